//! Taking everything away that is mapped behind an offset of the disk.
//!
//! One switch of all tables: L1 without the tables behind the new end, a copy of the table at the
//! new end without the entries behind it, and a copy of the disk's last cluster with zeroes behind
//! it if the end lies inside. So a later growth shows zeroes, whoever does it, and at any cut the
//! disk has its old size with all data, or the new one. Then: leases of the old disk end; what is
//! free is given back; new tables that had to go behind everything are moved down, and refcount
//! blocks that count nothing are left out, by a second switch; the file ends behind its last used
//! cluster. Of an external data file only the last cluster's bytes behind the end are zeroed.

use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::address::{GuestOffset, HostOffset};
use liveblk_engine::format::PackedCluster;

use super::entry::{Entry, RawEntry};
use super::freed::Cause;
use super::freeze::Frozen;
use super::image::Image;
use super::layout::{COPIED, ENTRY_BYTES, GuestCluster, HostCluster, Run};
use super::snapshot::NewTables;
use super::snapshot_count::entries;
use super::state::Table;
use super::subcluster::{ALL, Subclusters, touched};
use super::switch::Switch;

impl Image {
    /// Whether anything is mapped behind byte `size`, whole clusters only. The image is frozen.
    pub(super) async fn maps_beyond(self: &Rc<Self>, size: u64) -> Result<bool> {
        let keep = usize::try_from(self.geometry.l1_entries(size)).unwrap_or(usize::MAX);
        let (more, boundary) = {
            let state = self.state.borrow();
            let more = state.l1.get(keep..).unwrap_or_default().iter().any(|raw| *raw != 0);
            (more, keep.checked_sub(1).map_or(Ok(Table::None), |at| state.l2_table(at)))
        };
        let host = match self.judge(boundary)? {
            _ if more => return Ok(true),
            Table::None => return Ok(false),
            Table::Own(host) | Table::Shared(host) => host,
        };
        let table = self.read_l2(host).await?;
        let mut behind = self.first_behind(size)..entries(self.geometry);
        Ok(behind.any(|at| RawEntry::load(&table, at, self.geometry) != RawEntry::default()))
    }

    /// The first entry, in the table with byte `size - 1`, of a cluster behind byte `size`.
    fn first_behind(&self, size: u64) -> usize {
        let last = size.saturating_sub(1) >> self.geometry.cluster_bits;
        usize::try_from(last % self.geometry.l2_entries() + 1).unwrap_or(usize::MAX)
    }

    /// Makes the disk end at byte `size`.
    pub(super) async fn cut_off(self: &Rc<Self>, frozen: &Frozen<'_>, size: u64) -> Result<()> {
        let punch = self.switch_to_end(frozen, size, false).await?;
        // Reads behind the new end may be under way.
        self.leases_end().await;
        self.punch_all(punch, Cause::Shrink).await;
        Rc::clone(self).reclaim().await;
        if let Some(data) = &self.data {
            let end = size.next_multiple_of(self.geometry.cluster()).min(data.size());
            data.write_zeroes(size, end.saturating_sub(size), false).await?;
            self.fit_data_file(size).await?;
        }
        // Only for the size of the file; the disk is what it should be.
        if let Ok(punch) = self.switch_to_end(frozen, size, true).await {
            self.leases_end().await;
            self.punch_all(punch, Cause::Shrink).await;
        }
        Rc::clone(self).reclaim().await;
        Rc::clone(self).flush().await?;
        if let Err(error) = self.drop_tail().await {
            tracing::warn!(%error, "the file keeps its free end");
        }
        Ok(())
    }

    async fn switch_to_end(
        self: &Rc<Self>,
        frozen: &Frozen<'_>,
        size: u64,
        again: bool,
    ) -> Result<Vec<Run>> {
        let l1 = self.state.borrow().l1.clone();
        let bytes = l1.len() as u64 * ENTRY_BYTES;
        let (mut switch, places) = Switch::begin(frozen, 2, &[bytes]).await?;
        switch.drops_empty_blocks = again;
        let [l1_place] = places[..] else { unreachable!("as many as asked for") };
        let result = switch.end_at(l1, size, again).await;
        let new = result.map(|l1| NewTables { size, l1, l1_place, snapshots: None });
        self.finish(switch, new).await
    }

