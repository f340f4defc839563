//! What can be wrong with a command on the graph; the texts are those that QMP clients know.

use std::fmt;

use crate::error::{Error, ErrorKind};

/// A graph command that cannot be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GraphError {
    /// No node of that name.
    NotFound(String),
    /// No node of the name that an option refers to.
    ReferenceNotFound(String),
    /// No node of the name that is given as backing node.
    BackingNotFound(String),
    /// The node of that name cannot hold an image: it is one itself.
    NotAFile(String),
    /// The node is to be written and what holds it is read-only.
    ReadOnly,
    /// A node of that name exists.
    Duplicate(String),
    /// Not a legal node name.
    InvalidName(String),
    /// A node name longer than 31 bytes.
    NameTooLong,
    /// A top-level node without a name.
    NameMissing,
    /// The node serves a guest.
    InUse(String),
    /// The node is part of another node.
    BusyAsChild {
        /// The node.
        node: String,
        /// As what it is used ("backing", "file").
        edge: &'static str,
        /// By which node.
        parent: String,
    },
    /// A job has the node.
    BusyWithJob {
        /// The node.
        node: String,
        /// The job's type.
        kind: String,
    },
    /// The node was not added by name and goes with its parent.
    NotMonitorOwned(String),
    /// No such format.
    UnknownDriver(String),
    /// The chain refers to itself.
    Loop(String),
    /// The data file is a file of the chain itself.
    DataFileLoop(String),
    /// The policy does not allow the data file that the header names; the text says why.
    DataFileRefused(Box<str>),
    /// The chain is longer than the limit.
    TooDeep(String),
    /// The header names no format for the backing file, and it is none that proves itself.
    FormatMissing(String),
    /// A backing file of the header could not be opened; the text says why.
    Backing {
        /// The backing file.
        file: String,
        /// Why.
        cause: Box<str>,
    },
    /// A file could not be opened; the text says why.
    Open {
        /// The file.
        file: String,
        /// Why.
        cause: Box<str>,
    },
    /// The format cannot have a backing file.
    NoBackingSupport(String),
    /// A backing node that has the node itself below it.
    Cycle {
        /// The backing node.
        base: String,
        /// The node.
        node: String,
    },
    /// A job keeps the link to the backing node.
    Frozen {
        /// The node.
        node: String,
        /// Its backing node.
        backing: String,
    },
    /// The node cannot become read-only: somebody writes it.
    ReadWriteUsers(String),
    /// A node above this one is active.
    ActiveParent,
    /// Somebody has the node.
    CannotInactivate,
    /// An inactive node cannot be below an active one.
    InactiveChild {
        /// The inactive node.
        child: String,
        /// What it would be of its parent ("file", "backing").
        edge: &'static str,
        /// The active node, or who else.
        parent: String,
    },
    /// An inactive node gives nobody this permission.
    InactivePermission(&'static str),
    /// What lies below the node was changed by a commit.
    Stale(String),
    /// Requests did not end within the deadline.
    NotIdle {
        /// The node.
        node: String,
        /// Requests in flight.
        in_flight: u32,
        /// The deadline in milliseconds.
        waited_ms: u64,
    },
}

