"""What a test is and how it is run.

A test is an async function with a `World`. `both` runs it against the daemon under test and
against the peer, each must pass; `pair` gives it both at once, to compare; `ours` runs only
against liveblkd, because it promises something the peer does not do; `rig` tests the rig itself.
"""

import asyncio
import os
import shutil
import tempfile
import time
import traceback

from rig import faults
from rig.daemon import Daemon
from rig.guest import Guest

CASES = []

# A busy machine was seen to take ten times as long. These times only end what hangs; where a test
# promises one, it counts the daemon's processor time or asks `slowness` how fast the machine is.
UNDER_LOAD = 4


def slowness():
    """How many times longer than its processor time a piece of work takes here and now, >= 1."""
    wall, spent = time.monotonic(), time.thread_time()
    while time.thread_time() - spent < 0.05:
        pass
    return max(1.0, (time.monotonic() - wall) / 0.05)


class NotPossibleHere(AssertionError):
    """The machine lacks something a test needs; it counts as a failure and says what is missing."""


class Case:
    def __init__(self, function, on, timeout, beside=False):
        self.function = function
        self.on = on
        self.timeout = timeout * UNDER_LOAD
        self.beside = beside  # may run while others do: it looks at no clock
        self.module = function.__module__.replace("test_", "")
        self.name = function.__name__


def case(on="both", timeout=60):
    def mark(function):
        CASES.append(Case(function, on, timeout))
        return function
    return mark


class World:
    """What one run of one test owns: a folder, daemons, guests, mounts; all undone at the end."""

    def __init__(self, kind, peer, folder, options):
        self.kind = kind
        self.peer = peer
        self.folder = folder
        self.options = options
        self.daemons = []
        self.guests = []
        self.undo = []
        self.notes = []

    @property
    def rounds(self):
        """How often a kill -9 test kills; the peer only shows that the test is fair."""
        return self.options.rounds if self.kind.ours else max(2, self.options.rounds // 4)

    def path(self, *parts):
        return os.path.join(self.folder, *parts)

    def sub(self, name, kind):
        """A world of its own below this one, for the other daemon."""
        folder = self.path(name)
        os.mkdir(folder)
        world = World(kind, self.peer, folder, self.options)
        self.undo.append(world.close)
        return world

    async def daemon(self, *args, name=None, kind=None, **kw):
        daemon = Daemon(kind or self.kind, self.folder, name or f"d{len(self.daemons)}")
        self.daemons.append(daemon)
        return await daemon.start(*args, **kw)

    async def guest(self, *uris, **kw):
        for last in (self.kind.ours, True):
            guest = Guest(self.folder, list(uris), name=f"guest{len(self.guests)}", **kw)
            self.guests.append(guest)
            try:
                return await guest.start(90 if last else 10)
            except asyncio.TimeoutError:
                # The peer was seen to leave a client without an answer; ours must not.
                if last:
                    raise AssertionError("the guest got no answer to its connection") from None
                self.note(f"{self.kind.name} left a connection unanswered")

    def liveblk(self):
        """The program `liveblk`: named on the command line, or built beside the daemon."""
        path = self.options.liveblk or os.path.join(os.path.dirname(self.kind.path), "liveblk")
        if not os.access(path, os.X_OK):
            raise AssertionError(f"{path} is missing: build it, or name it with --liveblk")
        return os.path.abspath(path)

    async def tmpfs(self, size):
        folder, undo = await faults.tmpfs(self.path(f"tmpfs{len(self.undo)}"), size)
        self.undo.append(undo)
        return folder

    async def failing_file(self, size):
        disk = await faults.FailingFile(self.path(f"fuse{len(self.undo)}"), size).start()
        self.undo.append(disk.stop)
        return disk

    def note(self, text):
        self.notes.append(text)

    async def close(self):
        problems = []
        for guest in self.guests:
            await guest.end()
        for daemon in self.daemons:
            try:
                await daemon.close()
            except AssertionError as problem:
                problems.append(str(problem))
        for undo in reversed(self.undo):
            try:
                await undo()
            except AssertionError as problem:
                problems.append(str(problem))
        if problems:
            raise AssertionError("; ".join(problems))


async def run_one(item, kind, peer, options):
    """Runs one case once; returns (error text or None, seconds, notes)."""
    folder = tempfile.mkdtemp(prefix="lb-", dir=options.tmp)
    world = World(kind, peer, folder, options)
    began = time.monotonic()
    error = None
    test = asyncio.ensure_future(item.function(world))
    # not wait_for: a wait inside the test that takes too long is another failure than its own
    ended, _ = await asyncio.wait({test}, timeout=item.timeout)
    if not ended:
        test.cancel()
        await asyncio.wait({test}, timeout=60)
        error = f"did not end in {item.timeout} s"
    elif test.cancelled() or test.exception():  # a test reports whatever it met
        problem = asyncio.CancelledError() if test.cancelled() else test.exception()
        last = traceback.format_exception(type(problem), problem, problem.__traceback__)
        error = "".join(last) if options.verbose else "".join(last[-2:])
    try:
        await asyncio.wait_for(world.close(), 60)
    except (Exception, asyncio.CancelledError) as problem:
        error = (error or "") + f"\nat the end: {problem}"
    if error and options.keep:
        error += f"\nfiles kept in {folder}"
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return error, time.monotonic() - began, world.notes
