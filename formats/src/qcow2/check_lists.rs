//! The snapshot table, the bitmap directory and the encryption header of a survey.
//!
//! Entries are read one after the other with every length checked against its bound before anything
//! is read for it.

use std::collections::BTreeMap;

use liveblk_engine::Result;
use liveblk_engine::executor::Core;
use liveblk_engine::storage::Storage;

use super::check_survey::Survey;
use super::extensions::{BITMAPS, ENCRYPTION_HEADER};
use super::header::Header;
use super::layout::{ENTRY_BYTES, OFFSET_MASK};
use super::open::{read, read_words};
use crate::limits::{
    BITMAP_DIRECTORY_BYTES_MAX, BITMAP_TABLE_ENTRIES_MAX, BITMAPS_MAX, L1_BYTES_MAX,
    SNAPSHOT_EXTRA_MAX, SNAPSHOT_TABLE_BYTES_MAX, TABLE_PIECE,
};

/// Bytes of the fixed part of a snapshot table entry and of a bitmap directory entry.
const SNAPSHOT_FIXED: usize = 40;
const BITMAP_FIXED: u64 = 24;

/// Bytes of extra data that version 3 asks for: size of the machine state, size of the disk.
const EXTRA_V3: usize = 16;

/// Bits of a bitmap table entry that must be 0.
const BITMAP_RESERVED: u64 = 0xff00_0000_0000_01fe;

/// An entry of the snapshot table as stored.
pub(super) struct StoredSnapshot {
    fixed: Vec<u8>,
    extra: Vec<u8>,
    /// Id and name.
    strings: Vec<u8>,
    /// Extra data that was left out because there is too much.
    dropped: bool,
}

impl StoredSnapshot {
    pub(super) fn l1(&self) -> (u64, u64) {
        (number(&self.fixed, 0, 8), number(&self.fixed, 8, 4))
    }

    fn name(&self) -> String {
        let id = usize::try_from(number(&self.fixed, 12, 2)).unwrap_or(0).min(self.strings.len());
        let (id, name) = self.strings.split_at(id);
        format!("{} ({})", String::from_utf8_lossy(id), String::from_utf8_lossy(name))
    }

    /// The entry as it should be stored in version 3, padded.
    fn bytes(mut self, disk_size: u64) -> Vec<u8> {
        if self.extra.len() < 8 {
            self.extra = number(&self.fixed, 32, 4).to_be_bytes().to_vec();
        }
        if self.extra.len() < EXTRA_V3 {
            self.extra.truncate(8);
            self.extra.extend_from_slice(&disk_size.to_be_bytes());
        }
        let extra = u32::try_from(self.extra.len()).unwrap_or(0);
        self.fixed.truncate(SNAPSHOT_FIXED - 4);
        let mut out = self.fixed;
        out.extend_from_slice(&extra.to_be_bytes());
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(&self.strings);
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }
}

/// Reads a snapshot table entry by entry.
pub(super) struct SnapshotReader<'a> {
    core: &'a Core,
    storage: &'a Storage,
    start: u64,
    at: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl<'a> SnapshotReader<'a> {
    pub(super) fn new(core: &'a Core, storage: &'a Storage, start: u64) -> Self {
        Self { core, storage, start, at: start, window: Vec::new(), window_at: 0 }
    }

    /// Bytes of the entries read so far, padding of the last one left out.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.at - self.start
    }

    /// The next entry; `None` where the table would become too large.
    pub(super) async fn next(&mut self) -> Result<Option<StoredSnapshot>> {
        self.at = self.at.next_multiple_of(8);
        let fixed = self.take(SNAPSHOT_FIXED).await?;
        let extra_len = number(&fixed, 36, 4);
        let strings_len = number(&fixed, 12, 2) + number(&fixed, 14, 2);
        let end = (self.at - self.start).saturating_add(extra_len + strings_len);
        if end > SNAPSHOT_TABLE_BYTES_MAX {
            return Ok(None);
        }
        let kept = extra_len.min(SNAPSHOT_EXTRA_MAX);
        let extra = self.take(usize::try_from(kept).unwrap_or(0)).await?;
        self.at += extra_len - kept;
        let strings = self.take(usize::try_from(strings_len).unwrap_or(0)).await?;
        Ok(Some(StoredSnapshot { fixed, extra, strings, dropped: extra_len > kept }))
    }

    async fn take(&mut self, len: usize) -> Result<Vec<u8>> {
        let within = |at: u64, from: u64| usize::try_from(at.wrapping_sub(from)).ok();
        let mut found = within(self.at, self.window_at);
        if found.is_none_or(|from| from.saturating_add(len) > self.window.len()) {
            let bytes = (TABLE_PIECE / 4).max(len) as u64;
            self.window = read(self.core, self.storage, self.at, bytes).await?;
            self.window_at = self.at;
            found = Some(0);
        }
        let from = found.unwrap_or(0);
        self.at += len as u64;
        Ok(self.window.get(from..from + len).unwrap_or_default().to_vec())
    }
}

