//! Jobs that end together: all with their result, or none.
//!
//! Every job is in a transaction; alone, unless a client grouped it. Order rules: (1) a job that is
//! done waits until all are; (2) the first failure forces the others to end; (3) when all are over
//! they are finished, the last added first, as the peer does.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use crate::job::Job;
use crate::lifecycle::Status;

/// A group of jobs that end together.
#[derive(Default)]
pub struct JobTxn {
    jobs: RefCell<Vec<Weak<Job>>>,
    aborting: Cell<bool>,
    finalizing: Cell<bool>,
}

impl JobTxn {
    /// A transaction without jobs.
    pub fn new() -> Rc<Self> {
        Rc::default()
    }

    pub(crate) fn add(&self, job: &Rc<Job>) {
        self.jobs.borrow_mut().push(Rc::downgrade(job));
    }

    /// The members, the last added first.
    pub(crate) fn members(&self) -> Vec<Rc<Job>> {
        self.jobs.borrow().iter().rev().filter_map(Weak::upgrade).collect()
    }

    /// Whether several jobs end together.
    pub(crate) fn is_group(&self) -> bool {
        self.jobs.borrow().len() > 1
    }

    pub(crate) fn is_aborting(&self) -> bool {
        self.aborting.get()
    }

    /// Marks the transaction as failing; true the first time.
    pub(crate) fn begin_abort(&self) -> bool {
        !self.aborting.replace(true)
    }

    /// Marks the transaction as being finalized; true the first time.
    pub(crate) fn begin_finalize(&self) -> bool {
        !self.finalizing.replace(true)
    }

    /// Whether the work of all members is over.
    pub(crate) fn all_completed(&self) -> bool {
        self.members().iter().all(|job| job.status().is_completed())
    }

    /// Whether the results of all members can still become effective.
    pub(crate) fn is_pending(&self) -> bool {
        self.members().iter().all(|job| job.status() == Status::Pending)
    }

    /// Whether a member waits for job-finalize.
    pub(crate) fn needs_finalize(&self) -> bool {
        self.members()
            .iter()
            .any(|job| job.status() == Status::Pending && !job.options().auto_finalize)
    }
}

impl std::fmt::Debug for JobTxn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JobTxn({} jobs)", self.jobs.borrow().len())
    }
}
