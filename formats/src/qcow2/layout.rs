//! The bytes of a qcow2 file: structures, constants and the geometry that follows from the header.
//!
//! Section names are those of the qcow2 specification (QEMU `docs/interop/qcow2`). Everything is
//! big endian and of fixed width. Does no I/O and checks nothing; see `header`.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::limits::SLICE_BYTES;

/// "QFI\xfb" (section "Header").
pub(super) const MAGIC: u32 = 0x5146_49fb;

/// Smallest and largest `cluster_bits`.
pub(super) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// Header fields that versions 2 and 3 share.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub(super) magic: U32,
    pub(super) version: U32,
    pub(super) backing_file_offset: U64,
    pub(super) backing_file_size: U32,
    pub(super) cluster_bits: U32,
    pub(super) size: U64,
    pub(super) crypt_method: U32,
    pub(super) l1_size: U32,
    pub(super) l1_table_offset: U64,
    pub(super) refcount_table_offset: U64,
    pub(super) refcount_table_clusters: U32,
    pub(super) nb_snapshots: U32,
    pub(super) snapshots_offset: U64,
}

/// Further fields of version 3.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawHeaderV3 {
    pub(super) incompatible: U64,
    pub(super) compatible: U64,
    pub(super) autoclear: U64,
    pub(super) refcount_order: U32,
    pub(super) header_length: U32,
}

/// Type and length before the data of a header extension.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawExtension {
    pub(super) kind: U32,
    pub(super) len: U32,
}

/// One entry of the feature name table.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawFeature {
    pub(super) kind: u8,
    pub(super) bit: u8,
    pub(super) name: [u8; 46],
}

/// The data of the bitmaps extension (section "Bitmaps extension").
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawBitmapPointer {
    pub(super) count: U32,
    pub(super) reserved: U32,
    pub(super) bytes: U64,
    pub(super) offset: U64,
}

/// The fixed part of a bitmap directory entry (section "Bitmap directory").
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawBitmapEntry {
    pub(super) table: U64,
    pub(super) entries: U32,
    pub(super) flags: U32,
    pub(super) kind: u8,
    pub(super) granularity_bits: u8,
    pub(super) name_len: U16,
    pub(super) extra_len: U32,
}

const _: () = assert!(size_of::<RawBitmapPointer>() == 24);
const _: () = assert!(size_of::<RawBitmapEntry>() == 24);
const _: () = assert!(size_of::<RawHeader>() == 72);
const _: () = assert!(size_of::<RawHeaderV3>() == 32);
const _: () = assert!(size_of::<RawExtension>() == 8);
const _: () = assert!(size_of::<RawFeature>() == 48);

/// Length of the version 2 header.
pub(super) const HEADER_V2: u32 = 72;
/// Smallest version 3 header.
pub(super) const HEADER_V3: u32 = 104;
/// The version 3 header with the compression type, as it is written today.
pub(super) const HEADER_V3_FULL: u32 = 112;

/// Incompatible feature bit 0: refcounts may be stale.
pub(super) const INCOMPATIBLE_DIRTY: u64 = 1;
/// Incompatible feature bit 1: metadata is known to be damaged.
pub(super) const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
/// Incompatible feature bit 2: guest data is in another file.
pub(super) const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
/// Incompatible feature bit 3: the compression type field counts.
pub(super) const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
/// Incompatible feature bit 4: extended L2 entries.
pub(super) const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
/// All incompatible bits that have a meaning.
pub(super) const INCOMPATIBLE_KNOWN: u64 = 0x1f;
/// Compatible feature bit 0: lazy refcounts.
pub(super) const COMPATIBLE_LAZY: u64 = 1;
/// Autoclear bit 0: the bitmaps extension is consistent.
pub(super) const AUTOCLEAR_BITMAPS: u64 = 1;
/// Autoclear bit 1: the external data file is a raw image of the disk.
pub(super) const AUTOCLEAR_DATA_FILE_RAW: u64 = 1 << 1;

/// Bit 63 of L1 and L2 entries: the refcount is exactly one.
pub(super) const COPIED: u64 = 1 << 63;
/// Bit 62 of L2 entries.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of L2 entries (version 3).
pub(super) const ZERO: u64 = 1;
/// Bits 9 to 55 of L1 and L2 entries.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of L1 entries that must be 0.
pub(super) const L1_RESERVED: u64 = !(OFFSET_MASK | COPIED);
/// Bits of L2 entries of plain clusters that must be 0 (bit 0 has a meaning, or none at all).
pub(super) const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits 9 to 63 of refcount table entries.
pub(super) const REFTABLE_MASK: u64 = !0x1ff;

/// Bytes of an L1 entry and of a refcount table entry.
pub(super) const ENTRY_BYTES: u64 = 8;

/// Subclusters of a cluster with an extended L2 entry.
pub(super) const SUBCLUSTERS: u32 = 32;

