//! A file or block device as storage: alignment, short transfers, flush coalescing, locks.
//!
//! Order rules: (1) direct writes hold a range claim from before their first read or write to after
//! their last completion, so that the read-modify-write of an unaligned edge and a neighbour's
//! write
//! never overlap; (2) a flush covers the writes that ended before it was asked for: one runs at a
//! time, later callers share the next one; (3) a failed flush is remembered for good, by all
//! descriptors of the file, those opened later too, because the kernel forgets which pages it lost.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use super::StorageExtent;
use super::lock::{LockRequest, Locks};
use super::watch::WriteWatch;
use crate::address::GuestRange;
use crate::buf::Buf;
use crate::driver::{FallocateMode, FileFacts, FsOp, FsOutcome, Handle, OpKind, OpenSpec};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::sync::Notify;
use crate::executor::{Class, Core, JoinHandle, Op};
use crate::limits::FAILED_SYNCS;
use crate::ranges::RangeLocks;

/// How a file is opened.
#[derive(Clone, Debug, Default)]
pub struct FileOptions {
    /// Its path.
    pub path: PathBuf,
    /// What errors call it, if its path is a temporary one.
    pub shown_as: Option<PathBuf>,
    /// Open for writing.
    pub writable: bool,
    /// Bypass the page cache (O_DIRECT).
    pub direct: bool,
    /// Create it; fails if it exists.
    pub create_new: bool,
    /// Do not follow anything out of this folder (openat2 RESOLVE_BENEATH).
    pub beneath: Option<PathBuf>,
    /// Take and honour locks on the file (OFD locks in QEMU's byte layout).
    pub locking: bool,
}

/// An open file.
#[derive(Debug)]
pub struct File {
    pub(super) core: Core,
    name: String,
    path: RefCell<PathBuf>,
    beneath: Option<PathBuf>,
    direct: bool,
    handle: RefCell<Rc<Handle>>,
    pub(super) facts: FileFacts,
    writable: Cell<bool>,
    pub(super) size: Cell<u64>,
    pub(super) claims: Rc<RangeLocks>,
    flush: FlushState,
    locks: Option<Locks>,
    /// Set when the file system refused to punch holes or zero ranges.
    no_punch: Cell<bool>,
    no_zero_range: Cell<bool>,
    watch: Rc<WriteWatch>,
    discards: Cell<DiscardStats>,
}

/// Discards of a file since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiscardStats {
    /// Discards that gave space back.
    pub done: u64,
    /// Discards that failed.
    pub failed: u64,
    /// Bytes given back.
    pub bytes: u64,
}

#[derive(Debug)]
struct FlushState {
    requested: Cell<u64>,
    finished: Cell<u64>,
    running: Cell<bool>,
    failed: RefCell<Option<Error>>,
    changed: Notify,
}

/// Files of a core whose data may be lost although the page cache still shows it: a flush failed,
/// and the kernel forgets it with the descriptor that was told.
#[derive(Debug, Default)]
struct FailedSyncs(RefCell<VecDeque<((u64, u64), Error)>>);

impl FailedSyncs {
    fn of(core: &Core) -> Rc<Self> {
        core.extension(Self::default)
    }

    fn note(&self, identity: (u64, u64), error: &Error) {
        let mut failed = self.0.borrow_mut();
        if failed.iter().any(|(known, _)| *known == identity) {
            return;
        }
        if failed.len() >= FAILED_SYNCS {
            failed.pop_front();
        }
        failed.push_back((identity, error.clone()));
    }

    fn forget(&self, identity: (u64, u64)) {
        self.0.borrow_mut().retain(|(known, _)| *known != identity);
    }

    fn find(&self, identity: (u64, u64)) -> Option<Error> {
        let failed = self.0.borrow();
        failed.iter().find(|(known, _)| *known == identity).map(|(_, error)| error.clone())
    }
}

