//! The loop: picks dirty runs, keeps the window full, paces, pauses.

use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::executor::Class;

use super::chunk::{How, Run};
use super::offload::Way;
use super::state::Copy;
use crate::error::{JobError, Result};
use crate::limits::ZERO_UNIT;

impl Copy {
    /// Copies until nothing is dirty or in flight.
    ///
    /// # Errors
    /// The failure that the policy reports; `Cancelled` when the job is forced to end. Copies may
    /// still be in flight then.
    pub(crate) async fn run_until_clean(self: &Rc<Self>) -> Result<()> {
        self.run_while(|| true).await.map(|_| ())
    }

    /// As [`Copy::run_until_clean`], but stops starting copies when `wanted` says no (it is asked
    /// after each change); true if everything is clean.
    pub(crate) async fn run_while(self: &Rc<Self>, wanted: impl Fn() -> bool) -> Result<bool> {
        let job = &self.job;
        loop {
            let changed = job.changed().wait();
            self.check()?;
            if job.wants_pause() {
                if self.is_quiet() {
                    job.pause_point().await;
                } else {
                    changed.await;
                }
                continue;
            }
            if self.is_clean() {
                return Ok(true);
            }
            if !wanted() {
                return Ok(false);
            }
            if !self.has_room() {
                changed.await;
                continue;
            }
            let wait = self.delay();
            if wait > 0 {
                job.set_busy(false);
                job.nap(wait).await;
                job.set_busy(true);
                continue;
            }
            if self.look_ahead().await {
                continue;
            }
            if !self.start_next() {
                changed.await;
            }
        }
    }

    /// The last pass, with the gates of the source closed: copies what is left, then makes the
    /// target durable. Neither paced nor paused.
    ///
    /// # Errors
    /// The first failure; what was not copied is dirty again.
    pub(crate) async fn last_pass(self: &Rc<Self>) -> liveblk_engine::Result<()> {
        self.begin_last_pass();
        self.pass_failure.take();
        let result = self.last_copies().await;
        self.end_last_pass();
        result
    }

    async fn last_copies(self: &Rc<Self>) -> liveblk_engine::Result<()> {
        use crate::event::Operation;
        let cancelled =
            || liveblk_engine::Error::new(liveblk_engine::ErrorKind::Cancelled, "finish mirror");
        loop {
            let changed = self.job.changed().wait();
            if self.is_dead() {
                return Err(cancelled());
            }
            let failure = self.pass_failure.borrow().as_ref().map(|(_, error)| error.clone());
            if let Some(error) = failure {
                if self.is_quiet() {
                    return Err(error);
                }
                changed.await;
                continue;
            }
            if self.is_clean() {
                break;
            }
            if self.look_ahead().await {
                continue;
            }
            if !(self.has_room() && self.start_next()) {
                changed.await;
            }
        }
        let flush = self.target.flush(self.origin());
        match self.job.unless_dead(flush, || self.is_dead()).await {
            None => Err(cancelled()),
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => {
                self.pass_failure.borrow_mut().get_or_insert((Operation::Write, error.clone()));
                Err(error)
            }
        }
    }

    /// Makes the target durable, as often as the policy wants.
    ///
    /// # Errors
    /// As [`Copy::run_until_clean`].
    pub(crate) async fn flush_target(&self) -> Result<()> {
        loop {
            let flush = self.target.flush(self.origin());
            match self.job.unless_dead(flush, || self.is_dead()).await {
                None => return self.check().and(Err(JobError::Cancelled)),
                Some(Ok(())) => return Ok(()),
                Some(Err(error)) => self.answer(crate::event::Operation::Write, error).await?,
            }
        }
    }

    /// Nanoseconds until the next background copy may start.
    fn delay(&self) -> u64 {
        let now = self.job.core().now();
        let retry = self.retry_at.get().saturating_sub(now);
        let mut rate = self.job.rate().borrow_mut();
        rate.unit(self.granularity(), self.largest_unit());
        retry.max(rate.delay(now))
    }

    /// Starts the next background copy; false if everything dirty is in flight already.
    fn start_next(self: &Rc<Self>) -> bool {
        let Some(run) = self.next_run() else { return false };
        let range = run.region.range();
        if run.how != How::Zeroes {
            self.job.rate().borrow_mut().charge(range.len, self.job.core().now());
        }
        let flight = self.flight(range, 0);
        let copy = Rc::clone(self).copy_run(run, flight);
        drop(self.job.core().spawn(Class::Background, copy));
        true
    }

    /// Claims the next dirty run after the cursor that nobody is copying. A run begins and ends at
    /// granules: before the disk grew, the cursor and regions in flight may have ended at its old
    /// end, within one, and a bit that no run covers would never be cleared.
    fn next_run(&self) -> Option<Run> {
        let granule = self.granularity();
        let mut from = self.cursor.get() / granule * granule;
        let mut wrapped = from == 0;
        loop {
            let found = self.next_candidate(from);
            let Some((range, how)) = found else {
                if wrapped {
                    return None;
                }
                (from, wrapped) = (0, true);
                continue;
            };
            let range = match self.regions.overlap(range) {
                None => range,
                Some(other) if other.start > range.start => {
                    GuestRange { len: other.start.since(range.start), ..range }
                }
                Some(other) => {
                    from = other.end().bytes().next_multiple_of(granule);
                    continue;
                }
            };
            self.cursor.set(range.end().bytes());
            return self.take(range, how, false);
        }
    }

    /// The next dirty run of one kind at or after `from`, at most a unit long.
    fn next_candidate(&self, from: u64) -> Option<(GuestRange, How)> {
        let todo = self.todo.borrow();
        let zeroes = self.zero.borrow();
        let unit = |largest| self.job.rate().borrow_mut().unit(todo.granularity(), largest);
        let start = todo.next_dirty(from)?;
        if zeroes.test(start) {
            let limit = ZERO_UNIT.max(unit(self.largest_unit()));
            let range =
                todo.next_dirty_range(start, limit.min(zeroes.next_clean(start) - start))?;
            return Some((range, How::Zeroes));
        }
        let change = zeroes.next_dirty(start).unwrap_or(self.size());
        let (how, limit, end) = match self.way(start) {
            Way::Memory(end) => (How::Memory, unit(self.largest_unit()), end),
            Way::Share(end) => (How::Share, unit(self.largest_share()), end),
        };
        let range = todo.next_dirty_range(start, limit.min(change.min(end) - start))?;
        Some((range, how))
    }

    /// Claims `range` and clears its dirty bits.
    pub(super) fn take(&self, range: GuestRange, how: How, urgent: bool) -> Option<Run> {
        let region = self.regions.claim(range)?;
        #[cfg(feature = "planted-bugs")]
        if self.clears_late(how == How::Zeroes) {
            return Some(Run { region, how, urgent });
        }
        self.todo.borrow_mut().clear_range(range);
        Some(Run { region, how, urgent })
    }

    /// Whether the bits of a copy are cleared only after its read, a planted bug.
    #[cfg(feature = "planted-bugs")]
    pub(super) fn clears_late(&self, zero: bool) -> bool {
        use liveblk_engine::planted::{Planted, has};
        !zero && has(self.job.core(), Planted::BitClearedAfterRead)
    }
}
