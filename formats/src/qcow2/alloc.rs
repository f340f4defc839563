//! Free clusters: found and reserved by an image task, taken and counted by writes.
//!
//! A reserved run has refcount 0 and belongs to the allocator alone; taking clusters sets their
//! refcounts to 1 in memory, which the next flush writes before any entry that uses them. Clusters
//! below the end of the file are handed out only where a refcount block says that they are free;
//! where no block exists nothing is known, so such regions are left alone. A count is not believed
//! alone: what holds metadata or is known to hold guest data is never handed out.

use std::rc::Rc;

use liveblk_engine::Result;

use super::counts;
use super::image::Image;
use super::layout::{HostCluster, Run};
use super::state::State;
use crate::limits::{ALLOC_CLUSTERS_BATCH, ALLOC_CLUSTERS_MAX, ALLOC_SCAN_SLICES};
use crate::reason::Reason;

impl State {
    /// Takes up to `want` neighbouring clusters and counts them; `None`: a refill is needed.
    pub(super) fn take_clusters(&mut self, want: u64) -> Option<Run> {
        loop {
            let enough = self.allocator.runs.iter().position(|run| run.count >= want);
            let any = || {
                let runs = self.allocator.runs.iter().enumerate();
                let longest = runs.max_by_key(|(_, run)| run.count).map(|(at, _)| at);
                longest.filter(|_| self.allocator.fresh)
            };
            let at = enough.or_else(any)?;
            let run = self.allocator.runs.get_mut(at)?;
            let taken = Run { start: run.start, count: run.count.min(want) };
            run.start = run.start.plus(taken.count);
            run.count -= taken.count;
            if run.count == 0 {
                self.allocator.runs.swap_remove(at);
            }
            self.allocator.fresh = false;
            if taken.clusters().all(|cluster| self.is_free(cluster)) {
                for cluster in taken.clusters() {
                    self.set_refcount(cluster, 1);
                }
                return Some(taken);
            }
            // Cannot be: slices under a reserved run stay cached. Leave these clusters alone.
            tracing::error!(start = taken.start.0, "reserved clusters are not free");
        }
    }

    /// Takes and counts this cluster if it is the first of a reserved run.
    pub(super) fn take_cluster(&mut self, cluster: HostCluster) -> bool {
        let runs = &mut self.allocator.runs;
        let Some(at) = runs.iter().position(|run| run.start == cluster) else { return false };
        if let Some(run) = runs.get_mut(at) {
            run.start = run.start.plus(1);
            run.count -= 1;
            if run.count == 0 {
                runs.swap_remove(at);
            }
        }
        self.allocator.fresh = false;
        self.is_free(cluster) && self.set_refcount(cluster, 1)
    }

    /// Whether nothing is known to use `cluster`: neither a count, nor metadata, nor guest data.
    fn is_free(&self, cluster: HostCluster) -> bool {
        self.refcount(cluster) == Some(0)
            && !self.metadata.contains(cluster.0)
            && !self.mapped.contains(cluster)
    }

    /// Takes clusters back that nobody refers to and nobody accesses.
    pub(super) fn give_back(&mut self, run: Run) {
        for cluster in run.clusters() {
            if self.refcount(cluster) == Some(1) {
                self.set_refcount(cluster, 0);
                self.note_free(cluster);
            } else {
                super::freed::push_cluster(&mut self.released, cluster);
            }
        }
    }

    /// The searches must look at `cluster` (again).
    pub(super) fn note_free(&mut self, cluster: HostCluster) {
        for scan in &mut self.allocator.scan {
            *scan = (*scan).min(cluster.0);
        }
    }

    /// Whether a refcount slice counts clusters that are reserved.
    pub(super) fn reserves(runs: &[Run], slice: u64, entries: u64) -> bool {
        let (first, last) = (slice * entries, (slice + 1) * entries);
        runs.iter().any(|run| run.start.0 < last && run.start.0 + run.count > first)
    }

    fn is_reserved(&self, cluster: HostCluster) -> bool {
        let inside = |run: &Run| run.start <= cluster && cluster < run.start.plus(run.count);
        self.allocator.runs.iter().any(inside)
    }

    fn has_run(&self, want: u64) -> bool {
        self.allocator.runs.iter().any(|run| run.count >= want)
    }

