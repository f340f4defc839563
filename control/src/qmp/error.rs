//! Errors as clients see them.
//!
//! Owns: the classes and the form of an error reply.

use std::fmt;

use serde_json::{Value, json};

/// Kind of an error; clients may act on it, never on the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// Everything without a class of its own.
    GenericError,
    /// No such command, also before negotiation.
    CommandNotFound,
    /// No such block job.
    DeviceNotActive,
    /// No such device.
    DeviceNotFound,
}

impl ErrorClass {
    /// Its word in a reply.
    pub fn word(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
            Self::DeviceNotFound => "DeviceNotFound",
        }
    }
}

/// An error reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QmpError {
    /// Its class.
    pub class: ErrorClass,
    /// What went wrong, for people.
    pub desc: String,
}

impl QmpError {
    /// An error of class `GenericError`.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, desc)
    }

    /// An error of any class.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        Self { class, desc: desc.into() }
    }

    /// The value of the reply's `error` member.
    pub fn to_value(&self) -> Value {
        json!({"class": self.class.word(), "desc": self.desc})
    }
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for QmpError {}
