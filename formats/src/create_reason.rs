//! Why an image cannot be created as asked: the peer's texts, in the order of the peer's checks.

use std::fmt;

use liveblk_engine::ErrorKind;

/// A reason why creation options are refused; Display is the whole text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CreateReason {
    /// An option that the format does not have.
    Unknown(String),
    /// An option with a value that it does not take.
    Value {
        /// The option.
        option: &'static str,
        /// The value.
        value: String,
    },
    /// An option with a value of another type.
    Type {
        /// The option.
        option: &'static str,
        /// What it takes.
        expected: &'static str,
    },
    /// The virtual size is not a multiple of 512.
    Size,
    /// The virtual size needs a larger L1 table than there may be.
    TooLarge,
    /// A virtual size of 8 EiB or more.
    Negative,
    /// The header cannot hold the backing file's name.
    Backing {
        /// The name.
        file: String,
        /// The format that was named.
        format: Option<String>,
        /// Whether the name is short enough and only this header has no room for it.
        full: bool,
    },
    /// The cluster size cannot be.
    ClusterSize,
    /// Extended L2 entries need larger clusters.
    ExtendedClusterSize,
    /// A feature (as the text names it) that version 2 does not have.
    NeedsVersion3(&'static str),
    /// Preallocation would hide the backing file.
    PreallocationOverBacking,
    /// A backing format without a backing file.
    FormatWithoutBacking,
    /// The refcount width cannot be.
    RefcountBits,
    /// A raw data file without a data file.
    RawWithoutDataFile,
    /// A raw data file cannot have something below.
    RawOverBacking,
    /// A data file was named but not opened, or opened but not named.
    DataFileMissing,
}

impl CreateReason {
    /// The errno that goes with it: `EFBIG` where another cluster size would help.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::TooLarge => ErrorKind::Io(27),
            Self::Backing { full: true, .. } => ErrorKind::NoSpace,
            _ => ErrorKind::InvalidArgument,
        }
    }
}

impl fmt::Display for CreateReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown(option) => return write!(f, "Invalid parameter '{option}'"),
            Self::Value { option, value } => {
                return write!(f, "Parameter '{option}' does not accept value '{value}'");
            }
            Self::Type { option, expected } => {
                return write!(f, "Invalid parameter type for '{option}', expected: {expected}");
            }
            Self::NeedsVersion3(what) => {
                return write!(
                    f,
                    "{what} compatibility level 1.1 {} above (use version=v3 or greater)",
                    if what.ends_with("require") { "or" } else { "and" },
                );
            }
            Self::Backing { file, format, full } => {
                let format = format.as_deref().unwrap_or("(null)");
                let why = if *full { "No space left on device" } else { "Invalid argument" };
                return write!(
                    f,
                    "Could not assign backing file '{file}' with format '{format}': {why}"
                );
            }
            Self::Negative => "Could not resize image: Image size cannot be negative",
            Self::Size => "Image size must be a multiple of 512 bytes",
            Self::TooLarge => "Could not resize image: Failed to grow the L1 table: File too large",
            Self::ClusterSize => "Cluster size must be a power of two between 512 and 2048k",
            Self::ExtendedClusterSize => {
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
            }
            Self::PreallocationOverBacking => {
                "Backing file and preallocation can only be used at the same time if extended_l2 \
                 is on"
            }
            Self::FormatWithoutBacking => "Backing format cannot be used without backing file",
            Self::RefcountBits => {
                "Refcount width must be a power of two and may not exceed 64 bits"
            }
            Self::RawWithoutDataFile => "data-file-raw requires data-file",
            Self::RawOverBacking => {
                "Backing file and data-file-raw cannot be used at the same time"
            }
            Self::DataFileMissing => "The data file that the options name has to be opened, too",
        })
    }
}

impl std::error::Error for CreateReason {}
