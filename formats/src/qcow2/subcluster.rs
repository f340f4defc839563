//! The subclusters of one cluster: two bits each (specification, "Extended L2 Entries").
//!
//! Pure arithmetic. An image without subclusters is treated as if all 32 always had the same bits.

use super::layout::{Geometry, SUBCLUSTERS};

/// The bits of all subclusters.
pub(super) const ALL: u32 = u32::MAX;

/// What an entry says about its subclusters, bit 0 for the first one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Subclusters {
    /// The host cluster in bytes, 0: none.
    pub(super) host: u64,
    /// The host cluster belongs to this entry alone.
    pub(super) copied: bool,
    /// Those whose data is in the host cluster.
    pub(super) allocated: u32,
    /// Those that read as zeroes. What is in neither set is not in this image.
    pub(super) zero: u32,
}

/// What one subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Data,
    Zero,
    Absent,
}

impl Subclusters {
    /// Decodes the second word of an extended entry.
    pub(super) const fn from_bitmap(host: u64, copied: bool, bitmap: u64) -> Self {
        Self { host, copied, allocated: bitmap as u32, zero: (bitmap >> 32) as u32 }
    }

    /// The second word of an extended entry.
    pub(super) const fn bitmap(self) -> u64 {
        (self.zero as u64) << 32 | self.allocated as u64
    }

    /// Whether the specification allows this.
    pub(super) const fn is_possible(self) -> bool {
        self.allocated & self.zero == 0 && (self.host != 0 || (self.allocated == 0 && !self.copied))
    }

    /// What the subcluster with the byte `within` of the cluster is.
    pub(super) fn kind(self, within: u64, geometry: Geometry) -> Kind {
        let bit = touched(geometry, within, within + 1);
        match (self.allocated & bit != 0, self.zero & bit != 0) {
            (true, _) => Kind::Data,
            (false, true) => Kind::Zero,
            (false, false) => Kind::Absent,
        }
    }

    /// How many bytes from byte `within` of the cluster on are of the same kind, and of which.
    pub(super) fn run(self, within: u64, geometry: Geometry) -> (u64, Kind) {
        let kind = self.kind(within, geometry);
        let same = match kind {
            Kind::Data => self.allocated,
            Kind::Zero => self.zero,
            Kind::Absent => !(self.allocated | self.zero),
        };
        let index = index(geometry, within);
        let count = (same >> index).trailing_ones().min(SUBCLUSTERS - index);
        let end = u64::from(index + count) * geometry.cluster() / u64::from(SUBCLUSTERS);
        (end - within, kind)
    }

    /// The bytes of the cluster from the first to the last subcluster with data; `None` if none
    /// has.
    pub(super) fn data_span(self, geometry: Geometry) -> Option<(u64, u64)> {
        let unit = |count: u32| u64::from(count) * geometry.cluster() / u64::from(SUBCLUSTERS);
        let last = SUBCLUSTERS - self.allocated.leading_zeros();
        (self.allocated != 0).then(|| (unit(self.allocated.trailing_zeros()), unit(last)))
    }
}

/// The bits of the subclusters that the bytes from `from` to `to` of a cluster touch.
pub(super) fn touched(geometry: Geometry, from: u64, to: u64) -> u32 {
    let to = to.min(geometry.cluster());
    if from >= to {
        return 0;
    }
    if !geometry.extended {
        return ALL;
    }
    let (first, last) = (index(geometry, from), index(geometry, to - 1));
    (ALL << first) & (ALL >> (SUBCLUSTERS - 1 - last))
}

/// The number of the subcluster with the byte `within` of a cluster; 0 without subclusters, where
/// all are alike.
fn index(geometry: Geometry, within: u64) -> u32 {
    if geometry.extended { (within / geometry.subcluster()) as u32 % SUBCLUSTERS } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        version: 3,
        cluster_bits: 17,
        refcount_order: 4,
        extended: true,
        external: false,
        slice_bits: 0,
    };
    const PLAIN: Geometry = Geometry { extended: false, ..GEOMETRY };

    #[test]
    fn touched_subclusters_are_those_that_share_a_byte() {
        assert_eq!(touched(GEOMETRY, 0, 1), 1);
        assert_eq!(touched(GEOMETRY, 4095, 4097), 3);
        assert_eq!(touched(GEOMETRY, 4096, 8192), 2);
        assert_eq!(touched(GEOMETRY, 0, 128 << 10), ALL);
        assert_eq!(touched(GEOMETRY, 0, 1 << 40), ALL);
        assert_eq!(touched(GEOMETRY, (128 << 10) - 1, 128 << 10), 1 << 31);
        assert_eq!(touched(GEOMETRY, 5, 5), 0);
        assert_eq!(touched(PLAIN, 5, 6), ALL);
    }

    #[test]
    fn runs_end_where_the_kind_changes() {
        let some = Subclusters { host: 1 << 17, copied: true, allocated: 0xf0, zero: 0x300 };
        assert_eq!(some.run(0, GEOMETRY), (4 << 12, Kind::Absent));
        assert_eq!(some.run(100, GEOMETRY), ((4 << 12) - 100, Kind::Absent));
        assert_eq!(some.run(4 << 12, GEOMETRY), (4 << 12, Kind::Data));
        assert_eq!(some.run(9 << 12, GEOMETRY), (1 << 12, Kind::Zero));
        assert_eq!(some.run(10 << 12, GEOMETRY), (22 << 12, Kind::Absent));
        assert_eq!(some.data_span(GEOMETRY), Some((4 << 12, 8 << 12)));
        let whole = Subclusters { allocated: ALL, zero: 0, ..some };
        assert_eq!(whole.run(777, PLAIN), ((128 << 10) - 777, Kind::Data));
        assert_eq!(whole.data_span(PLAIN), Some((0, 128 << 10)));
    }
}
