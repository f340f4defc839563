//! Tables and data of bitmaps: read with all checks, and written in new places.
//!
//! Source: qcow2 specification, "Bitmap table" and "Bitmap data". A table has one entry for each
//! cluster of bits: where it is, or that all its bits are clear or set. Nothing is ever changed in
//! place: a [`Change`] collects the clusters that were taken for new content and those that nobody
//! needs afterwards; `bitmap_change` makes it true or undoes it.
//!
//! Memory: one table (at most 8 MiB, which follows from the limits of a bitmap) and one cluster of
//! bits at a time, beside the bits themselves, which take room only where some are set.

use std::cell::RefCell;
use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::bitmap::DirtyBitmap;

use super::bitmap_dir::{Stored, check_size, table_entries};
use super::bitmap_reason::BitmapReason;
use super::freed::{Cause, push_cluster};
use super::image::Image;
use super::layout::{ENTRY_BYTES, HostCluster, OFFSET_MASK, Run};
use super::open::{read, read_words};
use crate::reason::Reason;

/// The entry for a cluster whose bits are all set.
const ONES: u64 = 1;

/// What a change of bitmaps takes and gives back.
#[derive(Debug, Default)]
#[must_use = "publish or undo"]
pub(super) struct Change {
    /// Clusters taken for new content; nobody refers to them yet.
    pub(super) fresh: Vec<Run>,
    /// Clusters that nobody refers to when the change is durable.
    pub(super) freed: Vec<Run>,
}

impl Change {
    fn free(&mut self, image: &Image, host: u64) {
        push_cluster(&mut self.freed, image.geometry.host_cluster(host));
    }

    pub(super) fn free_table(&mut self, image: &Image, stored: &Stored) {
        let start = image.geometry.host_cluster(stored.table);
        let count = image.geometry.clusters(stored.entries * ENTRY_BYTES);
        self.freed.push(Run { start, count });
    }
}

impl Image {
    pub(super) fn bitmap_error(
        &self,
        reason: BitmapReason,
        op: &'static str,
    ) -> liveblk_engine::Error {
        self.error(Reason::Bitmap(reason), op)
    }

    /// Bits in a cluster.
    fn cluster_bits(&self) -> u64 {
        self.geometry.cluster() * 8
    }

    /// The entries of a bitmap's table, each checked.
    async fn bitmap_words(&self, stored: &Stored) -> Result<Vec<u64>> {
        let size = self.state.borrow().header.size;
        let expected = table_entries(self.geometry, size, stored.granularity_bits);
        let words = self.raw_words(stored).await?;
        if stored.entries != expected || !self.are_sane(&words) {
            return Err(self.bitmap_error(BitmapReason::Unreadable(stored.text()), "read"));
        }
        Ok(words)
    }

    async fn raw_words(&self, stored: &Stored) -> Result<Vec<u64>> {
        let end = stored.table.saturating_add(stored.entries * ENTRY_BYTES);
        if end > self.storage.size() {
            return Err(self.bitmap_error(BitmapReason::Unreadable(stored.text()), "read"));
        }
        read_words(&self.core, &self.storage, stored.table, stored.entries).await
    }

    /// Whether each entry is allowed, and none refers to what another one refers to: so the bits
    /// take no more memory than the file has.
    fn are_sane(&self, words: &[u64]) -> bool {
        let mut hosts: Vec<u64> = words.iter().copied().filter(|word| *word > ONES).collect();
        hosts.sort_unstable();
        let twice = hosts.windows(2).any(|pair| pair.first() == pair.last());
        !twice && hosts.into_iter().all(|host| self.is_sane(host))
    }

    fn is_sane(&self, host: u64) -> bool {
        host & !OFFSET_MASK == 0
            && self.geometry.aligned(host)
            && host < self.storage.size()
            && !self.state.borrow().is_metadata(host)
    }

    async fn data_cluster(&self, host: u64) -> Result<Vec<u8>> {
        let cluster = self.geometry.cluster();
        let there = cluster.min(self.storage.size().saturating_sub(host));
        let mut bytes = read(&self.core, &self.storage, host, there).await?;
        bytes.resize(usize::try_from(cluster).unwrap_or(0), 0);
        Ok(bytes)
    }

