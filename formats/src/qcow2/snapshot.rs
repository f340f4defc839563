//! Snapshots inside the image: list, create, delete, apply.
//!
//! Each change freezes the image and is one switch of all tables (`switch`), so at any cut the file
//! is the image before or after it. What is shared with a snapshot has no COPIED bit: the next
//! write copies the L2 table and the cluster.
//!
//! - create: L2 tables of the disk alone are written anew without COPIED bits, for both; all that
//!   the disk refers to is counted once more.
//! - delete: all that the snapshot refers to is counted once less; L2 tables of the disk in which
//!   that makes COPIED bits true are written anew.
//! - apply: what the snapshot refers to is counted once more, what the disk referred to once less;
//!   the disk has the snapshot's size. The machine state that a snapshot may hold behind the disk's
//!   end stays with the snapshot.

use std::rc::Rc;

use liveblk_engine::format::{
    Format, InternalSnapshots, LocalFuture, SnapshotChoice, SnapshotInfo,
};
use liveblk_engine::{Error, ErrorKind, Result};

use super::claims::Claims;
use super::freed::Cause;
use super::image::Image;
use super::layout::{
    COPIED, ENTRY_BYTES, Geometry, HostCluster, INCOMPATIBLE_DATA_FILE, OFFSET_MASK, Run,
};
use super::open::tables_of;
use super::snapshot_count::clear_copied;
use super::snapshot_table::{Snapshot, encode};
use super::state::{Meta, State, Table};
use super::switch::Switch;
use crate::reason::Reason;

/// The ability of an image to hold snapshots.
pub(super) struct Snapshots(pub(super) Rc<Image>);

impl InternalSnapshots for Snapshots {
    fn list(&self) -> Vec<SnapshotInfo> {
        let state = self.0.state.borrow();
        state.snapshots.iter().map(|snapshot| snapshot.info(state.header.size)).collect()
    }

    fn create(&self, info: SnapshotInfo) -> LocalFuture<'static, Result<SnapshotInfo>> {
        self.0.run(Rc::clone(&self.0).create_snapshot(info))
    }

    fn delete(&self, id_or_name: &str) -> LocalFuture<'static, Result<()>> {
        self.0.run(Rc::clone(&self.0).delete_snapshot(id_or_name.to_owned()))
    }

    fn apply(&self, id_or_name: &str) -> LocalFuture<'static, Result<()>> {
        self.0.run(Rc::clone(&self.0).apply_snapshot(id_or_name.to_owned()))
    }

    fn view(&self, which: SnapshotChoice) -> LocalFuture<'static, Result<Rc<dyn Format>>> {
        self.0.run(Rc::clone(&self.0).view_snapshot(which))
    }
}

/// A new set of tables, ready to be published.
pub(super) struct NewTables {
    pub(super) size: u64,
    pub(super) l1: Vec<u64>,
    pub(super) l1_place: Run,
    /// The snapshots and the place of their table, if they change too.
    pub(super) snapshots: Option<(Vec<Snapshot>, Run)>,
}

impl Image {
    fn check_snapshots(&self, op: &'static str) -> Result<()> {
        let state = self.state.borrow();
        state.check_writable()?;
        if state.header.incompatible & INCOMPATIBLE_DATA_FILE != 0 {
            return Err(self.error(Reason::SnapshotDataFile, op));
        }
        Ok(())
    }

    /// The snapshot with this id, else the one with this name.
    pub(super) fn find_snapshot(&self, text: &str, op: &'static str) -> Result<(usize, Snapshot)> {
        let state = self.state.borrow();
        let list = &state.snapshots;
        let at = list.iter().position(|snapshot| snapshot.has_id(text));
        let at = at.or_else(|| list.iter().position(|snapshot| snapshot.has_name(text)));
        let found = at.and_then(|at| Some((at, list.get(at)?.clone())));
        found.ok_or_else(|| self.error(Reason::SnapshotNotFound, op))
    }

