//! Arguments of the small commands: negotiation, queries, node removal.

use super::types::{EnumType, ObjectType, Type, may, need, object, words};

static CAPABILITY: EnumType = words("QMPCapability", &["oob"]);
static CAPABILITY_TYPE: Type = Type::Enum(&CAPABILITY);

pub(super) static QMP_CAPABILITIES: ObjectType =
    object("QmpCapabilities", &[may("enable", Type::Array(&CAPABILITY_TYPE))]);
pub(super) static BLOCKDEV_DEL: ObjectType = object("BlockdevDel", &[need("node-name", Type::Str)]);
pub(super) static NAMED_BLOCK_NODES: ObjectType =
    object("QueryNamedBlockNodes", &[may("flat", Type::Bool)]);
pub(super) static BLOCKSTATS: ObjectType =
    object("QueryBlockstats", &[may("query-nodes", Type::Bool)]);
