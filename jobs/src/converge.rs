//! Convergence: a mirror or active commit is ready before a deadline, whatever guests write.
//!
//! ```text
//! background -> write-blocking -> throttling
//! ```
//! - *background*: guests are not slowed down; as long as the copy is expected in good time.
//! - *write-blocking*: what guests write goes to the target at once, so that only less is left.
//! - *throttling*: each write of a guest is delayed before it enters the node, step by step longer
//!   while the copy is late, shorter while it is early.
//!
//! Rules: (1) a phase is left only for a later one: when the rates of a while say that it is too
//! late, background also before more than twice the disk would be copied; (2) no write is delayed
//! longer than half the maximum latency, and copies in flight, for which it may wait twice, are
//! bounded by what the target takes in a quarter of it (where two granules are more, delays are
//! shorter): the rest is the write's own; (3) delays end at once when the job is ready,
//! stands still, fails, or is told to end; (4) where the job's own speed limit is what takes long,
//! nobody is delayed for it; (5) a missed deadline is told once, and the job goes on; (6) gates are
//! closed for no more than the target takes in half the maximum latency, unless a guest keeps
//! ahead.
//!
//! Time and traffic are arguments of the pure part, so it is tested without a clock.

use std::cell::Cell;
use std::rc::Rc;

use crate::copy::Copy;
use crate::error::Result;
use crate::event::Event;
use crate::follow_error::FollowError;
use crate::limits::{
    CONVERGE_LATENCY_MAX_US, CONVERGE_TICK_MAX_NS, CONVERGE_TICK_MIN_NS, PIVOT_BYTES,
    PIVOT_BYTES_MAX, PIVOT_PATIENCE_NS,
};
use crate::spec::CopyMode;

#[cfg(test)]
mod tests;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Converge {
    /// Milliseconds from the start within which the job is to be ready; at least 1.
    pub deadline_ms: u32,
    /// Microseconds that a guest's write may take longer; from 1 to
    /// [`CONVERGE_LATENCY_MAX_US`](crate::limits::CONVERGE_LATENCY_MAX_US).
    pub max_latency_us: u32,
}

/// How far convergence went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Guests are not slowed down.
    Background,
    /// Guests' writes go to the target, too.
    WriteBlocking,
    /// Guests' writes are delayed.
    Throttling,
}

impl Phase {
    /// The name in QMP.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Background => "background",
            Self::WriteBlocking => "write-blocking",
            Self::Throttling => "throttling",
        }
    }
}

/// What queries and events tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvergeInfo {
    /// The phase.
    pub phase: Phase,
    /// Bytes per second that guests make dirty.
    pub dirty_rate: u64,
    /// Bytes that are dirty.
    pub remaining: u64,
    /// Microseconds that each write of a guest is delayed.
    pub delay_us: u64,
    /// Milliseconds until nothing is left, if that is to be expected.
    pub eta_ms: Option<u64>,
    /// The deadline has passed before the job was ready.
    pub missed: bool,
}

/// Bytes since the start of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Traffic {
    /// Made dirty by guests.
    pub(crate) dirtied: u64,
    /// Copied in the background.
    pub(crate) copied: u64,
    /// Written to the target beside guests' writes.
    pub(crate) covered: u64,
}

/// What a look at a job sees.
#[derive(Clone, Copy, Debug, Default)]
struct Sight {
    traffic: Traffic,
    /// Dirty bytes.
    left: u64,
    /// Bytes of the disk.
    size: u64,
    /// The speed limit, in bytes per second; 0: none.
    speed: u64,
    /// The job copies in the other mode.
    blocking: bool,
}

/// The convergence of one job.
#[derive(Debug)]
pub(crate) struct Convergence {
    deadline_ns: u64,
    latency_ns: u64,
    began: u64,
    phase: Cell<Phase>,
    /// When the phase began.
    since: Cell<u64>,
    missed: Cell<bool>,
    met: Cell<bool>,
    /// The last look, if there was one.
    seen: Cell<Option<(u64, Traffic)>>,
    /// Bytes per second.
    dirty_rate: Cell<u64>,
    copy_rate: Cell<u64>,
    target_rate: Cell<u64>,
    /// What was copied, and brought to the target in all, in how many nanoseconds of looking.
    mean: Cell<(u64, u64, u64)>,
    /// Nanoseconds that a guest's write may be delayed: what the copies in flight leave.
    most: Cell<u64>,
    /// Nanoseconds that each guest's write is delayed.
    delay: Cell<u64>,
}

/// What a look at the traffic led to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Step {
    phase: bool,
    missed: bool,
}

impl Converge {
    /// # Errors
    /// Values that mean nothing.
    pub(crate) fn check(&self) -> Result<()> {
        let members = [
            ("deadline-ms", self.deadline_ms, u32::MAX),
            ("max-latency-us", self.max_latency_us, CONVERGE_LATENCY_MAX_US),
        ];
        for (member, value, most) in members {
            if value == 0 || value > most {
                return Err(FollowError::BadConverge { member, most }.into());
            }
        }
        Ok(())
    }
}

