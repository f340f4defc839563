//! Read-only nodes that a job writes for a while.
//!
//! A node has a state that its users asked for and the state that it is in. A job that must write a
//! read-only node keeps it writable; when the last such job lets go, the node becomes what its
//! users asked for last, be it in the meantime (a snapshot put an overlay above it).

use std::rc::Rc;

use super::object::Node;
use crate::error::Result;
use crate::graph::GraphError;

/// Keeps a node writable; to be ended by [`KeptWritable::end`], or in the background when dropped.
#[derive(Debug)]
#[must_use = "the node may become read-only as soon as this is dropped"]
pub struct KeptWritable {
    node: Option<Rc<Node>>,
}

impl Node {
    /// Makes the image writable, if it is not, until the returned value is ended.
    ///
    /// # Errors
    /// As [`Node::set_writable`]; the node is then what it was.
    pub async fn keep_writable(self: &Rc<Self>) -> Result<KeptWritable> {
        if !self.is_active() {
            return Err(GraphError::InactivePermission("write").into());
        }
        self.writers.set(self.writers.get() + 1);
        let mut kept = KeptWritable { node: Some(Rc::clone(self)) };
        match self.turn_for_now(true).await {
            Ok(()) => Ok(kept),
            Err(error) => {
                kept.let_go();
                Err(error)
            }
        }
    }
}

impl Node {
    /// The users of `other` are about to come here: what they asked of it holds for this node.
    pub fn succeed(&self, other: &Self) {
        self.asked_writable.set(other.asked_writable.get());
    }
}

impl KeptWritable {
    /// Lets the node become what its users asked for.
    ///
    /// # Errors
    /// What flushing reports: the node then stays writable.
    pub async fn end(self) -> Result<()> {
        let mut kept = self;
        match kept.let_go() {
            Some(node) => node.set_writable(false).await,
            None => Ok(()),
        }
    }

    /// The node, if it is to become read-only now.
    fn let_go(&mut self) -> Option<Rc<Node>> {
        let node = self.node.take()?;
        node.writers.set(node.writers.get() - 1);
        (node.writers.get() == 0 && !node.asked_writable.get()).then_some(node)
    }
}

impl Drop for KeptWritable {
    fn drop(&mut self) {
        let Some(node) = self.let_go() else { return };
        let core = node.core().clone();
        // Nothing of this task does the same again when an engine that stops drops it.
        drop(core.spawn(crate::executor::Class::Background, async move {
            if let Err(error) = node.set_writable(false).await {
                tracing::warn!(%error, "a node of an ended job is still writable");
            }
        }));
    }
}
