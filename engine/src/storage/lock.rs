//! Locks on image files, compatible with QEMU (block/file-posix.c): OFD locks on one byte per
//! permission in use (from byte 100) and per permission not shared (from byte 200).
//!
//! The lock descriptor is apart from the descriptors that do I/O. It is opened by path and must
//! name the same file.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;

use crate::driver::{FsOp, FsOutcome, Handle, LockSpec, OpKind};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Core;

/// What a user of a file does with it and does not want others to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockRequest {
    /// Nothing.
    None,
    /// Reads; others may write (raw images, forced sharing).
    ReadShared,
    /// Reads metadata that must not change: nobody else writes or resizes.
    ReadStable,
    /// Writes: nobody else writes or resizes.
    Write,
}

const CONSISTENT_READ: u8 = 1;
const WRITE: u8 = 1 << 1;
const RESIZE: u8 = 1 << 3;
const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];

impl LockRequest {
    const fn spec(self) -> LockSpec {
        match self {
            Self::None => LockSpec { used: 0, unshared: 0 },
            Self::ReadShared => LockSpec { used: CONSISTENT_READ, unshared: 0 },
            Self::ReadStable => LockSpec { used: CONSISTENT_READ, unshared: WRITE | RESIZE },
            Self::Write => {
                LockSpec { used: CONSISTENT_READ | WRITE | RESIZE, unshared: WRITE | RESIZE }
            }
        }
    }
}

/// The lock descriptor of a file and what it holds.
#[derive(Debug)]
pub(super) struct Locks {
    handle: Rc<Handle>,
    held: Cell<LockSpec>,
}

impl Locks {
    pub(super) async fn open(core: &Core, path: &Path, identity: (u64, u64)) -> Result<Self> {
        let op = FsOp::OpenLock { path: path.to_path_buf(), identity };
        let done = core.submit(OpKind::Fs(op)).await;
        match done.outcome {
            FsOutcome::Opened(handle, _) if done.result >= 0 => {
                Ok(Self { handle: Rc::new(handle), held: Cell::new(LockSpec::default()) })
            }
            _ => Err(Error::os(-done.result, "open for locking").on(&path.display().to_string())),
        }
    }

    pub(super) async fn change(&self, core: &Core, name: &str, request: LockRequest) -> Result<()> {
        let (old, new) = (self.held.get(), request.spec());
        if old == new {
            return Ok(());
        }
        let op = FsOp::Lock { file: Rc::clone(&self.handle), old, new };
        let done = core.submit(OpKind::Fs(op)).await;
        match done.outcome {
            _ if done.result >= 0 => {
                self.held.set(new);
                Ok(())
            }
            FsOutcome::LockConflict { permission, shared } => {
                let permission = NAMES.get(usize::from(permission)).copied().unwrap_or("other");
                let source = LockConflict { name: name.into(), permission, shared };
                Err(Error::new(ErrorKind::Locked, "lock").on(name).with_source(source))
            }
            _ => Err(Error::os(-done.result, "lock").on(name)),
        }
    }
}

/// Another process or node excludes a lock. The first line is the peer's text, the rest its hint.
#[derive(Debug)]
struct LockConflict {
    name: Box<str>,
    permission: &'static str,
    shared: bool,
}

impl std::fmt::Display for LockConflict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shared = if self.shared { "shared " } else { "" };
        write!(f, "Failed to get {shared}\"{}\" lock", self.permission)?;
        write!(f, "\nIs another process using the image [{}]?", self.name)
    }
}

impl std::error::Error for LockConflict {}
