//! Where the granules of a chain lie whose first layer has them as plain data: a read that finds
//! its granule here asks no layer's table.
//!
//! Order rules:
//! 1. Only granules of layers that are read-only now, that are all data in one piece, and that no
//!    layer above has: as true as the chain's index, and emptied with it.
//! 2. A read that goes by a place holds no lease of the layer but the [`Places`] themselves. When a
//!    layer of the chain becomes writable, a lease on all that it has is put into them before they
//!    are replaced, and into those that were replaced before and are still in use: the layer reuses
//!    nothing until the last such read is over.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use crate::address::HostOffset;
use crate::lease::Lease;

/// A granule that is not remembered takes the place of another one every so many times, so that a
/// disk that is larger than the table does not spend its reads on filling it.
const REPLACE_EVERY: u32 = 8;

/// One granule: its number plus one (0: none) and the layer, and where it starts.
#[derive(Clone, Copy, Default)]
struct Place {
    key: u64,
    host: u64,
}

/// The places of one chain, a table with one place for each granule modulo its size.
#[derive(Default)]
pub(crate) struct Places {
    table: RefCell<Vec<Place>>,
    refused: Cell<u32>,
    leases: RefCell<Vec<Lease>>,
}

/// The places of a chain now, and those before that reads on their way still go by.
#[derive(Default)]
pub(super) struct Generations {
    now: RefCell<Rc<Places>>,
    former: RefCell<Vec<Weak<Places>>>,
}

impl Generations {
    /// The places of now.
    pub(super) fn now(&self) -> Rc<Places> {
        Rc::clone(&self.now.borrow())
    }

    /// Where `granule` is, and the places that are to be kept while it is read there.
    pub(super) fn get(&self, granule: u64) -> Option<(u8, HostOffset, Rc<Places>)> {
        let now = self.now.borrow();
        let (layer, host) = now.get(granule)?;
        Some((layer, host, Rc::clone(&now)))
    }

    /// An empty table of `count` places from now on.
    pub(super) fn begin(&self, count: usize) {
        self.replace(Places::new(count));
    }

    /// Nothing is to be found any more. Every generation that a read goes by gets a `lease` on the
    /// layer that becomes writable.
    pub(super) fn end(&self, lease: impl Fn() -> Option<Lease>) {
        self.replace(Rc::default());
        for places in self.former.borrow().iter().filter_map(Weak::upgrade) {
            places.leases.borrow_mut().extend(lease());
        }
    }

    fn replace(&self, places: Rc<Places>) {
        let former = self.now.replace(places);
        former.table.borrow_mut().clear();
        let mut list = self.former.borrow_mut();
        list.retain(|places| places.strong_count() > 0);
        list.push(Rc::downgrade(&former));
    }
}

fn key(granule: u64, layer: u8) -> u64 {
    (granule + 1) << 8 | u64::from(layer)
}

impl Places {
    /// An empty table of `count` places, a power of two.
    fn new(count: usize) -> Rc<Self> {
        let table = RefCell::new(vec![Place::default(); count]);
        Rc::new(Self { table, refused: Cell::new(0), leases: RefCell::default() })
    }

    /// The layer that has `granule` first, and where the granule starts in it.
    fn get(&self, granule: u64) -> Option<(u8, HostOffset)> {
        let table = self.table.borrow();
        let place = table.get(granule as usize & table.len().wrapping_sub(1))?;
        let layer = place.key as u8;
        (place.key == key(granule, layer)).then(|| (layer, HostOffset::new(place.host)))
    }

    /// Whether `granule` is to be entered: its place is free, or it is its turn.
    pub(super) fn wants(&self, granule: u64) -> bool {
        let table = self.table.borrow();
        let Some(place) = table.get(granule as usize & table.len().wrapping_sub(1)) else {
            return false;
        };
        let refused = self.refused.get().wrapping_add(1);
        self.refused.set(refused);
        place.key == 0 || refused.is_multiple_of(REPLACE_EVERY)
    }

    /// Enters a granule.
    pub(super) fn enter(&self, granule: u64, layer: u8, host: HostOffset) {
        let mut table = self.table.borrow_mut();
        let at = granule as usize & table.len().wrapping_sub(1);
        if let Some(place) = table.get_mut(at) {
            *place = Place { key: key(granule, layer), host: host.bytes() };
        }
    }

    /// Bytes of memory.
    pub(super) fn bytes(&self) -> usize {
        self.table.borrow().capacity() * size_of::<Place>()
    }

    /// How many places fit into `bytes` of memory and are of use to a disk of `granules`.
    pub(super) fn count(bytes: usize, granules: u64) -> usize {
        let most = 1 << (bytes / size_of::<Place>()).max(1).ilog2();
        usize::try_from(granules).unwrap_or(most).clamp(1, most).next_power_of_two()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::Epochs;

    #[test]
    fn a_granule_is_found_with_its_layer_until_another_takes_its_place() {
        let places = Places::new(4);
        assert!(places.get(5).is_none());
        places.enter(5, 7, HostOffset::new(1 << 20));
        assert_eq!(places.get(5), Some((7, HostOffset::new(1 << 20))));
        assert!(places.get(1).is_none() && places.get(9).is_none(), "others of the same place");
        let turns = (0..REPLACE_EVERY * 4).filter(|_| places.wants(9)).count();
        assert_eq!(turns, 4, "a taken place is given away now and then");
        places.enter(9, 0, HostOffset::new(0));
        assert_eq!((places.get(5), places.get(9)), (None, Some((0, HostOffset::new(0)))));
        assert!(places.wants(6), "a free place is taken at once");
    }

    #[test]
    fn a_read_on_its_way_keeps_what_a_layer_had_when_it_became_writable() {
        let layers = [Epochs::new(), Epochs::new()];
        let chain = Generations::default();
        chain.begin(4);
        let read = chain.now();
        read.enter(0, 1, HostOffset::new(0));
        for epochs in &layers {
            chain.end(|| Some(epochs.lease()));
            assert!(read.get(0).is_none() && chain.now().get(0).is_none());
        }
        let freed = layers.each_ref().map(|epochs| epochs.retire());
        let quiesced = || (layers[0].quiesced(freed[0]), layers[1].quiesced(freed[1]));
        assert_eq!(quiesced(), (false, false), "the read may look into either");
        drop(read);
        assert_eq!(quiesced(), (true, true));
    }

    #[test]
    fn the_table_fits_its_memory_and_its_disk() {
        assert_eq!(Places::count(1 << 20, 1000), 1024);
        assert_eq!(Places::count(1 << 20, u64::MAX), (1 << 20) / 16);
        assert_eq!(Places::count(0, 0), 1);
        assert!(Places::default().get(3).is_none() && !Places::default().wants(3));
    }
}
