//! Copies that move no bytes: where source and target are files that can share blocks, they do.
//!
//! Owns what the loop knows of that: which files refused, what part of the source lies so that it
//! can be shared, and how large such copies are. Hints only: the write itself asks again where the
//! bytes lie, and what it cannot share becomes dirty again and is copied. So a failure is always
//! that of a copy, and tells which side failed.
//!
//! Order of one such copy: claim the region, clear its dirty bits, share (source and target in one
//! step), let waiting guests go. A guest that waits for the region while nothing is being shared
//! (the target's gate, claims or tables hold the copy up) gets it at once: the bits are set again
//! and the region is free. Copy-before-write itself never shares: the guest waits for memory alone.
//!
//! What is shared is not looked at for zeroes. Copies begin small and grow as long as one is short,
//! because guests that write the source wait for the file system meanwhile.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::executor::sync::{Either, select};
use liveblk_engine::node::{Origin, ShareRight, ShareTurn, Shared};
use liveblk_engine::storage::Sharing;

use super::chunk::Run;
use super::state::{Copy, Flight};
use crate::limits::{
    SHARE_LONG_NS, SHARE_LOOK, SHARE_SHORT_NS, SHARE_UNIT_FIRST, SHARE_UNIT_MAX, SHARE_UNIT_MIN,
};

/// What the loop knows about sharing.
#[derive(Debug)]
pub(super) struct Offload {
    sharing: Rc<Sharing>,
    /// Bytes of one copy.
    unit: Cell<u64>,
    /// Most bytes of one copy, where the client limits them.
    chunk: u64,
    ahead: RefCell<Ahead>,
}

/// What part of the source was looked at, and what of it may be shared (whole granules, in order).
#[derive(Debug, Default)]
struct Ahead {
    looked: GuestRange,
    sharable: Vec<GuestRange>,
}

/// How the loop copies from some byte on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Through memory, up to this byte.
    Memory(u64),
    /// By sharing, up to this byte.
    Share(u64),
}

impl Offload {
    pub(super) fn new(chunk: u64) -> Self {
        Self {
            sharing: Rc::default(),
            unit: Cell::new(SHARE_UNIT_FIRST),
            chunk,
            ahead: RefCell::default(),
        }
    }

    /// Whether it is known how to copy from `at` on.
    fn knows(&self, at: u64) -> bool {
        let looked = self.ahead.borrow().looked;
        (looked.start.bytes()..looked.end().bytes()).contains(&at)
    }

    fn way(&self, at: u64) -> Way {
        let ahead = self.ahead.borrow();
        let next = ahead.sharable.iter().find(|run| run.end().bytes() > at);
        match next {
            None => Way::Memory(u64::MAX),
            Some(run) if run.start.bytes() <= at => Way::Share(run.end().bytes()),
            Some(run) => Way::Memory(run.start.bytes()),
        }
    }

    /// `range` is to be copied.
    fn leave(&self, range: GuestRange) {
        let mut ahead = self.ahead.borrow_mut();
        if self.sharing.is_hopeless() {
            *ahead = Ahead { looked: EVERYWHERE, sharable: Vec::new() };
            return;
        }
        let mut kept = Vec::with_capacity(ahead.sharable.len() + 1);
        for run in ahead.sharable.drain(..) {
            let first = GuestRange { len: range.start.since(run.start).min(run.len), ..run };
            let start = run.start.max(range.end());
            let second = GuestRange { start, len: run.end().since(start) };
            kept.extend([first, second].into_iter().filter(|part| !part.is_empty()));
        }
        ahead.sharable = kept;
    }

    /// A copy of `len` bytes is over; its longest step took `nanos`.
    fn took(&self, len: u64, nanos: u64) {
        let unit = self.unit.get();
        if nanos > SHARE_LONG_NS {
            self.unit.set((unit / 2).max(SHARE_UNIT_MIN));
        } else if nanos < SHARE_SHORT_NS && len >= unit {
            self.unit.set((unit * 2).min(SHARE_UNIT_MAX));
        }
    }
}

/// All of every disk.
const EVERYWHERE: GuestRange = GuestRange::new(0, u64::MAX);

impl Copy {
    /// Finds out what of the source may be shared where the next copy will be; true if that was not
    /// known, and time has passed.
    pub(super) async fn look_ahead(&self) -> bool {
        let Some(offload) = &self.offload else { return false };
        let next = {
            let todo = self.todo.borrow();
            todo.next_dirty(self.cursor.get()).or_else(|| todo.next_dirty(0))
        };
        let Some(at) = next.filter(|at| !offload.knows(*at)) else { return false };
        let source = self.source();
        let end = self.size().min(source.size());
        let looked = GuestRange::new(at, SHARE_LOOK.min(end.saturating_sub(at)).max(1));
        let (mut looked, mut sharable) = (looked, Vec::new());
        if looked.end().bytes() <= end {
            let _reading = self.begin_read();
            let found = source.sharable(looked, &self.target, &offload.sharing);
            // What cannot be looked at is copied, and the copy tells why.
            if let Some(Ok(runs)) = self.job.unless_dead(found, || self.is_dead()).await {
                sharable = runs.into_iter().filter_map(|run| self.whole_granules(run)).collect();
            }
        }
        if sharable.is_empty() && offload.sharing.is_hopeless() {
            // So it is everywhere, as far as it is worth to know.
            looked = EVERYWHERE;
        }
        offload.ahead.replace(Ahead { looked, sharable });
        true
    }

