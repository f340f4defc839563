//! The tests of the NBD server as one program: it is linked once, and what they share is compiled
//! once. The test that counts allocations is a program of its own beside it.
#![allow(clippy::unwrap_used)]

mod clients;
mod commands;
mod hostile;
mod lifecycle;
#[path = "../rig/mod.rs"]
mod rig;
