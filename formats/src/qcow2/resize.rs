//! Changing the virtual size. The image is frozen meanwhile; making it smaller is `cut_off`.
//!
//! Growing: (1) what is mapped behind the old end is taken away; (2) if L1 is too small: its new
//! clusters are taken and counted, everything dirty is written out, the new table is written,
//! barrier, one sector of the header changes L1 size and offset, the old clusters are freed; (3)
//! the last cluster's bytes behind the old end become zeroes, entries behind it that hide what the
//! layers below hold or that are preallocated are made (with a raw data file all are: what is in
//! it shows, also after a cut); (4) flush; (5) one sector of the header changes the size. Until (5)
//! nobody can see what (3) made.

use std::rc::Rc;

use liveblk_engine::address::{GuestOffset, GuestRange, HostOffset};
use liveblk_engine::buf::Buf;
use liveblk_engine::format::{Below, PackedCluster, Preallocation, Resize, ZeroMode};
use liveblk_engine::{Error, ErrorKind, Result};

use super::datafile::DataPlace;
use super::entry::Entry;
use super::freed::Cause;
use super::freeze::Frozen;
use super::image::Image;
use super::layout::{ENTRY_BYTES, GuestCluster, Run};
use super::state::{Health, Lookup, Meta, Miss, Table};
use super::subcluster::touched;
use super::zero;
use crate::limits::{ALLOC_CLUSTERS_MAX, L1_BYTES_MAX, TABLE_PIECE};
use crate::reason::Reason;

impl Image {
    /// See `Format::resize_with`.
    pub(super) async fn resize(self: Rc<Self>, to: Resize) -> Result<()> {
        self.state.borrow().check_writable()?;
        let refuse = |reason| Err(self.error(reason, "resize"));
        if !to.size.is_multiple_of(512) {
            return refuse(Reason::SizeAlignment);
        }
        if self.geometry.version < 3 && !self.state.borrow().snapshots.is_empty() {
            return refuse(Reason::ResizeSnapshots);
        }
        if self.geometry.l1_entries(to.size).saturating_mul(ENTRY_BYTES) > L1_BYTES_MAX {
            return refuse(Reason::L1Grow);
        }
        let frozen = self.freeze().await?;
        let old = self.state.borrow().header.size;
        if to.preallocation != Preallocation::Off && to.size <= old {
            return refuse(Reason::PreallocationShrink);
        }
        if to.size < old {
            return self.cut_off(&frozen, to.size).await;
        }
        let grown = self.grow(&frozen, old, &to).await;
        if grown.is_err()
            && matches!(self.state.borrow().health, Health::Good)
            && self.maps_beyond(old).await.unwrap_or(false)
        {
            // What cannot be undone now reads as zeroes, and the next change of size takes it away.
            let undone = self.cut_off(&frozen, old).await;
            drop(undone);
        }
        grown
    }

    async fn grow(self: &Rc<Self>, frozen: &Frozen<'_>, old: u64, to: &Resize) -> Result<()> {
        if self.maps_beyond(old).await? {
            self.cut_off(frozen, old).await?;
        }
        let below = to.below.as_ref();
        let reaching = below.filter(|below| below.size > old && to.size > old);
        let whole = old.next_multiple_of(self.geometry.cluster());
        let hidden = reaching.map_or(0, |below| below.size.min(to.size));
        if hidden > whole && self.geometry.version < 3 {
            return Err(self.error(Reason::ZeroNewClusters, "resize"));
        }
        let needed = self.geometry.l1_entries(to.size);
        if needed > self.state.borrow().l1.len() as u64 {
            self.move_l1(needed).await?;
        }
        if to.size > old {
            self.zero_behind(old, below, reaching.is_some()).await?;
            self.fit_data_file(to.size).await?;
        }
        self.hide(whole, hidden).await?;
        let raw = self.state.borrow().data_place == DataPlace::Raw;
        let mode = match to.preallocation {
            // As at creation: a raw data file can be told from the disk at no time.
            Preallocation::Off if raw => Preallocation::Metadata,
            mode => mode,
        };
        if mode != Preallocation::Off {
            self.preallocate(whole, to.size, mode).await?;
        }
        Rc::clone(self).flush().await?;
        self.update_header(|header| {
            header.size = to.size;
            self.apply_bitmaps(header);
        })
        .await
    }

    /// The entry of a cluster for the one who froze the image, in a table of this image alone.
    async fn own_entry(self: &Rc<Self>, at: GuestCluster) -> Result<Entry> {
        loop {
            let found = self.state.borrow_mut().unfrozen(|state| state.lookup(at));
            match self.judge(found)? {
                Lookup::Entry(entry) => return Ok(entry),
                Lookup::Miss(miss) => self.load_here(miss).await?,
                Lookup::Wait => return Err(Error::new(ErrorKind::Busy, "resize")),
            }
        }
    }

