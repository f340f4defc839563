//! Where a compressed cluster lies (specification, "Compressed Clusters Descriptor").
//!
//! Decoding and encoding only. A descriptor counts whole sectors, so the bytes that it names end
//! with a sector; its start need not be aligned for the peer, but is for what this code writes.

use super::layout::{COMPRESSED, COPIED, Geometry, Run, SECTOR};

/// The bytes of the file that a compressed cluster occupies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packed {
    /// The first byte.
    pub(super) host: u64,
    /// Bytes to the end of the last sector, never 0.
    pub(super) len: u64,
}

impl Packed {
    /// The first bit of an entry that belongs to the number of sectors.
    const fn shift(geometry: Geometry) -> u32 {
        62 - (geometry.cluster_bits - 8)
    }

    /// What the entry `word` says. Bit 0 belongs to the offset (there is no zero flag here), the
    /// bits beyond it are not checked: the offset can be anything.
    pub(super) const fn decode(word: u64, geometry: Geometry) -> Self {
        let sector = SECTOR as u64;
        let shift = Self::shift(geometry);
        let host = word & ((1 << shift) - 1);
        let further = (word & !(COPIED | COMPRESSED)) >> shift;
        Self { host, len: (further + 1) * sector - host % sector }
    }

    /// The entry.
    pub(super) const fn encode(self, geometry: Geometry) -> u64 {
        let sector = SECTOR as u64;
        let further = (self.host % sector + self.len - 1) / sector;
        COMPRESSED | further << Self::shift(geometry) | self.host
    }

    /// The byte behind the last one.
    pub(super) const fn end(self) -> u64 {
        self.host.saturating_add(self.len)
    }

    /// The host clusters that it touches; each holds one reference to it.
    pub(super) const fn run(self, geometry: Geometry) -> Run {
        let start = geometry.host_cluster(self.host);
        let last = geometry.host_cluster(self.end() - 1);
        Run { start, count: last.0 - start.0 + 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn geometry(cluster_bits: u32) -> Geometry {
        Geometry {
            version: 3,
            cluster_bits,
            refcount_order: 4,
            extended: false,
            external: false,
            slice_bits: 0,
        }
    }

    #[test]
    fn descriptors_read_back_at_every_cluster_size() {
        for bits in 9..=21 {
            let geometry = geometry(bits);
            let cluster = 1_u64 << bits;
            for host in [0, 1, 511, 512, cluster - 1, cluster + 512, (1 << 40) + 513] {
                for sectors in [1, 2, cluster / 512, 2 * cluster / 512] {
                    let packed = Packed { host, len: sectors * 512 - host % 512 };
                    let word = packed.encode(geometry);
                    assert_eq!(Packed::decode(word, geometry), packed, "bits {bits}");
                    assert_eq!(word & COPIED, 0);
                    assert_eq!(Packed::decode(word | COPIED, geometry), packed);
                }
            }
        }
    }

    #[test]
    fn all_host_clusters_that_share_a_byte_are_counted() {
        let geometry = geometry(12);
        let run = |host, len| {
            let run = Packed { host, len }.run(geometry);
            (run.start.0, run.count)
        };
        assert_eq!(run(4096, 4096), (1, 1));
        assert_eq!(run(4096 + 512, 4096 - 512), (1, 1));
        assert_eq!(run(4096 + 512, 4096), (1, 2));
        assert_eq!(run(8191, 1), (1, 1));
        assert_eq!(run(8191, 513), (1, 2));
        assert_eq!(Packed::decode(u64::MAX, geometry).len, 8192 - 511);
    }
}
