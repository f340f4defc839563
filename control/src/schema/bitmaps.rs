//! Arguments of the commands on dirty bitmaps.
//!
//! Owns: their data and typed form, which transactions share. `follow` is an addition of ours.

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::exports::{BITMAP, BITMAP_REFERENCE, BitmapRef};
use super::types::{Int, ObjectType, Type, may, need, object};

pub(super) static ADD: ObjectType = object(
    "BlockDirtyBitmapAdd",
    &[
        need("node", Type::Str),
        need("name", Type::Str),
        may("granularity", Type::Int(Int::U32)),
        may("persistent", Type::Bool),
        may("disabled", Type::Bool),
        may("follow", Type::Bool),
    ],
);
pub(super) static ONE: &ObjectType = &BITMAP;
pub(super) static MERGE: ObjectType = object(
    "BlockDirtyBitmapMerge",
    &[
        need("node", Type::Str),
        need("target", Type::Str),
        need("bitmaps", Type::Array(&BITMAP_REFERENCE)),
    ],
);
pub(super) static SHA256: ObjectType =
    object("BlockDirtyBitmapSha256", &[need("sha256", Type::Str)]);

/// Arguments of `block-dirty-bitmap-add`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BitmapAdd {
    /// The node.
    pub node: String,
    /// The bitmap.
    pub name: String,
    /// Bytes per bit; the node's default if absent.
    pub granularity: Option<u32>,
    /// Whether the image file keeps it.
    #[serde(default)]
    pub persistent: bool,
    /// Whether it starts without recording.
    #[serde(default)]
    pub disabled: bool,
    /// Whether it goes on at the node that takes the place of this one.
    #[serde(default)]
    pub follow: bool,
}

/// A bitmap of a node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BitmapOf {
    /// The node.
    pub node: String,
    /// The bitmap.
    pub name: String,
}

/// Arguments of `block-dirty-bitmap-merge`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BitmapMerge {
    /// The node of the target.
    pub node: String,
    /// The bitmap that takes the bits.
    pub target: String,
    /// The bitmaps whose bits are added.
    pub bitmaps: Vec<BitmapRef>,
}

/// A change of bitmaps: a command, or an action of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BitmapChange {
    /// `block-dirty-bitmap-add`.
    Add(BitmapAdd),
    /// `block-dirty-bitmap-remove`.
    Remove(BitmapOf),
    /// `block-dirty-bitmap-clear`.
    Clear(BitmapOf),
    /// `block-dirty-bitmap-enable`.
    Enable(BitmapOf),
    /// `block-dirty-bitmap-disable`.
    Disable(BitmapOf),
    /// `block-dirty-bitmap-merge`.
    Merge(BitmapMerge),
}

impl BitmapChange {
    /// Its name in QMP.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Add(_) => "block-dirty-bitmap-add",
            Self::Remove(_) => "block-dirty-bitmap-remove",
            Self::Clear(_) => "block-dirty-bitmap-clear",
            Self::Enable(_) => "block-dirty-bitmap-enable",
            Self::Disable(_) => "block-dirty-bitmap-disable",
            Self::Merge(_) => "block-dirty-bitmap-merge",
        }
    }

    /// The change called `name` with these arguments; none if there is no such change.
    pub(super) fn read<'de, D: Deserializer<'de>>(
        name: &str,
        data: D,
    ) -> Option<Result<Self, D::Error>> {
        Some(match name {
            "block-dirty-bitmap-add" => BitmapAdd::deserialize(data).map(Self::Add),
            "block-dirty-bitmap-remove" => BitmapOf::deserialize(data).map(Self::Remove),
            "block-dirty-bitmap-clear" => BitmapOf::deserialize(data).map(Self::Clear),
            "block-dirty-bitmap-enable" => BitmapOf::deserialize(data).map(Self::Enable),
            "block-dirty-bitmap-disable" => BitmapOf::deserialize(data).map(Self::Disable),
            "block-dirty-bitmap-merge" => BitmapMerge::deserialize(data).map(Self::Merge),
            _ => return None,
        })
    }

    /// The same for arguments that were checked.
    pub(super) fn command(name: &str, data: Value) -> Result<Self, serde_json::Error> {
        Self::read(name, data)
            .unwrap_or_else(|| Err(serde::de::Error::custom("no change of bitmaps has this name")))
    }
}
