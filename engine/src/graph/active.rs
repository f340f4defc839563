//! `blockdev-set-active`: giving nodes to another process and taking them back.
//!
//! A node is inactive only if everything above it is; what lies below a node that becomes inactive
//! and has no other active user goes with it, overlays first. Activation begins at the base.

use std::rc::Rc;

use super::cut::{CutPart, Swap, cut};
use super::error::GraphError;
use super::registry::Graph;
use crate::error::Result;
use crate::format::LocalFuture;
use crate::node::{Node, User};

impl Graph {
    /// Makes `node` and what only it uses inactive.
    ///
    /// # Errors
    /// If something active stands above it or a front door or a job has it; what flushing reports.
    /// Everything is as active as before then.
    pub async fn inactivate(self: &Rc<Self>, node: &Rc<Node>, deadline_ns: u64) -> Result<()> {
        if !node.is_active() {
            return Ok(());
        }
        if node.users().iter().any(|user| self.is_active_parent(user, &[])) {
            return Err(GraphError::ActiveParent.into());
        }
        let list = self.going_with(vec![Rc::clone(node)])?;
        self.change_active(list, false, deadline_ns).await
    }

    /// Makes all nodes inactive.
    ///
    /// # Errors
    /// As [`Graph::inactivate`].
    pub async fn inactivate_all(self: &Rc<Self>, deadline_ns: u64) -> Result<()> {
        let is_top =
            |node: &Rc<Node>| !node.users().iter().any(|user| self.is_active_parent(user, &[]));
        let tops = self.nodes().into_iter().filter(is_top).collect();
        let list = self.going_with(tops)?;
        self.change_active(list, false, deadline_ns).await
    }

    /// Makes `node` and everything below it active.
    ///
    /// # Errors
    /// If another process has an image; what was activated before stays so.
    pub async fn activate(self: &Rc<Self>, node: &Rc<Node>, deadline_ns: u64) -> Result<()> {
        let mut list = vec![Rc::clone(node)];
        let mut at = 0;
        while let Some(node) = list.get(at).cloned() {
            list.extend(node.backing().into_iter().chain(node.file()).chain(node.data_file()));
            at += 1;
        }
        list.reverse();
        list.retain(|node| !node.is_active());
        self.change_active(list, true, deadline_ns).await
    }

    fn is_active_parent(&self, user: &User, going: &[Rc<Node>]) -> bool {
        let goes = |name: &str| going.iter().any(|node| &*node.name() == name);
        match user {
            User::Overlay { node }
            | User::Format { node }
            | User::Data { node }
            | User::Filter { node, .. } => {
                !goes(node) && self.find(node).is_ok_and(|parent| parent.is_active())
            }
            User::Job { role, .. } => *role != crate::node::Role::Target,
            User::Guest { .. } => false,
        }
    }

    /// The nodes and what only they use, overlays first; nobody from outside may have them.
    fn going_with(&self, tops: Vec<Rc<Node>>) -> Result<Vec<Rc<Node>>> {
        let mut list = tops;
        let mut at = 0;
        while let Some(node) = list.get(at).cloned() {
            at += 1;
            if node.is_held_active() {
                return Err(GraphError::CannotInactivate.into());
            }
            for child in node.backing().into_iter().chain(node.file()).chain(node.data_file()) {
                let known = list.iter().any(|known| known.id() == child.id());
                let held = child.users().iter().any(|user| self.is_active_parent(user, &list));
                if !known && !held && child.is_active() {
                    list.push(child);
                }
            }
        }
        Ok(list)
    }

    async fn change_active(
        self: &Rc<Self>,
        list: Vec<Rc<Node>>,
        active: bool,
        deadline_ns: u64,
    ) -> Result<()> {
        if list.is_empty() {
            return Ok(());
        }
        let part = CutPart {
            core: self.core().id(),
            nodes: list.iter().map(|node| node.id()).collect(),
            flush: true,
            before_swap: Some(Box::new(move |_| -> LocalFuture<'static, Result<()>> {
                Box::pin(async move { change_all(&list, active).await })
            })),
            swap: Swap::Local(Box::new(|_| {})),
        };
        cut(self.core(), vec![part], deadline_ns).await
    }
}

/// Changes the nodes in order; a failed inactivation takes those before it back.
async fn change_all(list: &[Rc<Node>], active: bool) -> Result<()> {
    for (at, node) in list.iter().enumerate() {
        let changed = if active { node.activate().await } else { node.inactivate().await };
        let Err(error) = changed else { continue };
        if !active {
            for node in list.iter().take(at + 1).rev() {
                if let Err(error) = node.activate().await {
                    tracing::error!(node = %node.name(), %error, "taking a node back");
                }
            }
        }
        return Err(error);
    }
    Ok(())
}
