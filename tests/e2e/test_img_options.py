"""Options of `liveblk img` that read another thing, or read it in another way, beside qemu-img."""

import asyncio
import os
import pty
import time

from rig.cases import case
from rig.images import tool

MIB = 1 << 20


async def img(world, *words):
    return await tool(world.liveblk(), "img", *words, check=False)


async def good(world, *words):
    code, out, err = await img(world, *words)
    assert code == 0, f"img {' '.join(words)} ended with {code}: {out}{err}"
    return out


async def peer(*words):
    return await tool("qemu-img", *words, check=False)


async def same(one, other, fmt):
    code, out, err = await peer("compare", "-f", "raw", "-F", fmt, one, other)
    assert code == 0, f"{one} {other}: {out}{err}"


LAYOUTS = ["compat=v2", "cluster_size=4k", "extended_l2=on,cluster_size=128k", "cluster_size=512",
           "compression_type=zstd"]


@case(on="ours", timeout=240)
async def img_convert_reads_snapshots_as_the_peer_does(world):
    base, disk = world.path("base"), world.path("disk")
    theirs, ours = world.path("theirs"), world.path("ours")
    await tool("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    await tool("qemu-io", "-c", "write -P 5 0 1M", base)
    for options in LAYOUTS:
        for below in ("", f",backing_file={base},backing_fmt=qcow2"):
            await tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options + below, disk, "1M")
            await tool("qemu-io", "-c", "write -P 1 0 300k", "-c", "write -c -P 3 512k 128k", "-c",
                       "write -P 2 768k 70000", "-c", "write -z 400k 50k", disk)
            await tool("qemu-img", "snapshot", "-c", "one", disk)
            await tool("qemu-io", "-c", "write -P 9 100k 300k", "-c", "write -P 8 512k 64k", disk)
            await tool("qemu-img", "snapshot", "-c", "two", disk)
            await tool("qemu-io", "-c", "write -P 7 0 1M", disk)
            for which in ("one", "2", "snapshot.id=1,snapshot.name=one"):
                await tool("qemu-img", "convert", "-l", which, "-O", "raw", disk, theirs)
                await good(world, "convert", "-l", which, "-O", "raw", disk, ours)
                with open(theirs, "rb") as one, open(ours, "rb") as two:
                    assert one.read() == two.read(), f"{options}{below} {which}"
                await good(world, "convert", "-l", which, "-c", "-O", "qcow2", disk, ours)
                await same(theirs, ours, "qcow2")


@case(on="ours")
async def img_convert_gives_a_snapshot_the_size_that_the_disk_had(world):
    """The peer cuts a snapshot to the size that the disk has now; what was behind it is lost."""
    disk, applied = world.path("disk"), world.path("applied")
    await tool("qemu-img", "create", "-q", "-f", "qcow2", disk, "4M")
    await tool("qemu-io", "-c", "write -P 1 0 4M", disk)
    await tool("qemu-img", "snapshot", "-c", "large", disk)
    await tool("qemu-img", "resize", "-q", "--shrink", disk, "1M")
    await tool("qemu-img", "snapshot", "-c", "small", disk)
    await tool("qemu-img", "resize", "-q", disk, "6M")
    for name in ("large", "small"):
        await tool("cp", disk, applied)
        await tool("qemu-img", "snapshot", "-a", name, applied)
        await tool("qemu-img", "convert", "-O", "raw", applied, world.path("theirs"))
        await good(world, "convert", "-l", name, "-O", "raw", disk, world.path("ours"))
        with open(world.path("theirs"), "rb") as one, open(world.path("ours"), "rb") as two:
            assert one.read() == two.read(), name


