//! What a snapshot that is kept by copy-before-write consists of at this moment.

use liveblk_engine::address::GuestRange;
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::{Error, ErrorKind};

use super::state::Copy;
use crate::error::JobError;

/// A run of the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// On the source, as it was.
    Source(GuestRange),
    /// Kept in the spill file.
    Kept(GuestRange),
    /// Kept in the target.
    Target(GuestRange),
    /// Not part of the snapshot, or given up by its reader.
    Refused,
}

impl Piece {
    /// The run; empty if there is none.
    pub(crate) fn range(self) -> GuestRange {
        match self {
            Self::Source(range) | Self::Kept(range) | Self::Target(range) => range,
            Self::Refused => GuestRange::new(0, 0),
        }
    }
}

impl Copy {
    /// The run of the snapshot from `at` on, up to `end`; `None` while the granule of `at` is being
    /// kept.
    pub(crate) fn piece(&self, at: u64, end: u64) -> Option<Piece> {
        let end = end.min(self.size());
        if at >= end {
            return Some(Piece::Refused);
        }
        let mut until = end;
        if let Some(access) = &*self.access.borrow() {
            if !access.test(at) {
                return Some(Piece::Refused);
            }
            until = until.min(access.next_clean(at));
        }
        let granule = at - at % self.granularity();
        if let Some(busy) = self.regions.overlap(GuestRange::new(granule, until - granule)) {
            if busy.start.bytes() <= at {
                return None;
            }
            until = until.min(busy.start.bytes());
        }
        if let Some(kept) = self.spill.run_at(at) {
            return Some(Piece::Kept(kept.intersect(GuestRange::new(at, until - at))));
        }
        let until = until.min(self.spill.next_after(at).unwrap_or(until));
        let todo = self.todo.borrow();
        if todo.test(at) {
            let until = until.min(todo.next_clean(at));
            return Some(Piece::Source(GuestRange::new(at, until - at)));
        }
        let until = until.min(todo.next_dirty(at).unwrap_or(until));
        Some(Piece::Target(GuestRange::new(at, until - at)))
    }

    /// Whether the snapshot can be read.
    ///
    /// # Errors
    /// What broke it; `Unsupported` when it is over.
    pub(crate) fn check_snapshot(&self) -> liveblk_engine::Result<()> {
        match self.check() {
            Err(JobError::Engine(error)) => Err(error),
            Ok(()) if !self.is_dead() => Ok(()),
            _ => Err(Error::new(ErrorKind::Unsupported, "read the snapshot")),
        }
    }

    /// Keeps only what is dirty in `bitmap`; the rest is no part of the snapshot. Only before the
    /// hook is in.
    pub(crate) fn restrict_to(&self, bitmap: &DirtyBitmap) {
        let mut todo = DirtyBitmap::new(self.size(), self.granularity());
        todo.merge(bitmap);
        self.access.replace(Some(todo.clone()));
        self.todo.replace(todo);
        self.note_left();
    }

    /// The granules that lie wholly inside `range`.
    pub(crate) fn whole_granules_in(&self, range: GuestRange) -> Option<GuestRange> {
        let granule = self.granularity();
        let start = range.start.bytes().next_multiple_of(granule);
        let end = range.end().bytes();
        let end = if end >= self.size() { self.size() } else { end - end % granule };
        (start < end).then(|| GuestRange::new(start, end - start))
    }

    /// Whole granules of `range` cannot be read any more.
    pub(super) fn withhold(&self, range: GuestRange) {
        let mut access = self.access.borrow_mut();
        let access = access.get_or_insert_with(|| {
            let mut all = DirtyBitmap::new(self.size(), self.granularity());
            all.set_all();
            all
        });
        access.clear_range(range);
    }

    /// `range` (whole granules, nothing of them in flight) is no part of the snapshot any more.
    pub(crate) fn forget(&self, range: GuestRange) {
        self.withhold(range);
        self.todo.borrow_mut().clear_range(range);
        self.spill.forget(range);
        self.note_left();
        self.job.changed().notify_all();
    }
}