/// The unit that is written whole or not at all.
pub(super) const SECTOR: usize = 512;

/// Index of a cluster on the virtual disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct GuestCluster(pub(super) u64);

/// Index of a cluster in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct HostCluster(pub(super) u64);

impl GuestCluster {
    /// The cluster `count` further on.
    pub(super) const fn plus(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

impl HostCluster {
    /// The cluster `count` further on.
    pub(super) const fn plus(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

/// A run of neighbouring clusters in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: HostCluster,
    pub(super) count: u64,
}

impl Run {
    /// The clusters of the run.
    pub(super) fn clusters(self) -> impl Iterator<Item = HostCluster> {
        (self.start.0..self.start.0 + self.count).map(HostCluster)
    }
}

/// What the header says about sizes; all powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    /// Extended L2 entries: 16 bytes, 32 subclusters per cluster.
    pub(super) extended: bool,
    /// Guest data is in another file.
    pub(super) external: bool,
    /// Bytes of a cached piece of an L2 table, as a power of two, where the caller says it; else 0.
    pub(super) slice_bits: u32,
}

impl Geometry {
    /// Bytes of a cluster.
    pub(super) const fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of the smallest part of a cluster that is mapped by itself.
    pub(super) const fn subcluster(self) -> u64 {
        if self.extended { self.cluster() / SUBCLUSTERS as u64 } else { self.cluster() }
    }

    /// Bytes of an L2 entry.
    pub(super) const fn l2_entry_bytes(self) -> u64 {
        if self.extended { 2 * ENTRY_BYTES } else { ENTRY_BYTES }
    }

    /// Entries of an L2 table, as a power of two.
    pub(super) const fn l2_bits(self) -> u32 {
        self.cluster_bits - if self.extended { 4 } else { 3 }
    }

    /// Entries of an L2 table.
    pub(super) const fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// Guest bytes that one L1 entry covers.
    pub(super) const fn l2_span(self) -> u64 {
        1 << (self.l2_bits() + self.cluster_bits)
    }

    /// L1 entries that `size` guest bytes need.
    pub(super) const fn l1_entries(self, size: u64) -> u64 {
        size.div_ceil(self.l2_span())
    }

    /// Bytes of a cached slice of an L2 table.
    pub(super) const fn slice_bytes(self) -> u64 {
        if self.slice_bits == 0 { self.ref_slice_bytes() } else { 1 << self.slice_bits }
    }

    /// Bytes of a cached slice of a refcount block.
    pub(super) const fn ref_slice_bytes(self) -> u64 {
        if self.cluster() < SLICE_BYTES { self.cluster() } else { SLICE_BYTES }
    }

    /// L2 entries of a slice.
    pub(super) const fn slice_entries(self) -> u64 {
        self.slice_bytes() / self.l2_entry_bytes()
    }

    /// Slices of an L2 table.
    pub(super) const fn l2_slices(self) -> u64 {
        self.l2_entries() / self.slice_entries()
    }

    /// The slice (counted over the whole disk) that holds the entry of a guest cluster.
    pub(super) const fn slice_of(self, cluster: GuestCluster) -> u64 {
        cluster.0 / self.slice_entries()
    }

    /// The position of a guest cluster's entry in its slice.
    pub(super) const fn slice_index(self, cluster: GuestCluster) -> usize {
        (cluster.0 % self.slice_entries()) as usize
    }

    /// The L1 entry that leads to a slice.
    pub(super) const fn l1_of_slice(self, slice: u64) -> usize {
        (slice / self.l2_slices()) as usize
    }

    /// Bits of a refcount.
    pub(super) const fn refcount_bits(self) -> u32 {
        1 << self.refcount_order
    }

    /// Refcounts of a block.
    pub(super) const fn block_entries(self) -> u64 {
        (self.cluster() * 8) >> self.refcount_order
    }

    /// Refcounts of a slice of a block.
    pub(super) const fn ref_slice_entries(self) -> u64 {
        (self.ref_slice_bytes() * 8) >> self.refcount_order
    }

    /// Slices of a refcount block.
    pub(super) const fn block_slices(self) -> u64 {
        self.cluster() / self.ref_slice_bytes()
    }

    /// Clusters that `bytes` need.
    pub(super) const fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster())
    }

    /// Byte offset of a host cluster.
    pub(super) const fn host(self, cluster: HostCluster) -> u64 {
        cluster.0 << self.cluster_bits
    }

    /// The host cluster at byte `offset`.
    pub(super) const fn host_cluster(self, offset: u64) -> HostCluster {
        HostCluster(offset >> self.cluster_bits)
    }

    /// Whether a byte offset is the start of a cluster.
    pub(super) const fn aligned(self, offset: u64) -> bool {
        offset & (self.cluster() - 1) == 0
    }
}
