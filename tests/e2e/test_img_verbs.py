"""The verbs of `liveblk img` beside qemu-img: exit codes, JSON, refusals, what a failure leaves.
"""

import asyncio
import json
import os
import signal

from rig.cases import case
from rig.images import tool
from rig.img_matrix import plain_info

MIB = 1 << 20


async def img(world, *words):
    return await tool(world.liveblk(), "img", *words, check=False)


async def good(world, *words):
    code, out, err = await img(world, *words)
    assert code == 0, f"img {' '.join(words)} ended with {code}: {out}{err}"
    return out


async def peer(*words):
    return await tool("qemu-img", *words, check=False)


async def written(path, *commands, size="1M", options="cluster_size=65536"):
    await tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
    words = [word for command in commands for word in ("-c", command)]
    if words:
        await tool("qemu-io", *words, path)
    return path


@case(on="ours")
async def img_compare_has_the_exit_codes_and_texts_of_the_peer(world):
    one = await written(world.path("one"), "write -P 1 0 64k")
    same = await written(world.path("same"), "write -P 1 0 64k", size="2M")
    other = await written(world.path("other"), "write -P 1 0 64k", "write -P 2 70000 1")
    zero = await written(world.path("zero"), "write -P 1 0 64k", "write -z 70000 1")
    longer = await written(world.path("longer"), "write -P 1 0 64k", "write -P 3 1100k 4k",
                           size="2M")
    for first, second in ((one, same), (one, other), (other, one), (one, zero), (one, longer),
                          (longer, one), (one, one)):
        for flags in ([], ["-q"]):
            ours = await img(world, "compare", *flags, first, second)
            theirs = await peer("compare", *flags, first, second)
            assert ours[:2] == theirs[:2], f"{first} {second} {flags}: {ours} {theirs}"
    for words in (["-s", one, same], ["-s", one, zero]):
        code, out, _ = await img(world, "compare", *words)
        assert code == 1 and out.startswith("Strict mode: "), out
    code, out, err = await img(world, "compare", one, world.path("nope"))
    assert code == 2 and not out and "No such file or directory" in err, (code, out, err)
    assert err.startswith("liveblk img: Could not open '"), err
    code, _, _ = await img(world, "compare", one)
    assert code == 2, "a wrong command line is not a difference"
    out = await good(world, "compare", "--json", one, zero)
    assert json.loads(out)["identical"] is True


@case(on="ours")
async def img_check_has_the_exit_codes_and_numbers_of_the_peer(world):
    clean = await written(world.path("clean"), "write -P 1 0 192k", "write -c 256k 64k")
    leak = await written(world.path("leak"))
    corrupt = await written(world.path("corrupt"), "write -P 1 0 192k")
    os.truncate(leak, 512 << 10)
    poke(leak, 131072 + 2 * 5, b"\0\1")
    poke(corrupt, 131072 + 2 * 5, b"\0\0")
    raw = world.path("raw")
    with open(raw, "wb") as file:
        file.truncate(MIB)
    for path, code in ((clean, 0), (leak, 3), (corrupt, 2)):
        ours = await img(world, "check", "--output=json", path)
        theirs = await peer("check", "--output=json", path)
        assert ours[0] == theirs[0] == code, f"{path}: {ours} {theirs}"
        assert json.loads(ours[1]) == json.loads(theirs[1]), f"{ours[1]} {theirs[1]}"
        ours, theirs = await img(world, "check", path), await peer("check", path)
        assert ours[:2] == theirs[:2], f"{ours} {theirs}"
        assert (await img(world, "check", "-q", path))[:2] == (code, "")
    code, _, err = await img(world, "check", "-f", "raw", raw)
    assert (code, err) == (63, "liveblk img: This image format does not support checks\n"), err
    code, _, err = await img(world, "check", raw)
    assert code == 1 and "-f raw" in err, err
    await good(world, "check", "-r", "leaks", leak)
    await good(world, "check", "-r", "all", corrupt)
    for path in (leak, corrupt):
        code, out, err = await peer("check", path)
        assert code == 0, out + err
        await good(world, "check", path)


def poke(path, at, content):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


