//! What the target `compressed_cluster` runs: the codecs and the descriptors on bytes that nobody
//! vouches for.
//!
//! The first byte of an input chooses cluster size ([`BITS`]), codec and kind. Kinds: bytes to
//! be unpacked as they are; a cluster made from the bytes, packed and unpacked again; a descriptor.

use liveblk_engine::driver::sim::Rng;

use super::fuzzing::Session;
use crate::qcow2::codec::Codec;
use crate::qcow2::layout::{COMPRESSED, COPIED, Geometry};
use crate::qcow2::packed::Packed;

/// Cluster sizes as powers of two: all that there are in a descriptor, where they cost nothing.
const BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// The same for bytes that are packed or unpacked, by the low four bits of an input: mostly small,
/// because a large cluster costs as much as a hundred of them.
const PACKED_BITS: [u32; 16] = [9, 9, 9, 9, 9, 9, 10, 10, 10, 11, 11, 12, 12, 13, 14, 16];

/// Runs one input.
pub(super) fn compressed_cluster(_: &mut Session, data: &[u8]) {
    let Some((head, rest)) = data.split_first() else { return };
    let bits = PACKED_BITS[usize::from(head & 15)];
    let codec = if head & 16 == 0 { Codec::Deflate } else { Codec::Zstd };
    match head >> 5 {
        0..=3 => unpack(codec, 1 << bits, rest),
        4..=6 => pack(codec, 1 << bits, rest),
        _ => describe(BITS.start() + u32::from(head & 15) % 13, rest),
    }
}

/// Never more than a cluster, the same every time, whatever follows a good stream.
fn unpack(codec: Codec, cluster: usize, packed: &[u8]) {
    let mut out = vec![0x5a; cluster];
    let first = codec.unpack(packed, &mut out);
    let mut again = vec![0xa5; cluster];
    assert_eq!(codec.unpack(packed, &mut again), first, "the outcome depends on nothing else");
    if first.is_ok() {
        assert!(out == again, "a cluster that was unpacked is full");
        let mut longer = packed.to_vec();
        longer.extend([0xff; 600]);
        assert_eq!(codec.unpack(&longer, &mut again), Ok(()));
        assert!(out == again, "what follows does no harm");
    }
}

/// What is packed unpacks to the same, and is as small as it was said.
fn pack(codec: Codec, len: usize, program: &[u8]) {
    let mut cluster = Vec::with_capacity(len);
    for step in program.chunks_exact(3) {
        let count = usize::from(step[1]) << (step[0] & 7);
        let mut rng = Rng::new(step[2].into());
        match step[0] >> 6 {
            0 => cluster.extend((0..count).map(|_| (rng.bits() & 255) as u8)),
            1 => cluster.extend((0..count).map(|at| (at / 7) as u8 ^ step[2])),
            _ => cluster.extend(std::iter::repeat_n(step[2], count)),
        }
        if cluster.len() >= len {
            break;
        }
    }
    cluster.resize(len, 0);
    for most in [len, len - 512, len / 2] {
        let Some(mut packed) = codec.pack(&cluster, most) else { continue };
        assert!(packed.len() <= most);
        packed.extend([0x3c; 511]);
        let mut out = vec![0; len];
        assert_eq!(codec.unpack(&packed, &mut out), Ok(()));
        assert!(out == cluster);
    }
}

/// Every word decodes to a place that encodes to it again, flags of other kinds apart.
fn describe(cluster_bits: u32, bytes: &[u8]) {
    let geometry = Geometry {
        version: 3,
        cluster_bits,
        refcount_order: 4,
        extended: false,
        external: false,
        slice_bits: 0,
    };
    for word in bytes.chunks_exact(8) {
        let word = u64::from_be_bytes(word.try_into().expect("invariant: chunks of eight"));
        let packed = Packed::decode(word, geometry);
        assert!((1..=2 << cluster_bits).contains(&packed.len));
        assert_eq!(packed.encode(geometry), word & !COPIED | COMPRESSED);
        assert!((1..=3).contains(&packed.run(geometry).count));
    }
}

/// Inputs that reach all parts.
pub(super) fn corpus() -> Vec<Vec<u8>> {
    let mut rng = Rng::new(23);
    let mut out = Vec::new();
    for head in 0..=255_u8 {
        let noise: Vec<u8> = (0..48).map(|_| (rng.bits() & 255) as u8).collect();
        out.push([vec![head], noise.clone()].concat());
        if head >> 5 > 3 {
            continue;
        }
        // A good stream, cut, and with one bit turned.
        let codec = if head & 16 == 0 { Codec::Deflate } else { Codec::Zstd };
        let cluster = 1 << PACKED_BITS[usize::from(head & 15)];
        let content: Vec<u8> = noise.iter().copied().cycle().take(cluster).collect();
        let Some(packed) = codec.pack(&content, cluster) else { continue };
        let mut turned = packed.clone();
        let at = (rng.bits() as usize) % turned.len();
        turned[at] ^= 1 << (rng.bits() % 8);
        let cut = packed[..packed.len() / 2].to_vec();
        for bytes in [packed, turned, cut] {
            out.push([vec![head], bytes].concat());
        }
    }
    out
}
