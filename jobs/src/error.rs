//! What goes wrong with jobs, as types: `control` maps them to classes, Display is the peer's text.

use std::error::Error as StdError;
use std::fmt;

use liveblk_engine::ErrorKind;

use crate::chain_error::ChainError;
use crate::follow_error::FollowError;
use crate::lifecycle::{Status, Verb};
use crate::spill_error::SpillError;

/// Result of job operations.
pub type Result<T, E = JobError> = std::result::Result<T, E>;

/// Why a job, a verb, a snapshot or a transaction was refused or failed.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum JobError {
    /// A `job-*` verb named no job (class GenericError).
    NotFound,
    /// A `block-job-*` verb named no block job (class DeviceNotActive).
    BlockJobNotFound {
        /// The name asked for.
        id: Box<str>,
    },
    /// The id is not an identifier.
    InvalidId {
        /// The id given (empty if none was).
        id: Box<str>,
    },
    /// The id belongs to another job.
    IdInUse {
        /// The id given.
        id: Box<str>,
    },
    /// The state table refuses the verb.
    VerbRefused {
        /// The job.
        id: Box<str>,
        /// Its state.
        status: Status,
        /// What was asked.
        verb: Verb,
    },
    /// Pause of a paused job.
    AlreadyPaused,
    /// Resume of a job that the user did not pause.
    NotPaused,
    /// Soft cancel of a job that the user paused.
    CurrentlyPaused {
        /// The job.
        id: Box<str>,
    },
    /// This job has no result to take (now).
    CannotComplete {
        /// The job.
        id: Box<str>,
    },
    /// A negative speed.
    NegativeSpeed,
    /// This kind of job has nothing to change.
    ChangeUnsupported,
    /// An amend of the encryption of an image that has none.
    NotEncrypted,
    /// A mode or option that this version does not have.
    NotYet {
        /// What was asked for, in words.
        what: &'static str,
    },
    /// The granularity is out of range or no power of two.
    BadGranularity {
        /// Which rule it breaks.
        rule: GranularityRule,
    },
    /// Source and target are one node.
    SameNode {
        /// What the job does, as a verb ("mirror").
        verb: &'static str,
    },
    /// A largest copy that is smaller than a unit of copy-before-write.
    ChunkTooSmall {
        /// Bytes of the largest copy.
        chunk: u64,
        /// Bytes of a unit.
        granule: u64,
    },
    /// The target does not store compressed clusters.
    CompressionUnsupported,
    /// A mode that copies what a bitmap names, without one.
    BitmapMissing {
        /// The mode, as in QMP.
        mode: &'static str,
    },
    /// A rule of bitmaps in jobs is broken.
    Bitmap(BitmapRule),
    /// Source and target differ in size (mirror's text, found inside the job).
    SizesDiffer,
    /// Source and target differ in size (backup's text, found before the start).
    SizesDifferBytes {
        /// Bytes of the source.
        source: u64,
        /// Bytes of the target.
        target: u64,
    },
    /// No node or device of that name (the peer's text for snapshots and jobs).
    NodeNotFound {
        /// What was given as device.
        device: Box<str>,
        /// What was given as node name.
        node: Box<str>,
    },
    /// Somebody writes the node and would go on doing so.
    InUse {
        /// The node.
        node: Box<str>,
        /// Who.
        by: Box<str>,
    },
    /// A node is in use by a job in a way that excludes this.
    BusyWithJob {
        /// The node.
        node: Box<str>,
        /// Kind of the job ("mirror").
        kind: &'static str,
    },
    /// A rule of jobs that follow guests was broken.
    Follow(FollowError),
    /// The spill file of a backup.
    Spill(SpillError),
    /// More jobs or actions than a named bound.
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// A file cannot be made as asked.
    Create(CreateError),
    /// A snapshot rule was broken.
    Snapshot(SnapshotError),
    /// The transaction holds an `abort` action.
    AbortAction,
    /// An action that grouped completion does not allow.
    NotGrouped {
        /// The action's name in QMP.
        action: &'static str,
    },
    /// A job of this transaction was cancelled, or this one was.
    Cancelled,
    /// A rule of stream or commit was broken.
    Chain(ChainError),
    /// The engine refused or failed.
    Engine(liveblk_engine::Error),
}