impl File {
    /// Opens (or creates) a file.
    ///
    /// # Errors
    /// What the system reports, with the path; `InvalidArgument` naming what the path is if it is
    /// neither a regular file nor a block device.
    pub async fn open(core: &Core, options: FileOptions) -> Result<Rc<Self>> {
        let name = options.shown_as.as_ref().unwrap_or(&options.path).display().to_string();
        let spec = OpenSpec {
            path: options.path.clone(),
            writable: options.writable,
            direct: options.direct,
            create_new: options.create_new,
            beneath: options.beneath.clone(),
        };
        let op = if options.create_new { "create" } else { "open" };
        let done = core.submit(OpKind::Fs(FsOp::Open(spec))).await;
        let (handle, facts) = match done.outcome {
            FsOutcome::Opened(handle, facts) if done.result >= 0 => (handle, facts),
            FsOutcome::WrongKind(kind) => {
                let source = NotAFile { path: options.path, kind };
                return Err(Error::new(ErrorKind::InvalidArgument, op).with_source(source));
            }
            _ => return Err(Error::os(-done.result, op).on(&name)),
        };
        let locks = if options.locking {
            Some(Locks::open(core, &options.path, facts.identity).await?)
        } else {
            None
        };
        if options.create_new {
            // The same number, another file.
            FailedSyncs::of(core).forget(facts.identity);
        }
        Ok(Rc::new(Self {
            core: core.clone(),
            name,
            path: RefCell::new(options.path),
            beneath: options.beneath,
            direct: options.direct,
            handle: RefCell::new(Rc::new(handle)),
            facts,
            writable: Cell::new(options.writable),
            size: Cell::new(facts.size),
            claims: RangeLocks::new(core),
            flush: FlushState {
                requested: Cell::new(0),
                finished: Cell::new(0),
                running: Cell::new(false),
                failed: RefCell::new(None),
                changed: Notify::new(core),
            },
            locks,
            no_punch: Cell::new(false),
            no_zero_range: Cell::new(false),
            watch: Rc::default(),
            discards: Cell::default(),
        }))
    }

    /// The path as text.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file was given another path.
    pub fn renamed(&self, path: &Path) {
        self.path.replace(path.to_path_buf());
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size.get()
    }

    /// The path of a regular file on a file system of this machine; `None` for others.
    pub fn local_path(&self) -> Option<PathBuf> {
        let local = !self.facts.block_device && !self.facts.remote;
        local.then(|| self.path.borrow().clone())
    }

    /// Whether the descriptor allows writes.
    pub fn is_writable(&self) -> bool {
        self.writable.get()
    }

    pub(super) fn handle(&self) -> Rc<Handle> {
        Rc::clone(&self.handle.borrow())
    }

    /// Takes a descriptor that allows writes in the place of one that does not. Operations in
    /// flight end on the old one.
    ///
    /// # Errors
    /// What the system reports; `InvalidArgument` if the path names another file by now.
    pub async fn make_writable(&self) -> Result<()> {
        if self.writable.get() {
            return Ok(());
        }
        let spec = OpenSpec {
            path: self.path.borrow().clone(),
            writable: true,
            direct: self.direct,
            create_new: false,
            beneath: self.beneath.clone(),
        };
        let done = self.core.submit(OpKind::Fs(FsOp::Open(spec))).await;
        let (handle, facts) = match done.outcome {
            FsOutcome::Opened(handle, facts) if done.result >= 0 => (handle, facts),
            _ => return Err(Error::os(-done.result, "open for writing").on(&self.name)),
        };
        if facts.identity != self.facts.identity {
            let source = Replaced(self.path.borrow().clone());
            return Err(Error::new(ErrorKind::InvalidArgument, "open").with_source(source));
        }
        self.handle.replace(Rc::new(handle));
        self.writable.set(true);
        Ok(())
    }

    /// Alignment (bytes) of offsets and lengths that need no read-modify-write.
    pub fn alignment(&self) -> u64 {
        self.facts.align
    }

    /// Device and inode.
    pub fn identity(&self) -> (u64, u64) {
        self.facts.identity
    }

    /// Bytes that the file took on its device when it was opened.
    pub fn allocated_at_open(&self) -> u64 {
        self.facts.allocated
    }

    /// Whether reads and writes are served inline (the file lives in memory).
    pub fn is_memory_backed(&self) -> bool {
        self.handle.borrow().class == crate::driver::IoClass::Inline
    }

