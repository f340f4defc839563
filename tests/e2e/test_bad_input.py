"""Bad input: each gets a clear error that names what and where, and everything goes on.

Where the peer behaves the same, its answers are recorded at run time and must be equal. During
every script a guest writes and verifies; at the end it must still go on.
"""

import asyncio
import json
import os
import time

from rig import images, transcript
from rig.cases import case
from rig.daemon import RawMonitor, Refused

SIZE = 16 * images.MIB
FILLED = images.blocks(SIZE) // 2


class Bench:
    """A daemon with an exported disk under a guest: the background of all scripts here."""

    async def start(self, world, *args):
        self.world = world
        self.a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
        self.d = await world.daemon(*args)
        await self.d.add_qcow2("node-A", self.a)
        self.guest = await world.guest(await self.d.export("node-A"), filled=FILLED)
        await self.guest.run(rate=800)
        self.before = self.d.mark()
        return self

    async def tell(self, name, arguments=None, **kw):
        """Executes a command that may be refused; the record keeps the answer."""
        try:
            return await self.d.cmd(name, arguments, **kw)
        except Refused as refusal:
            return refusal

    async def target(self, node, size=SIZE):
        path = await images.create(self.world.path(node + ".qcow2"), size)
        await self.d.add_qcow2(node, path)
        return path

    async def end(self):
        """The guest goes on, nothing is lost, the daemon lives."""
        record = list(self.d.record[self.before:])
        await self.guest.progress()
        await self.guest.stop()
        await self.guest.verify()
        await self.guest.end()
        await self.d.cmd("query-version")
        await self.d.quit()
        await images.check(self.a)
        return record


async def same_answers(world, script, *args):
    """Runs the script on both daemons; every reply must be equal."""
    lines = []
    for name, kind in (("x", world.kind), ("p", world.peer)):
        side = world.sub(name, kind)
        bench = await Bench().start(side, *args)
        answers = await script(bench)
        record = await bench.end()
        lines.append(answers if answers is not None
                     else transcript.replies(record, side.folder, numbers=False))
    assert lines[1], "the script recorded nothing"
    transcript.require_same(lines[0], lines[1], "answers")


# -- the text of QMP ----------------------------------------------------------------------------
async def raw_answers(bench, texts, negotiate=True):
    """What the monitor answers to each text, as lines."""
    lines = []
    async with RawMonitor(bench.world.path("raw.qmp")) as monitor:
        if negotiate:
            await monitor.say('{"execute":"qmp_capabilities"}')
        for n, text in enumerate(texts):
            data = text if isinstance(text, bytes) else text.encode()
            mark = f"mark-{n}"
            monitor.writer.write(data + b"\n")
            monitor.writer.write(b'{"execute":"query-version","id":"%s"}\n' % mark.encode())
            while True:
                message = await monitor.line()
                if "event" in message:
                    continue
                if message.get("id") == mark:
                    break
                if "return" in message:
                    message["return"] = "something"
                lines.append(f"{data[:60]!r} -> {json.dumps(message, sort_keys=True)}")
    return lines


# a second monitor, to be spoken byte by byte (the path is relative to the daemon's folder)
RAW = ("--chardev", "socket,id=mon1,path=raw.qmp,server=on,wait=off", "--monitor", "chardev=mon1")


@case("pair")
async def malformed_json_gets_the_error_of_the_peer(world):
    texts = ['{"execute": }', '}', ']', 'hello', '[1]', '"text"', '17', '{"execute" "x"}',
             '{"execute":"query-version",}', "{'execute':'query-version'}", '{}', '{"foo":1}',
             '{"execute":"query-version","foo":1}', '{"execute":5}', '{"execute":null}',
             '{"execute":"query-version","exec-oob":"query-version"}',
             '{"execute":"query-version","arguments":[]}',
             '{"execute":"query-version","arguments":5}',
             '{"execute":"query-version","arguments":null}',
             '{"execute":"query-version","id":{"deep":[1,null,"x"]}}',
             '{"execute":"query-version","id":null}',
             '{"execute":"no-such-command","id":7}', '{"execute":""}',
             '{"exec-oob":"query-version"}', '{"execute":"qmp_capabilities"}',
             '{"execute":"query-version"} {"execute":"query-commands"}', '', '   ']
    await same_answers(world, lambda b: raw_answers(b, texts), *RAW)


