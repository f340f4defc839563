//! Arguments of the commands that start and steer jobs.
//!
//! Owns: the data and typed form of mirror, backup and the job verbs.

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::blockdev::{ON_CBW_ERROR, OnCbwError};
use super::transaction::{NEW_IMAGE, NewImageMode};
use super::types::{
    EnumType, INT, Int, ObjectType, Type, Variants, may, may_unstable, need, object, words,
};

pub(super) static JOB_TYPE: EnumType = words(
    "JobType",
    &[
        "commit",
        "stream",
        "mirror",
        "backup",
        "create",
        "amend",
        "snapshot-load",
        "snapshot-save",
        "snapshot-delete",
    ],
);
static MIRROR_SYNC: EnumType =
    words("MirrorSyncMode", &["top", "full", "none", "incremental", "bitmap"]);
pub(super) static ON_ERROR: EnumType =
    words("BlockdevOnError", &["report", "ignore", "enospc", "stop", "auto"]);
pub(super) static COPY_MODE: EnumType = words("MirrorCopyMode", &["background", "write-blocking"]);
static BITMAP_SYNC: EnumType = words("BitmapSyncMode", &["on-success", "never", "always"]);

pub(super) static BY_ID: ObjectType = object("JobId", &[need("id", Type::Str)]);
pub(super) static BY_DEVICE: ObjectType = object("JobDevice", &[need("device", Type::Str)]);
pub(super) static CANCEL: ObjectType =
    object("BlockJobCancel", &[need("device", Type::Str), may("force", Type::Bool)]);
pub(super) static SET_SPEED: ObjectType =
    object("BlockJobSetSpeed", &[need("device", Type::Str), need("speed", INT)]);

static CHANGE_MIRROR: ObjectType =
    object("BlockJobChangeOptionsMirror", &[need("copy-mode", Type::Enum(&COPY_MODE))]);
/// Ours: an active commit can change its mode, too.
static CHANGE_COMMIT: ObjectType =
    object("BlockJobChangeOptionsCommit", &[may("copy-mode", Type::Enum(&COPY_MODE))]);
pub(super) static CHANGE: ObjectType = ObjectType {
    name: "BlockJobChangeOptions",
    members: &[need("id", Type::Str), need("type", Type::Enum(&JOB_TYPE))],
    variants: Some(Variants {
        tag: "type",
        cases: &[("mirror", &CHANGE_MIRROR), ("commit", &CHANGE_COMMIT)],
    }),
    features: &[],
};

/// Ours: be ready within `deadline-ms` of the start, whatever guests write; each of their writes
/// takes at most about `max-latency-us` longer for it. Phases: background, write-blocking,
/// throttling. A deadline that is missed is an event, and the job goes on.
pub(super) static CONVERGE: ObjectType = object(
    "ConvergeOptions",
    &[need("deadline-ms", Type::Int(Int::U32)), need("max-latency-us", Type::Int(Int::U32))],
);

pub(super) static MIRROR: ObjectType = object(
    "BlockdevMirror",
    &[
        may("job-id", Type::Str),
        need("device", Type::Str),
        need("target", Type::Str),
        may("replaces", Type::Str),
        need("sync", Type::Enum(&MIRROR_SYNC)),
        may("speed", INT),
        may("granularity", Type::Int(Int::U32)),
        may("buf-size", INT),
        may("on-source-error", Type::Enum(&ON_ERROR)),
        may("on-target-error", Type::Enum(&ON_ERROR)),
        may("filter-node-name", Type::Str),
        may("copy-mode", Type::Enum(&COPY_MODE)),
        may("auto-finalize", Type::Bool),
        may("auto-dismiss", Type::Bool),
        may("target-is-zero", Type::Bool),
        may("bitmap", Type::Str),
        may("bitmap-mode", Type::Enum(&BITMAP_SYNC)),
        may("allow-larger-target", Type::Bool),
        may("converge", Type::Object(&CONVERGE)),
    ],
);

static BACKUP_PERF: ObjectType = object(
    "BackupPerf",
    &[
        may("use-copy-range", Type::Bool),
        may("max-workers", INT),
        may("max-chunk", INT),
        may("min-cluster-size", Type::Int(Int::Size)),
    ],
);