impl fmt::Display for GraphError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound(name) => write!(f, "Failed to find node with node-name='{name}'"),
            Self::ReferenceNotFound(name) => {
                write!(f, "Cannot find device='{name}' nor node-name='{name}'")
            }
            Self::BackingNotFound(name) => write!(
                f,
                "Could not open backing file: Cannot find device='{name}' nor node-name='{name}'"
            ),
            Self::NotAFile(name) => {
                write!(f, "Node '{name}' cannot hold an image: its driver is not 'file'")
            }
            Self::ReadOnly => f.write_str("Block node is read-only"),
            Self::Duplicate(name) => write!(f, "Duplicate nodes with node-name='{name}'"),
            Self::InvalidName(name) => write!(f, "Invalid node-name: '{name}'"),
            Self::NameTooLong => f.write_str("Node name too long"),
            Self::NameMissing => f.write_str("'node-name' must be specified for the root node"),
            Self::InUse(name) => write!(f, "Node {name} is in use"),
            Self::BusyAsChild { node, edge, parent } => {
                let role = if *edge == "backing" { "backing hd" } else { edge };
                write!(f, "Node '{node}' is busy: node is used as {role} of '{parent}'")
            }
            Self::BusyWithJob { node, kind } => {
                write!(f, "Node '{node}' is busy: block device is in use by block job: {kind}")
            }
            Self::NotMonitorOwned(name) => write!(f, "Node {name} is not owned by the monitor"),
            Self::UnknownDriver(name) => write!(f, "Unknown driver '{name}'"),
            Self::Loop(file) => write!(
                f,
                "Backing file '{file}' is part of a loop: it is opened already in this chain"
            ),
            Self::DataFileLoop(file) => {
                write!(f, "Data file '{file}' is the image itself or another file of its chain")
            }
            Self::DataFileRefused(cause) => {
                write!(f, "{cause}; the data file can be named with the option 'data-file'")
            }
            Self::TooDeep(file) => write!(
                f,
                "Backing file '{file}' is too deep: chains may have {} layers",
                crate::limits::CHAIN_DEPTH
            ),
            Self::FormatMissing(file) => write!(
                f,
                "The header names no format for backing file '{file}' and raw is never guessed: \
                 name it with 'backing': {{'driver': …}} or set it with qemu-img rebase -u -F"
            ),
            Self::Backing { file, cause } => {
                write!(f, "Could not open backing file: Could not open '{file}': {cause}")
            }
            Self::Open { file, cause } => write!(f, "Could not open '{file}': {cause}"),
            Self::NoBackingSupport(driver) => {
                write!(f, "Driver '{driver}' does not support backing files")
            }
            other => other.fmt_change(f),
        }
    }
}

impl GraphError {
    /// The texts of changes of nodes that are in use.
    fn fmt_change(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cycle { base, node } => {
                write!(f, "Making '{base}' a backing child of '{node}' would create a cycle")
            }
            Self::Frozen { node, backing } => {
                write!(f, "Cannot change frozen 'backing' link from '{node}' to '{backing}'")
            }
            Self::ReadWriteUsers(name) => {
                write!(f, "Read-only block node '{name}' cannot support read-write users")
            }
            Self::ActiveParent => f.write_str("Node has active parent node"),
            Self::CannotInactivate => f.write_str("Operation not permitted"),
            Self::InactiveChild { child, edge, parent } => {
                write!(f, "Inactive '{child}' can't be a {edge} child of active '{parent}'")
            }
            Self::InactivePermission(name) => {
                write!(f, "Permission '{name}' unavailable on inactive node")
            }
            Self::Stale(name) => write!(
                f,
                "Node '{name}' cannot be used any more: a commit changed what lies below it"
            ),
            Self::NotIdle { node, in_flight, waited_ms } => write!(
                f,
                "Node '{node}' did not become idle within {waited_ms} ms: {in_flight} requests \
                 are still in flight; nothing was changed"
            ),
            // Display has the others.
            _ => Ok(()),
        }
    }
}

impl std::error::Error for GraphError {}

impl From<GraphError> for Error {
    fn from(error: GraphError) -> Self {
        let kind = match &error {
            GraphError::NotFound(_)
            | GraphError::ReferenceNotFound(_)
            | GraphError::BackingNotFound(_) => ErrorKind::NotFound,
            GraphError::ReadOnly => ErrorKind::ReadOnly,
            GraphError::Duplicate(_) => ErrorKind::AlreadyExists,
            GraphError::InUse(_)
            | GraphError::BusyAsChild { .. }
            | GraphError::BusyWithJob { .. }
            | GraphError::Frozen { .. }
            | GraphError::ReadWriteUsers(_)
            | GraphError::ActiveParent
            | GraphError::CannotInactivate
            | GraphError::InactiveChild { .. }
            | GraphError::InactivePermission(_)
            | GraphError::NotMonitorOwned(_) => ErrorKind::Busy,
            GraphError::NotIdle { .. } => ErrorKind::TimedOut,
            GraphError::Open { .. } | GraphError::Backing { .. } => ErrorKind::Io(libc::EIO),
            _ => ErrorKind::InvalidArgument,
        };
        Self::new(kind, "change the graph").with_source(error)
    }
}
