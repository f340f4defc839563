//! Every bound of the formats crate, by name: full means back-pressure or an error, never growth.

/// Bytes of cached L2 slices of one image.
pub const L2_CACHE_BYTES: u64 = 32 << 20;

/// Bytes of cached L2 slices of a snapshot that is read.
pub const VIEW_CACHE_BYTES: u64 = 8 << 20;

/// Bytes of cached refcount slices of one image.
pub const REFCOUNT_CACHE_BYTES: u64 = 8 << 20;

/// Seconds without use after which a cached table leaves memory (as the peer's).
pub const CACHE_CLEAN_SECONDS: u64 = 600;

/// L2 tables of snapshots that are guarded against writes at most.
pub const INACTIVE_L2_MAX: usize = 1 << 20;

/// Bytes of one cached slice of a metadata table (smaller clusters: the cluster).
pub const SLICE_BYTES: u64 = 4096;

/// Slices that an image may always cache, however large they are.
pub const CACHE_SLICES_MIN: usize = 16;

/// The largest L1 table in bytes (as the peer's).
pub const L1_BYTES_MAX: u64 = 32 << 20;

/// The largest refcount table in bytes (as the peer's).
pub const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;

/// The largest snapshot table in entries (as the peer's).
pub const SNAPSHOTS_MAX: u32 = 65_536;

/// The longest backing file name in bytes (specification).
pub const BACKING_NAME_MAX: u32 = 1023;

/// Bytes of a header area that is read and kept in memory (the name must lie inside).
pub const HEADER_BYTES_MAX: u64 = 2 << 20;

/// How far beyond the end of the file an entry may point before it counts as damaged, in bytes.
pub const BEYOND_END_MAX: u64 = 1 << 30;

/// Clusters that one allocation step hands out at most.
pub const ALLOC_CLUSTERS_MAX: u64 = 256;

/// Clusters that a refill of the allocator prepares at least.
pub const ALLOC_CLUSTERS_BATCH: u64 = 16;

/// Refcount slices that one refill looks through for freed clusters before it takes the end.
pub const ALLOC_SCAN_SLICES: u64 = 32;

/// Bytes of a step of space that is reserved ahead of the allocator at most.
pub const ROOM_STEP_MAX: u64 = 64 << 20;

/// The part of the file that a smaller step is.
pub const ROOM_SHARE: u64 = 8;

/// Bytes behind the last cluster in use that an open after a crash may cut off at most.
pub const ROOM_CUT_MAX: u64 = 2 * ROOM_STEP_MAX;

/// Unlinked clusters that wait for a flush before the image starts one by itself.
pub const UNLINKED_RUNS_MAX: usize = 1024;

/// Bytes of one read or write of a whole table.
pub const TABLE_PIECE: usize = 1 << 20;

/// Metadata writes in flight together during a flush.
pub const FLUSH_WINDOW: usize = 32;

/// Problems that a check lists by text; more are only counted.
pub const CHECK_PROBLEMS_MAX: usize = 100;

/// Bytes of the arrays in which one check counts. They follow what is really referred to: two bytes
/// per used cluster of the file, twice.
pub const CHECK_BYTES_MAX: u64 = 1 << 30;

/// Bytes of refcount blocks that are read to see whether the mapping was made ahead of the data.
pub const MAPPED_AHEAD_SCAN: u64 = 64 << 20;

/// Clusters of a file that one check looks at (as the peer's).
pub const CHECK_CLUSTERS_MAX: u64 = i32::MAX as u64;

/// Entries of L1 tables and of bitmap tables, together, that one check looks at.
pub const CHECK_ENTRIES_MAX: u64 = 64 << 20;

/// L2 tables that a check reads together, if they are small.
pub const CHECK_WINDOW: usize = 32;

/// Clusters behind the end of a file in which a check remembers what refers to them.
pub const BEYOND_CLUSTERS_MAX: u64 = 65_536;

/// Refcount blocks that a repair makes even if each counts next to nothing.
pub const REBUILD_BLOCKS_SPARSE: u64 = 4096;

/// The largest snapshot table in bytes (as the peer's).
pub const SNAPSHOT_TABLE_BYTES_MAX: u64 = 64 << 20;

/// Bytes of unknown data that one snapshot may carry (as the peer's).
pub const SNAPSHOT_EXTRA_MAX: u64 = 1024;

/// The largest bitmap table in entries (as the peer's).
pub const BITMAP_TABLE_ENTRIES_MAX: u64 = 0x800_0000;

/// Clusters that one step of a write-zeroes or discard changes at most.
pub const ZERO_CLUSTERS_MAX: u64 = 65_536;

/// Clusters up to this many bytes are packed and unpacked on the core's loop.
pub const PACK_INLINE_MAX: u64 = 16 << 10;

/// Bytes that packing and unpacking hold for one image, about.
pub const PACKING_BYTES: u64 = 24 << 20;

/// Clusters of one image that are packed or unpacked at a time.
pub const PACKING_MAX: u64 = 16;

/// Bytes of unpacked clusters that one image keeps.
pub const UNPACKED_BYTES: u64 = 4 << 20;

/// Unpacked clusters that one image keeps.
pub const UNPACKED_CLUSTERS: usize = 64;

/// The longest id or name of a snapshot in bytes (a 16-bit field).
pub const SNAPSHOT_TEXT_MAX: usize = 65_535;

/// Bytes of one read of the snapshot table.
pub const SNAPSHOT_WINDOW: u64 = 64 << 10;

/// Runs of freed clusters that one change of all tables gives back to the storage at most.
pub const SWITCH_PUNCH_RUNS_MAX: usize = 65_536;

/// Clusters that a change of all tables remembers because a further reference to them cannot be
/// counted before another one goes.
pub const SWITCH_DEFERRED_MAX: usize = 65_536;

/// Clusters of snapshot tables, their L1 tables and the bitmap directory that one image guards
/// against overlaps.
pub const INACTIVE_CLUSTERS_MAX: u64 = 1 << 18;

/// Clusters of metadata that one image remembers singly; more are packed (see `qcow2::claims`). As
/// many as a hash map of a power of two holds.
pub const CLAIMS_MAX: usize = 7 << 15;

/// Pieces of the set of known mapped clusters of one image: 512 bytes for 4096 clusters each.
pub const MAPPED_CHUNKS_MAX: usize = 16_384;

/// The most bitmaps of an image (as the peer's).
pub const BITMAPS_MAX: u32 = 65_535;

/// The largest bitmap directory in bytes (as the peer's).
pub const BITMAP_DIRECTORY_BYTES_MAX: u64 = 1024 * BITMAPS_MAX as u64;

/// The largest bitmap table in entries (as the peer's).
pub const BITMAP_TABLE_MAX: u64 = 0x800_0000;

/// The largest bitmap in bytes (as the peer's).
pub const BITMAP_BYTES_MAX: u64 = 512 << 20;

/// The smallest and largest granularity of a stored bitmap, as powers of two (specification).
pub const BITMAP_GRANULARITY_BITS: std::ops::RangeInclusive<u32> = 9..=31;

/// The longest name of a stored bitmap in bytes (specification).
pub const BITMAP_NAME_MAX: usize = 1023;

/// How often an image that becomes read-only is settled for bitmaps that changed meanwhile; they
/// come when guests move to another node, which is rare.
pub const SETTLE_TRIES: u32 = 8;
