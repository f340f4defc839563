//! The seam between the engine and the world: operations, completions, clock, random, blocking
//! work.
//!
//! Slab, tasks, timers, mailbox and `File` are the same code above either driver:
//! - [`ring`]: io_uring on this thread, inline pread/pwrite for memory-backed files, a pool of
//!   threads for calls that the ring lacks or always punts;
//! - [`sim`]: one thread plays all cores; order, delays, faults and crashes come from a seed.
//!
//! Order rules: (1) a slot's operation owns its buffers and files until the driver reported its
//! last completion; (2) the driver reports every submitted operation exactly once; (3) nothing is
//! submitted to the kernel outside of `turn`.

pub(crate) mod blocking;
mod blocking_io;
pub(crate) mod file_ops;
pub(crate) mod ring;
mod seam;
pub mod sim;

pub(crate) use seam::{
    Descriptor, Done, Driver, FallocateMode, FileFacts, FsOp, FsOutcome, Handle, IoClass, LockSpec,
    OpKind, OpSlot, OpenSpec, SideMemory, SlotState, Token, Wait, WorkItem,
};
pub use seam::{DriverCounters, Nanos};
