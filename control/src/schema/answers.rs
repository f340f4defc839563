//! Types of answers and event data.
//!
//! Owns: the shape of what the daemon sends, as `query-qmp-schema` shows it. Promises: a member
//! that is never sent is not listed.

use super::blockdev::DETECT_ZEROES;
use super::exports::EXPORT_TYPE;
use super::jobs::JOB_TYPE;
use super::types::{EnumType, INT, ObjectType, Type, Variants, may, need, object, union, words};

static VERSION_TRIPLE: ObjectType =
    object("VersionTriple", &[need("major", INT), need("minor", INT), need("micro", INT)]);
pub(super) static VERSION: ObjectType = object(
    "VersionInfo",
    &[need("qemu", Type::Object(&VERSION_TRIPLE)), need("package", Type::Str)],
);
pub(super) static COMMAND_INFO: ObjectType = object("CommandInfo", &[need("name", Type::Str)]);

/// A snapshot inside an image.
pub(super) static SNAPSHOT_INFO: ObjectType = object(
    "SnapshotInfo",
    &[
        need("id", Type::Str),
        need("name", Type::Str),
        need("vm-state-size", INT),
        need("date-sec", INT),
        need("date-nsec", INT),
        need("vm-clock-sec", INT),
        need("vm-clock-nsec", INT),
        may("icount", INT),
    ],
);

static STR: Type = Type::Str;
static META_TYPE: EnumType = words(
    "SchemaMetaType",
    &["builtin", "enum", "array", "object", "alternate", "command", "event"],
);
static JSON_TYPE: EnumType =
    words("JSONType", &["string", "number", "int", "boolean", "null", "object", "array", "value"]);
static SCHEMA_BUILTIN: ObjectType =
    object("SchemaInfoBuiltin", &[need("json-type", Type::Enum(&JSON_TYPE))]);
static SCHEMA_ENUM_MEMBER: ObjectType =
    object("SchemaInfoEnumMember", &[need("name", Type::Str), may("features", Type::Array(&STR))]);
static SCHEMA_ENUM_MEMBER_TYPE: Type = Type::Object(&SCHEMA_ENUM_MEMBER);
static SCHEMA_ENUM: ObjectType = object(
    "SchemaInfoEnum",
    &[
        need("members", Type::Array(&SCHEMA_ENUM_MEMBER_TYPE)),
        super::types::Member {
            name: "values",
            ty: Type::Array(&STR),
            optional: false,
            features: &["deprecated"],
        },
    ],
);
static SCHEMA_ARRAY: ObjectType = object("SchemaInfoArray", &[need("element-type", Type::Str)]);
static SCHEMA_MEMBER: ObjectType = object(
    "SchemaInfoObjectMember",
    &[
        need("name", Type::Str),
        need("type", Type::Str),
        may("default", Type::Any),
        may("features", Type::Array(&STR)),
    ],
);
static SCHEMA_MEMBER_TYPE: Type = Type::Object(&SCHEMA_MEMBER);
static SCHEMA_VARIANT: ObjectType =
    object("SchemaInfoObjectVariant", &[need("case", Type::Str), need("type", Type::Str)]);
static SCHEMA_VARIANT_TYPE: Type = Type::Object(&SCHEMA_VARIANT);
static SCHEMA_OBJECT: ObjectType = object(
    "SchemaInfoObject",
    &[
        need("members", Type::Array(&SCHEMA_MEMBER_TYPE)),
        may("tag", Type::Str),
        may("variants", Type::Array(&SCHEMA_VARIANT_TYPE)),
    ],
);
static SCHEMA_CHOICE: ObjectType = object("SchemaInfoAlternateMember", &[need("type", Type::Str)]);
static SCHEMA_CHOICE_TYPE: Type = Type::Object(&SCHEMA_CHOICE);
static SCHEMA_ALTERNATE: ObjectType =
    object("SchemaInfoAlternate", &[need("members", Type::Array(&SCHEMA_CHOICE_TYPE))]);
