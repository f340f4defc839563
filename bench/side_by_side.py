#!/usr/bin/env python3
"""Ours and qemu-storage-daemon side by side, interleaved: guest I/O through NBD, and jobs.

    bench/side_by_side.py --ours target/release/liveblkd [--pairs 5] [--rows growing,chain,guest]

For each row the two daemons run in turn (A B A B ...) on the same images on tmpfs, pinned to one
core, the client to the other; printed are minimum, median and maximum of each figure and of the
paired ratios ours/peer. CPU is user + system time of the daemon process. With
--rt both run as SCHED_RR 1 (needs root), for machines with other load.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time

TICKS = os.sysconf("SC_CLK_TCK")
# Daemons to end if the run is broken off.
RUNNING = []


def cpu_seconds(pid):
    """User and system time of a process, threads included."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def peak_rss_mib(pid):
    """Peak resident memory of a process."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return 0.0


class Daemon:
    """A daemon under test with a QMP connection."""

    def __init__(self, program, folder, rt):
        self.qmp_path = os.path.join(folder, "qmp.sock")
        self.nbd_path = os.path.join(folder, "nbd.sock")
        for path in (self.qmp_path, self.nbd_path):
            if os.path.exists(path):
                os.unlink(path)
        command = ["taskset", "-c", "0"] + (["chrt", "-r", "1"] if rt else [])
        command += [program, "--chardev",
                    f"socket,id=mon,path={self.qmp_path},server=on,wait=off",
                    "--monitor", "chardev=mon",
                    "--nbd-server", f"addr.type=unix,addr.path={self.nbd_path}"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        RUNNING.append(self.process)
        self.socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 10
        while True:
            try:
                self.socket.connect(self.qmp_path)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        # only for reading: a text file that is written forgets what it has read ahead
        self.file = self.socket.makefile("r", encoding="ascii", newline="\n")
        self.events = []
        self.file.readline()
        self.command("qmp_capabilities")

    def read(self):
        """One message."""
        line = self.file.readline()
        if not line:
            raise RuntimeError("the daemon closed its monitor")
        return json.loads(line)

    def command(self, name, /, **arguments):
        """Runs a command and returns its answer; events are kept."""
        names = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.socket.sendall(json.dumps({"execute": name, "arguments": names}).encode() + b"\n")
        while True:
            message = self.read()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise RuntimeError(f"{name}: {message['error']}")
            else:
                return message["return"]

    def wait_event(self, name):
        """Waits for an event of this name."""
        while True:
            for index, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(index)
            message = self.read()
            if "event" in message:
                self.events.append(message)

    def add_image(self, node, path, driver):
        """Opens an image as a node."""
        self.command("blockdev-add", driver=driver, node_name=node,
                     file={"driver": "file", "filename": path})

    def quit(self):
        """Ends the daemon."""
        self.command("quit")
        self.process.wait(10)
        RUNNING.remove(self.process)


def fio(arguments, uri, rt):
    """Runs fio against an NBD export; its parsed job result."""
    command = ["taskset", "-c", "1"] + (["chrt", "-r", "1"] if rt else [])
    command += ["fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", "--output-format=json",
                "--randrepeat=1"] + arguments
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    text = answer.stdout
    return json.loads(text[text.index("{"):])["jobs"][0]


GUEST = {
    "4k randread qd32": ["--rw=randread", "--bs=4k", "--iodepth=32"],
    "4k randwrite qd32": ["--rw=randwrite", "--bs=4k", "--iodepth=32"],
    "4k randread qd1": ["--rw=randread", "--bs=4k", "--iodepth=1"],
    "64k read qd16": ["--rw=read", "--bs=64k", "--iodepth=16"],
    "64k write qd16": ["--rw=write", "--bs=64k", "--iodepth=16"],
}


# Every byte of a new image once: no request finds its cluster, or only its neighbours made it.
GROWING = {
    "4k randwrite qd32": ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=256m"],
    "64k write qd16": ["--rw=write", "--bs=64k", "--iodepth=16", "--size=1g"],
    "1M write qd8": ["--rw=write", "--bs=1m", "--iodepth=8", "--size=1g"],
}


def guest_row(program, folder, image, driver, arguments, seconds, rt):
    """IOPS, p50 in us and daemon CPU us per request; `seconds` None: as long as it takes."""
    daemon = Daemon(program, folder, rt)
    daemon.add_image("n", image, driver)
    daemon.command("block-export-add", type="nbd", id="e", node_name="n", name="n", writable=True)
    uri = f"nbd+unix:///n?socket={daemon.nbd_path}"
    limits = ["--time_based", f"--runtime={seconds}", f"--size={os.path.getsize(image)}"]
    if driver == "qcow2":
        limits[2] = "--size=256m"
    if seconds is None:
        limits = []
    before = cpu_seconds(daemon.process.pid)
    job = fio(arguments + limits, uri, rt)
    cpu = cpu_seconds(daemon.process.pid) - before
    side = job["read"] if job["read"]["total_ios"] else job["write"]
    rss = peak_rss_mib(daemon.process.pid)
    daemon.quit()
    percentiles = side["clat_ns"].get("percentile", {})
    return {
        "kIOPS": side["total_ios"] / (side["runtime"] / 1000) / 1000,
        "p50 us": percentiles.get("50.000000", 0) / 1000,
        "CPU us/IO": cpu * 1e6 / side["total_ios"],
        "RSS MiB": rss,
    }


def create(path, size, backing=None):
    """A new qcow2 image."""
    command = ["qemu-img", "create", "-q", "-f", "qcow2"]
    command += ["-b", backing, "-F", "qcow2"] if backing else []
    subprocess.run(command + [path, str(size)], check=True)
    return path


def growing_row(program, folder, arguments, rt):
    """The figures of writes into a new image."""
    image = create(os.path.join(folder, "growing"), 1 << 30)
    result = guest_row(program, folder, image, "qcow2", arguments, None, rt)
    os.unlink(image)
    return result


def chains(folder, base, depths):
    """The top of a chain for each depth; overlays hold eight clusters each, here and there."""
    top, clusters = base, (256 << 20) >> 16
    for depth in range(1, max(depths) + 1):
        if depth > 1:
            top = create(os.path.join(folder, f"layer{depth}"), os.path.getsize(base), top)
            places = [(depth * 104729 + at * 15485863) % clusters << 16 for at in range(8)]
            words = [word for at in places for word in ("-c", f"write -P 9 {at} 65536")]
            subprocess.run(["qemu-io", "-f", "qcow2", *words, top], check=True,
                           stdout=subprocess.DEVNULL)
        if depth in depths:
            yield depth, top


def job_row(program, folder, kind, driver, image, size, rt):
    """MB/s, CPU seconds per GiB and peak memory of one job from a full image to a new one."""
    target = os.path.join(folder, "target")
    if os.path.exists(target):
        os.unlink(target)
    subprocess.run(["qemu-img", "create", "-q", "-f", driver, target, str(size)], check=True)
    daemon = Daemon(program, folder, rt)
    daemon.add_image("s", image, driver)
    daemon.add_image("t", target, driver)
    before, start = cpu_seconds(daemon.process.pid), time.monotonic()
    daemon.command(f"blockdev-{kind}", job_id="j", device="s", target="t", sync="full")
    daemon.wait_event("BLOCK_JOB_READY" if kind == "mirror" else "BLOCK_JOB_COMPLETED")
    took = time.monotonic() - start
    if kind == "mirror":
        daemon.command("block-job-cancel", device="j")
        daemon.wait_event("BLOCK_JOB_COMPLETED")
    cpu = cpu_seconds(daemon.process.pid) - before
    rss = peak_rss_mib(daemon.process.pid)
    daemon.quit()
    compare = ["qemu-img", "compare", "-q", "-f", driver, "-F", driver, image, target]
    subprocess.run(compare, check=True)
    os.unlink(target)
    return {"MB/s": size / took / 1e6, "CPU s/GiB": cpu / (size / 2**30), "RSS MiB": rss}


def full_image(folder, driver, size):
    """An image whose every byte is written, incompressible."""
    path = os.path.join(folder, f"full.{driver}")
    raw = os.path.join(folder, "full.raw")
    if not os.path.exists(raw):
        with open(raw, "wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
    if driver != "raw":
        command = ["qemu-img", "convert", "-q", "-f", "raw", "-O", driver, raw, path]
        subprocess.run(command, check=True)
    return path


def report(name, ours, peers):
    """Prints a row: min/median/max of both sides and the median of the paired ratios."""
    for figure in ours[0]:
        mine, theirs = [run[figure] for run in ours], [run[figure] for run in peers]
        ratios = [a / b for a, b in zip(mine, theirs) if b]

        def three(values, digits=4):
            low, middle, high = min(values), statistics.median(values), max(values)
            return f"{low:.{digits}g}/{middle:.{digits}g}/{high:.{digits}g}"

        ratio = three(ratios, 3) if ratios else "-"
        print(f"| {name} | {figure} | {three(mine)} | {three(theirs)} | {ratio} |", flush=True)


def main():
    """Runs the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ours", default="target/release/liveblkd")
    parser.add_argument("--peer", default="qemu-storage-daemon")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", default="guest,jobs")
    parser.add_argument("--drivers", default="raw,qcow2")
    parser.add_argument("--only", default="", help="only guest rows whose name contains this")
    parser.add_argument("--size", type=int, default=1024, help="MiB of the job rows")
    parser.add_argument("--seconds", type=int, default=3, help="of each guest run")
    parser.add_argument("--rt", action="store_true")
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="liveblk-bench-", dir="/dev/shm")
    print("| row | figure | ours min/med/max | peer min/med/max | ratio |")
    print("|---|---|---|---|---|")
    programs = (options.ours, options.peer)

    def compare(name, row):
        runs = [[], []]
        for _ in range(options.pairs):
            for program, results in zip(programs, runs):
                results.append(row(program))
        report(name, *runs)

    try:
        for name, arguments in GROWING.items() if "growing" in options.rows else ():
            compare(f"NBD growing qcow2 {name}",
                    lambda program: growing_row(program, folder, arguments, options.rt))
        if "chain" in options.rows:
            base = full_image(folder, "qcow2", 256 << 20)
            arguments = GUEST["4k randread qd32"]
            for depth, top in chains(folder, base, [1, 8, 32, 100]):
                compare(f"NBD chain of {depth} 4k randread qd32",
                        lambda program: guest_row(program, folder, top, "qcow2", arguments,
                                                  options.seconds, options.rt))
            for file in ("full.raw", "full.qcow2"):
                os.unlink(os.path.join(folder, file))
        for driver in options.drivers.split(",") if options.drivers else ():
            size = options.size << 20
            image = full_image(folder, driver, size)
            for name, arguments in GUEST.items() if "guest" in options.rows else ():
                if options.only in name:
                    compare(f"NBD {driver} {name}",
                            lambda program: guest_row(program, folder, image, driver, arguments,
                                                      options.seconds, options.rt))
            for kind in ("backup", "mirror") if "jobs" in options.rows else ():
                compare(f"{kind} {driver}",
                        lambda program: job_row(program, folder, kind, driver, image, size,
                                                options.rt))
    finally:
        for process in RUNNING:
            process.kill()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
