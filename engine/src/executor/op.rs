//! Operations in flight: a slab of pinned slots, and the future of one operation.
//!
//! Everything the kernel may touch is owned by the slot. Dropping an unfinished [`Op`] turns its
//! slot into an orphan that is freed by its last completion, never earlier.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use slab::Slab;

use super::core::Core;
use super::task::TaskId;
use crate::driver::{FsOutcome, OpKind, OpSlot, SideMemory, SlotState, Token};

/// The slots of a core. Boxes keep their address; spare ones are reused.
#[derive(Default)]
pub(super) struct Ops {
    // The kernel and the driver hold pointers into slots: boxed so that growth moves none.
    #[expect(clippy::vec_box, reason = "addresses of slots must be stable")]
    spare: Vec<Box<OpSlot>>,
    slots: Slab<Box<OpSlot>>,
    generation: u32,
}

impl Ops {
    pub(super) fn insert(&mut self, kind: OpKind) -> (Token, &mut OpSlot) {
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        let mut slot = self.spare.pop().unwrap_or_else(|| {
            Box::new(OpSlot {
                generation,
                kind: OpKind::Vacant,
                outcome: FsOutcome::None,
                state: SlotState::Free,
                side: SideMemory::default(),
            })
        });
        slot.generation = generation;
        slot.kind = kind;
        slot.outcome = FsOutcome::None;
        slot.state = SlotState::Inflight;
        let index = self.slots.insert(slot);
        let token = Token {
            index: u32::try_from(index).expect("invariant: fewer than 2^32 operations"),
            generation,
        };
        let slot = self.slots.get_mut(index).expect("invariant: just inserted");
        (token, slot)
    }

    pub(super) fn get(&mut self, token: Token) -> Option<&mut OpSlot> {
        let slot = self.slots.get_mut(token.index as usize)?;
        (slot.generation == token.generation).then_some(&mut **slot)
    }

    /// Frees the slot and gives back what the operation owned.
    pub(super) fn free(&mut self, token: Token) -> (OpKind, FsOutcome) {
        let mut slot = self.slots.remove(token.index as usize);
        slot.state = SlotState::Free;
        let kind = std::mem::replace(&mut slot.kind, OpKind::Vacant);
        let outcome = std::mem::replace(&mut slot.outcome, FsOutcome::None);
        self.spare.push(slot);
        (kind, outcome)
    }

    pub(super) fn in_flight(&self) -> usize {
        self.slots.len()
    }

    /// Records a completion; the task to wake, or what an orphan leaves to be dropped.
    pub(super) fn complete(&mut self, token: Token, result: i32) -> Completed {
        let Some(slot) = self.get(token) else { return Completed::Nobody };
        match slot.state {
            SlotState::Waiting(task) => {
                slot.state = SlotState::Done(result);
                Completed::Wake(task)
            }
            SlotState::Inflight => {
                slot.state = SlotState::Done(result);
                Completed::Nobody
            }
            SlotState::Orphan => {
                let (kind, outcome) = self.free(token);
                Completed::Orphan(kind, outcome, result)
            }
            SlotState::Done(_) | SlotState::Free => {
                unreachable!("invariant: one completion per operation")
            }
        }
    }
}

/// What a completion means for the executor.
pub(super) enum Completed {
    Wake(TaskId),
    Nobody,
    /// Dropped by the caller outside of the slab's borrow (buffers, descriptors).
    Orphan(OpKind, FsOutcome, i32),
}

/// Drops what a finished operation leaves that nobody wants, a new connection included.
pub(super) fn discard(kind: OpKind, outcome: FsOutcome, result: i32) {
    if matches!(kind, OpKind::Accept { .. }) && result >= 0 {
        drop(crate::net::accepted(result));
    }
    drop((kind, outcome));
}

/// An operation in flight; started when it was made.
pub(crate) struct Op {
    core: Core,
    token: Token,
    finished: bool,
}

/// What a finished operation leaves.
#[derive(Debug)]
pub(crate) struct OpDone {
    /// Non-negative result, or negative errno.
    pub(crate) result: i32,
    pub(crate) kind: OpKind,
    pub(crate) outcome: FsOutcome,
}

impl Op {
    pub(super) fn new(core: Core, token: Token) -> Self {
        Self { core, token, finished: false }
    }

    /// The token, for a later cancel.
    pub(crate) fn token(&self) -> Token {
        self.token
    }
}

impl Future for Op {
    type Output = OpDone;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<OpDone> {
        let mut ops = self.core.ops().borrow_mut();
        let slot = ops.get(self.token).expect("invariant: the slot lives until it is taken");
        if let SlotState::Done(result) = slot.state {
            let (kind, outcome) = ops.free(self.token);
            drop(ops);
            self.finished = true;
            return Poll::Ready(OpDone { result, kind, outcome });
        }
        slot.state = SlotState::Waiting(self.core.tasks().current());
        Poll::Pending
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let mut ops = self.core.ops().borrow_mut();
        let Some(slot) = ops.get(self.token) else { return };
        if let SlotState::Done(result) = slot.state {
            let (kind, outcome) = ops.free(self.token);
            drop(ops);
            discard(kind, outcome, result);
        } else {
            slot.state = SlotState::Orphan;
        }
    }
}