static SCHEMA_COMMAND: ObjectType = object(
    "SchemaInfoCommand",
    &[need("arg-type", Type::Str), need("ret-type", Type::Str), may("allow-oob", Type::Bool)],
);
static SCHEMA_EVENT: ObjectType = object("SchemaInfoEvent", &[need("arg-type", Type::Str)]);
pub(super) static SCHEMA_INFO: ObjectType = union(
    "SchemaInfo",
    &[
        need("name", Type::Str),
        need("meta-type", Type::Enum(&META_TYPE)),
        may("features", Type::Array(&STR)),
    ],
    "meta-type",
    &[
        ("builtin", &SCHEMA_BUILTIN),
        ("enum", &SCHEMA_ENUM),
        ("array", &SCHEMA_ARRAY),
        ("object", &SCHEMA_OBJECT),
        ("alternate", &SCHEMA_ALTERNATE),
        ("command", &SCHEMA_COMMAND),
        ("event", &SCHEMA_EVENT),
    ],
);

static JOB_STATUS: EnumType = words(
    "JobStatus",
    &[
        "undefined",
        "created",
        "running",
        "paused",
        "ready",
        "standby",
        "waiting",
        "pending",
        "aborting",
        "concluded",
        "null",
    ],
);
static IO_STATUS: EnumType = words("BlockDeviceIoStatus", &["ok", "failed", "nospace"]);
static CONVERGE_PHASE: EnumType =
    words("ConvergePhase", &["background", "write-blocking", "throttling"]);
/// Ours: where a job is that is to be ready in time. `dirty-rate` in bytes per second, `remaining`
/// in bytes, `delay-us` of each write of a guest; `eta-ms` only if an end is to be expected.
static CONVERGE_INFO: ObjectType = object(
    "ConvergeInfo",
    &[
        need("phase", Type::Enum(&CONVERGE_PHASE)),
        need("dirty-rate", INT),
        need("remaining", INT),
        need("delay-us", INT),
        need("deadline-missed", Type::Bool),
        may("eta-ms", INT),
    ],
);
/// Ours: a job that is to be ready in time went on to another phase, or missed its deadline.
pub(super) static JOB_CONVERGE: ObjectType = object(
    "BLOCK_JOB_CONVERGE",
    &[
        need("id", Type::Str),
        need("phase", Type::Enum(&CONVERGE_PHASE)),
        need("dirty-rate", INT),
        need("remaining", INT),
        need("delay-us", INT),
        need("deadline-missed", Type::Bool),
        may("eta-ms", INT),
    ],
);
pub(super) static JOB_INFO: ObjectType = object(
    "JobInfo",
    &[
        need("id", Type::Str),
        need("type", Type::Enum(&JOB_TYPE)),
        need("status", Type::Enum(&JOB_STATUS)),
        need("current-progress", INT),
        need("total-progress", INT),
        may("error", Type::Str),
        may("converge", Type::Object(&CONVERGE_INFO)),
    ],
);
/// Ours: where a backup keeps what guests overwrite while its target is slow.
static SPILL_INFO: ObjectType =
    object("BackupSpillInfo", &[need("file", Type::Str), need("bytes", INT), need("max", INT)]);
static MIRROR_INFO: ObjectType =
    object("BlockJobInfoMirror", &[need("actively-synced", Type::Bool)]);
pub(super) static BLOCK_JOB_INFO: ObjectType = ObjectType {
    name: "BlockJobInfo",
    members: &[
        need("type", Type::Enum(&JOB_TYPE)),
        need("device", Type::Str),
        need("len", INT),
        need("offset", INT),
        need("busy", Type::Bool),
        need("paused", Type::Bool),
        need("speed", INT),
        need("io-status", Type::Enum(&IO_STATUS)),
        need("ready", Type::Bool),
        need("status", Type::Enum(&JOB_STATUS)),
        need("auto-finalize", Type::Bool),
        need("auto-dismiss", Type::Bool),
        may("error", Type::Str),
        may("converge", Type::Object(&CONVERGE_INFO)),
        may("spill", Type::Object(&SPILL_INFO)),
    ],
    variants: Some(Variants { tag: "type", cases: &[("mirror", &MIRROR_INFO)] }),
    features: &[],
};

