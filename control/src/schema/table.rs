//! The tables of commands and events.
//!
//! Owns: which commands exist, their argument and answer types, and what each one runs. Promises: a
//! command is in the table only if it works. Order of the table is the order of `query-commands`.

use std::collections::HashMap;
use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::Value;

use super::bitmaps::{self, BitmapChange};
use super::command::{Command, JobVerb};
use super::types::{EMPTY, ObjectType, Type};
use super::{
    amend, answers, arguments, blockdev, chains, create, exports, introspect, jobs, transaction,
    verbs,
};
use crate::qmp::version_info;

/// A command.
#[derive(Debug)]
pub struct CommandEntry {
    /// Its name.
    pub name: &'static str,
    /// Type of `arguments`.
    pub arguments: &'static ObjectType,
    /// Type of `return`.
    pub answer: Type,
    /// Named promises that clients probe.
    pub features: &'static [&'static str],
    /// What it does.
    pub run: Run,
}

/// What a command does with checked arguments.
#[derive(Debug)]
pub enum Run {
    /// Ends the negotiation; the session does it.
    Negotiate,
    /// Is answered by the front-end.
    Answer(fn() -> Value),
    /// Is given to the engine.
    Execute(fn(Value) -> Result<Command, serde_json::Error>),
}

/// An event.
#[derive(Debug)]
pub struct EventEntry {
    /// Its name.
    pub name: &'static str,
    /// Type of its `data`.
    pub data: &'static ObjectType,
}

/// The command of this name.
pub fn command_entry(name: &str) -> Option<&'static CommandEntry> {
    static BY_NAME: LazyLock<HashMap<&str, &CommandEntry>> =
        LazyLock::new(|| COMMANDS.iter().map(|entry| (entry.name, entry)).collect());
    BY_NAME.get(name).copied()
}

const NOTHING: Type = Type::Object(&EMPTY);

const fn command(
    name: &'static str,
    arguments: &'static ObjectType,
    answer: Type,
    run: Run,
) -> CommandEntry {
    CommandEntry { name, arguments, answer, features: &[], run }
}

const fn event(name: &'static str, data: &'static ObjectType) -> EventEntry {
    EventEntry { name, data }
}

static COMMAND_INFO_TYPE: Type = Type::Object(&answers::COMMAND_INFO);
static SCHEMA_INFO_TYPE: Type = Type::Object(&answers::SCHEMA_INFO);
static DEVICE_INFO_TYPE: Type = Type::Object(&answers::DEVICE_INFO);
static BLOCK_INFO_TYPE: Type = Type::Object(&answers::BLOCK_INFO);
static BLOCK_STATS_TYPE: Type = Type::Object(&answers::BLOCK_STATS);
static JOB_INFO_TYPE: Type = Type::Object(&answers::JOB_INFO);
static BLOCK_JOB_INFO_TYPE: Type = Type::Object(&answers::BLOCK_JOB_INFO);
static EXPORT_INFO_TYPE: Type = Type::Object(&answers::EXPORT_INFO);

