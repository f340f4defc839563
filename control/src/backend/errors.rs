//! The one table from failures to what clients see.
//!
//! Owns: which class an error has, and which part of its text is a hint for people. Promises: the
//! text is the one that the crate below gives; nothing is reworded here.

use liveblk_engine::Error;
use liveblk_exports::ExportError;
use liveblk_jobs::{ChainError, JobError};

use crate::qmp::{ErrorClass, QmpError};

/// A command that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Its class.
    pub class: ErrorClass,
    /// What went wrong.
    pub desc: String,
    /// What a person could do, only for standard error.
    pub hint: Option<String>,
}

impl Failure {
    /// The same failure, told as a part of something larger.
    #[must_use]
    pub fn within(mut self, what: &str) -> Self {
        self.desc = format!("{what}: {}", self.desc);
        self
    }

    /// A failure of class `GenericError`.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::GenericError, desc: desc.into(), hint: None }
    }

    /// A failure of that class by its text. Who holds a lock, or what could be done, is a hint: the
    /// peer's clients compare the first line.
    fn told(text: &str) -> Self {
        match text.split_once('\n') {
            Some((desc, hint)) => Self::generic(desc).hinted(hint),
            None => Self::generic(text),
        }
    }

    /// The same with a hint.
    #[must_use]
    pub fn hinted(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// A node that a command names as device, with the peer's text.
    pub fn no_node(device: &str, node: &str) -> Self {
        Self::generic(format!("Cannot find device='{device}' nor node-name='{node}'"))
    }

    /// The text for standard error: what went wrong, and the hint on a line of its own.
    pub fn full_text(&self) -> String {
        match &self.hint {
            Some(hint) => format!("{}\n{hint}", self.desc),
            None => self.desc.clone(),
        }
    }
}

impl From<Failure> for QmpError {
    fn from(failure: Failure) -> Self {
        Self::new(failure.class, failure.desc)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::told(&error.to_string())
    }
}

impl From<JobError> for Failure {
    fn from(error: JobError) -> Self {
        match error {
            JobError::BlockJobNotFound { .. } => {
                let desc = error.to_string();
                Self { class: ErrorClass::DeviceNotActive, desc, hint: None }
            }
            JobError::Chain(ChainError::DeviceNotFound(_)) => {
                let desc = error.to_string();
                Self { class: ErrorClass::DeviceNotFound, desc, hint: None }
            }
            JobError::Engine(error) => error.into(),
            other => Self::told(&other.to_string()),
        }
    }
}

impl From<ExportError> for Failure {
    fn from(error: ExportError) -> Self {
        let failure = Self::generic(error.to_string());
        match error {
            ExportError::InUse(_) => failure.hinted("Use mode='hard' to force client disconnect"),
            _ => failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_block_job_is_the_only_one_that_is_not_active() {
        let failure = Failure::from(JobError::BlockJobNotFound { id: "j".into() });
        assert_eq!(failure.class, ErrorClass::DeviceNotActive);
        assert_eq!(failure.desc, "Block job 'j' not found");
        assert_eq!(Failure::from(JobError::NotFound).class, ErrorClass::GenericError);
    }

    #[test]
    fn a_hint_stays_out_of_the_answer() {
        let failure = Failure::from(ExportError::InUse("e".into()));
        assert_eq!(QmpError::from(failure.clone()).desc, "export 'e' still in use");
        assert_eq!(failure.full_text().lines().count(), 2);
    }
}
