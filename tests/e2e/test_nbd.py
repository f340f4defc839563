"""NBD with real clients: libnbd's tools and library, qemu-img, qemu-io, and bare sockets."""

import asyncio
import json
import os
import re
import socket
import struct
import sys

import nbd

from rig import images, transcript
from rig.cases import case
from rig.pattern import BLOCK, sequence_of

SIZE = 32 * images.MIB
FILLED = images.blocks(SIZE) // 2


async def served(world, writable=True, **export):
    """A chain base <- top, exported as `disk`; returns (daemon, uri, path of top)."""
    await images.filled(world.path("base.qcow2"), SIZE, FILLED)
    top = await images.create(world.path("top.qcow2"), SIZE, backing=world.path("base.qcow2"))
    await images.tool("qemu-io", "-f", "qcow2", "-c", "write -P 0x11 1M 1M", "-c",
                      "write -z 4M 1M", "-c", "write -P 0x22 20M 192k", top)
    d = await world.daemon()
    await d.add_qcow2("top", top, discard="unmap")
    await d.cmd("block-export-add", dict({"type": "nbd", "id": "e", "node-name": "top",
                                          "name": "disk", "writable": writable}, **export))
    return d, d.uri(), top


async def pairwise(world, script):
    """The script's lines for both daemons must be equal."""
    lines = []
    for name, kind in (("x", world.kind), ("p", world.peer)):
        side = world.sub(name, kind)
        lines.append([line.replace(side.folder, "FOLDER") for line in await script(side)])
    assert lines[1], "the script recorded nothing"
    transcript.require_same(lines[0], lines[1], "NBD answers")


def connect(uri, strict=True):
    h = nbd.NBD()
    h.add_meta_context("base:allocation")
    if not strict:
        h.set_strict_mode(0)
    h.connect_uri(uri)
    return h


def outcome(function, *args):
    """What a call does, as text: `ok` or the errno's name."""
    try:
        function(*args)
        return "ok"
    except nbd.Error as problem:
        return problem.errno or f"error: {problem.string}"


# -- what the server announces ------------------------------------------------------------------
@case("pair")
async def nbdinfo_sees_the_flags_and_contexts_of_the_peer(world):
    async def script(side):
        lines = []
        for writable in (True, False):
            one = side.sub(f"w{writable}", side.kind)
            d, uri, _ = await served(one, writable=writable, description="a disk of the test")
            _, out, _ = await images.tool("nbdinfo", "--json", uri)
            info = json.loads(out)
            for export in info["exports"]:
                export.pop("uri", None)
                export.pop("content", None)
            lines += json.dumps(info, indent=1, sort_keys=True).split("\n")
            _, out, _ = await images.tool("nbdinfo", "--list", "--json",
                                          uri.replace("/disk", "/"))
            lines += [f"{e['export-name']}: {e.get('description')}"
                      for e in json.loads(out)["exports"]]
            await d.quit()
        return lines
    await pairwise(world, script)


@case("pair")
async def block_status_of_a_chain_is_that_of_the_peer(world):
    async def script(side):
        d, uri, _ = await served(side)
        _, out, _ = await images.tool("nbdinfo", "--map", uri)
        lines = out.splitlines()
        h = connect(uri)
        extents = []
        h.block_status(SIZE, 0, lambda ctx, off, entries, err: extents.append(
            (ctx, off, list(entries))) or 0, nbd.CMD_FLAG_REQ_ONE)
        lines += [str(e) for e in extents]
        h.shutdown()
        await d.quit()
        return lines
    await pairwise(world, script)


