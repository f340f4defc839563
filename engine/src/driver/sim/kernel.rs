//! The simulated kernel: operations in flight, the events that drive them, completions.
//!
//! Order rules: (1) an operation's bytes move in pieces at random moments between its start and
//! its completion; (2) a sync or a sync of a folder has its effect at its completion; (3) a
//! completed operation is out of flight before anything later is submitted, so a sync submitted
//! after it covers it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::config::{FaultRule, SimConfig, SimOpKind, SlowDisk, Subject};
use super::file::Covered;
use super::fs::SimFs;
use super::hold::{HoldPoint, HoldState};
use super::plan::{Fate, OpenFile, Work};
use super::rng::Rng;
use super::trace::{Trace, hash_buf};
use crate::driver::{Done, DriverCounters, FsOp, FsOutcome, Nanos, OpKind, OpSlot, Token, Wait};
use crate::executor::{Mailbox, Message, SendOutcome};

/// The machine below the cores.
pub(super) struct Kernel {
    pub(super) now: Nanos,
    pub(super) rng: Rng,
    pub(super) trace: Trace,
    pub(super) config: SimConfig,
    pub(super) fs: SimFs,
    pub(super) open: Vec<OpenFile>,
    pub(super) rules: Vec<Rule>,
    flights: BTreeMap<u64, Flight>,
    events: BTreeMap<(Nanos, u64), Event>,
    next_event: u64,
    next_op: u64,
    cores: Vec<CoreState>,
    holds: Vec<HoldState>,
    mailboxes: Arc<[Arc<Mailbox>]>,
    dead: bool,
    /// When the slow disk is through with what it was given.
    slow_until: Nanos,
}

#[derive(Default)]
struct CoreState {
    ready: Vec<Done>,
    counters: DriverCounters,
}

/// A failure to inject and how many operations matched it.
pub(super) struct Rule {
    pub(super) rule: FaultRule,
    pub(super) seen: u64,
}

/// An operation between submission and completion.
pub(super) struct Flight {
    core: usize,
    token: Token,
    subject: Subject,
    work: Work,
    fate: Fate,
    answer: (i32, FsOutcome),
    /// Hash of a write's bytes at its submission.
    fingerprint: u64,
    hold: Option<usize>,
}

enum Event {
    /// Bytes `from..to` of a read or write move.
    Piece {
        op: u64,
        from: usize,
        to: usize,
    },
    /// A call on files happens.
    Apply {
        op: u64,
    },
    Complete {
        op: u64,
    },
}

impl Kernel {
    pub(super) fn new(config: SimConfig, fs: SimFs, mailboxes: Arc<[Arc<Mailbox>]>) -> Self {
        Self {
            now: 0,
            rng: Rng::new(config.seed),
            trace: Trace::new(),
            cores: mailboxes.iter().map(|_| CoreState::default()).collect(),
            config,
            fs,
            open: Vec::new(),
            rules: Vec::new(),
            flights: BTreeMap::new(),
            events: BTreeMap::new(),
            next_event: 0,
            next_op: 1,
            holds: Vec::new(),
            mailboxes,
            dead: false,
            slow_until: 0,
        }
    }

    /// Takes an operation of a core.
    pub(super) fn submit(&mut self, core: usize, token: Token, slot: &mut OpSlot) {
        self.cores[core].counters.submitted += 1;
        if self.dead {
            self.cores[core].ready.push(Done { token, result: -libc::ECANCELED });
            return;
        }
        let op = self.next_op;
        self.next_op += 1;
        let subject = self.subject(&slot.kind);
        let work = self.work(op, &mut slot.kind);
        let fate = self.fate(&subject, &work);
        let fingerprint = match &work {
            Work::Write { buf, .. } => hash_buf(buf),
            Work::Read { buf, .. } => {
                buf.fill(self.rng.bits().to_le_bytes()[0]);
                0
            }
            _ => 0,
        };
        for word in [core as u64, subject.kind as u64, subject.offset, subject.len, fingerprint] {
            self.trace.word(word);
        }
        let hold = self.holds.iter_mut().position(|hold| {
            if hold.left == 0 || !hold.filter.matches(&subject) {
                return false;
            }
            let passes = hold.skip > 0;
            hold.skip -= u64::from(passes);
            !passes
        });
        let point = hold.map(|index| {
            self.holds[index].left -= 1;
            self.holds[index].ops.push(op);
            self.holds[index].point
        });
        let answer = (0, FsOutcome::None);
        let flight = Flight { core, token, subject, work, fate, answer, fingerprint, hold };
        self.flights.insert(op, flight);
        if point != Some(HoldPoint::Start) {
            self.start(op);
        }
    }

