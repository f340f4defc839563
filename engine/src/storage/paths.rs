//! Operations on names of files: creation is elsewhere, this is existence, renaming and removal.
//!
//! Renaming never replaces a file. A name is durable once its folder was synchronised.

use std::path::{Path, PathBuf};

use crate::driver::{FsOp, FsOutcome, OpKind};
use crate::error::{Error, Result};
use crate::executor::Core;

/// What a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathFacts {
    /// Size in bytes.
    pub size: u64,
    /// Device and inode.
    pub identity: (u64, u64),
    /// Whether it is a block device (else a regular file).
    pub block_device: bool,
    /// Bytes that it takes on its device.
    pub allocated: u64,
}

async fn run(core: &Core, op: FsOp, verb: &'static str, path: &Path) -> Result<FsOutcome> {
    let done = core.submit(OpKind::Fs(op)).await;
    if done.result < 0 {
        return Err(Error::os(-done.result, verb).on(&path.display().to_string()));
    }
    Ok(done.outcome)
}

/// Facts about the file or block device at `path`, following symbolic links.
///
/// # Errors
/// `NotFound`, or what the system reports.
pub async fn stat(core: &Core, path: &Path) -> Result<PathFacts> {
    match run(core, FsOp::Stat(path.to_path_buf()), "stat", path).await? {
        FsOutcome::Facts(facts) => Ok(PathFacts {
            size: facts.size,
            identity: facts.identity,
            block_device: facts.block_device,
            allocated: facts.allocated,
        }),
        _ => Err(Error::os(libc::EINVAL, "stat").on(&path.display().to_string())),
    }
}

/// Whether `path` names a folder.
///
/// # Errors
/// `NotFound`, or what the system reports.
pub async fn is_folder(core: &Core, path: &Path) -> Result<bool> {
    match run(core, FsOp::Stat(path.to_path_buf()), "stat", path).await {
        Ok(_) => Ok(false),
        Err(error) => match error.errno() {
            libc::EISDIR => Ok(true),
            libc::EINVAL => Ok(false),
            _ => Err(error),
        },
    }
}

/// Renames `from` to `to`, which must not exist.
///
/// # Errors
/// `AlreadyExists`, or what the system reports.
pub async fn rename(core: &Core, from: &Path, to: &Path) -> Result<()> {
    let op = FsOp::Rename { from: from.to_path_buf(), to: to.to_path_buf() };
    run(core, op, "rename", to).await.map(drop)
}

/// Removes a file.
///
/// # Errors
/// `NotFound`, or what the system reports.
pub async fn unlink(core: &Core, path: &Path) -> Result<()> {
    run(core, FsOp::Unlink(path.to_path_buf()), "remove", path).await.map(drop)
}

/// Makes the names in the folder of `path` durable.
///
/// # Errors
/// What the system reports.
pub async fn sync_folder_of(core: &Core, path: &Path) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_path_buf(),
        _ => PathBuf::from("."),
    };
    run(core, FsOp::SyncFolder(folder.clone()), "synchronise folder", &folder).await.map(drop)
}
