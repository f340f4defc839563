//! Waiting for each other on one core: notification, mutual exclusion, permits, a queue, select.
//!
//! All types are `!Send` and cost no allocation beyond the lists of waiters, whose capacity stays.
//! A waiter that goes away leaves at most a needless wake-up behind.

use std::cell::{Cell, RefCell, RefMut};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::core::Core;
use super::task::TaskId;

/// Tasks to be woken, in order of arrival.
#[derive(Default)]
struct Waiters(RefCell<Vec<TaskId>>);

impl Waiters {
    fn register(&self, core: &Core) {
        let task = core.tasks().current();
        let mut waiters = self.0.borrow_mut();
        if !waiters.contains(&task) {
            waiters.push(task);
        }
    }

    fn wake_all(&self, core: &Core) {
        for task in self.0.borrow_mut().drain(..) {
            core.tasks().wake(task);
        }
    }
}

/// Wakes everybody who waits, whenever something changed.
pub struct Notify {
    core: Core,
    waiters: Waiters,
    epoch: Cell<u64>,
}

impl Notify {
    /// Nobody waits yet.
    pub fn new(core: &Core) -> Self {
        Self { core: core.clone(), waiters: Waiters::default(), epoch: Cell::new(0) }
    }

    /// Wakes all that wait now.
    pub fn notify_all(&self) {
        self.epoch.set(self.epoch.get() + 1);
        self.waiters.wake_all(&self.core);
    }

    /// Resolves at the next `notify_all` after this call (not after the first poll).
    pub fn wait(&self) -> Notified<'_> {
        Notified { notify: self, epoch: self.epoch.get() }
    }

    /// Resolves as soon as `condition` holds; it is looked at now and after each notification.
    pub async fn until(&self, mut condition: impl FnMut() -> bool) {
        loop {
            let changed = self.wait();
            if condition() {
                return;
            }
            changed.await;
        }
    }
}

impl std::fmt::Debug for Notify {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Notify({})", self.epoch.get())
    }
}

/// Future of [`Notify::wait`].
#[must_use = "nothing waits unless awaited"]
#[derive(Debug)]
pub struct Notified<'a> {
    notify: &'a Notify,
    epoch: u64,
}

impl Future for Notified<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        if self.notify.epoch.get() != self.epoch {
            return Poll::Ready(());
        }
        self.notify.waiters.register(&self.notify.core);
        Poll::Pending
    }
}

/// A value that one task at a time may hold across awaits.
pub struct Mutex<T> {
    value: RefCell<T>,
    held: Cell<bool>,
    freed: Notify,
}

impl<T> Mutex<T> {
    /// A free mutex.
    pub fn new(core: &Core, value: T) -> Self {
        Self { value: RefCell::new(value), held: Cell::new(false), freed: Notify::new(core) }
    }

    /// Waits for the mutex.
    pub async fn lock(&self) -> MutexGuard<'_, T> {
        self.freed.until(|| !self.held.replace(true)).await;
        MutexGuard { mutex: self }
    }
}

impl<T> std::fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mutex(held: {})", self.held.get())
    }
}

/// The right to a [`Mutex`]'s value.
#[derive(Debug)]
pub struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
}

impl<T> MutexGuard<'_, T> {
    /// The value; do not keep the borrow across an await.
    pub fn get(&self) -> RefMut<'_, T> {
        self.mutex.value.borrow_mut()
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        self.mutex.held.set(false);
        self.mutex.freed.notify_all();
    }
}

/// Counted permits, for windows and memory budgets; waiters are served in order.
pub struct Semaphore {
    free: Cell<u64>,
    queue: RefCell<VecDeque<u64>>,
    next_ticket: Cell<u64>,
    changed: Notify,
}

impl Semaphore {
    /// A semaphore with `permits` free permits.
    pub fn new(core: &Core, permits: u64) -> Self {
        Self {
            free: Cell::new(permits),
            queue: RefCell::default(),
            next_ticket: Cell::new(0),
            changed: Notify::new(core),
        }
    }

