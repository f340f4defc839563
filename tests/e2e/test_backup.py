"""Backups: bitmaps and their modes, tuning, files as targets, groups; refusals as the peer."""

from rig import images
from rig.cases import case
from rig.pairs import SIZE, same
from test_mirror import ours


def backup(target="t", **more):
    return dict({"job-id": "b", "device": "a", "target": target, "sync": "full"}, **more)


async def run(side, **more):
    since = side.d.mark()
    await side.tell("blockdev-backup", backup(**more))
    await side.d.job_gone("b", since=since)


async def bitmaps(side):
    """What the peer's query tells of the named bitmaps, in the record."""
    rows = await side.d.cmd("query-named-block-nodes", flat=True, recorded=False)
    row = next(row for row in rows if row["node-name"] == "a")
    named = [b for b in row.get("dirty-bitmaps", []) if "name" in b]
    side.d.record.append(("reply", "bitmaps", sorted(named, key=lambda b: b["name"])))
    return {b["name"]: b["count"] for b in named}


@case("pair", timeout=90)
async def wrong_members_are_refused_with_the_text_of_the_peer(world):
    async def script(s):
        await s.node("t")
        await s.node("small", size=SIZE // 2)
        await s.tell("block-dirty-bitmap-add", node="a", name="b0")
        for more in ({"sync": "bitmap"}, {"sync": "incremental"},
                     {"sync": "bitmap", "bitmap": "b0"},
                     {"sync": "incremental", "bitmap": "nope"},
                     {"sync": "incremental", "bitmap": "b0", "bitmap-mode": "always"},
                     {"sync": "full", "bitmap": "b0"},
                     {"sync": "full", "bitmap": "b0", "bitmap-mode": "never"},
                     {"sync": "top", "bitmap": "b0", "bitmap-mode": "never"},
                     {"sync": "none", "bitmap": "b0", "bitmap-mode": "always"},
                     {"sync": "full", "bitmap-mode": "always"},
                     {"sync": "bitmap", "bitmap-mode": "never"},
                     {"x-perf": {"max-workers": 0}}, {"x-perf": {"max-chunk": -1}},
                     {"x-perf": {"max-chunk": 1}}, {"x-perf": {"min-cluster-size": 196608}},
                     {"target": "a"}, {"target": "nope"}, {"target": "small"},
                     {"filter-node-name": "a"}, {"job-id": "0"}):
            await s.tell("blockdev-backup", backup(**more))
        await s.tell("query-jobs")
    await same(world, script)


@case("pair", timeout=120)
async def bitmaps_are_consumed_and_kept_by_the_rules_of_the_peer(world):
    async def script(s):
        await s.node("t")
        await run(s)
        for name in ("inc", "never", "full"):
            await s.tell("block-dirty-bitmap-add", node="a", name=name)
        await s.io("write -P 7 0 64k", "write -P 8 3M 100k")
        await bitmaps(s)
        await run(s, sync="bitmap", bitmap="never", **{"bitmap-mode": "never"})
        await bitmaps(s)
        await s.io("write -P 9 5M 64k")
        await run(s, sync="incremental", bitmap="inc")
        await bitmaps(s)
        await run(s, sync="full", bitmap="full", **{"bitmap-mode": "on-success"})
        await bitmaps(s)
        await s.tell("block-export-del", {"id": "exp-a"})
        await s.d.wait_event("BLOCK_EXPORT_DELETED", id="exp-a")
        for node in ("a", "t"):
            await s.tell("blockdev-del", {"node-name": node})
        await s.keep("t", "a")
    await same(world, script)


@case("pair", timeout=120)
async def a_cancelled_backup_gives_bitmaps_back_as_its_mode_says(world):
    async def script(s):
        await s.node("t")
        for mode in ("on-success", "always"):
            await s.tell("block-dirty-bitmap-add", node="a", name=mode)
        await s.io("write -P 7 0 3M")
        for mode in ("on-success", "always"):
            since = s.d.mark()
            await s.tell("blockdev-backup", backup(
                sync="bitmap", bitmap=mode, speed=1, **{"bitmap-mode": mode}))
            await s.status("b", "running", since)
            await s.io("write -P 8 7M 64k")
            await s.tell("block-dirty-bitmap-clear", node="a", name=mode)
            await s.tell("job-cancel", id="b")
            await s.d.job_gone("b", since=since)
        counts = await bitmaps(s)
        assert counts["on-success"] == (3 << 20) + (64 << 10), counts
        s.d.record.pop()
    await same(world, script, numbers=False)


@case("pair", timeout=90)
async def drive_backup_makes_its_target_and_closes_it(world):
    async def script(s):
        since = s.d.mark()
        drive = backup(s.world.path("n.qcow2"), format="qcow2")
        await s.tell("drive-backup", drive)
        await s.d.job_gone("b", since=since)
        await s.keep("n", "a")
        since = s.d.mark()
        await s.tell("drive-backup", dict(drive, sync="none", target=s.world.path("o.qcow2")))
        await s.status("b", "running", since)
        await s.io("write -P 7 0 64k")
        await s.tell("job-cancel", id="b")
        await s.d.job_gone("b", since=since)
        await s.keep("o")
        for more in ({"device": "nope"}, {"format": "zzz"},
                     {"target": s.world.path("no/where.qcow2")},
                     {"mode": "existing", "target": s.world.path("none.qcow2")},
                     {"sync": "incremental"}):
            await s.tell("drive-backup", dict(dict(drive, target=s.world.path("q.qcow2")), **more))
    await same(world, script)


@case("pair", timeout=90)
async def grouped_backups_into_files_end_together(world):
    async def script(s):
        await s.node("c")
        since = s.d.mark()
        actions = [{"type": "drive-backup", "data": dict(
            backup(s.world.path(f"g{i}.qcow2"), format="qcow2"),
            **{"job-id": f"g{i}", "device": device})} for i, device in enumerate("ac")]
        await s.tell("transaction", actions=actions, properties={"completion-mode": "grouped"})
        for i in range(2):
            await s.d.job_gone(f"g{i}", since=since)
        await s.keep("g0", "g1", "a")
    await same(world, script, numbers=False, order=False)


@case("ours", timeout=90)
async def a_group_takes_bitmaps_snapshots_and_mirrors_too(world):
    s = await ours(world)
    await s.node("c")
    await s.node("t")
    since = s.d.mark()
    await s.d.cmd("transaction", properties={"completion-mode": "grouped"}, actions=[
        {"type": "block-dirty-bitmap-add", "data": {"node": "a", "name": "b"}},
        {"type": "blockdev-backup", "data": backup()},
        {"type": "drive-mirror", "data": {"job-id": "m", "device": "c", "sync": "full",
                                          "target": world.path("n.qcow2"), "format": "qcow2",
                                          "node-name": "n"}}])
    await s.d.wait_event("BLOCK_JOB_READY", device="m", since=since)
    await s.status("b", "waiting", since)
    await s.d.cmd("job-cancel", id="m")
    await s.d.wait_event("BLOCK_JOB_CANCELLED", device="b", since=since)
    await s.d.job_gone("m", since=since)
    nodes = {row["node-name"] for row in await s.d.cmd("query-named-block-nodes", flat=True)}
    assert "n" not in nodes, nodes
    await s.d.quit()


@case("ours", timeout=60)
async def a_unit_that_no_memory_holds_is_refused(world):
    """The peer aborts: bdrv_create_dirty_bitmap asserts a power of two that fits 32 bits."""
    s = await ours(world)
    await s.node("t")
    _, desc = await s.d.refused("blockdev-backup",
                                backup(**{"x-perf": {"min-cluster-size": 1 << 40}}))
    assert "min-cluster-size" in desc, desc
    await s.d.quit()


@case("ours", timeout=90)
async def a_full_target_reaches_the_guest_only_if_that_was_asked_for(world):
    for policy in ("break-snapshot", "break-guest-write"):
        s = await ours(world.sub(policy, world.kind))
        disk = await s.world.failing_file(SIZE)
        await s.d.cmd("blockdev-add", {"driver": "raw", "node-name": "f", "file": {
            "driver": "file", "filename": disk.file}})
        since = s.d.mark()
        await s.d.cmd("blockdev-backup", backup("f", sync="none", **{"on-cbw-error": policy}))
        disk.fail()
        _, out, err = await s.io("write -P 7 0 64k")
        failed = "failed" in out + err
        assert failed == (policy == "break-guest-write"), (policy, out, err)
        if policy == "break-snapshot":
            end = await s.d.wait_event("BLOCK_JOB_COMPLETED", device="b", since=since)
            assert end["error"] == "Input/output error", end
        disk.heal()
        await s.d.quit()
