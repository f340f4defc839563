//! Which layer of a chain is the first that has something to say about a piece of the disk, so that
//! a read does not have to ask all those above it.
//!
//! An index belongs to a path and serves the overlays above it. For each granule (the smallest unit
//! that a layer maps by itself) it keeps the first layer that is worth asking: every layer before
//! it has nothing there. It learns from the reads that come by: a read that asks a layer makes the
//! index look at the neighbourhood in that layer, too, as far as its tables are in memory. Nothing
//! is loaded for it and opening a chain does not wait for it.
//!
//! Rules:
//! 1. A first layer only moves down past layers that are read-only now, one at a time, each looked
//!    at. A layer that becomes writable empties the index first; the layer that is written (the top
//!    of the path above) is never part of it.
//! 2. A change of the chain compiles new paths with new indexes; old paths keep old layers.
//! 3. A granule that a layer does not cover up to its end stays with that layer: what lies beyond
//!    an image's end reads as zeroes, whatever is below.
//!
//! Memory: at most [`CHAIN_INDEX_BYTES`] per layer of the path, nothing before the first read that
//! leaves the top layer. Slices that are alike all over take a slot only; the others share the rest
//! and are dropped in turn. An eighth of it is for granules whose place in the file of their first
//! layer is known, too (`node::places`).

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use super::path::Layer;
use super::places::{Generations, Places};
use super::reads::ReadWatch;
use crate::address::{GuestRange, HostOffset};
use crate::format::{Extent, Extents, Format, Mapping};
use crate::limits::{CHAIN_GRANULE, CHAIN_INDEX_BYTES};

/// Granules of a slice.
const SLICE: usize = 512;

/// What a chain's index has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChainStats {
    /// Runs of bytes that were looked for below the top layer.
    pub lookups: u64,
    /// Those of them whose place was known, so that no layer was asked.
    pub placed: u64,
    /// Layers below the top that were asked on behalf of requests.
    pub probes: u64,
    /// Layers whose neighbourhood of a request was looked at.
    pub scans: u64,
    /// Bytes of memory that the index takes now.
    pub bytes: u64,
}

/// First layers by granule, for one path.
pub(crate) struct ChainIndex {
    layers: usize,
    granule: u64,
    table: RefCell<Table>,
    places: Generations,
    lookups: Cell<u64>,
    placed: Cell<u64>,
    probes: Cell<u64>,
    scans: Cell<u64>,
}

/// Whether a layer takes writes, and which indexes rely on it not to.
pub(crate) struct LayerState {
    writable: Cell<bool>,
    indexes: RefCell<Vec<Weak<ChainIndex>>>,
    /// Who wants to know of reads of the layer.
    watch: RefCell<Option<Rc<ReadWatch>>>,
}

impl LayerState {
    pub(crate) fn new(writable: bool) -> Rc<Self> {
        let (writable, watch) = (Cell::new(writable), RefCell::default());
        Rc::new(Self { writable, indexes: RefCell::default(), watch })
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.writable.get()
    }

    pub(crate) fn watch(&self) -> Option<Rc<ReadWatch>> {
        self.watch.borrow().clone()
    }

    pub(crate) fn set_watch(&self, watch: Rc<ReadWatch>) {
        self.watch.replace(Some(watch));
    }

    /// To be called before the layer, which is `format`, takes writes.
    pub(crate) fn set_writable(&self, writable: bool, format: &dyn Format) {
        self.writable.set(writable);
        if writable {
            self.changed(format);
        }
    }

    /// What was learnt of the layer, which is `format`, is not true any more.
    pub(crate) fn changed(&self, format: &dyn Format) {
        let indexes = self.indexes.borrow();
        indexes.iter().filter_map(Weak::upgrade).for_each(|index| index.reset(format));
    }
}

impl ChainIndex {
    /// An empty index for `layers`; none where there is nothing to skip.
    pub(crate) fn new(layers: &[Layer]) -> Option<Rc<Self>> {
        // The last layer is asked last anyway, and raw files have everything.
        let granules = layers.iter().map(|layer| layer.format.subcluster_size());
        let granule = granules.filter(|bytes| *bytes > 1).min()?;
        if layers.len() < 2 {
            return None;
        }
        let index = Rc::new(Self {
            layers: layers.len(),
            granule: granule.clamp(*CHAIN_GRANULE.start(), *CHAIN_GRANULE.end()),
            table: RefCell::default(),
            places: Generations::default(),
            lookups: Cell::new(0),
            placed: Cell::new(0),
            probes: Cell::new(0),
            scans: Cell::new(0),
        });
        for layer in layers {
            let mut indexes = layer.state.indexes.borrow_mut();
            indexes.retain(|index| index.strong_count() > 0);
            indexes.push(Rc::downgrade(&index));
        }
        Some(index)
    }

