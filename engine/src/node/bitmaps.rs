//! The dirty bitmaps of a node, by name: what they record, who uses them, what a query shows.
//!
//! ```text
//!            hold                    freeze
//!   Open  ---------->  Busy  ------------------->  Frozen      (writes go to the successor)
//!     ^                 |                            |
//!     +--- released ----+---- reclaim / abdicate ----+
//!   Inconsistent: missed writes; can only be removed
//! ```
//! Order rules: (1) a range is recorded after its data was written and before the guest is
//! answered, also when the write failed; (2) a bitmap that is kept in the image file is marked
//! there, durably, before it is told of something that the file does not have (`bitmap_verbs`, and
//! the format before the first write); (3) it is stored when the image is closed or becomes
//! read-only, when nothing is in flight any more.
//!
//! Does not: check what users ask for (`bitmap_verbs`) or do I/O. Everything happens on the node's
//! core, and each function is one instant for requests.

use std::cell::RefCell;
use std::rc::Rc;

use super::bitmap_error::BitmapError;
use crate::address::GuestRange;
use crate::bitmap::DirtyBitmap;
use crate::format::KeptBitmap;

/// A dirty bitmap of a node.
pub struct NodeBitmap {
    name: Rc<str>,
    granularity: u64,
    state: RefCell<State>,
}

#[derive(Debug)]
struct State {
    bits: DirtyBitmap,
    enabled: bool,
    persistent: bool,
    follow: bool,
    /// Whether the file, marked or not, would be out of date without another store.
    changed: bool,
    life: Life,
}

/// See the module.
#[derive(Debug)]
enum Life {
    Open,
    Busy { by: Rc<str> },
    Frozen { by: Rc<str>, successor: DirtyBitmap },
    Inconsistent,
}

/// What a query shows of a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapFacts {
    /// Its name; none for the successor of a frozen one.
    pub name: Option<Rc<str>>,
    /// Bytes of the dirty granules.
    pub count: u64,
    /// Bytes per granule.
    pub granularity: u64,
    /// Whether writes are recorded, in it or in its successor.
    pub recording: bool,
    /// Whether a job, an export or a transaction uses it.
    pub busy: bool,
    /// Whether it is kept in the image file.
    pub persistent: bool,
    /// Whether it missed writes.
    pub inconsistent: bool,
    /// Whether it goes on at the node that takes the place of this one.
    pub follow: bool,
}

/// How a bitmap is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBitmap {
    /// Its name, 1 to 1023 bytes.
    pub name: String,
    /// Bytes per granule; the node's default if absent.
    pub granularity: Option<u64>,
    /// Whether it is kept in the image file.
    pub persistent: bool,
    /// Whether it starts without recording.
    pub disabled: bool,
    /// Whether it goes on at the node that takes the place of this one (snapshot, pivot, commit).
    pub follow: bool,
}

/// What somebody wants to do with a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapAccess {
    /// Read its bits, or start and stop it: read-only images allow it.
    Read,
    /// Change its bits.
    Change,
    /// Remove it: inconsistent ones allow it.
    Remove,
}

impl NodeBitmap {
    pub(super) fn new(new: &NewBitmap, size: u64, granularity: u64) -> Rc<Self> {
        let bits = DirtyBitmap::new(size, granularity);
        Rc::new(Self {
            name: new.name.as_str().into(),
            granularity,
            state: RefCell::new(State {
                bits,
                enabled: !new.disabled,
                persistent: new.persistent,
                follow: new.follow,
                changed: false,
                life: Life::Open,
            }),
        })
    }

    /// One that was found in the image file, with its bits if they can be trusted.
    pub(super) fn stored(loaded: LoadedBitmap, size: u64) -> Rc<Self> {
        let LoadedBitmap { name, granularity, enabled, bits } = loaded;
        let life = if bits.is_some() { Life::Open } else { Life::Inconsistent };
        Rc::new(Self {
            name: name.into(),
            granularity,
            state: RefCell::new(State {
                bits: bits.unwrap_or_else(|| DirtyBitmap::new(size, granularity)),
                enabled,
                persistent: true,
                follow: false,
                changed: false,
                life,
            }),
        })
    }

    /// Its name.
    pub fn name(&self) -> Rc<str> {
        Rc::clone(&self.name)
    }

    /// Bytes per granule.
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// Bytes of the disk that it is for.
    pub fn size(&self) -> u64 {
        self.state.borrow().bits.size()
    }

