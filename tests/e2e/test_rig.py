"""The rig itself: its judges must be able to say no, and `qmp-shell` must work."""

import asyncio
import os
import sys

from rig import images
from rig.cases import case
from rig.guest import now, prove_cut, prove_durable, prove_latest
from rig.pattern import BLOCK, block_bytes, sequence_of

SIZE = 8 * images.MIB
FILLED = images.blocks(SIZE) // 2


class PlantedLog:
    """Three writes: 1 to block 0, 2 to block 1, 3 to block 0; a flush after 2."""

    writes = [[1, 0, 0, 1, 10, 20, None, "write", False],
              [2, 0, 1, 1, 30, 40, None, "write", False],
              [3, 0, 0, 1, 60, 70, None, "write", False]]
    flushes = [[0, 50, 55]]

    def by_block(self, _disk):
        return {0: [(1, 10, 20, False, None), (3, 60, 70, False, None)],
                1: [(2, 30, 40, False, None)]}


def planted(world, *sequences):
    path = world.path("planted.raw")
    with open(path, "wb") as f:
        for block, seq in enumerate(sequences):
            f.write(bytes(BLOCK) if seq is None else block_bytes(0, seq, block))
    return {0: path}


def refuses(judge, *args):
    try:
        return bool(judge(*args))
    except (AssertionError, ValueError):
        return True


@case("rig")
async def the_judges_refuse_what_is_wrong(world):
    log = PlantedLog()
    prove_cut(log, planted(world, 1, 2), 45, 50)
    prove_cut(log, planted(world, 1, None), 25, 35)
    prove_latest(log, planted(world, 3, 2))
    assert not prove_durable(log, planted(world, 1, 2))
    assert not prove_durable(log, planted(world, 3, 2))
    assert refuses(prove_cut, log, planted(world, 1, None), 45, 50), "a write is missing"
    assert refuses(prove_cut, log, planted(world, 3, 2), 45, 50), "a write is too new"
    assert refuses(prove_cut, log, planted(world, 3, None), 5, 100), "two instants"
    assert refuses(prove_cut, log, planted(world, 2, 2), 45, 50), "a foreign write"
    assert refuses(prove_latest, log, planted(world, 1, 2)), "an old write"
    assert refuses(prove_durable, log, planted(world, None, 2)), "a flushed write is lost"
    assert refuses(prove_durable, log, planted(world, 1, None)), "a flushed write is lost"
    torn = block_bytes(0, 1, 0)[:2048] + block_bytes(0, 3, 0)[2048:]
    assert refuses(sequence_of, torn, 0, 0), "a torn block"
    assert refuses(sequence_of, block_bytes(0, 1, 5), 0, 0), "a misplaced block"
    assert refuses(sequence_of, block_bytes(1, 1, 0), 0, 0), "a block of another disk"


@case("rig")
async def the_guest_notices_a_block_that_changes_behind_its_back(world):
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    d = await world.daemon(kind=world.peer)
    await d.add_qcow2("a", a)
    uri = await d.export("a")
    guest = await world.guest(uri, filled=FILLED)
    await guest.run(count=50, rate=5000)
    await guest.finish()
    await images.tool("qemu-io", "-f", "raw", "-c", "write -P 7 1M 4k", uri)
    try:
        await guest.verify()
    except AssertionError as problem:
        assert "block 256" in str(problem), problem
    else:
        raise AssertionError("the guest noticed nothing")
    await d.quit()


@case("rig")
async def a_counted_run_writes_the_same_whatever_the_timing(world):
    digests = []
    for rate in (3000, 20000):
        a = await images.filled(world.path(f"a{rate}.qcow2"), SIZE, FILLED)
        d = await world.daemon(kind=world.peer, name=f"r{rate}")
        await d.add_qcow2("a", a)
        guest = await world.guest(await d.export("a"), seed=5, filled=FILLED)
        await guest.run(count=400, rate=rate)
        await guest.finish()
        await guest.end()
        await d.quit()
        digests.append(await images.digest(a))
    assert digests[0] == digests[1]


async def shell(world, d, *lines):
    """Runs lines through the official `qmp-shell`; returns what it prints."""
    program = os.path.join(os.path.dirname(sys.executable), "qmp-shell")
    process = await asyncio.create_subprocess_exec(
        program, d.qmp_path, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT, env=dict(os.environ, HOME=world.folder))
    out, _ = await asyncio.wait_for(
        process.communicate("".join(line + "\n" for line in lines).encode()), 30)
    return out.decode()


@case("both")
async def the_backup_walkthrough_runs_through_qmp_shell(world):
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    e = await images.create(world.path("e.qcow2"), SIZE)
    b = world.path("b.qcow2")
    # the shell needs the only monitor connection
    d = await world.daemon("--chardev", f"socket,id=m,path={world.path('shell.qmp')},server=on,"
                           "wait=off", "--monitor", "m", "--blockdev",
                           f"driver=qcow2,node-name=node-A,file.driver=file,file.filename={a}")
    d.qmp_path = world.path("shell.qmp")
    first = await shell(
        world, d, "block-export-add type=nbd id=e node-name=node-A name=disk writable=true")
    assert "return" in first and "error" not in first, first
    guest = await world.guest(d.uri(), filled=FILLED)
    await guest.run(rate=2000)
    await guest.progress()
    t1 = now()
    out = await shell(
        world, d,
        f"blockdev-snapshot-sync node-name=node-A snapshot-file={b} snapshot-node-name=node-B "
        "format=qcow2",
        "blockdev-add driver=qcow2 node-name=node-E "
        f'file={{"driver":"file","filename":"{e}"}}',
        "blockdev-backup device=node-B target=node-E sync=full job-id=job0",
        "no-such-command")
    t2 = now()
    assert out.count("'return'") + out.count('"return"') >= 3, out
    assert "The command no-such-command has not been found" in out, out
    await d.wait_event("BLOCK_JOB_COMPLETED", device="job0")
    await d.job_gone()
    await guest.progress()
    await guest.stop()
    log = await guest.log()
    await guest.end()
    await d.quit()
    prove_cut(log, {0: await images.dump(e, world.path("e.raw"))}, t1, t2, FILLED)
    prove_latest(log, {0: await images.dump(b, world.path("b.raw"))}, FILLED)
