//! The L2 tables of a survey, and what a repair makes of their entries.

use liveblk_engine::Result;

use super::check_survey::{Survey, Uses};
use super::layout::{
    COMPRESSED, COPIED, Geometry, INCOMPATIBLE_DATA_FILE, L2_RESERVED, OFFSET_MASK, ZERO,
};
use super::state::{set_word, word};
use crate::limits::{CHECK_WINDOW, TABLE_PIECE};

/// What an entry refers to.
enum Reference {
    Nothing,
    Compressed {
        offset: u64,
        bytes: u64,
    },
    /// A cluster; `data`: not only kept for later.
    Cluster {
        host: u64,
        data: bool,
    },
}

impl Reference {
    fn of(raw: u64, bitmap: u64, geometry: Geometry, data_file: bool) -> Self {
        if raw & COMPRESSED != 0 {
            let bits = 62 - (geometry.cluster_bits - 8);
            let offset = raw & ((1 << bits) - 1);
            let sectors = ((raw & !(COPIED | COMPRESSED)) >> bits) + 1;
            return Self::Compressed { offset, bytes: (offset & !511) + sectors * 512 - offset };
        }
        let host = raw & OFFSET_MASK;
        // In a data file offset 0 is a place like any other.
        if host == 0 && !(data_file && raw & COPIED != 0) {
            return Self::Nothing;
        }
        let data = if geometry.extended { bitmap as u32 != 0 } else { raw & ZERO == 0 };
        Self::Cluster { host, data }
    }

    /// A cluster that no cluster can start at, and that holds no data: the entry can be reset.
    fn can_be_reset(&self, geometry: Geometry) -> bool {
        matches!(self, Self::Cluster { host, data: false } if !geometry.aligned(*host))
    }
}

