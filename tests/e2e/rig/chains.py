"""Chains a <- b <- c <- d for the tests of stream and commit, the same for both daemons.

A scenario is an async function that gets a `Chain` (daemon, nodes, files) and does something; it
runs on the daemon under test and on the peer, and what both said, the backing references of all
files and the content of each of them must be equal. Nothing else is normalised than in
`rig.transcript`.
"""

import hashlib
import json
import os

from rig import images, transcript
from rig.cases import CASES, Case

MIB = images.MIB
NAMES = "abcd"


class Chain:
    """The images of a world and the daemon that has them open."""

    def __init__(self, world, daemon, files):
        self.world = world
        self.daemon = daemon
        self.files = files

    async def cmd(self, name, **arguments):
        return await self.daemon.cmd(name, **arguments)

    async def refused(self, name, **arguments):
        return await self.daemon.refused(name, **arguments)

    async def job(self, name, job="j", **arguments):
        """Starts a job and waits until it is gone."""
        mark = self.daemon.mark()
        await self.daemon.cmd(name, job_id=job, **arguments)
        await self.daemon.job_gone(job, since=mark)

    async def nodes(self):
        """The nodes that the user named, without those of jobs: name, ro, backing file."""
        found = await self.daemon.cmd("query-named-block-nodes", flat=True, recorded=False)
        return [(n["node-name"], n["ro"], n.get("backing_file", "").replace(self.world.folder, ""))
                for n in found if n["drv"] in ("qcow2", "raw") and n["node-name"][0] != "#"]


async def filters_of(chain):
    """The filter nodes that queries show: name (of those with one), driver."""
    found = await chain.daemon.cmd("query-named-block-nodes", flat=True, recorded=False)
    return [(n["node-name"].strip("0123456789"), n["drv"]) for n in found
            if n["drv"] not in ("qcow2", "raw", "file")]


async def make(world, sizes=(8, 8, 8, 8), base="qcow2", implicit=False, top="d", small=None,
               **extra):
    """Makes the files and opens them: one node per layer, or only the top by name.

    `small` names a layer whose file lies in a file system that has too little space for a job.
    """
    files = {}
    cramped = await world.tmpfs("4M") if small else None
    below = None
    for index, name in enumerate(NAMES[:NAMES.index(top) + 1]):
        raw = index == 0 and base == "raw"
        file = name + (".raw" if raw else ".qcow2")
        path = os.path.join(cramped, file) if name == small else world.path(file)
        fmt = "raw" if raw else "qcow2"
        argv = ["qemu-img", "create", "-q", "-f", fmt]
        if below:
            argv += ["-b", below[0], "-F", below[1]]
        await images.tool(*argv, path, f"{sizes[index]}M")
        size = sizes[index] * MIB
        writes = [f"write -P {17 * (index + 1)} {index * MIB} {2 * MIB}"]
        if index:
            # a zero cluster over data, data that is zero, and a part of a cluster
            writes += [f"write -z {index * MIB + 65536 * 4} 131072",
                       f"write -P 0 {index * MIB + 65536 * 8} 65536",
                       f"write -P {100 + index} {size - MIB + 135168 * index} 3000"]
        for write in writes:
            at = int(write.split()[-2])
            if at + int(write.split()[-1]) <= size:
                await images.tool("qemu-io", "-f", fmt, "-c", write, path)
        files[name] = (path, fmt)
        below = (path, fmt)
    shown = await digest(world, files[top][0], "qcow2")
    daemon = await world.daemon()
    chain = Chain(world, daemon, files)
    # what a guest of the top sees
    chain.shown = shown
    if implicit:
        await daemon.add_qcow2(top, files[top][0], **extra)
        return chain
    below = None
    for name, (path, fmt) in files.items():
        options = {"driver": fmt, "node-name": name, "discard": "unmap",
                   "file": {"driver": "file", "filename": path}}
        if fmt == "qcow2":
            options["backing"] = below
        if name != top:
            options.update(extra)
        await daemon.cmd("blockdev-add", options)
        below = name
    return chain


async def digest(world, path, fmt):
    """The content of an image, whose own folder may be full."""
    raw = await images.dump(path, world.path("one.digest"), fmt)
    with open(raw, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    os.unlink(raw)
    return found


async def state_of(chain, leaks=False):
    """After the end of the daemon: backing reference and content of every file."""
    found = {}
    for name, (path, fmt) in chain.files.items():
        _, out, _ = await images.tool("qemu-img", "info", "-f", fmt, "--output=json", path)
        info = json.loads(out)
        reference = info.get("backing-filename", "").replace(chain.world.folder, "")
        opens = not reference or os.path.exists(info.get("full-backing-filename", ""))
        content = await digest(chain.world, path, fmt) if opens else "does not open"
        found[name] = (reference, info.get("backing-filename-format"), info["virtual-size"],
                       content)
        if fmt == "qcow2" and opens:
            await images.check(path, leaks_allowed=leaks or not chain.daemon.kind.ours)
    return found


async def run(world, kind, name, scenario, options):
    inner = world.sub(name, kind)
    chain = await make(inner, **options)
    told = await scenario(chain)
    await chain.daemon.quit()
    return chain, told, await state_of(chain)


def pair(scenario, name=None, numbers=True, content="abcd", **options):
    """Registers `scenario` as a test of both daemons; `content` names the files to compare."""
    async def test(world):
        ours, told, files = await run(world, world.kind, "ours", scenario, options)
        peer, peers_told, peers = await run(world, world.peer, "peer", scenario, options)
        for what in (transcript.replies, transcript.events):
            transcript.require_same(
                what(ours.daemon.record, ours.world.folder, numbers),
                what(peer.daemon.record, peer.world.folder, numbers), what.__name__)
        assert told == peers_told, f"ours {told}, the peer {peers_told}"
        for file, state in files.items():
            wanted = peers[file] if file in content else peers[file][:3]
            assert state[:len(wanted)] == wanted, f"{file}: ours {state}, the peer {wanted}"
    test.__name__ = name or scenario.__name__
    test.__module__ = scenario.__module__
    CASES.append(Case(test, "pair", 120))
    return scenario