pub(super) static BACKUP: ObjectType = object(
    "BlockdevBackup",
    &[
        may("job-id", Type::Str),
        need("device", Type::Str),
        need("sync", Type::Enum(&MIRROR_SYNC)),
        may("speed", INT),
        may("bitmap", Type::Str),
        may("bitmap-mode", Type::Enum(&BITMAP_SYNC)),
        may("compress", Type::Bool),
        may("on-source-error", Type::Enum(&ON_ERROR)),
        may("on-target-error", Type::Enum(&ON_ERROR)),
        may("auto-finalize", Type::Bool),
        may("auto-dismiss", Type::Bool),
        may("filter-node-name", Type::Str),
        may("discard-source", Type::Bool),
        may_unstable("x-perf", Type::Object(&BACKUP_PERF)),
        need("target", Type::Str),
        may("on-cbw-error", Type::Enum(&ON_CBW_ERROR)),
        may("allow-larger-target", Type::Bool),
        may("spill-dir", Type::Str),
        may("spill-max", Type::Int(Int::Size)),
    ],
);

/// Arguments of `drive-mirror`; the target is a file.
pub(super) static DRIVE_MIRROR: ObjectType = object(
    "DriveMirror",
    &[
        may("job-id", Type::Str),
        need("device", Type::Str),
        need("target", Type::Str),
        may("format", Type::Str),
        may("node-name", Type::Str),
        may("replaces", Type::Str),
        need("sync", Type::Enum(&MIRROR_SYNC)),
        may("mode", Type::Enum(&NEW_IMAGE)),
        may("speed", INT),
        may("granularity", Type::Int(Int::U32)),
        may("buf-size", INT),
        may("on-source-error", Type::Enum(&ON_ERROR)),
        may("on-target-error", Type::Enum(&ON_ERROR)),
        may("unmap", Type::Bool),
        may("copy-mode", Type::Enum(&COPY_MODE)),
        may("auto-finalize", Type::Bool),
        may("auto-dismiss", Type::Bool),
        may("bitmap", Type::Str),
        may("bitmap-mode", Type::Enum(&BITMAP_SYNC)),
        may("converge", Type::Object(&CONVERGE)),
    ],
);

/// Arguments of `drive-backup`; the target is a file.
pub(super) static DRIVE_BACKUP: ObjectType = object(
    "DriveBackup",
    &[
        may("job-id", Type::Str),
        need("device", Type::Str),
        need("sync", Type::Enum(&MIRROR_SYNC)),
        may("speed", INT),
        may("bitmap", Type::Str),
        may("bitmap-mode", Type::Enum(&BITMAP_SYNC)),
        may("compress", Type::Bool),
        may("on-source-error", Type::Enum(&ON_ERROR)),
        may("on-target-error", Type::Enum(&ON_ERROR)),
        may("auto-finalize", Type::Bool),
        may("auto-dismiss", Type::Bool),
        may("filter-node-name", Type::Str),
        may("discard-source", Type::Bool),
        may_unstable("x-perf", Type::Object(&BACKUP_PERF)),
        need("target", Type::Str),
        may("format", Type::Str),
        may("mode", Type::Enum(&NEW_IMAGE)),
        may("spill-dir", Type::Str),
        may("spill-max", Type::Int(Int::Size)),
    ],
);

/// What a mirror or backup copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SyncMode {
    /// What is allocated in the top layer.
    Top,
    /// Everything.
    Full,
    /// Only what is written from now on.
    None,
    /// What a bitmap says; the bitmap is cleared on success.
    Incremental,
    /// What a bitmap says.
    Bitmap,
}

/// The same words, as mirror uses them.
pub type MirrorSync = SyncMode;

/// What a job does when an operation fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// The job ends with the error.
    #[default]
    Report,
    /// The operation is tried again later.
    Ignore,
    /// Pause on a full disk, else report.
    Enospc,
    /// The job pauses.
    Stop,
    /// The program's choice, which is `Enospc`.
    Auto,
}

/// How guest writes reach a mirror's target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorCopyMode {
    /// Later, by the job.
    #[default]
    Background,
    /// Before the guest is answered.
    WriteBlocking,
}

/// What happens to the bitmap of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BitmapSync {
    /// Cleared if the job succeeds.
    OnSuccess,
    /// Left alone.
    Never,
    /// What was copied is cleared, whatever the end.
    Always,
}

fn yes() -> bool {
    true
}

