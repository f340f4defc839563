//! The one description of every command: its arguments, its answer, what it runs.
//!
//! Owns: the types of QMP as data ([`types`]), the tables of commands and events ([`table`]), the
//! check of arguments against them ([`validate()`]), the typed form of commands ([`Command`]) and
//! `query-qmp-schema`. Promises: what is listed is what is accepted; arguments are checked
//! completely before anything happens; the texts of refusals are the peer's. Does not: execute.

mod amend;
mod answers;
mod arguments;
mod bitmaps;
mod blockdev;
mod chains;
mod command;
mod create;
mod exports;
mod introspect;
mod jobs;
mod table;
mod transaction;
pub mod types;
mod validate;
mod verbs;

pub use amend::{AmendOptions, BlockdevAmend};
pub use bitmaps::{BitmapAdd, BitmapChange, BitmapMerge, BitmapOf};
pub use blockdev::{
    AioMode, BlockdevOptions, BlockdevRef, CacheOptions, CbwOptions, DetectZeroes, Discard,
    DriverOptions, FileOptions, NamedBitmap, NodeOptions, OnCbwError, OnOffAuto, Qcow2Options,
    RawOptions, SnapshotAccessOptions,
};
pub use chains::{BlockCommit, BlockStream, ChainJob};
pub use command::{Command, JobVerb};
pub use create::{BlockdevCreate, CreateFile, CreateOptions, CreateQcow2, CreateRaw, PreallocMode};
pub use exports::{
    BitmapRef, BlockExportAdd, BlockExportDel, ExportKind, ExportRemoveMode, InetAddress,
    IothreadOptions, MonitorOptions, NbdExportOptions, NbdServerOptions, ObjectAdd, SocketAddress,
    UnixAddress,
};
pub use introspect::{query_commands, query_qmp_schema};
pub use jobs::{
    BackupPerf, BitmapSync, BlockJobChange, BlockdevBackup, BlockdevMirror, ConvergeOptions, Drive,
    DriveFile, MirrorCopyMode, MirrorSync, OnError, SyncMode,
};
pub use table::{COMMANDS, CommandEntry, EVENTS, EventEntry, Run, command_entry};
pub use transaction::{
    BlockdevSnapshot, BlockdevSnapshotDelete, BlockdevSnapshotInternal, BlockdevSnapshotSync,
    CompletionMode, NewImageMode, Transaction, TransactionAction,
};
pub(crate) use validate::parse_switch;
pub use validate::{ArgumentError, Source, validate};
pub use verbs::{BlockResize, BlockdevReopen, ChangeBackingFile, SetActive, WriteThreshold};

/// Types of options that the command line takes and QMP does not.
pub mod startup {
    pub use super::exports::{MONITOR_OPTIONS, NBD_SERVER_OPTIONS};
}

/// Types of commands that the command line takes too.
pub mod shared {
    pub use super::blockdev::BLOCKDEV_OPTIONS;
    pub use super::exports::{BLOCK_EXPORT_OPTIONS, OBJECT_OPTIONS};
}
