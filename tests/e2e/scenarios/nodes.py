"""Nodes that are added inactive, and what blockdev-reopen changes of those that are there."""

from rig import images
from rig.scenario import CLUSTER, MIB, SIZE, scenario


def on(name):
    """A node of driver file, for a node that is described whole."""
    return {"driver": "file", "node-name": name + "-file"}


async def files(s, *names):
    """Files as nodes of their own, NAME-file."""
    for name in names:
        await s.cmd("blockdev-add", driver="file", node_name=name.split(".")[0] + "-file",
                    filename=s.path(name))


async def activity(s):
    """Which nodes of the monitor are active, and which take writes."""
    nodes = await s.d.cmd("query-named-block-nodes", {"flat": True}, recorded=False)
    rows = sorted([n["node-name"], n["active"], n["ro"]] for n in nodes
                  if not n["node-name"].startswith("#"))
    s.d.record.append(("reply", "activity", rows))


async def sizes(s):
    nodes = await s.d.cmd("query-named-block-nodes", {"flat": True}, recorded=False)
    rows = sorted([n["node-name"], n["image"]["virtual-size"]] for n in nodes
                  if not n["node-name"].startswith("#"))
    s.d.record.append(("reply", "sizes", rows))


@scenario
async def added_inactive_and_activated(s):
    await s.start()
    await s.chain("ab", opened=False)
    await s.open("a", read_only=True)
    await s.open("b", backing="a", active=False)
    await activity(s)
    # Another process has it meanwhile.
    await s.fill(s.path("b.qcow2"), [(0x77, 3 * MIB, MIB)])
    await s.cmd("blockdev-set-active", node_name="b", active=True)
    await s.cmd("blockdev-set-active", node_name="b", active=True)
    await activity(s)
    await s.export("b")
    await s.write("b", (0x78, 3 * MIB, CLUSTER))
    await s.cmd("blockdev-set-active", node_name="b", active=False)
    await s.cmd("blockdev-set-active", active=False)
    await activity(s)


@scenario
async def what_an_inactive_node_refuses(s):
    await s.start()
    await s.chain("ab", opened=False)
    await s.image("c", backing="b")
    await s.image("t")
    await s.open("a", read_only=True)
    await s.open("b", backing="a", active=False)
    await s.open("t")
    await s.job("blockdev-mirror", device="t", target="b", sync="full")
    await s.cmd("block_resize", node_name="b", size=2 * SIZE)
    await s.open("c", backing="b")
    await s.cmd("blockdev-reopen", options=[
        {"driver": "qcow2", "node-name": "b", "backing": "a",
         "file": {"driver": "file", "filename": s.path("b.qcow2")}}])
    await s.open("c", backing="b", active=False)
    await activity(s)
    await s.cmd("blockdev-set-active", node_name="b", active=False)
    await s.cmd("blockdev-del", node_name="c")
    await s.cmd("blockdev-del", node_name="b")
    await s.graph()


@scenario
async def children_of_inactive_nodes(s):
    await s.start()
    await s.image("r", fmt="raw")
    await s.cmd("blockdev-add", driver="file", node_name="f", filename=s.path("r.raw"),
                active=False)
    await s.cmd("blockdev-add", driver="raw", node_name="r", file="f")
    await s.cmd("blockdev-add", driver="raw", node_name="r", file=dict(
        on("g"), filename=s.path("r.raw"), active=False))
    await s.cmd("blockdev-add", driver="raw", node_name="r", file="f", active=False)
    await activity(s)
    await s.cmd("blockdev-set-active", node_name="r", active=True)
    await activity(s)
    await s.cmd("blockdev-set-active", node_name="f", active=False)
    await s.cmd("blockdev-set-active", node_name="r", active=False)
    await activity(s)
    await s.cmd("blockdev-set-active", active=True)
    await activity(s)


@scenario
async def an_export_activates_its_node(s):
    await s.start()
    await s.chain("a", opened=False)
    await s.open("a", active=False)
    await s.export("a")
    await activity(s)
    await s.write("a", (0x31, 0, CLUSTER))


@scenario
async def reopened_raw_places(s):
    await s.start()
    await s.image("r", fmt="raw", writes=[(0x21, 0, MIB), (0x22, MIB, MIB)])
    await files(s, "r.raw")
    await s.cmd("blockdev-add", driver="raw", node_name="r", file="r-file")
    await s.export("r")
    for place in ({"offset": MIB}, {"offset": MIB, "size": MIB}, {"size": MIB}, {},
                  {"offset": 4 * SIZE}, {"size": 4 * SIZE}, {"offset": MIB, "size": SIZE},
                  {"size": 1000}, {"size": -1}, {"offset": -1}, {"offset": MIB}):
        await s.cmd("blockdev-reopen", options=[
            dict(place, **{"driver": "raw", "node-name": "r", "file": "r-file"})])
        await sizes(s)
    await s.write("r", (0x23, 0, CLUSTER))
    await s.cmd("blockdev-reopen", options=[
        {"driver": "raw", "node-name": "r", "file": "nothing"}])


