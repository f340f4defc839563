"""x-blockdev-amend: nothing can be amended but keys of an encryption, as with the peer."""

from rig import images, transcript
from rig.cases import case
from rig.daemon import Refused

SIZE = 16 * images.MIB


async def amended(world):
    await images.create(world.path("a.qcow2"), SIZE)
    with open(world.path("r.raw"), "wb") as file:
        file.truncate(SIZE)
    d = await world.daemon()
    await d.add_qcow2("q", world.path("a.qcow2"))
    await d.cmd("blockdev-add", driver="raw", node_name="r",
                file={"driver": "file", "filename": world.path("r.raw")})
    before = d.mark()
    keys = {"format": "luks", "state": "active", "new-secret": "s"}
    attempts = [
        {},
        {"job-id": "j", "node-name": "nothing", "options": {"driver": "qcow2"}},
        {"job-id": "j", "node-name": "q", "options": {"driver": "raw"}},
        {"job-id": "j", "node-name": "r", "options": {"driver": "qcow2"}},
        {"job-id": "j", "node-name": "r", "options": {"driver": "raw"}},
        {"job-id": "1j", "node-name": "q", "options": {"driver": "qcow2"}},
        {"job-id": "j", "node-name": "q", "options": {"driver": "qcow2", "size": 5}},
        {"job-id": "j", "node-name": "q",
         "options": {"driver": "qcow2", "encrypt": {"format": "aes"}}},
        {"job-id": "j", "node-name": "q",
         "options": {"driver": "qcow2", "encrypt": {"format": "luks"}}},
        {"job-id": "j", "node-name": "q", "force": 3, "options": {"driver": "qcow2"}},
        {"job-id": "j", "node-name": "q", "options": {"driver": "qcow2"}},
        {"job-id": "j", "node-name": "q", "options": {"driver": "qcow2"}},
        {"job-id": "k", "node-name": "q", "force": True,
         "options": {"driver": "qcow2", "encrypt": keys}},
    ]
    steps = [("x-blockdev-amend", arguments) for arguments in attempts]
    steps += [("query-jobs", None), ("query-block-jobs", None),
              ("block-job-cancel", {"device": "j"}), ("job-cancel", {"id": "j"}),
              ("job-dismiss", {"id": "j"}), ("job-dismiss", {"id": "k"}), ("query-jobs", None)]
    for name, arguments in steps:
        try:
            await d.cmd(name, arguments)
        except Refused:
            pass  # the record keeps the answer
    record = list(d.record[before:])
    await d.quit()
    folder = world.folder
    return transcript.replies(record, folder) + transcript.events(record, folder)


@case("pair")
async def an_amend_ends_as_the_peers_does(world):
    ours = await amended(world.sub("x", world.kind))
    peers = await amended(world.sub("p", world.peer))
    transcript.require_same(ours, peers, "amend")
    assert any("image is not encrypted" in line for line in ours), ours
