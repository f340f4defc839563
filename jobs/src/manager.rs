//! The jobs of one core: ids, verbs, queries, events, and how transactions of jobs end.
//!
//! Promises: events reach the subscriber in the order of contract §2.4; a verb either takes effect
//! or answers the peer's text and changes nothing. Moves no data and knows no node.
//!
//! Order of an end: the body is over (target durable, hook gone) -> waiting -> all of the
//! transaction waiting -> pending -> finalize -> BLOCK_JOB_COMPLETED -> concluded -> null.

use std::cell::RefCell;
use std::rc::Rc;

use liveblk_engine::executor::sync::{Either, Notify, select};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::graph::Graph;
use liveblk_engine::node::{NodeId, User};

use crate::error::{JobError, Result};
use crate::event::{BlockJobInfo, Event, JobInfo, Kind};
use crate::follow::Follower;
use crate::job::Job;
use crate::lifecycle::{Effect, Ending, Status, Verb};
use crate::limits::{JOBS, LANDING_WAIT_NS, UNHOOK_WAIT_NS};
use crate::pivot::pivot_together;
use crate::spec::{CopyMode, JobOptions, check_id, checked_speed};
use crate::txn::JobTxn;

/// Who gets the events of a core's jobs.
pub type Subscriber = Rc<dyn Fn(&Event)>;

/// All jobs of a core.
pub struct JobManager {
    core: Core,
    jobs: RefCell<Vec<Rc<Job>>>,
    subscriber: RefCell<Option<Subscriber>>,
    changed: Notify,
}

impl JobManager {
    /// The manager of `core`.
    pub fn of(core: &Core) -> Rc<Self> {
        core.extension(|| Self {
            core: core.clone(),
            jobs: RefCell::default(),
            subscriber: RefCell::new(None),
            changed: Notify::new(core),
        })
    }

    /// Sends all events of this core's jobs to `subscriber` from now on. It must not call back.
    pub fn subscribe(&self, subscriber: Subscriber) {
        self.subscriber.replace(Some(subscriber));
    }

    pub(crate) fn core(&self) -> &Core {
        &self.core
    }

    pub(crate) fn emit(&self, event: &Event) {
        let subscriber = self.subscriber.borrow().clone();
        if let Some(subscriber) = subscriber {
            subscriber(event);
        }
        self.changed.notify_all();
    }

    /// The job called `id`.
    pub fn find(&self, id: &str) -> Option<Rc<Job>> {
        self.jobs.borrow().iter().find(|job| &**job.id() == id).cloned()
    }

    /// Checks that a job called `id` could be made now.
    ///
    /// # Errors
    /// The peer's texts for a bad or used id.
    pub fn check_new(&self, id: &str) -> Result<()> {
        check_id(id)?;
        if self.find(id).is_some() {
            return Err(JobError::IdInUse { id: id.into() });
        }
        if self.jobs.borrow().len() >= JOBS {
            return Err(JobError::TooMany { what: "jobs", limit: JOBS });
        }
        Ok(())
    }

    /// Makes a job in state `created` and announces it.
    pub(crate) fn create(
        self: &Rc<Self>,
        kind: Kind,
        options: JobOptions,
        txn: &Rc<JobTxn>,
    ) -> Result<Rc<Job>> {
        self.check_new(&options.id)?;
        let job = Job::new(self, kind, options, txn);
        txn.add(&job);
        self.jobs.borrow_mut().push(Rc::clone(&job));
        job.enter(Status::Created);
        if let Err(error) = job.options().checked_speed() {
            self.withdraw(&job);
            return Err(error);
        }
        Ok(job)
    }

    /// A job for copies that no command started: without events and place in queries.
    pub(crate) fn hidden_job(self: &Rc<Self>, name: &str) -> Rc<Job> {
        Job::hidden(self, name)
    }

    /// Takes back a job that never started.
    pub(crate) fn withdraw(&self, job: &Rc<Job>) {
        job.release();
        job.enter(Status::Null);
        self.forget(job);
    }

    /// Takes back a job that was ready to start when its transaction failed.
    pub(crate) fn call_off(&self, job: &Rc<Job>) {
        job.enter(Status::Aborting);
        job.release();
        job.enter(Status::Concluded);
        job.enter(Status::Null);
        self.forget(job);
    }

    /// All jobs, oldest first.
    pub(crate) fn all(&self) -> Vec<Rc<Job>> {
        self.jobs.borrow().clone()
    }

