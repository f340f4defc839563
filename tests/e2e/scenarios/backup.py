"""blockdev-backup and drive-backup."""

from rig.scenario import CLUSTER, MIB, SIZE, SLOW, scenario


async def pair(s, names="ab", size=SIZE, fmt="qcow2"):
    await s.start()
    await s.chain(names)
    await s.image("t", size=size, fmt=fmt)
    await s.open("t", fmt=fmt)


@scenario
async def full(s):
    await pair(s)
    await s.job("blockdev-backup", device="b", target="t", sync="full")
    await s.gone()
    await s.jobs()
    await s.graph()


@scenario
async def full_into_raw(s):
    await pair(s, fmt="raw")
    await s.job("blockdev-backup", device="b", target="t", sync="full")
    await s.gone()


@scenario
async def top(s):
    await pair(s, names="abc")
    await s.job("blockdev-backup", device="c", target="t", sync="top")
    await s.gone()


@scenario
async def compressed(s):
    await pair(s)
    await s.job("blockdev-backup", device="b", target="t", sync="full", compress=True)
    await s.gone()


@scenario
async def compressed_into_raw(s):
    await pair(s, fmt="raw")
    await s.job("blockdev-backup", device="b", target="t", sync="full", compress=True)


@scenario
async def none_with_writes(s):
    s.numbers = False
    await pair(s)
    await s.export("b")
    await s.job("blockdev-backup", device="b", target="t", sync="none")
    await s.write("b", (0x44, 2 * MIB, 2 * CLUSTER), (0x45, 512, 1024))
    await s.cmd("block-job-cancel", device="j")
    await s.gone()


@scenario
async def incremental(s):
    await pair(s)
    await s.export("b")
    await s.cmd("block-dirty-bitmap-add", node="b", name="m")
    await s.write("b", (0x44, 2 * MIB, 2 * CLUSTER), (0x45, 512, 1024))
    await s.job("blockdev-backup", device="b", target="t", sync="incremental", bitmap="m")
    await s.gone()
    await s.cmd("x-debug-block-dirty-bitmap-sha256", node="b", name="m")


async def bitmap_mode(s, mode, sync="bitmap"):
    await pair(s)
    await s.export("b")
    await s.cmd("block-dirty-bitmap-add", node="b", name="m", granularity=65536)
    await s.write("b", (0x44, 2 * MIB, 2 * CLUSTER), (0x45, 512, 1024))
    await s.cmd("x-debug-block-dirty-bitmap-sha256", node="b", name="m")
    await s.job("blockdev-backup", device="b", target="t", sync=sync, bitmap="m",
                bitmap_mode=mode)
    await s.gone()
    await s.cmd("x-debug-block-dirty-bitmap-sha256", node="b", name="m")


@scenario
async def bitmap_on_success(s):
    await bitmap_mode(s, "on-success")


@scenario
async def bitmap_never(s):
    await bitmap_mode(s, "never")


@scenario
async def bitmap_always(s):
    await bitmap_mode(s, "always")


@scenario
async def full_with_bitmap_on_success(s):
    await bitmap_mode(s, "on-success", sync="full")


@scenario
async def full_with_bitmap_always(s):
    await bitmap_mode(s, "always", sync="full")


@scenario
async def top_with_bitmap_on_success(s):
    await bitmap_mode(s, "on-success", sync="top")


@scenario
async def bitmap_busy_and_cancelled(s):
    s.partial = {"t.qcow2"}
    s.numbers = False
    await pair(s)
    await s.export("b")
    await s.cmd("block-dirty-bitmap-add", node="b", name="m", granularity=65536)
    await s.write("b", (0x44, 0, 4 * MIB))
    await s.cmd("x-debug-block-dirty-bitmap-sha256", node="b", name="m")
    await s.job("blockdev-backup", device="b", target="t", sync="incremental", bitmap="m",
                speed=SLOW)
    await s.cmd("block-dirty-bitmap-remove", node="b", name="m")
    await s.cmd("block-dirty-bitmap-clear", node="b", name="m")
    await s.cmd("block-dirty-bitmap-disable", node="b", name="m")
    await s.cmd("block-job-cancel", device="j")
    await s.gone()
    await s.cmd("x-debug-block-dirty-bitmap-sha256", node="b", name="m")
    await s.cmd("block-dirty-bitmap-remove", node="b", name="m")


@scenario
async def cancelled_while_paused(s):
    s.numbers = False
    await pair(s)
    await s.job("blockdev-backup", device="b", target="t", sync="none")
    await s.cmd("job-pause", id="j")
    await s.status("paused")
    await s.jobs()
    await s.cmd("block-job-cancel", device="j")
    await s.cmd("job-cancel", id="j")
    await s.gone()
    await s.graph()


