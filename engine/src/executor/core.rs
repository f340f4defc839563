//! One core: its loop and what tasks on it may use.
//!
//! Order of a turn: (1) mailbox; (2) timers; (3) ready tasks, guest class first, within a budget;
//! (4) one driver turn: submit everything queued, sleep if there is nothing to do, reap all.

use std::any::{Any, TypeId};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Context;

use super::call::{RemoteCall, remote_call, with_task_waker};
use super::mailbox::{Mailbox, Message};
use super::op::{Completed, Op, Ops, discard};
use super::task::{Class, JoinHandle, Tasks};
use super::timer::{Sleep, Timers};
use crate::buf::Pool;
use crate::driver::{Done, Driver, DriverCounters, Nanos, OpKind, Wait, WorkItem};
use crate::limits::{TURN_BACKGROUND_TASKS, TURN_TASKS};

/// Index of a core of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CoreId(pub u32);

/// A handle to the core that the caller runs on. Cheap to clone, `!Send`.
#[derive(Clone)]
pub struct Core(Rc<Inner>);

struct Inner {
    id: CoreId,
    driver: RefCell<Box<dyn Driver>>,
    ops: RefCell<Ops>,
    tasks: Tasks,
    timers: Timers,
    pool: Pool,
    mailboxes: Arc<[Arc<Mailbox>]>,
    done: RefCell<Vec<Done>>,
    extensions: RefCell<BTreeMap<TypeId, Rc<dyn Any>>>,
    stopping: Cell<bool>,
}

impl Core {
    pub(crate) fn new(id: CoreId, driver: Box<dyn Driver>, mailboxes: Arc<[Arc<Mailbox>]>) -> Self {
        Self::with_pool(id, driver, mailboxes, Pool::new())
    }

    /// A core whose buffers come from `pool`, which was another core's before.
    pub(crate) fn with_pool(
        id: CoreId,
        driver: Box<dyn Driver>,
        mailboxes: Arc<[Arc<Mailbox>]>,
        pool: Pool,
    ) -> Self {
        Self(Rc::new(Inner {
            id,
            driver: RefCell::new(driver),
            ops: RefCell::default(),
            tasks: Tasks::default(),
            timers: Timers::default(),
            pool,
            mailboxes,
            done: RefCell::default(),
            extensions: RefCell::default(),
            stopping: Cell::new(false),
        }))
    }

    /// This core's index.
    pub fn id(&self) -> CoreId {
        self.0.id
    }

    /// How many cores the engine has.
    pub fn core_count(&self) -> u32 {
        u32::try_from(self.0.mailboxes.len()).expect("invariant: few cores")
    }

    /// Runs `future` as a task of its own; it runs to its end also when the handle is dropped.
    pub fn spawn<F>(&self, class: Class, future: F) -> JoinHandle<F::Output>
    where
        F: Future + 'static,
    {
        JoinHandle::new(self.clone(), self.0.tasks.spawn(class, future))
    }

    /// The driver's clock in nanoseconds.
    pub fn now(&self) -> Nanos {
        self.0.driver.borrow().now()
    }

    /// 64 random bits of the driver.
    pub fn random(&self) -> u64 {
        self.0.driver.borrow_mut().random()
    }

    /// Resolves at time `at` of [`Core::now`].
    pub fn sleep_until(&self, at: Nanos) -> Sleep {
        Sleep::new(self.clone(), at)
    }

    /// Resolves `nanos` from now.
    pub fn sleep(&self, nanos: Nanos) -> Sleep {
        self.sleep_until(self.now().saturating_add(nanos))
    }

    /// This core's I/O buffers.
    pub fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// Counters of this core's driver.
    pub fn counters(&self) -> DriverCounters {
        self.0.driver.borrow().counters()
    }

    /// Operations in flight, orphans included.
    pub fn operations_in_flight(&self) -> usize {
        self.0.ops.borrow().in_flight()
    }

