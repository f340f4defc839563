//! Reads of a layer that somebody must wait for: where old content moves from a layer below to this
//! one, a read that found nothing here may still be reading the layer below.
//!
//! Only layers that are the target of such moves are watched; other reads cost one look at a flag.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use smallvec::SmallVec;

use super::object::Node;
use super::path::Path;
use crate::address::GuestRange;
use crate::executor::Core;
use crate::executor::sync::Notify;
use crate::graph::Graph;

/// The reads of one watched layer.
pub(crate) struct ReadWatch {
    next: Cell<u64>,
    reads: RefCell<Vec<(u64, GuestRange)>>,
    ended: Notify,
}

/// One read of a watched layer.
pub(crate) struct WatchedRead {
    watch: Rc<ReadWatch>,
    number: u64,
}

/// The watched layers that one read goes through.
pub(super) type WatchedReads = SmallVec<[WatchedRead; 1]>;

impl ReadWatch {
    fn new(core: &Core) -> Rc<Self> {
        let (next, reads) = (Cell::new(0), RefCell::default());
        Rc::new(Self { next, reads, ended: Notify::new(core) })
    }

    fn begin(self: &Rc<Self>, range: GuestRange) -> WatchedRead {
        let number = self.next.get();
        self.next.set(number + 1);
        self.reads.borrow_mut().push((number, range));
        WatchedRead { watch: Rc::clone(self), number }
    }
}

impl Drop for WatchedRead {
    fn drop(&mut self) {
        self.watch.reads.borrow_mut().retain(|(number, _)| *number != self.number);
        self.watch.ended.notify_all();
    }
}

impl Path {
    /// Registers a read of `range` with every watched layer.
    pub(super) fn watch_read(&self, range: GuestRange) -> WatchedReads {
        if !self.is_watched() {
            return WatchedReads::new();
        }
        let watches = self.layers().iter().filter_map(|layer| layer.state.watch());
        watches.map(|watch| watch.begin(range)).collect()
    }
}

impl Node {
    /// From now on reads of this layer can be waited for, on whatever path they come.
    pub fn watch_reads(&self) {
        if self.layer_state().watch().is_some() {
            return;
        }
        self.layer_state().set_watch(ReadWatch::new(self.core()));
        for node in Graph::of(self.core()).nodes() {
            node.path().look_for_watches();
        }
    }

    /// Whether watched reads of `range` are in flight.
    pub fn has_reads(&self, range: GuestRange) -> bool {
        let Some(watch) = self.layer_state().watch() else { return false };
        watch.reads.borrow().iter().any(|(_, read)| read.overlaps(range))
    }

    /// Resolves when the reads of `range` that have begun are over; at once if nobody watches.
    pub async fn reads_ended(&self, range: GuestRange) {
        let Some(watch) = self.layer_state().watch() else { return };
        let until = watch.next.get();
        let over = || {
            let reads = watch.reads.borrow();
            !reads.iter().any(|(number, read)| *number < until && read.overlaps(range))
        };
        watch.ended.until(over).await;
    }
}
