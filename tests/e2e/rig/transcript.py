"""Compares what two daemons said.

The only normalisation: ids that differ by nature (`#block…` names), timestamps, folder names, and
paused/running (standby/ready) pairs that no verb of the user caused; these are dropped on both
sides. Where a guest writes during a job, the numbers of progress depend on the scheduling of two
processes; `numbers=False` then compares only whether `offset` reached `len`.
"""

import difflib
import json
import re

PAUSE = {"block-job-pause", "job-pause"}
RESUME = {"block-job-resume", "job-resume"}
AUTO_NAME = re.compile(r"#block[0-9]+")
NUMBERS = ("len", "offset", "current-progress", "total-progress")


def _clean(value, folder, numbers):
    if isinstance(value, dict):
        out = {}
        for key, inner in value.items():
            if key == "timestamp":
                continue
            out[key] = _clean(inner, folder, numbers)
        if not numbers:
            if "len" in out and "offset" in out:
                out["offset"] = "= len" if out["offset"] == out["len"] else "< len"
                out["len"] = "a number"
            if "current-progress" in out:
                out["current-progress"] = out["total-progress"] = "a number"
            if "busy" in out:
                out["busy"] = "either"
        return out
    if isinstance(value, (list, tuple)):
        return [_clean(v, folder, numbers) for v in value]
    if isinstance(value, str):
        return AUTO_NAME.sub("#block", value.replace(folder, "FOLDER"))
    return value


def without_own_pauses(record):
    """Drops the pause/resume pairs that the daemon made by itself (drains of graph changes)."""
    user_paused = set()
    held = {}
    dropped = set()
    for at, (what, name, data) in enumerate(record):
        if what == "sent" and name in PAUSE:
            user_paused.add(data.get("id") or data.get("device"))
        elif what == "sent" and name in RESUME:
            user_paused.discard(data.get("id") or data.get("device"))
        elif what == "event" and name == "JOB_STATUS_CHANGE":
            job, status = data["id"], data["status"]
            back = {"paused": "running", "standby": "ready"}
            if status in back and job not in user_paused:
                held[job] = (at, back[status])
            else:
                if job in held and held[job][1] == status:
                    dropped |= {held[job][0], at}
                held.pop(job, None)
    return [row for at, row in enumerate(record) if at not in dropped]


def events(record, folder, numbers=True):
    """The events as comparable lines."""
    return [json.dumps([name, _clean(data, folder, numbers)], sort_keys=True)
            for what, name, data in without_own_pauses(record) if what == "event"]


def replies(record, folder, numbers=True):
    """Commands and their answers as comparable lines."""
    return [json.dumps([what, name, _clean(data, folder, numbers)], sort_keys=True)
            for what, name, data in record if what in ("reply", "error")]


def difference(ours, peers):
    """Empty when equal, else a readable diff."""
    if ours == peers:
        return ""
    return "\n".join(difflib.unified_diff(peers, ours, "peer", "under test", lineterm="", n=2))


def require_same(ours, peers, what):
    text = difference(ours, peers)
    if text:
        raise AssertionError(f"{what} differ:\n{text}")
