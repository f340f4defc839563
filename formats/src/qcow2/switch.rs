//! Changing all tables of an image at once: written beside the old ones, one sector decides.
//!
//! Snapshots and smaller sizes change refcounts, COPIED bits, L1 and the header together, and no
//! order of separate writes keeps them consistent at every cut (a refcount of 2 and a COPIED bit
//! contradict each other, so do a refcount of 1 and no COPIED bit). Therefore nothing that the file
//! refers to is changed:
//!
//! 1. the image is frozen, everything is in the file;
//! 2. clusters for all that is new are taken, counted once and made durable (a cut leaks them);
//! 3. every refcount block is copied to a new place before a count in it changes; L2 tables, L1 and
//!    the snapshot table are written to new places; what only the old tables use is counted as free
//!    in the new blocks;
//! 4. the changed counts and the new refcount table are written; barrier;
//! 5. one sector of the header points to refcount table, L1 and snapshot table, durable;
//! 6. memory follows; now free clusters can be taken again.
//!
//! At any cut the file is the old or the new image. Before (5) memory differs from the file in the
//! places of refcount blocks alone; a failure puts these back and gives all new clusters back.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::executor::sync::MutexGuard;

use super::counts;
use super::freed::{Cause, push_cluster};
use super::freeze::Frozen;
use super::header::Header;
use super::image::Image;
use super::layout::{HostCluster, Run};
use super::state::{Health, Meta, State};
use crate::limits::{ALLOC_CLUSTERS_MAX, SWITCH_DEFERRED_MAX, SWITCH_PUNCH_RUNS_MAX};
use crate::reason::Reason;

/// New tables beside the old ones; `publish` or `undo` ends it.
#[must_use = "publish it or undo it"]
pub(super) struct Switch<'a> {
    pub(super) image: &'a Rc<Image>,
    /// Clusters that were taken beforehand and are not used yet.
    spare: Vec<Run>,
    /// All that was taken.
    taken: Vec<Run>,
    reftable: Run,
    /// Old places of the refcount blocks that were copied, by index.
    moved: BTreeMap<u64, u64>,
    /// The same blocks in the order of copying.
    order: Vec<u64>,
    /// Leave out refcount blocks that count nothing but themselves.
    pub(super) drops_empty_blocks: bool,
    /// Let a reference that cannot be counted wait for one of its cluster that is taken away.
    pub(super) defers: bool,
    /// References that wait, by cluster.
    deferred: BTreeMap<u64, u64>,
    /// What became free, to be given back to the storage (as far as there is room to remember).
    punch: Vec<Run>,
    _frees: MutexGuard<'a, ()>,
}

impl<'a> Switch<'a> {
    /// Takes `clusters` single clusters and one run for each of `tables` (bytes), in this order.
    pub(super) async fn begin(
        frozen: &'a Frozen<'_>,
        clusters: u64,
        tables: &[u64],
    ) -> Result<(Self, Vec<Run>)> {
        let image = frozen.image;
        let mut taken = Vec::new();
        let found = image.take_all(clusters, tables, &mut taken).await;
        let settled = match found {
            Ok(found) => image.settle_taken().await.map(|frees| (found, frees)),
            Err(error) => Err(error),
        };
        let ((reftable, spare, runs), frees) = settled.inspect_err(|_| {
            image.state.borrow_mut().give_back_later(&mut taken);
        })?;
        {
            // Their refcount slices need not stay cached now.
            let mut state = image.state.borrow_mut();
            for run in std::mem::take(&mut state.allocator.runs) {
                state.note_free(run.start);
            }
            state.allocator.packing = None;
        }
        let switch = Self {
            image,
            spare,
            taken,
            reftable,
            moved: BTreeMap::new(),
            order: Vec::new(),
            drops_empty_blocks: false,
            defers: false,
            deferred: BTreeMap::new(),
            punch: Vec::new(),
            _frees: frees,
        };
        Ok((switch, runs))
    }

    /// One of the clusters that were taken.
    pub(super) fn take(&mut self) -> Result<HostCluster> {
        while let Some(run) = self.spare.last_mut() {
            if run.count > 0 {
                run.count -= 1;
                return Ok(run.start.plus(run.count));
            }
            self.spare.pop();
        }
        Err(self.image.error(Reason::TableFull, "allocate"))
    }

    /// The refcount of `cluster` as it will be.
    pub(super) async fn count(&self, cluster: HostCluster) -> Result<u64> {
        loop {
            {
                let state = self.image.state.borrow();
                let block = state.block(cluster.0 / self.image.geometry.block_entries());
                match state.refcount(cluster) {
                    Some(count) => return Ok(count),
                    None if block == Ok(0) => return Ok(0),
                    None => {}
                }
            }
            self.load(cluster).await?;
        }
    }

