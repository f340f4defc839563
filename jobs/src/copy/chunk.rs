//! One copy: a region from the source to the target, and what happens when a half of it fails.

use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::buf::Buf;
use liveblk_engine::node::{Origin, WriteFlags, ZeroFlags};

use super::state::{Copy, Flight};
use crate::error::JobError;
use crate::event::{Action, Kind, Operation};
use crate::limits::{RETRY_DELAY_NS, UNIT_DISK};
use crate::region::Region;

/// A region to be copied.
pub(super) struct Run {
    pub(super) region: Region,
    pub(super) how: How,
    /// Whether a guest waits for it.
    pub(super) urgent: bool,
}

/// How a region is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// It is known to read as zeroes.
    Zeroes,
    /// Through memory.
    Memory,
    /// By sharing the blocks of the source.
    Share,
}

/// What goes to the target.
pub(super) enum Content {
    Bytes(Buf),
    Zeroes(u64),
}

impl Copy {
    /// Copies `run`. Its dirty bits are cleared already.
    pub(super) async fn copy_run(self: Rc<Self>, run: Run, flight: Flight) {
        let range = run.region.range();
        if run.how == How::Share {
            return self.share_run(run, flight).await;
        }
        if run.how == How::Zeroes {
            run.region.read_done();
            if self.put(&run, range, Content::Zeroes(range.len)).await {
                self.note_landed(range);
                drop(run);
                flight.landed();
            } else {
                self.not_done(&run);
            }
            return;
        }
        let mut at = range.start.bytes();
        let end = range.end().bytes();
        while at < end {
            // More than one piece only where a granule is larger than a unit.
            let piece = GuestRange::new(at, (end - at).min(UNIT_DISK.max(self.largest_read())));
            at = piece.end().bytes();
            let Some(bytes) = self.fetch(&run, piece).await else { return };
            #[cfg(feature = "planted-bugs")]
            if self.clears_late(false) {
                self.todo.borrow_mut().clear_range(piece);
            }
            if at == end {
                run.region.read_done();
                self.job.changed().notify_all();
            }
            let content =
                if bytes.is_zero() { Content::Zeroes(piece.len) } else { Content::Bytes(bytes) };
            if !self.put(&run, piece, content).await {
                return self.not_done(&run);
            }
        }
        if self.discard_source && !run.urgent {
            let range = run.region.range();
            // Space that stays taken is all that a failure costs.
            let _ = self.source().discard(range.start.bytes(), range.len, Origin::Derived).await;
        }
        self.note_landed(range);
        drop(run);
        flight.landed();
    }

    /// What a job on a chain did not bring to its place is left, when it tells its end.
    fn not_done(&self, run: &Run) {
        if matches!(self.job.kind(), Kind::Commit) && self.is_dead() {
            self.mark(run.region.range(), false);
        }
    }

    /// Bytes that copy-before-write reads at once: its granules are never read in two halves.
    pub(super) fn largest_read(&self) -> u64 {
        self.granularity().min(4 << 20)
    }

    fn origin_of(&self, run: &Run) -> Origin {
        if run.urgent { Origin::Derived } else { self.origin() }
    }

    /// Reads `piece` of the source; `None` if the copy is over.
    pub(super) async fn fetch(&self, run: &Run, piece: GuestRange) -> Option<Buf> {
        if self.is_dead() {
            return None;
        }
        let len = usize::try_from(piece.len).expect("invariant: a piece fits into memory");
        let bytes = self.job.core().pool().alloc(len);
        // Never at the gate: a guest that was admitted, or the last pass behind closed gates, may
        // wait for this read. What it reads is stable (backup) or marked dirty again (mirror).
        let _reading = self.begin_read();
        let read = self.source().read(piece.start.bytes(), bytes.clone(), Origin::Derived);
        match read.await {
            Ok(()) if self.is_dead() => None,
            Ok(()) => Some(bytes),
            Err(error) => {
                self.read_failed(run, error);
                None
            }
        }
    }

