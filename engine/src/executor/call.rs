//! Calls between threads: a closure travels to a core, its output comes back.
//!
//! The future of the answer is runtime-neutral: any executor can await it, or a thread can block.

use std::future::Future;
use std::mem::ManuallyDrop;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, RawWaker, RawWakerVTable, Wake, Waker};

use super::core::Core;
use super::mailbox::{Mailbox, Message};
use super::task::{Class, TaskId};

struct Shared<R> {
    state: Mutex<State<R>>,
    arrived: Condvar,
}

struct State<R> {
    output: Option<R>,
    waker: Option<Waker>,
    /// The sender is gone without an answer (its engine stopped).
    closed: bool,
}

/// The answer of a call to another core, when it comes.
///
/// Dropping it does not stop the call.
#[must_use = "the call runs anyway; await the answer or drop it on purpose"]
pub struct RemoteCall<R>(Arc<Shared<R>>);

/// Delivers the output; dropped without one, it closes the call.
struct Answer<R>(Arc<Shared<R>>);

impl<R> Answer<R> {
    fn send(self, output: R) {
        self.lock().output = Some(output);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State<R>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<R> Drop for Answer<R> {
    fn drop(&mut self) {
        let waker = {
            let mut state = self.lock();
            state.closed = true;
            state.waker.take()
        };
        self.0.arrived.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

pub(super) fn remote_call<R, Fut>(
    mailbox: &Arc<Mailbox>,
    f: impl FnOnce(Core) -> Fut + Send + 'static,
) -> RemoteCall<R>
where
    R: Send + 'static,
    Fut: Future<Output = R> + 'static,
{
    let state = Mutex::new(State { output: None, waker: None, closed: false });
    let shared = Arc::new(Shared { state, arrived: Condvar::new() });
    let answer = Answer(Arc::clone(&shared));
    mailbox.push(Message::Call(Box::new(move |core: &Core| {
        let task = f(core.clone());
        drop(core.spawn(Class::Guest, async move { answer.send(task.await) }));
    })));
    RemoteCall(shared)
}

impl<R> RemoteCall<R> {
    /// Blocks this thread (never a core) until the answer is there; `None` if the engine stopped.
    pub fn wait(self) -> Option<R> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(output) = state.output.take() {
                return Some(output);
            }
            if state.closed {
                return None;
            }
            state = self.0.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<R> Future for RemoteCall<R> {
    /// `None` if the engine stopped before it answered.
    type Output = Option<R>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<R>> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(output) = state.output.take() {
            return Poll::Ready(Some(output));
        }
        if state.closed {
            return Poll::Ready(None);
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl<R> std::fmt::Debug for RemoteCall<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RemoteCall")
    }
}

/// The ordinary waker of a task, for futures from outside: owned, `Send`, through the mailbox.
struct TaskWaker {
    mailbox: Arc<Mailbox>,
    task: TaskId,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.mailbox.push(Message::Wake(self.task));
    }
}

struct Target<'a> {
    mailbox: &'a Arc<Mailbox>,
    task: TaskId,
}

/// Runs `poll` with the waker of `task`.
pub(super) fn with_task_waker<R>(
    mailbox: &Arc<Mailbox>,
    task: TaskId,
    poll: impl FnOnce(&Waker) -> R,
) -> R {
    let target = Target { mailbox, task };
    let raw = RawWaker::new((&raw const target).cast(), &BORROWED);
    // SAFETY: the vtable treats the data as a borrowed Target; `target` outlives the waker, which
    // is not dropped (a borrowed waker owns nothing) and not moved out of this function.
    let waker = ManuallyDrop::new(unsafe { Waker::from_raw(raw) });
    poll(&waker)
}

const BORROWED: RawWakerVTable = RawWakerVTable::new(
    clone_borrowed,
    wake_borrowed,
    wake_borrowed,
    // A borrowed waker owns nothing.
    |_| {},
);

/// # Safety
/// `data` points to the [`Target`] of a running `with_task_waker`.
unsafe fn clone_borrowed(data: *const ()) -> RawWaker {
    // SAFETY: made by `with_task_waker`, whose target is alive during the poll.
    let target = unsafe { &*data.cast::<Target<'_>>() };
    let waker = TaskWaker { mailbox: Arc::clone(target.mailbox), task: target.task };
    let owned = ManuallyDrop::new(Waker::from(Arc::new(waker)));
    RawWaker::new(owned.data(), owned.vtable())
}

/// # Safety
/// `data` points to the [`Target`] of a running `with_task_waker`.
unsafe fn wake_borrowed(data: *const ()) {
    // SAFETY: as in `clone_borrowed`.
    let target = unsafe { &*data.cast::<Target<'_>>() };
    target.mailbox.push(Message::Wake(target.task));
}
