//! Jobs on shared nodes: every pair of operations in every state of the first, every verb in every
//! state, targets that hang or are full, and groups that end together. Commands are those of QMP,
//! with their classes and texts; disks and time are the simulator's.
#![allow(missing_docs, reason = "a test")]

#[path = "../../../jobs/tests/rig/mod.rs"]
mod rig;

mod beside;
mod converging;
mod files;
mod groups;
mod known;
mod pairs;
mod targets;
mod verbs;
mod world;
