//! [`DirtyBitmap`]: byte ranges in, leaves below.

use roaring::RoaringTreemap;

use super::leaf::{LEAF_BITS, LEAF_WORDS, Leaf};
use crate::address::GuestRange;

/// The smallest granularity in bytes.
pub const GRANULARITY_MIN: u64 = 512;

/// Which granules of a disk are dirty.
///
/// All ranges are bytes. Setting marks every granule that the range touches; clearing clears only
/// granules that lie wholly inside the range (the last one ends with the disk), so that a half
/// copied granule stays dirty.
#[derive(Clone, Debug, PartialEq)]
pub struct DirtyBitmap {
    size: u64,
    shift: u32,
    leaves: Vec<Leaf>,
    /// Bit i: leaf i has a set bit.
    summary: Vec<u64>,
    count: u64,
}

impl DirtyBitmap {
    /// A clean bitmap for a disk of `size` bytes with granules of `granularity` bytes.
    ///
    /// # Panics
    /// If `granularity` is not a power of two of at least [`GRANULARITY_MIN`].
    pub fn new(size: u64, granularity: u64) -> Self {
        assert!(
            granularity.is_power_of_two() && granularity >= GRANULARITY_MIN,
            "granularity is a power of two of at least 512"
        );
        let mut bitmap = Self {
            size: 0,
            shift: granularity.trailing_zeros(),
            leaves: Vec::new(),
            summary: Vec::new(),
            count: 0,
        };
        bitmap.resize(size);
        bitmap
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes per granule.
    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    /// Number of dirty granules.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Bytes of the dirty granules (a last granule beyond the end of the disk counts whole).
    pub fn dirty_bytes(&self) -> u64 {
        self.count << self.shift
    }

    /// Whether nothing is dirty.
    pub fn is_clean(&self) -> bool {
        self.count == 0
    }

    /// Changes the size; new granules are clean, those beyond the end are forgotten.
    pub fn resize(&mut self, size: u64) {
        let old_bits = self.bits();
        self.size = size;
        let bits = self.bits();
        // Forget what is cut off before its leaves go.
        self.each_leaf(bits, old_bits, Leaf::clear, false);
        let leaves = usize::try_from(bits.div_ceil(u64::from(LEAF_BITS)))
            .expect("invariant: leaves are counted in memory");
        self.leaves.resize_with(leaves, Leaf::default);
        self.summary.resize(leaves.div_ceil(64), 0);
    }

    /// Marks every granule that `range` touches; answers how many were clean.
    pub fn set_range(&mut self, range: GuestRange) -> u64 {
        let start = range.start.bytes().min(self.size);
        let end = range.end().bytes().min(self.size);
        if start >= end {
            return 0;
        }
        let (first, end) = (start >> self.shift, end.div_ceil(self.granularity()));
        self.each_leaf(first, end, Leaf::set, true)
    }

    /// Marks everything.
    pub fn set_all(&mut self) {
        self.set_range(GuestRange::new(0, self.size));
    }

    /// Clears every granule that lies wholly inside `range`; answers how many were dirty.
    pub fn clear_range(&mut self, range: GuestRange) -> u64 {
        let first = range.start.bytes().div_ceil(self.granularity());
        let end = match range.end().bytes() {
            end if end >= self.size => self.bits(),
            end => end >> self.shift,
        };
        if first >= end {
            return 0;
        }
        self.each_leaf(first, end, Leaf::clear, false)
    }

    /// Clears everything.
    pub fn clear_all(&mut self) {
        self.clear_range(GuestRange::new(0, self.size));
    }

    /// Whether the granule that holds byte `offset` is dirty.
    pub fn test(&self, offset: u64) -> bool {
        let (leaf, bit) = locate(offset >> self.shift);
        offset < self.size && self.leaves.get(leaf).is_some_and(|leaf| leaf.test(bit))
    }

    /// Whether any granule that `range` touches is dirty.
    pub fn intersects(&self, range: GuestRange) -> bool {
        !range.is_empty()
            && self.next_dirty(range.start.bytes()).is_some_and(|at| at < range.end().bytes())
    }

    /// The first dirty byte at or after `from`.
    pub fn next_dirty(&self, from: u64) -> Option<u64> {
        if from >= self.size {
            return None;
        }
        let bit = self.next_set(from >> self.shift)?;
        Some((bit << self.shift).max(from))
    }

    /// The first run of dirty bytes at or after `from`, at most `max_len` bytes long and inside
    /// the disk. `from` should be a multiple of the granularity.
    pub fn next_dirty_range(&self, from: u64, max_len: u64) -> Option<GuestRange> {
        let start = self.next_dirty(from)?;
        let limit = start.saturating_add(max_len).min(self.size);
        let clean = self.next_clear(start >> self.shift, limit.div_ceil(self.granularity()));
        let end = (clean << self.shift).min(limit);
        Some(GuestRange::new(start, end - start))
    }

    /// The first clean byte at or after `from`, or the size of the disk.
    pub fn next_clean(&self, from: u64) -> u64 {
        if from >= self.size {
            return self.size;
        }
        let bit = self.next_clear(from >> self.shift, self.bits());
        (bit << self.shift).clamp(from, self.size)
    }

    /// Takes the next non-empty word of 64 granules at or after granule `from` (a multiple of 64)
    /// out of the bitmap: its first granule and its bits.
    pub fn take_word(&mut self, from: u64) -> Option<(u64, u64)> {
        let bit = self.next_set(from)? & !63;
        let (index, start) = locate(bit);
        let leaf = self.leaves.get_mut(index)?;
        let word = leaf.take_word(start / 64);
        self.count -= u64::from(word.count_ones());
        self.note(index);
        Some((bit, word))
    }

    /// Marks everything that is dirty in `other`; granularities and sizes may differ.
    pub fn merge(&mut self, other: &Self) {
        let mut from = 0;
        while let Some(run) = other.next_dirty_range(from, u64::MAX) {
            self.set_range(run);
            from = run.end().bytes();
        }
    }

    /// The numbers of the dirty granules.
    pub fn to_roaring(&self) -> RoaringTreemap {
        let mut map = RoaringTreemap::new();
        let mut from = 0;
        while let Some(first) = self.next_set(from) {
            let end = self.next_clear(first, self.bits());
            map.insert_range(first..end);
            from = end;
        }
        map
    }

    /// A bitmap whose dirty granules are the numbers in `map`; those beyond the disk are left out.
    ///
    /// # Panics
    /// As [`DirtyBitmap::new`].
    pub fn from_roaring(size: u64, granularity: u64, map: &RoaringTreemap) -> Self {
        let mut bitmap = Self::new(size, granularity);
        let bits = bitmap.bits();
        for bit in map.iter().take_while(|bit| *bit < bits) {
            bitmap.each_leaf(bit, bit + 1, Leaf::set, true);
        }
        bitmap
    }

    fn bits(&self) -> u64 {
        self.size.div_ceil(self.granularity())
    }

    /// Applies `change` to the part of the bits `first..end` in each leaf; answers how many bits
    /// changed, which are added to or taken from the count.
    fn each_leaf(
        &mut self,
        first: u64,
        end: u64,
        change: impl Fn(&mut Leaf, std::ops::Range<u32>) -> u32,
        adds: bool,
    ) -> u64 {
        let mut changed = 0;
        let mut bit = first;
        while bit < end {
            let (index, start) = locate(bit);
            let len = u64::from(LEAF_BITS - start).min(end - bit);
            let stop = start + u32::try_from(len).expect("invariant: inside a leaf");
            let leaf = self.leaves.get_mut(index).expect("invariant: bits are inside the disk");
            let count = change(leaf, start..stop);
            if count > 0 {
                changed += u64::from(count);
                self.note(index);
            }
            bit += len;
        }
        if adds {
            self.count += changed;
        } else {
            self.count -= changed;
        }
        changed
    }

    /// Brings the summary bit of leaf `index` up to date.
    fn note(&mut self, index: usize) {
        let empty = matches!(self.leaves.get(index), None | Some(Leaf::Empty));
        if let Some(word) = self.summary.get_mut(index / 64) {
            let mask = 1 << (index % 64);
            *word = if empty { *word & !mask } else { *word | mask };
        }
    }

    fn next_set(&self, from: u64) -> Option<u64> {
        let (mut index, mut start) = locate(from);
        loop {
            let leaf = self.leaves.get(index)?;
            if let Some(bit) = leaf.next_set(start) {
                return Some(index as u64 * u64::from(LEAF_BITS) + u64::from(bit));
            }
            index = self.next_leaf(index + 1)?;
            start = 0;
        }
    }

    /// The first leaf at or after `index` with a set bit.
    fn next_leaf(&self, index: usize) -> Option<usize> {
        let mut skip = u64::MAX << (index % 64);
        for (at, word) in self.summary.iter().enumerate().skip(index / 64) {
            let found = word & skip;
            if found != 0 {
                return Some(at * 64 + found.trailing_zeros() as usize);
            }
            skip = u64::MAX;
        }
        None
    }

    /// The first clear bit in `from..end`, or `end`.
    fn next_clear(&self, from: u64, end: u64) -> u64 {
        let mut at = from;
        while at < end {
            let (index, start) = locate(at);
            let Some(leaf) = self.leaves.get(index) else { break };
            let base = index as u64 * u64::from(LEAF_BITS);
            if let Some(bit) = leaf.next_clear(start) {
                return (base + u64::from(bit)).min(end);
            }
            at = base + u64::from(LEAF_BITS);
        }
        end
    }
}

/// Leaf and position of granule `bit`.
fn locate(bit: u64) -> (usize, u32) {
    let leaf = usize::try_from(bit / u64::from(LEAF_BITS)).unwrap_or(usize::MAX);
    (leaf, u32::try_from(bit % u64::from(LEAF_BITS)).expect("invariant: a remainder of 2^16"))
}

const _: () = assert!(LEAF_WORDS * 64 == LEAF_BITS as usize);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Sets and clears whole-range by the documented rule, one bool per granule.
    struct Model {
        bits: Vec<bool>,
        size: u64,
        granularity: u64,
    }

