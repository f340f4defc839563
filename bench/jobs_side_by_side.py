#!/usr/bin/env python3
"""Jobs of ours and of qemu-storage-daemon side by side, interleaved, with and without a guest.

    bench/jobs_side_by_side.py --ours target/release/liveblkd [--pairs 5] [--kinds backup,stream]

For each row the two daemons run in turn (A B A B ...) on the same images on tmpfs, pinned to one
core, the client to the other. Rows: each kind of job, over raw and qcow2, dense (every byte
written, incompressible) and with a tenth of the clusters written. Figures: MB/s of written data,
CPU seconds of the daemon per GiB of written data, peak memory. A mirror and an active commit are
timed to READY. The rows `beside a guest` run fio (4k random writes, queue depth 8) through NBD on
the disk from before the start of the job until it is over, at most --seconds: IOPS and latencies
of the guest while the job runs; beside a stream it writes the first eighth only, so that something
is left to stream. Every result without a guest is compared with its source.
The row `converge` is a background mirror under such a guest, ours with the policy of that name,
whose deadline is --patience times one pass without a guest: time to READY in such passes, bytes
copied (guests' own writes to the target included) in sizes of the disk, and whether it became
READY at all within --seconds. With `guest` in --rows come, in the same run, the guest without any
job and, until READY, ours as a mirror without the policy: what a longest write is worth.
The rows `reflink` (only if asked for; root) run on XFS in a file on tmpfs, on a loop device:
backups of ours with `use-copy-range`, against the peer with it and without. Everything is on the
file system's disk before a job starts. The figure `shared` is what of the result lies in blocks of
the source, as the kernel tells it.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from side_by_side import RUNNING, Daemon, cpu_seconds, create, full_image, peak_rss_mib, report

CLUSTER = 65536
KINDS = ("backup", "mirror", "write-blocking", "stream", "commit", "active commit")
ENDS = {"mirror": "BLOCK_JOB_READY", "write-blocking": "BLOCK_JOB_READY",
        "active commit": "BLOCK_JOB_READY"}


def sparse_image(folder, driver, size):
    """An image of which every tenth cluster, at random places, is written."""
    path = os.path.join(folder, f"sparse.{driver}")
    raw = os.path.join(folder, "sparse.raw")
    if not os.path.exists(raw):
        places = random.Random(1).sample(range(size // CLUSTER), size // CLUSTER // 10)
        with open(raw, "wb") as file:
            file.truncate(size)
            for place in places:
                file.seek(place * CLUSTER)
                file.write(os.urandom(CLUSTER))
    if driver != "raw":
        subprocess.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", driver, raw, path],
                       check=True)
    return path


def empty(path, driver, size, backing=None):
    """A new image of the driver; an overlay is always qcow2."""
    if backing:
        words = ["-b", backing[0], "-F", backing[1]]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words, path], check=True)
    elif driver == "qcow2":
        create(path, size)
    else:
        with open(path, "wb") as file:
            file.truncate(size)
    return path


class Setting:
    """The images of one run: made anew, opened in a daemon, compared at the end."""

    def __init__(self, program, folder, kind, driver, image, size, rt):
        self.kind, self.driver, self.image, self.size = kind, driver, image, size
        self.folder = folder
        self.daemon = Daemon(program, folder, rt)
        self.result, self.top = self.prepare()

    def path(self, name):
        return os.path.join(self.folder, "run-" + name)

    def open(self, node, path, driver, **more):
        self.daemon.command("blockdev-add", driver=driver, node_name=node,
                            file={"driver": "file", "filename": path}, **more)

    def prepare(self):
        """Opens what the kind of job works on; the file with its result and the guest's node."""
        driver, size = self.driver, self.size
        if self.kind in ("backup", "mirror", "write-blocking"):
            # the guest writes: a copy, so that each run begins alike
            source = self.path("source")
            subprocess.run(["cp", "--sparse=always", self.image, source], check=True)
            self.open("s", source, driver)
            self.open("t", empty(self.path("target"), driver, size), driver)
            return (self.path("target"), driver), "s"
        if self.kind == "stream":
            self.open("base", self.image, driver, read_only=True)
            top = empty(self.path("top"), "qcow2", size, (self.image, driver))
            self.open("s", top, "qcow2", backing="base")
            return (top, "qcow2"), "s"
        base = empty(self.path("base"), driver, size)
        full = self.path("full")
        if self.driver == "raw":
            subprocess.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", self.image,
                            full], check=True)
        else:
            shutil.copyfile(self.image, full)
        subprocess.run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", base, "-F", driver, full],
                       check=True)
        self.open("base", base, driver)
        self.open("m" if self.kind == "commit" else "s", full, "qcow2", backing="base")
        if self.kind == "commit":
            top = empty(self.path("top"), "qcow2", size, (full, "qcow2"))
            self.open("s", top, "qcow2", backing="m")
        return (base, driver), "s"

    def start(self, **more):
        """Starts the job; a mirror or a backup takes more members."""
        command = self.daemon.command
        if self.kind == "backup":
            command("blockdev-backup", job_id="j", device="s", target="t", sync="full",
                    **more)
        elif self.kind in ("mirror", "write-blocking"):
            mode = "background" if self.kind == "mirror" else "write-blocking"
            command("blockdev-mirror", job_id="j", device="s", target="t", sync="full",
                    copy_mode=mode, **more)
        elif self.kind == "stream":
            command("block-stream", job_id="j", device="s")
        elif self.kind == "commit":
            command("block-commit", job_id="j", device="s", top_node="m", base_node="base")
        else:
            command("block-commit", job_id="j", device="s")

    def end(self, compare):
        """Ends the job if it goes on, and the daemon; removes the files of the run."""
        if self.kind in ENDS and compare:
            self.daemon.command("block-job-cancel" if "commit" not in self.kind
                                else "block-job-complete", device="j")
            self.daemon.wait_event("BLOCK_JOB_COMPLETED")
        rss = peak_rss_mib(self.daemon.process.pid)
        if compare:
            self.daemon.quit()
            subprocess.run(["qemu-img", "compare", "-q", "-f", self.driver, "-F", self.result[1],
                            self.image, self.result[0]], check=True)
        else:
            # what a job beside a guest has reached does not matter
            self.daemon.process.kill()
            self.daemon.process.wait()
            RUNNING.remove(self.daemon.process)
        for name in ("source", "target", "top", "base", "full"):
            if os.path.exists(self.path(name)):
                os.unlink(self.path(name))
        return rss


