#!/usr/bin/env python3
"""qcow2 images under ours and under qemu-img bench, on the same files, interleaved.

    cargo build --release -p liveblk-bench --example pattern
    bench/qcow2_side_by_side.py --ours target/release/examples/pattern [--pairs 7]

Rows: 4 KiB requests that step through the disk in a scattered order (the same for both: qemu-img
has no random one), on allocated, growing and overlay images, and through chains. Each run of a
writing row gets a fresh copy of its image. Printed are minimum, median and maximum of the time per
request and of the processor time of the whole process per request, and the median of the paired
ratios ours/peer. Image files lie in --folder (a file system with O_DIRECT unless --cached).
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import tempfile

SIZE = 4096
MIB = 1 << 20
# A prime number of blocks: visits every block once, far from the one before.
STEP = 7919 * SIZE


def run(command):
    """Runs a program; its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def timed(command):
    """Seconds the program says it needed, and its processor seconds."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    found = re.search(r"Run completed in ([0-9.]+) seconds", output)
    if process.returncode != 0 or not found:
        raise RuntimeError(f"{command}: {process.returncode} {output}")
    return float(found.group(1)), usage.ru_utime + usage.ru_stime


class Row:
    """One measurement: images base first, made once; the top is copied before each writing run."""

    def __init__(self, name, folder, write, images):
        self.name, self.folder, self.write, self.images = name, folder, write, images

    def chain(self):
        """The images of one run."""
        if not self.write:
            return self.images
        top = self.images[-1] + ".run"
        run(["cp", "--sparse=always", self.images[-1], top])
        return self.images[:-1] + [top]

    def ours(self, options, chain):
        """One run of ours."""
        return timed(options.prefix + [
            options.ours, str(options.count), str(options.depth), str(SIZE), str(STEP),
            "write" if self.write else "read", "cached" if options.cached else "direct", *chain])

    def peer(self, options, chain):
        """One run of the peer."""
        command = ["qemu-img", "bench", "-f", "qcow2", "-c", str(options.count), "-d",
                   str(options.depth), "-s", str(SIZE), "-S", str(STEP), "-t",
                   "writeback" if options.cached else "none", "-i", options.aio]
        return timed(options.prefix + command + (["-w"] if self.write else []) + [chain[-1]])


def create(path, size, backing=None, options=""):
    """A new image."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2"]
    command += ["-o", options] if options else []
    command += ["-b", backing, "-F", "qcow2"] if backing else []
    run(command + [path, str(size)])
    return path


def fill(path, size):
    """Writes all of an image."""
    commands = [f"write -P 7 {at} {min(64 * MIB, size - at)}" for at in range(0, size, 64 * MIB)]
    arguments = [word for command in commands for word in ("-c", command)]
    run(["qemu-io", "-f", "qcow2", *arguments, path])


def scatter(path, size, count, seed):
    """Writes `count` clusters here and there."""
    clusters = size // 65536
    at = [(seed * 104729 + index * 15485863) % clusters * 65536 for index in range(count)]
    arguments = [word for offset in at for word in ("-c", f"write -P 9 {offset} 65536")]
    run(["qemu-io", "-f", "qcow2", *arguments, path])


def rows(folder, size, depths):
    """Makes the images; the rows."""
    def name(file):
        return os.path.join(folder, file)
    allocated = create(name("allocated"), size)
    fill(allocated, size)
    yield Row("allocated 4k read", folder, False, [allocated])
    yield Row("allocated 4k write", folder, True, [allocated])
    yield Row("growing 4k write", folder, True, [create(name("growing"), size)])
    overlay = create(name("overlay"), size, allocated)
    yield Row("overlay 4k first write", folder, True, [allocated, overlay])
    extended = create(name("extended"), size, allocated, "extended_l2=on,cluster_size=128k")
    yield Row("overlay with subclusters 4k first write", folder, True, [allocated, extended])
    chain = [allocated]
    for depth in range(2, max(depths, default=1) + 1):
        chain = chain + [create(name(f"layer{depth}"), size, chain[-1])]
        scatter(chain[-1], size, 8, depth)
        if depth in depths:
            yield Row(f"chain of {depth} 4k read", folder, False, chain)


def spread(values, digits=2):
    """Minimum, median, maximum."""
    found = (min(values), statistics.median(values), max(values))
    return "/".join(f"{value:.{digits}f}" for value in found)


def main():
    """Runs everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", required=True, help="the built example `pattern`")
    parser.add_argument("--folder", default=".", help="where the images are made")
    parser.add_argument("--size", type=int, default=1024, help="MiB of the disk")
    parser.add_argument("--count", type=int, default=100_000, help="requests of a run")
    parser.add_argument("--depth", type=int, default=32, help="requests at a time")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--chains", default="8,32,100", help="depths of chains, or empty")
    parser.add_argument("--aio", default="io_uring", help="the peer's: threads, native, io_uring")
    parser.add_argument("--cached", action="store_true", help="through the page cache")
    parser.add_argument("--cpu", help="pin both to this processor")
    options = parser.parse_args()
    options.prefix = ["taskset", "-c", options.cpu] if options.cpu else []
    depths = [int(depth) for depth in options.chains.split(",") if depth]
    folder = tempfile.mkdtemp(dir=os.path.abspath(options.folder))
    print("| row | figure | ours min/med/max | peer min/med/max | ratio |\n|---|---|---|---|---|")
    try:
        for row in rows(folder, options.size * MIB, depths):
            pairs = []
            for _ in range(options.pairs):
                pairs.append((row.ours(options, row.chain()), row.peer(options, row.chain())))
            for index, figure in enumerate(["us/request", "CPU us/request"]):
                ours = [pair[0][index] * 1e6 / options.count for pair in pairs]
                peer = [pair[1][index] * 1e6 / options.count for pair in pairs]
                ratio = statistics.median(a / b for a, b in zip(ours, peer))
                print(f"| {row.name} | {figure} | {spread(ours)} | {spread(peer)} | {ratio:.2f} |",
                      flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