/// All commands.
pub static COMMANDS: &[CommandEntry] = &[
    command("qmp_capabilities", &arguments::QMP_CAPABILITIES, NOTHING, Run::Negotiate),
    command("query-version", &EMPTY, Type::Object(&answers::VERSION), Run::Answer(version_info)),
    command(
        "query-commands",
        &EMPTY,
        Type::Array(&COMMAND_INFO_TYPE),
        Run::Answer(introspect::query_commands),
    ),
    command(
        "query-qmp-schema",
        &EMPTY,
        Type::Array(&SCHEMA_INFO_TYPE),
        Run::Answer(introspect::query_qmp_schema),
    ),
    command("quit", &EMPTY, NOTHING, Run::Execute(|_| Ok(Command::Quit))),
    command(
        "blockdev-add",
        &blockdev::BLOCKDEV_OPTIONS,
        NOTHING,
        Run::Execute(|value| Ok(Command::BlockdevAdd(Box::deserialize(value)?))),
    ),
    command(
        "blockdev-del",
        &arguments::BLOCKDEV_DEL,
        NOTHING,
        Run::Execute(|value| Ok(Command::BlockdevDel { node_name: text(&value, "node-name") })),
    ),
    command(
        "query-named-block-nodes",
        &arguments::NAMED_BLOCK_NODES,
        Type::Array(&DEVICE_INFO_TYPE),
        Run::Execute(|value| Ok(Command::QueryNamedBlockNodes { flat: flag(&value, "flat") })),
    ),
    command(
        "query-block",
        &EMPTY,
        Type::Array(&BLOCK_INFO_TYPE),
        Run::Execute(|_| Ok(Command::QueryBlock)),
    ),
    command(
        "query-blockstats",
        &arguments::BLOCKSTATS,
        Type::Array(&BLOCK_STATS_TYPE),
        Run::Execute(|value| {
            Ok(Command::QueryBlockstats { query_nodes: flag(&value, "query-nodes") })
        }),
    ),
    command(
        "query-jobs",
        &EMPTY,
        Type::Array(&JOB_INFO_TYPE),
        Run::Execute(|_| Ok(Command::QueryJobs)),
    ),
    command(
        "query-block-jobs",
        &EMPTY,
        Type::Array(&BLOCK_JOB_INFO_TYPE),
        Run::Execute(|_| Ok(Command::QueryBlockJobs)),
    ),
    job("job-pause", |value| verb(&value, JobVerb::Pause)),
    job("job-resume", |value| verb(&value, JobVerb::Resume)),
    job("job-cancel", |value| Ok(Command::JobCancel { id: text(&value, "id") })),
    job("job-complete", |value| verb(&value, JobVerb::Complete)),
    job("job-finalize", |value| verb(&value, JobVerb::Finalize)),
    job("job-dismiss", |value| verb(&value, JobVerb::Dismiss)),
    block_job("block-job-pause", |value| block_verb(&value, "device", JobVerb::Pause)),
    block_job("block-job-resume", |value| block_verb(&value, "device", JobVerb::Resume)),
    block_job("block-job-complete", |value| block_verb(&value, "device", JobVerb::Complete)),
    job("block-job-finalize", |value| block_verb(&value, "id", JobVerb::Finalize)),
    job("block-job-dismiss", |value| block_verb(&value, "id", JobVerb::Dismiss)),
    command(
        "block-job-cancel",
        &jobs::CANCEL,
        NOTHING,
        Run::Execute(|value| {
            let (id, force) = (text(&value, "device"), flag(&value, "force"));
            Ok(Command::BlockJobCancel { id, force })
        }),
    ),
    command(
        "block-job-set-speed",
        &jobs::SET_SPEED,
        NOTHING,
        Run::Execute(|value| {
            let speed = value.get("speed").and_then(Value::as_i64).unwrap_or_default();
            Ok(Command::BlockJobSetSpeed { id: text(&value, "device"), speed })
        }),
    ),
    command(
        "block-job-change",
        &jobs::CHANGE,
        NOTHING,
        Run::Execute(|value| Ok(Command::BlockJobChange(Deserialize::deserialize(value)?))),
    ),
    command(
        "block-stream",
        &chains::STREAM,
        NOTHING,
        Run::Execute(|value| Ok(Command::BlockStream(Box::deserialize(value)?))),
    ),
    command(
        "block-commit",
        &chains::COMMIT,
        NOTHING,
        Run::Execute(|value| Ok(Command::BlockCommit(Box::deserialize(value)?))),
    ),
    command(
        "blockdev-mirror",
        &jobs::MIRROR,
        NOTHING,
        Run::Execute(|value| Ok(Command::BlockdevMirror(Box::deserialize(value)?))),
    ),
    command(
        "blockdev-backup",
        &jobs::BACKUP,
        NOTHING,
        Run::Execute(|value| Ok(Command::BlockdevBackup(Box::deserialize(value)?))),
    ),
    command(
        "block-dirty-bitmap-add",
        &bitmaps::ADD,
        NOTHING,
        Run::Execute(|value| bitmap("block-dirty-bitmap-add", value)),
    ),
    command(
        "block-dirty-bitmap-remove",
        bitmaps::ONE,
        NOTHING,
        Run::Execute(|value| bitmap("block-dirty-bitmap-remove", value)),
    ),
    command(
        "block-dirty-bitmap-clear",
        bitmaps::ONE,
        NOTHING,
        Run::Execute(|value| bitmap("block-dirty-bitmap-clear", value)),
    ),
    command(
        "block-dirty-bitmap-enable",
        bitmaps::ONE,
        NOTHING,
        Run::Execute(|value| bitmap("block-dirty-bitmap-enable", value)),
    ),
    command(
        "block-dirty-bitmap-disable",
        bitmaps::ONE,
        NOTHING,
        Run::Execute(|value| bitmap("block-dirty-bitmap-disable", value)),
    ),
    command(
        "block-dirty-bitmap-merge",
        &bitmaps::MERGE,
        NOTHING,
        Run::Execute(|value| bitmap("block-dirty-bitmap-merge", value)),
    ),
    CommandEntry {
        name: "x-debug-block-dirty-bitmap-sha256",
        arguments: bitmaps::ONE,
        answer: Type::Object(&bitmaps::SHA256),
        features: &["unstable"],
        run: Run::Execute(|value| Ok(Command::BitmapSha256(Deserialize::deserialize(value)?))),
    },
    command(
        "drive-mirror",
        &jobs::DRIVE_MIRROR,
        NOTHING,
        Run::Execute(|value| Ok(Command::DriveMirror(Box::deserialize(value)?))),
    ),
    CommandEntry {
        name: "drive-backup",
        arguments: &jobs::DRIVE_BACKUP,
        answer: NOTHING,
        features: &["deprecated"],
        run: Run::Execute(|value| Ok(Command::DriveBackup(Box::deserialize(value)?))),
    },
    CommandEntry {
        name: "x-blockdev-amend",
        arguments: &amend::AMEND,
        answer: NOTHING,
        features: &["unstable"],
        run: Run::Execute(|value| Ok(Command::BlockdevAmend(Deserialize::deserialize(value)?))),
    },
    command(
        "blockdev-create",
        &create::CREATE,
        NOTHING,
        Run::Execute(|value| Ok(Command::BlockdevCreate(Deserialize::deserialize(value)?))),
    ),
    command(
        "change-backing-file",
        &verbs::CHANGE_BACKING_FILE,
        NOTHING,
        Run::Execute(|value| Ok(Command::ChangeBackingFile(Deserialize::deserialize(value)?))),
    ),
    command(
        "block-set-write-threshold",
        &verbs::WRITE_THRESHOLD,
        NOTHING,
        Run::Execute(|value| Ok(Command::BlockSetWriteThreshold(Deserialize::deserialize(value)?))),
    ),
    command(
        "blockdev-reopen",
        &verbs::REOPEN,
        NOTHING,
        Run::Execute(|value| Ok(Command::BlockdevReopen(Deserialize::deserialize(value)?))),
    ),
    command(
        "blockdev-set-active",
        &verbs::SET_ACTIVE,
        NOTHING,
        Run::Execute(|value| Ok(Command::BlockdevSetActive(Deserialize::deserialize(value)?))),
    ),
    command(
        "block_resize",
        &verbs::RESIZE,
        NOTHING,
        Run::Execute(|value| Ok(Command::BlockResize(Deserialize::deserialize(value)?))),
    ),
    CommandEntry {
        name: "x-debug-query-block-graph",
        arguments: &EMPTY,
        answer: Type::Object(&verbs::GRAPH),
        features: &["unstable"],
        run: Run::Execute(|_| Ok(Command::QueryBlockGraph)),
    },
    CommandEntry {
        name: "blockdev-snapshot",
        arguments: &transaction::SNAPSHOT,
        answer: NOTHING,
        features: &["allow-write-only-overlay"],
        run: Run::Execute(|value| Ok(Command::BlockdevSnapshot(Deserialize::deserialize(value)?))),
    },
    command(
        "blockdev-snapshot-sync",
        &transaction::SNAPSHOT_SYNC,
        NOTHING,
        Run::Execute(|value| Ok(Command::BlockdevSnapshotSync(Deserialize::deserialize(value)?))),
    ),
    command(
        "blockdev-snapshot-internal-sync",
        &transaction::SNAPSHOT_INTERNAL,
        NOTHING,
        Run::Execute(|value| Ok(Command::SnapshotInternal(Deserialize::deserialize(value)?))),
    ),
    command(
        "blockdev-snapshot-delete-internal-sync",
        &transaction::SNAPSHOT_DELETE,
        Type::Object(&answers::SNAPSHOT_INFO),
        Run::Execute(|value| Ok(Command::SnapshotDelete(Deserialize::deserialize(value)?))),
    ),
    command(
        "transaction",
        &transaction::TRANSACTION,
        NOTHING,
        Run::Execute(|value| Ok(Command::Transaction(Deserialize::deserialize(value)?))),
    ),
    command(
        "nbd-server-start",
        &exports::NBD_SERVER_START,
        NOTHING,
        Run::Execute(|value| Ok(Command::NbdServerStart(Deserialize::deserialize(value)?))),
    ),
    command("nbd-server-stop", &EMPTY, NOTHING, Run::Execute(|_| Ok(Command::NbdServerStop))),
    command(
        "block-export-add",
        &exports::BLOCK_EXPORT_OPTIONS,
        NOTHING,
        Run::Execute(|value| Ok(Command::BlockExportAdd(Deserialize::deserialize(value)?))),
    ),
    command(
        "block-export-del",
        &exports::BLOCK_EXPORT_DEL,
        NOTHING,
        Run::Execute(|value| Ok(Command::BlockExportDel(Deserialize::deserialize(value)?))),
    ),
    command(
        "query-block-exports",
        &EMPTY,
        Type::Array(&EXPORT_INFO_TYPE),
        Run::Execute(|_| Ok(Command::QueryBlockExports)),
    ),
    command(
        "object-add",
        &exports::OBJECT_OPTIONS,
        NOTHING,
        Run::Execute(|value| Ok(Command::ObjectAdd(Deserialize::deserialize(value)?))),
    ),
    job("object-del", |value| Ok(Command::ObjectDel { id: text(&value, "id") })),
];

