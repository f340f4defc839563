"""blockdev-create and the small verbs on nodes: replies, events and files are the peer's."""

import json
import os

from rig import images, transcript
from rig.cases import case
from rig.daemon import Refused

MIB = images.MIB


async def attempt(d, name, arguments):
    """Runs a command whose answer is compared; a refusal stays in the record."""
    try:
        return await d.cmd(name, arguments)
    except Refused:
        return None


async def created(d, job, options, dismiss=True):
    """One creation from its start to its end; what query-jobs says of it is in the record."""
    since = d.mark()
    if await attempt(d, "blockdev-create", {"job-id": job, "options": options}) is None:
        return
    await d.wait_event("JOB_STATUS_CHANGE", id=job, status="concluded", since=since)
    await d.cmd("query-jobs")
    if dismiss:
        await d.cmd("job-dismiss", id=job)
        await d.wait_event("JOB_STATUS_CHANGE", id=job, status="null", since=since)


def lines(d, folder):
    """Replies and events apart from each other: which comes first is a matter of speed."""
    return transcript.replies(d.record, folder) + transcript.events(d.record, folder)


async def compared(world, script, what):
    found = []
    for name, kind in (("x", world.kind), ("p", world.peer)):
        sub = world.sub(name, kind)
        found.append(await script(sub))
    transcript.require_same(found[0], found[1], what)
    return found[0]


async def new_files(world):
    d = await world.daemon()
    path = world.path("a")
    file = {"driver": "file", "filename": path}
    attempts = [
        {**file, "size": 65537},
        {**file, "size": 1 << 20, "preallocation": "falloc"},
        {**file, "size": 1 << 20, "preallocation": "full"},
        {**file, "size": 1 << 20, "preallocation": "metadata"},
        {**file, "size": 1 << 20, "nocow": False, "extent-size-hint": 65536},
        {**file, "filename": "/nonexistent/x", "size": 1 << 20},
        {**file, "filename": world.folder + "/", "size": 1 << 20},
        {**file, "size": 1 << 63},
        {**file, "size": (1 << 63) - 1},
        {**file, "size": -1},
        {**file, "size": "1M"},
        {**file, "size": 1.5},
        {**file},
        {**file, "size": 512, "preallocation": "some"},
        {**file, "size": 512, "cluster-size": 512},
        {**file, "size": 0},
        {**file, "size": 4096},
    ]
    for number, options in enumerate(attempts):
        await created(d, f"j{number}", options)
    for arguments in ({}, {"job-id": "j"}, {"job-id": "j", "options": {}},
                      {"job-id": "1j", "options": {**file, "size": 512}},
                      {"job-id": "", "options": {**file, "size": 512}},
                      {"job-id": "j", "options": {"driver": "other"}}):
        await attempt(d, "blockdev-create", arguments)
    await created(d, "kept", {**file, "size": 8192}, dismiss=False)
    for name, arguments in (("blockdev-create", {"job-id": "kept", "options": {**file, "size": 5}}),
                            ("job-cancel", {"id": "kept"}), ("job-pause", {"id": "kept"}),
                            ("job-complete", {"id": "kept"}), ("job-finalize", {"id": "kept"}),
                            ("block-job-cancel", {"device": "kept"}), ("query-block-jobs", {}),
                            ("job-dismiss", {"id": "kept"}), ("job-dismiss", {"id": "kept"})):
        await attempt(d, name, arguments)
    assert os.path.getsize(path) == 8192
    await d.quit()
    return lines(d, world.folder)


@case("pair")
async def a_file_is_made_as_by_the_peer(world):
    await compared(world, new_files, "creation of files")


