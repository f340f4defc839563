"""Dirty bitmaps: commands, flags, refusals and what files hold, as with the peer."""

import json

from rig import images, transcript
from rig.cases import case
from rig.daemon import Refused

SIZE = 64 * images.MIB
ADD = "block-dirty-bitmap-add"
MERGE = "block-dirty-bitmap-merge"
SHA256 = "x-debug-block-dirty-bitmap-sha256"
VERBS = ["block-dirty-bitmap-" + verb for verb in ("enable", "disable", "clear", "remove")]


async def tried(d, name, /, arguments=None, **kw):
    """Executes a command; the record keeps a refusal."""
    try:
        return await d.cmd(name, arguments, **kw)
    except Refused:
        return None


async def bitmaps(d, node):
    """What a query shows of a node's bitmaps; noted in the record."""
    for row in await d.cmd("query-named-block-nodes", recorded=False, flat=True):
        if row["node-name"] == node:
            found = row.get("dirty-bitmaps")
            d.record.append(("reply", "bitmaps of " + node, [row["ro"], found]))
            return {b.get("name"): b for b in found or []}
    raise AssertionError(f"no node {node}")


async def sums(d, node, *names):
    return [(await d.cmd(SHA256, node=node, name=name))["sha256"] for name in names]


def said(d, world):
    return transcript.replies(d.record, world.folder)


async def compared(world, script, what):
    ours = await script(world.sub("x", world.kind))
    peers = await script(world.sub("p", world.peer))
    transcript.require_same(ours, peers, what)
    return ours


async def raw(world, d, node, size=SIZE):
    path = world.path(node + ".raw")
    with open(path, "wb") as out:
        out.truncate(size)
    await d.cmd("blockdev-add", driver="raw", node_name=node,
                file={"driver": "file", "filename": path})


async def write(uri, *ranges):
    steps = []
    for offset, length in ranges:
        steps += ["-c", f"write -P 0x5a {offset} {length}"]
    await images.tool("qemu-io", "-f", "raw", *steps, uri)


# -- commands and refusals ----------------------------------------------------------------------
async def adding(world):
    await images.create(world.path("a.qcow2"), SIZE)
    await images.create(world.path("v2.qcow2"), SIZE, options="compat=0.10")
    await images.create(world.path("big.qcow2"), SIZE, options="cluster_size=2M")
    await images.create(world.path("small.qcow2"), SIZE, options="cluster_size=512")
    d = await world.daemon()
    for node in ("a", "v2", "big", "small"):
        await d.add_qcow2(node, world.path(node + ".qcow2"))
    await raw(world, d, "r")
    for arguments in (
            {"node": "a", "name": "b0"}, {"node": "a", "name": "b0"},
            {"node": "nowhere", "name": "b0"}, {"node": "a", "name": ""},
            {"node": "nowhere", "name": ""}, {"node": "a", "name": "x" * 1024},
            {"node": "a", "name": "x" * 1023}, {"node": "a", "name": "ä b/\"c"},
            {"node": "r", "name": "y" * 1024, "persistent": True},
            {"node": "a", "name": "y" * 1024, "persistent": True},
            *({"node": "a", "name": f"g{size}", "granularity": size} for size in (
                0, 1, 256, 511, 512, 1000, 1536, 4096, 1 << 31, (1 << 32) - 1, 1 << 32, -1)),
            {"node": "a", "name": "gp", "granularity": 1 << 31, "persistent": True},
            {"node": "a", "name": "gp", "granularity": 512, "persistent": True},
            {"node": "a", "name": "b0", "persistent": True},
            {"node": "r", "name": "p", "persistent": True},
            {"node": "v2", "name": "p", "persistent": True},
            {"node": "a", "name": "p", "persistent": True, "granularity": 1000},
            {"node": "a", "name": "p", "persistent": True, "disabled": True},
            {"node": "a", "name": "off", "disabled": True},
            {"node": "r", "name": "b0"}, {"node": "big", "name": "b0"},
            {"node": "small", "name": "b0"}, {"node": "v2", "name": "b0"},
            {"node": "a"}, {"name": "b"}, {"node": "a", "name": "b", "persistent": 1},
            {"node": "a", "name": "b", "what": 1}):
        await tried(d, ADD, arguments)
    for node in ("a", "v2", "big", "small", "r"):
        await bitmaps(d, node)
    for verb in VERBS + [SHA256]:
        for node, name in (("a", "none"), ("nowhere", "b0"), ("a", ""), ("a", "b0")):
            await tried(d, verb, node=node, name=name)
    await bitmaps(d, "a")
    lines = said(d, world)
    await d.quit()
    return lines


