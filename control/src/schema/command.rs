//! The typed form of commands.
//!
//! Owns: one variant per thing the engine can be asked. Promises: a value of this type has passed
//! the argument check. Does not: hold commands that the front-end answers itself.

use super::{
    BitmapChange, BitmapOf, BlockCommit, BlockExportAdd, BlockExportDel, BlockJobChange,
    BlockResize, BlockStream, BlockdevAmend, BlockdevBackup, BlockdevCreate, BlockdevMirror,
    BlockdevOptions, BlockdevReopen, BlockdevSnapshot, BlockdevSnapshotDelete,
    BlockdevSnapshotInternal, BlockdevSnapshotSync, ChangeBackingFile, Drive, NbdServerOptions,
    ObjectAdd, SetActive, Transaction, WriteThreshold,
};

/// What can be asked of a job without further arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobVerb {
    /// Stop issuing I/O.
    Pause,
    /// Undo one pause of the user.
    Resume,
    /// Finish a ready job.
    Complete,
    /// Let a pending job commit.
    Finalize,
    /// Forget a concluded job.
    Dismiss,
}

/// A command with its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// `quit`.
    Quit,
    /// `blockdev-add`.
    BlockdevAdd(Box<BlockdevOptions>),
    /// `blockdev-del`.
    BlockdevDel {
        /// The node.
        node_name: String,
    },
    /// `query-named-block-nodes`.
    QueryNamedBlockNodes {
        /// Without the nested images below each node.
        flat: bool,
    },
    /// `query-block`.
    QueryBlock,
    /// `query-blockstats`.
    QueryBlockstats {
        /// One entry per node instead of per device.
        query_nodes: bool,
    },
    /// `query-jobs`.
    QueryJobs,
    /// `query-block-jobs`.
    QueryBlockJobs,
    /// `job-pause` and its like; an unknown id is a `GenericError`.
    Job {
        /// What to do.
        verb: JobVerb,
        /// The job.
        id: String,
    },
    /// `job-cancel`: always by force.
    JobCancel {
        /// The job.
        id: String,
    },
    /// `block-job-pause` and its like; an unknown id is `DeviceNotActive`.
    BlockJob {
        /// What to do.
        verb: JobVerb,
        /// The job.
        id: String,
    },
    /// `block-job-cancel`.
    BlockJobCancel {
        /// The job.
        id: String,
        /// Abort also a ready job.
        force: bool,
    },
    /// `block-job-set-speed`.
    BlockJobSetSpeed {
        /// The job.
        id: String,
        /// Bytes per second as given; negative ones are for the executor to refuse.
        speed: i64,
    },
    /// `block-job-change`.
    BlockJobChange(BlockJobChange),
    /// `blockdev-mirror`.
    BlockdevMirror(Box<BlockdevMirror>),
    /// `blockdev-backup`.
    BlockdevBackup(Box<BlockdevBackup>),
    /// `block-stream`.
    BlockStream(Box<BlockStream>),
    /// `block-commit`.
    BlockCommit(Box<BlockCommit>),
    /// A change of dirty bitmaps.
    Bitmap(BitmapChange),
    /// `x-debug-block-dirty-bitmap-sha256`.
    BitmapSha256(BitmapOf),
    /// `drive-mirror`.
    DriveMirror(Box<Drive<BlockdevMirror>>),
    /// `drive-backup`.
    DriveBackup(Box<Drive<BlockdevBackup>>),
    /// `x-blockdev-amend`.
    BlockdevAmend(BlockdevAmend),
    /// `blockdev-create`.
    BlockdevCreate(BlockdevCreate),
    /// `change-backing-file`.
    ChangeBackingFile(ChangeBackingFile),
    /// `block-set-write-threshold`.
    BlockSetWriteThreshold(WriteThreshold),
    /// `blockdev-reopen`.
    BlockdevReopen(BlockdevReopen),
    /// `blockdev-set-active`.
    BlockdevSetActive(SetActive),
    /// `block_resize`.
    BlockResize(BlockResize),
    /// `x-debug-query-block-graph`.
    QueryBlockGraph,
    /// `blockdev-snapshot`.
    BlockdevSnapshot(BlockdevSnapshot),
    /// `blockdev-snapshot-sync`.
    BlockdevSnapshotSync(BlockdevSnapshotSync),
    /// `blockdev-snapshot-internal-sync`.
    SnapshotInternal(BlockdevSnapshotInternal),
    /// `blockdev-snapshot-delete-internal-sync`.
    SnapshotDelete(BlockdevSnapshotDelete),
    /// `transaction`.
    Transaction(Transaction),
    /// `nbd-server-start`.
    NbdServerStart(NbdServerOptions),
    /// `nbd-server-stop`.
    NbdServerStop,
    /// `block-export-add`.
    BlockExportAdd(BlockExportAdd),
    /// `block-export-del`.
    BlockExportDel(BlockExportDel),
    /// `query-block-exports`.
    QueryBlockExports,
    /// `object-add`.
    ObjectAdd(ObjectAdd),
    /// `object-del`.
    ObjectDel {
        /// The object.
        id: String,
    },
}
