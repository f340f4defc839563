"""Snapshots, external and internal, and transactions of several kinds."""

from rig.scenario import CLUSTER, MIB, SLOW, scenario


@scenario
async def to_a_new_file(s):
    await s.start()
    await s.chain("a")
    await s.export("a")
    await s.cmd("blockdev-snapshot-sync", node_name="a", snapshot_file=s.path("o.qcow2"),
                snapshot_node_name="o")
    await s.write("a", (0x51, MIB, CLUSTER))
    await s.cmd("query-block-exports")
    await s.graph()


@scenario
async def to_a_node(s):
    await s.start()
    await s.chain("a")
    await s.export("a")
    await s.image("o", backing="a")
    await s.open("o")
    await s.cmd("blockdev-snapshot", node="a", overlay="o")
    await s.write("a", (0x51, MIB, CLUSTER))
    await s.cmd("blockdev-snapshot", node="a", overlay="o")
    await s.graph()


@scenario
async def refusals(s):
    await s.start()
    await s.chain("ab")
    await s.image("o")
    await s.open("o", backing="a")
    await s.image("r", fmt="raw")
    await s.open("r", fmt="raw")
    for node, overlay in (("b", "nothing"), ("nothing", "o"), ("b", "o"), ("b", "r"), ("b", "b"),
                          ("b", "a")):
        await s.cmd("blockdev-snapshot", node=node, overlay=overlay)
    for arguments in (
            {"node-name": "nothing", "snapshot-file": s.path("n.qcow2"),
             "snapshot-node-name": "n"},
            {"snapshot-file": s.path("n.qcow2")},
            {"node-name": "b", "snapshot-file": s.path("n.qcow2")},
            {"node-name": "b", "snapshot-file": s.path("n.qcow2"), "snapshot-node-name": "a"},
            {"node-name": "b", "snapshot-file": s.path("missing/n.qcow2"),
             "snapshot-node-name": "n"},
            {"node-name": "b", "snapshot-file": s.path("n.qcow2"), "snapshot-node-name": "n",
             "format": "nothing"},
            {"node-name": "b", "snapshot-file": s.path("n.qcow2"), "snapshot-node-name": "n",
             "mode": "existing"}):
        await s.cmd("blockdev-snapshot-sync", arguments)
    await s.graph()


@scenario
async def internal(s):
    await s.start()
    await s.chain("a")
    await s.export("a")
    await s.image("r", fmt="raw")
    await s.open("r", fmt="raw")
    await s.cmd("blockdev-snapshot-internal-sync", device="a", name="one")
    await s.write("a", (0x51, MIB, CLUSTER))
    await s.cmd("blockdev-snapshot-internal-sync", device="a", name="two")
    await s.cmd("blockdev-snapshot-internal-sync", device="a", name="one")
    await s.cmd("blockdev-snapshot-internal-sync", device="a", name="")
    await s.cmd("blockdev-snapshot-internal-sync", device="r", name="x")
    await s.cmd("blockdev-snapshot-internal-sync", device="nothing", name="x")
    await s.cmd("blockdev-snapshot-delete-internal-sync", device="a")
    await s.cmd("blockdev-snapshot-delete-internal-sync", device="a", name="nothing")
    await s.cmd("blockdev-snapshot-delete-internal-sync", device="a", id="9")
    await s.cmd("blockdev-snapshot-delete-internal-sync", device="a", name="one", recorded=False)


def snapshot(s, node, name):
    return {"type": "blockdev-snapshot-sync", "data": {
        "node-name": node, "snapshot-file": s.path(f"{name}.qcow2"), "snapshot-node-name": name}}


def backup(node, target, job):
    return {"type": "blockdev-backup", "data": {
        "device": node, "target": target, "sync": "full", "job-id": job}}


@scenario
async def of_two_disks_at_once(s):
    await s.start()
    for name in "ab":
        await s.image(name, [(0x31, 0, MIB)])
        await s.open(name)
        await s.export(name)
    await s.cmd("transaction", actions=[snapshot(s, "a", "oa"), snapshot(s, "b", "ob")])
    await s.cmd("query-block-exports")
    await s.graph()


@scenario
async def a_failing_transaction_changes_nothing(s):
    await s.start()
    for name in "abt":
        await s.image(name, [(0x31, 0, MIB)])
        await s.open(name)
        await s.export(name)
    await s.cmd("transaction", actions=[backup("a", "t", "j"), snapshot(s, "nothing", "ob")])
    await s.cmd("transaction", actions=[snapshot(s, "a", "b"), {"type": "abort", "data": {}}])
    await s.cmd("transaction", actions=[])
    await s.cmd("transaction", actions=[{"type": "nothing", "data": {}}])
    await s.graph()


@scenario
async def with_backup_and_bitmap_together(s):
    s.numbers = False
    await s.start()
    await s.image("a", [(0x31, 0, MIB)])
    await s.image("t")
    for name in "at":
        await s.open(name)
    await s.export("a")
    await s.cmd("transaction", actions=[
        {"type": "block-dirty-bitmap-add", "data": {"node": "a", "name": "m"}},
        backup("a", "t", "j")])
    await s.gone()
    await s.write("a", (0x52, 2 * MIB, CLUSTER))
    await s.cmd("x-debug-block-dirty-bitmap-sha256", node="a", name="m")


@scenario
async def two_backups_individual(s):
    s.numbers = False
    await s.start()
    for name in ("a", "b", "ta", "tb"):
        await s.image(name, [(0x31, 0, MIB)] if len(name) == 1 else ())
        await s.open(name)
    await s.cmd("transaction", actions=[backup("a", "ta", "j")])
    await s.gone()
    await s.cmd("transaction", actions=[backup("b", "tb", "k")],
                properties={"completion-mode": "individual"})
    await s.gone("k")


@scenario
async def a_grouped_backup_cancelled_with_its_partner(s):
    s.partial = {"ta.qcow2", "tb.qcow2"}
    s.numbers = False
    await s.start()
    for name in ("a", "b", "ta", "tb"):
        await s.image(name, [(0x31, 0, 4 * MIB)] if len(name) == 1 else ())
        await s.open(name)
    slow = backup("a", "ta", "j")
    slow["data"]["speed"] = SLOW
    slower = backup("b", "tb", "k")
    slower["data"]["speed"] = SLOW
    await s.cmd("transaction", actions=[slow, slower], properties={"completion-mode": "grouped"})
    await s.cmd("block-job-cancel", device="j")
    await s.gone("j")
    await s.gone("k")
