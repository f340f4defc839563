//! What the copies of one job share: bitmaps, regions, window, and whether they may go on.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::node::{Node, NodeId, Origin};

use super::before::{BeforeWrite, Crowd};
use super::offload::Offload;
use super::spill::{Spill, SpillPlan};
use crate::converge::Traffic;
use crate::error::{JobError, Result};
use crate::event::{Action, Operation};
use crate::job::Job;
use crate::limits::{UNIT_DISK, UNIT_MEMORY, WINDOW_BYTES, WINDOW_UNITS, WINDOW_UNITS_MEMORY};
use crate::region::{Region, Regions};
use crate::spec::CopyMode;

/// Where the copies are in their life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// In the background, while guests write.
    Background,
    /// Gates of the source are closed: the last pass. A failure ends the pass, not the job.
    LastPass,
    /// Over: nothing starts any more, waiting guests go on.
    Dead,
}

/// What a job gives its copies.
pub(crate) struct CopySetup {
    pub(crate) job: Rc<Job>,
    pub(crate) source: Rc<Node>,
    pub(crate) target: Rc<Node>,
    /// Bytes per dirty bit.
    pub(crate) granularity: u64,
    /// Whether everything is dirty from the first moment (copy-before-write needs that).
    pub(crate) all_dirty: bool,
    /// Whether a partial last granule counts whole in the progress.
    pub(crate) whole_granules: bool,
    /// Whether whole clusters are stored compressed.
    pub(crate) compress: bool,
    /// Whether bytes that the target did not take are kept for another try: where the source does
    /// not have them any more. Else they are read again.
    pub(crate) keeps_bytes: bool,
    /// Whether space of the source is given back as it is copied.
    pub(crate) discard_source: bool,
    /// Whether the target may share blocks with the source.
    pub(crate) shares: bool,
    /// How copy-before-write treats guests.
    pub(crate) before: BeforeWrite,
    /// Where copy-before-write goes on when the target is slow.
    pub(crate) spill: Option<SpillPlan>,
    /// Most copies in flight and bytes of one, where the client limits them.
    pub(crate) bounds: Bounds,
    /// Kept by every copy in flight: the use of the target.
    pub(crate) hold: Rc<dyn Any>,
}

/// Limits of the background loop.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Copies in flight.
    pub(crate) units: usize,
    /// Bytes in flight.
    pub(crate) bytes: u64,
    /// Bytes of one copy.
    pub(crate) chunk: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { units: WINDOW_UNITS, bytes: WINDOW_BYTES, chunk: u64::MAX }
    }
}

