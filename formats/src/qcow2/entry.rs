//! One cluster's entry of an L2 table, decoded and encoded.
//!
//! The only place that knows the bits of an entry (of 8 bytes, or of 16 with subclusters);
//! everything else works with [`Entry`].

use super::layout::{COMPRESSED, COPIED, Geometry, OFFSET_MASK, ZERO};
use super::packed::Packed;
use super::subcluster::{ALL, Subclusters};

/// The words of an entry as they are stored; `bitmap` is 0 where entries have 8 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RawEntry {
    pub(super) word: u64,
    pub(super) bitmap: u64,
}

impl RawEntry {
    /// The entry `index` of a table or a slice; zeroes outside.
    pub(super) fn load(bytes: &[u8], index: usize, geometry: Geometry) -> Self {
        use super::state::word;
        if geometry.extended {
            Self { word: word(bytes, index * 2), bitmap: word(bytes, index * 2 + 1) }
        } else {
            Self { word: word(bytes, index), bitmap: 0 }
        }
    }

    /// Sets the entry `index` of a table or a slice.
    pub(super) fn store(self, bytes: &mut [u8], index: usize, geometry: Geometry) {
        use super::state::set_word;
        if geometry.extended {
            set_word(bytes, index * 2, self.word);
            set_word(bytes, index * 2 + 1, self.bitmap);
        } else {
            set_word(bytes, index, self.word);
        }
    }
}

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
    /// Subclusters of several kinds, or a reserved cluster without content; never what one of the
    /// other kinds says.
    Sub(Subclusters),
    /// A compressed cluster.
    Compressed(Packed),
    /// Bits that cannot be.
    Damaged,
}

impl Entry {
    /// Decodes `raw`; host offsets must be aligned and below `limit`.
    pub(super) fn decode(raw: RawEntry, geometry: Geometry, limit: u64) -> Self {
        let word = raw.word;
        if word & COMPRESSED != 0 {
            let packed = Packed::decode(word, geometry);
            let inside = packed.host != 0 && packed.end() <= limit;
            let possible = raw.bitmap == 0 && inside && !geometry.external;
            return if possible { Self::Compressed(packed) } else { Self::Damaged };
        }
        let place = word & OFFSET_MASK;
        let mut copied = word & COPIED != 0;
        let host = if geometry.external && (place != 0 || copied) {
            // What is not counted is never shared.
            copied = true;
            place + geometry.bias()
        } else {
            place
        };
        let subclusters = if geometry.extended {
            Subclusters::from_bitmap(host, copied, raw.bitmap)
        } else {
            let zero = if word & ZERO == 0 { 0 } else { ALL };
            Subclusters { host, copied, allocated: if host == 0 { 0 } else { !zero }, zero }
        };
        // Bit 0 has no meaning beside subclusters; the peer does not look at it either.
        let impossible = word & !(OFFSET_MASK | COPIED | ZERO) != 0
            || (word & ZERO != 0 && geometry.version < 3)
            || !geometry.aligned(host)
            || place >= limit
            || !subclusters.is_possible();
        if impossible { Self::Damaged } else { Self::of(subclusters) }
    }

    /// The entry of a cluster with these subclusters.
    pub(super) fn of(subclusters: Subclusters) -> Self {
        let Subclusters { host, copied, allocated, zero } = subclusters;
        match (host, allocated, zero) {
            (0, 0, 0) => Self::Absent,
            (0, 0, ALL) => Self::ZeroPlain,
            (host, ALL, 0) => Self::Data { host, copied },
            (host, 0, ALL) => Self::ZeroAllocated { host, copied },
            _ => Self::Sub(subclusters),
        }
    }

