//! What guests of the model write: every 512-byte block says which write made it and where it
//! belongs, so a block read anywhere names its origin, or is foreign.
//!
//! The value 0 is a block of zeroes; other values are numbers of writes.

use liveblk::engine::buf::Buf;

/// Bytes of a block: what the simulated disk keeps or loses as one.
pub(crate) const BLOCK: usize = 512;

const FACTOR: u64 = 0x9fb2_1c65_1e98_df25;
const WORDS: usize = BLOCK / 8;

/// Number of the write that a block holds; 0: zeroes.
pub(crate) type Value = u32;

/// The bytes of block `index` of a disk as write `value` makes it.
pub(crate) fn block(value: Value, index: u64) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    if value == 0 {
        return bytes;
    }
    for (at, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = word_of(value, index, at).to_le_bytes();
    }
    bytes
}

fn word_of(value: Value, index: u64, at: usize) -> u64 {
    let head = u64::from(value) << 32 | (index & 0xffff_ffff);
    if at == 0 { head } else { (head ^ at as u64).wrapping_mul(FACTOR).rotate_left(29) }
}

/// Fills `buf` with what write `value` puts at block `first` and the following.
pub(crate) fn fill(buf: &Buf, value: Value, first: u64) {
    for (index, at) in (0..buf.len()).step_by(BLOCK).enumerate() {
        buf.copy_from(at, &block(value, first + index as u64));
    }
}

/// The values of `bytes`, which were read at block `first`; `Err` gives the first foreign block.
pub(crate) fn values(bytes: &[u8], first: u64) -> Result<Vec<Value>, String> {
    let blocks = bytes.as_chunks::<BLOCK>().0;
    blocks.iter().enumerate().map(|(at, block)| value_of(block, first + at as u64)).collect()
}

fn value_of(bytes: &[u8; BLOCK], index: u64) -> Result<Value, String> {
    let words = bytes.as_chunks::<8>().0;
    let word = |at: usize| u64::from_le_bytes(words[at]);
    let head = word(0);
    if head == 0 && words.iter().all(|word| *word == [0; 8]) {
        return Ok(0);
    }
    let value = u32::try_from(head >> 32).expect("invariant: 32 bits");
    if (0..WORDS).all(|at| word(at) == word_of(value, index, at)) {
        return Ok(value);
    }
    let place = head & 0xffff_ffff;
    let whole = (0..WORDS).all(|at| word(at) == word_of(value, place, at));
    let same = bytes.iter().all(|byte| *byte == bytes[0]);
    Err(match (whole, same) {
        (true, _) => format!("block {index} holds write {value} of block {place}"),
        (false, true) => format!("block {index} is full of {:#04x}", bytes[0]),
        (false, false) => format!("block {index} is torn or foreign: starts with {head:#x}"),
    })
}