/// All events.
pub static EVENTS: &[EventEntry] = &[
    event("JOB_STATUS_CHANGE", &answers::JOB_STATUS_CHANGE),
    event("BLOCK_JOB_COMPLETED", &answers::JOB_COMPLETED),
    event("BLOCK_JOB_CANCELLED", &answers::JOB_PROGRESS),
    event("BLOCK_JOB_ERROR", &answers::JOB_ERROR),
    event("BLOCK_JOB_READY", &answers::JOB_PROGRESS),
    event("BLOCK_JOB_PENDING", &answers::JOB_PENDING),
    event("BLOCK_JOB_CONVERGE", &answers::JOB_CONVERGE),
    event("BLOCK_WRITE_THRESHOLD", &verbs::WRITE_THRESHOLD_EVENT),
    event("BLOCK_IMAGE_CORRUPTED", &answers::IMAGE_CORRUPTED),
    event("BLOCK_EXPORT_DELETED", &answers::EXPORT_DELETED),
];

type Execute = fn(Value) -> Result<Command, serde_json::Error>;

/// A command whose only argument is `id`.
const fn job(name: &'static str, run: Execute) -> CommandEntry {
    command(name, &jobs::BY_ID, NOTHING, Run::Execute(run))
}

/// A command whose only argument is `device`.
const fn block_job(name: &'static str, run: Execute) -> CommandEntry {
    command(name, &jobs::BY_DEVICE, NOTHING, Run::Execute(run))
}

fn bitmap(name: &str, value: Value) -> Result<Command, serde_json::Error> {
    BitmapChange::command(name, value).map(Command::Bitmap)
}

fn verb(value: &Value, verb: JobVerb) -> Result<Command, serde_json::Error> {
    Ok(Command::Job { verb, id: text(value, "id") })
}

fn block_verb(value: &Value, key: &str, verb: JobVerb) -> Result<Command, serde_json::Error> {
    Ok(Command::BlockJob { verb, id: text(value, key) })
}

fn text(value: &Value, key: &str) -> String {
    value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn flag(value: &Value, key: &str) -> bool {
    value.get(key).and_then(Value::as_bool).unwrap_or_default()
}
