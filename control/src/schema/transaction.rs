//! Arguments of snapshots and of `transaction`.
//!
//! Owns: the union of transaction actions; it lists only actions that are built.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::bitmaps::{self, BitmapChange};
use super::chains::{BlockCommit, BlockStream, COMMIT, STREAM};
use super::jobs::{
    BACKUP, BlockdevBackup, BlockdevMirror, DRIVE_BACKUP, DRIVE_MIRROR, Drive, MIRROR,
};
use super::types::{EMPTY, EnumType, ObjectType, Type, Variants, may, need, object, words};

static ACTION_KIND: EnumType = words(
    "TransactionActionKind",
    &[
        "abort",
        "block-commit",
        "block-dirty-bitmap-add",
        "block-dirty-bitmap-remove",
        "block-dirty-bitmap-clear",
        "block-dirty-bitmap-enable",
        "block-dirty-bitmap-disable",
        "block-dirty-bitmap-merge",
        "block-stream",
        "blockdev-backup",
        "blockdev-mirror",
        "blockdev-snapshot",
        "blockdev-snapshot-internal-sync",
        "blockdev-snapshot-sync",
        "drive-backup",
        "drive-mirror",
    ],
);
static COMPLETION: EnumType = words("ActionCompletionMode", &["individual", "grouped"]);
pub(super) static NEW_IMAGE: EnumType = words("NewImageMode", &["existing", "absolute-paths"]);

pub(super) static SNAPSHOT: ObjectType =
    object("BlockdevSnapshot", &[need("node", Type::Str), need("overlay", Type::Str)]);
pub(super) static SNAPSHOT_SYNC: ObjectType = object(
    "BlockdevSnapshotSync",
    &[
        may("device", Type::Str),
        may("node-name", Type::Str),
        need("snapshot-file", Type::Str),
        may("snapshot-node-name", Type::Str),
        may("format", Type::Str),
        may("mode", Type::Enum(&NEW_IMAGE)),
    ],
);

pub(super) static SNAPSHOT_INTERNAL: ObjectType =
    object("BlockdevSnapshotInternal", &[need("device", Type::Str), need("name", Type::Str)]);
pub(super) static SNAPSHOT_DELETE: ObjectType = object(
    "BlockdevSnapshotDeleteInternal",
    &[need("device", Type::Str), may("id", Type::Str), may("name", Type::Str)],
);

static ABORT_WRAPPER: ObjectType = object("AbortWrapper", &[need("data", Type::Object(&EMPTY))]);
static BITMAP_ADD_WRAPPER: ObjectType =
    object("BlockDirtyBitmapAddWrapper", &[need("data", Type::Object(&bitmaps::ADD))]);
static BITMAP_WRAPPER: ObjectType =
    object("BlockDirtyBitmapWrapper", &[need("data", Type::Object(bitmaps::ONE))]);
static BITMAP_MERGE_WRAPPER: ObjectType =
    object("BlockDirtyBitmapMergeWrapper", &[need("data", Type::Object(&bitmaps::MERGE))]);
static BACKUP_WRAPPER: ObjectType =
    object("BlockdevBackupWrapper", &[need("data", Type::Object(&BACKUP))]);
static MIRROR_WRAPPER: ObjectType =
    object("BlockdevMirrorWrapper", &[need("data", Type::Object(&MIRROR))]);
static DRIVE_BACKUP_WRAPPER: ObjectType =
    object("DriveBackupWrapper", &[need("data", Type::Object(&DRIVE_BACKUP))]);
static DRIVE_MIRROR_WRAPPER: ObjectType =
    object("DriveMirrorWrapper", &[need("data", Type::Object(&DRIVE_MIRROR))]);
static STREAM_WRAPPER: ObjectType =
    object("BlockStreamWrapper", &[need("data", Type::Object(&STREAM))]);
static COMMIT_WRAPPER: ObjectType =
    object("BlockCommitWrapper", &[need("data", Type::Object(&COMMIT))]);
