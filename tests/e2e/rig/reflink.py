"""A file system whose files can share blocks: XFS in a file, and what the kernel says of it."""

import array
import ctypes
import fcntl
import os
import shutil
import struct

from rig.images import tool

FIEMAP = 0xC020660B
SYNC, LAST, SHARED = 1, 1, 0x2000
GOING_DOWN, WITHOUT_LOG = 0x8004587D, 2
BLOCK = 4096


async def mount(path, size=512 << 20):
    """XFS on a loop device at `path`: (how to undo it, None), or (None, why that cannot be)."""
    if shutil.which("mkfs.xfs") is None:
        return None, "mkfs.xfs is missing (package xfsprogs)"
    os.mkdir(path)
    with open(path + ".img", "wb") as file:
        file.truncate(size)
    await tool("mkfs.xfs", "-q", "-m", "reflink=1", path + ".img")
    code, _, err = await tool("mount", "-o", "loop", path + ".img", path, check=False)
    if code != 0:
        return None, f"this machine mounts no file: {err.strip()}"

    async def undo():
        await tool("umount", "-l", path, check=False)

    return undo, None


async def power_cut(path):
    """The file system loses what is not durable, and is there again."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(folder, GOING_DOWN, struct.pack("=I", WITHOUT_LOG))
    finally:
        os.close(folder)
    await tool("umount", path)
    await tool("mount", "-o", "loop", path + ".img", path)


def extents(path):
    """[(place on the disk, bytes, whether another file has them too)] of a file, flushed."""
    found, at = [], 0
    with open(path, "rb") as file:
        while True:
            count = 256
            room = array.array("B", bytes(32 + 56 * count))
            struct.pack_into("=QQIIII", room, 0, at, ctypes.c_uint64(-1).value, SYNC, 0, count, 0)
            fcntl.ioctl(file, FIEMAP, room, True)
            mapped = struct.unpack_from("=I", room, 20)[0]
            for index in range(mapped):
                first, place, size = struct.unpack_from("=QQQ", room, 32 + 56 * index)
                flags = struct.unpack_from("=I", room, 32 + 56 * index + 40)[0]
                found.append((place, size, bool(flags & SHARED)))
                at = first + size
                if flags & LAST:
                    return found
            if not mapped:
                return found


def shared_bytes(path):
    """Bytes of a file that another file has, too."""
    return sum(size for _, size, shared in extents(path) if shared)


def blocks(path):
    """Where the blocks of a file lie on the disk.

    A block that another file takes over stays there, whatever is written to this one later.
    """
    return {block for place, size, _ in extents(path)
            for block in range(place // BLOCK, (place + size) // BLOCK)}