def alone(program, folder, kind, driver, image, size, written, rt):
    """The figures of a job without a guest."""
    setting = Setting(program, folder, kind, driver, image, size, rt)
    pid = setting.daemon.process.pid
    before, start = cpu_seconds(pid), time.monotonic()
    setting.start()
    setting.daemon.wait_event(ENDS.get(kind, "BLOCK_JOB_COMPLETED"))
    took = time.monotonic() - start
    cpu = cpu_seconds(pid) - before
    rss = setting.end(compare=True)
    return {"MB/s": written / took / 1e6, "CPU s/GiB": cpu / (written / 2**30), "RSS MiB": rss}


def on_reflink(program, folder, kind, driver, image, size, more, rt):
    """The figures of a job on a file system whose files can share blocks."""
    from rig import reflink
    setting = Setting(program, folder, kind, driver, image, size, rt)
    pid = setting.daemon.process.pid
    os.sync()
    before, start = cpu_seconds(pid), time.monotonic()
    setting.start(**more)
    setting.daemon.wait_event(ENDS.get(kind, "BLOCK_JOB_COMPLETED"))
    took = time.monotonic() - start
    cpu = cpu_seconds(pid) - before
    shared = reflink.shared_bytes(setting.result[0])
    setting.end(compare=True)
    return {"ms": took * 1000, "CPU ms": cpu * 1000, "shared": shared / size}