    /// What the subclusters are; without subclusters all bits are equal. `None`: compressed or
    /// damaged.
    pub(super) fn subclusters(self) -> Option<Subclusters> {
        let none = Subclusters::default();
        Some(match self {
            Self::Absent => none,
            Self::ZeroPlain => Subclusters { zero: ALL, ..none },
            Self::Data { host, copied } => Subclusters { host, copied, allocated: ALL, zero: 0 },
            Self::ZeroAllocated { host, copied } => {
                Subclusters { host, copied, allocated: 0, zero: ALL }
            }
            Self::Sub(subclusters) => subclusters,
            Self::Compressed(_) | Self::Damaged => return None,
        })
    }

    /// The host cluster that the entry names, unless it is compressed or names none.
    pub(super) fn host(self) -> Option<u64> {
        self.subclusters().map(|subclusters| subclusters.host).filter(|host| *host != 0)
    }

    /// What the entry of a cluster `bytes` further on is if it continues this one.
    pub(super) fn continued(self, bytes: u64) -> Self {
        match self.subclusters() {
            Some(subclusters) if subclusters.host != 0 => {
                Self::of(Subclusters { host: subclusters.host + bytes, ..subclusters })
            }
            _ => self,
        }
    }

    /// The words of an entry that is not damaged.
    pub(super) fn encode(self, geometry: Geometry) -> RawEntry {
        if let Self::Compressed(packed) = self {
            return RawEntry { word: packed.encode(geometry), bitmap: 0 };
        }
        let subclusters = self.subclusters().unwrap_or_default();
        let copied = if subclusters.copied { COPIED } else { 0 };
        let word = geometry.place(subclusters.host).bytes() | copied;
        if geometry.extended {
            return RawEntry { word, bitmap: subclusters.bitmap() };
        }
        RawEntry { word: word | if subclusters.zero == 0 { 0 } else { ZERO }, bitmap: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V3: Geometry = Geometry {
        version: 3,
        cluster_bits: 16,
        refcount_order: 4,
        extended: false,
        external: false,
        slice_bits: 0,
    };
    const V2: Geometry = Geometry {
        version: 2,
        cluster_bits: 16,
        refcount_order: 4,
        extended: false,
        external: false,
        slice_bits: 0,
    };
    const EXTENDED: Geometry = Geometry {
        version: 3,
        cluster_bits: 16,
        refcount_order: 4,
        extended: true,
        external: false,
        slice_bits: 0,
    };
    const LIMIT: u64 = 1 << 30;

    fn plain(word: u64) -> RawEntry {
        RawEntry { word, bitmap: 0 }
    }

    fn extended(word: u64, bitmap: u64) -> Entry {
        Entry::decode(RawEntry { word, bitmap }, EXTENDED, LIMIT)
    }

    #[test]
    fn entries_decode_by_version_and_bounds() {
        let decode = |word| Entry::decode(plain(word), V3, LIMIT);
        assert_eq!(decode(0), Entry::Absent);
        assert_eq!(decode(1), Entry::ZeroPlain);
        assert_eq!(decode(COPIED | 0x5_0000), Entry::Data { host: 0x5_0000, copied: true });
        assert_eq!(decode(0x5_0001), Entry::ZeroAllocated { host: 0x5_0000, copied: false });
        assert_eq!(decode(COPIED), Entry::Damaged);
        assert_eq!(decode(COPIED | 0x5_0200), Entry::Damaged);
        assert_eq!(decode(COPIED | 0x00ff_ffff_ffff_0000), Entry::Damaged);
        assert_eq!(decode(0x5_0000 | 1 << 57), Entry::Damaged);
        assert_eq!(Entry::decode(plain(0x5_0001), V2, LIMIT), Entry::Damaged);
    }

    /// Row R8: bit 0 is an offset bit of a compressed cluster, not the zero flag.
    #[test]
    fn the_compressed_bit_is_looked_at_before_the_zero_flag() {
        let packed = Entry::Compressed(Packed { host: 0x5_0001, len: 511 });
        assert_eq!(Entry::decode(plain(COMPRESSED | 0x5_0001), V3, LIMIT), packed);
        assert_eq!(Entry::decode(plain(COMPRESSED | 0x5_0001), V2, LIMIT), packed);
        assert_eq!(extended(COMPRESSED | 0x5_0001, 0), packed);
        let beyond = plain(COMPRESSED | LIMIT);
        assert_eq!(Entry::decode(beyond, V3, LIMIT), Entry::Damaged);
        assert_eq!(Entry::decode(plain(COMPRESSED), V3, LIMIT), Entry::Damaged);
        assert_eq!(extended(COMPRESSED | 0x5_0000, 1), Entry::Damaged, "it has no subclusters");
        assert_eq!(extended(COMPRESSED | 0x5_0000, 1 << 32), Entry::Damaged);
    }

    #[test]
    fn uniform_bitmaps_decode_into_the_plain_kinds() {
        let (host, copied) = (0x5_0000, true);
        assert_eq!(extended(0, 0), Entry::Absent);
        assert_eq!(extended(0, u64::from(ALL) << 32), Entry::ZeroPlain);
        assert_eq!(extended(COPIED | host, ALL.into()), Entry::Data { host, copied });
        let zero = extended(COPIED | host, u64::from(ALL) << 32);
        assert_eq!(zero, Entry::ZeroAllocated { host, copied });
        let shared = extended(host, ALL.into());
        assert_eq!(shared, Entry::Data { host, copied: false });
    }

    #[test]
    fn every_single_subcluster_decodes_into_its_own_bit() {
        for index in 0..32 {
            let bit = 1 << index;
            let host = 0x5_0000;
            let expected = Subclusters { host, copied: true, allocated: bit, zero: !bit };
            let bitmap = u64::from(!bit) << 32 | u64::from(bit);
            assert_eq!(extended(COPIED | host, bitmap), Entry::Sub(expected));
            let expected = Subclusters { host: 0, copied: false, allocated: 0, zero: bit };
            assert_eq!(extended(0, u64::from(bit) << 32), Entry::Sub(expected));
            let both = u64::from(bit) << 32 | u64::from(bit);
            assert_eq!(extended(COPIED | host, both), Entry::Damaged, "both bits of {index}");
            assert_eq!(extended(0, u64::from(bit)), Entry::Damaged, "data without a cluster");
        }
        let reserved = Subclusters { host: 0x5_0000, copied: true, allocated: 0, zero: 0 };
        assert_eq!(extended(COPIED | 0x5_0000, 0), Entry::Sub(reserved), "reserved, no content");
    }

    #[test]
    fn reserved_bits_of_extended_entries_are_damage() {
        for bit in (1..9).chain(9..16).chain(56..62) {
            let entry = extended(COPIED | 0x5_0000 | 1 << bit, ALL.into());
            assert_eq!(entry, Entry::Damaged, "bit {bit}");
        }
        assert_eq!(extended(1, 0), Entry::Absent, "no zero flag in the first word");
        assert_eq!(extended(COPIED, 0), Entry::Damaged);
    }

    #[test]
    fn what_is_encoded_decodes_into_the_same() {
        let host = 0x7_0000;
        let mut entries = vec![Entry::Absent, Entry::ZeroPlain];
        for copied in [true, false] {
            entries.push(Entry::Data { host, copied });
            entries.push(Entry::ZeroAllocated { host, copied });
        }
        for geometry in [V3, EXTENDED] {
            for entry in &entries {
                assert_eq!(Entry::decode(entry.encode(geometry), geometry, LIMIT), *entry);
            }
        }
        for (host, allocated, zero) in [(host, 5, 2), (host, 0, 1), (host, 0, 0), (0, 0, 0xf0)] {
            let copied = host != 0;
            let entry = Entry::Sub(Subclusters { host, copied, allocated, zero });
            assert_eq!(Entry::decode(entry.encode(EXTENDED), EXTENDED, LIMIT), entry);
        }
    }
}
