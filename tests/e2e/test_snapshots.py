"""Snapshots: single, several disks at one instant, and what is left when a creation fails."""

import os

from rig import images, transcript
from rig.cases import case
from rig.guest import GuestFailure, now, prove_cut, prove_latest
from rig.pattern import BLOCK, sequence_of

SIZE = 32 * images.MIB
FILLED = images.blocks(SIZE) // 2


async def two_disks(world):
    """Two exported disks of different content; returns (daemon, [uri, uri])."""
    d = await world.daemon()
    uris = []
    for i in range(2):
        path = await images.filled(world.path(f"a{i}.qcow2"), SIZE, FILLED, disk=i)
        await d.add_qcow2(f"node-{i}", path)
        uris.append(await d.export(f"node-{i}", name=f"disk{i}"))
    return d, uris


def snapshot_action(world, i, name=None, **extra):
    return {"type": "blockdev-snapshot-sync", "data": dict({
        "node-name": f"node-{i}", "snapshot-file": world.path(name or f"b{i}.qcow2"),
        "snapshot-node-name": f"over-{i}", "format": "qcow2"}, **extra)}


@case()
async def snapshot_under_writes_is_one_instant_and_the_guest_notices_nothing(world):
    a, b = await images.filled(world.path("a.qcow2"), SIZE, FILLED), world.path("b.qcow2")
    d = await world.daemon()
    await d.add_qcow2("node-A", a)
    guest = await world.guest(await d.export("node-A"), filled=FILLED)
    await guest.run(rate=4000)
    await guest.progress(200)
    t1 = now()
    await d.cmd("blockdev-snapshot-sync", node_name="node-A", snapshot_file=b,
                snapshot_node_name="node-B", format="qcow2")
    t2 = now()
    await guest.progress(200)
    await guest.stop()
    await guest.verify()
    log = await guest.log()
    await guest.end()
    await d.quit()
    _, out, _ = await images.tool("qemu-img", "info", "--output=json", b)
    assert '"backing-filename": "' + a + '"' in out and '"backing-filename-format": "qcow2"' in out
    for path in (a, b):
        await images.check(path)
    prove_cut(log, {0: await images.dump(a, world.path("a.raw"))}, t1, t2, FILLED)
    prove_latest(log, {0: await images.dump(b, world.path("b.raw"))}, FILLED)


@case()
async def ten_snapshots_in_a_row_under_writes_lose_nothing(world):
    a = await images.filled(world.path("s0.qcow2"), SIZE, FILLED)
    d = await world.daemon()
    await d.add_qcow2("s0", a)
    guest = await world.guest(await d.export("s0"), filled=FILLED)
    await guest.run(rate=4000)
    cuts = []
    for i in range(1, 11):
        await guest.progress(40)
        t1 = now()
        await d.cmd("blockdev-snapshot-sync", node_name=f"s{i - 1}",
                    snapshot_file=world.path(f"s{i}.qcow2"), snapshot_node_name=f"s{i}")
        cuts.append((t1, now()))
    await guest.progress(40)
    await guest.stop()
    await guest.verify()
    log = await guest.log()
    await guest.end()
    await d.quit()
    for i, (t1, t2) in enumerate(cuts):
        raw = await images.dump(world.path(f"s{i}.qcow2"), world.path("one.raw"))
        prove_cut(log, {0: raw}, t1, t2, FILLED)
    await images.check(world.path("s10.qcow2"))
    prove_latest(log, {0: await images.dump(world.path("s10.qcow2"), world.path("one.raw"))},
                 FILLED)


@case()
async def transaction_cuts_two_disks_at_one_instant_under_random_writes(world):
    d, uris = await two_disks(world)
    guest = await world.guest(*uris, filled=FILLED)
    await guest.run(rate=5000, depth=12)
    await guest.progress(200)
    t1 = now()
    await d.cmd("transaction", actions=[snapshot_action(world, i) for i in range(2)])
    t2 = now()
    await guest.progress(200)
    await guest.stop()
    await guest.verify()
    log = await guest.log()
    await guest.end()
    await d.quit()
    prove_cut(log, {i: await images.dump(world.path(f"a{i}.qcow2"), world.path(f"a{i}.raw"))
                    for i in range(2)}, t1, t2, FILLED)
    prove_latest(log, {i: await images.dump(world.path(f"b{i}.qcow2"), world.path(f"b{i}.raw"))
                       for i in range(2)}, FILLED)


