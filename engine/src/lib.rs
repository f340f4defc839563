//! The engine of liveblk: executor, storage, graph, compiled paths and requests.
//!
//! Modules, from the bottom up:
//! - [`address`], [`error`], [`buf`], [`lease`], [`limits`]: the vocabulary;
//! - [`driver`]: the seam to the kernel (io_uring) or to the simulator;
//! - [`executor`]: cores, tasks, timers, and the way in from outside;
//! - [`storage`], [`net`]: files, memory and sockets;
//! - [`format`]: what an image format owes the engine;
//! - [`node`]: requests on a node: gate, claims, hooks, compiled path;
//! - [`graph`]: nodes by name, permissions, attachments, cuts;
//! - [`bitmap`]: dirty tracking;
//! - `planted`: rules left out on purpose, for tests of the tests (a feature of theirs).

pub mod address;
pub mod bitmap;
pub mod buf;
pub mod driver;
pub mod error;
pub mod executor;
pub mod format;
pub mod graph;
pub mod lease;
pub mod limits;
pub mod net;
pub mod node;
#[cfg(feature = "planted-bugs")]
pub mod planted;
pub mod ranges;
pub mod storage;

pub use error::{Error, ErrorKind, Result};