pub(super) static EXPORT_INFO: ObjectType = object(
    "BlockExportInfo",
    &[
        need("id", Type::Str),
        need("type", Type::Enum(&EXPORT_TYPE)),
        need("node-name", Type::Str),
        need("shutting-down", Type::Bool),
    ],
);

static COMPRESSION: EnumType = words("Qcow2CompressionType", &["zlib", "zstd"]);
static INFO_QCOW2: ObjectType = object(
    "ImageInfoSpecificQCow2",
    &[
        need("compat", Type::Str),
        may("extended-l2", Type::Bool),
        may("lazy-refcounts", Type::Bool),
        may("corrupt", Type::Bool),
        need("refcount-bits", INT),
        need("compression-type", Type::Enum(&COMPRESSION)),
    ],
);
static INFO_FILE: ObjectType = object("ImageInfoSpecificFile", &[may("extent-size-hint", INT)]);
static INFO_QCOW2_WRAPPER: ObjectType =
    object("ImageInfoSpecificQCow2Wrapper", &[need("data", Type::Object(&INFO_QCOW2))]);
static INFO_FILE_WRAPPER: ObjectType =
    object("ImageInfoSpecificFileWrapper", &[need("data", Type::Object(&INFO_FILE))]);
static INFO_KIND: EnumType = words("ImageInfoSpecificKind", &["qcow2", "file"]);
static INFO_SPECIFIC: ObjectType = union(
    "ImageInfoSpecific",
    &[need("type", Type::Enum(&INFO_KIND))],
    "type",
    &[("qcow2", &INFO_QCOW2_WRAPPER), ("file", &INFO_FILE_WRAPPER)],
);
static IMAGE_INFO: ObjectType = object(
    "ImageInfo",
    &[
        need("filename", Type::Str),
        need("format", Type::Str),
        may("dirty-flag", Type::Bool),
        may("actual-size", INT),
        need("virtual-size", INT),
        may("cluster-size", INT),
        may("backing-filename", Type::Str),
        may("full-backing-filename", Type::Str),
        may("backing-filename-format", Type::Str),
        may("format-specific", Type::Object(&INFO_SPECIFIC)),
        may("backing-image", Type::Object(&IMAGE_INFO)),
    ],
);
static CACHE_INFO: ObjectType = object(
    "BlockdevCacheInfo",
    &[need("writeback", Type::Bool), need("direct", Type::Bool), need("no-flush", Type::Bool)],
);
static DIRTY_INFO: ObjectType = object(
    "BlockDirtyInfo",
    &[
        may("name", Type::Str),
        need("count", INT),
        need("granularity", INT),
        need("recording", Type::Bool),
        need("busy", Type::Bool),
        need("persistent", Type::Bool),
        may("inconsistent", Type::Bool),
        may("follow", Type::Bool),
    ],
);
static DIRTY_INFO_TYPE: Type = Type::Object(&DIRTY_INFO);
pub(super) static DEVICE_INFO: ObjectType = object(
    "BlockDeviceInfo",
    &[
        need("file", Type::Str),
        may("node-name", Type::Str),
        need("ro", Type::Bool),
        need("drv", Type::Str),
        may("backing_file", Type::Str),
        need("backing_file_depth", INT),
        need("active", Type::Bool),
        need("encrypted", Type::Bool),
        need("detect_zeroes", Type::Enum(&DETECT_ZEROES)),
        need("bps", INT),
        need("bps_rd", INT),
        need("bps_wr", INT),
        need("iops", INT),
        need("iops_rd", INT),
        need("iops_wr", INT),
        need("image", Type::Object(&IMAGE_INFO)),
        need("cache", Type::Object(&CACHE_INFO)),
        need("write_threshold", INT),
        may("dirty-bitmaps", Type::Array(&DIRTY_INFO_TYPE)),
    ],
);
pub(super) static BLOCK_INFO: ObjectType = object(
    "BlockInfo",
    &[
        need("device", Type::Str),
        need("type", Type::Str),
        need("removable", Type::Bool),
        need("locked", Type::Bool),
        may("inserted", Type::Object(&DEVICE_INFO)),
    ],
);

