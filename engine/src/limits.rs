//! Every bound of the engine, by name: full means back-pressure or an error, never growth.

/// Sizes of pool blocks in bytes; a buffer takes the smallest that fits.
pub const BUF_CLASSES: [usize; 5] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, BUF_MAX_BLOCK];

/// The largest block in bytes; longer buffers are lists of these.
pub const BUF_MAX_BLOCK: usize = 1 << 20;

/// Bytes of one arena (and its alignment, so that huge pages can back it).
pub const ARENA_BYTES: usize = 2 << 20;

/// Entries of the submission queue of a core's ring.
pub const RING_ENTRIES: u32 = 1024;

/// Entries of the completion queue of a core's ring.
pub const RING_COMPLETIONS: u32 = 4096;

/// io-wq workers per ring for bounded work.
pub const IO_WORKERS: u32 = 4;

/// Threads of the blocking pool of an engine.
pub const BLOCKING_THREADS: usize = 64;

/// Threads of the blocking pool that one file, the paths, or computing may have.
pub const LANE_THREADS: usize = 4;

/// Threads of the blocking pool that stay when there is nothing to do.
pub const IDLE_THREADS: usize = 4;

/// Tasks that one loop turn runs before it looks at completions.
pub const TURN_TASKS: usize = 256;

/// Background tasks among them.
pub const TURN_BACKGROUND_TASKS: usize = 32;

/// Bytes that one loop turn moves inline for memory-backed files beyond small guest pieces.
pub const TURN_INLINE_BYTES: usize = 512 << 10;

/// Largest inline piece in bytes: one that stays in the cache.
pub const INLINE_PIECE: usize = 64 << 10;

/// The longest chain of backing files that opens.
pub const CHAIN_DEPTH: usize = 256;

/// Bytes of the index of a chain per layer (see `node::chain`).
pub const CHAIN_INDEX_BYTES: usize = 64 << 10;

/// Smallest and largest unit of such an index in bytes.
pub const CHAIN_GRANULE: std::ops::RangeInclusive<u64> = 4 << 10..=2 << 20;

/// Nanoseconds after which a cut gives up waiting for requests in flight.
pub const CUT_DEADLINE_NS: u64 = 30_000_000_000;

/// Files with a failed flush that a core remembers after they were closed.
pub const FAILED_SYNCS: usize = 1024;

/// Pairs of files of which one job remembers whether they can share blocks.
pub const SHARING_PAIRS: usize = 256;

/// Smallest run of bytes in one place of a file that is worth a call of its own to be shared.
pub const SHARE_RUN_MIN: u64 = 32 << 10;

/// The longest node name in bytes.
pub const NODE_NAME_MAX: usize = 31;

/// The largest read, write or copy in one request, in bytes.
pub const REQUEST_MAX: u64 = 32 << 20;

/// References to backing files that a graph remembers as its own.
pub const KNOWN_REFERENCES: usize = 4096;

/// Compressed clusters of one read that are unpacked at a time.
pub const UNPACK_WINDOW: usize = 8;

/// Clusters of one compressed write that are packed at a time.
pub const PACK_WINDOW: usize = 8;

/// Pieces of one compressed write that are in flight together.
pub const PACKED_FLYING: usize = 64;

/// The longest name of a dirty bitmap in bytes.
pub const BITMAP_NAME_MAX: usize = 1023;

/// The largest granularity of a named dirty bitmap in bytes.
pub const BITMAP_GRANULARITY_MAX: u64 = 2 << 30;
