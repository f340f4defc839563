//! The header: parsed and validated before anything is allocated for it, and written back.
//!
//! Promises: every field of an accepted header is inside its bounds (table sizes, alignment, no
//! overflow, tables not absurdly far beyond the file), so later code computes with it freely. The
//! texts are the peer's. Fields that this version does not know survive a rewrite.

use zerocopy::{FromBytes, IntoBytes};

use super::extensions::Extensions;
use super::layout::{
    AUTOCLEAR_BITMAPS, CLUSTER_BITS, COMPATIBLE_LAZY, ENTRY_BYTES, Geometry, HEADER_V2, HEADER_V3,
    INCOMPATIBLE_COMPRESSION, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_DIRTY,
    INCOMPATIBLE_EXTENDED_L2, INCOMPATIBLE_KNOWN, MAGIC, RawHeader, RawHeaderV3, SECTOR,
};
use crate::limits::{
    BACKING_NAME_MAX, BEYOND_END_MAX, L1_BYTES_MAX, REFCOUNT_TABLE_BYTES_MAX, SNAPSHOTS_MAX,
};
use crate::reason::Reason;

/// A validated header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) geometry: Geometry,
    pub(super) size: u64,
    pub(super) backing: Option<String>,
    /// Where the backing name is stored.
    pub(super) backing_offset: u64,
    pub(super) l1_size: u32,
    pub(super) l1_offset: u64,
    pub(super) reftable_offset: u64,
    pub(super) reftable_clusters: u32,
    pub(super) nb_snapshots: u32,
    pub(super) snapshots_offset: u64,
    pub(super) incompatible: u64,
    pub(super) compatible: u64,
    pub(super) autoclear: u64,
    pub(super) header_length: u32,
    /// Bytes of the header after the fixed version 3 fields (compression type and unknown fields).
    pub(super) further: Vec<u8>,
    pub(super) extensions: Extensions,
}

impl Header {
    /// Reads a header from the first bytes of a file of `file_size` bytes (at least the first
    /// cluster, or all of the file).
    pub(super) fn parse(bytes: &[u8], file_size: u64) -> Result<Self, Reason> {
        let (header, encryption) = Self::fields(bytes)?;
        header.check_encryption(encryption)?;
        if header.reftable_clusters == 0 {
            return Err(Reason::NoRefcountTable);
        }
        header.check_compression()?;
        header.check_tables(file_size)?;
        Ok(header)
    }

    /// As [`Self::parse`], for a check: encrypted images and images without a refcount table are
    /// taken too.
    pub(super) fn parse_for_check(bytes: &[u8], file_size: u64) -> Result<Self, Reason> {
        let (header, _) = Self::fields(bytes)?;
        header.check_compression()?;
        header.check_tables(file_size)?;
        Ok(header)
    }

