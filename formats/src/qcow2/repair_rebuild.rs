//! New refcounts (and, if it is damaged, a new snapshot table) behind everything else.
//!
//! Layout: snapshot table, refcount table, blocks. All of it is written and durable before one
//! sector of the header names it; until then the file means what it meant before. The new blocks
//! count every reference, themselves included, and nothing of the old ones, whose clusters are free
//! from that moment on. Entries may refer to clusters not far behind the end of the file: the new
//! structures keep away from those, and count the ones that the file then has (they read as
//! zeroes).
//!
//! A device does not grow: there "everything else" ends behind the last cluster that something
//! refers to, or that the old refcounts call used. Where tables could not be followed, nobody knows
//! where that is; then, and where the room is too small, the repair is refused before anything is
//! written.

use std::collections::BTreeSet;

use liveblk_engine::Result;

use super::check_counts::Counts;
use super::check_survey::Survey;
use super::counts;
use super::layout::{ENTRY_BYTES, Geometry};
use super::repair::{patch_header, write};
use crate::limits::{REBUILD_BLOCKS_SPARSE, REFCOUNT_TABLE_BYTES_MAX};
use crate::reason::Reason;

/// Where the new structures go, in clusters.
struct Region {
    start: u64,
    snapshots: u64,
    table: u64,
    /// The indices of the blocks, in the order in which they are stored.
    blocks: Vec<u64>,
}

impl Region {
    /// The smallest region at `start` whose blocks count the clusters of the blocks `used`, and the
    /// region itself.
    fn plan(geometry: Geometry, start: u64, snapshots: u64, used: &BTreeSet<u64>) -> Self {
        let (mut table, mut blocks) = (1, used.clone());
        loop {
            let end = start + snapshots + table + blocks.len() as u64;
            let mut all = used.clone();
            all.extend(start / geometry.block_entries()..=(end - 1) / geometry.block_entries());
            let entries = all.last().copied().unwrap_or(0) + 1;
            let needed = geometry.clusters(entries * ENTRY_BYTES);
            if needed == table && all.len() == blocks.len() {
                return Self { start, snapshots, table, blocks: all.into_iter().collect() };
            }
            (table, blocks) = (needed, all);
        }
    }

    fn table_at(&self) -> u64 {
        self.start + self.snapshots
    }

    fn block_at(&self, position: usize) -> u64 {
        self.table_at() + self.table + position as u64
    }

    fn end(&self) -> u64 {
        self.block_at(self.blocks.len())
    }
}

