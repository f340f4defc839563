//! Why a verb failed: a text for stderr and an exit code.

use std::fmt;

use liveblk::{Error, HostError};

/// A failed verb.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// The exit code.
    pub(crate) code: u8,
    /// What is told, without the program's name.
    pub(crate) text: String,
}

/// What a verb answers: the exit code of a run that did what it was asked to.
pub(crate) type Answer = Result<u8, Failure>;

impl Failure {
    /// A failure with exit code 1.
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self { code: 1, text: text.into() }
    }

    /// A file that could not be opened.
    pub(crate) fn open(file: &str, cause: &impl fmt::Display) -> Self {
        let cause = cause.to_string();
        // Errors of the engine name the file themselves where they can.
        let plain = cause.strip_prefix(&format!("'{file}': ")).unwrap_or(&cause);
        if plain.starts_with(&format!("Could not open '{file}'")) {
            return Self::new(plain);
        }
        Self::new(format!("Could not open '{file}': {plain}"))
    }

    /// The same with `what` in front.
    #[must_use]
    pub(crate) fn during(self, what: &str) -> Self {
        Self { text: format!("{what}: {}", self.text), ..self }
    }

    /// The same with another exit code.
    #[must_use]
    pub(crate) fn with_code(self, code: u8) -> Self {
        Self { code, ..self }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(error.to_string())
    }
}

impl From<HostError> for Failure {
    fn from(error: HostError) -> Self {
        Self::new(error.to_string())
    }
}