# -- commands -----------------------------------------------------------------------------------
def every_command(h):
    """Each command with each flag, with what it answers and what the disk reads after."""
    lines = []

    def note(what, function, *args):
        lines.append(f"{what}: {outcome(function, *args)}")

    data = bytearray(os.urandom(8192))
    note("write", h.pwrite, data, 4096)
    note("write FUA", h.pwrite, data, 65536, nbd.CMD_FLAG_FUA)
    lines.append(f"reads back: {h.pread(8192, 4096) == data and h.pread(8192, 65536) == data}")
    note("write unaligned", h.pwrite, bytearray(b"x" * 1000), 333)
    lines.append(f"neighbours: {h.pread(3, 331).hex()} {h.pread(4, 1331)[:2].hex()}")
    note("zero", h.zero, 65536, 131072)
    note("zero NO_HOLE", h.zero, 65536, 262144, nbd.CMD_FLAG_NO_HOLE)
    note("zero FUA", h.zero, 4096, 393216, nbd.CMD_FLAG_FUA)
    note("zero FAST_ZERO", h.zero, 65536, 524288, nbd.CMD_FLAG_FAST_ZERO)
    note("zero unaligned", h.zero, 777, 131)
    for at in (131072, 262144, 393216):
        lines.append(f"zero at {at}: {h.pread(4096, at) == bytes(4096)}")
    note("trim", h.trim, 1 << 20, 1 << 20)
    note("trim FUA", h.trim, 65536, 4 << 20, nbd.CMD_FLAG_FUA)
    note("trim unaligned", h.trim, 1000, 5000)
    lines.append(f"after trim: {h.pread(4096, 1 << 20) == bytes(4096)}")
    note("cache", h.cache, 1 << 20, 0)
    note("flush", h.flush)
    parts = []
    buffer = h.pread_structured(1 << 20, 4 << 20, lambda part, off, status, err: parts.append(
        (off, status)) or 0)
    lines.append(f"sparse read: {len(buffer)} {sorted(parts)}")
    buffer = h.pread_structured(65536, 0, lambda *a: 0, nbd.CMD_FLAG_DF)
    lines.append(f"read DF: {len(buffer)}")
    size = h.get_size()
    for what, call in (
            ("read", lambda n, at: h.pread(n, at)),
            ("write", lambda n, at: h.pwrite(bytearray(n), at)),
            ("zero", lambda n, at: h.zero(n, at)), ("trim", lambda n, at: h.trim(n, at)),
            ("cache", lambda n, at: h.cache(n, at)),
            ("status", lambda n, at: h.block_status(n, at, lambda *a: 0))):
        note(f"{what} across the end", call, 8192, size - 4096)
        note(f"{what} after the end", call, 4096, size + 4096)
        note(f"{what} of nothing", call, 0, 0)
        note(f"{what} last block", call, 4096, size - 4096)
    note("write 32 MiB", h.pwrite, bytearray(SIZE), 0)
    note("unknown flag", h.pwrite, bytearray(512), 0, 1 << 9)
    note("flush at the end", h.flush)
    return lines


@case("pair")
async def every_command_and_flag_answers_as_the_peer_does(world):
    async def script(side):
        d, uri, top = await served(side)
        h = connect(uri, strict=False)
        lines = every_command(h)
        h.shutdown()
        await d.quit()
        await images.check(top)
        return lines + [await images.digest(top)]
    await pairwise(world, script)


@case("pair")
async def a_read_only_export_refuses_every_change_as_the_peer_does(world):
    async def script(side):
        d, uri, _ = await served(side, writable=False)
        h = connect(uri, strict=False)
        lines = [outcome(h.pwrite, bytearray(512), 0), outcome(h.zero, 512, 0),
                 outcome(h.trim, 512, 0), outcome(h.flush), outcome(h.pread, 512, 0)]
        h.shutdown()
        await d.quit()
        return lines
    await pairwise(world, script)


# -- negotiation --------------------------------------------------------------------------------
@case("pair")
async def unknown_export_names_are_refused_as_the_peer_does(world):
    async def script(side):
        d, uri, _ = await served(side)
        lines = []
        for name in ("nowhere", "", "x" * 4096):
            h = nbd.NBD()
            h.set_opt_mode(True)
            h.connect_uri(uri)
            h.set_export_name(name)
            lines.append(f"info: {outcome(h.opt_info)}")
            text = ""
            try:
                h.opt_go()
            except nbd.Error as problem:
                text = re.sub(r"x{9,}", "xxx", problem.string)
            lines.append("go: " + text)
            h.opt_abort()
        await d.quit()
        return lines
    await pairwise(world, script)


class BareClient:
    """A client spoken byte by byte: old style of asking, halves of requests."""

    def __init__(self, path):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.settimeout(10)
        self.s.connect(path)
        magic, opt, self.flags = struct.unpack(">8s8sH", self.take(18))
        assert (magic, opt) == (b"NBDMAGIC", b"IHAVEOPT")

    def take(self, count):
        data = b""
        while len(data) < count:
            chunk = self.s.recv(count - len(data))
            if not chunk:
                raise EOFError(f"the server closed after {len(data)} of {count} bytes")
            data += chunk
        return data

    def begin(self, flags):
        self.s.sendall(struct.pack(">I", flags))

    def option(self, number, data=b""):
        self.s.sendall(struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data)

    def export_name(self, name):
        self.option(1, name.encode())
        return struct.unpack(">QH", self.take(10))

    def request(self, kind, cookie, offset, length, payload=b"", flags=0):
        self.s.sendall(struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length)
                       + payload)

    def simple_reply(self):
        magic, error, cookie = struct.unpack(">IIQ", self.take(16))
        assert magic == 0x67446698, hex(magic)
        return error, cookie


