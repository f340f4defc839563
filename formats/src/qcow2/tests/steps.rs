//! Single steps of the contract between engine and format.

use liveblk_engine::ErrorKind;
use liveblk_engine::address::GuestRange;
use liveblk_engine::driver::sim::{Sim, SimConfig};
use liveblk_engine::executor::Core;
use liveblk_engine::format::{Extents, Fill, Mapping, WritePiece, WriteStep, ZeroMode, ZeroStep};
use liveblk_engine::storage::{Memory, Storage};

use super::mover::{Disk, calm, file, open};
use crate::qcow2::{CreateOptions, check, create};

const CLUSTER: u64 = 64 << 10;

async fn image(core: &Core, options: CreateOptions) -> Disk {
    let storage = Storage::Memory(Memory::new(0));
    create(core, &storage, options).await.expect("is created");
    open(core, storage, true).await.expect("opens")
}

/// Begins a write, loading what it misses.
async fn begin(disk: &Disk, at: u64, len: u64) -> WriteStep {
    loop {
        match disk.format.begin_write(GuestRange::new(at, len)).expect("begins") {
            WriteStep::Miss(miss) => disk.format.load(miss).await.expect("loads"),
            step => return step,
        }
    }
}

async fn piece(disk: &Disk, at: u64, len: u64) -> WritePiece {
    match begin(disk, at, len).await {
        WriteStep::Ready(piece) => piece,
        step => panic!("{step:?}"),
    }
}

fn mapping(disk: &Disk, at: u64, len: u64) -> Extents {
    let mut extents = Extents::new();
    drop(disk.format.resolve(GuestRange::new(at, len), &mut extents));
    extents
}

#[test]
fn a_large_write_allocates_one_contiguous_piece_with_fill_on_both_sides() {
    calm(|core| async move {
        let disk = image(&core, CreateOptions::new(1 << 30)).await;
        let first = piece(&disk, 512, 1 << 20).await;
        assert_eq!((first.len, first.head), (1 << 20, 512));
        assert_eq!(first.tail, CLUSTER - 512);
        assert_eq!(first.fill, Fill::Below);
        assert_eq!(first.host.bytes() % CLUSTER, 512);
        let extents = mapping(&disk, 0, 2 << 20);
        assert!(matches!(extents[..], [ref one] if matches!(one.mapping, Mapping::Absent)));
        let host = first.host.bytes();
        // Stands for the data, which is written before the guard is completed.
        disk.format.data_storage().truncate(host + 17 * CLUSTER).await.unwrap();
        first.guard.complete();
        let extents = mapping(&disk, 0, 17 * CLUSTER);
        assert_eq!(extents.len(), 1);
        assert!(matches!(extents[0].mapping, Mapping::Data(at) if at.bytes() == host - 512));
        let again = piece(&disk, 100, 17 * CLUSTER - 100).await;
        assert_eq!((again.len, again.head, again.tail), (17 * CLUSTER - 100, 0, 0));
        again.guard.complete();
    });
}

#[test]
fn the_second_writer_of_a_cluster_waits_until_the_first_ends() {
    calm(|core| async move {
        let disk = image(&core, CreateOptions::new(1 << 30)).await;
        let first = piece(&disk, 0, 512).await;
        let WriteStep::Wait(wait) = begin(&disk, 1024, 512).await else { panic!("must wait") };
        let step = disk.format.begin_zero(GuestRange::new(0, CLUSTER), ZeroMode::Unmap);
        assert!(matches!(step, Ok(ZeroStep::Wait(_))));
        let host = first.host.bytes();
        drop(first.guard);
        disk.format.pending(wait).await;
        let second = piece(&disk, 1024, 512).await;
        assert_eq!(second.fill, Fill::Below, "the first writer gave up");
        let mut hosts = vec![second.host.bytes() - 1024];
        second.guard.complete();
        assert_eq!(piece(&disk, 0, 512).await.head, 0, "now in place");
        // Clusters that were reserved together are handed out before one that came back.
        for cluster in 1..64 {
            let next = piece(&disk, cluster * CLUSTER, 512).await;
            hosts.push(next.host.bytes());
            next.guard.complete();
        }
        assert!(hosts.contains(&host), "its cluster is free again");
    });
}

#[test]
fn a_freed_cluster_is_reused_only_after_a_flush_and_without_leases() {
    calm(|core| async move {
        let disk = image(&core, CreateOptions::new(1 << 30)).await;
        disk.write(0, &[1; 4096]).await.unwrap();
        let mut extents = Extents::new();
        let lease = disk.format.resolve(GuestRange::new(0, 4096), &mut extents);
        let Mapping::Data(host) = extents[0].mapping else { panic!("is data") };
        disk.zero(0, CLUSTER, ZeroMode::Discard).await.unwrap();
        assert!(matches!(mapping(&disk, 0, 512)[0].mapping, Mapping::Zero));
        // More allocations than any reserve, so that the search runs each time.
        let mut next = 1;
        let mut used = async |count: u64| {
            let mut hosts = Vec::new();
            for _ in 0..count {
                let piece = piece(&disk, next * CLUSTER, 4096).await;
                hosts.push(piece.host.bytes());
                piece.guard.complete();
                next += 1;
            }
            hosts
        };
        assert!(!used(40).await.contains(&host.bytes()), "the unlink is not durable");
        disk.format.flush().await.unwrap();
        assert!(!used(40).await.contains(&host.bytes()), "a reader may still use it");
        drop(lease);
        disk.format.flush().await.unwrap();
        assert!(used(40).await.contains(&host.bytes()), "now it is free");
    });
}

