//! The spill file of copy-before-write: where old content goes that the target does not take in
//! time, so that guests go on.
//!
//! Owns the file, which of its bytes are in use, and what of the snapshot lies there. The file is
//! made when it is first needed and removed when the job ends; it is never durable, because a job
//! does not outlive its process without it.
//!
//! ```text
//! dirty -> reading -> spilling -> kept (in the file, or known to be zero) -> copying -> clean
//! ```
//! Order rules: (1) a guest waits for the read of its old content only, never for the file; what is
//! on its way there is bounded, and beyond that guests wait for the file; (2) a granule is kept
//! before its region is free, and its region is claimed before it is kept no more, so whoever looks
//! finds it in one of the two; (3) bytes of the file are used again only when the copy from there,
//! or the read of the snapshot there, has ended: both hold the region; (4) what is kept counts as
//! left to be copied, and a client's bitmap hears of it when it is in the target.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::buf::Buf;
use liveblk_engine::executor::sync::{Either, select};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::storage::{self, File, FileOptions, LockRequest};
use liveblk_engine::{Error, ErrorKind};

use super::chunk::{Content, How, Run};
use super::state::{Copy, Flight};
use crate::error::{JobError, Result};
use crate::event::{Action, Operation, SpillInfo};
use crate::limits::{
    BEFORE_WRITE_BYTES, LANDING_WAIT_NS, SPILL_BYTES_IN_FLIGHT, SPILL_HEADER, SPILL_PATIENCE_NS,
    UNIT_DISK,
};
use crate::region::Region;
use crate::spill_error::SpillError;

type EngineResult<T> = liveblk_engine::Result<T>;

/// Where the spill file of a job would be, and how large.
#[derive(Clone, Debug)]
pub(crate) struct SpillPlan {
    /// Its path; another one in the same folder if that is taken.
    pub(crate) path: PathBuf,
    /// Most bytes of it.
    pub(crate) max: u64,
    /// Bytes of old content that memory holds before.
    pub(crate) after: u64,
}

/// The spill file of one job.
#[derive(Default)]
pub(super) struct Spill {
    plan: Option<SpillPlan>,
    place: RefCell<Place>,
    kept: RefCell<Kept>,
    room: RefCell<Room>,
    /// Bytes on their way to the file.
    writing: Cell<u64>,
    /// Whether the task that empties the file is at work.
    draining: Cell<bool>,
    /// When the target last took old content, in nanoseconds.
    taken_at: Cell<u64>,
}

#[derive(Default)]
enum Place {
    /// Not needed yet.
    #[default]
    Unused,
    Opening,
    Open(Rc<File>, PathBuf),
    /// The job is over.
    Ended,
}

/// What lies in the file, by guest offset. Runs never overlap and consist of whole granules.
#[derive(Default)]
struct Kept {
    runs: BTreeMap<u64, KeptRun>,
    bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct KeptRun {
    len: u64,
    /// First byte in the file; none: it reads as zeroes.
    at: Option<u64>,
}

/// Which bytes of the file are free, by offset, below its end; neighbours are one.
#[derive(Default)]
struct Room {
    free: BTreeMap<u64, u64>,
    end: u64,
}

/// Bytes on their way to the file, until dropped.
struct Writing<'a>(&'a Copy, u64);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let spill = &self.0.spill;
        spill.writing.set(spill.writing.get() - self.1);
        self.0.job.changed().notify_all();
    }
}

impl Spill {
    pub(super) fn new(plan: Option<SpillPlan>) -> Self {
        Self { plan, ..Self::default() }
    }

    /// Bytes of old content that memory may hold.
    pub(super) fn reserve(&self) -> u64 {
        self.plan.as_ref().map_or(BEFORE_WRITE_BYTES, |plan| plan.after.min(BEFORE_WRITE_BYTES))
    }

    /// Bytes of the snapshot that are kept here.
    pub(super) fn bytes(&self) -> u64 {
        self.kept.borrow().bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.kept.borrow().runs.is_empty()
    }

    /// The target took old content.
    pub(super) fn note_taken(&self, now: u64) {
        self.taken_at.set(now);
    }

    /// The kept run at `at`, from there on.
    pub(super) fn run_at(&self, at: u64) -> Option<GuestRange> {
        let kept = self.kept.borrow();
        let (start, run) = kept.runs.range(..=at).next_back()?;
        (at < start + run.len).then(|| GuestRange::new(at, start + run.len - at))
    }

    /// The first kept byte after `at`.
    pub(super) fn next_after(&self, at: u64) -> Option<u64> {
        self.kept.borrow().runs.range(at + 1..).next().map(|(start, _)| *start)
    }