    /// How many of the `len` bytes at `at` have one first layer, and which: not before `from`.
    pub(crate) fn run(&self, at: u64, len: u64, from: usize) -> (u64, usize) {
        let table = self.table.borrow();
        let end = at.saturating_add(len);
        let (mut until, first) = table.first(at / self.granule);
        let first = usize::from(first).max(from);
        while until.saturating_mul(self.granule) < end {
            let (next, layer) = table.first(until);
            if usize::from(layer).max(from) != first {
                break;
            }
            until = next;
        }
        (until.saturating_mul(self.granule).min(end) - at, first)
    }

    /// A run was looked for.
    pub(crate) fn count_lookup(&self) {
        self.lookups.set(self.lookups.get() + 1);
    }

    /// A layer was asked about the byte `at` and had its table in memory: learns what it can from
    /// the same layer about what is near. `layers` are the index's own.
    pub(crate) fn probed(&self, layers: &[Layer], layer: usize, at: u64) {
        self.probes.set(self.probes.get() + 1);
        let granule = at / self.granule;
        let (Some(looked), Ok(number)) = (layers.get(layer), u8::try_from(layer)) else { return };
        if !self.table.borrow().is_open(granule, number) || looked.state.is_writable() {
            return;
        }
        self.scans.set(self.scans.get() + 1);
        let found = self.look(looked, granule);
        let mut table = self.table.borrow_mut();
        if table.slots.is_empty() {
            let size = layers.iter().map(|layer| layer.format.size()).max().unwrap_or(0);
            let granules = size / self.granule + 1;
            table.prepare(self.layers, granules / SLICE as u64 + 1);
            let memory = self.layers * CHAIN_INDEX_BYTES / 8;
            self.places.begin(Places::count(memory, granules));
        }
        table.learn(granule, number, &found);
    }

    /// The layer that has `range` first as plain data, and where, if that is known; what is handed
    /// out is to be kept until the read there is over.
    pub(crate) fn place(&self, range: GuestRange) -> Option<(usize, HostOffset, Rc<Places>)> {
        let granule = range.start.bytes() / self.granule;
        let into = range.start.bytes() % self.granule;
        if range.len > self.granule - into {
            return None;
        }
        let (layer, host, places) = self.places.get(granule)?;
        self.placed.set(self.placed.get() + 1);
        Some((usize::from(layer), host.plus(into), places))
    }

    /// A layer had the byte `at` as data: remembers where, if its granule lies in one piece.
    pub(crate) fn found(&self, layers: &[Layer], layer: usize, at: u64) {
        let granule = at / self.granule;
        let (Some(looked), Ok(number)) = (layers.get(layer), u8::try_from(layer)) else { return };
        let range = GuestRange::new(granule * self.granule, self.granule);
        let wanted = self.table.borrow().settled(granule) == Some(number)
            && !looked.state.is_writable()
            && range.end().bytes() <= looked.format.size()
            && self.places.now().wants(granule);
        if !wanted {
            return;
        }
        // Without a lease on the whole layer nothing can be kept for the reads on their way.
        if looked.format.lease().is_none() {
            return;
        }
        let mut extents = Extents::new();
        drop(looked.format.resolve(range, &mut extents));
        if let [Extent { len, mapping: Mapping::Data(host) }] = extents[..]
            && len == self.granule
        {
            self.places.now().enter(granule, number, host);
        }
    }

    /// What a layer has in the slice of `granule`.
    fn look(&self, layer: &Layer, granule: u64) -> Found {
        let first = granule - granule % SLICE as u64;
        let mut found = Found::default();
        // Backwards from the granule nothing may be loaded; it itself is.
        self.look_at(layer, first, granule..first + SLICE as u64, &mut found);
        self.look_at(layer, first, first..granule, &mut found);
        found
    }

