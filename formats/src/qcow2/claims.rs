//! Which clusters of the file hold metadata, in memory that a file cannot make large.
//!
//! Owns the map from host clusters to kinds of metadata. Up to [`CLAIMS_MAX`] clusters it is a hash
//! map, which also knows which entry of L1 or of the refcount table a cluster belongs to. Beyond
//! that the clusters of tables, snapshots and bitmaps are packed into sorted lists of differences
//! (one to about four bytes each, where the map takes 25 to 50), one list per kind: 32 MiB of L1
//! entries that all name other clusters cost 16 MiB more. Packed clusters no longer know whose they
//! are; those that several entries named are kept aside and belong to nobody. Does no I/O.

use super::cache::IntMap;
use super::state::Meta;
use crate::limits::CLAIMS_MAX;

/// Stands for the index of a cluster in a packed list.
const ANY: u64 = u64::MAX;

/// Clusters between two that are stored as they are.
const BLOCK: usize = 64;

/// The clusters of the file that hold metadata.
#[derive(Debug)]
pub(super) struct Claims {
    single: IntMap<Meta>,
    /// What of the packed lists has gone.
    gone: IntMap<()>,
    /// Refcount blocks, L2 tables, snapshots, bitmaps.
    packed: [Packed; 4],
    /// Packed clusters that more than one entry names.
    shared: Packed,
    /// How many clusters are kept singly.
    most: usize,
}

impl Default for Claims {
    fn default() -> Self {
        Self::with_most(CLAIMS_MAX)
    }
}

impl Claims {
    fn with_most(most: usize) -> Self {
        let (single, gone) = (IntMap::default(), IntMap::default());
        Self { single, gone, packed: Default::default(), shared: Packed::default(), most }
    }

    /// What `cluster` holds; the index of a table is not always known (see [`Self::is`]).
    pub(super) fn get(&self, cluster: u64) -> Option<Meta> {
        if let Some(meta) = self.single.get(&cluster) {
            return Some(*meta);
        }
        if self.packed.iter().all(Packed::is_empty) || self.gone.contains_key(&cluster) {
            return None;
        }
        let kind = self.packed.iter().position(|list| list.contains(cluster))?;
        Some(match kind {
            0 => Meta::RefBlock(ANY),
            1 => Meta::L2(ANY),
            2 => Meta::Snapshots,
            _ => Meta::Bitmaps,
        })
    }

    /// Whether `cluster` holds any metadata.
    pub(super) fn contains(&self, cluster: u64) -> bool {
        self.get(cluster).is_some()
    }

    /// Whether `cluster` holds this, and this alone.
    pub(super) fn is(&self, cluster: u64, meta: Meta) -> bool {
        match self.get(cluster) {
            Some(Meta::RefBlock(ANY)) => {
                matches!(meta, Meta::RefBlock(_)) && !self.shared.contains(cluster)
            }
            Some(Meta::L2(ANY)) => matches!(meta, Meta::L2(_)) && !self.shared.contains(cluster),
            found => found == Some(meta),
        }
    }

    /// Enters `cluster`, whatever it held.
    pub(super) fn insert(&mut self, cluster: u64, meta: Meta) {
        if self.single.len() >= self.most {
            self.pack();
        }
        self.single.insert(cluster, meta);
    }

    /// Enters `cluster` if nobody has it.
    pub(super) fn claim(&mut self, cluster: u64, meta: Meta) {
        if !self.contains(cluster) {
            self.insert(cluster, meta);
        }
    }

    /// Enters the clusters of tables that entries name (index of the entry, cluster), each if
    /// nobody has it.
    pub(super) fn claim_tables(
        &mut self,
        meta: fn(u64) -> Meta,
        entries: impl Iterator<Item = (u64, u64)> + Clone,
    ) {
        let fits = |count| self.single.len() + count <= self.most;
        if entries.size_hint().1.is_some_and(fits) || fits(entries.clone().count()) {
            entries.for_each(|(index, cluster)| self.claim(cluster, meta(index)));
            return;
        }
        let count = entries.clone().count();
        if !self.gone.is_empty() {
            self.pack();
        }
        let mut clusters = Vec::with_capacity(count);
        clusters.extend(entries.map(|(_, cluster)| cluster));
        clusters.retain(|cluster| !self.single.contains_key(cluster));
        clusters.sort_unstable();
        let twice = clusters.windows(2).filter_map(|pair| match pair {
            [first, second] if first == second => Some(*first),
            _ => None,
        });
        let mut shared: Vec<u64> = self.shared.iter().chain(twice).collect();
        shared.sort_unstable();
        self.shared = Packed::from_sorted(shared.iter().copied());
        if let Some(list) = kind(meta(0)).and_then(|kind| self.packed.get_mut(kind)) {
            let old: Vec<u64> = list.iter().collect();
            if !old.is_empty() {
                clusters.extend(old);
                clusters.sort_unstable();
            }
            *list = Packed::from_sorted(clusters.iter().copied());
        }
    }