    /// The first free run of at least `want` clusters in a cached slice, from `from` on.
    fn free_run_in(&self, slice: u64, from: u64, want: u64) -> Option<Run> {
        let entries = self.geometry.ref_slice_entries();
        let order = self.geometry.refcount_order;
        let bytes = self.refs.get(slice)?;
        let most = want.max(ALLOC_CLUSTERS_BATCH);
        let last = ((slice + 1) * entries).min(self.allocator.end);
        let mut found: Option<Run> = None;
        for cluster in from.max(slice * entries)..last {
            let free = counts::get(bytes, order, cluster % entries) == 0
                && !self.is_reserved(HostCluster(cluster))
                && !self.metadata.contains(cluster)
                && !self.mapped.contains(HostCluster(cluster));
            if !free {
                if found.is_some_and(|run| run.count >= want) {
                    break;
                }
                found = None;
                continue;
            }
            let run = found.get_or_insert(Run { start: HostCluster(cluster), count: 0 });
            run.count += 1;
            if run.count == most {
                break;
            }
        }
        found.filter(|run| run.count >= want)
    }
}

impl Image {
    /// Takes `count` neighbouring clusters. The caller holds `growth`.
    pub(super) async fn allocate(self: &Rc<Self>, count: u64) -> Result<Run> {
        loop {
            let taken = self.state.borrow_mut().take_clusters(count);
            match taken {
                Some(run) if run.count == count => return Ok(run),
                Some(run) => {
                    self.state.borrow_mut().give_back(run);
                    self.extend(count).await?;
                }
                None => self.refill(count).await?,
            }
        }
    }

    /// Reserves a run of `want` clusters, or a shorter one if there is none. The caller holds
    /// `growth`.
    pub(super) async fn refill(self: &Rc<Self>, want: u64) -> Result<()> {
        let want = want.clamp(1, ALLOC_CLUSTERS_MAX);
        if !self.state.borrow().has_run(want) {
            Rc::clone(self).reclaim().await;
            if !self.search(want).await? {
                self.extend(want).await?;
            }
        }
        self.state.borrow_mut().allocator.fresh = true;
        Ok(())
    }

    /// Looks for free clusters below the end of the file, for a bounded time.
    async fn search(self: &Rc<Self>, want: u64) -> Result<bool> {
        let entries = self.geometry.ref_slice_entries();
        let which = usize::from(want > 1);
        for _ in 0..ALLOC_SCAN_SLICES {
            let (from, covered) = {
                let state = self.state.borrow();
                let from = state.allocator.scan.get(which).copied().unwrap_or(0);
                if from >= state.allocator.end {
                    return Ok(false);
                }
                let block = state.block(from / self.geometry.block_entries());
                (from, block.is_ok_and(|host| host != 0))
            };
            let slice = from / entries;
            if covered {
                self.load_ref_slice(slice).await?;
            }
            let mut state = self.state.borrow_mut();
            if let Some(run) = state.free_run_in(slice, from, want) {
                state.allocator.runs.push(run);
                return Ok(true);
            }
            // Frees that happened meanwhile moved the position back; then start there.
            if let Some(scan) = state.allocator.scan.get_mut(which)
                && *scan == from
            {
                *scan = (slice + 1) * entries;
            }
        }
        Ok(false)
    }

    /// Reserves clusters at the end of the file, with refcount blocks and a larger refcount table
    /// where needed. The run may be shorter than `want` where a new block interrupts it; it is
    /// longer, for the writes that follow, as far as that loads nothing.
    async fn extend(self: &Rc<Self>, want: u64) -> Result<()> {
        let entries = self.geometry.block_entries();
        loop {
            let at = HostCluster(self.state.borrow().allocator.end);
            if at.0 >= self.geometry.host_cluster(super::layout::OFFSET_MASK).0 {
                return Err(self.error(Reason::TableFull, "allocate"));
            }
            let block = at.0 / entries;
            if block >= self.state.borrow().reftable.count() {
                self.grow_reftable().await?;
                continue;
            }
            let host = self.state.borrow().block(block);
            if self.judge(host)? == 0 {
                self.make_block(block, at).await?;
                continue;
            }
            let mut run = Run { start: at, count: 0 };
            let most = want.max(ALLOC_CLUSTERS_BATCH);
            while run.count < most && (at.0 + run.count) / entries == block {
                let next = at.plus(run.count);
                let (slice, _) = self.state.borrow().ref_position(next);
                if run.count >= want && !self.state.borrow().refs.contains(slice) {
                    break;
                }
                self.load_ref_slice(slice).await?;
                if !self.state.borrow().is_free(next) {
                    break;
                }
                run.count += 1;
            }
            let mut state = self.state.borrow_mut();
            if state.allocator.end != at.0 {
                continue;
            }
            if run.count == 0 {
                // Counted or used although it lies behind the end: a leak, or another program's.
                state.allocator.end += 1;
                continue;
            }
            state.allocator.end += run.count;
            state.allocator.runs.push(run);
            drop(state);
            self.keep_room();
            return Ok(());
        }
    }
}
