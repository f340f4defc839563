"""Image fleecing: the instant of a disk read while guests write, by every way out of the daemon."""

from rig import images
from rig.cases import case
from rig.pairs import SIZE, same
from test_mirror import ours

KEEP = {"job-id": "k", "device": "a", "target": "t", "sync": "none", "filter-node-name": "cbw"}


async def fleece(side):
    """The recipe that works with the peer."""
    await side.node("t")
    since = side.d.mark()
    await side.tell("blockdev-backup", KEEP)
    await side.status("k", "running", since)
    await side.tell("blockdev-add", {"driver": "snapshot-access", "node-name": "sa",
                                     "file": "cbw"})
    await side.tell("block-export-add", {"type": "nbd", "id": "exp-sa", "node-name": "sa",
                                         "name": "sa"})


async def pulled(side, name):
    """What an NBD client reads from the export, as a digest."""
    raw = side.world.path(name + ".raw")
    await images.tool("qemu-img", "convert", "-f", "raw", "-O", "raw", side.d.uri(name), raw)
    return await images.digest(raw, "raw")


@case("pair", timeout=90)
async def the_recipe_of_the_peer_gives_the_instant_over_nbd(world):
    async def script(s):
        before = await pulled(s, "a")
        await fleece(s)
        await s.io("write -P 7 0 64k", "write -P 8 3M 1M", "write -z 1M 64k")
        assert await pulled(s, "sa") == before, "the export is not the instant"
        await s.tell("query-block-exports")
        await s.tell("blockdev-del", {"node-name": "cbw"})
        await s.tell("block-export-del", {"id": "exp-sa"})
        await s.d.wait_event("BLOCK_EXPORT_DELETED", id="exp-sa")
        await s.tell("blockdev-del", {"node-name": "sa"})
        since = s.d.mark()
        await s.tell("job-cancel", id="k")
        await s.d.job_gone("k", since=since)
    await same(world, script)


@case("pair", timeout=90)
async def options_of_the_filters_are_refused_as_by_the_peer(world):
    async def script(s):
        await s.node("t")
        base = {"driver": "copy-before-write", "node-name": "c", "file": "a", "target": "t"}
        for more in ({"file": "nope"}, {"target": "nope"}, {"min-cluster-size": 100},
                     {"bitmap": {"node": "a", "name": "x"}}, {"node-name": "a"},
                     {"node-name": "0"}, {"on-cbw-error": "sometimes"}):
            await s.tell("blockdev-add", dict(base, **more))
        await s.tell("blockdev-add", {"driver": "snapshot-access", "node-name": "s",
                                      "file": "nope"})
        await s.tell("blockdev-add", dict(base, **{"on-cbw-error": "break-snapshot",
                                                   "cbw-timeout": 3}))
        await s.tell("blockdev-del", {"node-name": "c"})
    await same(world, script)


@case("ours", timeout=90)
async def a_filter_above_an_exported_disk_keeps_what_its_guests_overwrite(world):
    s = await ours(world)
    before = await pulled(s, "a")
    await s.node("t")
    await s.d.cmd("blockdev-add", {"driver": "copy-before-write", "node-name": "c", "file": "a",
                                   "target": "t"})
    await s.d.cmd("blockdev-add", {"driver": "snapshot-access", "node-name": "sa", "file": "c"})
    await s.d.export("sa", name="sa", writable=False)
    await s.io("write -P 7 0 64k", "write -P 8 3M 1M")
    assert await pulled(s, "sa") == before
    await s.d.quit()


@case("ours", timeout=120)
async def mirror_and_backup_of_the_view_are_right_on_a_chain(world):
    """contract.md §8.1: the peer's mirror from such a node zeroes what the chain has."""
    s = await ours(world)
    for i, over in enumerate(("b", "c", "d")):
        await s.d.cmd("blockdev-snapshot-sync", {
            "node-name": "abc"[i], "snapshot-node-name": over,
            "snapshot-file": world.path(over + ".qcow2")})
        await s.io(f"write -P {i + 1} {i + 1}M 1M")
    before = await pulled(s, "a")
    await s.node("t", discard="unmap")
    await s.d.cmd("blockdev-backup", dict(KEEP, device="d"))
    await s.d.cmd("blockdev-add", {"driver": "snapshot-access", "node-name": "sa", "file": "cbw"})
    await s.io("write -P 9 0 64k", "write -P 9 6M 1M")
    for command, job in (("blockdev-mirror", "m"), ("blockdev-backup", "n")):
        out = world.path(job + ".raw")
        with open(out, "wb") as file:
            file.truncate(SIZE)
        await s.d.cmd("blockdev-add", {"driver": "raw", "node-name": job, "file": {
            "driver": "file", "filename": out}})
        since = s.d.mark()
        await s.d.cmd(command, {"job-id": job, "device": "sa", "target": job, "sync": "full"})
        if job == "m":
            await s.d.wait_event("BLOCK_JOB_READY", device="m", since=since)
            await s.d.cmd("block-job-cancel", device="m")
        await s.d.job_gone(job, since=since)
        await s.d.cmd("blockdev-del", {"node-name": job})
        assert await images.digest(out, "raw") == before, f"{command} is not the instant"
    await s.d.quit()


@case("ours", timeout=90)
async def an_overlay_of_the_disk_can_be_the_target_and_shows_the_instant(world):
    s = await ours(world)
    before = await pulled(s, "a")
    await s.node("t", backing="a")
    await s.d.cmd("blockdev-backup", KEEP)
    await s.d.export("t", name="t", writable=False)
    await s.io("write -P 7 0 64k", "write -P 8 3M 1M", "write -P 9 100k 4k")
    assert await pulled(s, "t") == before
    await s.d.cmd("job-cancel", id="k")
    await s.d.job_gone("k")
    await s.d.quit()