@case(on="ours")
async def img_convert_copies_bitmaps_with_their_bits_and_flags(world):
    disk, target = world.path("disk"), world.path("target")
    await tool("qemu-img", "create", "-q", "-f", "qcow2", disk, "4M")
    await tool("qemu-img", "bitmap", "--add", "-g", "32k", disk, "on")
    await tool("qemu-io", "-c", "write -P 1 0 1M", "-c", "write -P 2 3M 512k", disk)
    await tool("qemu-img", "bitmap", "--add", "--disable", "--merge", "on", disk, "off")
    await good(world, "convert", "--bitmaps", "-O", "qcow2", disk, target)
    assert (await peer("check", target))[0] == 0
    assert await bits(target, "on") == await bits(disk, "on") != []
    assert await bits(target, "off") == await bits(disk, "off")
    info = (await peer("info", target))[1]
    assert "auto" in info and "granularity: 32768" in info and "name: off" in info, info
    refused = [
        (["-O", "raw", disk], "does not support bitmaps"),
        (["-O", "qcow2", "-o", "compat=v2", disk], "does not support bitmaps"),
        (["-O", "qcow2", disk, disk], "only possible with single source"),
    ]
    for words, part in refused:
        code, _, err = await img(world, "convert", "--bitmaps", *words, world.path("new"))
        assert code == 1 and part in err and not os.path.exists(world.path("new")), err
    code, _, err = await img(world, "convert", "--bitmaps", "-n", "-O", "qcow2", disk, target)
    assert code == 1 and "Bitmap already exists" in err, err
    spoil(disk)
    code, _, err = await img(world, "convert", "--bitmaps", "-O", "qcow2", disk, world.path("new"))
    assert code == 1 and "Cannot copy inconsistent bitmap" in err, err
    code, _, err = await img(world, "convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2",
                             disk, world.path("new"))
    assert code == 0 and "Skipping inconsistent bitmap" in err, err


async def bits(path, name):
    """Where the bitmap is dirty, as the peer's map of an export tells it."""
    socket = path + ".sock"
    process = await asyncio.create_subprocess_exec(
        "qemu-nbd", "-r", "-f", "qcow2", "-B", name, "-k", socket, path)
    try:
        for _ in range(200):
            if os.path.exists(socket):
                break
            await asyncio.sleep(0.05)
        _, out, _ = await tool("nbdinfo", f"--map=qemu:dirty-bitmap:{name}",
                               f"nbd+unix:///?socket={socket}")
        return out.split()
    finally:
        if process.returncode is None:
            try:
                process.terminate()
            except ProcessLookupError:
                pass
        await process.wait()


def spoil(path):
    """Says in the first entry of the bitmap directory that the bitmap was not stored."""
    with open(path, "r+b") as file:
        head = file.read(65536)
        at = head.index(b"\x23\x85\x28\x75")
        directory = int.from_bytes(head[at + 24:at + 32], "big")
        file.seek(directory + 15)
        flags = file.read(1)[0]
        file.seek(directory + 15)
        file.write(bytes([flags | 1]))


@case(on="ours")
async def img_takes_images_by_their_options(world):
    disk, raw = world.path("disk"), world.path("raw")
    await tool("qemu-img", "create", "-q", "-f", "qcow2", disk, "4M")
    await tool("qemu-io", "-c", "write -P 1 0 1M", disk)
    await tool("qemu-img", "convert", "-O", "raw", disk, raw)
    named = f"driver=qcow2,file.driver=file,file.filename={disk},l2-cache-size=1048576"
    short = f"driver=raw,file.filename={raw}"
    for words in (["info"], ["map"], ["check"], ["info", "--output=json"]):
        assert await good(world, *words, "--image-opts", named) == await good(world, *words, disk)
    await good(world, "compare", "--image-opts", named, short)
    await good(world, "convert", "--image-opts", named, "-O", "raw", world.path("copy"))
    await same(raw, world.path("copy"), "raw")
    part = f"driver=raw,offset=512,size=1024,file.filename={raw}"
    await good(world, "convert", "--image-opts", part, world.path("part"))
    assert os.path.getsize(world.path("part")) == 1024
    await good(world, "convert", "-n", "--target-image-opts", disk, short)
    await good(world, "resize", "-q", "--image-opts", named, "8M")
    await good(world, "snapshot", "--image-opts", "-c", "one", named)
    await good(world, "bitmap", "--image-opts", "--add", named, "b0")
    refused = [
        (["info", "--image-opts", "-f", "qcow2", named], "mutually exclusive"),
        (["info", "--image-opts", named + ",foo=1"], "foo"),
        (["info", "--image-opts", "driver=qcow2"], "file"),
        (["info", "--image-opts", f"driver=zz,file.filename={disk}"], "zz"),
        (["info", "--image-opts", disk], disk),
        (["info", "--object", "secret,id=s,data=x", disk], "encrypted"),
        (["convert", "--target-image-opts", disk, short], "requires use of -n"),
        (["info", "--image-opts", f"{named},l2-cache-entry-size=3"], "power of two"),
    ]
    for words, part in refused:
        code, out, err = await img(world, *words)
        assert code == 1 and part in err and "panicked" not in err, f"{words}: {code} {out}{err}"


