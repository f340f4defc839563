//! Everything of an open image that changes, in one place; synchronous, no I/O.
//!
//! Borrowed for the length of one function, never across an await.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use liveblk_engine::format::MissId;
use liveblk_engine::{Error, ErrorKind, Result};

use super::cache::{Cache, IntMap};
use super::claims::Claims;
use super::counts;
use super::datafile::DataPlace;
use super::entry::{Entry, RawEntry};
use super::freed::{Freed, Passes};
use super::header::Header;
use super::layout::{
    COMPRESSED, COPIED, ENTRY_BYTES, Geometry, GuestCluster, HostCluster, OFFSET_MASK,
    REFTABLE_MASK, Run, SECTOR,
};
use super::mapped::Mapped;
use super::overlap::Overlap;
use super::packed::Packed;
use super::snapshot_table::Snapshot;
use super::unpack::Unpacked;
use super::words::Words;
use crate::limits::BEYOND_END_MAX;
use crate::reason::Reason;

/// What a cluster of the file holds, if it is metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meta {
    Header,
    L1,
    RefTable,
    RefBlock(u64),
    L2(u64),
    /// The snapshot table or a snapshot's L1 table.
    Snapshots,
    /// The bitmap directory.
    Bitmaps,
}

/// Whether the image takes writes.
#[derive(Clone, Debug)]
pub(super) enum Health {
    Good,
    /// A metadata write or flush failed in a way that leaves the file's state unknown.
    Poisoned(Error),
    /// Metadata that contradicts itself was met.
    Corrupt(Error),
}

/// Something that is loaded or made by an image task, as a [`MissId`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Miss {
    /// A slice of an L2 table.
    L2Slice(u64),
    /// A whole L2 table that has to be made (or copied, if shared), by L1 index.
    L2Table(u64),
    /// A run of free clusters.
    Clusters(u64),
    /// A slice of a refcount block.
    RefSlice(u64),
    /// The mark in the file that bitmaps are in use.
    Bitmaps,
}

impl Miss {
    const SHIFT: u32 = 60;

    pub(super) fn id(self) -> MissId {
        let (tag, value) = match self {
            Self::L2Slice(slice) => (1, slice),
            Self::L2Table(index) => (2, index),
            Self::Clusters(count) => (3, count),
            Self::RefSlice(slice) => (4, slice),
            Self::Bitmaps => (15, 0),
        };
        MissId(tag << Self::SHIFT | value)
    }

    pub(super) fn of(id: MissId) -> Option<Self> {
        let value = id.0 & ((1 << Self::SHIFT) - 1);
        match id.0 >> Self::SHIFT {
            1 => Some(Self::L2Slice(value)),
            2 => Some(Self::L2Table(value)),
            3 => Some(Self::Clusters(value)),
            4 => Some(Self::RefSlice(value)),
            15 => Some(Self::Bitmaps),
            _ => None,
        }
    }
}

/// Where an L1 entry leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    None,
    /// A table of this image alone.
    Own(u64),
    /// A table that something else refers to as well: copy before change.
    Shared(u64),
}

/// The answer of a lookup on behalf of a write.
pub(super) enum Lookup {
    Entry(Entry),
    Miss(Miss),
    Wait,
}

/// A write that has clusters but is not visible yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct PendingWrite {
    pub(super) first: GuestCluster,
    pub(super) run: Run,
    /// Whether the run was allocated for this write (not kept from the old entries).
    pub(super) fresh: bool,
    /// The bytes from the start of the first cluster that hold data when the write completes.
    pub(super) span: (u64, u64),
    /// The clusters that lose a reference when the write completes.
    pub(super) old: Option<Run>,
    /// Where the bytes are, if they are packed; then the write is one whole cluster.
    pub(super) packed: Option<Packed>,
    /// Whole clusters whose bytes were given back: they stay, and read as zeroes.
    pub(super) zeroes: bool,
}

/// What of a cluster has pending writes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Busy {
    pub(super) writes: u32,
    /// The subclusters concerned.
    pub(super) bits: u32,
    /// Whether one of them puts the cluster into another place: then nothing else goes on in it.
    pub(super) moves: bool,
}

