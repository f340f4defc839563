"""One script on two daemons, without guests: replies, event order and images must be equal."""

from rig import images, transcript
from rig.daemon import Refused

SIZE = 8 * images.MIB
FILLED = images.blocks(SIZE) // 2


class Side:
    """One daemon with a filled disk `a`, exported for writing, in a folder of its own."""

    def __init__(self, world, d):
        self.world = world
        self.d = d
        self.images = {}

    async def tell(self, command, arguments=None, /, **kw):
        """Executes a command that may be refused; the record keeps the answer."""
        try:
            return await self.d.cmd(command, dict(arguments or {}, **kw))
        except Refused as refusal:
            return refusal

    async def node(self, name, size=SIZE, backing=None, **extra):
        """A new empty image as a node of the same name."""
        path = await images.create(self.world.path(name + ".qcow2"), size)
        await self.d.add_qcow2(name, path, **dict({"backing": backing}, **extra))
        return path

    async def io(self, *commands, name="a"):
        """Commands of qemu-io on the export `name`."""
        words = [word for command in commands for word in ("-c", command)]
        return await images.tool("qemu-io", "-f", "raw", *words, self.d.uri(name), check=False)

    async def status(self, job, status, since=0):
        await self.d.wait_event("JOB_STATUS_CHANGE", id=job, status=status, since=since)

    async def keep(self, *names):
        """The content of these images at the end belongs to what is compared."""
        self.images.update(dict.fromkeys(names))


async def same(world, script, numbers=True, order=True):
    """Runs the script on both daemons; returns our side.

    `order=False` compares the events as a set: of jobs that start at once, the peer's drains decide
    which one is seen to run first.
    """
    sides = []
    for name, kind in (("x", world.kind), ("p", world.peer)):
        folder = world.sub(name, kind)
        path = await images.filled(folder.path("a.qcow2"), SIZE, FILLED)
        d = await folder.daemon()
        await d.add_qcow2("a", path)
        await d.export("a", name="a")
        side = Side(folder, d)
        before = d.mark()
        await script(side)
        await d.quit()
        record = d.record[before:]
        for image in side.images:
            side.images[image] = await images.digest(folder.path(image + ".qcow2"))
        for image in ["a", *side.images]:
            await images.check(folder.path(image + ".qcow2"))
        sides.append((side, record))
    (ours, record), (peers, peer_record) = sides
    one, other = ours.world.folder, peers.world.folder
    transcript.require_same(transcript.replies(record, one, numbers),
                            transcript.replies(peer_record, other, numbers), "replies")
    lists = [transcript.events(record, one, numbers),
             transcript.events(peer_record, other, numbers)]
    if not order:
        lists = [sorted(lines) for lines in lists]
    transcript.require_same(*lists, "events")
    assert ours.images == peers.images, f"images differ: {ours.images}, {peers.images}"
    return ours
