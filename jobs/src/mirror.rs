//! Mirror: a target follows the source in the background until the job is told to end.
//!
//! Order rules:
//! 1. the hook sets dirty bits after the data and the mapping of a write, also of a failed one,
//!    before the guest is answered;
//! 2. the copy loop clears a bit before it reads;
//! 3. `ready` is announced after nothing was dirty or in flight and the target was flushed;
//! 4. the end is one cut of the source: gates closed, nothing in flight, last pass, target flushed,
//!    then (complete) guests move to the target and the hook goes;
//! 5. events after that.
//!
//! A guest that writes faster than the target takes it cannot keep the job from its end: when
//! little is left the gates close for the rest.

use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::error::Result as EngineResult;
use liveblk_engine::format::LocalFuture;
use liveblk_engine::graph::{CutPart, Graph, Swap, cut};
use liveblk_engine::node::WriteHook;

use crate::copy::{Copy, CopySetup, Plan};
use crate::error::{JobError, Result};
use crate::event::{Kind, Operation};
use crate::job::Job;
use crate::lifecycle::Ending;
use crate::limits::{CUT_WAIT_NS, PIVOT_BYTES, PIVOT_BYTES_MAX, PIVOT_PATIENCE_NS};
use crate::manager::JobManager;
use crate::spec::{MirrorSpec, SyncMode};
use crate::start::{Body, HookSlot, LastStep, Prepared, check_free, use_nodes};
use crate::txn::JobTxn;

/// Starts a mirror.
///
/// # Errors
/// What cannot work, with the peer's texts; no job is left then. Sizes that differ are found inside
/// the job, as the peer does.
pub async fn start_mirror(spec: MirrorSpec) -> Result<Rc<Job>> {
    prepare(spec)?.start().await
}

fn prepare(spec: MirrorSpec) -> Result<Prepared> {
    let granularity = spec.check()?;
    let manager = JobManager::of(spec.source.core());
    check_free(&manager, &spec.source, &spec.target)?;
    let job = manager.create(Kind::Mirror, spec.job.clone(), &JobTxn::new())?;
    job.set_nodes(spec.source.id(), spec.target.id());
    let hold = match use_nodes(&job, &spec.source, &spec.target) {
        Ok(hold) => hold,
        Err(error) => {
            manager.withdraw(&job);
            return Err(error);
        }
    };
    let copy = Copy::new(CopySetup {
        compress: false,
        job,
        source: Rc::clone(&spec.source),
        target: Rc::clone(&spec.target),
        granularity,
        all_dirty: false,
        whole_granules: false,
        hold,
    });
    let hook: Rc<dyn WriteHook> = Rc::new(MarkDirty(Rc::clone(&copy)));
    let slot = HookSlot::new(&spec.source, hook);
    let mirror = Rc::new(Mirror { copy: Rc::clone(&copy), slot: Rc::clone(&slot), spec });
    let body: Body = Box::pin(async move { mirror.run().await });
    Ok(Prepared { copy, slot, body })
}

/// Sets dirty bits for what guests write.
struct MarkDirty(Rc<Copy>);

impl WriteHook for MarkDirty {
    fn before_write(&self, _: GuestRange) -> Option<LocalFuture<'static, EngineResult<()>>> {
        None
    }

    fn after_write(&self, range: GuestRange) {
        if !self.0.is_dead() {
            self.0.mark(range, true);
        }
    }
}

struct Mirror {
    copy: Rc<Copy>,
    slot: Rc<HookSlot>,
    spec: MirrorSpec,
}

