//! One look at everything of a closed image that refers to clusters or counts them.
//!
//! Owns the reference counts, the stored refcounts and the list of L2 tables. Promises: each table
//! is read once, however many entries lead to it; memory follows the metadata that is really there
//! (`check_counts`); the number of entries looked at is bounded. Reads only.

use std::collections::{BTreeMap, BTreeSet};

use liveblk_engine::executor::Core;
use liveblk_engine::storage::Storage;
use liveblk_engine::{Error, ErrorKind, Result};

use super::check::CheckReport;
use super::check_counts::Counts;
use super::counts;
use super::header::Header;
use super::layout::{COPIED, ENTRY_BYTES, L1_RESERVED, OFFSET_MASK, REFTABLE_MASK};
use super::open::{read, read_words};
use crate::limits::{
    BEYOND_CLUSTERS_MAX, CHECK_BYTES_MAX, CHECK_CLUSTERS_MAX, CHECK_ENTRIES_MAX, TABLE_PIECE,
};

/// How often an L2 table is referred to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Uses {
    /// By the active L1 table.
    pub(super) active: u64,
    /// By all L1 tables.
    pub(super) total: u64,
}

/// See the module.
pub(super) struct Survey<'a> {
    pub(super) core: &'a Core,
    pub(super) storage: &'a Storage,
    pub(super) header: &'a Header,
    /// Entries that a repair resets count as reset.
    pub(super) resets: bool,
    /// References by cluster, as they are (not cut to the width of a refcount).
    pub(super) references: Counts,
    /// References as metadata that stays where it is: header, L1 tables, snapshot table, bitmaps.
    pub(super) fixed: Counts,
    /// References to clusters not far behind the end of the file.
    pub(super) beyond: BTreeMap<u64, u64>,
    /// Refcounts as stored.
    pub(super) stored: Counts,
    /// Refcount blocks that can be used: index and host offset.
    pub(super) blocks: Vec<(u64, u64)>,
    /// L2 tables by host offset.
    pub(super) tables: BTreeMap<u64, Uses>,
    pub(super) report: CheckReport,
    /// Wrong COPIED bits; they are corruptions too, but repaired apart from the others.
    pub(super) copied_errors: u64,
    /// The refcount table or its blocks are damaged or missing.
    pub(super) rebuild: bool,
    /// The snapshot table has to be written anew.
    pub(super) snapshots_damaged: bool,
    /// A part of the tables could not be followed, so references may be missing.
    pub(super) incomplete: bool,
    /// A table of the disk or of a snapshot lies behind the end of the file.
    pub(super) behind: bool,
    /// Bytes of the snapshot table.
    pub(super) snapshot_bytes: u64,
    entries_left: u64,
}

impl<'a> Survey<'a> {
    /// A survey of the image behind `header`. With `resets`, entries that a repair resets count as
    /// if they were reset already.
    pub(super) fn new(
        core: &'a Core,
        storage: &'a Storage,
        header: &'a Header,
        resets: bool,
    ) -> Result<Self> {
        // The last cluster may be one that the file does not hold completely.
        let clusters = header.geometry.clusters(storage.size()) + 1;
        if clusters > CHECK_CLUSTERS_MAX {
            return Err(too_large());
        }
        let report = CheckReport {
            total_clusters: header.geometry.clusters(header.size),
            ..CheckReport::default()
        };
        Ok(Self {
            core,
            storage,
            header,
            resets,
            references: Counts::new(clusters),
            fixed: Counts::new(clusters),
            beyond: BTreeMap::new(),
            stored: Counts::new(clusters),
            blocks: Vec::new(),
            tables: BTreeMap::new(),
            report,
            copied_errors: 0,
            rebuild: header.reftable_clusters == 0,
            snapshots_damaged: false,
            incomplete: false,
            behind: false,
            snapshot_bytes: 0,
            entries_left: CHECK_ENTRIES_MAX,
        })
    }

    /// Looks at everything.
    pub(super) async fn run(&mut self) -> Result<()> {
        let header = self.header;
        let geometry = header.geometry;
        self.read_refcounts().await?;
        let table = u64::from(header.reftable_clusters) << geometry.cluster_bits;
        self.claim("refcount table", header.reftable_offset, table, 1);
        // If it lies behind the end, it moves, and its place is nobody's.
        self.beyond.clear();
        self.claim_fixed("header", 0, geometry.cluster(), 1);
        self.read_l1(header.l1_offset, header.l1_size.into(), 1, true).await?;
        self.read_snapshots().await?;
        self.walk_tables().await?;
        self.claim_encryption();
        self.read_bitmaps().await?;
        self.claim_blocks();
        Ok(())
    }