@case("pair")
async def bitmaps_are_added_and_refused_as_by_the_peer(world):
    lines = await compared(world, adding, "adding bitmaps")
    for text in ("Bitmap already exists: b0", "Bitmap name cannot be empty",
                 "Granularity must be power of 2 and at least 512", "Bitmap name too long",
                 "Can't store persistent bitmaps to r: Operation not supported",
                 "Cannot store dirty bitmaps in qcow2 v2 files", "Node 'nowhere' not found"):
        assert any(text in line for line in lines), text


async def merging(world):
    await images.create(world.path("a.qcow2"), SIZE)
    await images.create(world.path("half.qcow2"), SIZE // 2)
    d = await world.daemon()
    await d.add_qcow2("a", world.path("a.qcow2"))
    await d.add_qcow2("half", world.path("half.qcow2"))
    await raw(world, d, "r")
    for node, name, granularity in (("a", "fine", 512), ("a", "b0", 65536), ("a", "b1", 65536),
                                    ("a", "huge", 1 << 20), ("r", "b0", 4096),
                                    ("half", "b0", 65536)):
        await d.cmd(ADD, node=node, name=name, granularity=granularity)
    a, r = await d.export("a"), await d.export("r", "r")
    await write(a, (0, 512), (70000, 5), (1 << 20, 1 << 20), (SIZE - 512, 512))
    await write(r, (5 << 20, 300000))
    await d.cmd("block-dirty-bitmap-clear", node="a", name="b1")
    await write(a, (9 << 20, 1), (12 << 20, 123456))
    await d.cmd("block-dirty-bitmap-disable", node="a", name="b0")
    await write(a, (20 << 20, 65536))
    await sums(d, "a", "fine", "b0", "b1", "huge")
    for target, sources in (
            ("none", ["b0"]), ("b0", ["none"]), ("b0", [{"node": "nowhere", "name": "b0"}]),
            ("b0", [{"node": "half", "name": "b0"}]),
            ("b0", ["b1", {"node": "half", "name": "b0"}]), ("b0", [{"node": "r"}]),
            ("b0", [7]), ("b0", ["b0"]), ("b0", [{"node": "r", "name": "b0"}]),
            ("huge", ["b0", "b1", {"node": "a", "name": "fine"}]), ("fine", ["b1"])):
        await tried(d, MERGE, node="a", target=target, bitmaps=sources)
        await bitmaps(d, "a")
        await sums(d, "a", "fine", "b0", "b1", "huge")
    await tried(d, MERGE, node="nowhere", target="b0", bitmaps=["b0"])
    for verb in VERBS:
        await tried(d, verb, node="a", name="b0")
        await bitmaps(d, "a")
    lines = said(d, world)
    await d.quit()
    return lines


@case("pair")
async def bits_and_merges_of_any_granularity_equal_the_peers(world):
    await compared(world, merging, "merging bitmaps")


@case("ours")
async def a_merge_of_nothing_changes_nothing(world):
    """The peer's process ends at this."""
    await images.create(world.path("a.qcow2"), SIZE)
    d = await world.daemon()
    await d.add_qcow2("a", world.path("a.qcow2"))
    await d.cmd(ADD, node="a", name="b0")
    await d.cmd(MERGE, node="a", target="b0", bitmaps=[])
    assert (await bitmaps(d, "a"))["b0"]["count"] == 0
    await d.quit()


# -- kinds of writes ----------------------------------------------------------------------------
async def writing(world):
    await images.create(world.path("a.qcow2"), SIZE)
    d = await world.daemon()
    await d.add_qcow2("a", world.path("a.qcow2"), discard="unmap")
    await d.cmd(ADD, node="a", name="b0", granularity=4096)
    await d.cmd(ADD, node="a", name="p", persistent=True)
    uri = await d.export("a")
    for steps in (["write 1M 10k"], ["write -z 2M 64k"], ["write -z -u 3M 128k"],
                  ["discard 4M 64k"], ["discard 5000 100"], ["write -z 6000 100"], ["flush"],
                  ["read 30M 1M"], ["write 40M 1", "write 40M 1"]):
        commands = [part for step in steps for part in ("-c", step)]
        await images.tool("qemu-io", "-f", "raw", *commands, uri)
        await bitmaps(d, "a")
        await sums(d, "a", "b0", "p")
    lines = said(d, world)
    await d.quit()
    return lines


@case("pair")
async def every_kind_of_write_is_recorded_as_by_the_peer(world):
    await compared(world, writing, "recording")


# -- in files -----------------------------------------------------------------------------------
async def listed(path):
    _, out, _ = await images.tool("qemu-img", "info", "--output=json", path)
    data = json.loads(out)["format-specific"]["data"]
    return sorted((b["name"], b["granularity"], *sorted(b["flags"]))
                  for b in data.get("bitmaps", []))


async def stored(world):
    path = world.path("a.qcow2")
    await images.create(path, SIZE)
    d = await world.daemon()
    await d.add_qcow2("a", path)
    for name, more in (("on", {}), ("off", {"disabled": True}), ("fine", {"granularity": 512}),
                       ("cleared", {}), ("gone", {}), ("merged", {"disabled": True})):
        await d.cmd(ADD, node="a", name=name, persistent=True, **more)
    await d.cmd(ADD, node="a", name="memory")
    uri = await d.export("a")
    await write(uri, (0, 5), (3 << 20, 200000), (SIZE - 1, 1))
    await d.cmd("block-dirty-bitmap-clear", node="a", name="cleared")
    await d.cmd("block-dirty-bitmap-remove", node="a", name="gone")
    await d.cmd(MERGE, node="a", target="merged", bitmaps=["on", "fine"])
    names = ("on", "off", "fine", "cleared", "merged")
    await bitmaps(d, "a")
    before = await sums(d, "a", *names)
    await d.quit()
    await images.check(path)
    d.record.append(("reply", "in the file", await listed(path)))
    return d, path, names, before


async def read_back(world, kind, path, names, before, offset=10 << 20):
    """Another daemon finds the same bits, also as a reader, and goes on with them."""
    d = await world.daemon(kind=kind)
    await d.cmd(
        "blockdev-add", {"driver": "qcow2", "node-name": "a", "read-only": True,
                         "file": {"driver": "file", "filename": path}})
    assert await sums(d, "a", *names) == before
    found = await bitmaps(d, "a")
    assert found["on"]["persistent"] and found["on"]["recording"], found
    error = await d.refused("block-dirty-bitmap-clear", node="a", name="on")
    assert error[1] == "Bitmap 'on' is readonly and cannot be modified", error
    await d.cmd("blockdev-del", node_name="a")
    await d.add_qcow2("a", path)
    assert await sums(d, "a", *names) == before
    uri = await d.export("a")
    await write(uri, (offset, 1))
    after = await sums(d, "a", *names)
    assert after[0] != before[0] and after[1] == before[1]
    await d.quit()
    await images.check(path)
    return after


@case("pair")
async def stored_bitmaps_are_read_by_the_peer_and_the_other_way_round(world):
    ours, peers = world.sub("x", world.kind), world.sub("p", world.peer)
    d, path, names, before = await stored(ours)
    p, p_path, _, p_before = await stored(peers)
    transcript.require_same(said(d, ours), said(p, peers), "persistent bitmaps")
    assert before == p_before
    after = await read_back(ours, world.peer, path, names, before)
    assert await read_back(peers, world.kind, p_path, names, p_before) == after
    later = 20 << 20
    assert await read_back(ours, world.kind, path, names, after, later) == \
        await read_back(peers, world.peer, p_path, names, after, later)
    assert await listed(path) == await listed(p_path)


async def crashed(world):
    """Q12: kill -9 with persistent bitmaps; only removing is left, and the name is free then."""
    path = world.path("a.qcow2")
    await images.create(path, SIZE)
    await images.tool("qemu-img", "bitmap", "--add", path, "p0")
    await images.tool("qemu-img", "bitmap", "--add", path, "p1")
    d = await world.daemon()
    await d.add_qcow2("a", path)
    await write(await d.export("a"), (0, 1))
    await d.kill9()
    e = await world.daemon()
    await e.add_qcow2("a", path)
    await bitmaps(e, "a")
    await e.cmd(ADD, node="a", name="q0")
    for verb in VERBS[:3]:
        await tried(e, verb, node="a", name="p0")
    for target, sources in (("p0", ["p1"]), ("p0", ["q0"]), ("q0", ["p1"])):
        await tried(e, MERGE, node="a", target=target, bitmaps=sources)
    await tried(e, ADD, node="a", name="p0")
    await tried(e, ADD, node="a", name="p0", persistent=True)
    await tried(e, SHA256, node="a", name="p0")
    await tried(e, "block-dirty-bitmap-remove", node="a", name="p0")
    await tried(e, ADD, node="a", name="p0", persistent=True)
    await bitmaps(e, "a")
    lines = said(e, world)
    await e.quit()
    await images.check(path, leaks_allowed=True)
    return lines + [str(await listed(path))]


@case("pair")
async def after_a_crash_a_bitmap_is_inconsistent_and_can_only_be_removed(world):
    lines = await compared(world, crashed, "bitmaps after a crash")
    assert any("is inconsistent and cannot be used" in line for line in lines)


# -- after a snapshot ---------------------------------------------------------------------------
async def snapshotted(world):
    path = world.path("a.qcow2")
    await images.create(path, SIZE)
    d = await world.daemon()
    await d.add_qcow2("a", path)
    await d.cmd(ADD, node="a", name="p0", persistent=True)
    await d.cmd(ADD, node="a", name="p1", persistent=True)
    await d.cmd(ADD, node="a", name="memory")
    uri = await d.export("a")
    await write(uri, (0, 100000))
    await d.cmd("blockdev-snapshot-sync", node_name="a", snapshot_node_name="o",
                snapshot_file=world.path("o.qcow2"))
    await write(uri, (1 << 20, 1))
    await bitmaps(d, "a")
    await bitmaps(d, "o")
    for verb in ("block-dirty-bitmap-disable", "block-dirty-bitmap-enable",
                 "block-dirty-bitmap-clear", "block-dirty-bitmap-remove"):
        await tried(d, verb, node="a", name="p0")
    await tried(d, MERGE, node="a", target="p0", bitmaps=["p1"])
    await tried(d, MERGE, node="a", target="memory", bitmaps=["p1"])
    await tried(d, ADD, node="o", name="more")
    await tried(d, MERGE, node="o", target="more", bitmaps=[{"node": "a", "name": "p0"}])
    await write(uri, (7 << 20, 1))
    await sums(d, "o", "more")
    await bitmaps(d, "o")
    await tried(d, "block-dirty-bitmap-clear", node="a", name="memory")
    await tried(d, "block-dirty-bitmap-remove", node="a", name="memory")
    await bitmaps(d, "a")
    lines = said(d, world)
    await d.quit()
    await images.check(path)
    return lines + [str(await listed(path))]


@case("pair")
async def after_a_snapshot_bitmaps_stay_where_the_peer_leaves_them(world):
    await compared(world, snapshotted, "bitmaps and a snapshot")


# -- transactions -------------------------------------------------------------------------------
def actions(*pairs):
    return [{"type": kind if kind in ("abort", "blockdev-backup", "blockdev-snapshot-sync")
             else "block-dirty-bitmap-" + kind, "data": data} for kind, data in pairs]


async def together(world):
    path = world.path("a.qcow2")
    await images.create(path, SIZE)
    d = await world.daemon()
    await d.add_qcow2("a", path)
    uri = await d.export("a")
    for name, more in (("x", {}), ("y", {"persistent": True, "disabled": True}),
                       ("z", {"persistent": True})):
        await d.cmd(ADD, node="a", name=name, **more)
    await write(uri, (0, 100), (1 << 20, 1))

    def of(name, node="a", **more):
        return dict({"node": node, "name": name}, **more)
    for steps in (
            [("add", of("n")), ("abort", {})],
            [("add", of("n", persistent=True)), ("clear", of("x")), ("abort", {})],
            [("clear", of("x")), ("disable", of("z")), ("enable", of("y")),
             ("merge", {"node": "a", "target": "y", "bitmaps": ["z"]}), ("remove", of("z")),
             ("abort", {})],
            [("add", of("x"))],
            [("add", of("n")), ("clear", of("none"))],
            [("add", of("n", node="nowhere"))],
            [("clear", of("x", node="nowhere"))],
            [("add", of("n", granularity=5))],
            [("merge", {"node": "a", "target": "y", "bitmaps": ["none"]})],
            [("remove", of("x")), ("add", of("x"))],
            [("remove", of("x")), ("clear", of("x"))],
            [("remove", of("z")), ("remove", of("z"))],
            [("clear", of("y")), ("disable", of("none"))],
            [("add", of("n", disabled=True)),
             ("merge", {"node": "a", "target": "n", "bitmaps": ["x", "z"]}),
             ("clear", of("x")), ("disable", of("z")), ("enable", of("y"))],
            [("add", of("m", granularity=512)), ("add", of("m2", persistent=True)),
             ("remove", of("z"))],
            [("merge", {"node": "a", "target": "m", "bitmaps": ["n"]}), ("remove", of("n")),
             ("remove", of("m2"))]):
        await tried(d, "transaction", actions=actions(*steps))
        found = await bitmaps(d, "a")
        await sums(d, "a", *sorted(found))
    await write(uri, (5 << 20, 1))
    await sums(d, "a", *sorted(await bitmaps(d, "a")))
    lines = said(d, world)
    await d.quit()
    await images.check(path)
    return lines + [str(await listed(path))]


@case("pair")
async def bitmap_actions_of_a_transaction_happen_all_or_none(world):
    lines = await compared(world, together, "transactions of bitmaps")
    assert any("Transaction aborted using Abort action" in line for line in lines)


@case("ours")
async def an_aborted_transaction_keeps_removed_bitmaps_in_the_file(world):
    """The peer takes a bitmap out of the file before it knows that the transaction goes through."""
    path = world.path("a.qcow2")
    await images.create(path, SIZE)
    await images.tool("qemu-img", "bitmap", "--add", path, "p")
    d = await world.daemon()
    await d.add_qcow2("a", path)
    error = await d.refused("transaction", actions=actions(
        ("add", {"node": "a", "name": "n", "persistent": True}),
        ("remove", {"node": "a", "name": "p"}), ("abort", {})))
    assert error[1] == "Transaction aborted using Abort action", error
    await d.kill9()
    assert [row[0] for row in await listed(path)] == ["p"]
    await images.check(path, leaks_allowed=True)


async def with_others(world):
    """Checkpoints as libvirt makes them: snapshot or backup, and bitmaps at the same instant."""
    path = world.path("a.qcow2")
    await images.create(path, SIZE)
    await images.create(world.path("t.qcow2"), SIZE)
    d = await world.daemon()
    await d.add_qcow2("a", path)
    await d.add_qcow2("t", world.path("t.qcow2"))
    uri = await d.export("a")
    await d.cmd(ADD, node="a", name="old", persistent=True)
    await write(uri, (0, 100))
    await d.cmd("transaction", actions=actions(
        ("blockdev-backup", {"device": "a", "target": "t", "sync": "full", "job-id": "j"}),
        ("add", {"node": "a", "name": "new", "persistent": True}),
        ("disable", {"node": "a", "name": "old"})))
    await d.job_gone("j")
    await write(uri, (1 << 20, 100))
    await bitmaps(d, "a")
    await d.cmd("transaction", actions=actions(
        ("blockdev-snapshot-sync", {"node-name": "a", "snapshot-node-name": "o",
                                    "snapshot-file": world.path("o.qcow2")}),
        ("add", {"node": "o", "name": "new", "persistent": True})))
    await write(uri, (2 << 20, 100))
    await bitmaps(d, "a")
    await bitmaps(d, "o")
    refused = await d.refused("transaction", actions=actions(
        ("blockdev-snapshot-sync", {"node-name": "o", "snapshot-node-name": "o2",
                                    "snapshot-file": world.path("o2.qcow2")}),
        ("add", {"node": "o2", "name": "b", "persistent": True}),
        ("add", {"node": "o2", "name": "b"})))
    assert refused[1] == "Bitmap already exists: b", refused
    await bitmaps(d, "o")
    lines = said(d, world)
    await d.quit()
    await images.check(world.path("o.qcow2"))
    return lines + [str(await listed(path)), str(await listed(world.path("o.qcow2")))]


@case("pair")
async def bitmaps_snapshots_and_backups_go_together_as_with_the_peer(world):
    await compared(world, with_others, "bitmaps in transactions with others")


# -- over NBD -----------------------------------------------------------------------------------
async def seen(uri, context):
    _, out, err = await images.tool("nbdinfo", "--map=" + context, uri, check=False)
    return [context] + out.split("\n") + err.split("\n")[:1]


async def exported(world):
    base, path = world.path("base.qcow2"), world.path("a.qcow2")
    await images.create(base, SIZE)
    await images.tool("qemu-io", "-f", "qcow2", "-c", "write 0 1M", "-c", "write -z 10M 1M", base)
    await images.create(path, SIZE, backing=base)
    await images.create(world.path("o.qcow2"), SIZE)
    d = await world.daemon()
    await d.cmd("blockdev-add", {"driver": "qcow2", "node-name": "base", "read-only": True,
                                 "file": {"driver": "file", "filename": base}})
    await d.add_qcow2("a", path, backing="base")
    await d.add_qcow2("other", world.path("o.qcow2"))
    for node, name, more in (("base", "below", {}), ("a", "b0", {}), ("a", "fine", {
            "granularity": 512}), ("a", "off", {"disabled": True}), ("other", "b0", {})):
        await d.cmd(ADD, node=node, name=name, **more)

    def export(export_id, node="a", writable=True, **more):
        return tried(d, "block-export-add", dict({
            "type": "nbd", "id": export_id, "node-name": node, "name": export_id,
            "writable": writable}, **more))
    await export("e", bitmaps=["b0", {"node": "a", "name": "fine"}, "below"],
                 **{"allocation-depth": True})
    for bitmaps_wanted in (["none"], [{"node": "nowhere", "name": "b0"}],
                           [{"node": "a", "name": "none"}], ["b0"],
                           [{"node": "other", "name": "b0"}, "b0"], [7], [{"name": "b0"}]):
        await export("refused", bitmaps=bitmaps_wanted)
        await export("refused", writable=False, bitmaps=bitmaps_wanted)
    await bitmaps(d, "a")
    for verb in VERBS:
        await tried(d, verb, node="a", name="b0")
    await tried(d, MERGE, node="a", target="b0", bitmaps=["off"])
    await tried(d, MERGE, node="a", target="off", bitmaps=["b0"])
    await export("ro", writable=False, bitmaps=["off"])
    await export("plain", node="other")
    uri = d.uri("e")
    await write(uri, (1 << 20, 10), (70000, 512), (5 << 20, 3 << 20), (SIZE - 1, 1))
    lines = []
    for context in ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0",
                    "qemu:dirty-bitmap:fine", "qemu:dirty-bitmap:below"):
        lines += await seen(uri, context)
    lines += await seen(d.uri("ro"), "qemu:dirty-bitmap:off")
    for name in ("e", "ro", "plain"):
        lines += await contexts_of(d.nbd_path, name)
    for export_id in ("e", "ro"):
        await d.cmd("block-export-del", id=export_id, mode="hard")
        await d.wait_event("BLOCK_EXPORT_DELETED", id=export_id)
    await bitmaps(d, "a")
    await tried(d, "block-dirty-bitmap-clear", node="a", name="b0")
    replies = said(d, world)
    await d.quit()
    return replies + lines


