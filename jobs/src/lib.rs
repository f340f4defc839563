//! The jobs of liveblk: mirror, backup, snapshots and transactions of them, under live guests.
//!
//! Modules, from the bottom up:
//! - [`lifecycle`], [`rate`], [`progress`], [`region`]: pure parts;
//! - [`event`], [`error`], [`spec`], [`limits`]: what goes in and out;
//! - `copy`: the one copy loop;
//! - [`mirror`], [`backup`], [`stream`], [`commit`]: jobs, policy over that loop;
//! - [`snapshot`], [`internal`], [`transaction`]: changes that are atomic over disks and cores;
//! - [`bitmaps`]: changes of dirty bitmaps in transactions;
//! - [`manager`]: ids, verbs, queries, how jobs end together.
//!
//! Knows neither QMP nor formats; everything stays on the core of the source.

#![forbid(unsafe_code)]

pub mod amend;
pub mod backup;
pub mod bitmaps;
mod chain;
mod chain_error;
pub mod commit;
mod commit_active;
mod copy;
pub mod error;
pub mod event;
pub mod internal;
mod job;
pub mod lifecycle;
pub mod limits;
pub mod manager;
pub mod mirror;
pub mod progress;
pub mod rate;
pub mod region;
pub mod snapshot;
pub mod spec;
mod start;
pub mod stream;
pub mod transaction;
mod txn;

pub use amend::{Amendment, start_amend};
pub use backup::start_backup;
pub use bitmaps::{BitmapAction, BitmapName};
pub use chain_error::ChainError;
pub use commit::{CommitSpec, start_commit};
pub use error::{JobError, SnapshotError};
pub use event::{BlockJobFacts, BlockJobInfo, Event, JobInfo, Kind};
pub use internal::{InternalSnapshot, delete_internal_snapshot};
pub use job::Job;
pub use lifecycle::{Status, Verb};
pub use manager::JobManager;
pub use mirror::start_mirror;
pub use snapshot::{NewImageMode, SnapshotFile};
pub use spec::{BackupSpec, CopyMode, JobOptions, MirrorSpec, OnError, SyncMode};
pub use stream::{StreamSpec, StreamTo, start_stream};
pub use transaction::{Action, BackupAction, CompletionMode, snapshot_file, transaction};
pub use txn::JobTxn;
