"""Replies, events and images of every scenario equal what the peer was recorded to do.

The recordings are made by record_golden.py. Where ours differs on purpose, DIFFERENCES names the
scenario and the reason, and the test holds the difference to what is said there.
"""

import record_golden
from rig import scenario, transcript
from rig.cases import CASES, Case

from golden_differences import DIFFERENCES


def compare(name, function):
    async def check(world):
        group, short = name.split("/")
        wanted = scenario.lines(scenario.golden(group)[short])
        found = scenario.lines(await scenario.outcome(function, world))
        difference = DIFFERENCES.get(name) if world.kind.ours else None
        if difference is None:
            transcript.require_same(found, wanted, name)
        else:
            difference.require(found, wanted)
    check.__module__ = "test_golden"
    check.__name__ = name.replace("-", "_").replace("/", " ")
    return check


for _name, _function in record_golden.load().items():
    CASES.append(Case(compare(_name, _function), "ours", 60, beside=True))