    /// The mirrors and active commits that follow the guests of `node`.
    pub(crate) fn followers(&self, node: NodeId) -> Vec<Rc<Follower>> {
        let jobs = self.jobs.borrow();
        let of_node = jobs.iter().filter(|job| job.nodes().is_some_and(|(from, _)| from == node));
        of_node.filter_map(|job| job.follower()).collect()
    }

    /// Whether job `id` follows the guests of `node`: it can grow then, and its target with it.
    pub fn follows(&self, id: &str, node: NodeId) -> bool {
        self.find(id).is_some_and(|job| {
            job.nodes().is_some_and(|(source, _)| source == node) && job.follower().is_some()
        })
    }

    /// The job that has `node` as its source and takes its guests away, but does not follow them
    /// any more: it is about to end.
    pub(crate) fn ending_user(&self, node: NodeId) -> Option<Kind> {
        self.user_where(|job, source, _| {
            let follows = matches!(job.kind(), Kind::Mirror | Kind::Commit);
            source == node && follows && job.follower().is_none()
        })
    }

    /// The job that works on a section of a chain which `node` is in.
    pub(crate) fn section_user(&self, node: NodeId) -> Option<Kind> {
        let jobs = self.jobs.borrow();
        let mut at_work = jobs.iter().filter(|job| job.status() < Status::Concluded);
        let found = at_work.find(|job| job.section_has(node));
        found.map(|job| job.kind())
    }

    /// The job that has `node` as its target.
    pub(crate) fn target_user(&self, node: NodeId) -> Option<Kind> {
        self.user_where(|_, _, target| target == node)
    }

    /// Any job that works on `node`.
    pub(crate) fn any_user(&self, node: NodeId) -> Option<Kind> {
        let used = self.user_where(|_, source, target| source == node || target == node);
        used.or_else(|| self.section_user(node))
    }

    fn user_where(&self, uses: impl Fn(&Job, NodeId, NodeId) -> bool) -> Option<Kind> {
        let jobs = self.jobs.borrow();
        let found = jobs
            .iter()
            .filter(|job| job.status() < Status::Concluded)
            .find(|job| job.nodes().is_some_and(|(source, target)| uses(job, source, target)));
        found.map(|job| job.kind())
    }

    /// Applies `verb` of the `job-*` commands; a cancel is always forced.
    ///
    /// # Errors
    /// "Job not found", or the refusal of the state table.
    pub fn job_verb(&self, id: &str, verb: Verb) -> Result<()> {
        let job = self.find(id).ok_or(JobError::NotFound)?;
        self.apply(&job, verb, true)
    }

    /// Applies `verb` of the `block-job-*` commands; `force` matters to cancel.
    ///
    /// # Errors
    /// "Block job 'x' not found", or the refusal of the state table.
    pub fn block_job_verb(&self, id: &str, verb: Verb, force: bool) -> Result<()> {
        let job = self.block_job(id)?;
        if verb == Verb::Cancel && !force && job.life().borrow().user_paused() {
            return Err(JobError::CurrentlyPaused { id: id.into() });
        }
        self.apply(&job, verb, force)
    }

    /// Limits job `id` to `speed` bytes per second (0: no limit).
    ///
    /// # Errors
    /// As [`JobManager::block_job_verb`]; a negative speed.
    pub fn set_speed(&self, id: &str, speed: i64) -> Result<()> {
        let job = self.block_job(id)?;
        self.apply(&job, Verb::SetSpeed, false)?;
        let speed = checked_speed(speed)?;
        job.rate().borrow_mut().set_speed(speed, self.core.now());
        job.changed().notify_all();
        Ok(())
    }

    /// Changes the copy mode of mirror or active commit `id`, from the next guest write on. (The
    /// peer knows this of mirrors only, which cannot go back to the background there.)
    ///
    /// # Errors
    /// As [`JobManager::block_job_verb`]; a job of another kind.
    pub fn change(&self, id: &str, copy_mode: impl Into<Option<CopyMode>>) -> Result<()> {
        let job = self.block_job(id)?;
        self.apply(&job, Verb::Change, false)?;
        match (job.kind(), copy_mode.into()) {
            (Kind::Mirror, mode) => job.set_copy_mode(mode.unwrap_or_default()),
            (Kind::Commit, Some(mode)) if job.is_active_commit() => job.set_copy_mode(mode),
            (_, _) => return Err(JobError::ChangeUnsupported),
        }
        Ok(())
    }

    /// The rows of `query-jobs`, newest first.
    pub fn query(&self) -> Vec<JobInfo> {
        self.jobs.borrow().iter().rev().map(|job| job.info()).collect()
    }

