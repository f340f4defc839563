//! Commit of the layer that guests write: it follows them until it is told to end.
//!
//! Order rules:
//! 1. the hook sets dirty bits after the data and the mapping of a write, also of a failed one,
//!    before the guest is answered; the copy loop clears a bit before it reads;
//! 2. `ready` is announced after nothing was dirty or in flight and the base was flushed;
//! 3. the end is one cut of top and base: gates closed, nothing in flight, last pass, base durable,
//!    then (complete) guests move to the base and the hook goes; events after that;
//! 4. the base gets only what layers above it hold, and a layer never gives back what it holds
//!    (discarded clusters read as zeroes): as seen from the top nothing changes before the end.

use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::error::Result as EngineResult;
use liveblk_engine::format::LocalFuture;
use liveblk_engine::graph::{CutPart, Graph, Swap, cut};
use liveblk_engine::node::{Node, WriteHook};

use crate::chain::{Section, close_dropped, with_section};
use crate::commit::{CommitSpec, Lot, begin, granularity, hold, layers_of, vouch};
use crate::copy::{BeforeWrite, Bounds, Copy, CopySetup};
use crate::error::{JobError, Result};
use crate::event::{Kind, Operation};
use crate::job::Job;
use crate::lifecycle::Ending;
use crate::limits::{CUT_WAIT_NS, PIVOT_BYTES, PIVOT_BYTES_MAX, PIVOT_PATIENCE_NS};
use crate::manager::JobManager;
use crate::start::{Body, HookSlot, LastStep, Prepared, show_filter};
use crate::txn::JobTxn;

/// All of a start over `nodes`, from the top to the base, that comes before the cut.
pub(crate) async fn prepare_active(
    spec: CommitSpec,
    nodes: Vec<Rc<Node>>,
    txn: &Rc<JobTxn>,
) -> Result<Prepared> {
    let manager = JobManager::of(spec.top.core());
    for node in &nodes {
        if let Some(kind) = manager.any_user(node.id()) {
            return Err(JobError::BusyWithJob { node: (*node.name()).into(), kind: kind.name() });
        }
    }
    let job = manager.create(Kind::Commit, spec.job.clone(), txn)?;
    job.set_nodes(spec.top.id(), spec.base.id());
    job.set_section(nodes.iter().map(|node| node.id()).collect());
    let graph = Graph::of(job.core());
    let section = Section::new(&graph);
    let idle = vouch(&section, &graph, &nodes);
    if let Err(error) = hold(&section, &job, &nodes, true).await {
        section.end().await;
        manager.withdraw(&job);
        return Err(error);
    }
    prepare(job, spec, section, Lot { nodes, idle })
}

fn prepare(job: Rc<Job>, spec: CommitSpec, section: Rc<Section>, lot: Lot) -> Result<Prepared> {
    let copy = Copy::new(CopySetup {
        job,
        source: Rc::clone(&spec.top),
        target: Rc::clone(&spec.base),
        granularity: granularity(&spec.base),
        all_dirty: false,
        whole_granules: false,
        compress: false,
        keeps_bytes: true,
        discard_source: false,
        before: BeforeWrite::default(),
        bounds: Bounds::default(),
        hold: Rc::clone(&section) as Rc<dyn std::any::Any>,
    });
    show_filter(Kind::Commit, &copy, spec.filter_name.as_deref())?;
    let hook: Rc<dyn WriteHook> = Rc::new(MarkDirty(Rc::clone(&copy)));
    let slot = HookSlot::new(&spec.top, hook);
    let (held, inner) = (Rc::clone(&section), Rc::clone(&copy));
    let commit = Active { copy: Rc::clone(&copy), slot: Rc::clone(&slot), section, lot };
    let body: Body = Box::pin(async move {
        with_section(held, inner, async move { Rc::new(commit).run().await }).await
    });
    Ok(Prepared { copy, slot, body, opened: None })
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

struct Active {
    copy: Rc<Copy>,
    slot: Rc<HookSlot>,
    section: Rc<Section>,
    lot: Lot,
}

impl Active {
    async fn run(self: Rc<Self>) -> Result<Option<LastStep>> {
        begin(&self.lot).await?;
        self.copy.plan_layers(&layers_of(&self.lot.nodes), false).await?;
        self.catch_up().await?;
        self.copy.job().become_ready();
        self.follow().await?;
        if self.copy.job().options().auto_finalize && !self.copy.job().txn().is_group() {
            self.end().await?;
            return Ok(None);
        }
        // The guest goes on and its writes are marked; job-finalize copies them and ends.
        self.copy.job().set_busy(false);
        Ok(Some(Box::pin(async move { self.end().await })))
    }

    /// Brings the base up to the top once, durably.
    async fn catch_up(&self) -> Result<()> {
        loop {
            if self.copy_until_little().await? {
                return self.copy.flush_target().await;
            }
            // The guest is faster: one short pass with the gates closed.
            if self.cut(Ending::None).await? {
                return Ok(());
            }
        }
    }

    /// Follows the guest until told to end.
    async fn follow(&self) -> Result<()> {
        let job = self.copy.job();
        loop {
            let changed = job.changed().wait();
            self.copy.check()?;
            if job.ending() != Ending::None && !job.wants_pause() {
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

    /// Ends as it was told to, and gives back what the job has.
    async fn end(&self) -> Result<()> {
        loop {
            self.copy_until_little().await?;
            if self.cut(self.copy.job().ending()).await? {
                break;
            }
        }
        let pivoted = self.copy.job().ending() == Ending::Complete;
        self.section.end().await;
        if pivoted {
            let graph = Graph::of(self.copy.job().core());
            close_dropped(&graph, None, self.lot.nodes.first().cloned()).await;
        }
        Ok(())
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
    async fn cut(&self, ending: Ending) -> Result<bool> {
        let job = self.copy.job();
        let copy = Rc::clone(&self.copy);
        let last_pass = move |_: Rc<Graph>| -> LocalFuture<'static, EngineResult<()>> {
            Box::pin(async move { copy.last_pass().await })
        };
        let part = CutPart {
            core: job.core().id(),
            nodes: vec![self.copy.source().id(), self.copy.target().id()],
            flush: false,
            before_swap: Some(Box::new(last_pass)),
            swap: self.swap(ending),
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

    /// What happens with the gates closed and everything in the base.
    fn swap(&self, ending: Ending) -> Swap {
        let (copy, slot) = (Rc::clone(&self.copy), Rc::clone(&self.slot));
        let section = Rc::clone(&self.section);
        let dropped = self.lot.nodes.get(..self.lot.nodes.len() - 1).unwrap_or_default().to_vec();
        Swap::Local(Box::new(move |graph: &Rc<Graph>| {
            if ending == Ending::None {
                return;
            }
            slot.remove();
            if copy.is_dead() {
                return;
            }
            copy.job().decide();
            if ending == Ending::Complete {
                section.give_up_uses(&dropped);
                copy.target().succeed(copy.source());
                graph.repoint(copy.source().id(), copy.target().id());
            }
        }))
    }
}