@case("pair")
async def before_negotiation_every_command_is_refused_as_the_peer_does(world):
    async def script(bench):
        lines = []
        async with RawMonitor(bench.world.path("raw.qmp")) as monitor:
            greeting = monitor.greeting["QMP"]
            lines.append(json.dumps([sorted(greeting), greeting["capabilities"],
                                     greeting["version"]["qemu"]]))
            for text in ('{"execute":"query-version"}', '{"execute":"no-such","id":1}',
                         '{"execute":"qmp_capabilities","arguments":{"enable":["foo"]}}',
                         '{"execute":"qmp_capabilities","arguments":{"x":1}}',
                         '{"execute":"qmp_capabilities","arguments":{"enable":[]}}',
                         '{"execute":"qmp_capabilities"}'):
                lines.append(json.dumps(await monitor.say(text), sort_keys=True))
        return lines
    await same_answers(world, script, *RAW)


@case("both")
async def hostile_bytes_do_not_end_the_monitor(world):
    bench = await Bench().start(world, *RAW)
    texts = [b"\xff", b'{"execute":"query-version\xff"}', b"[" * 1100 + b"]" * 1100,
             b'{"execute":"\x00"}', b'"\\ud800"', b"[" * 3000, b"\xff" * 100]
    for text in texts:
        async with RawMonitor(world.path("raw.qmp")) as monitor:
            monitor.writer.write(b'{"execute":"qmp_capabilities"}\n' + text + b"\xff\n")
            monitor.writer.write(b'{"execute":"query-version","id":"after"}\n')
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                message = await monitor.line()
                if message.get("id") == "after":
                    assert "return" in message, message
                    break
                assert "QMP" in message or "error" in message or "return" in message \
                    or "event" in message, message
    await bench.end()


