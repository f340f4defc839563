//! Every bound of the jobs, by name: full means back-pressure or an error, never growth.

/// Bytes of one copy on storage where a request costs a seek or a command.
pub const UNIT_DISK: u64 = 1 << 20;

/// Bytes of one copy where both sides are in memory: small enough to stay in the cache.
pub const UNIT_MEMORY: u64 = 128 << 10;

/// Bytes of the first copy by shared blocks: guests that write the source wait while it lasts.
pub const SHARE_UNIT_FIRST: u64 = 4 << 20;

/// Least bytes of such a copy, however long one takes.
pub const SHARE_UNIT_MIN: u64 = 1 << 20;

/// Most bytes of such a copy.
pub const SHARE_UNIT_MAX: u64 = 64 << 20;

/// Nanoseconds of such a copy below which the next is larger.
pub const SHARE_SHORT_NS: u64 = 1_000_000;

/// Nanoseconds of such a copy above which the next is smaller.
pub const SHARE_LONG_NS: u64 = 4_000_000;

/// Bytes of the disk of which the loop finds out at once where they lie.
pub const SHARE_LOOK: u64 = 64 << 20;

/// Copies in flight of one background loop. Small on purpose: a guest request queues behind what
/// is in flight, and 64 copies of 1 MiB are what gives the peer its stalls of 100 ms.
pub const WINDOW_UNITS: usize = 8;

/// The same where both sides are in memory. Such a copy is over where it was started, so more of
/// them only take turns, over more memory (measured: bench/RESULTS.md).
pub const WINDOW_UNITS_MEMORY: usize = 2;

/// Bytes in flight of one background loop.
pub const WINDOW_BYTES: u64 = 4 << 20;

/// Bytes of old content that copy-before-write of one job may hold for its target; beyond it a
/// guest write waits for the target.
pub const BEFORE_WRITE_BYTES: u64 = 32 << 20;

/// Nanoseconds that a guest waits for the target to take old content before it goes to the spill
/// file; less when the target has taken none for that long.
pub const SPILL_PATIENCE_NS: u64 = 10_000_000;

/// Bytes of old content on their way to the spill file; beyond it a guest waits for that file.
pub const SPILL_BYTES_IN_FLIGHT: u64 = 8 << 20;

/// Bytes at the start of a spill file that say what it is.
pub const SPILL_HEADER: u64 = 4096;

/// Bytes of the disk that one block-status call of a plan covers.
pub const PLAN_STEP: u64 = 256 << 20;

/// Bytes of one zeroing request.
pub const ZERO_UNIT: u64 = 32 << 20;

/// Bytes of one write of zeroes where a new file is filled.
pub const ZERO_PIECE: usize = 1 << 20;

/// Jobs of one core.
pub const JOBS: usize = 1024;

/// Actions of one transaction.
pub const ACTIONS: usize = 1024;

/// Length of a rate slice in nanoseconds.
pub const RATE_SLICE_NS: u64 = 100_000_000;

/// Nanoseconds between a failed copy and its next try under `ignore`.
pub const RETRY_DELAY_NS: u64 = 100_000_000;

/// Nanoseconds that the end of a cancelled job waits for its hook to be taken out; after that the
/// hook, which does nothing any more, is taken out when the source is quiet.
pub const UNHOOK_WAIT_NS: u64 = 300_000_000;

/// Nanoseconds that the end of a job waits for copies in flight; after that the target stays in use
/// until they are over.
pub const LANDING_WAIT_NS: u64 = 500_000_000;

/// Nanoseconds that the end of a failed job waits for the flush after which a bitmap in mode always
/// gives up what was copied.
pub const BITMAP_FLUSH_WAIT_NS: u64 = 150_000_000;

/// Nanoseconds that a cut of a job may wait for requests in flight.
pub const CUT_WAIT_NS: u64 = 30_000_000_000;

/// Dirty bytes below which a completing mirror closes the gates; doubled every
/// [`PIVOT_PATIENCE_NS`], so that a busy guest is cut at last.
pub const PIVOT_BYTES: u64 = 1 << 20;

/// See [`PIVOT_BYTES`].
pub const PIVOT_PATIENCE_NS: u64 = 50_000_000;

/// Least nanoseconds between two looks of a job that converges at its traffic.
pub const CONVERGE_TICK_MIN_NS: u64 = 1_000_000;

/// Most microseconds of latency that a job that converges may be allowed to add: guests give a
/// request up after some tens of seconds.
pub const CONVERGE_LATENCY_MAX_US: u32 = 10_000_000;

/// Most nanoseconds between two such looks.
pub const CONVERGE_TICK_MAX_NS: u64 = 250_000_000;

/// Tries of the steps that finish a transaction after its decision.
pub const FINISH_TRIES: u32 = 5;

/// Nanoseconds after which a node that could not become read-only tries again; doubled each time.
pub const READ_ONLY_RETRY_NS: u64 = 1_000_000_000;

/// See [`READ_ONLY_RETRY_NS`].
pub const READ_ONLY_RETRY_MAX_NS: u64 = 10_000_000_000;

/// What [`PIVOT_BYTES`] never grows beyond: what a slow disk takes in a fraction of a second.
pub const PIVOT_BYTES_MAX: u64 = 32 << 20;

/// The smallest unit of copy-before-write in bytes.
pub const BACKUP_GRANULE_MIN: u64 = 64 << 10;

/// The smallest unit of copies within a chain in bytes.
pub const SECTION_GRANULE_MIN: u64 = 4 << 10;

/// Nanoseconds that the end of a job waits for requests on old paths; after that the layers that
/// are not needed any more are closed when those requests are over.
pub const RETIRE_WAIT_NS: u64 = 5_000_000_000;

/// Nanoseconds that a failed job on a chain waits for its copies, and then for its nodes to become
/// what they were, before it says so; after that they do so in the background.
pub const SECTION_WAIT_NS: u64 = 90_000_000;

/// Bytes in flight that a mirror's `buf-size` can ask for.
pub const BUF_SIZE_MAX: u64 = 64 << 20;

/// The largest unit of copy-before-write in bytes that a client can ask for.
pub const BACKUP_GRANULE_MAX: u64 = 64 << 20;
