//! The nodes of one core by id and name; names, removal, attachments' moves.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::error::GraphError;
use crate::error::{Error, Result};
use crate::executor::Core;
use crate::executor::sync::Semaphore;
use crate::format::{BackingRef, ReferencePolicy, Registry, ResolveReference, ResolvedReference};
use crate::limits::{KNOWN_REFERENCES, NODE_NAME_MAX};
use crate::node::{Node, NodeId, Permissions, Role, User, UserGuard};

/// What a graph knows about the world around it.
#[derive(Clone)]
pub struct GraphConfig {
    /// Formats by name.
    pub formats: Registry,
    /// Which references in headers are followed.
    pub policy: ReferencePolicy,
    /// Checks a reference against the policy.
    pub resolve: ResolveReference,
}

impl Default for GraphConfig {
    fn default() -> Self {
        Self { formats: Registry::new(), policy: ReferencePolicy::Explicit, resolve: refuse }
    }
}

fn refuse(
    _: &std::path::Path,
    reference: &BackingRef,
    _: &ReferencePolicy,
) -> Result<ResolvedReference> {
    let source = GraphError::FormatMissing(reference.file.clone());
    Err(source.into())
}

/// The nodes of one core.
pub struct Graph {
    core: Core,
    config: RefCell<GraphConfig>,
    nodes: RefCell<BTreeMap<NodeId, Entry>>,
    next_id: Cell<u64>,
    next_implicit: Cell<u64>,
    /// References that this process wrote into headers: image and reference, the oldest first.
    known: RefCell<VecDeque<(PathBuf, BackingRef)>>,
    /// The permit to change the graph: one change at a time.
    pub(super) changes: Semaphore,
}

struct Entry {
    node: Rc<Node>,
    /// The node's uses of its children.
    children: Vec<UserGuard>,
}

impl Graph {
    /// The graph of `core`, made at first use.
    pub fn of(core: &Core) -> Rc<Self> {
        core.extension(|| Self {
            core: core.clone(),
            config: RefCell::default(),
            nodes: RefCell::default(),
            next_id: Cell::new(1),
            next_implicit: Cell::new(0),
            known: RefCell::default(),
            changes: Semaphore::new(core, 1),
        })
    }

    /// Sets formats and reference policy; applies to nodes opened afterwards.
    pub fn configure(&self, config: GraphConfig) {
        *self.config.borrow_mut() = config;
    }

    /// The configuration.
    pub fn config(&self) -> GraphConfig {
        self.config.borrow().clone()
    }

    /// Remembers that the caller made `image` with this reference in its header: it is followed
    /// whatever the policy says, as long as the header holds exactly it.
    pub fn know_reference(&self, image: PathBuf, reference: BackingRef) {
        let mut known = self.known.borrow_mut();
        known.retain(|(path, _)| *path != image);
        if known.len() >= KNOWN_REFERENCES {
            known.pop_front();
        }
        known.push_back((image, reference));
    }

    pub(super) fn known_reference(
        &self,
        image: &Path,
        reference: &BackingRef,
    ) -> Option<ResolvedReference> {
        let known = self.known.borrow();
        known.iter().find(|(path, held)| path == image && held == reference)?;
        let folder = image.parent().unwrap_or(Path::new(""));
        let path = folder.join(&reference.file);
        Some(ResolvedReference { path, beneath: None, driver: reference.format.clone() })
    }

    /// The core whose nodes these are.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// The node called `name`.
    ///
    /// # Errors
    /// `NotFound` with the text that QMP clients know.
    pub fn find(&self, name: &str) -> Result<Rc<Node>> {
        let nodes = self.nodes.borrow();
        let found = nodes.values().find(|entry| &*entry.node.name() == name);
        found
            .map(|entry| Rc::clone(&entry.node))
            .ok_or_else(|| GraphError::NotFound(name.into()).into())
    }

    /// The node `id`, if it is still there.
    pub fn node(&self, id: NodeId) -> Option<Rc<Node>> {
        self.nodes.borrow().get(&id).map(|entry| Rc::clone(&entry.node))
    }

    /// All nodes, newest first.
    pub fn nodes(&self) -> Vec<Rc<Node>> {
        self.nodes.borrow().values().rev().map(|entry| Rc::clone(&entry.node)).collect()
    }

    /// Admits a user to a node; see [`Node::use_by`].
    ///
    /// # Errors
    /// `Busy` if another user excludes it.
    pub fn use_node(
        &self,
        node: &Rc<Node>,
        user: User,
        permissions: Permissions,
    ) -> Result<UserGuard> {
        Node::use_by(node, user, permissions)
    }

    /// Checks that a new node may have this name.
    ///
    /// # Errors
    /// If the name is malformed, too long or in use.
    pub fn check_name(&self, name: &str) -> Result<()> {
        self.name_for(Some(name)).map(drop)
    }

    /// A legal, free name: the given one, or a generated one.
    pub(super) fn name_for(&self, name: Option<&str>) -> Result<Rc<str>> {
        let Some(name) = name else {
            loop {
                let number = self.next_implicit.get();
                self.next_implicit.set(number + 1);
                let name = format!("#block{number:03}");
                if self.find(&name).is_err() {
                    return Ok(name.into());
                }
            }
        };
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        if !name.starts_with(|c: char| c.is_ascii_alphabetic()) || !name.chars().all(legal) {
            return Err(GraphError::InvalidName(name.into()).into());
        }
        if name.len() > NODE_NAME_MAX {
            return Err(GraphError::NameTooLong.into());
        }
        if self.find(name).is_ok() {
            return Err(GraphError::Duplicate(name.into()).into());
        }
        Ok(name.into())
    }

