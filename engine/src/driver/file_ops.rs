//! Path and descriptor calls that always block: executed on a thread of the blocking pool.
//!
//! [`FsCall`] is an [`FsOp`] without shared handles, so it can travel; the slot of the operation
//! keeps the descriptors open meanwhile. Opening never blocks on FIFOs and never follows a
//! reference out of the folder it is confined to.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::blocking::Lane;
use super::{
    Descriptor, FallocateMode, FileFacts, FsOp, FsOutcome, Handle, IoClass, LockSpec, OpenSpec,
};

/// First byte of the lock range "permission i is used" (QEMU's block/file-posix.c).
const LOCK_USED_BASE: i64 = 100;
/// First byte of the lock range "permission i is not shared".
const LOCK_UNSHARED_BASE: i64 = 200;
/// Most runs that one hole query reports; what follows is reported as data.
const EXTENT_RUNS: usize = 4096;

const TMPFS_MAGIC: i64 = 0x0102_1994;
const RAMFS_MAGIC: i64 = 0x8584_58f6;
/// NFS, SMB, SMB2, CIFS, Ceph, 9P, AFS, FUSE (linux/magic.h and the drivers' headers).
const REMOTE_MAGICS: [i64; 8] =
    [0x6969, 0x517b, 0xfe53_4d42, 0xff53_4d42, 0x00c3_6400, 0x0102_1997, 0x5346_414f, 0x6573_5546];

type Answer = Result<(i32, FsOutcome), Errno>;

/// The argument of FICLONERANGE (linux/fs.h, `struct file_clone_range`); all in bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct FileCloneRange {
    source: i64,
    source_offset: u64,
    len: u64,
    offset: u64,
}

nix::ioctl_write_ptr!(clone_range, 0x94, 13, FileCloneRange);

/// A call that can be sent to a thread.
#[derive(Debug)]
pub(crate) enum FsCall {
    Open(OpenSpec),
    Stat(PathBuf),
    Rename { from: PathBuf, to: PathBuf },
    Unlink(PathBuf),
    SyncFolder(PathBuf),
    OpenLock { path: PathBuf, identity: (u64, u64) },
    Lock { fd: RawFd, old: LockSpec, new: LockSpec },
    Extents { fd: RawFd, offset: u64, len: u64 },
    Fallocate { fd: RawFd, mode: FallocateMode, offset: u64, len: u64 },
    Truncate { fd: RawFd, len: u64 },
    Share { fd: RawFd, range: FileCloneRange },
}

impl FsCall {
    /// The sendable form of `op`; `None` if it names a simulated file.
    pub(crate) fn of(op: &FsOp) -> Option<Self> {
        let raw = |handle: &Handle| match &handle.descriptor {
            Descriptor::Os(fd) => Some(fd.as_raw_fd()),
            Descriptor::Sim(_) => None,
        };
        Some(match op {
            FsOp::Open(spec) => Self::Open(spec.clone()),
            FsOp::Stat(path) => Self::Stat(path.clone()),
            FsOp::Rename { from, to } => Self::Rename { from: from.clone(), to: to.clone() },
            FsOp::Unlink(path) => Self::Unlink(path.clone()),
            FsOp::SyncFolder(path) => Self::SyncFolder(path.clone()),
            FsOp::OpenLock { path, identity } => {
                Self::OpenLock { path: path.clone(), identity: *identity }
            }
            FsOp::Lock { file, old, new } => Self::Lock { fd: raw(file)?, old: *old, new: *new },
            FsOp::Extents { file, offset, len } => {
                Self::Extents { fd: raw(file)?, offset: *offset, len: *len }
            }
            FsOp::Fallocate { file, mode, offset, len } => {
                Self::Fallocate { fd: raw(file)?, mode: *mode, offset: *offset, len: *len }
            }
            FsOp::Truncate { file, len } => Self::Truncate { fd: raw(file)?, len: *len },
            FsOp::Share { source, source_offset, file, offset, len } => {
                let range = FileCloneRange {
                    source: i64::from(raw(source)?),
                    source_offset: *source_offset,
                    len: *len,
                    offset: *offset,
                };
                Self::Share { fd: raw(file)?, range }
            }
        })
    }

    /// What the call waits for.
    pub(crate) fn lane(&self) -> Lane {
        match self {
            Self::Lock { fd, .. }
            | Self::Extents { fd, .. }
            | Self::Fallocate { fd, .. }
            | Self::Truncate { fd, .. } => Lane::File(*fd),
            _ => Lane::Paths,
        }
    }

