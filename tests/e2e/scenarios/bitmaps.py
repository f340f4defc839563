"""Dirty bitmaps: verbs, flags, persistence, transactions."""

from rig.scenario import CLUSTER, MIB, SIZE, scenario


async def bitmaps_of(s, node):
    nodes = await s.d.cmd("query-named-block-nodes", {"flat": True}, recorded=False)
    found = [n for n in nodes if n["node-name"] == node]
    s.d.record.append(("reply", "bitmaps", found[0].get("dirty-bitmaps", [])))


async def sha(s, node, *names):
    for name in names:
        await s.cmd("x-debug-block-dirty-bitmap-sha256", node=node, name=name)


@scenario
async def life_of_a_bitmap(s):
    await s.start()
    await s.chain("a")
    await s.export("a")
    await s.cmd("block-dirty-bitmap-add", node="a", name="m")
    await s.cmd("block-dirty-bitmap-add", node="a", name="m")
    await s.write("a", (0x41, MIB, CLUSTER), (0x42, 3 * MIB - 512, 1024))
    await bitmaps_of(s, "a")
    await sha(s, "a", "m")
    await s.cmd("block-dirty-bitmap-disable", node="a", name="m")
    await s.write("a", (0x43, 5 * MIB, CLUSTER))
    await bitmaps_of(s, "a")
    await s.cmd("block-dirty-bitmap-enable", node="a", name="m")
    await s.write("a", (0x44, 6 * MIB, CLUSTER))
    await sha(s, "a", "m")
    await s.cmd("block-dirty-bitmap-clear", node="a", name="m")
    await bitmaps_of(s, "a")
    await s.cmd("block-dirty-bitmap-remove", node="a", name="m")
    await s.cmd("block-dirty-bitmap-remove", node="a", name="m")
    await bitmaps_of(s, "a")


@scenario
async def granularities(s):
    await s.start()
    await s.image("a", options="cluster_size=4096")
    await s.image("b", options="cluster_size=2M")
    await s.image("r", fmt="raw")
    await s.open("a")
    await s.open("b")
    await s.open("r", fmt="raw")
    for node in "abr":
        await s.cmd("block-dirty-bitmap-add", node=node, name="default")
        await bitmaps_of(s, node)
    for granularity in (512, 256, 1000, 0, 1 << 31, 1 << 32, 131072):
        await s.cmd("block-dirty-bitmap-add", node="a", name=f"g{granularity}",
                    granularity=granularity)
    await bitmaps_of(s, "a")


@scenario
async def merged(s):
    await s.start()
    await s.chain("a")
    await s.image("o")
    await s.open("o")
    await s.export("a")
    await s.export("o")
    await s.cmd("block-dirty-bitmap-add", node="a", name="x", granularity=65536)
    await s.cmd("block-dirty-bitmap-add", node="a", name="y", granularity=4096)
    await s.cmd("block-dirty-bitmap-add", node="o", name="z", granularity=512)
    await s.write("a", (0x41, MIB, CLUSTER))
    await s.write("o", (0x42, 3 * MIB, 512))
    await s.cmd("block-dirty-bitmap-add", node="a", name="sum", granularity=32768, disabled=True)
    await s.cmd("block-dirty-bitmap-merge", node="a", target="sum",
                bitmaps=["x", "y", {"node": "o", "name": "z"}])
    await sha(s, "a", "sum", "x", "y")
    await s.cmd("block-dirty-bitmap-merge", node="a", target="sum", bitmaps=["nothing"])
    await s.cmd("block-dirty-bitmap-merge", node="a", target="nothing", bitmaps=["x"])
    await s.cmd("block-dirty-bitmap-merge", node="a", target="sum",
                bitmaps=[{"node": "nothing", "name": "z"}])
    await bitmaps_of(s, "a")


@scenario
async def sizes_that_do_not_merge(s):
    await s.start()
    await s.chain("a")
    await s.image("o", size=SIZE * 2)
    await s.open("o")
    await s.cmd("block-dirty-bitmap-add", node="a", name="x")
    await s.cmd("block-dirty-bitmap-add", node="o", name="z")
    await s.cmd("block-dirty-bitmap-merge", node="a", target="x",
                bitmaps=[{"node": "o", "name": "z"}])


@scenario
async def persistent(s):
    await s.start()
    await s.chain("a")
    await s.export("a")
    await s.cmd("block-dirty-bitmap-add", node="a", name="p", persistent=True)
    await s.cmd("block-dirty-bitmap-add", node="a", name="q", persistent=True, disabled=True)
    await s.cmd("block-dirty-bitmap-add", node="a", name="gone", persistent=True)
    await s.write("a", (0x41, MIB, CLUSTER))
    await sha(s, "a", "p", "q")
    await s.cmd("block-dirty-bitmap-remove", node="a", name="gone")
    await bitmaps_of(s, "a")
    await s.cmd("block-export-del", id="exp-a")
    await s.event("BLOCK_EXPORT_DELETED", id="exp-a")
    await s.cmd("blockdev-del", node_name="a")
    await s.open("a")
    await bitmaps_of(s, "a")
    await sha(s, "a", "p", "q")


