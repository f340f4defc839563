//! The gate of a node: where requests of external origin wait while a cut runs.
//!
//! States: open (requests pass and are counted), closed (they wait). Closing is counted, so two
//! reasons to drain nest. A request that passed is in flight until its pass is dropped.

use std::cell::Cell;
use std::rc::Rc;

use crate::executor::Core;
use crate::executor::sync::Notify;

/// Counts requests in flight and holds back new ones.
#[derive(Debug)]
pub(crate) struct Gate {
    closed: Cell<u32>,
    in_flight: Cell<u32>,
    changed: Notify,
}

/// The right of one request to be in flight.
#[derive(Debug)]
pub(crate) struct Pass(Rc<Gate>);

impl Gate {
    pub(crate) fn new(core: &Core) -> Rc<Self> {
        let changed = Notify::new(core);
        Rc::new(Self { closed: Cell::new(0), in_flight: Cell::new(0), changed })
    }

    /// A pass, if the gate is open.
    pub(crate) fn try_pass(self: &Rc<Self>) -> Option<Pass> {
        if self.closed.get() > 0 {
            return None;
        }
        self.in_flight.set(self.in_flight.get() + 1);
        Some(Pass(Rc::clone(self)))
    }

    /// Resolves when the gate is open (it may be closed again by the time the caller runs).
    pub(crate) async fn opened(&self) {
        self.changed.until(|| self.closed.get() == 0).await;
    }

    pub(crate) fn close(&self) {
        self.closed.set(self.closed.get() + 1);
    }

    pub(crate) fn open(&self) {
        self.closed.set(self.closed.get() - 1);
        if self.closed.get() == 0 {
            self.changed.notify_all();
        }
    }

    /// Requests that passed and have not ended.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.get()
    }

    /// Whether requests wait.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.get() > 0
    }

    /// Resolves when nothing is in flight.
    pub(crate) async fn idle(&self) {
        self.changed.until(|| self.in_flight.get() == 0).await;
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.in_flight.set(self.0.in_flight.get() - 1);
        if self.0.in_flight.get() == 0 {
            self.0.changed.notify_all();
        }
    }
}