    /// Does the call; a negative errno and no outcome on failure.
    pub(crate) fn run(self) -> (i32, FsOutcome) {
        let answer = match self {
            Self::Open(spec) => open(&spec),
            Self::Stat(path) => stat(&path),
            Self::Rename { from, to } => rename(&from, &to),
            Self::Unlink(path) => nix::unistd::unlink(&path).map(|()| (0, FsOutcome::None)),
            Self::SyncFolder(path) => sync_folder(&path),
            Self::OpenLock { path, identity } => open_lock(&path, identity),
            Self::Lock { fd, old, new } => change_locks(fd, old, new),
            Self::Extents { fd, offset, len } => extents(fd, offset, len),
            Self::Fallocate { fd, mode, offset, len } => fallocate(fd, mode, offset, len),
            Self::Truncate { fd, len } => truncate(fd, len),
            Self::Share { fd, range } => share(fd, &range),
        };
        answer.unwrap_or_else(|errno| (-(errno as i32), FsOutcome::None))
    }
}

fn io_errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

fn open(spec: &OpenSpec) -> Answer {
    let mut flags = libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
    flags |= if spec.writable { libc::O_RDWR } else { libc::O_RDONLY };
    if spec.direct {
        flags |= libc::O_DIRECT;
    }
    if spec.create_new {
        flags |= libc::O_CREAT | libc::O_EXCL;
    }
    let fd = match &spec.beneath {
        Some(folder) => open_beneath(folder, &spec.path, flags)?,
        None => open_plain(&spec.path, flags)?,
    };
    let file = std::fs::File::from(fd);
    let metadata = file.metadata().map_err(|error| io_errno(&error))?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Ok((-libc::EINVAL, FsOutcome::WrongKind(kind_name(kind))));
    }
    let facts = facts(&file, &metadata, spec)?;
    let (class, block) = match file_system(file.as_raw_fd()) {
        Some((TMPFS_MAGIC | RAMFS_MAGIC, _)) => (IoClass::Inline, 0),
        Some((magic, _)) if REMOTE_MAGICS.contains(&magic) => (IoClass::Blocking, 0),
        Some((_, block)) if kind.is_file() => (IoClass::Ring, block),
        _ => (IoClass::Ring, 0),
    };
    let facts = FileFacts { block, ..facts };
    let handle = Handle { descriptor: Descriptor::Os(file.into()), class };
    Ok((0, FsOutcome::Opened(handle, facts)))
}

fn kind_name(kind: std::fs::FileType) -> &'static str {
    if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "not a file"
    }
}

fn open_plain(path: &Path, flags: i32) -> Result<OwnedFd, Errno> {
    let write = flags & libc::O_ACCMODE == libc::O_RDWR;
    OpenOptions::new()
        .read(true)
        .write(write)
        .create_new(flags & libc::O_EXCL != 0)
        .mode(0o644)
        .custom_flags(flags & !(libc::O_CREAT | libc::O_EXCL | libc::O_ACCMODE))
        .open(path)
        .map(OwnedFd::from)
        .map_err(|error| io_errno(&error))
}

/// Opens `path` (absolute, below `folder`) without following anything out of `folder`.
fn open_beneath(folder: &Path, path: &Path, flags: i32) -> Result<OwnedFd, Errno> {
    let relative = path.strip_prefix(folder).map_err(|_| Errno::EXDEV)?;
    let folder = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(folder)
        .map_err(|error| io_errno(&error))?;
    let name = CString::new(relative.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: open_how is a plain C structure for which all-zero is valid.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = u64::from(flags.unsigned_abs());
    how.mode = if flags & libc::O_CREAT == 0 { 0 } else { 0o644 };
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS;
    // SAFETY: the descriptor is open, name is a C string and how has the size that is passed.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            folder.as_raw_fd(),
            name.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        )
    };
    let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EMFILE)?;
    // SAFETY: the kernel just returned this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether another machine or program answers for the file.
fn is_remote(fd: RawFd) -> bool {
    file_system(fd).is_some_and(|(magic, _)| REMOTE_MAGICS.contains(&magic))
}

/// Kind (its magic number) and block size (bytes) of the file system of a file (statfs(2)).
fn file_system(fd: RawFd) -> Option<(i64, u64)> {
    // SAFETY: statfs is a plain C structure for which all-zero is valid.
    let mut facts: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: fd is open and facts is writable.
    let result = unsafe { libc::fstatfs(fd, &raw mut facts) };
    (result == 0).then(|| (facts.f_type, u64::try_from(facts.f_bsize).unwrap_or(0)))
}

