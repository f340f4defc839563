//! The way into a core from other threads.
//!
//! A bounded-by-protocol queue (every sender awaits the answer of what it sent) and a wake-up that
//! is only paid when the core sleeps. Parked protocol: the core stores `parked`, looks at the queue
//! once more, then sleeps; a sender pushes, and wakes only if it took `parked` away.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use super::core::Core;
use super::task::TaskId;
use crate::driver::{FsOutcome, Token};

/// What a core can be told.
pub(crate) enum Message {
    /// Poll this task.
    Wake(TaskId),
    /// Run this on the core.
    Call(Box<dyn FnOnce(&Core) + Send>),
    /// Blocking work for the operation is done.
    WorkDone { token: Token, result: i32, outcome: SendOutcome },
    /// End the loop when nothing is left to do.
    Stop,
}

/// Outcome of blocking work on its way back to the core.
pub(crate) struct SendOutcome(pub(crate) FsOutcome);

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Wake(_) => "Wake",
            Self::Call(_) => "Call",
            Self::WorkDone { .. } => "WorkDone",
            Self::Stop => "Stop",
        })
    }
}

/// The mailbox of a core.
pub(crate) struct Mailbox {
    queue: Mutex<VecDeque<Message>>,
    parked: AtomicBool,
    /// Written to wake a sleeping ring; none in the simulator.
    eventfd: Option<OwnedFd>,
}

impl Mailbox {
    pub(crate) fn new(eventfd: Option<OwnedFd>) -> Self {
        Self { queue: Mutex::default(), parked: AtomicBool::new(false), eventfd }
    }

    pub(crate) fn push(&self, message: Message) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(message);
        if self.parked.swap(false, Ordering::SeqCst)
            && let Some(eventfd) = &self.eventfd
        {
            // A full counter means that a wake-up is pending already.
            let _ = nix::unistd::write(eventfd.as_fd(), &1_u64.to_ne_bytes());
        }
    }

    pub(crate) fn pop(&self) -> Option<Message> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Announces that the core is about to sleep; false if a message came in the meantime.
    pub(crate) fn park(&self) -> bool {
        self.parked.store(true, Ordering::SeqCst);
        if self.is_empty() {
            return true;
        }
        self.unpark();
        false
    }

    /// The core is awake.
    pub(crate) fn unpark(&self) {
        self.parked.store(false, Ordering::SeqCst);
    }

    /// The number of the wake descriptor, for the ring.
    pub(crate) fn raw_eventfd(&self) -> Option<i32> {
        self.eventfd.as_ref().map(AsRawFd::as_raw_fd)
    }
}