static SNAPSHOT_WRAPPER: ObjectType =
    object("BlockdevSnapshotWrapper", &[need("data", Type::Object(&SNAPSHOT))]);
static SNAPSHOT_SYNC_WRAPPER: ObjectType =
    object("BlockdevSnapshotSyncWrapper", &[need("data", Type::Object(&SNAPSHOT_SYNC))]);
static SNAPSHOT_INTERNAL_WRAPPER: ObjectType =
    object("BlockdevSnapshotInternalWrapper", &[need("data", Type::Object(&SNAPSHOT_INTERNAL))]);

static ACTION: ObjectType = ObjectType {
    name: "TransactionAction",
    members: &[need("type", Type::Enum(&ACTION_KIND))],
    variants: Some(Variants {
        tag: "type",
        cases: &[
            ("abort", &ABORT_WRAPPER),
            ("block-commit", &COMMIT_WRAPPER),
            ("block-dirty-bitmap-add", &BITMAP_ADD_WRAPPER),
            ("block-dirty-bitmap-remove", &BITMAP_WRAPPER),
            ("block-dirty-bitmap-clear", &BITMAP_WRAPPER),
            ("block-dirty-bitmap-enable", &BITMAP_WRAPPER),
            ("block-dirty-bitmap-disable", &BITMAP_WRAPPER),
            ("block-dirty-bitmap-merge", &BITMAP_MERGE_WRAPPER),
            ("block-stream", &STREAM_WRAPPER),
            ("blockdev-backup", &BACKUP_WRAPPER),
            ("blockdev-mirror", &MIRROR_WRAPPER),
            ("blockdev-snapshot", &SNAPSHOT_WRAPPER),
            ("blockdev-snapshot-internal-sync", &SNAPSHOT_INTERNAL_WRAPPER),
            ("blockdev-snapshot-sync", &SNAPSHOT_SYNC_WRAPPER),
            ("drive-backup", &DRIVE_BACKUP_WRAPPER),
            ("drive-mirror", &DRIVE_MIRROR_WRAPPER),
        ],
    }),
    features: &[],
};
static ACTION_TYPE: Type = Type::Object(&ACTION);
static PROPERTIES: ObjectType =
    object("TransactionProperties", &[may("completion-mode", Type::Enum(&COMPLETION))]);
pub(super) static TRANSACTION: ObjectType = object(
    "Transaction",
    &[need("actions", Type::Array(&ACTION_TYPE)), may("properties", Type::Object(&PROPERTIES))],
);

/// Arguments of `blockdev-snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevSnapshot {
    /// The node that becomes the overlay's backing.
    pub node: String,
    /// The node that takes its place.
    pub overlay: String,
}

/// Whether an image is made or taken as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NewImageMode {
    /// The file is there and is opened as it is.
    Existing,
    /// The file is created with an absolute reference to its backing.
    #[default]
    AbsolutePaths,
}

/// Arguments of `blockdev-snapshot-sync`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevSnapshotSync {
    /// The node, by the name of a device or node.
    pub device: Option<String>,
    /// The node.
    pub node_name: Option<String>,
    /// Path of the new image.
    pub snapshot_file: String,
    /// Name of the new node.
    pub snapshot_node_name: Option<String>,
    /// Format of the new image; absent means qcow2.
    pub format: Option<String>,
    /// See [`NewImageMode`].
    #[serde(default)]
    pub mode: NewImageMode,
}

/// Arguments of `blockdev-snapshot-internal-sync`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockdevSnapshotInternal {
    /// The node whose image gets the snapshot.
    pub device: String,
    /// The snapshot's name.
    pub name: String,
}

/// Arguments of `blockdev-snapshot-delete-internal-sync`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockdevSnapshotDelete {
    /// The node whose image holds the snapshot.
    pub device: String,
    /// Its id.
    pub id: Option<String>,
    /// Its name.
    pub name: Option<String>,
}

