//! Dirty bitmaps: which parts of a disk changed, one bit per granule.
//!
//! The hot side of dirty tracking (DESIGN.md, "Dirty tracking"): leaves of 65,536 bits that are
//! sparse arrays, words or "all", below a summary with one bit per leaf. The home core of a node
//! touches it without locks. `roaring` is the cold side: merge, export, persistence.
//!
//! Order rules of its users: (1) a dirty bit is set after the data is written and before the guest
//! is answered, also when the write failed; (2) a copy loop clears a bit before it reads, and sets
//! it again when the copy failed.
//!
//! Does not know nodes, names or jobs.

mod dirty;
mod leaf;
mod serial;

pub use dirty::{DirtyBitmap, GRANULARITY_MIN};
