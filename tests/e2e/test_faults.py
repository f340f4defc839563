"""Storage that fails under jobs and guests: a full disk, and a target that answers EIO."""

import asyncio
import os

from rig import images, transcript
from rig.cases import case
from rig.daemon import Refused
from rig.guest import now, prove_latest

SIZE = 32 * images.MIB
FILLED = images.blocks(SIZE) * 3 // 4


async def running(world, busy=True):
    """A daemon whose guest writes all the time, or has written and is silent."""
    path = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    d = await world.daemon()
    await d.add_qcow2("node-A", path)
    guest = await world.guest(await d.export("node-A"), filled=FILLED)
    await guest.run(rate=1500)
    await guest.progress()
    if not busy:
        await guest.stop()
    return path, d, guest


async def settle(path, d, guest):
    """The guest goes on, nothing is lost, the daemon lives and the image is right."""
    await guest.run(rate=1500)
    await guest.progress()
    await guest.stop()
    await guest.verify()
    log = await guest.log()
    await guest.end()
    assert await d.cmd("query-block-jobs") == []
    await d.quit()
    await images.check(path)
    prove_latest(log, {0: await images.dump(path, path + ".raw")}, FILLED)


async def full_target(world, busy):
    """Backup and mirror to a file system that is too small; both report and the guest goes on."""
    small = await world.tmpfs("4m")
    path, d, guest = await running(world, busy)
    lines = []
    for n, job in enumerate(("blockdev-backup", "blockdev-mirror")):
        e = await images.create(os.path.join(small, f"e{n}.qcow2"), SIZE)
        await d.add_qcow2(f"node-E{n}", e)
        since = d.mark()
        await d.cmd(job, device="node-A", target=f"node-E{n}", sync="full", job_id=f"j{n}")
        done = await d.wait_event("BLOCK_JOB_COMPLETED", device=f"j{n}")
        error = await d.wait_event("BLOCK_JOB_ERROR", device=f"j{n}", since=since)
        lines.append(f"{job}: {done.get('error')} {error['operation']} {error['action']}")
        await d.job_gone(f"j{n}")
        await d.cmd("blockdev-del", node_name=f"node-E{n}")
        os.unlink(e)
    await settle(path, d, guest)
    return lines


@case("pair", timeout=90)
async def a_full_target_ends_the_job_with_the_error_of_the_peer(world):
    # silent guests: the peer hands errors of a backup target to a guest that writes
    lines = [await full_target(world.sub("x", world.kind), busy=False),
             await full_target(world.sub("p", world.peer), busy=False)]
    transcript.require_same(lines[0], lines[1], "job errors")
    assert "No space left on device" in lines[0][0], lines[0]


@case("ours", timeout=90)
async def a_full_target_never_fails_a_write_of_the_guest(world):
    for line in await full_target(world, busy=True):
        assert "No space left on device" in line, line


@case("both", timeout=90)
async def a_job_that_stops_on_a_full_target_ends_well_when_there_is_room(world):
    small = await world.tmpfs("48m")
    filler = os.path.join(small, "filler")
    with open(filler, "wb") as f:
        f.write(bytes(44 * images.MIB))
    path, d, guest = await running(world, busy=False)
    e = await images.create(os.path.join(small, "e.qcow2"), SIZE)
    await d.add_qcow2("node-E", e)
    await d.cmd("blockdev-backup", {"device": "node-A", "target": "node-E", "sync": "full",
                                    "job-id": "j", "on-target-error": "stop"})
    error = await d.wait_event("BLOCK_JOB_ERROR", device="j")
    assert error["action"] == "stop" and error["operation"] == "write", error
    for _ in range(500):
        job = (await d.cmd("query-block-jobs"))[0]
        if job["status"] == "paused":
            break
        await asyncio.sleep(0.01)
    assert job["status"] == "paused" and job["io-status"] == "nospace", job
    os.unlink(filler)
    await d.cmd("block-job-resume", device="j")
    done = await d.wait_event("BLOCK_JOB_COMPLETED", device="j")
    assert "error" not in done, done
    await d.job_gone("j")
    await settle(path, d, guest)
    await images.check(e)