    /// Plans when the parts of an operation happen.
    fn start(&mut self, op: u64) {
        let flight = self.flights.get_mut(&op).expect("invariant: started once, when in flight");
        let range = self.config.latency.of(flight.subject.kind).clone();
        let held = flight.hold.is_some();
        let instant = !held && self.rng.chance(self.config.instant_per_mille);
        let mut span = self.rng.between(range.start, range.end);
        if instant {
            span = 0;
        } else if self.rng.chance(50) {
            span *= self.rng.between(2, 20);
        }
        let len = flight.work.begin(&flight.fate, &self.fs);
        let is_slow = |slow: &&SlowDisk| {
            flight.subject.kind == SimOpKind::Write && slow.filter.matches(&flight.subject)
        };
        if let Some(slow) = self.config.slow.as_ref().filter(is_slow) {
            let nanos = len as u64 * 1_000_000_000 / slow.bytes_per_second.max(1);
            self.slow_until = self.slow_until.max(self.now) + nanos;
            span = self.slow_until - self.now;
        }
        for (from, to) in flight.fate.pieces(len, flight.work.offset(), &mut self.rng) {
            let at = self.now + self.rng.below(span + 1);
            self.schedule(at, Event::Piece { op, from, to });
        }
        let flight = self.flights.get_mut(&op).expect("invariant: still in flight");
        match (&flight.fate, &flight.work) {
            (Fate::Fail(errno), _) => flight.answer.0 = -errno,
            (_, Work::Read { .. } | Work::Write { .. }) => {
                flight.answer.0 = i32::try_from(len).unwrap_or(i32::MAX);
                if let Work::Write { no_space: true, .. } = flight.work {
                    flight.answer.0 = -libc::ENOSPC;
                }
            }
            (_, Work::Fs(FsOp::SyncFolder(_), _) | Work::Sync { .. } | Work::Answer(_)) => {}
            (_, Work::Fs(..) | Work::Run(_)) => {
                let at = self.now + self.rng.below(span + 1);
                self.schedule(at, Event::Apply { op });
            }
        }
        if !held {
            self.schedule(self.now + span, Event::Complete { op });
        }
        if instant {
            while let Some(event) = self.events.first_entry()
                && event.key().0 <= self.now
            {
                let event = event.remove();
                self.run_event(event);
            }
        }
    }

    fn schedule(&mut self, at: Nanos, event: Event) {
        self.events.insert((at, self.next_event), event);
        self.next_event += 1;
    }

    /// When something happens next, if anything is planned.
    pub(super) fn next_event(&self) -> Option<Nanos> {
        self.events.first_key_value().map(|((at, _), _)| *at)
    }

    /// Lets everything happen that is due.
    pub(super) fn run_due(&mut self) {
        while self.next_event().is_some_and(|at| at <= self.now) {
            let Some((_, event)) = self.events.pop_first() else { return };
            self.run_event(event);
        }
    }

    fn run_event(&mut self, event: Event) {
        match event {
            Event::Piece { op, from, to } => {
                let flight = self.flights.get(&op).expect("invariant: pieces come before the end");
                flight.work.move_bytes(op, from, to, &self.fs);
            }
            Event::Apply { op } => self.apply(op),
            Event::Complete { op } => self.complete(op),
        }
    }

    /// The effect of a call on files, or of work.
    fn apply(&mut self, op: u64) {
        let flight = self.flights.get_mut(&op).expect("invariant: applied before the end");
        let work = std::mem::replace(&mut flight.work, Work::Answer(0));
        match work {
            Work::Fs(call, covered) => {
                let answer = self.run_fs(op, &call, &covered);
                let flight = self.flights.get_mut(&op).expect("invariant: still in flight");
                flight.answer = answer;
                flight.work = Work::Fs(call, covered);
            }
            Work::Run(run) => run(),
            other => flight.work = other,
        }
    }

    fn complete(&mut self, op: u64) {
        if let Some(flight) = self.flights.get(&op)
            && matches!(flight.work, Work::Fs(FsOp::SyncFolder(_), _))
            && !matches!(flight.fate, Fate::Fail(_))
        {
            self.apply(op);
        }
        let flight = self.flights.remove(&op).expect("invariant: completed once");
        let failed = matches!(flight.fate, Fate::Fail(_));
        let mut content = 0;
        match &flight.work {
            Work::Sync { inode, covered } if failed => self.fs.strand(*inode, covered),
            Work::Sync { inode, covered } => self.fs.state().sync_file(*inode, covered),
            Work::Write { inode, offset, fua, buf, .. } => {
                if self.config.check_write_buffers && buf.is_stable() {
                    assert!(
                        hash_buf(buf) == flight.fingerprint,
                        "seed {}: buffer of {:?} changed while it was written",
                        self.config.seed,
                        flight.subject
                    );
                }
                if let (true, Ok(len @ 1..)) = (*fua, u64::try_from(flight.answer.0)) {
                    self.fs.persist(*inode, op, offset + len);
                }
            }
            Work::Read { buf, .. } => content = hash_buf(buf),
            _ => {}
        }
        for word in [op, flight.answer.0.cast_unsigned().into(), self.now, content] {
            self.trace.word(word);
        }
        self.deliver(flight);
    }

