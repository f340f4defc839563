//! Calls on paths and descriptors, as the engine's blocking calls answer them.

use std::path::Path;
use std::rc::Weak;

use super::config::{SimOpKind, Subject};
use super::file::Covered;
use super::fs::normal;
use super::kernel::Kernel;
use super::pages::PAGE;
use super::plan::OpenFile;
use crate::driver::{
    Descriptor, FallocateMode, FileFacts, FsOp, FsOutcome, Handle, IoClass, LockSpec, OpenSpec,
};

/// The device number of all simulated files.
const DEVICE: u64 = 0x51;

type Answer = Result<FsOutcome, i32>;

impl Kernel {
    /// What a call is about.
    pub(super) fn fs_subject(&self, op: &FsOp) -> Subject {
        use SimOpKind as Kind;
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let file = |file: &Handle| self.open_file(file).map_or(String::new(), |f| f.name.clone());
        let (kind, name, offset, len) = match op {
            FsOp::Open(spec) => (Kind::Open, path(&spec.path), 0, 0),
            FsOp::Stat(name) => (Kind::Stat, path(name), 0, 0),
            FsOp::Rename { from, to } => {
                (Kind::Rename, format!("{} -> {}", path(from), path(to)), 0, 0)
            }
            FsOp::Unlink(name) => (Kind::Unlink, path(name), 0, 0),
            FsOp::SyncFolder(name) => (Kind::SyncFolder, path(name), 0, 0),
            FsOp::OpenLock { path: name, .. } => (Kind::Lock, path(name), 0, 0),
            FsOp::Lock { file: handle, .. } => (Kind::Lock, file(handle), 0, 0),
            FsOp::Extents { file: handle, offset, len } => {
                (Kind::Extents, file(handle), *offset, *len)
            }
            FsOp::Fallocate { file: handle, mode, offset, len } => {
                let kind = match mode {
                    FallocateMode::Allocate => Kind::Allocate,
                    FallocateMode::PunchHole => Kind::PunchHole,
                    FallocateMode::ZeroRange => Kind::ZeroRange,
                };
                (kind, file(handle), *offset, *len)
            }
            FsOp::Truncate { file: handle, len } => (Kind::Truncate, file(handle), *len, 0),
            FsOp::Share { file: handle, offset, len, .. } => {
                (Kind::Share, file(handle), *offset, *len)
            }
        };
        Subject { kind, name, offset, len }
    }

    /// Does the call; a negative errno on failure.
    pub(super) fn run_fs(&mut self, op: u64, call: &FsOp, covered: &Covered) -> (i32, FsOutcome) {
        let answer = match call {
            FsOp::Open(spec) => self.open_path(op, spec),
            FsOp::Stat(path) => self.stat(path),
            FsOp::Rename { from, to } => self.rename(op, from, to),
            FsOp::Unlink(path) => self.unlink(op, path),
            FsOp::SyncFolder(path) => {
                self.fs.state().sync_folder(&normal(path), covered);
                Ok(FsOutcome::None)
            }
            FsOp::OpenLock { path, identity } => self.open_lock(path, *identity),
            FsOp::Lock { file, new, .. } => {
                return match self.lock(file, *new) {
                    Ok(None) => (0, FsOutcome::None),
                    Ok(Some((permission, shared))) => {
                        (-libc::EAGAIN, FsOutcome::LockConflict { permission, shared })
                    }
                    Err(errno) => (-errno, FsOutcome::None),
                };
            }
            FsOp::Extents { file, offset, len } => self.extents(file, *offset, *len),
            FsOp::Fallocate { file, mode, offset, len } => {
                self.fallocate(op, file, *mode, *offset, *len)
            }
            FsOp::Truncate { file, len } => self.truncate(op, file, *len),
            FsOp::Share { source, source_offset, file, offset, len } => {
                self.share(op, (source, *source_offset), (file, *offset), *len)
            }
        };
        match answer {
            Ok(FsOutcome::WrongKind(kind)) => (-libc::EINVAL, FsOutcome::WrongKind(kind)),
            Ok(outcome) => (0, outcome),
            Err(errno) => (-errno, FsOutcome::None),
        }
    }

