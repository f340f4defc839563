//! One simulated core's view of the simulated kernel.

use std::cell::RefCell;
use std::rc::Rc;

use super::kernel::Kernel;
use crate::driver::{Done, Driver, DriverCounters, Nanos, OpSlot, Token, Wait};

/// The driver of a simulated core.
pub(super) struct SimDriver {
    core: usize,
    kernel: Rc<RefCell<Kernel>>,
}

impl SimDriver {
    pub(super) fn new(core: usize, kernel: &Rc<RefCell<Kernel>>) -> Self {
        Self { core, kernel: Rc::clone(kernel) }
    }
}

impl Driver for SimDriver {
    fn submit(&mut self, token: Token, slot: &mut OpSlot) {
        self.kernel.borrow_mut().submit(self.core, token, slot);
    }

    fn turn(&mut self, wait: Wait, done: &mut Vec<Done>) {
        self.kernel.borrow_mut().turn(self.core, wait, done);
    }

    fn now(&self) -> Nanos {
        self.kernel.borrow().now
    }

    fn random(&mut self) -> u64 {
        self.kernel.borrow_mut().rng.bits()
    }

    fn counters(&self) -> DriverCounters {
        self.kernel.borrow().counters(self.core)
    }
}
