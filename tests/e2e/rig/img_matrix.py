"""What the two-way matrix of images is made of: parameters, a model of the disk, operations.

One world is one image with its backing file and data file, chosen by a seed. In each round either
qemu-io/qemu-img or `liveblk img` changes it, at random; then both must find it clean, read the same
bytes as the model, and tell the same map, information and check.
"""

import asyncio
import json
import os
import random

from rig.images import ToolFailed, tool

KIB, MIB = 1 << 10, 1 << 20

# What ours refuses to do with an image although the peer does it, and why. Each is checked: the
# refusal must come as an error that names it. (condition on the parameters, operation, reason)
REFUSED = []

# Where the two tell different things about one image, and why.
DIFFERENCES = [
    ("map: offset of what is not present",
     "inside an allocated cluster with subclusters the peer tells where a subcluster would lie "
     "that no layer has; ours tells places of bytes only"),
    ("info: actual-size",
     "blocks of the file at the moment of the question; the file system may still allocate"),
]


class Params:
    """One point of the matrix."""

    def __init__(self, seed):
        rng = random.Random(f"params {seed}")
        self.seed = seed
        self.version = rng.choice([2, 3, 3, 3])
        v3 = self.version == 3
        self.cluster = rng.choice([512, 1024, 4096, 16384, 65536, 65536, 262144, 2 * MIB])
        self.refcount_bits = rng.choice([1, 2, 4, 8, 16, 32, 64]) if v3 else 16
        self.extended = v3 and self.cluster >= 16384 and rng.random() < 0.4
        self.compression = rng.choice(["none", "zlib", "zstd"]) if v3 \
            else rng.choice(["none", "zlib"])
        self.data_file = v3 and rng.choice(["no", "no", "no", "plain", "raw"]) or "no"
        self.lazy = v3 and rng.random() < 0.2
        if self.data_file != "no":
            self.compression = "none"
        self.backing = "no" if self.data_file == "raw" \
            else rng.choice(["no", "no", "same", "shorter", "longer"])
        self.backing_format = rng.choice(["raw", "qcow2"])
        self.preallocation = rng.choice(["off", "off", "metadata", "falloc", "full"]) \
            if self.backing == "no" or self.extended else "off"
        self.creator = rng.choice(["ours", "peer"])
        self.size = max(64 * self.cluster, 256 * KIB)
        self.size = min(self.size, 8 * MIB)
        self.size += rng.choice([0, 0, 512, self.cluster // 2]) // 512 * 512

    def options(self, folder):
        words = [f"cluster_size={self.cluster}", f"compat=v{self.version}"]
        if self.version == 3:
            words += [f"refcount_bits={self.refcount_bits}",
                      f"extended_l2={'on' if self.extended else 'off'}",
                      f"lazy_refcounts={'on' if self.lazy else 'off'}"]
        if self.compression == "zstd":
            words.append("compression_type=zstd")
        if self.preallocation != "off":
            words.append(f"preallocation={self.preallocation}")
        if self.data_file != "no":
            words.append(f"data_file={folder}/image.data")
            words.append(f"data_file_raw={'on' if self.data_file == 'raw' else 'off'}")
        return ",".join(words)

    def snapshots(self):
        # one bit of refcount cannot count two uses
        return self.data_file == "no" and self.refcount_bits > 1

    def __str__(self):
        return (f"v{self.version} cluster {self.cluster} refcount {self.refcount_bits} "
                f"{'subclusters ' if self.extended else ''}{'lazy ' if self.lazy else ''}"
                f"compression {self.compression} data-file {self.data_file} "
                f"prealloc {self.preallocation} backing {self.backing}"
                f"{'/' + self.backing_format if self.backing != 'no' else ''} "
                f"size {self.size} by {self.creator}")


class Side:
    """One of the two tools."""

    def __init__(self, name, img, io):
        self.name, self.img, self.io = name, img, io


class ImageWorld:
    """The image of one seed with its model."""

    def __init__(self, folder, seed, liveblk):
        self.folder = folder
        self.params = Params(seed)
        self.rng = random.Random(f"operations {seed}")
        self.path = os.path.join(folder, "image.qcow2")
        ours = Side("ours", [liveblk, "img"], [liveblk, "img", "io"])
        peer = Side("peer", ["qemu-img"], None)
        self.ours, self.peer = ours, peer
        self.data = bytearray(self.params.size)
        self.unsure = []
        self.snapshots = {}
        self.history = []
        self.counts = {}
        # clusters that may be allocated: the peer writes no compressed cluster over one
        self.touched = set()

    async def img(self, side, *words, check=True):
        argv = [*side.img, words[0], *words[1:]]
        return await tool(*argv, check=check)

    # -- creation -----------------------------------------------------------------------------
    async def create(self):
        params = self.params
        words = ["create", "-q", "-f", "qcow2", "-o", params.options(self.folder)]
        if params.backing != "no":
            size = {"same": params.size, "shorter": params.size // 2 // 512 * 512,
                    "longer": params.size + 3 * params.cluster}[params.backing]
            base = os.path.join(self.folder, "base")
            raw = base + ".raw"
            content = bytearray(size)
            for _ in range(6):
                at = self.rng.randrange(0, size)
                length = min(size - at, self.rng.randrange(1, size // 3))
                content[at:at + length] = bytes([self.rng.randrange(1, 256)]) * length
            with open(raw, "wb") as out:
                out.write(content)
            if params.backing_format == "qcow2":
                await tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, base)
            else:
                os.rename(raw, base)
            shown = content[:params.size]
            self.data[:len(shown)] = shown
            words += ["-b", "base", "-F", params.backing_format]
        side = self.ours if params.creator == "ours" else self.peer
        self.history.append(f"{side.name}: {' '.join(words)} {params.size}")
        await self.img(side, *words, self.path, str(params.size))

    # -- operations ---------------------------------------------------------------------------
    def some_range(self, aligned):
        size, cluster = len(self.data), self.params.cluster
        if aligned:
            clusters = -(-size // cluster)
            first = self.rng.randrange(clusters)
            count = self.rng.randrange(1, min(8, clusters - first) + 1)
            at = first * cluster
            return at, min(size, at + count * cluster) - at
        at = self.rng.randrange(size)
        if self.rng.random() < 0.5:
            at = at // 512 * 512
        return at, min(size - at, self.rng.randrange(1, 3 * cluster + 4096))

    def batch(self, side):
        """Some commands for one run of the I/O tool; the model takes them as done."""
        commands = []
        for _ in range(self.rng.randrange(2, 7)):
            kinds = ["write", "write", "write", "zero", "unmap", "discard"]
            if self.params.compression != "none":
                kinds += ["compressed", "compressed"]
            kind = self.rng.choice(kinds)
            at, length = self.some_range(kind in ("compressed", "discard")
                                         or self.rng.random() < 0.4)
            byte = self.rng.randrange(1, 256)
            clusters = range(at // self.params.cluster, -(-(at + length) // self.params.cluster))
            if kind == "compressed" and side is self.peer and (
                    self.params.preallocation != "off" or not self.touched.isdisjoint(clusters)):
                kind = "write"
            self.counts[kind] = self.counts.get(kind, 0) + 1
            if kind != "discard":
                self.touched.update(clusters)
            if kind in ("write", "compressed"):
                flag = "-c " if kind == "compressed" else ""
                commands.append(f"write {flag}-P {byte} {at} {length}")
                self.write(at, bytes([byte]) * length)
            elif kind == "discard":
                commands.append(f"discard {at} {length}")
                self.unsure.append((at, length, bytes(self.data[at:at + length])))
            else:
                commands.append(f"write -z {'-u ' if kind == 'unmap' else ''}{at} {length}")
                self.write(at, bytes(length))
        self.history += [f"{side.name}: {command}" for command in commands]
        return commands

    def write(self, at, content):
        self.data[at:at + len(content)] = content
        # what is written after a discard is known again
        kept = []
        for start, length, old in self.unsure:
            end, stop = start + length, at + len(content)
            if stop <= start or at >= end:
                kept.append((start, length, old))
                continue
            if start < at:
                kept.append((start, at - start, old[:at - start]))
            if stop < end:
                kept.append((stop, end - stop, old[stop - start:]))
        self.unsure = kept

    async def run_batch(self, side):
        commands = self.batch(side)
        if side is self.ours:
            await tool(*side.io, self.path, *commands)
            return
        words = [word for command in commands for word in ("-c", command)]
        _, out, err = await tool("qemu-io", "-f", "qcow2", *words, self.path)
        if "failed" in out + err or "rror" in out + err:
            raise AssertionError(f"qemu-io: {out}{err}")

    async def run_other(self, side):
        """A snapshot or a change of size."""
        kind = self.rng.choice(["create", "apply", "delete", "grow", "shrink"])
        if kind in ("create", "apply", "delete"):
            if not self.params.snapshots() or (kind != "create" and not self.snapshots) \
                    or (kind == "create" and len(self.snapshots) > 2):
                return
            if kind == "create" and self.params.refcount_bits == 2 and len(self.snapshots) > 1:
                return
        elif self.snapshots:
            return
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind == "create":
            name = f"s{len(self.history)}"
            self.history.append(f"{side.name}: snapshot -c {name}")
            await self.img(side, "snapshot", "-c", name, self.path)
            await self.learn()
            self.snapshots[name] = bytes(self.data)
        elif kind == "apply":
            name = self.rng.choice(sorted(self.snapshots))
            self.history.append(f"{side.name}: snapshot -a {name}")
            await self.img(side, "snapshot", "-a", name, self.path)
            self.data, self.unsure = bytearray(self.snapshots[name]), []
        elif kind == "delete":
            name = self.rng.choice(sorted(self.snapshots))
            self.history.append(f"{side.name}: snapshot -d {name}")
            await self.img(side, "snapshot", "-d", name, self.path)
            del self.snapshots[name]
        else:
            await self.learn()
            step = self.rng.choice([512, self.params.cluster, 5 * self.params.cluster])
            size = len(self.data) + (step if kind == "grow" else -step)
            if size < 4096 or size > 20 * MIB:
                return
            self.history.append(f"{side.name}: resize {size}")
            shrink = ["--shrink"] if kind == "shrink" else []
            await self.img(side, "resize", "-q", *shrink, self.path, str(size))
            self.data = self.data[:size] + bytearray(max(0, size - len(self.data)))

    # -- judgement ----------------------------------------------------------------------------
    async def dump(self, side, name):
        """What the disk reads as."""
        raw = os.path.join(self.folder, name)
        await self.img(side, "convert", "-f", "qcow2", "-O", "raw", self.path, raw)
        with open(raw, "rb") as file:
            content = file.read()
        return content, raw

    async def learn(self):
        """Takes what discards left: old bytes or zeroes, nothing else."""
        if not self.unsure:
            return
        content, _ = await self.dump(self.peer, "learn.raw")
        self.settle(content)

    def settle(self, content):
        for at, length, old in self.unsure:
            now = content[at:at + length]
            for index in range(0, length, 512):
                piece = now[index:index + 512]
                if piece != old[index:index + 512] and any(piece):
                    raise AssertionError(f"a discard left strange bytes at {at + index}")
            self.data[at:at + length] = now
        self.unsure = []

    async def judge(self):
        (theirs, raw), (mine, _) = await asyncio.gather(
            self.dump(self.peer, "peer.raw"), self.dump(self.ours, "ours.raw"))
        self.settle(theirs)
        first_difference(bytes(self.data), theirs, "the model and what qemu-img reads")
        first_difference(theirs, mine, "what qemu-img and liveblk read")
        await self.both_clean()
        code, out, err = await self.img(self.ours, "compare", "-f", "raw", "-F", "qcow2", raw,
                                        self.path, check=False)
        assert code == 0 and "Images are identical." in out, f"compare: {code} {out}{err}"
        await self.same_told()
        if self.params.data_file == "raw":
            with open(os.path.join(self.folder, "image.data"), "rb") as file:
                held = file.read()[:len(theirs)]
                first_difference(theirs, held, "the disk and its raw data file")

    async def both_clean(self):
        told = []
        for side in (self.peer, self.ours):
            code, out, err = await self.img(side, "check", "-f", "qcow2", "--output=json",
                                            self.path, check=False)
            assert code == 0, f"check by {side.name} ended with {code}: {out}{err}"
            told.append(json.loads(out))
        if "image-end-offset" not in told[1]:
            return
        assert told[0] == told[1], f"check: the peer {told[0]}, ours {told[1]}"

    async def same_told(self):
        told = []
        for side in (self.peer, self.ours):
            _, out, _ = await self.img(side, "map", "-f", "qcow2", "--output=json", self.path)
            told.append(plain_map(json.loads(out)))
        for one, two in zip(*told):
            assert one == two, f"map: the peer {one}, ours {two}"
        assert len(told[0]) == len(told[1]), "map: one is longer"
        told = []
        for side in (self.peer, self.ours):
            _, out, _ = await self.img(side, "info", "-f", "qcow2", "--output=json", self.path)
            told.append(plain_info(json.loads(out)))
        assert told[0] == told[1], f"info: the peer {told[0]}, ours {told[1]}"

    # -- the whole ----------------------------------------------------------------------------
    async def run(self, rounds):
        try:
            await self.create()
            await self.judge()
            for turn in range(rounds):
                side = self.ours if (turn + self.params.seed) % 2 else self.peer
                if self.rng.random() < 0.35:
                    await self.run_other(side)
                await self.run_batch(side)
                await self.judge()
        except (AssertionError, ToolFailed) as problem:
            done = "\n    ".join(self.history[-30:])
            raise AssertionError(f"seed {self.params.seed} ({self.params})\n    {done}\n"
                                 f"  {problem}") from None


def plain_map(rows):
    """A map without the listed difference: places of what is not there."""
    out = []
    for row in rows:
        row = dict(row)
        if not row["present"]:
            row.pop("offset", None)
        last = out[-1] if out else None
        if last and not row["present"] and not last["present"] \
                and all(row[key] == last[key] for key in ("depth", "zero", "data")):
            last["length"] += row["length"]
        else:
            out.append(row)
    return out


def plain_info(info):
    """Information without the listed difference: the blocks of the file."""
    info.pop("actual-size", None)
    for child in info.get("children", []):
        child["info"].pop("actual-size", None)
    return info


def first_difference(one, two, what):
    if one == two:
        return
    assert len(one) == len(two), f"{what} differ in length: {len(one)} and {len(two)}"
    at = next(index for index, (a, b) in enumerate(zip(one, two)) if a != b)
    raise AssertionError(f"{what} differ at {at}: {one[at]} and {two[at]}")
