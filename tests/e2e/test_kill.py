"""SIGKILL of the daemon: what was flushed is in the image, and a finished job is finished.

A round starts a daemon, lets a guest write and flush, starts a job, and kills the daemon at a
seeded moment. Then only the files speak.
"""

import asyncio
import random

from rig import images
from rig.cases import case, slowness
from rig.guest import now, prove_cut, prove_durable

SIZE = 24 * images.MIB
FILLED = images.blocks(SIZE) // 2


async def killed_round(world, seed, job):
    """One round; returns the list of lost blocks of the active image."""
    side = world.sub(f"r{seed}", world.kind)
    choice = random.Random(seed)
    a = await images.filled(side.path("a.qcow2"), SIZE, FILLED)
    active = a
    d = await side.daemon()
    await d.add_qcow2("node-A", a)
    guest = await side.guest(await d.export("node-A"), seed=seed, filled=FILLED)
    await guest.run(rate=4000, flush_every=24)
    await guest.progress(30)
    if job == "snapshot":
        await d.cmd("blockdev-snapshot-sync", node_name="node-A",
                    snapshot_file=side.path("b.qcow2"), snapshot_node_name="node-B")
        active = side.path("b.qcow2")
    elif job:
        e = await images.create(side.path("e.qcow2"), SIZE)
        await d.add_qcow2("node-E", e)
        await d.cmd("blockdev-" + job, device="node-A", target="node-E", sync="full",
                    job_id="j", speed=8 * images.MIB)
    await asyncio.sleep(choice.random() * 0.4)
    await d.kill9()
    for _ in range(300):
        state = await guest.ask("state", tolerate=True)
        if state["lost"]:
            break
        await asyncio.sleep(0.01)
    log = await guest.log(tolerate=True)
    await guest.end()
    assert log.acked_between(0, now()) >= 30
    await images.check(active, leaks_allowed=True)
    lost = prove_durable(log, {0: await images.dump(active, side.path("raw"))}, FILLED)
    # the next daemon opens it without a manual step and the guest writes again
    d = await side.daemon(name="again")
    began = now()
    await d.add_qcow2("node-A", active)
    assert (now() - began) / 1e9 < 5
    await d.export("node-A")
    await d.quit()
    await images.check(active, leaks_allowed=True)
    return lost


