"""Where our outcome of a scenario differs from the peer's on purpose, and what it is instead."""

from rig import transcript


class Difference:
    """Lines of the peer's outcome that are others in ours: `changed` maps peer's to ours.

    A value of None means that the line is absent in ours, a list that there are several.
    `any_order` compares the lines as sets: where two jobs begin in one command, the order of
    their events is the drains' choice.
    """

    def __init__(self, reason, changed=None, any_order=False):
        self.reason = reason
        self.changed = changed or {}
        self.any_order = any_order

    def require(self, found, wanted):
        expected = []
        used = set()
        for line in wanted:
            if line in self.changed:
                used.add(line)
                ours = self.changed[line]
                expected += ours if isinstance(ours, list) else [ours] if ours else []
            else:
                expected.append(line)
        unused = [line for line in self.changed if line not in used]
        assert not unused, f"the recording has no such lines: {unused}"
        if self.any_order:
            found, expected = sorted(found), sorted(expected)
        transcript.require_same(found, expected, f"beyond what is meant ({self.reason})")


def kept(verb, ends, statuses, replies=()):
    """A file with content is refused as the target of `verb`, which the peer overwrites."""
    lost = [f'["JOB_STATUS_CHANGE", {{"id": "j", "status": "{status}"}}]' for status in statuses]
    changed = {line: None for line in [*lost, *ends, *replies]}
    changed[f'["{verb}", {{}}]'] = (
        f'["{verb}", ["GenericError", "Could not create \'FOLDER/t.qcow2\': the file exists and is '
        'not empty (remove it, or use mode \'existing\')"]]')
    changed['["t.qcow2", {"digest": "aab31b40c94ef404", "size": 8388608}]'] = (
        '["t.qcow2", {"digest": "3554697866378574", "size": 8388608}]')
    return Difference("a file that existed with content is never truncated", changed)


DIFFERENCES = {
    "backup/drive-backup-over-a-file-with-content": kept(
        "drive-backup", [
            '["BLOCK_JOB_COMPLETED", {"device": "j", "len": 8388608, "offset": 8388608, '
            '"speed": 0, "type": "backup"}]'],
        ("created", "running", "waiting", "pending", "concluded", "null")),
    "mirror/drive-mirror-over-a-file-with-content": kept(
        "drive-mirror", [
            f'["BLOCK_JOB_{end}", {{"device": "j", "len": 2228224, "offset": 2228224, '
            '"speed": 0, "type": "mirror"}]' for end in ("READY", "COMPLETED")],
        ("created", "running", "ready", "waiting", "pending", "concluded", "null"),
        ['["block-job-cancel", {}]']),
    "backup/drive-backup-of-the-top-layer": Difference(
        "the layer below is open and shared; the peer opens it anew and meets its own lock", {
            '["drive-backup", ["GenericError", "Could not open backing file: Failed to get shared '
            '\\"write\\" lock"]]': '["drive-backup", {}]',
            "events:": ["events:"] + [
                '["JOB_STATUS_CHANGE", {"id": "j", "status": "%s"}]' % status
                for status in ("created", "running", "waiting", "pending")] + [
                '["BLOCK_JOB_COMPLETED", {"device": "j", "len": 1245184, "offset": 1245184, '
                '"speed": 0, "type": "backup"}]',
                '["JOB_STATUS_CHANGE", {"id": "j", "status": "concluded"}]',
                '["JOB_STATUS_CHANGE", {"id": "j", "status": "null"}]'],
            '["m.qcow2", {"backing": "a.qcow2", "backing-format": "qcow2", "digest": '
            '"2fe3a8d402e7e688", "size": 8388608}]':
            '["m.qcow2", {"backing": "a.qcow2", "backing-format": "qcow2", "digest": '
            '"aab31b40c94ef404", "size": 8388608}]'}),
    "commit/what-else-is-refused-meanwhile": Difference(
        "of two reasons the overlay is told", {
            '["block_resize", ["GenericError", "Node \'a\' is busy: block device is in use by '
            'block job: commit"]]':
            '["block_resize", ["GenericError", "Node \'a\' is busy: node is used as backing hd of '
            '\'b\'"]]'}),
    "backup/drive-backup-refusals": Difference(
        "a command that fails leaves no file", {
            '["m.qcow2", {"digest": "2daeb1f36095b44b", "size": 8388608}]': None}),
    "mirror/drive-mirror-refusals": Difference(
        "a command that fails leaves no file", {
            '["m.qcow2", {"digest": "2daeb1f36095b44b", "size": 8388608}]': None}),
    "mirror/cancelled-before-ready": Difference(
        "the length is that of the whole plan from the start", {
            '["BLOCK_JOB_CANCELLED", {"device": "j", "len": "a number", "offset": "= len", '
            '"speed": 1, "type": "mirror"}]':
            '["BLOCK_JOB_CANCELLED", {"device": "j", "len": "a number", "offset": "< len", '
            '"speed": 1, "type": "mirror"}]'}),
    "mirror/drive-mirror-to-a-new-file": Difference(
        "zero clusters that a new image has anyway are not counted as copied", {
            '["BLOCK_JOB_READY", {"device": "j", "len": 2228224, "offset": 2228224, "speed": 0, '
            '"type": "mirror"}]':
            '["BLOCK_JOB_READY", {"device": "j", "len": 2097152, "offset": 2097152, "speed": 0, '
            '"type": "mirror"}]',
            '["BLOCK_JOB_COMPLETED", {"device": "j", "len": 2228224, "offset": 2228224, '
            '"speed": 0, "type": "mirror"}]':
            '["BLOCK_JOB_COMPLETED", {"device": "j", "len": 2097152, "offset": 2097152, '
            '"speed": 0, "type": "mirror"}]'}),
    "snapshots/to-a-node": Difference(
        "of two reasons the overlay's is told", {
            '["blockdev-snapshot", ["GenericError", "Node \'a\' is busy: node is used as backing '
            'hd of \'o\'"]]':
            '["blockdev-snapshot", ["GenericError", "The overlay is already in use"]]'}),
    "snapshots/refusals": Difference(
        "an overlay in use is told as such, also where there would be a loop", {
            '["blockdev-snapshot", ["GenericError", "Making \'b\' a backing child of \'a\' would '
            'create a cycle"]]':
            '["blockdev-snapshot", ["GenericError", "The overlay is already in use"]]'}),
    "snapshots/a-grouped-backup-cancelled-with-its-partner": Difference(
        "two jobs begin in one command", any_order=True),
    "bitmaps/in-a-transaction": Difference(
        "bitmaps go with jobs that end together, which the peer refuses", {
            '["transaction", ["GenericError", "Action \'block-dirty-bitmap-clear\' does not '
            'support transaction property completion-mode = grouped"]]':
            '["transaction", ["GenericError", "Node \'nothing\' not found"]]'}),
}