/// Free clusters that are known and reserved, and where to look for more.
#[derive(Debug, Default)]
pub(super) struct Allocator {
    /// Reserved runs: refcount 0, their refcount slices cached, found by no other search.
    pub(super) runs: Vec<Run>,
    /// The first cluster behind everything known.
    pub(super) end: u64,
    /// Where the search for one free cluster, and for several, goes on.
    pub(super) scan: [u64; 2],
    /// Where the next packed cluster goes, in a host cluster that is used in part.
    pub(super) packing: Option<u64>,
    /// A refill has just ended: a shorter run than wanted is good enough.
    pub(super) fresh: bool,
}

/// Which flush runs have begun and ended.
#[derive(Debug)]
pub(super) struct FlushRuns {
    pub(super) started: u64,
    pub(super) finished: u64,
    pub(super) running: bool,
    /// An image-started flush is on its way.
    pub(super) own: bool,
    pub(super) result: Result<()>,
}

/// The changing part of an open image.
#[derive(Debug)]
pub(super) struct State {
    pub(super) geometry: Geometry,
    pub(super) header: Header,
    pub(super) data_place: DataPlace,
    pub(super) writable: bool,
    pub(super) health: Health,
    pub(super) l1: Vec<u64>,
    /// Changed sectors of the L1 table.
    pub(super) l1_dirty: BTreeSet<u64>,
    pub(super) reftable: Words,
    /// Changed sectors of the refcount table.
    pub(super) reftable_dirty: BTreeSet<u64>,
    pub(super) l2: Cache,
    pub(super) refs: Cache,
    pub(super) metadata: Claims,
    /// Which of it guest data may not be written into.
    pub(super) overlap: Overlap,
    /// The L2 tables of snapshots, if guest data may not be written into them either.
    pub(super) inactive_l2: IntMap<()>,
    /// For which freed clusters space goes back to the storage.
    pub(super) passes: Passes,
    /// What guests give up stays allocated where it is.
    pub(super) no_unref: bool,
    /// Clusters that are known to hold guest data.
    pub(super) mapped: Mapped,
    /// Guest clusters with pending writes.
    pub(super) pending: BTreeMap<u64, Busy>,
    pub(super) writes: IntMap<PendingWrite>,
    pub(super) next_token: u64,
    pub(super) allocator: Allocator,
    pub(super) loading: BTreeSet<Miss>,
    pub(super) unpacked: Unpacked,
    /// Clusters whose unlink is not durable yet.
    pub(super) unlinked: Vec<Freed>,
    /// Clusters whose unlink is durable, with the epoch that may still use them.
    pub(super) quarantine: VecDeque<(u64, Vec<Freed>)>,
    /// Clusters that lost their reference and are used by nobody.
    pub(super) released: Vec<Run>,
    pub(super) flushes: FlushRuns,
    /// Who wants that no entry changes for now (see `freeze`).
    pub(super) frozen: u32,
    /// The snapshots inside the image, in the order of their table.
    pub(super) snapshots: Vec<Snapshot>,
    /// Write-outs in progress: while there is one, "nothing dirty" does not mean "durable".
    pub(super) write_outs: u32,
    #[cfg(feature = "planted-bugs")]
    pub(super) reuses_at_once: bool,
}

impl State {
    /// Fails if the image does not take writes.
    pub(super) fn check_writable(&self) -> Result<()> {
        match &self.health {
            Health::Corrupt(cause) => Err(cause.clone()),
            Health::Poisoned(cause) => {
                Err(Error::new(ErrorKind::Poisoned, "write").with_source(cause.clone()))
            }
            Health::Good if !self.writable => Err(Error::new(ErrorKind::ReadOnly, "write")),
            Health::Good => Ok(()),
        }
    }

    /// Remembers the first cause why the image takes no more writes.
    pub(super) fn poison(&mut self, cause: &Error) {
        if matches!(self.health, Health::Good) {
            tracing::error!(%cause, "image takes no more writes");
            self.health = Health::Poisoned(cause.clone());
        }
    }

    /// Host offsets at or beyond this are nonsense.
    pub(super) fn host_limit(&self) -> u64 {
        if self.geometry.external {
            // The only right place follows from the guest's offset.
            return u64::MAX;
        }
        let end = self.allocator.end << self.geometry.cluster_bits;
        end.saturating_add(BEYOND_END_MAX)
    }