@case("pair")
async def wrong_arguments_get_the_error_of_the_peer(world):
    async def script(b):
        file = {"driver": "file", "filename": b.world.path("x.qcow2")}
        for name, arguments in [
                ("no-such-command", None),
                ("blockdev-add", {}), ("blockdev-add", {"driver": "qcow2"}),
                ("blockdev-add", {"driver": "no-such-driver", "node-name": "x"}),
                ("blockdev-add", {"driver": 5, "node-name": "x"}),
                ("blockdev-add", {"driver": "qcow2", "node-name": "x"}),
                ("blockdev-add", {"driver": "qcow2", "node-name": "x", "file": "nowhere"}),
                ("blockdev-add", {"driver": "qcow2", "file": file}),
                ("blockdev-add", {"driver": "file", "node-name": "x"}),
                ("blockdev-add", {"driver": "file", "node-name": "x", "filename": 5}),
                ("blockdev-add", {"driver": "file", "node-name": "x", "filename": "f", "y": 1}),
                ("blockdev-add", {"driver": "file", "node-name": "x", "filename": "f",
                                  "read-only": "on"}),
                ("blockdev-add", {"driver": "file", "node-name": "1x", "filename": b.a}),
                ("blockdev-add", {"driver": "file", "node-name": "x" * 40, "filename": b.a}),
                ("blockdev-add", {"driver": "qcow2", "node-name": "node-A", "file": file}),
                ("blockdev-add", {"driver": "qcow2", "node-name": "x", "file": file,
                                  "backing": "nowhere"}),
                ("blockdev-del", {}), ("blockdev-del", {"node-name": "nowhere"}),
                ("blockdev-del", {"node-name": "node-A"}), ("blockdev-del", {"node-name": 1}),
                ("blockdev-snapshot-sync", {}),
                ("blockdev-snapshot-sync", {"snapshot-file": "f"}),
                ("blockdev-snapshot-sync", {"node-name": "node-A", "snapshot-file": "f"}),
                ("blockdev-snapshot-sync", {"node-name": "nowhere", "snapshot-file": "f",
                                            "snapshot-node-name": "y"}),
                ("blockdev-snapshot-sync", {"node-name": "node-A", "snapshot-file": 5}),
                ("blockdev-snapshot-sync", {"node-name": "node-A", "snapshot-file": "f",
                                            "snapshot-node-name": "y", "mode": "sideways"}),
                ("blockdev-snapshot-sync", {"node-name": "node-A", "snapshot-node-name": "node-A",
                                            "snapshot-file": "f"}),
                ("blockdev-mirror", {}),
                ("blockdev-mirror", {"device": "node-A", "target": "node-A", "sync": "full",
                                     "job-id": "j"}),
                ("blockdev-mirror", {"device": "node-A", "target": "nowhere", "sync": "full",
                                     "job-id": "j"}),
                ("blockdev-mirror", {"device": "nowhere", "target": "node-A", "sync": "full",
                                     "job-id": "j"}),
                ("blockdev-backup", {"device": "node-A", "target": "nowhere", "sync": "full",
                                     "job-id": "j"}),
                ("blockdev-backup", {"device": "node-A", "target": "node-A", "sync": "half",
                                     "job-id": "j"}),
                ("blockdev-backup", {"device": "node-A", "target": "node-A", "sync": "full",
                                     "job-id": "j", "speed": "fast"}),
                ("blockdev-backup", {"device": "node-A", "target": "node-A", "sync": "full",
                                     "job-id": "j", "x": 1}),
                ("transaction", {}), ("transaction", {"actions": 5}),
                ("transaction", {"actions": [5]}),
                ("transaction", {"actions": [{"type": "no-such", "data": {}}]}),
                ("transaction", {"actions": [{"type": "blockdev-snapshot-sync", "data": {}}]}),
                ("transaction", {"actions": [{"type": "blockdev-backup", "data": {}}]}),
                ("transaction", {"actions": []}),
                ("block-export-add", {}),
                ("block-export-add", {"type": "nbd", "id": "e"}),
                ("block-export-add", {"type": "nope", "id": "e", "node-name": "node-A"}),
                ("block-export-add", {"type": "nbd", "id": "e", "node-name": "nowhere"}),
                ("block-export-add", {"type": "nbd", "id": "exp-disk", "node-name": "node-A",
                                      "name": "other"}),
                ("block-export-add", {"type": "nbd", "id": "e", "node-name": "node-A",
                                      "name": "disk"}),
                ("block-export-add", {"type": "nbd", "id": "e", "node-name": "node-A",
                                      "writable": "yes"}),
                ("block-export-add", {"type": "nbd", "id": "-e", "node-name": "node-A"}),
                ("block-export-del", {}), ("block-export-del", {"id": "nowhere"}),
                ("block-export-del", {"id": "exp-disk"}),
                ("block-export-del", {"id": "exp-disk", "mode": "gently"}),
                ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "other.sock"}}}),
                ("nbd-server-start", {}),
                ("query-named-block-nodes", {"flat": 1}), ("quit", {"now": True})]:
            await b.tell(name, arguments)
    await same_answers(world, script)


@case("pair")
async def job_verbs_in_wrong_states_get_the_error_of_the_peer(world):
    async def script(b):
        for verb in ("complete", "cancel", "pause", "resume"):
            await b.tell("block-job-" + verb, {"device": "nobody"})
        for verb in ("finalize", "dismiss"):
            await b.tell("block-job-" + verb, {"id": "nobody"})
        for verb in ("complete", "cancel", "pause", "resume", "finalize", "dismiss"):
            await b.tell("job-" + verb, {"id": "nobody"})
        await b.tell("block-job-set-speed", {"device": "nobody", "speed": 1})
        await b.tell("block-job-change", {"id": "nobody", "type": "mirror",
                                          "copy-mode": "write-blocking"})
        await b.target("t")
        start = {"device": "node-A", "target": "t", "sync": "full", "job-id": "j", "speed": 1}
        await b.tell("blockdev-backup", {k: v for k, v in start.items() if k != "job-id"})
        await b.tell("blockdev-backup", dict(start, **{"job-id": "1bad"}))
        await b.tell("blockdev-backup", dict(start, speed=-1))
        since = b.d.mark()
        await b.tell("blockdev-mirror", start)
        await b.d.wait_event("JOB_STATUS_CHANGE", since=since, id="j", status="running")
        # a job id in use is refused; the peer meets "Need a root block node" before, ours does not
        await b.d.refused("blockdev-mirror", start, recorded=False)
        await b.tell("block-job-complete", {"device": "j"})
        await b.tell("job-complete", {"id": "j"})
        await b.tell("job-finalize", {"id": "j"})
        await b.tell("job-dismiss", {"id": "j"})
        await b.tell("block-job-dismiss", {"id": "j"})
        await b.tell("block-job-resume", {"device": "j"})
        await b.tell("block-job-set-speed", {"device": "j", "speed": -5})
        await b.tell("block-job-set-speed", {"device": "j", "speed": "x"})
        await b.tell("blockdev-del", {"node-name": "t"})
        await b.tell("job-pause", {"id": "j"})
        await b.d.wait_event("JOB_STATUS_CHANGE", since=since, id="j", status="paused")
        await b.tell("job-pause", {"id": "j"})
        await b.tell("block-job-pause", {"device": "j"})
        await b.tell("block-job-cancel", {"device": "j"})
        await b.tell("job-cancel", {"id": "j"})
        await b.d.job_gone("j", since=since)
        await b.tell("job-dismiss", {"id": "j"})
        await b.tell("blockdev-del", {"node-name": "t"})
    await same_answers(world, script)