    /// Loads or makes what a step missed. The caller holds `growth`.
    async fn load_here(self: &Rc<Self>, miss: Miss) -> Result<()> {
        match miss {
            Miss::L2Table(index) => self.make_l2_table(index).await,
            Miss::Clusters(count) => self.refill(count).await,
            miss => Rc::clone(self).load(miss).await,
        }
    }

    /// Makes the bytes behind `end` zeroes in the cluster with that byte; `reaches`: the layers
    /// below have something there.
    async fn zero_behind(
        self: &Rc<Self>,
        end: u64,
        below: Option<&Below>,
        reaches: bool,
    ) -> Result<()> {
        let cluster = self.geometry.cluster();
        let within = end & (cluster - 1);
        let at = self.guest_cluster(end);
        let index = self.geometry.l1_of_slice(self.geometry.slice_of(at));
        let table = self.state.borrow().l2_table(index);
        if within == 0 || (self.judge(table)? == Table::None && !reaches) {
            return Ok(());
        }
        let entry = self.own_entry(at).await?;
        let behind = touched(self.geometry, within, cluster);
        let old = entry.subclusters();
        let seen = old.is_none_or(|old| {
            let absent = behind & !old.allocated & !old.zero != 0;
            behind & old.allocated != 0 || (absent && reaches)
        });
        if !seen {
            return Ok(());
        }
        if let Entry::Data { host, copied: true } = entry {
            let place = self.geometry.place(host + within).bytes();
            return self.data_storage().write_zeroes(place, cluster - within, false).await;
        }
        let start = end - within;
        let content = self.core.pool().zeroed(usize::try_from(cluster).unwrap_or(0));
        let kept = content.slice(0..usize::try_from(within).unwrap_or(0));
        self.read_current(start, entry, below, &kept).await?;
        let external = self.geometry.external;
        let identity = self.geometry.identity(at, 1);
        let run = if external { identity } else { self.allocate(1).await? };
        let host = self.geometry.host(run.start);
        let place = self.geometry.place(host).bytes();
        if let Err(error) = self.data_storage().write(place, content, false).await {
            if !external {
                self.state.borrow_mut().give_back(run);
            }
            return Err(error);
        }
        self.link(at, host).await?;
        if let Some(old) = entry.references(self.geometry).filter(|_| !external) {
            self.state.borrow_mut().unlink_run(old, Cause::Rewrite);
        }
        Ok(())
    }

    /// Reads what the cluster at byte `start` shows into `buf`.
    async fn read_current(
        self: &Rc<Self>,
        start: u64,
        entry: Entry,
        below: Option<&Below>,
        buf: &Buf,
    ) -> Result<()> {
        if let Entry::Compressed(packed) = entry {
            let (at, host) = (GuestOffset::new(start), HostOffset::new(packed.host));
            let cluster = PackedCluster { at, host, len: packed.len };
            let whole = Rc::clone(self).read_packed(cluster).await?;
            buf.copy_from_buf(&whole.slice(0..buf.len()));
            return Ok(());
        }
        let old = entry.subclusters().unwrap_or_default();
        let sub = self.geometry.subcluster();
        let mut done = 0;
        while done < buf.len() as u64 {
            let len = sub.min(buf.len() as u64 - done);
            let from = usize::try_from(done).unwrap_or(usize::MAX);
            let part = buf.slice(from..from + usize::try_from(len).unwrap_or(0));
            let bit = touched(self.geometry, done, done + len);
            if old.allocated & bit != 0 {
                let place = self.geometry.place(old.host + done).bytes();
                self.data_storage().read(place, part).await?;
            } else if old.zero & bit == 0
                && let Some(below) = below
            {
                let range = GuestRange { start: GuestOffset::new(start + done), len };
                (below.read)(range, part).await?;
            }
            done += len;
        }
        Ok(())
    }

    /// Points cluster `at` to a data cluster of its own.
    async fn link(self: &Rc<Self>, at: GuestCluster, host: u64) -> Result<()> {
        let entry = Entry::Data { host, copied: true };
        while !self.state.borrow_mut().set_entry(at, entry) {
            self.own_entry(at).await?;
        }
        Ok(())
    }

    /// Makes whole clusters from byte `from` to byte `to` read as zeroes, whatever lies below.
    async fn hide(self: &Rc<Self>, from: u64, to: u64) -> Result<()> {
        let cluster = self.geometry.cluster();
        let mut at = from;
        while at < to {
            let count = (to - at).div_ceil(cluster);
            let step = self.state.borrow_mut().unfrozen(|state| {
                let first = GuestCluster(at / cluster);
                state.zero_clusters(first, count, count * cluster, ZeroMode::Unmap)
            });
            match self.judge(step)? {
                zero::Plan::Done { len } => at += len,
                zero::Plan::Miss(miss) => self.load_here(miss).await?,
                _ => return Err(Error::new(ErrorKind::Busy, "resize").at(at)),
            }
        }
        Ok(())
    }

