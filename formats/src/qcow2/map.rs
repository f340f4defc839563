//! Reading the mapping: guest ranges to extents, synchronous, without allocation.

use std::rc::Rc;

use liveblk_engine::address::{GuestOffset, GuestRange, HostOffset};
use liveblk_engine::format::{Extent, Extents, Mapping, PackedCluster};

use super::entry::{Entry, RawEntry};
use super::image::Image;
use super::layout::GuestCluster;
use super::packed::Packed;
use super::state::{Miss, State, Table};
use super::subcluster::{Kind, Subclusters};
use crate::reason::Reason;

impl Image {
    /// Appends what `range` is mapped to; stops behind the first miss.
    pub(super) fn resolve(self: &Rc<Self>, range: GuestRange, extents: &mut Extents) {
        extents.clear();
        let damage = {
            let state = self.state.borrow();
            Walk { image: self, state: &state, extents, damage: None }.run(range)
        };
        if let Some(reason) = damage {
            self.mark_corrupt(&reason);
        }
    }
}

struct Walk<'a> {
    image: &'a Image,
    state: &'a State,
    extents: &'a mut Extents,
    damage: Option<Reason>,
}

impl Walk<'_> {
    fn run(mut self, range: GuestRange) -> Option<Reason> {
        let geometry = self.image.geometry;
        let (mut at, end) = (range.start.bytes(), range.end().bytes());
        while at < end {
            let cluster = GuestCluster(at >> geometry.cluster_bits);
            let slice = geometry.slice_of(cluster);
            let span = geometry.slice_entries() << geometry.cluster_bits;
            let slice_end = (slice * span).saturating_add(span).min(end);
            if let Some(bytes) = self.state.l2.get(slice) {
                at = self.slice(bytes, at, slice_end);
                continue;
            }
            match self.state.l2_table(geometry.l1_of_slice(slice)) {
                Ok(Table::None) => self.push(slice_end - at, Mapping::Absent),
                Ok(Table::Own(_) | Table::Shared(_)) => {
                    self.push(end - at, Mapping::Miss(Miss::L2Slice(slice).id()));
                    break;
                }
                Err(reason) => self.push_damage(slice_end - at, reason),
            }
            at = slice_end;
        }
        self.damage
    }

    /// Pushes the extents from `at` to `end`, all in the slice `bytes`; returns `end`.
    fn slice(&mut self, bytes: &[u8], mut at: u64, end: u64) -> u64 {
        let geometry = self.image.geometry;
        let limit = self.state.host_limit();
        let file_end = self.image.data_storage().size().saturating_add(geometry.bias());
        while at < end {
            let cluster = GuestCluster(at >> geometry.cluster_bits);
            let within = at & (geometry.cluster() - 1);
            let len = (geometry.cluster() - within).min(end - at);
            let raw = RawEntry::load(bytes, geometry.slice_index(cluster), geometry);
            let guest = at - within;
            match Entry::decode(raw, geometry, limit) {
                Entry::Absent => self.push(len, Mapping::Absent),
                Entry::ZeroPlain => self.push(len, Mapping::Zero),
                Entry::ZeroAllocated { host, .. } => {
                    self.push(len, Mapping::ZeroAllocated(geometry.place(host + within)));
                }
                Entry::Data { host, .. } => self.data(guest, host, host + within, len, file_end),
                Entry::Sub(subclusters) => self.parts(guest, subclusters, within, len, file_end),
                Entry::Compressed(packed) => self.packed(guest, packed, len, file_end),
                Entry::Damaged => self.push_damage(len, Reason::BadEntry("L2", guest, raw.word)),
            }
            at += len;
        }
        end
    }

    /// Pushes `len` bytes of data at `at` in the host cluster `host`.
    fn data(&mut self, guest: u64, host: u64, at: u64, len: u64, file_end: u64) {
        let cluster = GuestCluster(guest >> self.image.geometry.cluster_bits);
        if let Err(reason) = self.state.check_place(cluster, host) {
            return self.push_damage(len, reason);
        }
        // Data is written before its entry is: this is a file that lost its end, and zeroes would
        // be wrong data.
        if host >= file_end {
            let error = self.image.error(Reason::DataBeyondEnd(guest, host), "read");
            return self.push(len, Mapping::Damaged(error));
        }
        self.push(len, Mapping::Data(self.image.geometry.place(at)));
    }

    /// Pushes `len` bytes of a compressed cluster.
    fn packed(&mut self, guest: u64, packed: Packed, len: u64, file_end: u64) {
        if let Some(host) = self.state.metadata_in(packed) {
            return self.push_damage(len, Reason::Overlap(host));
        }
        if packed.host >= file_end {
            let error = self.image.error(Reason::DataBeyondEnd(guest, packed.host), "read");
            return self.push(len, Mapping::Damaged(error));
        }
        let (at, host) = (GuestOffset::new(guest), HostOffset::new(packed.host));
        self.push(len, Mapping::Compressed(PackedCluster { at, host, len: packed.len }));
    }

    /// Pushes `len` bytes from byte `within` on of a cluster with subclusters of several kinds.
    fn parts(&mut self, guest: u64, parts: Subclusters, within: u64, len: u64, file_end: u64) {
        let (mut at, end) = (within, within + len);
        while at < end {
            let (run, kind) = parts.run(at, self.image.geometry);
            let run = run.min(end - at);
            let host = parts.host + at;
            match kind {
                Kind::Data if host >= file_end => {
                    let error = self.image.error(Reason::DataBeyondEnd(guest, host), "read");
                    self.push(run, Mapping::Damaged(error));
                }
                Kind::Data => self.data(guest, parts.host, host, run, file_end),
                Kind::Zero if parts.host != 0 => {
                    self.push(run, Mapping::ZeroAllocated(self.image.geometry.place(host)));
                }
                Kind::Zero => self.push(run, Mapping::Zero),
                Kind::Absent => self.push(run, Mapping::Absent),
            }
            at += run;
        }
    }

    fn push_damage(&mut self, len: u64, reason: Reason) {
        let error = self.image.error(reason.clone(), "read");
        self.damage.get_or_insert(reason);
        self.push(len, Mapping::Damaged(error));
    }

    fn push(&mut self, len: u64, mapping: Mapping) {
        if let Some(last) = self.extents.last_mut() {
            let continues = match (&last.mapping, &mapping) {
                (Mapping::Data(before), Mapping::Data(next))
                | (Mapping::ZeroAllocated(before), Mapping::ZeroAllocated(next)) => {
                    before.plus(last.len) == *next
                }
                (Mapping::Zero, Mapping::Zero) | (Mapping::Absent, Mapping::Absent) => true,
                _ => false,
            };
            if continues {
                last.len += len;
                return;
            }
        }
        self.extents.push(Extent { len, mapping });
    }
}
