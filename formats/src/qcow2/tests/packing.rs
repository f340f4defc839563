//! Compressed clusters: against the peer's tools, under failures, power cuts and lies.

use liveblk_engine::address::{GuestOffset, GuestRange};
use liveblk_engine::executor::Core;
use liveblk_engine::format::{Extents, Mapping, PackedCluster, WritePiece, WriteStep, ZeroMode};
use liveblk_engine::storage::{Memory, Storage};

use super::mover::{Disk, calm, open};
use crate::qcow2::{CompressionType, CreateOptions, check, create};

const CLUSTER: u64 = 64 << 10;

/// Bytes that get smaller, different for each `seed`.
pub(super) fn soft(seed: u64, len: usize) -> Vec<u8> {
    let words = (0..).map(|at: u64| (at / 5).wrapping_mul(seed * 2 + 1) % 1000);
    words.flat_map(u64::to_be_bytes).take(len).collect()
}

/// Bytes that do not.
pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (state >> 33) as u8
    };
    std::iter::repeat_with(&mut next).take(len).collect()
}

async fn image(core: &Core, options: CreateOptions) -> Disk {
    image_on(core, Storage::Memory(Memory::new(0)), options).await
}

/// A new image in `storage`, open.
pub(super) async fn image_on(core: &Core, storage: Storage, options: CreateOptions) -> Disk {
    create(core, &storage, options).await.expect("is created");
    open(core, storage, true).await.expect("opens")
}

pub(super) fn mapping(disk: &Disk, at: u64, len: u64) -> Extents {
    let mut extents = Extents::new();
    drop(disk.format.resolve(GuestRange::new(at, len), &mut extents));
    extents
}

/// Where the cluster at `at` lies, if it is compressed.
pub(super) async fn packed_at(disk: &Disk, at: u64) -> Option<PackedCluster> {
    disk.read(at, 512).await.expect("reads");
    match &mapping(disk, at, 512)[..] {
        [one] => match one.mapping {
            Mapping::Compressed(packed) => Some(packed),
            _ => None,
        },
        other => panic!("{other:?}"),
    }
}

async fn begin_packed(disk: &Disk, at: u64, len: usize) -> WritePiece {
    let compress = disk.format.abilities().compress.expect("compresses");
    loop {
        match compress.begin_packed(GuestOffset::new(at), len as u64).expect("begins") {
            WriteStep::Ready(piece) => return piece,
            WriteStep::Miss(miss) => disk.format.load(miss).await.expect("loads"),
            WriteStep::Wait(wait) => disk.format.pending(wait).await,
        }
    }
}

async fn assert_clean(core: &Core, disk: &Disk) {
    let report = check(core, disk.format.data_storage()).await.expect("is checked");
    assert!(report.is_clean(), "{:?}", report.problems);
}

#[test]
fn packed_clusters_share_host_clusters_at_sector_boundaries() {
    calm(|core| async move {
        let disk = image(&core, CreateOptions::new(1 << 30)).await;
        for at in 0..20 {
            disk.write_compressed(at * CLUSTER, &soft(at, 65536)).await.expect("writes");
        }
        let mut end = 0;
        for at in 0..20 {
            let packed = packed_at(&disk, at * CLUSTER).await.expect("is compressed");
            assert_eq!((packed.host.bytes() % 512, packed.len % 512), (0, 0));
            assert!(end == 0 || packed.host.bytes() == end, "one behind the other");
            end = packed.host.bytes() + packed.len;
            assert_eq!(disk.read(at * CLUSTER, CLUSTER).await.unwrap(), soft(at, 65536));
        }
        disk.format.close().await.expect("closes");
        assert_clean(&core, &disk).await;
    });
}

#[test]
fn refcounts_of_one_bit_share_nothing_and_of_two_bits_at_most_three() {
    for (order, most) in [(0, 1), (1, 3), (2, 15)] {
        calm(move |core| async move {
            let options = CreateOptions { refcount_order: order, ..CreateOptions::new(1 << 26) };
            let disk = image(&core, options).await;
            for at in 0..40 {
                disk.write_compressed(at * CLUSTER, &soft(0, 65536)).await.expect("writes");
            }
            let mut users = std::collections::BTreeMap::<u64, u32>::new();
            for at in 0..40 {
                let packed = packed_at(&disk, at * CLUSTER).await.expect("is compressed");
                let last = packed.host.bytes() + packed.len - 1;
                for host in packed.host.bytes() / CLUSTER..=last / CLUSTER {
                    *users.entry(host).or_default() += 1;
                }
            }
            assert!(users.values().all(|count| *count <= most), "{users:?}");
            disk.format.close().await.expect("closes");
            assert_clean(&core, &disk).await;
        });
    }
}

