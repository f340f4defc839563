//! Which host clusters are known to hold guest data: a second opinion for the allocator.
//!
//! Refcounts say what is free; in a damaged image they may be wrong. Every cluster that an L2 entry
//! was seen to name is remembered here until its refcount becomes 0, and is never handed out
//! meanwhile (rows R1 and R6 of the fault list). Bounded: beyond the bound nothing new is
//! remembered. Does no I/O.

use super::cache::IntMap;
use super::layout::HostCluster;
use crate::limits::MAPPED_CHUNKS_MAX;

/// Clusters of a chunk, as a power of two.
const CHUNK_BITS: u32 = 12;

type Chunk = [u64; 1 << (CHUNK_BITS - 6)];

/// A set of host clusters.
#[derive(Debug, Default)]
pub(super) struct Mapped {
    chunks: IntMap<Box<Chunk>>,
}

impl Mapped {
    /// Remembers `cluster`.
    pub(super) fn insert(&mut self, cluster: HostCluster) {
        let (chunk, word, bit) = split(cluster);
        if self.chunks.len() >= MAPPED_CHUNKS_MAX && !self.chunks.contains_key(&chunk) {
            return;
        }
        let chunk = self.chunks.entry(chunk).or_insert_with(|| Box::new([0; _]));
        if let Some(word) = chunk.get_mut(word) {
            *word |= bit;
        }
    }

    /// Forgets `cluster`.
    pub(super) fn remove(&mut self, cluster: HostCluster) {
        let (chunk, word, bit) = split(cluster);
        if let Some(word) = self.chunks.get_mut(&chunk).and_then(|chunk| chunk.get_mut(word)) {
            *word &= !bit;
        }
    }

    /// Whether `cluster` is known to hold guest data.
    pub(super) fn contains(&self, cluster: HostCluster) -> bool {
        let (chunk, word, bit) = split(cluster);
        let word = self.chunks.get(&chunk).and_then(|chunk| chunk.get(word));
        word.is_some_and(|word| word & bit != 0)
    }
}

/// Chunk, word in it, bit of the word.
fn split(cluster: HostCluster) -> (u64, usize, u64) {
    let within = cluster.0 & ((1 << CHUNK_BITS) - 1);
    (cluster.0 >> CHUNK_BITS, usize::try_from(within / 64).unwrap_or(0), 1 << (within % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_is_found_until_it_is_forgotten_and_memory_is_bounded() {
        let mut mapped = Mapped::default();
        for cluster in [0, 1, 63, 64, 4095, 4096, 1 << 40] {
            assert!(!mapped.contains(HostCluster(cluster)));
            mapped.insert(HostCluster(cluster));
            assert!(mapped.contains(HostCluster(cluster)));
        }
        mapped.remove(HostCluster(64));
        assert!(!mapped.contains(HostCluster(64)) && mapped.contains(HostCluster(63)));
        for chunk in 0..2 * MAPPED_CHUNKS_MAX as u64 {
            mapped.insert(HostCluster(chunk << CHUNK_BITS));
        }
        assert_eq!(mapped.chunks.len(), MAPPED_CHUNKS_MAX);
        assert!(mapped.contains(HostCluster(4095)), "what was there stays");
    }
}