#[test]
fn zero_modes_keep_free_or_leave_clusters() {
    calm(|core| async move {
        let disk = image(&core, CreateOptions::new(1 << 30)).await;
        disk.write(0, &[1; 4 * 65536]).await.unwrap();
        let before = mapping(&disk, 0, CLUSTER);
        let Mapping::Data(host) = before[0].mapping else { panic!("is data") };
        disk.zero(0, CLUSTER, ZeroMode::Keep).await.unwrap();
        let kept = piece(&disk, 512, 512).await;
        assert_eq!((kept.host.bytes(), kept.fill), (host.bytes() + 512, Fill::Zero));
        assert_eq!((kept.head, kept.tail), (512, CLUSTER - 1024));
        kept.guard.complete();
        disk.zero(CLUSTER + 512, 1024, ZeroMode::Discard).await.unwrap();
        assert_eq!(disk.read(CLUSTER, 2048).await.unwrap(), [1; 2048], "partial: untouched");
        disk.zero(CLUSTER + 512, 1024, ZeroMode::Unmap).await.unwrap();
        assert_eq!(disk.read(CLUSTER + 512, 1024).await.unwrap(), [0; 1024]);
        disk.zero(600 << 20, 300 << 20, ZeroMode::Discard).await.expect("nothing to do");
        assert_eq!(mapping(&disk, 600 << 20, 300 << 20).len(), 1);
    });
}

#[test]
fn version_2_never_unmaps() {
    calm(|core| async move {
        let mut disk =
            image(&core, CreateOptions { version: 2, ..CreateOptions::new(1 << 24) }).await;
        disk.below = |_| 9;
        disk.write(0, &[1; 65536]).await.unwrap();
        disk.zero(0, CLUSTER, ZeroMode::Discard).await.unwrap();
        assert_eq!(disk.read(0, 512).await.unwrap(), [1; 512]);
        disk.zero(0, 2 * CLUSTER, ZeroMode::Unmap).await.unwrap();
        assert_eq!(disk.read(0, 2 * CLUSTER).await.unwrap(), vec![0; 2 * 65536]);
    });
}

#[test]
fn a_read_only_image_takes_no_writes_and_can_become_writable() {
    calm(|core| async move {
        let disk = image(&core, CreateOptions::new(1 << 24)).await;
        disk.write(0, &[1; 512]).await.unwrap();
        disk.format.set_writable(false).await.expect("is flushed");
        let report = check(&core, disk.format.data_storage()).await.unwrap();
        assert!(report.is_clean(), "{:?}", report.problems);
        assert_eq!(
            disk.write(0, &[2; 512]).await.expect_err("refused").kind(),
            ErrorKind::ReadOnly
        );
        disk.format.set_writable(true).await.expect("is writable again");
        disk.write(0, &[2; 512]).await.expect("writes");
        let past = disk.write((1 << 24) - 512, &[1; 1024]).await.expect_err("outside");
        assert_eq!(past.kind(), ErrorKind::OutOfRange);
    });
}

#[test]
fn growing_moves_the_l1_table_and_odd_sizes_are_refused() {
    calm(|core| async move {
        let options = CreateOptions { cluster_size: 512, ..CreateOptions::new(1 << 20) };
        let disk = image(&core, options).await;
        disk.write(0, &[1; 512 * 1024]).await.unwrap();
        disk.format.resize(64 << 20).await.expect("grows");
        assert_eq!(disk.format.size(), 64 << 20);
        disk.write(63 << 20, &[2; 4096]).await.unwrap();
        assert_eq!(disk.read(0, 512 * 1024).await.unwrap(), vec![1; 512 * 1024]);
        let odd = disk.format.resize(1000).await.expect_err("odd");
        assert_eq!(odd.kind(), ErrorKind::InvalidArgument);
        disk.format.close().await.expect("closes");
        let report = check(&core, disk.format.data_storage()).await.unwrap();
        assert!(report.is_clean(), "{:?}", report.problems);
    });
}

#[test]
fn what_a_discard_freed_is_not_leaked_by_a_close_right_after_a_flush() {
    for seed in 0..5 {
        Sim::new(SimConfig::new(seed).calm()).block_on(0, |core| async move {
            let storage = file(&core, "/image", true).await;
            create(&core, &storage, CreateOptions::new(1 << 30)).await.expect("is created");
            let disk = open(&core, storage.clone(), true).await.expect("opens");
            disk.write(0, &[1; CLUSTER as usize]).await.expect("writes");
            disk.zero(0, CLUSTER, ZeroMode::Discard).await.expect("discards");
            disk.format.flush().await.expect("flushes");
            disk.format.close().await.expect("closes");
            let report = check(&core, &storage).await.expect("is checked");
            assert!(report.is_clean(), "{:?}", report.problems);
        });
    }
}
