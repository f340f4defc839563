//! Guest writes: in place, or into new clusters that become visible when the data has landed.
//!
//! Order of an allocating write: (1) reserved clusters get refcount 1 in memory; (2) the guest
//! clusters are entered as pending, others wait; (3) the engine writes the data and the fill; (4)
//! `complete_write` changes the L2 entries in memory, or `abort_write` gives the clusters back.
//! With subclusters (3) concerns those that the request touches, and (4) exactly those; the others
//! stay what they are, in a kept cluster or in none. Writes to different subclusters of a cluster
//! that stays where it is go on at the same time.
//! The L2 slices concerned stay cached while their clusters are pending.

use std::rc::Rc;

use liveblk_engine::address::{GuestOffset, GuestRange, HostOffset};
use liveblk_engine::format::{
    Fill, MissId, PackedCluster, WriteEnd, WriteGuard, WritePiece, WriteStep,
};
use liveblk_engine::{Error, ErrorKind, Result};

use super::entry::Entry;
use super::freed::Cause;
use super::image::Image;
use super::layout::{Geometry, GuestCluster, HostCluster, Run};
use super::state::{Lookup, Miss, PendingWrite, State};
use super::subcluster::{ALL, Kind, Subclusters, touched};
use crate::limits::ALLOC_CLUSTERS_MAX;
use crate::reason::Reason;

/// How the clusters at the start of a range will be written.
enum Plan {
    /// Where they are.
    InPlace {
        host: u64,
        clusters: u64,
    },
    /// Into the host clusters that are kept for them.
    Reuse {
        old: Subclusters,
        clusters: u64,
    },
    /// Into new clusters; `copy`: where the data of a shared or compressed cluster comes from;
    /// `freed`: what loses a reference by it.
    Allocate {
        old: Subclusters,
        clusters: u64,
        copy: Option<Fill>,
        freed: Option<Run>,
    },
    Miss(Miss),
    Wait(GuestCluster),
}

/// The bytes, from the start of a write's first cluster, that its allocation makes data, and what
/// those are filled with that the request does not bring.
struct Shape {
    from: u64,
    to: u64,
    fill: Fill,
}

impl Shape {
    /// For a request from byte `from` to byte `to`, over clusters that hold `old` (in other places,
    /// if `fresh`). Only the first and the last subcluster can be written in part.
    fn new(geometry: Geometry, old: Subclusters, fresh: bool, from: u64, to: u64) -> Self {
        let (sub, last) = (geometry.subcluster(), (to - 1) & (geometry.cluster() - 1));
        let (start, end) = (from / sub * sub, to.next_multiple_of(sub));
        if fresh && let Some((first, behind)) = old.data_span(geometry) {
            // A shared cluster is copied alone, with all its data.
            let (from, to) = (start.min(first), end.max(behind));
            return Self { from, to, fill: Fill::Current };
        }
        let kind = |at, partial: bool| partial.then(|| old.kind(at, geometry));
        let head = kind(from & (geometry.cluster() - 1), start < from);
        let tail = kind(last, end > to);
        let fill = match (head, tail) {
            (Some(Kind::Absent), Some(Kind::Zero)) | (Some(Kind::Zero), Some(Kind::Absent)) => {
                Fill::Current
            }
            (Some(Kind::Absent), _) | (_, Some(Kind::Absent)) => Fill::Below,
            _ => Fill::Zero,
        };
        // What has data already (in a kept cluster) needs no filling.
        let from = if head == Some(Kind::Data) { from } else { start };
        Self { from, to: if tail == Some(Kind::Data) { to } else { end }, fill }
    }
}

impl Image {
    /// See `Format::begin_write`.
    pub(super) fn begin_write(self: &Rc<Self>, range: GuestRange) -> Result<WriteStep> {
        let outcome = {
            let mut state = self.state.borrow_mut();
            state.check_writable()?;
            if range.end().bytes() > state.header.size || range.is_empty() {
                return Err(Error::new(ErrorKind::OutOfRange, "write").at(range.start.bytes()));
            }
            let plan = state.plan(range);
            plan.map(|plan| self.begin(&mut state, range, &plan))
        };
        self.judge(outcome)
    }

