//! One cluster's entry of an L2 table, decoded.
//!
//! The only place that knows the bits of an entry; everything else works with [`Entry`]. Extended
//! entries (subclusters) will decode into a sequence of these.

use super::layout::{COMPRESSED, COPIED, Geometry, OFFSET_MASK, ZERO};

/// What an entry says about its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Not in this image.
    Absent,
    /// Data at this host offset; `copied`: the refcount is one, it may be written in place.
    Data { host: u64, copied: bool },
    /// Reads as zeroes, no cluster.
    ZeroPlain,
    /// Reads as zeroes, but this cluster is reserved for it.
    ZeroAllocated { host: u64, copied: bool },
    /// A compressed cluster.
    Compressed,
    /// Bits that cannot be.
    Damaged,
}

impl Entry {
    /// Decodes `raw`; host offsets must be aligned and below `limit`.
    pub(super) fn decode(raw: u64, geometry: Geometry, limit: u64) -> Self {
        if raw == 0 {
            return Self::Absent;
        }
        if raw & COMPRESSED != 0 {
            return Self::Compressed;
        }
        let host = raw & OFFSET_MASK;
        let copied = raw & COPIED != 0;
        let zero = raw & ZERO != 0;
        let reserved = raw & !(OFFSET_MASK | COPIED | ZERO);
        let impossible = reserved != 0
            || (zero && geometry.version < 3)
            || !geometry.aligned(host)
            || host >= limit
            || (host == 0 && copied);
        match (impossible, host, zero) {
            (true, ..) => Self::Damaged,
            (false, 0, true) => Self::ZeroPlain,
            (false, 0, false) => Self::Absent,
            (false, host, true) => Self::ZeroAllocated { host, copied },
            (false, host, false) => Self::Data { host, copied },
        }
    }

    /// What the entry of a cluster `bytes` further on is if it continues this one.
    pub(super) fn continued(self, bytes: u64) -> Self {
        match self {
            Self::Data { host, copied } => Self::Data { host: host + bytes, copied },
            Self::ZeroAllocated { host, copied } => {
                Self::ZeroAllocated { host: host + bytes, copied }
            }
            other => other,
        }
    }

    /// The entry of a cluster of this image alone at `host`.
    pub(super) const fn data(host: u64) -> u64 {
        host | COPIED
    }

    /// The entry of a cluster that reads as zeroes and keeps `host`.
    pub(super) const fn zero_allocated(host: u64) -> u64 {
        host | COPIED | ZERO
    }

    /// The entry of a cluster that reads as zeroes and has no host cluster.
    pub(super) const ZERO_PLAIN: u64 = ZERO;
}

#[cfg(test)]
mod tests {
    use super::*;

    const V3: Geometry =
        Geometry { version: 3, cluster_bits: 16, refcount_order: 4, extended: false };
    const V2: Geometry =
        Geometry { version: 2, cluster_bits: 16, refcount_order: 4, extended: false };

    #[test]
    fn entries_decode_by_version_and_bounds() {
        let limit = 1 << 30;
        let decode = |raw| Entry::decode(raw, V3, limit);
        assert_eq!(decode(0), Entry::Absent);
        assert_eq!(decode(1), Entry::ZeroPlain);
        assert_eq!(decode(COPIED | 0x5_0000), Entry::Data { host: 0x5_0000, copied: true });
        assert_eq!(decode(0x5_0001), Entry::ZeroAllocated { host: 0x5_0000, copied: false });
        assert_eq!(decode(COPIED), Entry::Damaged);
        assert_eq!(decode(COPIED | 0x5_0200), Entry::Damaged);
        assert_eq!(decode(COPIED | 0x00ff_ffff_ffff_0000), Entry::Damaged);
        assert_eq!(decode(0x5_0000 | 1 << 57), Entry::Damaged);
        assert_eq!(decode(COMPRESSED | 1), Entry::Compressed, "bit 0 is an offset bit there");
        assert_eq!(Entry::decode(0x5_0001, V2, limit), Entry::Damaged);
    }
}
