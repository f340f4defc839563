//! Refcounts of any width inside the bytes of a block or slice (specification, "Refcounts").
//!
//! Widths below a byte fill a byte from its least significant bits; wider ones are big endian.

/// The refcount at `index` of a block of `1 << order` bits wide counts; 0 outside.
pub(super) fn get(bytes: &[u8], order: u32, index: u64) -> u64 {
    let bits = 1_u64 << order;
    let at = usize::try_from(index * bits / 8).unwrap_or(usize::MAX);
    if order < 3 {
        let shift = (index * bits) % 8;
        let byte = u64::from(bytes.get(at).copied().unwrap_or(0));
        return (byte >> shift) & ((1 << bits) - 1);
    }
    let width = usize::try_from(bits / 8).unwrap_or(8);
    let field = at.checked_add(width).and_then(|end| bytes.get(at..end)).unwrap_or_default();
    field.iter().fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

/// Sets the refcount at `index`; does nothing outside.
pub(super) fn set(bytes: &mut [u8], order: u32, index: u64, value: u64) {
    let bits = 1_u64 << order;
    let at = usize::try_from(index * bits / 8).unwrap_or(usize::MAX);
    if order < 3 {
        let shift = (index * bits) % 8;
        let mask = ((1_u64 << bits) - 1) << shift;
        if let Some(byte) = bytes.get_mut(at) {
            let changed = (u64::from(*byte) & !mask) | ((value << shift) & mask);
            *byte = u8::try_from(changed).unwrap_or(*byte);
        }
        return;
    }
    let width = usize::try_from(bits / 8).unwrap_or(8);
    let Some(field) = at.checked_add(width).and_then(|end| bytes.get_mut(at..end)) else { return };
    let value = value.to_be_bytes();
    for (to, from) in field.iter_mut().rev().zip(value.iter().rev()) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_reads_back_and_leaves_neighbours_alone() {
        for order in 0..=6 {
            let max = u64::MAX >> (64 - (1 << order));
            let mut bytes = [0_u8; 64];
            let count = 512 >> order;
            for index in 0..count {
                set(&mut bytes, order, index, (index * 7 + 1) & max);
            }
            for index in 0..count {
                assert_eq!(get(&bytes, order, index), (index * 7 + 1) & max, "order {order}");
            }
            set(&mut bytes, order, 3, max);
            assert_eq!(get(&bytes, order, 3), max);
            assert_eq!(get(&bytes, order, 2), 15 & max);
            assert_eq!(get(&bytes, order, 4), 29 & max);
            assert_eq!(get(&bytes, order, count), 0);
        }
    }
}
