//! How far a file or a disk was written, and who wants to know when a write goes beyond a mark.
//!
//! A mark is good for one write: the first one that ends beyond it takes it away and is told.
//! Does no I/O, delays nothing; of one core.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// A write that ended beyond the mark (QMP `BLOCK_WRITE_THRESHOLD`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// The mark in bytes.
    pub threshold: u64,
    /// Bytes of the write beyond it.
    pub amount: u64,
}

/// Whom to tell; must not start I/O.
pub type Tell = Rc<dyn Fn(Exceeded)>;

/// See the module.
#[derive(Default)]
pub struct WriteWatch {
    highest: Cell<u64>,
    /// 0: none.
    threshold: Cell<u64>,
    tell: RefCell<Option<Tell>>,
}

impl WriteWatch {
    /// The end of the farthest write so far, in bytes.
    pub fn highest(&self) -> u64 {
        self.highest.get()
    }

    /// The mark in bytes; 0 if there is none.
    pub fn threshold(&self) -> u64 {
        self.threshold.get()
    }

    /// Tells `tell` of the next write that ends beyond byte `threshold`; 0 takes the mark away.
    pub fn set_threshold(&self, threshold: u64, tell: Tell) {
        self.threshold.set(threshold);
        self.tell.replace((threshold > 0).then_some(tell));
    }

    /// A write of `len` bytes at `offset` begins.
    pub(crate) fn note(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        if end > self.highest.get() {
            self.highest.set(end);
        }
        let threshold = self.threshold.get();
        if threshold == 0 || end <= threshold {
            return;
        }
        self.threshold.set(0);
        let tell = self.tell.take();
        if let Some(tell) = tell {
            tell(Exceeded { threshold, amount: end - threshold });
        }
    }
}

impl std::fmt::Debug for WriteWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WriteWatch(up to {}, mark {})", self.highest.get(), self.threshold.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_write_beyond_the_mark_is_told_once_with_what_it_exceeds() {
        let watch = WriteWatch::default();
        let told = Rc::new(RefCell::new(Vec::new()));
        let sink = Rc::clone(&told);
        let tell: Tell = Rc::new(move |exceeded| sink.borrow_mut().push(exceeded));
        watch.set_threshold(4096, Rc::clone(&tell));
        watch.note(0, 4096);
        assert_eq!((watch.threshold(), watch.highest()), (4096, 4096));
        watch.note(4096, 512);
        watch.note(8192, 512);
        assert_eq!(*told.borrow(), [Exceeded { threshold: 4096, amount: 512 }]);
        assert_eq!((watch.threshold(), watch.highest()), (0, 8704));
        watch.set_threshold(100, tell);
        watch.set_threshold(0, Rc::new(|_| unreachable!("no mark")));
        watch.note(0, 512);
        assert_eq!((told.borrow().len(), watch.highest()), (1, 8704));
        watch.note(u64::MAX, 512);
    }
}
