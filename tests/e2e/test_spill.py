"""A backup whose target stands still: guests go on, and the backup is right when it moves again."""

import os
import signal

from rig import images
from rig.cases import UNDER_LOAD, case, slowness
from rig.daemon import Refused
from rig.guest import now, prove_cut

# More than the reserve in memory (32 MiB) holds of it.
SIZE = 96 * images.MIB
FILLED = images.blocks(SIZE) * 3 // 4


class Frozen:
    """A target on a file system whose server is stopped and continued."""

    def __init__(self, disk):
        self.disk = disk

    def _signal(self, number):
        for process in self.disk.processes:
            process.send_signal(number)

    def __enter__(self):
        self._signal(signal.SIGSTOP)

    def __exit__(self, *_):
        self._signal(signal.SIGCONT)


def spill_files(folder):
    return [name for _, _, names in os.walk(folder) for name in names if name.endswith(".spill")]


async def running(world):
    path = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    disk = await world.failing_file(SIZE)
    d = await world.daemon()
    await d.add_qcow2("node-A", path)
    await d.cmd("blockdev-add", {"node-name": "node-T", "driver": "raw",
                                 "file": {"driver": "file", "filename": disk.file}})
    guest = await world.guest(await d.export("node-A"), filled=FILLED)
    return path, disk, d, guest


def slowest_but_a_thousandth(log, since):
    times = sorted(w[5] - w[4] for w in log.writes if w[4] >= since and w[5] is not None)
    return times[len(times) * 999 // 1000]


@case("ours", timeout=120)
async def guests_go_on_while_the_target_of_a_backup_stands_still(world):
    path, disk, d, guest = await running(world)
    t1 = now()
    await d.cmd("blockdev-backup", device="node-A", target="node-T", sync="full", job_id="j",
                speed=2 * images.MIB)
    t2 = now()
    with Frozen(disk):
        await guest.run(rate=2000)
        await guest.progress(more=4000)
        row, = await d.cmd("query-block-jobs")
        spill = row["spill"]
        assert spill["bytes"] > 0 and spill["max"] == SIZE, spill
        # The target is no file of this machine, so it is beside the disk.
        assert os.path.dirname(spill["file"]) == os.path.dirname(path), spill
        assert os.path.exists(spill["file"]), spill
        await d.cmd("block-job-set-speed", device="j", speed=0)
        await guest.progress(more=500)
    await d.wait_event("BLOCK_JOB_COMPLETED", device="j")
    await d.job_gone("j")
    await guest.stop()
    await guest.verify()
    log = await guest.log()
    await guest.end()
    latency = slowest_but_a_thousandth(log, t2)
    allowed = 50e6 * UNDER_LOAD * slowness()
    assert latency <= allowed, f"p99.9 was {latency / 1e6:.1f} ms, allowed {allowed / 1e6:.1f}"
    assert spill_files(world.path()) == [], "the file is gone with the job"
    await d.quit()
    prove_cut(log, {0: disk.backing}, t1, t2, FILLED)
    await images.check(path)


@case("ours", timeout=120)
async def a_spill_file_that_is_full_ends_the_backup_and_no_guest(world):
    path, disk, d, guest = await running(world)
    folder = world.path("spill")
    os.mkdir(folder)
    await d.cmd("blockdev-backup", {"device": "node-A", "target": "node-T", "sync": "full",
                                    "job-id": "j", "speed": 2 * images.MIB,
                                    "spill-dir": folder, "spill-max": 2 * images.MIB})
    with Frozen(disk):
        await guest.run(rate=2000)
        done = await d.wait_event("BLOCK_JOB_COMPLETED", device="j")
        name = os.path.join(folder, "node-T.j.spill")
        assert f"spill file '{name}' has reached its bound of 2097152 bytes" in done["error"], done
        await guest.progress(more=500)
        await guest.stop()
        await guest.verify()
    await d.job_gone("j")
    assert spill_files(world.path()) == []
    await guest.end()
    await d.quit()
    await images.check(path)


@case("ours", timeout=60)
async def a_spill_dir_that_is_no_folder_is_refused_by_name(world):
    path = await images.create(world.path("a.qcow2"), images.MIB)
    target = await images.create(world.path("t.qcow2"), images.MIB)
    d = await world.daemon()
    await d.add_qcow2("node-A", path)
    await d.add_qcow2("node-T", target)
    job = {"device": "node-A", "target": "node-T", "sync": "full", "job-id": "j"}
    for folder, text in ((path, f"spill-dir '{path}' is not a directory"),
                         ("/no/such", "spill-dir '/no/such': No such file or directory")):
        wrong = dict(job, **{"spill-dir": folder})
        for name, arguments in (("blockdev-backup", wrong),
                                ("transaction", {"actions": [{"type": "blockdev-backup",
                                                              "data": wrong}]})):
            try:
                await d.cmd(name, arguments)
            except Refused as refused:
                assert refused.desc == text, refused
            else:
                raise AssertionError(f"{name} took the folder {folder}")
    assert await d.cmd("query-jobs") == []
    await d.quit()
