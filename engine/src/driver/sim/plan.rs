//! What becomes of one operation: which file and bytes it is about, whether it is shortened or
//! fails, and in which pieces its bytes move.

use std::rc::{Rc, Weak};

use super::config::{SimOpKind, Subject};
use super::file::{Covered, SECTOR};
use super::fs::SimFs;
use super::kernel::Kernel;
use super::rng::Rng;
use crate::buf::Buf;
use crate::driver::{Descriptor, FsOp, Handle, LockSpec, OpKind};

/// An open simulated file: what `Descriptor::Sim` is an index of.
pub(super) struct OpenFile {
    pub(super) inode: u64,
    pub(super) name: String,
    pub(super) writable: bool,
    pub(super) direct: bool,
    pub(super) locks: LockSpec,
    /// Who holds the locks: they end with the handle.
    pub(super) holder: Weak<Handle>,
}

/// What an operation does when its time comes. Buffers share memory with the slot's.
pub(super) enum Work {
    Read {
        inode: u64,
        offset: u64,
        buf: Buf,
    },
    Write {
        inode: u64,
        offset: u64,
        buf: Buf,
        fua: bool,
        no_space: bool,
    },
    Sync {
        inode: u64,
        covered: Covered,
    },
    Fs(FsOp, Covered),
    Run(Box<dyn FnOnce() + Send>),
    /// Nothing; the answer is known.
    Answer(i32),
}

/// What was decided about an operation when it was submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// Everything is done.
    Whole,
    /// At most this many bytes move.
    Short(usize),
    /// It answers this errno.
    Fail(i32),
}

impl Fate {
    /// The first half of `len` bytes, in whole sectors if there are at least two.
    fn half(len: u64) -> Self {
        let half = if len >= 2 * SECTOR { len / 2 / SECTOR * SECTOR } else { len.div_ceil(2) };
        Self::Short(usize::try_from(half).unwrap_or(usize::MAX))
    }

    /// Cuts the first `len` bytes into pieces, in random order.
    pub(super) fn pieces(self, len: usize, offset: u64, rng: &mut Rng) -> Vec<(usize, usize)> {
        if len == 0 || !matches!(self, Self::Whole | Self::Short(_) | Self::Fail(libc::EIO)) {
            return Vec::new();
        }
        let mut cuts = vec![0];
        if rng.chance(500) {
            for _ in 0..rng.between(1, 3) {
                // The borders are those of the file's sectors.
                let at = (offset + rng.below(len as u64)).div_ceil(SECTOR) * SECTOR - offset;
                cuts.push(usize::try_from(at).unwrap_or(len).min(len));
            }
        }
        cuts.push(len);
        cuts.sort_unstable();
        cuts.dedup();
        let pieces = cuts.windows(2).map(|pair| (pair[0], pair[1]));
        if self == Self::Fail(libc::EIO) {
            // A failed write may have happened in part.
            return pieces.filter(|_| rng.chance(500)).collect();
        }
        pieces.collect()
    }
}

impl Work {
    pub(super) fn offset(&self) -> u64 {
        match self {
            Self::Read { offset, .. } | Self::Write { offset, .. } => *offset,
            _ => 0,
        }
    }

    /// Settles how many bytes a read or write moves: the end of the file and full disks count.
    pub(super) fn begin(&mut self, fate: &Fate, fs: &SimFs) -> usize {
        let state = fs.state();
        let limit = |len: usize| match fate {
            Fate::Short(short) => len.min(*short),
            Fate::Whole | Fate::Fail(_) => len,
        };
        match self {
            Self::Read { inode, offset, buf } => {
                if matches!(fate, Fate::Fail(_)) {
                    return 0;
                }
                let size = state.files.get(inode).map_or(0, |file| file.live.size);
                let left = usize::try_from(size.saturating_sub(*offset)).unwrap_or(usize::MAX);
                limit(buf.len().min(left))
            }
            Self::Write { inode, offset, buf, no_space, .. } => {
                let len = limit(buf.len());
                let Some(file) = state.files.get(inode) else { return 0 };
                let free = state.free_pages();
                if free == u64::MAX || file.live.pages.missing(*offset, len as u64) <= free {
                    return len;
                }
                let fits = |part: &usize| file.live.pages.missing(*offset, *part as u64) <= free;
                let sector = usize::try_from(SECTOR).expect("invariant: a small number");
                let fitting = (0..len / sector).map(|count| count * sector).rfind(fits);
                *no_space = fitting.unwrap_or(0) == 0;
                fitting.unwrap_or(0)
            }
            _ => 0,
        }
    }

