//! Options of block nodes (`blockdev-add`, `--blockdev`).
//!
//! Owns: the union by driver, as data and as typed form. Promises: only drivers that are built are
//! listed, every listed option is either honoured or has no effect on results (the cache sizes of
//! qcow2). Does not: check names or combinations; the executor of the command does.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::types::{
    AlternateType, EnumType, INT, Int, ObjectType, Type, Variants, may, may_unstable, need, object,
    words,
};

pub(super) static DRIVER: EnumType =
    words("BlockdevDriver", &["copy-before-write", "file", "qcow2", "raw", "snapshot-access"]);
static DISCARD: EnumType = words("BlockdevDiscardOptions", &["ignore", "unmap"]);
pub(super) static DETECT_ZEROES: EnumType =
    words("BlockdevDetectZeroesOptions", &["off", "on", "unmap"]);
static ON_OFF_AUTO: EnumType = words("OnOffAuto", &["auto", "on", "off"]);
static AIO: EnumType = words("BlockdevAioOptions", &["threads", "native", "io_uring"]);
static OVERLAP_TEMPLATE: EnumType =
    words("Qcow2OverlapCheckMode", &["none", "constant", "cached", "all"]);

static CACHE: ObjectType =
    object("BlockdevCacheOptions", &[may("direct", Type::Bool), may("no-flush", Type::Bool)]);

/// Options of a node of any driver.
pub static BLOCKDEV_OPTIONS: ObjectType = ObjectType {
    name: "BlockdevOptions",
    members: &[
        need("driver", Type::Enum(&DRIVER)),
        may("node-name", Type::Str),
        may("discard", Type::Enum(&DISCARD)),
        may("cache", Type::Object(&CACHE)),
        may("active", Type::Bool),
        may("read-only", Type::Bool),
        may("auto-read-only", Type::Bool),
        may("force-share", Type::Bool),
        may("detect-zeroes", Type::Enum(&DETECT_ZEROES)),
    ],
    variants: Some(Variants {
        tag: "driver",
        cases: &[
            ("copy-before-write", &CBW),
            ("file", &FILE),
            ("qcow2", &QCOW2),
            ("raw", &RAW),
            ("snapshot-access", &SNAPSHOT_ACCESS),
        ],
    }),
    features: &[],
};

static FILE: ObjectType = ObjectType {
    name: "BlockdevOptionsFile",
    members: &[
        need("filename", Type::Str),
        may("pr-manager", Type::Str),
        may("locking", Type::Enum(&ON_OFF_AUTO)),
        may("aio", Type::Enum(&AIO)),
        may("aio-max-batch", INT),
        may("drop-cache", Type::Bool),
        may_unstable("x-check-cache-dropped", Type::Bool),
    ],
    variants: None,
    features: &["dynamic-auto-read-only"],
};

pub(super) static REFERENCE: AlternateType =
    AlternateType { name: "BlockdevRef", choices: &[Type::Object(&BLOCKDEV_OPTIONS), Type::Str] };

static REFERENCE_OR_NULL: AlternateType = AlternateType {
    name: "BlockdevRefOrNull",
    choices: &[Type::Object(&BLOCKDEV_OPTIONS), Type::Str, Type::Null],
};

static OVERLAP_FLAGS: ObjectType = object(
    "Qcow2OverlapCheckFlags",
    &[
        may("template", Type::Enum(&OVERLAP_TEMPLATE)),
        may("main-header", Type::Bool),
        may("active-l1", Type::Bool),
        may("active-l2", Type::Bool),
        may("refcount-table", Type::Bool),
        may("refcount-block", Type::Bool),
        may("snapshot-table", Type::Bool),
        may("inactive-l1", Type::Bool),
        may("inactive-l2", Type::Bool),
        may("bitmap-directory", Type::Bool),
    ],
);

static OVERLAP_CHECKS: AlternateType = AlternateType {
    name: "Qcow2OverlapChecks",
    choices: &[Type::Object(&OVERLAP_FLAGS), Type::Enum(&OVERLAP_TEMPLATE)],
};

static RAW: ObjectType = object(
    "BlockdevOptionsRaw",
    &[need("file", Type::Alternate(&REFERENCE)), may("offset", INT), may("size", INT)],
);