    async fn create_snapshot(self: Rc<Self>, info: SnapshotInfo) -> Result<SnapshotInfo> {
        self.check_snapshots("create a snapshot")?;
        let frozen = self.freeze().await?;
        let (mut list, l1, size) = {
            let state = self.state.borrow();
            let mut list = state.snapshots.clone();
            list.push(state.new_snapshot(info, &self)?);
            (list, state.l1.clone(), state.header.size)
        };
        let encoded = encode(&list).map_err(|reason| self.error(reason, "create a snapshot"))?;
        let own = l1.iter().filter(|raw| **raw & COPIED != 0).count() as u64;
        let bytes = l1.len() as u64 * ENTRY_BYTES;
        let tables = [bytes, bytes, encoded.len() as u64];
        let (mut switch, places) = Switch::begin(&frozen, own, &tables).await?;
        let [l1_place, copy, table] = places[..] else { unreachable!("as many as asked for") };
        let info = list.last_mut().map(|new| {
            new.l1_offset = self.geometry.host(copy.start);
            new.l1_size = u32::try_from(l1.len()).unwrap_or(u32::MAX);
            new.info(size)
        });
        let shared = match switch.share_all(l1).await {
            Ok(l1) => self.write_table(switch_host(&self, copy), &l1).await.map(|()| l1),
            Err(error) => Err(error),
        };
        let new = shared.map(|l1| {
            let snapshots = Some((list, table));
            NewTables { size, l1, l1_place, snapshots }
        });
        self.finish(switch, new).await?;
        self.guard_snapshots().await;
        Ok(info.unwrap_or_default())
    }

    async fn delete_snapshot(self: Rc<Self>, text: String) -> Result<()> {
        self.check_snapshots("delete a snapshot")?;
        let frozen = self.freeze().await?;
        let (at, snapshot) = self.find_snapshot(&text, "delete a snapshot")?;
        self.check_not_viewed(&snapshot)?;
        let old = self.snapshot_l1(&snapshot).await?;
        let (mut list, l1, size) = {
            let state = self.state.borrow();
            (state.snapshots.clone(), state.l1.clone(), state.header.size)
        };
        list.remove(at);
        let encoded = encode(&list).map_err(|reason| self.error(reason, "delete a snapshot"))?;
        let both = l1.iter().zip(&old).filter(|(ours, theirs)| **ours != 0 && **theirs != 0);
        let tables = [l1.len() as u64 * ENTRY_BYTES, encoded.len() as u64];
        let (mut switch, places) = Switch::begin(&frozen, both.count() as u64, &tables).await?;
        let [l1_place, table] = places[..] else { unreachable!("as many as asked for") };
        let result = switch.drop_snapshot(&snapshot, &old, l1).await;
        let new = result.map(|l1| NewTables { size, l1, l1_place, snapshots: Some((list, table)) });
        let punch = self.finish(switch, new).await?;
        self.leases_end().await;
        self.punch_all(punch, Cause::Snapshot).await;
        self.guard_snapshots().await;
        Ok(())
    }

    async fn apply_snapshot(self: Rc<Self>, text: String) -> Result<()> {
        self.check_snapshots("apply a snapshot")?;
        if self.state.borrow().header.bitmaps_valid() {
            return Err(self.error(Reason::ActiveBitmaps, "apply a snapshot"));
        }
        let frozen = self.freeze().await?;
        let (_, snapshot) = self.find_snapshot(&text, "apply a snapshot")?;
        let mut target = self.snapshot_l1(&snapshot).await?;
        let (old, size) = {
            let state = self.state.borrow();
            (state.l1.clone(), snapshot.info(state.header.size).disk_size)
        };
        let entries = self.geometry.l1_entries(size);
        if entries > target.len() as u64 || !size.is_multiple_of(512) {
            let reason = Reason::BadEntry("Snapshot L1", entries, u64::from(snapshot.l1_size));
            return self.judge(Err(reason));
        }
        target.truncate(usize::try_from(entries.max(1)).unwrap_or(0));
        let bytes = target.len() as u64 * ENTRY_BYTES;
        let (mut switch, places) = Switch::begin(&frozen, 0, &[bytes]).await?;
        let [l1_place] = places[..] else { unreachable!("as many as asked for") };
        let result = switch.replace(target, &old).await;
        let new = result.map(|l1| NewTables { size, l1, l1_place, snapshots: None });
        let punch = self.finish(switch, new).await?;
        // Reads of the old disk may be under way.
        self.leases_end().await;
        self.punch_all(punch, Cause::Snapshot).await;
        self.guard_snapshots().await;
        Ok(())
    }

    /// Writes and publishes the new tables, or undoes everything. Answers what became free.
    pub(super) async fn finish(
        self: &Rc<Self>,
        mut switch: Switch<'_>,
        new: Result<NewTables>,
    ) -> Result<Vec<Run>> {
        let written = match new {
            Ok(new) => self.write_new(&mut switch, &new).await.map(|()| new),
            Err(error) => Err(error),
        };
        let NewTables { size, l1, l1_place, snapshots } = match written {
            Ok(new) => new,
            Err(error) => {
                switch.undo().await;
                return Err(error);
            }
        };
        let l1_offset = self.geometry.host(l1_place.start);
        let l1_size = u32::try_from(l1.len()).unwrap_or(u32::MAX);
        let place = snapshots.as_ref().map(|(list, place)| {
            let count = u32::try_from(list.len()).unwrap_or(u32::MAX);
            (count, self.geometry.host(place.start))
        });
        let change = move |header: &mut super::header::Header| {
            header.size = size;
            header.l1_offset = l1_offset;
            header.l1_size = l1_size;
            if let Some((count, offset)) = place {
                header.nb_snapshots = count;
                header.snapshots_offset = offset;
            }
        };
        let follow = move |state: &mut State| {
            state.l1 = l1;
            if let Some((list, _)) = snapshots {
                state.snapshots = list;
            }
            state.claim_again();
        };
        let free = switch.publish(change, follow).await?;
        Ok(free)
    }

