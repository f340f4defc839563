//! Copy-before-write: what a guest is about to overwrite is kept first; and readers of the snapshot
//! that is kept that way.
//!
//! Order rules of a guest write under a snapshot (it holds the node's claim):
//! 1. granules that are still to be kept are copied, their bits cleared before the read;
//! 2. the write goes on when the old content is in memory and nobody reads it from the source on
//!    behalf of the snapshot; where the client wants the guest to fail with the target, or sees the
//!    source through the target, only when it is in the target;
//! 3. with a target above the source (fleecing overlay) also reads of the target that began before
//!    the copy landed have ended: they may still be reading the source.
//!
//! Old content that the target does not take in time goes to the spill file of the job, where it
//! has one (`spill.rs`); else guests wait for the target when the reserve is used up.
//!
//! A failure is the guest's only if the client chose that; else it is the snapshot's.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::error::Result as EngineResult;
use liveblk_engine::executor::Class;
use liveblk_engine::executor::sync::{Either, select};
use liveblk_engine::{Error, ErrorKind};

use super::chunk::How;
use super::state::Copy;
use crate::error::JobError;
use crate::event::{Action, Operation};
use crate::spec::OnCbwError;

/// How copy-before-write of one job treats guests.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BeforeWrite {
    /// Who suffers from a failure.
    pub(crate) on_error: OnCbwError,
    /// Nanoseconds that a guest waits before that counts as a failure.
    pub(crate) timeout_ns: Option<u64>,
    /// The target shows the source where it has nothing itself.
    pub(crate) overlay: bool,
}

/// Guests that wait, and readers of the snapshot.
#[derive(Default)]
pub(super) struct Crowd {
    next: Cell<u64>,
    waiting: RefCell<Vec<Waiting>>,
    readers: RefCell<Vec<(u64, GuestRange)>>,
}

struct Waiting {
    ticket: u64,
    range: GuestRange,
    error: Option<Error>,
}

/// What became of a copy that a guest waits for.
enum Start {
    /// It is on its way.
    Done,
    /// A copy there is about to end.
    Busy,
    /// The reserve is used up. Whether the range is known to read as zeroes.
    Full(bool),
}

/// A guest in the list of those that wait.
struct InLine<'a> {
    crowd: &'a Crowd,
    ticket: u64,
}

/// A reader of the source on behalf of the snapshot: guests do not overwrite its range meanwhile.
pub(crate) struct Reading {
    copy: Rc<Copy>,
    ticket: u64,
}

impl Crowd {
    fn ticket(&self) -> u64 {
        self.next.set(self.next.get() + 1);
        self.next.get()
    }

    fn line_up(&self, range: GuestRange) -> InLine<'_> {
        let ticket = self.ticket();
        self.waiting.borrow_mut().push(Waiting { ticket, range, error: None });
        InLine { crowd: self, ticket }
    }

    /// Whether the source is read in `range` on behalf of the snapshot.
    fn reads(&self, range: GuestRange) -> bool {
        self.readers.borrow().iter().any(|(_, read)| read.overlaps(range))
    }

    /// Whether a guest waits for something of `range`.
    pub(super) fn waits_for(&self, range: GuestRange) -> bool {
        self.waiting.borrow().iter().any(|guest| guest.range.overlaps(range))
    }

    /// The copy of `range` failed: whoever waits for it fails.
    fn fail(&self, range: GuestRange, error: &Error) {
        let mut waiting = self.waiting.borrow_mut();
        for guest in waiting.iter_mut().filter(|guest| guest.range.overlaps(range)) {
            guest.error.get_or_insert_with(|| error.clone());
        }
    }
}

impl InLine<'_> {
    fn error(&self) -> Option<Error> {
        let waiting = self.crowd.waiting.borrow();
        waiting.iter().find(|guest| guest.ticket == self.ticket)?.error.clone()
    }
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        self.crowd.waiting.borrow_mut().retain(|guest| guest.ticket != self.ticket);
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.copy.crowd.readers.borrow_mut().retain(|(ticket, _)| *ticket != self.ticket);
        self.copy.job.changed().notify_all();
    }
}

impl Copy {
    /// Whether a guest waits until the old content is in the target.
    fn is_strict(&self) -> bool {
        self.before.overlay || self.before.on_error == OnCbwError::BreakGuestWrite
    }

    /// Whether a guest write to `range` must wait for old content to be kept.
    pub(crate) fn is_needed_before_write(&self, range: GuestRange) -> bool {
        let wide = range.widen(self.granularity());
        let read = self.before.overlay && self.target.has_reads(wide);
        !self.is_dead() && (read || self.todo.borrow().intersects(wide) || self.is_busy(wide))
    }

    /// Whether a guest write to the granules of `wide`, of which nothing is to be kept any more,
    /// must wait.
    fn is_busy(&self, wide: GuestRange) -> bool {
        self.regions.is_reading(wide)
            || self.crowd.reads(wide)
            || (self.is_strict() && self.regions.overlap(wide).is_some())
    }