/// The copies of one job.
pub(crate) struct Copy {
    pub(super) job: Rc<Job>,
    /// Follows its guests to another node of equal content.
    source: RefCell<Rc<Node>>,
    /// Shared by all reads of the source that is it now.
    reads: RefCell<Rc<()>>,
    pub(super) target: Rc<Node>,
    pub(super) size: Cell<u64>,
    /// Held while the size changes, and by a cut that ends the job: one excludes the other.
    pub(super) shape: Cell<bool>,
    /// The source is growing: no copy begins.
    pub(super) growing: Cell<bool>,
    pub(super) unit: u64,
    whole_granules: bool,
    pub(super) compress: bool,
    pub(super) keeps_bytes: bool,
    pub(super) discard_source: bool,
    pub(super) offload: Option<Offload>,
    pub(super) todo: RefCell<DirtyBitmap>,
    /// Bytes per dirty bit, known also while the bits are being changed.
    granularity: u64,
    /// Granules that are known to read as zeroes; a write takes them out.
    pub(super) zero: RefCell<DirtyBitmap>,
    /// Granules written since the plan began to look at a part of the source.
    pub(super) touched: RefCell<Option<DirtyBitmap>>,
    pub(super) regions: Rc<Regions>,
    pub(super) before: BeforeWrite,
    pub(super) crowd: Crowd,
    pub(super) spill: Spill,
    /// What has not reached the target yet, where a bitmap wants to know.
    pub(super) pending: RefCell<Option<DirtyBitmap>>,
    /// What of the snapshot can be read; everything if absent.
    pub(super) access: RefCell<Option<DirtyBitmap>>,
    pub(super) cursor: Cell<u64>,
    /// Background copies that do I/O now.
    units_in_flight: Cell<usize>,
    /// Bytes of all copies in flight.
    bytes_in_flight: Cell<u64>,
    /// Bytes of guests' own writes to the target in flight.
    guest_bytes: Cell<u64>,
    /// Copies that hold bytes for a target that failed, until the job is resumed.
    pub(super) parked: Cell<usize>,
    /// Bytes that copy-before-write holds.
    before_write_bytes: Cell<u64>,
    bounds: Bounds,
    /// Bytes in flight of the background loop, as convergence bounds them.
    window: Cell<u64>,
    traffic: Cell<Traffic>,
    pub(super) retry_at: Cell<u64>,
    phase: Cell<Phase>,
    failure: RefCell<Option<JobError>>,
    /// The target is the source: only what its own layer does not have is written.
    pub(super) fills: Cell<bool>,
    /// The first copy that was left out under `ignore` (only where the target is filled).
    pub(super) skipped: RefCell<Option<liveblk_engine::Error>>,
    /// What ended the last pass.
    pub(super) pass_failure: RefCell<Option<(Operation, liveblk_engine::Error)>>,
    hold: RefCell<Option<Rc<dyn Any>>>,
}

/// A copy counted as in flight until dropped.
pub(crate) struct Flight {
    copy: Rc<Copy>,
    bytes: u64,
    purpose: Purpose,
    _hold: Option<Rc<dyn Any>>,
}

/// A read of the source, until dropped.
pub(super) struct SourceRead<'a> {
    copy: &'a Copy,
    of: Rc<()>,
}

/// The reads of what was the source before.
pub(crate) struct EarlierReads(Rc<()>);

impl EarlierReads {
    /// Whether all have ended; the job's notification tells when that may have changed.
    pub(crate) fn are_over(&self) -> bool {
        Rc::strong_count(&self.0) == 1
    }
}

impl Drop for SourceRead<'_> {
    fn drop(&mut self) {
        // Somebody may wait for the reads of what is not the source any more; he looks when this is
        // gone.
        if !Rc::ptr_eq(&self.of, &self.copy.reads.borrow()) {
            self.copy.job.changed().notify_all();
        }
    }
}

/// On whose account a copy runs.
#[derive(Clone, Copy)]
enum Purpose {
    /// One of the background loop.
    Background,
    /// Copy-before-write; gives these bytes of its reserve back.
    BeforeWrite(u64),
    /// Copy-before-write on its way to the spill file.
    Spill,
    /// A guest's own write to the target.
    GuestWrite,
}

