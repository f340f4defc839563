"""Scenarios: scripts without chance in them, whose replies, events and images are recorded.

A scenario runs on any daemon. What it leaves is one JSON value (`outcome`): the replies and errors
in order, the events in order, and of each image its backing string, its format and a digest of
what a guest reads. `golden/` holds the outcomes of qemu-storage-daemon, recorded by
`run_e2e.py --record`; `test_golden.py` compares. The normalisation is rig.transcript's.
"""

import json
import os

from rig import images, transcript
from rig.daemon import Refused

MIB = images.MIB
SIZE = 8 * MIB
CLUSTER = 65536
GOLDEN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "golden")
SCENARIOS = {}

# One byte of speed: a job starts its first piece and is then still running at any later command.
SLOW = 1


def scenario(function):
    """Registers a scenario under `group/name`."""
    group = function.__module__.rsplit(".", maxsplit=1)[-1]
    SCENARIOS[f"{group}/{function.__name__.replace('_', '-')}"] = function
    return function


class Run:
    """What a scenario works with: one daemon, images, and commands that may be refused."""

    def __init__(self, world):
        self.world = world
        self.d = None
        self.files = []
        self.numbers = True
        self.partial = set()  # images that a cancelled job left half written
        self.started = set()  # ids of jobs that were started and whose end nobody waited for
        self.refused = set()  # ids of jobs that were not started when they were to be

    def path(self, name):
        return self.world.path(name)

    async def start(self, *args):
        self.d = await self.world.daemon(*args)

    # -- images -----------------------------------------------------------------------------------
    async def image(self, name, writes=(), backing=None, size=SIZE, fmt="qcow2", options=None):
        """Creates NAME.FMT; each write is (pattern, offset, length), pattern 0 writes zeroes."""
        path = self.path(f"{name}.{fmt}")
        base = self.path(f"{backing}.qcow2") if backing else None
        await images.create(path, size, backing=base, fmt=fmt, options=options)
        await self.fill(path, writes, fmt)
        self.files.append((f"{name}.{fmt}", fmt))
        return path

    def empty(self, name):
        """A file that its user made ahead, with nothing in it."""
        with open(self.path(name), "xb"):
            pass

    async def fill(self, path, writes, fmt="qcow2"):
        argv = []
        for pattern, offset, length in writes:
            argv += ["-c", f"write -{'z' if pattern == 0 else f'P {pattern}'} {offset} {length}"]
        if argv:
            await images.tool("qemu-io", "-f", fmt, *argv, path)

    async def chain(self, names="abc", opened=True, size=SIZE):
        """Images a <- b <- c …, each with data of its own; nodes of the same names."""
        below = None
        for at, name in enumerate(names):
            writes = [(0x11 * (at + 1), at * MIB, MIB),
                      (0x10 + at, 6 * MIB + at * CLUSTER, CLUSTER)]
            if at:
                writes.append((0, (at - 1) * MIB, 2 * CLUSTER))
            await self.image(name, writes, backing=below, size=size)
            below = name
        below = None
        for name in names if opened else "":
            await self.open(name, backing=below)
            below = name

    async def open(self, name, backing=None, fmt="qcow2", node=None, **extra):
        """Adds the node NAME (file NAME.FMT); `backing` is a node, None means none."""
        options = {"driver": fmt, "node-name": node or name,
                   "file": {"driver": "file", "filename": self.path(f"{name}.{fmt}")}}
        if fmt == "qcow2":
            options["backing"] = backing
        options.update({k.replace("_", "-"): v for k, v in extra.items()})
        return await self.cmd("blockdev-add", options)

    # -- commands ---------------------------------------------------------------------------------
    async def cmd(self, command, arguments=None, /, recorded=True, **kw):
        """Executes a command; the record keeps the answer, also when it is refused."""
        arguments = dict(arguments or {}, **{k.replace("_", "-"): v for k, v in kw.items()})
        job = arguments.get("job-id")
        try:
            value = await self.d.cmd(command, arguments, recorded=recorded)
        except Refused:
            if job not in self.started:
                self.refused.add(job)
            return None
        if job is not None:
            self.started.add(job)
            self.refused.discard(job)
        return value

    async def export(self, node):
        await self.d.export(node, name=node)

    async def write(self, node, *writes):
        """Writes through an NBD export of the node, which must exist."""
        await self.fill(self.d.uri(node), writes, fmt="raw")

    async def job(self, command, /, job="j", **kw):
        """Starts a job with the id `j`."""
        return await self.cmd(command, job_id=job, **kw)

    async def event(self, name, since=0, **fields):
        return await self.d.wait_event(name, since=since, **fields)

    async def gone(self, job="j", since=0):
        """Waits for the last event of a job, if it was started at all."""
        if job not in self.refused:
            await self.d.job_gone(job, since=since)
            self.started.discard(job)

    async def status(self, status, job="j", since=0):
        await self.d.wait_event("JOB_STATUS_CHANGE", id=job, status=status, since=since)

    async def graph(self):
        """The monitor's nodes, their files and backing files, as part of the replies."""
        nodes = await self.d.cmd("query-named-block-nodes", {"flat": True}, recorded=False)
        rows = sorted([n["node-name"], n["drv"], n["ro"], file_of(n["file"]),
                       file_of(n.get("backing_file", ""))]
                      for n in nodes if not n["node-name"].startswith("#") and n["drv"] != "file")
        self.d.record.append(("reply", "graph", rows))

    async def jobs(self):
        await self.cmd("query-jobs")
        await self.cmd("query-block-jobs")

    # -- the end ----------------------------------------------------------------------------------
    async def end(self):
        await self.d.quit()

    async def looks(self):
        """Each image: format, backing string and format, digest of the guest's view, check."""
        found = {}
        for name in sorted(os.listdir(self.world.folder)):
            fmt = name.rsplit(".", maxsplit=1)[-1]
            if fmt not in ("qcow2", "raw"):
                continue
            path = self.path(name)
            _, out, _ = await images.tool("qemu-img", "info", "-f", fmt, "--output=json", path)
            info = json.loads(out)
            look = {"size": info["virtual-size"], "digest": await self.digest(path, fmt)}
            if name in self.partial:
                look["digest"] = "of a part"
            if "backing-filename" in info:
                look["backing"] = os.path.basename(info["backing-filename"])
                look["backing-format"] = info.get("backing-filename-format")
            data = info.get("format-specific", {}).get("data", {})
            if data.get("bitmaps"):
                look["bitmaps"] = sorted(
                    [b["name"], b["granularity"], sorted(b["flags"])] for b in data["bitmaps"])
            if info.get("snapshots"):
                look["snapshots"] = [s["name"] for s in info["snapshots"]]
            if fmt == "qcow2" and not look["digest"].startswith("unreadable"):
                await images.check(path)
            found[name] = look
        return found

    async def digest(self, path, fmt):
        try:
            return (await images.digest(path, fmt))[:16]
        except images.ToolFailed as failed:
            last = failed.err.strip().splitlines()[-1]
            return "unreadable: " + last.replace(self.world.folder, "FOLDER")


