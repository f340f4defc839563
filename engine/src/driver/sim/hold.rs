//! Operations kept back by a test until it lets them go.

use std::cell::RefCell;
use std::rc::Rc;

use super::config::OpFilter;
use super::kernel::Kernel;

/// Where a held operation stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HoldPoint {
    /// Before it has any effect.
    Start,
    /// After its effect, before its completion is reported.
    Completion,
}

/// Keeps back operations that match a filter, until released or dropped.
#[must_use = "dropping a hold releases what it keeps"]
pub struct Hold {
    kernel: Rc<RefCell<Kernel>>,
    index: usize,
}

/// What the simulated kernel knows about a hold.
pub(super) struct HoldState {
    pub(super) filter: OpFilter,
    pub(super) point: HoldPoint,
    /// How many more it catches.
    pub(super) left: usize,
    /// How many pass before.
    pub(super) skip: u64,
    /// What it keeps now, oldest first.
    pub(super) ops: Vec<u64>,
}

impl Hold {
    pub(super) fn new(kernel: &Rc<RefCell<Kernel>>, state: HoldState) -> Self {
        let index = kernel.borrow_mut().add_hold(state);
        Self { kernel: Rc::clone(kernel), index }
    }

    /// How many operations it keeps now.
    pub fn held(&self) -> usize {
        self.kernel.borrow().held(self.index)
    }

    /// Lets go what it keeps; it catches nothing more.
    pub fn release(self) {}

    /// Lets the oldest operation go and keeps catching others.
    pub fn release_one(&self) {
        self.kernel.borrow_mut().release_one(self.index);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // A panic inside of the kernel may drop holds while it is borrowed; the world is over then.
        if let Ok(mut kernel) = self.kernel.try_borrow_mut() {
            kernel.release_hold(self.index);
        }
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hold({})", self.index)
    }
}
