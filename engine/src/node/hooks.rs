//! Hooks on the writes of a node: what jobs and filters add to every write, zeroing and discard.
//!
//! A hook is installed on the node that is written, inside a cut, so that no request is in flight
//! that saw only half of it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::address::GuestRange;
use crate::error::Result;
use crate::format::LocalFuture;

/// What happens around every change of a node's content.
///
/// Called by the request that holds the node claim for `range`. Implementers must not write to the
/// same node from `before_write` (the claim is held); writes to other nodes use
/// [`super::Origin::Derived`].
pub trait WriteHook {
    /// Before the data: `None` if there is nothing to do (no allocation then). An error stops the
    /// write before it had any effect and reaches the guest.
    fn before_write(&self, range: GuestRange) -> Option<LocalFuture<'static, Result<()>>>;

    /// After data and mapping, before the answer, also when the write failed half-way: everything
    /// in `range` may have changed.
    fn after_write(&self, range: GuestRange);
}

/// Names an installed hook of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HookId(u64);

type List = Rc<[(HookId, Rc<dyn WriteHook>)]>;

/// The hooks of a node, in order of installation.
pub(crate) struct Hooks {
    list: RefCell<List>,
    next: Cell<u64>,
}

impl Hooks {
    pub(crate) fn new() -> Self {
        Self { list: RefCell::new(Rc::new([])), next: Cell::new(0) }
    }

    pub(crate) fn add(&self, hook: Rc<dyn WriteHook>) -> HookId {
        let id = HookId(self.next.get());
        self.next.set(id.0 + 1);
        let mut list = self.list.borrow().to_vec();
        list.push((id, hook));
        *self.list.borrow_mut() = list.into();
        id
    }

    pub(crate) fn remove(&self, id: HookId) {
        let mut list = self.list.borrow().to_vec();
        list.retain(|(known, _)| *known != id);
        *self.list.borrow_mut() = list.into();
    }

    /// The hooks now; a request keeps the list it began with.
    pub(crate) fn current(&self) -> List {
        Rc::clone(&self.list.borrow())
    }
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hooks({})", self.list.borrow().len())
    }
}
