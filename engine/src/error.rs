//! The one error type of the engine: what failed, on which node, where, and why.
//!
//! `kind` is small and stable: callers decide by it. The text is for people: Display prints the
//! specific cause when one is attached (`source`), else the kind with its context. Cloning is
//! cheap, because a poisoned image keeps answering with its first cause.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

/// Result of engine operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What class of failure an [`Error`] is; each has one errno (see [`ErrorKind::errno`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The kernel or device reported this errno.
    Io(i32),
    /// No space is left for data or metadata; the operation had no effect and may be retried.
    NoSpace,
    /// A write to something opened or exported read-only.
    ReadOnly,
    /// A range outside the disk.
    OutOfRange,
    /// A known feature that this version does not handle; the source names it.
    Unsupported,
    /// Metadata that contradicts the format's specification.
    Corrupt,
    /// An argument that can never work.
    InvalidArgument,
    /// A name that does not exist.
    NotFound,
    /// A name that exists already.
    AlreadyExists,
    /// Something else uses the object in a way that excludes this use.
    Busy,
    /// Another process holds a lock on the file.
    Locked,
    /// A reference in a header that the reference policy does not allow.
    PolicyRefused,
    /// A deadline passed.
    TimedOut,
    /// The operation was cancelled before it had an effect.
    Cancelled,
    /// The image stopped taking writes after an earlier failure; the source is the first cause.
    Poisoned,
}

impl ErrorKind {
    /// The errno that front doors report for this kind.
    pub const fn errno(self) -> i32 {
        match self {
            Self::Io(errno) => errno,
            Self::NoSpace => libc::ENOSPC,
            Self::ReadOnly => libc::EPERM,
            Self::OutOfRange | Self::InvalidArgument => libc::EINVAL,
            Self::Unsupported => libc::ENOTSUP,
            Self::Corrupt | Self::Poisoned => libc::EIO,
            Self::NotFound => libc::ENOENT,
            Self::AlreadyExists => libc::EEXIST,
            Self::Busy => libc::EBUSY,
            Self::Locked => libc::EAGAIN,
            Self::PolicyRefused => libc::EACCES,
            Self::TimedOut => libc::ETIMEDOUT,
            Self::Cancelled => libc::ECANCELED,
        }
    }

    /// The kind that stands for `errno` (a positive number).
    pub const fn from_errno(errno: i32) -> Self {
        match errno {
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Self::NoSpace,
            libc::ENOENT => Self::NotFound,
            libc::EEXIST => Self::AlreadyExists,
            libc::ETIMEDOUT => Self::TimedOut,
            libc::ECANCELED => Self::Cancelled,
            other => Self::Io(other),
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Io(errno) => {
                return f.write_str(nix::errno::Errno::from_raw(*errno).desc());
            }
            Self::NoSpace => "No space left on device",
            Self::ReadOnly => "Operation not permitted (read-only)",
            Self::OutOfRange => "Range is outside the disk",
            Self::Unsupported => "Operation not supported",
            Self::Corrupt => "Image is corrupt",
            Self::InvalidArgument => "Invalid argument",
            Self::NotFound => "No such file or directory",
            Self::AlreadyExists => "File exists",
            Self::Busy => "Device or resource busy",
            Self::Locked => "File is locked by another process",
            Self::PolicyRefused => "Reference is not allowed",
            Self::TimedOut => "Timed out",
            Self::Cancelled => "Operation was cancelled",
            Self::Poisoned => "Image takes no more writes after an earlier failure",
        })
    }
}

/// An engine failure.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    op: &'static str,
    node: Option<Arc<str>>,
    offset: Option<u64>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    /// A failure of class `kind` while doing `op` (a verb in plain words, such as "read").
    #[cold]
    pub fn new(kind: ErrorKind, op: &'static str) -> Self {
        Self(Arc::new(Inner { kind, op, node: None, offset: None, source: None }))
    }

    /// The failure that the kernel reported as `errno` (positive) while doing `op`.
    #[cold]
    pub fn os(errno: i32, op: &'static str) -> Self {
        Self::new(ErrorKind::from_errno(errno), op)
    }

    /// The same failure with the structured cause that explains it.
    #[must_use]
    pub fn with_source(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        Arc::make_mut(&mut self.0).source = Some(Arc::new(source));
        self
    }

    /// The same failure at byte `offset` (kept if one is known already).
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        Arc::make_mut(&mut self.0).offset.get_or_insert(offset);
        self
    }

    /// The same failure on node or file `name` (kept if one is known already).
    #[must_use]
    pub fn on(mut self, name: &str) -> Self {
        Arc::make_mut(&mut self.0).node.get_or_insert_with(|| name.into());
        self
    }

    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The errno that front doors report.
    pub fn errno(&self) -> i32 {
        self.0.kind.errno()
    }

    /// What was being done.
    pub fn op(&self) -> &'static str {
        self.0.op
    }

    /// The node or file concerned, if known.
    pub fn node(&self) -> Option<&str> {
        self.0.node.as_deref()
    }

    /// The byte offset concerned, if known.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// The structured cause, if one was attached: its text is what a client should see.
    pub fn detail(&self) -> Option<&(dyn StdError + Send + Sync + 'static)> {
        self.0.source.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        if let Some(source) = &inner.source {
            return write!(f, "{source}");
        }
        if let Some(node) = &inner.node {
            write!(f, "'{node}': ")?;
        }
        f.write_str(inner.op)?;
        if let Some(offset) = inner.offset {
            write!(f, " at offset {offset}")?;
        }
        write!(f, ": {}", inner.kind)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        f.debug_struct("Error")
            .field("kind", &inner.kind)
            .field("op", &inner.op)
            .field("node", &inner.node)
            .field("offset", &inner.offset)
            .field("source", &inner.source.as_ref().map(ToString::to_string))
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_ref().map(|source| {
            let source: &(dyn StdError + 'static) = &**source;
            source
        })
    }
}
