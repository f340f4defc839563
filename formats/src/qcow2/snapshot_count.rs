//! What L1 and L2 tables refer to, counted into a switch of tables.
//!
//! A cluster's refcount is the number of ways from an L1 entry, of the active table or a
//! snapshot's, to it: a table in two L1 tables counts twice, and so does everything in it. Tables
//! are read one after the other. Untrusted: every offset is checked before it is counted.

use liveblk_engine::Result;

use super::entry::{Entry, RawEntry};
use super::image::Image;
use super::layout::{COMPRESSED, COPIED, ENTRY_BYTES, Geometry, HostCluster, OFFSET_MASK, Run};
use super::open::{read, read_words};
use super::snapshot_table::Snapshot;
use super::state::Meta;
use super::switch::Switch;
use crate::limits::L1_BYTES_MAX;
use crate::reason::Reason;

/// The clusters that an L2 entry refers to; `None` for one that cannot be.
pub(super) fn referenced(raw: RawEntry, geometry: Geometry, limit: u64) -> Option<Run> {
    let entry = Entry::decode(raw, geometry, limit);
    let none = Run { start: HostCluster(0), count: 0 };
    (entry != Entry::Damaged).then(|| entry.references(geometry).unwrap_or(none))
}

/// Clears the COPIED bits of a table's entries; whether there were any.
pub(super) fn clear_copied(table: &mut [u8], geometry: Geometry) -> bool {
    let mut changed = false;
    for index in 0..entries(geometry) {
        let raw = RawEntry::load(table, index, geometry);
        if raw.word & (COMPRESSED | COPIED) == COPIED {
            RawEntry { word: raw.word & !COPIED, ..raw }.store(table, index, geometry);
            changed = true;
        }
    }
    changed
}

/// Entries of an L2 table.
pub(super) fn entries(geometry: Geometry) -> usize {
    usize::try_from(geometry.l2_entries()).unwrap_or(0)
}

impl Image {
    /// The bytes of the L2 table at `host`.
    pub(super) async fn read_l2(&self, host: u64) -> Result<Vec<u8>> {
        if host >= self.storage.size() {
            return Err(self.error(Reason::Truncated("L2 table"), "read"));
        }
        read(&self.core, &self.storage, host, self.geometry.cluster()).await
    }

    /// The L1 table of a snapshot.
    pub(super) async fn snapshot_l1(&self, snapshot: &Snapshot) -> Result<Vec<u64>> {
        let bytes = u64::from(snapshot.l1_size) * ENTRY_BYTES;
        let refuse = |reason| Err(self.error(reason, "read"));
        if bytes > L1_BYTES_MAX {
            return refuse(Reason::TableLarge("Snapshot L1 table"));
        }
        let end = snapshot.l1_offset.checked_add(bytes);
        if !self.geometry.aligned(snapshot.l1_offset) || end.is_none() {
            return refuse(Reason::TableOffset("Snapshot L1 table"));
        }
        if bytes > 0 && end.is_some_and(|end| end > self.storage.size()) {
            return refuse(Reason::Truncated("snapshot's L1 table"));
        }
        let entries = u64::from(snapshot.l1_size);
        read_words(&self.core, &self.storage, snapshot.l1_offset, entries).await
    }

    /// Where entry `index` of a snapshot's L1 table leads.
    pub(super) fn snapshot_l2(&self, index: usize, raw: u64) -> Result<Option<u64>, Reason> {
        if raw == 0 {
            return Ok(None);
        }
        let host = raw & OFFSET_MASK;
        let state = self.state.borrow();
        let cluster = self.geometry.host_cluster(host).0;
        let own = state.metadata.is(cluster, Meta::L2(index as u64));
        let foreign = !own && state.metadata.contains(cluster);
        if raw & !(OFFSET_MASK | COPIED) != 0
            || host == 0
            || !self.geometry.aligned(host)
            || host >= state.host_limit()
            || foreign
        {
            return Err(Reason::BadEntry("Snapshot L1", index as u64, raw));
        }
        Ok(Some(host))
    }
}

impl Switch<'_> {
    /// Adds or takes one reference for everything that the entries of a table from `from` on
    /// refer to, but for what the entry at the same place of `other` refers to as well.
    pub(super) async fn change_entries(
        &mut self,
        table: &[u8],
        other: &[u8],
        from: usize,
        up: bool,
    ) -> Result<()> {
        let geometry = self.image.geometry;
        if geometry.external {
            // What lies in another file is not counted.
            return Ok(());
        }
        let limit = self.image.state.borrow().host_limit();
        for index in from..entries(geometry) {
            let raw = RawEntry::load(table, index, geometry);
            if raw.word == 0 {
                continue;
            }
            let found = referenced(raw, geometry, limit);
            let bad = Reason::BadEntry("L2", index as u64, raw.word);
            let clusters = self.image.judge(found.ok_or(bad))?;
            let same = referenced(RawEntry::load(other, index, geometry), geometry, limit);
            if same.as_ref() == Some(&clusters) {
                continue;
            }
            for cluster in clusters.clusters() {
                let host = geometry.host(cluster);
                if self.image.state.borrow().is_metadata(host) {
                    return self.image.judge(Err(Reason::Overlap(host)));
                }
                self.change(cluster, up).await?;
            }
        }
        Ok(())
    }

    /// Makes the COPIED bits of a table's entries what the counts will say; whether any changed.
    pub(super) async fn renew_copied(&self, table: &mut [u8]) -> Result<bool> {
        let geometry = self.image.geometry;
        let limit = self.image.state.borrow().host_limit();
        let mut changed = false;
        for index in 0..entries(geometry) {
            let raw = RawEntry::load(table, index, geometry);
            let Some(host) = Entry::decode(raw, geometry, limit).host() else { continue };
            let once = self.count(geometry.host_cluster(host)).await? == 1;
            if once != (raw.word & COPIED != 0) {
                RawEntry { word: raw.word ^ COPIED, ..raw }.store(table, index, geometry);
                changed = true;
            }
        }
        Ok(changed)
    }

    /// Writes `table` into one of the clusters that were taken; its offset.
    pub(super) async fn put_table(&mut self, table: &[u8]) -> Result<u64> {
        let host = self.image.geometry.host(self.take()?);
        self.image.write_bytes(host, table).await?;
        Ok(host)
    }
}