# -- images that are not what they should be ----------------------------------------------------
def qcow2(path, node="x", **extra):
    return dict({"driver": "qcow2", "node-name": node,
                 "file": {"driver": "file", "filename": path}}, **extra)


@case("pair")
async def images_that_cannot_be_opened_are_refused_with_the_text_of_the_peer(world):
    async def script(b):
        p = b.world.path
        with open(p("text"), "wb") as f:
            f.write(b"no image at all\n" * 100)
        with open(p("empty"), "wb"):
            pass
        with open(p("short"), "wb") as f:
            f.write(b"QFI\xfb\0\0\0\3")
        os.mkdir(p("folder"))
        good = open(b.a, "rb").read(65536 * 4)
        for name, at, value in (("version", 4, b"\0\0\0\7"), ("cluster-bits", 20, b"\0\0\0\x30"),
                                ("unknown-bit", 72, b"\x40\0\0\0\0\0\0\0"),
                                ("header-length", 100, b"\xff\xff\xff\xf8"),
                                ("l1-size", 36, b"\x7f\xff\xff\xff"),
                                ("refcount-order", 96, b"\0\0\0\x20")):
            with open(p(name), "wb") as f:
                f.write(good[:at] + value + good[at + len(value):])
        for name in ("nowhere.qcow2", "nowhere/x.qcow2", "text", "empty", "short", "folder",
                     "version", "cluster-bits", "unknown-bit", "l1-size", "refcount-order",
                     "header-length"):
            await b.tell("blockdev-add", qcow2(p(name)))
        await b.tell("blockdev-add", {"driver": "file", "node-name": "x",
                                      "filename": p("nowhere.raw")})
        await b.tell("blockdev-add", {"driver": "raw", "node-name": "x",
                                      "file": {"driver": "file", "filename": p("nowhere")}})
        await images.create(p("base.qcow2"), SIZE)
        await images.create(p("orphan.qcow2"), SIZE, backing=p("base.qcow2"))
        os.unlink(p("base.qcow2"))
        await b.tell("blockdev-add", qcow2(p("orphan.qcow2")))
    await same_answers(world, script)


async def refusal(d, arguments, limit=2.0, command="blockdev-add"):
    """The text of a refusal that waits for nothing and takes less processor time than `limit`."""
    before = d.processor_seconds()
    error = await d.refused(command, arguments)
    took = d.processor_seconds() - before
    assert took < limit, f"the refusal took {took:.1f} s of processor time"
    return error[1]


