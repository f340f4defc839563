//! Image formats of liveblk: metadata and address resolution, never guest data.
//!
//! - [`raw`]: the smallest example of a format;
//! - [`qcow2`]: versions 2 and 3;
//! - [`reference`]: which files a header may make the engine open;
//! - [`create_reason`]: why an image cannot be created as asked;
//! - [`reason`]: why something was refused, in the texts that people read;
//! - [`registry`]: the formats by name, for the engine.

#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::indexing_slicing)]
#![cfg_attr(any(test, feature = "fuzzing"), allow(clippy::unwrap_used, clippy::indexing_slicing))]

pub mod create_reason;
pub mod limits;
pub mod qcow2;
pub mod raw;
pub mod reason;
pub mod reference;
mod registry;

pub use registry::registry;