    /// Whether it records writes, or would if the node were written.
    pub fn is_enabled(&self) -> bool {
        let state = self.state.borrow();
        state.enabled && !matches!(state.life, Life::Inconsistent)
    }

    /// Whether it is kept in the image file.
    pub fn is_persistent(&self) -> bool {
        self.state.borrow().persistent
    }

    /// Whether it goes on at the node that takes the place of its own.
    pub fn follows(&self) -> bool {
        self.state.borrow().follow
    }

    /// Looks at the bits as they are now (of a frozen one: as they were when it was frozen).
    pub fn view<R>(&self, look: impl FnOnce(&DirtyBitmap) -> R) -> R {
        look(&self.state.borrow().bits)
    }

    /// Whether it can be used like this now; `readonly`: its image is.
    pub(super) fn check(&self, access: BitmapAccess, readonly: bool) -> Result<(), BitmapError> {
        let state = self.state.borrow();
        let name = || self.name.to_string();
        match &state.life {
            Life::Busy { .. } | Life::Frozen { .. } => return Err(BitmapError::Busy(name())),
            Life::Inconsistent if access == BitmapAccess::Remove => {}
            Life::Open | Life::Inconsistent => {}
        }
        if access != BitmapAccess::Read && state.persistent && readonly {
            return Err(BitmapError::ReadOnly(name()));
        }
        match state.life {
            Life::Inconsistent if access != BitmapAccess::Remove => {
                Err(BitmapError::Inconsistent(name()))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn record(&self, range: GuestRange) {
        let state = &mut *self.state.borrow_mut();
        if !state.enabled {
            return;
        }
        match &mut state.life {
            Life::Open | Life::Busy { .. } => state.bits.set_range(range),
            Life::Frozen { successor, .. } => successor.set_range(range),
            Life::Inconsistent => 0,
        };
    }

    pub(super) fn resize(&self, size: u64) {
        let state = &mut *self.state.borrow_mut();
        state.bits.resize(size);
        if let Life::Frozen { successor, .. } = &mut state.life {
            successor.resize(size);
        }
    }

    /// Changes the bits; the caller checked that it may.
    pub(super) fn change(&self, change: impl FnOnce(&mut DirtyBitmap)) {
        let state = &mut *self.state.borrow_mut();
        change(&mut state.bits);
        state.changed = true;
    }

    pub(super) fn set_follow(&self, follow: bool) {
        self.state.borrow_mut().follow = follow;
    }

    pub(super) fn set_persistent(&self, persistent: bool) {
        self.state.borrow_mut().persistent = persistent;
    }

    pub(super) fn set_enabled(&self, enabled: bool) {
        let state = &mut *self.state.borrow_mut();
        state.changed |= state.enabled != enabled;
        state.enabled = enabled;
    }

    /// Keeps others off. An inconsistent one stays what it is: nothing can be done with it anyway.
    pub(super) fn set_busy(&self, by: &str) {
        let life = &mut self.state.borrow_mut().life;
        if !matches!(life, Life::Inconsistent) {
            *life = Life::Busy { by: by.into() };
        }
    }

    /// Writes go to a successor from now on, which records if this one did.
    pub(super) fn freeze(&self) {
        let state = &mut *self.state.borrow_mut();
        let successor = DirtyBitmap::new(state.bits.size(), self.granularity);
        match &state.life {
            Life::Busy { by } => state.life = Life::Frozen { by: Rc::clone(by), successor },
            other => panic!("invariant: only a bitmap that is held is frozen, not {other:?}"),
        }
    }

    /// Ends the use: the bits are those of now and of the successor, or, with `instead`, these and
    /// the successor's.
    pub(super) fn release(&self, instead: Option<&DirtyBitmap>) {
        let state = &mut *self.state.borrow_mut();
        match std::mem::replace(&mut state.life, Life::Open) {
            Life::Frozen { successor, .. } => {
                let old = std::mem::replace(&mut state.bits, successor);
                state.bits.merge(instead.unwrap_or(&old));
                state.changed = true;
            }
            Life::Inconsistent => state.life = Life::Inconsistent,
            Life::Open | Life::Busy { .. } => {}
        }
    }

    /// What a query shows: the bitmap, and its successor before it.
    fn facts(&self) -> impl Iterator<Item = BitmapFacts> {
        let state = self.state.borrow();
        let inconsistent = matches!(state.life, Life::Inconsistent);
        let own = BitmapFacts {
            name: Some(self.name()),
            count: state.bits.dirty_bytes(),
            granularity: self.granularity,
            recording: state.enabled && !inconsistent,
            busy: matches!(state.life, Life::Busy { .. } | Life::Frozen { .. }),
            persistent: state.persistent,
            inconsistent,
            follow: state.follow,
        };
        let successor = match &state.life {
            Life::Frozen { successor, .. } => Some(BitmapFacts {
                name: None,
                count: successor.dirty_bytes(),
                busy: false,
                persistent: false,
                follow: false,
                ..own.clone()
            }),
            _ => None,
        };
        successor.into_iter().chain([own])
    }

    /// Who uses it now.
    pub fn user(&self) -> Option<Rc<str>> {
        match &self.state.borrow().life {
            Life::Busy { by } | Life::Frozen { by, .. } => Some(Rc::clone(by)),
            Life::Open | Life::Inconsistent => None,
        }
    }
}

impl KeptBitmap for NodeBitmap {
    fn bits(&self) -> DirtyBitmap {
        let state = self.state.borrow();
        let mut bits = state.bits.clone();
        if let Life::Frozen { successor, .. } = &state.life {
            bits.merge(successor);
        }
        bits
    }

    fn is_enabled(&self) -> bool {
        self.state.borrow().enabled
    }

    fn is_changed(&self) -> bool {
        self.state.borrow().changed
    }

    fn stored(&self) {
        self.state.borrow_mut().changed = false;
    }
}

impl std::fmt::Debug for NodeBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NodeBitmap('{}')", self.name)
    }
}

/// A bitmap as an image file holds it.
#[derive(Clone, Debug)]
pub(crate) struct LoadedBitmap {
    pub(crate) name: String,
    pub(crate) granularity: u64,
    pub(crate) enabled: bool,
    /// None if they cannot be trusted.
    pub(crate) bits: Option<DirtyBitmap>,
}

/// The bitmaps of a node, the oldest first.
#[derive(Debug, Default)]
pub(crate) struct NodeBitmaps(RefCell<Vec<Rc<NodeBitmap>>>);

impl NodeBitmaps {
    pub(super) fn find(&self, name: &str) -> Option<Rc<NodeBitmap>> {
        self.0.borrow().iter().find(|bitmap| &*bitmap.name == name).cloned()
    }

