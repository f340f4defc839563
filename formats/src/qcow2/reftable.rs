//! Moving the refcount table to a larger place.
//!
//! The new table and the blocks that count it (and themselves) are put behind everything else, into
//! clusters that no block counts yet. Order: (1) all dirty metadata is written out; (2) blocks and
//! table are written; (3) barrier; (4) the header points to the new table, durable; (5) the old
//! table's clusters are freed. Until (4) the file means what it meant before.

use std::rc::Rc;

use liveblk_engine::Result;

use super::counts;
use super::freed::Cause;
use super::image::Image;
use super::layout::{ENTRY_BYTES, Geometry, HostCluster, Run};
use super::state::{Meta, set_word};
use super::words::Words;
use crate::limits::{REFCOUNT_TABLE_BYTES_MAX, TABLE_PIECE};
use crate::reason::Reason;

/// Where the new blocks and the new table go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Move {
    /// First cluster of the blocks; the table follows them.
    start: u64,
    /// Index of the first new block.
    first_block: u64,
    blocks: u64,
    table_clusters: u64,
}

impl Move {
    fn plan(geometry: Geometry, start: u64, old_entries: u64) -> Self {
        let per_block = geometry.block_entries();
        let first_block = start / per_block;
        let mut blocks = 1;
        loop {
            let wanted =
                (old_entries + old_entries / 2).min(REFCOUNT_TABLE_BYTES_MAX / ENTRY_BYTES);
            let entries = wanted.max(first_block + blocks);
            let table_clusters = geometry.clusters(entries * ENTRY_BYTES);
            let end = start + blocks + table_clusters;
            let needed = end.div_ceil(per_block) - first_block;
            if needed <= blocks {
                return Self { start, first_block, blocks, table_clusters };
            }
            blocks = needed;
        }
    }

    fn table(&self) -> HostCluster {
        HostCluster(self.start + self.blocks)
    }

    fn end(&self) -> u64 {
        self.start + self.blocks + self.table_clusters
    }

    /// The content of the new block number `at`: one reference to each cluster of this move.
    fn block(&self, geometry: Geometry, at: u64) -> Vec<u8> {
        let per_block = geometry.block_entries();
        let first = (self.first_block + at) * per_block;
        let mut bytes = vec![0; usize::try_from(geometry.cluster()).unwrap_or(0)];
        for cluster in self.start.max(first)..self.end().min(first + per_block) {
            counts::set(&mut bytes, geometry.refcount_order, cluster - first, 1);
        }
        bytes
    }
}

impl Image {
    /// Makes the refcount table cover more clusters. The caller holds `growth`.
    pub(super) async fn grow_reftable(self: &Rc<Self>) -> Result<()> {
        let geometry = self.geometry;
        let _tables = self.tables.lock().await;
        self.write_out().await?;
        let plan = {
            let state = self.state.borrow();
            Move::plan(geometry, state.allocator.end, state.reftable.count())
        };
        // A sparse file can be so large that nothing could hold its refcounts.
        if plan.table_clusters << geometry.cluster_bits > REFCOUNT_TABLE_BYTES_MAX {
            return Err(self.error(Reason::TableFull, "allocate"));
        }
        let (old, table) = {
            let state = self.state.borrow();
            let mut table = state.reftable.to_vec();
            let entries = (plan.table_clusters << geometry.cluster_bits) / ENTRY_BYTES;
            table.resize(usize::try_from(entries).unwrap_or(0), 0);
            for at in 0..plan.blocks {
                let index = usize::try_from(plan.first_block + at).unwrap_or(usize::MAX);
                if let Some(entry) = table.get_mut(index) {
                    *entry = geometry.host(HostCluster(plan.start + at));
                }
            }
            let start = geometry.host_cluster(state.header.reftable_offset);
            let old = Run { start, count: u64::from(state.header.reftable_clusters) };
            (old, table)
        };
        for at in 0..plan.blocks {
            let host = geometry.host(HostCluster(plan.start + at));
            self.write_bytes(host, &plan.block(geometry, at)).await?;
        }
        self.write_table(geometry.host(plan.table()), &table).await?;
        self.barrier().await?;
        self.update_header(|header| {
            header.reftable_offset = geometry.host(plan.table());
            header.reftable_clusters = u32::try_from(plan.table_clusters).unwrap_or(0);
        })
        .await?;
        let mut state = self.state.borrow_mut();
        state.reftable = Words::new(table);
        state.reftable_dirty.clear();
        state.allocator.end = state.allocator.end.max(plan.end());
        for cluster in old.clusters() {
            state.metadata.remove(cluster.0);
        }
        for at in 0..plan.table_clusters {
            state.metadata.insert(plan.table().0 + at, Meta::RefTable);
        }
        for at in 0..plan.blocks {
            state.metadata.insert(plan.start + at, Meta::RefBlock(plan.first_block + at));
        }
        let old = state.freed(old, Cause::Other);
        state.quarantine.push_back((self.epochs.retire(), vec![old]));
        Ok(())
    }

    /// Writes a table of words to `host`.
    pub(super) async fn write_table(&self, host: u64, table: &[u64]) -> Result<()> {
        let mut at = host;
        for words in table.chunks(TABLE_PIECE / 8) {
            let mut bytes = vec![0; words.len() * 8];
            for (index, word) in words.iter().enumerate() {
                set_word(&mut bytes, index, *word);
            }
            self.write_bytes(at, &bytes).await?;
            at += bytes.len() as u64;
        }
        Ok(())
    }

    /// Writes bytes to `host`.
    pub(super) async fn write_bytes(&self, host: u64, bytes: &[u8]) -> Result<()> {
        let buf = self.core.pool().alloc(bytes.len());
        buf.copy_from(0, bytes);
        self.storage.write(host, buf, false).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_counts_itself_completely() {
        for (cluster_bits, refcount_order) in [(9, 6), (9, 0), (12, 3), (16, 4), (21, 4)] {
            let geometry = Geometry {
                version: 3,
                cluster_bits,
                refcount_order,
                extended: false,
                external: false,
                slice_bits: 0,
            };
            for old in [1, 64, 4096] {
                let start = old * geometry.block_entries() + 3;
                let plan = Move::plan(geometry, start, old);
                let counted: u64 = (0..plan.blocks)
                    .map(|at| {
                        let block = plan.block(geometry, at);
                        (0..geometry.block_entries())
                            .filter(|index| counts::get(&block, refcount_order, *index) == 1)
                            .count() as u64
                    })
                    .sum();
                assert_eq!(counted, plan.blocks + plan.table_clusters);
                let entries = (plan.table_clusters << cluster_bits) / ENTRY_BYTES;
                assert!(entries >= plan.first_block + plan.blocks && entries > old);
            }
        }
    }
}