    /// Takes exactly the locks of `request`, or leaves them as they were.
    ///
    /// # Errors
    /// `Locked` with the peer's text if another process (or node) excludes one of them.
    pub async fn lock(&self, request: LockRequest) -> Result<()> {
        match &self.locks {
            Some(locks) => locks.change(&self.core, &self.name, request).await,
            None => Ok(()),
        }
    }

    fn is_aligned(&self, offset: u64, buf: &Buf) -> bool {
        let align = self.facts.align;
        align <= 1
            || ((offset | buf.len() as u64) & (align - 1) == 0
                && buf.is_aligned(self.facts.memory_align))
    }

    /// How far the file was written since it was opened.
    pub fn watch(&self) -> &Rc<WriteWatch> {
        &self.watch
    }

    /// Looks at the size again, after others may have written the file.
    ///
    /// # Errors
    /// What the system reports.
    pub async fn look_again(&self) -> Result<()> {
        let path = self.path.borrow().clone();
        let found = super::paths::stat(&self.core, &path).await?;
        if found.identity == self.facts.identity && !found.block_device {
            self.size.set(found.size);
        }
        Ok(())
    }

    /// The discards since it was opened.
    pub fn discards(&self) -> DiscardStats {
        self.discards.get()
    }

    /// See [`super::Storage::read`].
    pub fn read(self: &Rc<Self>, offset: u64, buf: Buf) -> IoFuture {
        if buf.is_empty() {
            return IoFuture::ready(Ok(()));
        }
        if self.is_aligned(offset, &buf) {
            return IoFuture::start(self, Direction::Read, offset, buf);
        }
        let file = Rc::clone(self);
        let task = async move { file.read_unaligned(offset, buf).await };
        IoFuture::task(self.core.spawn(Class::Guest, task))
    }

    /// See [`super::Storage::write`].
    pub fn write(self: &Rc<Self>, offset: u64, buf: Buf, fua: bool) -> IoFuture {
        if buf.is_empty() {
            return IoFuture::ready(Ok(()));
        }
        self.watch.note(offset, buf.len() as u64);
        if self.facts.align <= 1 {
            return IoFuture::start(self, Direction::Write { fua }, offset, buf);
        }
        let file = Rc::clone(self);
        let task = async move { file.write_direct(offset, buf, fua).await };
        IoFuture::task(self.core.spawn(Class::Guest, task))
    }

    async fn read_unaligned(self: Rc<Self>, offset: u64, buf: Buf) -> Result<()> {
        let align = self.facts.align;
        let wide = GuestRange::new(offset, buf.len() as u64).widen(align);
        let bounce = self.core.pool().alloc(length(wide.len));
        IoFuture::start(&self, Direction::Read, wide.start.bytes(), bounce.clone()).await?;
        let at = length(offset - wide.start.bytes());
        buf.copy_from_buf(&bounce.slice(at..at + buf.len()));
        Ok(())
    }

    async fn write_direct(self: Rc<Self>, offset: u64, buf: Buf, fua: bool) -> Result<()> {
        let range = GuestRange::new(offset, buf.len() as u64);
        let align = self.facts.align;
        let wide = range.widen(align);
        // Padding that grows the file is cut off again below. Whatever lies beyond must not be
        // written meanwhile, or the cut would take it along: claim all the rest of the file.
        let cuts_tail = wide.end() > range.end() && wide.end().bytes() > self.size.get();
        let start = wide.start.bytes();
        let claimed = if cuts_tail { GuestRange::new(start, u64::MAX - start) } else { wide };
        let claim = self.claims.claim(claimed);
        claim.held().await;
        if self.is_aligned(offset, &buf) {
            return IoFuture::start(&self, Direction::Write { fua }, offset, buf).await;
        }
        let bounce = self.core.pool().alloc(length(wide.len));
        let head = length(offset - wide.start.bytes());
        let unit = length(align);
        let last = bounce.len() - unit;
        let tail_partial = head + buf.len() != bounce.len();
        let first = (head > 0).then(|| {
            let block = bounce.slice(0..unit);
            IoFuture::start(&self, Direction::Read, wide.start.bytes(), block)
        });
        let tail = (tail_partial && (last > 0 || head == 0)).then(|| {
            let block = bounce.slice(last..bounce.len());
            IoFuture::start(&self, Direction::Read, wide.start.bytes() + last as u64, block)
        });
        if let Some(first) = first {
            first.await?;
        }
        if let Some(tail) = tail {
            tail.await?;
        }
        bounce.slice(head..head + buf.len()).copy_from_buf(&buf);
        let end = range.end().bytes();
        let old_size = self.size.get();
        IoFuture::start(&self, Direction::Write { fua }, wide.start.bytes(), bounce).await?;
        if cuts_tail
            && wide.end().bytes() > end.max(old_size)
            && self.size.get() == wide.end().bytes()
            && !self.facts.block_device
        {
            // The padding grew the file: give back what nobody wrote.
            self.truncate(end.max(old_size)).await?;
        }
        drop(claim);
        Ok(())
    }

