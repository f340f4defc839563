//! What goes wrong with the spill file of a backup. The peer has no such file: there a guest waits
//! for the target.

use std::fmt;

/// Why old content could not be kept in, or brought back from, a spill file.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SpillError {
    /// The file has reached its bound.
    Full {
        /// The file.
        path: Box<str>,
        /// Its bound in bytes.
        max: u64,
    },
    /// The file could not be made, written or read.
    Failed {
        /// The file.
        path: Box<str>,
        /// Why not.
        source: liveblk_engine::Error,
    },
}

impl fmt::Display for SpillError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full { path, max } => write!(
                f,
                "The target is too slow for what guests overwrite: spill file '{path}' has reached \
                 its bound of {max} bytes (give it more with 'spill-max', or slow the guests)"
            ),
            Self::Failed { path, source } => write!(
                f,
                "Old content could not be kept for the backup in spill file '{path}': {} (choose \
                 another folder with 'spill-dir')",
                source.kind()
            ),
        }
    }
}
