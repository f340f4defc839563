//! The hash of everything that happened in a world.
//!
//! Two runs with equal hashes took the same decisions and moved the same bytes (up to collisions).
//! Multiply-rotate over 64-bit words: fast, not for secrets.

use crate::buf::Buf;

const SEED: u64 = 0xcbf2_9ce4_8422_2325;
const FACTOR: u64 = 0x9fb2_1c65_1e98_df25;

/// A running hash.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trace(u64);

impl Trace {
    pub(super) fn new() -> Self {
        Self(SEED)
    }

    pub(super) fn word(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(FACTOR);
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        let (words, tail) = bytes.as_chunks::<8>();
        for word in words {
            self.word(u64::from_le_bytes(*word));
        }
        for byte in tail {
            self.word(u64::from(*byte));
        }
    }

    pub(super) fn value(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }
}

/// Hash of the bytes that a buffer holds now.
pub(super) fn hash_buf(buf: &Buf) -> u64 {
    let mut trace = Trace::new();
    let mut scratch = [0; 4096];
    let mut at = 0;
    while at < buf.len() {
        let len = scratch.len().min(buf.len() - at);
        buf.copy_to(at, &mut scratch[..len]);
        trace.bytes(&scratch[..len]);
        at += len;
    }
    trace.value()
}