    /// See [`super::Storage::flush`].
    ///
    /// # Errors
    /// The first failed flush of this file, for ever.
    pub async fn flush(self: &Rc<Self>) -> Result<()> {
        let state = &self.flush;
        let ticket = state.requested.get() + 1;
        state.requested.set(ticket);
        if state.failed.borrow().is_none() {
            *state.failed.borrow_mut() = FailedSyncs::of(&self.core).find(self.identity());
        }
        loop {
            if let Some(error) = &*state.failed.borrow() {
                return Err(error.clone());
            }
            if state.finished.get() >= ticket {
                return Ok(());
            }
            let changed = state.changed.wait();
            if !state.running.replace(true) {
                let file = Rc::clone(self);
                drop(self.core.spawn(Class::Guest, async move { file.sync_once().await }));
            }
            changed.await;
        }
    }

    async fn sync_once(self: Rc<Self>) {
        let state = &self.flush;
        let covers = state.requested.get();
        let result = loop {
            let done = self.core.submit(OpKind::Sync { file: self.handle() }).await;
            if !matches!(-done.result, libc::EINTR | libc::EAGAIN) {
                break done.result;
            }
        };
        if result < 0 {
            let error = Error::os(-result, "flush").on(&self.name);
            FailedSyncs::of(&self.core).note(self.facts.identity, &error);
            *state.failed.borrow_mut() = Some(error);
        } else {
            state.finished.set(covers);
        }
        state.running.set(false);
        state.changed.notify_all();
    }

