//! Following: a target is brought up to its source, kept there while guests write, and takes them
//! over, or does not, when the job is told to end. Mirror and active commit are policy over this.
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

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;

use liveblk_engine::error::Result as EngineResult;
use liveblk_engine::executor::sync::{Either, select};
use liveblk_engine::format::LocalFuture;
use liveblk_engine::graph::{CutPart, Graph, Swap, cut};
use liveblk_engine::node::Node;

use crate::copy::{Copy, EarlierReads};
use crate::error::{JobError, Result};
use crate::event::Operation;
use crate::lifecycle::Ending;
use crate::limits::{CUT_WAIT_NS, PIVOT_BYTES, PIVOT_BYTES_MAX, PIVOT_PATIENCE_NS};
use crate::pivot::Pivot;
use crate::spec::CopyMode;
use crate::start::{HookSlot, LastStep};

/// What a kind of job does when its target has everything.
///
/// The follower calls `switch` once, inside the cut that ends the job well, and `after` once,
/// later; neither if the job fails or is forced to end.
pub(crate) trait Takeover {
    /// The switch: memory only, with the gates of the source closed and the target durable.
    fn switch(&self, graph: &Rc<Graph>, copy: &Rc<Copy>, ending: Ending);

    /// Guests, and the job with them, moved from one node to another above it. Memory only, inside
    /// the cut of the snapshot.
    fn moved(&self, _graph: &Rc<Graph>, _from: &Rc<Node>, _to: &Rc<Node>) {}

    /// What is left to be done before the event.
    fn after(&self, ending: Ending) -> LocalFuture<'static, ()>;
}

/// See the module.
pub(crate) struct Follower {
    copy: Rc<Copy>,
    slot: Rc<HookSlot>,
    takeover: Rc<dyn Takeover>,
    /// How it ended, once the cut of the end is over.
    ended: Cell<Ending>,
}

impl Follower {
    pub(crate) fn new(
        copy: &Rc<Copy>,
        slot: &Rc<HookSlot>,
        takeover: Rc<dyn Takeover>,
    ) -> Rc<Self> {
        let (slot, ended) = (Rc::clone(slot), Cell::new(Ending::None));
        let follower = Rc::new(Self { copy: Rc::clone(copy), slot, takeover, ended });
        copy.job().set_follower(&follower);
        follower
    }

    pub(crate) fn copy(&self) -> &Rc<Copy> {
        &self.copy
    }

    /// The guests of the source are at `to` from now on, which shows what the source did. Only
    /// inside the cut that moved them.
    pub(crate) fn move_to(&self, graph: &Rc<Graph>, to: &Rc<Node>) -> EarlierReads {
        let (from, job) = (self.copy.source(), self.copy.job());
        self.slot.move_to(to);
        let earlier = self.copy.set_source(to);
        job.set_nodes(to.id(), self.copy.target().id());
        job.carry_source_use(to);
        job.move_filter(to);
        self.takeover.moved(graph, &from, to);
        job.changed().notify_all();
        earlier
    }

    /// Runs to the end, when `plan` has found out what is to be copied.
    ///
    /// # Errors
    /// The failure that the policy reports; `Cancelled` when the job is forced to end.
    pub(crate) async fn run(
        self: Rc<Self>,
        plan: impl Future<Output = Result<()>>,
    ) -> Result<Option<LastStep>> {
        let work = async {
            plan.await?;
            self.catch_up().await
        };
        let job = self.copy.job();
        match job.convergence() {
            None => work.await?,
            Some(convergence) => {
                match select(work, convergence.control(&self.copy)).await {
                    Either::First(result) => result?,
                    Either::Second(never) => match never {},
                }
                convergence.meet();
            }
        }
        job.set_synced(job.copy_mode() == CopyMode::WriteBlocking && self.copy.is_clean());
        job.become_ready();
        self.follow().await?;
        if job.options().auto_finalize && !job.txn().is_group() {
            self.end().await?;
            self.takeover.after(self.ended.get()).await;
            return Ok(None);
        }
        // The guest goes on and its writes are marked; the end of the transaction copies them.
        job.set_busy(false);
        job.set_pivot(Rc::clone(&self).pivot());
        Ok(Some(Box::pin(async move {
            self.takeover.after(self.ended.get()).await;
            Ok(())
        })))
    }

