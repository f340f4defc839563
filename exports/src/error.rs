//! What can go wrong with exports and their server.
//!
//! The texts are those that monitor clients of the peer know.

use std::fmt;

/// Why a command on exports failed.
#[derive(Clone, Debug)]
pub enum ExportError {
    /// An id that is not a letter followed by letters, digits, `-`, `.`, `_`.
    InvalidId,
    /// Another export has this id.
    IdInUse(String),
    /// No export has this id.
    NotFound(String),
    /// Clients are connected; only a hard removal disconnects them.
    InUse(String),
    /// The export is going away already.
    ShuttingDown(String),
    /// A writable export of a node that is read-only.
    ReadOnlyNode,
    /// No NBD server runs.
    ServerNotRunning,
    /// There can be one NBD server.
    ServerRunning,
    /// The NBD server has another export of this name.
    NameInUse(String),
    /// The NBD name has more than 4096 bytes.
    NameTooLong(String),
    /// The description has more than 4096 bytes.
    DescriptionTooLong(String),
    /// More bitmaps than an export shows.
    TooManyBitmaps(usize),
    /// TLS was asked for.
    TlsUnsupported,
    /// The server cannot listen there.
    Listen {
        /// Path or address.
        address: String,
        /// What the kernel said.
        source: liveblk_engine::Error,
    },
}

impl fmt::Display for ExportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidId => f.write_str("Invalid block export id"),
            Self::IdInUse(id) => write!(f, "Block export id '{id}' is already in use"),
            Self::NotFound(id) => write!(f, "Export '{id}' is not found"),
            Self::InUse(id) => write!(f, "export '{id}' still in use"),
            Self::ShuttingDown(id) => write!(f, "Export '{id}' is already shutting down"),
            Self::ReadOnlyNode => f.write_str("Cannot export read-only node as writable"),
            Self::ServerNotRunning => f.write_str("NBD server not running"),
            Self::ServerRunning => f.write_str("NBD server already running"),
            Self::NameInUse(name) => {
                write!(f, "NBD server already has export named '{name}'")
            }
            Self::NameTooLong(name) => write!(f, "export name '{name}' too long"),
            Self::DescriptionTooLong(text) => write!(f, "description '{text}' too long"),
            Self::TooManyBitmaps(count) => write!(
                f,
                "{count} bitmaps in one export; at most {} are possible",
                crate::limits::EXPORT_BITMAPS
            ),
            Self::TlsUnsupported => f.write_str("TLS is not supported by this NBD server"),
            Self::Listen { address, source } => {
                write!(f, "Failed to bind socket to {address}: {}", source.kind())
            }
        }
    }
}

impl std::error::Error for ExportError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Listen { source, .. } => Some(source),
            _ => None,
        }
    }
}