    /// See [`super::Storage::write_zeroes`].
    ///
    /// # Errors
    /// What the system reports.
    pub async fn write_zeroes(self: &Rc<Self>, offset: u64, len: u64, unmap: bool) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.watch.note(offset, len);
        let inside = self.size.get().saturating_sub(offset).min(len);
        if inside > 0 {
            self.zero_inside(offset, inside, unmap).await?;
        }
        if inside < len {
            self.allocate(offset + inside, len - inside).await?;
        }
        Ok(())
    }

    async fn zero_inside(self: &Rc<Self>, offset: u64, len: u64, unmap: bool) -> Result<()> {
        if unmap && self.punch(offset, len).await? {
            return Ok(());
        }
        if !self.no_zero_range.get() {
            match self.fallocate(FallocateMode::ZeroRange, offset, len).await {
                Err(error) if is_unsupported(&error) => self.no_zero_range.set(true),
                other => return other,
            }
        }
        let zeroes = self.core.pool().zeroed(length(len.min(1 << 20)));
        let mut at = 0;
        while at < len {
            let part = length((len - at).min(zeroes.len() as u64));
            self.write(offset + at, zeroes.slice(0..part), false).await?;
            at += part as u64;
        }
        Ok(())
    }

    async fn punch(&self, offset: u64, len: u64) -> Result<bool> {
        if self.no_punch.get() {
            return Ok(false);
        }
        match self.fallocate(FallocateMode::PunchHole, offset, len).await {
            Ok(()) => Ok(true),
            Err(error) if is_unsupported(&error) => {
                self.no_punch.set(true);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    async fn fallocate(&self, mode: FallocateMode, offset: u64, len: u64) -> Result<()> {
        let file = self.handle();
        let op = FsOp::Fallocate { file, mode, offset, len };
        let done = self.core.submit(OpKind::Fs(op)).await;
        if done.result < 0 {
            return Err(Error::os(-done.result, "allocate space").on(&self.name).at(offset));
        }
        Ok(())
    }

    /// See [`super::Storage::discard`].
    ///
    /// # Errors
    /// What the system reports.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<bool> {
        let inside = self.size.get().saturating_sub(offset).min(len);
        if inside == 0 {
            return Ok(true);
        }
        let punched = self.punch(offset, inside).await;
        let mut discards = self.discards.get();
        match &punched {
            Ok(true) => {
                discards.done += 1;
                discards.bytes = discards.bytes.saturating_add(inside);
            }
            _ => discards.failed += 1,
        }
        self.discards.set(discards);
        punched
    }

    /// See [`super::Storage::allocate`].
    ///
    /// # Errors
    /// What the system reports; `NoSpace` leaves the size as it was.
    pub async fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset.saturating_add(len);
        match self.fallocate(FallocateMode::Allocate, offset, len).await {
            Err(error) if is_unsupported(&error) && end > self.size.get() => {
                self.truncate(end).await
            }
            Err(error) if is_unsupported(&error) => Ok(()),
            Err(error) => Err(error),
            Ok(()) => {
                self.size.set(self.size.get().max(end));
                Ok(())
            }
        }
    }

    /// See [`super::Storage::reserve`].
    ///
    /// # Errors
    /// What the system reports; `NoSpace` leaves the size as it was.
    pub async fn reserve(&self, offset: u64, len: u64) -> Result<bool> {
        match self.fallocate(FallocateMode::Allocate, offset, len).await {
            Err(error) if is_unsupported(&error) => Ok(false),
            Err(error) => Err(error),
            Ok(()) => {
                self.size.set(self.size.get().max(offset.saturating_add(len)));
                Ok(true)
            }
        }
    }

    /// Whether it is a regular file, which writes behind its end make larger.
    pub fn can_grow(&self) -> bool {
        !self.facts.block_device
    }

    /// Whether writes get cheaper where space was reserved: not for devices, not in memory.
    pub fn gains_from_room(&self) -> bool {
        !self.facts.block_device && !self.is_memory_backed()
    }

    /// See [`super::Storage::truncate`].
    ///
    /// # Errors
    /// What the system reports.
    pub async fn truncate(&self, size: u64) -> Result<()> {
        let op = FsOp::Truncate { file: self.handle(), len: size };
        let done = self.core.submit(OpKind::Fs(op)).await;
        if done.result < 0 {
            return Err(Error::os(-done.result, "truncate").on(&self.name));
        }
        self.size.set(size);
        Ok(())
    }

    /// See [`super::Storage::extents`].
    ///
    /// # Errors
    /// What the system reports.
    pub async fn extents(&self, offset: u64, len: u64) -> Result<Vec<StorageExtent>> {
        if self.facts.block_device {
            return Ok(vec![StorageExtent { len, data: true }]);
        }
        let op = FsOp::Extents { file: self.handle(), offset, len };
        let done = self.core.submit(OpKind::Fs(op)).await;
        match done.outcome {
            FsOutcome::Extents(runs) if done.result >= 0 => {
                Ok(runs.into_iter().map(|(len, data)| StorageExtent { len, data }).collect())
            }
            _ => Err(Error::os(-done.result, "find data and holes").on(&self.name).at(offset)),
        }
    }
}

fn is_unsupported(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Io(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV)
    )
}

fn length(len: u64) -> usize {
    usize::try_from(len).expect("invariant: requests fit memory")
}

/// The path names another file than the one that is open.
#[derive(Debug)]
struct Replaced(PathBuf);

impl std::fmt::Display for Replaced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = self.0.display();
        write!(f, "Could not open '{path}' for writing: another file has its name by now")
    }
}

impl std::error::Error for Replaced {}

/// The path is something that cannot hold an image.
#[derive(Debug)]
struct NotAFile {
    path: PathBuf,
    kind: &'static str,
}