    impl Model {
        fn new(size: u64, granularity: u64) -> Self {
            let bits = vec![false; size.div_ceil(granularity) as usize];
            Self { bits, size, granularity }
        }

        fn apply(&mut self, set: bool, range: GuestRange) {
            for (bit, at) in self.bits.iter_mut().zip((0..).step_by(self.granularity as usize)) {
                let end = (at + self.granularity).min(self.size);
                let (from, to) = (range.start.bytes(), range.end().bytes());
                let touched = from < end && at < to && !range.is_empty();
                if touched && (set || (from <= at && end <= to)) {
                    *bit = set;
                }
            }
        }

        fn runs(&self, max_len: u64) -> Vec<GuestRange> {
            let mut runs: Vec<GuestRange> = Vec::new();
            for (bit, at) in self.bits.iter().zip((0..).step_by(self.granularity as usize)) {
                let len = self.granularity.min(self.size - at);
                match runs.last_mut() {
                    Some(run) if *bit && run.end().bytes() == at && run.len < max_len => {
                        run.len = (run.len + len).min(max_len);
                    }
                    _ if *bit => runs.push(GuestRange::new(at, len.min(max_len))),
                    _ => {}
                }
            }
            runs
        }
    }

    fn runs(bitmap: &DirtyBitmap, max_len: u64) -> Vec<GuestRange> {
        let mut found = Vec::new();
        let mut from = 0;
        while let Some(run) = bitmap.next_dirty_range(from, max_len) {
            found.push(run);
            from = run.end().bytes();
        }
        found
    }

