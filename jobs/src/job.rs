//! One job as its own task sees it: life, rate, progress, and how failures are answered.
//!
//! Owns nothing of the graph. All waiting of a job and its copies is done on one notification,
//! [`Job::changed`]; whoever changes anything rings it. `!Send`, of one core.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use liveblk_engine::ErrorKind;
use liveblk_engine::executor::Core;
use liveblk_engine::executor::sync::{Either, Notify, select};
use liveblk_engine::node::{Node, NodeId, UserGuard};

use crate::beside::Seat;
use crate::bitmap_use::BitmapUse;
use crate::converge::{Converge, ConvergeInfo, Convergence};
use crate::error::JobError;
use crate::event::{Action, BlockJobFacts, BlockJobInfo, Event, JobInfo, Kind, Operation};
use crate::fleecing::JobFilter;
use crate::follow::Follower;
use crate::lifecycle::{Ending, IoStatus, Life, Status};
use crate::manager::JobManager;
use crate::pivot::Pivot;
use crate::progress::Progress;
use crate::rate::Rate;
use crate::spec::{CopyMode, JobOptions, OnError};
use crate::start::LastStep;
use crate::txn::JobTxn;

/// A job.
pub struct Job {
    core: Core,
    id: Rc<str>,
    kind: Kind,
    options: JobOptions,
    manager: Weak<JobManager>,
    txn: Rc<JobTxn>,
    life: RefCell<Life>,
    rate: RefCell<Rate>,
    progress: Progress,
    changed: Notify,
    error: RefCell<Option<JobError>>,
    busy: Cell<bool>,
    nodes: Cell<Option<(NodeId, NodeId)>>,
    /// Its use of the source, where that is no part of a section.
    source_use: RefCell<Option<UserGuard>>,
    /// The filter that queries show for it.
    filter: RefCell<Option<JobFilter>>,
    /// Of a mirror or active commit, while its body runs or waits for its end.
    follower: RefCell<Weak<Follower>>,
    /// Of a backup: where it reads.
    seat: RefCell<Weak<Seat>>,
    /// It copies all of its source: it can go on at a node of equal content.
    portable: Cell<bool>,
    /// Nodes of one chain that other jobs on chains must leave alone.
    section: RefCell<Vec<NodeId>>,
    /// What the job owns until it is concluded.
    scope: RefCell<Vec<Box<dyn Any>>>,
    /// What job-finalize has to do.
    last_step: RefCell<Option<LastStep>>,
    /// The result is effective: a cancel comes too late.
    decided: Cell<bool>,
    /// How it ends with its transaction, if that is a cut.
    pivot: RefCell<Option<Pivot>>,
    /// A target that was opened for it.
    owned: RefCell<Option<Rc<Node>>>,
    /// The user's bitmap that it works with.
    bitmap: RefCell<Option<Rc<BitmapUse>>>,
    /// It has no events and no place in queries: the copies of a client's filter.
    hidden: bool,
    /// Of a mirror or active commit: how guest writes reach the target now.
    copy_mode: Cell<CopyMode>,
    /// Of a mirror or active commit that is to be ready in time.
    convergence: RefCell<Option<Rc<Convergence>>>,
    /// Of a mirror: every write that was answered is in the target.
    synced: Cell<bool>,
    counters: Cell<JobCounters>,
}

/// What the copies of a job moved, in bytes; zeroes are neither.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JobCounters {
    /// Bytes that went through memory to the target.
    pub copied: u64,
    /// Bytes whose blocks the target shares with the source.
    pub shared: u64,
}

