"""blockdev-mirror and drive-mirror."""

from rig.scenario import CLUSTER, MIB, SIZE, SLOW, scenario


async def pair(s, names="ab", size=SIZE, fmt="qcow2"):
    """A chain with its top exported by default, and an empty target `t`."""
    await s.start()
    await s.chain(names)
    await s.image("t", size=size, fmt=fmt)
    await s.open("t", fmt=fmt)


@scenario
async def full_and_pivot(s):
    await pair(s)
    await s.export("b")
    await s.job("blockdev-mirror", device="b", target="t", sync="full")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.jobs()
    await s.cmd("block-job-complete", device="j")
    await s.gone()
    await s.cmd("query-block-exports")
    await s.write("b", (0x66, 4 * MIB, CLUSTER))
    await s.graph()


@scenario
async def full_into_raw(s):
    await pair(s, fmt="raw")
    await s.job("blockdev-mirror", device="b", target="t", sync="full")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.cmd("block-job-complete", device="j")
    await s.gone()
    await s.graph()


@scenario
async def cancelled_when_ready_is_a_copy(s):
    await pair(s)
    await s.job("blockdev-mirror", device="b", target="t", sync="full")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.cmd("block-job-cancel", device="j")
    await s.gone()
    await s.graph()


@scenario
async def cancelled_by_force_when_ready(s):
    await pair(s)
    await s.job("blockdev-mirror", device="b", target="t", sync="full")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.cmd("job-cancel", id="j")
    await s.gone()
    await s.graph()


@scenario
async def cancelled_before_ready(s):
    s.partial = {"t.qcow2"}
    s.numbers = False
    await pair(s)
    await s.job("blockdev-mirror", device="b", target="t", sync="full", speed=SLOW)
    await s.cmd("block-job-cancel", device="j")
    await s.gone()
    await s.graph()


@scenario
async def top_only(s):
    await s.start()
    await s.chain("ab")
    await s.image("t", backing="a")
    await s.open("t", backing="a")
    await s.job("blockdev-mirror", device="b", target="t", sync="top")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.cmd("block-job-complete", device="j")
    await s.gone()
    await s.graph()


@scenario
async def none_copies_only_new_writes(s):
    s.numbers = False
    await pair(s)
    await s.export("b")
    await s.job("blockdev-mirror", device="b", target="t", sync="none")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.write("b", (0x44, 2 * MIB, 2 * CLUSTER))
    await s.cmd("block-job-cancel", device="j")
    await s.gone()


@scenario
async def write_blocking(s):
    s.numbers = False
    await pair(s)
    await s.export("b")
    await s.job("blockdev-mirror", device="b", target="t", sync="full", copy_mode="write-blocking")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.write("b", (0x44, 2 * MIB, 2 * CLUSTER), (0x45, 512, 1024))
    await s.jobs()
    await s.cmd("block-job-complete", device="j")
    await s.gone()
    await s.cmd("query-block-exports")


@scenario
async def changed_to_write_blocking(s):
    await pair(s)
    await s.job("blockdev-mirror", device="b", target="t", sync="full")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.cmd("block-job-change", {"id": "j", "type": "mirror", "copy-mode": "write-blocking"})
    await s.cmd("block-job-change", {"id": "nothing", "type": "mirror",
                                     "copy-mode": "write-blocking"})
    await s.cmd("block-job-change", {"id": "j", "type": "stream", "copy-mode": "write-blocking"})
    await s.cmd("block-job-complete", device="j")
    await s.gone()


@scenario
async def paused_when_ready(s):
    await pair(s)
    await s.job("blockdev-mirror", device="b", target="t", sync="full")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.cmd("block-job-pause", device="j")
    await s.status("standby")
    await s.jobs()
    await s.cmd("block-job-cancel", device="j")
    await s.cmd("block-job-complete", device="j")
    await s.cmd("block-job-resume", device="j")
    await s.gone()
    await s.graph()


@scenario
async def finalized_by_hand(s):
    await pair(s)
    await s.job("blockdev-mirror", device="b", target="t", sync="full", auto_finalize=False,
                auto_dismiss=False)
    await s.event("BLOCK_JOB_READY", device="j")
    await s.cmd("block-job-finalize", id="j")
    await s.cmd("block-job-complete", device="j")
    await s.event("BLOCK_JOB_PENDING", id="j")
    await s.jobs()
    await s.graph()
    await s.cmd("block-job-complete", device="j")
    await s.cmd("block-job-finalize", id="j")
    await s.status("concluded")
    await s.cmd("block-job-dismiss", id="j")
    await s.graph()


