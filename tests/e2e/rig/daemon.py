"""Starts a daemon (liveblkd or qemu-storage-daemon, same command line) and talks QMP with it.

The monitor is the official `qemu.qmp` client. Everything that was sent and received is recorded
in one list, so that two daemons can be compared (rig.transcript).
"""

import asyncio
import json
import os
import signal
import time

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient

START_SECONDS = 60
WAIT_SECONDS = 90


class Refused(Exception):
    """The daemon answered a command with an error."""

    def __init__(self, command, error_class, desc):
        super().__init__(f"{command}: {error_class}: {desc}")
        self.error_class = error_class
        self.desc = desc


class Kind:
    """A daemon under test: its program, and whether it is ours."""

    def __init__(self, path, ours):
        self.path = path
        self.ours = ours
        self.name = os.path.basename(path)


class Daemon:
    """One running daemon with one monitor."""

    def __init__(self, kind, folder, name="d"):
        self.kind = kind
        self.folder = folder
        self.name = name
        self.qmp_path = os.path.join(folder, name + ".qmp")
        self.nbd_path = os.path.join(folder, name + ".nbd")
        self.process = None
        self.client = None
        self.record = []
        self.changed = asyncio.Event()
        self.listener = None
        self.reader = None
        self.expected_end = False

    # -- life -----------------------------------------------------------------------------------
    async def start(self, *args, nbd=True, monitor=True):
        argv = [self.kind.path]
        if monitor:
            argv += ["--chardev",
                     f"socket,id=mon0,path={self.qmp_path},server=on,wait=off",
                     "--monitor", "chardev=mon0"]
        if nbd:
            argv += ["--nbd-server", f"addr.type=unix,addr.path={self.nbd_path}"]
        argv += args
        self.argv = argv
        self.err_path = os.path.join(self.folder, self.name + ".stderr")
        self.out_path = os.path.join(self.folder, self.name + ".stdout")
        with open(self.err_path, "wb") as err, open(self.out_path, "wb") as out:
            self.process = await asyncio.create_subprocess_exec(
                *argv, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=err,
                cwd=self.folder)
        if monitor:
            await self._connect()
        return self

    async def _connect(self):
        limit = time.monotonic() + START_SECONDS
        while True:
            if self.process.returncode is not None:
                raise AssertionError(f"{self.kind.name} ended at start: {self.stderr_tail()}")
            self.client = QMPClient(self.name)
            self.listener = EventListener()
            self.client.register_listener(self.listener)
            try:
                wait = START_SECONDS if self.kind.ours else START_SECONDS / 12
                await asyncio.wait_for(self.client.connect(self.qmp_path), wait)
                break
            except asyncio.TimeoutError:
                # The peer was seen to leave a client without an answer; ours must not.
                if self.kind.ours or time.monotonic() > limit:
                    raise AssertionError(f"{self.kind.name} gives its monitor no greeting: "
                                         f"{self.stderr_tail()}") from None
            except ConnectError:
                # Not listening yet, or busy with the start.
                if time.monotonic() > limit:
                    raise AssertionError(f"{self.kind.name} opened no monitor: "
                                         f"{self.stderr_tail()}") from None
                await asyncio.sleep(0.01)
        self.reader = asyncio.create_task(self._collect())

    async def _collect(self):
        async for event in self.listener:
            self.record.append(("event", event["event"], event.get("data", {})))
            self.changed.set()

    def stderr_tail(self):
        try:
            with open(self.err_path, encoding="utf-8", errors="replace") as text:
                return text.read()[-1500:]
        except OSError:
            return ""

    @property
    def pid(self):
        return self.process.pid

    def processor_seconds(self):
        """What all threads took so far, in user and kernel."""
        with open(f"/proc/{self.pid}/stat", encoding="ascii", errors="replace") as stat:
            ticks = stat.read().rpartition(")")[2].split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def alive(self):
        return self.process is not None and self.process.returncode is None

    async def kill9(self):
        self.expected_end = True
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()
        await self._drop_monitor()

    async def quit(self):
        """Ends the daemon by `quit`, keeps the events that came before the end; exit must be 0."""
        self.expected_end = True
        try:
            await self.cmd("quit")
        except Refused:
            raise
        except Exception:  # the connection may go before the answer is read
            pass
        code = await asyncio.wait_for(self.process.wait(), WAIT_SECONDS)
        await self._drop_monitor()
        if code != 0:
            raise AssertionError(f"{self.kind.name} ended with {code}: {self.stderr_tail()}")

    async def terminate(self, sig=signal.SIGTERM):
        self.expected_end = True
        self.process.send_signal(sig)
        code = await asyncio.wait_for(self.process.wait(), WAIT_SECONDS)
        await self._drop_monitor()
        return code

    async def _drop_monitor(self):
        if self.client is not None:
            try:
                await asyncio.wait_for(self.client.disconnect(), 5)
            except Exception:  # whatever ended the connection, it is gone
                pass
            await asyncio.sleep(0)
            while not self.listener.empty():
                event = await self.listener.get()
                self.record.append(("event", event["event"], event.get("data", {})))
            self.client = None
        if self.reader is not None:
            self.reader.cancel()
            self.reader = None

    async def close(self):
        """Cleans up whatever is left; says when the daemon had died by itself."""
        died = None
        if self.process is not None and self.process.returncode is not None:
            if not self.expected_end:
                died = (f"{self.kind.name} died with {self.process.returncode}: "
                        f"{self.stderr_tail()}")
        elif self.process is not None:
            self.expected_end = True
            self.process.kill()
            await self.process.wait()
        await self._drop_monitor()
        if died:
            raise AssertionError(died)

    # -- QMP ------------------------------------------------------------------------------------
    async def cmd(self, name, /, arguments=None, timeout=WAIT_SECONDS, recorded=True, **kw):
        """Executes one command; returns its value, raises Refused.

        `recorded=False` keeps it out of the record: for polls, whose number depends on timing.
        """
        arguments = dict(arguments or {}, **{k.replace("_", "-"): v for k, v in kw.items()})
        note = self.record.append if recorded else lambda row: None
        note(("sent", name, arguments))
        try:
            value = await asyncio.wait_for(
                self.client.execute(name, arguments or None), timeout)
        except ExecuteError as refused:
            kind, desc = refused.error_class, str(refused)
            note(("error", name, (kind, desc)))
            raise Refused(name, kind, desc) from None
        note(("reply", name, value))
        if arguments.get("speed") == 1 and "job-id" in arguments:
            await self._under_way(arguments["job-id"])
        return value

    async def _under_way(self, job):
        """Waits until a slow job knows its length: what is told of it depends on no race then.

        Not for long, because some have none.
        """
        limit = time.monotonic() + 2
        while time.monotonic() < limit:
            rows = await asyncio.wait_for(self.client.execute("query-jobs"), WAIT_SECONDS)
            row = next((row for row in rows if row["id"] == job), None)
            if row is None or row["total-progress"] > 0:
                return
            await asyncio.sleep(0.01)

    async def refused(self, name, /, arguments=None, **kw):
        """Executes a command that must fail; returns (class, desc)."""
        try:
            value = await self.cmd(name, arguments, **kw)
        except Refused as error:
            return error.error_class, error.desc
        raise AssertionError(f"{self.kind.name} accepted {name} {arguments or kw}: {value}")

    def events(self, name=None, since=0):
        return [r[2] for r in self.record[since:]
                if r[0] == "event" and (name is None or r[1] == name)]

    def mark(self):
        """A place in the record, for `wait_event(since=…)`."""
        return len(self.record)

    async def wait_event(self, name, timeout=WAIT_SECONDS, since=0, **fields):
        """Waits for an event whose data has `fields`; returns its data."""
        limit = time.monotonic() + timeout
        at = since
        while True:
            for row in self.record[at:]:
                at += 1
                if row[0] == "event" and row[1] == name and all(
                        row[2].get(k.replace("_", "-")) == v for k, v in fields.items()):
                    return row[2]
            left = limit - time.monotonic()
            if left <= 0:
                seen = [(r[1], r[2].get("status")) for r in self.record if r[0] == "event"]
                raise AssertionError(f"{self.kind.name}: no {name} {fields} in {timeout} s; "
                                     f"seen: {seen[-20:]}")
            if self.process.returncode is not None:
                raise AssertionError(f"{self.kind.name} died with {self.process.returncode} "
                                     f"while {name} was awaited: {self.stderr_tail()}")
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), min(left, 0.5))
            except asyncio.TimeoutError:
                pass

    async def job_gone(self, job="job0", since=0, timeout=WAIT_SECONDS):
        await self.wait_event("JOB_STATUS_CHANGE", id=job, status="null", since=since,
                              timeout=timeout)

    # -- what most tests need -------------------------------------------------------------------
    async def add_qcow2(self, node, filename, **extra):
        await self.cmd("blockdev-add", dict(
            {"driver": "qcow2", "node-name": node,
             "file": {"driver": "file", "filename": filename}}, **extra))

    async def export(self, node, name="disk", writable=True, export_id=None):
        await self.cmd("block-export-add", {
            "type": "nbd", "id": export_id or "exp-" + name, "node-name": node,
            "name": name, "writable": writable})
        return self.uri(name)

    def uri(self, name="disk"):
        return f"nbd+unix:///{name}?socket={self.nbd_path}"


class RawMonitor:
    """A monitor spoken byte by byte, for input that no client library would send."""

    def __init__(self, path):
        self.path = path

    async def __aenter__(self):
        self.reader, self.writer = await asyncio.open_unix_connection(self.path, limit=1 << 24)
        self.greeting = await self.line()
        return self

    async def __aexit__(self, *_):
        self.writer.close()

    async def line(self, timeout=WAIT_SECONDS):
        text = await asyncio.wait_for(self.reader.readline(), timeout)
        return json.loads(text)

    async def say(self, data, answers=1):
        """Sends bytes, returns the next answers that are not events."""
        self.writer.write(data if isinstance(data, bytes) else data.encode())
        await self.writer.drain()
        found = []
        while len(found) < answers:
            message = await self.line()
            if "event" not in message:
                found.append(message)
        return found[0] if answers == 1 else found
