//! Changing options and links of nodes that are in use: all of a list, or none.
//!
//! Order: (1) the links that the list asks for are checked one after the other, each with those
//! before it in effect: no cycle, no format without backing files, no link that a job keeps; (2) a
//! cut of all nodes of the list and of everything above them: no request is in flight, what was
//! written is flushed; (3) what can fail: nodes become writable or read-only, backing nodes are
//! taken into use and linked; a failure undoes the steps before it, the last first; (4) options
//! (memory only, cannot fail); (5) backing nodes that nobody uses any more are closed.
//!
//! What a job reads must not change under it, so the backing node below a job's source stays.

use std::rc::Rc;

use super::cut::{CutPart, Swap, cut};
use super::error::GraphError;
use super::registry::Graph;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Applied, FormatOptions, LocalFuture};
use crate::node::{Node, NodeId, NodeOptions, Permissions, Role, User};

/// What lies below a node after it was reopened.
#[derive(Clone, Debug)]
pub enum NewBacking {
    /// What lies there now.
    Keep,
    /// Nothing.
    Detach,
    /// This node.
    Link(Rc<Node>),
}

/// How a node is to be.
#[derive(Clone, Debug)]
pub struct Reopen {
    /// The node.
    pub node: Rc<Node>,
    /// Whether it takes writes.
    pub writable: bool,
    /// Its options.
    pub options: NodeOptions,
    /// All options of its format by their QMP names; those that are not named get their defaults.
    pub format_options: FormatOptions,
    /// What lies below.
    pub backing: NewBacking,
}

/// What was done and how it is undone.
enum Done {
    Writable(Rc<Node>, bool),
    Linked(Rc<Node>, Option<Rc<Node>>),
}

