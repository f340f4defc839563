"""The two walkthroughs, backup and mirror, with one script for both daemons.

Each script runs once with a guest that writes during the job (the guest's log then proves the
instant of the copy) and once with a silent guest (then all numbers, replies and image contents
are compared exactly).
"""

import asyncio
import os

from rig import images, transcript
from rig.cases import case
from rig.guest import now, prove_cut, prove_latest
from rig.pattern import BLOCK

SIZE = 64 * images.MIB
FILLED = images.blocks(SIZE) * 3 // 4
SEED = 7
AFTER = 600


async def both(world, script, numbers, **kw):
    """Runs the script on both daemons, compares events, replies and final images."""
    results = []
    for name, kind in (("x", world.kind), ("p", world.peer)):
        side = world.sub(name, kind)
        results.append((await script(side, **kw), side))
    (ours, our_side), (peers, peer_side) = results
    compare(ours, our_side.folder, peers, peer_side.folder, numbers)


def compare(ours, our_folder, peers, peer_folder, numbers):
    """Fails at the first thing in which the two runs differ."""
    transcript.require_same(transcript.events(ours["record"], our_folder, numbers),
                            transcript.events(peers["record"], peer_folder, numbers), "events")
    transcript.require_same(transcript.replies(ours["record"], our_folder, numbers),
                            transcript.replies(peers["record"], peer_folder, numbers), "replies")
    assert ours["images"] == peers["images"], \
        f"final images differ: {ours['images']} against the peer's {peers['images']}"


async def quiet_writes(guest, count):
    """A fixed set of writes with nothing else going on."""
    await guest.run(count=count, rate=4000)
    await guest.finish()


# -- walkthrough A ------------------------------------------------------------------------------
async def backup(world, busy, sync="full"):
    """Chain A <- B under a guest, backed up to E while the guest writes (or is silent)."""
    a, b, e = (world.path(n + ".qcow2") for n in "abe")
    await images.filled(a, SIZE, FILLED)
    d = await world.daemon("--blockdev", f"driver=qcow2,node-name=node-A,file.driver=file,"
                                         f"file.filename={a}")
    uri = await d.export("node-A")
    guest = await world.guest(uri, seed=SEED, filled=FILLED)
    if busy:
        await guest.run(rate=3000)
        await guest.progress()
    else:
        await quiet_writes(guest, 400)
    await d.cmd("blockdev-snapshot-sync", node_name="node-A", snapshot_file=b,
                snapshot_node_name="node-B", format="qcow2")
    exported = (await d.cmd("query-block-exports"))[0]
    assert exported["node-name"] == "node-B", exported
    if busy:
        await guest.progress()
    else:
        await quiet_writes(guest, 400)
    await images.create(e, SIZE)
    await d.add_qcow2("node-E", e)
    t1 = now()
    slow = {"speed": 1} if busy else {}
    await d.cmd("blockdev-backup", device="node-B", target="node-E", sync=sync, job_id="job0",
                **slow)
    t2 = now()
    if busy:
        await guest.progress()
        await d.cmd("block-job-set-speed", device="job0", speed=0)
    done = await d.wait_event("BLOCK_JOB_COMPLETED", device="job0")
    t3 = now()
    assert "error" not in done and done["len"] == done["offset"], done
    await d.job_gone()
    assert await d.cmd("query-block-jobs") == []
    if busy:
        await guest.progress()
        await guest.stop()
    await guest.verify()
    log = await guest.log()
    await guest.end()
    await d.quit()
    for path in (a, b, e):
        await images.check(path)
    raw = {n: await images.dump(world.path(n + ".qcow2"), world.path(n + ".raw")) for n in "abe"}
    prove_latest(log, {0: raw["b"]}, FILLED)
    if sync == "full":
        prove_cut(log, {0: raw["e"]}, t1, t2, FILLED)
    if busy:
        assert log.acked_between(t1, t3) > 0, "the guest did not write during the backup"
        assert log.sent_after(t2) > 0
        return {"record": d.record, "images": {}}
    if sync == "full":
        await images.identical(b, e)
    return {"record": d.record,
            "images": {n: await images.digest(world.path(n + ".qcow2")) for n in "abe"}}


@case("pair", timeout=120)
async def backup_of_a_live_chain_is_the_instant_of_the_command(world):
    await both(world, backup, numbers=False, busy=True)


@case("pair", timeout=120)
async def backup_with_a_silent_guest_is_identical_and_has_the_same_events(world):
    await both(world, backup, numbers=True, busy=False)


