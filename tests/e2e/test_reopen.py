"""blockdev-reopen and blockdev-set-active: what may change, what is refused, what guests see."""

import json

from rig import images, transcript
from rig.cases import case
from test_create import attempt, chain, compared

MIB = images.MIB


async def open_chain(world, d, names="abc"):
    """A chain whose files are nodes of their own, and a lone image x."""
    below = None
    for name in names + "x":
        path = world.path(name + ".qcow2")
        base = below if name != "x" else None
        await images.create(path, 4 * MIB, backing=base and world.path(base + ".qcow2"))
        await d.cmd("blockdev-add", driver="file", node_name=name + "f", filename=path)
        await d.cmd("blockdev-add", driver="qcow2", node_name=name, file=name + "f", backing=base)
        below = name


async def state(d):
    nodes = await d.cmd("query-named-block-nodes", flat=True, recorded=False)
    return sorted([row["node-name"], row["ro"], row["active"], row["detect_zeroes"],
                   "backing_file" in row] for row in nodes)


def qcow2(node, backing="omit", **options):
    found = {"driver": "qcow2", "node-name": node, "file": node + "f"}
    if backing != "omit":
        found["backing"] = backing
    return dict(found, **{k.replace("_", "-"): v for k, v in options.items()})


async def reopened(world):
    d = await world.daemon()
    await open_chain(world, d)
    cf = {"driver": "file", "node-name": "cf", "filename": world.path("c.qcow2")}
    attempts = [
        [qcow2("no", None)], [{"driver": "qcow2", "file": "cf", "backing": "b"}],
        [qcow2("c")], [{"driver": "raw", "node-name": "c", "file": "cf"}],
        [qcow2("c", "b")], [qcow2("c", "b", read_only=True)], [qcow2("c", "b")],
        [qcow2("c", "b", discard="unmap", detect_zeroes="unmap")], [qcow2("c", "b")],
        [qcow2("c", "b", lazy_refcounts=True, overlap_check="all", l2_cache_size=MIB)],
        [qcow2("c", "b", l2_cache_size=MIB, cache_size=MIB // 2)],
        [qcow2("c", "b", l2_cache_entry_size=1000)], [qcow2("c", "b", cache_clean_interval=-1)],
        [qcow2("c", "c")], [qcow2("a", "c")], [qcow2("c", "no")],
        [qcow2("c", {"driver": "qcow2", "file": {"driver": "file",
                                                 "filename": world.path("x.qcow2")}})],
        [{**cf, "read-only": True}], [cf], [{**cf, "filename": world.path("x.qcow2")}],
        # All or nothing.
        [qcow2("c", "b", read_only=True), qcow2("x", None, read_only=True)],
        [qcow2("c", "b"), qcow2("x", None)],
        [qcow2("c", "b", read_only=True), qcow2("x", None, l2_cache_entry_size=1000)],
        [qcow2("c", "b", read_only=True), qcow2("x", "x")],
        [qcow2("c", "a"), qcow2("no", None)],
        # Links, one after the other.
        [qcow2("c", "a")], [qcow2("c", None)], [qcow2("c", "x")], [qcow2("c", None)],
        [qcow2("b", "c")], [qcow2("c", "b")], [qcow2("c", "b"), qcow2("b", "a")],
        [qcow2("b", "a"), qcow2("c", "b")], [qcow2("c", "b")],
    ]
    found = []
    for options in attempts:
        await attempt(d, "blockdev-reopen", {"options": options})
        found.append(await state(d))
    await attempt(d, "blockdev-reopen", {})
    await d.export("c")
    for options in ([qcow2("c", "b", read_only=True)], [qcow2("c", "a")], [qcow2("c", "b")],
                    [{**cf, "read-only": True}]):
        await attempt(d, "blockdev-reopen", {"options": options})
        found.append(await state(d))
    await d.quit()
    return (transcript.replies(d.record, world.folder)
            + [json.dumps(line, sort_keys=True) for line in found])


@case("pair", timeout=120)
async def nodes_are_reopened_as_by_the_peer(world):
    await compared(world, reopened, "blockdev-reopen")


@case("ours")
async def an_empty_list_does_nothing(world):
    d = await world.daemon()
    await open_chain(world, d)
    before = await state(d)
    await d.cmd("blockdev-reopen", options=[])
    assert await state(d) == before


@case("both")
async def a_guest_sees_the_layer_that_was_put_below_its_disk(world):
    d = await world.daemon()
    await open_chain(world, d, "ac")
    for image, pattern in (("a", 1), ("x", 2)):
        uri = await d.export(image) if image == "x" else None
        if uri:
            await images.tool("qemu-io", "-f", "raw", "-c", f"write -P {pattern} 0 1M", uri)
            await d.cmd("block-export-del", id="exp-disk")
            await d.wait_event("BLOCK_EXPORT_DELETED")
    uri = await d.export("c", name="c")
    await images.tool("qemu-io", "-f", "raw", "-c", "read -P 0 0 1M", uri)
    await d.cmd("blockdev-reopen", options=[qcow2("c", "x")])
    await images.tool("qemu-io", "-f", "raw", "-c", "read -P 2 0 1M", "-c", "write -P 3 0 64k", uri)
    await d.cmd("blockdev-reopen", options=[qcow2("c", None)])
    await images.tool("qemu-io", "-f", "raw", "-c", "read -P 3 0 64k", "-c",
                      "read -P 0 64k 960k", uri)
    await d.quit()


@case("both")
async def requests_in_flight_stay_right_while_nodes_are_reopened(world):
    d = await world.daemon()
    await open_chain(world, d)
    uri = await d.export("c")
    guest = await world.guest(uri)
    await guest.run()
    for turn in range(20):
        await d.cmd("blockdev-reopen", options=[
            qcow2("c", "b", discard="unmap" if turn % 2 else "ignore"),
            qcow2("x", None, read_only=turn % 2 == 0)])
    await guest.stop()
    await guest.verify()
    await d.quit()
    await images.tool("qemu-img", "check", world.path("c.qcow2"))


@case("ours")
async def what_a_job_reads_is_not_changed_under_it(world):
    d = await world.daemon()
    await open_chain(world, d)
    await d.cmd("blockdev-mirror", job_id="m", device="c", target="x", sync="none")
    await d.wait_event("BLOCK_JOB_READY")
    _, desc = await d.refused("blockdev-reopen", options=[qcow2("c", "a")])
    assert "in use by block job: mirror" in desc, desc
    await d.cmd("blockdev-reopen", options=[qcow2("c", "b", discard="unmap")])
    _, desc = await d.refused("blockdev-reopen", options=[qcow2("x", None, read_only=True)])
    assert desc == "Read-only block node 'x' cannot support read-write users", desc
    await d.cmd("job-cancel", id="m")
    await d.job_gone("m")
    await d.cmd("blockdev-reopen", options=[qcow2("c", "a")])


async def inactive(world):
    d = await world.daemon()
    await open_chain(world, d)
    found = []
    for arguments in ({}, {"node-name": "no", "active": True}, {"node-name": "c", "active": False},
                      {"node-name": "c", "active": False}, {"node-name": "cf", "active": False},
                      {"node-name": "b", "active": False}, {"node-name": "c", "active": True},
                      {"node-name": "a", "active": False}, {"node-name": "c", "active": True},
                      {"node-name": "cf", "active": True}, {"active": False}, {"active": True}):
        await attempt(d, "blockdev-set-active", arguments)
        found.append(await state(d))
    await d.export("c")
    for arguments in ({"node-name": "c", "active": False}, {"active": False}):
        await attempt(d, "blockdev-set-active", arguments)
        found.append(await state(d))
    await d.cmd("block-export-del", id="exp-disk")
    await d.wait_event("BLOCK_EXPORT_DELETED")
    await attempt(d, "blockdev-set-active", {"node-name": "c", "active": False})
    await images.tool("qemu-io", "-c", "write -P 5 0 1M", world.path("c.qcow2"))
    uri = await d.export("c", name="again", export_id="again")
    found.append(await state(d))
    await images.tool("qemu-io", "-f", "raw", "-c", "read -P 5 0 1M", "-c", "write -P 6 1M 1M", uri)
    await d.quit()
    await images.tool("qemu-img", "check", world.path("c.qcow2"))
    return (transcript.replies(d.record, world.folder)
            + [json.dumps(line, sort_keys=True) for line in found])


@case("pair", timeout=120)
async def nodes_are_given_up_and_taken_back_as_by_the_peer(world):
    await compared(world, inactive, "blockdev-set-active")


@case("ours")
async def the_file_of_an_image_is_not_exchanged_under_it(world):
    # The peer takes any other file under the open image.
    d = await world.daemon()
    await open_chain(world, d)
    before = await state(d)
    for file in ("xf", "x"):
        _, desc = await d.refused("blockdev-reopen", options=[dict(qcow2("c", "b"), file=file)])
        assert desc == "Cannot change the option 'file'", desc
    assert await state(d) == before


async def bitmaps(d, node):
    rows = await d.cmd("query-named-block-nodes", flat=True, recorded=False)
    (row,) = [row for row in rows if row["node-name"] == node]
    return sorted([b["name"], b["count"], b["recording"]] for b in row.get("dirty-bitmaps", []))


@case("ours")
async def bitmaps_are_those_that_the_file_holds_when_a_node_is_activated(world):
    # The peer cannot activate a node that was added inactive and holds a bitmap.
    path = await images.create(world.path("a.qcow2"), 4 * MIB)
    await images.tool("qemu-img", "bitmap", "--add", path, "old")
    d = await world.daemon()
    file = {"driver": "file", "filename": path}
    await d.cmd("blockdev-add", driver="qcow2", node_name="a", file=file, active=False)
    assert await bitmaps(d, "a") == []
    await images.tool("qemu-io", "-c", "write -P 1 0 64k", path)
    await d.cmd("blockdev-set-active", node_name="a", active=True)
    assert await bitmaps(d, "a") == [["old", 65536, True]]
    for turn in (1, 2):
        await d.cmd("blockdev-set-active", node_name="a", active=False)
        await images.tool("qemu-img", "bitmap", "--add", path, f"new{turn}")
        await images.tool("qemu-io", "-c", f"write -P 2 {turn}M 64k", path)
        await d.cmd("blockdev-set-active", node_name="a", active=True)
        found = await bitmaps(d, "a")
        assert ["old", (turn + 1) * 65536, True] in found, found
        assert [f"new{turn}", 65536, True] in found, found
    uri = await d.export("a")
    await images.tool("qemu-io", "-f", "raw", "-c", "write -P 3 3M 64k", uri)
    assert ["old", 4 * 65536, True] in await bitmaps(d, "a")
    await d.quit()
    await images.check(path)


@case("ours")
async def no_job_begins_at_an_inactive_node(world):
    # The peer aborts at the first of them.
    d = await world.daemon()
    await open_chain(world, d)
    await images.create(world.path("t.qcow2"), 4 * MIB)
    await d.cmd("blockdev-add", driver="qcow2", node_name="t",
                file={"driver": "file", "filename": world.path("t.qcow2")})
    await d.cmd("blockdev-set-active", node_name="c", active=False)
    for command, arguments in (
            ("block-stream", {"device": "c"}), ("block-commit", {"device": "c"}),
            ("block-commit", {"device": "c", "top-node": "b"}),
            ("blockdev-mirror", {"device": "c", "target": "t", "sync": "full"}),
            ("blockdev-mirror", {"device": "t", "target": "c", "sync": "full"}),
            ("blockdev-backup", {"device": "c", "target": "t", "sync": "full"}),
            ("blockdev-backup", {"device": "t", "target": "c", "sync": "full"})):
        _, desc = await d.refused(command, dict(arguments, **{"job-id": "j"}))
        assert "nactive" in desc, (command, desc)
    assert await d.cmd("query-jobs") == []
    await d.cmd("blockdev-set-active", active=True)
    await d.cmd("block-commit", device="c", job_id="j")
    await d.wait_event("BLOCK_JOB_READY")
    await d.cmd("job-complete", id="j")
    await d.job_gone("j")


@case("ours")
async def the_file_of_an_inactive_image_has_one_writer(world):
    # The peer takes the exports and cannot activate the image then.
    d = await world.daemon()
    path = await images.create(world.path("a.qcow2"), 4 * MIB)
    await d.cmd("blockdev-add", driver="file", node_name="af", filename=path)
    await d.cmd("blockdev-add", driver="qcow2", node_name="a", file="af")
    await d.cmd("blockdev-set-active", active=False)
    for inactive in (True, False):
        _, desc = await d.refused("block-export-add", {
            "type": "nbd", "id": "e", "node-name": "af", "writable": True,
            "allow-inactive": inactive})
        assert "Permission conflict on node 'af'" in desc and "by node 'a'" in desc, desc
    await d.cmd("blockdev-set-active", active=True)
    uri = await d.export("a")
    await images.tool("qemu-io", "-f", "raw", "-c", "write -P 3 0 64k", uri)
    await d.quit()
    await images.check(path)


@case("ours")
async def a_snapshot_into_a_new_file_of_an_inactive_disk_is_taken_and_activated(world):
    d = await world.daemon()
    await open_chain(world, d)
    await d.cmd("blockdev-set-active", node_name="c", active=False)
    for name in "ef":
        await d.cmd("blockdev-snapshot-sync", node_name="c" if name == "e" else "e",
                    snapshot_file=world.path(f"{name}.qcow2"), snapshot_node_name=name)
    for turn in (1, 2):
        await d.cmd("blockdev-set-active", active=True)
        uri = await d.export("f", export_id=f"e{turn}", name=f"e{turn}")
        await images.tool("qemu-io", "-f", "raw", "-c", f"write -P {turn} {turn}M 64k", uri)
        mark = d.mark()
        await d.cmd("block-export-del", id=f"e{turn}", mode="hard")
        await d.wait_event("BLOCK_EXPORT_DELETED", since=mark)
        await d.cmd("blockdev-set-active", active=False)
        # Another process writes meanwhile, which is seen.
        await images.tool("qemu-io", "-c", f"write -P 9 {turn}M 4k", world.path("f.qcow2"))
    uri = await d.export("f", export_id="last", name="last")
    await images.tool("qemu-io", "-f", "raw", "-c", "read -P 9 1M 4k", "-c", "read -P 2 2052k 60k",
                      uri)
    await d.quit()
    await images.check(world.path("f.qcow2"))


@case("ours")
async def a_failed_transaction_takes_an_overlay_of_an_inactive_disk_back(world):
    d = await world.daemon()
    await open_chain(world, d)
    await images.create(world.path("o.qcow2"), 4 * MIB)
    await d.cmd("blockdev-add", driver="qcow2", node_name="o", backing=None,
                file={"driver": "file", "filename": world.path("o.qcow2")})
    await d.cmd("blockdev-set-active", node_name="c", active=False)
    before = await state(d)
    snapshot = {"type": "blockdev-snapshot", "data": {"node": "c", "overlay": "o"}}
    await d.refused("transaction", actions=[snapshot, {"type": "abort", "data": {}}])
    assert await state(d) == before
    await d.cmd("transaction", actions=[snapshot])
    rows = await d.cmd("query-named-block-nodes", flat=True)
    assert not any(row["active"] for row in rows if row["node-name"] in ("c", "o"))
    await d.cmd("blockdev-set-active", active=True)
    await d.export("o")
    await d.quit()


@case("ours")
async def a_raw_disk_is_not_moved_under_who_relies_on_it(world):
    # The peer moves it under a mirror, whose target then keeps the old bytes.
    path, target = world.path("r.raw"), world.path("t.raw")
    for name in (path, target):
        await images.tool("qemu-img", "create", "-f", "raw", name, "4M")
    await images.tool("qemu-img", "create", "-f", "qcow2", world.path("o.qcow2"), "2M")
    d = await world.daemon()
    await d.cmd("blockdev-add", driver="file", node_name="rf", filename=path)
    place = {"driver": "raw", "node-name": "r", "file": "rf", "size": 2 * MIB}
    moved, same = dict(place, offset=MIB), dict(place, offset=0)
    await d.cmd("blockdev-add", **{key.replace("-", "_"): value for key, value in place.items()})
    await d.cmd("blockdev-add", driver="raw", node_name="t", size=2 * MIB,
                file={"driver": "file", "filename": target})
    await d.cmd("blockdev-mirror", job_id="j", device="r", target="t", sync="full")
    await d.wait_event("BLOCK_JOB_READY")
    for change in (moved, dict(place, size=MIB)):
        _, desc = await d.refused("blockdev-reopen", options=[change])
        assert desc == "Node 'r' is busy: block device is in use by block job: mirror", desc
    await d.cmd("blockdev-reopen", options=[same])
    await d.cmd("block-job-cancel", device="j")
    await d.wait_event("BLOCK_JOB_COMPLETED")
    await d.cmd("blockdev-add", driver="qcow2", node_name="o", backing="r",
                file={"driver": "file", "filename": world.path("o.qcow2")})
    _, desc = await d.refused("blockdev-reopen", options=[moved])
    assert desc == "Node 'r' is busy: node is used as backing hd of 'o'", desc
    await d.cmd("blockdev-del", node_name="o")
    await d.cmd("block-dirty-bitmap-add", node="r", name="b")
    await d.cmd("blockdev-reopen", options=[same])
    assert await bitmaps(d, "r") == [["b", 0, True]]
    await d.cmd("blockdev-reopen", options=[moved])
    assert await bitmaps(d, "r") == [["b", 2 * MIB, True]]