    /// The fields, each inside its own bounds, and the encryption method.
    fn fields(bytes: &[u8]) -> Result<(Self, u32), Reason> {
        let magic = bytes.get(..4).ok_or(Reason::NotQcow2)?;
        if magic != MAGIC.to_be_bytes() {
            return Err(Reason::NotQcow2);
        }
        let (raw, rest) =
            RawHeader::read_from_prefix(bytes).map_err(|_| Reason::HeaderUnreadable)?;
        let version = raw.version.get();
        if !(2..=3).contains(&version) {
            return Err(Reason::Version(version));
        }
        let cluster_bits = raw.cluster_bits.get();
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(Reason::ClusterBits(cluster_bits));
        }
        let v3 = (version == 3)
            .then(|| RawHeaderV3::read_from_prefix(rest).map_err(|_| Reason::HeaderUnreadable))
            .transpose()?
            .map(|(fields, _)| fields);
        let header_length = v3.map_or(HEADER_V2, |fields| fields.header_length.get());
        let cluster = 1_u64 << cluster_bits;
        check_length(version, header_length, cluster)?;
        let backing_offset = raw.backing_file_offset.get();
        if backing_offset > cluster {
            return Err(Reason::BackingOffset);
        }
        let area_end = if backing_offset == 0 { cluster } else { backing_offset };
        let area = slice(bytes, u64::from(header_length), area_end);
        let incompatible = v3.map_or(0, |fields| fields.incompatible.get());
        let unknown = incompatible & !INCOMPATIBLE_KNOWN;
        let extensions = match Extensions::parse(area) {
            Ok(extensions) => extensions,
            // The names help the text, but the unknown bit is the reason.
            Err(_) if unknown != 0 => Extensions::default(),
            Err(reason) => return Err(reason),
        };
        if unknown != 0 {
            return Err(Reason::Features(extensions.feature_names(unknown)));
        }
        let refcount_order = v3.map_or(4, |fields| fields.refcount_order.get());
        let header = Self {
            geometry: geometry(version, cluster_bits, refcount_order, incompatible)?,
            size: raw.size.get(),
            backing: backing_name(bytes, backing_offset, raw.backing_file_size.get(), cluster)?,
            backing_offset,
            l1_size: raw.l1_size.get(),
            l1_offset: raw.l1_table_offset.get(),
            reftable_offset: raw.refcount_table_offset.get(),
            reftable_clusters: raw.refcount_table_clusters.get(),
            nb_snapshots: raw.nb_snapshots.get(),
            snapshots_offset: raw.snapshots_offset.get(),
            incompatible,
            compatible: v3.map_or(0, |fields| fields.compatible.get()),
            autoclear: v3.map_or(0, |fields| fields.autoclear.get()),
            header_length,
            further: slice(bytes, u64::from(HEADER_V3), u64::from(header_length)).to_vec(),
            extensions,
        };
        Ok((header, raw.crypt_method.get()))
    }

    fn check_encryption(&self, method: u32) -> Result<(), Reason> {
        match method {
            0 => Ok(()),
            1 => Err(Reason::Encrypted("AES")),
            2 => Err(Reason::Encrypted("LUKS")),
            other => Err(Reason::Encryption(other)),
        }
    }

    fn check_compression(&self) -> Result<(), Reason> {
        let set = self.incompatible & INCOMPATIBLE_COMPRESSION != 0;
        match (self.compression_type(), set) {
            (0, false) | (1, true) => Ok(()),
            (0 | 1, set) => Err(Reason::CompressionBit { set }),
            (other, _) => Err(Reason::CompressionType(other)),
        }
    }

    fn check_tables(&self, file_size: u64) -> Result<(), Reason> {
        let geometry = self.geometry;
        let table = |name, offset: u64, bytes: u64, max: u64| {
            if bytes > max {
                return Err(Reason::TableLarge(name));
            }
            let end = offset.checked_add(bytes).filter(|end| *end <= i64::MAX as u64);
            let far = file_size.saturating_add(BEYOND_END_MAX);
            let inside = bytes == 0 || (offset >= geometry.cluster() && offset <= far);
            match end {
                Some(_) if geometry.aligned(offset) && inside => Ok(()),
                _ => Err(Reason::TableOffset(name)),
            }
        };
        let reftable = u64::from(self.reftable_clusters) << geometry.cluster_bits;
        table("Reference count table", self.reftable_offset, reftable, REFCOUNT_TABLE_BYTES_MAX)?;
        if self.nb_snapshots > SNAPSHOTS_MAX {
            return Err(Reason::TableLarge("Snapshot table"));
        }
        // The fixed part of a snapshot table entry has 40 bytes.
        let snapshots = u64::from(self.nb_snapshots) * 40;
        table("Snapshot table", self.snapshots_offset, snapshots, u64::MAX)?;
        let l1 = u64::from(self.l1_size) * ENTRY_BYTES;
        table("Active L1 table", self.l1_offset, l1, L1_BYTES_MAX)?;
        let needed = geometry.l1_entries(self.size);
        if needed > i32::MAX as u64 {
            return Err(Reason::SizeTooBig);
        }
        if needed > u64::from(self.l1_size) {
            return Err(Reason::L1Small);
        }
        Ok(())
    }

    /// Checks what this version can do with the image.
    pub(super) fn check_features(&self, writable: bool) -> Result<(), Reason> {
        if !writable {
            return Ok(());
        }
        if self.incompatible & INCOMPATIBLE_CORRUPT != 0 {
            return Err(Reason::CorruptBit);
        }
        Ok(())
    }

    /// 0 deflate, 1 zstd.
    pub(super) fn compression_type(&self) -> u8 {
        self.further.first().copied().unwrap_or(0)
    }

    /// Whether refcounts are marked as possibly stale.
    pub(super) fn dirty(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DIRTY != 0
    }

    /// Whether the image is marked as damaged.
    pub(super) fn corrupt(&self) -> bool {
        self.incompatible & INCOMPATIBLE_CORRUPT != 0
    }

    /// Whether the compatible bit for lazy refcounts is set.
    pub(super) fn lazy_refcounts(&self) -> bool {
        self.compatible & COMPATIBLE_LAZY != 0
    }

    /// Whether persistent bitmaps count as references.
    pub(super) fn bitmaps_valid(&self) -> bool {
        self.autoclear & AUTOCLEAR_BITMAPS != 0
    }

    /// The fixed fields and the extensions as bytes, without the backing name.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let name = self.backing.as_ref().map_or(0, String::len);
        let raw = RawHeader {
            magic: MAGIC.into(),
            version: self.geometry.version.into(),
            backing_file_offset: self.backing_offset.into(),
            backing_file_size: u32::try_from(name).unwrap_or(0).into(),
            cluster_bits: self.geometry.cluster_bits.into(),
            size: self.size.into(),
            crypt_method: 0.into(),
            l1_size: self.l1_size.into(),
            l1_table_offset: self.l1_offset.into(),
            refcount_table_offset: self.reftable_offset.into(),
            refcount_table_clusters: self.reftable_clusters.into(),
            nb_snapshots: self.nb_snapshots.into(),
            snapshots_offset: self.snapshots_offset.into(),
        };
        let mut out = raw.as_bytes().to_vec();
        if self.geometry.version == 3 {
            let v3 = RawHeaderV3 {
                incompatible: self.incompatible.into(),
                compatible: self.compatible.into(),
                autoclear: self.autoclear.into(),
                refcount_order: self.geometry.refcount_order.into(),
                header_length: self.header_length.into(),
            };
            out.extend_from_slice(v3.as_bytes());
            out.extend_from_slice(&self.further);
        }
        out.extend_from_slice(&self.extensions.bytes());
        out
    }
}