#[test]
fn an_aborted_packed_write_gives_back_what_it_counted() {
    calm(|core| async move {
        let disk = image(&core, CreateOptions::new(1 << 26)).await;
        let first = begin_packed(&disk, 0, 40 << 10).await;
        let second = begin_packed(&disk, CLUSTER, 40 << 10).await;
        assert_eq!(second.host.bytes(), first.host.bytes() + (40 << 10), "goes on behind it");
        drop(first);
        drop(second);
        let third = begin_packed(&disk, 0, 512).await;
        drop(third);
        disk.write_compressed(0, &soft(3, 65536)).await.expect("writes");
        disk.format.close().await.expect("closes");
        assert_clean(&core, &disk).await;
    });
}

#[test]
fn the_second_writer_of_a_packed_cluster_waits_and_readers_see_the_old_bytes() {
    calm(|core| async move {
        let disk = image(&core, CreateOptions::new(1 << 26)).await;
        disk.write(0, &[7; 65536]).await.unwrap();
        let piece = begin_packed(&disk, 0, 512).await;
        let step = disk.format.begin_write(GuestRange::new(512, 512)).expect("begins");
        assert!(matches!(step, WriteStep::Wait(_)));
        assert_eq!(disk.read(0, 65536).await.unwrap(), [7; 65536]);
        drop(piece);
        disk.write(512, &[8; 512]).await.unwrap();
        assert_eq!(disk.read(512, 512).await.unwrap(), [8; 512]);
    });
}

#[test]
fn a_cached_cluster_is_never_stale_after_a_rewrite() {
    for kind in [CompressionType::Zlib, CompressionType::Zstd] {
        calm(move |core| async move {
            let options = CreateOptions { compression_type: kind, ..CreateOptions::new(1 << 22) };
            let disk = image(&core, options).await;
            let mut expected = soft(1, 65536);
            disk.write_compressed(0, &expected).await.unwrap();
            assert_eq!(disk.read(4096, 4096).await.unwrap(), expected[4096..8192]);
            // In the middle of a cached cluster, by a normal write.
            disk.write(5000 / 512 * 512, &[9; 512]).await.unwrap();
            expected[4608..5120].fill(9);
            assert_eq!(disk.read(0, CLUSTER).await.unwrap(), expected);
            // Again and again at the same place of the file: what was kept of it must not come
            // back.
            let mut places = std::collections::BTreeSet::new();
            for round in 2..40 {
                let bytes = soft(round, 65536);
                disk.write_compressed(0, &bytes).await.unwrap();
                places.insert(packed_at(&disk, 0).await.expect("is compressed").host);
                for at in (0..CLUSTER).step_by(4096) {
                    let part = &bytes[at as usize..at as usize + 4096];
                    assert_eq!(disk.read(at, 4096).await.unwrap(), part, "round {round}");
                }
                disk.zero(0, CLUSTER, ZeroMode::Unmap).await.unwrap();
                assert_eq!(disk.read(0, 4096).await.unwrap(), [0; 4096]);
                disk.format.flush().await.unwrap();
                disk.format.flush().await.unwrap();
            }
            assert!(places.len() < 20, "places of the file are used again: {places:?}");
            disk.format.close().await.expect("closes");
            assert_clean(&core, &disk).await;
        });
    }
}

#[test]
fn a_read_that_began_before_a_rewrite_gets_the_old_bytes_and_leaves_nothing_behind() {
    calm(|core| async move {
        let disk = image(&core, CreateOptions::new(1 << 22)).await;
        disk.write_compressed(0, &soft(1, 65536)).await.unwrap();
        disk.format.flush().await.unwrap();
        let mut extents = Extents::new();
        let lease = disk.format.resolve(GuestRange::new(0, CLUSTER), &mut extents);
        let Mapping::Compressed(packed) = extents[0].mapping else { panic!("{extents:?}") };
        disk.zero(0, CLUSTER, ZeroMode::Unmap).await.unwrap();
        disk.format.flush().await.unwrap();
        for round in 2..6 {
            disk.write_compressed(CLUSTER, &soft(round, 65536)).await.unwrap();
            disk.format.flush().await.unwrap();
        }
        let old = disk.format.read_compressed(packed).await.expect("the lease keeps it");
        assert_eq!(old.to_vec(), soft(1, 65536));
        // A reader that went away lets go of its lease while the bytes are still on their way.
        let late = disk.format.read_compressed(packed);
        drop((lease, late));
        for round in 2..20 {
            let bytes = soft(round, 65536);
            disk.write_compressed(0, &bytes).await.unwrap();
            disk.format.flush().await.unwrap();
            assert_eq!(disk.read(0, CLUSTER).await.unwrap(), bytes);
        }
    });
}

