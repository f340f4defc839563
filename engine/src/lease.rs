//! Leases on an image's epoch: what a resolve handed out stays valid until its lease is dropped.
//!
//! A format resolves guest addresses to host addresses; the request then reads or writes there,
//! later. A cluster freed in between must not be reused (or punched) under that request.
//!
//! Order rule: (1) unlink the cluster from the mapping and make that durable; (2) `retire` the
//! current epoch; (3) reuse the cluster only when `quiesced(epoch)` is true. A lease taken after
//! (1) cannot have seen the old mapping, a lease taken before belongs to that epoch or an older
//! one.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

/// The epochs of one image on its home core.
#[derive(Default)]
pub struct Epochs {
    current: Cell<u64>,
    /// Called when an epoch before the current one has lost its last lease.
    wake: RefCell<Option<Rc<dyn Fn()>>>,
    /// Live leases per epoch, oldest first; the last entry is the current epoch.
    live: RefCell<VecDeque<u64>>,
}

/// Keeps everything that was resolved under it allocated.
#[derive(Debug)]
#[must_use = "dropping the lease allows reuse of what was resolved under it"]
pub struct Lease {
    epochs: Rc<Epochs>,
    epoch: u64,
}

impl Epochs {
    /// Epochs of an image that nobody uses yet.
    pub fn new() -> Rc<Self> {
        let epochs = Self::default();
        epochs.live.borrow_mut().push_back(0);
        Rc::new(epochs)
    }

    /// Has `wake` called whenever an epoch that was retired loses its last lease; replaces what was
    /// set before.
    pub fn on_quiesced(&self, wake: impl Fn() + 'static) {
        *self.wake.borrow_mut() = Some(Rc::new(wake));
    }

    /// A lease on the current epoch.
    pub fn lease(self: &Rc<Self>) -> Lease {
        if let Some(count) = self.live.borrow_mut().back_mut() {
            *count += 1;
        }
        Lease { epochs: Rc::clone(self), epoch: self.current.get() }
    }

    /// Ends the current epoch and returns it: leases taken from now on belong to the next one.
    pub fn retire(&self) -> u64 {
        let ended = self.current.get();
        let mut live = self.live.borrow_mut();
        while live.len() > 1 && live.front() == Some(&0) {
            live.pop_front();
        }
        self.current.set(ended + 1);
        live.push_back(0);
        ended
    }

    /// Whether no lease of `epoch` or an older one is alive.
    pub fn quiesced(&self, epoch: u64) -> bool {
        let live = self.live.borrow();
        let oldest = self.current.get() + 1 - live.len() as u64;
        live.iter().zip(oldest..).take_while(|(_, e)| *e <= epoch).all(|(count, _)| *count == 0)
    }

    fn release(&self, epoch: u64) {
        let mut live = self.live.borrow_mut();
        let oldest = self.current.get() + 1 - live.len() as u64;
        let index = usize::try_from(epoch - oldest).expect("invariant: epoch is live");
        let count = live.get_mut(index).expect("invariant: epoch is live");
        *count -= 1;
        let ended = *count == 0 && index + 1 < live.len();
        while live.len() > 1 && live.front() == Some(&0) {
            live.pop_front();
        }
        drop(live);
        let wake = self.wake.borrow().as_ref().filter(|_| ended).cloned();
        if let Some(wake) = wake {
            wake();
        }
    }
}

impl std::fmt::Debug for Epochs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let fields = (self.current.get(), self.live.borrow().len());
        f.debug_tuple("Epochs").field(&fields).finish()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.epochs.release(self.epoch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_quiesced_only_when_its_leases_and_older_ones_are_gone() {
        let epochs = Epochs::new();
        let old = epochs.lease();
        let first = epochs.retire();
        let young = epochs.lease();
        let second = epochs.retire();
        assert!(!epochs.quiesced(first));
        assert!(!epochs.quiesced(second));
        drop(young);
        assert!(!epochs.quiesced(second), "the older lease still counts");
        let woken = Rc::new(Cell::new(0));
        let count = Rc::clone(&woken);
        epochs.on_quiesced(move || count.set(count.get() + 1));
        drop(epochs.lease());
        assert_eq!(woken.get(), 0, "the current epoch goes on");
        drop(old);
        assert_eq!(woken.get(), 1);
        assert!(epochs.quiesced(first) && epochs.quiesced(second));
    }

    #[test]
    fn leases_taken_after_retirement_do_not_delay_reuse() {
        let epochs = Epochs::new();
        let ended = epochs.retire();
        let _young = epochs.lease();
        assert!(epochs.quiesced(ended));
    }
}
