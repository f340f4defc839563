//! Why an image, a reference or an operation was refused: the texts that people read.
//!
//! Where qemu-storage-daemon has a text for the same case, the text is the same, so that scripts
//! that look for it go on working. Each reason converts into an engine error of a fixed kind.

use std::fmt;
use std::path::PathBuf;

use liveblk_engine::{Error, ErrorKind};

use crate::create_reason::CreateReason;
use crate::qcow2::{BitmapReason, OptionFault};

/// A reason for a refusal; Display is the whole text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The magic bytes are missing.
    NotQcow2,
    /// The file ends inside the header.
    HeaderUnreadable,
    /// Neither version 2 nor 3.
    Version(u32),
    /// `cluster_bits` out of range.
    ClusterBits(u32),
    /// `header_length` below the fixed fields.
    HeaderShort,
    /// `header_length` above the cluster size.
    HeaderLong,
    /// `header_length` is not a multiple of 8.
    HeaderLength(u32),
    /// The backing name does not start in the first cluster.
    BackingOffset,
    /// The backing name is too long.
    BackingName,
    /// The backing name is not UTF-8.
    BackingEncoding,
    /// A header extension does not fit.
    Extension,
    /// Features that are unknown or not handled, by name.
    Features(String),
    /// The corrupt bit is set and the image should be writable.
    CorruptBit,
    /// The data is in another file, and nobody says in which.
    DataFile,
    /// A data file for an image that holds its data itself.
    DataFileUnexpected,
    /// An entry of an image with a data file names another place than the guest's own.
    DataFilePlace {
        /// The place.
        place: u64,
        /// The cluster of the guest.
        guest: u64,
    },
    /// The compression type and its feature bit contradict each other.
    CompressionBit {
        /// Whether the bit is set.
        set: bool,
    },
    /// An unknown compression type.
    CompressionType(u8),
    /// Extended L2 entries with subclusters of this many bytes.
    SubclusterSize(u64),
    /// `refcount_order` above 6.
    RefcountOrder,
    /// A known encryption method.
    Encrypted(&'static str),
    /// An unknown encryption method.
    Encryption(u32),
    /// `refcount_table_clusters` is 0.
    NoRefcountTable,
    /// A table is larger than allowed.
    TableLarge(&'static str),
    /// A table's offset cannot be.
    TableOffset(&'static str),
    /// A table lies beyond the end of the file.
    Truncated(&'static str),
    /// The bytes of a cluster lie beyond the end of the file (offset of the guest, of the host).
    DataBeyondEnd(u64, u64),
    /// More than 2^31 L1 entries would be needed.
    SizeTooBig,
    /// An option of opening.
    Option(OptionFault),
    /// The L1 table does not cover the virtual size.
    L1Small,
    /// No snapshot has this id or name.
    SnapshotNotFound,
    /// A snapshot that is to go is open to be read.
    SnapshotViewed,
    /// Snapshots together with an external data file.
    SnapshotDataFile,
    /// The table of snapshots would have too many entries or bytes.
    SnapshotsMany,
    /// A snapshot table entry has too much extra data (index).
    SnapshotExtra(u32),
    /// A snapshot table entry cannot be (index).
    SnapshotEntry(u32),
    /// The id or name of a new snapshot is too long.
    SnapshotName,
    /// One more reference to the cluster at this host offset does not fit in this many bits.
    RefcountOverflow(u32, u64),
    /// Bitmaps describe the disk, so it cannot be replaced.
    ActiveBitmaps,
    /// Another size would contradict the snapshots of a version 2 image.
    ResizeSnapshots,
    /// Version 2 cannot hide what the layers below hold.
    ZeroNewClusters,
    /// The L1 table cannot be large enough for the size.
    L1Grow,
    /// Preallocation with a size that is not larger.
    PreallocationShrink,
    /// A preallocation mode that the format does not have.
    PreallocationMode(&'static str),
    /// A compressed cluster cannot be unpacked (offset of the guest, of the host).
    CannotUnpack(u64, u64, Unpackable),
    /// An entry of a table that cannot be (table, offset of the guest or index).
    BadEntry(&'static str, u64, u64),
    /// A guest write would have hit metadata (host offset).
    Overlap(u64),
    /// The refcount of a cluster would overflow or underflow (host offset).
    Refcount(u64),
    /// The image cannot grow further.
    TableFull,
    /// Leaks cannot be repaired because the refcounts are damaged.
    NeedsRebuild,
    /// New refcounts would take far more space than what they count.
    Scattered,
    /// New refcounts do not fit on a device behind what is used (bytes needed, bytes there).
    RebuildRoom(u64, u64),
    /// A dirty image whose refcounts could not be repaired.
    DirtyRepair(String),
    /// The new size is not a multiple of 512.
    SizeAlignment,
    /// Options of a new image that cannot be, or do not go together.
    Create(CreateReason),
    /// The backing name does not fit in the header.
    HeaderFull,
    /// The header is so full that no order of writes is safe under a power cut.
    HeaderUnsafe,
    /// Something about bitmaps.
    Bitmap(BitmapReason),
    /// A format does not have a backing reference.
    NoBackingSupport(&'static str),
    /// A raw disk would begin outside its file.
    RawOffset {
        /// Where it would begin.
        offset: u64,
        /// Bytes of the file.
        file: u64,
    },
    /// The raw range lies outside the file.
    RawRange {
        /// Requested offset.
        offset: u64,
        /// Requested size.
        size: u64,
        /// Bytes the file has.
        file: u64,
    },
    /// The raw range has a fixed size.
    RawFixed,
    /// A size of a raw disk that is no whole number of sectors.
    RawSector,
    /// Another image took the place of this one while it was another process's.
    Replaced,
    /// A header reference with a protocol.
    ReferenceProtocol(String),
    /// A header reference outside the allowed folders.
    ReferenceOutside {
        /// The image whose header holds it.
        image: PathBuf,
        /// The path it leads to.
        path: PathBuf,
    },
    /// A header reference while the policy is `explicit`.
    ReferenceExplicit {
        /// The image whose header holds it.
        image: PathBuf,
        /// The path it leads to.
        path: PathBuf,
    },
}

/// Why the bytes of a compressed cluster do not unpack to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unpackable {
    /// The stream breaks its own rules.
    Damaged,
    /// The stream ends before the cluster is full.
    Short,
    /// The stream holds more than a cluster where that cannot be cut off.
    Long,
}

impl fmt::Display for Unpackable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Damaged => "the compressed bytes are damaged",
            Self::Short => "the compressed bytes end before the cluster is full",
            Self::Long => "the compressed bytes hold more than a cluster",
        })
    }
}

impl Reason {
    /// The class of error this reason stands for.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Features(_)
            | Self::SubclusterSize(_)
            | Self::Version(_)
            | Self::Encrypted(_)
            | Self::Encryption(_)
            | Self::SnapshotDataFile
            | Self::ResizeSnapshots
            | Self::ZeroNewClusters
            | Self::PreallocationMode(_)
            | Self::NoBackingSupport(_)
            | Self::RawFixed => ErrorKind::Unsupported,
            Self::CannotUnpack(..)
            | Self::DataBeyondEnd(..)
            | Self::NeedsRebuild
            | Self::DirtyRepair(_) => ErrorKind::Io(5),
            Self::Scattered => ErrorKind::Unsupported,
            Self::SnapshotNotFound => ErrorKind::NotFound,
            Self::ActiveBitmaps | Self::SnapshotViewed => ErrorKind::Busy,
            Self::SnapshotsMany | Self::L1Grow => ErrorKind::Io(27),
            Self::RefcountOverflow(..)
            | Self::SnapshotName
            | Self::BackingName
            | Self::PreallocationShrink
            | Self::SizeAlignment
            | Self::Option(_)
            | Self::DataFile
            | Self::DataFileUnexpected
            | Self::RawOffset { .. }
            | Self::RawRange { .. }
            | Self::RawSector
            | Self::NotQcow2 => ErrorKind::InvalidArgument,
            Self::TableFull | Self::HeaderFull | Self::HeaderUnsafe | Self::RebuildRoom(..) => {
                ErrorKind::NoSpace
            }
            Self::Bitmap(reason) => reason.kind(),
            Self::Create(reason) => reason.kind(),
            Self::ReferenceProtocol(_)
            | Self::ReferenceOutside { .. }
            | Self::ReferenceExplicit { .. } => ErrorKind::PolicyRefused,
            _ => ErrorKind::Corrupt,
        }
    }

    /// The engine error that carries this reason.
    #[must_use]
    pub fn error(self, op: &'static str) -> Error {
        Error::new(self.kind(), op).with_source(self)
    }
}