    fn look_at(
        &self,
        layer: &Layer,
        first: u64,
        granules: std::ops::Range<u64>,
        found: &mut Found,
    ) {
        let bytes = |granule: u64| granule.saturating_mul(self.granule);
        let covered = layer.format.size() / self.granule;
        let end = granules.end.min(covered).max(granules.start);
        for granule in end..granules.end {
            found.set(granule - first, true);
        }
        if end == granules.start {
            return;
        }
        let mut extents = Extents::new();
        let range = GuestRange::new(bytes(granules.start), bytes(end) - bytes(granules.start));
        drop(layer.format.resolve(range, &mut extents));
        let mut at = range.start.bytes();
        let mut known = end;
        for extent in &extents {
            let next = at.saturating_add(extent.len);
            match extent.mapping {
                Mapping::Absent => {}
                Mapping::Miss(_) => {
                    known = at / self.granule;
                    break;
                }
                _ => {
                    for granule in at / self.granule..next.div_ceil(self.granule).min(end) {
                        found.set(granule - first, true);
                    }
                }
            }
            at = next;
        }
        for granule in granules.start..known {
            if !found.has(granule - first) {
                found.set(granule - first, false);
            }
        }
    }

    /// Forgets everything, because `changed` does; reads on their way still find what it had.
    fn reset(&self, changed: &dyn Format) {
        *self.table.borrow_mut() = Table::default();
        self.places.end(|| changed.lease());
    }

    /// What it has done so far.
    pub(crate) fn stats(&self) -> ChainStats {
        ChainStats {
            lookups: self.lookups.get(),
            placed: self.placed.get(),
            probes: self.probes.get(),
            scans: self.scans.get(),
            bytes: (self.table.borrow().bytes() + self.places.now().bytes()) as u64,
        }
    }
}

/// What a look at a slice of a layer has found, by granule.
#[derive(Default)]
struct Found {
    known: [u64; SLICE / 64],
    present: [u64; SLICE / 64],
}

impl Found {
    fn set(&mut self, granule: u64, present: bool) {
        let (word, bit) = (granule as usize / 64, 1 << (granule % 64));
        self.known[word] |= bit;
        if present {
            self.present[word] |= bit;
        }
    }

    fn has(&self, granule: u64) -> bool {
        self.present[granule as usize / 64] & (1 << (granule % 64)) != 0
    }

    fn knows(&self, granule: u64) -> bool {
        self.known[granule as usize / 64] & (1 << (granule % 64)) != 0
    }
}

/// The first layer of a granule. Open: it has not been looked at there; else it has something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct First {
    layer: u8,
    settled: bool,
}

impl First {
    /// What a look at `layer` changes.
    fn learnt(self, layer: u8, present: bool) -> Self {
        match layer.checked_add(1) {
            _ if self.settled || self.layer != layer => self,
            Some(next) if !present => Self { layer: next, settled: false },
            _ => Self { layer, settled: true },
        }
    }
}

/// The first layers of a slice.
enum Slice {
    Alike(First),
    Each(Box<[First; SLICE]>),
}

struct Slot {
    /// The number of the slice plus one; 0: empty.
    key: u64,
    slice: Slice,
}

/// Slices in a table with one place for each, so that disks up to its size never collide.
#[derive(Default)]
struct Table {
    slots: Vec<Slot>,
    /// Slices that are not alike all over, and how many there may be.
    each: usize,
    each_max: usize,
    hand: usize,
}

impl Table {
    /// Makes the slots for an index of `layers`, the largest of `slices` slices: a power of two.
    fn prepare(&mut self, layers: usize, slices: u64) {
        let bytes = layers * CHAIN_INDEX_BYTES;
        let fit = bytes / 4 / size_of::<Slot>();
        let most = 1 << fit.max(1).ilog2();
        let slices = usize::try_from(slices).unwrap_or(most).clamp(1, most);
        let count = slices.next_power_of_two();
        let empty = || Slot { key: 0, slice: Slice::Alike(First::default()) };
        self.slots.resize_with(count, empty);
        self.each_max = bytes / 8 * 5 / size_of::<[First; SLICE]>();
    }

    fn place(&self, granule: u64) -> usize {
        (granule / SLICE as u64) as usize & self.slots.len().saturating_sub(1)
    }

    fn slice(&self, granule: u64) -> Option<&Slice> {
        let slot = self.slots.get(self.place(granule))?;
        (slot.key == granule / SLICE as u64 + 1).then_some(&slot.slice)
    }

    /// Up to which granule the first layer is known to be the same, and which it is.
    fn first(&self, granule: u64) -> (u64, u8) {
        let next = |count: u64| granule - granule % count + count;
        match self.slice(granule) {
            None => (next(SLICE as u64), 0),
            Some(Slice::Alike(first)) => (next(SLICE as u64), first.layer),
            Some(Slice::Each(each)) => (granule + 1, each[granule as usize % SLICE].layer),
        }
    }

