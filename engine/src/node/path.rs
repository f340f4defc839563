//! A compiled path: the layers that a node's requests go through, top to base, as a flat list.
//!
//! Guest requests never walk the graph. A path is immutable; a change of the chain compiles a new
//! one, and requests in flight finish on the old one, which keeps its layers alive.

use std::rc::Rc;

use crate::format::Format;

/// One layer: an image and how it is named.
#[derive(Clone)]
pub(crate) struct Layer {
    pub(crate) format: Rc<dyn Format>,
}

/// Layers from top to base; never empty.
pub(crate) struct Path {
    layers: Box<[Layer]>,
}

impl Path {
    /// `top` above the layers of `below`.
    pub(crate) fn compile(top: Rc<dyn Format>, below: Option<&Self>) -> Rc<Self> {
        let mut layers = vec![Layer { format: top }];
        if let Some(below) = below {
            layers.extend(below.layers.iter().cloned());
        }
        Rc::new(Self { layers: layers.into() })
    }

    /// The layers, top first.
    pub(crate) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The layer that is written.
    pub(crate) fn top(&self) -> &Layer {
        self.layers.first().expect("invariant: a path has a top layer")
    }
}

impl std::fmt::Debug for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Path({} layers)", self.layers.len())
    }
}