impl Job {
    pub(crate) fn new(
        manager: &Rc<JobManager>,
        kind: Kind,
        options: JobOptions,
        txn: &Rc<JobTxn>,
    ) -> Rc<Self> {
        // A negative speed is refused right after the job was announced, as the peer does.
        let speed = options.checked_speed().unwrap_or(0);
        let core = manager.core().clone();
        Rc::new(Self {
            id: options.id.as_str().into(),
            kind,
            manager: Rc::downgrade(manager),
            txn: Rc::clone(txn),
            life: RefCell::default(),
            rate: RefCell::new(Rate::new(speed, core.now())),
            progress: Progress::default(),
            changed: Notify::new(&core),
            error: RefCell::new(None),
            busy: Cell::new(false),
            nodes: Cell::new(None),
            source_use: RefCell::new(None),
            filter: RefCell::new(None),
            follower: RefCell::new(Weak::new()),
            seat: RefCell::new(Weak::new()),
            portable: Cell::new(false),
            section: RefCell::default(),
            scope: RefCell::default(),
            last_step: RefCell::new(None),
            decided: Cell::new(false),
            pivot: RefCell::new(None),
            owned: RefCell::new(None),
            bitmap: RefCell::new(None),
            hidden: false,
            copy_mode: Cell::new(CopyMode::Background),
            convergence: RefCell::new(None),
            synced: Cell::new(false),
            counters: Cell::default(),
            options,
            core,
        })
    }

    /// A job that nobody sees, for copies that no command started.
    pub(crate) fn hidden(manager: &Rc<JobManager>, name: &str) -> Rc<Self> {
        let (options, txn) = (JobOptions::new(name), JobTxn::new());
        let mut job = Self::new(manager, Kind::Backup, options, &txn);
        if let Some(job) = Rc::get_mut(&mut job) {
            job.hidden = true;
        }
        job
    }