/// The geometry of these fields, if the peer takes it.
fn geometry(
    version: u32,
    cluster_bits: u32,
    refcount_order: u32,
    incompatible: u64,
) -> Result<Geometry, Reason> {
    let extended = incompatible & INCOMPATIBLE_EXTENDED_L2 != 0;
    let external = incompatible & INCOMPATIBLE_DATA_FILE != 0;
    let slice_bits = 0;
    let geometry =
        Geometry { version, cluster_bits, refcount_order, extended, external, slice_bits };
    if geometry.subcluster() < SECTOR as u64 {
        return Err(Reason::SubclusterSize(geometry.subcluster()));
    }
    if refcount_order > 6 {
        return Err(Reason::RefcountOrder);
    }
    Ok(geometry)
}

fn check_length(version: u32, length: u32, cluster: u64) -> Result<(), Reason> {
    if version == 3 && length < HEADER_V3 {
        return Err(Reason::HeaderShort);
    }
    if u64::from(length) > cluster {
        return Err(Reason::HeaderLong);
    }
    if !length.is_multiple_of(8) {
        return Err(Reason::HeaderLength(length));
    }
    Ok(())
}

fn backing_name(
    bytes: &[u8],
    offset: u64,
    len: u32,
    cluster: u64,
) -> Result<Option<String>, Reason> {
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    let end = offset + u64::from(len);
    if len > BACKING_NAME_MAX || end > cluster {
        return Err(Reason::BackingName);
    }
    let name = slice(bytes, offset, end);
    if name.len() != len as usize {
        return Err(Reason::HeaderUnreadable);
    }
    let name = std::str::from_utf8(name).map_err(|_| Reason::BackingEncoding)?;
    Ok(Some(name.to_owned()))
}

/// The bytes from `start` to `end`, as far as there are any.
fn slice(bytes: &[u8], start: u64, end: u64) -> &[u8] {
    let len = bytes.len() as u64;
    let end = usize::try_from(end.min(len)).unwrap_or(0);
    let start = usize::try_from(start.min(len)).unwrap_or(0);
    bytes.get(start..end).unwrap_or_default()
}
