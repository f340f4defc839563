//! Slices of metadata tables in memory, with their dirty state.
//!
//! Owns the bytes; does no I/O. Promises: lookups do not allocate; a slice that is dirty, being
//! written or needed by somebody (the caller's predicate) is never evicted; a write-out works on a
//! copy, so the slice may change meanwhile and then stays dirty. A slice of zeroes, the most
//! frequent one in the layers of a chain, takes no memory for its bytes until it is changed.
//!
//! ```text
//! Clean --change--> Dirty --begin_write--> Writing --end_write(ok)--> Clean
//!                     ^                       | change
//!                     |--end_write(failed)-- Writing/again <-+
//! ```

use std::cell::Cell;
use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use crate::limits::SLICE_BYTES;

/// A hasher for integer keys that gives the same order in every run.
#[derive(Default)]
pub(super) struct IntHasher(u64);

impl Hasher for IntHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 29);
    }
}

/// A map from integers that behaves the same in every run.
pub(super) type IntMap<V> = HashMap<u64, V, BuildHasherDefault<IntHasher>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Clean,
    Dirty,
    /// A copy is being written; `again`: changed since.
    Writing {
        again: bool,
    },
}

/// What slices of zeroes show.
static ZEROES: [u8; SLICE_BYTES as usize] = [0; SLICE_BYTES as usize];

/// The bytes of a slice.
#[derive(Debug)]
enum Content {
    /// So many zeroes, at most as many as [`ZEROES`] has.
    Zeroes(usize),
    Bytes(Box<[u8]>),
}

impl Content {
    fn new(bytes: Box<[u8]>) -> Self {
        match ZEROES.get(..bytes.len()) {
            Some(zeroes) if *zeroes == *bytes => Self::Zeroes(bytes.len()),
            _ => Self::Bytes(bytes),
        }
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Zeroes(len) => ZEROES.get(..*len).unwrap_or_default(),
            Self::Bytes(bytes) => bytes,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        if let Self::Zeroes(len) = *self {
            *self = Self::Bytes(vec![0; len].into_boxed_slice());
        }
        match self {
            Self::Zeroes(_) => &mut [],
            Self::Bytes(bytes) => bytes,
        }
    }
}

#[derive(Debug)]
struct Slot {
    key: u64,
    content: Content,
    state: State,
    /// Since the hand was here.
    used: Cell<bool>,
    /// Since unused slices were last forgotten.
    recent: Cell<bool>,
}

/// A bounded set of slices by number.
#[derive(Debug)]
pub(super) struct Cache {
    index: IntMap<usize>,
    slots: Vec<Slot>,
    hand: usize,
    capacity: usize,
    dirty: BTreeSet<u64>,
}