@case()
async def a_counter_written_to_two_disks_in_turn_is_cut_once_over_both(world):
    d, uris = await two_disks(world)
    guest = await world.guest(*uris, filled=FILLED)
    await guest.run(rate=20000, alternate=True, flush_every=0)
    layers = []
    for turn in range(8):
        await guest.progress(50)
        actions = []
        for i in range(2):
            node = f"node-{i}" if turn == 0 else f"n{i}-{turn - 1}"
            actions.append({"type": "blockdev-snapshot-sync", "data": {
                "node-name": node, "snapshot-node-name": f"n{i}-{turn}",
                "snapshot-file": world.path(f"c{i}-{turn}.qcow2")}})
        await d.cmd("transaction", actions=actions)
        layers.append([world.path(f"a{i}.qcow2") if turn == 0
                       else world.path(f"c{i}-{turn - 1}.qcow2") for i in range(2)])
    await guest.stop()
    await guest.log()
    await guest.end()
    await d.quit()
    for turn, pair in enumerate(layers):
        counters = []
        for i, path in enumerate(pair):
            raw = await images.dump(path, world.path("one.raw"))
            with open(raw, "rb") as image:
                counters.append(sequence_of(image.read(BLOCK), i, 0))
        # write n goes to disk (n - 1) % 2 and is acknowledged before n + 1 is sent
        assert abs(counters[0] - counters[1]) == 1, \
            f"transaction {turn} cut the disks at different instants: {counters}"


@case()
async def a_transaction_of_backups_copies_two_disks_at_one_instant(world):
    d, uris = await two_disks(world)
    for i in range(2):
        e = await images.create(world.path(f"e{i}.qcow2"), SIZE)
        await d.add_qcow2(f"target-{i}", e)
    guest = await world.guest(*uris, filled=FILLED)
    await guest.run(rate=4000, depth=12)
    await guest.progress(100)
    t1 = now()
    await d.cmd("transaction", actions=[{"type": "blockdev-backup", "data": {
        "device": f"node-{i}", "target": f"target-{i}", "sync": "full", "job-id": f"j{i}"}}
        for i in range(2)], properties={"completion-mode": "grouped"})
    t2 = now()
    for i in range(2):
        done = await d.wait_event("BLOCK_JOB_COMPLETED", device=f"j{i}")
        assert "error" not in done, done
        await d.job_gone(f"j{i}")
    await guest.progress()
    await guest.stop()
    await guest.verify()
    log = await guest.log()
    await guest.end()
    await d.quit()
    prove_cut(log, {i: await images.dump(world.path(f"e{i}.qcow2"), world.path(f"e{i}.raw"))
                    for i in range(2)}, t1, t2, FILLED)


# -- failures -----------------------------------------------------------------------------------
async def graph(d):
    """The graph as the queries show it."""
    nodes = await d.cmd("query-named-block-nodes", flat=True)
    return sorted((n["node-name"], n["file"], n.get("backing_file"), n["ro"]) for n in nodes
                  if not n["node-name"].startswith("#"))


def files(world):
    return sorted(name for name in os.listdir(world.folder) if name.endswith(".qcow2"))


async def failing_transaction(world, second):
    """A transaction whose second snapshot cannot be made; the guest writes all the time.

    The peer sends writes to the first overlay already while the second is prepared, and drops it:
    writes that it acknowledged are lost. For the peer that is noted, for ours it is a failure.
    """
    d, uris = await two_disks(world)
    guest = await world.guest(*uris, filled=FILLED)
    await guest.run(rate=3000)
    await guest.progress()
    before, on_disk = await graph(d), files(world)
    error = await d.refused("transaction", actions=[snapshot_action(world, 0), second(world)])
    assert await graph(d) == before, "the graph changed"
    lost = False
    try:
        await guest.progress()
        await guest.stop()
        await guest.verify()
    except GuestFailure:
        if world.kind.ours:
            raise
        lost = True
    await guest.end()
    left = [name for name in files(world) if name not in on_disk]
    await d.quit()
    return error, left, lost


