//! Commands on dirty bitmaps.
//!
//! Owns: the translation of arguments, the order in which the peer looks at them, and the form of a
//! bitmap that its checksum is taken of. Does not: check or change bitmaps; the nodes do.

use std::rc::Rc;

use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::node::{BitmapError, BitmapFacts, BitmapSources, NewBitmap, Node, NodeBitmap};
use liveblk_jobs::{BitmapAction, BitmapName};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::control::{Control, Result};
use super::errors::Failure;
use crate::schema::{BitmapAdd, BitmapChange, BitmapOf, BitmapRef};

/// Bytes of a bitmap that are hashed at once.
const PIECE: usize = 64 << 10;

impl From<BitmapError> for Failure {
    fn from(error: BitmapError) -> Self {
        liveblk_engine::Error::from(error).into()
    }
}

impl Control {
    /// Changes bitmaps.
    pub(super) async fn change_bitmap(&self, change: BitmapChange) -> Result<()> {
        match change {
            BitmapChange::Add(add) => {
                let (node, new) = self.new_bitmap(add)?;
                node.add_bitmap(new).await?;
            }
            BitmapChange::Remove(BitmapOf { node, name }) => {
                self.bitmap_node(&node)?.remove_bitmap(&name).await?;
            }
            BitmapChange::Clear(BitmapOf { node, name }) => {
                self.bitmap_node(&node)?.clear_bitmap(&name)?;
            }
            BitmapChange::Enable(BitmapOf { node, name }) => {
                self.bitmap_node(&node)?.enable_bitmap(&name, true).await?;
            }
            BitmapChange::Disable(BitmapOf { node, name }) => {
                self.bitmap_node(&node)?.enable_bitmap(&name, false).await?;
            }
            BitmapChange::Merge(merge) => {
                let node = self.bitmap_node(&merge.node)?;
                let target = node.bitmap(&merge.target)?;
                let sources = self.bitmap_sources(&node, &target, &merge.bitmaps)?;
                node.merge_bitmaps(&merge.target, sources).await?;
            }
        }
        Ok(())
    }

    /// The node of a new bitmap, and how it is made.
    fn new_bitmap(&self, add: BitmapAdd) -> Result<(Rc<Node>, NewBitmap)> {
        let (name, new) = new_bitmap(add)?;
        Ok((self.node(&name)?, new))
    }

    /// The node that holds a bitmap.
    pub(super) fn bitmap_node(&self, name: &str) -> Result<Rc<Node>> {
        let found = self.graph.find(name);
        found.map_err(|_| BitmapError::NodeNotFound(name.to_owned()).into())
    }

    /// The bitmaps that `references` name, those without a node on `node`, looked up and checked
    /// one after the other as by the peer.
    fn bitmap_sources(
        &self,
        node: &Rc<Node>,
        target: &NodeBitmap,
        references: &[BitmapRef],
    ) -> Result<BitmapSources> {
        let source = |reference: &BitmapRef| {
            let source = match reference {
                BitmapRef::Name(name) => node.bitmap(name)?,
                BitmapRef::OnNode { node, name } => self.bitmap_node(node)?.bitmap(name)?,
            };
            node.check_merge(target, &source)?;
            Ok(source)
        };
        references.iter().map(source).collect()
    }

    /// `x-debug-block-dirty-bitmap-sha256`.
    pub(super) fn bitmap_sha256(&self, bitmap: &BitmapOf) -> Result<Value> {
        let bitmap = self.bitmap_node(&bitmap.node)?.bitmap(&bitmap.name)?;
        let digest: String = bitmap.view(hash).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(json!({ "sha256": digest }))
    }
}

/// The name of the node of a new bitmap, and how the bitmap is made.
fn new_bitmap(add: BitmapAdd) -> Result<(String, NewBitmap)> {
    if add.name.is_empty() {
        // The peer looks at the name before it looks for the node.
        return Err(BitmapError::NameEmpty.into());
    }
    let new = NewBitmap {
        name: add.name,
        granularity: add.granularity.map(u64::from),
        persistent: add.persistent,
        disabled: add.disabled,
        follow: add.follow,
    };
    Ok((add.node, new))
}

/// A change as an action of a transaction.
pub(super) fn bitmap_action(change: BitmapChange) -> Result<BitmapAction> {
    let of = |BitmapOf { node, name }| BitmapName { node, name };
    Ok(match change {
        BitmapChange::Add(add) => {
            let (node, new) = new_bitmap(add)?;
            BitmapAction::Add { node, new }
        }
        BitmapChange::Remove(bitmap) => BitmapAction::Remove(of(bitmap)),
        BitmapChange::Clear(bitmap) => BitmapAction::Clear(of(bitmap)),
        BitmapChange::Enable(bitmap) => BitmapAction::Enable(of(bitmap)),
        BitmapChange::Disable(bitmap) => BitmapAction::Disable(of(bitmap)),
        BitmapChange::Merge(merge) => {
            let source = |reference| match reference {
                BitmapRef::Name(name) => BitmapName { node: merge.node.clone(), name },
                BitmapRef::OnNode { node, name } => BitmapName { node, name },
            };
            let sources = merge.bitmaps.into_iter().map(source).collect();
            let target = BitmapName { node: merge.node.clone(), name: merge.target };
            BitmapAction::Merge { target, sources }
        }
    })
}

/// The checksum of the bits in 64-bit words, little end first, at least one word.
fn hash(bits: &DirtyBitmap) -> [u8; 32] {
    let mut left = bits.granules().div_ceil(64).max(1).saturating_mul(8);
    let mut hasher = Sha256::new();
    let mut first = 0;
    while left > 0 {
        let len = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
        let mut piece = vec![0; len];
        bits.add_to_bytes(first, &mut piece);
        hasher.update(&piece);
        first += len as u64 * 8;
        left -= len as u64;
    }
    hasher.finalize().into()
}

/// The member `dirty-bitmaps` of a node, if it has bitmaps.
pub(super) fn dirty_bitmaps(node: &Node) -> Option<Value> {
    let facts = node.bitmap_facts();
    (!facts.is_empty()).then(|| facts.into_iter().map(row).collect())
}

fn row(facts: BitmapFacts) -> Value {
    let mut row = Map::new();
    row.extend(facts.name.map(|name| ("name".to_owned(), json!(&*name))));
    row.insert("recording".to_owned(), json!(facts.recording));
    row.insert("persistent".to_owned(), json!(facts.persistent));
    row.insert("busy".to_owned(), json!(facts.busy));
    row.insert("granularity".to_owned(), json!(facts.granularity));
    row.insert("count".to_owned(), json!(facts.count));
    if facts.inconsistent {
        row.insert("inconsistent".to_owned(), json!(true));
    }
    if facts.follow {
        row.insert("follow".to_owned(), json!(true));
    }
    Value::Object(row)
}