    /// The id.
    pub fn id(&self) -> &Rc<str> {
        &self.id
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The state.
    pub fn status(&self) -> Status {
        self.life.borrow().status()
    }

    /// The options it was started with.
    pub fn options(&self) -> &JobOptions {
        &self.options
    }

    /// What its copies moved so far.
    pub fn counters(&self) -> JobCounters {
        self.counters.get()
    }

    /// Counts bytes that reached the target through memory.
    pub(crate) fn count_copied(&self, bytes: u64) {
        let counters = self.counters.get();
        self.counters
            .set(JobCounters { copied: counters.copied.saturating_add(bytes), ..counters });
    }

    /// Counts bytes that the target shares with the source.
    pub(crate) fn count_shared(&self, bytes: u64) {
        let counters = self.counters.get();
        self.counters
            .set(JobCounters { shared: counters.shared.saturating_add(bytes), ..counters });
    }

    pub(crate) fn core(&self) -> &Core {
        &self.core
    }

    pub(crate) fn txn(&self) -> &Rc<JobTxn> {
        &self.txn
    }

    pub(crate) fn life(&self) -> &RefCell<Life> {
        &self.life
    }

    pub(crate) fn rate(&self) -> &RefCell<Rate> {
        &self.rate
    }

    pub(crate) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Rung whenever anything of the job or its copies changed.
    pub(crate) fn changed(&self) -> &Notify {
        &self.changed
    }

    pub(crate) fn ending(&self) -> Ending {
        self.life.borrow().ending()
    }

    /// Whether a forced end was asked for: nothing may be waited for any more.
    pub(crate) fn is_forced(&self) -> bool {
        self.ending() == Ending::Force && !self.decided.get()
    }

    pub(crate) fn wants_pause(&self) -> bool {
        self.life.borrow().wants_pause()
    }

    pub(crate) fn set_busy(&self, busy: bool) {
        self.busy.set(busy);
    }

    /// Moves to `status` and announces it.
    pub(crate) fn enter(&self, status: Status) {
        let changed = self.life.borrow_mut().enter(status);
        if changed {
            self.emit(Event::StatusChange { id: Rc::clone(&self.id), status });
        }
    }

    pub(crate) fn emit(&self, event: Event) {
        if let Some(manager) = self.manager.upgrade().filter(|_| !self.hidden) {
            manager.emit(&event);
        }
    }

    pub(crate) fn manager(&self) -> Option<Rc<JobManager>> {
        self.manager.upgrade()
    }

    /// Announces that the result is at hand: at some instant nothing was left to be done, and the
    /// event tells of that one, whatever guests wrote since.
    pub(crate) fn become_ready(&self) {
        self.enter(Status::Ready);
        let facts = self.facts();
        self.emit(Event::Ready(BlockJobFacts { len: facts.offset, ..facts }));
    }

    /// Stands still while a pause is wanted; the caller has nothing in flight.
    pub(crate) async fn pause_point(&self) {
        if !self.wants_pause() || self.is_forced() {
            return;
        }
        let (before, quiet) = {
            let life = self.life.borrow();
            (life.status(), life.quiet_status())
        };
        self.busy.set(false);
        self.enter(quiet);
        self.changed.until(|| !self.wants_pause() || self.is_forced()).await;
        self.enter(before);
        self.busy.set(true);
    }

    /// Sleeps `nanos`, or until something changes.
    pub(crate) async fn nap(&self, nanos: u64) {
        let changed = self.changed.wait();
        let _: Either<(), ()> = select(changed, self.core.sleep(nanos)).await;
    }

    /// Resolves with the output of `work`, or `None` as soon as the job is forced to end or `dead`
    /// says that its copies are.
    pub(crate) async fn unless_dead<T>(
        &self,
        work: impl Future<Output = T>,
        dead: impl Fn() -> bool,
    ) -> Option<T> {
        let killed = self.changed.until(|| dead() || self.is_forced());
        match select(work, killed).await {
            Either::First(output) => Some(output),
            Either::Second(()) => None,
        }
    }

    /// Decides by the job's policy what a failure means, and announces it.
    pub(crate) fn on_error(&self, operation: Operation, error: &liveblk_engine::Error) -> Action {
        let policy = match operation {
            Operation::Read => self.options.on_source_error,
            Operation::Write => self.options.on_target_error,
        };
        let no_space = error.kind() == ErrorKind::NoSpace;
        let action = match policy {
            OnError::Report => Action::Report,
            OnError::Ignore => Action::Ignore,
            OnError::Stop => Action::Stop,
            OnError::Enospc | OnError::Auto if no_space => Action::Stop,
            OnError::Enospc | OnError::Auto => Action::Report,
        };
        // A job whose work is over has no state to pause in.
        let over = self.status().is_completed();
        let action = if over && action == Action::Stop { Action::Report } else { action };
        tracing::warn!(job = %self.id, operation = operation.name(), action = action.name(),
            %error, "a copy failed");
        // One announcement per stop: copies that were in flight fail with the first one.
        let stopped = self.life.borrow().io_status() != IoStatus::Ok;
        if !(action == Action::Stop && stopped) {
            self.announce(operation, action);
        }
        if action == Action::Stop {
            let io_status = if no_space { IoStatus::NoSpace } else { IoStatus::Failed };
            self.life.borrow_mut().stop_on_error(io_status);
        }
        self.changed.notify_all();
        action
    }

    /// Tells that a copy failed and what is done about it.
    pub(crate) fn announce(&self, operation: Operation, action: Action) {
        self.emit(Event::Error { id: Rc::clone(&self.id), operation, action });
    }

    /// The result is effective (guests moved, or the copy is complete): no cancel undoes it.
    pub(crate) fn decide(&self) {
        self.decided.set(true);
    }

    pub(crate) fn is_decided(&self) -> bool {
        self.decided.get()
    }

    /// How guest writes reach the target of a mirror or active commit now.
    pub fn copy_mode(&self) -> CopyMode {
        self.copy_mode.get()
    }

    /// Changes how guest writes reach a mirror's target, from the next write on.
    pub(crate) fn set_copy_mode(&self, mode: CopyMode) {
        self.copy_mode.set(mode);
        if mode == CopyMode::Background {
            self.synced.set(false);
        }
        self.changed.notify_all();
    }

    /// Is to be ready as `wanted` says, counted from now.
    pub(crate) fn set_converge(&self, wanted: Option<Converge>) {
        let (mode, now) = (self.copy_mode.get(), self.core.now());
        let convergence = wanted.map(|wanted| Convergence::new(wanted, mode, now));
        self.convergence.replace(convergence);
    }

    /// How it becomes ready in time, if it is to.
    pub(crate) fn convergence(&self) -> Option<Rc<Convergence>> {
        self.convergence.borrow().clone()
    }

    fn converge_info(&self) -> Option<ConvergeInfo> {
        let left = self.progress.total().saturating_sub(self.progress.done());
        self.convergence.borrow().as_ref().map(|convergence| convergence.info(left))
    }

    /// Whether every write that was answered is in the target.
    pub(crate) fn set_synced(&self, synced: bool) {
        self.synced.set(synced);
    }

    /// Ends by `pivot` when its transaction does.
    pub(crate) fn set_pivot(&self, pivot: Pivot) {
        self.pivot.replace(Some(pivot));
    }

    pub(crate) fn has_pivot(&self) -> bool {
        self.pivot.borrow().is_some()
    }

    pub(crate) fn take_pivot(&self) -> Option<Pivot> {
        self.pivot.take()
    }

    /// The job's target goes with it, unless guests have moved there.
    pub(crate) fn own(&self, target: &Rc<Node>) {
        self.owned.replace(Some(Rc::clone(target)));
    }

    pub(crate) fn has_owned(&self) -> bool {
        self.owned.borrow().is_some()
    }

    pub(crate) fn take_owned(&self) -> Option<Rc<Node>> {
        self.owned.take()
    }

    /// Works with a user's bitmap.
    pub(crate) fn set_bitmap(&self, bitmap: &Rc<BitmapUse>) {
        self.bitmap.replace(Some(Rc::clone(bitmap)));
    }

    /// The user's bitmap that it works with.
    pub(crate) fn bitmap(&self) -> Option<Rc<BitmapUse>> {
        self.bitmap.borrow().clone()
    }

    pub(crate) fn set_last_step(&self, step: LastStep) {
        self.last_step.replace(Some(step));
    }

    pub(crate) fn has_last_step(&self) -> bool {
        self.last_step.borrow().is_some()
    }

    pub(crate) fn take_last_step(&self) -> Option<LastStep> {
        self.last_step.take()
    }

    /// Keeps `resources` until the job is concluded.
    pub(crate) fn keep(&self, resources: Box<dyn Any>) {
        self.scope.borrow_mut().push(resources);
    }

    /// Gives back what the job has: the end of its scope.
    pub(crate) fn release(&self) {
        let ends = (self.last_step.take(), self.pivot.take());
        let shown = (self.filter.take(), self.source_use.take());
        let parts = (ends, self.scope.take(), self.bitmap.take(), shown);
        drop(parts);
    }

    /// Uses the source until the job is concluded.
    pub(crate) fn set_source_use(&self, guard: UserGuard) {
        self.source_use.replace(Some(guard));
    }

    /// Uses `source` as it used the old one. Only inside a cut of both.
    pub(crate) fn carry_source_use(&self, source: &Rc<Node>) {
        let carried = self.source_use.borrow().as_ref().map(|old| Node::carry_use(source, old));
        let old = self.source_use.replace(carried);
        drop(old);
    }

    /// Shows `filter` until the job is concluded.
    pub(crate) fn set_filter(&self, filter: JobFilter) {
        self.filter.replace(Some(filter));
    }

    /// Shows the filter above `node` from now on.
    pub(crate) fn move_filter(&self, node: &Rc<Node>) {
        let filter = self.filter.take();
        self.filter.replace(filter.and_then(|filter| filter.moved_above(node)));
    }

    /// It reads at `seat` until its work is over.
    pub(crate) fn set_seat(&self, seat: &Rc<Seat>) {
        self.seat.replace(Rc::downgrade(seat));
    }

    /// Where it reads, until its work is over.
    pub(crate) fn seat(&self) -> Option<Rc<Seat>> {
        self.seat.borrow().upgrade()
    }

    /// Whether it can go on at a node of equal content.
    pub(crate) fn set_portable(&self, portable: bool) {
        self.portable.set(portable);
    }

    pub(crate) fn is_portable(&self) -> bool {
        self.portable.get()
    }

    /// It follows the guests of its source.
    pub(crate) fn set_follower(&self, follower: &Rc<Follower>) {
        self.follower.replace(Rc::downgrade(follower));
    }

    /// What follows the guests of its source, until that is over.
    pub(crate) fn follower(&self) -> Option<Rc<Follower>> {
        let over = self.decided.get() || self.is_forced();
        self.follower.borrow().upgrade().filter(|_| !over)
    }

    /// Remembers which nodes the job works on.
    pub(crate) fn set_nodes(&self, source: NodeId, target: NodeId) {
        self.nodes.set(Some((source, target)));
    }

    /// Whether it commits the layer that guests write: only those commits have a source.
    pub(crate) fn is_active_commit(&self) -> bool {
        self.kind == Kind::Commit && self.nodes().is_some()
    }

    /// Remembers the section of a chain that the job works on.
    pub(crate) fn set_section(&self, nodes: Vec<NodeId>) {
        self.section.replace(nodes);
    }

    pub(crate) fn section_has(&self, node: NodeId) -> bool {
        self.section.borrow().contains(&node)
    }

    /// Source and target.
    pub(crate) fn nodes(&self) -> Option<(NodeId, NodeId)> {
        self.nodes.get()
    }

    /// Bytes done, as progress counts them.
    pub fn copied(&self) -> u64 {
        self.progress.done()
    }

    /// Bytes done and left, as progress counts them.
    pub fn total(&self) -> u64 {
        self.progress.total()
    }

    /// Why it failed, if it did.
    pub fn error(&self) -> Option<JobError> {
        self.error.borrow().clone()
    }

    pub(crate) fn set_error(&self, error: JobError) {
        self.error.borrow_mut().get_or_insert(error);
    }

    /// Why it failed, as clients read it.
    pub(crate) fn error_text(&self) -> Option<String> {
        self.error.borrow().as_ref().map(error_text)
    }

    pub(crate) fn facts(&self) -> BlockJobFacts {
        BlockJobFacts {
            kind: self.kind,
            id: Rc::clone(&self.id),
            len: self.progress.total(),
            offset: self.progress.done(),
            speed: self.rate.borrow().speed(),
        }
    }

    pub(crate) fn info(&self) -> JobInfo {
        JobInfo {
            id: Rc::clone(&self.id),
            kind: self.kind,
            status: self.status(),
            current: self.progress.done(),
            total: self.progress.total(),
            error: self.error_text(),
            converge: self.converge_info(),
        }
    }

    pub(crate) fn block_info(&self) -> BlockJobInfo {
        let life = self.life.borrow();
        BlockJobInfo {
            facts: self.facts(),
            busy: self.busy.get(),
            // A pending mirror shows as paused, as the peer's does.
            paused: life.wants_pause()
                || (self.kind == Kind::Mirror && life.status() == Status::Pending),
            io_status: life.io_status(),
            ready: matches!(life.status(), Status::Ready | Status::Standby),
            status: life.status(),
            auto_finalize: self.options.auto_finalize,
            auto_dismiss: self.options.auto_dismiss,
            error: self.error_text(),
            converge: self.converge_info(),
            spill: self.seat().and_then(|seat| seat.spill_info()),
            actively_synced: (self.kind == Kind::Mirror).then(|| self.synced.get()),
        }
    }
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Job({} {}, {})", self.kind.name(), self.id, self.status())
    }
}

/// The text of a job's failure: what clients of the peer read there is the errno's.
fn error_text(error: &JobError) -> String {
    match error {
        JobError::Engine(error) if error.detail().is_none() => {
            let text = std::io::Error::from_raw_os_error(error.errno()).to_string();
            match text.find(" (os error") {
                Some(end) => text[..end].to_owned(),
                None => text,
            }
        }
        // Who holds a lock is a hint for people.
        JobError::Engine(error) if error.kind() == ErrorKind::Locked => {
            error.to_string().lines().next().unwrap_or_default().to_owned()
        }
        other => other.to_string(),
    }
}
