//! Which parts of a disk a job is copying now, and who waits for them.
//!
//! A region is in one of these states; the dirty bitmap holds the first two, this map the rest:
//!
//! ```text
//! clean <- dirty -> reading -> copying -> clean
//!                     |            (failed read: dirty again)
//! ```
//! - *reading*: the source's content is not in memory yet; with copy-before-write a guest write
//!   waits here, and nowhere else.
//! - *copying*: the content is in memory, on its way to the target. The guest may write.
//! - *guest-write*: a guest's write is on its way to the target, too (write-blocking mirror). Other
//!   guest writes are not listed: the request holds the node's claim, and its hook (which waits for
//!   *reading* to end) runs under that claim.
//!
//! Order rules: (1) the node's claim comes before any region; (2) a task claims regions in
//! ascending offset; (3) nobody waits for anything while holding a region in state *reading*
//! except the read itself, or a target that is to share its blocks, as long as no guest waits here;
//! (4) two copies of one region are never in flight together.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use liveblk_engine::address::GuestRange;

/// How far the copy of a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Reading,
    Copying,
    GuestWrite,
}

/// The regions of one job. Waiting is done on the job's own notification.
#[derive(Debug, Default)]
pub struct Regions {
    /// By first byte: length and stage. Never overlapping.
    active: RefCell<BTreeMap<u64, (u64, Stage)>>,
}

/// The right to copy a region; dropped, the region is free.
#[derive(Debug)]
#[must_use = "the region is free as soon as this is dropped"]
pub struct Region {
    regions: Rc<Regions>,
    range: GuestRange,
}

impl Regions {
    /// Claims `range` for a copy; `None` if a part is being copied.
    pub fn claim(self: &Rc<Self>, range: GuestRange) -> Option<Region> {
        self.claim_at(range, Stage::Reading)
    }

    /// Claims `range` for a guest's write to the target; `None` if a part is being copied.
    pub fn claim_for_guest(self: &Rc<Self>, range: GuestRange) -> Option<Region> {
        self.claim_at(range, Stage::GuestWrite)
    }

    fn claim_at(self: &Rc<Self>, range: GuestRange, stage: Stage) -> Option<Region> {
        if self.first_overlap(range, false).is_some() {
            return None;
        }
        self.active.borrow_mut().insert(range.start.bytes(), (range.len, stage));
        Some(Region { regions: Rc::clone(self), range })
    }

    /// Whether a part of `range` is being read.
    pub fn is_reading(&self, range: GuestRange) -> bool {
        self.first_overlap(range, true).is_some()
    }

    /// The first region that shares a byte with `range`.
    pub fn overlap(&self, range: GuestRange) -> Option<GuestRange> {
        self.first_overlap(range, false)
    }

    /// Whether nothing is being copied; writes of guests do not count.
    pub fn is_empty(&self) -> bool {
        self.active.borrow().values().all(|(_, stage)| *stage == Stage::GuestWrite)
    }

    fn first_overlap(&self, range: GuestRange, reading: bool) -> Option<GuestRange> {
        let active = self.active.borrow();
        let start = range.start.bytes();
        let before = active.range(..start).next_back();
        let inside = active.range(start..range.end().bytes());
        before
            .into_iter()
            .chain(inside)
            .filter(|(_, (_, stage))| !reading || *stage == Stage::Reading)
            .map(|(start, (len, _))| GuestRange::new(*start, *len))
            .find(|known| known.overlaps(range))
    }
}

impl Region {
    /// The bytes.
    pub fn range(&self) -> GuestRange {
        self.range
    }

    /// The content is in memory: guests may write.
    pub fn read_done(&self) {
        let mut active = self.regions.active.borrow_mut();
        if let Some((_, stage)) = active.get_mut(&self.range.start.bytes()) {
            *stage = Stage::Copying;
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.regions.active.borrow_mut().remove(&self.range.start.bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_copies_never_share_a_byte() {
        let regions = Rc::new(Regions::default());
        let first = regions.claim(GuestRange::new(100, 100)).expect("free");
        assert!(regions.claim(GuestRange::new(199, 1)).is_none());
        assert!(regions.claim(GuestRange::new(0, 101)).is_none());
        let second = regions.claim(GuestRange::new(200, 1)).expect("free");
        assert_eq!(regions.overlap(GuestRange::new(150, 500)), Some(first.range()));
        drop(first);
        assert!(regions.claim(GuestRange::new(0, 200)).is_some());
        drop(second);
        assert!(regions.is_empty());
    }

    #[test]
    fn guests_wait_for_the_read_only() {
        let regions = Rc::new(Regions::default());
        let region = regions.claim(GuestRange::new(0, 64)).expect("free");
        assert!(regions.is_reading(GuestRange::new(63, 10)));
        region.read_done();
        assert!(!regions.is_reading(GuestRange::new(63, 10)));
        assert!(regions.claim(GuestRange::new(0, 1)).is_none());
    }
}
