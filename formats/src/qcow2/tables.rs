//! New L2 tables and refcount blocks.
//!
//! Order: (1) take the cluster and count it in memory; (2) write its content to the file; (3) point
//! to it in memory. The flush writes the counts, then makes (2) durable, then the pointer. A
//! failure in (2) gives the cluster back: nothing pointed to it.

use std::rc::Rc;

use liveblk_engine::Result;

use super::counts;
use super::freed::Cause;
use super::image::Image;
use super::layout::{COPIED, HostCluster};
use super::state::{Meta, State, Table};

impl Image {
    /// Makes an L2 table for L1 entry `index`, or copies one that is shared. The caller holds
    /// `growth`.
    pub(super) async fn make_l2_table(self: &Rc<Self>, index: u64) -> Result<()> {
        let at = usize::try_from(index).unwrap_or(usize::MAX);
        let found = self.state.borrow().l2_table(at);
        let old = match self.judge(found)? {
            Table::Own(_) => return Ok(()),
            Table::Shared(host) => Some(host),
            Table::None => None,
        };
        if at >= self.state.borrow().l1.len() {
            return Ok(());
        }
        let run = self.allocate(1).await?;
        let host = self.geometry.host(run.start);
        if let Err(error) = self.write_l2_table(host, old).await {
            self.state.borrow_mut().give_back(run);
            return Err(error);
        }
        let mut state = self.state.borrow_mut();
        state.metadata.insert(run.start.0, Meta::L2(index));
        state.set_l1(index, host | COPIED);
        if let Some(old) = old {
            let old = self.geometry.host_cluster(old);
            state.metadata.remove(old.0);
            state.unlink(old, Cause::Other);
        }
        Ok(())
    }

    async fn write_l2_table(&self, host: u64, old: Option<u64>) -> Result<()> {
        let len = usize::try_from(self.geometry.cluster()).unwrap_or(0);
        let content = self.core.pool().zeroed(len);
        if let Some(old) = old {
            self.storage.read(old, content.clone()).await?;
        }
        self.storage.write(host, content, false).await?;
        Ok(())
    }

    /// Makes the refcount block `index` in cluster `at`, which it counts itself and which is the
    /// end of the file. The caller holds `growth`.
    pub(super) async fn make_block(self: &Rc<Self>, index: u64, at: HostCluster) -> Result<()> {
        let len = usize::try_from(self.geometry.cluster()).unwrap_or(0);
        let host = self.geometry.host(at);
        self.storage.write(host, self.core.pool().zeroed(len), false).await?;
        self.make_room(State::make_ref_room).await;
        let (slice, position) = self.state.borrow().ref_position(at);
        let bytes = usize::try_from(self.geometry.ref_slice_bytes()).unwrap_or(0);
        let mut state = self.state.borrow_mut();
        state.refs.insert(slice, vec![0; bytes].into_boxed_slice());
        if let Some(bytes) = state.refs.change(slice) {
            counts::set(bytes, self.geometry.refcount_order, position, 1);
        }
        state.metadata.insert(at.0, Meta::RefBlock(index));
        state.set_block(index, host);
        state.allocator.end = state.allocator.end.max(at.0 + 1);
        Ok(())
    }
}