impl Cache {
    /// A cache of at most `capacity` slices.
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            index: IntMap::default(),
            slots: Vec::new(),
            hand: 0,
            capacity,
            dirty: BTreeSet::new(),
        }
    }

    fn slot(&self, key: u64) -> Option<&Slot> {
        self.slots.get(*self.index.get(&key)?)
    }

    fn slot_mut(&mut self, key: u64) -> Option<&mut Slot> {
        self.slots.get_mut(*self.index.get(&key)?)
    }

    /// The bytes of slice `key`, if cached.
    pub(super) fn get(&self, key: u64) -> Option<&[u8]> {
        let slot = self.slot(key)?;
        slot.used.set(true);
        slot.recent.set(true);
        Some(slot.content.bytes())
    }

    /// The bytes of slice `key` to be changed: it becomes dirty.
    pub(super) fn change(&mut self, key: u64) -> Option<&mut [u8]> {
        let at = *self.index.get(&key)?;
        let slot = self.slots.get_mut(at)?;
        slot.used.set(true);
        slot.recent.set(true);
        match slot.state {
            State::Clean => {
                slot.state = State::Dirty;
                self.dirty.insert(key);
            }
            State::Dirty => {}
            State::Writing { .. } => slot.state = State::Writing { again: true },
        }
        Some(slot.content.bytes_mut())
    }

    /// Whether slice `key` is cached.
    pub(super) fn contains(&self, key: u64) -> bool {
        self.index.contains_key(&key)
    }

    /// Adds a clean slice; nothing happens if it is cached already.
    pub(super) fn insert(&mut self, key: u64, bytes: Box<[u8]>) {
        if self.contains(key) {
            return;
        }
        self.index.insert(key, self.slots.len());
        let (used, recent) = (Cell::new(true), Cell::new(true));
        let content = Content::new(bytes);
        self.slots.push(Slot { key, content, state: State::Clean, used, recent });
    }

    /// Whether another slice fits without eviction.
    pub(super) fn has_room(&self) -> bool {
        self.slots.len() < self.capacity
    }

    /// Changes how many slices it holds at most. What is too much goes where it is clean and nobody
    /// needs it, the rest when room is made.
    pub(super) fn set_capacity(&mut self, capacity: usize, needed: impl Fn(u64) -> bool) {
        self.capacity = capacity;
        let mut at = 0;
        while let Some(slot) = self.slots.get(at).filter(|_| self.slots.len() > capacity) {
            if slot.state == State::Clean && !needed(slot.key) {
                self.remove_at(at);
            } else {
                at += 1;
            }
        }
    }

    /// Evicts clean slices that nobody needs until one more fits; answers whether it does.
    pub(super) fn make_room(&mut self, needed: impl Fn(u64) -> bool) -> bool {
        let mut looked = 0;
        while !self.has_room() && looked < self.slots.len() * 2 {
            looked += 1;
            if self.hand >= self.slots.len() {
                self.hand = 0;
            }
            let Some(slot) = self.slots.get(self.hand) else { return true };
            if slot.state != State::Clean || slot.used.replace(false) || needed(slot.key) {
                self.hand += 1;
                continue;
            }
            self.remove_at(self.hand);
        }
        self.has_room()
    }

    /// Forgets the clean slices that nobody needs and that were not used since the last call;
    /// whether there are others that the next call may forget.
    pub(super) fn forget_unused(&mut self, needed: impl Fn(u64) -> bool) -> bool {
        let (mut at, mut later) = (0, false);
        while let Some(slot) = self.slots.get(at) {
            let used = slot.recent.replace(false);
            if slot.state != State::Clean || needed(slot.key) {
                at += 1;
            } else if used {
                later = true;
                at += 1;
            } else {
                self.remove_at(at);
            }
        }
        later
    }

    fn remove_at(&mut self, at: usize) {
        let removed = self.slots.swap_remove(at);
        self.index.remove(&removed.key);
        if let Some(moved) = self.slots.get(at) {
            self.index.insert(moved.key, at);
        }
    }

    /// Forgets slice `key`, dirty or not. No write-out of it is under way.
    pub(super) fn forget(&mut self, key: u64) {
        self.dirty.remove(&key);
        if let Some(at) = self.index.get(&key).copied() {
            self.remove_at(at);
        }
    }

    /// Forgets every slice, dirty or not. No write-out is under way.
    pub(super) fn clear(&mut self) {
        self.index.clear();
        self.slots.clear();
        self.dirty.clear();
        self.hand = 0;
    }

    /// How many slices are dirty (those being written not counted).
    pub(super) fn dirty_count(&self) -> usize {
        self.dirty.len()
    }

    /// Whether so many slices are dirty that a write-out should begin.
    pub(super) fn above_high_water(&self) -> bool {
        self.dirty.len() * 4 > self.capacity
    }

    /// The dirty slices, ascending.
    pub(super) fn dirty_keys(&self) -> Vec<u64> {
        self.dirty.iter().copied().collect()
    }

    /// Marks a dirty slice as being written and gives its bytes to be copied.
    pub(super) fn begin_write(&mut self, key: u64) -> Option<&[u8]> {
        self.dirty.remove(&key);
        let slot = self.slot_mut(key)?;
        slot.state = State::Writing { again: false };
        Some(slot.content.bytes())
    }

    /// The copy was written (`ok`) or not; a slice that changed meanwhile is dirty again.
    pub(super) fn end_write(&mut self, key: u64, ok: bool) {
        let Some(slot) = self.slot_mut(key) else { return };
        let again = slot.state == State::Writing { again: true };
        if ok && !again {
            slot.state = State::Clean;
        } else {
            slot.state = State::Dirty;
            self.dirty.insert(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_needed_and_recently_used_slices_stay() {
        let mut cache = Cache::new(3);
        for key in 0..3 {
            assert!(cache.make_room(|_| false));
            cache.insert(key, Box::new([0; 8]));
        }
        cache.change(0).expect("cached").fill(1);
        assert!(cache.make_room(|key| key == 1));
        assert!(cache.contains(0) && cache.contains(1) && !cache.contains(2));
        cache.insert(3, Box::new([0; 8]));
        cache.change(1);
        cache.change(3);
        assert!(!cache.make_room(|_| false), "all are dirty");
        assert_eq!(cache.dirty_keys(), [0, 1, 3]);
    }

    #[test]
    fn only_clean_unneeded_slices_without_use_for_a_whole_interval_are_forgotten() {
        let mut cache = Cache::new(9);
        for key in 0..5 {
            cache.insert(key, Box::new([0; 8]));
        }
        cache.change(1);
        assert!(cache.forget_unused(|_| false), "the next interval may bring more");
        assert!((0..5).all(|key| cache.contains(key)), "all were used in the first interval");
        assert!(cache.get(2).is_some());
        cache.forget_unused(|key| key == 3);
        assert!(cache.contains(1) && cache.contains(2) && cache.contains(3));
        assert!(!cache.contains(0) && !cache.contains(4));
        assert!(cache.begin_write(1).is_some());
        cache.forget_unused(|_| false);
        assert!(cache.contains(1) && !cache.contains(2), "one is being written");
        cache.end_write(1, true);
        assert!(!cache.forget_unused(|_| false), "nothing is left");
        assert!(!cache.contains(1));
    }

    #[test]
    fn a_slice_of_zeroes_takes_memory_only_when_it_is_changed() {
        let mut cache = Cache::new(3);
        cache.insert(0, Box::new([0; 512]));
        cache.insert(1, vec![0; 2 * SLICE_BYTES as usize].into_boxed_slice());
        let bytes = |slot: &Slot| matches!(slot.content, Content::Bytes(_));
        assert_eq!(cache.slots.iter().map(bytes).collect::<Vec<_>>(), [false, true]);
        assert_eq!(cache.get(0), Some(&[0; 512][..]));
        cache.change(0).expect("cached")[511] = 3;
        let after = cache.begin_write(0).expect("cached");
        assert_eq!((after.len(), after[510], after[511]), (512, 0, 3));
    }

    #[test]
    fn a_slice_changed_while_written_stays_dirty() {
        let mut cache = Cache::new(3);
        cache.insert(7, Box::new([0; 8]));
        cache.change(7);
        assert!(cache.begin_write(7).is_some());
        assert_eq!(cache.dirty_count(), 0);
        cache.change(7).expect("cached").fill(2);
        cache.end_write(7, true);
        assert_eq!(cache.dirty_keys(), [7]);
        assert!(cache.begin_write(7).is_some());
        cache.end_write(7, true);
        assert_eq!(cache.dirty_count(), 0);
        assert!(cache.begin_write(7).is_some());
        cache.end_write(7, false);
        assert_eq!(cache.dirty_keys(), [7], "a failed write leaves it dirty");
    }
}