@case("pair", timeout=120)
async def backup_of_the_top_layer_copies_what_the_peer_copies(world):
    await both(world, backup, numbers=True, busy=False, sync="top")


async def backup_none(world):
    """sync=none: only old contents of what the guest overwrites go to the target."""
    a, e = world.path("a.qcow2"), world.path("e.qcow2")
    await images.filled(a, SIZE, FILLED)
    await images.create(e, SIZE)
    d = await world.daemon("--blockdev", f"driver=qcow2,node-name=node-A,file.driver=file,"
                                         f"file.filename={a}")
    guest = await world.guest(await d.export("node-A"), seed=SEED, filled=FILLED)
    await d.add_qcow2("node-E", e)
    await d.cmd("blockdev-backup", device="node-A", target="node-E", sync="none", job_id="job0")
    await guest.run(count=300, rate=3000)
    await guest.finish()
    await guest.verify()
    log = await guest.log()
    await d.cmd("block-job-cancel", device="job0")
    await d.job_gone()
    await guest.end()
    await d.quit()
    raw = await images.dump(e, world.path("e.raw"))
    per = 65536 // BLOCK
    touched = {block // per for block in log.by_block(0)}
    with open(raw, "rb") as image, open(await images.dump(
            await images.filled(world.path("o.qcow2"), SIZE, FILLED),
            world.path("o.raw")), "rb") as old:
        for cluster in range(SIZE // 65536):
            found, before = image.read(65536), old.read(65536)
            wanted = before if cluster in touched else bytes(65536)
            assert found == wanted, f"cluster {cluster} (touched: {cluster in touched})"
    await images.check(e)
    return {"record": d.record, "images": {"e": await images.digest(e)}}


@case("pair", timeout=120)
async def backup_with_sync_none_keeps_what_the_guest_overwrites(world):
    await both(world, backup_none, numbers=False)


# -- walkthrough B ------------------------------------------------------------------------------
async def chain(world, guest_seed=SEED):
    """A <- B <- C <- D, each layer with writes of its own; returns (daemon, guest)."""
    paths = {n: world.path(n + ".qcow2") for n in "abcd"}
    await images.filled(paths["a"], SIZE, FILLED)
    d = await world.daemon("--blockdev", f"driver=qcow2,node-name=node-A,file.driver=file,"
                                         f"file.filename={paths['a']}")
    uri = await d.export("node-A")
    guest = await world.guest(uri, seed=guest_seed, filled=FILLED)
    for old, new in ("AB", "BC", "CD"):
        await quiet_writes(guest, 150)
        await d.cmd("blockdev-snapshot-sync", node_name="node-" + old,
                    snapshot_file=paths[new.lower()], snapshot_node_name="node-" + new,
                    format="qcow2")
    await quiet_writes(guest, 150)
    return d, guest


async def mirror(world, busy, end, sync="full"):
    """Mirrors D to E; ends it with block-job-complete (pivot) or block-job-cancel (copy)."""
    d, guest = await chain(world)
    e = world.path("e.qcow2")
    if sync == "top":
        await images.create(e, SIZE, backing=world.path("c.qcow2"))
        await d.add_qcow2("node-E", e, backing="node-C")
    else:
        await images.create(e, SIZE)
        await d.add_qcow2("node-E", e)
    if busy:
        await guest.run(rate=3000)
        await guest.progress()
    t0 = now()
    await d.cmd("blockdev-mirror", device="node-D", target="node-E", sync=sync, job_id="job0")
    await d.wait_event("BLOCK_JOB_READY", device="job0")
    if busy:
        await guest.progress()
        await guest.stop()
    await idle(d)
    job = (await d.cmd("query-block-jobs"))[0]
    assert job["ready"] and job["len"] == job["offset"] and job["status"] == "ready", job
    if busy:
        await guest.run(rate=3000)
        await guest.progress()
    t1 = now()
    await d.cmd("block-job-" + end, device="job0")
    done = await d.wait_event("BLOCK_JOB_COMPLETED", device="job0")
    t2 = now()
    assert "error" not in done, done
    await d.job_gone()
    assert await d.cmd("query-block-jobs") == []
    exported = (await d.cmd("query-block-exports"))[0]
    assert exported["node-name"] == ("node-E" if end == "complete" else "node-D"), exported
    if busy:
        await guest.progress()
        await guest.stop()
    else:
        await quiet_writes(guest, AFTER)
    await guest.verify()
    log = await guest.log()
    await guest.end()
    await d.quit()
    for name in "abcde":
        await images.check(world.path(name + ".qcow2"))
    raw = {n: await images.dump(world.path(n + ".qcow2"), world.path(n + ".raw")) for n in "de"}
    active, left = ("e", "d") if end == "complete" else ("d", "e")
    prove_latest(log, {0: raw[active]}, FILLED)
    prove_cut(log, {0: raw[left]}, t1, t2, FILLED)
    if busy:
        assert log.acked_between(t0, t1) > 0 and log.sent_after(t2) > 0
        return {"record": d.record, "images": {}}
    return {"record": d.record,
            "images": {n: await images.digest(world.path(n + ".qcow2")) for n in "de"}}


async def idle(d):
    """Waits until a ready mirror has caught up with the silent guest."""
    for _ in range(500):
        job = (await d.cmd("query-block-jobs", recorded=False))[0]
        if job["len"] == job["offset"]:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"the mirror does not catch up: {job}")


@case("pair", timeout=120)
async def mirror_completes_and_the_guest_goes_on_at_the_target(world):
    await both(world, mirror, numbers=False, busy=True, end="complete")


@case("pair", timeout=120)
async def mirror_cancelled_at_ready_leaves_a_copy_of_that_instant(world):
    await both(world, mirror, numbers=False, busy=True, end="cancel")


@case("pair", timeout=120)
async def mirror_with_a_silent_guest_completes_with_the_same_events_and_images(world):
    await both(world, mirror, numbers=True, busy=False, end="complete")


@case("pair", timeout=120)
async def mirror_with_a_silent_guest_cancels_with_the_same_events_and_images(world):
    await both(world, mirror, numbers=True, busy=False, end="cancel")


@case("pair", timeout=120)
async def mirror_of_the_top_layer_completes_on_a_shared_backing_chain(world):
    await both(world, mirror, numbers=False, busy=True, end="complete", sync="top")


@case("pair", timeout=120)
async def mirror_of_the_top_layer_with_a_silent_guest_matches_the_peer(world):
    await both(world, mirror, numbers=True, busy=False, end="cancel", sync="top")


async def mirror_none(world):
    """sync=none: the target gets what is written after the start and nothing else."""
    d, guest = await chain(world)
    e = world.path("e.qcow2")
    await images.create(e, SIZE)
    await d.add_qcow2("node-E", e)
    await d.cmd("blockdev-mirror", device="node-D", target="node-E", sync="none", job_id="job0")
    await d.wait_event("BLOCK_JOB_READY", device="job0")
    first = (await guest.ask("state"))["seq"]
    await guest.run(count=300, rate=3000)
    await guest.finish()
    await idle(d)
    await d.cmd("block-job-cancel", device="job0")
    await d.wait_event("BLOCK_JOB_COMPLETED", device="job0")
    await d.job_gone()
    await guest.verify()
    log = await guest.log()
    await guest.end()
    await d.quit()
    await images.check(e)
    d_raw = await images.dump(world.path("d.qcow2"), world.path("d.raw"))
    e_raw = await images.dump(e, world.path("e.raw"))
    per = 65536 // BLOCK
    touched = {b // per for w in log.writes if w[0] > first
               for b in range(w[2], w[2] + w[3])}
    with open(d_raw, "rb") as source, open(e_raw, "rb") as target:
        for cluster in range(SIZE // 65536):
            live, copy = source.read(65536), target.read(65536)
            wanted = live if cluster in touched else bytes(65536)
            assert copy == wanted, f"cluster {cluster} (touched: {cluster in touched})"
    return {"record": d.record, "images": {"e": await images.digest(e)}}


@case("pair", timeout=120)
async def mirror_with_sync_none_copies_new_writes_only(world):
    await both(world, mirror_none, numbers=False)


# -- life cycle ---------------------------------------------------------------------------------
async def lifecycle(world):
    """Pause, speed, manual finalize and dismiss, forced cancel: the verbs left out above."""
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    d = await world.daemon()
    await d.add_qcow2("node-A", a)
    await d.export("node-A")

    async def target(name):
        path = await images.create(world.path(name + ".qcow2"), SIZE)
        await d.add_qcow2(name, path)

    await target("t0")
    await d.cmd("blockdev-mirror", device="node-A", target="t0", sync="full", job_id="m")
    await d.wait_event("BLOCK_JOB_READY", device="m")
    since = d.mark()
    await d.cmd("block-job-pause", device="m")
    await d.wait_event("JOB_STATUS_CHANGE", id="m", status="standby", since=since)
    await d.refused("block-job-pause", device="m")
    await d.cmd("block-job-resume", device="m")
    await d.wait_event("JOB_STATUS_CHANGE", id="m", status="ready", since=since)
    await d.refused("block-job-resume", device="m")
    await d.cmd("block-job-cancel", device="m", force=True)
    await d.wait_event("BLOCK_JOB_CANCELLED", device="m")
    await d.job_gone("m")
    await target("t1")
    await d.cmd("blockdev-backup", {
        "device": "node-A", "target": "t1", "sync": "full", "job-id": "b",
        "auto-finalize": False, "auto-dismiss": False})
    await d.wait_event("BLOCK_JOB_PENDING", id="b")
    await d.refused("block-job-dismiss", id="b")
    await d.refused("job-complete", id="b")
    await d.cmd("block-job-finalize", id="b")
    await d.wait_event("JOB_STATUS_CHANGE", id="b", status="concluded")
    await d.refused("job-cancel", id="b")
    await d.cmd("query-jobs")
    await d.cmd("job-dismiss", id="b")
    await d.job_gone("b")
    await target("t2")
    await d.cmd("blockdev-backup", device="node-A", target="t2", sync="full", job_id="c",
                speed=1)
    await d.refused("block-job-complete", device="c")
    await d.refused("block-job-set-speed", device="c", speed=-1)
    since = d.mark()
    await d.cmd("block-job-pause", device="c")
    await d.wait_event("JOB_STATUS_CHANGE", id="c", status="paused", since=since)
    await d.refused("block-job-cancel", device="c")
    await d.cmd("block-job-resume", device="c")
    await d.wait_event("JOB_STATUS_CHANGE", id="c", status="running", since=since)
    await d.cmd("block-job-set-speed", device="c", speed=0)
    await d.wait_event("BLOCK_JOB_COMPLETED", device="c")
    await d.job_gone("c")
    await target("t3")
    await d.cmd("blockdev-backup", device="node-A", target="t3", sync="full", job_id="q", speed=1)
    await d.quit()
    await images.identical(a, world.path("t1.qcow2"))
    await images.identical(a, world.path("t2.qcow2"))
    return {"record": d.record, "images": {}}


@case("pair", timeout=60)
async def every_job_verb_answers_and_reports_as_the_peer_does(world):
    await both(world, lifecycle, numbers=False)


# -- the test of the test -----------------------------------------------------------------------
def _swapped(record, first, second):
    """The record with two events exchanged."""
    out = list(record)
    places = [i for i, (what, name, data) in enumerate(out) if what == "event"
              and (name, data.get("status")) in (first, second)]
    assert len(places) >= 2, places
    i, j = places[0], places[-1]
    out[i], out[j] = out[j], out[i]
    return out


@case("rig", timeout=60)
async def a_swapped_event_fails_the_comparison(world):
    side = world.sub("p", world.peer)
    result = await mirror(side, busy=False, end="complete")
    compare(result, side.folder, result, side.folder, True)
    for first, second in (
            (("JOB_STATUS_CHANGE", "ready"), ("BLOCK_JOB_READY", None)),
            (("BLOCK_JOB_COMPLETED", None), ("JOB_STATUS_CHANGE", "concluded")),
            (("JOB_STATUS_CHANGE", "created"), ("JOB_STATUS_CHANGE", "running"))):
        bad = dict(result, record=_swapped(result["record"], first, second))
        try:
            compare(bad, side.folder, result, side.folder, False)
        except AssertionError:
            continue
        raise AssertionError(f"{first} and {second} were exchanged and nobody noticed")


@case("rig")
async def a_pause_of_the_user_is_kept_and_one_of_the_daemon_dropped(_world):
    def change(status):
        return ("event", "JOB_STATUS_CHANGE", {"id": "j", "status": status})
    own = [change("running"), change("paused"), change("running")]
    users = [change("running"), ("sent", "block-job-pause", {"device": "j"}), change("paused"),
             ("sent", "block-job-resume", {"device": "j"}), change("running")]
    assert len(transcript.events(own, "/nowhere")) == 1
    assert len(transcript.events(users, "/nowhere")) == 3


@case("rig")
async def a_missing_peer_fails_the_run(world):
    runner = os.path.join(os.path.dirname(os.path.abspath(__file__)), "run_e2e.py")
    import sys
    code, out, _ = await images.tool(sys.executable, runner, "--daemon", world.kind.path,
                                     "--peer", "/nowhere/qemu-storage-daemon", check=False)
    assert code == 1 and out.rstrip().splitlines()[-1] == "0 passed, 1 failed", (code, out)
