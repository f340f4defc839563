//! The border between monitors and what executes commands.

use std::sync::Arc;

use serde_json::Value;

use crate::qmp::{Event, QmpError};
use crate::schema::Command;

/// Executes commands.
///
/// Duties of the implementer: every command is answered exactly once through its [`ReplySink`],
/// from any thread, now or later; `execute` itself does not block; events are given to every
/// subscribed sink in the order in which they happen, before or after a reply as the peer does it.
/// Duties of the caller: a command has passed the argument check; commands of one connection are
/// given one at a time. Never happens: a call after `shutdown`.
pub trait Backend: Send + Sync {
    /// Executes a command. `Quit` cancels all jobs, delivers their events and answers; what ends
    /// the process follows with `shutdown`.
    fn execute(&self, command: Command, reply: ReplySink);

    /// Delivers all later events to `sink`.
    fn subscribe(&self, sink: EventSink);

    /// Ends everything: exports closed, jobs cancelled by force, nodes closed and flushed; then
    /// answers. May be called after `Quit`.
    fn shutdown(&self, done: ReplySink);
}

/// Takes events, from any thread, without blocking.
pub type EventSink = Arc<dyn Fn(Event) + Send + Sync>;

type Deliver = Box<dyn FnOnce(Result<Value, QmpError>) + Send>;

/// Takes the answer to one command. Dropped without an answer it reports an internal error, so that
/// no client waits for ever.
pub struct ReplySink {
    deliver: Option<Deliver>,
}

impl ReplySink {
    /// A sink that calls `deliver` once.
    pub fn new(deliver: impl FnOnce(Result<Value, QmpError>) + Send + 'static) -> Self {
        Self { deliver: Some(Box::new(deliver)) }
    }

    /// Answers.
    pub fn send(mut self, answer: Result<Value, QmpError>) {
        if let Some(deliver) = self.deliver.take() {
            deliver(answer);
        }
    }
}

impl Drop for ReplySink {
    fn drop(&mut self) {
        if let Some(deliver) = self.deliver.take() {
            deliver(Err(QmpError::generic("The command ended without an answer")));
        }
    }
}

impl std::fmt::Debug for ReplySink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReplySink")
    }
}