    /// Writes L1 and snapshot table, and counts their old places as free.
    async fn write_new(self: &Rc<Self>, switch: &mut Switch<'_>, new: &NewTables) -> Result<()> {
        self.write_table(switch_host(self, new.l1_place), &new.l1).await?;
        let (old_l1, old_table) = self.state.borrow().places();
        switch.release(old_l1).await?;
        if let Some((list, place)) = &new.snapshots {
            let bytes = encode(list).map_err(|reason| self.error(reason, "write a table"))?;
            self.write_bytes(switch_host(self, *place), &bytes).await?;
            switch.release(old_table).await?;
        }
        Ok(())
    }
}

fn switch_host(image: &Image, place: Run) -> u64 {
    image.geometry.host(place.start)
}

impl Switch<'_> {
    /// Makes everything that the disk refers to shared; the L1 table without COPIED bits.
    async fn share_all(&mut self, mut l1: Vec<u64>) -> Result<Vec<u64>> {
        for (index, entry) in l1.iter_mut().enumerate().filter(|(_, entry)| **entry != 0) {
            let found = self.image.state.borrow().l2_table(index);
            let (host, own) = match self.image.judge(found)? {
                Table::None => continue,
                Table::Own(host) => (host, true),
                Table::Shared(host) => (host, false),
            };
            let mut table = self.image.read_l2(host).await?;
            self.change_entries(&table, &[], 0, true).await?;
            let cleared = clear_copied(&mut table, self.image.geometry);
            let cluster = self.image.geometry.host_cluster(host);
            if own {
                self.change(cluster, false).await?;
                *entry = self.put_table(&table).await?;
                self.change(self.image.geometry.host_cluster(*entry), true).await?;
            } else {
                self.change(cluster, true).await?;
                *entry = host;
                if cleared {
                    self.image.write_bytes(host, &table).await?;
                }
            }
        }
        Ok(l1)
    }

    /// Takes a snapshot's references away; the disk's L1 table with the COPIED bits that are true
    /// then.
    async fn drop_snapshot(
        &mut self,
        snapshot: &Snapshot,
        old: &[u64],
        mut l1: Vec<u64>,
    ) -> Result<Vec<u64>> {
        let geometry = self.image.geometry;
        for (index, raw) in old.iter().enumerate() {
            let found = self.image.snapshot_l2(index, *raw);
            let Some(host) = self.image.judge(found)? else { continue };
            let table = self.image.read_l2(host).await?;
            self.change_entries(&table, &[], 0, false).await?;
            self.change(geometry.host_cluster(host), false).await?;
            let Some(entry) = l1.get_mut(index).filter(|entry| **entry != 0) else { continue };
            let found = self.image.state.borrow().l2_table(index);
            let ours = match self.image.judge(found)? {
                Table::None => continue,
                Table::Own(ours) | Table::Shared(ours) => ours,
            };
            let cluster = geometry.host_cluster(ours);
            let once = self.count(cluster).await? == 1;
            *entry = ours | if once { COPIED } else { 0 };
            if !once {
                continue;
            }
            let mut table = if ours == host { table } else { self.image.read_l2(ours).await? };
            if self.renew_copied(&mut table).await? {
                self.change(cluster, false).await?;
                *entry = self.put_table(&table).await? | COPIED;
            }
        }
        let clusters = geometry.clusters(u64::from(snapshot.l1_size) * ENTRY_BYTES);
        let start = geometry.host_cluster(snapshot.l1_offset);
        self.release(Run { start, count: clusters }).await?;
        Ok(l1)
    }

    /// Counts what `target` refers to and what `old` does not any more; `target` without COPIED
    /// bits.
    async fn replace(&mut self, mut target: Vec<u64>, old: &[u64]) -> Result<Vec<u64>> {
        let geometry = self.image.geometry;
        // Clusters of packed data move from one entry to another.
        self.defers = true;
        for index in 0..target.len().max(old.len()) {
            let raw = target.get(index).copied().unwrap_or(0);
            let found = self.image.snapshot_l2(index, raw);
            let theirs = self.image.judge(found)?;
            let found = self.image.state.borrow().l2_table(index);
            let ours = match self.image.judge(found)? {
                Table::None => None,
                Table::Own(host) | Table::Shared(host) => Some(host),
            };
            if let Some(entry) = target.get_mut(index) {
                *entry = theirs.unwrap_or(0) & OFFSET_MASK;
            }
            if theirs == ours {
                continue;
            }
            let before = match ours {
                Some(host) => self.image.read_l2(host).await?,
                None => Vec::new(),
            };
            let mut after = Vec::new();
            if let Some(host) = theirs {
                let mut table = self.image.read_l2(host).await?;
                after.clone_from(&table);
                self.change_entries(&table, &before, 0, true).await?;
                self.change(geometry.host_cluster(host), true).await?;
                if clear_copied(&mut table, geometry) {
                    // Nobody looks at these bits in a snapshot's table.
                    self.image.write_bytes(host, &table).await?;
                }
            }
            if let Some(host) = ours {
                self.change_entries(&before, &after, 0, false).await?;
                self.change(geometry.host_cluster(host), false).await?;
            }
        }
        self.check_deferred()?;
        Ok(target)
    }

    /// Takes one reference from the L2 table at `host` and from everything in it.
    pub(super) async fn drop_table(&mut self, host: u64) -> Result<()> {
        let table = self.image.read_l2(host).await?;
        self.change_entries(&table, &[], 0, false).await?;
        self.change(self.image.geometry.host_cluster(host), false).await?;
        Ok(())
    }
}