    /// Takes `cluster` out.
    pub(super) fn remove(&mut self, cluster: u64) {
        self.single.remove(&cluster);
        if self.contains(cluster) {
            self.gone.insert(cluster, ());
            if self.gone.len() > self.most {
                self.pack();
            }
        }
    }

    /// Takes L1, L2 tables and snapshots out.
    pub(super) fn forget_mapping(&mut self) {
        if !self.gone.is_empty() {
            self.pack();
        }
        let mapping = |meta: &Meta| matches!(meta, Meta::L1 | Meta::L2(_) | Meta::Snapshots);
        self.single.retain(|_, meta| !mapping(meta));
        for list in self.packed.iter_mut().skip(1).take(2) {
            *list = Packed::default();
        }
    }

    /// A cluster behind which no metadata is.
    pub(super) fn last(&self) -> Option<u64> {
        let packed = self.packed.iter().filter_map(|list| list.last);
        self.single.keys().copied().chain(packed).max()
    }

    /// Moves what can be packed into the lists.
    fn pack(&mut self) {
        let (single, gone) = (&self.single, &self.gone);
        let stays = |cluster: &u64| !gone.contains_key(cluster) && !single.contains_key(cluster);
        self.shared = Packed::from_sorted(self.shared.iter().filter(stays));
        for (number, list) in self.packed.iter_mut().enumerate() {
            let new = single.iter().filter(|(_, meta)| kind(**meta) == Some(number));
            let mut all: Vec<u64> = list.iter().filter(stays).collect();
            all.extend(new.map(|(cluster, _)| *cluster));
            all.sort_unstable();
            *list = Packed::from_sorted(all.iter().copied());
        }
        self.single.retain(|_, meta| kind(*meta).is_none());
        self.gone.clear();
    }
}

/// The list that this kind is packed into.
fn kind(meta: Meta) -> Option<usize> {
    match meta {
        Meta::RefBlock(_) => Some(0),
        Meta::L2(_) => Some(1),
        Meta::Snapshots => Some(2),
        Meta::Bitmaps => Some(3),
        Meta::Header | Meta::L1 | Meta::RefTable => None,
    }
}

/// A sorted set of clusters as differences of seven bits a byte.
#[derive(Debug, Default)]
struct Packed {
    /// Of each block: its first cluster, where its differences begin.
    heads: Vec<(u64, usize)>,
    bytes: Vec<u8>,
    last: Option<u64>,
}

impl Packed {
    /// The set of what comes in ascending order, perhaps repeated.
    fn from_sorted(clusters: impl Iterator<Item = u64> + Clone) -> Self {
        let mut new = Self::default();
        // Twice over, so that no list is ever twice as large as it needs.
        let (mut blocks, mut bytes) = (0, 0);
        each_difference(clusters.clone(), |difference| match difference {
            Difference::Head(_) => blocks += 1,
            Difference::Next(value) => bytes += len_of(value),
        });
        new.heads.reserve_exact(blocks);
        new.bytes.reserve_exact(bytes);
        each_difference(clusters.clone(), |difference| match difference {
            Difference::Head(cluster) => new.heads.push((cluster, new.bytes.len())),
            Difference::Next(mut value) => {
                while value > 0x7f {
                    new.bytes.push((value & 0x7f) as u8 | 0x80);
                    value >>= 7;
                }
                new.bytes.push((value & 0x7f) as u8);
            }
        });
        new.last = clusters.last();
        new
    }

    fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    fn contains(&self, cluster: u64) -> bool {
        let block = self.heads.partition_point(|(first, _)| *first <= cluster);
        let Some(block) = block.checked_sub(1) else { return false };
        self.block(block).take_while(|found| *found <= cluster).last() == Some(cluster)
    }

    fn iter(&self) -> impl Iterator<Item = u64> + Clone + '_ {
        (0..self.heads.len()).flat_map(|block| self.block(block))
    }

    /// The clusters of a block.
    fn block(&self, block: usize) -> impl Iterator<Item = u64> + Clone + '_ {
        let (first, start) = self.heads.get(block).copied().unwrap_or_default();
        let end = self.heads.get(block + 1).map_or(self.bytes.len(), |(_, start)| *start);
        let bytes = self.bytes.get(start..end).unwrap_or_default();
        let (mut at, mut value, mut shift) = (first, 0_u64, 0);
        let rest = bytes.iter().filter_map(move |byte| {
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 != 0 {
                return None;
            }
            at += value;
            (value, shift) = (0, 0);
            Some(at)
        });
        std::iter::once(first).chain(rest)
    }
}