    /// The rows of `query-block-jobs`, newest first.
    pub fn query_block(&self) -> Vec<BlockJobInfo> {
        let jobs = self.jobs.borrow();
        let block_jobs = jobs.iter().rev().filter(|job| job.kind().is_block_job());
        block_jobs.map(|job| job.block_info()).collect()
    }

    /// Forces all jobs to end and waits until they are gone.
    pub async fn cancel_all(&self) {
        loop {
            let changed = self.changed.wait();
            let jobs: Vec<_> = self.jobs.borrow().iter().rev().cloned().collect();
            for job in &jobs {
                match job.status() {
                    Status::Concluded => self.dismiss(job),
                    Status::Aborting | Status::Null => {}
                    _ if job.is_forced() => {}
                    _ => {
                        let effect = job.life().borrow_mut().cancel(true);
                        self.act(job, effect);
                    }
                }
            }
            if self.jobs.borrow().is_empty() {
                return;
            }
            changed.await;
        }
    }

    /// Resolves when job `id` is gone or in a state that `done` accepts.
    pub async fn until(&self, id: &str, mut done: impl FnMut(Status) -> bool) {
        self.changed.until(|| self.find(id).is_none_or(|job| done(job.status()))).await;
    }

    fn block_job(&self, id: &str) -> Result<Rc<Job>> {
        let found = self.find(id).filter(|job| job.kind().is_block_job());
        found.ok_or_else(|| JobError::BlockJobNotFound { id: id.into() })
    }

    fn apply(&self, job: &Rc<Job>, verb: Verb, force: bool) -> Result<()> {
        let completable = matches!(job.kind(), Kind::Mirror | Kind::Commit);
        let effect = job.life().borrow_mut().apply(job.id(), verb, force, completable)?;
        self.act(job, effect);
        Ok(())
    }

    fn act(&self, job: &Rc<Job>, effect: Effect) {
        match effect {
            Effect::Wake => job.changed().notify_all(),
            Effect::AbortFinished if job.is_decided() => {}
            Effect::AbortFinished => self.abort(job, JobError::Cancelled),
            Effect::Finalize => self.finalize(job.txn()),
            Effect::Dismiss => self.dismiss(job),
            Effect::Allowed => {}
        }
    }

    /// The body of `job` is over.
    pub(crate) fn body_ended(&self, job: &Rc<Job>, result: Result<()>) {
        job.set_busy(false);
        if job.is_forced() {
            return self.abort(job, JobError::Cancelled);
        }
        match result {
            Ok(()) => {
                job.enter(Status::Waiting);
                if job.txn().is_aborting() {
                    self.abort(job, JobError::Cancelled);
                } else if job.txn().all_completed() {
                    self.all_waiting(job.txn());
                }
            }
            Err(error) => self.abort(job, error),
        }
    }

    fn all_waiting(&self, txn: &Rc<JobTxn>) {
        for job in txn.members() {
            job.enter(Status::Pending);
            if !job.options().auto_finalize && job.kind().is_block_job() {
                job.emit(Event::Pending { kind: job.kind(), id: Rc::clone(job.id()) });
            }
        }
        if !txn.needs_finalize() {
            self.finalize(txn);
        }
    }

    /// Makes the results effective, if that is still to be done, and ends the jobs.
    fn finalize(&self, txn: &Rc<JobTxn>) {
        if !txn.begin_finalize() {
            // Two of its jobs were told to; the results become effective once.
            return;
        }
        if !txn.members().iter().any(|job| job.has_last_step()) {
            return self.end_well(txn);
        }
        let (manager, txn) = (Self::of(&self.core), Rc::clone(txn));
        drop(self.core.spawn(Class::Background, async move {
            // What moves guests comes last: nothing can fail after it.
            let (movers, others): (Vec<_>, Vec<_>) =
                txn.members().into_iter().partition(|job| job.has_pivot());
            if !manager.take_last_steps(others).await || !txn.is_pending() {
                return;
            }
            let pivots = movers.iter().filter_map(|job| Some((Rc::clone(job), job.take_pivot()?)));
            let pivots: Vec<_> = pivots.collect();
            if let Err((job, error)) = pivot_together(&manager.core, &pivots).await {
                if job.status() == Status::Pending {
                    manager.abort(&job, error);
                }
                return;
            }
            drop(pivots);
            // A cancel may have come before any of it: who is over has no steps.
            if manager.take_last_steps(movers).await && txn.is_pending() {
                manager.end_well(&txn);
            }
        }));
    }

