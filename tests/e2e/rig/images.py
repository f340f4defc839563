"""Images on disk, made and judged with the peer's own tools."""

import asyncio
import hashlib
import os
import shutil

from rig.pattern import BLOCK, run_bytes

MIB = 1 << 20
_templates = {}


class ToolFailed(AssertionError):
    """A tool ended with an unexpected status."""

    def __init__(self, argv, code, out, err):
        super().__init__(f"{' '.join(argv)} ended with {code}: {out}{err}")
        self.code, self.out, self.err = code, out, err


async def tool(*argv, check=True, timeout=300, stdin=None):
    """Runs a program; returns (status, stdout, stderr)."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    try:
        out, err = await asyncio.wait_for(
            process.communicate(stdin.encode() if stdin is not None else None), timeout)
    except asyncio.TimeoutError:
        process.kill()
        await process.wait()
        raise AssertionError(f"{' '.join(argv)} did not end in {timeout} s") from None
    out, err = out.decode(errors="replace"), err.decode(errors="replace")
    if check and process.returncode != 0:
        raise ToolFailed(argv, process.returncode, out, err)
    return process.returncode, out, err


async def create(path, size, backing=None, fmt="qcow2", options=None):
    argv = ["qemu-img", "create", "-q", "-f", fmt]
    if backing:
        argv += ["-b", backing, "-F", "qcow2"]
    if options:
        argv += ["-o", options]
    await tool(*argv, path, str(size))
    return path


async def filled(path, size, blocks, disk=0, fmt="qcow2"):
    """An image whose first `blocks` blocks hold write number 0; the rest is unallocated."""
    key = (size, blocks, disk, fmt)
    if key not in _templates:
        template = os.path.join(_templates["folder"], "t%d-%d-%d.%s" % key)
        raw = template + ".raw"
        with open(raw, "wb") as out:
            out.write(run_bytes(disk, 0, 0, blocks))
            out.truncate(size)
        await tool("qemu-img", "convert", "-f", "raw", "-O", fmt, raw, template)
        os.unlink(raw)
        _templates[key] = template
    shutil.copyfile(_templates[key], path)
    return path


def use_template_folder(folder):
    _templates.clear()
    _templates["folder"] = folder


async def dump(path, raw, fmt="qcow2"):
    """The guest's view of an image as a raw file."""
    await tool("qemu-img", "convert", "-f", fmt, "-O", "raw", path, raw)
    return raw


async def digest(path, fmt="qcow2"):
    raw = path + ".digest"
    await dump(path, raw, fmt)
    h = hashlib.sha256()
    with open(raw, "rb") as f:
        while chunk := f.read(MIB):
            h.update(chunk)
    os.unlink(raw)
    return h.hexdigest()


async def identical(one, other, fmt_one="qcow2", fmt_other="qcow2"):
    """`qemu-img compare` says so; returns its text."""
    _, out, _ = await tool("qemu-img", "compare", "-f", fmt_one, "-F", fmt_other, one, other)
    assert "Images are identical." in out, out
    return out


async def check(path, leaks_allowed=False):
    """`qemu-img check`: no corruption; leaks only where a crash came before."""
    code, out, err = await tool("qemu-img", "check", path, check=False)
    allowed = (0, 3) if leaks_allowed else (0,)
    if code not in allowed:
        raise AssertionError(f"qemu-img check {os.path.basename(path)} ended with {code}: "
                             f"{out}{err}")
    return out


def blocks(size):
    return size // BLOCK
