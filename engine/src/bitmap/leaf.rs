//! One leaf of a dirty bitmap: 65,536 bits that start sparse and become words when dense.
//!
//! Owns the three shapes of a leaf and the moves between them. Knows nothing of bytes or sizes:
//! positions are bit numbers inside the leaf.

/// Bits of one leaf: the size of a roaring container, so one converts to the other.
pub(super) const LEAF_BITS: u32 = 1 << 16;

/// Words of a dense leaf.
pub(super) const LEAF_WORDS: usize = (LEAF_BITS / 64) as usize;

/// A sparse leaf with more entries than this becomes dense (1 KiB against 8 KiB: inserting into
/// the sorted array stays cheap).
const SPARSE_MAX: usize = 512;

/// A run of bits inside a leaf: first and one past the last.
pub(super) type Run = std::ops::Range<u32>;

/// The bits of one leaf.
///
/// A leaf becomes dense at another count than it becomes sparse again, so equal bits may have
/// different shapes: leaves are equal if their bits are.
#[derive(Clone, Debug, Default)]
pub(super) enum Leaf {
    /// No bit is set.
    #[default]
    Empty,
    /// Sorted positions of the set bits; never empty.
    Sparse(Vec<u16>),
    /// All words, and how many bits are set.
    Dense { words: Box<[u64; LEAF_WORDS]>, count: u32 },
    /// Every bit is set.
    Full,
}

impl PartialEq for Leaf {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Dense { words, .. }, Self::Dense { words: others, .. }) => words == others,
            (Self::Sparse(list), Self::Dense { .. }) => other.is_exactly(list),
            (Self::Dense { .. }, Self::Sparse(list)) => self.is_exactly(list),
            (Self::Sparse(list), Self::Sparse(others)) => list == others,
            // an empty and a full leaf have one shape each
            _ => self.count() == other.count(),
        }
    }
}

impl Leaf {
    /// Whether the set bits are those of `list`.
    fn is_exactly(&self, list: &[u16]) -> bool {
        self.count() as usize == list.len() && list.iter().all(|bit| self.test(u32::from(*bit)))
    }

    pub(super) fn count(&self) -> u32 {
        match self {
            Self::Empty => 0,
            Self::Sparse(list) => u32::try_from(list.len()).expect("invariant: a short list"),
            Self::Dense { count, .. } => *count,
            Self::Full => LEAF_BITS,
        }
    }

    pub(super) fn test(&self, bit: u32) -> bool {
        match self {
            Self::Empty => false,
            Self::Sparse(list) => list.binary_search(&position(bit)).is_ok(),
            Self::Dense { words, .. } => words[(bit / 64) as usize] >> (bit % 64) & 1 == 1,
            Self::Full => true,
        }
    }

    /// Sets the bits of `run`; answers how many were clear.
    pub(super) fn set(&mut self, run: Run) -> u32 {
        if run.is_empty() {
            return 0;
        }
        if run.len() == LEAF_BITS as usize {
            let added = LEAF_BITS - self.count();
            *self = Self::Full;
            return added;
        }
        match self {
            Self::Full => 0,
            Self::Empty | Self::Sparse(_) if self.count() as usize + run.len() <= SPARSE_MAX => {
                self.set_sparse(run)
            }
            _ => {
                let (words, count) = self.make_dense();
                let mut added = 0;
                for_words(&run, |index, mask| {
                    added += (mask & !words[index]).count_ones();
                    words[index] |= mask;
                });
                *count += added;
                if *count == LEAF_BITS {
                    *self = Self::Full;
                }
                added
            }
        }
    }

    fn set_sparse(&mut self, run: Run) -> u32 {
        if matches!(self, Self::Empty) {
            *self = Self::Sparse(Vec::new());
        }
        let Self::Sparse(list) = self else { return 0 };
        let from = list.partition_point(|known| u32::from(*known) < run.start);
        let to = list.partition_point(|known| u32::from(*known) < run.end);
        let added = run.len() - (to - from);
        if added > 0 {
            list.splice(from..to, run.map(position));
        }
        u32::try_from(added).expect("invariant: a short run")
    }