    fn begin(self: &Rc<Self>, state: &mut State, range: GuestRange, plan: &Plan) -> WriteStep {
        let geometry = self.geometry;
        let head = range.start.within(geometry.cluster());
        let (run, old, copy, freed) = match *plan {
            Plan::Miss(miss) => return WriteStep::Miss(miss.id()),
            Plan::Wait(cluster) => return WriteStep::Wait(MissId(cluster.0)),
            Plan::InPlace { host, clusters } => {
                let len = range.len.min(clusters * geometry.cluster() - head);
                let guard = WriteGuard::in_place(Some(self.epochs.lease()));
                let host = geometry.place(host + head);
                let fill = Fill::Zero;
                return WriteStep::Ready(WritePiece { len, host, head: 0, tail: 0, fill, guard });
            }
            Plan::Reuse { old, clusters } => {
                let start = geometry.host_cluster(old.host);
                (Run { start, count: clusters }, old, None, None)
            }
            Plan::Allocate { old, clusters, copy, .. } if geometry.external => {
                let first = GuestCluster(range.start.bytes() >> geometry.cluster_bits);
                (geometry.identity(first, clusters), old, copy, None)
            }
            Plan::Allocate { old, clusters, copy, freed } => {
                let Some(run) = state.take_clusters(clusters) else {
                    return WriteStep::Miss(Miss::Clusters(clusters).id());
                };
                (run, old, copy, freed)
            }
        };
        let fresh = matches!(plan, Plan::Allocate { .. });
        let len = range.len.min(run.count * geometry.cluster() - head);
        let shape = Shape::new(geometry, old, fresh, head, head + len);
        let token = state.begin_pending(PendingWrite {
            first: GuestCluster(range.start.bytes() >> geometry.cluster_bits),
            run,
            fresh,
            span: (shape.from, shape.to),
            old: freed,
            packed: None,
            zeroes: false,
        });
        let end: Rc<dyn WriteEnd> = Rc::<Self>::clone(self);
        WriteStep::Ready(WritePiece {
            len,
            host: geometry.place(geometry.host(run.start) + head),
            head: head - shape.from,
            tail: shape.to - (head + len),
            fill: copy.unwrap_or(shape.fill),
            guard: WriteGuard::pending(end, token, Some(self.epochs.lease())),
        })
    }
}

impl PendingWrite {
    /// The subclusters of its cluster `index` that hold data when it completes.
    fn written(&self, geometry: Geometry, index: u64) -> u32 {
        let start = index << geometry.cluster_bits;
        let (from, to) = self.span;
        touched(geometry, from.saturating_sub(start), to.saturating_sub(start))
    }
}

impl State {
    /// Decides how the start of `range` is written.
    fn plan(&self, range: GuestRange) -> Result<Plan, Reason> {
        let geometry = self.geometry;
        let bits = geometry.cluster_bits;
        let first = GuestCluster(range.start.bytes() >> bits);
        let count = ((range.end().bytes() - 1) >> bits) - first.0 + 1;
        let head = range.start.within(geometry.cluster());
        let touched = touched(geometry, head, head.saturating_add(range.len));
        let entry = match self.lookup_beside(first, touched)? {
            Lookup::Entry(entry) => entry,
            Lookup::Miss(miss) => return Ok(Plan::Miss(miss)),
            Lookup::Wait => return Ok(Plan::Wait(first)),
        };
        let freed = entry.references(geometry);
        if let Entry::Compressed(packed) = entry {
            let (at, host) = (GuestOffset::new(first.0 << bits), HostOffset::new(packed.host));
            let copy = Some(Fill::OldCompressed(PackedCluster { at, host, len: packed.len }));
            // All of it is data, in another place.
            let old = Subclusters { allocated: ALL, ..Subclusters::default() };
            return Ok(Plan::Allocate { old, clusters: 1, copy, freed });
        }
        let Some(old) = entry.subclusters() else {
            return Err(Reason::BadEntry("L2", first.0 << bits, 0));
        };
        Ok(match entry {
            Entry::Data { host, copied: true } => {
                Plan::InPlace { host, clusters: self.run_of(first, count, entry) }
            }
            Entry::Data { host, copied: false } => {
                let copy = Some(Fill::Old(geometry.place(host)));
                Plan::Allocate { old, clusters: 1, copy, freed }
            }
            _ if old.host == 0 => {
                let clusters = self.run_of(first, count.min(ALLOC_CLUSTERS_MAX), entry);
                Plan::Allocate { old, clusters, copy: None, freed }
            }
            _ if !old.copied => Plan::Allocate { old, clusters: 1, copy: None, freed },
            _ if old.allocated & touched == touched => {
                Plan::InPlace { host: old.host, clusters: 1 }
            }
            _ => Plan::Reuse { old, clusters: self.run_of(first, count, entry) },
        })
    }

