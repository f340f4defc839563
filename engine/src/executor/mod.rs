//! One thread per core, `!Send` tasks, no locks on the data path.
//!
//! - [`Core`]: tasks, operations, timers, buffers and mailbox of one core. One loop turn: mailbox,
//!   timers, ready tasks (guest class before background class), one driver turn (submit all, reap
//!   all).
//! - [`Engine`] and [`Handle`]: cores on threads, and the `Send` way in from outside.
//! - [`sync`]: waiting for each other on one core.
//!
//! Leaf futures of this engine register the *current task* instead of cloning wakers, so they must
//! be awaited from a task of their core, directly or through `sync::select`; combinators that poll
//! with wakers of their own (as those of the futures crate) are not used. Futures from outside the
//! engine may use the ordinary waker: it is `Send` and goes through the mailbox.

mod call;
mod core;
mod engine;
mod mailbox;
mod op;
pub mod sync;
mod task;
mod task_memory;
mod timer;

pub use self::call::RemoteCall;
pub use self::core::{Core, CoreId};
pub use self::engine::{Engine, EngineConfig, Handle};
pub use self::task::{Class, JoinHandle};
pub use self::timer::Sleep;

pub(crate) use self::mailbox::{Mailbox, Message, SendOutcome};
pub(crate) use self::op::{Op, OpDone};
pub(crate) use self::task::TaskId;
