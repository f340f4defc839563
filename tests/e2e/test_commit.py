"""Commit, intermediate and active: every form, what is refused, what is left on disk, beside the
peer. Files of layers that were dropped are not compared: nobody promises what they hold."""

import asyncio
import os

from rig import images
from rig.cases import case
from rig.chains import filters_of, make, pair, state_of
from rig.guest import prove_latest


def ends(name, content, numbers=True, options=None, **arguments):
    """An intermediate commit that runs to its end, beside the peer."""
    async def scenario(chain):
        await chain.job("block-commit", device="d", **arguments)
        return await chain.nodes()
    scenario.__module__ = __name__
    pair(scenario, name=name, numbers=numbers, content=content, **(options or {}))


def active(name, content, end="complete", options=None, **arguments):
    """An active commit: waits for READY, then ends as told."""
    async def scenario(chain):
        await chain.cmd("block-commit", job_id="j", device="d", **arguments)
        await chain.daemon.wait_event("BLOCK_JOB_READY", device="j")
        told = []
        if end == "complete":
            await chain.cmd("job-complete", id="j")
        elif end == "standby":
            await chain.cmd("block-job-pause", device="j")
            await chain.daemon.wait_event("JOB_STATUS_CHANGE", id="j", status="standby")
            await chain.cmd("block-job-complete", device="j")
            await chain.cmd("block-job-resume", device="j")
        elif end == "soft":
            await chain.cmd("block-job-cancel", device="j")
        elif end == "force":
            await chain.cmd("block-job-cancel", device="j", force=True)
        elif end == "job-cancel":
            await chain.cmd("job-cancel", id="j")
        await chain.daemon.job_gone("j")
        return told, await chain.nodes()
    scenario.__module__ = __name__
    pair(scenario, name=name, content=content, **(options or {}))


def is_refused(name, options=None, **arguments):
    """A commit that cannot start: the same class and text as the peer's."""
    async def scenario(chain):
        before = await chain.nodes()
        answer = await chain.refused("block-commit", **arguments)
        assert await chain.nodes() == before
        return answer
    scenario.__module__ = __name__
    pair(scenario, name=name, **(options or {}))


ends("one_layer", "abd", top_node="c", base_node="b")
ends("two_layers_into_the_deepest_by_default", "ad", top_node="c")
ends("two_layers_by_name", "ad", top_node="c", base_node="a")
ends("the_lowest_layer", "acd", top_node="b")
ends("a_raw_base", "ad", options={"base": "raw"}, top_node="c", base_node="a")
ends("a_raw_base_that_is_read_only", "ad", options={"base": "raw", "read-only": True},
     top_node="c", base_node="a")
ends("read_only_layers", "ad", options={"read-only": True}, top_node="c", base_node="a")
ends("a_chain_with_names_from_headers", "abcd", options={"read-only": True}, top_node="c",
     base_node="b")
ends("a_base_that_grows", "ad", options={"sizes": (4, 8, 8, 8)}, top_node="c", base_node="a")
ends("a_raw_base_that_grows", "ad", options={"sizes": (3, 8, 8, 8), "base": "raw"},
     top_node="c", base_node="a")
ends("a_base_that_is_longer_stays_so", "ad", options={"sizes": (9, 8, 8, 8)}, top_node="c",
     base_node="a")
ends("a_short_layer_between_hides_the_base", "ad", options={"sizes": (8, 3, 8, 8)}, top_node="c",
     base_node="a")
ends("a_string_for_the_header", "a", top_node="c", base_node="a", backing_file="no/such")
ends("mask_protocol_leaves_a_format_as_it_is", "ad", top_node="c", base_node="a",
     backing_mask_protocol=True)

active("active_into_the_deepest", "a")
active("active_into_the_middle", "ab", base_node="b")
active("active_into_the_next", "abc", base_node="c")
active("active_into_a_raw_base", "a", options={"base": "raw"})
active("active_into_a_read_only_base", "a", options={"read-only": True})
active("active_that_makes_the_base_grow", "a", options={"sizes": (4, 8, 8, 8)})
active("active_completed_in_standby", "a", end="standby")
active("active_cancelled_softly_leaves_a_copy", "ad", end="soft")
active("active_cancelled_by_force", "d", end="force")
active("active_cancelled_by_job_cancel", "d", end="job-cancel")

is_refused("no_job_id", device="d")
is_refused("no_job_id_for_layers_between", device="d", top_node="c")
is_refused("an_unknown_device", device="x", job_id="j")
is_refused("an_unknown_device_comes_first", device="x", job_id="1", top="q", top_node="c")
is_refused("a_device_that_is_no_root", device="c", job_id="j")
is_refused("top_and_top_node", device="d", job_id="j", top="q", top_node="c")
is_refused("base_and_base_node", device="d", job_id="j", base="q", base_node="a")
is_refused("an_unknown_top_node", device="d", job_id="j", top_node="none")
is_refused("an_unknown_top_file", device="d", job_id="j", top="none")
is_refused("an_unknown_base_file", device="d", job_id="j", base="none")
is_refused("an_unknown_base_node", device="d", job_id="j", base_node="none")
is_refused("a_base_above_the_top", device="d", job_id="j", top_node="b", base_node="c")
is_refused("an_image_into_itself", device="d", job_id="j", top_node="c", base_node="c")
is_refused("the_deepest_into_itself", device="d", job_id="j", top_node="a")
is_refused("a_backing_file_for_the_active_layer", device="d", job_id="j", backing_file="x")
is_refused("a_negative_speed", device="d", job_id="j", top_node="c", speed=-1)
is_refused("a_negative_speed_of_an_active_one", device="d", job_id="j", speed=-1)
is_refused("a_filter_name_in_use", device="d", job_id="j", top_node="c", filter_node_name="a")
is_refused("a_filter_name_in_use_by_name", device="d", job_id="j", filter_node_name="a")


