//! Counting the references of an image, for `check`.

use liveblk_engine::Result;
use liveblk_engine::executor::Core;
use liveblk_engine::storage::Storage;

use super::check::CheckReport;
use super::entry::{Entry, RawEntry};
use super::extensions::BITMAPS;
use super::header::Header;
use super::layout::{COMPRESSED, COPIED, ENTRY_BYTES, OFFSET_MASK, REFTABLE_MASK, ZERO};
use super::open::{read, read_words};

/// Bytes of the fixed part of a snapshot table entry and of a bitmap directory entry.
const SNAPSHOT_FIXED: u64 = 40;
const BITMAP_FIXED: u64 = 24;

/// One pass over everything that refers to clusters.
pub(super) struct Walk<'a> {
    core: &'a Core,
    storage: &'a Storage,
    header: &'a Header,
    refcounts: Vec<u32>,
    references: Vec<u32>,
    report: CheckReport,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        core: &'a Core,
        storage: &'a Storage,
        header: &'a Header,
        refcounts: Vec<u32>,
        report: CheckReport,
    ) -> Self {
        let references = vec![0; refcounts.len()];
        Self { core, storage, header, refcounts, references, report }
    }

    pub(super) fn finish(self) -> (CheckReport, Vec<u32>, Vec<u32>) {
        (self.report, self.refcounts, self.references)
    }

    pub(super) async fn run(&mut self) -> Result<()> {
        let header = self.header;
        let geometry = header.geometry;
        self.claim("header", 0, geometry.cluster());
        let table = u64::from(header.reftable_clusters) << geometry.cluster_bits;
        self.claim("refcount table", header.reftable_offset, table);
        let entries = table / ENTRY_BYTES;
        let blocks = read_words(self.core, self.storage, header.reftable_offset, entries).await?;
        for raw in blocks {
            let host = raw & REFTABLE_MASK;
            if host != 0 && geometry.aligned(host) {
                self.claim("refcount block", host, geometry.cluster());
            }
        }
        self.level1(header.l1_offset, header.l1_size.into(), true).await?;
        self.snapshots().await?;
        if header.bitmaps_valid() {
            self.bitmaps().await?;
        }
        Ok(())
    }

    /// Counts one reference to each cluster of a range.
    fn claim(&mut self, what: &str, offset: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let geometry = self.header.geometry;
        let first = geometry.host_cluster(offset).0;
        let last = geometry.host_cluster(offset.saturating_add(bytes - 1)).0;
        for cluster in first..=last {
            let at = usize::try_from(cluster).unwrap_or(usize::MAX);
            match self.references.get_mut(at) {
                Some(count) => *count = count.saturating_add(1),
                None => {
                    self.report.corruption(format!("{what} at {offset:#x} is behind the end"));
                    return;
                }
            }
        }
    }

    fn check_copied(&mut self, what: &str, raw: u64, host: u64) {
        let cluster = self.header.geometry.host_cluster(host).0;
        let at = usize::try_from(cluster).unwrap_or(usize::MAX);
        let once = self.refcounts.get(at) == Some(&1);
        if once != (raw & COPIED != 0) {
            self.report.corruption(format!("COPIED bit of {what} entry {raw:#x} is wrong"));
        }
    }

    async fn level1(&mut self, offset: u64, entries: u64, active: bool) -> Result<()> {
        let geometry = self.header.geometry;
        self.claim("L1 table", offset, entries * ENTRY_BYTES);
        let table = read_words(self.core, self.storage, offset, entries).await?;
        for (index, raw) in table.into_iter().enumerate().filter(|(_, raw)| *raw != 0) {
            let host = raw & OFFSET_MASK;
            if raw & !(OFFSET_MASK | COPIED) != 0 || host == 0 || !geometry.aligned(host) {
                self.report.corruption(format!("L1 entry {index}: {raw:#x}"));
                continue;
            }
            self.claim("L2 table", host, geometry.cluster());
            if active {
                self.check_copied("L1", raw, host);
            }
            let words = geometry.cluster() / ENTRY_BYTES;
            let table = read_words(self.core, self.storage, host, words).await?;
            let entry_words = if geometry.extended { 2 } else { 1 };
            for words in table.chunks(entry_words).filter(|words| words.iter().any(|w| *w != 0)) {
                let bitmap = words.get(1).copied().unwrap_or(0);
                self.level2(words.first().copied().unwrap_or(0), bitmap, active);
            }
        }
        Ok(())
    }

    fn level2(&mut self, raw: u64, bitmap: u64, active: bool) {
        let geometry = self.header.geometry;
        if geometry.extended
            && Entry::decode(RawEntry { word: raw, bitmap }, geometry, u64::MAX) == Entry::Damaged
        {
            return self.report.corruption(format!("L2 entry {raw:#x} {bitmap:#x}"));
        }
        if raw & COMPRESSED != 0 {
            self.report.allocated_clusters += u64::from(active);
            if raw & COPIED != 0 {
                self.report.corruption(format!("COPIED bit of compressed entry {raw:#x}"));
            }
            let bits = 62 - (geometry.cluster_bits - 8);
            let offset = raw & ((1 << bits) - 1);
            let sectors = ((raw & !(COPIED | COMPRESSED)) >> bits) + 1;
            self.claim("compressed cluster", offset, (offset & !511) + sectors * 512 - offset);
            return;
        }
        if geometry.external {
            return self.external(raw, active);
        }
        let host = raw & OFFSET_MASK;
        let reserved = raw & !(OFFSET_MASK | COPIED | ZERO) != 0;
        let zero = raw & ZERO != 0;
        let plain = host == 0 && raw & COPIED == 0 && (zero || geometry.extended);
        if reserved || (zero && geometry.version < 3) || !geometry.aligned(host) {
            self.report.corruption(format!("L2 entry {raw:#x}"));
        } else if !plain {
            if host == 0 {
                self.report.corruption(format!("L2 entry {raw:#x} refers to the header"));
            }
            self.report.allocated_clusters += u64::from(active);
            self.claim("data cluster", host, geometry.cluster());
            if active {
                self.check_copied("L2", raw, host);
            }
        }
    }

    /// An entry of an image with a data file: nothing there is counted.
    fn external(&mut self, raw: u64, active: bool) {
        let host = raw & OFFSET_MASK;
        if raw & !(OFFSET_MASK | COPIED | ZERO) != 0 || !self.header.geometry.aligned(host) {
            self.report.corruption(format!("L2 entry {raw:#x}"));
        } else if host != 0 || raw & COPIED != 0 {
            self.report.allocated_clusters += u64::from(active);
        }
    }

    async fn snapshots(&mut self) -> Result<()> {
        let start = self.header.snapshots_offset;
        let mut at = start;
        for _ in 0..self.header.nb_snapshots {
            let fixed = read(self.core, self.storage, at, SNAPSHOT_FIXED).await?;
            let (offset, entries) = (number(&fixed, 0, 8), number(&fixed, 8, 4));
            let strings = number(&fixed, 12, 2) + number(&fixed, 14, 2);
            let len = SNAPSHOT_FIXED + number(&fixed, 36, 4) + strings;
            at = at.saturating_add(len).next_multiple_of(8);
            if entries * ENTRY_BYTES > crate::limits::L1_BYTES_MAX
                || !self.header.geometry.aligned(offset)
            {
                self.report.corruption(format!("snapshot L1 table at {offset:#x}"));
                continue;
            }
            self.level1(offset, entries, false).await?;
        }
        self.claim("snapshot table", start, at - start);
        Ok(())
    }

    async fn bitmaps(&mut self) -> Result<()> {
        let Some(data) = self.header.extensions.find(BITMAPS) else { return Ok(()) };
        let (count, bytes) = (number(data, 0, 4), number(data, 8, 8));
        let start = number(data, 16, 8);
        self.claim("bitmap directory", start, bytes);
        let mut at = start;
        for _ in 0..count {
            if at.saturating_sub(start) >= bytes {
                self.report.corruption("bitmap directory is too short".to_owned());
                return Ok(());
            }
            let fixed = read(self.core, self.storage, at, BITMAP_FIXED).await?;
            let (table, entries) = (number(&fixed, 0, 8), number(&fixed, 8, 4));
            let len = BITMAP_FIXED + number(&fixed, 18, 2) + number(&fixed, 20, 4);
            at = at.saturating_add(len).next_multiple_of(8);
            if entries > 0x800_0000 {
                self.report.corruption(format!("bitmap table of {entries} entries"));
                continue;
            }
            self.claim("bitmap table", table, entries * ENTRY_BYTES);
            for raw in read_words(self.core, self.storage, table, entries).await? {
                if raw & OFFSET_MASK != 0 {
                    self.claim("bitmap data", raw & OFFSET_MASK, self.header.geometry.cluster());
                }
            }
        }
        Ok(())
    }
}

/// The big-endian number of `len` bytes at `at`; 0 outside.
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let field = bytes.get(at..at + len).unwrap_or_default();
    field.iter().fold(0, |value, byte| (value << 8) | u64::from(*byte))
}