    pub(super) fn insert(&self, bitmap: Rc<NodeBitmap>) {
        self.0.borrow_mut().push(bitmap);
    }

    /// The consistent ones that go on at another node.
    pub(super) fn followers(&self) -> Vec<Rc<NodeBitmap>> {
        let follows = |bitmap: &&Rc<NodeBitmap>| {
            let state = bitmap.state.borrow();
            state.follow && !matches!(state.life, Life::Inconsistent)
        };
        self.0.borrow().iter().filter(follows).cloned().collect()
    }

    /// Makes `bitmap` the newest.
    pub(super) fn renew(&self, bitmap: &Rc<NodeBitmap>) {
        let mut list = self.0.borrow_mut();
        if let Some(at) = list.iter().position(|known| Rc::ptr_eq(known, bitmap)) {
            let bitmap = list.remove(at);
            list.push(bitmap);
        }
    }

    pub(super) fn remove(&self, bitmap: &Rc<NodeBitmap>) {
        self.0.borrow_mut().retain(|known| !Rc::ptr_eq(known, bitmap));
    }

    /// Takes out those that are kept in the file.
    pub(super) fn remove_persistent(&self) -> Vec<Rc<NodeBitmap>> {
        let list = std::mem::take(&mut *self.0.borrow_mut());
        let (kept, rest) = list.into_iter().partition(|bitmap| bitmap.is_persistent());
        *self.0.borrow_mut() = rest;
        kept
    }

    /// A range was written, or may have been.
    pub(super) fn record(&self, range: GuestRange) {
        for bitmap in &*self.0.borrow() {
            bitmap.record(range);
        }
    }

    pub(super) fn resize(&self, size: u64) {
        for bitmap in &*self.0.borrow() {
            bitmap.resize(size);
        }
    }

    /// What queries show, the newest first: successors, then the others.
    pub(super) fn facts(&self) -> Vec<BitmapFacts> {
        let list = self.0.borrow();
        let facts = list.iter().rev().flat_map(|bitmap| bitmap.facts());
        let (mut facts, named): (Vec<_>, Vec<_>) = facts.partition(|facts| facts.name.is_none());
        facts.extend(named);
        facts
    }
}