    /// The granules that lie wholly inside `run`.
    fn whole_granules(&self, run: GuestRange) -> Option<GuestRange> {
        self.whole_granules_in(run).filter(|whole| !whole.is_empty())
    }

    /// How to copy from `at` on.
    pub(super) fn way(&self, at: u64) -> Way {
        match &self.offload {
            Some(offload) if offload.knows(at) => offload.way(at),
            _ => Way::Memory(u64::MAX),
        }
    }

    /// Most bytes of one copy by sharing.
    pub(super) fn largest_share(&self) -> u64 {
        let Some(offload) = &self.offload else { return self.largest_unit() };
        let granule = self.granularity();
        let unit = offload.unit.get().min(offload.chunk);
        let unit = (unit - unit % granule).max(granule);
        if self.is_narrowed() { unit.min(self.largest_unit()) } else { unit }
    }

    /// Copies `run` by sharing. Its dirty bits are cleared already.
    pub(super) async fn share_run(self: Rc<Self>, run: Run, flight: Flight) {
        let Some(offload) = &self.offload else { return };
        let range = run.region.range();
        let turn = Rc::new(ShareTurn::default());
        let right = ShareRight { sharing: Rc::clone(&offload.sharing), turn: Rc::clone(&turn) };
        let reading = self.begin_read();
        let source = self.source();
        let mut request = if self.fills.get() {
            self.target.fill_shared(range, right, self.origin())
        } else {
            self.target.write_shared(&source, range, right, self.origin())
        };
        let wanted = || (self.is_dead() || self.crowd.waits_for(range)) && turn.give_up();
        let ended = match select(&mut request, self.job.changed().until(wanted)).await {
            Either::First(ended) => ended,
            Either::Second(()) => {
                self.mark(range, false);
                drop((run, reading));
                self.job.changed().notify_all();
                // It does nothing any more, but holds the target.
                request.await;
                self.job.rate().borrow_mut().refund(range.len);
                return;
            }
        };
        drop(reading);
        offload.took(range.len, turn.longest_ns());
        if ended != Shared::Done {
            if ended == Shared::Copy {
                offload.leave(range);
                self.cursor.set(self.cursor.get().min(range.start.bytes()));
            }
            self.job.rate().borrow_mut().refund(range.len);
            self.mark(range, false);
            drop(run);
            return;
        }
        run.region.read_done();
        self.job.changed().notify_all();
        self.job.count_shared(range.len);
        if self.discard_source {
            // Space that stays taken is all that a failure costs.
            let _ = source.discard(range.start.bytes(), range.len, Origin::Derived).await;
        }
        self.note_landed(range);
        drop(run);
        flight.landed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looked(sharable: &[(u64, u64)]) -> Offload {
        let offload = Offload::new(u64::MAX);
        let sharable = sharable.iter().map(|(at, len)| GuestRange::new(*at, *len)).collect();
        offload.ahead.replace(Ahead { looked: GuestRange::new(0, 1000), sharable });
        offload
    }

    #[test]
    fn what_was_refused_is_copied_and_the_rest_is_still_shared() {
        let offload = looked(&[(100, 200), (400, 100)]);
        assert_eq!(offload.way(0), Way::Memory(100));
        assert_eq!(offload.way(100), Way::Share(300));
        offload.leave(GuestRange::new(150, 50));
        assert_eq!(offload.way(100), Way::Share(150));
        assert_eq!(offload.way(150), Way::Memory(200));
        assert_eq!(offload.way(200), Way::Share(300));
        assert_eq!(offload.way(300), Way::Memory(400));
        offload.leave(GuestRange::new(0, 1000));
        assert_eq!(offload.way(0), Way::Memory(u64::MAX));
    }

    #[test]
    fn copies_grow_while_they_are_short_and_shrink_when_guests_would_notice() {
        let offload = looked(&[]);
        for _ in 0..20 {
            offload.took(SHARE_UNIT_MAX, 1);
        }
        assert_eq!(offload.unit.get(), SHARE_UNIT_MAX);
        offload.took(4096, SHARE_LONG_NS + 1);
        assert_eq!(offload.unit.get(), SHARE_UNIT_MAX / 2);
        for _ in 0..20 {
            offload.took(4096, SHARE_LONG_NS + 1);
        }
        assert_eq!(offload.unit.get(), SHARE_UNIT_MIN);
        // A small copy says nothing about large ones.
        offload.took(4096, 1);
        assert_eq!(offload.unit.get(), SHARE_UNIT_MIN);
    }
}
