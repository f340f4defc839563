//! The types and the trait of the seam; see the module above for its rules.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;

use crate::buf::Buf;

/// Nanoseconds of the driver's monotonic clock.
pub type Nanos = u64;

/// Names an operation in flight: slab index and generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

/// An open file, socket or simulated file.
#[derive(Debug)]
pub(crate) enum Descriptor {
    /// Of the kernel.
    Os(OwnedFd),
    /// Of the simulator: index of an open simulated file.
    Sim(u32),
}

/// How reads and writes of a file are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IoClass {
    /// Through the ring.
    Ring,
    /// By pread/pwrite on the loop: memory-backed files, where the ring would punt each request.
    Inline,
    /// By pread/pwrite on threads of the blocking pool: files that another machine or program
    /// answers for. The ring would ask a FUSE server on the loop whether it may poll it, and a file
    /// that hangs would keep the ring's few workers from others.
    Blocking,
}

/// A descriptor with what the driver must know about it; shared by the operations on it.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) descriptor: Descriptor,
    pub(crate) class: IoClass,
}

/// What the driver learnt about a file when it was opened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FileFacts {
    /// Bytes (of the device for block devices).
    pub(crate) size: u64,
    /// Alignment of offsets and lengths for this descriptor; 1 if buffered.
    pub(crate) align: u64,
    /// Alignment of memory for this descriptor; 1 if buffered.
    pub(crate) memory_align: usize,
    /// Device and inode: the identity of the file.
    pub(crate) identity: (u64, u64),
    /// Whether it is a block device.
    pub(crate) block_device: bool,
    /// Bytes that the file takes on its device.
    pub(crate) allocated: u64,
    /// Whether it lies on another machine or in another program (network, FUSE).
    pub(crate) remote: bool,
    /// Bytes of a block of its file system; 0 where files cannot share blocks for sure (devices,
    /// files on memory).
    pub(crate) block: u64,
}

/// How a file is opened.
#[derive(Clone, Debug, Default)]
pub(crate) struct OpenSpec {
    pub(crate) path: PathBuf,
    pub(crate) writable: bool,
    pub(crate) direct: bool,
    pub(crate) create_new: bool,
    /// Resolve below this folder only (symbolic links cannot leave it).
    pub(crate) beneath: Option<PathBuf>,
}

/// What OFD locks to take on a file: bit i of `used`/`unshared` is permission i of QEMU
/// (include/block/block-common.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LockSpec {
    pub(crate) used: u8,
    pub(crate) unshared: u8,
}

/// Calls on paths and descriptors that always go to the blocking pool.
#[derive(Clone, Debug)]
pub(crate) enum FsOp {
    Open(OpenSpec),
    Stat(PathBuf),
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    Unlink(PathBuf),
    /// Makes creations, renames and removals in the folder durable.
    SyncFolder(PathBuf),
    /// Opens `path` for locking only and takes locks; the descriptor holds them.
    OpenLock {
        path: PathBuf,
        identity: (u64, u64),
    },
    /// Changes the locks held by a lock descriptor from `old` to `new`.
    Lock {
        file: Rc<Handle>,
        old: LockSpec,
        new: LockSpec,
    },
    /// Data and holes from `offset`, as (length, data) runs covering `len`.
    Extents {
        file: Rc<Handle>,
        offset: u64,
        len: u64,
    },
    /// fallocate with `mode`.
    Fallocate {
        file: Rc<Handle>,
        mode: FallocateMode,
        offset: u64,
        len: u64,
    },
    Truncate {
        file: Rc<Handle>,
        len: u64,
    },
    /// Makes `file` share the blocks of `source` (FICLONERANGE).
    Share {
        source: Rc<Handle>,
        source_offset: u64,
        file: Rc<Handle>,
        offset: u64,
        len: u64,
    },
}

/// The fallocate modes that the engine uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FallocateMode {
    /// Mode 0: reserve and extend.
    Allocate,
    PunchHole,
    ZeroRange,
}