async def contexts_of(path, name):
    """What lists, selections and status replies of several contexts say."""
    import nbd
    lines = []
    queries = (
        [], ["base:"], ["qemu:"], ["qemu:dirty-bitmap:"], ["qemu:dirty-bitmap"], ["qemu:alloc"],
        ["base:allocation", "qemu:allocation-depth"], ["qemu:dirty-bitmap:b0"],
        ["qemu:dirty-bitmap:off", "base:allocation"], ["qemu:dirty-bitmap:none"], ["other:"],
        ["qemu:allocation-depth", "qemu:dirty-bitmap:fine", "base:allocation",
         "qemu:dirty-bitmap:below"])
    for wanted in queries:
        h = nbd.NBD()
        h.set_opt_mode(True)
        h.connect_unix(path)
        h.set_export_name(name)
        for query in wanted:
            h.add_meta_context(query)
        listed_names, chosen, found = [], [], []
        try:
            h.opt_list_meta_context(lambda context, names=listed_names: names.append(context))
            h.opt_go()
            for context in ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0",
                            "qemu:dirty-bitmap:fine", "qemu:dirty-bitmap:below",
                            "qemu:dirty-bitmap:off"):
                if h.can_meta_context(context):
                    chosen.append(context)
            if chosen:
                for flags in (0, nbd.CMD_FLAG_REQ_ONE):
                    h.block_status(
                        8 << 20, 1000, lambda context, offset, entries, error: found.append(
                            [context, offset, [int(e) for e in entries]]), flags)
        except nbd.Error as error:
            found.append(error.errno)
        lines.append(json.dumps([name, wanted, listed_names, chosen, found]))
        try:
            h.shutdown()
        except nbd.Error:
            pass
    return lines


