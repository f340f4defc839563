//! Whether an image's mapping was made ahead of its data (preallocation=metadata).
//!
//! Then most of what is mapped are holes of the file, and a block status asks the file too. As the
//! peer decides it: clearly more clusters are counted than the file takes on its device. Looked at
//! once, read-only, bounded by [`MAPPED_AHEAD_SCAN`]; nothing depends on the answer but speed and
//! what maps show.

use liveblk_engine::Result;
use liveblk_engine::storage::Storage;

use super::counts;
use super::image::Image;
use super::layout::REFTABLE_MASK;
use super::open::read;
use crate::limits::MAPPED_AHEAD_SCAN;

impl Image {
    /// See the module header; the answer is kept.
    pub(super) async fn is_mapped_ahead(&self) -> Result<bool> {
        if let Some(known) = self.mapped_ahead.get() {
            return Ok(known);
        }
        let answer = self.counts_more_than_is_there().await?;
        self.mapped_ahead.set(Some(answer));
        Ok(answer)
    }

    async fn counts_more_than_is_there(&self) -> Result<bool> {
        let Storage::File(file) = &self.storage else { return Ok(false) };
        if self.geometry.external {
            return Ok(false);
        }
        let geometry = self.geometry;
        let there = file.allocated_at_open() >> geometry.cluster_bits;
        let enough = (there * 10 / 9).max(there + 2);
        let end = geometry.clusters(self.storage.size());
        let blocks = self.state.borrow().reftable.used().to_vec();
        let (mut counted, mut scanned) = (0, 0);
        for (index, raw) in (0_u64..).zip(blocks).filter(|(_, raw)| *raw != 0) {
            let host = raw & REFTABLE_MASK;
            let first = index * geometry.block_entries();
            if first >= end || scanned >= MAPPED_AHEAD_SCAN {
                break;
            }
            if !geometry.aligned(host) || host >= self.storage.size() {
                continue;
            }
            let bytes = read(&self.core, &self.storage, host, geometry.cluster()).await?;
            scanned += geometry.cluster();
            for entry in 0..geometry.block_entries().min(end - first) {
                let used = counts::get(&bytes, geometry.refcount_order, entry) != 0;
                counted += u64::from(used);
            }
            if counted >= enough {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