impl Graph {
    /// Reopens all nodes of `list`, or none; gives up `deadline_ns` nanoseconds after it began to
    /// wait for requests in flight.
    ///
    /// # Errors
    /// What a node of the list cannot be, with the texts that QMP clients know; everything is as
    /// it was then.
    pub async fn reopen(self: &Rc<Self>, list: Vec<Reopen>, deadline_ns: u64) -> Result<()> {
        if list.is_empty() {
            return Ok(());
        }
        self.check_links(&list)?;
        let mut commits: Vec<Applied> = Vec::new();
        // Raw disks that will lie elsewhere in their files.
        let mut moved: Vec<Rc<Node>> = Vec::new();
        for change in &list {
            self.check_users(change)?;
            commits.extend(prepare_format(change)?);
            if moves(change) {
                check_still(&change.node)?;
                moved.push(Rc::clone(&change.node));
            }
        }
        let old: Vec<Rc<Node>> = list.iter().filter_map(|change| change.node.backing()).collect();
        let settled: Vec<_> =
            list.iter().map(|change| (Rc::clone(&change.node), change.options)).collect();
        let nodes = self.with_everything_above(list.iter().map(|change| &change.node));
        let before = move |graph: Rc<Self>| -> LocalFuture<'static, Result<()>> {
            Box::pin(async move { graph.change_all(&list).await })
        };
        let swap = move |_: &Rc<Self>| {
            for (node, options) in settled {
                node.set_options(options);
            }
            for commit in commits {
                commit();
            }
            for node in moved {
                node.other_bytes();
            }
        };
        let part = CutPart {
            core: self.core().id(),
            nodes,
            flush: true,
            before_swap: Some(Box::new(before)),
            swap: Swap::Local(Box::new(swap)),
        };
        cut(self.core(), vec![part], deadline_ns).await?;
        for node in old {
            self.remove_if_unused(&node).await?;
        }
        Ok(())
    }

    /// Step (1).
    fn check_links(&self, list: &[Reopen]) -> Result<()> {
        let mut links: Vec<(NodeId, Option<Rc<Node>>)> = Vec::new();
        for Reopen { node, backing, .. } in list {
            let base = match backing {
                NewBacking::Keep => continue,
                NewBacking::Detach => None,
                NewBacking::Link(base) => Some(Rc::clone(base)),
            };
            let now = node.backing();
            if now.as_ref().map(|now| now.id()) == base.as_ref().map(|base| base.id()) {
                links.push((node.id(), base));
                continue;
            }
            check_jobs(node, now.as_ref())?;
            if let Some(base) = &base {
                let driver = self.config().formats.find(node.driver());
                if !driver.is_some_and(|driver| driver.supports_backing()) {
                    return Err(GraphError::NoBackingSupport(node.driver().into()).into());
                }
                if self.reaches(base, node, &links) {
                    let (base, node) = (base.name().to_string(), node.name().to_string());
                    return Err(GraphError::Cycle { base, node }.into());
                }
            }
            links.push((node.id(), base));
        }
        Ok(())
    }

    /// Whether `node` is `from` or below it, with the changes of `links` in effect.
    fn reaches(&self, from: &Rc<Node>, node: &Node, links: &[(NodeId, Option<Rc<Node>>)]) -> bool {
        let mut todo = vec![Rc::clone(from)];
        while let Some(at) = todo.pop() {
            if at.id() == node.id() {
                return true;
            }
            let changed = links.iter().rev().find(|(id, _)| *id == at.id());
            let below = match changed {
                Some((_, base)) => base.clone(),
                None => at.backing(),
            };
            todo.extend(below.into_iter().chain(at.file()).chain(at.data_file()));
        }
        false
    }

    /// Refuses to make a node read-only that somebody goes on writing.
    fn check_users(&self, change: &Reopen) -> Result<()> {
        if change.writable {
            return Ok(());
        }
        let writes = |(user, with): &(User, Permissions)| {
            let own = match user {
                User::Format { node } | User::Data { node } => {
                    self.find(node).is_ok_and(|parent| parent.is_writable())
                }
                _ => true,
            };
            own && with.perm & Permissions::WRITE != 0
        };
        if change.node.uses().iter().any(writes) {
            return Err(GraphError::ReadWriteUsers(change.node.name().to_string()).into());
        }
        Ok(())
    }

    /// The nodes and everything that is served through them.
    fn with_everything_above<'a>(&self, nodes: impl Iterator<Item = &'a Rc<Node>>) -> Vec<NodeId> {
        let mut todo: Vec<Rc<Node>> = nodes.cloned().collect();
        let mut all: Vec<NodeId> = Vec::new();
        while let Some(node) = todo.pop() {
            if all.contains(&node.id()) {
                continue;
            }
            all.push(node.id());
            for user in node.users() {
                let (User::Overlay { node }
                | User::Format { node }
                | User::Data { node }
                | User::Filter { node, .. }) = user
                else {
                    continue;
                };
                todo.extend(self.find(&node));
            }
        }
        all
    }

    /// Step (3).
    async fn change_all(&self, list: &[Reopen]) -> Result<()> {
        let mut done: Vec<Done> = Vec::new();
        for change in list {
            if let Err(error) = self.change_one(change, &mut done).await {
                self.undo(done).await;
                return Err(error);
            }
        }
        Ok(())
    }

    async fn change_one(&self, change: &Reopen, done: &mut Vec<Done>) -> Result<()> {
        let node = &change.node;
        let was = node.is_asked_writable();
        if was != change.writable {
            if change.writable && node.file().is_some_and(|file| is_kept_read_only(&file)) {
                return Err(GraphError::ReadOnly.into());
            }
            done.push(Done::Writable(Rc::clone(node), was));
            node.set_writable(change.writable).await?;
        }
        let base = match &change.backing {
            NewBacking::Keep => return Ok(()),
            NewBacking::Detach => None,
            NewBacking::Link(base) => Some(base),
        };
        let old = node.backing();
        if old.as_ref().map(|old| old.id()) == base.map(|base| base.id()) {
            return Ok(());
        }
        // Nothing is in flight on the old paths.
        drop(self.relink(std::slice::from_ref(node), base)?);
        done.push(Done::Linked(Rc::clone(node), old));
        Ok(())
    }

    async fn undo(&self, done: Vec<Done>) {
        for step in done.into_iter().rev() {
            let undone = match step {
                Done::Writable(node, was) => node.set_writable(was).await,
                Done::Linked(node, old) => self.relink(&[node], old.as_ref()).map(drop),
            };
            if let Err(error) = undone {
                tracing::error!(%error, "undoing a step of a reopen");
            }
        }
    }
}