    /// Adds a reference to `cluster`, or takes one away; answers the new count.
    pub(super) async fn change(&mut self, cluster: HostCluster, up: bool) -> Result<u64> {
        let geometry = self.image.geometry;
        self.move_block(cluster.0 / geometry.block_entries()).await?;
        let max = u64::MAX >> (64 - geometry.refcount_bits());
        loop {
            {
                let mut state = self.image.state.borrow_mut();
                if let Some(count) = state.refcount(cluster) {
                    let host = geometry.host(cluster);
                    let new = match (up, count) {
                        (true, count) if count >= max => {
                            if self.defers && self.deferred.len() < SWITCH_DEFERRED_MAX {
                                *self.deferred.entry(cluster.0).or_default() += 1;
                                return Ok(count);
                            }
                            let bits = geometry.refcount_bits();
                            let reason = Reason::RefcountOverflow(bits, host);
                            return Err(self.image.error(reason, "count a reference"));
                        }
                        (true, 0) | (false, 0) => {
                            drop(state);
                            return self.image.judge(Err(Reason::Refcount(host)));
                        }
                        (true, count) => count + 1,
                        (false, count) if self.takes_deferred(cluster) => count,
                        (false, count) => count - 1,
                    };
                    state.set_refcount(cluster, new);
                    if new == 0 {
                        state.note_free(cluster);
                    }
                    drop(state);
                    if new == 0 && self.punch.len() < SWITCH_PUNCH_RUNS_MAX {
                        push_cluster(&mut self.punch, cluster);
                    }
                    return Ok(new);
                }
            }
            self.load(cluster).await?;
        }
    }

    /// Whether a reference to `cluster` waited, which takes the place of one that goes.
    fn takes_deferred(&mut self, cluster: HostCluster) -> bool {
        let Entry::Occupied(mut waiting) = self.deferred.entry(cluster.0) else { return false };
        *waiting.get_mut() -= 1;
        if *waiting.get() == 0 {
            waiting.remove();
        }
        true
    }

    /// Refuses the change if references still wait.
    pub(super) fn check_deferred(&self) -> Result<()> {
        let Some(cluster) = self.deferred.keys().next() else { return Ok(()) };
        let host = self.image.geometry.host(HostCluster(*cluster));
        let reason = Reason::RefcountOverflow(self.image.geometry.refcount_bits(), host);
        Err(self.image.error(reason, "count a reference"))
    }

    /// Takes one reference from each cluster of `run`.
    pub(super) async fn release(&mut self, run: Run) -> Result<()> {
        for cluster in run.clusters() {
            self.change(cluster, false).await?;
        }
        Ok(())
    }

    async fn load(&self, cluster: HostCluster) -> Result<()> {
        let (slice, _) = self.image.state.borrow().ref_position(cluster);
        self.image.load_ref_slice(slice).await
    }

    /// Copies refcount block `index` to its new place, if that has not been done.
    async fn move_block(&mut self, index: u64) -> Result<()> {
        if self.moved.contains_key(&index) {
            return Ok(());
        }
        let image = self.image;
        let found = image.state.borrow().block(index);
        let old = image.judge(found)?;
        if old == 0 {
            let host = index.saturating_mul(image.geometry.block_entries());
            return image.judge(Err(Reason::Refcount(host << image.geometry.cluster_bits)));
        }
        let new = self.take()?;
        let content =
            image.core.pool().alloc(usize::try_from(image.geometry.cluster()).unwrap_or(0));
        image.storage.read(old, content.clone()).await?;
        image.storage.write(image.geometry.host(new), content, false).await?;
        let mut state = image.state.borrow_mut();
        state.place_block(index, image.geometry.host(new));
        state.metadata.insert(new.0, Meta::RefBlock(index));
        self.moved.insert(index, old);
        self.order.push(index);
        Ok(())
    }

