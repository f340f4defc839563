//! Arguments of the commands that change one thing of existing nodes.

use serde::Deserialize;

use super::blockdev::{BLOCKDEV_OPTIONS, BlockdevOptions};
use super::types::{EnumType, INT, Int, ObjectType, Type, may, need, object, words};

pub(super) static CHANGE_BACKING_FILE: ObjectType = object(
    "ChangeBackingFile",
    &[
        need("device", Type::Str),
        need("image-node-name", Type::Str),
        need("backing-file", Type::Str),
    ],
);

pub(super) static WRITE_THRESHOLD: ObjectType = object(
    "BlockSetWriteThreshold",
    &[need("node-name", Type::Str), need("write-threshold", Type::Int(Int::U64))],
);

pub(super) static RESIZE: ObjectType = object(
    "BlockResize",
    &[may("device", Type::Str), may("node-name", Type::Str), need("size", INT)],
);

pub(super) static SET_ACTIVE: ObjectType =
    object("BlockdevSetActive", &[may("node-name", Type::Str), need("active", Type::Bool)]);

static BLOCKDEV_OPTIONS_TYPE: Type = Type::Object(&BLOCKDEV_OPTIONS);
pub(super) static REOPEN: ObjectType =
    object("BlockdevReopen", &[need("options", Type::Array(&BLOCKDEV_OPTIONS_TYPE))]);

static NODE_KIND: EnumType =
    words("XDbgBlockGraphNodeType", &["block-backend", "block-job", "block-driver"]);
static PERMISSION: EnumType =
    words("BlockPermission", &["consistent-read", "write", "write-unchanged", "resize"]);
static PERMISSION_TYPE: Type = Type::Enum(&PERMISSION);
static GRAPH_NODE: ObjectType = object(
    "XDbgBlockGraphNode",
    &[
        need("id", Type::Int(Int::U64)),
        need("type", Type::Enum(&NODE_KIND)),
        need("name", Type::Str),
    ],
);
static GRAPH_NODE_TYPE: Type = Type::Object(&GRAPH_NODE);
static GRAPH_EDGE: ObjectType = object(
    "XDbgBlockGraphEdge",
    &[
        need("parent", Type::Int(Int::U64)),
        need("child", Type::Int(Int::U64)),
        need("name", Type::Str),
        need("perm", Type::Array(&PERMISSION_TYPE)),
        need("shared-perm", Type::Array(&PERMISSION_TYPE)),
    ],
);
static GRAPH_EDGE_TYPE: Type = Type::Object(&GRAPH_EDGE);
pub(super) static GRAPH: ObjectType = object(
    "XDbgBlockGraph",
    &[need("nodes", Type::Array(&GRAPH_NODE_TYPE)), need("edges", Type::Array(&GRAPH_EDGE_TYPE))],
);

pub(super) static WRITE_THRESHOLD_EVENT: ObjectType = object(
    "BlockWriteThreshold",
    &[
        need("node-name", Type::Str),
        need("amount-exceeded", Type::Int(Int::U64)),
        need("write-threshold", Type::Int(Int::U64)),
    ],
);

/// `change-backing-file`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChangeBackingFile {
    /// The top of the chain.
    pub device: String,
    /// The node whose header is changed.
    pub image_node_name: String,
    /// The reference to store; empty removes it.
    pub backing_file: String,
}

/// `block-set-write-threshold`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct WriteThreshold {
    /// The node.
    pub node_name: String,
    /// Bytes; 0 takes the mark away.
    pub write_threshold: u64,
}

/// `block_resize`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockResize {
    /// A device; there are none here.
    pub device: Option<String>,
    /// The node.
    pub node_name: Option<String>,
    /// Bytes; negative ones are for the executor to refuse.
    pub size: i64,
}

/// `blockdev-set-active`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SetActive {
    /// The node; absent means all.
    pub node_name: Option<String>,
    /// What it is to be.
    pub active: bool,
}

/// `blockdev-reopen`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockdevReopen {
    /// Options of the nodes, each complete.
    pub options: Vec<BlockdevOptions>,
}
