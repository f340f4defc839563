//! Packing and unpacking the bytes of one cluster: deflate or zstd (specification, "Compressed
//! Clusters Descriptor" and the header's `compression_type`).
//!
//! Promises: pure functions of their input, which is not trusted; nothing beyond one cluster is
//! ever written or allocated for output; unpacking stops when the cluster is full, so what fills
//! the last sector does no harm; too little output is an error. Does no I/O, knows nothing of the
//! file.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::zstd_safe;

use crate::reason::Unpackable;

/// The window of deflate streams as a power of two: readers of qcow2 may have no larger one.
const WINDOW_BITS: u8 = 12;

/// The window for reading: what other writers got wrong is still read, as the peer does.
const READ_WINDOW_BITS: u8 = 15;

/// The level of zstd that is its default.
const ZSTD_LEVEL: i32 = 3;

/// zstd's result for "the destination is too small" (zstd_errors.h, stable).
const ZSTD_NO_ROOM: usize = 70_usize.wrapping_neg();

/// How the clusters of an image are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codec {
    /// Raw deflate without the header of zlib.
    Deflate,
    /// One or several zstd frames.
    Zstd,
}

impl Codec {
    /// The codec of a header's `compression_type`, if it is known.
    pub(crate) const fn of(compression_type: u8) -> Option<Self> {
        match compression_type {
            0 => Some(Self::Deflate),
            1 => Some(Self::Zstd),
            _ => None,
        }
    }

    /// The packed bytes of `cluster`; `None` if they would be more than `most`.
    pub(crate) fn pack(self, cluster: &[u8], most: usize) -> Option<Vec<u8>> {
        let mut out = vec![0; most];
        let len = match self {
            Self::Deflate => {
                let mut stream =
                    Compress::new_with_window_bits(Compression::default(), false, WINDOW_BITS);
                let status = stream.compress(cluster, &mut out, FlushCompress::Finish).ok()?;
                if status != Status::StreamEnd {
                    return None;
                }
                usize::try_from(stream.total_out()).ok()?
            }
            Self::Zstd => zstd_safe::compress(out.as_mut_slice(), cluster, ZSTD_LEVEL).ok()?,
        };
        out.truncate(len);
        Some(out)
    }

    /// Unpacks `packed` into `cluster`, which is full afterwards.
    pub(crate) fn unpack(self, packed: &[u8], cluster: &mut [u8]) -> Result<(), Unpackable> {
        match self {
            Self::Deflate => inflate(packed, cluster),
            Self::Zstd => unpack_frames(packed, cluster),
        }
    }
}

fn inflate(packed: &[u8], cluster: &mut [u8]) -> Result<(), Unpackable> {
    let mut stream = Decompress::new_with_window_bits(false, READ_WINDOW_BITS);
    loop {
        let at = usize::try_from(stream.total_out()).unwrap_or(usize::MAX);
        let Some(rest) = cluster.get_mut(at..).filter(|rest| !rest.is_empty()) else {
            return Ok(());
        };
        let read = usize::try_from(stream.total_in()).unwrap_or(usize::MAX);
        let input = packed.get(read..).unwrap_or_default();
        let status = stream.decompress(input, rest, FlushDecompress::Finish);
        let written = usize::try_from(stream.total_out()).unwrap_or(usize::MAX);
        match status {
            _ if written >= cluster.len() => return Ok(()),
            Err(_) => return Err(Unpackable::Damaged),
            Ok(Status::StreamEnd) => return Err(Unpackable::Short),
            // Neither input nor room for output is missing to a stream that goes on.
            Ok(_) if written == at && stream.total_in() == read as u64 => {
                return Err(Unpackable::Short);
            }
            Ok(_) => {}
        }
    }
}

