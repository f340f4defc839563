//! Timers of one core: a heap of deadlines.
//!
//! An entry wakes its task at or after its time. A dropped sleep leaves its entry behind, which
//! then causes one needless wake-up at most.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::core::Core;
use super::task::TaskId;
use crate::driver::Nanos;

#[derive(Default)]
pub(super) struct Timers {
    heap: RefCell<BinaryHeap<Reverse<(Nanos, u32, u32)>>>,
}

impl Timers {
    fn add(&self, at: Nanos, task: TaskId) {
        self.heap.borrow_mut().push(Reverse((at, task.index, task.generation)));
    }

    pub(super) fn next(&self) -> Option<Nanos> {
        self.heap.borrow().peek().map(|Reverse((at, _, _))| *at)
    }

    /// The task of the earliest entry that is due.
    pub(super) fn due(&self, now: Nanos) -> Option<TaskId> {
        let mut heap = self.heap.borrow_mut();
        let Reverse((at, _, _)) = heap.peek()?;
        if *at > now {
            return None;
        }
        heap.pop().map(|Reverse((_, index, generation))| TaskId { index, generation })
    }
}

/// Resolves when the core's clock reaches a time.
#[must_use = "a sleep does nothing unless awaited"]
pub struct Sleep {
    core: Core,
    at: Nanos,
    registered: Option<TaskId>,
}

impl Sleep {
    pub(super) fn new(core: Core, at: Nanos) -> Self {
        Self { core, at, registered: None }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if self.core.now() >= self.at {
            return Poll::Ready(());
        }
        let task = self.core.tasks().current();
        if self.registered != Some(task) {
            self.registered = Some(task);
            self.core.timers().add(self.at, task);
        }
        Poll::Pending
    }
}

impl std::fmt::Debug for Sleep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sleep(until {})", self.at)
    }
}
