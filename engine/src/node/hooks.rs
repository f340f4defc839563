//! Hooks on the writes of a node: what jobs and filters add to every write, zeroing and discard.
//!
//! A hook is installed on the node that is written, inside a cut, so that no request is in flight
//! that saw only half of it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use smallvec::SmallVec;

use crate::address::GuestRange;
use crate::buf::Buf;
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

    /// The data of `range` is about to go to the node: what runs beside it, started at once (a
    /// mirror's write to its target). `None`: nothing, which is right for every hook that does not
    /// look at the bytes. The bytes do not change until the copy has ended.
    fn begin_copy(
        self: Rc<Self>,
        _range: GuestRange,
        _content: WriteContent<'_>,
    ) -> Option<Box<dyn WriteCopy>> {
        None
    }

    /// The wait of a guest's write, zeroing or discard before it enters the node (a job that would
    /// never catch up with its guests), if it has to wait. Asked once per request of an attachment,
    /// before the gate, of hooks that [may](WriteHook::may_delay_guests) have it wait; requests of
    /// jobs and of other nodes never do.
    fn guest_delay(&self) -> Option<LocalFuture<'static, ()>> {
        None
    }

    /// Whether [`WriteHook::guest_delay`] ever says anything. Asked when the hook is installed, so
    /// that requests of all other nodes do not pay for it.
    fn may_delay_guests(&self) -> bool {
        false
    }

    /// Whether [`WriteHook::begin_copy`] will copy bytes: memory that a guest can still change is
    /// copied before anybody looks at it then.
    fn copies_bytes(&self) -> bool {
        false
    }
}

/// What a write brings to a node.
#[derive(Clone, Copy, Debug)]
pub enum WriteContent<'a> {
    /// These bytes.
    Bytes(&'a Buf),
    /// Zeroes; `unmap` says that space may be given back.
    Zeroes {
        /// Whether space may be given back.
        unmap: bool,
    },
    /// The guest does not need the data any more.
    Discard,
}

/// A copy of one write that runs beside its data. The request is answered after both.
///
/// Order: [`WriteCopy::ended`] resolves, the post-hooks run, then [`WriteCopy::finish`], all under
/// the node's claim. A copy whose request is gone with its engine is dropped without the last two.
pub trait WriteCopy {
    /// Resolves when the copy has ended, well or not, or is not waited for any more.
    fn ended(&self) -> LocalFuture<'_, ()>;

    /// The write to the node itself ended, `ok` or not.
    fn finish(self: Box<Self>, ok: bool);
}

/// The copies of one write.
pub(super) type Copies = SmallVec<[Box<dyn WriteCopy>; 1]>;

/// Names an installed hook of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HookId(u64);

/// The hooks that one request sees.
#[derive(Clone)]
pub(super) struct List(Rc<[(HookId, Rc<dyn WriteHook>)]>);

impl List {
    /// Runs the pre-hooks.
    pub(super) async fn before(&self, range: GuestRange) -> Result<()> {
        for (_, hook) in self.0.iter() {
            if let Some(before) = hook.before_write(range) {
                before.await?;
            }
        }
        Ok(())
    }

    /// Whether the bytes of a write are looked at twice.
    pub(super) fn copies_bytes(&self) -> bool {
        self.0.iter().any(|(_, hook)| hook.copies_bytes())
    }

    /// Starts what runs beside the data.
    pub(super) fn begin_copies(&self, range: GuestRange, content: WriteContent<'_>) -> Copies {
        let begin =
            |(_, hook): &(HookId, Rc<dyn WriteHook>)| Rc::clone(hook).begin_copy(range, content);
        self.0.iter().filter_map(begin).collect()
    }

    /// Waits for the copies, then runs the post-hooks.
    pub(super) async fn after(&self, range: GuestRange, copies: Copies, ok: bool) {
        for copy in &copies {
            copy.ended().await;
        }
        for (_, hook) in self.0.iter() {
            hook.after_write(range);
        }
        for copy in copies {
            copy.finish(ok);
        }
    }
}

/// The hooks of a node, in order of installation.
pub(crate) struct Hooks {
    list: RefCell<List>,
    next: Cell<u64>,
    /// A hook may have guests wait.
    delays: Cell<bool>,
}

impl Hooks {
    pub(crate) fn new() -> Self {
        Self { list: RefCell::new(List(Rc::new([]))), next: Cell::new(0), delays: Cell::new(false) }
    }

    pub(crate) fn add(&self, hook: Rc<dyn WriteHook>) -> HookId {
        let id = HookId(self.next.get());
        self.next.set(id.0 + 1);
        let mut list = self.list.borrow().0.to_vec();
        list.push((id, hook));
        self.set(list);
        id
    }

    pub(crate) fn remove(&self, id: HookId) {
        let mut list = self.list.borrow().0.to_vec();
        list.retain(|(known, _)| *known != id);
        self.set(list);
    }

    fn set(&self, list: Vec<(HookId, Rc<dyn WriteHook>)>) {
        self.delays.set(list.iter().any(|(_, hook)| hook.may_delay_guests()));
        *self.list.borrow_mut() = List(list.into());
    }

    /// Whether any hook may have guests wait.
    pub(super) fn may_delay_guests(&self) -> bool {
        self.delays.get()
    }

    /// Has a guest wait as long as the hooks say.
    pub(super) async fn delay_guest(&self) {
        for (_, hook) in self.current().0.iter() {
            if let Some(delay) = hook.guest_delay() {
                delay.await;
            }
        }
    }

    /// The hooks now; a request keeps the list it began with.
    pub(super) fn current(&self) -> List {
        self.list.borrow().clone()
    }
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hooks({})", self.list.borrow().0.len())
    }
}
