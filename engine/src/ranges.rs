//! Claims on byte ranges: overlapping holders exclude each other, in order of arrival.
//!
//! Used for node claims (writes to one node) and for the read-modify-write of unaligned direct I/O.
//! A claim waits for every overlapping claim that was asked for earlier, held or still waiting, so
//! nobody starves. A claim that is dropped while it waits leaves the queue.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::address::GuestRange;
use crate::executor::Core;
use crate::executor::sync::Notify;

/// The claims of one object.
#[derive(Debug)]
pub struct RangeLocks {
    /// In order of arrival.
    entries: RefCell<Vec<Entry>>,
    next: Cell<u64>,
    waiting: Cell<usize>,
    changed: Notify,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    ticket: u64,
    range: GuestRange,
}

/// A place in the queue for a range, or (once [`RangeClaim::held`] resolved) the range itself.
#[derive(Debug)]
#[must_use = "dropping the claim releases the range"]
pub struct RangeClaim {
    locks: Rc<RangeLocks>,
    ticket: u64,
}

impl RangeLocks {
    /// No claims.
    pub fn new(core: &Core) -> Rc<Self> {
        Rc::new(Self {
            entries: RefCell::default(),
            next: Cell::new(0),
            waiting: Cell::new(0),
            changed: Notify::new(core),
        })
    }

    /// Queues for `range`; the place is taken at the call.
    pub fn claim(self: &Rc<Self>, range: GuestRange) -> RangeClaim {
        let ticket = self.next.get();
        self.next.set(ticket + 1);
        self.entries.borrow_mut().push(Entry { ticket, range });
        RangeClaim { locks: Rc::clone(self), ticket }
    }

    /// Number of claims, held or waiting.
    pub fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    /// Whether there is no claim.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn is_first(&self, ticket: u64) -> bool {
        let entries = self.entries.borrow();
        let Some(own) = entries.iter().find(|entry| entry.ticket == ticket) else { return true };
        !entries.iter().any(|entry| entry.ticket < ticket && entry.range.overlaps(own.range))
    }
}

impl RangeClaim {
    /// Resolves when no earlier overlapping claim is left.
    pub async fn held(&self) {
        if self.locks.is_first(self.ticket) {
            return;
        }
        // CANCEL: the count is put right by the guard; the place in the queue by the claim's drop.
        let _waiting = Waiting::new(&self.locks.waiting);
        self.locks.changed.until(|| self.locks.is_first(self.ticket)).await;
    }
}

impl Drop for RangeClaim {
    fn drop(&mut self) {
        self.locks.entries.borrow_mut().retain(|entry| entry.ticket != self.ticket);
        if self.locks.waiting.get() > 0 {
            self.locks.changed.notify_all();
        }
    }
}

struct Waiting<'a>(&'a Cell<usize>);

impl<'a> Waiting<'a> {
    fn new(count: &'a Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}
