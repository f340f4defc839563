//! What a new image is like: options by their QMP names, and which of them go together.
//!
//! Does no I/O. The texts and the order of the checks are those of the peer's `blockdev-create`.

use liveblk_engine::format::{BackingRef, CreateImage, FormatOptions, InfoValue, Preallocation};

use super::layout::{
    AUTOCLEAR_DATA_FILE_RAW, CLUSTER_BITS, COMPATIBLE_LAZY, ENTRY_BYTES, Geometry,
    INCOMPATIBLE_COMPRESSION, INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2,
};
use crate::create_reason::CreateReason;
use crate::limits::L1_BYTES_MAX;
use crate::reason::Reason;

/// Clusters of extended L2 entries have at least so many bytes.
const EXTENDED_CLUSTER_MIN: u64 = 16 << 10;

/// How compressed clusters are packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate.
    #[default]
    Zlib,
    /// Zstandard; needs version 3.
    Zstd,
}

/// What a new image is like.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// The backing reference to store, as it is.
    pub backing: Option<BackingRef>,
    /// Bytes per cluster, a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// 2 (compat 0.10) or 3 (compat 1.1).
    pub version: u32,
    /// Width of a refcount as a power of two, 0 to 6; version 2 has 4.
    pub refcount_order: u32,
    /// Whether refcounts may be stale while the image is open for writing; needs version 3.
    pub lazy_refcounts: bool,
    /// How compressed clusters are packed.
    pub compression_type: CompressionType,
    /// Clusters of 32 subclusters; needs version 3 and clusters of at least 16 KiB.
    pub extended_l2: bool,
    /// What is allocated from the start.
    pub preallocation: Preallocation,
    /// The name of the external data file, as it is stored; needs version 3.
    pub data_file: Option<String>,
    /// Whether the data file is a raw image of the disk at any time.
    pub data_file_raw: bool,
}

