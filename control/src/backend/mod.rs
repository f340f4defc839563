//! Commands on the engine.
//!
//! Owns: the one `Control` object on core 0 that executes typed commands, the events that jobs and
//! exports cause, and the table of errors. Promises: every command is answered once; an event that
//! is caused before an answer is delivered before it, because both leave from the same thread.
//! Does not: parse, nor know a monitor.
//!
//! Order rules at the end: 1. exports stop taking requests; 2. jobs are ended by force, with their
//! events; 3. the exports are gone; 4. the answer to `quit` leaves; 5. nodes are closed.

mod bitmaps;
mod block_graph;
mod chains;
mod control;
mod create;
mod errors;
mod events;
mod exports;
mod fleecing;
mod handle;
mod image_opts;
mod internal;
mod jobs;
mod nodes;
mod objects;
mod queries;
mod reopen;
mod sockets;
mod verbs;

pub use errors::Failure;
pub use handle::{EngineBackend, Settings, execute_on};
pub use image_opts::ImageOpts;