    /// The core's one value of type `T`, made by `make` at first use.
    pub fn extension<T: 'static>(&self, make: impl FnOnce() -> T) -> Rc<T> {
        let id = TypeId::of::<T>();
        let known = self.0.extensions.borrow().get(&id).cloned();
        let value = known.unwrap_or_else(|| {
            let value: Rc<dyn Any> = Rc::new(make());
            self.0.extensions.borrow_mut().insert(id, Rc::clone(&value));
            value
        });
        value.downcast().expect("invariant: keyed by type")
    }

    /// Runs a task made by `f` on core `to` (this one included) and resolves with its output.
    pub fn call<R, Fut>(
        &self,
        to: CoreId,
        f: impl FnOnce(Core) -> Fut + Send + 'static,
    ) -> RemoteCall<R>
    where
        R: Send + 'static,
        Fut: Future<Output = R> + 'static,
    {
        let mailbox = self.0.mailboxes.get(to.0 as usize).expect("invariant: known core");
        remote_call(mailbox, f)
    }

    /// Runs `work` on a thread of the blocking pool; for CPU-heavy work and calls that block.
    pub async fn work<R: Send + 'static>(&self, work: impl FnOnce() -> R + Send + 'static) -> R {
        let result: Arc<std::sync::Mutex<Option<R>>> = Arc::default();
        let slot = Arc::clone(&result);
        let run = move || {
            *slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(work());
        };
        self.submit(OpKind::Work(WorkItem(Some(Box::new(run))))).await;
        let mut slot = result.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        slot.take().expect("invariant: the pool ran the work")
    }

    /// Starts an operation.
    pub(crate) fn submit(&self, kind: OpKind) -> Op {
        let mut ops = self.0.ops.borrow_mut();
        let (token, slot) = ops.insert(kind);
        self.0.driver.borrow_mut().submit(token, slot);
        drop(ops);
        Op::new(self.clone(), token)
    }

    pub(super) fn ops(&self) -> &RefCell<Ops> {
        &self.0.ops
    }

    pub(crate) fn tasks(&self) -> &Tasks {
        &self.0.tasks
    }

    pub(super) fn timers(&self) -> &Timers {
        &self.0.timers
    }

    pub(crate) fn mailbox(&self) -> &Arc<Mailbox> {
        &self.0.mailboxes[self.0.id.0 as usize]
    }

    /// Whether tasks or messages wait to be looked at.
    pub(crate) fn has_work(&self) -> bool {
        self.0.tasks.has_ready() || !self.mailbox().is_empty()
    }

    /// When the next timer fires.
    pub(crate) fn next_timer(&self) -> Option<Nanos> {
        self.0.timers.next()
    }

    /// One loop turn; sleeps only if `may_sleep` and there is nothing to do.
    pub(crate) fn turn(&self, may_sleep: bool) {
        self.read_mailbox();
        let now = self.now();
        while let Some(task) = self.0.timers.due(now) {
            self.0.tasks.wake(task);
        }
        self.run_ready();
        let wait = if self.0.tasks.has_ready() || !may_sleep || self.0.stopping.get() {
            Wait::No
        } else {
            Wait::Until(self.next_timer())
        };
        let parked = wait != Wait::No && self.mailbox().park();
        let wait = if parked { wait } else { Wait::No };
        let mut done = self.0.done.take();
        self.0.driver.borrow_mut().turn(wait, &mut done);
        self.mailbox().unpark();
        for completion in done.drain(..) {
            self.complete(completion);
        }
        self.0.done.replace(done);
    }

    fn run_ready(&self) {
        let mut background = TURN_BACKGROUND_TASKS;
        for _ in 0..TURN_TASKS {
            let Some(task) = self.0.tasks.next(&mut background) else { break };
            with_task_waker(self.mailbox(), task, |waker| {
                self.0.tasks.run(task, &mut Context::from_waker(waker));
            });
        }
    }

    fn read_mailbox(&self) {
        while let Some(message) = self.mailbox().pop() {
            match message {
                Message::Wake(task) => self.0.tasks.wake(task),
                Message::Call(call) => call(self),
                Message::Stop => self.0.stopping.set(true),
                Message::WorkDone { token, result, outcome } => {
                    if let Some(slot) = self.0.ops.borrow_mut().get(token) {
                        slot.outcome = outcome.0;
                    }
                    self.complete(Done { token, result });
                }
            }
        }
    }

    fn complete(&self, done: Done) {
        let completed = self.0.ops.borrow_mut().complete(done.token, done.result);
        match completed {
            Completed::Wake(task) => self.0.tasks.wake(task),
            Completed::Orphan(kind, outcome, result) => discard(kind, outcome, result),
            Completed::Nobody => {}
        }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.0.stopping.get()
    }

    /// Drops all tasks and extensions, then waits until no operation is in flight.
    pub(crate) fn drain(&self) {
        self.0.tasks.clear();
        let extensions = self.0.extensions.take();
        drop(extensions);
        while self.operations_in_flight() > 0 {
            self.0.tasks.clear();
            let mut done = self.0.done.take();
            // Only who is parked is woken: the end of a worker's operation comes by message.
            let wait = if self.mailbox().park() { Wait::Until(None) } else { Wait::No };
            self.0.driver.borrow_mut().turn(wait, &mut done);
            self.mailbox().unpark();
            for completion in done.drain(..) {
                self.complete(completion);
            }
            self.0.done.replace(done);
            self.read_mailbox();
        }
    }
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Core({})", self.0.id.0)
    }
}
