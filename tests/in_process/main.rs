//! The tests across crates that run in one process, as one program: it is linked once, and what
//! they share is compiled once. Tests that count allocations or memory of their process are
//! programs of their own beside it.
#![allow(missing_docs, reason = "a test")]

mod bitmaps;
mod chain_faults;
mod chain_jobs;
#[path = "../chains/mod.rs"]
mod chains;
mod compressed_backup;
mod data_files;
mod deep_chains;
mod drain_under_copy_before_write;
mod fleecing_overlay;
mod following_bitmaps;
mod following_jobs;
mod foreign_runtime;
mod full_disk;
mod held_writes;
mod hooks_at_every_step;
mod internal_snapshots;
mod jobs_on_chains;
mod known_failures;
mod late_bitmaps;
#[path = "../layers/mod.rs"]
mod layers;
mod moved_starts;
mod orphan_writes;
mod raw_sizes;
mod read_leases;
mod reopen;
#[path = "../../jobs/tests/rig/mod.rs"]
mod rig;
mod second_opinion;
mod sharing_chains;
#[path = "../simulated/mod.rs"]
mod simulated;
mod subcluster_overlay;
mod transactions;
mod two_writers_of_one_cluster;
