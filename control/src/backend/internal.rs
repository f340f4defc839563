//! Snapshots inside an image, of a running node.

use std::time::{SystemTime, UNIX_EPOCH};

use liveblk_engine::format::SnapshotInfo;
use liveblk_jobs::{Action, CompletionMode, InternalSnapshot, delete_internal_snapshot};
use serde_json::{Value, json};

use super::control::{Control, Result};
use super::errors::Failure;
use crate::schema::{BlockdevSnapshotDelete, BlockdevSnapshotInternal};

impl Control {
    /// `blockdev-snapshot-internal-sync`.
    pub(super) async fn snapshot_internal(&self, snapshot: BlockdevSnapshotInternal) -> Result<()> {
        let action = Action::InternalSnapshot(internal_snapshot(snapshot));
        self.run_transaction(vec![action], CompletionMode::Individual).await
    }

    /// `blockdev-snapshot-delete-internal-sync`.
    pub(super) async fn delete_internal(&self, wanted: &BlockdevSnapshotDelete) -> Result<Value> {
        let (id, name) = (wanted.id.as_deref(), wanted.name.as_deref());
        let device = &wanted.device;
        self.node(device)?;
        if id.is_none() && name.is_none() {
            return Err(Failure::generic("Name or id must be provided"));
        }
        Ok(facts(&delete_internal_snapshot(&self.core, device, id, name).await?))
    }
}

/// The action, at this time.
pub(super) fn internal_snapshot(snapshot: BlockdevSnapshotInternal) -> InternalSnapshot {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    InternalSnapshot {
        node: snapshot.device,
        name: snapshot.name,
        date_sec: u32::try_from(since.as_secs()).unwrap_or(u32::MAX),
        date_nsec: since.subsec_micros() * 1000,
    }
}

/// A snapshot in the peer's shape.
fn facts(snapshot: &SnapshotInfo) -> Value {
    let mut row = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec / 1_000_000_000,
        "vm-clock-nsec": snapshot.vm_clock_nsec % 1_000_000_000,
    });
    if let (Some(icount), Some(members)) = (snapshot.icount, row.as_object_mut()) {
        members.insert("icount".to_owned(), json!(icount));
    }
    row
}