impl Survey<'_> {
    /// The snapshot table and the L1 tables of its entries, each read once.
    pub(super) async fn read_snapshots(&mut self) -> Result<()> {
        let (count, start) = (self.header.nb_snapshots, self.header.snapshots_offset);
        if count == 0 {
            return Ok(());
        }
        let mut reader = SnapshotReader::new(self.core, self.storage, start);
        let mut tables: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        for index in 0..count {
            let before = reader.stored_bytes();
            let entry =
                if start + before < self.storage.size() { reader.next().await? } else { None };
            let Some(entry) = entry else {
                self.incomplete = true;
                self.snapshots_damaged = true;
                self.report.corruption(1, || {
                    format!("ERROR snapshot table entry {index}: snapshot table too large")
                });
                break;
            };
            self.snapshot(index, &entry, &mut tables);
        }
        self.snapshot_bytes = reader.stored_bytes();
        self.claim_fixed("snapshot table", start, self.snapshot_bytes, 1);
        for ((offset, entries), times) in tables {
            self.read_l1(offset, entries, times, false).await?;
        }
        Ok(())
    }

    fn snapshot(
        &mut self,
        index: u32,
        entry: &StoredSnapshot,
        tables: &mut BTreeMap<(u64, u64), u64>,
    ) {
        let geometry = self.header.geometry;
        let (offset, entries) = entry.l1();
        if entry.dropped {
            self.snapshots_damaged = true;
            self.report.corruption(1, || {
                format!("ERROR Too much extra metadata in snapshot table entry {index}")
            });
        }
        if geometry.version >= 3 && entry.extra.len() < EXTRA_V3 {
            self.snapshots_damaged = true;
            self.report
                .corruption(1, || format!("ERROR snapshot table entry {index} is incomplete"));
        }
        let problem = if !geometry.aligned(offset) {
            format!("l1_offset={offset:#x}: L1 table is not cluster aligned")
        } else if entries * ENTRY_BYTES > L1_BYTES_MAX {
            format!("l1_size={entries:#x}: L1 table is too large")
        } else {
            *tables.entry((offset, entries)).or_default() += 1;
            return;
        };
        self.incomplete = true;
        self.report.corruption(1, || {
            format!("ERROR snapshot {} {problem}; snapshot table entry corrupted", entry.name())
        });
    }

    /// The snapshot table as a repair writes it, and its number of entries.
    pub(super) async fn mended_snapshots(&self) -> Result<(u32, Vec<u8>)> {
        let mut reader = SnapshotReader::new(self.core, self.storage, self.header.snapshots_offset);
        let (mut count, mut out) = (0, Vec::new());
        while count < self.header.nb_snapshots {
            let at = self.header.snapshots_offset + reader.stored_bytes();
            let entry = if at < self.storage.size() { reader.next().await? } else { None };
            let Some(entry) = entry else { break };
            out.extend_from_slice(&entry.bytes(self.header.size));
            count += 1;
        }
        Ok((count, out))
    }

    /// The cluster or clusters of a LUKS header.
    pub(super) fn claim_encryption(&mut self) {
        if let Some(data) = self.header.extensions.find(ENCRYPTION_HEADER) {
            let (offset, bytes) = (number(data, 0, 8), number(data, 8, 8));
            self.claim_fixed("encryption header", offset, bytes, 1);
        }
    }

    /// The bitmap directory, the tables of its entries, and what these refer to.
    pub(super) async fn read_bitmaps(&mut self) -> Result<()> {
        if !self.header.bitmaps_valid() {
            return Ok(());
        }
        let Some(data) = self.header.extensions.find(BITMAPS) else { return Ok(()) };
        let (count, bytes, start) = (number(data, 0, 4), number(data, 8, 8), number(data, 16, 8));
        if count > BITMAPS_MAX || bytes > BITMAP_DIRECTORY_BYTES_MAX {
            self.bad_bitmaps("ERROR bitmap directory too large".to_owned());
            return Ok(());
        }
        self.claim_fixed("bitmap directory", start, bytes, 1);
        if !self.is_inside(start, bytes) {
            self.incomplete = true;
            return Ok(());
        }
        let mut at = start;
        for index in 0..count {
            let fixed = read(self.core, self.storage, at, BITMAP_FIXED).await?;
            let (table, entries) = (number(&fixed, 0, 8), number(&fixed, 8, 4));
            let len = BITMAP_FIXED + number(&fixed, 18, 2) + number(&fixed, 20, 4);
            at = at.saturating_add(len).next_multiple_of(8);
            if at.saturating_sub(start) > bytes {
                self.bad_bitmaps(format!("ERROR bitmap directory ends before entry {index}"));
                return Ok(());
            }
            if entries > BITMAP_TABLE_ENTRIES_MAX || !self.header.geometry.aligned(table) {
                self.bad_bitmaps(format!("ERROR bitmap {index} doesn't satisfy the constraints"));
                continue;
            }
            self.read_bitmap_table(table, entries).await?;
        }
        Ok(())
    }

    async fn read_bitmap_table(&mut self, table: u64, entries: u64) -> Result<()> {
        let geometry = self.header.geometry;
        self.claim_fixed("bitmap table", table, entries * ENTRY_BYTES, 1);
        if !self.is_inside(table, entries * ENTRY_BYTES) {
            self.incomplete = true;
            return Ok(());
        }
        self.spend(entries)?;
        let mut index = 0;
        while index < entries {
            let words = (entries - index).min(TABLE_PIECE as u64 / ENTRY_BYTES);
            let at = table + index * ENTRY_BYTES;
            for raw in read_words(self.core, self.storage, at, words).await? {
                let host = raw & OFFSET_MASK;
                if raw & BITMAP_RESERVED != 0
                    || !geometry.aligned(host)
                    || (host != 0 && raw & 1 != 0)
                {
                    self.bad_bitmaps(format!("ERROR bitmap table entry {raw:#x}"));
                } else if host != 0 {
                    self.claim("bitmap data", host, geometry.cluster(), 1);
                }
            }
            index += words;
        }
        Ok(())
    }

    fn bad_bitmaps(&mut self, text: String) {
        self.incomplete = true;
        self.report.corruption(1, || text);
    }
}

/// Where the bitmap directory lies, and its bytes, if it counts and can be.
pub(super) fn bitmap_directory(header: &Header) -> Option<(u64, u64)> {
    let data = header.extensions.find(BITMAPS).filter(|_| header.bitmaps_valid())?;
    let (bytes, start) = (number(data, 8, 8), number(data, 16, 8));
    (bytes <= BITMAP_DIRECTORY_BYTES_MAX && header.geometry.aligned(start))
        .then_some((start, bytes))
}

/// The big-endian number of `len` bytes at `at`; 0 outside.
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let field = bytes.get(at..at + len).unwrap_or_default();
    field.iter().fold(0, |value, byte| (value << 8) | u64::from(*byte))
}
