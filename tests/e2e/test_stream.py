"""Stream: every form of it, what it refuses, and what is left on disk, beside the peer."""

from rig import images
from rig.cases import case
from rig.chains import filters_of, make, pair, state_of
from rig.guest import prove_latest

WHOLE = {"device": "d"}
TO_A = {"device": "d", "base_node": "a"}


def ends(name, numbers=True, content="abcd", options=None, **arguments):
    """A stream that runs to its end, beside the peer."""
    async def scenario(chain):
        await chain.job("block-stream", **arguments)
        return await chain.nodes()
    scenario.__module__ = __name__
    pair(scenario, name=name, numbers=numbers, content=content, **(options or {}))


def is_refused(name, options=None, **arguments):
    """A stream that cannot start: the same class and text as the peer's."""
    async def scenario(chain):
        before = await chain.nodes()
        answer = await chain.refused("block-stream", **arguments)
        assert await chain.nodes() == before
        return answer
    scenario.__module__ = __name__
    pair(scenario, name=name, **(options or {}))


ends("the_whole_chain", device="d")
ends("the_whole_chain_over_a_raw_base", options={"base": "raw"}, device="d")
ends("down_to_a_base_node", device="d", base_node="a")
ends("down_to_a_raw_base", options={"base": "raw"}, device="d", base_node="a")
ends("down_to_the_node_below_copies_nothing", device="d", base_node="c")
ends("down_to_a_bottom", device="d", bottom="b")
ends("down_to_the_last_bottom_leaves_no_backing_file", device="d", bottom="a")
ends("a_bottom_that_is_the_device_copies_nothing", device="d", bottom="d")
ends("into_an_intermediate_layer", device="c", base_node="a")
ends("into_an_intermediate_layer_without_a_base", device="c")
ends("into_a_layer_without_backing_is_legal", device="a")
ends("a_backing_file_string_is_written_as_given", device="d", base_node="a", backing_file="a.qcow2")
ends("a_backing_file_string_is_not_looked_at", device="d", base_node="b", backing_file="no/such")
ends("mask_protocol_leaves_a_format_as_it_is", device="d", base_node="a",
     backing_mask_protocol=True)
ends("manual_dismissal_is_not_asked_for", device="d", base_node="b", auto_dismiss=True)
ends("a_short_base", options={"sizes": (4, 8, 8, 8)}, device="d", base_node="a")
ends("a_short_layer_hides_a_long_base", options={"sizes": (8, 3, 8, 8)}, device="d", base_node="a")
ends("the_whole_chain_with_a_short_layer", options={"sizes": (8, 3, 8, 8)}, device="d")
ends("a_size_that_is_no_multiple_of_anything",
     options={"sizes": (8, 8, 8, 9)}, device="d", base_node="a")
ends("read_only_layers_below", options={"read-only": True}, device="d", base_node="a")
ends("into_a_read_only_layer", options={"read-only": True}, device="c", base_node="a")
ends("a_chain_from_headers", options={"implicit": True}, device="d")

is_refused("no_job_id", device="d")
is_refused("an_unknown_device", device="x", job_id="j")
is_refused("base_and_base_node", device="d", job_id="j", base="q", base_node="a")
is_refused("base_and_bottom", device="d", job_id="j", base="q", bottom="a")
is_refused("bottom_and_base_node", device="d", job_id="j", base_node="a", bottom="a")
is_refused("an_unknown_base_file", device="d", job_id="j", base="none")
is_refused("an_unknown_base_node", device="d", job_id="j", base_node="none")
is_refused("a_base_above", device="c", job_id="j", base_node="d")
is_refused("itself_as_base", device="d", job_id="j", base_node="d")
is_refused("an_unknown_bottom", device="d", job_id="j", bottom="none")
is_refused("a_bottom_above", device="c", job_id="j", bottom="d")
is_refused("a_backing_file_without_a_base", device="d", job_id="j", backing_file="a.qcow2")
is_refused("a_backing_file_with_a_bottom", device="d", job_id="j", bottom="b", backing_file="x")
is_refused("a_negative_speed", device="d", job_id="j", speed=-1)
is_refused("a_filter_name_in_use", device="d", job_id="j", filter_node_name="a")
is_refused("a_filter_name_that_is_none", device="d", job_id="j", filter_node_name="#q")
is_refused("a_base_file_and_a_job_name_that_is_none", device="d", job_id="1", base="none")


