"""Verbs of jobs in every state that a client can hold a job in: answers are the peer's."""

from rig import images, transcript
from rig.cases import case
from test_create import attempt, compared

MIB = images.MIB

# What asks without ending the job; what a state allows is undone by the next verb.
ASKING = [
    ("job-pause", "id", {}), ("job-pause", "id", {}), ("block-job-pause", "device", {}),
    ("block-job-cancel", "device", {}), ("job-resume", "id", {}), ("job-resume", "id", {}),
    ("block-job-resume", "device", {}), ("job-dismiss", "id", {}), ("job-finalize", "id", {}),
    ("block-job-dismiss", "id", {}), ("block-job-finalize", "id", {}),
    ("block-job-set-speed", "device", {"speed": -1}),
    ("block-job-set-speed", "device", {"speed": 5}),
    ("block-job-set-speed", "device", {"speed": 0}),
    ("block-job-change", "id", {"type": "mirror", "copy-mode": "background"}),
    ("block-job-change", "id", {"type": "backup"}),
]
STEADY = [row for row in ASKING if row[0] != "block-job-cancel" and "speed" not in row[2]]


async def ask(d, verbs, job="j"):
    for name, key, more in verbs:
        await attempt(d, name, {key: job, **more})


async def disks(world):
    d = await world.daemon()
    for name in "st":
        path = world.path(name + ".qcow2")
        await images.create(path, 4 * MIB)
        await images.tool("qemu-io", "-c", "write -P 1 0 4M", path)
        await d.add_qcow2(name, path)
    return d


async def unknown_jobs(world):
    d = await disks(world)
    await ask(d, ASKING, "nobody")
    for name, arguments in (("job-cancel", {"id": "nobody"}), ("job-complete", {"id": "nobody"}),
                            ("block-job-complete", {"device": "nobody"}),
                            ("block-job-cancel", {"device": "nobody", "force": True})):
        await attempt(d, name, arguments)
    await d.quit()
    return transcript.replies(d.record, world.folder)


async def slow(world, end):
    """A running job; it is paused by the user, goes on, and ends."""
    d = await disks(world)
    await d.cmd("blockdev-backup", job_id="j", device="s", target="t", sync="full", speed=1)
    await ask(d, [row for row in ASKING if row[0] != "block-job-cancel"
                  and row[2].get("speed") is None])
    await ask(d, [("job-complete", "id", {}), ("block-job-complete", "device", {})])
    await d.cmd("job-pause", id="j")
    await d.wait_event("JOB_STATUS_CHANGE", id="j", status="paused")
    await ask(d, [("job-pause", "id", {}), ("job-dismiss", "id", {}), ("job-finalize", "id", {}),
                  ("job-complete", "id", {}), ("block-job-cancel", "device", {}),
                  ("block-job-set-speed", "device", {"speed": 7})])
    await ask(d, [end])
    await d.job_gone("j")
    await d.quit()
    return transcript.replies(d.record, world.folder)


async def ready(world, ends):
    d = await disks(world)
    await d.cmd("blockdev-mirror", job_id="j", device="s", target="t", sync="none")
    await d.wait_event("BLOCK_JOB_READY")
    await ask(d, [row for row in STEADY if row[0] != "job-pause" and "pause" not in row[0]])
    await d.cmd("job-pause", id="j")
    await d.wait_event("JOB_STATUS_CHANGE", id="j", status="standby")
    await ask(d, [("job-pause", "id", {}), ("block-job-cancel", "device", {}),
                  ("job-dismiss", "id", {}), ("job-finalize", "id", {})])
    await ask(d, ends)
    await d.job_gone("j")
    await d.quit()
    return (transcript.replies(d.record, world.folder)
            + transcript.events(d.record, world.folder, numbers=False))


async def pending(world, end):
    d = await disks(world)
    await d.cmd("blockdev-backup", job_id="j", device="s", target="t", sync="full",
                auto_finalize=False, auto_dismiss=False)
    await d.wait_event("BLOCK_JOB_PENDING")
    await ask(d, [row for row in ASKING if row[0] not in
                  ("block-job-cancel", "job-finalize", "block-job-finalize")])
    await ask(d, [("job-complete", "id", {})])
    await ask(d, [end])
    await d.wait_event("JOB_STATUS_CHANGE", id="j", status="concluded")
    await ask(d, [row for row in ASKING if "dismiss" not in row[0]])
    await ask(d, [("job-cancel", "id", {}), ("job-complete", "id", {})])
    await d.cmd("query-jobs")
    await d.cmd("query-block-jobs")
    await ask(d, [("job-dismiss", "id", {}), ("job-dismiss", "id", {})])
    await d.quit()
    return (transcript.replies(d.record, world.folder)
            + transcript.events(d.record, world.folder))


@case("pair")
async def verbs_on_no_job(world):
    await compared(world, unknown_jobs, "verbs without a job")


@case("pair")
async def verbs_on_a_running_and_a_paused_job(world):
    for name, end in (("a", ("job-cancel", "id", {})),
                      ("b", ("block-job-cancel", "device", {"force": True}))):
        sub = world.sub(name, world.kind)
        await compared(sub, lambda w, end=end: slow(w, end), f"running, then {end[0]}")


@case("pair")
async def verbs_on_a_ready_and_a_standby_job(world):
    resume = ("job-resume", "id", {})
    for name, ends in (("a", [("job-complete", "id", {}), resume]),
                       ("b", [("job-cancel", "id", {})]),
                       ("c", [resume, ("block-job-cancel", "device", {})]),
                       ("d", [resume, ("block-job-complete", "device", {})])):
        sub = world.sub(name, world.kind)
        await compared(sub, lambda w, ends=ends: ready(w, ends), f"ready, then {ends}")


@case("pair")
async def verbs_on_a_pending_and_a_concluded_job(world):
    for name, end in (("a", ("job-finalize", "id", {})), ("b", ("job-cancel", "id", {})),
                      ("c", ("block-job-finalize", "id", {})),
                      ("d", ("block-job-cancel", "device", {}))):
        sub = world.sub(name, world.kind)
        await compared(sub, lambda w, end=end: pending(w, end), f"pending, then {end[0]}")
