"""`liveblk img` and qemu-img on the same images, in both directions, over the matrix of formats.

The ordinary run is bounded by time (`--matrix-seconds`, 60); the seeds go on from where `--seed`
says, and a failure prints the seed that replays it: `tests/run e2e -k matrix --matrix-seed N`.
"""

import os
import shutil
import time

from rig.cases import case
from rig.img_matrix import DIFFERENCES, REFUSED, ImageWorld

ROUNDS = 4


@case(on="ours", timeout=24 * 3600)
async def images_of_both_are_the_same_to_both_over_the_matrix(world):
    liveblk = world.liveblk()
    began = time.monotonic()
    one = world.options.matrix_seed
    first = one if one is not None else world.options.seed * 1_000_000
    problems, counts, worlds = [], {}, 0
    while one is None or worlds == 0:
        if worlds and time.monotonic() - began > world.options.matrix_seconds:
            break
        folder = world.path(f"w{first + worlds}")
        os.mkdir(folder)
        image = ImageWorld(folder, first + worlds, liveblk)
        worlds += 1
        try:
            await image.run(ROUNDS)
            shutil.rmtree(folder)
        except AssertionError as problem:
            problems.append(str(problem))
            if len(problems) >= world.options.matrix_problems:
                break
        for kind, count in image.counts.items():
            counts[kind] = counts.get(kind, 0) + count
    seconds = time.monotonic() - began
    done = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    world.note(f"{worlds} images from seed {first} on, {ROUNDS} rounds each, {seconds:.0f} s: "
               f"{done}")
    for what, reason in DIFFERENCES:
        world.note(f"known difference: {what}: {reason}")
    for _, what, reason in REFUSED:
        world.note(f"refused by ours: {what}: {reason}")
    assert not problems, "\n\n".join(problems)
