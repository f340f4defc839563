//! Bugs that tests of the tests put in on purpose, one per core; only with the feature
//! `planted-bugs`, which no product build has.
//!
//! Each is a rule of this project left out at the one place that keeps it. A model test that does
//! not find them proves nothing.

use std::cell::Cell;

use crate::executor::Core;

/// A rule that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// qcow2 writes the mapping without the barrier after the data and the refcounts.
    FlushLeftOut,
    /// The copy loop clears dirty bits after it has read.
    BitClearedAfterRead,
    /// A write gives its range up before its data has landed.
    ClaimReleasedEarly,
    /// qcow2 takes a freed cluster before its unlink is durable and while it is still read.
    FreedReusedAtOnce,
    /// What is zeroed or discarded is not recorded in the dirty bitmaps.
    ZeroesUnrecorded,
}

#[derive(Default)]
struct Slot(Cell<Option<Planted>>);

/// Leaves a rule out on `core` from now on, for images opened from now on.
pub fn plant(core: &Core, bug: Planted) {
    core.extension(Slot::default).0.set(Some(bug));
}

/// Whether `bug` was planted on `core`.
pub fn has(core: &Core, bug: Planted) -> bool {
    core.extension(Slot::default).0.get() == Some(bug)
}