    /// Where L1 entry `index` leads; an error if the entry cannot be.
    pub(super) fn l2_table(&self, index: usize) -> Result<Table, Reason> {
        let raw = self.l1.get(index).copied().unwrap_or(0);
        if raw == 0 {
            return Ok(Table::None);
        }
        let host = raw & OFFSET_MASK;
        let at = index as u64;
        let own = self.metadata.is(self.geometry.host_cluster(host).0, Meta::L2(at));
        if raw & !(OFFSET_MASK | COPIED) != 0
            || host == 0
            || !self.geometry.aligned(host)
            || host >= self.host_limit()
            || !own
        {
            return Err(Reason::BadEntry("L1", at, raw));
        }
        Ok(if raw & COPIED != 0 { Table::Own(host) } else { Table::Shared(host) })
    }

    /// Where the refcount block `index` lies (0: none); an error if the entry cannot be.
    pub(super) fn block(&self, index: u64) -> Result<u64, Reason> {
        let raw = self.reftable.get(index);
        if raw == 0 {
            return Ok(0);
        }
        let host = raw & REFTABLE_MASK;
        let cluster = self.geometry.host_cluster(host).0;
        let own = self.metadata.is(cluster, Meta::RefBlock(index));
        if host != raw || !self.geometry.aligned(host) || host >= self.host_limit() || !own {
            return Err(Reason::BadEntry("Refcount table", index, raw));
        }
        Ok(host)
    }

    /// The decoded entry of a cached slice.
    pub(super) fn decode(&self, bytes: &[u8], index: usize) -> Entry {
        let raw = RawEntry::load(bytes, index, self.geometry);
        Entry::decode(raw, self.geometry, self.host_limit())
    }

    /// The entry of `cluster` for somebody who is about to change it.
    pub(super) fn lookup(&self, cluster: GuestCluster) -> Result<Lookup, Reason> {
        if self.frozen > 0 || self.pending.contains_key(&cluster.0) {
            return Ok(Lookup::Wait);
        }
        self.lookup_now(cluster)
    }

    /// The same for a write to the subclusters `touched`: others of the cluster may have pending
    /// writes, if these leave the cluster where it is.
    pub(super) fn lookup_beside(
        &self,
        cluster: GuestCluster,
        touched: u32,
    ) -> Result<Lookup, Reason> {
        if self.frozen > 0 {
            return Ok(Lookup::Wait);
        }
        match self.pending.get(&cluster.0) {
            Some(busy) if busy.moves || busy.bits & touched != 0 => Ok(Lookup::Wait),
            _ => self.lookup_now(cluster),
        }
    }

    fn lookup_now(&self, cluster: GuestCluster) -> Result<Lookup, Reason> {
        let slice = self.geometry.slice_of(cluster);
        let index = self.geometry.l1_of_slice(slice);
        if !matches!(self.l2_table(index)?, Table::Own(_)) {
            return Ok(Lookup::Miss(Miss::L2Table(index as u64)));
        }
        let Some(bytes) = self.l2.get(slice) else {
            return Ok(Lookup::Miss(Miss::L2Slice(slice)));
        };
        let index = self.geometry.slice_index(cluster);
        let entry = self.decode(bytes, index);
        let guest = cluster.0 << self.geometry.cluster_bits;
        if entry == Entry::Damaged {
            let raw = RawEntry::load(bytes, index, self.geometry);
            return Err(Reason::BadEntry("L2", guest, raw.word));
        }
        match entry {
            Entry::Compressed(packed) => {
                if let Some(host) = self.metadata_in(packed) {
                    return Err(Reason::Overlap(host));
                }
            }
            entry => {
                if let Some(host) = entry.host() {
                    self.check_place(cluster, host)?;
                }
            }
        }
        Ok(Lookup::Entry(entry))
    }

    /// Whether the cluster at byte `host` holds metadata that is guarded.
    pub(super) fn is_metadata(&self, host: u64) -> bool {
        let cluster = self.geometry.host_cluster(host).0;
        let meta = self.metadata.get(cluster);
        meta.is_some_and(|meta| self.overlap.guards(meta))
            || self.inactive_l2.contains_key(&cluster)
    }

