//! Why something about bitmaps was refused, in the peer's words.

use std::fmt;

use liveblk_engine::ErrorKind;

use crate::limits::{BITMAP_DIRECTORY_BYTES_MAX, BITMAP_NAME_MAX, BITMAPS_MAX};

/// A refusal that concerns bitmaps; Display is the whole text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapReason {
    /// The header extension has another length.
    ExtensionLength,
    /// The reserved field of the extension is not zero.
    ExtensionReserved,
    /// More bitmaps than allowed.
    TooMany(u32),
    /// An extension without bitmaps.
    None,
    /// The directory does not start at a cluster.
    DirectoryOffset,
    /// The directory is larger than allowed (bytes).
    DirectorySize(u64),
    /// The directory has no bytes.
    DirectoryEmpty,
    /// An entry does not fit in the directory.
    Broken,
    /// The directory has fewer entries than the extension says.
    Less,
    /// The directory has more entries than the extension says.
    More,
    /// An entry is outside of what the specification or the limits allow.
    Constraints(String),
    /// The table or its data cannot be.
    Unreadable(String),
    /// A bitmap of this name exists.
    Exists(String),
    /// No bitmap of this name exists.
    NotFound(String),
    /// The bitmap can only be removed.
    Inconsistent(String),
    /// Whoever has the image open has its bits.
    Kept(String),
    /// An empty name.
    NameEmpty,
    /// A name that is too long.
    NameLong,
    /// A granularity that cannot be.
    Granularity,
    /// The granularity is too large to be stored.
    GranularityLarge,
    /// The bitmap would have too many bits.
    TooFine,
    /// Version 2 images have no bitmaps.
    Version2,
    /// No further bitmap can be stored.
    Full,
    /// The directory would be too large.
    DirectoryFull,
    /// Sizes of disks differ (of the target, of the source), in bytes.
    Sizes(u64, u64),
    /// A disk without bytes has no bitmaps.
    NoDisk,
}

impl BitmapReason {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Exists(_) => ErrorKind::AlreadyExists,
            Self::NotFound(_) => ErrorKind::NotFound,
            Self::Version2 => ErrorKind::Unsupported,
            Self::Kept(_) => ErrorKind::Busy,
            Self::Inconsistent(_)
            | Self::NameEmpty
            | Self::NameLong
            | Self::Granularity
            | Self::GranularityLarge
            | Self::TooFine
            | Self::Full
            | Self::DirectoryFull
            | Self::Sizes(..)
            | Self::NoDisk => ErrorKind::InvalidArgument,
            _ => ErrorKind::Corrupt,
        }
    }

    fn fixed(&self) -> Option<&'static str> {
        Some(match self {
            Self::ExtensionLength => "bitmaps_ext: Invalid extension length",
            Self::ExtensionReserved => "bitmaps_ext: Reserved field is not zero",
            Self::None => "found bitmaps extension with zero bitmaps",
            Self::DirectoryOffset => "bitmaps_ext: invalid bitmap directory offset",
            Self::DirectoryEmpty => "Requested bitmap directory size is zero",
            Self::Broken => "Broken bitmap directory",
            Self::Less => "Less bitmaps found than specified in header extension",
            Self::More => "More bitmaps found than specified in header extension",
            Self::NameEmpty => "Bitmap name cannot be empty",
            Self::Granularity => "Granularity must be power of 2 and at least 512",
            Self::GranularityLarge => "Granularity exceeds maximum (2147483648 bytes)",
            Self::TooFine => {
                "Too much space will be occupied by the bitmap. Use larger granularity"
            }
            Self::Version2 => "Cannot store dirty bitmaps in qcow2 v2 files",
            Self::Full => "Maximum number of persistent bitmaps is already reached",
            Self::DirectoryFull => "Not enough space in the bitmap directory",
            Self::NoDisk => "A disk of 0 bytes cannot have persistent bitmaps",
            _ => return None,
        })
    }
}

impl fmt::Display for BitmapReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany(count) => write!(
                f,
                "bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of \
                 {BITMAPS_MAX}"
            ),
            Self::DirectorySize(bytes) => write!(
                f,
                "bitmaps_ext: bitmap directory size ({bytes}) exceeds the maximum supported size \
                 ({BITMAP_DIRECTORY_BYTES_MAX})"
            ),
            Self::Constraints(name) => {
                write!(f, "Bitmap '{name}' doesn't satisfy the constraints")
            }
            Self::Unreadable(name) => {
                write!(f, "Could not read bitmap '{name}' from image: Invalid argument")
            }
            Self::Exists(name) => write!(f, "Bitmap already exists: {name}"),
            Self::NotFound(name) => write!(f, "Dirty bitmap '{name}' not found"),
            Self::Inconsistent(name) => write!(
                f,
                "Bitmap '{name}' is inconsistent and cannot be used\n\
                 Try block-dirty-bitmap-remove to delete this bitmap from disk"
            ),
            Self::Kept(name) => {
                write!(f, "Bitmap '{name}' is changed through the node that has the image open")
            }
            Self::NameLong => {
                write!(f, "Name length exceeds maximum ({BITMAP_NAME_MAX} characters)")
            }
            Self::Sizes(target, source) => write!(
                f,
                "Bitmaps are of different sizes (destination size is {target}, source size is \
                 {source}) and can't be merged"
            ),
            other => f.write_str(other.fixed().unwrap_or_default()),
        }
    }
}