    /// Ends the file behind its last used cluster.
    async fn drop_tail(self: &Rc<Self>) -> Result<()> {
        let per_block = self.geometry.block_entries();
        let end = self.state.borrow().allocator.end;
        let mut last = end;
        while last > 0 {
            let cluster = HostCluster(last - 1);
            let found = self.state.borrow().block(cluster.0 / per_block);
            if self.judge(found)? == 0 {
                last = cluster.0 / per_block * per_block;
                continue;
            }
            let count = self.state.borrow().refcount(cluster);
            match count {
                Some(0) => last -= 1,
                Some(_) => break,
                None => {
                    let (slice, _) = self.state.borrow().ref_position(cluster);
                    self.load_ref_slice(slice).await?;
                }
            }
        }
        let bytes = last << self.geometry.cluster_bits;
        if last < end && self.storage.size() > bytes {
            {
                let mut state = self.state.borrow_mut();
                // Clusters in reserve lie behind the new end or are found again.
                for run in std::mem::take(&mut state.allocator.runs) {
                    state.note_free(run.start);
                }
                state.allocator.end = last;
            }
            self.storage.truncate(bytes).await?;
        }
        Ok(())
    }
}

impl Switch<'_> {
    /// The L1 table of a disk that ends at byte `size`; `again`: the table and the cluster at the
    /// end are copied even if they can stay.
    async fn end_at(&mut self, mut l1: Vec<u64>, size: u64, again: bool) -> Result<Vec<u64>> {
        let geometry = self.image.geometry;
        let keep = usize::try_from(geometry.l1_entries(size)).unwrap_or(usize::MAX);
        for (index, entry) in l1.iter_mut().enumerate().skip(keep) {
            let found = self.image.state.borrow().l2_table(index);
            if let Table::Own(host) | Table::Shared(host) = self.image.judge(found)? {
                self.drop_table(host).await?;
                *entry = 0;
            }
        }
        let Some(boundary) = keep.checked_sub(1) else { return Ok(l1) };
        let found = self.image.state.borrow().l2_table(boundary);
        let (host, own) = match self.image.judge(found)? {
            Table::None => return Ok(l1),
            Table::Own(host) => (host, true),
            Table::Shared(host) => (host, false),
        };
        let mut table = self.image.read_l2(host).await?;
        let first = self.image.first_behind(size);
        self.change_entries(&table, &[], first, false).await?;
        let mut changed = again && own;
        for index in first..entries(geometry) {
            changed |= RawEntry::load(&table, index, geometry) != RawEntry::default();
            RawEntry::default().store(&mut table, index, geometry);
        }
        changed |= self.end_cluster(&mut table, first - 1, size, again).await?;
        if changed {
            self.change(geometry.host_cluster(host), false).await?;
            let new = self.put_table(&table).await?;
            if let Some(entry) = l1.get_mut(boundary) {
                *entry = new | COPIED;
            }
        }
        Ok(l1)
    }

    /// Copies the cluster with the disk's end, without the bytes behind it; whether that was
    /// needed.
    async fn end_cluster(
        &mut self,
        table: &mut [u8],
        index: usize,
        size: u64,
        again: bool,
    ) -> Result<bool> {
        let image = self.image;
        let geometry = image.geometry;
        if geometry.external {
            return Ok(false);
        }
        let within = size & (geometry.cluster() - 1);
        let raw = RawEntry::load(table, index, geometry);
        let limit = image.state.borrow().host_limit();
        let entry = Entry::decode(raw, geometry, limit);
        let packed = matches!(entry, Entry::Compressed(_)) && within != 0;
        let old = match entry.subclusters() {
            Some(old) => old,
            None if packed => Subclusters { allocated: ALL, ..Subclusters::default() },
            None => return Ok(false),
        };
        let behind = if within == 0 { 0 } else { touched(geometry, within, geometry.cluster()) };
        let copied_again = again && old.copied && old.allocated != 0;
        if old.allocated & behind == 0 && !copied_again {
            return Ok(false);
        }
        let mut content = match entry {
            Entry::Compressed(packed) => {
                let at = GuestOffset::new(size - within);
                let host = HostOffset::new(packed.host);
                let cluster = PackedCluster { at, host, len: packed.len };
                Rc::clone(image).read_packed(cluster).await?.to_vec()
            }
            _ => image.read_l2(old.host).await?,
        };
        let kept = if within == 0 { geometry.cluster() } else { within };
        content.truncate(usize::try_from(kept).unwrap_or(0));
        content.resize(usize::try_from(geometry.cluster()).unwrap_or(0), 0);
        for cluster in entry.references(geometry).into_iter().flat_map(Run::clusters) {
            self.change(cluster, false).await?;
        }
        let host = self.put_table(&content).await?;
        let whole = within.next_multiple_of(geometry.subcluster());
        let gone = match within {
            0 => 0,
            _ if !geometry.extended || whole == geometry.cluster() => 0,
            _ => touched(geometry, whole, geometry.cluster()),
        };
        let new = Subclusters {
            host,
            copied: true,
            allocated: old.allocated & !gone,
            zero: old.zero | gone,
        };
        Entry::of(new).encode(geometry).store(table, index, geometry);
        Ok(true)
    }
}

impl Image {
    /// The guest cluster with byte `at`.
    pub(super) fn guest_cluster(&self, at: u64) -> GuestCluster {
        GuestCluster(at >> self.geometry.cluster_bits)
    }
}
