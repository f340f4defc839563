//! Compressed clusters under failures of the storage, and files that lie about them.

use std::rc::Rc;

use liveblk_engine::driver::sim::{FaultRule, OpFilter, Sim, SimConfig, SimOpKind};
use liveblk_engine::executor::Core;
use liveblk_engine::format::ZeroMode;
use liveblk_engine::storage::{Memory, Storage};
use liveblk_engine::{ErrorKind, Result};

use super::mover::{Disk, calm, file, open};
use super::packing::{image_on, noise, packed_at, soft};
use crate::qcow2::{CompressionType, CreateOptions, check};

const CLUSTER: u64 = 4096;
const ENOSPC: i32 = 28;
const EIO: i32 = 5;

fn bytes_of(step: u64) -> Vec<u8> {
    soft(step + 1, CLUSTER as usize)
}

/// Packed writes over everything that a cluster can be, among flushes, zeroes and normal writes.
async fn script(disk: &Disk) -> Vec<Result<()>> {
    let mut results = Vec::new();
    for step in 0..48_u64 {
        let at = step % 30 * CLUSTER;
        results.push(disk.write_compressed(at, &bytes_of(step)).await);
        if step % 6 == 5 {
            results.push(disk.write(at + 512, &noise(step, 700)).await);
        }
        if step % 7 == 0 {
            results.push(disk.format.flush().await);
        }
        if step % 11 == 3 {
            results.push(disk.zero(at, CLUSTER, ZeroMode::Unmap).await);
        }
    }
    results.push(disk.format.flush().await);
    results
}

async fn new_image(core: &Core, refcount_order: u32) -> (Rc<Memory>, Disk) {
    let memory = Memory::new(0);
    let options =
        CreateOptions { cluster_size: CLUSTER, refcount_order, ..CreateOptions::new(1 << 20) };
    let disk = image_on(core, Storage::Memory(Rc::clone(&memory)), options).await;
    (memory, disk)
}

#[test]
fn a_full_disk_at_any_write_of_packed_clusters_is_undone() {
    for nth in 0..120 {
        calm(move |core| async move {
            let (memory, disk) = new_image(&core, [4, 1, 6][nth as usize % 3]).await;
            memory.plant_fault(Some((nth, ENOSPC)));
            for error in script(&disk).await.into_iter().filter_map(Result::err) {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "write {nth}: {error}");
            }
            let storage = disk.format.data_storage().clone();
            let report = check(&core, &storage).await.expect("is checked");
            assert_eq!(report.corruptions, 0, "write {nth}: {:?}", report.problems);
            memory.plant_fault(None);
            for result in script(&disk).await {
                result.expect("space is back");
            }
            assert_eq!(disk.read(20 * CLUSTER, CLUSTER).await.expect("reads"), bytes_of(20));
            disk.format.close().await.expect("closes");
            let report = check(&core, &storage).await.expect("is checked");
            assert!(report.is_clean(), "write {nth}: {:?}", report.problems);
        });
    }
}

#[test]
fn a_failed_write_of_packed_bytes_leaves_the_old_ones_and_metadata_failures_stop_writing() {
    for nth in 0..120 {
        calm(move |core| async move {
            let (memory, disk) = new_image(&core, 4).await;
            disk.write_compressed(40 * CLUSTER, &bytes_of(99)).await.expect("writes");
            disk.format.flush().await.expect("flushes");
            memory.plant_fault(Some((nth, EIO)));
            for error in script(&disk).await.into_iter().filter_map(Result::err) {
                assert_eq!(error.errno(), EIO, "write {nth}: {error}");
            }
            memory.plant_fault(None);
            assert_eq!(disk.read(40 * CLUSTER, CLUSTER).await.expect("reads"), bytes_of(99));
            let report = check(&core, disk.format.data_storage()).await.expect("is checked");
            assert_eq!(report.corruptions, 0, "write {nth}: {:?}", report.problems);
        });
    }
}

#[test]
fn a_failed_read_of_packed_bytes_is_an_error_once_and_nothing_is_kept_of_it() {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/image", &[]);
    let second = sim.block_on(0, |core| async move {
        let storage = file(&core, "/image", false).await;
        let disk = image_on(&core, storage, CreateOptions::new(1 << 20)).await;
        disk.write_compressed(0, &soft(1, 2 << 16)).await.expect("writes");
        disk.format.close().await.expect("closes");
        packed_at(&disk, 1 << 16).await.expect("is compressed")
    });
    let place = second.host.bytes()..second.host.bytes() + second.len;
    sim.inject(FaultRule::once(OpFilter::any().kind(SimOpKind::Read).range(place), EIO));
    sim.block_on(0, |core| async move {
        let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
        assert_eq!(disk.read(0, 4096).await.expect("reads"), soft(1, 4096));
        let error = disk.read(1 << 16, 4096).await.expect_err("fails");
        assert_eq!(error.errno(), EIO);
        let expected = soft(1, 2 << 16);
        assert_eq!(disk.read(1 << 16, 4096).await.expect("reads"), expected[1 << 16..][..4096]);
        disk.write(70_000, &[1; 10]).await.expect("is copied up");
        assert_eq!(disk.read(70_010, 4096).await.expect("reads"), expected[70_010..][..4096]);
    });
}

/// A cluster that takes tens of sectors.
fn firm() -> Vec<u8> {
    let mut bytes = noise(1, 20_000);
    bytes.extend(soft(1, 65536 - 20_000));
    bytes
}