/// Rules of the granularity of a mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GranularityRule {
    /// 512 bytes to 64 MiB.
    Range,
    /// A power of two.
    PowerOfTwo,
}

/// Rules of a user's bitmap in a job, with the peer's texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapRule {
    /// A mode without a bitmap.
    ModeWithoutBitmap,
    /// A bitmap without a mode.
    ModeMissing,
    /// Incremental with another mode than on-success.
    IncrementalMode,
    /// No bitmap of that name on the source itself.
    NotFound {
        /// The name.
        name: Box<str>,
    },
    /// The bitmap would mean nothing afterwards.
    NoOutput {
        /// What is copied, as in QMP.
        sync: &'static str,
    },
    /// The bitmap is neither looked at nor changed.
    NoEffect {
        /// What is copied, as in QMP.
        sync: &'static str,
    },
}

impl fmt::Display for BitmapRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ModeWithoutBitmap => {
                f.write_str("Cannot specify bitmap sync mode without a bitmap")
            }
            Self::ModeMissing => {
                f.write_str("Bitmap sync mode must be given when providing a bitmap")
            }
            Self::IncrementalMode => f.write_str(
                "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
            ),
            Self::NotFound { name } => write!(f, "Bitmap '{name}' could not be found"),
            Self::NoOutput { sync } => {
                write!(f, "sync mode '{sync}' does not produce meaningful bitmap outputs")
            }
            Self::NoEffect { sync } => write!(
                f,
                "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode \
                 '{sync}'"
            ),
        }
    }
}

impl From<BitmapRule> for JobError {
    fn from(rule: BitmapRule) -> Self {
        Self::Bitmap(rule)
    }
}

/// Why a file cannot be made, with the peer's texts.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum CreateError {
    /// Files do not have this kind of preallocation.
    PreallocationMode(&'static str),
    /// A size of 8 EiB or more.
    NegativeSize,
    /// The file system does not have files of that size.
    TooLarge,
    /// The size cannot be set, or its space not be taken.
    Resize {
        /// What could not be done.
        what: &'static str,
        /// Why.
        error: liveblk_engine::Error,
    },
}

