//! Filters and views in the graph: adding them beside what runs, and taking them away.

use std::rc::Rc;

use super::registry::Graph;
use crate::error::Result;
use crate::node::{Node, NodeId, NodeParts, UserGuard, View, ViewFormat};

/// A filter or view to be added.
pub struct NewView {
    /// Node name; a generated one if absent.
    pub name: Option<String>,
    /// What it is.
    pub view: Rc<dyn View>,
    /// Its uses of other nodes, which end with it.
    pub uses: Vec<UserGuard>,
    /// A node that was opened for it alone and goes with it.
    pub owned: Option<Rc<Node>>,
    /// Whether `blockdev-del` may remove it.
    pub monitor_owned: bool,
    /// Whether discards have an effect.
    pub discard_unmap: bool,
}

impl std::fmt::Debug for NewView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NewView({:?})", self.name)
    }
}

impl Graph {
    /// Adds a filter or view above a node. No request of anybody changes its way.
    ///
    /// # Errors
    /// If the name is malformed, too long or in use.
    pub fn add_view(&self, new: NewView) -> Result<Rc<Node>> {
        let name = self.name_for(new.name.as_deref())?;
        let below = Rc::clone(new.view.below());
        let mut options = below.options();
        options.discard_unmap = new.discard_unmap;
        let parts = NodeParts {
            id: self.next_id(),
            name,
            format: Rc::new(ViewFormat(Rc::clone(&new.view))),
            filename: below.filename(),
            options,
            writable: true,
            monitor_owned: new.monitor_owned,
            file: (!below.is_monitor_owned()).then(|| Rc::clone(&below)),
            data: new.owned,
            backing: None,
            view: Some(new.view),
        };
        let node = Node::new(self.core(), parts);
        self.insert(&node, new.uses);
        Ok(node)
    }

    /// Forgets the filter or view `id` at once, without closing it: its maker has undone it. Its
    /// uses of other nodes end.
    pub fn forget_view(&self, id: NodeId) {
        let is_view = self.node(id).is_some_and(|node| node.view().is_some());
        if is_view {
            self.take_out(id);
        }
    }

    /// The filters above `node`, the newest first.
    pub fn filters_above(&self, node: NodeId) -> Vec<Rc<Node>> {
        let above = |other: &Rc<Node>| other.filtered().is_some_and(|below| below.id() == node);
        self.nodes().into_iter().filter(above).collect()
    }
}
