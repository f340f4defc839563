"""block-stream: whole chains, parts of them, refusals, ends."""

from rig.scenario import CLUSTER, MIB, SLOW, scenario


@scenario
async def whole_chain(s):
    await s.start()
    await s.chain("abc")
    await s.job("block-stream", device="c")
    await s.gone()
    await s.jobs()
    await s.graph()


@scenario
async def whole_chain_of_an_exported_node(s):
    await s.start()
    await s.chain("abc")
    await s.export("c")
    await s.write("c", (0x77, 3 * MIB, CLUSTER))
    await s.job("block-stream", device="c")
    await s.gone()
    await s.write("c", (0x78, 3 * MIB + CLUSTER, 512))
    await s.cmd("query-block-exports")
    await s.graph()


@scenario
async def down_to_a_base(s):
    await s.start()
    await s.chain("abcd")
    await s.job("block-stream", device="d", base_node="a")
    await s.gone()
    await s.graph()


@scenario
async def down_to_a_base_named_by_its_file(s):
    await s.start()
    await s.chain("abcd")
    await s.job("block-stream", device="d", base=s.path("b.qcow2"))
    await s.gone()
    await s.graph()


@scenario
async def down_to_a_bottom(s):
    await s.start()
    await s.chain("abcd")
    await s.job("block-stream", device="d", bottom="c")
    await s.gone()
    await s.graph()


@scenario
async def into_an_intermediate_layer(s):
    await s.start()
    await s.chain("abcd")
    await s.job("block-stream", device="c", base_node="a")
    await s.gone()
    await s.graph()


@scenario
async def into_an_intermediate_layer_whole(s):
    await s.start()
    await s.chain("abcd")
    await s.export("d")
    await s.job("block-stream", device="b")
    await s.gone()
    await s.graph()


@scenario
async def with_a_backing_string_of_the_caller(s):
    await s.start()
    await s.chain("abc")
    await s.job("block-stream", device="c", base_node="a", backing_file="elsewhere.qcow2")
    await s.gone()


@scenario
async def with_a_masked_protocol(s):
    await s.start()
    await s.image("a", [(0x11, 0, MIB)], fmt="raw")
    await s.image("b", [(0x22, MIB, MIB)])
    await s.cmd("blockdev-add", driver="file", node_name="a", filename=s.path("a.raw"))
    await s.open("b", backing="a")
    await s.cmd("blockdev-add", driver="qcow2", node_name="c", backing="b",
                file={"driver": "file", "filename": await s.image("c", [(0x33, 0, CLUSTER)])})
    await s.job("block-stream", device="c", base_node="a", backing_mask_protocol=True)
    await s.gone()


@scenario
async def nothing_below(s):
    await s.start()
    await s.chain("a")
    await s.job("block-stream", device="a")
    await s.gone()
    await s.graph()


@scenario
async def twice_in_a_row(s):
    await s.start()
    await s.chain("abc")
    await s.job("block-stream", device="c", base_node="a")
    await s.gone()
    at = s.d.mark()
    await s.job("block-stream", device="c")
    await s.gone(since=at)
    await s.graph()


@scenario
async def cancelled(s):
    s.numbers = False
    await s.start()
    await s.chain("abc")
    await s.job("block-stream", device="c", speed=SLOW)
    await s.cmd("block-job-cancel", device="j")
    await s.gone()
    await s.graph()


@scenario
async def cancelled_as_a_job(s):
    s.numbers = False
    await s.start()
    await s.chain("abc")
    await s.job("block-stream", device="c", speed=SLOW)
    await s.cmd("job-cancel", id="j")
    await s.gone()
    await s.graph()


@scenario
async def paused_and_resumed(s):
    s.numbers = False
    await s.start()
    await s.chain("abc")
    await s.job("block-stream", device="c", speed=SLOW)
    await s.cmd("block-job-pause", device="j")
    await s.status("paused")
    await s.cmd("block-job-pause", device="j")
    await s.jobs()
    await s.cmd("block-job-cancel", device="j")
    # Slow until all is answered: the job must not end before.
    await s.cmd("block-job-resume", device="j")
    await s.cmd("block-job-resume", device="j")
    await s.cmd("block-job-set-speed", device="j", speed=0)
    await s.gone()
    await s.graph()


@scenario
async def finalized_and_dismissed_by_hand(s):
    await s.start()
    await s.chain("abc")
    await s.job("block-stream", device="c", auto_finalize=False, auto_dismiss=False)
    await s.event("BLOCK_JOB_PENDING", id="j")
    await s.jobs()
    await s.cmd("block-job-pause", device="j")
    await s.cmd("block-job-complete", device="j")
    await s.cmd("block-job-dismiss", id="j")
    await s.graph()
    await s.cmd("block-job-finalize", id="j")
    await s.status("concluded")
    await s.jobs()
    await s.cmd("block-job-finalize", id="j")
    await s.cmd("block-job-cancel", device="j")
    await s.cmd("block-job-dismiss", id="j")
    await s.jobs()
    await s.graph()


@scenario
async def cancelled_while_pending(s):
    await s.start()
    await s.chain("abc")
    await s.job("block-stream", device="c", auto_finalize=False)
    await s.event("BLOCK_JOB_PENDING", id="j")
    await s.cmd("job-cancel", id="j")
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
            {"device": "c", "base": "nothing"},
            {"device": "c", "base-node": "nothing"},
            {"device": "c", "base-node": "c"},
            {"device": "b", "base-node": "c"},
            {"device": "c", "bottom": "nothing"},
            {"device": "b", "bottom": "c"},
            {"device": "c", "base": s.path("a.qcow2"), "base-node": "a"},
            {"device": "c", "base-node": "a", "bottom": "b"},
            {"device": "c", "backing-file": "x"},
            {"device": "c", "base-node": "a", "backing-mask-protocol": 3},
            {"device": "c", "speed": -1},
            {"device": "c", "on-error": "whatever"},
            {"device": "c", "filter-node-name": "b"},
            {"device": "c", "base-node": "r"},
            {"base-node": "a"}):
        await s.cmd("block-stream", dict({"job-id": "j"}, **arguments))
    await s.cmd("block-stream", device="c")
    await s.cmd("block-stream", job_id="1j", device="c")
    await s.cmd("block-stream", job_id="j", device="r")
    await s.gone()
    await s.graph()


@scenario
async def what_else_is_refused_meanwhile(s):
    s.numbers = False
    await s.start()
    await s.chain("abc")
    await s.job("block-stream", device="c", base_node="a", speed=SLOW)
    await s.job("block-stream", device="c")
    await s.cmd("block-stream", job_id="k", device="c")
    await s.cmd("blockdev-del", node_name="b")
    await s.cmd("blockdev-del", node_name="c")
    await s.cmd("blockdev-del", node_name="a")
    await s.cmd("block_resize", node_name="c", size=16 * MIB)
    await s.cmd("job-complete", id="j")
    await s.cmd("job-finalize", id="j")
    await s.cmd("job-dismiss", id="j")
    await s.cmd("block-job-change", {"id": "j", "type": "mirror", "copy-mode": "write-blocking"})
    await s.cmd("job-cancel", id="j")
    await s.gone()