impl Copy {
    pub(crate) fn new(mut setup: CopySetup) -> Rc<Self> {
        let size = setup.source.size();
        let in_memory = setup.source.is_memory_backed() && setup.target.is_memory_backed();
        let unit = if in_memory { UNIT_MEMORY } else { UNIT_DISK };
        if in_memory {
            setup.bounds.units = setup.bounds.units.min(WINDOW_UNITS_MEMORY);
        }
        let mut todo = DirtyBitmap::new(size, setup.granularity);
        if setup.all_dirty {
            todo.set_all();
        }
        let shares = setup.shares && !setup.compress;
        #[cfg(feature = "planted-bugs")]
        let shares = shares && {
            use liveblk_engine::planted::{Planted, has};
            !has(setup.job.core(), Planted::BitClearedAfterRead)
        };
        let copy = Self {
            zero: RefCell::new(DirtyBitmap::new(size, setup.granularity)),
            todo: RefCell::new(todo),
            granularity: setup.granularity,
            touched: RefCell::new(None),
            unit: whole(unit.min(setup.bounds.chunk), setup.granularity),
            bounds: setup.bounds,
            window: Cell::new(setup.bounds.bytes),
            traffic: Cell::default(),
            whole_granules: setup.whole_granules,
            compress: setup.compress,
            keeps_bytes: setup.keeps_bytes,
            discard_source: setup.discard_source,
            offload: (shares && !in_memory).then(|| Offload::new(setup.bounds.chunk)),
            job: setup.job,
            source: RefCell::new(setup.source),
            reads: RefCell::default(),
            target: setup.target,
            size: Cell::new(size),
            shape: Cell::new(false),
            growing: Cell::new(false),
            regions: Rc::default(),
            before: setup.before,
            crowd: Crowd::default(),
            spill: Spill::new(setup.spill),
            pending: RefCell::new(None),
            access: RefCell::new(None),
            cursor: Cell::new(0),
            units_in_flight: Cell::new(0),
            bytes_in_flight: Cell::new(0),
            guest_bytes: Cell::new(0),
            parked: Cell::new(0),
            before_write_bytes: Cell::new(0),
            retry_at: Cell::new(0),
            phase: Cell::new(Phase::Background),
            failure: RefCell::new(None),
            fills: Cell::new(false),
            skipped: RefCell::new(None),
            pass_failure: RefCell::new(None),
            hold: RefCell::new(Some(setup.hold)),
        };
        copy.note_left();
        Rc::new(copy)
    }

    /// The copies go into the source's own layer, where it has nothing. A failed copy is then a
    /// failed read, whatever half failed, and is left out under `ignore`, as the peer does.
    pub(crate) fn fill_source(&self) {
        self.fills.set(true);
    }

    /// The first copy that was left out.
    pub(crate) fn skipped(&self) -> Option<JobError> {
        self.skipped.borrow().clone().map(JobError::Engine)
    }

    /// What a failure of `operation` is told as.
    pub(super) fn told_as(&self, operation: Operation) -> Operation {
        if self.fills.get() { Operation::Read } else { operation }
    }

    pub(crate) fn job(&self) -> &Rc<Job> {
        &self.job
    }

    pub(crate) fn source(&self) -> Rc<Node> {
        Rc::clone(&self.source.borrow())
    }

    /// Whether the source is still `known`: a cut that closed the gates of that one may go on.
    ///
    /// # Errors
    /// `Cancelled` if guests, and the job with them, have moved since.
    pub(crate) fn check_source(&self, known: NodeId) -> liveblk_engine::Result<()> {
        if self.source.borrow().id() == known {
            return Ok(());
        }
        Err(liveblk_engine::Error::new(liveblk_engine::ErrorKind::Cancelled, "follow the guests"))
    }

    /// From now on copies read `source`, which holds what the old one does. Only inside a cut of
    /// both.
    pub(crate) fn set_source(&self, source: &Rc<Node>) -> EarlierReads {
        self.source.replace(Rc::clone(source));
        EarlierReads(self.reads.take())
    }

