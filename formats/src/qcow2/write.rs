//! Guest writes: in place, or into new clusters that become visible when the data has landed.
//!
//! Order of an allocating write: (1) reserved clusters get refcount 1 in memory; (2) the guest
//! clusters are entered as pending, others wait; (3) the engine writes the data and the fill; (4)
//! `complete_write` changes the L2 entries in memory, or `abort_write` gives the clusters back.
//! The L2 slices concerned stay cached while their clusters are pending.

use std::rc::Rc;

use liveblk_engine::address::{GuestRange, HostOffset};
use liveblk_engine::format::{Fill, MissId, WriteEnd, WriteGuard, WritePiece, WriteStep};
use liveblk_engine::{Error, ErrorKind, Result};

use super::entry::Entry;
use super::image::Image;
use super::layout::{GuestCluster, HostCluster, Run};
use super::state::{Lookup, Miss, PendingWrite, State};
use crate::limits::ALLOC_CLUSTERS_MAX;
use crate::reason::Reason;

/// How the clusters at the start of a range will be written.
enum Plan {
    /// Where they are.
    InPlace {
        host: u64,
        clusters: u64,
    },
    /// Into the clusters that were kept for them.
    Reuse {
        host: u64,
        clusters: u64,
    },
    /// Into new clusters.
    Allocate {
        clusters: u64,
        fill: Fill,
        old: Option<u64>,
    },
    Miss(Miss),
    Wait(GuestCluster),
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
        let cluster = self.geometry.cluster();
        let head = range.start.within(cluster);
        let first = GuestCluster(range.start.bytes() >> self.geometry.cluster_bits);
        let (host, clusters, fill, write) = match *plan {
            Plan::Miss(miss) => return WriteStep::Miss(miss.id()),
            Plan::Wait(cluster) => return WriteStep::Wait(MissId(cluster.0)),
            Plan::InPlace { host, clusters } => {
                let len = range.len.min(clusters * cluster - head);
                let guard = WriteGuard::in_place(Some(self.epochs.lease()));
                let host = HostOffset::new(host + head);
                let fill = Fill::Zero;
                return WriteStep::Ready(WritePiece { len, host, head: 0, tail: 0, fill, guard });
            }
            Plan::Reuse { host, clusters } => {
                let run = Run { start: self.geometry.host_cluster(host), count: clusters };
                let write = PendingWrite { first, run, fresh: false, old: None };
                (host, clusters, Fill::Zero, write)
            }
            Plan::Allocate { clusters, fill, old } => {
                let Some(run) = state.take_clusters(clusters) else {
                    return WriteStep::Miss(Miss::Clusters(clusters).id());
                };
                let old = old.map(|host| self.geometry.host_cluster(host));
                let write = PendingWrite { first, run, fresh: true, old };
                (self.geometry.host(run.start), run.count, fill, write)
            }
        };
        let len = range.len.min(clusters * cluster - head);
        let token = state.begin_pending(write);
        let end: Rc<dyn WriteEnd> = Rc::<Self>::clone(self);
        let guard = WriteGuard::pending(end, token, Some(self.epochs.lease()));
        let tail = clusters * cluster - head - len;
        let host = HostOffset::new(host + head);
        WriteStep::Ready(WritePiece { len, host, head, tail, fill, guard })
    }
}

impl State {
    /// Decides how the start of `range` is written.
    fn plan(&self, range: GuestRange) -> Result<Plan, Reason> {
        let bits = self.geometry.cluster_bits;
        let first = GuestCluster(range.start.bytes() >> bits);
        let count = ((range.end().bytes() - 1) >> bits) - first.0 + 1;
        let entry = match self.lookup(first)? {
            Lookup::Entry(entry) => entry,
            Lookup::Miss(miss) => return Ok(Plan::Miss(miss)),
            Lookup::Wait => return Ok(Plan::Wait(first)),
        };
        Ok(match entry {
            Entry::Data { host, copied: true } => {
                Plan::InPlace { host, clusters: self.run_of(first, count, entry) }
            }
            Entry::ZeroAllocated { host, copied: true } => {
                Plan::Reuse { host, clusters: self.run_of(first, count, entry) }
            }
            Entry::Data { host, copied: false } => {
                let fill = Fill::Old(HostOffset::new(host));
                Plan::Allocate { clusters: 1, fill, old: Some(host) }
            }
            Entry::ZeroAllocated { host, copied: false } => {
                Plan::Allocate { clusters: 1, fill: Fill::Zero, old: Some(host) }
            }
            Entry::Absent | Entry::ZeroPlain => {
                let fill = if entry == Entry::Absent { Fill::Below } else { Fill::Zero };
                let clusters = self.run_of(first, count.min(ALLOC_CLUSTERS_MAX), entry);
                Plan::Allocate { clusters, fill, old: None }
            }
            Entry::Compressed => return Err(Reason::CompressedCluster(first.0 << bits)),
            Entry::Damaged => return Err(Reason::BadEntry("L2", first.0 << bits, 0)),
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

    fn begin_pending(&mut self, write: PendingWrite) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.writes.insert(token, write);
        for index in 0..write.run.count {
            self.pending.insert(write.first.0 + index, token);
        }
        token
    }

    fn end_pending(&mut self, token: u64) -> Option<PendingWrite> {
        let write = self.writes.remove(&token)?;
        for index in 0..write.run.count {
            self.pending.remove(&(write.first.0 + index));
        }
        Some(write)
    }

    fn publish(&mut self, write: PendingWrite) {
        for index in 0..write.run.count {
            let host = self.geometry.host(HostCluster(write.run.start.0 + index));
            if !self.set_entry(write.first.plus(index), Entry::data(host)) {
                // Cannot be: slices with pending clusters are not evicted. Never guess, stop.
                let cause = Error::new(ErrorKind::Corrupt, "publish a mapping").at(host);
                self.poison(&cause);
            }
        }
        if let Some(old) = write.old {
            self.unlink(old);
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
            if let Some(write) = state.end_pending(token)
                && write.fresh
            {
                state.give_back(write.run);
            }
        }
        self.pending_ended.notify_all();
    }
}
