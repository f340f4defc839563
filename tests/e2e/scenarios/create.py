"""blockdev-create, change-backing-file, blockdev-reopen, resize, thresholds."""

from rig.scenario import CLUSTER, MIB, SIZE, scenario


async def created(s, options, job="j"):
    at = s.d.mark()
    if await s.cmd("blockdev-create", job_id=job, options=options) is None:
        return
    await s.status("concluded", job, since=at)
    await s.cmd("query-jobs")
    await s.cmd("job-dismiss", id=job)


@scenario
async def a_file_and_an_image_in_it(s):
    await s.start()
    await created(s, {"driver": "file", "filename": s.path("n.qcow2"), "size": 0})
    await s.cmd("blockdev-add", driver="file", node_name="f", filename=s.path("n.qcow2"))
    await created(s, {"driver": "qcow2", "file": "f", "size": SIZE})
    await s.cmd("blockdev-add", driver="qcow2", node_name="n", file="f")
    await s.graph()


@scenario
async def options_of_qcow2(s):
    await s.start()
    for at, options in enumerate((
            {"cluster-size": 4096, "refcount-bits": 64},
            {"version": "v2"},
            {"lazy-refcounts": True},
            {"extended-l2": True, "cluster-size": 65536},
            {"compression-type": "zstd"},
            {"preallocation": "metadata"},
            {"backing-file": "x.qcow2", "backing-fmt": "qcow2"})):
        await created(s, {"driver": "file", "filename": s.path(f"n{at}.qcow2"), "size": 0})
        await s.cmd("blockdev-add", driver="file", node_name=f"f{at}",
                    filename=s.path(f"n{at}.qcow2"))
        await created(s, dict({"driver": "qcow2", "file": f"f{at}", "size": SIZE}, **options))


@scenario
async def refused_options(s):
    await s.start()
    await created(s, {"driver": "file", "filename": s.path("n.img"), "size": 0})
    await s.cmd("blockdev-add", driver="file", node_name="f", filename=s.path("n.img"))
    for options in (
            {"cluster-size": 1000}, {"cluster-size": 4 << 20}, {"refcount-bits": 3},
            {"refcount-bits": 128}, {"version": "v2", "refcount-bits": 8},
            {"version": "v2", "lazy-refcounts": True}, {"version": "v2", "extended-l2": True},
            {"extended-l2": True, "cluster-size": 4096}, {"size": 513}, {"size": -1},
            {"backing-fmt": "qcow2"}, {"backing-file": "x", "preallocation": "full"},
            {"data-file-raw": True}, {"version": "v4"},
            {"version": "v2", "compression-type": "zstd"}):
        await created(s, dict({"driver": "qcow2", "file": "f", "size": SIZE}, **options))
    await created(s, {"driver": "qcow2", "file": "nothing", "size": SIZE})
    await created(s, {"driver": "file", "filename": s.path("missing/n"), "size": 0})
    await created(s, {"driver": "nothing"})
    await s.cmd("blockdev-create", job_id="j")
    await s.cmd("query-jobs")


@scenario
async def the_string_of_a_backing_file(s):
    await s.start()
    await s.chain("abc")
    await s.cmd("change-backing-file", device="c", image_node_name="b", backing_file="x.qcow2")
    await s.cmd("change-backing-file", device="c", image_node_name="c", backing_file="")
    await s.cmd("change-backing-file", device="c", image_node_name="a", backing_file="y")
    await s.cmd("change-backing-file", device="nothing", image_node_name="c", backing_file="y")
    await s.cmd("change-backing-file", device="c", image_node_name="nothing", backing_file="y")
    await s.cmd("change-backing-file", device="b", image_node_name="b", backing_file="y")
    await s.graph()


@scenario
async def reopened(s):
    await s.start()
    await s.chain("ab")
    path = s.path("b.qcow2")
    file = {"driver": "file", "filename": path}
    for extra in (
            {"read-only": True}, {"read-only": False}, {"backing": None}, {"backing": "a"},
            {"backing": "b"}, {"backing": "nothing"}, {"file": {"driver": "file"}},
            {"lazy-refcounts": True}, {"discard": "unmap"},
            {"discard": "unmap", "detect-zeroes": "unmap"},
            {"node-name": "nothing"}, {"driver": "raw"}):
        options = dict({"driver": "qcow2", "node-name": "b", "file": file, "backing": "a"}, **extra)
        await s.cmd("blockdev-reopen", options=[options])
    await s.cmd("blockdev-reopen", options=[{"driver": "qcow2", "node-name": "b", "file": file}])
    await s.cmd("blockdev-reopen", options=[{"driver": "qcow2", "file": file}])
    await s.graph()


@scenario
async def grown_and_shrunk(s):
    await s.start()
    await s.chain("a")
    for size in (16 * MIB, 4 * MIB, 1000, -1, 0, 16 * MIB):
        await s.cmd("block_resize", node_name="a", size=size)
    await s.cmd("block_resize", node_name="nothing", size=MIB)
    await s.cmd("block_resize", size=MIB)
    await s.cmd("block_resize", node_name="a", device="a", size=MIB)


@scenario
async def a_threshold_that_is_passed_once(s):
    await s.start()
    await s.chain("a")
    await s.export("a")
    await s.cmd("block-set-write-threshold", node_name="nothing", write_threshold=MIB)
    await s.cmd("block-set-write-threshold", node_name="a", write_threshold=4 * MIB)
    await s.write("a", (0x61, MIB, CLUSTER))
    await s.write("a", (0x61, 4 * MIB - 512, 1024))
    await s.event("BLOCK_WRITE_THRESHOLD")
    await s.write("a", (0x62, 5 * MIB, CLUSTER))


@scenario
async def active_and_inactive(s):
    await s.start()
    await s.chain("ab")
    await s.cmd("blockdev-set-active", node_name="a", active=False)
    await s.cmd("blockdev-set-active", node_name="b", active=False)
    await s.cmd("blockdev-set-active", node_name="nothing", active=False)
    await s.cmd("block-export-add", {"type": "nbd", "id": "e", "node-name": "b", "writable": True})
    await s.cmd("blockdev-set-active", node_name="b", active=True)
    await s.cmd("blockdev-set-active", active=False)
    await s.cmd("blockdev-set-active", active=True)
    await s.graph()
