//! Tasks of one core: slab, ready queues, join handles.
//!
//! A task id carries a generation, so a late wake-up never reaches the slot's next tenant. A task
//! runs to its end whatever happens to its handle.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};

use slab::Slab;

use super::core::Core;
use super::task_memory::{RawTask, TaskMemory, drop_contents};

/// Names a task of a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TaskId {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl TaskId {
    /// No task: what runs outside of a poll.
    pub(crate) const NONE: Self = Self { index: u32::MAX, generation: 0 };
}

/// Which ready queue a task uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Guest requests and what they wait for.
    Guest,
    /// Copy loops and other work that may wait.
    Background,
}

struct TaskSlot {
    generation: u32,
    raw: RawTask,
    class: Class,
    queued: bool,
    polling: bool,
    done: bool,
    /// Whether a join handle will still look at the output.
    wanted: bool,
    joiner: Option<TaskId>,
}

/// All tasks of a core.
#[derive(Default)]
pub(crate) struct Tasks {
    slots: RefCell<Slab<TaskSlot>>,
    memory: RefCell<TaskMemory>,
    guest: RefCell<VecDeque<TaskId>>,
    background: RefCell<VecDeque<TaskId>>,
    generation: Cell<u32>,
    current: Cell<Option<TaskId>>,
}

impl Tasks {
    pub(super) fn spawn<F: Future + 'static>(&self, class: Class, future: F) -> TaskId {
        let raw = self.memory.borrow_mut().store(future);
        let generation = self.generation.get().wrapping_add(1);
        self.generation.set(generation);
        let slot = TaskSlot {
            generation,
            raw,
            class,
            queued: false,
            polling: false,
            done: false,
            wanted: true,
            joiner: None,
        };
        let index = self.slots.borrow_mut().insert(slot);
        let index = u32::try_from(index).expect("invariant: fewer than 2^32 tasks");
        let id = TaskId { index, generation };
        self.wake(id);
        id
    }

    /// The task that is being polled.
    pub(crate) fn current(&self) -> TaskId {
        self.current.get().unwrap_or(TaskId::NONE)
    }

    /// Makes a task ready; ignores ids of tasks that ended.
    pub(super) fn wake(&self, id: TaskId) {
        let mut slots = self.slots.borrow_mut();
        let Some(slot) = slots.get_mut(id.index as usize) else { return };
        if slot.generation != id.generation || slot.queued || slot.done {
            return;
        }
        slot.queued = true;
        match slot.class {
            Class::Guest => self.guest.borrow_mut().push_back(id),
            Class::Background => self.background.borrow_mut().push_back(id),
        }
    }

    pub(super) fn has_ready(&self) -> bool {
        !self.guest.borrow().is_empty() || !self.background.borrow().is_empty()
    }

    /// The next ready task: guest class first, then background within `background` more.
    pub(super) fn next(&self, background: &mut usize) -> Option<TaskId> {
        if let Some(id) = self.guest.borrow_mut().pop_front() {
            return Some(id);
        }
        if *background == 0 {
            return None;
        }
        *background -= 1;
        self.background.borrow_mut().pop_front()
    }

    /// Polls one task.
    pub(super) fn run(&self, id: TaskId, context: &mut Context<'_>) {
        let raw = {
            let mut slots = self.slots.borrow_mut();
            let Some(slot) = slots.get_mut(id.index as usize) else { return };
            if slot.generation != id.generation || slot.done {
                return;
            }
            slot.queued = false;
            slot.polling = true;
            slot.raw
        };
        let outer = self.current.replace(Some(id));
        // SAFETY: the slot is alive and `polling` keeps it from being released; tasks are polled
        // from here only, which does not recurse into the same task.
        let done = unsafe { raw.poll(context) };
        self.current.set(outer);
        let mut slots = self.slots.borrow_mut();
        let slot = slots.get_mut(id.index as usize).expect("invariant: polled slots stay");
        slot.polling = false;
        if !done {
            return;
        }
        slot.done = true;
        if slot.wanted {
            let joiner = slot.joiner.take();
            drop(slots);
            if let Some(joiner) = joiner {
                self.wake(joiner);
            }
        } else {
            slots.remove(id.index as usize);
            drop(slots);
            self.release(raw);
        }
    }

    fn release(&self, raw: RawTask) {
        // SAFETY: the slot was removed, so this is the only release; it is not being polled.
        unsafe { drop_contents(raw) };
        self.memory.borrow_mut().recycle(raw);
    }

    /// The output of a finished task; registers the current task otherwise.
    fn join<T>(&self, id: TaskId) -> Option<T> {
        let mut slots = self.slots.borrow_mut();
        let slot = slots.get_mut(id.index as usize).expect("invariant: wanted tasks stay");
        if !slot.done {
            slot.joiner = Some(self.current());
            return None;
        }
        let raw = slots.remove(id.index as usize).raw;
        drop(slots);
        // SAFETY: the slot was removed just now; T is the output type (JoinHandle<T> was made for
        // this task).
        let output = unsafe { raw.take::<T>() };
        self.release(raw);
        output
    }

    fn detach(&self, id: TaskId) {
        let mut slots = self.slots.borrow_mut();
        let Some(slot) = slots.get_mut(id.index as usize) else { return };
        if slot.generation != id.generation {
            return;
        }
        slot.wanted = false;
        if slot.done {
            let raw = slots.remove(id.index as usize).raw;
            drop(slots);
            self.release(raw);
        }
    }

    /// Drops every task; their operations in flight become orphans.
    pub(super) fn clear(&self) {
        loop {
            let mut slots = self.slots.borrow_mut();
            let Some(index) = slots.iter().next().map(|(index, _)| index) else { break };
            let raw = slots.remove(index).raw;
            drop(slots);
            self.release(raw);
        }
        self.guest.borrow_mut().clear();
        self.background.borrow_mut().clear();
    }
}

/// The right to a task's output; dropping it lets the task run on alone.
pub struct JoinHandle<T> {
    core: Core,
    id: TaskId,
    taken: bool,
    output: PhantomData<T>,
}

impl<T> JoinHandle<T> {
    pub(super) fn new(core: Core, id: TaskId) -> Self {
        Self { core, id, taken: false, output: PhantomData }
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<T> {
        match self.core.tasks().join(self.id) {
            Some(output) => {
                self.taken = true;
                Poll::Ready(output)
            }
            None => Poll::Pending,
        }
    }
}

impl<T> Unpin for JoinHandle<T> {}

impl<T> Drop for JoinHandle<T> {
    fn drop(&mut self) {
        if !self.taken {
            self.core.tasks().detach(self.id);
        }
    }
}

impl<T> std::fmt::Debug for JoinHandle<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JoinHandle({})", self.id.index)
    }
}
