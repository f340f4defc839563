//! Commands that change one thing of an existing node: its backing reference, its size, the mark
//! that its writes are watched for.
//!
//! Owns: who may be in the way, with the peer's texts. A larger size is no harm to a front door or
//! to a backup (which stays the disk as it was at its start), so they do not refuse it; mirrors and
//! active commits grow their targets with it. A smaller one is refused by everybody who uses the
//! node.

use std::rc::Rc;

use liveblk_engine::executor::Core;
use liveblk_engine::format::{BackingRef, Preallocation};
use liveblk_engine::graph::GraphError;
use liveblk_engine::node::{Node, Permissions, Role, User};
use liveblk_engine::storage::Tell;
use liveblk_jobs::JobManager;
use serde_json::json;

use super::control::{Control, Result};
use super::errors::Failure;
use super::events::Sinks;
use crate::qmp::Event;
use crate::schema::{BlockResize, ChangeBackingFile, WriteThreshold};

impl Control {
    /// `change-backing-file`. The header names the format of the node that lies below; the peer
    /// writes the image's own, which is wrong for a backing file of another format.
    pub(super) async fn change_backing_file(&self, change: ChangeBackingFile) -> Result<()> {
        let top = self.node(&change.device)?;
        if !is_root(&top) {
            return Err(Failure::generic("Need a root block node"));
        }
        let name = &change.image_node_name;
        let image = self.graph.find(name).map_err(|_| Failure::no_node("", name))?;
        let Some(backing) = image.backing() else {
            let desc = "not allowing backing file change on an image without a backing file";
            return Err(Failure::generic(desc));
        };
        if !chain_of(top).any(|node| node.id() == image.id()) {
            let desc = format!("'{}' and image file are not in the same chain", change.device);
            return Err(Failure::generic(desc));
        }
        let format = match backing.driver() {
            "file" => "raw",
            driver => driver,
        };
        let reference = (!change.backing_file.is_empty()).then(|| BackingRef {
            file: change.backing_file.clone(),
            format: Some(format.to_owned()),
        });
        let kept = image.keep_writable().await.map_err(|error| match error.errno() {
            libc::EACCES | libc::EPERM | libc::EROFS => {
                Failure::generic(GraphError::ReadOnly.to_string())
            }
            _ => error.into(),
        })?;
        let written = image.format().set_backing(reference).await;
        let ended = kept.end().await;
        written.map_err(|error| {
            let file = &change.backing_file;
            let why = nix::errno::Errno::from_raw(error.errno()).desc();
            Failure::generic(format!("Could not change backing file to '{file}': {why}"))
        })?;
        Ok(ended?)
    }

    /// `block-set-write-threshold`.
    pub(super) fn set_write_threshold(&self, mark: &WriteThreshold) -> Result<()> {
        let name = &mark.node_name;
        let node = self
            .graph
            .find(name)
            .map_err(|_| Failure::generic(format!("Device '{name}' not found")))?;
        let tell = tell_of(&self.core, &node);
        node.write_watch().set_threshold(mark.write_threshold, tell);
        Ok(())
    }

    /// `block_resize`.
    pub(super) async fn resize(&self, resize: BlockResize) -> Result<()> {
        let name = resize.node_name.unwrap_or_default();
        let device = resize.device.unwrap_or_default();
        let node = self.graph.find(&name).map_err(|_| Failure::no_node(&device, &name))?;
        let size = u64::try_from(resize.size)
            .map_err(|_| Failure::generic("Parameter 'size' expects a >0 size"))?;
        check_resize(&self.jobs, &node, size)?;
        Ok(liveblk_jobs::resize(&node, size, Preallocation::Off).await?)
    }
}

/// Whether no node, and no job's filter, stands above `node`.
pub(super) fn is_root(node: &Node) -> bool {
    !node.users().iter().any(|user| match user {
        User::Guest { .. } => false,
        User::Overlay { .. } | User::Format { .. } | User::Data { .. } => true,
        User::Filter { role, .. } | User::Job { role, .. } => *role == Role::Source,
    })
}

fn chain_of(top: Rc<Node>) -> impl Iterator<Item = Rc<Node>> {
    std::iter::successors(Some(top), |node| node.backing())
}

/// What is told when a write to `node` goes beyond its mark.
fn tell_of(core: &Core, node: &Rc<Node>) -> Tell {
    let sinks = core.extension(Sinks::default);
    let name = node.name();
    Rc::new(move |exceeded| {
        let data = json!({
            "node-name": &*name,
            "amount-exceeded": exceeded.amount,
            "write-threshold": exceeded.threshold,
        });
        sinks.emit(&Event::now("BLOCK_WRITE_THRESHOLD", data));
    })
}

/// Who is in the way of a new size.
fn check_resize(jobs: &JobManager, node: &Rc<Node>, size: u64) -> Result<()> {
    let name = node.name().to_string();
    let grows = size >= node.size();
    let users = node.users();
    for user in &users {
        match user {
            User::Overlay { node: parent } => {
                let (edge, parent) = ("backing", parent.to_string());
                return Err(refusal(GraphError::BusyAsChild { node: name, edge, parent }));
            }
            User::Job { kind: "backup", role: Role::Source, .. } => {}
            // Its target grows, too; a smaller size is refused by it.
            User::Job { id, role: Role::Source, .. } if jobs.follows(id, node.id()) => {}
            User::Job { kind: "backup", role: Role::Target, .. } if !grows => {
                let kind = "backup".to_owned();
                return Err(refusal(GraphError::BusyWithJob { node: name, kind }));
            }
            User::Job { kind, .. } if *kind != "backup" => {
                let kind = (*kind).to_owned();
                return Err(refusal(GraphError::BusyWithJob { node: name, kind }));
            }
            _ => {}
        }
    }
    let tolerates = |user: &User| match user {
        User::Guest { .. } => grows,
        User::Job { id, .. } => grows || jobs.follows(id, node.id()),
        _ => false,
    };
    if !users.iter().all(tolerates) {
        let with = Permissions { perm: Permissions::RESIZE, shared: Permissions::ALL };
        drop(Node::use_by(node, User::Guest { name: "".into() }, with)?);
    }
    if !node.is_active() {
        return Err(refusal(GraphError::InactivePermission("resize")));
    }
    if !node.is_writable() {
        return Err(refusal(GraphError::ReadOnly));
    }
    Ok(())
}

fn refusal(error: GraphError) -> Failure {
    liveblk_engine::Error::from(error).into()
}