    /// What is kept in `range` (whole granules) is given up.
    pub(super) fn forget(&self, range: GuestRange) {
        for (_, run) in self.kept.borrow_mut().take(range) {
            self.room.borrow_mut().give(run);
        }
    }
}

impl Kept {
    fn add(&mut self, range: GuestRange, at: Option<u64>) {
        self.bytes += range.len;
        let known = self.runs.insert(range.start.bytes(), KeptRun { len: range.len, at });
        assert!(known.is_none(), "old content of a granule is kept once");
    }

    /// Takes out what lies in `range`; runs that reach beyond it keep the rest.
    fn take(&mut self, range: GuestRange) -> Vec<(GuestRange, KeptRun)> {
        let (start, end) = (range.start.bytes(), range.end().bytes());
        let before = self.runs.range(..start).next_back().map(|(start, _)| *start);
        let inside = self.runs.range(start..end).map(|(start, _)| *start);
        let touched: Vec<u64> = before.into_iter().chain(inside).collect();
        let mut taken = Vec::new();
        for first in touched {
            let Some(run) = self.runs.remove(&first) else { continue };
            let whole = GuestRange::new(first, run.len);
            let part = whole.intersect(range);
            let piece = |piece: GuestRange| KeptRun {
                len: piece.len,
                at: run.at.map(|at| at + piece.start.bytes() - first),
            };
            let head = GuestRange::new(first, start.saturating_sub(first).min(run.len));
            let tail = whole.end().bytes().saturating_sub(end.max(first));
            let tail = GuestRange::new(whole.end().bytes() - tail, tail);
            for rest in [head, tail] {
                if !rest.is_empty() {
                    self.runs.insert(rest.start.bytes(), piece(rest));
                }
            }
            if !part.is_empty() {
                self.bytes -= part.len;
                taken.push((part, piece(part)));
            }
        }
        taken
    }
}

impl Room {
    /// A place for `len` bytes, if the file then has at most `max` of them.
    fn take(&mut self, len: u64, max: u64) -> Option<u64> {
        let fits = self.free.iter().find(|(_, free)| **free >= len).map(|(at, free)| (*at, *free));
        if let Some((at, free)) = fits {
            self.free.remove(&at);
            if free > len {
                self.free.insert(at + len, free - len);
            }
            return Some(at + SPILL_HEADER);
        }
        let at = self.end;
        let end = at.checked_add(len).filter(|end| *end <= max)?;
        self.end = end;
        Some(at + SPILL_HEADER)
    }

    fn give(&mut self, run: KeptRun) {
        let Some(at) = run.at else { return };
        let (mut at, mut len) = (at - SPILL_HEADER, run.len);
        if let Some((before, free)) = self.free.range(..at).next_back().map(|(at, len)| (*at, *len))
            && before + free == at
        {
            self.free.remove(&before);
            (at, len) = (before, free + len);
        }
        if let Some(free) = self.free.remove(&(at + len)) {
            len += free;
        }
        if at + len == self.end {
            self.end = at;
        } else {
            self.free.insert(at, len);
        }
    }
}

impl Copy {
    /// Nanoseconds after which a guest that has waited for the reserve since `since` spills; `None`
    /// if it has to wait for the target.
    pub(super) fn spill_delay(&self, since: u64) -> Option<u64> {
        self.spill.plan.as_ref()?;
        if self.parked.get() > 0 {
            return Some(0);
        }
        let patience = since.min(self.spill.taken_at.get()).saturating_add(SPILL_PATIENCE_NS);
        Some(patience.saturating_sub(self.job.core().now()))
    }

    /// Whether the spill file takes `bytes` more now.
    fn can_spill(&self, bytes: u64) -> bool {
        let writing = self.spill.writing.get();
        writing == 0 || writing + bytes <= SPILL_BYTES_IN_FLIGHT
    }

    /// Starts to put the old content of `range` into the spill file; false if too much is on its
    /// way there, or a copy there is about to end.
    pub(super) fn start_spill(self: &Rc<Self>, range: GuestRange, zero: bool) -> bool {
        if !self.can_spill(range.len) {
            return false;
        }
        let flight = self.spill_flight(range);
        let how = if zero { How::Zeroes } else { How::Memory };
        let Some(run) = self.take(range, how, true) else { return false };
        self.job.rate().borrow_mut().charge(range.len, self.job.core().now());
        self.spill.writing.set(self.spill.writing.get() + range.len);
        let copy = Rc::clone(self);
        drop(self.job.core().spawn(Class::Guest, async move {
            let writing = Writing(&copy, range.len);
            copy.spill_run(&run).await;
            drop(writing);
            // Free only when it is kept: whoever waits for the region looks for it there.
            drop((run, flight));
            copy.start_draining();
        }));
        true
    }

