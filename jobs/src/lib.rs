//! The jobs of liveblk: mirror, backup, snapshots and transactions of them, under live guests.
//!
//! Modules, from the bottom up:
//! - [`lifecycle`], [`rate`], [`progress`], [`region`]: pure parts;
//! - [`event`], [`error`], [`spec`], [`limits`]: what goes in and out;
//! - `copy`: the one copy loop;
//! - [`mirror`], [`backup`], [`stream`], [`commit`]: jobs, policy over that loop;
//! - [`snapshot`], [`internal`], [`transaction`]: changes that are atomic over disks and cores;
//! - [`bitmaps`]: changes of dirty bitmaps in transactions;
//! - [`create`]: new files and images;
//! - [`manager`]: ids, verbs, queries, how jobs end together.
//!
//! Knows neither QMP nor formats; everything stays on the core of the source.

#![forbid(unsafe_code)]

mod actions;
mod active;
pub mod amend;
pub mod backup;
mod beside;
mod bitmap_use;
pub mod bitmaps;
mod chain;
mod chain_error;
pub mod commit;
mod commit_active;
pub mod converge;
mod copy;
pub mod create;
mod drive;
pub mod error;
pub mod event;
pub mod fleecing;
mod follow;
mod follow_error;
pub mod growth;
pub mod internal;
mod job;
pub mod lifecycle;
pub mod limits;
pub mod manager;
pub mod mirror;
mod pivot;
pub mod progress;
pub mod rate;
mod read_only;
pub mod region;
pub mod snapshot;
pub mod spec;
mod spill_error;
mod start;
pub mod stream;
pub mod transaction;
mod txn;

pub use actions::{
    BackupAction, CommitAction, MirrorAction, StreamAction, start_drive_backup, start_drive_mirror,
};
pub use amend::{Amendment, start_amend};
pub use backup::start_backup;
pub use bitmap_use::BitmapChoice;
pub use bitmaps::{BitmapAction, BitmapName};
pub use chain_error::ChainError;
pub use commit::{CommitSpec, start_commit};
pub use converge::{Converge, ConvergeInfo, Phase};
pub use create::{Creation, NewPlace, start_create};
pub use drive::DriveTarget;
pub use error::{BitmapRule, CreateError, JobError, SnapshotError};
pub use event::{BlockJobFacts, BlockJobInfo, Event, JobInfo, Kind, SpillInfo};
pub use fleecing::{
    CopyBeforeWriteSpec, add_copy_before_write, add_snapshot_access, is_job_filter,
    job_filter_above,
};
pub use follow_error::FollowError;
pub use growth::resize;
pub use internal::{InternalSnapshot, delete_internal_snapshot};
pub use job::{Job, JobCounters};
pub use lifecycle::{Status, Verb};
pub use manager::JobManager;
pub use mirror::start_mirror;
pub use snapshot::{NewImageMode, SnapshotFile};
pub use spec::{
    BackupOptions, BackupSpec, BitmapMode, CopyMode, JobOptions, MirrorOptions, MirrorSpec,
    OnCbwError, OnError, SpillOptions, SyncMode,
};
pub use spill_error::SpillError;
pub use stream::{StreamSpec, StreamTo, start_stream};
pub use transaction::{Action, CompletionMode, snapshot_file, transaction};
pub use txn::JobTxn;