    /// Does what is left to do for each job; false if the jobs are not to end well any more.
    async fn take_last_steps(&self, jobs: Vec<Rc<Job>>) -> bool {
        for job in jobs {
            let Some(step) = job.take_last_step() else { continue };
            let result = step.await;
            if job.status() != Status::Pending {
                return false;
            }
            if let Err(error) = result {
                self.abort(&job, error);
                return false;
            }
        }
        true
    }

    fn end_well(&self, txn: &Rc<JobTxn>) {
        let members = txn.members();
        for job in &members {
            job.decide();
            if let Some(bitmap) = job.bitmap() {
                bitmap.commit();
            }
        }
        let txn = Rc::clone(txn);
        self.close_targets(members, move |manager| manager.tell_well(&txn));
    }

    /// Closes the targets that were opened for `jobs`, then does what is left.
    fn close_targets(&self, jobs: Vec<Rc<Job>>, then: impl FnOnce(&Self) + 'static) {
        if !jobs.iter().any(|job| job.has_owned()) {
            return then(self);
        }
        let manager = Self::of(&self.core);
        drop(self.core.spawn(Class::Background, async move {
            for job in jobs {
                close_target(&job).await;
            }
            then(&manager);
        }));
    }

    fn tell_well(&self, txn: &Rc<JobTxn>) {
        for job in txn.members() {
            job.release();
            if job.kind().is_block_job() {
                job.emit(Event::Completed { facts: job.facts(), error: None });
            }
            self.conclude(&job);
        }
    }

    /// Fails `job` and with it its transaction.
    fn abort(&self, job: &Rc<Job>, error: JobError) {
        job.set_error(error);
        job.enter(Status::Aborting);
        let txn = job.txn();
        if txn.begin_abort() {
            for other in txn.members() {
                if Rc::ptr_eq(&other, job) {
                    continue;
                }
                let status = other.status();
                other.life().borrow_mut().cancel(true);
                if matches!(status, Status::Waiting | Status::Pending) {
                    other.set_error(JobError::Cancelled);
                    other.enter(Status::Aborting);
                }
                other.changed().notify_all();
            }
        }
        if txn.all_completed() {
            self.finish_aborted(txn);
        }
    }

    fn finish_aborted(&self, txn: &Rc<JobTxn>) {
        let members = txn.members();
        for job in members.iter().filter(|job| job.status() == Status::Aborting) {
            if let Some(bitmap) = job.bitmap() {
                bitmap.abort();
            }
        }
        let txn = Rc::clone(txn);
        self.close_targets(members, move |manager| manager.tell_aborted(&txn));
    }

    fn tell_aborted(&self, txn: &Rc<JobTxn>) {
        for job in txn.members() {
            if job.status() != Status::Aborting {
                continue;
            }
            job.release();
            if !job.kind().is_block_job() {
                // Only its changes of status tell.
            } else if job.life().borrow().ending() == Ending::Force {
                job.emit(Event::Cancelled(job.facts()));
            } else {
                let error = job.error_text();
                job.emit(Event::Completed { facts: job.facts(), error });
            }
            self.conclude(&job);
        }
    }

    fn conclude(&self, job: &Rc<Job>) {
        job.enter(Status::Concluded);
        if job.options().auto_dismiss {
            self.dismiss(job);
        }
    }

    fn dismiss(&self, job: &Rc<Job>) {
        job.enter(Status::Null);
        self.forget(job);
    }

    fn forget(&self, job: &Rc<Job>) {
        self.jobs.borrow_mut().retain(|known| !Rc::ptr_eq(known, job));
        self.changed.notify_all();
    }
}

/// Closes the target that was opened for `job`; one that hangs, or that somebody uses now, stays.
async fn close_target(job: &Rc<Job>) {
    let Some(target) = job.take_owned() else { return };
    job.release();
    let core = job.core().clone();
    let graph = Graph::of(&core);
    let closing = core.spawn(Class::Background, async move {
        // Orphans of a cancelled job still write to it.
        let by_job = |user: &User| matches!(user, User::Job { .. });
        while target.users().iter().any(by_job) {
            target.core().sleep(UNHOOK_WAIT_NS).await;
        }
        if target.users().is_empty()
            && let Err(error) = graph.remove(&target).await
        {
            tracing::warn!(%error, "closing the target of a job");
        }
    });
    let _: Either<(), ()> = select(closing, core.sleep(LANDING_WAIT_NS)).await;
}

impl std::fmt::Debug for JobManager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JobManager({} jobs)", self.jobs.borrow().len())
    }
}