impl Survey<'_> {
    /// See the module.
    pub(super) async fn rebuild_refcounts(&mut self) -> Result<()> {
        let geometry = self.header.geometry;
        let (count, snapshots) = if self.snapshots_damaged {
            self.mended_snapshots().await?
        } else {
            (self.header.nb_snapshots, Vec::new())
        };
        self.forget_old_structures();
        let region = self.plan_region(geometry.clusters(snapshots.len() as u64))?;
        let host = |cluster: u64| cluster << geometry.cluster_bits;
        write(self.core, self.storage, host(region.start), &snapshots).await?;
        let words = host(region.table) / ENTRY_BYTES;
        let mut table = vec![0_u8; usize::try_from(words * ENTRY_BYTES).unwrap_or(0)];
        for (position, index) in region.blocks.iter().enumerate() {
            let at = region.block_at(position);
            let entry = usize::try_from(*index).unwrap_or(usize::MAX);
            super::state::set_word(&mut table, entry, host(at));
            let block = self.block_content(*index);
            write(self.core, self.storage, host(at), &block).await?;
        }
        write(self.core, self.storage, host(region.table_at()), &table).await?;
        self.storage.flush().await?;
        let clusters = u32::try_from(region.table).unwrap_or(u32::MAX).to_be_bytes();
        let table = host(region.table_at()).to_be_bytes();
        let (count, place) = (count.to_be_bytes(), host(region.start).to_be_bytes());
        let mut fields: Vec<(usize, &[u8])> = vec![(48, &table), (56, &clusters)];
        if self.snapshots_damaged {
            fields.extend([(60, &count[..]), (64, &place[..])]);
        }
        patch_header(self.core, self.storage, &fields).await
    }

    fn plan_region(&mut self, snapshots: u64) -> Result<Region> {
        let geometry = self.header.geometry;
        let mut used = BTreeSet::new();
        let mut clusters = 0_u64;
        let kept = if self.incomplete { Some(&self.stored) } else { None };
        for counts in [Some(&self.references), kept].into_iter().flatten() {
            for chunk in 0..counts.chunk_count() {
                for cluster in counts.used(chunk) {
                    used.insert(cluster / geometry.block_entries());
                    clusters += 1;
                }
            }
        }
        let refuse = |reason: Reason| Err(reason.error("repair").on(self.storage.name()));
        if used.len() as u64 > REBUILD_BLOCKS_SPARSE + clusters / 16 {
            return refuse(Reason::Scattered);
        }
        let mut start = self.first_free()?;
        let region = loop {
            let between = self.beyond.range(..start).map(|(cluster, _)| cluster);
            used.extend(between.map(|cluster| cluster / geometry.block_entries()));
            let region = Region::plan(geometry, start, snapshots, &used);
            match self.beyond.range(start..region.end()).next_back() {
                Some((cluster, _)) => start = cluster + 1,
                None => break region,
            }
        };
        if region.table << geometry.cluster_bits > REFCOUNT_TABLE_BYTES_MAX {
            return refuse(Reason::TableFull);
        }
        self.check_room(&region)?;
        self.references.raise_limit(region.end());
        for (cluster, times) in self.beyond.range(..region.start) {
            self.references.add(*cluster, *times);
        }
        (region.start..region.end()).for_each(|cluster| self.references.set(cluster, 1));
        Ok(region)
    }

    /// The first cluster behind everything.
    fn first_free(&self) -> Result<u64> {
        let geometry = self.header.geometry;
        if self.storage.can_grow() {
            return Ok(geometry.clusters(self.storage.size()).max(self.references.limit()));
        }
        if self.incomplete {
            let reason = Reason::RebuildRoom(geometry.cluster(), 0);
            return Err(reason.error("repair").on(self.storage.name()));
        }
        let highest = [&self.references, &self.stored].map(Counts::highest);
        Ok(highest.into_iter().flatten().max().map_or(1, |last| last + 1))
    }

    /// Whether a device has room for the new structures.
    fn check_room(&self, region: &Region) -> Result<()> {
        let bits = self.header.geometry.cluster_bits;
        if self.storage.can_grow() || region.end() << bits <= self.storage.size() {
            return Ok(());
        }
        let needed = (region.end() - region.start) << bits;
        let there = self.storage.size().saturating_sub(region.start << bits);
        Err(Reason::RebuildRoom(needed, there).error("repair").on(self.storage.name()))
    }

    /// Takes the references of what the header will no longer name out of the counts.
    fn forget_old_structures(&mut self) {
        let geometry = self.header.geometry;
        let table = u64::from(self.header.reftable_clusters) << geometry.cluster_bits;
        self.forget(self.header.reftable_offset, table);
        for (_, host) in std::mem::take(&mut self.blocks) {
            self.forget(host, geometry.cluster());
        }
        if self.snapshots_damaged {
            self.forget(self.header.snapshots_offset, self.snapshot_bytes);
        }
    }

    fn forget(&mut self, offset: u64, bytes: u64) {
        let geometry = self.header.geometry;
        if bytes == 0 || !self.is_inside(offset, bytes) {
            return;
        }
        for cluster in geometry.host_cluster(offset).0..=geometry.host_cluster(offset + bytes - 1).0
        {
            let count = self.references.at(cluster);
            self.references.set(cluster, count.saturating_sub(1));
        }
    }

    fn block_content(&self, index: u64) -> Vec<u8> {
        let geometry = self.header.geometry;
        let mut bytes = vec![0; usize::try_from(geometry.cluster()).unwrap_or(0)];
        for entry in 0..geometry.block_entries() {
            let cluster = index * geometry.block_entries() + entry;
            let count = self.final_count(cluster);
            if count != 0 {
                counts::set(&mut bytes, geometry.refcount_order, entry, count);
            }
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_has_a_block_for_each_of_its_clusters_and_no_more() {
        for (cluster_bits, refcount_order) in [(9, 6), (9, 0), (12, 3), (16, 4), (21, 6)] {
            let (version, extended, external) = (3, false, false);
            let slice_bits = 0;
            let geometry =
                Geometry { version, cluster_bits, refcount_order, extended, external, slice_bits };
            for (start, snapshots) in [(1, 0), (500, 3), (70_001, 1), (9_999_999, 40)] {
                let used: BTreeSet<u64> = (0..start).step_by(777).collect::<BTreeSet<_>>();
                let used = used.iter().map(|at| at / geometry.block_entries()).collect();
                let region = Region::plan(geometry, start, snapshots, &used);
                let mut needed: BTreeSet<u64> =
                    (start..region.end()).map(|at| at / geometry.block_entries()).collect();
                needed.extend(&used);
                assert_eq!(region.blocks, needed.into_iter().collect::<Vec<_>>());
                let last = region.blocks.last().copied().unwrap_or(0);
                assert_eq!(region.table, geometry.clusters((last + 1) * ENTRY_BYTES));
            }
        }
    }
}
