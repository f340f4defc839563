//! Compressed writes: the bytes of whole clusters packed, and places for them in the file.
//!
//! Packed clusters begin at sector boundaries (or at those of the storage, if larger) and share
//! host clusters but no sector: what is durable is never read and written again to put something
//! beside it, so a torn or failed write harms nobody but its own cluster. One may continue in the
//! next host cluster if that is free. Each host cluster counts every packed cluster that touches
//! it.
//!
//! The order is that of other allocations (see `write`): counted in memory, pending, written,
//! visible; what the entry named before loses its references when the new entry is published. The
//! open host cluster, where the next packed cluster goes, is nothing but a number: it is forgotten
//! as soon as its last reference is given up, before its space can be punched, and where a count
//! cannot go up any more (refcounts of one bit: nothing is shared).

use std::rc::Rc;

use liveblk_engine::address::{GuestOffset, HostOffset};
use liveblk_engine::buf::Buf;
use liveblk_engine::format::{
    CompressedWrites, Fill, LocalFuture, MissId, WriteEnd, WriteGuard, WritePiece, WriteStep,
};
use liveblk_engine::{Error, ErrorKind, Result};

use super::bitmap_track::Waits;
use super::codec::Codec;
use super::entry::Entry;
use super::freed::Cause;
use super::image::Image;
use super::layout::{Geometry, GuestCluster, HostCluster, Run, SECTOR};
use super::packed::Packed;
use super::state::{Lookup, Miss, PendingWrite, State};
use crate::limits::PACK_INLINE_MAX;
use crate::reason::Reason;

/// What a packed write of one cluster comes to.
enum Plan {
    Ready { packed: Packed, old: Option<Run> },
    Miss(Miss),
    Wait,
}

impl Image {
    /// The codec of the image's compressed clusters.
    pub(super) fn codec(&self) -> Codec {
        // Headers with other types are refused.
        Codec::of(self.state.borrow().header.compression_type()).unwrap_or(Codec::Deflate)
    }

    /// Runs heavy work on `cluster` bytes: away from the core's loop unless they are few.
    pub(super) async fn crunch<R: Send + 'static>(
        &self,
        work: impl FnOnce() -> R + Send + 'static,
    ) -> R {
        if self.geometry.cluster() <= PACK_INLINE_MAX { work() } else { self.core.work(work).await }
    }

    /// Where packed clusters may begin: multiples of this.
    fn pack_unit(&self) -> u64 {
        self.storage.alignment().max(SECTOR as u64)
    }

    async fn pack_cluster(self: Rc<Self>, data: Buf) -> Result<Option<Buf>> {
        let unit = self.pack_unit();
        let length = |bytes: u64| usize::try_from(bytes).unwrap_or(0);
        let cluster = length(self.geometry.cluster());
        let most = length(self.geometry.cluster().saturating_sub(unit));
        if most == 0 || data.len() > cluster {
            return Ok(None);
        }
        let mut bytes = data.to_vec();
        drop(data);
        // What lies behind the end of the disk reads as zeroes if the disk grows.
        bytes.resize(cluster, 0);
        let codec = self.codec();
        self.packing.acquire(1).await;
        let packed = self.crunch(move || codec.pack(&bytes, most)).await;
        self.packing.release(1);
        Ok(packed.map(|packed| {
            let len = (packed.len() as u64).next_multiple_of(unit);
            let buf = self.core.pool().zeroed(length(len));
            buf.copy_from(0, &packed);
            buf
        }))
    }

    fn begin_packed_write(self: &Rc<Self>, at: GuestOffset, len: u64) -> Result<WriteStep> {
        let cluster = self.geometry.cluster();
        assert!(len > 0 && len < cluster, "packed clusters are smaller than clusters");
        let first = GuestCluster(at.bytes() >> self.geometry.cluster_bits);
        let outcome = {
            let mut state = self.state.borrow_mut();
            state.check_writable()?;
            if at.within(cluster) != 0 || at.bytes() >= state.header.size {
                return Err(Error::new(ErrorKind::OutOfRange, "write").at(at.bytes()));
            }
            state.plan_packed(first, len)
        };
        Ok(match self.judge(outcome)? {
            Plan::Miss(miss) => WriteStep::Miss(miss.id()),
            Plan::Wait => WriteStep::Wait(MissId(first.0)),
            Plan::Ready { packed, old } => {
                let token = self.state.borrow_mut().begin_pending(PendingWrite {
                    first,
                    run: Run { start: packed.run(self.geometry).start, count: 1 },
                    fresh: true,
                    span: (0, cluster),
                    old,
                    packed: Some(packed),
                    zeroes: false,
                });
                let end: Rc<dyn WriteEnd> = Rc::<Self>::clone(self);
                WriteStep::Ready(WritePiece {
                    len,
                    host: HostOffset::new(packed.host),
                    head: 0,
                    tail: 0,
                    fill: Fill::Zero,
                    guard: WriteGuard::pending(end, token, Some(self.epochs.lease())),
                })
            }
        })
    }
}

