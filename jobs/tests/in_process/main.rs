//! The tests of jobs as one program: it is linked once, and what they share is compiled once.
#![allow(missing_docs, reason = "a test")]

mod active_mirror;
mod backup;
mod bitmap_jobs;
mod converge;
mod fleecing;
mod group;
mod mirror;
mod pace;
mod real_files;
#[path = "../rig/mod.rs"]
mod rig;
mod sharing;
mod spill;