SECOND = {
    "a folder that does not exist": lambda w: snapshot_action(w, 1, "nowhere/b1.qcow2"),
    "a node that does not exist": lambda w: snapshot_action(w, 7),
    "a format that does not exist": lambda w: snapshot_action(w, 1, format="qcow9"),
    "a node name in use": lambda w: snapshot_action(w, 1, **{"snapshot-node-name": "node-0"}),
    "an action that aborts": lambda w: {"type": "abort", "data": {}},
}


@case("pair", timeout=90)
async def a_failed_transaction_changes_no_graph_and_answers_as_the_peer(world):
    for n, (name, second) in enumerate(SECOND.items()):
        errors = []
        for side_name, kind in (("x", world.kind), ("p", world.peer)):
            side = world.sub(f"{side_name}{n}", kind)
            (error_class, desc), left, lost = await failing_transaction(side, second)
            if lost:
                world.note(f"{kind.name} lost acknowledged writes: {name}")
            errors.append([error_class, desc.replace(side.folder, "FOLDER")])
            if kind.ours:
                assert not left, f"{name}: new files are left: {left}"
        if name == "a format that does not exist" and world.kind.ours:
            # the peer names its own driver table; the class and the format must be named
            assert "qcow9" in errors[0][1], errors[0]
            continue
        assert errors[0] == errors[1], f"{name}: {errors[0]} against the peer's {errors[1]}"


@case("ours")
async def a_file_that_exists_is_neither_truncated_nor_removed(world):
    d, uris = await two_disks(world)
    precious = world.path("b0.qcow2")
    for content in (b"precious bytes", open(world.path("a1.qcow2"), "rb").read(65536)):
        with open(precious, "wb") as f:
            f.write(content)
        before = await graph(d)
        one = await d.refused("blockdev-snapshot-sync", snapshot_action(world, 0)["data"])
        assert precious in one[1], f"the refusal names no file: {one}"
        await d.refused("transaction", actions=[snapshot_action(world, 1),
                                                snapshot_action(world, 0)])
        await d.refused("transaction", actions=[snapshot_action(world, 0),
                                                {"type": "abort", "data": {}}])
        assert await graph(d) == before
        with open(precious, "rb") as f:
            assert f.read() == content, "a file that existed was changed"
        assert not os.path.exists(world.path("b1.qcow2")), "a new file is left"
    assert uris
    await d.quit()


@case("ours")
async def snapshot_of_a_node_with_nothing_attached_keeps_the_overlay(world):
    a, b = await images.filled(world.path("a.qcow2"), SIZE, FILLED), world.path("b.qcow2")
    d = await world.daemon()
    await d.add_qcow2("node-A", a)
    await d.cmd("blockdev-snapshot-sync", node_name="node-A", snapshot_file=b,
                snapshot_node_name="node-B", format="qcow2")
    names = [n["node-name"] for n in await d.cmd("query-named-block-nodes", flat=True)]
    assert "node-B" in names and "node-A" in names, names
    guest = await world.guest(await d.export("node-B"), filled=FILLED)
    await guest.run(count=100, rate=5000)
    await guest.finish()
    await guest.verify()
    log = await guest.log()
    await guest.end()
    await d.quit()
    assert await images.digest(a) == await images.digest(
        await images.filled(world.path("orig.qcow2"), SIZE, FILLED)), "the base was written"
    prove_latest(log, {0: await images.dump(b, world.path("b.raw"))}, FILLED)


