//! The object on core 0 that executes commands.
//!
//! Owns: graph, jobs, exports and objects of the daemon. Order rules: commands of one caller are
//! given one after the other; commands of several callers run at the same time, and what they
//! change is checked where it is changed.

use std::cell::Cell;
use std::rc::Rc;

use liveblk_engine::executor::sync::{Notify, select};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::graph::Graph;
use liveblk_engine::node::Node;
use liveblk_exports::Exports;
use liveblk_jobs::{JobInfo, JobManager, Verb};
use serde_json::{Map, Value};

use super::errors::Failure;
use super::events::{self, Sinks};
use super::objects::Objects;
use crate::limits::EXPORTS_FIRST_NS;
use crate::schema::{Command, JobVerb};

pub(super) type Result<T, E = Failure> = std::result::Result<T, E>;

/// See the module.
pub(super) struct Control {
    pub(super) core: Core,
    pub(super) graph: Rc<Graph>,
    pub(super) jobs: Rc<JobManager>,
    pub(super) exports: Exports,
    pub(super) objects: Objects,
    end: Cell<End>,
    ended: Notify,
}

/// ```text
/// Open --quit, signal--> Ending --jobs and exports gone--> Quiet
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Open,
    Ending,
    Quiet,
}

impl Control {
    /// The control of `core`, made at first use.
    pub(super) fn of(core: &Core) -> Rc<Self> {
        core.extension(|| {
            let sinks = core.extension(Sinks::default);
            let exports = Exports::new(core, move |id| sinks.emit(&events::of_export_gone(id)));
            let sinks = core.extension(Sinks::default);
            let jobs = JobManager::of(core);
            jobs.subscribe(Rc::new(move |event| sinks.emit(&events::of_job(event))));
            Self {
                core: core.clone(),
                graph: Graph::of(core),
                jobs,
                exports,
                objects: Objects::default(),
                end: Cell::new(End::Open),
                ended: Notify::new(core),
            }
        })
    }

    /// Executes a command.
    pub(super) async fn execute(self: Rc<Self>, command: Command) -> Result<Value> {
        if self.end.get() != End::Open && command != Command::Quit {
            return Err(Failure::generic("The daemon is shutting down"));
        }
        match command {
            Command::Quit => self.quiesce().await,
            Command::BlockdevAdd(options) => self.add_node(*options).await?,
            Command::BlockdevDel { node_name } => self.remove_node(&node_name).await?,
            Command::BlockdevMirror(mirror) => self.mirror(*mirror).await?,
            Command::BlockdevBackup(backup) => self.backup(*backup).await?,
            Command::BlockStream(stream) => self.stream(*stream).await?,
            Command::BlockCommit(commit) => self.commit(*commit).await?,
            Command::Bitmap(change) => self.change_bitmap(change).await?,
            Command::BitmapSha256(bitmap) => return self.bitmap_sha256(&bitmap),
            Command::DriveMirror(drive) => self.drive_mirror(*drive).await?,
            Command::DriveBackup(drive) => self.drive_backup(*drive).await?,
            Command::BlockdevAmend(amend) => self.amend(&amend)?,
            Command::BlockdevCreate(create) => self.create(create)?,
            Command::ChangeBackingFile(change) => self.change_backing_file(change).await?,
            Command::BlockSetWriteThreshold(mark) => self.set_write_threshold(&mark)?,
            Command::BlockdevReopen(list) => self.reopen(list.options).await?,
            Command::BlockdevSetActive(change) => self.set_active(change).await?,
            Command::BlockResize(resize) => self.resize(resize).await?,
            Command::BlockdevSnapshot(snapshot) => self.snapshot(snapshot).await?,
            Command::BlockdevSnapshotSync(snapshot) => self.snapshot_sync(snapshot).await?,
            Command::SnapshotInternal(snapshot) => self.snapshot_internal(snapshot).await?,
            Command::SnapshotDelete(snapshot) => return self.delete_internal(&snapshot).await,
            Command::Transaction(transaction) => self.transaction(transaction).await?,
            Command::NbdServerStart(options) => self.start_server(options).await?,
            Command::NbdServerStop => self.exports.stop_nbd().await?,
            Command::BlockExportAdd(export) => self.add_export(export).await?,
            Command::BlockExportDel(export) => self.remove_export(&export)?,
            Command::ObjectAdd(object) => self.objects.add(&object)?,
            Command::ObjectDel { id } => self.remove_object(&id)?,
            Command::QueryNamedBlockNodes { .. }
            | Command::QueryBlock
            | Command::QueryBlockstats { .. }
            | Command::QueryJobs
            | Command::QueryBlockJobs
            | Command::QueryBlockGraph
            | Command::QueryBlockExports => return Ok(self.query(&command)),
            Command::Job { .. }
            | Command::JobCancel { .. }
            | Command::BlockJob { .. }
            | Command::BlockJobCancel { .. }
            | Command::BlockJobSetSpeed { .. }
            | Command::BlockJobChange(_) => self.steer_job(command)?,
        }
        Ok(Value::Object(Map::new()))
    }