async def base_by_file_name(chain):
    await chain.job("block-stream", device="d", base=chain.files["b"][0])
    return await chain.nodes()

pair(base_by_file_name)


async def finalized_and_dismissed_by_hand(chain):
    # the peer dies of a query between concluded and dismissed, see below
    await chain.cmd("block-stream", job_id="j", auto_finalize=False, auto_dismiss=False, **TO_A)
    await chain.daemon.wait_event("BLOCK_JOB_PENDING", id="j")
    answer = await chain.refused("job-complete", id="j")
    await chain.cmd("job-finalize", id="j")
    await chain.daemon.wait_event("JOB_STATUS_CHANGE", id="j", status="concluded")
    await chain.cmd("job-dismiss", id="j")
    await chain.daemon.job_gone("j")
    return answer, await chain.nodes()

pair(finalized_and_dismissed_by_hand)


async def cancelled_at_pending_keeps_the_chain(chain):
    await chain.cmd("block-stream", job_id="j", auto_finalize=False, **TO_A)
    await chain.daemon.wait_event("BLOCK_JOB_PENDING", id="j")
    await chain.cmd("job-cancel", id="j")
    await chain.daemon.job_gone("j")
    return await chain.nodes()

pair(cancelled_at_pending_keeps_the_chain)


async def cancelled_on_the_way_keeps_the_chain(chain):
    await chain.cmd("block-stream", job_id="j", speed=1, **WHOLE)
    await chain.daemon.wait_event("JOB_STATUS_CHANGE", id="j", status="running")
    complete = await chain.refused("job-complete", id="j")
    change = await chain.refused("block-job-change", id="j", type="mirror",
                                 copy_mode="write-blocking")
    await chain.cmd("block-job-cancel", device="j")
    await chain.daemon.job_gone("j")
    return complete, change, await chain.nodes()

pair(cancelled_on_the_way_keeps_the_chain, numbers=False)


async def quit_cancels_it(chain):
    await chain.cmd("block-stream", job_id="j", speed=1, **WHOLE)
    await chain.daemon.wait_event("JOB_STATUS_CHANGE", id="j", status="running")

pair(quit_cancels_it, name="quit_cancels_a_stream", numbers=False)


async def paused_and_resumed(chain):
    await chain.cmd("block-stream", job_id="j", speed=1, **WHOLE)
    await chain.cmd("block-job-pause", device="j")
    await chain.daemon.wait_event("JOB_STATUS_CHANGE", id="j", status="paused")
    told = [await chain.refused("block-job-pause", device="j"),
            await chain.refused("block-job-cancel", device="j"),
            await chain.refused("job-finalize", id="j")]
    await chain.cmd("block-job-set-speed", device="j", speed=0)
    await chain.cmd("block-job-resume", device="j")
    await chain.daemon.job_gone("j")
    return told, await chain.nodes()

pair(paused_and_resumed, name="stream_paused_and_resumed", numbers=False)


async def the_filter_is_shown(chain):
    await chain.cmd("block-stream", job_id="j", speed=1, filter_node_name="f", **WHOLE)
    shown = [await filters_of(chain)]
    await chain.cmd("job-cancel", id="j")
    await chain.daemon.job_gone("j")
    mark = chain.daemon.mark()
    await chain.cmd("block-stream", job_id="j", speed=1, device="c")
    shown.append(await filters_of(chain))
    await chain.cmd("job-cancel", id="j")
    await chain.daemon.job_gone("j", since=mark)
    return shown, await filters_of(chain)

pair(the_filter_is_shown, name="the_filter_of_a_stream_is_shown", numbers=False)