fn facts(
    file: &std::fs::File,
    metadata: &std::fs::Metadata,
    spec: &OpenSpec,
) -> Result<FileFacts, Errno> {
    let block_device = metadata.file_type().is_block_device();
    let mut size = metadata.len();
    if block_device {
        use std::io::{Seek, SeekFrom};
        size = (&*file).seek(SeekFrom::End(0)).map_err(|error| io_errno(&error))?;
    }
    let (align, memory_align) =
        if spec.direct { direct_alignment(file.as_raw_fd()) } else { (1, 1) };
    let identity =
        if block_device { (u64::MAX, metadata.rdev()) } else { (metadata.dev(), metadata.ino()) };
    let allocated = metadata.blocks().saturating_mul(512);
    let remote = is_remote(file.as_raw_fd());
    let block = 0;
    Ok(FileFacts { size, align, memory_align, identity, block_device, allocated, remote, block })
}

/// Alignment of offsets and of memory for O_DIRECT on this file (statx DIOALIGN).
fn direct_alignment(fd: RawFd) -> (u64, usize) {
    if matches!(file_system(fd), Some((TMPFS_MAGIC | RAMFS_MAGIC, _))) {
        return (1, 1);
    }
    // SAFETY: statx is a plain C structure for which all-zero is valid.
    let mut facts: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: fd is open, the path is an empty C string, facts is writable.
    let result = unsafe {
        libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut facts)
    };
    if result == 0 && facts.stx_dio_offset_align > 0 {
        let memory = facts.stx_dio_mem_align.max(1) as usize;
        return (u64::from(facts.stx_dio_offset_align), memory);
    }
    (4096, 4096)
}

fn stat(path: &Path) -> Answer {
    let metadata = std::fs::metadata(path).map_err(|error| io_errno(&error))?;
    let kind = metadata.file_type();
    if kind.is_dir() {
        return Err(Errno::EISDIR);
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Ok((-libc::EINVAL, FsOutcome::WrongKind(kind_name(kind))));
    }
    let facts = FileFacts {
        size: metadata.len(),
        align: 1,
        memory_align: 1,
        identity: (metadata.dev(), metadata.ino()),
        block_device: kind.is_block_device(),
        allocated: metadata.blocks().saturating_mul(512),
        remote: false,
        block: 0,
    };
    Ok((0, FsOutcome::Facts(facts)))
}

/// Renames without ever replacing an existing file.
fn rename(from: &Path, to: &Path) -> Answer {
    nix::fcntl::renameat2(
        nix::fcntl::AT_FDCWD,
        from,
        nix::fcntl::AT_FDCWD,
        to,
        nix::fcntl::RenameFlags::RENAME_NOREPLACE,
    )?;
    Ok((0, FsOutcome::None))
}

fn sync_folder(path: &Path) -> Answer {
    let folder = std::fs::File::open(path).map_err(|error| io_errno(&error))?;
    folder.sync_all().map_err(|error| io_errno(&error))?;
    Ok((0, FsOutcome::None))
}

fn open_lock(path: &Path, identity: (u64, u64)) -> Answer {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| io_errno(&error))?;
    let metadata = file.metadata().map_err(|error| io_errno(&error))?;
    let same =
        metadata.file_type().is_block_device() || (metadata.dev(), metadata.ino()) == identity;
    if !same {
        return Err(Errno::ESTALE);
    }
    let handle = Handle { descriptor: Descriptor::Os(file.into()), class: IoClass::Ring };
    Ok((0, FsOutcome::Opened(handle, FileFacts::default())))
}

/// Takes what `new` has beyond `old`, looks for conflicts, then gives back what nobody needs;
/// on a conflict everything is as before.
fn change_locks(fd: RawFd, old: LockSpec, new: LockSpec) -> Answer {
    let added = LockSpec { used: new.used & !old.used, unshared: new.unshared & !old.unshared };
    set_locks(fd, added, libc::F_RDLCK)?;
    if let Some((permission, shared)) = conflict(fd, new)? {
        set_locks(fd, added, libc::F_UNLCK)?;
        return Ok((-libc::EAGAIN, FsOutcome::LockConflict { permission, shared }));
    }
    let dropped = LockSpec { used: old.used & !new.used, unshared: old.unshared & !new.unshared };
    set_locks(fd, dropped, libc::F_UNLCK)?;
    Ok((0, FsOutcome::None))
}

fn bits(mask: u8) -> impl Iterator<Item = u8> {
    (0..8).filter(move |bit| mask & (1 << bit) != 0)
}

fn set_locks(fd: RawFd, which: LockSpec, kind: i32) -> Result<(), Errno> {
    for bit in bits(which.used) {
        lock_byte(fd, LOCK_USED_BASE + i64::from(bit), kind, libc::F_OFD_SETLK)?;
    }
    for bit in bits(which.unshared) {
        lock_byte(fd, LOCK_UNSHARED_BASE + i64::from(bit), kind, libc::F_OFD_SETLK)?;
    }
    Ok(())
}