    /// The bits of a bitmap as stored.
    pub(super) async fn stored_bits(&self, stored: &Stored) -> Result<DirtyBitmap> {
        let words = self.bitmap_words(stored).await?;
        let size = self.state.borrow().header.size;
        let mut bits = DirtyBitmap::new(size, stored.granularity());
        let per = self.cluster_bits();
        for (first, word) in (0..).step_by(usize::try_from(per).unwrap_or(1)).zip(words) {
            match word {
                0 => {}
                ONES => bits.set_granules(first, per),
                host => bits.merge_bytes(first, &self.data_cluster(host).await?),
            }
        }
        Ok(bits)
    }

    /// Notes everything that a bitmap takes in the file as not needed any more. What cannot be
    /// read stays counted: a leak, which a check finds.
    pub(super) async fn free_bitmap(&self, stored: &Stored, change: &mut Change) {
        change.free_table(self, stored);
        match self.raw_words(stored).await {
            Ok(words) => {
                let mut hosts: Vec<u64> = words.into_iter().filter(|word| *word > ONES).collect();
                hosts.sort_unstable();
                hosts.dedup();
                for host in hosts.into_iter().filter(|host| self.is_sane(*host)) {
                    change.free(self, host);
                }
            }
            Err(error) => tracing::warn!(%error, "data of a removed bitmap stays allocated"),
        }
    }

    /// Writes a new bitmap with `bits`.
    pub(super) async fn new_table(
        self: &Rc<Self>,
        stored: &mut Stored,
        bits: &RefCell<DirtyBitmap>,
        change: &mut Change,
    ) -> Result<()> {
        self.add_bits(stored, Vec::new(), bits, change).await
    }

    /// Adds `bits` to a stored bitmap.
    pub(super) async fn merged_table(
        self: &Rc<Self>,
        stored: &mut Stored,
        bits: &RefCell<DirtyBitmap>,
        change: &mut Change,
    ) -> Result<()> {
        if bits.borrow().is_clean() {
            return Ok(());
        }
        let old = self.bitmap_words(stored).await?;
        change.free_table(self, stored);
        self.add_bits(stored, old, bits, change).await
    }

    async fn add_bits(
        self: &Rc<Self>,
        stored: &mut Stored,
        old: Vec<u64>,
        bits: &RefCell<DirtyBitmap>,
        change: &mut Change,
    ) -> Result<()> {
        let size = self.state.borrow().header.size;
        let entries = table_entries(self.geometry, size, stored.granularity_bits);
        let per = self.cluster_bits();
        let mut words = old;
        words.resize(usize::try_from(entries).unwrap_or(0), 0);
        for (index, word) in (0_u64..).zip(&mut words) {
            let first = index * per;
            let (any, all) = {
                let bits = bits.borrow();
                (bits.any_granule(first, per), bits.all_granules(first, per))
            };
            if !any || *word == ONES {
                continue;
            }
            let old = *word;
            if all {
                *word = ONES;
            } else {
                *word = self.add_to_cluster(old, first, bits, change).await?;
            }
            if old != 0 && old != *word {
                change.free(self, old);
            }
        }
        self.write_words(stored, words, change).await
    }

    /// The table entry after the bits from granule `first` on were added to what `old` names.
    async fn add_to_cluster(
        self: &Rc<Self>,
        old: u64,
        first: u64,
        bits: &RefCell<DirtyBitmap>,
        change: &mut Change,
    ) -> Result<u64> {
        let mut bytes = if old == 0 { Vec::new() } else { self.data_cluster(old).await? };
        bytes.resize(usize::try_from(self.geometry.cluster()).unwrap_or(0), 0);
        let before = bytes.clone();
        bits.borrow().add_to_bytes(first, &mut bytes);
        if bytes.iter().all(|byte| *byte == 0xff) {
            Ok(ONES)
        } else if before != bytes {
            self.write_data(&bytes, change).await
        } else {
            Ok(old)
        }
    }

    async fn write_data(self: &Rc<Self>, bytes: &[u8], change: &mut Change) -> Result<u64> {
        let run = self.one_cluster().await?;
        change.fresh.push(run);
        let host = self.geometry.host(run.start);
        self.write_bytes(host, bytes).await?;
        Ok(host)
    }