async def top_and_base_by_file_name(chain):
    await chain.job("block-commit", device="d", top=chain.files["c"][0], base=chain.files["b"][0])
    return await chain.nodes()

pair(top_and_base_by_file_name, content="abd")


async def finalized_and_dismissed_by_hand(chain):
    await chain.cmd("block-commit", job_id="j", device="d", top_node="c", auto_finalize=False,
                    auto_dismiss=False)
    await chain.daemon.wait_event("BLOCK_JOB_PENDING", id="j")
    await chain.cmd("job-finalize", id="j")
    await chain.daemon.wait_event("JOB_STATUS_CHANGE", id="j", status="concluded")
    await chain.cmd("job-dismiss", id="j")
    await chain.daemon.job_gone("j")
    return await chain.nodes()

pair(finalized_and_dismissed_by_hand, name="commit_finalized_and_dismissed_by_hand", content="ad")


async def cancelled_at_pending_keeps_the_chain(chain):
    await chain.cmd("block-commit", job_id="j", device="d", top_node="c", auto_finalize=False)
    await chain.daemon.wait_event("BLOCK_JOB_PENDING", id="j")
    await chain.cmd("job-cancel", id="j")
    await chain.daemon.job_gone("j")
    return await chain.nodes()

pair(cancelled_at_pending_keeps_the_chain, name="commit_cancelled_at_pending", content="d")


async def cancelled_on_the_way_keeps_the_chain(chain):
    await chain.cmd("block-commit", job_id="j", device="d", top_node="c", speed=1)
    await chain.daemon.wait_event("JOB_STATUS_CHANGE", id="j", status="running")
    complete = await chain.refused("job-complete", id="j")
    await chain.cmd("block-job-cancel", device="j")
    await chain.daemon.job_gone("j")
    return complete, await chain.nodes()

pair(cancelled_on_the_way_keeps_the_chain, name="commit_cancelled_on_the_way", numbers=False,
     content="d")


async def quit_cancels_it(chain):
    await chain.cmd("block-commit", job_id="j", device="d", top_node="c", speed=1)
    await chain.daemon.wait_event("JOB_STATUS_CHANGE", id="j", status="running")

pair(quit_cancels_it, name="quit_cancels_a_commit", numbers=False, content="d")


async def quit_never_pivots(chain):
    await chain.cmd("block-commit", job_id="j", device="d")
    await chain.daemon.wait_event("BLOCK_JOB_READY", device="j")

pair(quit_never_pivots, name="quit_never_pivots_a_ready_commit", numbers=False, content="d")


async def active_finalized_by_hand(chain):
    await chain.cmd("block-commit", job_id="j", device="d", auto_finalize=False)
    await chain.daemon.wait_event("BLOCK_JOB_READY", device="j")
    await chain.cmd("job-complete", id="j")
    await chain.daemon.wait_event("BLOCK_JOB_PENDING", id="j")
    await chain.cmd("job-finalize", id="j")
    await chain.daemon.job_gone("j")
    return await chain.nodes()

pair(active_finalized_by_hand, name="active_commit_finalized_by_hand", content="a")


async def the_filter_is_shown(chain):
    shown = []
    for arguments in ({"top_node": "c", "filter_node_name": "f"}, {"filter_node_name": "g"}):
        mark = chain.daemon.mark()
        await chain.cmd("block-commit", job_id="j", device="d", speed=1, **arguments)
        shown.append(await filters_of(chain))
        await chain.cmd("job-cancel", id="j")
        await chain.daemon.job_gone("j", since=mark)
    return shown, await filters_of(chain)

pair(the_filter_is_shown, name="the_filter_of_a_commit_is_shown", numbers=False, content="d")


async def commits_in_any_order(chain):
    """The middle first, then what is left."""
    await chain.job("block-commit", device="d", top_node="b", base_node="a")
    await chain.job("block-commit", device="d", top_node="c", base_node="a")
    await chain.cmd("block-commit", job_id="k", device="d")
    await chain.daemon.wait_event("BLOCK_JOB_READY", device="k")
    await chain.cmd("block-job-complete", device="k")
    await chain.daemon.job_gone("k")
    return await chain.nodes()

pair(commits_in_any_order, content="a")


