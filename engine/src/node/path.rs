//! A compiled path: the layers that a node's requests go through, top to base, as a flat list.
//!
//! Guest requests never walk the graph. A path is immutable; a change of the chain compiles a new
//! one, and requests in flight finish on the old one, which keeps its layers alive.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::{Rc, Weak};

use super::chain::{ChainIndex, LayerState};
use crate::executor::sync::Notify;
use crate::format::Format;

/// One layer: an image, and whether it is written.
#[derive(Clone)]
pub(crate) struct Layer {
    pub(crate) format: Rc<dyn Format>,
    pub(crate) state: Rc<LayerState>,
}

/// Layers from top to base; never empty.
pub(crate) struct Path {
    layers: Box<[Layer]>,
    /// Of the layers below the top; shared with all overlays of the same backing node.
    below: Option<Rc<ChainIndex>>,
    /// Of all layers, made for the first overlay.
    whole: OnceCell<Option<Rc<ChainIndex>>>,
    /// Whether reads of one of the layers are watched.
    watched: Cell<bool>,
    /// Rung when the last request on this path is over, once another one took its place.
    retired: RefCell<Weak<Notify>>,
}

impl Path {
    /// `top` above the layers of `below`.
    pub(crate) fn compile(top: Layer, below: Option<&Self>) -> Rc<Self> {
        let mut layers = vec![top];
        if let Some(below) = below {
            layers.extend(below.layers.iter().cloned());
        }
        let below = below.and_then(|below| below.whole());
        let whole = OnceCell::new();
        let (watched, retired) = (Cell::new(false), RefCell::default());
        let path = Rc::new(Self { layers: layers.into(), below, whole, watched, retired });
        path.look_for_watches();
        path
    }

    /// Finds out whether reads of one of the layers are watched.
    pub(super) fn look_for_watches(&self) {
        self.watched.set(self.layers.iter().any(|layer| layer.state.watch().is_some()));
    }

    /// Whether reads of one of the layers are watched.
    pub(super) fn is_watched(&self) -> bool {
        self.watched.get()
    }

    /// Another path took its place: `ring` is rung when nobody uses this one any more.
    pub(crate) fn retire(&self, ring: &Rc<Notify>) {
        self.retired.replace(Rc::downgrade(ring));
    }

    fn whole(&self) -> Option<Rc<ChainIndex>> {
        self.whole.get_or_init(|| ChainIndex::new(&self.layers)).clone()
    }

    /// The layers, top first.
    pub(crate) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The layer that is written.
    pub(crate) fn top(&self) -> &Layer {
        self.layers.first().expect("invariant: a path has a top layer")
    }

    /// The layers below the top.
    pub(crate) fn lower(&self) -> &[Layer] {
        self.layers.get(1..).unwrap_or_default()
    }

    /// The index of the layers below the top, if there are several.
    pub(crate) fn index(&self) -> Option<&Rc<ChainIndex>> {
        self.below.as_ref()
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        if let Some(ring) = self.retired.borrow().upgrade() {
            ring.notify_all();
        }
    }
}

impl std::fmt::Debug for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Path({} layers)", self.layers.len())
    }
}
