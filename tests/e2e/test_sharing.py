"""Jobs on a file system whose files can share blocks (XFS): nothing is copied, and it is right.

On a machine that cannot mount such a file system each test says so and ends.
"""

import os

from rig import images, reflink
from rig.cases import case
from rig.guest import now, prove_cut, prove_latest

SIZE = 64 * images.MIB
FILLED = images.blocks(SIZE)
ASKED = {"use-copy-range": True}
# so that guests write while the job runs
SLOW = 48 * images.MIB


async def place(world):
    """A folder on XFS; None if there is none here."""
    folder = world.path(f"xfs{len(world.undo)}")
    undo, why_not = await reflink.mount(folder)
    if undo is None:
        world.note(f"skipped: {why_not}")
        return None
    world.undo.append(undo)
    return folder


async def add(d, node, path, fmt, direct, **more):
    file = {"driver": "file", "filename": path, "cache": {"direct": direct}}
    await d.cmd("blockdev-add", dict({"driver": fmt, "node-name": node, "file": file,
                                      "cache": {"direct": direct}, "discard": "unmap"}, **more))


async def disk(world, folder, fmt, direct=False):
    """A daemon with a full disk under a guest that writes all the time."""
    path = await images.filled(os.path.join(folder, "a"), SIZE, FILLED, fmt=fmt)
    d = await world.daemon()
    await add(d, "a", path, fmt, direct)
    guest = await world.guest(await d.export("a"), filled=FILLED)
    await guest.run(rate=500)
    await guest.progress()
    return d, guest


async def target(d, folder, fmt, direct=False, name="t"):
    path = os.path.join(folder, name)
    if fmt == "raw":
        with open(path, "wb") as file:
            file.truncate(SIZE)
    else:
        await images.create(path, SIZE)
    await add(d, name, path, fmt, direct)
    return path


async def ended(d, guest):
    """The guest's log, when it and the daemon are gone."""
    await guest.progress()
    await guest.stop()
    await guest.verify()
    log = await guest.log()
    await guest.end()
    await d.quit()
    return log


async def dump(world, path, fmt):
    return await images.dump(path, world.path(f"dump{len(os.listdir(world.folder))}"), fmt)


@case("ours", timeout=120)
async def a_backup_shares_its_blocks_and_is_the_instant_of_its_start(world):
    for fmt, direct in (("raw", False), ("raw", True), ("qcow2", True)):
        folder = await place(world)
        if folder is None:
            return
        d, guest = await disk(world, folder, fmt, direct)
        path = await target(d, folder, fmt, direct)
        before = reflink.blocks(os.path.join(folder, "a"))
        t1 = now()
        await d.cmd("blockdev-backup", job_id="b", device="a", target="t", sync="full",
                    speed=SLOW, x_perf=ASKED)
        t2 = now()
        await d.job_gone("b")
        # what the guest was about to overwrite went through memory
        assert before & reflink.blocks(path), f"{fmt}: nothing is shared"
        log = await ended(d, guest)
        prove_cut(log, {0: await dump(world, path, fmt)}, t1, t2, FILLED)
        prove_latest(log, {0: await dump(world, os.path.join(folder, "a"), fmt)}, FILLED)


@case("ours", timeout=120)
async def a_mirror_shares_its_blocks_and_becomes_the_disk(world):
    for fmt, other, direct, mode in (("raw", "raw", False, "background"),
                                     ("raw", "qcow2", True, "write-blocking"),
                                     ("qcow2", "raw", True, "background"),
                                     ("qcow2", "qcow2", False, "write-blocking")):
        folder = await place(world)
        if folder is None:
            return
        d, guest = await disk(world, folder, fmt, direct)
        path = await target(d, folder, other, direct)
        before = reflink.blocks(os.path.join(folder, "a"))
        await d.cmd("blockdev-mirror", job_id="m", device="a", target="t", sync="full",
                    copy_mode=mode, speed=SLOW)
        await d.wait_event("BLOCK_JOB_READY", device="m")
        assert before & reflink.blocks(path), f"{fmt} to {other}: nothing is shared"
        await d.cmd("block-job-complete", device="m")
        await d.job_gone("m")
        log = await ended(d, guest)
        prove_latest(log, {0: await dump(world, path, other)}, FILLED)
        if other == "qcow2":
            await images.check(path)


