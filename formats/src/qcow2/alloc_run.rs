//! Many neighbouring clusters at once, however many refcount blocks count them.
//!
//! Short runs come from the ordinary search. A run that blocks would interrupt is put at the end
//! of the file: first every block that will count it is made, each in a cluster before the run,
//! then the run is counted in memory. Order rules as in `alloc` and `tables`; what an error leaves
//! behind are empty refcount blocks.

use std::rc::Rc;

use liveblk_engine::Result;

use super::image::Image;
use super::layout::{HostCluster, OFFSET_MASK, Run};
use super::state::Meta;
use crate::limits::ALLOC_CLUSTERS_MAX;
use crate::reason::Reason;

impl Image {
    /// Takes `count` neighbouring clusters and counts them. The caller holds `growth`.
    pub(super) async fn allocate_run(self: &Rc<Self>, count: u64) -> Result<Run> {
        if count <= ALLOC_CLUSTERS_MAX.min(self.geometry.block_entries() / 2) {
            return self.allocate(count).await;
        }
        loop {
            let start = HostCluster(self.state.borrow().allocator.end);
            if start.0 + count >= self.geometry.host_cluster(OFFSET_MASK).0 {
                return Err(self.error(Reason::TableFull, "allocate"));
            }
            let run = Run { start, count };
            if self.has_blocks_for(run).await? && self.take_run(run).await? {
                return Ok(run);
            }
        }
    }

    /// Whether every block exists that counts `run`; makes the first one that is missing.
    async fn has_blocks_for(self: &Rc<Self>, run: Run) -> Result<bool> {
        let entries = self.geometry.block_entries();
        let last = (run.start.0 + run.count - 1) / entries;
        if last >= self.state.borrow().reftable.count() {
            self.grow_reftable().await?;
            return Ok(false);
        }
        for index in run.start.0 / entries..=last {
            let host = self.state.borrow().block(index);
            if self.judge(host)? != 0 {
                continue;
            }
            if index == run.start.0 / entries {
                self.make_block(index, run.start).await?;
            } else {
                let at = self.allocate(1).await?;
                if let Err(error) = self.make_distant_block(index, at.start).await {
                    self.state.borrow_mut().give_back(at);
                    return Err(error);
                }
            }
            return Ok(false);
        }
        Ok(true)
    }

    /// Makes the refcount block `index` in a cluster that another block counts.
    async fn make_distant_block(&self, index: u64, at: HostCluster) -> Result<()> {
        let len = usize::try_from(self.geometry.cluster()).unwrap_or(0);
        let host = self.geometry.host(at);
        self.storage.write(host, self.core.pool().zeroed(len), false).await?;
        let mut state = self.state.borrow_mut();
        state.metadata.insert(at.0, Meta::RefBlock(index));
        state.set_block(index, host);
        Ok(())
    }

    /// Counts the clusters of a run at the end of the file; false if something is there already.
    async fn take_run(self: &Rc<Self>, run: Run) -> Result<bool> {
        if self.state.borrow().allocator.end != run.start.0 {
            return Ok(false);
        }
        self.state.borrow_mut().allocator.end = run.start.0 + run.count;
        for (taken, cluster) in (0_u64..).zip(run.clusters()) {
            let (slice, _) = self.state.borrow().ref_position(cluster);
            let loaded = self.load_ref_slice(slice).await;
            let mut state = self.state.borrow_mut();
            if loaded.is_ok() && state.refcount(cluster) == Some(0) {
                state.set_refcount(cluster, 1);
                continue;
            }
            state.give_back(Run { start: run.start, count: taken });
            drop(state);
            return loaded.map(|()| false);
        }
        Ok(true)
    }
}
