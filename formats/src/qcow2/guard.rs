//! Overlap checks: nothing is written into metadata but that metadata itself.
//!
//! Before guest data goes anywhere, its place is looked up in the map of metadata clusters
//! (`State::lookup`); before a write-out starts, every dirty piece is checked to go where its own
//! kind of metadata is ([`State::check_targets`]). What is guarded follows the option
//! `overlap-check`; the allocator always keeps away from all of it.
//!
//! An image whose tables lie behind the end of the file has lost its end. Reading them is an error
//! only as long as the file is that short: once it grew over their places they would read as
//! zeroes, which is "nothing is allocated", or "all is free". So such an image is not opened for
//! writing.

use super::check_lists::bitmap_directory;
use super::claims::Claims;
use super::header::Header;
use super::layout::{OFFSET_MASK, REFTABLE_MASK, SECTOR};
use super::open::tables_of;
use super::state::{Meta, State, Table};
use crate::limits::INACTIVE_CLUSTERS_MAX;
use crate::reason::Reason;

/// Adds the clusters of the bitmap directory to `metadata`; where two claim one cluster, the first
/// keeps it.
pub(super) fn claim_bitmaps(header: &Header, metadata: &mut Claims) {
    let Some((offset, bytes)) = bitmap_directory(header) else { return };
    let geometry = header.geometry;
    let first = geometry.host_cluster(offset).0;
    let clusters = geometry.clusters(bytes).min(INACTIVE_CLUSTERS_MAX);
    for cluster in first..first.saturating_add(clusters) {
        metadata.claim(cluster, Meta::Bitmaps);
    }
}

impl State {
    /// Fails if the refcount table, an L2 table or a refcount block lies behind the end of a file
    /// of `size` bytes.
    pub(super) fn check_whole(&self, size: u64) -> Result<(), Reason> {
        let geometry = self.geometry;
        let end = geometry.clusters(size);
        let lost =
            |entries: &[u64], mask| tables_of(entries, mask, geometry).any(|(_, at)| at >= end);
        let table = self.header.reftable_offset;
        let table_end = geometry.host_cluster(table).0 + u64::from(self.header.reftable_clusters);
        if table_end > end {
            return Err(Reason::Truncated("refcount table"));
        }
        if lost(self.reftable.used(), REFTABLE_MASK) {
            return Err(Reason::Truncated("refcount block"));
        }
        if lost(&self.l1, OFFSET_MASK) {
            return Err(Reason::Truncated("L2 table"));
        }
        Ok(())
    }

    /// Fails if a dirty piece of metadata would not go where its own kind of metadata is.
    pub(super) fn check_targets(&self) -> Result<(), Reason> {
        let geometry = self.geometry;
        let sectors = [
            (&self.l1_dirty, self.header.l1_offset, Meta::L1),
            (&self.reftable_dirty, self.header.reftable_offset, Meta::RefTable),
        ];
        for (dirty, start, meta) in sectors {
            for sector in dirty {
                let host = start + sector * SECTOR as u64;
                if !self.metadata.is(geometry.host_cluster(host).0, meta) {
                    return Err(Reason::Overlap(host));
                }
            }
        }
        for slice in self.refs.dirty_keys() {
            self.block(slice / geometry.block_slices())?;
        }
        for slice in self.l2.dirty_keys() {
            let index = geometry.l1_of_slice(slice);
            match self.l2_table(index)? {
                Table::None => return Err(Reason::BadEntry("L1", index as u64, 0)),
                // A snapshot refers to what was taken for the disk's own.
                Table::Own(host)
                    if self.inactive_l2.contains_key(&geometry.host_cluster(host).0) =>
                {
                    return Err(Reason::Overlap(host));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Remembers what the entries of a slice name as clusters with guest data.
    pub(super) fn note_mapped(&mut self, bytes: &[u8]) {
        if !self.writable || self.geometry.external {
            return;
        }
        for index in 0..usize::try_from(self.geometry.slice_entries()).unwrap_or(0) {
            if let Some(host) = self.decode(bytes, index).host() {
                self.mapped.insert(self.geometry.host_cluster(host));
            }
        }
    }
}