@case("ours", timeout=120)
async def streams_and_commits_share_blocks_along_the_chain(world):
    for job, fmt in (("stream", "raw"), ("commit", "raw"), ("active", "qcow2")):
        folder = await place(world)
        if folder is None:
            return
        d, guest = await disk(world, folder, fmt)
        # the layers in the middle hold a third of the disk each
        for index, name in enumerate("bc"):
            path = os.path.join(folder, name)
            await d.cmd("blockdev-snapshot-sync", node_name="a" if name == "b" else "b",
                        snapshot_file=path, snapshot_node_name=name, format="qcow2")
            await guest.progress(400)
        before = {name: reflink.blocks(os.path.join(folder, name)) for name in "ab"}
        if job == "stream":
            result, kind = os.path.join(folder, "c"), "qcow2"
            await d.cmd("block-stream", job_id="j", device="c", speed=SLOW)
        elif job == "commit":
            result, kind = os.path.join(folder, "c"), "qcow2"
            await d.cmd("block-commit", job_id="j", device="c", top_node="b", base_node="a",
                        speed=SLOW)
        else:
            result, kind = os.path.join(folder, "a"), fmt
            await d.cmd("block-commit", job_id="j", device="c", speed=SLOW)
            await d.wait_event("BLOCK_JOB_READY", device="j")
            await d.cmd("block-job-complete", device="j")
        await d.job_gone("j")
        taken = (before["a"] & reflink.blocks(result) if job == "stream" else
                 before["b"] & reflink.blocks(os.path.join(folder, "a")))
        assert taken, f"{job}: nothing is shared"
        log = await ended(d, guest)
        prove_latest(log, {0: await dump(world, result, kind)}, FILLED)
        if kind == "qcow2":
            await images.check(result)


@case("ours", timeout=60)
async def a_backup_shares_only_when_it_is_asked_to_as_the_peers(world):
    folder = await place(world)
    if folder is None:
        return
    await images.filled(os.path.join(folder, "a"), SIZE, FILLED, fmt="raw")
    d = await world.daemon()
    await add(d, "a", os.path.join(folder, "a"), "raw", False)
    for name, perf, expected in (("t0", {"use-copy-range": False}, 0), ("t1", {}, 0),
                                 ("t2", ASKED, SIZE)):
        path = await target(d, folder, "raw", name=name)
        await d.cmd("blockdev-backup", {"job-id": name, "device": "a", "target": name,
                                        "sync": "full", "x-perf": perf})
        await d.job_gone(name)
        assert reflink.shared_bytes(path) == expected, name
    await d.quit()
    for name in ("t0", "t1", "t2"):
        await images.identical(os.path.join(folder, "a"), os.path.join(folder, name), "raw", "raw")


@case("ours", timeout=60)
async def img_convert_shares_blocks_when_it_is_asked_to(world):
    folder = await place(world)
    if folder is None:
        return
    source = await images.filled(os.path.join(folder, "a"), SIZE, FILLED, fmt="qcow2")
    for fmt, words, expected in (("raw", [], 0), ("raw", ["-C"], SIZE), ("qcow2", ["-C"], SIZE)):
        path = os.path.join(folder, "t")
        await images.tool(world.liveblk(), "img", "convert", "-f", "qcow2", "-O", fmt, *words,
                          source, path)
        assert reflink.shared_bytes(path) == expected, (fmt, words)
        await images.identical(source, path, "qcow2", fmt)
        os.unlink(path)


@case("ours", timeout=60)
async def a_copy_by_sharing_survives_a_power_cut_after_its_end(world):
    folder = await place(world)
    if folder is None:
        return
    original = await images.filled(world.path("original"), SIZE, FILLED, fmt="raw")
    for fmt in ("raw", "qcow2"):
        source = os.path.join(folder, "a")
        # written a moment ago: only the page cache has it
        await images.filled(source, SIZE, FILLED, fmt="raw")
        d = await world.daemon()
        await add(d, "a", source, "raw", False)
        path = await target(d, folder, fmt, name=fmt)
        # the empty file, not its content
        await images.tool("sync", folder, path)
        await d.cmd("blockdev-backup", job_id="b", device="a", target=fmt, sync="full",
                    x_perf=ASKED)
        await d.job_gone("b")
        assert reflink.shared_bytes(path) == SIZE
        await d.kill9()
        os.unlink(source)
        await reflink.power_cut(folder)
        await images.identical(original, path, "raw", fmt)


@case("ours", timeout=60)
async def discarded_and_overwritten_sources_leave_the_copy_alone(world):
    folder = await place(world)
    if folder is None:
        return
    original = await images.filled(world.path("original"), SIZE, FILLED, fmt="raw")
    source = await images.filled(os.path.join(folder, "a"), SIZE, FILLED, fmt="raw")
    d = await world.daemon()
    await add(d, "a", source, "raw", False)
    path = await target(d, folder, "qcow2")
    await d.cmd("blockdev-backup", {"job-id": "b", "device": "a", "target": "t", "sync": "full",
                                    "discard-source": True, "x-perf": ASKED})
    await d.job_gone("b")
    assert sum(size for _, size, _ in reflink.extents(source)) == 0, "the source is empty now"
    await d.quit()
    await images.identical(original, path, "raw", "qcow2")
    await images.check(path)