def file_of(name):
    """The image's file; the peer shows a node with a backing node of its own as JSON."""
    if name.startswith("json:"):
        name = json.loads(name[5:])["file"]["filename"]
    return os.path.basename(name)


async def outcome(function, world):
    """Runs a scenario and returns what it left, comparable."""
    run = Run(world)
    await function(run)
    record = list(run.d.record)
    if run.d.alive():
        await run.end()
        record = list(run.d.record)
    folder = world.folder
    return {"replies": [json.loads(line)[1:] for line in
                        transcript.replies(record, folder, run.numbers)],
            "events": [json.loads(line) for line in
                       transcript.events(record, folder, run.numbers)],
            "images": await run.looks()}


def golden_path(group):
    return os.path.join(GOLDEN, group + ".json")


def golden(group):
    """The recorded outcomes of one group, by scenario."""
    with open(golden_path(group), encoding="utf-8") as text:
        return json.load(text)


def lines(value):
    """An outcome as lines, for a readable difference."""
    return ([json.dumps(row, sort_keys=True) for row in value["replies"]]
            + ["events:"] + [json.dumps(row, sort_keys=True) for row in value["events"]]
            + ["images:"] + [json.dumps([name, look], sort_keys=True)
                             for name, look in sorted(value["images"].items())])
