//! liveblk-exports: front doors through which guests reach their disks.
//!
//! - [`registry`]: exports by id, whatever their kind, and the one NBD server;
//! - [`nbd`]: the NBD server, and the protocol's wire code ([`nbd::wire`]) for both sides;
//! - [`error`]: what can go wrong with an export, in the words that clients know;
//! - [`limits`]: every bound by name.
//!
//! A front door turns what a guest asks into requests on a [`liveblk_engine::node::Disk`] and never
//! looks below it. It does not know formats, jobs or the monitor.
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::indexing_slicing)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing))]

pub mod error;
pub mod limits;
pub mod nbd;
pub mod registry;

pub use error::ExportError;
pub use registry::{ExportInfo, Exports, RemoveMode};
