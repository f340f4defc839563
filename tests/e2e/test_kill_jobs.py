"""SIGKILL with a job on each of two disks, all kinds of jobs, under one verifying guest.

Each disk is a chain of three layers that hold the guest's own writes. A round starts one job per
disk, ends some of them with a pivot, and kills the daemon at a seeded moment. Then only the files
speak: every flushed write is seen from the top of each chain, no image is corrupt, and the next
daemon opens them without a manual step.
"""

import asyncio
import random

from rig import images
from rig.cases import case
from rig.guest import prove_durable

SIZE = 16 * images.MIB
FILLED = images.blocks(SIZE) // 2


class Disk:
    """A chain base <- mid <- top of one disk, and the file that the guest's disk is now."""

    def __init__(self, world, daemon, index, choice):
        self.world, self.daemon, self.index, self.choice = world, daemon, index, choice
        self.files = [self.path("base")]
        self.active = self.files[0]
        self.job = f"job{index}"

    def path(self, layer):
        return self.world.path(f"{layer}{self.index}.qcow2")

    def node(self, layer):
        return f"{layer}{self.index}"

    async def open(self):
        await images.filled(self.files[0], SIZE, FILLED, disk=self.index)
        await self.daemon.add_qcow2(self.node("base"), self.files[0])
        return await self.daemon.export(self.node("base"), name=self.node("disk"))

    async def snapshot(self, below, layer):
        self.active = self.path(layer)
        self.files.append(self.active)
        await self.daemon.cmd("blockdev-snapshot-sync", node_name=self.node(below),
                              snapshot_file=self.active, snapshot_node_name=self.node(layer))

    async def target(self):
        path = await images.create(self.path("target"), SIZE)
        self.files.append(path)
        await self.daemon.add_qcow2(self.node("target"), path)
        return path

    def speed(self):
        return self.choice.choice([0, 4, 16]) * images.MIB

    async def start(self, command, **arguments):
        await self.daemon.cmd(command, job_id=self.job, device=self.node("top"),
                              speed=self.speed(), **arguments)

    async def pivot(self, path):
        """Completes a job that is ready; from the completion on, the disk is `path`."""
        await self.daemon.wait_event("BLOCK_JOB_READY", device=self.job)
        await self.daemon.cmd("block-job-complete", device=self.job)
        await self.daemon.wait_event("BLOCK_JOB_COMPLETED", device=self.job)
        self.active = path

    # -- what a disk may undergo; each returns with the job running or over --------------------
    async def stream(self):
        await self.start("block-stream")

    async def stream_to_a_base(self):
        await self.start("block-stream", base_node=self.node("base"))

    async def commit(self):
        await self.start("block-commit", top_node=self.node("mid"), base_node=self.node("base"))

    async def active_commit(self):
        await self.start("block-commit", base_node=self.node("base"))

    async def active_commit_with_its_pivot(self):
        await self.start("block-commit", base_node=self.node("base"))
        await self.pivot(self.files[0])

    async def mirror_that_blocks_writes(self):
        await self.target()
        await self.start("blockdev-mirror", target=self.node("target"), sync="full",
                         copy_mode="write-blocking")

    async def mirror_with_its_pivot(self):
        path = await self.target()
        await self.start("blockdev-mirror", target=self.node("target"), sync="full")
        await self.pivot(path)

    async def backup_of_a_kept_bitmap(self):
        await self.daemon.cmd("block-dirty-bitmap-add", node=self.node("top"), name="b",
                              persistent=True)
        await self.target()
        await asyncio.sleep(0.1)
        await self.start("blockdev-backup", target=self.node("target"), sync="bitmap",
                         bitmap="b", bitmap_mode="always")

    async def internal_snapshots(self):
        for name in ("one", "two"):
            await self.daemon.cmd("blockdev-snapshot-internal-sync", device=self.node("top"),
                                  name=name)
        await self.daemon.cmd("blockdev-snapshot-delete-internal-sync",
                              device=self.node("top"), name="one")

    async def growth(self):
        for more in range(1, 4):
            await self.daemon.cmd("block_resize", node_name=self.node("top"),
                                  size=SIZE + more * images.MIB)


WORK = ["stream", "mirror_with_its_pivot", "active_commit", "backup_of_a_kept_bitmap", "commit",
        "active_commit_with_its_pivot", "internal_snapshots", "mirror_that_blocks_writes",
        "stream_to_a_base", "growth"]


async def killed_round(world, seed):
    """One round; returns what was lost."""
    side = world.sub(f"r{seed}", world.kind)
    choice = random.Random(seed)
    daemon = await side.daemon()
    disks = [Disk(side, daemon, index, choice) for index in range(2)]
    guest = await side.guest(*[await disk.open() for disk in disks], seed=seed, filled=FILLED)
    await guest.run(rate=4000, flush_every=24)
    for below, layer in (("base", "mid"), ("mid", "top")):
        await guest.progress(40)
        for disk in disks:
            await disk.snapshot(below, layer)
    # in ten rounds each kind of work comes once on each disk, beside each time another one
    kinds = [WORK[seed % len(WORK)], WORK[(seed * 3 + 1) % len(WORK)]]
    for disk, kind in zip(disks, kinds):
        await getattr(disk, kind)()
    await asyncio.sleep(choice.random() * 0.5)
    await daemon.kill9()
    for _ in range(300):
        if (await guest.ask("state", tolerate=True))["lost"]:
            break
        await asyncio.sleep(0.01)
    log = await guest.log(tolerate=True)
    await guest.end()
    for disk in disks:
        for path in disk.files:
            await images.check(path, leaks_allowed=True)
    raw = {d.index: await images.dump(d.active, side.path(f"raw{d.index}")) for d in disks}
    lost = prove_durable(log, raw, FILLED)
    again = await side.daemon(name="again")
    for disk in disks:
        await again.add_qcow2("again" + str(disk.index), disk.active)
        await again.export("again" + str(disk.index), name="again" + str(disk.index))
    await again.quit()
    for disk in disks:
        await images.check(disk.active, leaks_allowed=True)
    return [f"{kinds}: {len(lost)} blocks, first: {lost[0]}"] if lost else []


@case(on="ours", timeout=600)
async def kill_beside_a_job_on_each_of_two_disks_keeps_every_flushed_write(world):
    wrong = []
    first = world.options.seed
    for seed in range(first, first + world.options.rounds):
        wrong += [f"round {seed}, {text}" for text in await killed_round(world, seed)]
    assert not wrong, "; ".join(wrong)