    /// Moves bytes `from..to` between buffer and file.
    pub(super) fn move_bytes(&self, op: u64, from: usize, to: usize, fs: &SimFs) {
        let mut state = fs.state();
        match self {
            Self::Read { inode, offset, buf } => {
                let Some(file) = state.files.get(inode) else { return };
                let mut bytes = vec![0; to - from];
                file.live.pages.read(offset + from as u64, &mut bytes);
                buf.copy_from(from, &bytes);
            }
            Self::Write { inode, offset, buf, .. } => {
                let Some(file) = state.files.get_mut(inode) else { return };
                file.write(op, offset + from as u64, buf.slice(from..to).to_vec());
            }
            _ => {}
        }
    }
}

impl SimFs {
    pub(super) fn strand(&self, inode: u64, covered: &Covered) {
        if let Some(file) = self.state().files.get_mut(&inode) {
            file.strand(covered);
        }
    }

    pub(super) fn persist(&self, inode: u64, op: u64, end: u64) {
        if let Some(file) = self.state().files.get_mut(&inode) {
            file.persist_op(op, end);
        }
    }
}

impl Kernel {
    pub(super) fn open_file(&self, handle: &Handle) -> Option<&OpenFile> {
        match handle.descriptor {
            Descriptor::Sim(index) => self.open.get(index as usize),
            Descriptor::Os(_) => None,
        }
    }

    /// What the operation will do, checked as the kernel checks arguments.
    pub(super) fn work(&self, op: u64, kind: &mut OpKind) -> Work {
        let answer = |errno: i32| Work::Answer(-errno);
        match kind {
            OpKind::Read { file, offset, buf } => match self.checked(file, *offset, buf, false) {
                Ok(inode) => Work::Read { inode, offset: *offset, buf: buf.clone() },
                Err(errno) => answer(errno),
            },
            OpKind::Write { file, offset, buf, fua } => {
                match self.checked(file, *offset, buf, true) {
                    Ok(inode) => Work::Write {
                        inode,
                        offset: *offset,
                        buf: buf.clone(),
                        fua: *fua,
                        no_space: false,
                    },
                    Err(errno) => answer(errno),
                }
            }
            OpKind::Sync { file } => match self.open_file(file) {
                Some(open) => Work::Sync { inode: open.inode, covered: self.covered(op) },
                None => answer(libc::EBADF),
            },
            OpKind::Fs(call) => {
                let folder = matches!(call, FsOp::SyncFolder(_));
                let covered = if folder { self.covered(op) } else { Covered::nothing() };
                Work::Fs(call.clone(), covered)
            }
            OpKind::Work(item) => match item.0.take() {
                Some(run) => Work::Run(run),
                None => Work::Answer(0),
            },
            // Disk operations cannot be cancelled; asking is not an error.
            OpKind::Cancel { .. } => Work::Answer(0),
            _ => answer(libc::ENOSYS),
        }
    }

    fn checked(&self, file: &Rc<Handle>, at: u64, buf: &Buf, write: bool) -> Result<u64, i32> {
        let open = self.open_file(file).ok_or(libc::EBADF)?;
        if write && !open.writable {
            return Err(libc::EBADF);
        }
        if at.checked_add(buf.len() as u64).is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(libc::EFBIG);
        }
        let align = self.fs.state().config.direct_align.max(1);
        let memory_align = usize::try_from(align).unwrap_or(1);
        let aligned = at.is_multiple_of(align)
            && (buf.len() as u64).is_multiple_of(align)
            && buf.is_aligned(memory_align);
        if open.direct && !aligned {
            return Err(libc::EINVAL);
        }
        Ok(open.inode)
    }

    /// Decides whether the operation fails or is shortened.
    pub(super) fn fate(&mut self, subject: &Subject, work: &Work) -> Fate {
        for rule in self.rules.iter_mut().filter(|rule| rule.rule.filter.matches(subject)) {
            rule.seen += 1;
            let hit = rule.seen.saturating_sub(rule.rule.after);
            if hit > 0 && rule.rule.times.is_none_or(|times| hit <= times) {
                if rule.rule.errno != 0 {
                    return Fate::Fail(rule.rule.errno);
                }
                if matches!(work, Work::Read { .. } | Work::Write { .. }) {
                    return Fate::half(subject.len);
                }
            }
        }
        if let Work::Answer(result) = work {
            return if *result < 0 { Fate::Fail(-result) } else { Fate::Whole };
        }
        if !matches!(subject.kind, SimOpKind::Read | SimOpKind::Write) {
            return Fate::Whole;
        }
        if self.rng.chance(self.config.again_per_mille) {
            return Fate::Fail(*self.rng.pick(&[libc::EINTR, libc::EAGAIN]));
        }
        if subject.len > SECTOR && self.rng.chance(self.config.short_per_mille) {
            let sectors = 1 + self.rng.below((subject.len - 1) / SECTOR);
            let len = usize::try_from(sectors * SECTOR).unwrap_or(usize::MAX);
            return Fate::Short(len);
        }
        Fate::Whole
    }
}
