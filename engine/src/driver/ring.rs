//! The real driver: one io_uring per core, created on its thread.
//!
//! Flags are probed from the best set down (NO_SQARRAY, then DEFER_TASKRUN, then plain). Files on
//! memory (tmpfs, ramfs) are served by pread/pwrite on the loop in pieces that fit the cache,
//! within
//! a byte budget per turn, because the ring would hand every such request to a worker thread. Files
//! of other machines and programs (NFS, FUSE) are served by threads of the blocking pool.
//!
//! Order rules: (1) entries are pushed at `submit` and enter the kernel at the next `turn`, with at
//! most one enter per turn (more only when the submission queue is full); (2) pointers into a slot
//! are valid until its completion, because slots are boxed and freed only then.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use io_uring::types::{CancelBuilder, Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};

use super::blocking::{BlockingPool, Lane};
use super::blocking_io::{BlockingIo, sync_data};
use super::file_ops::FsCall;
use super::{
    Descriptor, Done, Driver, DriverCounters, FsOutcome, Handle, IoClass, Nanos, OpKind, OpSlot,
    Token, Wait,
};
use crate::buf::Buf;
use crate::error::{Error, Result};
use crate::executor::Mailbox;
use crate::limits::{INLINE_PIECE, IO_WORKERS, RING_COMPLETIONS, RING_ENTRIES, TURN_INLINE_BYTES};

/// user_data of the armed read of the wake descriptor.
const WAKE: u64 = u64::MAX;
/// user_data of operations whose completion means nothing (cancels).
const IGNORE: u64 = u64::MAX - 1;

/// io_uring, inline I/O and the blocking pool of one core.
pub(crate) struct RingDriver {
    ring: IoUring,
    mailbox: Arc<Mailbox>,
    pool: Arc<BlockingPool>,
    wake_value: Box<u64>,
    wake_armed: bool,
    inline: VecDeque<Inline>,
    ready: Vec<Done>,
    in_ring: u64,
    start: Instant,
    random: u64,
    counters: DriverCounters,
}

/// A read or write of a memory-backed file in progress.
struct Inline {
    token: Token,
    slot: NonNull<OpSlot>,
    done: usize,
}

impl RingDriver {
    /// A ring for the calling thread.
    pub(crate) fn new(mailbox: Arc<Mailbox>, pool: Arc<BlockingPool>) -> Result<Self> {
        let ring = build_ring()?;
        let mut workers = [IO_WORKERS, 0];
        if let Err(error) = ring.submitter().register_iowq_max_workers(&mut workers) {
            tracing::info!("io-wq workers are not capped: {error}");
        }
        if let Err(error) = ring.submitter().register_ring_fd() {
            tracing::info!("ring descriptor is not registered: {error}");
        }
        let start = Instant::now();
        let mut seed = [0_u8; 8];
        // SAFETY: getrandom writes at most 8 bytes to the array; on failure the seed stays weak,
        // which only makes jitter predictable.
        unsafe { libc::getrandom(seed.as_mut_ptr().cast(), seed.len(), 0) };
        Ok(Self {
            ring,
            mailbox,
            pool,
            wake_value: Box::new(0),
            wake_armed: false,
            inline: VecDeque::new(),
            ready: Vec::new(),
            in_ring: 0,
            start,
            random: u64::from_ne_bytes(seed) | 1,
            counters: DriverCounters::default(),
        })
    }

    fn push(&mut self, entry: squeue::Entry) {
        loop {
            // SAFETY: every pointer in the entry is into a boxed slot or this driver's box, which
            // live until the completion.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            // Full: hand over what is queued; this is the only enter outside of `turn`.
            self.counters.enters += 1;
            if let Err(error) = self.ring.submit()
                && !is_transient(&error)
            {
                tracing::error!("io_uring_enter: {error}");
            }
        }
    }

    fn push_op(&mut self, token: Token, entry: squeue::Entry) {
        self.in_ring += 1;
        self.counters.submitted += 1;
        self.push(entry.user_data(user_data(token)));
    }

    fn arm_wake(&mut self) {
        let Some(fd) = self.mailbox.raw_eventfd() else { return };
        self.wake_armed = true;
        let value: *mut u64 = &raw mut *self.wake_value;
        let entry = opcode::Read::new(Fd(fd), value.cast(), 8).build().user_data(WAKE);
        self.push(entry);
    }