    /// Takes `count` permits when it is this caller's turn and they are free.
    pub async fn acquire(&self, count: u64) {
        if self.queue.borrow().is_empty() && self.try_acquire(count) {
            return;
        }
        let turn = Turn::new(self);
        self.changed.until(|| turn.is_first() && self.try_acquire(count)).await;
    }

    /// Takes `count` permits if they are free now.
    pub fn try_acquire(&self, count: u64) -> bool {
        let free = self.free.get();
        if free < count {
            return false;
        }
        self.free.set(free - count);
        true
    }

    /// Gives `count` permits back.
    pub fn release(&self, count: u64) {
        self.free.set(self.free.get() + count);
        self.changed.notify_all();
    }

    /// Permits that are free now.
    pub fn free(&self) -> u64 {
        self.free.get()
    }
}

impl std::fmt::Debug for Semaphore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Semaphore({} free)", self.free.get())
    }
}

/// A place in the queue of a semaphore, left on drop.
struct Turn<'a> {
    semaphore: &'a Semaphore,
    ticket: u64,
}

impl<'a> Turn<'a> {
    fn new(semaphore: &'a Semaphore) -> Self {
        let ticket = semaphore.next_ticket.get();
        semaphore.next_ticket.set(ticket + 1);
        semaphore.queue.borrow_mut().push_back(ticket);
        Self { semaphore, ticket }
    }

    fn is_first(&self) -> bool {
        self.semaphore.queue.borrow().front() == Some(&self.ticket)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.semaphore.queue.borrow_mut().retain(|ticket| *ticket != self.ticket);
        self.semaphore.changed.notify_all();
    }
}

/// A bounded queue between tasks of one core.
pub struct Channel<T> {
    items: RefCell<VecDeque<T>>,
    capacity: usize,
    closed: Cell<bool>,
    changed: Notify,
}

impl<T> Channel<T> {
    /// An empty queue for at most `capacity` items.
    pub fn new(core: &Core, capacity: usize) -> Self {
        Self {
            items: RefCell::default(),
            capacity,
            closed: Cell::new(false),
            changed: Notify::new(core),
        }
    }

    /// Adds an item when there is room; gives it back if the queue is closed.
    ///
    /// # Errors
    /// The item, if the queue was closed.
    pub async fn send(&self, item: T) -> Result<(), T> {
        self.changed.until(|| self.closed.get() || self.items.borrow().len() < self.capacity).await;
        if self.closed.get() {
            return Err(item);
        }
        self.items.borrow_mut().push_back(item);
        self.changed.notify_all();
        Ok(())
    }

    /// The next item; `None` when the queue is closed and empty.
    pub async fn receive(&self) -> Option<T> {
        let mut item = None;
        self.changed
            .until(|| {
                item = self.items.borrow_mut().pop_front();
                item.is_some() || self.closed.get()
            })
            .await;
        if item.is_some() {
            self.changed.notify_all();
        }
        item
    }

    /// The next item if one is there now.
    pub fn try_receive(&self) -> Option<T> {
        let item = self.items.borrow_mut().pop_front();
        if item.is_some() {
            self.changed.notify_all();
        }
        item
    }

    /// No more items; what is queued can still be received.
    pub fn close(&self) {
        self.closed.set(true);
        self.changed.notify_all();
    }
}

impl<T> std::fmt::Debug for Channel<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Channel({} items)", self.items.borrow().len())
    }
}

/// What [`select`] saw first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Either<A, B> {
    /// The first future ended.
    First(A),
    /// The second future ended.
    Second(B),
}

/// Resolves with the first future to end (the first argument if both have); the other is dropped.
pub async fn select<A: Future, B: Future>(first: A, second: B) -> Either<A::Output, B::Output> {
    let mut first = std::pin::pin!(first);
    let mut second = std::pin::pin!(second);
    std::future::poll_fn(move |context| {
        if let Poll::Ready(output) = first.as_mut().poll(context) {
            return Poll::Ready(Either::First(output));
        }
        second.as_mut().poll(context).map(Either::Second)
    })
    .await
}
