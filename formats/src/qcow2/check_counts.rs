//! A number per cluster of a file, for counting references.
//!
//! Memory follows what is counted, not what a header claims: chunks are lists of pairs while few
//! of their clusters are counted and arrays afterwards. Numbers that do not fit in 16 bits are kept
//! aside. Does no I/O.

use std::collections::BTreeMap;

/// Clusters of a chunk, as a power of two.
const CHUNK_BITS: u32 = 16;

/// Pairs of a chunk before it becomes an array.
const PAIRS_MAX: usize = 8192;

/// Stands for "look aside".
const ASIDE: u16 = u16::MAX;

#[derive(Debug)]
enum Chunk {
    Pairs(Vec<(u16, u16)>),
    Array(Box<[u16]>),
}

/// Numbers by cluster; 0 where nothing was set.
#[derive(Debug)]
pub(super) struct Counts {
    chunks: Vec<Chunk>,
    aside: BTreeMap<u64, u64>,
    /// Clusters that can be counted.
    limit: u64,
    arrays: u64,
}

impl Counts {
    /// Numbers for the clusters below `limit`.
    pub(super) fn new(limit: u64) -> Self {
        Self { chunks: Vec::new(), aside: BTreeMap::new(), limit, arrays: 0 }
    }

    /// Clusters that can be counted.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Lets more clusters be counted.
    pub(super) fn raise_limit(&mut self, limit: u64) {
        self.limit = self.limit.max(limit);
    }

    /// Bytes of the arrays, roughly what all of it takes.
    pub(super) fn array_bytes(&self) -> u64 {
        self.arrays << (CHUNK_BITS + 1)
    }

    /// The number of `cluster`.
    pub(super) fn at(&self, cluster: u64) -> u64 {
        let (chunk, within) = split(cluster);
        let small = match self.chunks.get(chunk) {
            None => 0,
            Some(Chunk::Array(array)) => array.get(usize::from(within)).copied().unwrap_or(0),
            Some(Chunk::Pairs(pairs)) => pairs
                .binary_search_by_key(&within, |pair| pair.0)
                .ok()
                .and_then(|at| pairs.get(at))
                .map_or(0, |pair| pair.1),
        };
        match small {
            ASIDE => self.aside.get(&cluster).copied().unwrap_or(u64::from(ASIDE)),
            small => small.into(),
        }
    }

    /// Sets the number of `cluster`; nothing happens beyond the limit.
    pub(super) fn set(&mut self, cluster: u64, value: u64) {
        if cluster >= self.limit {
            return;
        }
        let small = u16::try_from(value).unwrap_or(ASIDE);
        if small == ASIDE {
            self.aside.insert(cluster, value);
        }
        let (chunk, within) = split(cluster);
        while self.chunks.len() <= chunk {
            self.chunks.push(Chunk::Pairs(Vec::new()));
        }
        let Some(chunk) = self.chunks.get_mut(chunk) else { return };
        if let Chunk::Pairs(pairs) = chunk {
            match pairs.binary_search_by_key(&within, |pair| pair.0) {
                Ok(at) => {
                    if let Some(pair) = pairs.get_mut(at) {
                        pair.1 = small;
                    }
                    return;
                }
                Err(_) if small == 0 => return,
                Err(at) if pairs.len() < PAIRS_MAX => return pairs.insert(at, (within, small)),
                Err(_) => {}
            }
            let mut array = vec![0; 1 << CHUNK_BITS].into_boxed_slice();
            for (at, number) in pairs.iter() {
                if let Some(slot) = array.get_mut(usize::from(*at)) {
                    *slot = *number;
                }
            }
            self.arrays += 1;
            *chunk = Chunk::Array(array);
        }
        if let Chunk::Array(array) = chunk
            && let Some(slot) = array.get_mut(usize::from(within))
        {
            *slot = small;
        }
    }

    /// Adds to the number of `cluster`; answers the new one.
    pub(super) fn add(&mut self, cluster: u64, times: u64) -> u64 {
        let value = self.at(cluster).saturating_add(times);
        self.set(cluster, value);
        value
    }

    /// How many chunks there are; [`Self::used`] lists each.
    pub(super) fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// The clusters of a chunk whose number is not 0, ascending.
    pub(super) fn used(&self, chunk: usize) -> impl Iterator<Item = u64> + '_ {
        let first = (chunk as u64) << CHUNK_BITS;
        let (pairs, array) = match self.chunks.get(chunk) {
            None => (None, None),
            Some(Chunk::Pairs(pairs)) => (Some(pairs), None),
            Some(Chunk::Array(array)) => (None, Some(array)),
        };
        let pairs = pairs.into_iter().flatten().filter(|pair| pair.1 != 0);
        let numbers = array.into_iter().flat_map(|array| array.iter().enumerate());
        let array = numbers.filter(|(_, number)| **number != 0).map(|(at, _)| at as u64);
        pairs.map(|pair| u64::from(pair.0)).chain(array).map(move |at| first + at)
    }

    /// The highest cluster whose number is not 0.
    pub(super) fn highest(&self) -> Option<u64> {
        (0..self.chunks.len()).rev().find_map(|chunk| self.used(chunk).last())
    }
}

/// Chunk, and position in it.
fn split(cluster: u64) -> (usize, u16) {
    let chunk = usize::try_from(cluster >> CHUNK_BITS).unwrap_or(usize::MAX);
    (chunk, (cluster & ((1 << CHUNK_BITS) - 1)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_back_in_lists_arrays_and_aside() {
        let mut counts = Counts::new(1 << 20);
        for step in 0..20_000_u64 {
            let cluster = step * 7919 % 100_000;
            counts.add(cluster, step % 5 + 1);
        }
        counts.set(5, 1 << 40);
        counts.set(6, 0xffff);
        counts.add(6, 3);
        counts.set(999_999, 1);
        counts.set(1 << 20, 1);
        assert_eq!(counts.at(5), 1 << 40);
        assert_eq!(counts.at(6), 0x1_0002);
        assert_eq!(counts.at(1 << 20), 0, "beyond the limit");
        assert_eq!(counts.highest(), Some(999_999));
        let listed: Vec<u64> = (0..counts.chunk_count()).flat_map(|c| counts.used(c)).collect();
        assert!(listed.is_sorted());
        let all: Vec<u64> = (0..1 << 20).filter(|cluster| counts.at(*cluster) != 0).collect();
        assert_eq!(listed, all);
        assert!(counts.array_bytes() <= 2 << 17);
    }

    #[test]
    fn few_numbers_in_a_huge_file_take_little_memory() {
        let mut counts = Counts::new(1 << 31);
        for chunk in 0..1 << 12 {
            counts.set(chunk << 19, 1);
        }
        assert_eq!(counts.array_bytes(), 0);
        assert_eq!(counts.highest(), Some(0xfff << 19));
    }
}
