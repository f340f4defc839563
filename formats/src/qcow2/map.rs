//! Reading the mapping: guest ranges to extents, synchronous, without allocation.

use std::rc::Rc;

use liveblk_engine::address::{GuestRange, HostOffset};
use liveblk_engine::format::{Extent, Extents, Mapping};

use super::entry::Entry;
use super::image::Image;
use super::layout::GuestCluster;
use super::state::{Miss, State, Table, word};
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
        let file_end = self.image.storage.size();
        while at < end {
            let cluster = GuestCluster(at >> geometry.cluster_bits);
            let within = at & (geometry.cluster() - 1);
            let len = (geometry.cluster() - within).min(end - at);
            let raw = word(bytes, geometry.slice_index(cluster));
            let guest = at - within;
            match Entry::decode(raw, geometry, limit) {
                Entry::Absent => self.push(len, Mapping::Absent),
                Entry::ZeroPlain => self.push(len, Mapping::Zero),
                Entry::ZeroAllocated { host, .. } => {
                    self.push(len, Mapping::ZeroAllocated(HostOffset::new(host + within)));
                }
                Entry::Data { host, .. } if self.state.is_metadata(host) => {
                    self.push_damage(len, Reason::Overlap(host));
                }
                // Data is written before its entry is: this is a file that lost its end, and zeroes
                // would be wrong data.
                Entry::Data { host, .. } if host >= file_end => {
                    let error = self.image.error(Reason::DataBeyondEnd(guest, host), "read");
                    self.push(len, Mapping::Damaged(error));
                }
                Entry::Data { host, .. } => {
                    self.push(len, Mapping::Data(HostOffset::new(host + within)));
                }
                Entry::Compressed => {
                    let error = self.image.error(Reason::CompressedCluster(guest), "read");
                    self.push(len, Mapping::Damaged(error));
                }
                Entry::Damaged => self.push_damage(len, Reason::BadEntry("L2", guest, raw)),
            }
            at += len;
        }
        end
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