@case("ours")
async def a_snapshot_on_a_full_disk_leaves_no_file_and_no_change(world):
    small = await world.tmpfs("1m")
    with open(os.path.join(small, "filler"), "wb") as f:
        f.write(bytes(images.MIB - 65536 * 2))
    d, uris = await two_disks(world)
    guest = await world.guest(*uris, filled=FILLED)
    await guest.run(rate=3000)
    before = await graph(d)
    for i in (0, 1):
        action = snapshot_action(world, i, **{
            "snapshot-file": os.path.join(small, "over.qcow2")})
        text = (await d.refused("blockdev-snapshot-sync", action["data"]))[1]
        assert "No space left on device" in text and "over.qcow2" in text, text
        await d.refused("transaction", actions=[snapshot_action(world, 1 - i), action])
        assert await graph(d) == before
        assert os.listdir(small) == ["filler"], os.listdir(small)
        assert not [name for name in files(world) if name.startswith("b")], files(world)
    await guest.progress()
    await guest.stop()
    await guest.verify()
    await d.quit()


@case("ours")
async def an_overlay_made_here_in_another_folder_opens_again_by_its_header(world):
    os.mkdir(world.path("elsewhere"))
    over = world.path("elsewhere", "over.qcow2")
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    d = await world.daemon()
    await d.add_qcow2("node-A", a)
    await d.cmd("blockdev-snapshot-sync", node_name="node-A", snapshot_file=over,
                snapshot_node_name="node-B")
    await d.cmd("blockdev-del", node_name="node-B")
    await d.cmd("blockdev-del", node_name="node-A")
    await d.add_qcow2("again", over)
    guest = await world.guest(await d.export("again"), filled=FILLED)
    await guest.verify()
    await guest.end()
    await d.quit()


# -- target size --------------------------------------------------------------------------------
async def other_size(world, size):
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    e = await images.create(world.path("e.qcow2"), size)
    d = await world.daemon()
    await d.add_qcow2("node-A", a)
    await d.export("node-A")
    await d.add_qcow2("node-E", e)
    await d.refused("blockdev-backup", device="node-A", target="node-E", sync="full",
                    job_id="job0")
    await d.cmd("blockdev-mirror", device="node-A", target="node-E", sync="full", job_id="job1")
    done = await d.wait_event("BLOCK_JOB_COMPLETED", device="job1")
    assert "error" in done, done
    await d.job_gone("job1")
    await d.cmd("query-jobs")
    await d.quit()
    return d.record


@case("pair")
async def a_target_of_another_size_is_refused_with_the_text_of_the_peer(world):
    for n, size in enumerate((SIZE * 2, SIZE // 2)):
        ours, peers = world.sub(f"x{n}", world.kind), world.sub(f"p{n}", world.peer)
        one, other = await other_size(ours, size), await other_size(peers, size)
        transcript.require_same(transcript.replies(one, ours.folder),
                                transcript.replies(other, peers.folder), "replies")
        transcript.require_same(transcript.events(one, ours.folder),
                                transcript.events(other, peers.folder), "events")


@case("ours")
async def a_larger_target_is_accepted_when_asked_for_and_its_tail_reads_zero(world):
    a = await images.filled(world.path("a.qcow2"), SIZE, FILLED)
    e = await images.create(world.path("e.qcow2"), SIZE + 5 * images.MIB)
    small = await images.create(world.path("small.qcow2"), SIZE // 2)
    # the target has old content that must not show in the tail
    await images.tool("qemu-io", "-f", "qcow2", "-c", f"write -P 0xaa {SIZE} 5M", e)
    d = await world.daemon()
    await d.add_qcow2("node-A", a)
    await d.export("node-A")
    await d.add_qcow2("node-E", e)
    await d.add_qcow2("node-S", small)
    await d.refused("blockdev-backup", {
        "device": "node-A", "target": "node-S", "sync": "full", "job-id": "s",
        "allow-larger-target": True})
    await d.cmd("blockdev-backup", {
        "device": "node-A", "target": "node-E", "sync": "full", "job-id": "job0",
        "allow-larger-target": True})
    done = await d.wait_event("BLOCK_JOB_COMPLETED", device="job0")
    assert "error" not in done, done
    await d.job_gone()
    await d.quit()
    _, out, err = await images.tool("qemu-img", "compare", a, e)
    assert "Warning: Image size mismatch!" in out + err and "Images are identical." in out, out
