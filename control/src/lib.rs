//! The control plane of liveblk: QMP, the command line of `liveblkd`, and what connects them to the
//! engine.
//!
//! Owns: JSON, the protocol, the table of commands, monitors, start-up and shutdown. Promises: what
//! a client of the peer daemon sees, it sees here. Does not: touch guest data; nothing here is on
//! the data path.

#![forbid(unsafe_code)]

pub mod backend;
pub mod cli;
pub mod daemon;
pub mod json;
pub mod limits;
pub mod monitor;
pub mod qmp;
pub mod schema;
