"""What the queries answer, field by field, and the schema that clients probe."""

import json

from rig import images, transcript
from rig.cases import case

SIZE = 16 * images.MIB
FILLED = images.blocks(SIZE) // 2

# fields of a node that depend on how a file was allocated, not on what the graph is
VOLATILE = {"actual-size", "dirty-flag", "format-specific", "children"}


def stable(value):
    if isinstance(value, dict):
        return {k: stable(v) for k, v in value.items() if k not in VOLATILE}
    if isinstance(value, list):
        return [stable(v) for v in value]
    return value


async def asked(world):
    await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    d = await world.daemon()
    await d.add_qcow2("node-A", world.path("a.qcow2"))
    await d.export("node-A")
    await d.cmd("blockdev-snapshot-sync", node_name="node-A", snapshot_node_name="node-B",
                snapshot_file=world.path("b.qcow2"))
    await images.create(world.path("e.qcow2"), SIZE)
    await d.add_qcow2("node-E", world.path("e.qcow2"))
    answers = {
        "version": (await d.cmd("query-version"))["qemu"],
        "exports": await d.cmd("query-block-exports"),
        "jobs": [await d.cmd("query-jobs"), await d.cmd("query-block-jobs")],
        "block": await d.cmd("query-block"),
        "flat": stable(await d.cmd("query-named-block-nodes", flat=True)),
        "nested": stable(await d.cmd("query-named-block-nodes")),
    }
    await d.cmd("blockdev-backup", device="node-B", target="node-E", sync="full", job_id="j",
                speed=1)
    job = (await d.cmd("query-block-jobs"))[0]
    answers["block job"] = sorted(job)
    answers["job"] = sorted((await d.cmd("query-jobs"))[0])
    await d.cmd("job-cancel", id="j")
    await d.job_gone("j")
    names = {c["name"] for c in await d.cmd("query-commands")}
    schema = await d.cmd("query-qmp-schema")
    await d.quit()
    text = json.dumps(answers, indent=1, sort_keys=True).replace(world.folder, "FOLDER")
    return text.split("\n"), names, schema


# every command of the first priority and those of this stage
COMMANDS = """qmp_capabilities query-version query-commands query-qmp-schema quit blockdev-add
blockdev-del query-named-block-nodes query-jobs query-block-jobs job-pause job-resume job-cancel
job-complete job-finalize job-dismiss nbd-server-start block-export-add block-export-del
query-block-exports blockdev-snapshot-sync transaction blockdev-mirror blockdev-backup
block-job-cancel block-job-set-speed block-job-complete block-job-pause block-job-resume
block-job-finalize block-job-dismiss block-job-change""".split()


@case("pair")
async def queries_answer_what_the_peer_answers(world):
    ours, _, _ = await asked(world.sub("x", world.kind))
    peers, _, _ = await asked(world.sub("p", world.peer))
    transcript.require_same([transcript.AUTO_NAME.sub("#block", line) for line in ours],
                            [transcript.AUTO_NAME.sub("#block", line) for line in peers],
                            "queries")


@case("both")
async def the_schema_tells_the_commands_that_there_are(world):
    _, names, schema = await asked(world)
    missing = [name for name in COMMANDS if name not in names]
    assert not missing, f"not in query-commands: {missing}"
    in_schema = {e["name"] for e in schema if e["meta-type"] == "command"}
    assert in_schema == names, in_schema ^ names
    known = {e["name"] for e in schema}
    for entity in schema:
        for key in ("arg-type", "ret-type", "element-type"):
            assert entity.get(key, next(iter(known))) in known, entity
        for member in entity.get("members", []):
            if isinstance(member, dict) and "type" in member:
                assert member["type"] in known, (entity["name"], member)
    events = {e["name"] for e in schema if e["meta-type"] == "event"}
    assert {"JOB_STATUS_CHANGE", "BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED",
            "BLOCK_JOB_PENDING", "BLOCK_JOB_ERROR", "BLOCK_EXPORT_DELETED"} <= events, events