def reflink_rows(options, size):
    """Runs the rows `reflink`."""
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests", "e2e"))
    from rig import reflink
    place = tempfile.mkdtemp(prefix="liveblk-bench-", dir="/dev/shm")
    folder = os.path.join(place, "xfs")
    undo, why_not = asyncio.run(reflink.mount(folder, 5 * size))
    if undo is None:
        raise SystemExit(f"no rows `reflink`: {why_not}")
    asked = {"x_perf": {"use-copy-range": True}}
    rows = [("backup", "both with use-copy-range", asked, asked),
            ("backup", "peer without", asked, {}),
            ("backup", "neither shares", {}, {}),
            ("mirror", "peer copies", {}, {}), ("stream", "peer copies", {}, {}),
            ("commit", "peer copies", {}, {})]
    try:
        for driver in options.drivers.split(","):
            image = full_image(folder, driver, size)
            for kind, what, ours, peers in rows:
                if kind not in options.kinds.split(","):
                    continue
                runs = [[], []]
                for _ in range(options.pairs):
                    sides = ((options.ours, ours), (options.peer, peers))
                    for (program, more), results in zip(sides, runs):
                        results.append(on_reflink(program, folder, kind, driver, image, size,
                                                  more, options.rt))
                report(f"reflink {kind} {driver}, {what}", *runs)
            os.unlink(image)
    finally:
        for process in RUNNING:
            process.kill()
        asyncio.run(undo())
        shutil.rmtree(place)


def beside(program, folder, kind, driver, image, size, options):
    """What a guest gets while the job runs, and for how long it ran."""
    setting = Setting(program, folder, kind, driver, image, size, options.rt)
    daemon, seconds = setting.daemon, options.seconds
    # random writes all over an overlay leave nothing to stream before the job begins
    part = size // 8 if kind == "stream" else size
    guest = start_guest(daemon, part, options)
    setting.start()
    began = time.monotonic()
    # the peer may answer late while the guest writes: the guest's own clock ends it
    wanted = ENDS.get(kind, "BLOCK_JOB_COMPLETED")
    daemon.socket.settimeout(seconds + 30)
    while guest.poll() is None:
        jobs = daemon.command("query-block-jobs")
        if not jobs or jobs[0]["ready"] or any(e["event"] == wanted for e in daemon.events):
            guest.send_signal(signal.SIGINT)
            break
        time.sleep(0.05)
    took = time.monotonic() - began
    figures = guest_figures(guest)
    setting.end(compare=False)
    return figures | {"job s": took}


def undisturbed(program, folder, driver, image, size, options):
    """What a guest gets without any job."""
    setting = Setting(program, folder, "mirror", driver, image, size, options.rt)
    figures = guest_figures(start_guest(setting.daemon, size, options))
    setting.end(compare=False)
    return figures


def start_guest(daemon, size, options):
    """Writes 4k at random places as fast as it can; returns when it has begun."""
    daemon.command("block-export-add", type="nbd", id="e", node_name="s", name="n", writable=True)
    command = ["taskset", "-c", "1"] + (["chrt", "-r", "1"] if options.rt else [])
    command += ["fio", "--name=x", "--ioengine=nbd", f"--uri=nbd+unix:///n?socket="
                f"{daemon.nbd_path}", "--output-format=json", "--rw=randwrite", "--bs=4k",
                f"--iodepth={options.depth}", "--time_based", "--ramp_time=1",
                f"--runtime={options.seconds}",
                f"--size={size}"]
    guest = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    # what came before the job does not count
    time.sleep(1.1)
    return guest


def guest_figures(guest):
    """What the guest got, when it has ended."""
    text = guest.communicate(timeout=60)[0]
    side = json.loads(text[text.index("{"):])["jobs"][0]["write"]
    percentiles = side["clat_ns"].get("percentile", {})
    return {"guest IOPS": side["total_ios"] / max(side["runtime"] / 1000, 0.001),
            "guest p99 ms": percentiles.get("99.000000", 0) / 1e6,
            "guest p99.9 ms": percentiles.get("99.900000", 0) / 1e6,
            "guest max ms": side["clat_ns"]["max"] / 1e6}


