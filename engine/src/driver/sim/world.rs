//! A simulated world: cores, their kernel, and the loop that decides whose turn it is.
//!
//! Order rules: (1) what is due happens before a core runs; (2) any core with something to do may
//! be next, whatever it waits for; (3) time jumps to the next event or timer only when no core has
//! anything to do; when there is none either, the world is dead and says so.

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;

use super::config::{FaultRule, OpFilter, SimConfig};
use super::driver::SimDriver;
use super::fs::SimFs;
use super::hold::{Hold, HoldPoint, HoldState};
use super::kernel::{Kernel, Rule};
use crate::buf::Pool;
use crate::driver::Nanos;
use crate::executor::{Class, Core, CoreId, Handle, Mailbox, RemoteCall};

/// A world in which one thread plays all cores.
pub struct Sim {
    cores: Vec<Core>,
    kernel: Rc<RefCell<Kernel>>,
    mailboxes: Arc<[Arc<Mailbox>]>,
    seed: u64,
    steps: u64,
    steps_max: u64,
}

impl Sim {
    /// A world with an empty file system.
    pub fn new(config: SimConfig) -> Self {
        let fs = SimFs::new(config.fs.clone());
        Self::with_fs(config, fs)
    }

    /// A world on `fs`, for instance on what a power cut left.
    pub fn with_fs(config: SimConfig, fs: SimFs) -> Self {
        Self::with_pool(config, fs, Pool::new())
    }

    /// A world on `fs` whose first core takes its buffers from `pool`, that of an earlier world:
    /// memory is not fresh then, which is cheaper, and new buffers hold what others left in them.
    pub fn with_pool(config: SimConfig, fs: SimFs, pool: Pool) -> Self {
        let mailboxes: Arc<[Arc<Mailbox>]> =
            (0..config.cores.max(1)).map(|_| Arc::new(Mailbox::new(None))).collect();
        let (seed, steps_max) = (config.seed, config.steps_max);
        let kernel = Rc::new(RefCell::new(Kernel::new(config, fs, Arc::clone(&mailboxes))));
        let core = |index: usize| {
            let id = CoreId(u32::try_from(index).expect("invariant: few cores"));
            let driver = Box::new(SimDriver::new(index, &kernel));
            let pool = if index == 0 { pool.clone() } else { Pool::new() };
            Core::with_pool(id, driver, Arc::clone(&mailboxes), pool)
        };
        let cores = (0..mailboxes.len()).map(core).collect();
        Self { cores, kernel, mailboxes, seed, steps: 0, steps_max }
    }

