//! The protocol of a monitor, without its transport.
//!
//! Owns: greeting, negotiation, form of requests, replies and events, error classes. Promises: pure
//! functions of what was received; nothing here reads, writes, waits or runs a command.

mod error;
mod event;
mod greeting;
mod session;

pub use error::{ErrorClass, QmpError};
pub use event::Event;
pub use greeting::{COMPATIBLE_VERSION, PACKAGE, greeting, version_info};
pub use session::{Request, Session, Step, reply};
