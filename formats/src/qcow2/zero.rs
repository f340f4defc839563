//! Write-zeroes and discard: in metadata alone for whole clusters of version 3.
//!
//! What is given back reads as zeroes, never as what the layers below hold: version 2 has no way
//! to say so, therefore there nothing is unmapped. A cluster that loses its mapping is freed by
//! `reclaim` after the change is durable.

use std::rc::Rc;

use liveblk_engine::address::{GuestRange, HostOffset};
use liveblk_engine::format::{MissId, WriteGuard, ZeroMode, ZeroStep};
use liveblk_engine::{Error, ErrorKind, Result};

use super::entry::Entry;
use super::image::Image;
use super::layout::GuestCluster;
use super::state::{Lookup, Miss, State, Table};
use crate::limits::ZERO_CLUSTERS_MAX;
use crate::reason::Reason;

/// What happens with the start of a range.
enum Plan {
    Done { len: u64 },
    Storage { len: u64, host: u64 },
    Write { len: u64 },
    Miss(Miss),
    Wait(GuestCluster),
}

impl Image {
    /// See `Format::begin_zero`.
    pub(super) fn begin_zero(
        self: &Rc<Self>,
        range: GuestRange,
        mode: ZeroMode,
    ) -> Result<ZeroStep> {
        let outcome = {
            let mut state = self.state.borrow_mut();
            state.check_writable()?;
            if range.end().bytes() > state.header.size || range.is_empty() {
                let error = Error::new(ErrorKind::OutOfRange, "write zeroes");
                return Err(error.at(range.start.bytes()));
            }
            state.plan_zero(range, mode)
        };
        let plan = self.judge(outcome)?;
        self.wake_flusher();
        Ok(match plan {
            Plan::Done { len } => ZeroStep::Done { len },
            Plan::Write { len } => ZeroStep::Write { len },
            Plan::Miss(miss) => ZeroStep::Miss(miss.id()),
            Plan::Wait(cluster) => ZeroStep::Wait(MissId(cluster.0)),
            Plan::Storage { len, host } => {
                let guard = WriteGuard::in_place(Some(self.epochs.lease()));
                ZeroStep::Storage { len, host: HostOffset::new(host), guard }
            }
        })
    }
}

impl State {
    fn plan_zero(&mut self, range: GuestRange, mode: ZeroMode) -> Result<Plan, Reason> {
        let cluster = self.geometry.cluster();
        let first = GuestCluster(range.start.bytes() >> self.geometry.cluster_bits);
        let head = range.start.within(cluster);
        // The last cluster may end behind the disk: what lies there reads as zeroes anyway.
        let to_end = range.end().bytes() == self.header.size;
        let whole = if to_end { range.len.div_ceil(cluster) } else { range.len / cluster };
        if head == 0 && whole > 0 && self.geometry.version >= 3 {
            return self.zero_clusters(first, whole, range.len, mode);
        }
        if head == 0 && whole > 0 {
            return self.zero_in_place(first, whole, 0, range.len.min(whole * cluster), mode);
        }
        self.zero_in_place(first, 1, head, range.len.min(cluster - head), mode)
    }

    /// Zeroes whole clusters by their entries, as far as that is possible now.
    fn zero_clusters(
        &mut self,
        first: GuestCluster,
        count: u64,
        len: u64,
        mode: ZeroMode,
    ) -> Result<Plan, Reason> {
        let cluster = self.geometry.cluster();
        let mut done = 0;
        while done < count.min(ZERO_CLUSTERS_MAX) {
            let at = first.plus(done);
            let skipped = if mode == ZeroMode::Discard { self.unmapped_from(at) } else { 0 };
            if skipped > 0 {
                done = count.min(done + skipped);
                continue;
            }
            let blocked = match self.lookup(at) {
                Ok(Lookup::Entry(Entry::Compressed)) if mode == ZeroMode::Discard => {
                    Plan::Write { len: cluster.min(len) }
                }
                Ok(Lookup::Entry(entry)) if self.zero_entry(at, entry, mode) => {
                    done += 1;
                    continue;
                }
                Ok(Lookup::Entry(_)) => Plan::Write { len: cluster.min(len) },
                Ok(Lookup::Miss(miss)) => Plan::Miss(miss),
                Ok(Lookup::Wait) => Plan::Wait(at),
                Err(reason) if done == 0 => return Err(reason),
                Err(_) => break,
            };
            if done == 0 {
                return Ok(blocked);
            }
            break;
        }
        Ok(Plan::Done { len: len.min(done * cluster) })
    }

    /// How many clusters from `at` to the end of its slice have no L2 table.
    fn unmapped_from(&self, at: GuestCluster) -> u64 {
        let slice = self.geometry.slice_of(at);
        match self.l2_table(self.geometry.l1_of_slice(slice)) {
            Ok(Table::None) => (slice + 1) * self.geometry.slice_entries() - at.0,
            _ => 0,
        }
    }

    /// Makes one cluster read as zeroes; false if its entry cannot say so.
    fn zero_entry(&mut self, at: GuestCluster, entry: Entry, mode: ZeroMode) -> bool {
        let (raw, freed) = match (entry, mode) {
            (Entry::Absent, ZeroMode::Discard) | (Entry::ZeroPlain, _) => return true,
            (Entry::ZeroAllocated { .. }, ZeroMode::Keep) => return true,
            (Entry::Absent, _) => (Entry::ZERO_PLAIN, None),
            (Entry::Data { host, copied: true }, ZeroMode::Keep) => {
                (Entry::zero_allocated(host), None)
            }
            (Entry::Data { host, .. } | Entry::ZeroAllocated { host, .. }, _) => {
                (Entry::ZERO_PLAIN, Some(host))
            }
            (Entry::Compressed | Entry::Damaged, _) => return false,
        };
        let changed = self.set_entry(at, raw);
        if let (true, Some(host)) = (changed, freed) {
            self.unlink(self.geometry.host_cluster(host));
        }
        changed
    }

    /// Zeroes `len` bytes from byte `head` of cluster `first` where the data is, if possible.
    fn zero_in_place(
        &self,
        first: GuestCluster,
        count: u64,
        head: u64,
        len: u64,
        mode: ZeroMode,
    ) -> Result<Plan, Reason> {
        let cluster = self.geometry.cluster();
        let one = len.min(cluster - head);
        if mode == ZeroMode::Discard {
            return Ok(Plan::Write { len });
        }
        let slice = self.geometry.slice_of(first);
        if self.l2_table(self.geometry.l1_of_slice(slice))? == Table::None {
            let clusters = self.unmapped_from(first).min(count).max(1);
            return Ok(Plan::Write { len: len.min(clusters * cluster - head) });
        }
        Ok(match self.lookup(first)? {
            Lookup::Miss(miss) => Plan::Miss(miss),
            Lookup::Wait => Plan::Wait(first),
            Lookup::Entry(Entry::ZeroPlain | Entry::ZeroAllocated { .. }) => {
                Plan::Done { len: one }
            }
            Lookup::Entry(entry @ Entry::Data { host, copied: true }) => {
                let run = self.run_of(first, count, entry);
                Plan::Storage { len: len.min(run * cluster - head), host: host + head }
            }
            Lookup::Entry(entry) => {
                let run = self.run_of(first, count, entry);
                Plan::Write { len: len.min(run * cluster - head) }
            }
        })
    }
}
