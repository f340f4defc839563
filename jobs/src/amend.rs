//! Amend: changes options of an image. No option can be changed yet that the formats have.
//!
//! The job exists so that clients find what they know: it runs through its states at once and waits
//! for `job-dismiss`. It touches no node.

use std::rc::Rc;

use liveblk_engine::executor::Core;

use crate::error::{JobError, Result};
use crate::event::Kind;
use crate::job::Job;
use crate::lifecycle::Status;
use crate::manager::JobManager;
use crate::spec::JobOptions;
use crate::txn::JobTxn;

/// What an amend is to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amendment {
    /// Nothing.
    Nothing,
    /// Keys of an encryption that the image does not have.
    Encryption,
}

/// Runs an amend job called `id`; it is concluded when this returns.
///
/// # Errors
/// A bad or used id. What the job itself finds is its own error.
pub fn start_amend(core: &Core, id: &str, amendment: Amendment) -> Result<Rc<Job>> {
    let manager = JobManager::of(core);
    let options = JobOptions { auto_dismiss: false, ..JobOptions::new(id) };
    let job = manager.create(Kind::Amend, options, &JobTxn::new())?;
    job.progress().add_done(1);
    job.enter(Status::Running);
    manager.body_ended(
        &job,
        match amendment {
            Amendment::Nothing => Ok(()),
            Amendment::Encryption => Err(JobError::NotEncrypted),
        },
    );
    Ok(job)
}