    /// Keeps the old content of `run`.
    async fn spill_run(&self, run: &Run) {
        let range = run.region.range();
        let mut place = None;
        if run.how == How::Zeroes {
            run.region.read_done();
            self.job.changed().notify_all();
        } else {
            let Some(bytes) = self.fetch_whole(run).await else { return };
            run.region.read_done();
            self.job.changed().notify_all();
            if !bytes.iter().all(|(_, bytes)| bytes.is_zero()) {
                match self.write_spill(range, bytes).await {
                    Ok(at) => place = Some(at),
                    Err(error) => return self.spill_failed(error),
                }
            }
        }
        if !self.is_dead() {
            self.spill.kept.borrow_mut().add(range, place);
            self.note_left();
        }
    }

    /// All of `run`, read in pieces that a request may have.
    async fn fetch_whole(&self, run: &Run) -> Option<Vec<(u64, Buf)>> {
        let range = run.region.range();
        let mut pieces = Vec::new();
        let mut at = range.start.bytes();
        while at < range.end().bytes() {
            let most = UNIT_DISK.max(self.largest_read());
            let piece = GuestRange::new(at, (range.end().bytes() - at).min(most));
            pieces.push((at - range.start.bytes(), self.fetch(run, piece).await?));
            at = piece.end().bytes();
        }
        Some(pieces)
    }

    /// Puts the old content of `range` somewhere in the file: where.
    async fn write_spill(&self, range: GuestRange, bytes: Vec<(u64, Buf)>) -> Result<u64> {
        let (file, path) = self.spill_file().await?;
        let max = self.spill.plan.as_ref().map_or(0, |plan| plan.max);
        let path = || path.display().to_string().into();
        let Some(at) = self.spill.room.borrow_mut().take(range.len, max) else {
            return Err(SpillError::Full { path: path(), max }.into());
        };
        for (offset, bytes) in bytes {
            let written = file.write(at + offset, bytes, false).await;
            written.map_err(|source| SpillError::Failed { path: path(), source })?;
        }
        Ok(at)
    }

    /// Old content is lost: the guest goes on, the job does not.
    fn spill_failed(&self, error: JobError) {
        if self.is_dead() {
            return;
        }
        self.job.announce(Operation::Write, Action::Report);
        self.fail(error);
    }

    /// The file, made if it is needed for the first time.
    async fn spill_file(&self) -> Result<(Rc<File>, PathBuf)> {
        loop {
            let changed = self.job.changed().wait();
            match &*self.spill.place.borrow() {
                Place::Open(file, path) => return Ok((Rc::clone(file), path.clone())),
                Place::Ended => return Err(JobError::Cancelled),
                Place::Opening | Place::Unused => {}
            }
            if matches!(*self.spill.place.borrow(), Place::Unused) {
                break;
            }
            changed.await;
        }
        let Some(plan) = self.spill.plan.clone() else { return Err(JobError::Cancelled) };
        self.spill.place.replace(Place::Opening);
        let made = make(self.job.core(), &plan.path, self.job.id()).await;
        let ended = matches!(*self.spill.place.borrow(), Place::Ended);
        let result = match made {
            Ok((file, path)) if ended => {
                drop(file);
                remove(self.job.core(), &path).await;
                Err(JobError::Cancelled)
            }
            Ok((file, path)) => {
                tracing::warn!(job = %self.job.id(), file = %path.display(),
                    "the target is slow: what guests overwrite is kept in a spill file");
                self.spill.place.replace(Place::Open(Rc::clone(&file), path.clone()));
                Ok((file, path))
            }
            Err(error) => {
                if !ended {
                    self.spill.place.replace(Place::Unused);
                }
                let path = plan.path.display().to_string().into();
                Err(SpillError::Failed { path, source: error }.into())
            }
        };
        self.job.changed().notify_all();
        result
    }

    /// Brings what is kept to the target, in the background, until nothing is.
    fn start_draining(self: &Rc<Self>) {
        if self.spill.is_empty() || self.spill.draining.replace(true) {
            return;
        }
        let copy = Rc::clone(self);
        drop(self.job.core().spawn(Class::Background, async move {
            copy.drain_spill().await;
            copy.spill.draining.set(false);
        }));
    }