async def new_images(world):
    d = await world.daemon()
    await created(d, "f", {"driver": "file", "filename": world.path("a"), "size": 0})
    await created(d, "g", {"driver": "file", "filename": world.path("df"), "size": 0})
    await d.cmd("blockdev-add", driver="file", node_name="f", filename=world.path("a"))
    await d.cmd("blockdev-add", driver="file", node_name="df", filename=world.path("df"))
    await d.cmd("blockdev-add", driver="file", node_name="ro", filename=world.path("a"),
                read_only=True)
    one = {"driver": "qcow2", "file": "f", "size": MIB}
    attempts = [
        one,
        {**one, "size": 513}, {**one, "cluster-size": 1000}, {**one, "cluster-size": 4 * MIB},
        {**one, "cluster-size": 0}, {**one, "size": 1 << 62}, {**one, "size": 1 << 63},
        {**one, "version": "v2", "lazy-refcounts": True},
        {**one, "version": "v2", "refcount-bits": 1}, {**one, "refcount-bits": 3},
        {**one, "refcount-bits": 128}, {**one, "refcount-bits": 0}, {**one, "refcount-bits": -1},
        {**one, "backing-fmt": "raw"}, {**one, "backing-file": "no", "backing-fmt": "raw"},
        {**one, "backing-file": "no"}, {**one, "backing-file": "no", "preallocation": "full"},
        {**one, "backing-file": "x" * 1024}, {**one, "backing-file": "x" * 1023},
        {**one, "backing-file": "x" * 1023, "cluster-size": 512},
        {**one, "extended-l2": True, "version": "v2"},
        {**one, "extended-l2": True, "cluster-size": 8192},
        {**one, "extended-l2": True, "preallocation": "full"},
        {**one, "compression-type": "zstd", "version": "v2"},
        {**one, "compression-type": "zstd"}, {**one, "data-file-raw": True},
        {**one, "data-file": "no"}, {**one, "version": "v1"}, {**one, "cluster-size": "64k"},
        {"driver": "qcow2", "file": "f"}, {**one, "file": "no"}, {**one, "file": "ro"},
        {**one, "data-file": "df"}, {**one, "data-file": "df", "data-file-raw": True},
        {**one, "data-file": "df", "version": "v2"},
        {**one, "data-file": "df", "data-file-raw": True, "backing-file": "x"},
        {**one, "data-file": {"driver": "file", "filename": world.path("no")}},
        {**one, "file": {"driver": "file", "filename": world.path("no")}},
        {**one, "preallocation": "metadata", "lazy-refcounts": True, "refcount-bits": 8},
    ]
    for number, options in enumerate(attempts):
        await created(d, f"j{number}", options)
    await d.cmd("blockdev-add", driver="qcow2", node_name="q", file="f")
    await created(d, "busy", one)
    await d.cmd("blockdev-del", node_name="q")
    await created(d, "again", one)
    await d.quit()
    code, info, _ = await images.tool("qemu-img", "info", "--output=json", world.path("a"))
    found = json.loads(info)
    await images.tool("qemu-img", "check", world.path("a"))
    facts = [found["format"], found["virtual-size"], found["format-specific"]["data"]]
    return lines(d, world.folder) + [json.dumps(facts, sort_keys=True)]


@case("pair")
async def an_image_is_made_as_by_the_peer(world):
    await compared(world, new_images, "creation of images")


async def opened_in_line(world):
    """A file that is opened for the creation is given back afterwards."""
    d = await world.daemon()
    path = world.path("a")
    await created(d, "f", {"driver": "file", "filename": path, "size": 0})
    line = {"driver": "file", "filename": path}
    for job in ("one", "two"):
        await created(d, job, {"driver": "qcow2", "file": line, "size": MIB})
    await d.cmd("query-named-block-nodes", flat=True)
    await d.add_qcow2("q", path)
    await created(d, "three", {"driver": "qcow2", "file": line, "size": MIB})
    await created(d, "four", {"driver": "file", "filename": path, "size": 0})
    await d.quit()
    await images.tool("qemu-img", "check", path)
    return lines(d, world.folder)


@case("pair")
async def a_file_named_in_line_is_given_back(world):
    await compared(world, opened_in_line, "creation in a file named in line")


@case("ours")
async def raw_images_can_be_made_too(world):
    d = await world.daemon()
    path = world.path("r")
    await created(d, "f", {"driver": "file", "filename": path, "size": 0})
    await d.cmd("blockdev-add", driver="file", node_name="f", filename=path)
    await created(d, "r", {"driver": "raw", "file": "f", "size": MIB})
    assert os.path.getsize(path) == MIB
    await created(d, "m", {"driver": "raw", "file": "f", "size": MIB, "preallocation": "metadata"})
    jobs = [row[2] for row in d.record if row[0] == "reply" and row[1] == "query-jobs"]
    assert "preallocation" in jobs[-1][0]["error"], jobs[-1]