/// The first permission that somebody else does not share, or uses although we do not share it.
fn conflict(fd: RawFd, wanted: LockSpec) -> Result<Option<(u8, bool)>, Errno> {
    for bit in bits(wanted.used) {
        let byte = LOCK_UNSHARED_BASE + i64::from(bit);
        if lock_byte(fd, byte, libc::F_WRLCK, libc::F_OFD_GETLK)? {
            return Ok(Some((bit, false)));
        }
    }
    for bit in bits(wanted.unshared) {
        let byte = LOCK_USED_BASE + i64::from(bit);
        if lock_byte(fd, byte, libc::F_WRLCK, libc::F_OFD_GETLK)? {
            return Ok(Some((bit, true)));
        }
    }
    Ok(None)
}

/// Sets or tests the lock of one byte; for a test: whether somebody else holds it.
fn lock_byte(fd: RawFd, byte: i64, kind: i32, command: i32) -> Result<bool, Errno> {
    // SAFETY: flock is a plain C structure for which all-zero is valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(kind).map_err(|_| Errno::EINVAL)?;
    lock.l_whence = 0;
    lock.l_start = byte;
    lock.l_len = 1;
    // SAFETY: fd is open, lock is a valid flock structure.
    let result = unsafe { libc::fcntl(fd, command, &raw mut lock) };
    Errno::result(result)?;
    Ok(command == libc::F_OFD_GETLK && i32::from(lock.l_type) != libc::F_UNLCK)
}

fn extents(fd: RawFd, offset: u64, len: u64) -> Answer {
    let seek = |at: u64, whence: i32| -> Result<u64, Errno> {
        let at = i64::try_from(at).map_err(|_| Errno::EOVERFLOW)?;
        // SAFETY: fd is open; only positional I/O is used on it, so its offset means nothing.
        let found = Errno::result(unsafe { libc::lseek(fd, at, whence) })?;
        u64::try_from(found).map_err(|_| Errno::EOVERFLOW)
    };
    let end = offset.saturating_add(len);
    let mut runs: Vec<(u64, bool)> = Vec::new();
    let mut at = offset;
    while at < end {
        if runs.len() >= EXTENT_RUNS {
            runs.push((end - at, true));
            break;
        }
        let data = match seek(at, libc::SEEK_DATA) {
            Ok(data) => data.min(end),
            Err(Errno::ENXIO) => end,
            Err(_) => at,
        };
        if data > at {
            runs.push((data - at, false));
            at = data;
            continue;
        }
        let hole = seek(at, libc::SEEK_HOLE).unwrap_or(end).clamp(at + 1, end);
        runs.push((hole - at, true));
        at = hole;
    }
    Ok((0, FsOutcome::Extents(runs)))
}

fn fallocate(fd: RawFd, mode: FallocateMode, offset: u64, len: u64) -> Answer {
    use nix::fcntl::FallocateFlags as Flags;
    let flags = match mode {
        FallocateMode::Allocate => Flags::empty(),
        FallocateMode::PunchHole => Flags::FALLOC_FL_PUNCH_HOLE | Flags::FALLOC_FL_KEEP_SIZE,
        FallocateMode::ZeroRange => Flags::FALLOC_FL_ZERO_RANGE,
    };
    let offset = i64::try_from(offset).map_err(|_| Errno::EFBIG)?;
    let len = i64::try_from(len).map_err(|_| Errno::EFBIG)?;
    // SAFETY: the slot of the operation keeps the descriptor open.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    loop {
        match nix::fcntl::fallocate(fd, flags, offset, len) {
            Err(Errno::EINTR) => {}
            other => return other.map(|()| (0, FsOutcome::None)),
        }
    }
}

fn truncate(fd: RawFd, len: u64) -> Answer {
    let len = i64::try_from(len).map_err(|_| Errno::EFBIG)?;
    // SAFETY: as in `fallocate`.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    nix::unistd::ftruncate(fd, len).map(|()| (0, FsOutcome::None))
}

/// The kernel flushes the pages of the source, waits for direct I/O on both files and forgets the
/// target's pages; all or nothing is shared, but for failures half-way.
fn share(fd: RawFd, range: &FileCloneRange) -> Answer {
    loop {
        // SAFETY: the slot of the operation keeps both descriptors open; range is what the call
        // reads.
        match unsafe { clone_range(fd, range) } {
            Err(Errno::EINTR) => {}
            other => return other.map(|_| (0, FsOutcome::None)),
        }
    }
}
