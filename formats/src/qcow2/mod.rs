//! qcow2, versions 2 and 3: metadata and address resolution, never guest data.
//!
//! Order rules (each kept in the module named):
//! 1. refcount before the entry that uses it; data before its mapping is durable; L2 before L1
//!    (`flush`);
//! 2. a cluster is handed out once: reserved, counted, pending, mapped (`alloc`, `write`);
//! 3. unlink durable, epoch retired, leases gone, punched, then refcount decreased (`reclaim`);
//! 4. new tables are written before anything points to them; a failure before that point leaves no
//!    trace (`tables`, `reftable`);
//! 5. snapshots and smaller sizes change all tables at once, by one sector (`switch`);
//! 6. header changes are one sector, or are written where the old header does not look first
//!    (`rewrite`);
//! 7. what an earlier writer left is durable before a writer reads it (`open`, `repair`).
//!
//! What this version does not do is refused by name: see `header`.

mod aging;
mod ahead;
mod alloc;
mod alloc_run;
mod bitmap_api;
mod bitmap_change;
mod bitmap_dir;
mod bitmap_reason;
mod bitmap_resize;
mod bitmap_store;
mod bitmap_table;
mod bitmap_track;
mod cache;
mod check;
mod check_counts;
mod check_entries;
mod check_lists;
mod check_survey;
mod claims;
mod codec;
mod counts;
mod create;
mod create_options;
mod cut_off;
mod datafile;
mod driver;
mod entry;
mod extensions;
mod flush;
mod freed;
mod freeze;
mod guard;
mod header;
mod header_plan;
mod image;
mod layout;
mod load;
mod map;
mod mapped;
mod open;
mod options;
mod overlap;
mod pack;
mod packed;
mod reclaim;
mod reftable;
mod repair;
mod repair_rebuild;
mod resize;
mod rewrite;
mod room;
mod snapshot;
mod snapshot_count;
mod snapshot_table;
mod snapshot_view;
mod state;
mod subcluster;
mod switch;
mod tables;
mod tuning;
mod unpack;
mod words;
mod write;
mod zero;

#[cfg(test)]
mod tests;
#[cfg(all(feature = "fuzzing", not(test)))]
#[path = "tests/fuzz_root.rs"]
mod tests;

#[cfg(any(test, feature = "fuzzing"))]
pub use tests::fuzzing;

pub use bitmap_reason::BitmapReason;
pub use check::{CheckReport, check};
pub use create::{create, create_with_data};
pub use create_options::{CompressionType, CreateOptions};
pub use driver::Qcow2Driver;
pub use options::{OptionFault, Options};
pub use overlap::Overlap;
pub use repair::{Repair, repair};
