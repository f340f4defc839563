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
//! A user's bitmap that names what is copied goes on recording until that cut and is given up only
//! when the job has succeeded.
//!
//! A guest that writes faster than the target takes it cannot keep the job from its end: when
//! little is left the gates close for the rest.

use std::rc::Rc;

use liveblk_engine::error::Result as EngineResult;
use liveblk_engine::format::LocalFuture;
use liveblk_engine::graph::{CutPart, Graph, Swap, cut};
use liveblk_engine::node::{NodeId, WriteHook};

use crate::active::MirrorHook;
use crate::copy::{BeforeWrite, Bounds, Copy, CopySetup, Plan};
use crate::error::{JobError, Result};
use crate::event::{Kind, Operation};
use crate::job::Job;
use crate::lifecycle::Ending;
use crate::limits::{BUF_SIZE_MAX, CUT_WAIT_NS, PIVOT_BYTES, PIVOT_BYTES_MAX, PIVOT_PATIENCE_NS};
use crate::manager::JobManager;
use crate::pivot::Pivot;
use crate::spec::{CopyMode, MirrorSpec, SyncMode};
use crate::start::{
    Body, HookSlot, LastStep, Prepared, check_free, show_filter, use_bitmap, use_nodes,
};
use crate::txn::JobTxn;

/// Starts a mirror.
///
/// # Errors
/// What cannot work, with the peer's texts; no job is left then. Sizes that differ are found inside
/// the job, as the peer does.
pub async fn start_mirror(spec: MirrorSpec) -> Result<Rc<Job>> {
    prepare_mirror(spec, &JobTxn::new())?.start().await
}

/// All of a start that comes before the cut.
pub(crate) fn prepare_mirror(spec: MirrorSpec, txn: &Rc<JobTxn>) -> Result<Prepared> {
    let granularity = spec.check()?;
    let bitmap = spec.more.bitmap.checked(spec.sync, &spec.source)?;
    let manager = JobManager::of(spec.source.core());
    check_free(&manager, &spec.source, &spec.target)?;
    let job = manager.create(Kind::Mirror, spec.job.clone(), txn)?;
    job.set_nodes(spec.source.id(), spec.target.id());
    job.set_copy_mode(spec.copy_mode);
    let hold = match use_nodes(&job, &spec.source, &spec.target) {
        Ok(hold) => hold,
        Err(error) => {
            manager.withdraw(&job);
            return Err(error);
        }
    };
    let copy = Copy::new(CopySetup {
        compress: false,
        keeps_bytes: false,
        discard_source: false,
        job,
        source: Rc::clone(&spec.source),
        target: Rc::clone(&spec.target),
        granularity,
        all_dirty: false,
        whole_granules: false,
        before: BeforeWrite::default(),
        bounds: bounds(spec.more.buf_size, granularity),
        hold,
    });
    show_filter(Kind::Mirror, &copy, spec.more.filter_name.as_deref())?;
    let hook: Rc<dyn WriteHook> =
        MirrorHook::new(&copy, !spec.more.keep_zeroes, spec.needs_whole_clusters());
    let slot = HookSlot::new(&spec.source, hook);
    if let Some((name, mode)) = bitmap {
        let used = use_bitmap(&copy, &name, mode)?;
        let (begun, by_bitmap) = (Rc::clone(&copy), spec.sync.is_by_bitmap());
        slot.at_start(Box::new(move || {
            if by_bitmap {
                used.view(|bits| begun.add_from(bits));
            }
        }));
    }
    let mirror = Rc::new(Mirror { copy: Rc::clone(&copy), slot: Rc::clone(&slot), spec });
    let body: Body = Box::pin(async move { mirror.run().await });
    Ok(Prepared { copy, slot, body, opened: None })
}

/// What `buf-size` allows: half of it in one copy at most, so that two are in flight.
fn bounds(buf_size: u64, granularity: u64) -> Bounds {
    if buf_size == 0 {
        return Bounds::default();
    }
    let bytes = buf_size.next_multiple_of(granularity).min(BUF_SIZE_MAX);
    Bounds { bytes, chunk: (bytes / 2).max(granularity), ..Bounds::default() }
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
        if self.spec.sync != SyncMode::None && !self.spec.sync.is_by_bitmap() {
            let target_is_zero = self.spec.more.target_is_zero;
            self.copy.plan(Plan { top, all_dirty: false, target_is_zero }).await?;
        }
        self.catch_up().await?;
        let job = self.copy.job();
        job.set_synced(job.copy_mode() == CopyMode::WriteBlocking && self.copy.is_clean());
        job.become_ready();
        self.follow().await?;
        if self.spec.job.auto_finalize && !self.copy.job().txn().is_group() {
            self.end().await?;
            return Ok(None);
        }
        // The guest goes on and its writes are marked; the end of the transaction copies them.
        let job = self.copy.job();
        job.set_busy(false);
        job.set_pivot(Rc::clone(&self).pivot());
        Ok(Some(Box::pin(async { Ok(()) })))
    }

    /// The end of the mirror as a part of the end of its transaction.
    fn pivot(self: Rc<Self>) -> Pivot {
        let (one, two) = (Rc::clone(&self), Rc::clone(&self));
        Pivot {
            copy: Rc::clone(&self.copy),
            approach: Box::new(move || {
                let mirror = Rc::clone(&one);
                Box::pin(async move { mirror.copy_until_little().await.map(drop) })
            }),
            part: Box::new(move || two.cut_part(two.copy.job().ending())),
        }
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
                job.set_synced(job.copy_mode() == CopyMode::WriteBlocking);
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

    /// What the source contributes to the cut that does what `ending` asks for: the last pass, then
    /// the switch.
    fn cut_part(&self, ending: Ending) -> CutPart {
        let source = self.copy.source();
        let copy = Rc::clone(&self.copy);
        let last_pass = move |_: Rc<Graph>| -> LocalFuture<'static, EngineResult<()>> {
            Box::pin(async move { copy.last_pass().await })
        };
        let (copy, slot) = (Rc::clone(&self.copy), Rc::clone(&self.slot));
        let below = self.spec.more.backing_at_pivot;
        let swap = move |graph: &Rc<Graph>| {
            if ending != Ending::None {
                end_in_cut(graph, &copy, &slot, ending, below);
            }
        };
        CutPart {
            core: source.core().id(),
            nodes: vec![source.id()],
            flush: false,
            before_swap: Some(Box::new(last_pass)),
            swap: Swap::Local(Box::new(swap)),
        }
    }

    /// One cut: the last pass and what `ending` asks for. False if it failed and the policy says to
    /// go on.
    async fn finish(&self, ending: Ending) -> Result<bool> {
        let job = self.copy.job();
        let cut = cut(job.core(), vec![self.cut_part(ending)], CUT_WAIT_NS);
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

/// The switch: memory only, with the gates of the source closed and the target durable.
fn end_in_cut(
    graph: &Rc<Graph>,
    copy: &Rc<Copy>,
    slot: &Rc<HookSlot>,
    ending: Ending,
    below: Option<NodeId>,
) {
    slot.remove();
    if copy.is_dead() {
        return;
    }
    copy.job().decide();
    if let Some(bitmap) = copy.job().bitmap() {
        bitmap.freeze();
    }
    if ending == Ending::Complete {
        graph.repoint(copy.source().id(), copy.target().id());
        let Some(below) = below.and_then(|id| graph.node(id)) else { return };
        if let Err(error) = graph.set_backing(copy.target(), Some(&below)) {
            // Nobody excludes an overlay of a node that is read by overlays already.
            tracing::error!(%error, node = %below.name(), "no backing node below the target");
        }
    }
}