impl CreateOptions {
    /// The defaults of qemu-img: version 3, 64 KiB clusters, 16-bit refcounts.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            backing: None,
            cluster_size: 64 << 10,
            version: 3,
            refcount_order: 4,
            lazy_refcounts: false,
            compression_type: CompressionType::Zlib,
            extended_l2: false,
            preallocation: Preallocation::Off,
            data_file: None,
            data_file_raw: false,
        }
    }

    /// The options of a creation by QMP names: `version` (v2, v3), `cluster-size`,
    /// `preallocation` (off, metadata, falloc, full), `refcount-bits`, `lazy-refcounts`,
    /// `compression-type` (zlib, zstd), `extended-l2`, `data-file` (the name to store) and
    /// `data-file-raw`. Numbers and truth values may also be texts.
    ///
    /// # Errors
    /// What is unknown or no value of its option; combinations are checked by `create`.
    pub fn parse(image: &CreateImage) -> Result<Self, Reason> {
        let mut options = Self::new(image.size);
        options.backing.clone_from(&image.backing);
        if let Some(bytes) = image.cluster_size {
            options.cluster_size = bytes;
        }
        options.apply(&image.options).map_err(Reason::Create)?;
        Ok(options)
    }

    fn apply(&mut self, given: &FormatOptions) -> Result<(), CreateReason> {
        for (name, value) in given {
            match name.as_str() {
                "cluster-size" => self.cluster_size = number("cluster-size", value)?,
                "version" => self.version = choice("version", value, &[("v2", 2), ("v3", 3)])?,
                "refcount-bits" => {
                    let bits = number("refcount-bits", value)?;
                    // What cannot be is refused in the order of the checks, by `geometry`.
                    let order = bits.is_power_of_two().then(|| bits.trailing_zeros());
                    self.refcount_order = order.unwrap_or(u32::MAX);
                }
                "lazy-refcounts" => self.lazy_refcounts = flag("lazy-refcounts", value)?,
                "compression-type" => {
                    let known = [("zlib", CompressionType::Zlib), ("zstd", CompressionType::Zstd)];
                    self.compression_type = choice("compression-type", value, &known)?;
                }
                "extended-l2" => self.extended_l2 = flag("extended-l2", value)?,
                "preallocation" => {
                    let known = [
                        ("off", Preallocation::Off),
                        ("metadata", Preallocation::Metadata),
                        ("falloc", Preallocation::Falloc),
                        ("full", Preallocation::Full),
                    ];
                    self.preallocation = choice("preallocation", value, &known)?;
                }
                "data-file" => self.data_file = Some(text("data-file", value)?.to_owned()),
                "data-file-raw" => self.data_file_raw = flag("data-file-raw", value)?,
                _ => return Err(CreateReason::Unknown(name.clone())),
            }
        }
        Ok(())
    }

    /// Checks that the options go together; the sizes that follow from them.
    pub(super) fn geometry(&self) -> Result<Geometry, Reason> {
        self.check().map_err(Reason::Create)?;
        let geometry = Geometry {
            version: self.version,
            cluster_bits: self.cluster_size.trailing_zeros(),
            refcount_order: self.refcount_order,
            extended: self.extended_l2,
            external: self.data_file.is_some(),
            slice_bits: 0,
        };
        if i64::try_from(self.size).is_err() {
            return Err(Reason::Create(CreateReason::Negative));
        }
        if geometry.l1_entries(self.size).saturating_mul(ENTRY_BYTES) > L1_BYTES_MAX {
            return Err(Reason::Create(CreateReason::TooLarge));
        }
        Ok(geometry)
    }

    fn check(&self) -> Result<(), CreateReason> {
        let v3 = match self.version {
            2 => false,
            3 => true,
            other => {
                let value = format!("v{other}");
                return Err(CreateReason::Value { option: "version", value });
            }
        };
        let needs_v3 = |used: bool, what: &'static str| match used && !v3 {
            true => Err(CreateReason::NeedsVersion3(what)),
            false => Ok(()),
        };
        let refuse = |wrong: bool, reason| if wrong { Err(reason) } else { Ok(()) };
        refuse(!self.size.is_multiple_of(512), CreateReason::Size)?;
        needs_v3(self.extended_l2, "Extended L2 entries are only supported with")?;
        let bits = self.cluster_size.trailing_zeros();
        let cluster = self.cluster_size.is_power_of_two() && CLUSTER_BITS.contains(&bits);
        refuse(!cluster, CreateReason::ClusterSize)?;
        let small = self.extended_l2 && self.cluster_size < EXTENDED_CLUSTER_MIN;
        refuse(small, CreateReason::ExtendedClusterSize)?;
        let name = self.backing.as_ref().map_or("", |backing| &backing.file);
        let format = self.backing.as_ref().is_some_and(|backing| backing.format.is_some());
        let below = !name.is_empty();
        let hides = self.preallocation != Preallocation::Off && !self.extended_l2;
        refuse(below && hides, CreateReason::PreallocationOverBacking)?;
        refuse(format && !below, CreateReason::FormatWithoutBacking)?;
        needs_v3(self.lazy_refcounts, "Lazy refcounts only supported with")?;
        refuse(self.refcount_order > 6, CreateReason::RefcountBits)?;
        let what = "Different refcount widths than 16 bits require";
        needs_v3(self.refcount_order != 4, what)?;
        let lone = self.data_file_raw && self.data_file.is_none();
        refuse(lone, CreateReason::RawWithoutDataFile)?;
        refuse(self.data_file_raw && below, CreateReason::RawOverBacking)?;
        needs_v3(self.data_file.is_some(), "External data files are only supported with")?;
        let zstd = self.compression_type == CompressionType::Zstd;
        needs_v3(zstd, "Non-zlib compression type is only supported with")
    }

    /// What is allocated from the start, in effect: a raw data file can be told from the disk at no
    /// time, so all of it is mapped.
    pub(super) fn preallocated(&self) -> Preallocation {
        match self.preallocation {
            Preallocation::Off if self.data_file_raw => Preallocation::Metadata,
            mode => mode,
        }
    }

    /// The feature bits: incompatible, compatible, autoclear.
    pub(super) fn features(&self) -> (u64, u64, u64) {
        let bit = |set: bool, bit: u64| if set { bit } else { 0 };
        let zstd = self.compression_type == CompressionType::Zstd;
        (
            bit(self.data_file.is_some(), INCOMPATIBLE_DATA_FILE)
                | bit(zstd, INCOMPATIBLE_COMPRESSION)
                | bit(self.extended_l2, INCOMPATIBLE_EXTENDED_L2),
            bit(self.lazy_refcounts, COMPATIBLE_LAZY),
            bit(self.data_file_raw, AUTOCLEAR_DATA_FILE_RAW),
        )
    }
}

fn number(option: &'static str, value: &InfoValue) -> Result<u64, CreateReason> {
    let number = match value {
        InfoValue::Number(number) => Some(*number),
        InfoValue::Text(text) => text.parse().ok(),
        _ => None,
    };
    number.ok_or(CreateReason::Type { option, expected: "integer" })
}

fn flag(option: &'static str, value: &InfoValue) -> Result<bool, CreateReason> {
    match value {
        InfoValue::Flag(flag) => Ok(*flag),
        InfoValue::Text(text) if matches!(text.as_str(), "on" | "true") => Ok(true),
        InfoValue::Text(text) if matches!(text.as_str(), "off" | "false") => Ok(false),
        _ => Err(CreateReason::Type { option, expected: "boolean" }),
    }
}

fn text<'a>(option: &'static str, value: &'a InfoValue) -> Result<&'a str, CreateReason> {
    match value {
        InfoValue::Text(text) => Ok(text),
        _ => Err(CreateReason::Type { option, expected: "string" }),
    }
}

fn choice<T: Copy>(
    option: &'static str,
    value: &InfoValue,
    known: &[(&str, T)],
) -> Result<T, CreateReason> {
    let given = text(option, value)?;
    let found = known.iter().find(|(name, _)| *name == given).map(|(_, value)| *value);
    found.ok_or_else(|| CreateReason::Value { option, value: given.to_owned() })
}