async def busy_nodes(chain):
    """What is refused while a commit of c into b runs, in any case."""
    await chain.cmd("block-commit", job_id="j", device="d", top_node="c", base_node="b", speed=1)
    told = [await chain.refused(name, **arguments) for name, arguments in (
        ("block-stream", {"job_id": "k", "device": "c"}),
        ("block-stream", {"job_id": "k", "device": "b"}),
        ("block-stream", {"job_id": "j", "device": "a"}),
        ("blockdev-del", {"node_name": "b"}),
        ("blockdev-del", {"node_name": "c"}))]
    await chain.cmd("job-cancel", id="j")
    await chain.daemon.job_gone("j")
    return told

pair(busy_nodes, name="nodes_busy_with_a_commit", numbers=False, content="d")


async def no_space_ends_the_job(chain):
    await chain.job("block-commit", device="d", top_node="c", on_error="report")
    return await chain.nodes()

pair(no_space_ends_the_job, name="no_space_ends_the_commit", numbers=False, content="d",
     small="a")


async def no_space_stops_the_job_until_it_is_cancelled(chain):
    await chain.cmd("block-commit", job_id="j", device="d", top_node="c", on_error="stop")
    await chain.daemon.wait_event("BLOCK_JOB_ERROR", device="j", action="stop")
    await chain.daemon.wait_event("JOB_STATUS_CHANGE", id="j", status="paused")
    (job,) = await chain.daemon.cmd("query-block-jobs", recorded=False)
    told = job["io-status"], job["paused"], job["status"]
    await chain.cmd("job-cancel", id="j")
    await chain.daemon.job_gone("j")
    return told, await chain.nodes()

pair(no_space_stops_the_job_until_it_is_cancelled, name="no_space_stops_the_commit",
     numbers=False, content="d", small="a")


@case("ours")
async def a_long_base_below_a_short_top_does_not_show_through_a_longer_overlay(world):
    """The peer's chain shows what the end of the top hid before."""
    chain = await make(world, sizes=(8, 8, 3, 8))
    await chain.job("block-commit", device="d", top_node="c", base_node="b")
    await chain.daemon.quit()
    found = await state_of(chain)
    assert found["d"][3] == chain.shown, "the commit changed what the guest sees"


@case("both", timeout=120)
async def guests_write_while_their_chain_is_committed(world):
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
    await d.cmd("block-commit", job_id="j", device="d", top_node="c", base_node="b")
    await guest.progress(100)
    await d.job_gone("j")
    mark = d.mark()
    await d.cmd("block-commit", job_id="j", device="d")
    await d.wait_event("BLOCK_JOB_READY", device="j")
    await guest.progress(200)
    await d.cmd("job-complete", id="j")
    await d.job_gone("j", since=mark)
    await guest.progress(200)
    await guest.stop()
    await guest.verify()
    log = await guest.log()
    await guest.end()
    await d.quit()
    await images.check(a)
    prove_latest(log, {0: await images.dump(a, world.path("a.raw"))}, filled)


@case("ours", timeout=120)
async def an_active_commit_goes_on_under_growth_a_snapshot_and_changes_of_its_mode(world):
    """The peer refuses the growth and the snapshot, and knows no mode of a commit."""
    size = 16 * images.MIB
    filled = images.blocks(size) // 2
    a = await images.filled(world.path("a.qcow2"), size, filled)
    d = await world.daemon()
    await d.add_qcow2("a", a)
    guest = await world.guest(await d.export("a"), filled=filled)
    await guest.run(rate=3000)
    await d.cmd("blockdev-snapshot-sync", node_name="a", snapshot_node_name="b",
                snapshot_file=world.path("b.qcow2"))
    await guest.progress(100)
    await d.cmd("block-commit", job_id="j", device="b", copy_mode="write-blocking")
    for mode in ("background", "write-blocking"):
        await d.cmd("block-job-change", {"id": "j", "type": "commit", "copy-mode": mode})
        await guest.progress(50)
    await d.cmd("block_resize", node_name="b", size=size + images.MIB)
    _, text = await d.refused("block_resize", node_name="b", size=size)
    assert "block job 'j'" in text, text
    await d.cmd("blockdev-snapshot-sync", node_name="b", snapshot_node_name="c",
                snapshot_file=world.path("c.qcow2"))
    await guest.progress(50)
    await d.wait_event("BLOCK_JOB_READY", device="j")
    await d.cmd("job-complete", id="j")
    await d.job_gone("j")
    await guest.progress(100)
    await guest.stop()
    await guest.verify()
    log = await guest.log()
    await guest.end()
    await d.quit()
    await images.check(a)
    raw = await images.dump(a, world.path("a.raw"))
    assert os.path.getsize(raw) == size + images.MIB
    prove_latest(log, {0: raw}, filled)


@case("both", timeout=120)
async def kill_9_during_a_commit_leaves_the_chain_as_the_guest_saw_it(world):
    chain = await make(world, sizes=(16, 16, 16, 16))
    await chain.cmd("block-commit", job_id="j", device="d", top_node="c", speed=2 * images.MIB)
    await asyncio.sleep(0.3)
    await chain.daemon.kill9()
    assert (await state_of(chain, leaks=True))["d"][3] == chain.shown