    /// Serves memory-backed files within the turn's budget.
    fn run_inline(&mut self) {
        let mut budget = TURN_INLINE_BYTES;
        while budget > 0 {
            let Some(mut work) = self.inline.pop_front() else { break };
            // SAFETY: the slot is boxed and not freed before its completion, which is reported
            // below; nothing else refers to it while the driver runs.
            let slot = unsafe { work.slot.as_ref() };
            match inline_step(slot, work.done, budget) {
                Step::More(bytes) => {
                    budget = budget.saturating_sub(bytes);
                    work.done += bytes;
                    self.inline.push_back(work);
                }
                Step::End(result) => {
                    self.counters.inline += 1;
                    budget = budget.saturating_sub(512);
                    self.ready.push(Done { token: work.token, result });
                }
            }
        }
    }

    fn enter(&mut self, wait: Wait) {
        let queued = !self.ring.submission().is_empty();
        let pending = self.ring.submission().taskrun() || self.ring.submission().cq_overflow();
        if wait == Wait::No && !queued && !pending {
            return;
        }
        self.counters.enters += 1;
        let result = match wait {
            Wait::No => self.ring.submit(),
            Wait::Until(None) => self.ring.submit_and_wait(1),
            Wait::Until(Some(at)) => {
                let left = at.saturating_sub(self.now());
                let spec = Timespec::new()
                    .sec(left / 1_000_000_000)
                    .nsec(u32::try_from(left % 1_000_000_000).unwrap_or(0));
                let args = SubmitArgs::new().timespec(&spec);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        if let Err(error) = result
            && !is_transient(&error)
        {
            tracing::error!("io_uring_enter: {error}");
        }
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        let mut woken = false;
        let completions = self.ring.completion();
        for completion in completions {
            match completion.user_data() {
                WAKE => woken = true,
                IGNORE => {}
                data => {
                    self.in_ring -= 1;
                    done.push(Done { token: token_of(data), result: completion.result() });
                }
            }
        }
        if woken {
            self.wake_armed = false;
        }
    }

    fn start_io(&mut self, token: Token, slot: &mut OpSlot, write: bool) {
        let (file, offset, buf, fua) = match &slot.kind {
            OpKind::Read { file, offset, buf } => (file, *offset, buf, false),
            OpKind::Write { file, offset, buf, fua } => (file, *offset, buf, *fua),
            _ => unreachable!("invariant: called for reads and writes"),
        };
        if file.class == IoClass::Inline {
            self.inline.push_back(Inline { token, slot: NonNull::from(slot), done: 0 });
            return;
        }
        let Some(fd) = raw_fd(file) else {
            self.ready.push(Done { token, result: -libc::EBADF });
            return;
        };
        if file.class == IoClass::Blocking {
            let io = BlockingIo::new(fd, buf, offset, write, fua);
            let mailbox = Arc::clone(&self.mailbox);
            self.pool.run(Lane::File(fd), token, mailbox, move || (io.run(), FsOutcome::None));
            return;
        }
        let flags = if fua { libc::RWF_DSYNC } else { 0 };
        let mut segments = buf.raw_segments();
        let entry = match (segments.next(), segments.next()) {
            (Some((ptr, len)), None) if !write => {
                let len = u32::try_from(len).expect("invariant: segments are small");
                opcode::Read::new(Fd(fd), ptr, len).offset(offset).build()
            }
            (Some((ptr, len)), None) => {
                let len = u32::try_from(len).expect("invariant: segments are small");
                opcode::Write::new(Fd(fd), ptr, len).offset(offset).rw_flags(flags).build()
            }
            _ => {
                drop(segments);
                fill_iovecs(&mut slot.side.iovecs, buf);
                let iovecs = slot.side.iovecs.as_ptr();
                let count = u32::try_from(slot.side.iovecs.len()).unwrap_or(u32::MAX);
                if write {
                    opcode::Writev::new(Fd(fd), iovecs, count)
                        .offset(offset)
                        .rw_flags(flags)
                        .build()
                } else {
                    opcode::Readv::new(Fd(fd), iovecs, count).offset(offset).build()
                }
            }
        };
        self.push_op(token, entry);
    }

    fn start_socket(&mut self, token: Token, slot: &mut OpSlot) {
        let fd = match &slot.kind {
            OpKind::Accept { socket }
            | OpKind::Recv { socket, .. }
            | OpKind::Send { socket, .. } => raw_fd(socket),
            _ => None,
        };
        let Some(fd) = fd else {
            self.ready.push(Done { token, result: -libc::EBADF });
            return;
        };
        let entry = match &slot.kind {
            OpKind::Accept { .. } => {
                opcode::Accept::new(Fd(fd), std::ptr::null_mut(), std::ptr::null_mut())
                    .flags(libc::SOCK_CLOEXEC)
                    .build()
            }
            OpKind::Recv { buf, .. } if buf.segment_count() == 1 => {
                let (ptr, len) = buf.raw_segments().next().expect("invariant: one segment");
                opcode::Recv::new(Fd(fd), ptr, u32::try_from(len).unwrap_or(u32::MAX)).build()
            }
            OpKind::Recv { buf, .. } => {
                fill_iovecs(&mut slot.side.iovecs, buf);
                let message = message(&mut slot.side.message, &mut slot.side.iovecs);
                opcode::RecvMsg::new(Fd(fd), message).build()
            }
            OpKind::Send { buf, .. } => {
                fill_iovecs(&mut slot.side.iovecs, buf);
                let message = message(&mut slot.side.message, &mut slot.side.iovecs);
                let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
                opcode::SendMsg::new(Fd(fd), message).flags(flags.unsigned_abs()).build()
            }
            _ => unreachable!("invariant: called for socket operations"),
        };
        self.push_op(token, entry);
    }
}

impl Driver for RingDriver {
    fn submit(&mut self, token: Token, slot: &mut OpSlot) {
        match &mut slot.kind {
            OpKind::Read { .. } => self.start_io(token, slot, false),
            OpKind::Write { .. } => self.start_io(token, slot, true),
            OpKind::Sync { file } => match raw_fd(file) {
                Some(fd) if file.class == IoClass::Blocking => {
                    let mailbox = Arc::clone(&self.mailbox);
                    let sync = move || (sync_data(fd), FsOutcome::None);
                    self.pool.run(Lane::File(fd), token, mailbox, sync);
                }
                Some(fd) => {
                    let entry = opcode::Fsync::new(Fd(fd)).flags(FsyncFlags::DATASYNC).build();
                    self.push_op(token, entry);
                }
                None => self.ready.push(Done { token, result: -libc::EBADF }),
            },
            OpKind::Fs(op) => match FsCall::of(op) {
                Some(call) => {
                    let mailbox = Arc::clone(&self.mailbox);
                    self.pool.run(call.lane(), token, mailbox, move || call.run());
                }
                None => self.ready.push(Done { token, result: -libc::EBADF }),
            },
            OpKind::Work(work) => {
                let work = work.0.take();
                let mailbox = Arc::clone(&self.mailbox);
                self.pool.run(Lane::Computing, token, mailbox, move || {
                    work.into_iter().for_each(|work| work());
                    (0, FsOutcome::None)
                });
            }
            OpKind::Accept { .. } | OpKind::Recv { .. } | OpKind::Send { .. } => {
                self.start_socket(token, slot);
            }
            OpKind::Cancel { target } => {
                let builder = CancelBuilder::user_data(user_data(*target));
                let entry = opcode::AsyncCancel2::new(builder).build();
                self.push(entry.user_data(IGNORE));
                self.ready.push(Done { token, result: 0 });
            }
            OpKind::Vacant => unreachable!("invariant: a submitted slot has an operation"),
        }
    }

    fn turn(&mut self, wait: Wait, done: &mut Vec<Done>) {
        self.counters.turns += 1;
        self.run_inline();
        let busy = !self.inline.is_empty() || !self.ready.is_empty();
        let wait = if busy { Wait::No } else { wait };
        if wait != Wait::No && !self.wake_armed {
            self.arm_wake();
        }
        self.enter(wait);
        done.append(&mut self.ready);
        self.reap(done);
    }

    fn now(&self) -> Nanos {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn random(&mut self) -> u64 {
        // xorshift64*: jitter only, nothing secret.
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn counters(&self) -> DriverCounters {
        self.counters
    }
}

impl Drop for RingDriver {
    fn drop(&mut self) {
        // The executor waits for every operation before it drops its driver. If one is left (a
        // panic is unwinding), closing the ring would not stop the kernel from writing into
        // memory: the slots are leaked by their owner in that case, and the wake value here.
        if self.wake_armed {
            Box::leak(std::mem::replace(&mut self.wake_value, Box::new(0)));
        }
    }
}

fn build_ring() -> Result<IoUring> {
    let attempts: [(&str, fn(&mut io_uring::Builder)); 4] = [
        ("DEFER_TASKRUN and NO_SQARRAY", |builder| {
            builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
            builder.setup_no_sqarray();
        }),
        ("DEFER_TASKRUN", |builder| {
            builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
        }),
        ("COOP_TASKRUN", |builder| {
            builder.setup_coop_taskrun().setup_taskrun_flag();
        }),
        ("no flags", |_| {}),
    ];
    let mut last = None;
    for (name, setup) in attempts {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_cqsize(RING_COMPLETIONS).setup_submit_all();
        setup(&mut builder);
        match builder.build(RING_ENTRIES) {
            Ok(ring) => {
                tracing::debug!("ring set up with {name}");
                return Ok(ring);
            }
            Err(error) => {
                tracing::info!("the kernel refuses a ring with {name}: {error}");
                last = error.raw_os_error();
            }
        }
    }
    Err(Error::os(last.unwrap_or(libc::ENOSYS), "set up io_uring"))
}

fn is_transient(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN))
}

const fn user_data(token: Token) -> u64 {
    (token.generation as u64) << 32 | token.index as u64
}

#[expect(clippy::cast_possible_truncation, reason = "splits the two halves")]
const fn token_of(data: u64) -> Token {
    Token { index: data as u32, generation: (data >> 32) as u32 }
}

fn raw_fd(handle: &Handle) -> Option<RawFd> {
    match &handle.descriptor {
        Descriptor::Os(fd) => Some(fd.as_raw_fd()),
        Descriptor::Sim(_) => None,
    }
}

fn fill_iovecs(iovecs: &mut Vec<libc::iovec>, buf: &Buf) {
    iovecs.clear();
    iovecs.extend(
        buf.raw_segments().map(|(ptr, len)| libc::iovec { iov_base: ptr.cast(), iov_len: len }),
    );
}

/// A message header in `slot` that points to `iovecs`.
fn message(slot: &mut Option<libc::msghdr>, iovecs: &mut [libc::iovec]) -> *mut libc::msghdr {
    // SAFETY: msghdr is a plain C structure for which all-zero is valid.
    let header = slot.insert(unsafe { std::mem::zeroed() });
    header.msg_iov = iovecs.as_mut_ptr();
    header.msg_iovlen = iovecs.len();
    header
}

enum Step {
    More(usize),
    End(i32),
}

/// Moves one cache-sized piece of an inline operation; `done` bytes of it are moved already.
fn inline_step(slot: &OpSlot, done: usize, budget: usize) -> Step {
    let (file, offset, buf, write, fua) = match &slot.kind {
        OpKind::Read { file, offset, buf } => (file, *offset, buf, false, false),
        OpKind::Write { file, offset, buf, fua } => (file, *offset, buf, true, *fua),
        _ => unreachable!("invariant: only reads and writes are inline"),
    };
    let Some(fd) = raw_fd(file) else { return Step::End(-libc::EBADF) };
    let whole = buf.len();
    let piece = (whole - done).min(INLINE_PIECE.min(budget.max(4096)));
    let result = move_inline(fd, buf, offset, done, piece, write, fua);
    if result < 0 {
        return match -result {
            libc::EINTR | libc::EAGAIN => Step::More(0),
            _ if done > 0 => Step::End(i32::try_from(done).unwrap_or(i32::MAX)),
            _ => Step::End(result),
        };
    }
    let moved = usize::try_from(result).unwrap_or(0);
    if moved < piece || done + moved == whole {
        // Short or complete: the file layer continues a short transfer.
        return Step::End(i32::try_from(done + moved).unwrap_or(i32::MAX));
    }
    Step::More(moved)
}

/// One pread/pwrite of the part of the segment list that starts at `done`; bytes or negative errno.
fn move_inline(
    fd: RawFd,
    buf: &Buf,
    offset: u64,
    done: usize,
    piece: usize,
    write: bool,
    fua: bool,
) -> i32 {
    let mut skip = done;
    let mut iovecs = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 16];
    let mut count = 0;
    let mut left = piece;
    for (ptr, len) in buf.raw_segments() {
        if skip >= len {
            skip -= len;
            continue;
        }
        let part = (len - skip).min(left);
        // SAFETY: skip < len, so the address is inside the segment.
        iovecs[count].iov_base = unsafe { ptr.add(skip) }.cast();
        iovecs[count].iov_len = part;
        skip = 0;
        count += 1;
        left -= part;
        if left == 0 || count == iovecs.len() {
            break;
        }
    }
    let at = i64::try_from(offset + done as u64).unwrap_or(i64::MAX);
    let count = i32::try_from(count).unwrap_or(16);
    let flags = if fua { libc::RWF_DSYNC } else { 0 };
    // SAFETY: the iovecs point into segments that the slot keeps alive; fd is open.
    let result = unsafe {
        if write {
            libc::pwritev2(fd, iovecs.as_ptr(), count, at, flags)
        } else {
            libc::preadv2(fd, iovecs.as_ptr(), count, at, 0)
        }
    };
    if result < 0 {
        return -nix::errno::Errno::last_raw();
    }
    i32::try_from(result).unwrap_or(i32::MAX)
}