static QCOW2: ObjectType = object(
    "BlockdevOptionsQcow2",
    &[
        need("file", Type::Alternate(&REFERENCE)),
        may("backing", Type::Alternate(&REFERENCE_OR_NULL)),
        may("lazy-refcounts", Type::Bool),
        may("pass-discard-request", Type::Bool),
        may("pass-discard-snapshot", Type::Bool),
        may("pass-discard-other", Type::Bool),
        may("discard-no-unref", Type::Bool),
        may("overlap-check", Type::Alternate(&OVERLAP_CHECKS)),
        may("cache-size", INT),
        may("l2-cache-size", INT),
        may("l2-cache-entry-size", INT),
        may("refcount-cache-size", INT),
        may("cache-clean-interval", INT),
        may("data-file", Type::Alternate(&REFERENCE)),
    ],
);

pub(super) static ON_CBW_ERROR: EnumType =
    words("OnCbwError", &["break-guest-write", "break-snapshot"]);

static BITMAP: ObjectType =
    object("BlockDirtyBitmap", &[need("node", Type::Str), need("name", Type::Str)]);

static CBW: ObjectType = object(
    "BlockdevOptionsCbw",
    &[
        need("file", Type::Alternate(&REFERENCE)),
        need("target", Type::Alternate(&REFERENCE)),
        may("bitmap", Type::Object(&BITMAP)),
        may("on-cbw-error", Type::Enum(&ON_CBW_ERROR)),
        may("cbw-timeout", Type::Int(Int::U32)),
        may("min-cluster-size", Type::Int(Int::Size)),
    ],
);

static SNAPSHOT_ACCESS: ObjectType =
    object("BlockdevOptionsGenericFormat", &[need("file", Type::Alternate(&REFERENCE))]);

/// Who suffers when old content cannot be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnCbwError {
    /// The guest's write fails.
    #[default]
    BreakGuestWrite,
    /// The snapshot cannot be read any more.
    BreakSnapshot,
}

/// A dirty bitmap of a node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct NamedBitmap {
    /// The node.
    pub node: String,
    /// The bitmap.
    pub name: String,
}

/// Options of driver `copy-before-write`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CbwOptions {
    /// The disk.
    pub file: BlockdevRef,
    /// Where old content goes.
    pub target: BlockdevRef,
    /// What is kept; absent means everything.
    pub bitmap: Option<NamedBitmap>,
    /// See [`OnCbwError`].
    #[serde(default)]
    pub on_cbw_error: OnCbwError,
    /// Seconds that a guest waits before that counts as an error; 0 is for ever.
    pub cbw_timeout: Option<u32>,
    /// Least bytes of a unit.
    pub min_cluster_size: Option<u64>,
}

/// Options of driver `snapshot-access`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct SnapshotAccessOptions {
    /// The copy-before-write node.
    pub file: BlockdevRef,
}

/// What a discard request does on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Discard {
    /// Succeeds without effect.
    #[default]
    Ignore,
    /// Frees the space.
    Unmap,
}

/// Whether writes of zeroes are turned into write-zeroes requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DetectZeroes {
    /// Data is written as it is.
    #[default]
    Off,
    /// Zeroes are written as zeroes.
    On,
    /// Zeroes are written as zeroes and may free the space.
    Unmap,
}

/// A switch with a default chosen by the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnOffAuto {
    /// Chosen by the program.
    #[default]
    Auto,
    /// On.
    On,
    /// Off.
    Off,
}

/// The peer's choice of I/O back-end; accepted, ours is always the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AioMode {
    /// A pool of threads.
    #[default]
    Threads,
    /// Linux AIO; the peer wants `cache.direct` with it.
    Native,
    /// The ring.
    IoUring,
}

/// Cache mode of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct CacheOptions {
    /// Bypass the page cache. Absent means the parent's setting, at the root false.
    pub direct: Option<bool>,
    /// Ignore flushes. Absent means the parent's setting, at the root false.
    pub no_flush: Option<bool>,
}

/// Options that every driver has.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct NodeOptions {
    /// Name; the root of a command must have one, children get a generated one.
    pub node_name: Option<String>,
    /// What discard does; absent means the parent's setting, at the root `ignore`.
    pub discard: Option<Discard>,
    /// Cache mode.
    pub cache: CacheOptions,
    /// Whether the node is active from the start; absent means true.
    pub active: Option<bool>,
    /// Opened for reading only; absent means the parent's setting, at the root false.
    pub read_only: Option<bool>,
    /// Opened for reading only where writing is not possible or not needed.
    pub auto_read_only: Option<bool>,
    /// Take no lock; needs `read_only`.
    pub force_share: Option<bool>,
    /// See [`DetectZeroes`].
    pub detect_zeroes: DetectZeroes,
}

