//! Arguments of `blockdev-create`.
//!
//! Owns: the union of what can be made, as data and as typed form. `raw` is an addition: the peer
//! makes only files, and formats that have something to write.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::blockdev::{BlockdevRef, DRIVER, REFERENCE};
use super::types::{EnumType, INT, Int, ObjectType, Type, Variants, may, need, object, words};

const SIZE: Type = Type::Int(Int::Size);

static PREALLOCATION: EnumType = words("PreallocMode", &["off", "metadata", "falloc", "full"]);
static VERSION: EnumType = words("BlockdevQcow2Version", &["v2", "v3"]);
static COMPRESSION: EnumType = words("Qcow2CompressionType", &["zlib", "zstd"]);

static FILE: ObjectType = object(
    "BlockdevCreateOptionsFile",
    &[
        need("filename", Type::Str),
        need("size", SIZE),
        may("preallocation", Type::Enum(&PREALLOCATION)),
        may("nocow", Type::Bool),
        may("extent-size-hint", SIZE),
    ],
);

static QCOW2: ObjectType = object(
    "BlockdevCreateOptionsQcow2",
    &[
        need("file", Type::Alternate(&REFERENCE)),
        may("data-file", Type::Alternate(&REFERENCE)),
        may("data-file-raw", Type::Bool),
        may("extended-l2", Type::Bool),
        need("size", SIZE),
        may("version", Type::Enum(&VERSION)),
        may("backing-file", Type::Str),
        may("backing-fmt", Type::Enum(&DRIVER)),
        may("cluster-size", SIZE),
        may("preallocation", Type::Enum(&PREALLOCATION)),
        may("lazy-refcounts", Type::Bool),
        may("refcount-bits", INT),
        may("compression-type", Type::Enum(&COMPRESSION)),
    ],
);

static RAW: ObjectType = object(
    "BlockdevCreateOptionsRaw",
    &[
        need("file", Type::Alternate(&REFERENCE)),
        need("size", SIZE),
        may("preallocation", Type::Enum(&PREALLOCATION)),
    ],
);

static OPTIONS: ObjectType = ObjectType {
    name: "BlockdevCreateOptions",
    members: &[need("driver", Type::Enum(&DRIVER))],
    variants: Some(Variants {
        tag: "driver",
        cases: &[("file", &FILE), ("qcow2", &QCOW2), ("raw", &RAW)],
    }),
    features: &[],
};

pub(super) static CREATE: ObjectType =
    object("BlockdevCreate", &[need("job-id", Type::Str), need("options", Type::Object(&OPTIONS))]);

/// `blockdev-create`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevCreate {
    /// The job.
    pub job_id: String,
    /// What to make.
    pub options: CreateOptions,
}

/// What is allocated from the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PreallocMode {
    /// Nothing.
    #[default]
    Off,
    /// The format's metadata.
    Metadata,
    /// Space.
    Falloc,
    /// Space, by writing zeroes.
    Full,
}

impl PreallocMode {
    /// The name in QMP.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }
}

/// What to make, by driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CreateOptions {
    /// A file of the host.
    File(CreateFile),
    /// A qcow2 image.
    Qcow2(Box<CreateQcow2>),
    /// A raw image.
    Raw(CreateRaw),
    /// Of a driver that makes nothing.
    Other,
}

/// A new file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CreateFile {
    /// Its path.
    pub filename: String,
    /// Bytes.
    pub size: u64,
    /// What of it is allocated.
    #[serde(default)]
    pub preallocation: PreallocMode,
}

/// A new qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CreateQcow2 {
    /// What holds it.
    pub file: BlockdevRef,
    /// What holds the guest data, if the image does not.
    pub data_file: Option<BlockdevRef>,
    /// Whether the data file is a raw image of the disk at any time.
    pub data_file_raw: Option<bool>,
    /// Whether clusters have subclusters.
    pub extended_l2: Option<bool>,
    /// Bytes of the disk.
    pub size: u64,
    /// `v2` or `v3`.
    pub version: Option<String>,
    /// The backing reference to store.
    pub backing_file: Option<String>,
    /// The format of the backing file.
    pub backing_fmt: Option<String>,
    /// Bytes per cluster.
    pub cluster_size: Option<u64>,
    /// What is allocated from the start.
    pub preallocation: Option<PreallocMode>,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: Option<bool>,
    /// Width of a refcount.
    pub refcount_bits: Option<i64>,
    /// How compressed clusters are packed.
    pub compression_type: Option<String>,
}

/// A new raw image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CreateRaw {
    /// What holds it.
    pub file: BlockdevRef,
    /// Bytes of the disk.
    pub size: u64,
    /// What of it is allocated.
    #[serde(default)]
    pub preallocation: PreallocMode,
}

impl<'de> Deserialize<'de> for CreateOptions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let options = match value.get("driver").and_then(Value::as_str) {
            Some("file") => CreateFile::deserialize(value).map(Self::File),
            Some("raw") => CreateRaw::deserialize(value).map(Self::Raw),
            Some("qcow2") => CreateQcow2::deserialize(value).map(|q| Self::Qcow2(Box::new(q))),
            _ => return Ok(Self::Other),
        };
        options.map_err(D::Error::custom)
    }
}