/// Arguments of `blockdev-mirror`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevMirror {
    /// Name of the job; absent means the source's device name, which nodes here do not have.
    pub job_id: Option<String>,
    /// Source node.
    pub device: String,
    /// Target node.
    pub target: String,
    /// Node that the target takes the place of; absent means the source.
    pub replaces: Option<String>,
    /// What to copy.
    pub sync: SyncMode,
    /// Bytes per second, 0 is unlimited.
    #[serde(default)]
    pub speed: i64,
    /// Bytes per dirty bit; absent or 0 means chosen from the target.
    pub granularity: Option<u32>,
    /// Bytes of copy buffers; absent or 0 means the default.
    pub buf_size: Option<i64>,
    /// Policy for reads of the source.
    #[serde(default)]
    pub on_source_error: OnError,
    /// Policy for writes of the target.
    #[serde(default)]
    pub on_target_error: OnError,
    /// Name under which queries show the job's filter node.
    pub filter_node_name: Option<String>,
    /// See [`MirrorCopyMode`].
    #[serde(default)]
    pub copy_mode: MirrorCopyMode,
    /// Whether the job finishes by itself.
    #[serde(default = "yes")]
    pub auto_finalize: bool,
    /// Whether the job vanishes by itself.
    #[serde(default = "yes")]
    pub auto_dismiss: bool,
    /// Ours: a bitmap of the source that names what is copied, or what the copy leaves behind.
    pub bitmap: Option<String>,
    /// Ours: what becomes of the bitmap.
    pub bitmap_mode: Option<BitmapSync>,
    /// Of later versions of the peer: the target reads as zeroes already.
    #[serde(default)]
    pub target_is_zero: bool,
    /// Ours: the target may be larger than the source; its tail reads zero.
    #[serde(default)]
    pub allow_larger_target: bool,
    /// Ours: be ready in time.
    pub converge: Option<ConvergeOptions>,
}

/// How a mirror or active commit is ready in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ConvergeOptions {
    /// Milliseconds from the start.
    pub deadline_ms: u32,
    /// Microseconds that a guest's write is delayed at most.
    pub max_latency_us: u32,
}

/// Tuning of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct BackupPerf {
    /// Let the host copy where it can.
    pub use_copy_range: Option<bool>,
    /// Copies in flight; at least 1.
    pub max_workers: Option<i64>,
    /// Bytes of one copy; 0 is chosen by the program.
    pub max_chunk: Option<i64>,
    /// Smallest unit of copy-before-write.
    pub min_cluster_size: Option<u64>,
}

/// Arguments of `blockdev-backup`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevBackup {
    /// Name of the job; absent means the source's device name, which nodes here do not have.
    pub job_id: Option<String>,
    /// Source node.
    pub device: String,
    /// Target node.
    pub target: String,
    /// What to copy.
    pub sync: SyncMode,
    /// Bytes per second, 0 is unlimited.
    #[serde(default)]
    pub speed: i64,
    /// Bitmap that says what to copy.
    pub bitmap: Option<String>,
    /// What happens to the bitmap.
    pub bitmap_mode: Option<BitmapSync>,
    /// Write compressed clusters.
    #[serde(default)]
    pub compress: bool,
    /// Policy for reads of the source.
    #[serde(default)]
    pub on_source_error: OnError,
    /// Policy for writes of the target.
    #[serde(default)]
    pub on_target_error: OnError,
    /// Whether the job finishes by itself.
    #[serde(default = "yes")]
    pub auto_finalize: bool,
    /// Whether the job vanishes by itself.
    #[serde(default = "yes")]
    pub auto_dismiss: bool,
    /// Name under which queries show the job's filter node.
    pub filter_node_name: Option<String>,
    /// Free the source's space as it is copied.
    #[serde(default)]
    pub discard_source: bool,
    /// Tuning.
    #[serde(default)]
    pub x_perf: BackupPerf,
    /// Of later versions of the peer: who suffers when old content cannot be kept; absent means
    /// the backup.
    pub on_cbw_error: Option<OnCbwError>,
    /// Ours: the target may be larger than the source; its tail reads zero.
    #[serde(default)]
    pub allow_larger_target: bool,
    /// Ours: the folder of the spill file; absent means beside the target.
    pub spill_dir: Option<String>,
    /// Ours: most bytes of the spill file; absent means the size of the disk, 0 none.
    pub spill_max: Option<u64>,
}

/// The file of a `drive-mirror` or `drive-backup`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DriveFile {
    /// The file.
    pub target: String,
    /// Its format; absent means the source's, or what a file that exists proves to have.
    pub format: Option<String>,
    /// Name of the target's node.
    pub node_name: Option<String>,
    /// Whether the file is made.
    #[serde(default)]
    pub mode: NewImageMode,
    /// Whether space of the target is given back.
    #[serde(default = "yes")]
    pub unmap: bool,
}

/// Arguments of `drive-mirror` or `drive-backup`: those of the job, and the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive<T> {
    /// The job; its `target` is the name of the file.
    pub job: T,
    /// The file.
    pub file: DriveFile,
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Drive<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let file = DriveFile::deserialize(&value).map_err(D::Error::custom)?;
        let job = serde_json::from_value(value).map_err(D::Error::custom)?;
        Ok(Self { job, file })
    }
}

/// Arguments of `block-job-change`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockJobChange {
    /// The job.
    pub id: String,
    /// The kind of job that the caller takes it for.
    #[serde(rename = "type")]
    pub job_type: String,
    /// The new mode of a mirror.
    pub copy_mode: Option<MirrorCopyMode>,
}