@case("pair")
async def nbd_clients_see_the_bitmaps_and_depths_that_the_peer_shows(world):
    lines = await compared(world, exported, "contexts of NBD")
    assert any("dirty" in line and "65536" in line for line in lines)


# -- going on at another node -------------------------------------------------------------------
@case("ours")
async def a_bitmap_that_follows_goes_on_at_the_overlay_and_at_the_target(world):
    path = world.path("a.qcow2")
    await images.create(path, SIZE)
    await images.create(world.path("t.qcow2"), SIZE)
    d = await world.daemon()
    await d.add_qcow2("a", path)
    await d.cmd(ADD, node="a", name="f", persistent=True, follow=True)
    await d.cmd(ADD, node="a", name="stays", persistent=True)
    uri = await d.export("a")
    await write(uri, (0, 1))
    await d.cmd("blockdev-snapshot-sync", node_name="a", snapshot_node_name="o",
                snapshot_file=world.path("o.qcow2"))
    await write(uri, (10 << 20, 1))
    found = await bitmaps(d, "o")
    assert set(found) == {"f"} and found["f"]["count"] == 2 * 65536, found
    assert found["f"]["recording"] and found["f"]["follow"], found
    assert (await bitmaps(d, "a"))["f"]["count"] == 65536
    await d.add_qcow2("t", world.path("t.qcow2"))
    await d.cmd("blockdev-mirror", device="o", target="t", sync="full", job_id="j")
    await d.wait_event("BLOCK_JOB_READY", device="j")
    await write(uri, (20 << 20, 1))
    await d.cmd("block-job-complete", device="j")
    await d.job_gone("j")
    await write(uri, (30 << 20, 1))
    found = await bitmaps(d, "t")
    assert found["f"]["count"] == 4 * 65536 and found["f"]["persistent"], found
    await d.quit()
    for name in ("a", "o", "t"):
        await images.check(world.path(name + ".qcow2"))
    assert await listed(world.path("t.qcow2")) == [("f", 65536, "auto")]
    peer = await world.daemon(kind=world.peer)
    await peer.add_qcow2("t", world.path("t.qcow2"))
    assert (await bitmaps(peer, "t"))["f"]["count"] == 4 * 65536
    await peer.quit()