/// Whether the jobs of a transaction succeed or fail together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CompletionMode {
    /// Each for itself.
    #[default]
    Individual,
    /// All or none.
    Grouped,
}

/// One step of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TransactionAction {
    /// Fails, for tests.
    Abort,
    /// A change of dirty bitmaps.
    Bitmap(BitmapChange),
    /// See [`BlockdevBackup`].
    Backup(Box<BlockdevBackup>),
    /// See [`BlockdevMirror`].
    Mirror(Box<BlockdevMirror>),
    /// A backup into a file.
    DriveBackup(Box<Drive<BlockdevBackup>>),
    /// A mirror into a file.
    DriveMirror(Box<Drive<BlockdevMirror>>),
    /// See [`BlockStream`].
    Stream(Box<BlockStream>),
    /// See [`BlockCommit`].
    Commit(Box<BlockCommit>),
    /// See [`BlockdevSnapshot`].
    Snapshot(BlockdevSnapshot),
    /// See [`BlockdevSnapshotInternal`].
    SnapshotInternal(BlockdevSnapshotInternal),
    /// See [`BlockdevSnapshotSync`].
    SnapshotSync(BlockdevSnapshotSync),
}

impl TransactionAction {
    /// Its name in QMP.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Abort => "abort",
            Self::Bitmap(change) => change.name(),
            Self::Backup(_) => "blockdev-backup",
            Self::Mirror(_) => "blockdev-mirror",
            Self::DriveBackup(_) => "drive-backup",
            Self::DriveMirror(_) => "drive-mirror",
            Self::Stream(_) => "block-stream",
            Self::Commit(_) => "block-commit",
            Self::Snapshot(_) => "blockdev-snapshot",
            Self::SnapshotInternal(_) => "blockdev-snapshot-internal-sync",
            Self::SnapshotSync(_) => "blockdev-snapshot-sync",
        }
    }
}

impl<'de> Deserialize<'de> for TransactionAction {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut value = Value::deserialize(deserializer)?;
        let data = value.get_mut("data").map(Value::take).unwrap_or_default();
        let action = match value.get("type").and_then(Value::as_str) {
            Some("abort") => return Ok(Self::Abort),
            Some("blockdev-backup") => {
                BlockdevBackup::deserialize(data).map(|backup| Self::Backup(Box::new(backup)))
            }
            Some("blockdev-mirror") => Box::deserialize(data).map(Self::Mirror),
            Some("drive-backup") => Box::deserialize(data).map(Self::DriveBackup),
            Some("drive-mirror") => Box::deserialize(data).map(Self::DriveMirror),
            Some("block-stream") => Box::deserialize(data).map(Self::Stream),
            Some("block-commit") => Box::deserialize(data).map(Self::Commit),
            Some("blockdev-snapshot") => BlockdevSnapshot::deserialize(data).map(Self::Snapshot),
            Some("blockdev-snapshot-internal-sync") => {
                BlockdevSnapshotInternal::deserialize(data).map(Self::SnapshotInternal)
            }
            Some("blockdev-snapshot-sync") => {
                BlockdevSnapshotSync::deserialize(data).map(Self::SnapshotSync)
            }
            Some(name) => match BitmapChange::read(name, data) {
                Some(change) => change.map(Self::Bitmap),
                None => return Err(D::Error::custom("no such action")),
            },
            None => return Err(D::Error::custom("action without data")),
        };
        action.map_err(D::Error::custom)
    }
}

/// Arguments of `transaction`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Transaction {
    /// The steps, in order.
    pub actions: Vec<TransactionAction>,
    /// Properties of the whole.
    #[serde(default)]
    properties: Properties,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Properties {
    completion_mode: CompletionMode,
}

impl Transaction {
    /// See [`CompletionMode`].
    pub fn completion_mode(&self) -> CompletionMode {
        self.properties.completion_mode
    }
}