    fn same(bitmap: &DirtyBitmap, model: &Model) {
        let count = model.bits.iter().filter(|bit| **bit).count() as u64;
        assert_eq!(bitmap.count(), count);
        assert_eq!(runs(bitmap, u64::MAX), model.runs(u64::MAX));
        let short = 8 * bitmap.granularity();
        let cut: u64 = runs(bitmap, short).iter().map(|run| run.len).sum();
        assert_eq!(cut, model.runs(u64::MAX).iter().map(|run| run.len).sum::<u64>());
        for (bit, at) in model.bits.iter().zip((0..).step_by(model.granularity as usize)) {
            assert_eq!(bitmap.test(at), *bit, "at {at}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn random_ranges_agree_with_a_vector_of_bools(
            size in 1_u64..(150_000 * 512),
            steps in prop::collection::vec(
                (any::<bool>(), any::<u32>(), prop_oneof![0_u64..4096, 0_u64..40_000_000]), 1..40),
        ) {
            let mut bitmap = DirtyBitmap::new(size, 512);
            let mut model = Model::new(size, 512);
            for (set, at, len) in steps {
                let range = GuestRange::new(u64::from(at) % size, len);
                if set { bitmap.set_range(range); } else { bitmap.clear_range(range); }
                model.apply(set, range);
            }
            same(&bitmap, &model);
            let back = DirtyBitmap::from_roaring(size, 512, &bitmap.to_roaring());
            same(&back, &model);
            let mut words = bitmap.clone();
            let mut taken = DirtyBitmap::new(size, 512);
            while let Some((first, word)) = words.take_word(0) {
                for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                    taken.set_range(GuestRange::new((first + bit) * 512, 1));
                }
            }
            prop_assert!(words.is_clean());
            same(&taken, &model);
        }

        #[test]
        fn resizing_keeps_what_stays_and_forgets_the_rest(
            size in 512_u64..100_000_000, smaller in 0_u64..100_000_000,
            at in any::<u32>(), len in 0_u64..50_000_000,
        ) {
            let mut bitmap = DirtyBitmap::new(size, 65536);
            bitmap.set_range(GuestRange::new(u64::from(at) % size, len));
            let smaller = smaller.min(size);
            let mut model = Model::new(smaller, 65536);
            for run in runs(&bitmap, u64::MAX) {
                model.apply(true, run);
            }
            bitmap.resize(smaller);
            same(&bitmap, &model);
            bitmap.resize(size);
            let kept: u64 = model.bits.iter().filter(|bit| **bit).count() as u64;
            prop_assert_eq!(bitmap.count(), kept);
        }
    }