    /// Clears the bits of `run`; answers how many were set.
    pub(super) fn clear(&mut self, run: Run) -> u32 {
        if run.is_empty() {
            return 0;
        }
        if run.len() == LEAF_BITS as usize {
            let removed = self.count();
            *self = Self::Empty;
            return removed;
        }
        let removed = match self {
            Self::Empty => 0,
            Self::Sparse(list) => {
                let from = list.partition_point(|known| u32::from(*known) < run.start);
                let to = list.partition_point(|known| u32::from(*known) < run.end);
                list.drain(from..to);
                u32::try_from(to - from).expect("invariant: a short list")
            }
            Self::Dense { .. } | Self::Full => {
                let (words, count) = self.make_dense();
                let mut removed = 0;
                for_words(&run, |index, mask| {
                    removed += (mask & words[index]).count_ones();
                    words[index] &= !mask;
                });
                *count -= removed;
                removed
            }
        };
        if self.count() == 0 {
            *self = Self::Empty;
        }
        removed
    }

    /// The first set bit at or after `from`.
    pub(super) fn next_set(&self, from: u32) -> Option<u32> {
        if from >= LEAF_BITS {
            return None;
        }
        match self {
            Self::Empty => None,
            Self::Full => Some(from),
            Self::Sparse(list) => {
                let at = list.partition_point(|known| u32::from(*known) < from);
                list.get(at).map(|known| u32::from(*known))
            }
            Self::Dense { words, .. } => scan(words, from, |word| word),
        }
    }

    /// The first clear bit at or after `from`.
    pub(super) fn next_clear(&self, from: u32) -> Option<u32> {
        if from >= LEAF_BITS {
            return None;
        }
        match self {
            Self::Empty => Some(from),
            Self::Full => None,
            Self::Sparse(list) => {
                let at = list.partition_point(|known| u32::from(*known) < from);
                let mut free = from;
                for known in list.iter().skip(at) {
                    if u32::from(*known) != free {
                        break;
                    }
                    free += 1;
                }
                (free < LEAF_BITS).then_some(free)
            }
            Self::Dense { words, .. } => scan(words, from, |word| !word),
        }
    }

    /// Word `index` of the leaf, which is cleared.
    pub(super) fn take_word(&mut self, index: u32) -> u64 {
        let mut word = 0;
        let start = index * 64;
        let mut from = start;
        while let Some(bit) = self.next_set(from).filter(|bit| *bit < start + 64) {
            word |= 1 << (bit - start);
            from = bit + 1;
        }
        self.clear(start..start + 64);
        word
    }

    fn make_dense(&mut self) -> (&mut [u64; LEAF_WORDS], &mut u32) {
        let known = std::mem::take(self);
        let count = known.count();
        let words = match known {
            Self::Dense { words, .. } => words,
            Self::Full => Box::new([u64::MAX; LEAF_WORDS]),
            Self::Empty => Box::new([0; LEAF_WORDS]),
            Self::Sparse(list) => {
                let mut words = Box::new([0; LEAF_WORDS]);
                for bit in list {
                    words[usize::from(bit / 64)] |= 1 << (bit % 64);
                }
                words
            }
        };
        *self = Self::Dense { words, count };
        match self {
            Self::Dense { words, count } => (words, count),
            _ => unreachable!("invariant: just made dense"),
        }
    }
}

fn position(bit: u32) -> u16 {
    u16::try_from(bit).expect("invariant: positions are inside the leaf")
}

/// Calls `each` with every word that `run` touches and the mask of its bits there.
fn for_words(run: &Run, mut each: impl FnMut(usize, u64)) {
    let mut bit = run.start;
    while bit < run.end {
        let end = run.end.min((bit / 64 + 1) * 64);
        let mask = u64::MAX >> (64 - (end - bit)) << (bit % 64);
        each((bit / 64) as usize, mask);
        bit = end;
    }
}

/// The first bit at or after `from` that is set in `look(word)`.
fn scan(words: &[u64; LEAF_WORDS], from: u32, look: impl Fn(u64) -> u64) -> Option<u32> {
    let mut skip = u64::MAX << (from % 64);
    for (word, base) in words.iter().zip((0..).step_by(64)).skip((from / 64) as usize) {
        let found = look(*word) & skip;
        if found != 0 {
            return Some(base + found.trailing_zeros());
        }
        skip = u64::MAX;
    }
    None
}
