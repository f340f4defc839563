"""The guest: a process of its own that writes and verifies disks through NBD.

It is started by rig.guest and speaks JSON lines on stdin/stdout. It knows for every block what it
must read back; a wrong read is reported with place and expectation and is never forgotten.
Commands: run (random or alternating writes), stop, wait, state, flush, verify, dump, exit.
For a given seed the sequence of writes is the same whatever the timing: a write that would overlap
one in flight waits for it instead of choosing another place.
"""

import errno
import json
import os
import random
import select
import sys
import time

import nbd

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from rig.pattern import BLOCK, ZERO, block_bytes, run_bytes, sequence_of  # noqa: E402

POLL_MS = 20


class Disk:
    """One connection to one export, with the model of what the disk must hold."""

    def __init__(self, index, uri):
        self.index = index
        self.h = nbd.NBD()
        self.h.connect_uri(uri)
        self.blocks = self.h.get_size() // BLOCK
        # block -> sequence number, None for zeroes; absent = not yet known, read before use
        self.model = {}
        self.busy = {}
        self.in_flight = 0


class Guest:
    """Issues writes, keeps the log, answers the controller."""

    def __init__(self, uris, seed, filled):
        self.disks = [Disk(i, uri) for i, uri in enumerate(uris)]
        for disk in self.disks:
            for block in range(disk.blocks):
                disk.model[block] = 0 if block < filled else None
        self.choice = random.Random(seed)
        self.checks = random.Random(seed + 1)
        self.seq = 0
        self.writes = []
        self.flushes = []
        self.failures = []
        self.errors = []
        self.plan = None
        self.pending = None
        self.next_due = 0
        self.verified = 0
        self.longest = 0
        self.waiting = None
        self.lost = None
        self.alternating = False
        self.own = None

    # -- the controller -------------------------------------------------------------------------
    def answer(self, **values):
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()

    def obey(self, line):
        command = json.loads(line)
        op = command.pop("op")
        if op == "run":
            self.plan = dict({"count": None, "rate": 1500, "depth": 8, "zeroes": 0.04,
                              "fua": 0.02, "flush_every": 64, "region": None, "max_run": 8,
                              "shared": False, "check": True}, **command)
            # where others write too, only the own region can be known
            self.own = self.plan["region"] if self.plan["shared"] else None
            self.plan["start"] = self.seq
            self.alternating = command.get("alternate", False)
            self.next_due = time.monotonic()
            self.answer(ok=True)
        elif op == "stop":
            self.plan = None
            self.pending = None
            self.waiting = "idle"
        elif op == "wait":
            self.waiting = "idle"
        elif op == "state":
            self.answer(**self.state())
        elif op == "flush":
            self.plan = None
            self.waiting = "flush"
        elif op == "verify":
            self.plan = None
            self.waiting = "verify"
        elif op == "dump":
            with open(command["path"], "w", encoding="utf-8") as out:
                json.dump({"writes": self.writes, "flushes": self.flushes,
                           "failures": self.failures, "errors": self.errors}, out)
            self.answer(**self.state())
        elif op == "exit":
            self.answer(ok=True)
            os._exit(0)

    def state(self):
        return {"seq": self.seq, "acked": sum(1 for w in self.writes if w[5] is not None),
                "failures": self.failures[:5], "errors": self.errors[:5],
                "error_count": len(self.errors), "verified": self.verified,
                "longest_ms": self.longest / 1e6, "lost": self.lost}

    # -- the work -------------------------------------------------------------------------------
    def active(self):
        plan = self.plan
        return plan is not None and (
            plan["count"] is None or self.seq - plan["start"] < plan["count"])

    def draw(self):
        """Chooses the next write; the choice depends on the seed only."""
        plan = self.plan
        if self.alternating:
            disk = self.disks[self.seq % len(self.disks)]
            return disk, 0, 1, "write", False
        disk = self.disks[self.choice.randrange(len(self.disks))]
        low, high = plan["region"] or (0, disk.blocks)
        block = self.choice.randrange(low, high)
        count = min(self.choice.randint(1, plan["max_run"]), high - block)
        kind = "zero" if self.choice.random() < plan["zeroes"] else "write"
        fua = self.choice.random() < plan["fua"]
        return disk, block, count, kind, fua

    def submit(self):
        """Issues at most one write; False when it has to wait."""
        if self.pending is None:
            self.pending = self.draw()
        disk, block, count, kind, fua = self.pending
        if any(b in disk.busy for b in range(block, block + count)):
            return False
        self.pending = None
        self.seq += 1
        seq = self.seq
        # seq, disk, block, count, submitted, acknowledged, error, kind, fua
        row = [seq, disk.index, block, count, time.monotonic_ns(), None, None, kind, fua]
        self.writes.append(row)
        for b in range(block, block + count):
            disk.busy[b] = seq
        disk.in_flight += 1
        held = []

        def done(error):
            now = time.monotonic_ns()
            held.clear()
            disk.in_flight -= 1
            for b in range(block, block + count):
                del disk.busy[b]
            code = getattr(error, "value", error)
            if code:
                row[6] = errno.errorcode.get(code, str(code))
                self.errors.append([seq, disk.index, block, row[6]])
                for b in range(block, block + count):
                    disk.model.pop(b, None)
            else:
                row[5] = now
                self.longest = max(self.longest, now - row[4])
                for b in range(block, block + count):
                    disk.model[b] = None if kind == "zero" else seq
            return 1

        flags = nbd.CMD_FLAG_FUA if fua else 0
        if kind == "zero":
            disk.h.aio_zero(count * BLOCK, block * BLOCK, done, flags)
        else:
            data = nbd.Buffer.from_bytearray(
                bytearray(run_bytes(disk.index, seq, block, count)))
            held.append(data)
            disk.h.aio_pwrite(data, block * BLOCK, done, flags)
        every = self.plan["flush_every"]
        if every and seq % every == 0:
            self.flush(disk)
        if seq % 4 == 0 and self.plan["check"] and not self.alternating:
            self.check_one(disk)
        return True

    def flush(self, disk):
        row = [disk.index, time.monotonic_ns(), None]
        self.flushes.append(row)
        disk.in_flight += 1

        def done(error):
            disk.in_flight -= 1
            code = getattr(error, "value", error)
            if code:
                self.errors.append([0, disk.index, -1, "flush " + errno.errorcode.get(
                    code, str(code))])
            else:
                row[2] = time.monotonic_ns()
            return 1

        disk.h.aio_flush(done)

    def check_one(self, disk):
        """Reads a random quiet block and compares it with the model when it arrives."""
        low, high = self.own or (0, disk.blocks)
        block = self.checks.randrange(low, high)
        if block in disk.busy or block not in disk.model:
            return
        if self.writes and self.checks.random() < 0.7:
            recent = self.writes[-self.checks.randint(1, min(200, len(self.writes)))]
            if recent[1] == disk.index and recent[2] not in disk.busy and recent[2] in disk.model:
                block = recent[2]
        expected = disk.model[block]
        disk.busy[block] = -1
        disk.in_flight += 1
        data = nbd.Buffer(BLOCK)

        def done(error):
            disk.in_flight -= 1
            del disk.busy[block]
            code = getattr(error, "value", error)
            if code:
                self.errors.append([0, disk.index, block, "read " + errno.errorcode.get(
                    code, str(code))])
                return 1
            self.compare(disk, block, expected, bytes(data.to_bytearray()))
            return 1

        disk.h.aio_pread(data, block * BLOCK, done)

    def compare(self, disk, block, expected, data):
        self.verified += 1
        wanted = ZERO if expected is None else block_bytes(disk.index, expected, block)
        if data == wanted:
            return
        try:
            found = sequence_of(data, disk.index, block)
        except ValueError as problem:
            found = str(problem)
        self.failures.append(f"disk {disk.index} block {block}: read {found}, "
                             f"must be write {expected}")

    def verify_all(self):
        """Reads everything and compares it with the model."""
        for disk in self.disks:
            step = 256
            for first in range(0, disk.blocks, step):
                count = min(step, disk.blocks - first)
                data = disk.h.pread(count * BLOCK, first * BLOCK)
                low, high = self.own or (0, disk.blocks)
                for i in range(count):
                    if first + i in disk.model and low <= first + i < high:
                        self.compare(disk, first + i, disk.model[first + i],
                                     data[i * BLOCK:(i + 1) * BLOCK])

    def turn(self):
        now = time.monotonic()
        depth = 1 if self.alternating else (self.plan or {}).get("depth", 0)
        while self.active() and now >= self.next_due:
            if sum(d.in_flight for d in self.disks) >= depth or not self.submit():
                break
            self.next_due = max(self.next_due + 1.0 / self.plan["rate"], now - 0.1)
        idle = not self.active() and all(d.in_flight == 0 for d in self.disks)
        if self.waiting and idle:
            # stays set until it is answered: a read that fails is answered, too
            waiting = self.waiting
            if waiting == "verify":
                self.verify_all()
            elif waiting == "flush":
                for disk in self.disks:
                    row = [disk.index, time.monotonic_ns(), None]
                    disk.h.flush()
                    row[2] = time.monotonic_ns()
                    self.flushes.append(row)
            self.waiting = None
            self.answer(**self.state())

    def wait_for_something(self):
        poll = select.poll()
        poll.register(0, select.POLLIN)
        for disk in self.disks:
            direction = disk.h.aio_get_direction()
            mask = 0
            if direction & nbd.AIO_DIRECTION_READ:
                mask |= select.POLLIN
            if direction & nbd.AIO_DIRECTION_WRITE:
                mask |= select.POLLOUT
            if mask:
                poll.register(disk.h.aio_get_fd(), mask)
        delay = POLL_MS
        if self.active():
            delay = max(0, min(POLL_MS, (self.next_due - time.monotonic()) * 1000))
        ready = dict(poll.poll(delay))
        for disk in self.disks:
            state = ready.get(disk.h.aio_get_fd(), 0)
            if state & (select.POLLIN | select.POLLHUP | select.POLLERR):
                disk.h.aio_notify_read()
            elif state & select.POLLOUT:
                disk.h.aio_notify_write()
        return 0 in ready

    def loop(self):
        buffer = b""
        while True:
            if self.lost is None:
                try:
                    self.turn()
                    readable = self.wait_for_something()
                except nbd.Error as problem:
                    self.lost = str(problem)
                    self.plan = None
                    if self.waiting:
                        self.waiting = None
                        self.answer(**self.state())
                    continue
            else:
                readable = bool(select.select([0], [], [], 1)[0])
            if not readable:
                continue
            chunk = os.read(0, 65536)
            if not chunk:
                os._exit(0)
            buffer += chunk
            while b"\n" in buffer:
                line, buffer = buffer.split(b"\n", 1)
                op = json.loads(line)["op"]
                if self.lost is not None and op not in ("dump", "state", "exit"):
                    self.answer(**self.state())
                else:
                    self.obey(line)


def main():
    spec = json.loads(sys.argv[1])
    guest = Guest(spec["uris"], spec["seed"], spec["filled"])
    guest.answer(ready=True, blocks=[d.blocks for d in guest.disks])
    guest.loop()


if __name__ == "__main__":
    main()
