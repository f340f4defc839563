//! Arguments of exports, of the NBD server, of objects, and options of monitors.
//!
//! Owns: socket addresses in both forms (QMP wraps the address in `data`, options do not). Lists
//! only export types and object types that are built.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::types::{
    AlternateType, EnumType, INT, Int, Member, ObjectType, Type, Variants, may, need, object,
    union, words,
};

static ADDRESS_TYPE: EnumType = words("SocketAddressType", &["inet", "unix", "fd"]);
static INET: ObjectType = object(
    "InetSocketAddress",
    &[
        need("host", Type::Str),
        need("port", Type::Str),
        may("numeric", Type::Bool),
        may("to", Type::Int(Int::U16)),
        may("ipv4", Type::Bool),
        may("ipv6", Type::Bool),
        may("keep-alive", Type::Bool),
    ],
);
static UNIX: ObjectType = object(
    "UnixSocketAddress",
    &[need("path", Type::Str), may("abstract", Type::Bool), may("tight", Type::Bool)],
);
static FD: ObjectType = object("FdSocketAddress", &[need("str", Type::Str)]);
static INET_WRAPPER: ObjectType =
    object("InetSocketAddressWrapper", &[need("data", Type::Object(&INET))]);
static UNIX_WRAPPER: ObjectType =
    object("UnixSocketAddressWrapper", &[need("data", Type::Object(&UNIX))]);
static FD_WRAPPER: ObjectType =
    object("FdSocketAddressWrapper", &[need("data", Type::Object(&FD))]);

static ADDRESS: ObjectType = union(
    "SocketAddress",
    &[need("type", Type::Enum(&ADDRESS_TYPE))],
    "type",
    &[("inet", &INET), ("unix", &UNIX), ("fd", &FD)],
);
static ADDRESS_LEGACY: ObjectType = union(
    "SocketAddressLegacy",
    &[need("type", Type::Enum(&ADDRESS_TYPE))],
    "type",
    &[("inet", &INET_WRAPPER), ("unix", &UNIX_WRAPPER), ("fd", &FD_WRAPPER)],
);

const HANDSHAKE_SECONDS: Member = may("handshake-max-seconds", Type::Int(Int::U32));
const TLS_CREDS: Member = may("tls-creds", Type::Str);
const TLS_AUTHZ: Member = may("tls-authz", Type::Str);
const MAX_CONNECTIONS: Member = may("max-connections", Type::Int(Int::U32));

pub(super) static NBD_SERVER_START: ObjectType = object(
    "NbdServerOptionsLegacy",
    &[
        HANDSHAKE_SECONDS,
        TLS_CREDS,
        TLS_AUTHZ,
        MAX_CONNECTIONS,
        need("addr", Type::Object(&ADDRESS_LEGACY)),
    ],
);

/// Options of `--nbd-server`.
pub static NBD_SERVER_OPTIONS: ObjectType = object(
    "NbdServerOptions",
    &[
        HANDSHAKE_SECONDS,
        TLS_CREDS,
        TLS_AUTHZ,
        MAX_CONNECTIONS,
        need("addr", Type::Object(&ADDRESS)),
    ],
);

pub(super) static EXPORT_TYPE: EnumType = words("BlockExportType", &["nbd"]);
pub(super) static BITMAP: ObjectType =
    object("BlockDirtyBitmap", &[need("node", Type::Str), need("name", Type::Str)]);
static BITMAP_OR_NAME: AlternateType =
    AlternateType { name: "BlockDirtyBitmapOrStr", choices: &[Type::Str, Type::Object(&BITMAP)] };
pub(super) static BITMAP_REFERENCE: Type = Type::Alternate(&BITMAP_OR_NAME);
static NBD_EXPORT: ObjectType = object(
    "BlockExportOptionsNbd",
    &[
        may("name", Type::Str),
        may("description", Type::Str),
        may("bitmap", Type::Str),
        may("bitmaps", Type::Array(&BITMAP_REFERENCE)),
        may("allocation-depth", Type::Bool),
    ],
);

