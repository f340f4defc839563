//! Arguments of the commands that shorten chains: stream and commit.

use serde::Deserialize;

use super::jobs::{CONVERGE, COPY_MODE, ConvergeOptions, MirrorCopyMode, ON_ERROR, OnError};
use super::types::{INT, Member, ObjectType, Type, may, need, object};

const fn may_deprecated(name: &'static str) -> Member {
    Member { name, ty: Type::Str, optional: true, features: &["deprecated"] }
}

pub(super) static STREAM: ObjectType = object(
    "BlockStream",
    &[
        may("job-id", Type::Str),
        need("device", Type::Str),
        may("base", Type::Str),
        may("base-node", Type::Str),
        may("backing-file", Type::Str),
        may("backing-mask-protocol", Type::Bool),
        may("bottom", Type::Str),
        may("speed", INT),
        may("on-error", Type::Enum(&ON_ERROR)),
        may("filter-node-name", Type::Str),
        may("auto-finalize", Type::Bool),
        may("auto-dismiss", Type::Bool),
    ],
);

pub(super) static COMMIT: ObjectType = object(
    "BlockCommit",
    &[
        may("job-id", Type::Str),
        need("device", Type::Str),
        may("base-node", Type::Str),
        may_deprecated("base"),
        may("top-node", Type::Str),
        may_deprecated("top"),
        may("backing-file", Type::Str),
        may("backing-mask-protocol", Type::Bool),
        may("speed", INT),
        may("on-error", Type::Enum(&ON_ERROR)),
        may("filter-node-name", Type::Str),
        may("auto-finalize", Type::Bool),
        may("auto-dismiss", Type::Bool),
        may("copy-mode", Type::Enum(&COPY_MODE)),
        may("converge", Type::Object(&CONVERGE)),
    ],
);

fn yes() -> bool {
    true
}

/// What stream and commit have in common.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChainJob {
    /// Name of the job; absent means the device's name, which nodes here do not have.
    pub job_id: Option<String>,
    /// The node at the head of the chain.
    pub device: String,
    /// File name of the base.
    pub base: Option<String>,
    /// Node name of the base.
    pub base_node: Option<String>,
    /// What the header is to say instead of the base's file name.
    pub backing_file: Option<String>,
    /// Write the format "raw" where the base is a plain file.
    #[serde(default)]
    pub backing_mask_protocol: bool,
    /// Bytes per second, 0 is unlimited.
    #[serde(default)]
    pub speed: i64,
    /// Policy for reads and writes.
    #[serde(default)]
    pub on_error: OnError,
    /// Name under which queries show the job's filter node.
    pub filter_node_name: Option<String>,
    /// Whether the job finishes by itself.
    #[serde(default = "yes")]
    pub auto_finalize: bool,
    /// Whether the job vanishes by itself.
    #[serde(default = "yes")]
    pub auto_dismiss: bool,
}

/// Arguments of `block-stream`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockStream {
    /// The common ones.
    #[serde(flatten)]
    pub job: ChainJob,
    /// Node name of the last layer that is copied.
    pub bottom: Option<String>,
}

/// Arguments of `block-commit`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockCommit {
    /// The common ones.
    #[serde(flatten)]
    pub job: ChainJob,
    /// Node name of the first layer that is committed; absent means the device.
    pub top_node: Option<String>,
    /// File name of that layer.
    pub top: Option<String>,
    /// Ours: how guest writes reach the base, where the top is the layer that guests write.
    #[serde(default)]
    pub copy_mode: MirrorCopyMode,
    /// Ours: be ready in time, where the top is the layer that guests write.
    pub converge: Option<ConvergeOptions>,
}