impl Mirror {
    async fn run(self: Rc<Self>) -> Result<Option<LastStep>> {
        let (source, target) = (self.spec.source.size(), self.spec.target.size());
        let fits = target == source || (self.spec.allow_larger_target && target > source);
        if !fits {
            return Err(JobError::SizesDiffer);
        }
        self.copy.zero_tail().await?;
        // Without a backing file the top layer is everything, as for the peer.
        let top = self.spec.sync == SyncMode::Top && self.spec.source.has_backing();
        if self.spec.sync != SyncMode::None {
            self.copy.plan(Plan { top, all_dirty: false }).await?;
        }
        self.catch_up().await?;
        self.copy.job().become_ready();
        self.follow().await?;
        if self.spec.job.auto_finalize {
            self.end().await?;
            return Ok(None);
        }
        // The guest goes on and its writes are marked; job-finalize copies them and ends.
        self.copy.job().set_busy(false);
        Ok(Some(Box::pin(async move { self.end().await })))
    }

    /// Brings the target up to the source once, durably.
    async fn catch_up(&self) -> Result<()> {
        loop {
            if self.copy_until_little().await? {
                return self.copy.flush_target().await;
            }
            // The guest is faster: one short pass with the gates closed.
            if self.finish(Ending::None).await? {
                return Ok(());
            }
        }
    }

    /// Follows the source until told to end.
    async fn follow(&self) -> Result<()> {
        let job = self.copy.job();
        loop {
            let changed = job.changed().wait();
            self.copy.check()?;
            let ending = job.ending();
            if ending != Ending::None && !job.wants_pause() {
                return Ok(());
            }
            if job.wants_pause() || !self.copy.is_clean() {
                job.set_busy(true);
                self.copy.run_while(|| job.ending() == Ending::None).await?;
            } else {
                job.set_busy(false);
                changed.await;
            }
        }
    }

    /// Ends as it was told to.
    async fn end(&self) -> Result<()> {
        loop {
            self.copy_until_little().await?;
            if self.finish(self.copy.job().ending()).await? {
                return Ok(());
            }
        }
    }

    /// Copies until nothing is dirty (true), or so little that closing the gates for it does not
    /// hurt. What counts as little grows while the guest keeps ahead.
    async fn copy_until_little(&self) -> Result<bool> {
        let core = self.copy.job().core().clone();
        let began = core.now();
        let is_little = || {
            let waited = core.now().saturating_sub(began);
            let doublings = u32::try_from(waited / PIVOT_PATIENCE_NS).unwrap_or(u32::MAX);
            let little = PIVOT_BYTES.checked_shl(doublings.min(16)).unwrap_or(PIVOT_BYTES_MAX);
            waited > PIVOT_PATIENCE_NS && self.copy.dirty_bytes() <= little.min(PIVOT_BYTES_MAX)
        };
        self.copy.run_while(|| !is_little()).await
    }

    /// One cut: the last pass and what `ending` asks for. False if it failed and the policy says to
    /// go on.
    async fn finish(&self, ending: Ending) -> Result<bool> {
        let job = self.copy.job();
        let source = self.copy.source();
        let copy = Rc::clone(&self.copy);
        let last_pass = move |_: Rc<Graph>| -> LocalFuture<'static, EngineResult<()>> {
            Box::pin(async move { copy.last_pass().await })
        };
        let (copy, slot) = (Rc::clone(&self.copy), Rc::clone(&self.slot));
        let swap = move |graph: &Rc<Graph>| {
            if ending == Ending::None {
                return;
            }
            slot.remove();
            if copy.is_dead() {
                return;
            }
            copy.job().decide();
            if ending == Ending::Complete {
                graph.repoint(copy.source().id(), copy.target().id());
            }
        };
        let part = CutPart {
            core: source.core().id(),
            nodes: vec![source.id()],
            flush: false,
            before_swap: Some(Box::new(last_pass)),
            swap: Swap::Local(Box::new(swap)),
        };
        let cut = cut(job.core(), vec![part], CUT_WAIT_NS);
        match job.unless_dead(cut, || self.copy.is_dead()).await {
            None => self.copy.check().and(Err(JobError::Cancelled)),
            Some(Ok(())) => self.copy.check().map(|()| true),
            Some(Err(error)) => {
                let (operation, error) =
                    self.copy.take_pass_failure().unwrap_or((Operation::Read, error));
                self.copy.answer(operation, error).await?;
                Ok(false)
            }
        }
    }
}
