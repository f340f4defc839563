//! Arguments of `x-blockdev-amend`.
//!
//! Owns: the data and typed form. Only keys of an encryption can be named, as with the peer.

use serde::Deserialize;

use super::blockdev::DRIVER;
use super::types::{
    EMPTY, EnumType, INT, ObjectType, Type, Variants, may, need, object, union, words,
};

static STATE: EnumType = words("QCryptoBlockLUKSKeyslotState", &["active", "inactive"]);
static FORMAT: EnumType = words("QCryptoBlockFormat", &["qcow", "luks"]);

static LUKS: ObjectType = object(
    "QCryptoBlockAmendOptionsLUKS",
    &[
        need("state", Type::Enum(&STATE)),
        may("new-secret", Type::Str),
        may("old-secret", Type::Str),
        may("keyslot", INT),
        may("iter-time", INT),
        may("secret", Type::Str),
    ],
);

static ENCRYPT: ObjectType = union(
    "QCryptoBlockAmendOptions",
    &[need("format", Type::Enum(&FORMAT))],
    "format",
    &[("luks", &LUKS), ("qcow", &EMPTY)],
);

static QCOW2: ObjectType =
    object("BlockdevAmendOptionsQcow2", &[may("encrypt", Type::Object(&ENCRYPT))]);

static OPTIONS: ObjectType = ObjectType {
    name: "BlockdevAmendOptions",
    members: &[need("driver", Type::Enum(&DRIVER))],
    variants: Some(Variants { tag: "driver", cases: &[("qcow2", &QCOW2)] }),
    features: &[],
};

pub(super) static AMEND: ObjectType = object(
    "XBlockdevAmend",
    &[
        need("job-id", Type::Str),
        need("node-name", Type::Str),
        need("options", Type::Object(&OPTIONS)),
        may("force", Type::Bool),
    ],
);

/// `x-blockdev-amend`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevAmend {
    /// The job.
    pub job_id: String,
    /// The node.
    pub node_name: String,
    /// What to change.
    pub options: AmendOptions,
}

/// What to change.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct AmendOptions {
    /// The driver of the node.
    pub driver: String,
    /// Keys of the encryption.
    #[serde(default)]
    pub encrypt: Option<serde_json::Value>,
}