    fn deliver(&mut self, flight: Flight) {
        let (token, (result, outcome)) = (flight.token, flight.answer);
        if matches!(outcome, FsOutcome::None) {
            self.cores[flight.core].ready.push(Done { token, result });
            return;
        }
        let outcome = SendOutcome(outcome);
        self.mailboxes[flight.core].push(Message::WorkDone { token, result, outcome });
    }

    /// Whether a core has completions to look at.
    pub(super) fn has_ready(&self, core: usize) -> bool {
        !self.cores[core].ready.is_empty()
    }

    /// A turn of a core's driver: reports completions in random order. A core that may sleep while
    /// nothing is ready lets time pass by itself (only when it drains).
    pub(super) fn turn(&mut self, core: usize, wait: Wait, done: &mut Vec<Done>) {
        self.cores[core].counters.turns += 1;
        while wait != Wait::No && !self.has_ready(core) && self.mailboxes[core].is_empty() {
            let Some(((at, _), event)) = self.events.pop_first() else { break };
            self.now = self.now.max(at);
            self.run_event(event);
        }
        while self.has_ready(core) {
            let index = self.rng.index(self.cores[core].ready.len());
            done.push(self.cores[core].ready.swap_remove(index));
        }
    }

    pub(super) fn counters(&self, core: usize) -> DriverCounters {
        self.cores[core].counters
    }

    /// Ends the world: operations in flight answer ECANCELED and have no further effect. What they
    /// hold is returned, to be dropped when the kernel is not borrowed.
    pub(super) fn cut(&mut self) -> Vec<Flight> {
        self.dead = true;
        self.events.clear();
        self.holds.clear();
        let flights: Vec<Flight> = std::mem::take(&mut self.flights).into_values().collect();
        for flight in &flights {
            let done = Done { token: flight.token, result: -libc::ECANCELED };
            self.cores[flight.core].ready.push(done);
        }
        flights
    }

    pub(super) fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// The operations in flight, for people.
    pub(super) fn describe_flights(&self) -> String {
        let lines = self.flights.iter().map(|(op, flight)| {
            let held = if flight.hold.is_some() { ", held" } else { "" };
            let Subject { kind, name, offset, len } = &flight.subject;
            format!("\n  {op}: {kind:?} '{name}' {offset}+{len} of core {}{held}", flight.core)
        });
        lines.collect()
    }

    /// What had completed by now: what a sync submitted as `op` covers.
    pub(super) fn covered(&self, op: u64) -> Covered {
        Covered { before: op, in_flight: self.flights.keys().copied().collect() }
    }

    pub(super) fn add_hold(&mut self, state: HoldState) -> usize {
        self.holds.push(state);
        self.holds.len() - 1
    }

    pub(super) fn held(&self, index: usize) -> usize {
        self.holds.get(index).map_or(0, |hold| hold.ops.len())
    }

    pub(super) fn release_one(&mut self, index: usize) {
        let Some(hold) = self.holds.get_mut(index) else { return };
        if hold.ops.is_empty() {
            return;
        }
        let (op, point) = (hold.ops.remove(0), hold.point);
        if let Some(flight) = self.flights.get_mut(&op) {
            flight.hold = None;
            match point {
                HoldPoint::Start => self.start(op),
                // Its parts may be planned for later than now.
                HoldPoint::Completion => self.complete_last(op),
            }
        }
    }

    /// Plans the completion of an operation after its last part.
    fn complete_last(&mut self, op: u64) {
        let parts = self.events.iter().filter(|(_, event)| match event {
            Event::Piece { op: part, .. } | Event::Apply { op: part } => *part == op,
            Event::Complete { .. } => false,
        });
        let at = parts.map(|((at, _), _)| *at).max().unwrap_or(self.now).max(self.now);
        self.schedule(at + 1, Event::Complete { op });
    }

    pub(super) fn release_hold(&mut self, index: usize) {
        if let Some(hold) = self.holds.get_mut(index) {
            hold.left = 0;
        }
        while self.held(index) > 0 {
            self.release_one(index);
        }
    }
}

impl Kernel {
    /// What an operation is about.
    fn subject(&self, kind: &OpKind) -> Subject {
        use SimOpKind as Kind;
        let name = |file: &crate::driver::Handle| {
            self.open_file(file).map_or(String::new(), |open| open.name.clone())
        };
        let (kind, name, offset, len) = match kind {
            OpKind::Read { file, offset, buf } => (Kind::Read, name(file), *offset, buf.len()),
            OpKind::Write { file, offset, buf, .. } => {
                (Kind::Write, name(file), *offset, buf.len())
            }
            OpKind::Sync { file } => (Kind::Sync, name(file), 0, 0),
            OpKind::Fs(op) => return self.fs_subject(op),
            OpKind::Work(_) => (Kind::Work, String::new(), 0, 0),
            OpKind::Cancel { .. } => (Kind::Cancel, String::new(), 0, 0),
            _ => (Kind::Socket, String::new(), 0, 0),
        };
        Subject { kind, name, offset, len: len as u64 }
    }
}