    /// Gives the clusters from byte `from` to byte `to` space that reads as zeroes.
    async fn preallocate(self: &Rc<Self>, from: u64, to: u64, mode: Preallocation) -> Result<()> {
        let cluster = self.geometry.cluster();
        let mut at = from / cluster;
        let end = to.div_ceil(cluster);
        // Where the data file ends at most.
        let behind = to.next_multiple_of(self.geometry.subcluster());
        while at < end {
            let want = (end - at).min(ALLOC_CLUSTERS_MAX);
            let external = self.geometry.external;
            let identity = external.then(|| self.geometry.identity(GuestCluster(at), want));
            let taken = identity.or_else(|| self.state.borrow_mut().take_clusters(want));
            let Some(run) = taken else {
                self.refill(want).await?;
                continue;
            };
            let give_back = |run| {
                if !external {
                    self.state.borrow_mut().give_back(run);
                }
            };
            let most = if external { behind } else { u64::MAX };
            if let Err(error) = self.clear_space(run, mode, most).await {
                give_back(run);
                return Err(error);
            }
            for index in 0..run.count {
                let linked = self.own_entry(GuestCluster(at + index)).await;
                let host = self.geometry.host(run.start.plus(index));
                let linked = match linked {
                    Ok(_) => self.link(GuestCluster(at + index), host).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = linked {
                    let rest = Run { start: run.start.plus(index), count: run.count - index };
                    give_back(rest);
                    return Err(error);
                }
            }
            at += run.count;
        }
        Ok(())
    }

    /// Makes the space of new clusters read as zeroes; the file grows to byte `most` at most, if
    /// nothing has to be written.
    async fn clear_space(self: &Rc<Self>, run: Run, mode: Preallocation, most: u64) -> Result<()> {
        let host = self.geometry.place(self.geometry.host(run.start)).bytes();
        let (bytes, storage) = (run.count * self.geometry.cluster(), self.data_storage());
        match mode {
            Preallocation::Off => {}
            Preallocation::Metadata => {
                // Behind the end of the file nothing has to be written.
                let inside = storage.size().saturating_sub(host).min(bytes);
                storage.write_zeroes(host, inside, true).await?;
                let end = most.min(host + bytes);
                if storage.size() < end {
                    storage.truncate(end).await?;
                }
            }
            Preallocation::Falloc => storage.write_zeroes(host, bytes, false).await?,
            Preallocation::Full => {
                let mut done = 0;
                while done < bytes {
                    let len = (bytes - done).min(TABLE_PIECE as u64);
                    let zeroes = self.core.pool().zeroed(usize::try_from(len).unwrap_or(0));
                    storage.write(host + done, zeroes, false).await?;
                    done += len;
                }
            }
        }
        Ok(())
    }

    /// Moves the L1 table to where it can have `needed` entries. The caller holds `growth`.
    async fn move_l1(self: &Rc<Self>, needed: u64) -> Result<()> {
        let geometry = self.geometry;
        let run = self.allocate_table(geometry.clusters(needed * ENTRY_BYTES)).await?;
        let _tables = self.tables.lock().await;
        let moved = match self.write_l1(run, needed).await {
            Ok(()) => {
                let l1_size = u32::try_from(needed).unwrap_or(u32::MAX);
                let l1_offset = geometry.host(run.start);
                let change = |header: &mut super::header::Header| {
                    header.l1_size = l1_size;
                    header.l1_offset = l1_offset;
                };
                let header = &self.state.borrow().header.clone();
                let clusters = geometry.clusters(u64::from(header.l1_size) * ENTRY_BYTES);
                let start = geometry.host_cluster(header.l1_offset);
                self.update_header(change).await.map(|()| Run { start, count: clusters })
            }
            Err(error) => Err(error),
        };
        let mut state = self.state.borrow_mut();
        let old = match moved {
            Ok(old) => old,
            Err(error) => {
                if matches!(state.health, Health::Good) {
                    state.give_back(run);
                }
                return Err(error);
            }
        };
        state.l1.resize(usize::try_from(needed).unwrap_or(0), 0);
        for cluster in old.clusters() {
            state.metadata.remove(cluster.0);
        }
        for cluster in run.clusters() {
            state.metadata.insert(cluster.0, Meta::L1);
        }
        if old.count > 0 {
            let old = state.freed(old, Cause::Other);
            state.quarantine.push_back((self.epochs.retire(), vec![old]));
        }
        Ok(())
    }

    async fn write_l1(&self, run: Run, needed: u64) -> Result<()> {
        self.write_out().await?;
        let mut table = self.state.borrow().l1.clone();
        let words = (run.count << self.geometry.cluster_bits) / ENTRY_BYTES;
        table.resize(usize::try_from(words.max(needed)).unwrap_or(0), 0);
        self.write_table(self.geometry.host(run.start), &table).await?;
        self.barrier().await
    }
}