impl Survey<'_> {
    /// Reads all L2 tables, some at a time, and counts what their entries refer to.
    pub(super) async fn walk_tables(&mut self) -> Result<()> {
        let tables: Vec<(u64, Uses)> = self.tables.iter().map(|(at, uses)| (*at, *uses)).collect();
        let bytes = usize::try_from(self.header.geometry.cluster()).unwrap_or(0);
        for window in tables.chunks(window_of(bytes)) {
            let reads: Vec<_> = window
                .iter()
                .map(|(host, _)| {
                    let buf = self.core.pool().zeroed(bytes);
                    (buf.clone(), self.storage.read(*host, buf))
                })
                .collect();
            let mut tables = Vec::with_capacity(reads.len());
            for (buf, read) in reads {
                read.await?;
                tables.push(buf);
            }
            for ((_, uses), buf) in window.iter().zip(tables) {
                self.table(&buf.to_vec(), *uses);
            }
            self.spend(0)?;
        }
        Ok(())
    }

    fn table(&mut self, bytes: &[u8], uses: Uses) {
        let geometry = self.header.geometry;
        let mut next = None;
        for index in 0..usize::try_from(geometry.l2_entries()).unwrap_or(0) {
            let (raw, bitmap) = entry(bytes, index, geometry);
            if raw | bitmap != 0 {
                self.entry(index, raw, bitmap, uses, &mut next);
            }
        }
    }

    fn entry(&mut self, index: usize, raw: u64, bitmap: u64, uses: Uses, next: &mut Option<u64>) {
        let geometry = self.header.geometry;
        let data_file = self.header.incompatible & INCOMPATIBLE_DATA_FILE != 0;
        let reference = Reference::of(raw, bitmap, geometry, data_file);
        if raw & COMPRESSED == 0 && (raw & L2_RESERVED != 0 || zero_in_v2(raw, geometry)) {
            self.report.corruption(uses.total, || {
                format!("ERROR found l2 entry with reserved bits set: {raw:x}")
            });
        }
        if self.resets && reference.can_be_reset(geometry) {
            self.report.corruption(uses.total, || {
                let host = raw & OFFSET_MASK;
                format!(
                    "Repairing offset={host:x}: Preallocated cluster is not properly aligned; L2 \
                     entry corrupted."
                )
            });
            return;
        }
        match reference {
            Reference::Nothing => self.nothing(raw, bitmap, uses),
            Reference::Compressed { offset, bytes } => {
                self.compressed(index, raw, bitmap, uses, (offset, bytes), data_file);
            }
            Reference::Cluster { host, data } => {
                self.cluster(raw, bitmap, uses, (host, data), data_file, next);
            }
        }
    }

    fn nothing(&mut self, raw: u64, bitmap: u64, uses: Uses) {
        if raw & COPIED != 0 {
            self.report.corruption(uses.total, || {
                format!("ERROR l2_entry={raw:x}: COPIED bit without an offset")
            });
        }
        if bitmap as u32 != 0 {
            self.report.corruption(uses.total, || {
                "ERROR: Unallocated cluster has non-zero subcluster allocation map".to_owned()
            });
        }
    }

    fn compressed(
        &mut self,
        index: usize,
        raw: u64,
        bitmap: u64,
        uses: Uses,
        (offset, bytes): (u64, u64),
        data_file: bool,
    ) {
        if raw & COPIED != 0 {
            self.report.corruption(uses.total, || {
                format!(
                    "ERROR: coffset={offset:#x}: copied flag must never be set for compressed \
                     clusters"
                )
            });
        }
        if data_file {
            return self.report.corruption(uses.total, || {
                format!("ERROR compressed cluster {index} with data file, entry={raw:#x}")
            });
        }
        if bitmap != 0 {
            return self.report.corruption(uses.total, || {
                format!(
                    "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, \
                     entry={raw:#x}"
                )
            });
        }
        self.report.allocated_clusters += uses.active;
        self.report.compressed_clusters += uses.active;
        self.report.fragmented_clusters += uses.active;
        self.claim("compressed cluster", offset, bytes, uses.total);
    }

    fn cluster(
        &mut self,
        raw: u64,
        bitmap: u64,
        uses: Uses,
        (host, data): (u64, bool),
        data_file: bool,
        next: &mut Option<u64>,
    ) {
        let geometry = self.header.geometry;
        if bitmap as u32 & (bitmap >> 32) as u32 != 0 {
            self.report.corruption(uses.total, || {
                format!(
                    "ERROR offset={host:x}: Allocated cluster has corrupted subcluster allocation \
                     bitmap"
                )
            });
        }
        if !geometry.aligned(host) {
            self.report.corruption(uses.total, || {
                let what = if data { "Data" } else { "Preallocated" };
                format!(
                    "ERROR offset={host:x}: {what} cluster is not properly aligned; L2 entry \
                     corrupted."
                )
            });
        }
        if uses.active > 0 {
            self.report.allocated_clusters += uses.active;
            self.report.fragmented_clusters +=
                if next.is_some_and(|next| next != host) { uses.active } else { 0 };
            *next = Some(host + geometry.cluster());
        }
        if data_file {
            return;
        }
        self.claim("data cluster", host, geometry.cluster(), uses.total);
        let count = self.stored.at(geometry.host_cluster(host).0);
        if uses.active > 0 && (count == 1) != (raw & COPIED != 0) {
            self.copied_error(uses.active, || {
                format!("ERROR OFLAG_COPIED data cluster: l2_entry={raw:x} refcount={count}")
            });
        }
    }

    /// What a repair makes of the table `bytes`: entries that cannot be are reset, COPIED bits say
    /// whether the cluster is counted once (`once`, asked for tables of the disk). Answers whether
    /// anything changed.
    pub(super) fn mend_table(
        &self,
        bytes: &mut [u8],
        uses: Uses,
        entries: bool,
        once: impl Fn(u64) -> bool,
    ) -> bool {
        let geometry = self.header.geometry;
        let data_file = self.header.incompatible & INCOMPATIBLE_DATA_FILE != 0;
        let step = if geometry.extended { 2 } else { 1 };
        let mut changed = false;
        for index in 0..usize::try_from(geometry.l2_entries()).unwrap_or(0) {
            let (raw, bitmap) = entry(bytes, index, geometry);
            let reference = Reference::of(raw, bitmap, geometry, data_file);
            let wanted = match reference {
                _ if entries && reference.can_be_reset(geometry) => {
                    if geometry.extended {
                        (0, u64::MAX << 32)
                    } else {
                        (ZERO, bitmap)
                    }
                }
                Reference::Nothing | Reference::Compressed { .. } if entries => {
                    (raw & !COPIED, bitmap)
                }
                Reference::Cluster { host, .. } if uses.active > 0 && !data_file => {
                    let copied = if once(geometry.host_cluster(host).0) { COPIED } else { 0 };
                    (raw & !COPIED | copied, bitmap)
                }
                _ => (raw, bitmap),
            };
            if wanted != (raw, bitmap) {
                changed = true;
                set_word(bytes, index * step, wanted.0);
                if geometry.extended {
                    set_word(bytes, index * step + 1, wanted.1);
                }
            }
        }
        changed
    }
}

/// How many tables of `bytes` are read together.
fn window_of(bytes: usize) -> usize {
    (4 * TABLE_PIECE / bytes.max(1)).clamp(1, CHECK_WINDOW)
}

/// Entry `index` of an L2 table, with its subcluster bitmap.
fn entry(bytes: &[u8], index: usize, geometry: Geometry) -> (u64, u64) {
    if geometry.extended {
        return (word(bytes, index * 2), word(bytes, index * 2 + 1));
    }
    (word(bytes, index), 0)
}

/// Version 2 has no entries for zeroes.
fn zero_in_v2(raw: u64, geometry: Geometry) -> bool {
    raw & ZERO != 0 && geometry.version < 3
}
