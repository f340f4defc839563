//! Changes of dirty bitmaps as steps of a transaction.
//!
//! Order: (1) prepare, in the order of the list: checks, and what needs I/O (a place in the image
//! file for a new bitmap, the mark that the file is behind); a later action sees the bitmaps that
//! an earlier one adds, and a bitmap that is to be removed is busy; (2) swap, inside the cut and in
//! the order of the list: the changes themselves, at the same instant as snapshots and the starts
//! of backups; (3) finish: removed bitmaps are taken out of their files. Abort before (2) takes
//! what was added away again and leaves everything else as it was, in memory and in the files.

use std::rc::Rc;

use liveblk_engine::executor::Core;
use liveblk_engine::graph::Graph;
use liveblk_engine::node::{
    BitmapAccess, BitmapError, BitmapHold, BitmapSources, NewBitmap, Node, NodeBitmap, NodeId,
};

use crate::error::{JobError, Result};

/// A bitmap by the names of its node and of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapName {
    /// The node.
    pub node: String,
    /// The bitmap.
    pub name: String,
}

/// A change of a bitmap in a transaction.
#[derive(Clone, Debug)]
pub enum BitmapAction {
    /// `block-dirty-bitmap-add`.
    Add {
        /// The node.
        node: String,
        /// How it is made.
        new: NewBitmap,
    },
    /// `block-dirty-bitmap-remove`.
    Remove(BitmapName),
    /// `block-dirty-bitmap-clear`.
    Clear(BitmapName),
    /// `block-dirty-bitmap-enable`.
    Enable(BitmapName),
    /// `block-dirty-bitmap-disable`.
    Disable(BitmapName),
    /// `block-dirty-bitmap-merge`.
    Merge {
        /// The bitmap that takes the bits.
        target: BitmapName,
        /// The bitmaps whose bits are added.
        sources: Vec<BitmapName>,
    },
}

impl BitmapAction {
    /// The name in QMP.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Add { .. } => "block-dirty-bitmap-add",
            Self::Remove(_) => "block-dirty-bitmap-remove",
            Self::Clear(_) => "block-dirty-bitmap-clear",
            Self::Enable(_) => "block-dirty-bitmap-enable",
            Self::Disable(_) => "block-dirty-bitmap-disable",
            Self::Merge { .. } => "block-dirty-bitmap-merge",
        }
    }
}

/// A change that can be made.
pub(crate) struct PreparedBitmap {
    node: Rc<Node>,
    bitmap: Rc<NodeBitmap>,
    step: Step,
}

enum Step {
    Add { enabled: bool },
    Remove { _hold: BitmapHold },
    Clear,
    Switch { enabled: bool },
    Merge { sources: BitmapSources },
}

impl PreparedBitmap {
    /// The first half of `action`.
    pub(crate) async fn new(core: &Core, action: BitmapAction) -> Result<Self> {
        match action {
            BitmapAction::Add { node, new } => {
                let found = Graph::of(core).find(&node);
                let node = found.map_err(|_| JobError::NodeNotFound {
                    device: node.as_str().into(),
                    node: node.as_str().into(),
                })?;
                let enabled = !new.disabled;
                let bitmap = node.prepare_bitmap(new).await?;
                Ok(Self { node, bitmap, step: Step::Add { enabled } })
            }
            BitmapAction::Remove(of) => {
                let (node, bitmap) = find(core, &of)?;
                let hold = node.hold_bitmap(&of.name, "transaction", BitmapAccess::Remove)?;
                Ok(Self { node, bitmap, step: Step::Remove { _hold: hold } })
            }
            BitmapAction::Clear(of) => {
                let (node, bitmap) = find(core, &of)?;
                node.check_bitmap(&bitmap, BitmapAccess::Change)?;
                Ok(Self { node, bitmap, step: Step::Clear })
            }
            BitmapAction::Enable(of) => {
                let (node, bitmap) = find(core, &of)?;
                node.check_bitmap(&bitmap, BitmapAccess::Read)?;
                node.mark_bitmap(&bitmap).await?;
                Ok(Self { node, bitmap, step: Step::Switch { enabled: true } })
            }
            BitmapAction::Disable(of) => {
                let (node, bitmap) = find(core, &of)?;
                node.check_bitmap(&bitmap, BitmapAccess::Read)?;
                Ok(Self { node, bitmap, step: Step::Switch { enabled: false } })
            }
            BitmapAction::Merge { target, sources } => {
                let (node, bitmap) = find(core, &target)?;
                let source = |of| {
                    let (_, source) = find(core, of)?;
                    node.check_merge(&bitmap, &source)?;
                    Ok(source)
                };
                let sources = sources.iter().map(source).collect::<Result<BitmapSources>>()?;
                let bitmap = node.prepare_merge(&target.name, &sources).await?;
                Ok(Self { node, bitmap, step: Step::Merge { sources } })
            }
        }
    }

    /// The nodes that the cut must hold still.
    pub(crate) fn nodes(&self) -> Vec<NodeId> {
        vec![self.node.id()]
    }

    /// The change itself. Only inside the cut of [`PreparedBitmap::nodes`].
    pub(crate) fn swap(&self) {
        match &self.step {
            Step::Add { enabled } => self.node.start_bitmap(&self.bitmap, *enabled),
            Step::Remove { .. } => self.node.drop_bitmap(&self.bitmap),
            Step::Clear => self.node.wipe_bitmap(&self.bitmap),
            Step::Switch { enabled } => self.node.switch_bitmap(&self.bitmap, *enabled),
            Step::Merge { sources } => self.node.pour_bitmaps(&self.bitmap, sources),
        }
    }

    /// What is left to do afterwards.
    pub(crate) async fn finish(self) {
        if let Step::Remove { .. } = self.step {
            self.node.finish_drop(&self.bitmap).await;
        }
    }

    /// Undoes what was prepared.
    pub(crate) async fn abort(self) {
        if let Step::Add { .. } = self.step {
            self.node.withdraw_bitmap(&self.bitmap).await;
        }
    }
}

fn find(core: &Core, of: &BitmapName) -> Result<(Rc<Node>, Rc<NodeBitmap>)> {
    let found = Graph::of(core).find(&of.node);
    let node =
        found.map_err(|_| JobError::Engine(BitmapError::NodeNotFound(of.node.clone()).into()))?;
    let bitmap = node.bitmap(&of.name)?;
    Ok((node, bitmap))
}
