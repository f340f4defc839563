"""Storage that fails: a full file system and a file that answers EIO on request."""

import asyncio
import os
import shutil
import subprocess

from rig.images import tool


def _need(program, package):
    if shutil.which(program) is None:
        raise AssertionError(f"{program} is missing (package {package}); tests/run installs it")


async def tmpfs(folder, size):
    """Mounts a small tmpfs; root is needed. Returns (folder, undo)."""
    os.mkdir(folder)
    code, _, err = await tool("mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder,
                              check=False)
    if code != 0:
        raise AssertionError(f"a full disk needs a tmpfs of its own, and mounting one needs root: "
                             f"{err.strip()} (run tests/run as root or in `unshare -Urm`)")

    async def undo():
        await tool("umount", "-l", folder, check=False)

    return folder, undo


class FailingFile:
    """A raw file served by nbdkit's error filter and mounted by nbdfuse.

    `file` is an ordinary path; after `fail()` every write to it gets EIO, after `heal()` none.
    """

    def __init__(self, folder, size):
        self.folder = folder
        self.size = size
        self.backing = os.path.join(folder, "backing.raw")
        self.trigger = os.path.join(folder, "fail-now")
        self.mount = os.path.join(folder, "m")
        self.file = os.path.join(self.mount, "nbd")
        self.processes = []

    async def start(self):
        _need("nbdkit", "nbdkit")
        _need("nbdfuse", "libnbd-bin")
        if not os.path.exists("/dev/fuse"):
            raise AssertionError("a file that answers EIO needs /dev/fuse (modprobe fuse)")
        os.makedirs(self.mount)
        with open(self.backing, "wb") as f:
            f.truncate(self.size)
        sock = os.path.join(self.folder, "s")
        log = open(os.path.join(self.folder, "log"), "wb")
        self.processes.append(subprocess.Popen(
            ["nbdkit", "-f", "-U", sock, "--filter=error", "file", self.backing,
             "error-pwrite=EIO", "error-pwrite-rate=100%", "error-zero=EIO",
             "error-zero-rate=100%", "error-trim=EIO", "error-trim-rate=100%",
             f"error-file={self.trigger}"], stdout=log, stderr=log))
        await self._until(lambda: os.path.exists(sock), "nbdkit's socket")
        self.processes.append(subprocess.Popen(["nbdfuse", self.mount, "--unix", sock],
                                               stdout=log, stderr=log))
        await self._until(lambda: os.path.exists(self.file), "nbdfuse's file")
        return self

    async def _until(self, condition, what):
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.01)
        with open(os.path.join(self.folder, "log"), encoding="utf-8", errors="replace") as log:
            raise AssertionError(f"{what} did not appear: {log.read()[-500:]}")

    def fail(self):
        with open(self.trigger, "wb"):
            pass

    def heal(self):
        os.unlink(self.trigger)

    async def stop(self):
        await tool("umount", "-l", self.mount, check=False)
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                await asyncio.to_thread(process.wait, 5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
