"""block-commit: intermediate and active."""

from rig.scenario import CLUSTER, MIB, SIZE, SLOW, scenario


@scenario
async def intermediate(s):
    await s.start()
    await s.chain("abcd")
    await s.export("d")
    await s.job("block-commit", device="d", top_node="c", base_node="a")
    await s.gone()
    await s.jobs()
    await s.graph()


@scenario
async def intermediate_of_one_layer(s):
    await s.start()
    await s.chain("abc")
    await s.job("block-commit", device="c", top_node="b", base_node="a")
    await s.gone()
    await s.graph()


@scenario
async def intermediate_to_the_default_base(s):
    await s.start()
    await s.chain("abcd")
    await s.job("block-commit", device="d", top_node="b")
    await s.gone()
    await s.graph()


@scenario
async def intermediate_named_by_files(s):
    await s.start()
    await s.chain("abcd")
    await s.job("block-commit", device="d", top=s.path("c.qcow2"), base=s.path("b.qcow2"))
    await s.gone()
    await s.graph()


@scenario
async def intermediate_with_a_backing_string(s):
    await s.start()
    await s.chain("abc")
    await s.job("block-commit", device="c", top_node="b", base_node="a", backing_file="e.qcow2")
    await s.gone()


@scenario
async def intermediate_into_a_smaller_base(s):
    await s.start()
    await s.image("a", [(0x11, 0, MIB)], size=SIZE // 2)
    await s.image("b", [(0x22, 6 * MIB, CLUSTER)], backing="a", size=SIZE)
    await s.image("c", [(0x33, MIB, CLUSTER)], backing="b", size=SIZE)
    await s.open("a")
    await s.open("b", backing="a")
    await s.open("c", backing="b")
    await s.job("block-commit", device="c", top_node="b", base_node="a")
    await s.gone()
    await s.graph()


@scenario
async def intermediate_into_raw(s):
    await s.start()
    await s.image("a", [(0x11, 0, MIB)], fmt="raw")
    await s.image("b", [(0x22, MIB, MIB), (0, 0, CLUSTER)])
    await s.image("c", [(0x33, 2 * MIB, CLUSTER)])
    await s.open("a", fmt="raw")
    await s.open("b", backing="a")
    await s.open("c", backing="b")
    await s.job("block-commit", device="c", top_node="b", base_node="a")
    await s.gone()
    await s.graph()


@scenario
async def intermediate_cancelled(s):
    s.partial = {"a.qcow2"}
    s.numbers = False
    await s.start()
    await s.chain("abc")
    await s.job("block-commit", device="c", top_node="b", base_node="a", speed=SLOW)
    await s.cmd("block-job-cancel", device="j")
    await s.gone()
    await s.graph()


@scenario
async def intermediate_by_hand(s):
    await s.start()
    await s.chain("abc")
    await s.job("block-commit", device="c", top_node="b", base_node="a",
                auto_finalize=False, auto_dismiss=False)
    await s.event("BLOCK_JOB_PENDING", id="j")
    await s.graph()
    await s.cmd("job-finalize", id="j")
    await s.status("concluded")
    await s.jobs()
    await s.cmd("job-dismiss", id="j")
    await s.graph()


@scenario
async def active_completed(s):
    await s.start()
    await s.chain("abc")
    await s.export("c")
    await s.job("block-commit", device="c")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.jobs()
    await s.cmd("block-job-complete", device="j")
    await s.gone()
    await s.cmd("query-block-exports")
    await s.graph()


@scenario
async def active_into_the_middle(s):
    await s.start()
    await s.chain("abc")
    await s.job("block-commit", device="c", base_node="b")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.cmd("job-complete", id="j")
    await s.gone()
    await s.graph()


@scenario
async def active_with_writes_while_ready(s):
    s.numbers = False
    await s.start()
    await s.chain("abc")
    await s.export("c")
    await s.job("block-commit", device="c", base_node="a")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.write("c", (0x55, 4 * MIB, CLUSTER), (0x56, 2 * MIB + 512, 512))
    await s.cmd("block-job-complete", device="j")
    await s.gone()
    await s.write("c", (0x57, 5 * MIB, CLUSTER))
    await s.cmd("query-block-exports")
    await s.graph()


@scenario
async def active_cancelled_when_ready(s):
    await s.start()
    await s.chain("abc")
    await s.job("block-commit", device="c", base_node="a")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.cmd("block-job-cancel", device="j")
    await s.gone()
    await s.graph()


@scenario
async def active_cancelled_by_force(s):
    await s.start()
    await s.chain("abc")
    await s.job("block-commit", device="c", base_node="a")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.cmd("block-job-cancel", device="j", force=True)
    await s.gone()
    await s.graph()


@scenario
async def active_into_a_smaller_base(s):
    await s.start()
    await s.image("a", [(0x11, 0, MIB)], size=SIZE // 2)
    await s.image("b", [(0x22, 6 * MIB, CLUSTER)], backing="a", size=SIZE)
    await s.open("a")
    await s.open("b", backing="a")
    await s.job("block-commit", device="b")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.cmd("block-job-complete", device="j")
    await s.gone()
    await s.graph()


@scenario
async def wrong_arguments(s):
    await s.start()
    await s.chain("abc")
    await s.image("r", fmt="raw")
    await s.open("r", fmt="raw")
    for arguments in (
            {"device": "nothing"},
            {"device": "b"},
            {"device": "r"},
            {"device": "c", "top-node": "nothing"},
            {"device": "c", "base-node": "nothing"},
            {"device": "c", "top": "nothing"},
            {"device": "c", "base": "nothing"},
            {"device": "c", "top-node": "a", "base-node": "b"},
            {"device": "c", "top-node": "b", "base-node": "b"},
            {"device": "c", "top-node": "a"},
            {"device": "c", "top-node": "r"},
            {"device": "c", "base-node": "r"},
            {"device": "c", "top": s.path("b.qcow2"), "top-node": "b"},
            {"device": "c", "base": s.path("a.qcow2"), "base-node": "a"},
            {"device": "c", "backing-file": "x"},
            {"device": "c", "speed": -5},
            {"device": "c", "on-error": "never"}):
        await s.cmd("block-commit", dict({"job-id": "j"}, **arguments))
    await s.cmd("block-commit", device="c")
    await s.graph()


@scenario
async def what_else_is_refused_meanwhile(s):
    s.partial = {"a.qcow2", "b.qcow2"}
    s.numbers = False
    await s.start()
    await s.chain("abcd")
    await s.job("block-commit", device="d", top_node="c", base_node="a", speed=SLOW)
    await s.cmd("block-stream", job_id="k", device="c")
    await s.cmd("blockdev-del", node_name="b")
    await s.cmd("block_resize", node_name="a", size=16 * MIB)
    await s.cmd("job-cancel", id="j")
    await s.gone()