#[test]
fn zeroes_and_discards_free_every_host_cluster_that_a_packed_one_touches() {
    calm(|core| async move {
        let disk = image(&core, CreateOptions::new(1 << 26)).await;
        let bytes: Vec<u8> = (0..16).flat_map(|at| soft(at, 65536)).collect();
        disk.write_compressed(0, &bytes).await.unwrap();
        disk.zero(0, 4 * CLUSTER, ZeroMode::Discard).await.unwrap();
        disk.zero(4 * CLUSTER, 4 * CLUSTER, ZeroMode::Unmap).await.unwrap();
        disk.zero(8 * CLUSTER, 4 * CLUSTER, ZeroMode::Keep).await.unwrap();
        assert_eq!(disk.read(0, 12 * CLUSTER).await.unwrap(), vec![0; 12 * 65536]);
        // A part of a cluster: its other bytes stay.
        disk.zero(12 * CLUSTER + 512, 1024, ZeroMode::Unmap).await.unwrap();
        let mut expected = soft(12, 65536);
        expected[512..1536].fill(0);
        assert_eq!(disk.read(12 * CLUSTER, CLUSTER).await.unwrap(), expected);
        disk.zero(13 * CLUSTER + 512, 1024, ZeroMode::Discard).await.unwrap();
        assert_eq!(disk.read(13 * CLUSTER, CLUSTER).await.unwrap(), soft(13, 65536));
        disk.format.close().await.expect("closes");
        assert_clean(&core, &disk).await;
    });
}

#[test]
fn a_cluster_that_does_not_get_smaller_is_written_as_it_is() {
    calm(|core| async move {
        let disk = image(&core, CreateOptions::new(1 << 22)).await;
        disk.write_compressed(0, &noise(1, 65536)).await.unwrap();
        assert!(matches!(mapping(&disk, 0, CLUSTER)[0].mapping, Mapping::Data(_)));
        assert_eq!(disk.read(0, CLUSTER).await.unwrap(), noise(1, 65536));
        // The smallest clusters hold one sector: nothing is smaller.
        let options = CreateOptions { cluster_size: 512, ..CreateOptions::new(1 << 20) };
        let disk = image(&core, options).await;
        disk.write_compressed(0, &[5; 2048]).await.unwrap();
        assert!(matches!(mapping(&disk, 0, 2048)[0].mapping, Mapping::Data(_)));
        assert_eq!(disk.read(0, 2048).await.unwrap(), [5; 2048]);
    });
}

#[test]
fn version_2_has_compressed_clusters_too() {
    calm(|core| async move {
        let options = CreateOptions { version: 2, ..CreateOptions::new(1 << 22) };
        let disk = image(&core, options).await;
        disk.write_compressed(0, &soft(1, 2 * 65536)).await.unwrap();
        disk.zero(0, CLUSTER, ZeroMode::Unmap).await.unwrap();
        assert_eq!(disk.read(0, CLUSTER).await.unwrap(), [0; 65536]);
        assert_eq!(disk.read(CLUSTER, CLUSTER).await.unwrap(), soft(1, 2 * 65536)[65536..]);
        disk.format.close().await.expect("closes");
        assert_clean(&core, &disk).await;
    });
}

#[test]
fn a_compressed_cluster_with_subclusters_is_copied_up_whole() {
    calm(|core| async move {
        let options = CreateOptions { extended_l2: true, ..CreateOptions::new(1 << 22) };
        let mut disk = image(&core, options).await;
        disk.below = |_| 0xee;
        disk.write_compressed(0, &soft(1, 2 * 65536)).await.unwrap();
        disk.write(10_000, &[3; 100]).await.unwrap();
        let mut expected = soft(1, 2 * 65536);
        expected[10_000..10_100].fill(3);
        assert_eq!(disk.read(0, 2 * CLUSTER).await.unwrap(), expected);
        disk.zero(CLUSTER + 2048, 2048, ZeroMode::Unmap).await.unwrap();
        expected[65536 + 2048..65536 + 4096].fill(0);
        assert_eq!(disk.read(0, 2 * CLUSTER).await.unwrap(), expected);
        disk.write_compressed(0, &soft(2, 65536)).await.unwrap();
        assert_eq!(disk.read(0, CLUSTER).await.unwrap(), soft(2, 65536));
        disk.format.close().await.expect("closes");
        assert_clean(&core, &disk).await;
    });
}