impl State {
    /// The entry of a new snapshot of the disk as it is.
    fn new_snapshot(&self, info: SnapshotInfo, image: &Image) -> Result<Snapshot> {
        let id = if info.id.is_empty() {
            let highest = self.snapshots.iter().map(Snapshot::number).max().unwrap_or(0);
            highest.saturating_add(1).to_string()
        } else {
            info.id.clone()
        };
        if self.snapshots.iter().any(|snapshot| snapshot.has_id(&id)) {
            return Err(Error::new(ErrorKind::AlreadyExists, "create a snapshot"));
        }
        let info = SnapshotInfo { id, disk_size: self.header.size, vm_state_size: 0, ..info };
        Snapshot::new(&info).map_err(|reason| image.error(reason, "create a snapshot"))
    }

    /// The clusters of the L1 table and of the snapshot table.
    fn places(&self) -> (Run, Run) {
        let geometry = self.geometry;
        let run = |offset: u64, bytes: u64| Run {
            start: geometry.host_cluster(offset),
            count: geometry.clusters(bytes),
        };
        let l1 = run(self.header.l1_offset, u64::from(self.header.l1_size) * ENTRY_BYTES);
        let table = encode(&self.snapshots).map_or(0, |bytes| bytes.len() as u64);
        (l1, run(self.header.snapshots_offset, table))
    }

    /// Enters the clusters of the current tables as metadata, in place of the ones before.
    fn claim_again(&mut self) {
        self.metadata.forget_mapping();
        let (l1, _) = self.places();
        for cluster in l1.clusters() {
            self.metadata.claim(cluster.0, Meta::L1);
        }
        let tables = tables_of(&self.l1, OFFSET_MASK, self.geometry);
        self.metadata.claim_tables(Meta::L2, tables);
        let offset = self.header.snapshots_offset;
        let end = self.allocator.end << self.geometry.cluster_bits;
        claim_snapshots(&mut self.metadata, self.geometry, offset, &self.snapshots, end);
    }
}

/// Enters the snapshot table and the L1 tables of snapshots as metadata, of a file of `size` bytes.
pub(super) fn claim_snapshots(
    metadata: &mut Claims,
    geometry: Geometry,
    offset: u64,
    list: &[Snapshot],
    size: u64,
) {
    // Tables that lie over each other, in a file that lies, must not cost more than it has.
    let mut left = geometry.clusters(size);
    let mut claim = |offset: u64, bytes: u64| {
        let HostCluster(first) = geometry.host_cluster(offset);
        let count = geometry.clusters(bytes).min(left);
        left -= count;
        for cluster in first..first.saturating_add(count) {
            metadata.claim(cluster, Meta::Snapshots);
        }
    };
    claim(offset, encode(list).map_or(0, |bytes| bytes.len() as u64));
    for snapshot in list {
        let bytes = u64::from(snapshot.l1_size) * ENTRY_BYTES;
        if bytes <= crate::limits::L1_BYTES_MAX && geometry.aligned(snapshot.l1_offset) {
            claim(snapshot.l1_offset, bytes);
        }
    }
}