    /// Counts `times` references to each cluster of a range.
    pub(super) fn claim(&mut self, what: &str, offset: u64, bytes: u64, times: u64) {
        if bytes == 0 || times == 0 {
            return;
        }
        let geometry = self.header.geometry;
        let end = offset.saturating_add(bytes);
        if !self.is_inside(offset, bytes) {
            self.claim_beyond(what, offset, bytes, times);
            return;
        }
        let most = self.refcount_max();
        for cluster in geometry.host_cluster(offset).0..=geometry.host_cluster(end - 1).0 {
            let count = self.references.add(cluster, times);
            if count > most {
                let excess = (count - most).min(times);
                self.report.corruption(excess, || {
                    format!(
                        "ERROR: overflow cluster offset={:#x}",
                        cluster << geometry.cluster_bits
                    )
                });
            }
        }
    }

    /// Notes references to what the file does not have.
    fn claim_beyond(&mut self, what: &str, offset: u64, bytes: u64, times: u64) {
        self.report.corruption(times, || {
            format!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster \
                 or more: offset {offset:#x} size {bytes:#x} ({what})"
            )
        });
        let geometry = self.header.geometry;
        let near = geometry.clusters(self.storage.size()) + BEYOND_CLUSTERS_MAX;
        let last = geometry.host_cluster(offset.saturating_add(bytes - 1)).0.min(near);
        for cluster in geometry.host_cluster(offset).0..=last {
            *self.beyond.entry(cluster).or_default() += times;
        }
    }

    /// As [`Self::claim`], for metadata that a repair does not move.
    pub(super) fn claim_fixed(&mut self, what: &str, offset: u64, bytes: u64, times: u64) {
        self.claim(what, offset, bytes, times);
        if bytes > 0 && self.is_inside(offset, bytes) {
            let geometry = self.header.geometry;
            let last = geometry.host_cluster(offset + bytes - 1).0;
            for cluster in geometry.host_cluster(offset).0..=last {
                self.fixed.add(cluster, times);
            }
        }
    }

