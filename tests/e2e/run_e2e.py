"""Runs the end-to-end tests against a daemon and its peer.

    run_e2e.py --daemon PATH [--peer PATH] [-k WORDS] [--keep] [--rounds N]

The last line is `N passed, N failed`. A peer that is missing fails the run: without it there is
nothing to compare with.
"""

import argparse
import asyncio
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))

# How many tests that look at no clock run at a time.
BESIDE = 3
sys.path.insert(0, HERE)


def options_of(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--daemon", required=True, help="the daemon under test")
    parser.add_argument("--peer", default="qemu-storage-daemon", help="the daemon to compare with")
    parser.add_argument("-k", dest="words", default="", help="only tests whose name has all words")
    parser.add_argument("--keep", action="store_true", help="keep the files of failed tests")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each kill -9 test")
    parser.add_argument("--seed", type=int, default=0, help="added to the seeds of these tests")
    parser.add_argument("--verbose", action="store_true", help="full tracebacks")
    parser.add_argument("--list", action="store_true", help="only list the tests")
    parser.add_argument("--repeat", type=int, default=1, help="run the selection N times")
    parser.add_argument("--minutes", type=float, default=0, help="repeat until N minutes are over")
    parser.add_argument("--as-ours", action="store_true",
                        help="hold the daemon to everything that only liveblkd promises")
    parser.add_argument("--liveblk", help="the program `liveblk`; default: beside the daemon")
    parser.add_argument("--matrix-seconds", type=float, default=60,
                        help="how long new images are made for the matrix of `liveblk img`")
    parser.add_argument("--matrix-seed", type=int, help="replay one image of the matrix")
    parser.add_argument("--matrix-problems", type=int, default=1,
                        help="end the matrix after so many problems")
    parser.add_argument("--tmp", default=None, help="folder for the images of the tests")
    return parser.parse_args(argv)


def located(name):
    path = shutil.which(name)
    return os.path.abspath(path) if path else None


def is_ours(path):
    """`-V` names liveblk first in ours; the peer's names itself."""
    try:
        text = subprocess.run([path, "-V"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return True
    return not text.startswith("qemu-storage-daemon version")


def plan(cases, subject, peer):
    """Expands the cases to single runs: (label, case, kind)."""
    runs = []
    for item in cases:
        label = f"{item.module}: {item.name.replace('_', ' ')}"
        if item.on == "ours":
            if subject.ours:
                runs.append((label, item, subject))
        elif item.on == "both":
            runs.append((f"{label} [{subject.name}]", item, subject))
            if subject.ours:
                runs.append((f"{label} [{peer.name}]", item, peer))
        else:
            runs.append((label, item, subject))
    return runs


async def run_all(runs, peer, options):
    from rig.cases import run_one
    counts = {True: 0, False: 0}

    async def one(label, item, kind):
        error, seconds, notes = await run_one(item, kind, peer, options)
        print(f"{'FAILED' if error else 'ok    '} {seconds:6.2f} s  {label}", flush=True)
        for note in notes:
            print(f"       note: {note}", flush=True)
        if error:
            print("       " + error.strip().replace("\n", "\n       "), flush=True)
        counts[not error] += 1

    turns = asyncio.Semaphore(BESIDE)

    async def beside(*run):
        async with turns:
            await one(*run)

    await asyncio.gather(*(beside(*run) for run in runs if run[1].beside))
    for run in runs:
        if not run[1].beside:
            await one(*run)
    return counts[True], counts[False]


def main():
    options = options_of(sys.argv[1:])
    from rig import cases, images
    from rig.daemon import Kind
    for name in sorted(os.listdir(HERE)):
        if re.fullmatch(r"test_\w+\.py", name):
            importlib.import_module(name[:-3])
    daemon, peer = located(options.daemon), located(options.peer)
    missing = [text for path, text in (
        (daemon, f"the daemon under test, {options.daemon}, is missing"),
        (peer, f"the peer, {options.peer}, is missing (package qemu-utils)")) if path is None]
    if missing:
        print("\n".join(missing))
        print(f"0 passed, {len(missing)} failed")
        return 1
    subject, peer = Kind(daemon, options.as_ours or is_ours(daemon)), Kind(peer, False)
    words = options.words.split()
    chosen = [run for run in plan(cases.CASES, subject, peer)
              if all(word in run[0] for word in words)]
    if options.list:
        print("\n".join(label for label, _, _ in chosen))
        return 0
    left_out = sum(1 for c in cases.CASES if c.on == "ours") if not subject.ours else 0
    print(f"under test: {subject.path}; peer: {peer.path}", flush=True)
    if left_out:
        print(f"the daemon under test is the peer: {left_out} tests of what only liveblkd "
              "promises are left out", flush=True)
    passed = failed = 0
    began = time.monotonic()
    turn = 0
    with tempfile.TemporaryDirectory(prefix="lb-t-", dir=options.tmp) as templates:
        images.use_template_folder(templates)
        while turn < options.repeat or time.monotonic() - began < options.minutes * 60:
            turn += 1
            p, f = asyncio.run(run_all(chosen, peer, options))
            passed, failed = passed + p, failed + f
    if not chosen:
        print(f"no test has all of these words: {options.words}")
        failed += 1
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
