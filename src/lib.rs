//! Live block operations on virtual disks, as a library.
//!
//! [`run`] starts an engine and gives a [`Host`]: open chains of raw and qcow2 images, attach
//! [`Disk`]s, and while they are written snapshot, mirror and back them up. The crates below are
//! re-exported for hosts that need more: `liveblk_engine` (executor, graph, requests),
//! `liveblk_formats` and `liveblk_jobs`.
//!
//! ```no_run
//! # fn main() -> Result<(), liveblk::HostError> {
//! liveblk::run(|host| async move {
//!     host.create("disk.qcow2", "qcow2", 1 << 30).await?;
//!     let node = host.open(host.image("disk.qcow2", "qcow2").named("disk")).await?;
//!     let disk = host.attach(&node)?;
//!     disk.write(0, host.buffer(b"hello"), Default::default()).await?;
//!     disk.flush().await?;
//!     Ok(())
//! })
//! # }
//! ```

#![forbid(unsafe_code)]

mod host;

pub use host::{Host, HostError, run};
pub use liveblk_engine::executor::{Core, CoreId, Engine, EngineConfig, Handle};
pub use liveblk_engine::format::ReferencePolicy;
pub use liveblk_engine::graph::{BackingSource, FileSource, OpenNode};
pub use liveblk_engine::node::{Disk, Node, WriteFlags, ZeroFlags};
pub use liveblk_engine::{Error, ErrorKind};
pub use liveblk_jobs::{
    BackupSpec, Event, Job, JobError, JobOptions, MirrorSpec, Status, SyncMode,
};
pub use {liveblk_engine as engine, liveblk_formats as formats, liveblk_jobs as jobs};