@scenario
async def sizes_differ(s):
    await pair(s, size=SIZE // 2)
    await s.job("blockdev-mirror", device="b", target="t", sync="full", auto_dismiss=False)
    await s.status("concluded")
    await s.jobs()
    await s.cmd("job-dismiss", id="j")
    await s.graph()


@scenario
async def wrong_arguments(s):
    await pair(s, names="abc")
    for arguments in (
            {"device": "nothing"},
            {"target": "nothing"},
            {"target": "c"},
            {"target": "a"},
            {"target": "b"},
            {"sync": "whole"},
            {"granularity": 1000},
            {"granularity": 256},
            {"granularity": 134217728},
            {"buf-size": -1},
            {"speed": -1},
            {"replaces": "nothing"},
            {"copy-mode": "fast"},
            {"on-source-error": "enospc2"},
            {"filter-node-name": "a"},
            {"filter-node-name": "0x"},
            {"job-id": "9"}):
        await s.cmd("blockdev-mirror", dict(
            {"job-id": "j", "device": "c", "target": "t", "sync": "full"}, **arguments))
    await s.jobs()
    await s.graph()


@scenario
async def the_pivot_of_a_node_with_a_filter_name(s):
    await pair(s)
    await s.export("b")
    await s.job("blockdev-mirror", device="b", target="t", sync="full", filter_node_name="filter")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.cmd("query-block-exports")
    await s.cmd("blockdev-del", node_name="filter")
    await s.cmd("block-job-complete", device="j")
    await s.gone()
    await s.cmd("query-block-exports")


@scenario
async def quit_when_ready_never_pivots(s):
    await pair(s)
    await s.job("blockdev-mirror", device="b", target="t", sync="full")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.end()


@scenario
async def drive_mirror_to_a_new_file(s):
    await s.start()
    await s.chain("ab")
    await s.cmd("drive-mirror", job_id="j", device="b", target=s.path("m.qcow2"), sync="full",
                format="qcow2", node_name="m")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.cmd("block-job-complete", device="j")
    await s.gone()
    await s.graph()


@scenario
async def drive_mirror_of_the_top_layer(s):
    await s.start()
    await s.chain("ab")
    await s.cmd("drive-mirror", job_id="j", device="b", target=s.path("m.qcow2"), sync="top",
                format="qcow2", node_name="m")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.cmd("block-job-complete", device="j")
    await s.gone()
    await s.graph()


@scenario
async def drive_mirror_to_an_existing_file(s):
    await s.start()
    await s.chain("ab")
    await s.image("t", [(0x99, 0, MIB)])
    await s.cmd("drive-mirror", job_id="j", device="b", target=s.path("t.qcow2"), sync="full",
                format="qcow2", mode="existing")
    await s.event("BLOCK_JOB_READY", device="j")
    await s.cmd("block-job-cancel", device="j")
    await s.gone()
    await s.graph()


@scenario
async def drive_mirror_refusals(s):
    await s.start()
    await s.chain("ab")
    for arguments in (
            {"device": "nothing"},
            {"target": s.path("missing/m.qcow2")},
            {"format": "nothing"},
            {"mode": "existing", "target": s.path("missing.qcow2")},
            {"replaces": "b"},
            {"node-name": "a"}):
        await s.cmd("drive-mirror", dict(
            {"job-id": "j", "device": "b", "target": s.path("m.qcow2"), "sync": "full",
             "format": "qcow2"}, **arguments))
    await s.graph()


@scenario
async def drive_mirror_over_files_of_others(s):
    s.numbers = False
    await s.start()
    await s.chain("ab")
    await s.image("u", [(0x55, 0, MIB)])
    await s.open("u")
    s.empty("e.qcow2")
    for name in ("e", "u", "a", "b"):
        job = f"job-{name}"
        await s.job("drive-mirror", job=job, device="b", target=s.path(f"{name}.qcow2"),
                    sync="full", format="qcow2")
        if job not in s.refused:
            await s.event("BLOCK_JOB_READY", device=job)
            await s.cmd("block-job-cancel", device=job)
            await s.gone(job)
    await s.cmd("drive-mirror", job_id="j", device="b", target=s.world.folder, sync="full",
                format="qcow2")
    await s.graph()


@scenario
async def drive_mirror_over_a_file_with_content(s):
    await s.start()
    await s.chain("ab")
    await s.image("t", [(0x99, 0, MIB)])
    await s.job("drive-mirror", device="b", target=s.path("t.qcow2"), sync="full", format="qcow2")
    if "j" not in s.refused:
        await s.event("BLOCK_JOB_READY", device="j")
        await s.cmd("block-job-cancel", device="j")
    await s.gone()
    await s.graph()