impl Convergence {
    /// The convergence of a job that starts at `now` (nanoseconds), in `mode`.
    pub(crate) fn new(wanted: Converge, mode: CopyMode, now: u64) -> Rc<Self> {
        let phase = match mode {
            CopyMode::Background => Phase::Background,
            CopyMode::WriteBlocking => Phase::WriteBlocking,
        };
        Rc::new(Self {
            deadline_ns: u64::from(wanted.deadline_ms) * 1_000_000,
            latency_ns: u64::from(wanted.max_latency_us) * 1_000,
            began: now,
            phase: Cell::new(phase),
            since: Cell::new(now),
            missed: Cell::new(false),
            met: Cell::new(false),
            seen: Cell::new(None),
            dirty_rate: Cell::new(0),
            copy_rate: Cell::new(0),
            target_rate: Cell::new(0),
            mean: Cell::default(),
            most: Cell::new(u64::from(wanted.max_latency_us) * 500),
            delay: Cell::new(0),
        })
    }

    /// Looks at the copies again and again and does what the phases say. Never ends.
    pub(crate) async fn control(&self, copy: &Rc<Copy>) -> std::convert::Infallible {
        let job = copy.job();
        let core = job.core().clone();
        let tick = (self.deadline_ns / 64).clamp(CONVERGE_TICK_MIN_NS, CONVERGE_TICK_MAX_NS);
        loop {
            core.sleep(tick).await;
            let sight = Sight {
                traffic: copy.traffic(),
                left: copy.dirty_bytes(),
                size: copy.source().size(),
                speed: job.rate().borrow().speed(),
                blocking: job.copy_mode() == CopyMode::WriteBlocking,
            };
            let step = if job.wants_pause() {
                self.stand_still(core.now(), sight)
            } else {
                self.look(core.now(), sight)
            };
            if self.phase.get() > Phase::Background {
                let window = copy.set_window(self.window());
                self.set_most(window);
                // Not behind all that is in flight already.
                if !sight.blocking && copy.fits_window() {
                    job.set_copy_mode(CopyMode::WriteBlocking);
                }
            }
            if step.phase || step.missed {
                let (id, info) = (Rc::clone(job.id()), self.info(sight.left));
                job.emit(Event::Converge { id, info });
            }
        }
    }

    /// The job is ready: guests are slowed down no more than its copy mode says.
    pub(crate) fn meet(&self) {
        self.met.set(true);
        self.delay.set(0);
        self.dirty_rate.set(0);
        if self.phase.get() == Phase::Throttling {
            self.phase.set(Phase::WriteBlocking);
        }
    }

    /// Nanoseconds that a guest's write waits before it enters the node.
    pub(crate) fn delay(&self) -> u64 {
        self.delay.get()
    }

    /// Bytes, at least a `granule`, for which the gates may be closed at `now` by who tries since
    /// `began`: what the target takes in half the maximum latency. It doubles again and again when
    /// the deadline has passed, so that a guest that keeps ahead is cut at last.
    pub(crate) fn little(&self, now: u64, began: u64, granule: u64) -> u64 {
        let (copied, _) = self.mean_rates();
        let first = bytes_in(self.copy_rate.get().min(copied), self.latency_ns / 2);
        let first = first.min(PIVOT_BYTES).max(granule);
        let deadline = self.began.saturating_add(self.deadline_ns);
        let from = if self.met.get() { began } else { began.max(deadline) };
        let patience = (self.deadline_ns / 4).max(10 * PIVOT_PATIENCE_NS);
        let doublings = u32::try_from(now.saturating_sub(from) / patience).unwrap_or(u32::MAX);
        first.checked_shl(doublings.min(16)).unwrap_or(PIVOT_BYTES_MAX)
    }

    /// What queries tell; `left` bytes are dirty.
    pub(crate) fn info(&self, left: u64) -> ConvergeInfo {
        ConvergeInfo {
            phase: self.phase.get(),
            dirty_rate: self.dirty_rate.get(),
            remaining: left,
            delay_us: self.delay.get() / 1_000,
            eta_ms: self.eta_ns(left).map(|nanos| nanos / 1_000_000),
            missed: self.missed.get(),
        }
    }