    /// The region becomes dirty again; its owner drops it after that.
    fn read_failed(&self, run: &Run, error: liveblk_engine::Error) {
        if self.fills.get() && !self.is_dead() {
            return self.fill_failed(run, error);
        }
        if run.urgent && self.fails_guests(run.region.range(), &error) {
            return;
        }
        self.mark(run.region.range(), false);
        if self.is_dead() {
            return;
        }
        if self.in_last_pass() {
            self.pass_failure.borrow_mut().get_or_insert((Operation::Read, error));
            return;
        }
        if run.urgent {
            // The old content cannot be kept, and the guest does not wait for it.
            self.job.announce(Operation::Read, Action::Report);
            self.fail(JobError::Engine(error));
            return;
        }
        match self.job.on_error(Operation::Read, &error) {
            Action::Report => self.fail(JobError::Engine(error)),
            Action::Ignore => {
                let now = self.job.core().now();
                self.retry_at.set(now.saturating_add(RETRY_DELAY_NS));
            }
            // The loop pauses and finds the region dirty when it is resumed.
            Action::Stop => {}
        }
    }

    /// A part of a layer could not be filled: it is left out, or tried again after a pause.
    fn fill_failed(&self, run: &Run, error: liveblk_engine::Error) {
        match self.job.on_error(Operation::Read, &error) {
            Action::Report => self.fail(JobError::Engine(error)),
            Action::Ignore => {
                self.skipped.borrow_mut().get_or_insert(error);
            }
            Action::Stop => self.mark(run.region.range(), false),
        }
    }

    /// Brings `content` to the target, as often as the policy wants; false if the copy is over.
    pub(super) async fn put(&self, run: &Run, piece: GuestRange, content: Content) -> bool {
        loop {
            if self.is_dead() {
                return false;
            }
            let start = piece.start.bytes();
            let origin = self.origin_of(run);
            let written = match &content {
                Content::Bytes(bytes) if self.fills.get() => {
                    self.target.fill(start, bytes.clone(), origin)
                }
                Content::Zeroes(len) if self.fills.get() => {
                    self.target.fill_zeroes(start, *len, origin)
                }
                Content::Bytes(bytes) => {
                    let flags = WriteFlags { compressed: self.compress, ..WriteFlags::default() };
                    self.target.write(start, bytes.clone(), flags, origin)
                }
                Content::Zeroes(len) => {
                    let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
                    self.target.write_zeroes(start, *len, flags, origin)
                }
            };
            let Err(error) = written.await else {
                if let Content::Bytes(bytes) = &content {
                    self.job.count_copied(bytes.len() as u64);
                }
                return true;
            };
            if self.is_dead() {
                return false;
            }
            if self.fills.get() {
                self.fill_failed(run, error);
                return false;
            }
            if self.in_last_pass() {
                self.mark(run.region.range(), false);
                self.pass_failure.borrow_mut().get_or_insert((Operation::Write, error));
                return false;
            }
            if run.urgent && self.fails_guests(run.region.range(), &error) {
                return false;
            }
            let action = self.job.on_error(Operation::Write, &error);
            if action == Action::Report {
                self.fail(JobError::Engine(error));
                return false;
            }
            if !self.keeps_bytes {
                // Read again later: a guest's own write may wait for the region meanwhile.
                self.mark(run.region.range(), false);
                if action == Action::Ignore {
                    let now = self.job.core().now();
                    self.retry_at.set(now.saturating_add(RETRY_DELAY_NS));
                }
                return false;
            }
            match action {
                Action::Report => return false,
                Action::Ignore => self.wait_parked(run.urgent, Some(RETRY_DELAY_NS)).await,
                Action::Stop => self.wait_parked(run.urgent, None).await,
            }
        }
    }

    /// Stands still with the bytes in hand: `nanos`, or until the job is resumed.
    async fn wait_parked(&self, urgent: bool, nanos: Option<u64>) {
        self.park(urgent);
        match nanos {
            Some(nanos) => {
                let core = self.job.core();
                let until = core.now().saturating_add(nanos);
                while core.now() < until && !self.is_dead() {
                    self.job.nap(until - core.now()).await;
                }
            }
            None => {
                let changed = self.job.changed();
                changed.until(|| !self.job.wants_pause() || self.is_dead()).await;
            }
        }
        self.unpark(urgent);
    }
}