    #[test]
    fn a_coarse_bitmap_takes_up_a_fine_one() {
        let mut fine = DirtyBitmap::new(1 << 20, 4096);
        fine.set_range(GuestRange::new(70_000, 1));
        let mut coarse = DirtyBitmap::new(1 << 20, 65536);
        coarse.merge(&fine);
        assert_eq!(runs(&coarse, u64::MAX), [GuestRange::new(65536, 65536)]);
        fine.merge(&coarse);
        assert_eq!(fine.count(), 16);
    }

    #[test]
    fn a_full_disk_of_16_tib_costs_no_words() {
        let mut bitmap = DirtyBitmap::new(16 << 40, 65536);
        bitmap.set_all();
        assert_eq!(bitmap.dirty_bytes(), 16 << 40);
        assert!(bitmap.leaves.iter().all(|leaf| *leaf == Leaf::Full));
        bitmap.clear_range(GuestRange::new(0, 65536));
        assert_eq!(bitmap.next_dirty(0), Some(65536));
        assert_eq!(bitmap.next_clean(65536), 16 << 40);
    }

    #[test]
    fn a_partly_covered_granule_is_not_cleared_except_the_last() {
        let mut bitmap = DirtyBitmap::new(100_000, 65536);
        bitmap.set_all();
        bitmap.clear_range(GuestRange::new(1, 65536));
        assert_eq!(bitmap.count(), 2);
        bitmap.clear_range(GuestRange::new(65536, 100_000 - 65536));
        assert_eq!(bitmap.count(), 1);
    }

    #[test]
    fn bitmaps_with_the_same_granules_are_equal_whatever_way_they_were_filled() {
        let run = GuestRange::new(0, 300 * 512);
        let mut once = DirtyBitmap::new(1 << 20, 512);
        once.set_range(run);
        let mut twice = once.clone();
        // counted twice, the run is too long for a sparse leaf
        twice.set_range(run);
        assert_eq!(once, twice);
        assert_eq!(twice, once);
        twice.clear_range(GuestRange::new(512, 512));
        assert_ne!(once, twice);
        twice.set_range(GuestRange::new(300 * 512, 512));
        assert_eq!(once.count(), twice.count());
        assert_ne!(once, twice);
        assert_ne!(twice, once);
    }
}