    /// A read of the source, as it is now, begins.
    pub(super) fn begin_read(&self) -> SourceRead<'_> {
        SourceRead { copy: self, of: Rc::clone(&self.reads.borrow()) }
    }

    pub(crate) fn target(&self) -> &Rc<Node> {
        &self.target
    }

    /// Bytes that are copied: the size of the source at the start, or to which it has grown since.
    pub(crate) fn size(&self) -> u64 {
        self.size.get()
    }

    /// Whether nothing may start any more.
    pub(crate) fn is_dead(&self) -> bool {
        self.phase.get() == Phase::Dead || self.job.is_forced()
    }

    pub(super) fn in_last_pass(&self) -> bool {
        self.phase.get() == Phase::LastPass
    }

    /// How copies enter nodes: past the gates when a guest waits for them, or may wait for their
    /// region.
    pub(super) fn origin(&self) -> Origin {
        let blocking = self.job.copy_mode() == CopyMode::WriteBlocking;
        if blocking || self.in_last_pass() { Origin::Derived } else { Origin::External }
    }

    /// From now on the gates of the source are closed.
    pub(super) fn begin_last_pass(&self) {
        if self.phase.get() == Phase::Background {
            self.phase.set(Phase::LastPass);
        }
    }

    pub(super) fn end_last_pass(&self) {
        if self.phase.get() == Phase::LastPass {
            self.phase.set(Phase::Background);
        }
    }

    /// The use of the target, for who may outlive the copies; `None` when they are over.
    pub(crate) fn hold(&self) -> Option<Rc<dyn Any>> {
        self.hold.borrow().clone()
    }

    /// Ends all copies: waiting guests go on, the use of the target ends with what is in flight.
    pub(crate) fn kill(&self) {
        self.phase.set(Phase::Dead);
        self.hold.take();
        self.job.changed().notify_all();
    }

    /// The job cannot succeed any more.
    pub(crate) fn fail(&self, error: JobError) {
        self.failure.borrow_mut().get_or_insert(error);
        self.phase.set(Phase::Dead);
        self.job.changed().notify_all();
    }

    /// Why the copies must not go on, if so.
    pub(crate) fn check(&self) -> Result<()> {
        if self.job.is_forced() {
            return Err(JobError::Cancelled);
        }
        match &*self.failure.borrow() {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// A failure outside of a copy (flush, status): `Ok` if it is to be tried again.
    pub(crate) async fn answer(
        &self,
        operation: Operation,
        error: liveblk_engine::Error,
    ) -> Result<()> {
        match self.job.on_error(self.told_as(operation), &error) {
            Action::Report => {
                self.fail(JobError::Engine(error));
                self.check()
            }
            Action::Ignore => {
                let now = self.job.core().now();
                self.retry_at.set(now.saturating_add(crate::limits::RETRY_DELAY_NS));
                self.rest(crate::limits::RETRY_DELAY_NS).await
            }
            Action::Stop => {
                self.job.changed().until(|| self.is_quiet() || self.is_dead()).await;
                self.job.pause_point().await;
                self.check()
            }
        }
    }

    /// Sleeps `nanos` unless the job ends before.
    async fn rest(&self, nanos: u64) -> Result<()> {
        let until = self.job.core().now().saturating_add(nanos);
        while self.job.core().now() < until && !self.is_dead() {
            self.job.nap(until - self.job.core().now()).await;
        }
        self.check()
    }

    /// Whether no background copy is doing I/O.
    pub(super) fn is_quiet(&self) -> bool {
        self.units_in_flight.get() == 0
    }

    /// Whether no copy at all is doing I/O or holds bytes.
    pub(crate) fn has_landed(&self) -> bool {
        self.bytes_in_flight.get() == 0 && self.guest_bytes.get() == 0
    }

    /// Whether everything dirty has reached the target (not yet its disk).
    pub(crate) fn is_clean(&self) -> bool {
        self.todo.borrow().is_clean()
            && self.is_quiet()
            && self.regions.is_empty()
            && self.spill.is_empty()
    }

    /// Dirty bytes, those in flight included.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.counted_todo() + self.bytes_in_flight.get() + self.spill.bytes()
    }

    /// Whether one more background copy may start.
    pub(super) fn has_room(&self) -> bool {
        let (units, bytes) = (self.units_in_flight.get(), self.bytes_in_flight.get());
        let fits = units < self.bounds.units && bytes < self.window.get();
        !self.growing.get() && (units == 0 || fits)
    }

    /// From now on at most `bytes` of the background loop are in flight, but two small copies
    /// always; how many those are.
    pub(crate) fn set_window(&self, bytes: u64) -> u64 {
        let least = self.granularity.saturating_mul(2).min(self.bounds.bytes);
        self.window.set(bytes.clamp(least, self.bounds.bytes));
        self.window.get()
    }

    /// Whether not much more is in flight than the window allows.
    pub(crate) fn fits_window(&self) -> bool {
        self.bytes_in_flight.get() <= self.window.get().saturating_mul(2)
    }

    /// Most bytes of one copy of the background loop.
    pub(super) fn largest_unit(&self) -> u64 {
        let half = whole(self.window.get() / 2, self.granularity);
        if self.is_narrowed() { half.min(self.unit) } else { self.unit }
    }

    /// Whether convergence allows less in flight than the job may have.
    pub(super) fn is_narrowed(&self) -> bool {
        self.window.get() < self.bounds.bytes
    }

    /// What went on since the start.
    pub(crate) fn traffic(&self) -> Traffic {
        self.traffic.get()
    }

    fn count(&self, add: Traffic) {
        let now = self.traffic.get();
        self.traffic.set(Traffic {
            dirtied: now.dirtied.saturating_add(add.dirtied),
            copied: now.copied.saturating_add(add.copied),
            covered: now.covered.saturating_add(add.covered),
        });
    }

    /// Takes `bytes` of the copy-before-write reserve; one copy always fits. Given back with the
    /// copy's [`Flight`].
    pub(super) fn reserve(&self, bytes: u64) -> bool {
        let held = self.before_write_bytes.get();
        let fits = held == 0 || held + bytes <= self.spill.reserve();
        if fits {
            self.before_write_bytes.set(held + bytes);
        }
        fits
    }

    /// Counts a copy of `range` as in flight; `reserved` goes back to the reserve with it.
    pub(super) fn flight(self: &Rc<Self>, range: GuestRange, reserved: u64) -> Flight {
        let bytes = self.counted(range);
        let purpose = if reserved == 0 {
            self.units_in_flight.set(self.units_in_flight.get() + 1);
            Purpose::Background
        } else {
            Purpose::BeforeWrite(reserved)
        };
        self.bytes_in_flight.set(self.bytes_in_flight.get() + bytes);
        Flight { copy: Rc::clone(self), bytes, purpose, _hold: self.hold.borrow().clone() }
    }

    /// Counts old content of `range` as in flight that goes to the spill file.
    pub(super) fn spill_flight(self: &Rc<Self>, range: GuestRange) -> Flight {
        let bytes = self.counted(range);
        self.bytes_in_flight.set(self.bytes_in_flight.get() + bytes);
        let (copy, purpose) = (Rc::clone(self), Purpose::Spill);
        Flight { copy, bytes, purpose, _hold: self.hold.borrow().clone() }
    }

    /// Counts a guest's own write to the target as in flight; it is no part of the progress before
    /// it ended.
    pub(crate) fn guest_flight(self: &Rc<Self>, range: GuestRange) -> Flight {
        self.guest_bytes.set(self.guest_bytes.get() + range.len);
        let (copy, purpose) = (Rc::clone(self), Purpose::GuestWrite);
        Flight { copy, bytes: range.len, purpose, _hold: self.hold.borrow().clone() }
    }

    /// Claims the granules of `range` for a guest's write, after the copies of them that are in
    /// flight; `None` when the copies are over.
    pub(crate) async fn claim_for_guest(&self, range: GuestRange) -> Option<Region> {
        let wide = range.widen(self.granularity());
        loop {
            let changed = self.job.changed().wait();
            if self.is_dead() {
                return None;
            }
            if let Some(region) = self.regions.claim_for_guest(wide) {
                return Some(region);
            }
            changed.await;
        }
    }

    /// A guest wrote `range` to source and target alike.
    pub(crate) fn cover(&self, range: GuestRange) {
        self.todo.borrow_mut().clear_range(range);
        self.job.progress().add_done(range.len);
        self.count(Traffic { covered: range.len, ..Traffic::default() });
        self.note_left();
    }

    /// A guest wrote `range`: nothing that was found out about it before holds.
    pub(crate) fn touch(&self, range: GuestRange) {
        self.zero.borrow_mut().clear_range(range.widen(self.granularity()));
        if let Some(touched) = &mut *self.touched.borrow_mut() {
            touched.set_range(range);
        }
    }

    /// No background copy starts before `at` (nanoseconds).
    pub(crate) fn retry_not_before(&self, at: u64) {
        self.retry_at.set(at);
    }

    /// A copy stands still without I/O.
    pub(super) fn park(&self, urgent: bool) {
        self.parked.set(self.parked.get() + 1);
        if !urgent {
            self.units_in_flight.set(self.units_in_flight.get() - 1);
        }
        self.job.changed().notify_all();
    }

    /// A copy that stood still goes on.
    pub(super) fn unpark(&self, urgent: bool) {
        self.parked.set(self.parked.get() - 1);
        if !urgent {
            self.units_in_flight.set(self.units_in_flight.get() + 1);
        }
    }

    /// Marks `range` dirty (again); `written` says that a guest changed it.
    pub(crate) fn mark(&self, range: GuestRange, written: bool) {
        let added = self.todo.borrow_mut().set_range(range);
        if written {
            self.touch(range);
            let dirtied = added.saturating_mul(self.granularity);
            self.count(Traffic { dirtied, ..Traffic::default() });
        }
        if added > 0 {
            self.note_left();
            self.job.changed().notify_all();
        }
    }

    /// What ended the last pass, if a copy did.
    pub(crate) fn take_pass_failure(&self) -> Option<(Operation, liveblk_engine::Error)> {
        self.pass_failure.take()
    }

    /// Bytes per dirty bit.
    pub(crate) fn granularity(&self) -> u64 {
        self.granularity
    }

    /// Brings the progress up to date with what is dirty and in flight.
    pub(super) fn note_left(&self) {
        self.job.progress().set_left(self.dirty_bytes());
    }

    /// The bytes of `range` as the progress counts them.
    pub(super) fn counted(&self, range: GuestRange) -> u64 {
        if self.whole_granules { range.len.next_multiple_of(self.granularity()) } else { range.len }
    }

    fn counted_todo(&self) -> u64 {
        let todo = self.todo.borrow();
        let bytes = todo.dirty_bytes();
        let tail = self.size() % todo.granularity();
        if self.whole_granules || tail == 0 || !todo.test(self.size() - 1) {
            return bytes;
        }
        bytes - (todo.granularity() - tail)
    }
}