    /// The end of the job as a part of the end of its transaction.
    fn pivot(self: Rc<Self>) -> Pivot {
        let (one, two) = (Rc::clone(&self), Rc::clone(&self));
        Pivot {
            copy: Rc::clone(&self.copy),
            approach: Box::new(move || {
                let follower = Rc::clone(&one);
                Box::pin(async move {
                    follower.hurry();
                    follower.copy_until_little().await.map(drop)
                })
            }),
            part: Box::new(move || two.cut_part(two.copy.job().ending())),
        }
    }

    /// Brings the target up to the source once, durably.
    async fn catch_up(self: &Rc<Self>) -> Result<()> {
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
            if job.ending() != Ending::None && !job.wants_pause() {
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
    async fn end(self: &Rc<Self>) -> Result<()> {
        self.hurry();
        loop {
            self.copy_until_little().await?;
            if self.finish(self.copy.job().ending()).await? {
                return Ok(());
            }
        }
    }

    /// Who asked for a bounded latency does not want gates closed for long: what guests write from
    /// now on is not left for the end.
    fn hurry(&self) {
        let job = self.copy.job();
        if job.convergence().is_some() {
            job.set_copy_mode(CopyMode::WriteBlocking);
        }
    }

    /// Copies until nothing is dirty (true), or so little that closing the gates for it does not
    /// hurt. What counts as little grows while the guest keeps ahead.
    async fn copy_until_little(&self) -> Result<bool> {
        let core = self.copy.job().core().clone();
        let (began, convergence) = (core.now(), self.copy.job().convergence());
        let is_little = || {
            let (now, waited) = (core.now(), core.now().saturating_sub(began));
            let little = match &convergence {
                Some(convergence) => convergence.little(now, began, self.copy.granularity()),
                None => {
                    let doublings = u32::try_from(waited / PIVOT_PATIENCE_NS).unwrap_or(u32::MAX);
                    PIVOT_BYTES.checked_shl(doublings.min(16)).unwrap_or(PIVOT_BYTES_MAX)
                }
            };
            waited > PIVOT_PATIENCE_NS && self.copy.dirty_bytes() <= little.min(PIVOT_BYTES_MAX)
        };
        self.copy.run_while(|| !is_little()).await
    }

    /// What the source contributes to the cut that does what `ending` asks for: the last pass, then
    /// the switch.
    fn cut_part(self: &Rc<Self>, ending: Ending) -> CutPart {
        let source = self.copy.source();
        let (copy, known) = (Rc::clone(&self.copy), source.id());
        let last_pass = move |_: Rc<Graph>| -> LocalFuture<'static, EngineResult<()>> {
            Box::pin(async move {
                copy.check_source(known)?;
                copy.last_pass().await
            })
        };
        let follower = Rc::clone(self);
        let swap = move |graph: &Rc<Graph>| {
            if ending != Ending::None {
                follower.end_in_cut(graph, ending);
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

    fn end_in_cut(&self, graph: &Rc<Graph>, ending: Ending) {
        self.slot.remove();
        if self.copy.is_dead() {
            return;
        }
        let job = self.copy.job();
        job.decide();
        self.ended.set(ending);
        if let Some(bitmap) = job.bitmap() {
            bitmap.freeze();
        }
        self.takeover.switch(graph, &self.copy, ending);
    }

    /// One cut: the last pass and what `ending` asks for. False if it failed and the policy says to
    /// go on.
    async fn finish(self: &Rc<Self>, ending: Ending) -> Result<bool> {
        let job = self.copy.job();
        let source = self.copy.source().id();
        let cut = async {
            let _shape = self.copy.hold_shape().await;
            cut(job.core(), vec![self.cut_part(ending)], CUT_WAIT_NS).await
        };
        match job.unless_dead(cut, || self.copy.is_dead()).await {
            None => self.copy.check().and(Err(JobError::Cancelled)),
            Some(Ok(())) => self.copy.check().map(|()| true),
            Some(Err(_)) if self.copy.check_source(source).is_err() => Ok(false),
            Some(Err(error)) => {
                let (operation, error) =
                    self.copy.take_pass_failure().unwrap_or((Operation::Read, error));
                self.copy.answer(operation, error).await?;
                Ok(false)
            }
        }
    }
}