impl std::fmt::Display for NotAFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = self.path.display();
        write!(
            f,
            "Could not open '{path}': it is {}, not a regular file or block device",
            self.kind
        )
    }
}

impl std::error::Error for NotAFile {}

#[derive(Clone, Copy, Debug)]
enum Direction {
    Read,
    Write { fua: bool },
}

/// A started read or write of storage.
///
/// Dropping it does not stop the operation: buffers stay owned by it until its completion.
#[must_use = "await it to learn the result"]
#[derive(Debug)]
pub struct IoFuture(State);

#[derive(Debug)]
enum State {
    Ready(Option<Result<()>>),
    Running(Transfer),
    Task(JoinHandle<Result<()>>),
}

struct Transfer {
    file: Rc<File>,
    direction: Direction,
    offset: u64,
    buf: Buf,
    done: usize,
    op: Op,
}

impl IoFuture {
    /// An operation that is over.
    pub(crate) fn ready(result: Result<()>) -> Self {
        Self(State::Ready(Some(result)))
    }

    /// An operation done by a task.
    pub(crate) fn task(task: JoinHandle<Result<()>>) -> Self {
        Self(State::Task(task))
    }

    fn start(file: &Rc<File>, direction: Direction, offset: u64, buf: Buf) -> Self {
        let op = submit(file, direction, offset, buf.clone());
        Self(State::Running(Transfer {
            file: Rc::clone(file),
            direction,
            offset,
            buf,
            done: 0,
            op,
        }))
    }
}

fn submit(file: &File, direction: Direction, offset: u64, buf: Buf) -> Op {
    let handle = file.handle();
    file.core.submit(match direction {
        Direction::Read => OpKind::Read { file: handle, offset, buf },
        Direction::Write { fua } => OpKind::Write { file: handle, offset, buf, fua },
    })
}

impl Transfer {
    /// Accounts for a completion; `None` if the rest was submitted.
    fn step(&mut self, result: i32) -> Option<Result<()>> {
        if result < 0 {
            if !matches!(-result, libc::EINTR | libc::EAGAIN) {
                let op = match self.direction {
                    Direction::Read => "read",
                    Direction::Write { .. } => "write",
                };
                return Some(Err(Error::os(-result, op).on(&self.file.name).at(self.offset)));
            }
        } else {
            self.done += usize::try_from(result).unwrap_or(0);
        }
        let whole = self.buf.len();
        if self.done >= whole {
            self.grow_size();
            return Some(Ok(()));
        }
        match self.direction {
            Direction::Read => {
                let at_end = self.offset + self.done as u64 >= self.file.size.get();
                if result == 0 || (result > 0 && at_end) {
                    self.buf.slice(self.done..whole).fill(0);
                    return Some(Ok(()));
                }
            }
            Direction::Write { .. } if result == 0 => {
                return Some(Err(Error::os(libc::EIO, "write").on(&self.file.name)));
            }
            Direction::Write { .. } => {}
        }
        // Direct I/O goes on from the last whole block.
        self.done -= self.done % length(self.file.facts.align.max(1));
        let rest = self.buf.slice(self.done..whole);
        self.op = submit(&self.file, self.direction, self.offset + self.done as u64, rest);
        None
    }

    fn grow_size(&self) {
        if matches!(self.direction, Direction::Write { .. }) {
            let end = self.offset + self.buf.len() as u64;
            self.file.size.set(self.file.size.get().max(end));
        }
    }
}

impl std::fmt::Debug for Transfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {}+{}", self.direction, self.offset, self.buf.len())
    }
}

impl Future for IoFuture {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        match &mut self.0 {
            State::Ready(result) => {
                Poll::Ready(result.take().expect("invariant: not polled after the end"))
            }
            State::Task(task) => Pin::new(task).poll(context),
            State::Running(transfer) => loop {
                let Poll::Ready(done) = Pin::new(&mut transfer.op).poll(context) else {
                    return Poll::Pending;
                };
                if let Some(result) = transfer.step(done.result) {
                    return Poll::Ready(result);
                }
            },
        }
    }
}