/// The largest multiple of `granularity` within `bytes`, at least one: a bit is cleared only when
/// its whole granule is copied.
fn whole(bytes: u64, granularity: u64) -> u64 {
    (bytes - bytes % granularity).max(granularity)
}

impl Flight {
    /// The copy reached the target.
    pub(super) fn landed(self) {
        let bytes = self.bytes;
        let copy = Rc::clone(&self.copy);
        let urgent = matches!(self.purpose, Purpose::BeforeWrite(_));
        drop(self);
        if urgent {
            copy.spill.note_taken(copy.job.core().now());
        }
        copy.job.progress().add_done(bytes);
        copy.count(Traffic { copied: bytes, ..Traffic::default() });
        copy.note_left();
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let copy = &self.copy;
        let less = |count: &Cell<u64>, bytes| count.set(count.get() - bytes);
        match self.purpose {
            Purpose::Background => copy.units_in_flight.set(copy.units_in_flight.get() - 1),
            Purpose::BeforeWrite(reserved) => less(&copy.before_write_bytes, reserved),
            Purpose::Spill => {}
            Purpose::GuestWrite => {
                less(&copy.guest_bytes, self.bytes);
                return copy.job.changed().notify_all();
            }
        }
        less(&copy.bytes_in_flight, self.bytes);
        copy.note_left();
        copy.job.changed().notify_all();
    }
}
