//! What is wrong with a stream or a commit, with the peer's texts.

use std::fmt;

/// Refusals of jobs on chains.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChainError {
    /// Two options that name the same thing.
    Exclusive {
        /// One option.
        one: &'static str,
        /// The other.
        other: &'static str,
        /// Whether stream or commit refuses: their words differ.
        stream: bool,
    },
    /// The device does not exist (class DeviceNotFound: clients probe for it).
    DeviceNotFound(Box<str>),
    /// The device is the backing node of another node.
    NotRoot,
    /// No image of this file name lies below.
    NoSuchFile(Box<str>),
    /// No image of this file name is in the chain (the top of a commit).
    NoTopFile(Box<str>),
    /// The base of a stream does not lie below the device.
    NotBelow {
        /// The node given as base.
        base: Box<str>,
        /// The device.
        device: Box<str>,
    },
    /// The bottom of a stream is not in its chain.
    NotInChain {
        /// The node given as bottom.
        bottom: Box<str>,
        /// The device.
        device: Box<str>,
    },
    /// A node given to a commit is not in the chain.
    NotInThisChain(Box<str>),
    /// A backing file for an image that will have none.
    WholeChain,
    /// Top and base are one.
    IntoItself,
    /// Nothing lies below the top.
    NoBase,
    /// A backing file is given, but nothing will refer to it.
    ActiveLayer,
    /// The node is the overlay of a snapshot in the same transaction: what lies below it is not
    /// there yet.
    NewOverlay(Box<str>),
}

impl fmt::Display for ChainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exclusive { one, other, stream: true } => {
                write!(f, "'{one}' and '{other}' cannot be specified at the same time")
            }
            Self::Exclusive { one, other, stream: false } => {
                write!(f, "'{one}' and '{other}' are mutually exclusive")
            }
            Self::DeviceNotFound(device) => write!(f, "Device '{device}' not found"),
            Self::NotRoot => f.write_str("Need a root block node"),
            Self::NoSuchFile(file) => write!(f, "Can't find '{file}' in the backing chain"),
            Self::NoTopFile(file) => write!(f, "Top image file {file} not found"),
            Self::NotBelow { base, device } => {
                write!(f, "Node '{base}' is not a backing image of '{device}'")
            }
            Self::NotInChain { bottom, device } => {
                write!(f, "Node '{bottom}' is not in a chain starting from '{device}'")
            }
            Self::NotInThisChain(node) => {
                write!(f, "'{node}' is not in this backing file chain")
            }
            Self::WholeChain => {
                f.write_str("backing file specified, but streaming the entire chain")
            }
            Self::IntoItself => f.write_str("cannot commit an image into itself"),
            Self::NoBase => f.write_str("There is no backimg image"),
            Self::ActiveLayer => {
                f.write_str("'backing-file' specified, but 'top' is the active layer")
            }
            Self::NewOverlay(node) => write!(
                f,
                "Node '{node}' gets its backing node by this transaction: start the job after it"
            ),
        }
    }
}

impl std::error::Error for ChainError {}
