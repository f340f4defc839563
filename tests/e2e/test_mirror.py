"""Mirrors: all members and their refusals as the peer, and what only liveblkd does."""

import os

from rig import images
from rig.cases import case
from rig.daemon import Refused
from rig.pairs import FILLED, SIZE, same


def mirror(target="t", **more):
    return dict({"job-id": "m", "device": "a", "target": target, "sync": "full"}, **more)


async def ready(side, **more):
    since = side.d.mark()
    await side.tell("blockdev-mirror", mirror(**more))
    await side.d.wait_event("BLOCK_JOB_READY", device="m", since=since)


async def ended(side, verb, **arguments):
    since = side.d.mark()
    await side.tell(verb, arguments)
    await side.d.job_gone("m", since=since)


@case("pair", timeout=90)
async def write_blocking_copies_before_the_answer_and_ends_as_the_peers(world):
    async def script(s):
        await s.node("t")
        await ready(s, **{"copy-mode": "write-blocking", "filter-node-name": "mf"})
        await s.tell("query-block-jobs")
        await s.tell("query-block-exports")
        await s.io("write -P 7 0 64k", "write -P 8 1M 200k", "write -z 3M 128k")
        await s.tell("query-block-jobs")
        await s.tell("block-job-change", {"id": "m", "type": "mirror",
                                          "copy-mode": "write-blocking"})
        await ended(s, "block-job-complete", device="m")
        await s.io("write -P 9 2M 64k")
        await s.tell("query-block-exports")
        await s.tell("block-export-del", {"id": "exp-a"})
        await s.d.wait_event("BLOCK_EXPORT_DELETED", id="exp-a")
        await s.keep("t", "a")
    await same(world, script)


@case("pair", timeout=90)
async def background_becomes_write_blocking_at_run_time(world):
    async def script(s):
        await s.node("t")
        await ready(s)
        await s.tell("block-job-change", {"id": "m", "type": "mirror",
                                          "copy-mode": "write-blocking"})
        await s.io("write -P 7 0 64k")
        await ended(s, "block-job-cancel", device="m")
        await s.keep("t", "a")
    await same(world, script, numbers=False)


@case("pair", timeout=90)
async def every_wrong_member_is_refused_with_the_text_of_the_peer(world):
    async def script(s):
        await s.node("t")
        await s.node("u")
        for more in ({"replaces": "nope"}, {"replaces": "u"}, {"replaces": "t"},
                     {"buf-size": -1}, {"granularity": 3}, {"granularity": 3 << 20},
                     {"granularity": 128 << 20}, {"target": "a"}, {"target": "nope"},
                     {"device": "nope"}, {"job-id": "0"}, {"speed": -1},
                     {"filter-node-name": "a"}, {"filter-node-name": "0x"},
                     {"copy-mode": "sometimes"}, {"sync": "most"}):
            await s.tell("blockdev-mirror", mirror(**more))
        await s.tell("query-jobs")
    await same(world, script)


@case("pair", timeout=90)
async def replaces_and_buf_size_are_taken_as_by_the_peer(world):
    async def script(s):
        await s.node("t")
        await ready(s, replaces="a", **{"buf-size": 65536, "granularity": 4096})
        await ended(s, "job-complete", id="m")
        await s.keep("t", "a")
    await same(world, script)


@case("pair", timeout=90)
async def drive_mirror_makes_its_target_and_closes_it(world):
    async def script(s):
        drive = dict(mirror(s.world.path("n.qcow2")), format="qcow2")
        since = s.d.mark()
        await s.tell("drive-mirror", drive)
        await s.d.wait_event("BLOCK_JOB_READY", device="m", since=since)
        await ended(s, "block-job-cancel", device="m")
        await s.keep("n", "a")
        for more in ({"device": "nope"}, {"node-name": "a"}, {"format": "zzz"},
                     {"target": s.world.path("no/where.qcow2")},
                     {"mode": "existing", "target": s.world.path("none.qcow2")},
                     {"granularity": 3}, {"job-id": "0"}):
            await s.tell("drive-mirror", dict(drive, target=s.world.path("o.qcow2"), **more)
                         if "target" not in more else dict(drive, **more))
        names = await s.d.cmd("query-named-block-nodes", flat=True, recorded=False)
        assert {row["drv"] for row in names} == {"qcow2", "file"} and len(names) == 2, names
    await same(world, script)


@case("ours", timeout=90)
async def the_mode_goes_back_to_the_background(world):
    s = await ours(world)
    await s.node("t")
    await ready(s, **{"copy-mode": "write-blocking"})
    assert (await s.d.cmd("query-block-jobs"))[0]["actively-synced"] is True
    await s.d.cmd("block-job-change", {"id": "m", "type": "mirror", "copy-mode": "background"})
    assert (await s.d.cmd("query-block-jobs"))[0]["actively-synced"] is False
    await s.io("write -P 7 0 64k")
    await ended(s, "block-job-cancel", device="m")
    await s.d.quit()
    await images.identical(s.world.path("a.qcow2"), s.world.path("t.qcow2"))


async def ours(world):
    """Our daemon with a filled disk, as `pairs.same` makes it."""
    from rig.pairs import Side
    path = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    d = await world.daemon()
    await d.add_qcow2("a", path)
    await d.export("a", name="a")
    return Side(world, d)


@case("ours", timeout=90)
async def a_mirror_of_what_a_bitmap_names_clears_it_only_when_it_completes(world):
    s = await ours(world)
    await s.node("t")
    await ready(s)
    await ended(s, "block-job-cancel", device="m")
    await s.d.cmd("block-dirty-bitmap-add", node="a", name="b")
    await s.io("write -P 7 0 64k", "write -P 8 5M 64k")

    async def count():
        rows = await s.d.cmd("query-named-block-nodes", flat=True)
        row = next(row for row in rows if row["node-name"] == "a")
        return next(b["count"] for b in row["dirty-bitmaps"] if b.get("name") == "b")
    assert await count() == 128 << 10
    await ready(s, sync="incremental", bitmap="b")
    job = (await s.d.cmd("query-block-jobs"))[0]
    assert job["len"] == 128 << 10, job
    await ended(s, "job-cancel", id="m")
    assert await count() == 128 << 10, "a cancelled mirror gives up nothing"
    await ready(s, sync="bitmap", bitmap="b", **{"bitmap-mode": "on-success"})
    await s.io("write -P 9 6M 64k")
    await ended(s, "block-job-cancel", device="m")
    assert await count() == 0
    await s.d.quit()
    await images.identical(s.world.path("a.qcow2"), s.world.path("t.qcow2"))


@case("ours", timeout=90)
async def a_file_that_exists_is_never_overwritten_and_a_failed_start_leaves_none(world):
    s = await ours(world)
    kept = world.path("kept.qcow2")
    await images.filled(kept, SIZE, FILLED)
    before = await images.digest(kept)
    try:
        await s.d.cmd("drive-mirror", dict(mirror(kept), format="qcow2"))
        raise AssertionError("the file was taken")
    except Refused as refusal:
        assert "exists" in refusal.desc, refusal
    assert await images.digest(kept) == before
    for command in ("drive-mirror", "drive-backup"):
        new = world.path("new.qcow2")
        await s.d.refused(command, dict(mirror(new), speed=-1))
        assert not os.path.exists(new)
    await s.d.quit()