async def busy_nodes(chain):
    """What is refused while a stream runs, in any case."""
    await chain.cmd("block-stream", job_id="j", speed=1, device="c", base_node="a")
    told = []
    for name, arguments in (("block-stream", {"job_id": "k", "device": "c"}),
                            ("block-stream", {"job_id": "k", "device": "c", "bottom": "b"}),
                            ("block-stream", {"job_id": "j", "device": "b"}),
                            ("block-stream", {"job_id": "k", "device": "b"}),
                            ("blockdev-del", {"node_name": "b"})):
        told.append(await chain.refused(name, **arguments))
    await chain.cmd("job-cancel", id="j")
    await chain.daemon.job_gone("j")
    return told

pair(busy_nodes, numbers=False)


async def disjoint_sections(chain):
    """A stream of d down to c and one of b run at the same time."""
    await chain.cmd("block-stream", job_id="j", speed=1, device="d", bottom="c")
    await chain.job("block-stream", job="k", device="b")
    await chain.cmd("block-job-set-speed", device="j", speed=0)
    await chain.daemon.job_gone("j")
    return await chain.nodes()

pair(disjoint_sections, numbers=False)


async def no_space_ends_the_job(chain):
    await chain.job("block-stream", device="d", on_error="report")
    return await chain.nodes()

pair(no_space_ends_the_job, numbers=False, small="d")


async def no_space_stops_the_job_until_it_is_cancelled(chain):
    await chain.cmd("block-stream", job_id="j", device="d", on_error="enospc")
    await chain.daemon.wait_event("BLOCK_JOB_ERROR", device="j", action="stop")
    await chain.daemon.wait_event("JOB_STATUS_CHANGE", id="j", status="paused")
    (job,) = await chain.daemon.cmd("query-block-jobs", recorded=False)
    told = job["io-status"], job["paused"], job["status"]
    refused = await chain.refused("block-job-cancel", device="j")
    await chain.cmd("job-cancel", id="j")
    await chain.daemon.job_gone("j")
    return told, refused, await chain.nodes()

pair(no_space_stops_the_job_until_it_is_cancelled, numbers=False, small="d")


@case("ours")
async def a_query_between_concluded_and_dismissed_is_answered(world):
    """The peer dies here (SIGSEGV, measured with 10.0.2)."""
    chain = await make(world)
    await chain.cmd("block-stream", job_id="j", auto_dismiss=False, **WHOLE)
    await chain.daemon.wait_event("JOB_STATUS_CHANGE", id="j", status="concluded")
    assert [node[0] for node in await chain.nodes()] == ["d", "c", "b", "a"]
    await chain.cmd("job-dismiss", id="j")
    await chain.daemon.job_gone("j")
    await chain.daemon.quit()
    await state_of(chain)


@case("both", timeout=120)
async def guests_write_while_the_chain_is_flattened(world):
    size = 32 * images.MIB
    filled = images.blocks(size) // 2
    a = await images.filled(world.path("a.qcow2"), size, filled)
    d = await world.daemon()
    await d.add_qcow2("a", a)
    guest = await world.guest(await d.export("a"), filled=filled)
    await guest.run(rate=3000)
    below = "a"
    for name in "bcd":
        await guest.progress(100)
        await d.cmd("blockdev-snapshot-sync", node_name=below, snapshot_node_name=name,
                    snapshot_file=world.path(name + ".qcow2"))
        below = name
    await guest.progress(100)
    await d.cmd("block-stream", job_id="j", device="c", base_node="a")
    await guest.progress(100)
    await d.job_gone("j")
    mark = d.mark()
    await d.cmd("block-stream", job_id="j", device="d")
    await guest.progress(100)
    await d.job_gone("j", since=mark)
    await guest.progress(100)
    await guest.stop()
    await guest.verify()
    log = await guest.log()
    await guest.end()
    await d.quit()
    await images.check(world.path("d.qcow2"))
    _, out, _ = await images.tool("qemu-img", "info", "--output=json", world.path("d.qcow2"))
    assert "backing-filename" not in out
    prove_latest(log, {0: await images.dump(world.path("d.qcow2"), world.path("d.raw"))}, filled)
