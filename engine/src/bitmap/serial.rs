//! Bitmaps as bytes, the form in which image files hold them.
//!
//! Bit `n % 8` of byte `n / 8` stands for granule `n` (qcow2 specification, "Dirty tracking
//! bitmaps"; the same order as the peer's serialised form). Parts of a bitmap are converted one
//! piece at a time, so a large bitmap never exists twice.

use super::dirty::DirtyBitmap;
use crate::address::GuestRange;

impl DirtyBitmap {
    /// Number of granules, the last one possibly beyond the end of the disk.
    pub fn granules(&self) -> u64 {
        self.size().div_ceil(self.granularity())
    }

    /// Whether one of `count` granules from `first` on is dirty.
    pub fn any_granule(&self, first: u64, count: u64) -> bool {
        self.bytes_of(first, count).is_some_and(|range| self.intersects(range))
    }

    /// Whether all of `count` granules from `first` on (those inside the disk) are dirty.
    pub fn all_granules(&self, first: u64, count: u64) -> bool {
        let Some(range) = self.bytes_of(first, count) else { return true };
        self.next_clean(range.start.bytes()) >= range.end().bytes()
    }

    /// Marks `count` granules from `first` on, as far as the disk has them.
    pub fn set_granules(&mut self, first: u64, count: u64) {
        if let Some(range) = self.bytes_of(first, count) {
            self.set_range(range);
        }
    }

    /// Sets the bits of the dirty granules from `first` on in `bytes`; the others stay as they are.
    pub fn add_to_bytes(&self, first: u64, bytes: &mut [u8]) {
        let Some(range) = self.bytes_of(first, bytes.len() as u64 * 8) else { return };
        let mut from = range.start.bytes();
        while let Some(run) = self.next_dirty_range(from, range.end().bytes() - from) {
            if run.start.bytes() >= range.end().bytes() {
                return;
            }
            let start = run.start.bytes() / self.granularity() - first;
            let end = run.end().bytes().div_ceil(self.granularity()) - first;
            set_bits(bytes, start, end);
            from = run.end().bytes();
            if from >= range.end().bytes() {
                return;
            }
        }
    }

    /// Marks the granules from `first` on whose bits are set in `bytes`; bits beyond the end of
    /// the disk are ignored.
    pub fn merge_bytes(&mut self, first: u64, bytes: &[u8]) {
        let mut run: Option<(u64, u64)> = None;
        for (granule, byte) in (first..).step_by(8).zip(bytes) {
            let mut rest = *byte;
            while rest != 0 {
                let skip = u64::from(rest.trailing_zeros());
                let len = u64::from((!(rest >> skip)).trailing_zeros()).min(8 - skip);
                let at = granule + skip;
                run = match run {
                    Some((start, end)) if end == at => Some((start, at + len)),
                    old => {
                        self.set_run(old);
                        Some((at, at + len))
                    }
                };
                rest &= !(((1_u16 << len) - 1) << skip) as u8;
            }
        }
        self.set_run(run);
    }

    fn set_run(&mut self, run: Option<(u64, u64)>) {
        if let Some((start, end)) = run {
            self.set_granules(start, end - start);
        }
    }

    /// The bytes of the disk that some granules cover; `None` if they lie behind its end.
    fn bytes_of(&self, first: u64, count: u64) -> Option<GuestRange> {
        let start = first.checked_mul(self.granularity()).filter(|start| *start < self.size())?;
        let len = count.saturating_mul(self.granularity()).min(self.size() - start);
        Some(GuestRange::new(start, len))
    }
}

/// Sets the bits `start..end`.
fn set_bits(bytes: &mut [u8], start: u64, end: u64) {
    let mut bit = start;
    while bit < end {
        let stop = end.min((bit / 8 + 1) * 8);
        let mask = (0xff_u8 >> (8 - (stop - bit))) << (bit % 8);
        if let Some(byte) = usize::try_from(bit / 8).ok().and_then(|at| bytes.get_mut(at)) {
            *byte |= mask;
        }
        bit = stop;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn bytes_and_back_are_the_same_bitmap_in_pieces_of_any_size(
            size in 1_u64..3_000_000,
            steps in prop::collection::vec((any::<u32>(), 1_u64..40_000), 0..12),
            piece in 1_usize..700,
        ) {
            let mut bitmap = DirtyBitmap::new(size, 512);
            for (at, len) in steps {
                bitmap.set_range(GuestRange::new(u64::from(at) % size, len));
            }
            let count = usize::try_from(bitmap.granules().div_ceil(8)).unwrap();
            let mut bytes = vec![0; count];
            let mut first = 0;
            for part in bytes.chunks_mut(piece) {
                bitmap.add_to_bytes(first, part);
                let len = part.len() as u64 * 8;
                let dirty = part.iter().any(|byte| *byte != 0);
                prop_assert_eq!(bitmap.any_granule(first, len), dirty);
                first += len;
            }
            for granule in 0..bitmap.granules() {
                let bit = bytes[(granule / 8) as usize] >> (granule % 8) & 1 == 1;
                prop_assert_eq!(bit, bitmap.test(granule * 512));
            }
            let mut back = DirtyBitmap::new(size, 512);
            let mut first = 0;
            for part in bytes.chunks(piece) {
                back.merge_bytes(first, part);
                first += part.len() as u64 * 8;
            }
            prop_assert_eq!(back, bitmap);
        }
    }

    #[test]
    fn bits_beyond_the_end_are_ignored_and_full_parts_are_known() {
        let mut bitmap = DirtyBitmap::new(5 * 512 + 1, 512);
        bitmap.merge_bytes(0, &[0xff, 0xff]);
        assert_eq!(bitmap.count(), 6);
        assert!(bitmap.all_granules(0, 16));
        assert!(bitmap.all_granules(100, 16), "nothing is missing where nothing is");
        let mut bytes = [0; 2];
        bitmap.add_to_bytes(0, &mut bytes);
        assert_eq!(bytes, [0x3f, 0]);
        assert!(!bitmap.any_granule(6, 100));
    }
}