    async fn drain_spill(self: &Rc<Self>) {
        loop {
            let changed = self.job.changed().wait();
            if self.is_dead() || self.spill.is_empty() {
                return;
            }
            if self.job.wants_pause() || !self.has_room() {
                changed.await;
                continue;
            }
            let Some((region, run)) = self.next_kept() else {
                changed.await;
                continue;
            };
            let (copy, flight) = (Rc::clone(self), self.flight(region.range(), 0));
            let drained = async move { copy.drain_run(region, run, flight).await };
            drop(self.job.core().spawn(Class::Background, drained));
        }
    }

    /// Claims a kept run that nobody reads; guests overwrite the disk there as they like.
    fn next_kept(&self) -> Option<(Region, KeptRun)> {
        let mut kept = self.spill.kept.borrow_mut();
        let free = kept.runs.iter().find_map(|(start, run)| {
            let range = GuestRange::new(*start, run.len);
            self.regions.overlap(range).is_none().then_some(range)
        })?;
        let region = self.regions.claim(free)?;
        region.read_done();
        let (_, run) = kept.take(free).pop()?;
        Some((region, run))
    }

    async fn drain_run(self: Rc<Self>, region: Region, kept: KeptRun, flight: Flight) {
        let how = if kept.at.is_none() { How::Zeroes } else { How::Memory };
        let run = Run { region, how, urgent: false };
        let range = run.region.range();
        if self.drain_pieces(&run, kept).await {
            self.note_landed(range);
            self.spill.room.borrow_mut().give(kept);
            drop(run);
            flight.landed();
        }
    }

    /// False if the copies are over.
    async fn drain_pieces(&self, run: &Run, kept: KeptRun) -> bool {
        let range = run.region.range();
        let Some(first) = kept.at else {
            return self.put(run, range, Content::Zeroes(range.len)).await;
        };
        let mut done = 0;
        while done < range.len {
            let len = (range.len - done).min(UNIT_DISK.max(self.largest_read()));
            let piece = GuestRange::new(range.start.bytes() + done, len);
            let bytes = match self.read_spill(first + done, len).await {
                Ok(bytes) => bytes,
                Err(error) => {
                    if !self.is_dead() {
                        self.job.announce(Operation::Read, Action::Report);
                        self.fail(error);
                    }
                    return false;
                }
            };
            let content =
                if bytes.is_zero() { Content::Zeroes(len) } else { Content::Bytes(bytes) };
            if !self.put(run, piece, content).await {
                return false;
            }
            done += len;
        }
        true
    }

    async fn read_spill(&self, at: u64, len: u64) -> Result<Buf> {
        let (file, path) = self.spill_file().await?;
        let len = usize::try_from(len).expect("invariant: a piece fits into memory");
        let bytes = self.job.core().pool().alloc(len);
        match file.read(at, bytes.clone()).await {
            Ok(()) => Ok(bytes),
            Err(source) => {
                let path = path.display().to_string().into();
                Err(SpillError::Failed { path, source }.into())
            }
        }
    }

    /// Reads `range` of the snapshot, a run that is kept ([`super::Piece::Kept`]), into `buf`.
    /// Claims it before the first await, so that it stays where it is.
    ///
    /// # Errors
    /// What the file reports; `Cancelled` when the snapshot is over.
    pub(crate) async fn read_kept(&self, range: GuestRange, buf: Buf) -> EngineResult<()> {
        let over = || Error::new(ErrorKind::Cancelled, "read the snapshot");
        let region = self.regions.claim(range).ok_or_else(over)?;
        region.read_done();
        let place = {
            let kept = self.spill.kept.borrow();
            let found = kept.runs.range(..=range.start.bytes()).next_back();
            found.and_then(|(start, run)| Some(run.at? + range.start.bytes() - start))
        };
        let result = match place {
            None => {
                buf.fill(0);
                Ok(())
            }
            Some(at) => {
                let (file, _) = self.spill_file().await.map_err(|_| over())?;
                file.read(at, buf).await
            }
        };
        drop(region);
        self.job.changed().notify_all();
        result
    }

    /// What queries tell of the spill file; nothing if it was never needed.
    pub(crate) fn spill_info(&self) -> Option<SpillInfo> {
        match &*self.spill.place.borrow() {
            Place::Open(_, path) => {
                let max = self.spill.plan.as_ref().map_or(0, |plan| plan.max);
                let file = path.display().to_string();
                Some(SpillInfo { file, bytes: self.spill.bytes(), max })
            }
            _ => None,
        }
    }