@case("ours")
async def a_truncated_qcow2_is_refused_or_reads_errors_never_wrong_data(world):
    whole = await images.filled(world.path("whole.qcow2"), SIZE, FILLED)
    size = os.path.getsize(whole)
    b = await Bench().start(world)
    cluster = 65536
    for n, keep in enumerate((100, 512, cluster, cluster * 2, cluster * 3, cluster * 4,
                              size // 2 // cluster * cluster, (size - 1) // cluster * cluster)):
        path = world.path(f"cut{n}.qcow2")
        with open(whole, "rb") as source, open(path, "wb") as out:
            out.write(source.read(keep))
        answer = await b.tell("blockdev-add", qcow2(path, f"cut{n}"))
        if isinstance(answer, Refused):
            assert f"cut{n}" in answer.desc or path in answer.desc or "qcow2" in answer.desc, \
                answer.desc
            continue
        uri = await b.d.export(f"cut{n}", name=f"cut{n}", writable=False)
        reader = await world.guest(uri, filled=FILLED)
        try:
            await reader.ask("verify", tolerate=True)
        except AssertionError as problem:
            # an EIO is right, other bytes are not
            assert "Input/output error" in str(problem) or "ended" in str(problem), problem
        await reader.end()
    await b.end()


@case("ours")
async def backing_loops_fifos_and_deep_chains_are_refused_at_once(world):
    p = world.path
    b = await Bench().start(world)
    await images.create(p("self.qcow2"), SIZE)
    await images.tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", p("self.qcow2"),
                      "-F", "qcow2", p("self.qcow2"))
    text = await refusal(b.d, qcow2(p("self.qcow2")))
    assert "self.qcow2" in text, text
    for one, other in (("l1.qcow2", "l2.qcow2"), ("l2.qcow2", "l1.qcow2")):
        if not os.path.exists(p(one)):
            await images.create(p(one), SIZE)
        if not os.path.exists(p(other)):
            await images.create(p(other), SIZE)
        await images.tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", p(other),
                          "-F", "qcow2", p(one))
    text = await refusal(b.d, qcow2(p("l1.qcow2")))
    assert "l1.qcow2" in text or "l2.qcow2" in text, text
    os.mkfifo(p("fifo"))
    await images.create(p("onfifo.qcow2"), SIZE)
    await images.tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", p("fifo"), "-F", "raw",
                      p("onfifo.qcow2"))
    for arguments in (qcow2(p("onfifo.qcow2")),
                      {"driver": "file", "node-name": "f", "filename": p("fifo")}):
        text = await refusal(b.d, arguments)
        assert "fifo" in text, text
    await images.create(p("deep0.qcow2"), SIZE)
    for i in range(1, 301):
        with open(p("deep0.qcow2"), "rb") as source, open(p(f"deep{i}.qcow2"), "wb") as out:
            out.write(source.read())
    few = asyncio.Semaphore(4)
    await asyncio.gather(*[_rebase(few, p, i) for i in range(1, 301)])
    await refusal(b.d, qcow2(p("deep300.qcow2")))
    await b.end()


async def _rebase(few, p, i):
    async with few:
        await images.tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", p(f"deep{i - 1}.qcow2"),
                          "-F", "qcow2", p(f"deep{i}.qcow2"))


# -- references found in headers ----------------------------------------------------------------
async def outside(world):
    """An image in one folder whose header names a backing file in another one."""
    os.mkdir(world.path("in"))
    os.mkdir(world.path("out"))
    base = await images.filled(world.path("out", "base.qcow2"), SIZE, FILLED)
    return base, await images.create(world.path("in", "top.qcow2"), SIZE, backing=base)


@case("ours")
async def a_header_reference_outside_the_folder_is_refused_by_name(world):
    base, top = await outside(world)
    b = await Bench().start(world)
    text = await refusal(b.d, qcow2(top))
    for word in (base, "--allow-dir", "--header-refs"):
        assert word in text, f"{word} is not in the refusal: {text}"
    os.symlink(base, world.path("in", "link.qcow2"))
    linked = await images.create(world.path("in", "bylink.qcow2"), SIZE,
                                 backing=world.path("in", "link.qcow2"))
    await refusal(b.d, qcow2(linked))
    up = await images.create(world.path("in", "up.qcow2"), SIZE, backing="../out/base.qcow2")
    await refusal(b.d, qcow2(up))
    for n, reference in enumerate((
            'json:{"driver":"qcow2","file":{"driver":"file","filename":"' + base + '"}}',
            "nbd://127.0.0.1:1/x", "/dev/zero", "/etc/passwd")):
        path = await images.create(world.path("in", f"ref{n}.qcow2"), SIZE)
        await images.tool("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", reference,
                          "-F", "qcow2" if n == 0 else "raw", path)
        await refusal(b.d, qcow2(path))
    # what the caller names is no header reference
    await b.d.cmd("blockdev-add", qcow2(base, "base", **{"read-only": True}))
    await b.d.cmd("blockdev-add", qcow2(top, "top", backing="base"))
    await b.end()