/// Arguments of `block-export-add` and `--export`.
pub static BLOCK_EXPORT_OPTIONS: ObjectType = ObjectType {
    name: "BlockExportOptions",
    members: &[
        need("type", Type::Enum(&EXPORT_TYPE)),
        need("id", Type::Str),
        may("fixed-iothread", Type::Bool),
        may("iothread", Type::Str),
        need("node-name", Type::Str),
        may("writable", Type::Bool),
        may("writethrough", Type::Bool),
        may("allow-inactive", Type::Bool),
    ],
    variants: Some(Variants { tag: "type", cases: &[("nbd", &NBD_EXPORT)] }),
    features: &[],
};

static REMOVE_MODE: EnumType = words("BlockExportRemoveMode", &["safe", "hard"]);
pub(super) static BLOCK_EXPORT_DEL: ObjectType =
    object("BlockExportDel", &[need("id", Type::Str), may("mode", Type::Enum(&REMOVE_MODE))]);

static OBJECT_TYPE: EnumType = words("ObjectType", &["iothread"]);
pub(super) static IOTHREAD: ObjectType = object(
    "IothreadProperties",
    &[
        may("aio-max-batch", INT),
        may("thread-pool-min", INT),
        may("thread-pool-max", INT),
        may("poll-max-ns", INT),
        may("poll-grow", INT),
        may("poll-shrink", INT),
    ],
);

/// Arguments of `object-add` and `--object`.
pub static OBJECT_OPTIONS: ObjectType = ObjectType {
    name: "ObjectOptions",
    members: &[need("qom-type", Type::Enum(&OBJECT_TYPE)), need("id", Type::Str)],
    variants: Some(Variants { tag: "qom-type", cases: &[("iothread", &IOTHREAD)] }),
    features: &[],
};

static MONITOR_MODE: EnumType = words("MonitorMode", &["readline", "control"]);

/// Options of `--monitor`.
pub static MONITOR_OPTIONS: ObjectType = object(
    "MonitorOptions",
    &[
        may("id", Type::Str),
        may("mode", Type::Enum(&MONITOR_MODE)),
        may("pretty", Type::Bool),
        need("chardev", Type::Str),
    ],
);

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketAddress {
    /// TCP.
    Inet(InetAddress),
    /// A socket in the file system.
    Unix(UnixAddress),
    /// A descriptor that the process inherited, by number.
    Fd(String),
}

/// A TCP address.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InetAddress {
    /// Name or number.
    pub host: String,
    /// Name or number; 0 lets the system choose.
    pub port: String,
    /// Last port to try.
    pub to: Option<u16>,
    /// Whether IPv4 may be used.
    pub ipv4: Option<bool>,
    /// Whether IPv6 may be used.
    pub ipv6: Option<bool>,
    /// Whether connections send keep-alive probes.
    pub keep_alive: Option<bool>,
}

/// A unix socket address.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct UnixAddress {
    /// Path.
    pub path: String,
    /// In the abstract name space.
    #[serde(rename = "abstract", default)]
    pub is_abstract: bool,
}

impl<'de> Deserialize<'de> for SocketAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut value = Value::deserialize(deserializer)?;
        let kind = value.get("type").and_then(Value::as_str).map(str::to_owned);
        let inner = match value.get_mut("data").map(Value::take) {
            Some(data) => data,
            None => value,
        };
        match kind.as_deref() {
            Some("inet") => InetAddress::deserialize(inner).map(Self::Inet),
            Some("unix") => UnixAddress::deserialize(inner).map(Self::Unix),
            Some("fd") => {
                Ok(Self::Fd(inner.get("str").and_then(Value::as_str).unwrap_or("").to_owned()))
            }
            _ => return Err(D::Error::custom("address without type")),
        }
        .map_err(D::Error::custom)
    }
}

/// Arguments of `nbd-server-start` and `--nbd-server`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NbdServerOptions {
    /// Where to listen.
    pub addr: SocketAddress,
    /// Id of TLS credentials.
    pub tls_creds: Option<String>,
    /// Id of an authorisation object.
    pub tls_authz: Option<String>,
    /// Connections at a time, 0 is unlimited.
    #[serde(default = "hundred")]
    pub max_connections: u32,
    /// Seconds a client has to finish negotiation, 0 is unlimited.
    #[serde(default = "ten")]
    pub handshake_max_seconds: u32,
}