@case(on="ours")
async def img_info_tells_a_chain_as_the_peer_does(world):
    await written(world.path("base"), "write -P 1 0 64k")
    await written(world.path("top"), "write -P 2 0 4k",
                  options=f"backing_file={world.path('base')},backing_fmt=qcow2")
    await tool("qemu-img", "snapshot", "-c", "one", world.path("top"))
    await tool("qemu-img", "bitmap", "--add", world.path("top"), "b0")
    for words in ([], ["--backing-chain"]):
        ours = json.loads(await good(world, "info", "--json", *words, world.path("top")))
        _, theirs, _ = await peer("info", "--output=json", *words, world.path("top"))
        theirs = json.loads(theirs)
        if words:
            assert [plain_info(i) for i in ours] == [plain_info(i) for i in theirs]
        else:
            assert plain_info(ours) == plain_info(theirs), f"{ours} {theirs}"
        ours = await good(world, "info", *words, world.path("top"))
        _, theirs, _ = await peer("info", *words, world.path("top"))
        assert told(ours) == told(theirs), f"{ours} {theirs}"
    shown = await good(world, "snapshot", "-l", world.path("top"))
    assert shown == (await peer("snapshot", "-l", world.path("top")))[1]


def told(text):
    return [line for line in text.splitlines() if "disk size" not in line]


@case(on="ours")
async def img_overlays_have_subclusters_and_everything_else_is_as_the_peer_makes_it(world):
    await good(world, "create", "-q", "-f", "qcow2", world.path("plain"), "1M")
    await tool("qemu-img", "create", "-q", "-f", "qcow2", world.path("theirs"), "1M")
    with open(world.path("plain"), "rb") as one, open(world.path("theirs"), "rb") as two:
        assert one.read() == two.read()
    for options, extended, cluster in (([], True, 131072),
                                       (["-o", "extended_l2=off"], False, 65536),
                                       (["-o", "compat=v2"], False, 65536),
                                       (["-o", "cluster_size=64k"], True, 65536)):
        await good(world, "create", "-q", "-f", "qcow2", *options, "-b", "plain", "-F", "qcow2",
                   world.path("top"))
        _, out, _ = await peer("info", "--output=json", world.path("top"))
        info = json.loads(out)
        data = info["format-specific"]["data"]
        assert data.get("extended-l2", False) is extended and info["cluster-size"] == cluster, out
        assert info["virtual-size"] == MIB


@case(on="ours")
async def img_convert_goes_both_ways_and_reads_no_holes(world):
    source = await written(world.path("source"), "write -P 1 0 100k", "write -P 2 5M 64k",
                           "write -c -P 3 6M 128k", "write -z 7M 1M", size="1G")
    await good(world, "convert", "-O", "raw", source, world.path("raw"))
    await good(world, "convert", "-f", "raw", "-O", "qcow2", world.path("raw"), world.path("back"))
    await good(world, "convert", "-c", "-O", "qcow2", source, world.path("packed"))
    await good(world, "convert", "-O", "qcow2", "-o", "cluster_size=4k,compat=v2", source,
               world.path("small"))
    for name, fmt in (("raw", "raw"), ("back", "qcow2"), ("packed", "qcow2"), ("small", "qcow2")):
        code, out, err = await peer("compare", "-F", fmt, source, world.path(name))
        assert code == 0, f"{name}: {out}{err}"
        assert os.stat(world.path(name)).st_blocks < 4096, f"{name} is not sparse"
        if fmt == "qcow2":
            assert (await peer("check", world.path(name)))[0] == 0
    packed = json.loads((await peer("check", "--output=json", world.path("packed")))[1])
    assert packed["compressed-clusters"] == packed["allocated-clusters"], packed
    await good(world, "convert", "-O", "qcow2", source, world.path("back"), world.path("two"))
    info = json.loads((await peer("info", "--output=json", world.path("two")))[1])
    assert info["virtual-size"] == 2 << 30, info
    assert leftovers(world) == [], leftovers(world)


def leftovers(world, folder=None):
    return [name for name in os.listdir(folder or world.folder) if name.endswith(".new")]