    /// Leaves out the refcount blocks that count nothing, or nothing but themselves.
    async fn drop_empty_blocks(&mut self) -> Result<()> {
        let image = self.image;
        let geometry = image.geometry;
        let blocks = image.state.borrow().reftable.used().len() as u64;
        for index in (0..blocks).rev() {
            let host = image.state.borrow().block(index).unwrap_or(0);
            if host == 0 {
                continue;
            }
            let own = geometry.host_cluster(host);
            let inside = own.0 / geometry.block_entries() == index;
            if !self.is_empty(index, inside.then_some(own)).await? {
                continue;
            }
            if !inside {
                self.change(own, false).await?;
            } else if self.punch.len() < SWITCH_PUNCH_RUNS_MAX {
                push_cluster(&mut self.punch, own);
            }
            let mut state = image.state.borrow_mut();
            let first = index * geometry.block_slices();
            for slice in first..first + geometry.block_slices() {
                state.refs.forget(slice);
            }
            // The old place is known if the block was moved, and was counted as free then.
            self.moved.entry(index).or_insert(host);
            state.metadata.remove(own.0);
            state.place_block(index, 0);
        }
        Ok(())
    }

    /// Whether block `index` counts nothing, `but` for this cluster.
    async fn is_empty(&self, index: u64, but: Option<HostCluster>) -> Result<bool> {
        let entries = self.image.geometry.block_entries();
        for cluster in (index * entries..(index + 1) * entries).map(HostCluster) {
            if Some(cluster) != but && self.count(cluster).await? != 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Steps 4 to 6. `change` puts the places of the new tables into the header, `follow` changes
    /// the state in the same way. On failure everything is as before.
    pub(super) async fn publish(
        mut self,
        change: impl FnOnce(&mut Header),
        follow: impl FnOnce(&mut State),
    ) -> Result<Vec<Run>> {
        let old_table = {
            let header = &self.image.state.borrow().header;
            let start = self.image.geometry.host_cluster(header.reftable_offset);
            Run { start, count: u64::from(header.reftable_clusters) }
        };
        if let Err(error) = self.write(old_table, change).await {
            self.undo().await;
            return Err(error);
        }
        let mut state = self.image.state.borrow_mut();
        for cluster in old_table.clusters() {
            state.metadata.remove(cluster.0);
        }
        for cluster in self.reftable.clusters() {
            state.metadata.insert(cluster.0, Meta::RefTable);
        }
        for (_, old) in std::mem::take(&mut self.moved) {
            state.metadata.remove(self.image.geometry.host_cluster(old).0);
        }
        follow(&mut state);
        state.l2.clear();
        state.give_back_later(&mut self.spare);
        Ok(self.punch)
    }

    async fn write(&mut self, old_table: Run, change: impl FnOnce(&mut Header)) -> Result<()> {
        self.release(old_table).await?;
        // Counting an old block as free may copy another block.
        let mut at = 0;
        loop {
            let next = self.order.get(at).and_then(|index| self.moved.get(index)).copied();
            if let Some(old) = next {
                self.change(self.image.geometry.host_cluster(old), false).await?;
                at += 1;
            } else if std::mem::take(&mut self.drops_empty_blocks) {
                self.drop_empty_blocks().await?;
            } else {
                break;
            }
        }
        let place = self.image.geometry.host(self.reftable.start);
        let table = self.image.state.borrow().reftable.to_vec();
        self.image.write_table(place, &table).await?;
        {
            let _tables = self.image.tables.lock().await;
            self.image.write_out().await?;
        }
        let clusters = u32::try_from(self.reftable.count).unwrap_or(u32::MAX);
        self.image
            .update_header(|header| {
                header.reftable_offset = place;
                header.reftable_clusters = clusters;
                change(header);
                self.image.apply_bitmaps(header);
            })
            .await
    }

    /// Puts everything back as it was.
    pub(super) async fn undo(mut self) {
        // No write-out may be under way to clusters that are given back.
        let _tables = self.image.tables.lock().await;
        let mut state = self.image.state.borrow_mut();
        for (index, old) in &self.moved {
            let new = state.block(*index).unwrap_or(0);
            state.place_block(*index, *old);
            if new != 0 {
                state.metadata.remove(self.image.geometry.host_cluster(new).0);
            }
            let old = self.image.geometry.host_cluster(*old).0;
            state.metadata.insert(old, Meta::RefBlock(*index));
        }
        state.refs.clear();
        // After an unknown header write the new tables may be the ones that count.
        if matches!(state.health, Health::Good) {
            state.give_back_later(&mut self.taken);
        }
    }
}

impl State {
    /// Refcount block `index` lies at `host` now; the file learns it by another way.
    fn place_block(&mut self, index: u64, host: u64) {
        self.reftable.set(index, host);
    }

    fn give_back_later(&mut self, runs: &mut Vec<Run>) {
        self.released.extend(std::mem::take(runs).into_iter().filter(|run| run.count > 0));
    }

    fn blocks(&self) -> u64 {
        self.reftable.used().iter().filter(|entry| **entry != 0).count() as u64
    }
}

impl Image {
    /// Takes room for the refcount table, all refcount blocks, `clusters` clusters, and `tables`.
    async fn take_all(
        self: &Rc<Self>,
        clusters: u64,
        tables: &[u64],
        taken: &mut Vec<Run>,
    ) -> Result<(Run, Vec<Run>, Vec<Run>)> {
        let mut runs = Vec::new();
        for bytes in tables {
            let run = self.allocate_table(self.geometry.clusters(*bytes)).await?;
            taken.push(run);
            runs.push(run);
        }
        let (mut spare, mut have) = (Vec::new(), 0);
        loop {
            let wanted = || clusters + self.state.borrow().blocks();
            while have < wanted() {
                let want = (wanted() - have).min(ALLOC_CLUSTERS_MAX);
                let run = self.state.borrow_mut().take_clusters(want);
                let Some(run) = run else {
                    self.refill(want).await?;
                    continue;
                };
                have += run.count;
                taken.push(run);
                spare.push(run);
            }
            let table = || u64::from(self.state.borrow().header.reftable_clusters);
            let before = table();
            let run = self.allocate_table(before).await?;
            taken.push(run);
            if table() == before && have >= wanted() {
                return Ok((run, spare, runs));
            }
            have += run.count;
            spare.push(run);
        }
    }

    /// Makes the counts of what was taken durable, and keeps others from freeing.
    async fn settle_taken(self: &Rc<Self>) -> Result<MutexGuard<'_, ()>> {
        loop {
            Rc::clone(self).flush().await?;
            Rc::clone(self).reclaim().await;
            let frees = self.frees.lock().await;
            if self.state.borrow().is_quiet() {
                return Ok(frees);
            }
        }
    }

    /// Gives the space of clusters that became free for `cause` back to the storage, if that is
    /// wanted. The caller holds `growth`, and no lease covers them.
    pub(super) async fn punch_all(&self, runs: Vec<Run>, cause: Cause) {
        if !self.state.borrow().passes.has(cause) {
            return;
        }
        for run in runs {
            let bytes = run.count << self.geometry.cluster_bits;
            // Only an optimisation: without it the space is reused later.
            let _ = self.storage.discard(self.geometry.host(run.start), bytes).await;
        }
    }

    /// Takes `count` neighbouring clusters, however many. The caller holds `growth`.
    pub(super) async fn allocate_table(self: &Rc<Self>, count: u64) -> Result<Run> {
        let entries = self.geometry.block_entries();
        if count == 0 {
            return Ok(Run { start: HostCluster(0), count: 0 });
        }
        if count <= ALLOC_CLUSTERS_MAX.min(entries / 2) {
            return self.allocate(count).await;
        }
        let mut blocks = 1;
        while (blocks + count).div_ceil(entries) > blocks {
            blocks = (blocks + count).div_ceil(entries);
        }
        loop {
            let start = self.state.borrow().allocator.end.next_multiple_of(entries);
            let first = start / entries;
            let range = first..first + 2 * blocks + 2;
            let found = range.rev().find(|at| self.state.borrow().block(*at) != Ok(0));
            if let Some(block) = found {
                // Counts clusters behind the end. Stay behind it.
                self.state.borrow_mut().allocator.end = (block + 1) * entries;
                continue;
            }
            if first + blocks > self.state.borrow().reftable.count() {
                self.state.borrow_mut().allocator.end = start;
                self.grow_reftable().await?;
                continue;
            }
            return self.append_table(start, blocks, count).await;
        }
    }

    /// Makes `blocks` new refcount blocks at cluster `start`, which count themselves and the
    /// `count` clusters behind them.
    async fn append_table(self: &Rc<Self>, start: u64, blocks: u64, count: u64) -> Result<Run> {
        let geometry = self.geometry;
        let entries = geometry.block_entries();
        let first = start / entries;
        let end = start + blocks + count;
        for at in 0..blocks {
            let mut bytes = vec![0; usize::try_from(geometry.cluster()).unwrap_or(0)];
            let from = (first + at) * entries;
            for cluster in from.max(start)..end.min(from + entries) {
                counts::set(&mut bytes, geometry.refcount_order, cluster - from, 1);
            }
            self.write_bytes(geometry.host(HostCluster(start + at)), &bytes).await?;
        }
        let mut state = self.state.borrow_mut();
        for at in 0..blocks {
            state.set_block(first + at, geometry.host(HostCluster(start + at)));
            state.metadata.insert(start + at, Meta::RefBlock(first + at));
        }
        state.allocator.end = state.allocator.end.max(end);
        Ok(Run { start: HostCluster(start + blocks), count })
    }
}