/// Options of driver `file`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileOptions {
    /// Path.
    pub filename: String,
    /// Whether image locks are taken.
    #[serde(default)]
    pub locking: OnOffAuto,
    /// See [`AioMode`].
    #[serde(default)]
    pub aio: AioMode,
}

/// Options of driver `raw`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RawOptions {
    /// The node below.
    pub file: BlockdevRef,
    /// First byte of the file that the node shows.
    pub offset: Option<i64>,
    /// Bytes that the node shows.
    pub size: Option<i64>,
}

/// Options of driver `qcow2`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Options {
    /// The node that holds the image.
    pub file: BlockdevRef,
    /// The node below; absent means what the image's header says, `Null` means none.
    #[serde(default, deserialize_with = "present")]
    pub backing: Option<BlockdevRef>,
    /// The node that holds the guest data, if the image does not; absent means what the header
    /// says.
    pub data_file: Option<BlockdevRef>,
    /// Metadata cache in bytes, both kinds.
    pub cache_size: Option<i64>,
    /// L2 table cache in bytes.
    pub l2_cache_size: Option<i64>,
    /// Bytes of an L2 table that are read at once.
    pub l2_cache_entry_size: Option<i64>,
    /// Refcount block cache in bytes.
    pub refcount_cache_size: Option<i64>,
    /// Seconds after which unused metadata leaves the cache.
    pub cache_clean_interval: Option<i64>,
    /// Whether freed clusters stay reserved for their guest address.
    pub discard_no_unref: Option<bool>,
    /// Whether discards of the guest reach the file; absent means if `discard` is unmap.
    pub pass_discard_request: Option<bool>,
    /// Whether clusters freed with a snapshot are discarded in the file.
    pub pass_discard_snapshot: Option<bool>,
    /// Whether other freed clusters are discarded in the file.
    pub pass_discard_other: Option<bool>,
    /// Whether refcounts may be written late, under the image's dirty bit.
    pub lazy_refcounts: Option<bool>,
    /// Which metadata is guarded against overlaps: a template, or flags; checked by the schema.
    pub overlap_check: Option<Value>,
}

/// Tells `"backing": null` from no `backing`.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<BlockdevRef>, D::Error> {
    BlockdevRef::deserialize(deserializer).map(Some)
}

/// Options of a node: the common ones and the driver's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockdevOptions {
    /// Common options.
    pub node: NodeOptions,
    /// The driver and its options.
    pub driver: DriverOptions,
}

/// The options of each driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DriverOptions {
    /// A file of the host.
    File(FileOptions),
    /// A raw image, or a part of it.
    Raw(RawOptions),
    /// A qcow2 image.
    Qcow2(Box<Qcow2Options>),
    /// A filter that keeps what guests overwrite.
    CopyBeforeWrite(Box<CbwOptions>),
    /// A view of what such a filter keeps.
    SnapshotAccess(SnapshotAccessOptions),
}

/// A node named or described.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockdevRef {
    /// An existing node.
    Name(String),
    /// A node to be made.
    Definition(Box<BlockdevOptions>),
    /// No node.
    Null,
}

impl<'de> Deserialize<'de> for BlockdevOptions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let node = NodeOptions::deserialize(&value).map_err(D::Error::custom)?;
        let driver = match value.get("driver").and_then(Value::as_str) {
            Some("file") => FileOptions::deserialize(value).map(DriverOptions::File),
            Some("raw") => RawOptions::deserialize(value).map(DriverOptions::Raw),
            Some("qcow2") => {
                Qcow2Options::deserialize(value).map(|q| DriverOptions::Qcow2(Box::new(q)))
            }
            Some("copy-before-write") => {
                CbwOptions::deserialize(value).map(|c| DriverOptions::CopyBeforeWrite(Box::new(c)))
            }
            Some("snapshot-access") => {
                SnapshotAccessOptions::deserialize(value).map(DriverOptions::SnapshotAccess)
            }
            _ => return Err(D::Error::custom("driver without options")),
        };
        Ok(Self { node, driver: driver.map_err(D::Error::custom)? })
    }
}

impl<'de> Deserialize<'de> for BlockdevRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::Null => Ok(Self::Null),
            Value::String(name) => Ok(Self::Name(name)),
            value => BlockdevOptions::deserialize(value)
                .map(|options| Self::Definition(Box::new(options)))
                .map_err(D::Error::custom),
        }
    }
}