    fn query(&self, command: &Command) -> Value {
        match command {
            Command::QueryNamedBlockNodes { flat } => self.named_block_nodes(*flat),
            Command::QueryBlockstats { query_nodes } => self.block_stats(*query_nodes),
            Command::QueryJobs => self.query_jobs(),
            Command::QueryBlockJobs => self.query_block_jobs(),
            Command::QueryBlockExports => self.query_exports(),
            Command::QueryBlockGraph => self.block_graph(),
            // No node here is a device of the peer's old kind.
            _ => Value::Array(Vec::new()),
        }
    }

    fn steer_job(&self, command: Command) -> Result<()> {
        let jobs = &self.jobs;
        match command {
            Command::Job { verb, id } => jobs.job_verb(&id, verb_of(verb))?,
            Command::JobCancel { id } => jobs.job_verb(&id, Verb::Cancel)?,
            Command::BlockJob { verb, id } => jobs.block_job_verb(&id, verb_of(verb), false)?,
            Command::BlockJobCancel { id, force } => {
                jobs.block_job_verb(&id, Verb::Cancel, force)?;
            }
            Command::BlockJobSetSpeed { id, speed } => jobs.set_speed(&id, speed)?,
            Command::BlockJobChange(change) => {
                // Options of one kind of job mean nothing to another.
                let is_meant =
                    |row: &JobInfo| *row.id == *change.id && row.kind.name() == change.job_type;
                let mode = change.copy_mode.filter(|_| jobs.query().iter().any(is_meant));
                jobs.change(&change.id, mode.map(super::jobs::copy_mode))?;
            }
            // The caller gives only commands of jobs.
            _ => {}
        }
        Ok(())
    }

    /// The node that an argument names as device or node; for a filter the one that it serves.
    pub(super) fn node(&self, name: &str) -> Result<Rc<Node>> {
        let found = self.graph.find(name).map_err(|_| Failure::no_node(name, name))?;
        Ok(found.served())
    }

    /// Ends exports and jobs; a second caller waits for the first.
    pub(super) async fn quiesce(self: &Rc<Self>) {
        match self.end.get() {
            End::Quiet => {}
            End::Ending => self.ended.until(|| self.end.get() == End::Quiet).await,
            End::Open => {
                self.end.set(End::Ending);
                let exports = self.exports.clone();
                let control = Rc::clone(self);
                let stopped = Rc::new(Cell::new(false));
                let done = Rc::clone(&stopped);
                drop(self.core.spawn(Class::Guest, async move {
                    // Without a server there is nothing to stop.
                    let _ = exports.stop_nbd().await;
                    done.set(true);
                    control.ended.notify_all();
                }));
                // Exports go first, as in the peer; one whose requests wait for a job does not keep
                // the job from ending.
                let gone = self.ended.until(|| stopped.get());
                select(gone, self.core.sleep(EXPORTS_FIRST_NS)).await;
                self.jobs.cancel_all().await;
                self.ended.until(|| stopped.get()).await;
                self.end.set(End::Quiet);
                self.ended.notify_all();
            }
        }
    }

    /// Ends everything.
    pub(super) async fn shut_down(self: Rc<Self>) -> Result<Value> {
        self.quiesce().await;
        self.graph.close_all().await?;
        Ok(Value::Object(Map::new()))
    }
}

fn verb_of(verb: JobVerb) -> Verb {
    match verb {
        JobVerb::Pause => Verb::Pause,
        JobVerb::Resume => Verb::Resume,
        JobVerb::Complete => Verb::Complete,
        JobVerb::Finalize => Verb::Finalize,
        JobVerb::Dismiss => Verb::Dismiss,
    }
}
