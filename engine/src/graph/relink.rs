//! Changing what lies below nodes while guests go on: the end of a stream or a commit.
//!
//! The content seen through every node that is relinked must be the same before and after; then no
//! request has to wait. Order: (1) the new backing node is taken into use; (2) links and paths of
//! the overlays and of everything above them change at once; (3) requests in flight end on the old
//! paths ([`Retired::gone`]); (4) only then may what was dropped be closed.

use std::rc::{Rc, Weak};

use super::registry::Graph;
use crate::error::Result;
use crate::executor::sync::Notify;
use crate::node::{Node, Path, Permissions, User, UserGuard};

/// Old paths that requests may still be on.
#[must_use = "what was dropped may be closed only after `gone`"]
pub struct Retired {
    paths: Vec<Weak<Path>>,
    ring: Rc<Notify>,
}

impl Retired {
    fn new(graph: &Graph, paths: Vec<Rc<Path>>) -> Self {
        let ring = Rc::new(Notify::new(graph.core()));
        paths.iter().for_each(|path| path.retire(&ring));
        Self { paths: paths.iter().map(Rc::downgrade).collect(), ring }
    }

    /// Resolves when no request is on the old paths any more.
    pub async fn gone(&self) {
        self.ring.until(|| self.paths.iter().all(|path| path.strong_count() == 0)).await;
    }
}

impl std::fmt::Debug for Retired {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Retired({} paths)", self.paths.len())
    }
}

impl Graph {
    /// The nodes that have `node` as their backing node.
    pub fn overlays(&self, node: &Node) -> Vec<Rc<Node>> {
        let is_overlay = |known: &Rc<Node>| known.backing().is_some_and(|b| b.id() == node.id());
        self.nodes().into_iter().filter(is_overlay).collect()
    }

    /// Whether nobody reads or writes through `node`: it has no users, or only such overlays.
    pub fn is_idle(&self, node: &Node) -> bool {
        node.users().iter().all(|user| match user {
            User::Overlay { node } => self.find(node).is_ok_and(|above| self.is_idle(&above)),
            _ => false,
        })
    }

    /// The use that `overlay` will have of `base`, taken ahead of [`Graph::relink`].
    ///
    /// # Errors
    /// `Busy` if a user of `base` excludes it.
    pub fn use_as_backing(&self, overlay: &Node, base: &Rc<Node>) -> Result<UserGuard> {
        let user = User::Overlay { node: overlay.name() };
        Node::use_unseen(base, user, Permissions::of_overlay())
    }

    /// Puts `base` below each of `overlays` instead of what lies there now.
    ///
    /// # Errors
    /// `Busy` if a user of `base` excludes its use; nothing was changed then.
    pub fn relink(&self, overlays: &[Rc<Node>], base: Option<&Rc<Node>>) -> Result<Retired> {
        let mut uses = Vec::new();
        for overlay in overlays {
            uses.push(base.map(|base| self.use_as_backing(overlay, base)).transpose()?);
        }
        let mut old = Vec::new();
        for (overlay, new_use) in overlays.iter().zip(uses) {
            self.replace_backing_use(overlay, new_use);
            old.push(overlay.link_backing(base.cloned()));
            self.recompile_above(overlay, &mut old);
        }
        Ok(Retired::new(self, old))
    }

    /// Compiles the paths of all nodes above `node`; the old ones are added to `old`.
    pub(super) fn recompile_above(&self, node: &Rc<Node>, old: &mut Vec<Rc<Path>>) {
        let mut changed = vec![Rc::clone(node)];
        while let Some(node) = changed.pop() {
            for overlay in self.overlays(&node) {
                old.push(overlay.recompile());
                changed.push(overlay);
            }
        }
    }

    /// What `overlay` needs of its backing node and tolerates there: a job that changes the node
    /// below in a way that does not show through the overlay vouches for it meanwhile.
    pub fn set_backing_permissions(&self, overlay: &Node, permissions: Permissions) {
        if let Some(backing) = overlay.backing() {
            self.with_children(overlay.id(), |children| {
                let uses = children.iter().filter(|held| held.is_backing_use_of(&backing));
                uses.for_each(|held| held.set_permissions(permissions));
            });
        }
    }

    fn replace_backing_use(&self, overlay: &Node, new_use: Option<UserGuard>) {
        let old = overlay.backing();
        self.with_children(overlay.id(), |children| {
            if let Some(old) = &old {
                let of_old = children.extract_if(.., |held| held.is_backing_use_of(old));
                let of_old: Vec<_> = of_old.collect();
                // The new use may be of the same node and must not be taken for the old one.
                drop(of_old);
            }
            children.extend(new_use);
        });
    }

    /// Closes `node` and what only it uses, unless somebody uses it or the monitor owns it.
    ///
    /// # Errors
    /// Errors of deferred writes, which leave the node removed.
    pub async fn remove_if_unused(&self, node: &Rc<Node>) -> Result<()> {
        if self.node(node.id()).is_none() || node.is_monitor_owned() || !node.users().is_empty() {
            return Ok(());
        }
        self.remove(node).await
    }
}