async def counts(d, node, name="f"):
    return (await bitmaps(d, node))[name]["count"] // 65536


@case("ours")
async def a_bitmap_that_follows_has_every_change_across_both_kinds_of_commit(world):
    path = world.path("n0.qcow2")
    await images.create(path, SIZE)
    d = await world.daemon()
    await d.add_qcow2("n0", path)
    await d.cmd(ADD, node="n0", name="f", persistent=True, follow=True)
    uri = await d.export("n0")
    await write(uri, (0, 1))
    for at in (1, 2, 3):
        await d.cmd("blockdev-snapshot-sync", node_name=f"n{at - 1}",
                    snapshot_node_name=f"n{at}", snapshot_file=world.path(f"n{at}.qcow2"))
        await write(uri, (at << 20, 1))
    assert [await counts(d, f"n{at}") for at in range(4)] == [1, 2, 3, 4]
    # Between: what the layers had is in the base's bitmap, the disk's own is as it was.
    await d.cmd("block-commit", device="n3", top_node="n2", base_node="n0", job_id="j",
                auto_finalize=False)
    await d.wait_event("BLOCK_JOB_PENDING", id="j")
    await write(uri, (4 << 20, 1))
    mark = d.mark()
    await d.cmd("job-finalize", id="j")
    await d.job_gone("j", since=mark)
    assert await counts(d, "n0") == 3 and await counts(d, "n3") == 5
    # The active layer: the disk's bitmap goes down with the guests, and goes on there.
    mark = d.mark()
    await d.cmd("block-commit", device="n3", job_id="k")
    await d.wait_event("BLOCK_JOB_READY", device="k")
    await write(uri, (5 << 20, 1))
    await d.cmd("block-job-complete", device="k")
    await d.job_gone("k", since=mark)
    await write(uri, (6 << 20, 1))
    assert await counts(d, "n0") == 7
    assert (await bitmaps(d, "n0"))["f"]["recording"]
    await d.quit()
    await images.check(path)
    peer = await world.daemon(kind=world.peer)
    await peer.add_qcow2("n0", path)
    assert await counts(peer, "n0") == 7
    await peer.quit()