async def chain(world, d, names="abc"):
    below = None
    for name in names:
        path = world.path(name + ".qcow2")
        await images.create(path, 4 * MIB, backing=below and world.path(below + ".qcow2"))
        await d.add_qcow2(name, path, backing=below)
        below = name
    await images.create(world.path("x.qcow2"), 4 * MIB)
    await d.add_qcow2("x", world.path("x.qcow2"), backing=None)


async def references(world):
    d = await world.daemon()
    await chain(world, d)
    found = []
    for device, node, name in (
            ("no", "c", "n"), ("c", "no", "n"), ("b", "b", "n"), ("c", "a", "n"), ("x", "x", "n"),
            ("x", "c", "n"), ("c", "c", "new-name"), ("c", "b", "new-b"), ("c", "c", "y" * 1024),
            ("c", "c", "y" * 1023), ("c", "c", ""), ("c", "c", world.path("b.qcow2"))):
        await attempt(d, "change-backing-file",
                      {"device": device, "image-node-name": node, "backing-file": name})
        for image in "bc":
            _, info, _ = await images.tool("qemu-img", "info", "-U", "--output=json",
                                           world.path(image + ".qcow2"))
            info = json.loads(info)
            found.append([info.get("backing-filename", "none").replace(world.folder, "FOLDER"),
                          info.get("backing-filename-format")])
    await attempt(d, "change-backing-file", {"device": "c"})
    await d.export("c")
    await attempt(d, "change-backing-file",
                  {"device": "c", "image-node-name": "c", "backing-file": "under-export"})
    await d.cmd("blockdev-mirror", job_id="m", device="c", target="x", sync="none")
    await d.wait_event("BLOCK_JOB_READY")
    await attempt(d, "change-backing-file",
                  {"device": "c", "image-node-name": "c", "backing-file": "under-mirror"})
    await d.cmd("job-cancel", id="m")
    await d.job_gone("m")
    await d.quit()
    return transcript.replies(d.record, world.folder) + [json.dumps(found)]


@case("pair")
async def a_backing_reference_is_changed_as_by_the_peer(world):
    await compared(world, references, "change-backing-file")


async def thresholds(world):
    d = await world.daemon()
    await images.create(world.path("x.qcow2"), 4 * MIB)
    await d.cmd("blockdev-add", driver="file", node_name="f", filename=world.path("x.qcow2"))
    await d.cmd("blockdev-add", driver="qcow2", node_name="x", file="f")
    uri = await d.export("x")

    async def io(*commands):
        words = [word for command in commands for word in ("-c", command)]
        await images.tool("qemu-io", "-f", "raw", *words, uri)
        nodes = await d.cmd("query-named-block-nodes", flat=True, recorded=False)
        return [[row["node-name"], row["write_threshold"]] for row in nodes]

    found = []
    for node, value in (("no", 5), ("x", MIB), ("f", 400000), ("x", 1.5), ("x", "5")):
        await attempt(d, "block-set-write-threshold",
                      {"node-name": node, "write-threshold": value})
    found.append(await io("write 1048064 512", "flush"))
    found.append(await io("write 1048064 1024", "flush"))
    for step in ("write -z 0 64k", "discard 0 64k", "write 0 4096", "write 0 4097"):
        await attempt(d, "block-set-write-threshold", {"node-name": "x", "write-threshold": 4096})
        found.append(await io(step))
    for value in (-1, 0, 18446744073709551615):
        await attempt(d, "block-set-write-threshold",
                      {"node-name": "x", "write-threshold": value})
        found.append(await io("read 0 512"))
    stats = await d.cmd("query-blockstats", query_nodes=True, recorded=False)
    found.append([[row["node-name"], row["stats"]["wr_highest_offset"]] for row in stats
                  if row["node-name"] == "x"])
    await d.quit()
    events = [line for line in transcript.events(d.record, world.folder)
              if "THRESHOLD" in line]
    return transcript.replies(d.record, world.folder) + events + [json.dumps(f) for f in found]


@case("pair")
async def a_write_beyond_the_mark_is_told_as_by_the_peer(world):
    found = await compared(world, thresholds, "block-set-write-threshold")
    assert any('"amount-exceeded": 512' in line for line in found), found