    /// Runs the world until the task that `make` gives core `core` has ended.
    ///
    /// # Panics
    /// If nothing can make progress any more; the message names seed and operations in flight.
    pub fn block_on<F: Future + 'static>(
        &mut self,
        core: u32,
        make: impl FnOnce(Core) -> F,
    ) -> F::Output
    where
        F::Output: 'static,
    {
        let output = Rc::new(RefCell::new(None));
        let slot = Rc::clone(&output);
        let core = self.core(core);
        let future = make(core.clone());
        drop(core.spawn(Class::Guest, async move {
            let value = future.await;
            slot.replace(Some(value));
        }));
        self.run_until(|| output.borrow().is_some());
        output.take().expect("invariant: just seen")
    }

    /// Runs the world until the answer of a call is there; `None` if its core was stopped.
    pub fn wait<R: Send + 'static>(&mut self, call: RemoteCall<R>) -> Option<R> {
        self.block_on(0, |_| call)
    }

    /// Runs the world until `condition` holds.
    ///
    /// # Panics
    /// As [`Sim::block_on`].
    pub fn run_until(&mut self, mut condition: impl FnMut() -> bool) {
        while !condition() {
            if !self.step(Nanos::MAX) {
                panic!("{}", self.report("nothing can make progress"));
            }
        }
    }

    /// Runs the world for a time.
    pub fn run_for(&mut self, nanos: Nanos) {
        let end = self.now().saturating_add(nanos);
        while self.now() < end && self.step(end) {}
        let mut kernel = self.kernel.borrow_mut();
        kernel.now = kernel.now.max(end);
    }

    /// Runs at most `steps` steps (turns of cores and jumps of time); false if nothing is left to
    /// happen.
    pub fn run_steps(&mut self, steps: u64) -> bool {
        (0..steps).all(|_| self.step(Nanos::MAX))
    }

    /// Runs until nothing is left to happen, but for what holds keep.
    pub fn run_idle(&mut self) {
        while self.step(Nanos::MAX) {}
    }

    /// A handle to core `core`, for spawning tasks that run along.
    ///
    /// # Panics
    /// If there is no such core.
    pub fn core(&self, core: u32) -> Core {
        self.cores[core as usize].clone()
    }

    /// The way in from outside, as of a real engine. Its answers come while the world runs.
    pub fn handle(&self) -> Handle {
        Handle::new(Arc::clone(&self.mailboxes))
    }

    /// The file system.
    pub fn fs(&self) -> SimFs {
        self.kernel.borrow().fs.clone()
    }

    /// Simulated time in nanoseconds.
    pub fn now(&self) -> Nanos {
        self.kernel.borrow().now
    }

    /// The seed of this world.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Steps done so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Operations between submission and completion.
    pub fn in_flight(&self) -> usize {
        self.kernel.borrow().in_flight()
    }

    /// Hash of all decisions, completions and their bytes: equal for equal seeds and programs.
    pub fn trace_hash(&self) -> u64 {
        self.kernel.borrow().trace.value()
    }

    /// Keeps back all operations submitted from now on that match.
    pub fn hold(&self, filter: OpFilter, point: HoldPoint) -> Hold {
        self.hold_some(filter, point, usize::MAX)
    }

    /// Keeps back the next `count` operations that match.
    pub fn hold_some(&self, filter: OpFilter, point: HoldPoint, count: usize) -> Hold {
        let state = HoldState { filter, point, left: count, skip: 0, ops: Vec::new() };
        Hold::new(&self.kernel, state)
    }

    /// Keeps back one operation that matches, after `skip` others.
    pub fn hold_nth(&self, filter: OpFilter, point: HoldPoint, skip: u64) -> Hold {
        let state = HoldState { filter, point, left: 1, skip, ops: Vec::new() };
        Hold::new(&self.kernel, state)
    }

    /// Makes operations fail.
    pub fn inject(&self, rule: FaultRule) {
        self.kernel.borrow_mut().rules.push(Rule { rule, seen: 0 });
    }

    /// How many operations the injected failures have hit so far.
    pub fn faults(&self) -> u64 {
        let kernel = self.kernel.borrow();
        let hits = kernel.rules.iter().map(|Rule { rule, seen }| {
            let hits = seen.saturating_sub(rule.after);
            rule.times.map_or(hits, |times| hits.min(times))
        });
        hits.sum()
    }

    /// Ends all injected failures.
    pub fn clear_faults(&self) {
        self.kernel.borrow_mut().rules.clear();
    }

    /// Cuts the power now: what survives. Tasks are dropped where they stand.
    #[must_use]
    pub fn crash(self) -> SimFs {
        let seed = self.kernel.borrow_mut().rng.bits();
        self.fs().after_power_cut(seed)
    }

    /// Kills the process now; the machine lives, so every byte written so far survives.
    #[must_use]
    pub fn kill(self) -> SimFs {
        self.fs().after_kill()
    }

    /// One step, not beyond time `end`; false if nothing is left to happen until then.
    fn step(&mut self, end: Nanos) -> bool {
        self.steps += 1;
        if self.steps > self.steps_max {
            panic!("{}", self.report("the world runs for ever"));
        }
        self.kernel.borrow_mut().run_due();
        let now = self.now();
        let runnable = |index: &usize| {
            let core = &self.cores[*index];
            core.has_work()
                || core.next_timer().is_some_and(|at| at <= now)
                || self.kernel.borrow().has_ready(*index)
        };
        let count = (0..self.cores.len()).filter(runnable).count();
        if count == 0 {
            return self.jump(end);
        }
        let choice = self.kernel.borrow_mut().rng.index(count);
        let index = (0..self.cores.len()).filter(runnable).nth(choice);
        let index = index.expect("invariant: counted above");
        self.kernel.borrow_mut().trace.word(index as u64);
        self.cores[index].turn(false);
        let mut kernel = self.kernel.borrow_mut();
        kernel.now += kernel.rng.between(100, 1000);
        true
    }

    /// Lets time pass until something can happen.
    fn jump(&self, end: Nanos) -> bool {
        let timers = self.cores.iter().filter_map(Core::next_timer);
        let mut kernel = self.kernel.borrow_mut();
        let next = timers.chain(kernel.next_event()).min();
        let Some(next) = next.filter(|next| *next <= end) else { return false };
        kernel.now = kernel.now.max(next);
        true
    }

    fn report(&self, what: &str) -> String {
        let kernel = self.kernel.borrow();
        format!(
            "seed {}: {what} at {} ns after {} steps; in flight:{}",
            self.seed,
            kernel.now,
            self.steps,
            kernel.describe_flights()
        )
    }

    /// Drops every task without running it; operations in flight have no further effect.
    fn stop(&mut self) {
        let flights = self.kernel.borrow_mut().cut();
        drop(flights);
        // Tasks that are dropped may tell other cores; what they say is dropped too.
        for _ in 0..2 {
            for (core, mailbox) in self.cores.iter().zip(self.mailboxes.iter()) {
                while let Some(message) = mailbox.pop() {
                    drop(message);
                }
                core.drain();
            }
        }
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        // While panicking, tasks may be borrowed half-way: leaking them is the safe end.
        if !std::thread::panicking() {
            self.stop();
        }
    }
}

impl std::fmt::Debug for Sim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sim(seed {}, {} cores)", self.seed, self.cores.len())
    }
}