impl std::error::Error for Reason {}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.fixed_text() {
            Some(text) => f.write_str(text),
            None => self.fmt_with_values(f),
        }
    }
}

impl Reason {
    fn fixed_text(&self) -> Option<&'static str> {
        Some(match self {
            Self::NotQcow2 => "Image is not in qcow2 format",
            Self::HeaderUnreadable => "Could not read qcow2 header",
            Self::HeaderShort => "qcow2 header too short",
            Self::HeaderLong => "qcow2 header exceeds cluster size",
            Self::BackingOffset => "Invalid backing file offset",
            Self::BackingName => "Backing file name too long",
            Self::BackingEncoding => "Backing file name is not valid UTF-8",
            Self::Extension => "Header extension too large",
            Self::CorruptBit => "qcow2: Image is corrupt; cannot be opened read/write",
            Self::DataFile => "'data-file' is required for this image",
            Self::DataFileUnexpected => {
                "'data-file' can only be set for images with an external data file"
            }
            Self::CompressionBit { set: true } => {
                "qcow2: Compression type incompatible feature bit must not be set"
            }
            Self::CompressionBit { set: false } => {
                "qcow2: Compression type incompatible feature bit must be set"
            }
            Self::RefcountOrder => "Reference count entry width too large; may not exceed 64 bits",
            Self::NoRefcountTable => "Image does not contain a reference count table",
            Self::SizeTooBig => "Image is too big",
            Self::L1Small => "L1 table is too small",
            Self::NeedsRebuild => "need to rebuild refcount structures",
            Self::Scattered => {
                "Clusters are scattered so far that rebuilding the refcounts is refused"
            }
            Self::TableFull => "qcow2: The refcount table cannot grow any further",
            Self::SnapshotNotFound => "snapshot not found",
            Self::SnapshotViewed => "The snapshot is being read; close its readers first",
            Self::SnapshotDataFile => {
                "Images with an external data file cannot have internal snapshots"
            }
            Self::SnapshotsMany => "Snapshot table too large",
            Self::SnapshotName => "Snapshot ids and names have at most 65535 bytes",
            Self::ActiveBitmaps => "Device has active dirty bitmaps",
            Self::ResizeSnapshots => "Can't resize a v2 image which has snapshots",
            Self::ZeroNewClusters => "Failed to zero out new clusters: Operation not supported",
            Self::L1Grow => "Failed to grow the L1 table: File too large",
            Self::PreallocationShrink => "Preallocation can only be used for growing images",
            Self::SizeAlignment => "The new size must be a multiple of 512",
            Self::HeaderFull => "Header extensions and backing file name do not fit in a cluster",
            Self::HeaderUnsafe => {
                "The header is too full to be changed so that a power cut leaves the old or the \
                 new one; use a shorter backing file name"
            }
            Self::RawFixed => "Cannot resize fixed-size raw disks",
            Self::RawSector => "Specified size is not multiple of 512",
            Self::Replaced => {
                "The file holds another image than before: remove the node and add \
                               it again"
            }
            _ => return None,
        })
    }

    fn fmt_with_values(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Option(fault) => fmt::Display::fmt(fault, f),
            Self::Create(reason) => write!(f, "{reason}"),
            Self::Version(version) => write!(f, "Unsupported qcow2 version {version}"),
            Self::ClusterBits(bits) => write!(f, "Unsupported cluster size: 2^{bits}"),
            Self::SubclusterSize(bytes) => write!(f, "Unsupported subcluster size: {bytes}"),
            Self::HeaderLength(len) => {
                write!(f, "qcow2 header length {len} is not a multiple of 8")
            }
            Self::Features(names) => write!(f, "Unsupported qcow2 feature(s): {names}"),
            Self::DirtyRepair(cause) => write!(f, "Could not repair dirty image: {cause}"),
            Self::CompressionType(kind) => write!(f, "qcow2: unknown compression type: {kind}"),
            Self::Encrypted(name) => write!(f, "Unsupported qcow2 feature(s): {name} encryption"),
            Self::Encryption(method) => write!(f, "Unsupported encryption method {method}"),
            Self::TableLarge(table) => write!(f, "{table} too large"),
            Self::Truncated(table) => {
                write!(f, "qcow2 image is truncated: its {table} lies beyond the end of the file")
            }
            Self::DataBeyondEnd(guest, host) => write!(
                f,
                "qcow2 image is truncated: the cluster at guest offset {guest:#x} lies at \
                     {host:#x}, beyond the end of the file"
            ),
            Self::TableOffset(table) => write!(f, "{table} offset invalid"),
            Self::CannotUnpack(guest, host, why) => write!(
                f,
                "The compressed cluster at guest offset {guest:#x} (host offset {host:#x}) cannot \
                 be read: {why}"
            ),
            Self::BadEntry(table, at, entry) => {
                write!(f, "qcow2: Image is corrupt: {table} entry {entry:#x} at {at:#x}")
            }
            Self::Overlap(host) => write!(
                f,
                "qcow2: Image is corrupt: guest data at host offset {host:#x} overlaps metadata"
            ),
            Self::DataFilePlace { place, guest } => write!(
                f,
                "qcow2: Image is corrupt: External data file host cluster offset {place:#x} does \
                 not match guest cluster offset: {guest:#x}"
            ),
            Self::Refcount(host) => {
                write!(f, "qcow2: Image is corrupt: wrong refcount of the cluster at {host:#x}")
            }
            Self::RebuildRoom(needed, there) => write!(
                f,
                "New refcounts need {needed} bytes behind what is used, and the device has {there} \
                 there; enlarge the device, or copy it into a file and repair that"
            ),
            Self::Bitmap(reason) => write!(f, "{reason}"),
            Self::NoBackingSupport(driver) => {
                write!(f, "Driver '{driver}' does not support backing files")
            }
            Self::RawOffset { offset, file } => write!(
                f,
                "Offset ({offset}) cannot be greater than size of the containing file ({file})"
            ),
            Self::RawRange { offset, size, file } => write!(
                f,
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to \
                     the  actual size of the containing file ({file})"
            ),
            other => other.fmt_snapshot(f),
        }
    }

    fn fmt_snapshot(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SnapshotExtra(index) => {
                write!(f, "Too much extra metadata in snapshot table entry {index}")
            }
            Self::SnapshotEntry(index) => {
                write!(f, "qcow2: Image is corrupt: snapshot table entry {index} cannot be")
            }
            Self::RefcountOverflow(bits, host) => write!(
                f,
                "A refcount of {bits} bit(s) cannot count another reference to the cluster at \
                     {host:#x}; delete a snapshot, or convert to an image with wider refcounts"
            ),
            Self::PreallocationMode(mode) => write!(f, "Unsupported preallocation mode: {mode}"),
            other => other.fmt_reference(f),
        }
    }

    fn fmt_reference(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ReferenceProtocol(name) => write!(
                f,
                "Reference '{name}' is not a plain file name; protocols and json: in a \
                 header are never followed, name the node explicitly"
            ),
            Self::ReferenceOutside { image, path } => write!(
                f,
                "'{}' refers to '{}', which is outside the folder of the image; allow it with \
                 --allow-dir DIR or --header-refs=any, or name the node explicitly",
                image.display(),
                path.display()
            ),
            Self::ReferenceExplicit { image, path } => write!(
                f,
                "'{}' refers to '{}', but references in headers are not followed; use \
                 --header-refs=same-dir, --header-refs=any or --allow-dir DIR, or name the node \
                 explicitly",
                image.display(),
                path.display()
            ),
            _ => Ok(()),
        }
    }
}