async def killed(world, job, first):
    lost_rounds = []
    first += world.options.seed
    rounds = max(2, world.rounds // 2) if job else world.rounds
    for seed in range(first, first + rounds):
        lost = await killed_round(world, seed, job)
        if lost:
            lost_rounds.append(f"round {seed}: {len(lost)} blocks, first: {lost[0]}")
    assert not lost_rounds, "; ".join(lost_rounds)


@case(timeout=300)
async def kill_under_a_guest_keeps_every_flushed_write(world):
    await killed(world, None, 100)


@case(timeout=300)
async def kill_during_a_mirror_keeps_every_flushed_write(world):
    await killed(world, "mirror", 200)


@case(timeout=300)
async def kill_during_a_backup_keeps_every_flushed_write(world):
    await killed(world, "backup", 300)


@case(timeout=300)
async def kill_after_a_snapshot_keeps_every_flushed_write(world):
    await killed(world, "snapshot", 400)


async def finished(world, seed, job, busy):
    """Kills right at the completion event; returns what is wrong with the result."""
    side = world.sub(f"{job}{seed}{busy}", world.kind)
    a = await images.filled(side.path("a.qcow2"), SIZE, FILLED)
    e = await images.create(side.path("e.qcow2"), SIZE)
    d = await side.daemon()
    await d.add_qcow2("node-A", a)
    await d.add_qcow2("node-E", e)
    guest = await side.guest(await d.export("node-A"), seed=seed, filled=FILLED)
    await guest.run(rate=3000) if busy else await guest.run(count=200, rate=5000)
    await guest.progress()
    if not busy:
        await guest.finish()
        await guest.flush()
    t1 = now()
    await d.cmd("blockdev-" + job, device="node-A", target="node-E", sync="full", job_id="j")
    t2 = now()
    if job == "mirror":
        await d.wait_event("BLOCK_JOB_READY", device="j")
        t1 = now()
        await d.cmd("block-job-cancel", device="j")
    await d.wait_event("BLOCK_JOB_COMPLETED", device="j")
    if job == "mirror":
        t2 = now()
    await d.kill9()
    log = await guest.log(tolerate=True)
    await guest.end()
    await images.check(e, leaks_allowed=True)
    try:
        prove_cut(log, {0: await images.dump(e, side.path("raw"))}, t1, t2, FILLED)
    except (AssertionError, ValueError) as problem:
        return str(problem)
    return None


async def all_finished(world, job):
    wrong = []
    for seed in range(world.options.seed, world.options.seed + world.rounds):
        problem = await finished(world, seed, job, busy=bool(seed % 2))
        if problem:
            wrong.append(f"round {seed}: {problem}")
    if wrong and not world.kind.ours:
        world.note(f"{world.kind.name}: {len(wrong)} of {world.rounds} finished {job} "
                   "targets incomplete after SIGKILL")
        return
    assert not wrong, f"{len(wrong)} targets incomplete: {wrong[0]}"


@case(timeout=300)
async def a_completed_backup_is_whole_although_the_daemon_is_killed_right_then(world):
    await all_finished(world, "backup")


@case(timeout=300)
async def a_completed_mirror_is_whole_although_the_daemon_is_killed_right_then(world):
    await all_finished(world, "mirror")


async def pivoted(world, seed):
    """After the pivot the active image is the target, also after SIGKILL right then."""
    side = world.sub(f"p{seed}", world.kind)
    a = await images.filled(side.path("a.qcow2"), SIZE, FILLED)
    e = await images.create(side.path("e.qcow2"), SIZE)
    d = await side.daemon()
    await d.add_qcow2("node-A", a)
    await d.add_qcow2("node-E", e)
    guest = await side.guest(await d.export("node-A"), seed=seed, filled=FILLED)
    await guest.run(rate=3000, flush_every=24)
    await d.cmd("blockdev-mirror", device="node-A", target="node-E", sync="full", job_id="j")
    await d.wait_event("BLOCK_JOB_READY", device="j")
    await d.cmd("block-job-complete", device="j")
    await d.wait_event("BLOCK_JOB_COMPLETED", device="j")
    await guest.progress(30 * (seed % 3))
    await d.kill9()
    log = await guest.log(tolerate=True)
    await guest.end()
    await images.check(e, leaks_allowed=True)
    lost = prove_durable(log, {0: await images.dump(e, side.path("raw"))}, FILLED)
    assert not lost, f"round {seed}: {len(lost)} blocks, first: {lost[0]}"


@case(timeout=300)
async def kill_after_a_pivot_keeps_every_flushed_write_in_the_target(world):
    first = 500 + world.options.seed
    for seed in range(first, first + world.rounds // 2):
        await pivoted(world, seed)


@case(timeout=60)
async def sigterm_with_a_job_and_a_guest_ends_in_five_seconds_with_clean_images(world):
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    e = await images.create(world.path("e.qcow2"), SIZE)
    d = await world.daemon()
    await d.add_qcow2("node-A", a)
    await d.add_qcow2("node-E", e)
    guest = await world.guest(await d.export("node-A"), filled=FILLED)
    await guest.run(rate=3000)
    await d.cmd("blockdev-backup", device="node-A", target="node-E", sync="full", job_id="j",
                speed=images.MIB)
    await guest.progress()
    slow = slowness()
    began = now()
    code = await d.terminate()
    took = (now() - began) / 1e9
    assert code == 0 and took < 5 * max(slow, slowness()), (code, took)
    log = await guest.log(tolerate=True)
    await guest.end()
    for path in (a, e):
        await images.check(path)
    lost = prove_durable(log, {0: await images.dump(a, world.path("raw"))}, FILLED)
    assert not lost, lost[:3]