@case(on="ours")
async def img_convert_salvages_what_can_be_read(world):
    broken, target = world.path("broken"), world.path("target")
    await tool("qemu-img", "create", "-q", "-f", "qcow2", broken, "1M")
    await tool("qemu-io", "-c", "write -P 1 0 1M", broken)
    # An entry that leads behind the end of the file: the cluster is lost.
    with open(broken, "r+b") as file:
        file.seek(40)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        table = int.from_bytes(file.read(8), "big") & ~(1 << 63)
        file.seek(table + 3 * 8)
        file.write((1 << 63 | 64 * MIB).to_bytes(8, "big"))
    code, _, err = await img(world, "convert", "-O", "raw", broken, target)
    assert code == 1 and not os.path.exists(target), err
    code, _, err = await img(world, "convert", "--salvage", "-O", "raw", broken, target)
    assert code == 0 and "warning: error while reading" in err, (code, err)
    with open(target, "rb") as file:
        content = file.read()
    assert content == b"\1" * 196608 + b"\0" * 65536 + b"\1" * (MIB - 262144)
    code, _, err = await img(world, "convert", "--salvage", "-q", "-O", "raw", broken, target)
    assert (code, err) == (0, ""), err


@case(on="ours")
async def img_convert_keeps_to_a_rate(world):
    disk = world.path("disk")
    await tool("qemu-img", "create", "-q", "-f", "qcow2", disk, "8M")
    await tool("qemu-io", "-c", "write -P 1 0 8M", disk)
    start = time.monotonic()
    await good(world, "convert", "-r", "4M", "-O", "raw", disk, world.path("slow"))
    assert time.monotonic() - start > 1.2
    await same(world.path("slow"), disk, "qcow2")
    for words, part in ((["-r", "x"], "'x'"), (["-r", "16E"], "between 0"),
                        (["-S", "513"], "multiples of 512"), (["-S", "2G"], "multiples of 512"),
                        (["-C", "-S", "4k"], "-S"), (["-C", "-c"], "-c"),
                        (["-C", "--salvage"], "salvaging")):
        code, _, err = await img(world, "convert", *words, "-O", "qcow2", disk, world.path("x"))
        assert code == 1 and part in err and not os.path.exists(world.path("x")), f"{words} {err}"


@case(on="ours")
async def img_shows_progress_on_a_terminal_and_percentages_if_asked_elsewhere(world):
    disk = world.path("disk")
    await tool("qemu-img", "create", "-q", "-f", "qcow2", disk, "8M")
    await tool("qemu-io", "-c", "write -P 1 0 8M", disk)
    words = ["convert", "-O", "raw", disk, world.path("copy")]
    code, out, err = await img(world, *words)
    assert (code, out, err) == (0, "", "")
    code, out, err = await img(world, words[0], "-p", *words[1:])
    assert code == 0 and out.endswith("    (100.00/100%)\r\n") and not err, (out, err)
    assert (await img(world, words[0], "-p", "-q", *words[1:]))[1:] == ("", "")
    for flags, shows in (([], True), (["-q"], False)):
        main, side = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            world.liveblk(), "img", words[0], "-r", "8M", *flags, *words[1:], stderr=side)
        os.close(side)
        seen = await asyncio.get_running_loop().run_in_executor(None, drained, main)
        assert await process.wait() == 0 and (b"%" in seen) is shows, seen


def drained(terminal):
    seen = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:
            part = b""
        if not part:
            os.close(terminal)
            return seen
        seen += part