fn hundred() -> u32 {
    100
}

fn ten() -> u32 {
    10
}

/// A bitmap of a node, or of the exported node's chain by name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum BitmapRef {
    /// By name, searched from the exported node down.
    Name(String),
    /// On a node.
    OnNode {
        /// The node.
        node: String,
        /// The bitmap.
        name: String,
    },
}

/// What an NBD export adds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct NbdExportOptions {
    /// Export name; absent means the node's name.
    pub name: Option<String>,
    /// Text for clients that list exports.
    pub description: Option<String>,
    /// A bitmap offered as metadata context: the form that the peer's manual page promises.
    pub bitmap: Option<String>,
    /// Bitmaps offered as metadata contexts.
    pub bitmaps: Vec<BitmapRef>,
    /// Whether the allocation depth is offered as metadata context.
    pub allocation_depth: bool,
}

/// The kinds of export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExportKind {
    /// Over the NBD server.
    Nbd(NbdExportOptions),
}

/// Arguments of `block-export-add` and `--export`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockExportAdd {
    /// Id of the export.
    pub id: String,
    /// The node.
    pub node_name: String,
    /// Whether clients may write; absent means false.
    pub writable: bool,
    /// Whether each write is flushed; absent means false.
    pub writethrough: bool,
    /// Iothread that serves it.
    pub iothread: Option<String>,
    /// Whether the iothread may never change.
    pub fixed_iothread: bool,
    /// Whether the node may be inactive.
    pub allow_inactive: bool,
    /// The kind and what it adds.
    pub kind: ExportKind,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ExportBase {
    id: String,
    node_name: String,
    #[serde(default)]
    writable: bool,
    #[serde(default)]
    writethrough: bool,
    iothread: Option<String>,
    #[serde(default)]
    fixed_iothread: bool,
    #[serde(default)]
    allow_inactive: bool,
}

impl<'de> Deserialize<'de> for BlockExportAdd {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let base = ExportBase::deserialize(&value).map_err(D::Error::custom)?;
        let nbd = NbdExportOptions::deserialize(value).map_err(D::Error::custom)?;
        Ok(Self {
            id: base.id,
            node_name: base.node_name,
            writable: base.writable,
            writethrough: base.writethrough,
            iothread: base.iothread,
            fixed_iothread: base.fixed_iothread,
            allow_inactive: base.allow_inactive,
            kind: ExportKind::Nbd(nbd),
        })
    }
}

/// What happens to connected clients of a removed export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExportRemoveMode {
    /// The removal is refused while clients are connected.
    #[default]
    Safe,
    /// They are disconnected.
    Hard,
}

/// Arguments of `block-export-del`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct BlockExportDel {
    /// The export.
    pub id: String,
    /// See [`ExportRemoveMode`].
    #[serde(default)]
    pub mode: ExportRemoveMode,
}

/// Properties of an iothread.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct IothreadOptions {
    /// Requests submitted at once; 0 is chosen by the program.
    pub aio_max_batch: Option<i64>,
    /// Threads kept for blocking calls.
    pub thread_pool_min: Option<i64>,
    /// Threads at most for blocking calls.
    pub thread_pool_max: Option<i64>,
    /// Longest busy wait.
    pub poll_max_ns: Option<i64>,
    /// Factor by which the busy wait grows.
    pub poll_grow: Option<i64>,
    /// Divisor by which it shrinks.
    pub poll_shrink: Option<i64>,
}

/// Arguments of `object-add` and `--object`; the only type is iothread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectAdd {
    /// Id of the object.
    pub id: String,
    /// Its properties.
    pub iothread: IothreadOptions,
}

impl<'de> Deserialize<'de> for ObjectAdd {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let id = value.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
        let iothread = IothreadOptions::deserialize(value).map_err(D::Error::custom)?;
        Ok(Self { id, iothread })
    }
}

/// Options of `--monitor`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct MonitorOptions {
    /// Id of the monitor; kept for the log.
    pub id: Option<String>,
    /// The chardev it speaks on.
    pub chardev: String,
    /// `control` or `readline`.
    pub mode: Option<String>,
    /// Whether output is indented.
    #[serde(default)]
    pub pretty: bool,
}