@case("ours")
async def header_references_are_followed_where_the_options_allow_it(world):
    _, top = await outside(world)
    for args in (("--allow-dir", world.path("out")), ("--header-refs=any",)):
        side = world.sub("s" + str(len(args)), world.kind)
        d = await side.daemon(*args)
        await d.add_qcow2("top", top)
        reader = await side.guest(await d.export("top", writable=False), filled=FILLED)
        await reader.verify()
        await reader.end()
        await d.quit()
    side = world.sub("explicit", world.kind)
    inside = await images.create(world.path("out", "near.qcow2"), SIZE,
                                 backing=world.path("out", "base.qcow2"))
    d = await side.daemon("--header-refs=explicit")
    text = await refusal(d, qcow2(inside))
    assert "--header-refs" in text, text
    await d.quit()


@case("both")
async def a_backing_file_in_the_same_folder_opens_by_its_relative_name(world):
    await images.filled(world.path("base.qcow2"), SIZE, FILLED)
    top = await images.create(world.path("top.qcow2"), SIZE, backing="base.qcow2")
    d = await world.daemon()
    await d.add_qcow2("top", top)
    guest = await world.guest(await d.export("top"), filled=FILLED)
    await guest.run(count=200, rate=5000)
    await guest.finish()
    await guest.verify()
    await d.quit()


# -- second writers -----------------------------------------------------------------------------
@case("pair")
async def an_image_that_another_process_writes_is_refused_with_the_text_of_the_peer(world):
    async def script(b):
        path = await images.create(b.world.path("held.qcow2"), SIZE)
        holder = await asyncio.create_subprocess_exec(
            "qemu-io", "-f", "qcow2", path, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE)
        try:
            holder.stdin.write(b"length\n")
            await holder.stdin.drain()
            await asyncio.wait_for(holder.stdout.readline(), 10)
            await b.tell("blockdev-add", qcow2(path))
            await b.tell("blockdev-add", qcow2(path, **{"read-only": True}))
            await b.tell("blockdev-snapshot-sync", {
                "node-name": "node-A", "snapshot-file": path, "snapshot-node-name": "y",
                "mode": "existing"})
        finally:
            holder.stdin.close()
            await asyncio.wait_for(holder.wait(), 10)
        await b.tell("blockdev-add", qcow2(path))
    await same_answers(world, script)


@case("pair")
async def an_image_in_use_here_is_refused_to_other_processes(world):
    async def script(b):
        lines = []
        for argv in (["qemu-io", "-f", "qcow2", "-c", "write 0 4k", b.a],
                     ["qemu-img", "check", b.a], ["qemu-img", "info", b.a],
                     ["qemu-img", "convert", "-O", "raw", b.a, b.world.path("copy.raw")],
                     ["qemu-img", "resize", b.a, "+1M"],
                     ["qemu-img", "info", "-U", b.a]):
            code, _, err = await images.tool(*argv, check=False)
            lines.append(f"{argv[:2]} {code} " + err.replace(b.world.folder, "FOLDER"))
        assert 'Failed to get "write" lock' in lines[0], lines[0]
        assert 'Failed to get shared "write" lock' in lines[2], lines[2]
        return lines
    await same_answers(world, script)


@case("both")
async def a_second_daemon_on_the_same_image_is_refused_and_the_first_goes_on(world):
    b = await Bench().start(world)
    second = await world.daemon(name="second")
    error = await second.refused("blockdev-add", qcow2(b.a))
    assert 'Failed to get "write" lock' in error[1], error
    await second.quit()
    await b.end()


@case("both")
async def two_nodes_on_one_file_in_one_daemon_do_not_write_together(world):
    b = await Bench().start(world)
    answer = await b.tell("blockdev-add", qcow2(b.a, "twin"))
    if not isinstance(answer, Refused):
        answer = await b.tell("block-export-add", {
            "type": "nbd", "id": "twin", "node-name": "twin", "name": "twin", "writable": True})
    assert isinstance(answer, Refused), "two writers of one file were accepted"
    await b.end()