@case(on="ours")
async def img_convert_that_fails_leaves_nothing_and_an_old_target_as_it_was(world):
    """Row Q22: a full file system, at any point of the copy."""
    source = await written(world.path("source"), "write -P 1 0 40M", size="64M")
    folder = await world.tmpfs("24m")
    target = os.path.join(folder, "target")
    for old in (None, b"old content"):
        if old:
            with open(target, "wb") as file:
                file.write(old)
        for fmt in ("raw", "qcow2"):
            code, _, err = await img(world, "convert", "-O", fmt, source, target)
            assert code == 1 and "No space left on device" in err, (code, err)
            assert os.listdir(folder) == (["target"] if old else []), os.listdir(folder)
            if old:
                with open(target, "rb") as file:
                    assert file.read() == old
    code, _, err = await img(world, "convert", "-O", "raw", world.path("nope"), target)
    assert code == 1 and os.listdir(folder) == ["target"], err


@case(on="ours")
async def img_convert_tells_a_write_that_fails_only_late(world):
    """Row Q22: an error at write-back, flush or close is an exit code, not a lost message."""
    source = await written(world.path("source"), "write -P 1 0 4M", size="8M")
    disk = await world.failing_file(8 * MIB)
    disk.fail()
    code, _, err = await img(world, "convert", "-n", "-O", "raw", source, disk.file)
    assert code == 1 and err.startswith("liveblk img: "), (code, err)
    disk.heal()
    await good(world, "convert", "-n", "-O", "raw", source, disk.file)
    assert (await peer("compare", "-F", "raw", source, disk.backing))[0] == 0


@case(on="ours")
async def img_convert_that_is_interrupted_leaves_nothing(world):
    source = await written(world.path("source"), "write -P 1 0 400M", size="512M")
    os.mkdir(world.path("to"))
    process = await asyncio.create_subprocess_exec(
        world.liveblk(), "img", "convert", "-O", "qcow2", source, world.path("to", "target"))
    for _ in range(2000):
        if os.listdir(world.path("to")) or process.returncode is not None:
            break
        await asyncio.sleep(0.002)
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    code = await process.wait()
    left = os.listdir(world.path("to"))
    assert (code, left) in ((143, []), (0, ["target"])), (code, left)
    if code == 0:
        world.note("the copy was faster than the signal")