    /// How many of `count` clusters from `first` on continue its entry.
    pub(super) fn run_of(&self, first: GuestCluster, count: u64, entry: Entry) -> u64 {
        let mut clusters = 1;
        while clusters < count {
            let next = self.lookup(first.plus(clusters));
            let Ok(Lookup::Entry(next)) = next else { break };
            if next != entry.continued(clusters << self.geometry.cluster_bits) {
                break;
            }
            clusters += 1;
        }
        clusters
    }

    pub(super) fn begin_pending(&mut self, write: PendingWrite) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.writes.insert(token, write);
        for index in 0..write.run.count {
            let busy = self.pending.entry(write.first.0 + index).or_default();
            busy.writes += 1;
            busy.bits |= write.written(self.geometry, index);
            busy.moves |= write.fresh;
        }
        token
    }

    fn end_pending(&mut self, token: u64) -> Option<PendingWrite> {
        let write = self.writes.remove(&token)?;
        for index in 0..write.run.count {
            let cluster = write.first.0 + index;
            let Some(busy) = self.pending.get_mut(&cluster) else { continue };
            busy.writes -= 1;
            // Writes to one cluster at the same time have no subcluster in common.
            busy.bits &= !write.written(self.geometry, index);
            if busy.writes == 0 {
                self.pending.remove(&cluster);
            }
        }
        Some(write)
    }

    fn publish(&mut self, write: PendingWrite) {
        let geometry = self.geometry;
        if let Some(packed) = write.packed {
            return self.publish_packed(write.first, packed, write.old);
        }
        for index in 0..write.run.count {
            let host = geometry.host(HostCluster(write.run.start.0 + index));
            let cluster = write.first.plus(index);
            let written = write.written(geometry, index);
            let slice = self.l2.get(geometry.slice_of(cluster));
            let old = slice.map(|bytes| self.decode(bytes, geometry.slice_index(cluster)));
            let old = old.and_then(Entry::subclusters).unwrap_or_default();
            let kept = if write.fresh { 0 } else { old.allocated };
            let (allocated, zero) = match write.zeroes {
                true => (0, ALL),
                false => (kept | written, old.zero & !written),
            };
            let new = Subclusters { host, copied: true, allocated, zero };
            if !self.set_entry(cluster, Entry::of(new)) {
                // Cannot be: slices with pending clusters are not evicted. Never guess, stop.
                let cause = Error::new(ErrorKind::Corrupt, "publish a mapping").at(host);
                self.poison(&cause);
            }
        }
        if let Some(old) = write.old {
            self.unlink_run(old, Cause::Rewrite);
        }
    }
}

impl WriteEnd for Image {
    fn complete_write(&self, token: u64) {
        {
            let mut state = self.state.borrow_mut();
            if let Some(write) = state.end_pending(token) {
                state.publish(write);
            }
        }
        self.pending_ended.notify_all();
        self.wake_flusher();
    }

    fn abort_write(&self, token: u64) {
        {
            let mut state = self.state.borrow_mut();
            match state.end_pending(token) {
                Some(PendingWrite { packed: Some(packed), .. }) => state.give_back_packed(packed),
                Some(write) if write.fresh && !self.geometry.external => state.give_back(write.run),
                _ => {}
            }
        }
        self.pending_ended.notify_all();
    }
}
