//! Monitors: QMP on real streams.
//!
//! Owns: chardevs, connections, the delivery of replies and events, the process's signals, and the
//! one thread they run on (tokio-uring). Promises: requests of a connection run one after the
//! other; replies and events of a connection leave in the order in which they were made; a client
//! that does not read costs bounded memory. Does not: execute commands; a [`Backend`] does.
//!
//! Order rules at the end: 1. a signal or the reply to `quit` starts it; 2. the backend is shut
//! down and its events are delivered; 3. connections are closed, their operations awaited; 4.
//! socket files are removed.

mod backend;
mod chardev;
mod connection;
mod hub;
mod output;
mod serve;
mod stdio;
mod system_text;
mod transport;

pub use backend::{Backend, EventSink, ReplySink};
pub(crate) use chardev::adopt_listener;
pub use chardev::{Chardev, Chardevs};
pub use serve::{MonitorSetup, serve};
pub(crate) use system_text::system_text;