/// The ability as the engine sees it.
pub(super) struct Packer(pub(super) Rc<Image>);

impl CompressedWrites for Packer {
    fn pack(&self, data: Buf) -> LocalFuture<'static, Result<Option<Buf>>> {
        self.0.run(Rc::clone(&self.0).pack_cluster(data))
    }

    fn begin_packed(&self, at: GuestOffset, len: u64) -> Result<WriteStep> {
        match self.0.write_waits_for()? {
            Some(Waits::Mark(miss)) => return Ok(WriteStep::Miss(miss)),
            Some(Waits::Held) => return Ok(WriteStep::Wait(self.0.place_of(at))),
            None => {}
        }
        let step = self.0.begin_packed_write(at, len)?;
        Ok(self.0.watch_packed(at, step))
    }
}

impl State {
    fn plan_packed(&mut self, cluster: GuestCluster, len: u64) -> Result<Plan, Reason> {
        let entry = match self.lookup(cluster)? {
            Lookup::Entry(entry) => entry,
            Lookup::Miss(miss) => return Ok(Plan::Miss(miss)),
            Lookup::Wait => return Ok(Plan::Wait),
        };
        let old = entry.references(self.geometry);
        Ok(match self.take_packed(len) {
            Ok(packed) => Plan::Ready { packed, old },
            Err(miss) => Plan::Miss(miss),
        })
    }

    /// Takes and counts a place for `len` bytes.
    fn take_packed(&mut self, len: u64) -> Result<Packed, Miss> {
        let geometry = self.geometry;
        let most = most_references(geometry);
        if let Some(host) = self.allocator.packing {
            let open = geometry.host_cluster(host);
            let room = geometry.cluster() - (host & (geometry.cluster() - 1));
            let Some(count) = self.refcount(open) else {
                return Err(Miss::RefSlice(self.ref_position(open).0));
            };
            let usable = count > 0 && count < most;
            if usable && len > room && self.allocator.runs.is_empty() {
                // The next clusters of the file may be the ones behind the open one.
                return Err(Miss::Clusters(2));
            }
            if usable && (len <= room || self.take_cluster(open.plus(1))) {
                self.set_refcount(open, count + 1);
                return Ok(self.place(host, len));
            }
            self.allocator.packing = None;
        }
        let longest = self.allocator.runs.iter().max_by_key(|run| run.count).map(|run| run.start);
        match longest {
            Some(start) if self.take_cluster(start) => Ok(self.place(geometry.host(start), len)),
            _ => Err(Miss::Clusters(if most > 1 { 2 } else { 1 })),
        }
    }

    /// The next packed cluster goes behind this one.
    fn place(&mut self, host: u64, len: u64) -> Packed {
        let end = host + len;
        self.allocator.packing = (!self.geometry.aligned(end)).then_some(end);
        Packed { host, len }
    }

    /// Makes a packed write visible.
    pub(super) fn publish_packed(&mut self, at: GuestCluster, packed: Packed, old: Option<Run>) {
        if !self.set_entry(at, Entry::Compressed(packed)) {
            // Cannot be: slices with pending clusters are not evicted. Never guess, stop.
            let cause = Error::new(ErrorKind::Corrupt, "publish a mapping").at(packed.host);
            self.poison(&cause);
        }
        if let Some(old) = old {
            self.unlink_run(old, Cause::Rewrite);
        }
    }

    /// Takes a place back that nobody refers to and nobody accesses.
    pub(super) fn give_back_packed(&mut self, packed: Packed) {
        for cluster in packed.run(self.geometry).clusters() {
            match self.refcount(cluster) {
                Some(count) if count > 1 => {
                    self.set_refcount(cluster, count - 1);
                }
                _ => self.give_back(Run { start: cluster, count: 1 }),
            }
        }
    }

    /// Nothing is put beside what `cluster` holds any more.
    pub(super) fn close_packing(&mut self, cluster: HostCluster) {
        let geometry = self.geometry;
        let open = self.allocator.packing.map(|host| geometry.host_cluster(host));
        if open == Some(cluster) {
            self.allocator.packing = None;
        }
    }
}

impl Entry {
    /// The host clusters that the entry holds one reference to each, if any.
    pub(super) fn references(self, geometry: Geometry) -> Option<Run> {
        if let Self::Compressed(packed) = self {
            return Some(packed.run(geometry));
        }
        // Clusters of an external data file are not counted.
        let host = self.host().filter(|_| !geometry.external);
        host.map(|host| Run { start: geometry.host_cluster(host), count: 1 })
    }
}

/// The largest refcount.
const fn most_references(geometry: Geometry) -> u64 {
    u64::MAX >> (64 - geometry.refcount_bits())
}