    /// Resolves when the old content of all granules that `range` touches is safe, or when the
    /// snapshot is broken.
    ///
    /// # Errors
    /// Only if the client wants guests to fail with the target: the cause, and nothing was written.
    pub(crate) async fn before_guest_write(self: Rc<Self>, range: GuestRange) -> EngineResult<()> {
        let wide = range.widen(self.granularity());
        let in_line = self.crowd.line_up(wide);
        if self.regions.is_reading(wide) {
            // A copy that is held up gives the region back.
            self.job.changed().notify_all();
        }
        let work = self.keep_old(wide, &in_line);
        let Some(nanos) = self.before.timeout_ns else { return work.await };
        match select(work, self.job.core().sleep(nanos)).await {
            Either::First(result) => result,
            Either::Second(()) => {
                let late = Error::new(ErrorKind::TimedOut, "keep old content for a snapshot");
                if self.before.on_error == OnCbwError::BreakGuestWrite {
                    return Err(late);
                }
                self.fail(JobError::Engine(late));
                Ok(())
            }
        }
    }

    async fn keep_old(self: &Rc<Self>, wide: GuestRange, in_line: &InLine<'_>) -> EngineResult<()> {
        let job = Rc::clone(&self.job);
        let mut full_since = None;
        loop {
            let changed = job.changed().wait();
            if self.is_dead() {
                return Ok(());
            }
            if let Some(error) = in_line.error() {
                return Err(error);
            }
            let next = self.todo.borrow().next_dirty_range(wide.start.bytes(), self.unit);
            let next = next.map(|run| run.intersect(wide)).filter(|run| !run.is_empty());
            if let Some(run) = next {
                let wait = match self.start_before_write(run) {
                    Start::Done => continue,
                    Start::Busy => None,
                    Start::Full(zero) => {
                        let since = *full_since.get_or_insert_with(|| job.core().now());
                        match self.when_full(run, zero, since) {
                            Some(0) => continue,
                            wait => wait,
                        }
                    }
                };
                if let Some(nanos) = wait {
                    let _: Either<(), ()> = select(changed, job.core().sleep(nanos)).await;
                    continue;
                }
            } else if !self.is_busy(wide) {
                break;
            }
            changed.await;
        }
        if self.before.overlay {
            self.target.reads_ended(wide).await;
        }
        Ok(())
    }

    /// Starts a copy that a guest waits for.
    fn start_before_write(self: &Rc<Self>, range: GuestRange) -> Start {
        if self.regions.overlap(range).is_some() {
            // Looked at first: a flight taken and given back would wake the caller for ever.
            return Start::Busy;
        }
        let zero = {
            let zeroes = self.zero.borrow();
            zeroes.test(range.start.bytes())
                && zeroes.next_clean(range.start.bytes()) >= range.end().bytes()
        };
        if !self.reserve(range.len) {
            return Start::Full(zero);
        }
        let flight = self.flight(range, range.len);
        let how = if zero { How::Zeroes } else { How::Memory };
        let Some(run) = self.take(range, how, true) else { return Start::Busy };
        self.job.rate().borrow_mut().charge(range.len, self.job.core().now());
        let copy = Rc::clone(self).copy_run(run, flight);
        drop(self.job.core().spawn(Class::Guest, copy));
        Start::Done
    }

    /// The reserve is used up since `since`: old content goes to the spill file after a while.
    /// Nanoseconds until then, 0 if the caller looks again at once; `None` if it waits for a
    /// change.
    fn when_full(self: &Rc<Self>, range: GuestRange, zero: bool, since: u64) -> Option<u64> {
        match self.spill_delay(since) {
            Some(0) => self.start_spill(range, zero).then_some(0),
            Some(nanos) => Some(nanos),
            None if self.parked.get() == 0 => None,
            None => {
                // The target does not take what is held already: the guest must not wait for it.
                let full = Error::new(ErrorKind::NoSpace, "keep old content for the backup");
                self.job.announce(Operation::Write, Action::Report);
                self.fail(JobError::Engine(full));
                Some(0)
            }
        }
    }

    /// A copy that guests wait for failed, and they are to fail with it: true. The old content is
    /// where it was, because they waited.
    pub(super) fn fails_guests(&self, range: GuestRange, error: &Error) -> bool {
        if self.before.on_error != OnCbwError::BreakGuestWrite || self.is_dead() {
            return false;
        }
        self.mark(range, false);
        self.crowd.fail(range, error);
        self.job.changed().notify_all();
        true
    }

    /// Holds guests back from overwriting `range` of the source.
    pub(crate) fn begin_reading(self: &Rc<Self>, range: GuestRange) -> Reading {
        let ticket = self.crowd.ticket();
        self.crowd.readers.borrow_mut().push((ticket, range));
        Reading { copy: Rc::clone(self), ticket }
    }
}