@case("pair")
async def the_old_export_name_option_works_as_with_the_peer(world):
    async def script(side):
        d, _, _ = await served(side)
        lines = []
        for flags in (3, 1):
            c = BareClient(d.nbd_path)
            lines.append(f"handshake flags {c.flags}")
            c.begin(flags)
            lines.append(f"size and flags {c.export_name('disk')}")
            if not flags & 2:
                lines.append(f"padding is zero: {c.take(124) == bytes(124)}")
            c.request(0, 77, 0, 4096)
            lines.append(f"read {c.simple_reply()} {c.take(4096)[:8]}")
            c.request(1, 78, 8192, 512, bytes(512))
            lines.append(f"write {c.simple_reply()}")
            c.request(3, 79, 0, 0)
            lines.append(f"flush {c.simple_reply()}")
            c.request(99, 80, 0, 0)
            lines.append(f"unknown command {c.simple_reply()}")
            c.request(2, 81, 0, 0)
            try:
                c.take(1)
                lines.append("more")
            except EOFError:
                lines.append("closed after DISC")
        c = BareClient(d.nbd_path)
        c.begin(3)
        try:
            c.export_name("nowhere")
            lines.append("accepted")
        except (EOFError, ConnectionResetError):
            lines.append("unknown name: closed")
        c = BareClient(d.nbd_path)
        c.begin(3)
        c.option(4242, b"what")
        lines.append(f"unknown option {c.take(20).hex()}")
        c.option(2)
        lines.append(f"abort {c.take(20).hex()}")
        await d.quit()
        return lines
    await pairwise(world, script)


# -- copies through the tools -------------------------------------------------------------------
@case()
async def nbdcopy_and_qemu_img_copy_in_and_out(world):
    source = world.path("random.raw")
    with open(source, "wb") as f:
        f.write(os.urandom(8 * images.MIB))
        f.truncate(20 * images.MIB)
        f.seek(20 * images.MIB)
        f.write(os.urandom(12 * images.MIB))
    d, uri, top = await served(world)
    await images.tool("nbdcopy", "--flush", source, uri)
    out = world.path("out.raw")
    await images.tool("nbdcopy", uri, out)
    await images.identical(source, out, "raw", "raw")
    await images.tool("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, world.path("q.raw"))
    await images.identical(source, world.path("q.raw"), "raw", "raw")
    with open(source, "r+b") as f:
        f.seek(3 * images.MIB)
        f.write(os.urandom(images.MIB))
    await images.tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri)
    await images.identical(source, uri, "raw", "raw")
    await images.tool("qemu-io", "-f", "raw", "-c", "write -P 0x5a 1M 64k", "-c",
                      "read -P 0x5a 1M 64k", "-c", "write -z 2M 64k", "-c", "read -P 0 2M 64k",
                      "-c", "discard 3M 64k", "-c", "flush", uri)
    await d.quit()
    await images.check(top)