/// An image whose guest clusters 0 and 1 are compressed and 2 is not, as bytes, and where the two
/// compressed ones lie.
fn lying(kind: CompressionType) -> (Vec<u8>, [u64; 2]) {
    calm(move |core| async move {
        let storage = file(&core, "/image", true).await;
        let options = CreateOptions { compression_type: kind, ..CreateOptions::new(1 << 30) };
        let disk = image_on(&core, storage.clone(), options).await;
        disk.write(2 << 16, &[7; 65536]).await.expect("writes");
        disk.write_compressed(0, &firm().repeat(2)).await.expect("writes");
        let first = packed_at(&disk, 0).await.expect("is compressed").host.bytes();
        let second = packed_at(&disk, 1 << 16).await.expect("is compressed").host.bytes();
        disk.format.close().await.expect("closes");
        let buf = core.pool().alloc(storage.size() as usize);
        storage.read(0, buf.clone()).await.unwrap();
        (buf.to_vec(), [first, second])
    })
}

/// Reads the first cluster of `bytes`; the rest must go on whatever it says.
fn read_lying(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/image", bytes);
    sim.block_on(0, |core| async move {
        let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
        let first = disk.read(0, 65536).await;
        let rest = disk.read(2 << 16, 65536).await.expect("the rest goes on");
        assert_eq!(rest, [7; 65536]);
        first
    })
}

/// The L2 table of a new image is its fifth cluster.
const L2: usize = 0x40000;

#[test]
fn damaged_compressed_clusters_give_a_clear_error_and_the_rest_goes_on() {
    for kind in [CompressionType::Zlib, CompressionType::Zstd] {
        let (good, [first, second]) = lying(kind);
        assert_eq!(read_lying(&good).expect("reads"), firm());
        let word = u64::from_be_bytes(good[L2..L2 + 8].try_into().unwrap());
        assert_eq!((word >> 62, word & ((1 << 54) - 1)), (1, first));
        let with = |word: u64| {
            let mut bytes = good.clone();
            bytes[L2..L2 + 8].copy_from_slice(&word.to_be_bytes());
            bytes
        };
        let refused = |bytes: &[u8], text: &str| {
            let read = read_lying(bytes).map(|bytes| bytes.len());
            let error = read.expect_err("is an error");
            assert_eq!(error.errno(), EIO, "{kind:?}: {error}");
            assert!(error.to_string().contains(text), "{kind:?}: {error}");
        };
        // One sector of a stream that is longer.
        refused(&with(1 << 62 | first), "compressed bytes");
        // The middle of a stream, and bytes that are none.
        refused(&with(word + 512), "compressed bytes");
        refused(&with(1 << 62 | (5 << 54) | 0x50000), "compressed bytes");
        // Sectors to the most that the field can say: trailing bytes do no harm, metadata does.
        let most = read_lying(&with(word | 0xff << 54)).expect("reads");
        assert_eq!(most, firm());
        refused(&with(1 << 62 | (0xff << 54) | 0x30000), "overlaps metadata");
        refused(&with(1 << 62 | 0x40200), "overlaps metadata");
        // Beyond the end of the file, and beyond everything.
        let end = good.len() as u64;
        refused(&with(1 << 62 | (end + 4096)), "beyond the end of the file");
        refused(&with(1 << 62 | 0x3f_ffff_ffff_ffff), "corrupt");
        refused(&with(1 << 62), "corrupt");
        // The file ends inside the stream.
        refused(&good[..first as usize + 512], "compressed bytes");
        let mut damaged = good.clone();
        for byte in &mut damaged[first as usize + 20..second as usize] {
            *byte ^= 0x55;
        }
        refused(&damaged, "compressed bytes");
    }
}

/// Row R8: the zero flag of normal clusters is an offset bit of compressed ones.
#[test]
fn an_odd_host_offset_of_a_compressed_cluster_is_not_a_zero_flag() {
    let (good, [first, second]) = lying(CompressionType::Zlib);
    let (first, second) = (first as usize, second as usize);
    let mut bytes = good.clone();
    // Moved by one byte: the stream ends well before its last sector does.
    bytes.copy_within(first..second - 1, first + 1);
    let word = u64::from_be_bytes(good[L2..L2 + 8].try_into().unwrap()) | 1;
    bytes[L2..L2 + 8].copy_from_slice(&word.to_be_bytes());
    assert_eq!(read_lying(&bytes).expect("reads"), firm());
}

#[test]
fn a_bomb_unpacks_to_one_cluster_at_most() {
    let (good, [first, _]) = lying(CompressionType::Zlib);
    let mut bytes = good;
    let bomb = crate::qcow2::codec::Codec::Deflate.pack(&vec![3; 4 << 20], 4 << 20).unwrap();
    bytes.resize(bytes.len().max(first as usize + bomb.len()), 0);
    bytes[first as usize..first as usize + bomb.len()].copy_from_slice(&bomb);
    let word = 1_u64 << 62 | ((bomb.len() as u64 / 512) << 54) | first;
    bytes[L2..L2 + 8].copy_from_slice(&word.to_be_bytes());
    assert_eq!(read_lying(&bytes).expect("the first cluster of it"), [3; 65536]);
}

#[test]
fn reading_compressed_clusters_again_and_again_takes_no_more_memory() {
    calm(|core| async move {
        let memory = Storage::Memory(Memory::new(0));
        let disk = image_on(&core, memory, CreateOptions::new(64 << 20)).await;
        let before = core.pool().in_use();
        disk.write_compressed(0, &soft(1, 16 << 20)).await.expect("writes");
        for round in 0..3 {
            for at in (0..16 << 20).step_by(8192) {
                disk.read(at, 4096).await.expect("reads");
            }
            assert!(core.pool().in_use() <= before, "round {round}");
        }
    });
}