async def zeroes(world):
    found = []
    for mode in ("off", "on", "unmap"):
        d = await world.daemon(name=mode)
        path = world.path(mode + ".qcow2")
        await images.create(path, 4 * MIB)
        await d.add_qcow2("z", path, **{"detect-zeroes": mode, "discard": "unmap"})
        uri = await d.export("z")
        await images.tool("qemu-io", "-f", "raw", "-c", "write -P 5 0 1M", "-c",
                          "write -P 0 0 128k", "-c", "write -P 0 2M 64k", "-c",
                          "write -f -P 0 3M 64k", "-c", "flush", uri)
        stats = await d.cmd("query-blockstats", query_nodes=True, recorded=False)
        found.append(next(row["driver-specific"] for row in stats if "driver-specific" in row))
        nodes = await d.cmd("query-named-block-nodes", flat=True, recorded=False)
        found.append([row["detect_zeroes"] for row in nodes])
        await d.quit()
        _, text, _ = await images.tool("qemu-img", "map", "--output=json", path)
        found.append([[run["start"], run["length"], run["zero"], run["data"], run["present"]]
                      for run in json.loads(text)])
    return [json.dumps(line, sort_keys=True) for line in found]


@case("pair")
async def zeroes_are_found_in_writes_as_by_the_peer(world):
    await compared(world, zeroes, "detect-zeroes")


async def sizes(world):
    d = await world.daemon()
    await chain(world, d)
    for arguments in ({"node-name": "no", "size": 5}, {"size": 5}, {"device": "c", "size": MIB},
                      {"device": "c", "node-name": "c", "size": 8 * MIB},
                      {"node-name": "c", "size": -1}, {"node-name": "c", "size": 0},
                      {"node-name": "c", "size": 513}, {"node-name": "c", "size": 8 * MIB},
                      {"node-name": "c", "size": 4 * MIB}, {"node-name": "b", "size": 8 * MIB},
                      {"node-name": "c", "size": 1 << 62}):
        await attempt(d, "block_resize", arguments)
    nodes = await d.cmd("query-named-block-nodes", flat=True, recorded=False)
    found = [[row["node-name"], row["image"]["virtual-size"]] for row in nodes
             if row["drv"] == "qcow2"]
    await d.cmd("blockdev-mirror", job_id="m", device="c", target="x", sync="none")
    await d.wait_event("BLOCK_JOB_READY")
    await attempt(d, "block_resize", {"node-name": "x", "size": 8 * MIB})
    await d.cmd("job-cancel", id="m")
    await d.job_gone("m")
    await d.quit()
    return transcript.replies(d.record, world.folder) + [json.dumps(found)]


@case("pair")
async def a_size_is_changed_as_by_the_peer(world):
    await compared(world, sizes, "block_resize")


@case("ours")
async def a_disk_grows_under_a_front_door_and_a_backup_and_does_not_shrink(world):
    d = await world.daemon()
    for name in "ct":
        await images.create(world.path(name), 4 * MIB)
        await d.add_qcow2(name, world.path(name))
    uri = await d.export("c")
    await d.cmd("blockdev-backup", job_id="b", device="c", target="t", sync="none")
    await d.cmd("block_resize", node_name="c", size=8 * MIB)
    _, desc = await d.refused("block_resize", node_name="c", size=4 * MIB)
    assert "exp-disk" in desc or "'b'" in desc or "backup" in desc, desc
    await images.tool("qemu-io", "-f", "raw", "-c", "write -P 7 3M 4M", "-c", "read -P 7 3M 4M",
                      uri)
    await d.cmd("job-cancel", id="b")
    await d.job_gone("b")
    await d.quit()
    await images.tool("qemu-img", "check", world.path("c"))
    await images.tool("qemu-io", "-r", "-c", "read -P 0 3M 1M", world.path("t"))


async def graph(world):
    d = await world.daemon()
    await chain(world, d)
    await d.export("c")
    shape = await d.cmd("x-debug-query-block-graph", recorded=False)
    names = {row["id"]: row["name"] or row["type"] for row in shape["nodes"]}
    auto = lambda name: "#block" if name.startswith("#block") else name
    edges = sorted([auto(names[edge["parent"]]), auto(names[edge["child"]]), edge["name"]]
                   + ([edge["perm"], edge["shared-perm"]] if edge["name"] != "backing" else [])
                   for edge in shape["edges"])
    kinds = sorted([row["type"], auto(row["name"])] for row in shape["nodes"])
    return [json.dumps(row) for row in kinds + edges]


@case("pair")
async def the_graph_is_shown_as_by_the_peer(world):
    await compared(world, graph, "x-debug-query-block-graph")