/// Frame after frame, each straight into its place: no frame's window is allocated.
fn unpack_frames(packed: &[u8], cluster: &mut [u8]) -> Result<(), Unpackable> {
    let mut context = zstd_safe::DCtx::create();
    let (mut input, mut output) = (packed, cluster);
    while !output.is_empty() {
        if input.is_empty() {
            return Err(Unpackable::Short);
        }
        let len = zstd_safe::find_frame_compressed_size(input).map_err(|_| Unpackable::Damaged)?;
        let (frame, behind) = input.split_at_checked(len).ok_or(Unpackable::Damaged)?;
        if frame.is_empty() {
            return Err(Unpackable::Damaged);
        }
        let written = context.decompress(&mut *output, frame).map_err(|code| match code {
            ZSTD_NO_ROOM => Unpackable::Long,
            _ => Unpackable::Damaged,
        })?;
        output = output.get_mut(written..).ok_or(Unpackable::Long)?;
        input = behind;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [Codec; 2] = [Codec::Deflate, Codec::Zstd];

    /// Bytes that get smaller, with repetitions at all distances up to `len`.
    fn text(len: usize) -> Vec<u8> {
        let mut seed = 7_u32;
        let mut bytes: Vec<u8> = Vec::with_capacity(len);
        while bytes.len() < len {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let back = (seed >> 8) as usize % 60_000 + 1;
            if bytes.len() > back && !seed.is_multiple_of(4) {
                let from = bytes.len() - back;
                let piece = bytes[from..(from + 40).min(bytes.len())].to_vec();
                bytes.extend(piece);
            } else {
                bytes.extend(seed.to_be_bytes());
            }
        }
        bytes.truncate(len);
        bytes
    }

    #[test]
    fn what_is_packed_unpacks_also_with_garbage_behind_it() {
        for codec in BOTH {
            for bits in 9..=21 {
                let cluster = text(1 << bits);
                let mut packed = codec.pack(&cluster, cluster.len()).expect("gets smaller");
                assert!(packed.len() < cluster.len());
                packed.extend([0xa5; 511]);
                let mut out = vec![0; cluster.len()];
                codec.unpack(&packed, &mut out).expect("unpacks");
                assert!(out == cluster, "{codec:?} {bits}");
            }
        }
    }

    #[test]
    fn a_stream_of_ours_unpacks_with_a_window_of_twelve_bits() {
        let cluster = text(1 << 18);
        let packed = Codec::Deflate.pack(&cluster, cluster.len()).expect("gets smaller");
        // A reader that keeps no more than the window: its output is taken away piece by piece.
        let mut stream = Decompress::new_with_window_bits(false, WINDOW_BITS);
        let mut out: Vec<u8> = Vec::new();
        let mut piece = [0; 1000];
        while out.len() < cluster.len() {
            let (read, written) = (stream.total_in() as usize, stream.total_out());
            stream
                .decompress(&packed[read..], &mut piece, FlushDecompress::None)
                .expect("is right");
            out.extend(&piece[..(stream.total_out() - written) as usize]);
        }
        assert!(out == cluster);
    }

    #[test]
    fn what_does_not_get_smaller_is_not_packed() {
        let mut seed = 1_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as u8
        })
        .take(65_536)
        .collect();
        for codec in BOTH {
            assert_eq!(codec.pack(&noise, noise.len() - 512), None);
            assert_eq!(codec.pack(&noise, 0), None);
        }
    }

    #[test]
    fn short_damaged_and_overlong_streams_are_errors() {
        let cluster = text(1 << 16);
        for codec in BOTH {
            let packed = codec.pack(&cluster, cluster.len()).expect("gets smaller");
            let mut out = vec![0; cluster.len()];
            for len in [0, 1, 2, 512, packed.len() / 2, packed.len() - 50] {
                let cut = codec.unpack(&packed[..len], &mut out);
                assert!(cut.is_err(), "{codec:?} {len}");
            }
            let mut larger = vec![0; 2 * cluster.len()];
            assert_eq!(codec.unpack(&packed, &mut larger), Err(Unpackable::Short));
            assert!(codec.unpack(&[0xff; 4096], &mut out).is_err());
            // A bomb: a megabyte of zeroes for a cluster of 64 KiB.
            let bomb = codec.pack(&vec![0; 1 << 20], 1 << 20).expect("gets smaller");
            let cut = codec.unpack(&bomb, &mut out);
            match codec {
                Codec::Deflate => assert_eq!((cut, out.iter().all(|b| *b == 0)), (Ok(()), true)),
                Codec::Zstd => assert_eq!(cut, Err(Unpackable::Long)),
            }
        }
    }

    #[test]
    fn several_zstd_frames_make_one_cluster() {
        let cluster = text(1 << 16);
        let mut packed = Vec::new();
        for part in cluster.chunks(10_000) {
            packed.extend(Codec::Zstd.pack(part, part.len()).expect("gets smaller"));
            // A skippable frame of three bytes.
            packed.extend([0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 9, 9, 9]);
        }
        packed.extend([0; 300]);
        let mut out = vec![0; cluster.len()];
        Codec::Zstd.unpack(&packed, &mut out).expect("unpacks");
        assert!(out == cluster);
    }
}
