"""Controls a guest process and reads its log.

`prove_cut` is the judge of point-in-time copies: it takes a final image and the log, and shows
that the image holds every write acknowledged before `t1`, none submitted after `t2`, and that no
write in it began after a missing one was acknowledged (one instant for all disks).
`prove_durable` is the judge after a crash: flushed writes are there, nothing never written appears.
"""

import asyncio
import json
import os
import sys
import time

from rig.pattern import BLOCK, sequence_of


class GuestFailure(AssertionError):
    """The guest read something else than it wrote, or met an error it should not have."""


def now():
    """The clock of the log: nanoseconds, the same in all processes of this machine."""
    return time.monotonic_ns()


class Log:
    """The writes and flushes of a guest, in the order in which they were submitted."""

    def __init__(self, path):
        with open(path, encoding="utf-8") as source:
            raw = json.load(source)
        self.writes = raw["writes"]
        self.flushes = raw["flushes"]
        self.failures = raw["failures"]
        self.errors = raw["errors"]

    def by_block(self, disk):
        """block -> its writes [(seq or None for zeroes, submitted, acknowledged, fua)]."""
        table = {}
        for seq, d, block, count, sent, acked, error, kind, fua in self.writes:
            if d != disk:
                continue
            for b in range(block, block + count):
                table.setdefault(b, []).append(
                    (None if kind == "zero" else seq, sent, acked, fua, error))
        return table

    def acked_between(self, t1, t2):
        return sum(1 for w in self.writes if w[5] is not None and t1 <= w[5] <= t2)

    def sent_after(self, t):
        return sum(1 for w in self.writes if w[4] > t)


class Guest:
    """A running guest. Every method raises GuestFailure as soon as a wrong read is known."""

    def __init__(self, folder, uris, seed=1, filled=0, name="guest"):
        self.folder = folder
        self.name = name
        self.spec = {"uris": uris, "seed": seed, "filled": filled}
        self.process = None
        self.blocks = []

    async def start(self, timeout=90):
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "guest_process.py")
        self.stderr = open(os.path.join(self.folder, self.name + ".err"), "wb")
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, script, json.dumps(self.spec), stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=self.stderr, limit=1 << 24)
        hello = await self._answer(timeout)
        self.blocks = hello["blocks"]
        return self

    async def _answer(self, timeout):
        line = await asyncio.wait_for(self.process.stdout.readline(), timeout)
        if not line:
            self.stderr.flush()
            with open(self.stderr.name, encoding="utf-8", errors="replace") as text:
                raise GuestFailure("the guest process ended: " + text.read()[-2000:])
        return json.loads(line)

    async def ask(self, op, timeout=180, tolerate=False, **values):
        line = json.dumps(dict(values, op=op)) + "\n"
        self.process.stdin.write(line.encode())
        await self.process.stdin.drain()
        state = await self._answer(timeout)
        if state.get("failures"):
            raise GuestFailure("wrong reads: " + "; ".join(state["failures"]))
        if not tolerate and state.get("lost"):
            raise GuestFailure("the guest lost its disk: " + state["lost"])
        if not tolerate and state.get("errors"):
            raise GuestFailure(f"the guest met errors: {state['errors']}")
        return state

    async def run(self, **plan):
        await self.ask("run", **plan)

    async def stop(self, **kw):
        return await self.ask("stop", **kw)

    async def finish(self, **kw):
        """Waits until the counted run is over."""
        return await self.ask("wait", **kw)

    async def progress(self, more=20, timeout=90):
        """Waits until `more` further writes are acknowledged: the guest is alive."""
        first = (await self.ask("state"))["acked"]
        limit = time.monotonic() + timeout
        while time.monotonic() < limit:
            state = await self.ask("state")
            if state["acked"] >= first + more:
                return state
            await asyncio.sleep(0.01)
        raise GuestFailure(f"the guest stands still at {state['acked']} writes")

    async def verify(self):
        return await self.ask("verify")

    async def flush(self):
        return await self.ask("flush")

    async def log(self, tolerate=False):
        path = os.path.join(self.folder, self.name + ".log")
        await self.ask("dump", path=path, tolerate=tolerate)
        return Log(path)

    async def end(self):
        if self.process and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        if self.process:
            self.stderr.close()


def _visible(raw, disk):
    with open(raw, "rb") as image:
        block = 0
        while True:
            chunk = image.read(BLOCK * 256)
            if not chunk:
                return
            for at in range(0, len(chunk), BLOCK):
                data = chunk[at:at + BLOCK].ljust(BLOCK, b"\0")
                yield block, sequence_of(data, disk, block)
                block += 1


def initial(block, filled):
    """What a block held before the first write."""
    return 0 if block < filled else None


def prove_cut(log, images, t1, t2, filled=0):
    """Shows that the raw files `images` {disk: path} are one cut in [t1, t2]."""
    newest_inside, oldest_outside = (0, "nothing"), (1 << 63, "nothing")
    for disk, raw in images.items():
        table = log.by_block(disk)
        for block, found in _visible(raw, disk):
            history = table.get(block, [])
            floor, allowed = -1, []
            for i, (_, _, acked, _, _) in enumerate(history):
                if acked is not None and acked < t1:
                    floor = i
            if floor < 0:
                allowed.append((initial(block, filled), -1))
            allowed += [(w[0], i) for i, w in enumerate(history)
                        if i >= max(floor, 0) and (i == floor or w[1] < t2)]
            matches = [i for value, i in allowed if value == found]
            if not matches:
                raise AssertionError(
                    f"disk {disk} block {block} holds write {found}; the cut allows "
                    f"{[value for value, _ in allowed]} (writes of the block: "
                    f"{[w[0] for w in history]}, acknowledged before the cut up to index {floor})")
            if len(matches) > 1:
                continue
            at = matches[0]
            if at >= 0 and history[at][1] > newest_inside[0]:
                newest_inside = (history[at][1], f"disk {disk} write {found}")
            for seq, _, acked, _, _ in history[at + 1:]:
                if acked is not None and acked < oldest_outside[0]:
                    oldest_outside = (acked, f"disk {disk} write {seq}")
    if newest_inside[0] > oldest_outside[0]:
        raise AssertionError(
            f"no single instant: {newest_inside[1]} is in the image although it was sent after "
            f"{oldest_outside[1]}, which is missing, had been acknowledged")


def prove_latest(log, images, filled=0):
    """Shows that the images hold the last write of every block."""
    end = 1 << 62
    prove_cut(log, images, end, end, filled)


def prove_durable(log, images, filled=0):
    """Shows that everything flushed is there and nothing never written; returns the loss count."""
    lost = []
    for disk, raw in images.items():
        flushes = [(sent, acked) for d, sent, acked in log.flushes
                   if d == disk and acked is not None]
        last = max((sent for sent, _ in flushes), default=0)
        table = log.by_block(disk)
        for block, found in _visible(raw, disk):
            history = table.get(block, [])
            floor = -1
            for i, (_, _, acked, fua, _) in enumerate(history):
                if acked is not None and (fua or acked < last):
                    floor = i
            allowed = [initial(block, filled)] if floor < 0 else []
            allowed += [w[0] for w in history[max(floor, 0):]]
            if found not in allowed:
                lost.append(f"disk {disk} block {block} holds {found}, allowed {allowed}")
    return lost
