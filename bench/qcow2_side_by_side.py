#!/usr/bin/env python3
"""qcow2 images under ours and under qemu-img bench, on the same files, interleaved.

    cargo build --release -p liveblk-bench --example pattern
    bench/qcow2_side_by_side.py --ours target/release/examples/pattern [--pairs 7]

Rows: 4 KiB requests that step through the disk in a scattered order (the same for both: qemu-img
has no random one), on allocated, growing and overlay images, and through chains. In rows "each to
a new cluster" no request finds its cluster allocated; in the other rows most of them do. Each run
of a writing row gets a fresh copy of its image. Printed are minimum, median and maximum of the time
per request, of the processor time of the whole process per request (less that of a run with one
read), and of the paired ratios ours/peer. Image files lie in --folder (a file system with O_DIRECT
unless --cached).
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
CLUSTER = 65536


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

    def __init__(self, name, write, images, count, step=STEP):
        self.name, self.write, self.images = name, write, images
        self.count, self.step = count, step

    def chain(self, cached):
        """The images of one run; nothing of a fresh copy is left in the page cache for O_DIRECT."""
        if not self.write:
            return self.images
        top = self.images[-1] + ".run"
        run(["cp", "--sparse=always", self.images[-1], top])
        if not cached:
            with open(top, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return self.images[:-1] + [top]

    def measure(self, side, options):
        """Microseconds and processor microseconds per request, beyond those of one read."""
        chain = self.chain(options.cached)
        start = timed(options.prefix + side(self, options, chain, 1, False))[1]
        took, cpu = timed(options.prefix + side(self, options, chain, self.count, self.write))
        return took * 1e6 / self.count, (cpu - start) * 1e6 / self.count

    def ours(self, options, chain, count, write):
        """The command of ours."""
        return [options.ours, str(count), str(options.depth), str(SIZE), str(self.step),
                "write" if write else "read", "cached" if options.cached else "direct", *chain]

    def peer(self, options, chain, count, write):
        """The command of the peer."""
        command = ["qemu-img", "bench", "-f", "qcow2", "-c", str(count), "-d",
                   str(options.depth), "-s", str(SIZE), "-S", str(self.step), "-t",
                   "writeback" if options.cached else "none", "-i", options.aio]
        return command + (["-w"] if write else []) + [chain[-1]]


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
    clusters = size // CLUSTER
    at = [(seed * 104729 + index * 15485863) % clusters * CLUSTER for index in range(count)]
    arguments = [word for offset in at for word in ("-c", f"write -P 9 {offset} 65536")]
    run(["qemu-io", "-f", "qcow2", *arguments, path])


def rows(folder, size, depths, count):
    """Makes the images; the rows."""
    def name(file):
        return os.path.join(folder, file)
    # With a prime number of clusters as step every request is the first of its cluster.
    clusters, far = size // CLUSTER, 7919 * CLUSTER
    allocated = create(name("allocated"), size)
    fill(allocated, size)
    yield Row("allocated 4k read", False, [allocated], count)
    yield Row("allocated 4k write", True, [allocated], count)
    growing = create(name("growing"), size)
    yield Row("growing 4k write", True, [growing], count)
    yield Row("growing 4k write, each to a new cluster", True, [growing], clusters, far)
    overlay = create(name("overlay"), size, allocated)
    yield Row("overlay 4k write", True, [allocated, overlay], count)
    yield Row("overlay 4k write, each to a new cluster", True, [allocated, overlay], clusters, far)
    extended = create(name("extended"), size, allocated, "extended_l2=on,cluster_size=128k")
    yield Row("overlay with subclusters 4k write, each to a new one", True,
              [allocated, extended], count)
    chain = [allocated]
    for depth in range(2, max(depths, default=1) + 1):
        chain = chain + [create(name(f"layer{depth}"), size, chain[-1])]
        scatter(chain[-1], size, 8, depth)
        if depth in depths:
            yield Row(f"chain of {depth} 4k read", False, chain, count)


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
    parser.add_argument("--rt", action="store_true", help="run both as SCHED_RR 1 (needs root)")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    options = parser.parse_args()
    options.prefix = ["taskset", "-c", options.cpu] if options.cpu else []
    options.prefix += ["chrt", "-r", "1"] if options.rt else []
    depths = [int(depth) for depth in options.chains.split(",") if depth]
    folder = tempfile.mkdtemp(dir=os.path.abspath(options.folder))
    print("| row | figure | ours min/med/max | peer min/med/max | ratio |\n|---|---|---|---|---|")
    try:
        for row in rows(folder, options.size * MIB, depths, options.count):
            if options.rows not in row.name:
                continue
            pairs = [(row.measure(Row.ours, options), row.measure(Row.peer, options))
                     for _ in range(options.pairs)]
            for index, figure in enumerate(["us/request", "CPU us/request"]):
                ours = [pair[0][index] for pair in pairs]
                peer = [pair[1][index] for pair in pairs]
                ratios = spread([a / b for a, b in zip(ours, peer)])
                print(f"| {row.name} | {figure} | {spread(ours)} | {spread(peer)} | {ratios} |",
                      flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