@scenario
async def wrong_arguments(s):
    await s.start()
    await s.chain("ab")
    await s.image("r", fmt="raw")
    await s.open("r", fmt="raw")
    await s.image("old", options="compat=0.10")
    await s.open("old")
    await s.cmd("block-dirty-bitmap-add", node="nothing", name="m")
    await s.cmd("block-dirty-bitmap-add", node="b", name="")
    await s.cmd("block-dirty-bitmap-add", node="b", name="n" * 1023)
    await s.cmd("block-dirty-bitmap-add", node="b", name="n" * 1024)
    await s.cmd("block-dirty-bitmap-add", node="r", name="m", persistent=True)
    await s.cmd("block-dirty-bitmap-add", node="old", name="m", persistent=True)
    await s.cmd("block-dirty-bitmap-add", node="a", name="m", persistent=True)
    await s.cmd("block-dirty-bitmap-add", node="b", name="m", granularity=-1)
    for verb in ("remove", "clear", "enable", "disable"):
        await s.cmd(f"block-dirty-bitmap-{verb}", node="b", name="nothing")
        await s.cmd(f"block-dirty-bitmap-{verb}", node="nothing", name="m")
    await sha(s, "b", "nothing")


@scenario
async def after_a_snapshot(s):
    await s.start()
    await s.chain("a")
    await s.export("a")
    await s.cmd("block-dirty-bitmap-add", node="a", name="m")
    await s.cmd("block-dirty-bitmap-add", node="a", name="p", persistent=True)
    await s.write("a", (0x41, MIB, CLUSTER))
    await s.cmd("blockdev-snapshot-sync", node_name="a", snapshot_file=s.path("o.qcow2"),
                snapshot_node_name="o")
    await bitmaps_of(s, "a")
    await bitmaps_of(s, "o")
    for name in "mp":
        await s.cmd("block-dirty-bitmap-clear", node="a", name=name)
        await s.cmd("block-dirty-bitmap-disable", node="a", name=name)
        await s.cmd("block-dirty-bitmap-remove", node="a", name=name)
    await bitmaps_of(s, "a")


@scenario
async def resized(s):
    await s.start()
    await s.chain("a")
    await s.export("a")
    await s.cmd("block-dirty-bitmap-add", node="a", name="m")
    await s.write("a", (0x41, 7 * MIB, CLUSTER))
    await s.cmd("block-export-del", id="exp-a")
    await s.event("BLOCK_EXPORT_DELETED", id="exp-a")
    await s.cmd("block_resize", node_name="a", size=16 * MIB)
    await sha(s, "a", "m")
    await s.cmd("block_resize", node_name="a", size=4 * MIB)
    await sha(s, "a", "m")
    await bitmaps_of(s, "a")


@scenario
async def in_a_transaction(s):
    await s.start()
    await s.chain("a")
    await s.export("a")
    await s.cmd("block-dirty-bitmap-add", node="a", name="m")
    await s.write("a", (0x41, MIB, CLUSTER))

    def act(kind, **data):
        return {"type": f"block-dirty-bitmap-{kind}", "data": data}

    await s.cmd("transaction", actions=[
        act("add", node="a", name="n"), act("merge", node="a", target="n", bitmaps=["m"]),
        act("clear", node="a", name="m"), act("disable", node="a", name="m")])
    await bitmaps_of(s, "a")
    await sha(s, "a", "m", "n")
    await s.cmd("transaction", actions=[
        act("remove", node="a", name="n"), act("enable", node="a", name="m"),
        {"type": "abort", "data": {}}])
    await bitmaps_of(s, "a")
    await s.cmd("transaction", actions=[
        act("clear", node="a", name="n"), act("add", node="a", name="m")])
    await sha(s, "a", "n")
    await s.cmd("transaction", properties={"completion-mode": "grouped"},
                actions=[act("clear", node="nothing", name="n")])
    await s.cmd("transaction", actions=[act("remove", node="a", name="n")])
    await bitmaps_of(s, "a")


@scenario
async def exported_ones_are_busy(s):
    await s.start()
    await s.chain("a")
    await s.cmd("block-dirty-bitmap-add", node="a", name="m")
    await s.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "a", "name": "x",
                                     "bitmaps": ["nothing"]})
    await s.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "a", "name": "x",
                                     "bitmaps": ["m"]})
    await s.cmd("block-dirty-bitmap-disable", node="a", name="m")
    await s.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "a", "name": "x",
                                     "bitmaps": ["m", {"node": "a", "name": "m"}]})
    await bitmaps_of(s, "a")
    await s.cmd("block-dirty-bitmap-remove", node="a", name="m")
    await s.cmd("block-dirty-bitmap-enable", node="a", name="m")
    await s.cmd("block-export-del", id="e")
    await s.event("BLOCK_EXPORT_DELETED", id="e")
    await s.cmd("block-dirty-bitmap-enable", node="a", name="m")
    await bitmaps_of(s, "a")
