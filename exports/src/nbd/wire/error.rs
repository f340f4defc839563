//! What can be wrong with bytes from the other side.

use std::fmt;

/// Why bytes do not form what they should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireError {
    /// They end too early, or lengths inside contradict the length outside.
    Inconsistent,
    /// There is more than the parts account for.
    Trailing,
    /// A name longer than the protocol allows; its claimed length in bytes.
    NameTooLong(u32),
    /// They start with another number than they must.
    BadMagic(u64),
    /// A text that is not UTF-8.
    NotText,
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inconsistent => f.write_str("Inconsistent lengths"),
            Self::Trailing => f.write_str("Unexpected length"),
            Self::NameTooLong(len) => write!(f, "Invalid name length: {len}"),
            Self::BadMagic(number) => write!(f, "Bad magic {number:#x}"),
            Self::NotText => f.write_str("Text is not UTF-8"),
        }
    }
}

impl std::error::Error for WireError {}