/// What a blocking call gave back beside its errno.
#[derive(Debug)]
pub(crate) enum FsOutcome {
    None,
    Opened(Handle, FileFacts),
    Facts(FileFacts),
    Extents(Vec<(u64, bool)>),
    /// What was found is not a regular file or block device.
    WrongKind(&'static str),
    /// The lock that could not be taken: index of the permission and whether it was the "shared"
    /// half.
    LockConflict {
        permission: u8,
        shared: bool,
    },
}

/// A closure for the blocking pool, taken when it starts.
pub(crate) struct WorkItem(pub(crate) Option<Box<dyn FnOnce() + Send>>);

impl std::fmt::Debug for WorkItem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WorkItem")
    }
}

/// One operation.
#[derive(Debug)]
pub(crate) enum OpKind {
    Read {
        file: Rc<Handle>,
        offset: u64,
        buf: Buf,
    },
    Write {
        file: Rc<Handle>,
        offset: u64,
        buf: Buf,
        fua: bool,
    },
    Sync {
        file: Rc<Handle>,
    },
    Fs(FsOp),
    /// CPU-heavy or blocking work off the loop.
    Work(WorkItem),
    Accept {
        socket: Rc<Handle>,
    },
    Recv {
        socket: Rc<Handle>,
        buf: Buf,
    },
    /// Sends the whole buffer (short sends are continued by the driver's caller).
    Send {
        socket: Rc<Handle>,
        buf: Buf,
    },
    /// Asks the kernel to end the operation `target` early.
    Cancel {
        target: Token,
    },
    /// The slot is free or its operation was taken.
    Vacant,
}

/// A slot of the operation slab: stable in memory while its operation is in flight.
#[derive(Debug)]
pub(crate) struct OpSlot {
    pub(crate) generation: u32,
    pub(crate) kind: OpKind,
    pub(crate) outcome: FsOutcome,
    pub(crate) state: SlotState,
    /// Memory for the kernel's view of scattered buffers.
    pub(crate) side: SideMemory,
}

/// Structures beside the buffers that the kernel reads while an operation is in flight.
#[derive(Default)]
pub(crate) struct SideMemory {
    pub(crate) iovecs: Vec<libc::iovec>,
    pub(crate) message: Option<libc::msghdr>,
}

impl std::fmt::Debug for SideMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SideMemory({} segments)", self.iovecs.len())
    }
}

/// Where an operation is in its life.
///
/// ```text
/// Inflight -> Waiting -> Done -> (freed by the future)
///     \___________\-> Orphan -> (freed by the last completion)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotState {
    Free,
    Inflight,
    Waiting(crate::executor::TaskId),
    Done(i32),
    Orphan,
}

/// A completion: the operation and its result (negative errno on failure).
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) token: Token,
    pub(crate) result: i32,
}

/// How long a turn may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Not at all: there is work.
    No,
    /// Until something happens, or this time.
    Until(Option<Nanos>),
}

/// What the engine needs from the world, per core.
///
/// The caller keeps a slot pinned (boxed) from `submit` to its `Done`. The driver never calls back.
pub(crate) trait Driver {
    /// Takes the operation of `slot`; it starts at the latest in the next turn.
    fn submit(&mut self, token: Token, slot: &mut OpSlot);

    /// Submits what is queued, waits as told, and reports completions into `done`.
    fn turn(&mut self, wait: Wait, done: &mut Vec<Done>);

    /// Nanoseconds of a clock that never goes back.
    fn now(&self) -> Nanos;

    /// 64 random bits (seeded in the simulator).
    fn random(&mut self) -> u64;

    /// Counters for tests and benches.
    fn counters(&self) -> DriverCounters;
}

/// Counts since the driver started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DriverCounters {
    /// io_uring_enter calls.
    pub enters: u64,
    /// Loop turns.
    pub turns: u64,
    /// Operations submitted to the ring.
    pub submitted: u64,
    /// Reads and writes served inline.
    pub inline: u64,
}