    fn at(&self, granule: u64) -> First {
        match self.slice(granule) {
            None => First::default(),
            Some(Slice::Alike(first)) => *first,
            Some(Slice::Each(each)) => each[granule as usize % SLICE],
        }
    }

    /// The layer that has something of `granule`, if it is known.
    fn settled(&self, granule: u64) -> Option<u8> {
        let first = self.at(granule);
        first.settled.then_some(first.layer)
    }

    /// Whether a look at `layer` would tell something new about `granule`.
    fn is_open(&self, granule: u64, layer: u8) -> bool {
        self.at(granule) == First { layer, settled: false }
    }

    /// Enters what a look at `layer` found in the slice of `granule`.
    fn learn(&mut self, granule: u64, layer: u8, found: &Found) {
        let place = self.place(granule);
        let key = granule / SLICE as u64 + 1;
        let slot = &mut self.slots[place];
        if slot.key != key {
            self.each -= usize::from(matches!(slot.slice, Slice::Each(_)));
            *slot = Slot { key, slice: Slice::Alike(First::default()) };
        }
        let old = |index: usize| match &slot.slice {
            Slice::Alike(first) => *first,
            Slice::Each(each) => each[index],
        };
        let new = |index: usize| match index as u64 {
            index if !found.knows(index) => old(index as usize),
            at => old(index).learnt(layer, found.has(at)),
        };
        let alike = (1..SLICE).all(|index| new(index) == new(0)).then(|| new(0));
        let each = || Box::new(std::array::from_fn(new));
        let slice = alike.map_or_else(|| Slice::Each(each()), Slice::Alike);
        let before = usize::from(matches!(slot.slice, Slice::Each(_)));
        let after = usize::from(matches!(slice, Slice::Each(_)));
        slot.slice = slice;
        self.each = self.each + after - before;
        while self.each > self.each_max {
            self.drop_one(place);
        }
    }

    /// Drops one slice that is not alike all over, but not that at `kept`.
    fn drop_one(&mut self, kept: usize) {
        for _ in 0..self.slots.len() {
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[self.hand];
            if self.hand != kept && matches!(slot.slice, Slice::Each(_)) {
                *slot = Slot { key: 0, slice: Slice::Alike(First::default()) };
                self.each -= 1;
                return;
            }
        }
        unreachable!("invariant: more than one slice is counted");
    }

    fn bytes(&self) -> usize {
        self.slots.len() * size_of::<Slot>() + self.each * size_of::<[First; SLICE]>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(granules: std::ops::Range<u64>, present: bool) -> Found {
        let mut found = Found::default();
        granules.for_each(|granule| found.set(granule, present));
        found
    }

    #[test]
    fn a_first_layer_moves_down_one_layer_at_a_time_and_stops_where_something_is() {
        let mut table = Table::default();
        table.prepare(4, 1 << 20);
        assert_eq!(table.first(7), (512, 0));
        table.learn(7, 0, &found(0..512, false));
        assert_eq!(table.first(7), (512, 1), "a slice that is alike all over");
        assert!(table.is_open(7, 1) && !table.is_open(7, 0));
        table.learn(7, 2, &found(0..512, false));
        assert_eq!(table.first(7), (512, 1), "layer 1 was not looked at");
        table.learn(7, 1, &found(10..20, true));
        assert_eq!(table.first(15), (16, 1));
        assert!(!table.is_open(15, 1), "it has something there");
        assert!(table.is_open(9, 1), "nothing is known there");
        let mut rest = found(0..512, false);
        (10..20).for_each(|granule| rest.set(granule, true));
        table.learn(7, 1, &rest);
        assert_eq!((table.first(9), table.first(15)), ((10, 2), (16, 1)));
    }

    #[test]
    fn the_last_layer_that_a_byte_can_name_is_never_skipped() {
        let first = First { layer: u8::MAX, settled: false };
        assert_eq!(first.learnt(u8::MAX, false), First { layer: u8::MAX, settled: true });
    }

    #[test]
    fn memory_stays_within_the_bound_whatever_is_learnt() {
        let mut table = Table::default();
        table.prepare(2, 1 << 40);
        for slice in 0..100_000_u64 {
            table.learn(slice * 512, 0, &found(slice % 512..slice % 512 + 1, true));
            assert!(table.bytes() <= 2 * CHAIN_INDEX_BYTES, "slice {slice}");
        }
        let last = 99_999 * 512;
        assert_eq!(table.first(last + 99_999 % 512).1, 0);
        assert!(!table.is_open(last + 99_999 % 512, 0), "the latest is kept");
    }
}
