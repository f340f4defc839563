"""What the guest writes: every 4 KiB block names its disk, its write and its place.

A block is 128 copies of one 32-byte record (magic, disk, reserved, sequence number, block number),
so a torn or misplaced block is told from a whole one. Sequence 0 is the content the image was made
with; an all-zero block carries no sequence number.
"""

import struct

BLOCK = 4096
RECORD = struct.Struct("<8sIIQQ")
MAGIC = b"liveblk1"
COPIES = BLOCK // RECORD.size
ZERO = bytes(BLOCK)


def block_bytes(disk, seq, block):
    """The 4 KiB that write number `seq` puts at block number `block` of disk `disk`."""
    return RECORD.pack(MAGIC, disk, 0, seq, block) * COPIES


def run_bytes(disk, seq, block, count):
    """The bytes of one write of `count` blocks that starts at `block`."""
    return b"".join(block_bytes(disk, seq, block + i) for i in range(count))


def sequence_of(data, disk, block):
    """The write in `data`, None for zeroes; ValueError when torn, foreign or misplaced."""
    if data == ZERO:
        return None
    magic, found_disk, _, seq, found_block = RECORD.unpack_from(data)
    if magic != MAGIC:
        raise ValueError(f"block {block} of disk {disk} holds foreign bytes {data[:16].hex()}")
    if (found_disk, found_block) != (disk, block):
        raise ValueError(f"block {block} of disk {disk} holds block {found_block} of disk "
                         f"{found_disk} (write {seq})")
    if data != block_bytes(disk, seq, block):
        raise ValueError(f"block {block} of disk {disk} is torn (starts with write {seq})")
    return seq