/// Whether the file was opened read-only by its own name.
fn is_kept_read_only(file: &Node) -> bool {
    file.is_monitor_owned() && !file.is_writable()
}

/// What the format has to say to its options; what makes them effective.
fn prepare_format(change: &Reopen) -> Result<Option<Applied>> {
    let node = &change.node;
    match node.format().abilities().options {
        Some(options) => {
            let unmap = change.options.discard_unmap;
            let prepared = options.prepare(&change.format_options, unmap);
            prepared.map(Some).map_err(|error| error.on(&node.name()))
        }
        None if change.format_options.is_empty() => Ok(None),
        None => Err(Error::new(ErrorKind::Unsupported, "change options").on(&node.name())),
    }
}

/// Whether the disk will be other bytes of its file.
fn moves(change: &Reopen) -> bool {
    let options = change.node.format().abilities().options;
    options.is_some_and(|options| options.moves(&change.format_options))
}

/// Refuses to move a disk in its file under a job or a node that relies on what was there.
fn check_still(node: &Node) -> Result<()> {
    for user in node.users() {
        let (edge, parent) = match user {
            User::Guest { .. } => continue,
            User::Job { kind, .. } => {
                let (node, kind) = (node.name().to_string(), kind.to_owned());
                return Err(GraphError::BusyWithJob { node, kind }.into());
            }
            User::Overlay { node } => ("backing", node),
            User::Data { node } => ("data-file", node),
            User::Format { node } | User::Filter { node, .. } => ("file", node),
        };
        let (node, parent) = (node.name().to_string(), parent.to_string());
        return Err(GraphError::BusyAsChild { node, edge, parent }.into());
    }
    Ok(())
}

/// Refuses to change the link from `node` to `backing` under a job that depends on it.
fn check_jobs(node: &Node, backing: Option<&Rc<Node>>) -> Result<()> {
    // A job that lets nobody write what it reads is about to drop it and to link what lies above.
    let drops = |(user, with): &(User, Permissions)| {
        let reads = matches!(user, User::Job { role: Role::Source, .. });
        reads && with.shared & Permissions::WRITE == 0
    };
    if let Some(backing) = backing.filter(|backing| backing.uses().iter().any(drops)) {
        let (node, backing) = (node.name().to_string(), backing.name().to_string());
        return Err(GraphError::Frozen { node, backing }.into());
    }
    for user in node.users() {
        if let User::Filter { node: parent, role: Role::Source } = &user {
            let (node, parent) = (node.name().to_string(), parent.to_string());
            return Err(GraphError::BusyAsChild { node, edge: "file", parent }.into());
        }
        let User::Job { id, kind, role } = user else { continue };
        let below = backing.filter(|backing| {
            let same = |other: &User| matches!(other, User::Job { id: other, .. } if *other == id);
            backing.users().iter().any(same)
        });
        if let Some(backing) = below {
            let (node, backing) = (node.name().to_string(), backing.name().to_string());
            return Err(GraphError::Frozen { node, backing }.into());
        }
        if role == Role::Source {
            let (node, kind) = (node.name().to_string(), kind.to_owned());
            return Err(GraphError::BusyWithJob { node, kind }.into());
        }
    }
    Ok(())
}