@case("both", timeout=90)
async def a_full_disk_under_the_guest_fails_its_writes_and_all_goes_on_after(world):
    small = await world.tmpfs("12m")
    filler = os.path.join(small, "filler")
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    b = os.path.join(small, "b.qcow2")
    d = await world.daemon()
    await d.add_qcow2("node-A", a)
    uri = await d.export("node-A")
    await d.cmd("blockdev-snapshot-sync", node_name="node-A", snapshot_file=b,
                snapshot_node_name="node-B")
    with open(filler, "wb") as f:
        f.write(bytes(8 * images.MIB))
    guest = await world.guest(uri, filled=FILLED)
    await guest.run(rate=3000, zeroes=0.0)
    for _ in range(400):
        state = await guest.ask("state", tolerate=True)
        if state["error_count"] > 5:
            break
        await asyncio.sleep(0.02)
    state = await guest.stop(tolerate=True)
    assert state["error_count"] > 0, "the disk did not fill"
    log = await guest.log(tolerate=True)
    kinds = {row[3].split()[-1] for row in log.errors}
    assert kinds == {"ENOSPC"}, f"the guest met {kinds}"
    # what was acknowledged reads back although the disk is full
    await guest.ask("verify", tolerate=True)
    os.unlink(filler)
    await guest.ask("run", tolerate=True, rate=2000, count=150, region=[0, 400], zeroes=0.0)
    after = await guest.ask("wait", tolerate=True)
    assert after["error_count"] == state["error_count"], \
        f"writes still fail after space was freed: {after['errors']}"
    await guest.ask("verify", tolerate=True)
    await guest.end()
    await d.quit()
    await images.check(b)


async def failing_target(world, busy):
    """A target that starts to answer EIO in the middle of a job."""
    disk = await world.failing_file(SIZE)
    path, d, guest = await running(world, busy)
    lines = []
    for job in ("blockdev-backup", "blockdev-mirror"):
        await d.cmd("blockdev-add", {"driver": "raw", "node-name": "node-E", "file": {
            "driver": "file", "filename": disk.file}})
        await d.cmd(job, device="node-A", target="node-E", sync="full", job_id=job,
                    speed=4 * images.MIB)
        await copied(d, images.MIB)
        disk.fail()
        try:
            await d.cmd("block-job-set-speed", device=job, speed=0, recorded=False)
        except Refused:
            pass  # it has met the failure already
        done = await d.wait_event("BLOCK_JOB_COMPLETED", device=job)
        error = await d.wait_event("BLOCK_JOB_ERROR", device=job)
        lines.append(f"{job}: {done.get('error')} {error['operation']} {error['action']}")
        await d.job_gone(job)
        disk.heal()
        await d.cmd("blockdev-del", node_name="node-E")
    await settle(path, d, guest)
    return lines


async def copied(d, bytes_wanted):
    for _ in range(1000):
        jobs = await d.cmd("query-block-jobs")
        if jobs and jobs[0]["offset"] >= bytes_wanted:
            return
        assert jobs, "the job ended before the target failed"
        await asyncio.sleep(0.01)
    raise AssertionError(f"the job does not move: {jobs}")


@case("pair", timeout=90)
async def a_target_that_fails_in_the_middle_ends_the_job_with_the_error_of_the_peer(world):
    lines = [await failing_target(world.sub("x", world.kind), busy=False),
             await failing_target(world.sub("p", world.peer), busy=False)]
    transcript.require_same(lines[0], lines[1], "job errors")
    for line in lines[0]:
        assert "Input/output error" in line, line


@case("ours", timeout=90)
async def a_target_that_fails_in_the_middle_never_fails_a_write_of_the_guest(world):
    for line in await failing_target(world, busy=True):
        assert "Input/output error" in line, line


@case("ours", timeout=60)
async def an_eio_of_a_backup_target_never_reaches_the_guest(world):
    disk = await world.failing_file(SIZE)
    path, d, guest = await running(world)
    await d.cmd("blockdev-add", {"driver": "raw", "node-name": "node-E", "file": {
        "driver": "file", "filename": disk.file}})
    await d.cmd("blockdev-backup", device="node-A", target="node-E", sync="none", job_id="j")
    await guest.progress()
    disk.fail()
    began = now()
    await guest.progress(200)
    log = await guest.log()
    assert log.acked_between(began, now()) > 0
    jobs = await d.cmd("query-block-jobs")
    if jobs:
        await d.cmd("block-job-cancel", device="j", force=True)
    await d.job_gone("j")
    await settle(path, d, guest)
