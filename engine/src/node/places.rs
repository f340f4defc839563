//! Where the granules of a chain lie whose first layer has them as plain data: a read that finds
//! its granule here asks no layer's table.
//!
//! Order rules:
//! 1. Only granules of layers that are read-only now, that are all data in one piece, and that no
//!    layer above has: as true as the chain's index, and emptied with it.
//! 2. A read that goes by a place holds no lease of the layer but the [`Places`] themselves. When a
//!    layer of the chain becomes writable, a lease on all that it has is put into them before they
//!    are replaced: the layer reuses nothing until the last such read is over.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

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

fn key(granule: u64, layer: u8) -> u64 {
    (granule + 1) << 8 | u64::from(layer)
}

impl Places {
    /// An empty table of `count` places, a power of two.
    pub(super) fn new(count: usize) -> Rc<Self> {
        let table = RefCell::new(vec![Place::default(); count]);
        Rc::new(Self { table, refused: Cell::new(0), leases: RefCell::default() })
    }

    /// The layer that has `granule` first, and where the granule starts in it.
    pub(super) fn get(&self, granule: u64) -> Option<(u8, HostOffset)> {
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

    /// Nothing is to be found any more; reads on their way keep `lease` alive.
    pub(super) fn give_up(&self, lease: Option<Lease>) {
        self.table.borrow_mut().clear();
        self.leases.borrow_mut().extend(lease);
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
        let epochs = Epochs::new();
        let places = Places::new(4);
        let read = Rc::clone(&places);
        places.give_up(Some(epochs.lease()));
        drop(places);
        let freed = epochs.retire();
        assert!(!epochs.quiesced(freed), "the read may still look there");
        assert!(read.get(0).is_none());
        drop(read);
        assert!(epochs.quiesced(freed));
    }

    #[test]
    fn the_table_fits_its_memory_and_its_disk() {
        assert_eq!(Places::count(1 << 20, 1000), 1024);
        assert_eq!(Places::count(1 << 20, u64::MAX), (1 << 20) / 16);
        assert_eq!(Places::count(0, 0), 1);
        assert!(Places::default().get(3).is_none() && !Places::default().wants(3));
    }
}