@case(on="ours")
async def img_convert_replaces_no_image_that_is_in_use(world):
    path = await written(world.path("disk"), "write -P 1 0 64k")
    other = await written(world.path("other"))
    process = await asyncio.create_subprocess_exec(
        "qemu-io", path, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    await process.stdout.read(8)
    for words in (["convert", "-O", "qcow2", other, path], ["create", "-f", "qcow2", path, "1M"],
                  ["resize", path, "2M"], ["snapshot", "-c", "x", path], ["info", path]):
        code, _, err = await img(world, *words)
        assert code == 1 and "lock" in err, f"{words}: {code} {err}"
    await good(world, "info", "-U", path)
    process.stdin.write(b"q\n")
    await process.communicate()
    code, _, err = await img(world, "convert", "-O", "qcow2", path, path)
    assert code == 1 and "lock" in err, err


@case(on="ours")
async def img_resize_snapshot_and_bitmap_do_what_the_peer_sees(world):
    path = await written(world.path("disk"), "write -P 1 0 1M")
    code, _, err = await img(world, "resize", path, "512k")
    assert code == 1 and "--shrink" in err, err
    await good(world, "snapshot", "-c", "one", path)
    await tool("qemu-io", "-c", "write -P 2 0 1M", path)
    await good(world, "snapshot", "-a", "one", path)
    await tool("qemu-io", "-c", "read -P 1 0 1M", path)
    await good(world, "snapshot", "-d", "one", path)
    code, _, err = await img(world, "snapshot", "-d", "one", path)
    assert code == 1 and "snapshot 'one'" in err, err
    await good(world, "resize", "-q", "--shrink", path, "512k")
    await good(world, "resize", "-q", path, "+1M")
    await tool("qemu-io", "-c", "read -P 1 0 512k", "-c", "read -P 0 512k 1M", path)
    await good(world, "bitmap", "--add", "-g", "32k", path, "b0")
    await good(world, "bitmap", "--add", "--disable", path, "b1")
    await tool("qemu-io", "-c", "write -P 3 64k 4k", path)
    await good(world, "bitmap", "--merge", "b0", path, "b1")
    info = json.loads((await peer("info", "--output=json", path))[1])
    bitmaps = info["format-specific"]["data"]["bitmaps"]
    assert [(b["name"], b["granularity"], b["flags"]) for b in bitmaps] == \
        [("b0", 32768, ["auto"]), ("b1", 65536, [])], bitmaps
    for words, part in ((["--add", path, "b0"], "already exists"),
                        (["--remove", path, "x"], "not found"),
                        (["--merge", "x", path, "b0"], "not found"),
                        (["--add", "-g", "3k", path, "b9"], "power of 2"),
                        (["--clear", "-g", "4k", path, "b0"], "--add"), ([path, "b0"], "at least")):
        code, _, err = await img(world, "bitmap", *words)
        assert code == 1 and part in err, f"{words}: {err}"
    await good(world, "bitmap", "--remove", path, "b1")
    assert (await peer("check", path))[0] == 0


# (arguments, what the error must name); FILE is a good image, RAW a raw one, NEW no file
BAD = [
    (["foo"], "foo"), (["create"], "FILENAME"), (["create", "NEW"], "size"),
    (["create", "-f", "qcow2", "NEW", "10X"], "10X"), (["create", "NEW", "--", "-5"], "between 0"),
    (["create", "-f", "vmdk", "NEW", "1M"], "vmdk"), (["create", "NEW", "16E"], "between 0"),
    (["create", "-f", "qcow2", "NEW", "7E"], "too large"), (["create", "NEW", "8E"], "between 0"),
    (["create", "-f", "qcow2", "NEW", "1M", "2M"], "2M"),
    (["create", "-f", "qcow2", "-o", "foo=1", "NEW", "1M"], "'foo'"),
    (["create", "-f", "qcow2", "-o", "cluster_size=3k", "NEW", "1M"], "power of two"),
    (["create", "-f", "qcow2", "-o", "cluster_size=4M", "NEW", "1M"], "power of two"),
    (["create", "-f", "qcow2", "-o", "cluster_size=x", "NEW", "1M"], "cluster_size"),
    (["create", "-f", "qcow2", "-o", "compat=9", "NEW", "1M"], "'9'"),
    (["create", "-f", "qcow2", "-o", "refcount_bits=3", "NEW", "1M"], "efcount"),
    (["create", "-f", "qcow2", "-o", "refcount_bits=128", "NEW", "1M"], "efcount"),
    (["create", "-f", "qcow2", "-o", "lazy_refcounts=maybe", "NEW", "1M"], "lazy_refcounts"),
    (["create", "-f", "qcow2", "-o", "preallocation=x", "NEW", "1M"], "preallocation"),
    (["create", "-f", "qcow2", "-o", "compression_type=x", "NEW", "1M"], "compression"),
    (["create", "-f", "qcow2", "-o", "compat=v2,extended_l2=on", "NEW", "1M"], "1.1"),
    (["create", "-f", "qcow2", "-o", "compat=v2,lazy_refcounts=on", "NEW", "1M"], "1.1"),
    (["create", "-f", "qcow2", "-o", "compat=v2,refcount_bits=8", "NEW", "1M"], "1.1"),
    (["create", "-f", "qcow2", "-o", "compat=v2,compression_type=zstd", "NEW", "1M"], "1.1"),
    (["create", "-f", "qcow2", "-o", "cluster_size=4k,extended_l2=on", "NEW", "1M"], "16384"),
    (["create", "-f", "qcow2", "-o", "data_file_raw=on", "NEW", "1M"], "data-file"),
    (["create", "-f", "qcow2", "-o", "size=1M", "NEW", "2M"], "once"),
    (["create", "-f", "qcow2", "-b", "nope", "-F", "qcow2", "NEW"], "nope"),
    (["create", "-f", "qcow2", "-b", "FILE", "NEW"], "-F"),
    (["create", "-f", "qcow2", "-F", "qcow2", "NEW", "1M"], "backing"),
    (["create", "-f", "raw", "-b", "FILE", "-F", "qcow2", "NEW", "1M"], "not supported"),
    (["create", "-f", "raw", "-o", "preallocation=metadata", "NEW", "1M"], "metadata"),
    (["create", "-f", "qcow2", "/nonexistent/x", "1M"], "No such file"),
    (["create", "-f", "qcow2", "/tmp", "1M"], "regular file"),
    (["info", "NEW"], "No such file"), (["info", "RAW"], "-f raw"), (["info", "/tmp"], "/tmp"),
    (["info", "-f", "qcow2", "RAW"], "not in qcow2 format"), (["info", "-f", "zz", "FILE"], "'zz'"),
    (["info", "--output=xml", "FILE"], "xml"), (["info", "/dev/null"], "/dev/null"),
    (["info", "FILE", "FILE"], "FILE"), (["map", "RAW"], "-f raw"),
    (["map", "-s", "x", "FILE"], "x"),
    (["map", "-l", "1.5", "FILE"], "1.5"), (["check", "-r", "foo", "FILE"], "foo"),
    (["check", "-r", "all", "-U", "FILE"], "force-share"), (["check", "NEW"], "No such file"),
    (["convert"], "FILES"), (["convert", "FILE"], "target"), (["convert", "NEW", "NEW"], "No such"),
    (["convert", "-O", "zz", "FILE", "NEW"], "'zz'"),
    (["convert", "-f", "zz", "FILE", "NEW"], "zz"),
    (["convert", "-c", "-O", "raw", "FILE", "NEW"], "ompression"),
    (["convert", "-n", "FILE", "NEW"], "No such file"),
    (["convert", "-t", "x", "FILE", "NEW"], "x"),
    (["convert", "-T", "x", "FILE", "NEW"], "x"), (["convert", "-S", "q", "FILE", "NEW"], "'q'"),
    (["convert", "-m", "99", "FILE", "NEW"], "99"), (["convert", "-m", "0", "FILE", "NEW"], "0"),
    (["convert", "-O", "qcow2", "-B", "FILE", "FILE", "NEW"], "-F"),
    (["convert", "--target-is-zero", "FILE", "NEW"], "--no-create"),
    (["convert", "-O", "qcow2", "-o", "size=512", "FILE", "NEW"], "less"),
    (["resize", "FILE"], "SIZE"), (["resize", "FILE", "zz"], "'size'"),
    (["resize", "RAW", "1M"], "raw"),
    (["resize", "FILE", "512k"], "--shrink"),
    (["resize", "--shrink", "FILE", "--", "-5M"], "positive"),
    (["resize", "FILE", "0"], "positive"), (["resize", "--preallocation=x", "FILE", "2M"], "'x'"),
    (["resize", "FILE", "+99999E"], "'size'"), (["snapshot", "-c", "a", "-d", "b", "FILE"], "-d"),
    (["snapshot", "-a", "nope", "FILE"], "nope"), (["snapshot", "-d", "nope", "FILE"], "nope"),
    (["snapshot", "-f", "raw", "-c", "x", "RAW"], "'x'"), (["bitmap", "FILE", "b"], "at least"),
    (["bitmap", "--remove", "FILE", "b"], "not found"), (["bitmap", "--add", "FILE"], "BITMAP"),
    (["bitmap", "--add", "-f", "raw", "RAW", "b"], "b"), (["io", "FILE", "fly"], "fly"),
    (["io", "FILE", "write 2M 1k"], "outside"), (["io", "FILE", "write -P 300 0 1"], "300"),
]


@case(on="ours", timeout=120)
async def img_answers_each_wrong_command_line_with_a_clear_error_and_no_file(world):
    names = {"FILE": world.path("file"), "RAW": world.path("raw"), "NEW": world.path("new")}
    await written(names["FILE"], "write -P 1 0 1M")
    with open(names["RAW"], "wb") as file:
        file.truncate(MIB)
    before = sorted(os.listdir(world.folder))
    problems = []
    for words, part in BAD:
        code, _, err = await img(world, *[names.get(word, word) for word in words])
        if code != 1 or part not in err or "panicked" in err or len(err.splitlines()) > 8:
            problems.append(f"{' '.join(words)}: {code}, {err!r} should name {part!r}")
        if sorted(os.listdir(world.folder)) != before:
            problems.append(f"{' '.join(words)} left {sorted(os.listdir(world.folder))}")
            break
    assert not problems, "\n".join(problems)
