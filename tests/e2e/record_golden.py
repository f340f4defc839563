"""Records what qemu-storage-daemon answers to each scenario: golden/GROUP.json.

    record_golden.py [--peer PATH] [--times N] [-k WORDS] [--only-print]

Each scenario runs N times (3); one whose outcome changes from run to run is an error, because a
recording of it would compare chance. Recordings of scenarios that are not chosen stay.
"""

import argparse
import asyncio
import importlib
import json
import os
import shutil
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)


def load():
    """Imports all scenarios."""
    from rig import scenario
    for name in sorted(os.listdir(os.path.join(HERE, "scenarios"))):
        if name.endswith(".py") and name != "__init__.py":
            importlib.import_module("scenarios." + name[:-3])
    return scenario.SCENARIOS


async def once(function, kind, options):
    from rig.cases import World
    from rig.scenario import outcome
    folder = tempfile.mkdtemp(prefix="lb-", dir=options.tmp)
    world = World(kind, kind, folder, options)
    try:
        return await asyncio.wait_for(outcome(function, world), 60)
    finally:
        try:
            await world.close()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


async def record(options):
    from rig import scenario, transcript
    from rig.daemon import Kind
    kind = Kind(shutil.which(options.peer), False)
    problems = 0
    for name, function in load().items():
        if not all(word in name for word in options.words.split()):
            continue
        began = time.monotonic()
        try:
            first = await once(function, kind, options)
            for _ in range(options.times - 1):
                text = transcript.difference(
                    scenario.lines(await once(function, kind, options)), scenario.lines(first))
                if text:
                    raise AssertionError(f"changes from run to run:\n{text}")
        except (AssertionError, TypeError, asyncio.TimeoutError) as problem:
            print(f"{name}: {problem!r:.1500}".replace("\\n", "\n"))
            problems += 1
            continue
        print(f"{name}: {len(first['replies'])} replies, {len(first['events'])} events, "
              f"{time.monotonic() - began:.1f} s")
        if options.only_print:
            print("\n".join(scenario.lines(first)))
            continue
        store(scenario, name, first)
    return problems


def store(scenario, name, value):
    group, name = name.split("/")
    path = scenario.golden_path(group)
    known = scenario.golden(group) if os.path.exists(path) else {}
    known[name] = value
    with open(path, "w", encoding="utf-8") as out:
        out.write(written(known))


def written(outcomes):
    """JSON with one reply, event or image per line."""
    scenarios = []
    for name, value in sorted(outcomes.items()):
        parts = []
        for part in ("replies", "events"):
            rows = ",\n   ".join(json.dumps(row, sort_keys=True) for row in value[part])
            parts.append(f'  "{part}": [\n   {rows}]')
        rows = ",\n   ".join(f"{json.dumps(image)}: {json.dumps(look, sort_keys=True)}"
                             for image, look in sorted(value["images"].items()))
        parts.append(f'  "images": {{\n   {rows}}}')
        scenarios.append(f" {json.dumps(name)}: {{\n" + ",\n".join(parts) + "}")
    return "{\n" + ",\n".join(scenarios) + "}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--peer", default="qemu-storage-daemon")
    parser.add_argument("--times", type=int, default=3, help="runs of each scenario")
    parser.add_argument("-k", dest="words", default="", help="only those with all words")
    parser.add_argument("--only-print", action="store_true", help="write nothing")
    parser.add_argument("--tmp", default=None, help="folder for the images")
    problems = asyncio.run(record(parser.parse_args()))
    print(f"{problems} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