@case("ours")
async def a_mirror_gives_the_bits_of_a_bitmap_up_only_when_it_has_completed(world):
    source = await images.create(world.path("a.qcow2"), SIZE)
    await images.create(world.path("t.qcow2"), SIZE)
    d = await world.daemon()
    await d.add_qcow2("a", source)
    await d.add_qcow2("t", world.path("t.qcow2"))
    await d.cmd(ADD, node="a", name="m", granularity=65536)
    uri = await d.export("a")
    await write(uri, (0, 1), (1 << 20, 1))

    async def mirrored(**options):
        mark = d.mark()
        await d.cmd("blockdev-mirror", device="a", target="t", sync="bitmap", bitmap="m",
                    bitmap_mode="on-success", job_id="j", auto_finalize=False, **options)
        await d.wait_event("BLOCK_JOB_READY", device="j", since=mark)
        await d.cmd("block-job-complete", device="j")
        await d.wait_event("BLOCK_JOB_PENDING", id="j", since=mark)
        return mark

    for verb in ("job-cancel", "job-finalize"):
        mark = await mirrored()
        named = [b for b in (await shown(d, "a")) if b.get("name") == "m"]
        assert [b["count"] for b in named] == [2 * 65536], named
        await d.cmd(verb, id="j")
        await d.job_gone("j", since=mark)
        ended = d.events("BLOCK_JOB_COMPLETED", since=mark)
        assert bool(ended) == (verb == "job-finalize"), ended
        assert await counts(d, "a", "m") == (0 if ended else 2), verb
    await d.quit()


async def shown(d, node):
    """Every bitmap as it is shown, successors too."""
    nodes = await d.cmd("query-named-block-nodes", flat=True, recorded=False)
    (found,) = [row for row in nodes if row["node-name"] == node]
    return found.get("dirty-bitmaps", [])
