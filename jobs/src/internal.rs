//! Snapshots inside an image file, taken and removed while guests write.
//!
//! A snapshot is a step of a transaction (a single one is a transaction of one). Order: 1. prepare:
//! checks, nothing is written; 2. take: with the gates of all nodes of the transaction closed and
//! everything flushed, the image gets the snapshot durably; 3. the other actions swap. A failure
//! after 2 and before 3 removes the snapshot again, so that a transaction that failed left none.
//!
//! Does not: apply a snapshot to a node in use; no command of QMP does that to a running node.

use std::rc::Rc;

use liveblk_engine::executor::Core;
use liveblk_engine::format::{InternalSnapshots, SnapshotInfo};
use liveblk_engine::node::{Node, NodeId};

use crate::error::{JobError, Result, SnapshotError};
use crate::snapshot::find;

/// A snapshot inside an image (`blockdev-snapshot-internal-sync`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InternalSnapshot {
    /// The node, by name.
    pub node: String,
    /// The snapshot's name.
    pub name: String,
    /// Its time: whole seconds since the epoch.
    pub date_sec: u32,
    /// The nanoseconds that belong to `date_sec`.
    pub date_nsec: u32,
}

/// A snapshot that can be taken.
pub(crate) struct PreparedInternal {
    node: Rc<Node>,
    held: Rc<dyn InternalSnapshots>,
    spec: InternalSnapshot,
    taken: Option<SnapshotInfo>,
}

/// Step 1.
pub(crate) fn prepare(core: &Core, spec: InternalSnapshot) -> Result<PreparedInternal> {
    let node = find(core, &spec.node, &spec.node)?;
    if !node.takes_writers() {
        return Err(SnapshotError::ReadOnly { device: spec.node.into() }.into());
    }
    let held = snapshots_of(&node, &spec.node)?;
    if spec.name.is_empty() {
        return Err(SnapshotError::EmptyName.into());
    }
    if held.list().iter().any(|known| known.name == spec.name) {
        let (name, device) = (spec.name.into(), spec.node.into());
        return Err(SnapshotError::InternalExists { name, device }.into());
    }
    Ok(PreparedInternal { node, held, spec, taken: None })
}

impl PreparedInternal {
    /// The node of the cut.
    pub(crate) fn nodes(&self) -> Vec<NodeId> {
        vec![self.node.id()]
    }

    /// Step 2.
    pub(crate) async fn take(&mut self) -> Result<()> {
        // Two actions of one transaction may have asked for one name.
        if self.held.list().iter().any(|known| known.name == self.spec.name) {
            let (name, device) = (self.spec.name.as_str().into(), self.spec.node.as_str().into());
            return Err(SnapshotError::InternalExists { name, device }.into());
        }
        let info = SnapshotInfo {
            name: self.spec.name.clone(),
            date_sec: self.spec.date_sec,
            date_nsec: self.spec.date_nsec,
            icount: Some(0),
            disk_size: self.node.size(),
            ..SnapshotInfo::default()
        };
        let taken = self.held.create(info).await.map_err(|source| SnapshotError::Internal {
            name: self.spec.name.as_str().into(),
            device: self.spec.node.as_str().into(),
            source,
        })?;
        self.taken = Some(taken);
        Ok(())
    }

    /// Removes what was taken.
    pub(crate) async fn abort(self) {
        if let Some(taken) = self.taken
            && let Err(error) = self.held.delete(&taken.id).await
        {
            tracing::warn!(%error, name = %taken.name, "a snapshot that failed in part stays");
        }
    }
}

/// Removes the snapshot of `device` with this id and this name (those that are given).
///
/// # Errors
/// No such node or snapshot; what the image says.
pub async fn delete_internal_snapshot(
    core: &Core,
    device: &str,
    id: Option<&str>,
    name: Option<&str>,
) -> Result<SnapshotInfo> {
    let node = find(core, device, device)?;
    let held = snapshots_of(&node, device)?;
    let fits = |known: &SnapshotInfo| {
        id.is_none_or(|id| known.id == id) && name.is_none_or(|name| known.name == name)
    };
    let missing = || SnapshotError::InternalMissing {
        id: id.unwrap_or("null").into(),
        name: name.unwrap_or("null").into(),
        device: device.into(),
    };
    let found = held.list().into_iter().find(fits).ok_or_else(missing)?;
    held.delete(&found.id).await?;
    Ok(found)
}

fn snapshots_of(node: &Rc<Node>, device: &str) -> Result<Rc<dyn InternalSnapshots>> {
    node.format().abilities().snapshots.ok_or_else(|| {
        let (format, device) = (node.driver().into(), device.into());
        JobError::from(SnapshotError::InternalUnsupported { format, device })
    })
}