@scenario
async def finalized_by_hand(s):
    await pair(s)
    await s.job("blockdev-backup", device="b", target="t", sync="full", auto_finalize=False,
                auto_dismiss=False)
    await s.event("BLOCK_JOB_PENDING", id="j")
    await s.jobs()
    await s.cmd("job-complete", id="j")
    await s.cmd("job-finalize", id="j")
    await s.status("concluded")
    await s.cmd("job-dismiss", id="j")


@scenario
async def wrong_arguments(s):
    await pair(s, names="abc")
    await s.cmd("block-dirty-bitmap-add", node="c", name="m")
    await s.image("small", size=MIB)
    await s.open("small")
    for arguments in (
            {"device": "nothing"},
            {"target": "nothing"},
            {"target": "c"},
            {"target": "small"},
            {"sync": "incremental"},
            {"sync": "bitmap"},
            {"sync": "bitmap", "bitmap": "m"},
            {"sync": "incremental", "bitmap": "m", "bitmap-mode": "never"},
            {"sync": "incremental", "bitmap": "nothing"},
            {"sync": "none", "bitmap": "m", "bitmap-mode": "on-success"},
            {"sync": "full", "bitmap": "m", "bitmap-mode": "never"},
            {"sync": "full", "bitmap": "m"},
            {"sync": "full", "bitmap-mode": "always"},
            {"sync": "everything"},
            {"speed": -1},
            {"x-perf": {"max-workers": 0}},
            {"x-perf": {"max-chunk": -1}},
            {"x-perf": {"max-chunk": 100}},
            {"x-perf": {"min-cluster-size": 1000}},
            {"filter-node-name": "a"},
            {"on-target-error": "x"}):
        await s.cmd("blockdev-backup", dict(
            {"job-id": "j", "device": "c", "target": "t", "sync": "full"}, **arguments))
    await s.jobs()
    await s.graph()


@scenario
async def two_backups_of_one_node(s):
    s.partial = {"t.qcow2"}
    s.numbers = False
    await pair(s)
    await s.image("u")
    await s.open("u")
    await s.job("blockdev-backup", device="b", target="t", sync="full", speed=SLOW)
    await s.job("blockdev-backup", job="k", device="b", target="t", sync="full")
    await s.job("blockdev-backup", job="k", device="b", target="u", sync="full")
    await s.gone("k")
    await s.cmd("block-job-cancel", device="j")
    await s.gone("j")


@scenario
async def drive_backup_to_a_new_file(s):
    await s.start()
    await s.chain("ab")
    await s.cmd("drive-backup", job_id="j", device="b", target=s.path("m.qcow2"), sync="full",
                format="qcow2")
    await s.gone()
    await s.graph()


@scenario
async def drive_backup_of_the_top_layer(s):
    await s.start()
    await s.chain("ab")
    await s.cmd("drive-backup", job_id="j", device="b", target=s.path("m.qcow2"), sync="top",
                format="qcow2")
    await s.gone()
    await s.graph()


@scenario
async def drive_backup_refusals(s):
    await s.start()
    await s.chain("ab")
    for arguments in (
            {"device": "nothing"},
            {"target": s.path("missing/m.qcow2")},
            {"format": "nothing"},
            {"mode": "existing", "target": s.path("missing.qcow2")},
            {"sync": "incremental"}):
        await s.cmd("drive-backup", dict(
            {"job-id": "j", "device": "b", "target": s.path("m.qcow2"), "sync": "full",
             "format": "qcow2"}, **arguments))
    await s.graph()


@scenario
async def drive_backup_over_files_of_others(s):
    await s.start()
    await s.chain("ab")
    await s.image("u", [(0x55, 0, MIB)])
    await s.open("u")
    s.empty("e.qcow2")
    for name in ("e", "u", "a", "b"):
        job = f"job-{name}"
        await s.job("drive-backup", job=job, device="b", target=s.path(f"{name}.qcow2"),
                    sync="full", format="qcow2")
        await s.gone(job)
    await s.cmd("drive-backup", job_id="j", device="b", target=s.world.folder, sync="full",
                format="qcow2")
    await s.graph()


@scenario
async def drive_backup_over_a_file_with_content(s):
    await s.start()
    await s.chain("ab")
    await s.image("t", [(0x99, 0, MIB)])
    await s.job("drive-backup", device="b", target=s.path("t.qcow2"), sync="full", format="qcow2")
    await s.gone()
    await s.graph()


@scenario
async def while_the_node_gets_a_snapshot(s):
    s.partial = {"t.qcow2"}
    s.numbers = False
    await pair(s)
    await s.export("b")
    await s.job("blockdev-backup", device="b", target="t", sync="full", speed=MIB // 4)
    await s.cmd("blockdev-snapshot-sync", node_name="b", snapshot_file=s.path("o.qcow2"),
                snapshot_node_name="o")
    await s.cmd("block-job-cancel", device="j")
    await s.gone()
    await s.graph()
