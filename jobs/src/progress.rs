//! What a job has done and what is left, in bytes.
//!
//! Promises: `done` never falls, and is never above `total`; both may grow (a mirror's total grows
//! with what the guest writes).

use std::cell::Cell;

/// The progress of one job.
#[derive(Debug, Default)]
pub struct Progress {
    done: Cell<u64>,
    left: Cell<u64>,
}

impl Progress {
    /// Bytes done.
    pub fn done(&self) -> u64 {
        self.done.get()
    }

    /// Bytes done and left: `len` of the queries.
    pub fn total(&self) -> u64 {
        self.done.get().saturating_add(self.left.get())
    }

    /// Counts `bytes` as done; what is left is told apart by [`Progress::set_left`].
    pub fn add_done(&self, bytes: u64) {
        self.done.set(self.done.get().saturating_add(bytes));
    }

    /// Counts `bytes` of what was left as done.
    pub fn advance(&self, bytes: u64) {
        self.add_done(bytes);
        self.left.set(self.left.get().saturating_sub(bytes));
    }

    /// Sets what is left.
    pub fn set_left(&self, bytes: u64) {
        self.left.set(bytes);
    }
}
