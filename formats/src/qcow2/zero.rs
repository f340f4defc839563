//! Write-zeroes and discard: in metadata alone for whole clusters of version 3, and for whole
//! subclusters.
//!
//! What is given back reads as zeroes, never as what the layers below hold: version 2 has no way
//! to say so, therefore there nothing is unmapped. A cluster that loses its mapping is freed by
//! `reclaim` after the change is durable.

use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::format::{MissId, WriteEnd, WriteGuard, ZeroMode, ZeroStep};
use liveblk_engine::{Error, ErrorKind, Result};

use super::datafile::ZeroData;
use super::entry::Entry;
use super::freed::Cause;
use super::image::Image;
use super::layout::{GuestCluster, Run};
use super::state::{Lookup, Miss, PendingWrite, State, Table};
use super::subcluster::{ALL, Subclusters, touched};
use crate::limits::ZERO_CLUSTERS_MAX;
use crate::reason::Reason;

/// What happens with the start of a range.
pub(super) enum Plan {
    Done {
        len: u64,
    },
    Storage {
        len: u64,
        host: u64,
    },
    /// The clusters of a run of host clusters stay; their bytes go back to the storage.
    GiveBack {
        len: u64,
        first: GuestCluster,
        run: Run,
    },
    Write {
        len: u64,
    },
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
                ZeroStep::Storage { len, host: self.geometry.place(host), guard }
            }
            Plan::GiveBack { len, first, run } => self.give_back_bytes(len, first, run),
        })
    }
}

impl Image {
    /// Zeroes the host clusters `run` where they are; the mapping says so when they are.
    fn give_back_bytes(self: &Rc<Self>, len: u64, first: GuestCluster, run: Run) -> ZeroStep {
        let span = (0, run.count << self.geometry.cluster_bits);
        let write =
            PendingWrite { first, run, fresh: false, span, old: None, packed: None, zeroes: true };
        let token = self.state.borrow_mut().begin_pending(write);
        let end: Rc<dyn WriteEnd> = Rc::<Self>::clone(self);
        let guard = WriteGuard::pending(end, token, Some(self.epochs.lease()));
        let host = self.geometry.place(self.geometry.host(run.start));
        ZeroStep::Storage { len, host, guard }
    }
}

impl State {
    fn plan_zero(&mut self, range: GuestRange, mode: ZeroMode) -> Result<Plan, Reason> {
        let range = match self.plan_zero_data(range, mode)? {
            None => range,
            Some(ZeroData::Metadata(part)) => part,
            Some(ZeroData::Plan(plan)) => return Ok(plan),
        };
        let geometry = self.geometry;
        let (cluster, sub) = (geometry.cluster(), geometry.subcluster());
        let first = GuestCluster(range.start.bytes() >> geometry.cluster_bits);
        let head = range.start.within(cluster);
        // The last cluster may end behind the disk: what lies there reads as zeroes anyway.
        let to_end = range.end().bytes() == self.header.size;
        let whole = if to_end { range.len.div_ceil(cluster) } else { range.len / cluster };
        if head == 0 && whole > 0 && geometry.version >= 3 {
            return self.zero_clusters(first, whole, range.len, mode);
        }
        if head == 0 && whole > 0 {
            return self.zero_in_place(first, whole, 0, range.len.min(whole * cluster), mode);
        }
        let here = range.len.min(cluster - head);
        let within = head & (sub - 1);
        let to_end = to_end && here == range.len;
        let whole = if to_end { here } else { here & !(sub - 1) };
        if geometry.extended && within == 0 && whole > 0 {
            return self.zero_subclusters(first, head, whole, mode);
        }
        self.zero_in_place(first, 1, head, here.min(sub - within), mode)
    }

    /// Zeroes whole subclusters, `len` bytes from byte `head` of cluster `at`, by their bits.
    fn zero_subclusters(
        &mut self,
        at: GuestCluster,
        head: u64,
        len: u64,
        mode: ZeroMode,
    ) -> Result<Plan, Reason> {
        if mode == ZeroMode::Discard && self.unmapped_from(at) > 0 {
            return Ok(Plan::Done { len });
        }
        let entry = match self.lookup(at)? {
            Lookup::Entry(entry) => entry,
            Lookup::Miss(miss) => return Ok(Plan::Miss(miss)),
            Lookup::Wait => return Ok(Plan::Wait(at)),
        };
        let Some(old) = entry.subclusters() else { return Ok(Plan::Write { len }) };
        let touched = touched(self.geometry, head, head + len);
        let changed = match mode {
            ZeroMode::Discard => touched & old.allocated,
            ZeroMode::Keep | ZeroMode::Unmap => touched & !old.zero,
        };
        if changed == 0 {
            return Ok(Plan::Done { len });
        }
        let mut new =
            Subclusters { allocated: old.allocated & !changed, zero: old.zero | changed, ..old };
        let stays = mode == ZeroMode::Keep || (self.no_unref && old.copied);
        if !stays && new.allocated == 0 {
            new = Subclusters { host: 0, copied: false, ..new };
        }
        if self.set_entry(at, Entry::of(new)) && new.host != old.host {
            self.unlink_data(old.host, Cause::Request);
        }
        Ok(Plan::Done { len })
    }

