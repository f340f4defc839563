//! Blocks that two files of one file system share: a copy that moves no bytes (FICLONERANGE).
//!
//! Whether two files can share blocks is found out by trying: the first range that is asked for
//! decides, and a refusal is remembered for the pair. What failed for another reason (no space, a
//! failing disk) is not: the caller copies that range, and the copy tells what is wrong.
//!
//! Order rules: (1) the kernel makes it one step with respect to other writes: it flushes what the
//! page cache holds of the source, and waits for direct I/O on both files; a write of the source
//! that has ended is in, one that began later may or may not be; (2) it is durable with the next
//! flush of the target that is asked for after it has ended; (3) as a direct write it holds a claim
//! on its range of the target, so that the edges of others are not written over it.

use std::cell::RefCell;
use std::rc::Rc;

use super::file::File;
use crate::address::GuestRange;
use crate::driver::{FsOp, OpKind};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::SHARING_PAIRS;

/// What is known about which files can share blocks.
#[derive(Debug, Default)]
pub struct Sharing(RefCell<Vec<Known>>);

#[derive(Debug)]
struct Known {
    source: (u64, u64),
    target: (u64, u64),
    works: bool,
}

impl Sharing {
    /// Bytes of the blocks that `target` can share with `source` as far as is known; `None` if it
    /// cannot. A file shares nothing with itself.
    pub(crate) fn unit(&self, source: &File, target: &File) -> Option<u64> {
        let (from, to) = (source.facts, target.facts);
        let unit = from.block.max(to.block);
        let possible = from.block > 0 && to.block > 0 && unit.is_power_of_two();
        if !possible || from.identity == to.identity {
            return None;
        }
        let known = self.0.borrow();
        let refused = known.iter().any(|pair| pair.is(source, target) && !pair.works);
        (!refused).then_some(unit)
    }

    /// `source` and `target` will not be asked again.
    pub(crate) fn refuse(&self, source: &File, target: &File) {
        self.set(source, target, false);
    }

    /// Whether files were asked and none could.
    pub fn is_hopeless(&self) -> bool {
        let known = self.0.borrow();
        !known.is_empty() && known.iter().all(|pair| !pair.works)
    }

    /// Learns from what the kernel said.
    pub(crate) fn note(&self, source: &File, target: &File, result: &Result<()>) {
        let worked = self.0.borrow().iter().any(|pair| pair.is(source, target) && pair.works);
        match result {
            Ok(()) if !worked => self.set(source, target, true),
            Err(error) if !worked && is_refusal(error) => self.set(source, target, false),
            _ => {}
        }
    }

    fn set(&self, source: &File, target: &File, works: bool) {
        let mut known = self.0.borrow_mut();
        known.retain(|pair| !pair.is(source, target));
        if known.len() >= SHARING_PAIRS {
            known.remove(0);
        }
        known.push(Known { source: source.identity(), target: target.identity(), works });
    }
}

impl Known {
    fn is(&self, source: &File, target: &File) -> bool {
        self.source == source.identity() && self.target == target.identity()
    }
}

/// Whether the kernel says that it is not possible at all.
fn is_refusal(error: &Error) -> bool {
    let ErrorKind::Io(errno) = error.kind() else {
        return !matches!(error.kind(), ErrorKind::NoSpace);
    };
    !matches!(errno, libc::EIO | libc::EDQUOT | libc::ENOMEM | libc::EAGAIN)
}

impl File {
    /// Makes `len` bytes at `offset` share the blocks of `source` at `source_offset`; all are
    /// multiples of the block size (bytes), and the source holds them.
    ///
    /// # Errors
    /// What the system reports; any part of the range may then be shared.
    pub(crate) async fn share(
        self: &Rc<Self>,
        offset: u64,
        source: &Rc<Self>,
        source_offset: u64,
        len: u64,
    ) -> Result<()> {
        self.watch().note(offset, len);
        let range = GuestRange::new(offset, len);
        let claim =
            (self.facts.align > 1).then(|| self.claims.claim(range.widen(self.facts.align)));
        if let Some(claim) = &claim {
            claim.held().await;
        }
        let (source, file) = (source.handle(), self.handle());
        let op = FsOp::Share { source, source_offset, file, offset, len };
        let done = self.core.submit(OpKind::Fs(op)).await;
        drop(claim);
        if done.result < 0 {
            return Err(Error::os(-done.result, "share blocks").on(self.name()).at(offset));
        }
        self.size.set(self.size.get().max(range.end().bytes()));
        Ok(())
    }
}