@case()
async def nbdsh_and_fio_style_clients_work_over_tcp(world):
    d = await world.daemon(nbd=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    await d.cmd("nbd-server-start", addr={"type": "inet", "data": {
        "host": "127.0.0.1", "port": str(port)}})
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    await d.add_qcow2("a", a)
    await d.export("a")
    uri = f"nbd://127.0.0.1:{port}/disk"
    _, out, _ = await images.tool(sys.executable, "-m", "nbd", "-u", uri,
                                  "-c", "print(h.get_size())",
                                  "-c", "h.pwrite(b'y' * 512, 0, nbd.CMD_FLAG_FUA)",
                                  "-c", "print(h.pread(2, 0))")
    assert out.split("\n")[0] == str(SIZE) and "yy" in out, out
    guest = await world.guest(uri, filled=FILLED)
    await guest.run(count=300, rate=5000, region=[100, 4000])
    await guest.finish()
    await d.quit()
    await images.check(a)


@case(timeout=120)
async def fio_verifies_a_disk_that_is_mirrored_under_it(world):
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    e = await images.create(world.path("e.qcow2"), SIZE)
    d = await world.daemon()
    await d.add_qcow2("a", a)
    await d.add_qcow2("e", e)
    uri = await d.export("a")
    fio = asyncio.create_task(images.tool(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randrw", "--bs=4k,16k",
        "--size=24m", "--io_size=48m", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1",
        "--verify_backlog=256", "--verify_state_save=0",
        "--output-format=terse", timeout=100))
    await d.cmd("blockdev-mirror", device="a", target="e", sync="full", job_id="j",
                speed=16 * images.MIB)
    await d.wait_event("BLOCK_JOB_READY", device="j")
    await d.cmd("block-job-complete", device="j")
    await d.wait_event("BLOCK_JOB_COMPLETED", device="j")
    await fio
    await d.quit()
    await images.check(e)


# -- several clients ----------------------------------------------------------------------------
@case()
async def several_connections_share_one_disk_and_one_flush(world):
    d, uri, top = await served(world)
    one, other, third = (connect(uri) for _ in range(3))
    assert one.can_multi_conn()
    data = bytearray(os.urandom(65536))
    one.pwrite(data, 7 << 20)
    assert other.pread(65536, 7 << 20) == data
    third.flush()
    for h in (one, other, third):
        h.shutdown()
    await d.kill9()
    await images.check(top, leaks_allowed=True)
    raw = await images.dump(top, world.path("raw"))
    with open(raw, "rb") as f:
        f.seek(7 << 20)
        assert f.read(65536) == data, "a flush on one connection did not cover another's write"


@case()
async def four_guests_write_regions_of_one_disk_at_once(world):
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    d = await world.daemon()
    await d.add_qcow2("a", a)
    uri = await d.export("a")
    guests = []
    for i in range(4):
        guest = await world.guest(uri, seed=i, filled=FILLED)
        # odd borders: two guests write one cluster
        await guest.run(count=300, rate=2000, shared=True,
                        region=[i * 2000 + 3, i * 2000 + 2003])
        guests.append(guest)
    logs = []
    for guest in guests:
        await guest.finish()
        await guest.verify()
        logs.append(await guest.log())
        await guest.end()
    await d.quit()
    await images.check(a)
    raw = await images.dump(a, world.path("raw"))
    for i, log in enumerate(logs):
        table = log.by_block(0)
        with open(raw, "rb") as f:
            for block, history in table.items():
                f.seek(block * BLOCK)
                assert sequence_of(f.read(BLOCK), 0, block) == history[-1][0], (i, block)


@case()
async def a_client_killed_in_the_middle_of_its_writes_harms_nobody(world):
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    d = await world.daemon()
    await d.add_qcow2("a", a)
    uri = await d.export("a")
    half = images.blocks(SIZE) // 2
    steady = await world.guest(uri, seed=1, filled=FILLED)
    await steady.run(rate=1500, region=[0, half - 100], shared=True)
    for turn in range(4):
        doomed = await world.guest(uri, seed=10 + turn, filled=FILLED)
        await doomed.run(rate=20000, depth=32, max_run=64, check=False,
                         region=[half, half * 2])
        await doomed.progress(50 * (turn + 1))
        await doomed.end()
        c = BareClient(d.nbd_path)
        c.begin(3)
        c.export_name("disk")
        # a write of 1 MiB of which 100,000 bytes are sent
        c.request(1, 5, (half + 16) * BLOCK, 1 << 20, b"\0" * 100000)
        c.s.close()
        await steady.progress()
    await steady.stop()
    log = await steady.log()
    await steady.end()
    # every request of the dead is over: the export can be removed
    await d.cmd("block-export-del", id="exp-disk", mode="hard")
    await d.wait_event("BLOCK_EXPORT_DELETED", id="exp-disk")
    await d.quit()
    await images.check(a)
    raw = await images.dump(a, world.path("raw"))
    with open(raw, "rb") as f:
        for block in range(images.blocks(SIZE)):
            sequence_of(f.read(BLOCK), 0, block)
    table = log.by_block(0)
    with open(raw, "rb") as f:
        for block, history in table.items():
            f.seek(block * BLOCK)
            assert sequence_of(f.read(BLOCK), 0, block) == history[-1][0], block


@case("both")
async def removing_an_export_under_a_client_says_so_and_hard_removal_ends_it(world):
    d, uri, _ = await served(world)
    h = connect(uri)
    error = await d.refused("block-export-del", id="e")
    assert error == ("GenericError", "export 'e' still in use"), error
    assert outcome(h.pread, 512, 0) == "ok"
    await d.cmd("block-export-del", id="e", mode="hard")
    await d.wait_event("BLOCK_EXPORT_DELETED", id="e")
    assert outcome(h.pread, 512, 0) != "ok"
    await d.cmd("blockdev-del", node_name="top")
    await d.quit()


@case("both")
async def thirty_idle_connections_do_not_stop_a_guest_or_the_end(world):
    d, uri, top = await served(world)
    idle = []
    for _ in range(30):
        s = socket.socket(socket.AF_UNIX)
        s.connect(d.nbd_path)
        idle.append(s)
    h = connect(uri)
    assert outcome(h.pwrite, bytearray(4096), 0) == "ok"
    await d.quit()
    for s in idle:
        s.close()
    await images.check(top)
