//! The plan: which granules need a copy at first, and which of them are zeroes.
//!
//! Looks at source and target step by step while guests write. A granule that a guest wrote since
//! the look began is neither called zero nor clean on the strength of that look.

use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::node::{Node, Origin, StatusExtent, StatusKind, ZeroFlags};

use super::state::Copy;
use crate::error::{JobError, Result};
use crate::event::Operation;
use crate::limits::{PLAN_STEP, ZERO_UNIT};

/// What a job wants planned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Only what the source's own layer holds; else what differs from a target full of zeroes.
    pub(crate) top: bool,
    /// Everything is dirty already: the plan takes out what needs no copy. Otherwise nothing is,
    /// and the plan puts in what needs one.
    pub(crate) all_dirty: bool,
    /// The target is known to read as zeroes: what need not be copied was never to be done.
    pub(crate) target_is_zero: bool,
}

impl Copy {
    /// Makes the plan from what `source` holds, the node of the start. A snapshot may move the
    /// guests, and the job, above it meanwhile: what is written there is marked by the hook.
    ///
    /// # Errors
    /// As [`Copy::run_until_clean`].
    pub(crate) async fn plan(self: &Rc<Self>, source: &Rc<Node>, plan: Plan) -> Result<()> {
        // What is written beyond the end that the source has now is marked by the hook.
        let (size, mut at) = (self.size().min(source.size()), 0);
        while at < size {
            self.check()?;
            self.job.pause_point().await;
            let step = GuestRange::new(at, PLAN_STEP.min(size - at));
            // The guests, and the job with them, may be elsewhere by now; what is copied of a layer
            // is what that layer held.
            let now = if plan.top { Rc::clone(source) } else { self.source() };
            self.plan_step(&now, plan, step).await?;
            at = step.end().bytes();
        }
        self.touched.replace(None);
        Ok(())
    }

    async fn plan_step(
        self: &Rc<Self>,
        source: &Rc<Node>,
        plan: Plan,
        step: GuestRange,
    ) -> Result<()> {
        let fresh = DirtyBitmap::new(self.size(), self.granularity());
        self.touched.replace(Some(fresh));
        let source = self.status_of(source, step).await?;
        let part = |runs: &[StatusExtent], pick: fn(&StatusExtent) -> bool| {
            granules(step.len, self.granularity(), runs, pick)
        };
        let data = part(&source, is_data);
        let mut copy = if plan.top { part(&source, StatusExtent::top) } else { data.clone() };
        if !plan.top && !plan.target_is_zero {
            let status = self.target.block_status(step.start.bytes(), step.len);
            match self.job.unless_dead(status, || self.is_dead()).await {
                None => return self.check().and(Err(JobError::Cancelled)),
                Some(Ok(target)) => copy.merge(&part(&target, is_data)),
                // Not knowing the target only costs explicit zeroes.
                Some(Err(_)) => copy.set_all(),
            }
        }
        self.apply(plan, step, &data, &copy);
        Ok(())
    }

    pub(super) async fn status_of(
        &self,
        source: &Rc<Node>,
        step: GuestRange,
    ) -> Result<Vec<StatusExtent>> {
        loop {
            let _reading = self.begin_read();
            let status = source.block_status(step.start.bytes(), step.len);
            match self.job.unless_dead(status, || self.is_dead()).await {
                None => return self.check().and(Err(JobError::Cancelled)),
                Some(Ok(runs)) => return Ok(runs),
                Some(Err(error)) => self.answer(Operation::Read, error).await?,
            }
        }
    }

    /// Takes over what a look at `step` found: granules with `data`, granules that need a `copy`.
    pub(super) fn apply(
        &self,
        plan: Plan,
        step: GuestRange,
        data: &DirtyBitmap,
        copy: &DirtyBitmap,
    ) {
        let moved =
            |run: GuestRange| GuestRange::new(step.start.plus(run.start.bytes()).bytes(), run.len);
        {
            let touched = self.touched.borrow();
            let mut zeroes = self.zero.borrow_mut();
            for run in clean_runs(data) {
                zeroes.set_range(moved(run));
            }
            let mut from = step.start.bytes();
            while let Some(run) = touched
                .as_ref()
                .and_then(|touched| touched.next_dirty_range(from, u64::MAX))
                .filter(|run| run.start < step.end())
            {
                zeroes.clear_range(run);
                from = run.end().bytes();
            }
        }
        let skipped;
        let mut todo = self.todo.borrow_mut();
        if plan.all_dirty {
            // What a guest is about to write is not dirty any more: it is being copied.
            let mut cleared = 0;
            for run in clean_runs(copy) {
                cleared += todo.clear_range(moved(run));
                self.note_landed(moved(run));
                if plan.top {
                    // Not copied and not zero: what lies below the top is no part of the copy.
                    self.withhold(moved(run));
                }
            }
            skipped = cleared * todo.granularity();
        } else {
            skipped = step.len - kept(copy, step.len);
            let mut from = 0;
            while let Some(run) = copy.next_dirty_range(from, u64::MAX) {
                todo.set_range(moved(run));
                from = run.end().bytes();
            }
        }
        drop(todo);
        // What a full copy skips is done; what sync=top leaves out was never to be done.
        if !plan.top && !plan.target_is_zero {
            self.job.progress().add_done(skipped);
        }
        self.note_left();
    }

    /// Makes the target read as zeroes from the end of the source on.
    ///
    /// # Errors
    /// As [`Copy::run_until_clean`].
    pub(crate) async fn zero_tail(&self) -> Result<()> {
        let mut at = self.size();
        while at < self.target.size() {
            let len = ZERO_UNIT.min(self.target.size() - at);
            let work = zero_if_needed(&self.target, at, len);
            match self.job.unless_dead(work, || self.is_dead()).await {
                None => return self.check().and(Err(JobError::Cancelled)),
                Some(Ok(())) => at += len,
                Some(Err(error)) => self.answer(Operation::Write, error).await?,
            }
        }
        Ok(())
    }
}

/// Zeroes `len` bytes of `node` at `at` unless they are known to read so.
async fn zero_if_needed(node: &Rc<Node>, at: u64, len: u64) -> liveblk_engine::Result<()> {
    let known = node.block_status(at, len).await;
    if known.is_ok_and(|runs| !runs.iter().any(is_data)) {
        return Ok(());
    }
    let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
    node.write_zeroes(at, len, flags, Origin::External).await
}

pub(super) fn is_data(run: &StatusExtent) -> bool {
    run.kind == StatusKind::Data
}

/// The granules of `len` bytes that a run of `pick` touches.
fn granules(
    len: u64,
    granularity: u64,
    runs: &[StatusExtent],
    pick: fn(&StatusExtent) -> bool,
) -> DirtyBitmap {
    let mut map = DirtyBitmap::new(len, granularity);
    let mut at = 0;
    for run in runs {
        if pick(run) {
            map.set_range(GuestRange::new(at, run.len));
        }
        at += run.len;
    }
    map
}

/// The runs of clean granules.
fn clean_runs(map: &DirtyBitmap) -> Vec<GuestRange> {
    let mut runs = Vec::new();
    let mut at = map.next_clean(0);
    while at < map.size() {
        let end = map.next_dirty(at).unwrap_or(map.size());
        runs.push(GuestRange::new(at, end - at));
        at = map.next_clean(end);
    }
    runs
}

/// Bytes inside `len` that are dirty in `map`.
fn kept(map: &DirtyBitmap, len: u64) -> u64 {
    len - clean_runs(map).iter().map(|run| run.len).sum::<u64>()
}
