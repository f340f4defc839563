//! `blockdev-add` of the drivers copy-before-write and snapshot-access.
//!
//! Owns: the translation of their options. Does not: keep or read anything; the jobs crate does.

use std::rc::Rc;

use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::node::{BitmapAccess, Node};
use liveblk_jobs::limits::BACKUP_GRANULE_MAX;
use liveblk_jobs::{CopyBeforeWriteSpec, OnCbwError, add_copy_before_write, add_snapshot_access};

use super::control::{Control, Result};
use super::errors::Failure;
use super::nodes::child_image;
use crate::schema::{self, BlockdevRef, CbwOptions, Discard, NodeOptions};

impl Control {
    /// Adds a copy-before-write filter.
    pub(super) async fn add_cbw(&self, node: &NodeOptions, cbw: CbwOptions) -> Result<()> {
        if let Some(name) = &node.node_name {
            self.graph.check_name(name)?;
        }
        check_granule(cbw.min_cluster_size)?;
        let (source, new_source) = self.child(cbw.file).await?;
        let target = self.child(cbw.target).await;
        let added = match target {
            Ok((target, new_target)) => {
                let owned = new_target.then(|| Rc::clone(&target));
                let bitmap = cbw.bitmap.as_ref().map(|named| self.bitmap_bits(named)).transpose();
                let added = match bitmap {
                    Ok(bitmap) => {
                        let spec = CopyBeforeWriteSpec {
                            name: node.node_name.clone(),
                            source: source.served(),
                            target: target.served(),
                            owned: owned.clone(),
                            bitmap,
                            on_error: on_cbw_error(cbw.on_cbw_error),
                            timeout_ns: timeout(cbw.cbw_timeout),
                            min_cluster_size: cbw.min_cluster_size.unwrap_or(0),
                        };
                        add_copy_before_write(spec).await.map_err(Failure::from)
                    }
                    Err(error) => Err(error),
                };
                if let (Err(_), Some(owned)) = (&added, owned) {
                    self.graph.remove(&owned).await?;
                }
                added
            }
            Err(error) => Err(error),
        };
        if added.is_err() && new_source {
            self.graph.remove(&source).await?;
        }
        added.map(drop)
    }

    /// Adds a view of the snapshot that a copy-before-write filter keeps.
    pub(super) async fn add_snapshot_access(
        &self,
        node: &NodeOptions,
        file: BlockdevRef,
    ) -> Result<()> {
        let BlockdevRef::Name(name) = file else {
            return Err(Failure::generic(
                "The 'file' of a snapshot-access node is a copy-before-write node: add that first \
                 and name it",
            ));
        };
        let filter = self.graph.find(&name).map_err(|_| Failure::no_node(&name, &name))?;
        let unmap = node.discard == Some(Discard::Unmap);
        add_snapshot_access(&self.core, node.node_name.as_deref(), &filter, unmap)?;
        Ok(())
    }

    /// A child by name, or opened for its parent (then true).
    async fn child(&self, reference: BlockdevRef) -> Result<(Rc<Node>, bool)> {
        match reference {
            BlockdevRef::Name(name) => {
                let found = self.graph.find(&name);
                Ok((found.map_err(|_| Failure::no_node(&name, &name))?, false))
            }
            BlockdevRef::Null => Err(Failure::generic("Parameter 'file' is missing")),
            BlockdevRef::Definition(definition) => {
                Ok((self.graph.open(child_image(*definition)?).await?, true))
            }
        }
    }

    /// The bits of a bitmap as they are now.
    fn bitmap_bits(&self, named: &schema::NamedBitmap) -> Result<DirtyBitmap> {
        let node = self.node(&named.node)?;
        let bitmap = node.bitmap(&named.name)?;
        node.check_bitmap(&bitmap, BitmapAccess::Read)?;
        Ok(bitmap.view(Clone::clone))
    }
}

/// Refuses what no unit of copy-before-write can be.
pub(super) fn check_granule(least: Option<u64>) -> Result<()> {
    let least = least.unwrap_or(0);
    let wrong = if least > 0 && !least.is_power_of_two() {
        "min-cluster-size needs to be a power of 2"
    } else if least > BACKUP_GRANULE_MAX {
        "min-cluster-size is too large (at most 67108864)"
    } else {
        return Ok(());
    };
    Err(Failure::generic(format!("Cannot create block-copy-state: {wrong}")))
}

fn timeout(seconds: Option<u32>) -> Option<u64> {
    seconds.filter(|seconds| *seconds > 0).map(|seconds| u64::from(seconds) * 1_000_000_000)
}

/// The policy as jobs know it.
pub(super) fn on_cbw_error(policy: schema::OnCbwError) -> OnCbwError {
    match policy {
        schema::OnCbwError::BreakGuestWrite => OnCbwError::BreakGuestWrite,
        schema::OnCbwError::BreakSnapshot => OnCbwError::BreakSnapshot,
    }
}