    async fn write_words(
        self: &Rc<Self>,
        stored: &mut Stored,
        mut words: Vec<u64>,
        change: &mut Change,
    ) -> Result<()> {
        let entries = words.len() as u64;
        let run = self.some_clusters(entries * ENTRY_BYTES, change).await?;
        let room = (run.count << self.geometry.cluster_bits) / ENTRY_BYTES;
        words.resize(usize::try_from(room).unwrap_or(0), 0);
        let host = self.geometry.host(run.start);
        self.write_table(host, &words).await?;
        stored.table = host;
        stored.entries = entries;
        Ok(())
    }

    /// Neighbouring clusters for `bytes` bytes.
    pub(super) async fn some_clusters(
        self: &Rc<Self>,
        bytes: u64,
        change: &mut Change,
    ) -> Result<Run> {
        let count = self.geometry.clusters(bytes);
        let run = {
            let _growth = self.growth.lock().await;
            self.allocate_run(count).await?
        };
        change.fresh.push(run);
        Ok(run)
    }

    async fn one_cluster(self: &Rc<Self>) -> Result<Run> {
        loop {
            if let Some(run) = self.state.borrow_mut().take_clusters(1) {
                return Ok(run);
            }
            let _growth = self.growth.lock().await;
            self.refill(1).await?;
        }
    }

    /// Makes the table fit a disk of `size` bytes: what is cut off is forgotten, what is added is
    /// clean. Answers whether anything had to change.
    pub(super) async fn resized_table(
        self: &Rc<Self>,
        stored: &mut Stored,
        size: u64,
        change: &mut Change,
    ) -> Result<bool> {
        let checked = check_size(self.geometry, size, stored.granularity_bits);
        checked.map_err(|reason| self.bitmap_error(reason, "resize"))?;
        let old_size = self.state.borrow().header.size;
        let entries = table_entries(self.geometry, size, stored.granularity_bits);
        let old = self.bitmap_words(stored).await?;
        let mut words = old.clone();
        let per = self.cluster_bits();
        let kept = old_size.min(size).div_ceil(stored.granularity());
        let (last, bits) = (usize::try_from(kept / per).unwrap_or(usize::MAX), kept % per);
        if let Some(word) = words.get_mut(last)
            && bits > 0
            && *word != 0
        {
            // Bits behind the end must not come to life when the disk grows (again).
            let mut bytes = match *word {
                ONES => vec![0xff; usize::try_from(self.geometry.cluster()).unwrap_or(0)],
                host => self.data_cluster(host).await?,
            };
            let before = bytes.clone();
            keep_bits(&mut bytes, bits);
            if before != bytes {
                *word = self.write_data(&bytes, change).await?;
            }
        }
        words.resize(usize::try_from(entries).unwrap_or(0), 0);
        if words == old {
            return Ok(false);
        }
        for (index, word) in old.iter().enumerate().filter(|(_, word)| **word > ONES) {
            if words.get(index) != Some(word) {
                change.free(self, *word);
            }
        }
        change.free_table(self, stored);
        self.write_words(stored, words, change).await?;
        Ok(true)
    }

    /// Gives up a change that nothing refers to yet.
    pub(super) fn undo(&self, change: Change) {
        let mut state = self.state.borrow_mut();
        for run in change.fresh {
            state.give_back(run);
        }
    }

    /// Gives clusters back that nothing refers to any more, durably.
    pub(super) async fn release(self: &Rc<Self>, runs: Vec<Run>) {
        for cluster in runs.into_iter().flat_map(Run::clusters) {
            if let Err(error) = self.release_one(cluster).await {
                tracing::warn!(%error, cluster = cluster.0, "cluster stays allocated");
            }
        }
    }

    async fn release_one(self: &Rc<Self>, cluster: HostCluster) -> Result<()> {
        let (slice, _) = self.state.borrow().ref_position(cluster);
        self.load_ref_slice(slice).await?;
        let mut state = self.state.borrow_mut();
        // A damaged table may name clusters that nobody counted.
        if state.refcount(cluster).is_some_and(|count| count > 0) {
            state.unlink(cluster, Cause::Other);
        }
        Ok(())
    }
}

/// Clears all bits but the first `bits`.
fn keep_bits(bytes: &mut [u8], bits: u64) {
    for (byte, first) in bytes.iter_mut().zip((0..).step_by(8)) {
        let kept = bits.saturating_sub(first).min(8);
        *byte &= !(0xff_u16 << kept) as u8;
    }
}