@scenario
async def reopened_options_of_qcow2(s):
    await s.start()
    await s.image("a", [(0x41, 0, MIB)])
    await s.image("o", options="compat=0.10")
    await files(s, "a.qcow2", "o.qcow2")
    for name in "ao":
        await s.cmd("blockdev-add", driver="qcow2", node_name=name, file=f"{name}-file")
    await s.export("a")
    for given in (
            {"lazy-refcounts": True}, {"lazy-refcounts": False},
            {"l2-cache-size": MIB}, {"l2-cache-size": 1}, {"l2-cache-size": -1},
            {"refcount-cache-size": MIB}, {"cache-size": MIB},
            {"cache-size": MIB, "l2-cache-size": MIB, "refcount-cache-size": 1},
            {"cache-size": 1, "l2-cache-size": 2}, {"cache-size": 1, "refcount-cache-size": 2},
            {"l2-cache-entry-size": 4096}, {"l2-cache-entry-size": 1000},
            {"l2-cache-entry-size": 2 * CLUSTER},
            {"cache-clean-interval": 5}, {"cache-clean-interval": 0},
            {"cache-clean-interval": -1}, {"cache-clean-interval": 1 << 33},
            {"overlap-check": "none"}, {"overlap-check": "all"}, {"overlap-check": "some"},
            {"overlap-check": {"template": "none", "main-header": True}},
            {"discard": "unmap"}, {"detect-zeroes": "on"}, {"discard-no-unref": True},
            {"pass-discard-request": True}, {"pass-discard-snapshot": False},
            {"pass-discard-other": True}, {"cache": {"no-flush": True}}, {}):
        await s.cmd("blockdev-reopen", options=[
            dict(given, **{"driver": "qcow2", "node-name": "a", "file": "a-file"})])
        await s.write("a", (0x42, MIB, CLUSTER))
    for given in ({"lazy-refcounts": True}, {"discard-no-unref": True}, {}):
        await s.cmd("blockdev-reopen", options=[
            dict(given, **{"driver": "qcow2", "node-name": "o", "file": "o-file"})])


async def tried(s, node, *commands):
    """What an NBD client is told that tries each of these."""
    told = []
    for command in commands:
        mode = ["-r"] if command.startswith("read") else []
        code, out, err = await images.tool("qemu-io", *mode, "-f", "raw", "-c", command,
                                           s.d.uri(node), check=False)
        failed = [line for line in (out + err).splitlines() if "failed" in line]
        told.append([command, code, failed])
    s.d.record.append(("reply", "tried", told))


@scenario
async def exports_of_inactive_nodes(s):
    await s.start()
    await s.image("a", [(0x31, 0, MIB)])
    await s.open("a", active=False)
    shown = {"type": "nbd", "id": "e", "node-name": "a", "writable": True}
    kinds = [f"write -P 50 0 {CLUSTER}", f"write -z 0 {CLUSTER}", f"discard 0 {CLUSTER}", "flush"]
    for given in ({}, {"allow-inactive": False}, {"allow-inactive": True}):
        await s.cmd("block-export-add", dict(shown, **given))
        await activity(s)
        await s.cmd("query-block-exports")
        await s.cmd("blockdev-set-active", node_name="a", active=False)
        await activity(s)
        if given.get("allow-inactive"):
            await tried(s, "a", f"read -P 49 0 {CLUSTER}", *kinds, f"read -P 49 0 {CLUSTER}")
            await s.cmd("blockdev-set-active", node_name="a", active=True)
            await tried(s, "a", *kinds)
            await s.cmd("blockdev-set-active", active=False)
            await activity(s)
            await tried(s, "a", f"read -P 0 0 {CLUSTER}", *kinds)
        mark = s.d.mark()
        await s.cmd("block-export-del", id="e")
        await s.event("BLOCK_EXPORT_DELETED", since=mark)
        await s.cmd("blockdev-set-active", node_name="a", active=False)
        await activity(s)


@scenario
async def a_read_only_export_of_an_inactive_node(s):
    await s.start()
    await s.image("a", [(0x31, 0, MIB)])
    await s.open("a", active=False, read_only=True)
    await s.cmd("block-export-add", type="nbd", id="w", node_name="a", writable=True,
                allow_inactive=True)
    await s.cmd("block-export-add", type="nbd", id="e", node_name="a", allow_inactive=True)
    await activity(s)
    await tried(s, "a", f"read -P 49 0 {CLUSTER}")
    await s.cmd("blockdev-set-active", node_name="a", active=True)
    await activity(s)
    await tried(s, "a", f"read -P 49 0 {CLUSTER}")


@scenario
async def snapshots_of_inactive_nodes(s):
    await s.start()
    await s.image("a", [(0x31, 0, MIB)])
    for name in "bcd":
        await s.image(name, backing="a")
    # One that is added inactive stays writable below its overlay in the peer.
    await s.open("a")
    await s.cmd("blockdev-set-active", node_name="a", active=False)
    await s.open("b")
    await s.open("c", active=False)
    await s.open("d", active=False)
    await s.image("t")
    await s.open("t")
    await s.cmd("blockdev-snapshot", node="t", overlay="c")
    await activity(s)
    await s.cmd("blockdev-snapshot", node="a", overlay="b")
    await s.graph()
    await activity(s)
    await s.cmd("blockdev-snapshot", node="b", overlay="d")
    await s.graph()
    await activity(s)
    await s.cmd("blockdev-set-active", active=True)
    await s.graph()
    await activity(s)