    fn facts(&self, inode: u64, direct: bool) -> FileFacts {
        let state = self.fs.state();
        let align = if direct { state.config.direct_align.max(1) } else { 1 };
        let size = state.files.get(&inode).map_or(0, |file| file.live.size);
        FileFacts {
            size,
            allocated: size,
            align,
            memory_align: usize::try_from(align).unwrap_or(1),
            identity: (DEVICE, inode),
            block_device: false,
            remote: false,
            block: if state.config.shares { PAGE } else { 0 },
        }
    }

    fn add_open(&mut self, inode: u64, path: &Path, spec: &OpenSpec) -> Handle {
        let index = u32::try_from(self.open.len()).expect("invariant: fewer than 2^32 opens");
        self.open.push(OpenFile {
            inode,
            name: path.to_string_lossy().into_owned(),
            writable: spec.writable,
            direct: spec.direct,
            locks: LockSpec::default(),
            holder: Weak::new(),
        });
        Handle { descriptor: Descriptor::Sim(index), class: IoClass::Ring }
    }

    fn open_path(&mut self, op: u64, spec: &OpenSpec) -> Answer {
        let path = normal(&spec.path);
        if let Some(folder) = &spec.beneath
            && !path.starts_with(normal(folder))
        {
            return Err(libc::EXDEV);
        }
        let known = self.fs.state().names.get(&path).copied();
        let inode = match known {
            Some(_) if spec.create_new => return Err(libc::EEXIST),
            Some(inode) => inode,
            None if self.fs.state().is_folder(&path) => {
                return Ok(FsOutcome::WrongKind("a directory"));
            }
            None if spec.create_new => self.fs.state().link_new(op, &path),
            None => return Err(libc::ENOENT),
        };
        let handle = self.add_open(inode, &path, spec);
        Ok(FsOutcome::Opened(handle, self.facts(inode, spec.direct)))
    }

    fn stat(&self, path: &Path) -> Answer {
        let path = normal(path);
        let known = self.fs.state().names.get(&path).copied();
        match known {
            Some(inode) => Ok(FsOutcome::Facts(self.facts(inode, false))),
            None if self.fs.state().is_folder(&path) => Ok(FsOutcome::WrongKind("a directory")),
            None => Err(libc::ENOENT),
        }
    }

    fn rename(&self, op: u64, from: &Path, to: &Path) -> Answer {
        let (from, to) = (normal(from), normal(to));
        let mut state = self.fs.state();
        if !state.names.contains_key(&from) {
            return Err(libc::ENOENT);
        }
        if state.names.contains_key(&to) {
            return Err(libc::EEXIST);
        }
        state.rename(op, &from, &to);
        Ok(FsOutcome::None)
    }

    fn unlink(&self, op: u64, path: &Path) -> Answer {
        let path = normal(path);
        let mut state = self.fs.state();
        if !state.names.contains_key(&path) {
            return Err(libc::ENOENT);
        }
        state.unlink(op, &path);
        Ok(FsOutcome::None)
    }

    fn open_lock(&mut self, path: &Path, identity: (u64, u64)) -> Answer {
        let path = normal(path);
        let inode = self.fs.state().names.get(&path).copied().ok_or(libc::ENOENT)?;
        if (DEVICE, inode) != identity {
            return Err(libc::ESTALE);
        }
        let handle = self.add_open(inode, &path, &OpenSpec::default());
        Ok(FsOutcome::Opened(handle, FileFacts::default()))
    }

    /// Changes locks; the conflict if somebody holds against them.
    fn lock(
        &mut self,
        file: &std::rc::Rc<Handle>,
        new: LockSpec,
    ) -> Result<Option<(u8, bool)>, i32> {
        let own = match file.descriptor {
            Descriptor::Sim(index) => index as usize,
            Descriptor::Os(_) => return Err(libc::EBADF),
        };
        let open = self.open.get(own).ok_or(libc::EBADF)?;
        let outside = self.fs.state().conflicts.get(Path::new(&open.name)).copied();
        if let Some((permission, shared)) = outside {
            let wanted = if shared { new.unshared } else { new.used };
            if wanted & (1 << permission) != 0 {
                return Ok(Some((permission, shared)));
            }
        }
        let others = self.open.iter().enumerate().filter(|(index, other)| {
            *index != own && other.inode == open.inode && other.holder.strong_count() > 0
        });
        for (_, other) in others {
            let refused = new.used & other.locks.unshared;
            let taken = new.unshared & other.locks.used;
            if refused != 0 {
                return Ok(Some((lowest(refused), false)));
            }
            if taken != 0 {
                return Ok(Some((lowest(taken), true)));
            }
        }
        let open = self.open.get_mut(own).ok_or(libc::EBADF)?;
        open.locks = new;
        open.holder = std::rc::Rc::downgrade(file);
        Ok(None)
    }