static DEVICE_STATS: ObjectType = object(
    "BlockDeviceStats",
    &[
        need("rd_bytes", INT),
        need("wr_bytes", INT),
        need("zone_append_bytes", INT),
        need("unmap_bytes", INT),
        need("rd_operations", INT),
        need("wr_operations", INT),
        need("zone_append_operations", INT),
        need("flush_operations", INT),
        need("unmap_operations", INT),
        need("rd_total_time_ns", INT),
        need("wr_total_time_ns", INT),
        need("zone_append_total_time_ns", INT),
        need("flush_total_time_ns", INT),
        need("unmap_total_time_ns", INT),
        need("wr_highest_offset", INT),
        need("rd_merged", INT),
        need("wr_merged", INT),
        need("zone_append_merged", INT),
        need("unmap_merged", INT),
        need("failed_rd_operations", INT),
        need("failed_wr_operations", INT),
        need("failed_zone_append_operations", INT),
        need("failed_flush_operations", INT),
        need("failed_unmap_operations", INT),
        need("invalid_rd_operations", INT),
        need("invalid_wr_operations", INT),
        need("invalid_zone_append_operations", INT),
        need("invalid_flush_operations", INT),
        need("invalid_unmap_operations", INT),
        need("account_invalid", Type::Bool),
        need("account_failed", Type::Bool),
    ],
);
static FILE_STATS: ObjectType = object(
    "BlockStatsSpecificFile",
    &[need("discard-nb-ok", INT), need("discard-nb-failed", INT), need("discard-bytes-ok", INT)],
);
static STATS_DRIVER: EnumType = words("BlockdevDriver", &["file", "qcow2", "raw"]);
static STATS_SPECIFIC: ObjectType = union(
    "BlockStatsSpecific",
    &[need("driver", Type::Enum(&STATS_DRIVER))],
    "driver",
    &[("file", &FILE_STATS)],
);
pub(super) static BLOCK_STATS: ObjectType = object(
    "BlockStats",
    &[
        may("device", Type::Str),
        may("node-name", Type::Str),
        need("stats", Type::Object(&DEVICE_STATS)),
        may("driver-specific", Type::Object(&STATS_SPECIFIC)),
        may("parent", Type::Object(&BLOCK_STATS)),
        may("backing", Type::Object(&BLOCK_STATS)),
    ],
);

static IO_OPERATION: EnumType = words("IoOperationType", &["read", "write"]);
static ERROR_ACTION: EnumType = words("BlockErrorAction", &["ignore", "report", "stop"]);
pub(super) static JOB_STATUS_CHANGE: ObjectType =
    object("JobStatusChange", &[need("id", Type::Str), need("status", Type::Enum(&JOB_STATUS))]);
pub(super) static JOB_COMPLETED: ObjectType = object(
    "BlockJobCompleted",
    &[
        need("type", Type::Enum(&JOB_TYPE)),
        need("device", Type::Str),
        need("len", INT),
        need("offset", INT),
        need("speed", INT),
        may("error", Type::Str),
    ],
);
pub(super) static JOB_PROGRESS: ObjectType = object(
    "BlockJobProgress",
    &[
        need("type", Type::Enum(&JOB_TYPE)),
        need("device", Type::Str),
        need("len", INT),
        need("offset", INT),
        need("speed", INT),
    ],
);
pub(super) static JOB_ERROR: ObjectType = object(
    "BlockJobError",
    &[
        need("device", Type::Str),
        need("operation", Type::Enum(&IO_OPERATION)),
        need("action", Type::Enum(&ERROR_ACTION)),
    ],
);
pub(super) static JOB_PENDING: ObjectType =
    object("BlockJobPending", &[need("type", Type::Enum(&JOB_TYPE)), need("id", Type::Str)]);
pub(super) static EXPORT_DELETED: ObjectType =
    object("BlockExportDeleted", &[need("id", Type::Str)]);
pub(super) static IMAGE_CORRUPTED: ObjectType = object(
    "BlockImageCorrupted",
    &[
        need("device", Type::Str),
        may("node-name", Type::Str),
        need("msg", Type::Str),
        may("offset", INT),
        may("size", INT),
        need("fatal", Type::Bool),
    ],
);