/// Refusals of snapshots, with the peer's texts.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The overlay was opened with a backing file.
    HasBacking,
    /// The overlay's format cannot have one.
    NoBackingSupport,
    /// Something reads the overlay already.
    OverlayInUse,
    /// `snapshot-node-name` is missing though `node-name` was given.
    NameMissing,
    /// The new node's name is taken.
    NameInUse {
        /// The name.
        name: Box<str>,
    },
    /// The format is not known.
    UnknownFormat {
        /// The name asked for.
        format: Box<str>,
    },
    /// The format of a file to be created cannot refer to the node.
    FormatWithoutBacking {
        /// The format.
        format: Box<str>,
    },
    /// The file to be created exists and holds something.
    FileExists {
        /// Its path.
        path: Box<str>,
    },
    /// The file is to be opened and names no format that proves itself.
    FormatMissing {
        /// Its path.
        path: Box<str>,
    },
    /// The file cannot be opened.
    CannotOpen {
        /// Its path.
        path: Box<str>,
        /// Why.
        source: liveblk_engine::Error,
    },
    /// The file cannot be created or opened.
    File {
        /// Its path.
        path: Box<str>,
        /// Why.
        source: liveblk_engine::Error,
    },
    /// Internal: the node cannot be written.
    ReadOnly {
        /// The node.
        device: Box<str>,
    },
    /// Internal: the format holds no snapshots.
    InternalUnsupported {
        /// The format.
        format: Box<str>,
        /// The node.
        device: Box<str>,
    },
    /// Internal: the name is empty.
    EmptyName,
    /// Internal: the name is taken.
    InternalExists {
        /// The name.
        name: Box<str>,
        /// The node.
        device: Box<str>,
    },
    /// Internal: there is no such snapshot.
    InternalMissing {
        /// The id asked for, or `null`.
        id: Box<str>,
        /// The name asked for, or `null`.
        name: Box<str>,
        /// The node.
        device: Box<str>,
    },
    /// Internal: the image did not take it.
    Internal {
        /// The name.
        name: Box<str>,
        /// The node.
        device: Box<str>,
        /// Why.
        source: liveblk_engine::Error,
    },
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound => f.write_str("Job not found"),
            Self::BlockJobNotFound { id } => write!(f, "Block job '{id}' not found"),
            Self::InvalidId { id } => write!(f, "Invalid job ID '{id}'"),
            Self::IdInUse { id } => write!(f, "Job ID '{id}' already in use"),
            Self::VerbRefused { id, status, verb } => {
                write!(f, "Job '{id}' in state '{status}' cannot accept command verb '{verb}'")
            }
            Self::AlreadyPaused => f.write_str("Job is already paused"),
            Self::NotPaused => f.write_str("Can't resume a job that was not paused"),
            Self::CurrentlyPaused { id } => {
                write!(f, "The block job for device '{id}' is currently paused")
            }
            Self::CannotComplete { id } => {
                write!(f, "The active block job '{id}' cannot be completed")
            }
            Self::NegativeSpeed => f.write_str("Parameter 'speed' expects a non-negative value"),
            Self::NotEncrypted => f.write_str("image is not encrypted, can't amend"),
            Self::ChangeUnsupported => f.write_str("Job type does not support change"),
            Self::NotYet { what } => write!(f, "{what} is not supported by this version"),
            Self::BadGranularity { rule: GranularityRule::Range } => {
                f.write_str("Parameter 'granularity' expects a value in range [512B, 64MB]")
            }
            Self::BadGranularity { rule: GranularityRule::PowerOfTwo } => {
                f.write_str("Parameter 'granularity' expects a power of 2")
            }
            Self::SameNode { verb: "mirror" } => f.write_str("Can't mirror node into itself"),
            Self::SameNode { .. } => f.write_str("Source and target cannot be the same"),
            Self::ChunkTooSmall { chunk, granule } => write!(
                f,
                "Required max-chunk ({chunk}) is less than backup cluster size ({granule})"
            ),
            Self::CompressionUnsupported => {
                // The peer names the target's device here, which nodes do not have.
                f.write_str("Compression is not supported for this drive ")
            }
            Self::BitmapMissing { mode } => {
                write!(f, "must provide a valid bitmap name for '{mode}' sync mode")
            }
            Self::Bitmap(rule) => rule.fmt(f),
            Self::SizesDiffer => f.write_str("Source and target image have different sizes"),
            Self::SizesDifferBytes { .. } => {
                f.write_str("Source and target image have different sizes")
            }
            Self::NodeNotFound { device, node } => {
                write!(f, "Cannot find device='{device}' nor node-name='{node}'")
            }
            Self::InUse { node, by } => {
                write!(f, "Node '{node}' is busy: it is written by {by}")
            }
            Self::BusyWithJob { node, kind } => {
                write!(f, "Node '{node}' is busy: block device is in use by block job: {kind}")
            }
            Self::Follow(error) => error.fmt(f),
            Self::Spill(error) => error.fmt(f),
            Self::TooMany { what, limit } => write!(f, "Too many {what} (at most {limit})"),
            Self::Create(error) => error.fmt(f),
            Self::Snapshot(error) => error.fmt(f),
            Self::AbortAction => f.write_str("Transaction aborted using Abort action"),
            Self::NotGrouped { action } => write!(
                f,
                "Action '{action}' does not support transaction property completion-mode = grouped"
            ),
            Self::Cancelled => f.write_str("Operation canceled"),
            Self::Chain(error) => error.fmt(f),
            Self::Engine(error) => error.fmt(f),
        }
    }
}

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PreallocationMode(mode) => write!(f, "Unsupported preallocation mode: {mode}"),
            Self::NegativeSize => f.write_str("Could not resize file: Invalid argument"),
            Self::TooLarge => f.write_str("Could not resize file: File too large"),
            Self::Resize { what, error } => write!(f, "{what}: {}", error.kind()),
        }
    }
}