    fn extents(&self, file: &Handle, offset: u64, len: u64) -> Answer {
        let inode = self.open_file(file).ok_or(libc::EBADF)?.inode;
        let state = self.fs.state();
        let file = state.files.get(&inode).ok_or(libc::EBADF)?;
        Ok(FsOutcome::Extents(file.live.pages.runs(offset, len)))
    }

    fn fallocate(
        &self,
        op: u64,
        file: &Handle,
        mode: FallocateMode,
        offset: u64,
        len: u64,
    ) -> Answer {
        let open = self.open_file(file).ok_or(libc::EBADF)?;
        if !open.writable {
            return Err(libc::EBADF);
        }
        if len == 0 {
            return Err(libc::EINVAL);
        }
        let end = offset.checked_add(len).filter(|end| i64::try_from(*end).is_ok());
        let end = end.ok_or(libc::EFBIG)?;
        let mut state = self.fs.state();
        let free = state.free_pages();
        let file = state.files.get_mut(&open.inode).ok_or(libc::EBADF)?;
        let size = file.live.size;
        match mode {
            FallocateMode::Allocate => {
                if end > size && (end - size) / PAGE > free {
                    return Err(libc::ENOSPC);
                }
            }
            FallocateMode::PunchHole => file.zero(op, offset, end.min(size).max(offset)),
            FallocateMode::ZeroRange => file.zero(op, offset, end.min(size).max(offset)),
        }
        if mode != FallocateMode::PunchHole && end > size {
            file.resize(op, end);
        }
        Ok(FsOutcome::None)
    }

    fn truncate(&self, op: u64, file: &Handle, len: u64) -> Answer {
        let open = self.open_file(file).ok_or(libc::EBADF)?;
        if !open.writable {
            return Err(libc::EINVAL);
        }
        if i64::try_from(len).is_err() {
            return Err(libc::EFBIG);
        }
        let mut state = self.fs.state();
        let file = state.files.get_mut(&open.inode).ok_or(libc::EBADF)?;
        file.resize(op, len);
        Ok(FsOutcome::None)
    }

    /// What FICLONERANGE does and refuses: whole blocks, inside the source; a block of the target
    /// needs no space, but for one that was not there.
    fn share(&self, op: u64, from: (&Handle, u64), to: (&Handle, u64), len: u64) -> Answer {
        let source = self.open_file(from.0).ok_or(libc::EBADF)?.inode;
        let open = self.open_file(to.0).ok_or(libc::EBADF)?;
        if !open.writable {
            return Err(libc::EBADF);
        }
        let mut state = self.fs.state();
        if !state.config.shares {
            return Err(libc::EOPNOTSUPP);
        }
        let free = state.free_pages();
        let content = state.files.get(&source).ok_or(libc::EBADF)?.live.clone();
        let whole = (from.1 | to.1 | len).is_multiple_of(PAGE);
        let inside = from.1.checked_add(len).is_some_and(|end| end <= content.size);
        if !whole || !inside || len == 0 || source == open.inode {
            return Err(libc::EINVAL);
        }
        let file = state.files.get_mut(&open.inode).ok_or(libc::EBADF)?;
        if file.live.pages.missing(to.1, len) > free {
            return Err(libc::ENOSPC);
        }
        let mut at = 0;
        for (run, data) in content.pages.runs(from.1, len) {
            if data {
                let mut bytes = vec![0; usize::try_from(run).map_err(|_| libc::EFBIG)?];
                content.pages.read(from.1 + at, &mut bytes);
                file.write(op, to.1 + at, bytes);
            } else {
                let end = to.1 + at + run;
                if end > file.live.size {
                    file.resize(op, end);
                }
                file.zero(op, to.1 + at, end);
            }
            at += run;
        }
        Ok(FsOutcome::None)
    }
}

fn lowest(mask: u8) -> u8 {
    u8::try_from(mask.trailing_zeros()).expect("invariant: at most eight bits")
}