    /// Zeroes whole clusters by their entries, as far as that is possible now.
    pub(super) fn zero_clusters(
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
            let found = self.lookup(at);
            if let Ok(Lookup::Entry(entry)) = found
                && let Some(run) = self.bytes_to_give_back(at, entry, count - done, mode)
            {
                if done > 0 {
                    break;
                }
                let len = len.min(run.count * cluster);
                return Ok(Plan::GiveBack { len, first: at, run });
            }
            let blocked = match found {
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

    /// The host clusters, from that of guest cluster `at` on, that stay allocated although a guest
    /// gave their bytes up, if these go back to the storage (`discard-no-unref`).
    fn bytes_to_give_back(
        &self,
        at: GuestCluster,
        entry: Entry,
        count: u64,
        mode: ZeroMode,
    ) -> Option<Run> {
        if !self.no_unref || mode == ZeroMode::Keep || !self.passes.has(Cause::Request) {
            return None;
        }
        let old = entry.subclusters().filter(|old| old.copied && old.allocated != 0)?;
        let whole = matches!(entry, Entry::Data { .. });
        let count = if whole { self.run_of(at, count.min(ZERO_CLUSTERS_MAX), entry) } else { 1 };
        Some(Run { start: self.geometry.host_cluster(old.host), count })
    }

    /// How many clusters from `at` to the end of its slice have no L2 table.
    pub(super) fn unmapped_from(&self, at: GuestCluster) -> u64 {
        let slice = self.geometry.slice_of(at);
        match self.l2_table(self.geometry.l1_of_slice(slice)) {
            Ok(Table::None) => (slice + 1) * self.geometry.slice_entries() - at.0,
            _ => 0,
        }
    }

    /// Makes one cluster read as zeroes; false if its entry cannot say so.
    fn zero_entry(&mut self, at: GuestCluster, entry: Entry, mode: ZeroMode) -> bool {
        if let Entry::Compressed(packed) = entry {
            let changed = self.set_entry(at, Entry::ZeroPlain);
            if changed {
                self.unlink_run(packed.run(self.geometry), Cause::Request);
            }
            return changed;
        }
        let Some(old) = entry.subclusters() else { return false };
        let kept = old.copied && (mode == ZeroMode::Keep || self.no_unref);
        let done = match mode {
            ZeroMode::Discard => entry == Entry::Absent || entry == Entry::ZeroPlain,
            ZeroMode::Keep => old.zero == ALL,
            ZeroMode::Unmap => entry == Entry::ZeroPlain,
        };
        if done || (kept && old.zero == ALL) {
            return true;
        }
        let new = match old {
            Subclusters { host, copied, .. } if kept => Entry::ZeroAllocated { host, copied },
            _ => Entry::ZeroPlain,
        };
        let changed = self.set_entry(at, new);
        if changed && !kept && old.host != 0 {
            let cause = if mode == ZeroMode::Keep { Cause::Rewrite } else { Cause::Request };
            self.unlink_data(old.host, cause);
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
        let entry = match self.lookup(first)? {
            Lookup::Entry(entry) => entry,
            Lookup::Miss(miss) => return Ok(Plan::Miss(miss)),
            Lookup::Wait => return Ok(Plan::Wait(first)),
        };
        let old = entry.subclusters().unwrap_or_default();
        let bits = touched(self.geometry, head, head + one);
        if old.zero & bits == bits {
            return Ok(Plan::Done { len: one });
        }
        // The following clusters continue this one only where it is of one kind.
        let uniform = matches!(entry, Entry::Data { .. } | Entry::Absent);
        let run = if uniform { self.run_of(first, count, entry) } else { 1 };
        let len = len.min(run * cluster - head);
        if old.copied && old.allocated & bits == bits {
            return Ok(Plan::Storage { len, host: old.host + head });
        }
        Ok(Plan::Write { len })
    }
}