impl fmt::Display for SnapshotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HasBacking => f.write_str("The overlay already has a backing image"),
            Self::NoBackingSupport => f.write_str("The overlay does not support backing images"),
            Self::OverlayInUse => f.write_str("The overlay is already in use"),
            Self::NameMissing => f.write_str("New overlay node-name missing"),
            Self::NameInUse { .. } => f.write_str("New overlay node-name already in use"),
            Self::UnknownFormat { format } => write!(f, "Unknown file format '{format}'"),
            Self::FormatWithoutBacking { format } => {
                write!(f, "Backing file not supported for file format '{format}'")
            }
            Self::FileExists { path } => write!(
                f,
                "Could not create '{path}': the file exists and is not empty \
                 (remove it, or use mode 'existing')"
            ),
            Self::FormatMissing { path } => write!(
                f,
                "Could not open '{path}': its format is not known (name it with 'format')"
            ),
            Self::CannotOpen { path, source } => match source.detail() {
                Some(detail) => write!(f, "{detail}"),
                None => write!(f, "Could not open '{path}': {}", source.kind()),
            },
            Self::File { path, source } => match source.detail() {
                Some(lock) if source.kind() == ErrorKind::Locked => write!(f, "{lock}"),
                Some(detail) => write!(f, "Could not create '{path}': {detail}"),
                None => write!(f, "Could not create '{path}': {}", source.kind()),
            },
            Self::ReadOnly { device } => write!(f, "Device '{device}' is read only"),
            Self::InternalUnsupported { format, device } => write!(
                f,
                "Block format '{format}' used by device '{device}' does not support internal \
                 snapshots"
            ),
            Self::EmptyName => f.write_str("Name is empty"),
            Self::InternalExists { name, device } => {
                write!(f, "Snapshot with name '{name}' already exists on device '{device}'")
            }
            Self::InternalMissing { id, name, device } => write!(
                f,
                "Snapshot with id '{id}' and name '{name}' does not exist on device '{device}'"
            ),
            Self::Internal { name, device, source } => write!(
                f,
                "Failed to create snapshot '{name}' on device '{device}': {}",
                source
                    .detail()
                    .map_or_else(|| source.kind().to_string(), |detail| detail.to_string())
            ),
        }
    }
}

impl StdError for JobError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Engine(error)
            | Self::Follow(FollowError::TargetCannotGrow { source: error, .. })
            | Self::Spill(SpillError::Failed { source: error, .. })
            | Self::Create(CreateError::Resize { error, .. })
            | Self::Snapshot(
                SnapshotError::File { source: error, .. }
                | SnapshotError::Internal { source: error, .. },
            ) => Some(error),
            _ => None,
        }
    }
}

impl From<liveblk_engine::Error> for JobError {
    fn from(error: liveblk_engine::Error) -> Self {
        Self::Engine(error)
    }
}

impl From<SpillError> for JobError {
    fn from(error: SpillError) -> Self {
        Self::Spill(error)
    }
}

impl From<FollowError> for JobError {
    fn from(error: FollowError) -> Self {
        Self::Follow(error)
    }
}

impl From<ChainError> for JobError {
    fn from(error: ChainError) -> Self {
        Self::Chain(error)
    }
}

impl From<CreateError> for JobError {
    fn from(error: CreateError) -> Self {
        Self::Create(error)
    }
}

impl From<SnapshotError> for JobError {
    fn from(error: SnapshotError) -> Self {
        Self::Snapshot(error)
    }
}

impl PartialEq for JobError {
    /// Equal texts: enough to compare answers.
    fn eq(&self, other: &Self) -> bool {
        self.to_string() == other.to_string()
    }
}