    /// The first cluster that a packed one would share with metadata.
    pub(super) fn metadata_in(&self, packed: Packed) -> Option<u64> {
        let mut hosts = packed.run(self.geometry).clusters().map(|at| self.geometry.host(at));
        hosts.find(|host| self.is_metadata(*host))
    }

    /// Changes the entry of `cluster`; false if its slice is not cached.
    pub(super) fn set_entry(&mut self, cluster: GuestCluster, entry: Entry) -> bool {
        self.set_raw_entry(cluster, entry.encode(self.geometry))
    }

    /// Changes the words of the entry of `cluster`; false if its slice is not cached.
    pub(super) fn set_raw_entry(&mut self, cluster: GuestCluster, raw: RawEntry) -> bool {
        let index = self.geometry.slice_index(cluster);
        let Some(bytes) = self.l2.change(self.geometry.slice_of(cluster)) else { return false };
        raw.store(bytes, index, self.geometry);
        let own = raw.word & COMPRESSED == 0 && !self.geometry.external;
        if own && raw.word & OFFSET_MASK != 0 {
            self.mapped.insert(self.geometry.host_cluster(raw.word & OFFSET_MASK));
        }
        true
    }

    /// Changes an L1 entry in memory; the next flush writes it.
    pub(super) fn set_l1(&mut self, index: u64, raw: u64) {
        if let Some(entry) = usize::try_from(index).ok().and_then(|at| self.l1.get_mut(at)) {
            *entry = raw;
            self.l1_dirty.insert(index * ENTRY_BYTES / SECTOR as u64);
        }
    }

    /// Changes a refcount table entry in memory; the next flush writes it.
    pub(super) fn set_block(&mut self, index: u64, raw: u64) {
        if self.reftable.set(index, raw) {
            self.reftable_dirty.insert(index * ENTRY_BYTES / SECTOR as u64);
        }
    }

    /// The refcount slice that counts `cluster`, and the position in it.
    pub(super) fn ref_position(&self, cluster: HostCluster) -> (u64, u64) {
        let entries = self.geometry.ref_slice_entries();
        (cluster.0 / entries, cluster.0 % entries)
    }

    /// The refcount of `cluster`, if its slice is cached.
    pub(super) fn refcount(&self, cluster: HostCluster) -> Option<u64> {
        let (slice, index) = self.ref_position(cluster);
        Some(counts::get(self.refs.get(slice)?, self.geometry.refcount_order, index))
    }

    /// Sets the refcount of `cluster`; false if its slice is not cached.
    pub(super) fn set_refcount(&mut self, cluster: HostCluster, value: u64) -> bool {
        let (slice, index) = self.ref_position(cluster);
        let order = self.geometry.refcount_order;
        let Some(bytes) = self.refs.change(slice) else { return false };
        counts::set(bytes, order, index, value);
        if value == 0 {
            self.close_packing(cluster);
            self.unpacked.forget(cluster, self.geometry);
            self.mapped.remove(cluster);
        }
        true
    }

    /// Whether nothing has to be written before the storage is flushed.
    pub(super) fn is_clean(&self) -> bool {
        self.l2.dirty_count() == 0
            && self.refs.dirty_count() == 0
            && self.l1_dirty.is_empty()
            && self.reftable_dirty.is_empty()
            && self.unlinked.is_empty()
    }

    /// Whether the image should start a flush by itself.
    pub(super) fn wants_flush(&self) -> bool {
        !self.flushes.own
            && matches!(self.health, Health::Good)
            && (self.l2.above_high_water()
                || self.refs.above_high_water()
                || self.unlinked.len() > crate::limits::UNLINKED_RUNS_MAX)
    }
}

/// The big-endian word `index` of a table; 0 outside.
pub(super) fn word(bytes: &[u8], index: usize) -> u64 {
    let at = index * 8;
    let field = bytes.get(at..at + 8).and_then(|field| field.try_into().ok());
    field.map_or(0, u64::from_be_bytes)
}

/// Sets the big-endian word `index` of a table.
pub(super) fn set_word(bytes: &mut [u8], index: usize, value: u64) {
    let at = index * 8;
    if let Some(field) = bytes.get_mut(at..at + 8) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}