    /// The largest refcount that the image can store.
    pub(super) fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.header.geometry.refcount_bits())
    }

    /// Whether a table of `bytes` at `offset` lies inside the file (its last cluster may not).
    pub(super) fn is_inside(&self, offset: u64, bytes: u64) -> bool {
        let end = offset.saturating_add(bytes);
        end.saturating_sub(self.storage.size()) < self.header.geometry.cluster()
    }

    /// Takes `entries` out of the number of entries that one check looks at.
    pub(super) fn spend(&mut self, entries: u64) -> Result<()> {
        self.entries_left = self.entries_left.checked_sub(entries).ok_or_else(too_large)?;
        if self.references.array_bytes() + self.stored.array_bytes() > CHECK_BYTES_MAX {
            return Err(too_large());
        }
        Ok(())
    }

    /// The refcounts as stored, and which blocks can be used.
    async fn read_refcounts(&mut self) -> Result<()> {
        let geometry = self.header.geometry;
        let bytes = u64::from(self.header.reftable_clusters) << geometry.cluster_bits;
        if !self.is_inside(self.header.reftable_offset, bytes) {
            self.rebuild = true;
        }
        let mut seen = BTreeSet::new();
        let mut index = 0;
        while index < bytes / ENTRY_BYTES {
            let at = self.header.reftable_offset + index * ENTRY_BYTES;
            let words = (bytes / ENTRY_BYTES - index).min(TABLE_PIECE as u64 / ENTRY_BYTES);
            if at >= self.storage.size() {
                return Ok(());
            }
            for raw in read_words(self.core, self.storage, at, words).await? {
                if raw != 0 && self.is_block(index, raw) {
                    if seen.insert(raw) {
                        self.read_block(index, raw).await?;
                    }
                    self.blocks.push((index, raw));
                }
                index += 1;
            }
        }
        Ok(())
    }

    /// Whether entry `index` of the refcount table can be followed.
    fn is_block(&mut self, index: u64, raw: u64) -> bool {
        let geometry = self.header.geometry;
        let problem = if raw & !REFTABLE_MASK != 0 {
            format!("ERROR refcount table entry {index} has reserved bits set")
        } else if !geometry.aligned(raw) {
            format!(
                "ERROR refcount block {index} is not cluster aligned; refcount table entry \
                 corrupted"
            )
        } else if raw >= self.storage.size() {
            format!("ERROR refcount block {index} is outside image")
        } else {
            return true;
        };
        self.rebuild = true;
        self.report.corruption(1, || problem);
        false
    }

    async fn read_block(&mut self, index: u64, host: u64) -> Result<()> {
        let geometry = self.header.geometry;
        let first = index.saturating_mul(geometry.block_entries());
        if first >= self.stored.limit() {
            return Ok(());
        }
        let bytes = read(self.core, self.storage, host, geometry.cluster()).await?;
        for entry in 0..geometry.block_entries() {
            let count = counts::get(&bytes, geometry.refcount_order, entry);
            if count != 0 {
                self.stored.set(first + entry, count);
            }
        }
        self.spend(0)
    }

    fn claim_blocks(&mut self) {
        let geometry = self.header.geometry;
        let table = geometry.host_cluster(self.header.reftable_offset).0;
        for cluster in table..table + u64::from(self.header.reftable_clusters) {
            // Something else is in the same place: the table has to move.
            self.rebuild |= self.references.at(cluster) > 1;
        }
        for at in 0..self.blocks.len() {
            let Some((index, host)) = self.blocks.get(at).copied() else { break };
            let count = self.references.add(geometry.host_cluster(host).0, 1);
            if count != 1 {
                self.rebuild = true;
                self.report
                    .corruption(1, || format!("ERROR refcount block {index} refcount={count}"));
            }
        }
    }

    /// Follows an L1 table that is referred to `times` times.
    pub(super) async fn read_l1(
        &mut self,
        offset: u64,
        entries: u64,
        times: u64,
        active: bool,
    ) -> Result<()> {
        self.claim_fixed("L1 table", offset, entries * ENTRY_BYTES, times);
        if !self.is_inside(offset, entries * ENTRY_BYTES) {
            self.incomplete = true;
            self.behind = true;
            return Ok(());
        }
        self.spend(entries)?;
        let mut index = 0;
        while index < entries {
            let words = (entries - index).min(TABLE_PIECE as u64 / ENTRY_BYTES);
            let at = offset + index * ENTRY_BYTES;
            for raw in read_words(self.core, self.storage, at, words).await? {
                if raw != 0 {
                    self.l1_entry(index, raw, times, active);
                }
                index += 1;
            }
        }
        Ok(())
    }

    fn l1_entry(&mut self, index: u64, raw: u64, times: u64, active: bool) {
        let geometry = self.header.geometry;
        let host = raw & OFFSET_MASK;
        if raw & L1_RESERVED != 0 {
            self.report.corruption(times, || {
                format!("ERROR found L1 entry with reserved bits set: {raw:x}")
            });
        }
        if host == 0 {
            // No table can be there: what a repair makes of it is "no table".
            self.report.corruption(times, || {
                format!("ERROR l1_index={index} l1_entry={raw:x}: L1 entry without an offset")
            });
            return;
        }
        if !geometry.aligned(host) {
            self.incomplete = true;
            self.report.corruption(times, || {
                format!(
                    "ERROR l2_offset={host:x}: Table is not cluster aligned; L1 entry corrupted"
                )
            });
            return;
        }
        self.claim("L2 table", host, geometry.cluster(), times);
        if active {
            let count = self.stored.at(geometry.host_cluster(host).0);
            if (count == 1) != (raw & COPIED != 0) {
                self.copied_error(1, || {
                    format!(
                        "ERROR OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={raw:x} \
                         refcount={count}"
                    )
                });
            }
        }
        if host >= self.storage.size() {
            self.incomplete = true;
            self.behind = true;
            return;
        }
        let uses = self.tables.entry(host).or_default();
        uses.total += times;
        uses.active += if active { times } else { 0 };
    }

    pub(super) fn copied_error(&mut self, times: u64, text: impl FnOnce() -> String) {
        self.copied_errors += times;
        self.report.corruption(times, text);
    }

    /// Compares references with refcounts and finds the end of what is used.
    pub(super) fn compare(&mut self) {
        let most = self.refcount_max();
        let chunks = self.references.chunk_count().max(self.stored.chunk_count());
        for chunk in 0..chunks {
            let mut clusters: Vec<u64> = self.references.used(chunk).collect();
            clusters.extend(self.stored.used(chunk));
            clusters.sort_unstable();
            clusters.dedup();
            for cluster in clusters {
                let used = self.references.at(cluster).min(most);
                let count = self.stored.at(cluster);
                if count < used {
                    self.rebuild |= count == 0 && !self.is_counted(cluster);
                    self.report.corruption(1, || {
                        format!("ERROR cluster {cluster} refcount={count} reference={used}")
                    });
                } else if count > used {
                    self.report.leak(|| {
                        format!("Leaked cluster {cluster} refcount={count} reference={used}")
                    });
                }
            }
        }
        let last = self.references.highest().max(self.stored.highest());
        self.report.image_end_offset =
            last.map_or(0, |last| last + 1) << self.header.geometry.cluster_bits;
    }

    /// Whether a block counts `cluster`.
    fn is_counted(&self, cluster: u64) -> bool {
        let index = cluster / self.header.geometry.block_entries();
        self.blocks.binary_search_by_key(&index, |block| block.0).is_ok()
    }
}

/// The error for what one check cannot look at.
fn too_large() -> Error {
    Error::new(ErrorKind::Unsupported, "check so large an image")
}
