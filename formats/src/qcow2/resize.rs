//! Changing the virtual size.
//!
//! Growing beyond L1 moves the table: (1) its new clusters are taken and counted; (2) everything
//! dirty is written out; (3) the new table is written; (4) barrier; (5) one sector of the header
//! changes size, L1 size and L1 offset together; (6) the old clusters are freed. What the file's
//! last cluster holds behind the old end is zeroed first.

use std::rc::Rc;

use liveblk_engine::format::Resize;
use liveblk_engine::{ErrorKind, Result};

use super::image::Image;
use super::layout::{ENTRY_BYTES, GuestCluster, Run};
use super::state::{Lookup, Meta, Miss, Table};
use crate::limits::L1_BYTES_MAX;
use crate::reason::Reason;

impl Image {
    /// See `Format::resize_with`; the caller has prepared the bitmaps.
    pub(super) async fn resize(self: Rc<Self>, to: Resize) -> Result<()> {
        let size = to.size;
        self.state.borrow().check_writable()?;
        let refuse = |reason| Err(self.error(reason, "resize"));
        if !size.is_multiple_of(512) {
            return refuse(Reason::SizeAlignment);
        }
        let _growth = self.growth.lock().await;
        let old = self.state.borrow().header.size;
        if size < old && !self.is_unmapped_from(size) {
            return refuse(Reason::Shrink);
        }
        if size > old {
            self.zero_behind(old).await?;
            self.fit_data_file(size).await?;
        }
        let needed = self.geometry.l1_entries(size);
        if needed * ENTRY_BYTES > L1_BYTES_MAX {
            return refuse(Reason::SizeTooBig);
        }
        if needed > self.state.borrow().l1.len() as u64 {
            return self.move_l1(size, needed).await;
        }
        Rc::clone(&self).flush().await?;
        self.update_header(|header| {
            header.size = size;
            self.apply_bitmaps(header);
        })
        .await?;
        self.fit_data_file(size).await
    }

    /// Whether no L2 table covers anything from byte `size` on.
    fn is_unmapped_from(&self, size: u64) -> bool {
        let state = self.state.borrow();
        let first = usize::try_from(size / self.geometry.l2_span()).unwrap_or(usize::MAX);
        state.l1.get(first..).unwrap_or_default().iter().all(|entry| *entry == 0)
    }

    /// Zeroes what the cluster with byte `end` holds from there on.
    async fn zero_behind(self: &Rc<Self>, end: u64) -> Result<()> {
        let cluster = self.geometry.cluster();
        let head = end & (cluster - 1);
        let at = GuestCluster(end >> self.geometry.cluster_bits);
        let slice = self.geometry.slice_of(at);
        let table = self.state.borrow().l2_table(self.geometry.l1_of_slice(slice));
        if head == 0 || self.judge(table)? == Table::None {
            return Ok(());
        }
        loop {
            let found = self.state.borrow().lookup(at);
            match self.judge(found)? {
                Lookup::Entry(entry) => {
                    // Subclusters without data do not care what their place holds.
                    let old = entry.subclusters().filter(|old| old.copied && old.allocated != 0);
                    let Some(old) = old else { return Ok(()) };
                    let host = old.host + head;
                    let host = self.geometry.place(host).bytes();
                    let data = self.data_storage();
                    return data.write_zeroes(host, cluster - head, false).await;
                }
                Lookup::Miss(miss @ Miss::L2Slice(_)) => Rc::clone(self).load(miss).await?,
                Lookup::Miss(_) => {
                    self.make_l2_table(self.geometry.l1_of_slice(slice) as u64).await?
                }
                Lookup::Wait => {
                    let ended = || !self.state.borrow().pending.contains_key(&at.0);
                    self.pending_ended.until(ended).await;
                }
            }
        }
    }

    async fn move_l1(self: &Rc<Self>, size: u64, needed: u64) -> Result<()> {
        let geometry = self.geometry;
        let run = self.allocate(geometry.clusters(needed * ENTRY_BYTES)).await?;
        let _tables = self.tables.lock().await;
        let written = self.write_l1(run, needed).await;
        if let Err(error) = written {
            self.state.borrow_mut().give_back(run);
            return Err(error);
        }
        let old = {
            let header = &self.state.borrow().header;
            let clusters = geometry.clusters(u64::from(header.l1_size) * ENTRY_BYTES);
            Run { start: geometry.host_cluster(header.l1_offset), count: clusters }
        };
        let moved = self.update_header(|header| {
            header.size = size;
            header.l1_size = u32::try_from(needed).unwrap_or(u32::MAX);
            header.l1_offset = geometry.host(run.start);
            self.apply_bitmaps(header);
        });
        if let Err(error) = moved.await {
            if error.kind() == ErrorKind::NoSpace {
                self.state.borrow_mut().give_back(run);
            }
            return Err(error);
        }
        let mut state = self.state.borrow_mut();
        state.l1.resize(usize::try_from(needed).unwrap_or(0), 0);
        for cluster in old.clusters() {
            state.metadata.remove(&cluster.0);
        }
        for cluster in run.clusters() {
            state.metadata.insert(cluster.0, Meta::L1);
        }
        if old.count > 0 {
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