    /// At most `window` bytes of copies are in flight: a write may wait for them twice, for one of
    /// its own granules and then in the queue of the target.
    fn set_most(&self, window: u64) {
        let (_, target) = self.mean_rates();
        let nanos = u128::from(window) * 2_000_000_000 / u128::from(target.max(1));
        let left = self.latency_ns.saturating_sub(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.most.set(left.clamp(self.latency_ns / 8, self.latency_ns / 2));
        self.delay.set(self.delay.get().min(self.most.get()));
    }

    /// Bytes of copies in flight that a guest's write may have to wait for.
    fn window(&self) -> u64 {
        let (_, target) = self.mean_rates();
        bytes_in(self.target_rate.get().min(target), self.latency_ns / 4)
    }

    /// Bytes per second that were copied, and that reached the target, since the start: a large
    /// copy that ends between two looks is no quick target.
    fn mean_rates(&self) -> (u64, u64) {
        let (copied, reached, nanos) = self.mean.get();
        let rate =
            |bytes| u64::try_from(u128::from(bytes) * 1_000_000_000 / u128::from(nanos.max(1)));
        (rate(copied).unwrap_or(u64::MAX), rate(reached).unwrap_or(u64::MAX))
    }

    fn eta_ns(&self, left: u64) -> Option<u64> {
        if left == 0 {
            return Some(0);
        }
        let gain = self.copy_rate.get().saturating_sub(self.dirty_rate.get());
        let nanos = (u128::from(left) * 1_000_000_000).checked_div(u128::from(gain))?;
        u64::try_from(nanos).ok()
    }

    /// Takes in what happened up to `now` while the job stood still: nothing is learnt from it.
    fn stand_still(&self, now: u64, sight: Sight) -> Step {
        self.seen.set(Some((now, sight.traffic)));
        self.since.set(now);
        Step { phase: false, missed: self.has_missed(now) }
    }

    /// Takes in what happened up to `now`.
    fn look(&self, now: u64, sight: Sight) -> Step {
        self.measure(now, sight.traffic);
        let before = self.phase.get();
        if sight.blocking && before == Phase::Background {
            self.enter(Phase::WriteBlocking, now);
        }
        let missed = self.has_missed(now);
        let time_left = self.deadline_ns.saturating_sub(now.saturating_sub(self.began));
        let eta = self.eta_ns(sight.left);
        let late = |eighths: u64| eta.is_none_or(|eta| eta > time_left / 8 * eighths);
        let measured = now.saturating_sub(self.since.get()) >= self.deadline_ns / 8;
        // What would be copied in all if nothing became dirty any more.
        let volume = sight.traffic.copied.saturating_add(sight.left);
        let too_much = volume > sight.size.saturating_add(sight.size / 4 * 3);
        let limited = sight.speed > 0 && self.copy_rate.get() >= sight.speed / 4 * 3;
        match self.phase.get() {
            Phase::Background if too_much || missed || (measured && late(4)) => {
                self.enter(Phase::WriteBlocking, now);
            }
            Phase::WriteBlocking if !limited && (missed || (measured && late(6))) => {
                self.enter(Phase::Throttling, now);
            }
            _ => {}
        }
        if self.phase.get() == Phase::Throttling {
            self.pace(late(6) && !limited, !late(4) || limited);
        }
        Step { phase: self.phase.get() != before, missed }
    }

    fn enter(&self, phase: Phase, now: u64) {
        self.phase.set(phase);
        self.since.set(now);
    }

    /// Whether the deadline passed since the last look.
    fn has_missed(&self, now: u64) -> bool {
        now.saturating_sub(self.began) >= self.deadline_ns && !self.missed.replace(true)
    }

    /// Delays double while the copy is late and get shorter by an eighth while it is early.
    fn pace(&self, late: bool, early: bool) {
        let (most, delay) = (self.most.get(), self.delay.get());
        let least = (most / 16).max(1).min(most);
        if late {
            self.delay.set(delay.saturating_mul(2).clamp(least, most));
        } else if early {
            self.delay.set(if delay <= least { 0 } else { delay - (delay / 8).max(1) });
        }
    }

    fn measure(&self, now: u64, traffic: Traffic) {
        let Some((then, before)) = self.seen.replace(Some((now, traffic))) else { return };
        let (copied, reached, looked) = self.mean.get();
        let more = traffic.copied.saturating_sub(before.copied);
        let beside = traffic.covered.saturating_sub(before.covered);
        let passed = now.saturating_sub(then);
        let reached = reached.saturating_add(more).saturating_add(beside);
        self.mean.set((copied.saturating_add(more), reached, looked.saturating_add(passed)));
        let nanos = u128::from(passed.max(1));
        let rate = |now: u64, before: u64| {
            let bytes = u128::from(now.saturating_sub(before));
            u64::try_from(bytes * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
        };
        // The last few looks count.
        let smooth = |cell: &Cell<u64>, rate: u64| cell.set(cell.get() - cell.get() / 4 + rate / 4);
        let copied = rate(traffic.copied, before.copied);
        smooth(&self.dirty_rate, rate(traffic.dirtied, before.dirtied));
        smooth(&self.copy_rate, copied);
        smooth(&self.target_rate, copied.saturating_add(rate(traffic.covered, before.covered)));
    }
}

/// Bytes at `rate` bytes per second in `nanos`.
fn bytes_in(rate: u64, nanos: u64) -> u64 {
    let bytes = u128::from(rate) * u128::from(nanos) / 1_000_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}