    /// The job is over: the file goes. A folder that hangs is not waited for.
    pub(crate) async fn end_spill(&self) {
        let Place::Open(file, path) = self.spill.place.replace(Place::Ended) else { return };
        drop(file);
        let core = self.job.core().clone();
        let inner = core.clone();
        let removal = core.spawn(Class::Background, async move { remove(&inner, &path).await });
        let _: Either<(), ()> = select(removal, core.sleep(LANDING_WAIT_NS)).await;
    }
}

/// Makes the file, or takes over one that a process left which is gone.
async fn make(core: &Core, path: &Path, job: &str) -> EngineResult<(Rc<File>, PathBuf)> {
    let options = |path: &Path, create_new| FileOptions {
        path: path.to_path_buf(),
        writable: true,
        create_new,
        locking: true,
        ..FileOptions::default()
    };
    let mut path = path.to_path_buf();
    let mut made = File::open(core, options(&path, true)).await;
    if matches!(&made, Err(error) if error.kind() == ErrorKind::AlreadyExists) {
        match left_behind(core, options(&path, false)).await {
            Some(file) => return Ok((file, path)),
            None => {
                let extension = format!("{:08x}.spill", core.random() & 0xffff_ffff);
                path.set_extension(extension);
                made = File::open(core, options(&path, true)).await;
            }
        }
    }
    let file = match made {
        Ok(file) => file,
        Err(error) => {
            if error.kind() != ErrorKind::AlreadyExists {
                // It may have been made before something else of it failed.
                let _ = storage::unlink(core, &path).await;
            }
            return Err(error);
        }
    };
    let begun = async {
        file.lock(LockRequest::Write).await?;
        let header = core.pool().alloc(usize::try_from(SPILL_HEADER).unwrap_or_default());
        header.fill(0);
        header.copy_from(0, format!("{MARK} of the job '{job}'{EXPLAINED}").as_bytes());
        file.write(0, header, false).await
    };
    if let Err(error) = begun.await {
        remove(core, &path).await;
        return Err(error);
    }
    Ok((file, path))
}

/// A spill file of nobody, emptied.
async fn left_behind(core: &Core, options: FileOptions) -> Option<Rc<File>> {
    let file = File::open(core, options).await.ok()?;
    file.lock(LockRequest::Write).await.ok()?;
    let mark = core.pool().alloc(MARK.len());
    file.read(0, mark.clone()).await.ok()?;
    if mark.to_vec() != MARK.as_bytes() {
        return None;
    }
    file.truncate(SPILL_HEADER).await.ok()?;
    Some(file)
}

async fn remove(core: &Core, path: &Path) {
    if let Err(error) = storage::unlink(core, path).await {
        tracing::warn!(%error, "the spill file of a job is left behind");
    }
}

/// What such a file begins with.
const MARK: &str = "liveblk spill file";

const EXPLAINED: &str = ": old content of a disk for a backup whose target is slow.\n\
    It is of no use once the process that made it has ended, and can be removed then.\n";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_run_is_taken_apart_and_keeps_its_places() {
        let mut kept = Kept::default();
        kept.add(GuestRange::new(100, 100), Some(5000));
        kept.add(GuestRange::new(300, 50), None);
        let taken = kept.take(GuestRange::new(120, 30));
        assert_eq!(taken, [(GuestRange::new(120, 30), KeptRun { len: 30, at: Some(5020) })]);
        assert_eq!(kept.bytes, 120);
        let left: Vec<_> = kept.runs.iter().map(|(start, run)| (*start, run.len, run.at)).collect();
        assert_eq!(left, [(100, 20, Some(5000)), (150, 50, Some(5050)), (300, 50, None)]);
        let taken = kept.take(GuestRange::new(0, 1000));
        assert_eq!(taken.len(), 3);
        assert_eq!((kept.bytes, kept.runs.len()), (0, 0));
    }

    #[test]
    fn places_never_overlap_and_come_back_as_one() {
        let mut room = Room::default();
        let run = |at, len| KeptRun { len, at: Some(at) };
        let a = room.take(100, 250).expect("room");
        let b = room.take(100, 250).expect("room");
        assert_eq!((a, b), (SPILL_HEADER, SPILL_HEADER + 100));
        assert_eq!(room.take(100, 250), None, "beyond the bound");
        room.give(run(a, 100));
        assert_eq!(room.take(60, 250), Some(a));
        assert_eq!(room.take(60, 250), None, "neither the gap nor the end has room");
        assert_eq!(room.take(40, 250), Some(a + 60));
        room.give(run(a + 60, 40));
        room.give(run(a, 60));
        room.give(run(b, 100));
        assert_eq!((room.end, room.free.len()), (0, 0));
        room.give(KeptRun { len: 10, at: None });
        assert_eq!(room.end, 0);
    }
}