enum Difference {
    /// The first cluster of a block.
    Head(u64),
    /// From the one before to the next.
    Next(u64),
}

fn each_difference(clusters: impl Iterator<Item = u64>, mut visit: impl FnMut(Difference)) {
    let (mut before, mut count) = (None, 0_usize);
    for cluster in clusters {
        match before {
            Some(before) if before == cluster => continue,
            Some(before) if !count.is_multiple_of(BLOCK) => {
                visit(Difference::Next(cluster - before));
            }
            _ => visit(Difference::Head(cluster)),
        }
        before = Some(cluster);
        count += 1;
    }
}

/// Bytes that a difference takes.
fn len_of(value: u64) -> usize {
    usize::try_from((u64::BITS - value.leading_zeros()).max(1).div_ceil(7)).unwrap_or(10)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use liveblk_engine::driver::sim::Rng;

    use super::*;

    fn same_kind(a: Meta, b: Meta) -> bool {
        std::mem::discriminant(&a) == std::mem::discriminant(&b)
    }

    #[test]
    fn packed_sets_hold_what_was_put_in_and_nothing_else() {
        let mut rng = Rng::new(5);
        for bits in [1, 4, 9, 20, 46] {
            let mut all: Vec<u64> = (0..3000).map(|_| rng.bits() & ((1 << bits) - 1)).collect();
            all.sort_unstable();
            let packed = Packed::from_sorted(all.iter().copied());
            assert_eq!(packed.bytes.len(), packed.bytes.capacity());
            all.dedup();
            assert_eq!(packed.iter().collect::<Vec<_>>(), all);
            assert_eq!(packed.last, all.last().copied());
            for cluster in all.iter().flat_map(|at| [*at, at + 1, at.saturating_sub(1)]) {
                assert_eq!(packed.contains(cluster), all.binary_search(&cluster).is_ok());
            }
        }
        assert!(!Packed::default().contains(0) && Packed::default().is_empty());
    }

    #[test]
    fn claims_packed_or_not_are_a_map() {
        let mut rng = Rng::new(9);
        for most in [8, 40, CLAIMS_MAX] {
            let (mut claims, mut model) = (Claims::with_most(most), BTreeMap::new());
            for at in 0..5 {
                claims.insert(at, Meta::Header);
                model.insert(at, Meta::Header);
            }
            for _ in 0..4000 {
                let cluster = 5 + rng.bits() % 200;
                let meta = *rng.pick(&[Meta::L2(7), Meta::RefBlock(7), Meta::Bitmaps]);
                match rng.bits() % 3 {
                    0 => {
                        claims.insert(cluster, meta);
                        model.insert(cluster, meta);
                    }
                    1 => {
                        claims.claim(cluster, meta);
                        model.entry(cluster).or_insert(meta);
                    }
                    _ => {
                        claims.remove(cluster);
                        model.remove(&cluster);
                    }
                }
                let wanted = model.get(&cluster).copied();
                assert_eq!(claims.contains(cluster), wanted.is_some());
                if let Some(wanted) = wanted {
                    assert!(claims.is(cluster, wanted) && !claims.is(cluster, Meta::L1));
                }
                assert!(claims.single.len() <= most && claims.gone.len() <= most);
            }
            for cluster in 0..300 {
                let (found, wanted) = (claims.get(cluster), model.get(&cluster));
                assert_eq!(found.is_some(), wanted.is_some(), "{cluster}");
                assert!(found.zip(wanted).is_none_or(|(a, b)| same_kind(a, *b)), "{cluster}");
            }
            assert!(claims.last() >= model.keys().last().copied());
            claims.forget_mapping();
            model.retain(|_, meta| !matches!(meta, Meta::L2(_)));
            for cluster in 0..300 {
                assert_eq!(claims.contains(cluster), model.contains_key(&cluster), "{cluster}");
            }
        }
    }

    #[test]
    fn a_table_that_several_entries_name_belongs_to_one_of_them_or_none() {
        for most in [2, 100] {
            let mut claims = Claims::with_most(most);
            claims.insert(0, Meta::Header);
            claims.claim_tables(Meta::RefBlock, [(0, 5), (1, 6)].into_iter());
            claims.claim_tables(Meta::L2, [(0, 9), (1, 8), (2, 9), (3, 6), (4, 0)].into_iter());
            let owns = |index, cluster| claims.is(cluster, Meta::L2(index));
            assert!(owns(1, 8) && !owns(2, 9) && !owns(3, 6) && !owns(4, 0));
            assert_eq!(owns(0, 9), most == 100, "packed, nobody knows who was first");
            assert!(claims.is(6, Meta::RefBlock(1)) && claims.is(0, Meta::Header));
            assert_eq!(claims.last(), Some(9));
        }
    }
}
