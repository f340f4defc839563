"""Where our outcome of a scenario differs from the peer's on purpose, and what it is instead."""

from rig import transcript


class Difference:
    """Lines of the peer's outcome that are others in ours: `changed` maps peer's to ours.

    A value of None means that the line is absent in ours; a key that begins with "+" is a line
    only ours has.
    """

    def __init__(self, reason, changed):
        self.reason = reason
        self.changed = changed

    def require(self, found, wanted):
        expected = []
        used = set()
        for line in wanted:
            if line in self.changed:
                used.add(line)
                if self.changed[line] is not None:
                    expected.append(self.changed[line])
            else:
                expected.append(line)
        unused = [line for line in self.changed if line not in used]
        assert not unused, f"the recording has no such lines: {unused}"
        transcript.require_same(found, expected, f"beyond what is meant ({self.reason})")


DIFFERENCES = {
    "bitmaps/in-a-transaction": Difference(
        "bitmaps go with jobs that end together, which the peer refuses", {
            '["transaction", ["GenericError", "Action \'block-dirty-bitmap-clear\' does not '
            'support transaction property completion-mode = grouped"]]':
            '["transaction", ["GenericError", "Node \'nothing\' not found"]]'}),
}
