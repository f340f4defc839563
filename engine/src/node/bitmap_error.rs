//! What can be wrong with a command on bitmaps; the texts are the peer's.

use std::fmt;

use crate::error::{Error, ErrorKind};

/// A command on a bitmap that cannot be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapError {
    /// An empty name.
    NameEmpty,
    /// A name of more than 1023 bytes.
    NameTooLong(String),
    /// A granularity that is no power of two from 512 bytes on.
    Granularity,
    /// There is no node of this name.
    NodeNotFound(String),
    /// The node has one of this name.
    Exists(String),
    /// The node has none of this name.
    NotFound(String),
    /// A job, an export or a transaction uses it.
    Busy(String),
    /// Its image is read-only.
    ReadOnly(String),
    /// It missed writes.
    Inconsistent(String),
    /// The format of the node keeps no bitmaps.
    CannotStore {
        /// The node.
        node: String,
    },
    /// The image refuses to keep it; the text says why.
    NotStored {
        /// The node.
        node: String,
        /// The bitmap.
        name: String,
        /// Why.
        cause: String,
    },
    /// The bitmap could not be taken out of the image; the text says why.
    NotRemoved {
        /// The node.
        node: String,
        /// The bitmap.
        name: String,
        /// Why.
        cause: String,
    },
    /// Bitmaps are for disks of different sizes (of the target, of the source), in bytes.
    Sizes(u64, u64),
}

impl fmt::Display for BitmapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NameEmpty => f.write_str("Bitmap name cannot be empty"),
            Self::NameTooLong(name) => write!(f, "Bitmap name too long: {name}"),
            Self::Granularity => f.write_str("Granularity must be power of 2 and at least 512"),
            Self::NodeNotFound(node) => write!(f, "Node '{node}' not found"),
            Self::Exists(name) => write!(f, "Bitmap already exists: {name}"),
            Self::NotFound(name) => write!(f, "Dirty bitmap '{name}' not found"),
            Self::Busy(name) => write!(
                f,
                "Bitmap '{name}' is currently in use by another operation and cannot be used"
            ),
            Self::ReadOnly(name) => {
                write!(f, "Bitmap '{name}' is readonly and cannot be modified")
            }
            Self::Inconsistent(name) => {
                write!(f, "Bitmap '{name}' is inconsistent and cannot be used")
            }
            Self::CannotStore { node } => {
                write!(f, "Can't store persistent bitmaps to {node}: Operation not supported")
            }
            Self::NotStored { node, name, cause } => {
                write!(f, "Can't make bitmap '{name}' persistent in '{node}': {cause}")
            }
            Self::NotRemoved { node, name, cause } => {
                write!(f, "Failed to remove persistent bitmap '{name}' from node '{node}': {cause}")
            }
            Self::Sizes(target, source) => write!(
                f,
                "Bitmaps are of different sizes (destination size is {target}, source size is \
                 {source}) and can't be merged"
            ),
        }
    }
}

impl std::error::Error for BitmapError {}

impl From<BitmapError> for Error {
    fn from(error: BitmapError) -> Self {
        let kind = match &error {
            BitmapError::Exists(_) => ErrorKind::AlreadyExists,
            BitmapError::NotFound(_) | BitmapError::NodeNotFound(_) => ErrorKind::NotFound,
            BitmapError::Busy(_) => ErrorKind::Busy,
            BitmapError::ReadOnly(_) => ErrorKind::ReadOnly,
            BitmapError::CannotStore { .. } => ErrorKind::Unsupported,
            _ => ErrorKind::InvalidArgument,
        };
        Self::new(kind, "use a bitmap").with_source(error)
    }
}