    pub(super) fn next_id(&self) -> NodeId {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        NodeId(id)
    }

    pub(super) fn insert(&self, node: &Rc<Node>, children: Vec<UserGuard>) {
        let entry = Entry { node: Rc::clone(node), children };
        self.nodes.borrow_mut().insert(node.id(), entry);
    }

    /// Forgets node `id`; its uses of others end.
    pub(super) fn take_out(&self, id: NodeId) {
        let entry = self.nodes.borrow_mut().remove(&id);
        drop(entry);
    }

    /// Gives the uses that node `id` has of its children to `change`.
    pub(super) fn with_children(&self, id: NodeId, change: impl FnOnce(&mut Vec<UserGuard>)) {
        if let Some(entry) = self.nodes.borrow_mut().get_mut(&id) {
            change(&mut entry.children);
        }
    }

    /// Closes a node and the unnamed children that nobody else uses.
    ///
    /// # Errors
    /// `Busy` if something uses the node (the text says what); errors of deferred writes, which
    /// leave the node removed.
    pub async fn remove(&self, node: &Rc<Node>) -> Result<()> {
        self.check_removable(node)?;
        self.close(Rc::clone(node)).await
    }

    /// Whether nothing uses the node.
    ///
    /// # Errors
    /// `Busy` with the text that says what uses it.
    pub fn check_removable(&self, node: &Node) -> Result<()> {
        let name = node.name().to_string();
        // Guests are told first, then jobs, as the peer does.
        let rank = |user: &User| match user {
            User::Guest { .. } => 0,
            User::Job { .. } => 1,
            _ => 2,
        };
        let Some(user) = node.users().into_iter().min_by_key(rank) else { return Ok(()) };
        Err(match user {
            User::Guest { .. } => GraphError::InUse(name),
            User::Overlay { node: parent } => {
                GraphError::BusyAsChild { node: name, edge: "backing", parent: parent.to_string() }
            }
            User::Format { node: parent } => {
                GraphError::BusyAsChild { node: name, edge: "file", parent: parent.to_string() }
            }
            User::Data { node: parent } => {
                let parent = parent.to_string();
                GraphError::BusyAsChild { node: name, edge: "data-file", parent }
            }
            User::Filter { node: parent, role } => {
                let edge = if role == Role::Source { "file" } else { "target" };
                GraphError::BusyAsChild { node: name, edge, parent: parent.to_string() }
            }
            User::Job { kind, .. } => GraphError::BusyWithJob { node: name, kind: kind.into() },
        }
        .into())
    }

    async fn close(&self, node: Rc<Node>) -> Result<()> {
        let mut result = Ok(());
        let mut closing = vec![node];
        while let Some(node) = closing.pop() {
            // Nobody can enter any more; what is in flight ends first.
            node.gate().close();
            node.gate().idle().await;
            let closed = node.format().close().await;
            result = result.and(closed.map_err(|error| error.on(&node.name())));
            if node.driver() == "file" {
                // Whoever still holds the node object must not keep others from the file.
                let unlocked = node.unlock_file().await;
                result = result.and(unlocked);
            }
            drop(self.nodes.borrow_mut().remove(&node.id()));
            let orphans = node.take_children().into_iter().flatten();
            closing.extend(
                orphans.filter(|child| !child.is_monitor_owned() && child.users().is_empty()),
            );
        }
        result
    }

    /// Closes every node, overlays first. Errors of deferred writes are returned, all nodes are
    /// closed.
    ///
    /// # Errors
    /// The first error.
    pub async fn close_all(&self) -> Result<()> {
        let mut result: Result<()> = Ok(());
        loop {
            let free = self.nodes().into_iter().find(|node| {
                node.users()
                    .iter()
                    .all(|user| matches!(user, User::Guest { .. } | User::Job { .. }))
            });
            let Some(node) = free else { break };
            let closed = self.close(node).await;
            result = result.and(closed);
        }
        result
    }

    /// Moves every attachment of `from` to `to`, and the bitmaps that follow. Only inside a cut of
    /// both nodes.
    ///
    /// # Panics
    /// If one of the nodes does not exist.
    pub fn repoint(&self, from: NodeId, to: NodeId) {
        let from = self.node(from).expect("invariant: nodes of a cut exist");
        let to = self.node(to).expect("invariant: nodes of a cut exist");
        for attachment in from.take_attachments() {
            attachment.move_to(&to);
        }
        Node::carry_bitmaps(&from, &to);
    }

    /// Puts `base` below `overlay`: its layers serve what the overlay does not have. Only inside a
    /// cut of both nodes, or while nobody uses the overlay.
    ///
    /// # Errors
    /// `Busy` if a user of `base` excludes it (a writer that stays).
    pub fn set_backing(&self, overlay: &Rc<Node>, base: Option<&Rc<Node>>) -> Result<()> {
        let guard = match base {
            Some(base) => {
                let user = User::Overlay { node: overlay.name() };
                Some(Node::use_by(base, user, Permissions::of_overlay())?)
            }
            None => None,
        };
        let mut old = vec![overlay.link_backing(base.cloned())];
        self.recompile_above(overlay, &mut old);
        let mut nodes = self.nodes.borrow_mut();
        let entry = nodes
            .get_mut(&overlay.id())
            .ok_or_else(|| Error::from(GraphError::NotFound(overlay.name().to_string())))?;
        entry.children.extend(guard);
        Ok(())
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Graph({} nodes)", self.nodes.borrow().len())
    }
}