def converge(program, folder, driver, image, size, options, policy=True):
    """How a mirror becomes ready under a guest, in passes without one and in sizes of the disk."""
    setting = Setting(program, folder, "mirror", driver, image, size, options.rt)
    start = time.monotonic()
    setting.start()
    setting.daemon.wait_event("BLOCK_JOB_READY")
    idle = time.monotonic() - start
    setting.end(compare=True)

    setting = Setting(program, folder, "mirror", driver, image, size, options.rt)
    daemon = setting.daemon
    guest = start_guest(daemon, size, options)
    daemon.socket.settimeout(options.seconds + 30)
    bounds = {"deadline-ms": max(1, int(idle * options.patience * 1000)),
              "max-latency-us": options.latency}
    start, found, ready = time.time(), 0, None
    setting.start(**({"converge": bounds} if policy and program == options.ours else {}))
    while guest.poll() is None and not ready:
        jobs = daemon.command("query-block-jobs")
        found = jobs[0]["offset"] if jobs else found
        ready = next((e for e in daemon.events if e["event"] == "BLOCK_JOB_READY"), None)
        took = time.time() - start
        time.sleep(0.005)
    if ready:
        # the answers come later than the event
        found, stamp = ready["data"]["offset"], ready["timestamp"]
        took = stamp["seconds"] + stamp["microseconds"] / 1e6 - start
        guest.send_signal(signal.SIGINT)
    figures = guest_figures(guest)
    setting.end(compare=False)
    return {"time / idle pass": took / idle, "copied / disk": found / size,
            "READY (1: yes)": int(ready is not None)} | figures


def main():
    """Runs the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ours", default="target/release/liveblkd")
    parser.add_argument("--peer", default="qemu-storage-daemon")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--drivers", default="raw,qcow2")
    parser.add_argument("--fill", default="dense,sparse")
    parser.add_argument("--rows", default="alone,beside,converge")
    parser.add_argument("--size", type=int, default=1024, help="MiB of the disk")
    parser.add_argument("--seconds", type=int, default=5, help="longest time beside a guest")
    parser.add_argument("--patience", type=float, default=2.5, help="deadline of converge")
    parser.add_argument("--latency", type=int, default=20000, help="us that converge may add")
    parser.add_argument("--depth", type=int, default=8, help="requests of the guest in flight")
    parser.add_argument("--rt", action="store_true")
    options = parser.parse_args()
    if options.rows == "reflink":
        print("| row | figure | ours min/med/max | peer min/med/max | ratio |")
        print("|---|---|---|---|---|")
        return reflink_rows(options, options.size << 20)
    folder = tempfile.mkdtemp(prefix="liveblk-bench-", dir="/dev/shm")
    size = options.size << 20
    print("| row | figure | ours min/med/max | peer min/med/max | ratio |")
    print("|---|---|---|---|---|")

    def compare(name, row, pairs):
        runs = [[], []]
        for _ in range(pairs):
            for program, results in zip((options.ours, options.peer), runs):
                results.append(row(program))
        report(name, *runs)

    try:
        for fill in options.fill.split(","):
            for driver in options.drivers.split(","):
                image = (full_image if fill == "dense" else sparse_image)(folder, driver, size)
                written = size if fill == "dense" else size // CLUSTER // 10 * CLUSTER
                guest = f"{driver}, 4k random writes QD{options.depth}"
                if "guest" in options.rows and fill == "dense":
                    compare(f"no job {guest}",
                            lambda program: undisturbed(program, folder, driver, image, size,
                                                        options), options.pairs)
                    compare(f"mirror {guest}",
                            lambda program: converge(program, folder, driver, image, size,
                                                     options, policy=False), options.pairs)
                if "converge" in options.rows and fill == "dense":
                    compare(f"converge {guest}",
                            lambda program: converge(program, folder, driver, image, size,
                                                     options), options.pairs)
                for kind in options.kinds.split(","):
                    if "alone" in options.rows:
                        compare(f"{kind} {driver} {fill}",
                                lambda program: alone(program, folder, kind, driver, image, size,
                                                      written, options.rt), options.pairs)
                    if "beside" in options.rows and fill == "dense":
                        compare(f"{kind} {driver} beside a guest",
                                lambda program: beside(program, folder, kind, driver, image, size,
                                                       options),
                                options.pairs)
            for name in os.listdir(folder):
                if name.startswith(("full.", "sparse.")):
                    os.unlink(os.path.join(folder, name))
    finally:
        for process in RUNNING:
            process.kill()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
