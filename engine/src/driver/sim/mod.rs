//! The simulator: a second implementation of [`Driver`](super::Driver) in which one thread plays
//! all cores.
//!
//! [`Sim`] owns the cores and decides whose turn it is; the simulated kernel decides how long each
//! operation takes, in which pieces it happens, whether it is shortened, fails, or is held by a
//! test; [`SimFs`] keeps for each file what is live and what is durable. Everything random comes
//! from one seed, so a seed replays a run exactly; [`Sim::trace_hash`] proves it.
//!
//! What it promises:
//! - every operation completes exactly once, unless a [`Hold`] keeps it or the world is cut;
//! - a read buffer is poisoned when its operation starts, a write's bytes are taken at some moment
//!   before its completion, so memory that is touched while in flight shows;
//! - a completed sync covers exactly what had completed before it was submitted, and perhaps more;
//! - a power cut keeps all that is durable and, per 512-byte sector, any version written since.
//!
//! It does not simulate sockets: those operations answer `ENOSYS`.

mod config;
mod driver;
mod file;
mod fs;
mod fs_op;
mod hold;
mod kernel;
mod pages;
mod plan;
mod rng;
mod trace;
mod world;

#[cfg(test)]
mod tests;

pub use self::config::{FaultRule, Latency, OpFilter, SimConfig, SimOpKind, SlowDisk};
pub use self::fs::{FsConfig, SimFs};
pub use self::hold::{Hold, HoldPoint};
pub use self::rng::Rng;
pub use self::world::Sim;
