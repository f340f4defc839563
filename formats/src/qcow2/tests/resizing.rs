//! Smaller and larger disks: what is cut off is gone, what is added reads as zeroes.

use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::buf::Buf;
use liveblk_engine::executor::Core;
use liveblk_engine::format::{
    Below, Extents, LocalFuture, Mapping, Preallocation, Resize, ZeroMode,
};
use liveblk_engine::storage::{Memory, Storage};

use super::mover::{Disk, calm, open};
use super::snapshots::{shapes, snapshots, take};
use crate::qcow2::{CreateOptions, check, create};

const MIB: u64 = 1 << 20;

async fn image(core: &Core, options: CreateOptions) -> Disk {
    let storage = Storage::Memory(Memory::new(0));
    create(core, &storage, options).await.expect("is created");
    open(core, storage, true).await.expect("opens")
}

async fn assert_clean(core: &Core, disk: &Disk) {
    disk.format.set_writable(false).await.expect("settles");
    let report = check(core, disk.format.data_storage()).await.expect("is checked");
    assert!(report.is_clean(), "{:?}", report.problems);
    disk.format.set_writable(true).await.expect("goes on");
}

fn nines(size: u64) -> Below {
    let read = |_: GuestRange, buf: Buf| -> LocalFuture<'static, liveblk_engine::Result<()>> {
        buf.fill(9);
        Box::pin(async { Ok(()) })
    };
    Below { size, read: Rc::new(read) }
}

#[test]
fn what_is_cut_off_is_gone_and_the_file_gets_smaller() {
    for options in shapes() {
        println!("{options:?}");
        calm(|core| async move {
            let disk = image(&core, options).await;
            disk.write(0, &vec![1; 1 << 20]).await.unwrap();
            disk.format.flush().await.unwrap();
            let before = disk.format.data_storage().size();
            for size in [700_416, 300_032, 65_536, 512] {
                disk.format.resize(size).await.expect("shrinks");
                assert_eq!(disk.format.size(), size);
                assert_eq!(disk.read(0, size).await.unwrap(), vec![1; size as usize]);
                assert_clean(&core, &disk).await;
                let error = disk.write(size, &[1; 512]).await.expect_err("outside");
                assert_eq!(error.errno(), 22);
            }
            assert!(disk.format.data_storage().size() < before / 2);
            disk.format.resize(2 * MIB).await.expect("grows");
            let bytes = disk.read(0, 2 * MIB).await.unwrap();
            assert!(bytes[..512] == [1; 512] && bytes[512..].iter().all(|byte| *byte == 0));
            disk.write(MIB, &[2; 100_000]).await.unwrap();
            disk.format.resize(0).await.expect("shrinks to nothing");
            disk.format.resize(MIB).await.expect("grows");
            assert_eq!(disk.read(0, MIB).await.unwrap(), vec![0; 1 << 20]);
            disk.write(0, &[3; 5000]).await.unwrap();
            assert_clean(&core, &disk).await;
        });
    }
}

/// What the fuzz target `qcow2_io` found: layers below that end where the disk ends were taken for
/// none, and subclusters that were left to them became zeroes.
#[test]
fn growth_keeps_what_the_last_cluster_leaves_to_the_layers_below() {
    const END: u64 = 42_496;
    for below in [END, 65_536] {
        calm(move |core| async move {
            let options = CreateOptions { extended_l2: true, ..CreateOptions::new(END) };
            let mut disk = image(&core, options).await;
            disk.below = |_| 9;
            // The last subcluster is there and goes on behind the end of the disk.
            disk.write(END - 512, &[1; 512]).await.unwrap();
            let grown = Resize { below: Some(nines(below)), ..Resize::to(54_784) };
            disk.format.resize_with(grown).await.expect("grows");
            let bytes = disk.read(0, 54_784).await.unwrap();
            let expected = [vec![9; END as usize - 512], vec![1; 512], vec![0; 12_288]].concat();
            assert!(bytes == expected, "{below}");
            assert_clean(&core, &disk).await;
        });
    }
}

#[test]
fn a_snapshot_keeps_its_size_and_what_was_cut_off() {
    for options in shapes() {
        calm(|core| async move {
            let version = options.version;
            let disk = image(&core, options).await;
            disk.write(0, &vec![1; 1 << 20]).await.unwrap();
            take(&disk, "large").await.unwrap();
            let shrunk = disk.format.resize(100_352).await;
            if version == 2 {
                let text = shrunk.expect_err("is refused").to_string();
                assert_eq!(text, "Can't resize a v2 image which has snapshots");
                return;
            }
            shrunk.expect("shrinks");
            assert_clean(&core, &disk).await;
            disk.format.resize(3 * MIB).await.expect("grows");
            let bytes = disk.read(0, 3 * MIB).await.unwrap();
            assert!(bytes[..100_352].iter().all(|byte| *byte == 1));
            assert!(bytes[100_352..].iter().all(|byte| *byte == 0));
            disk.write(0, &[2; 512]).await.unwrap();
            take(&disk, "larger").await.unwrap();
            snapshots(&disk).apply("large").await.unwrap();
            assert_eq!(disk.format.size(), MIB);
            assert_eq!(disk.read(0, MIB).await.unwrap(), vec![1; 1 << 20]);
            snapshots(&disk).delete("large").await.unwrap();
            snapshots(&disk).apply("larger").await.unwrap();
            assert!(disk.read(0, 3 * MIB).await.unwrap()[512..] == bytes[512..]);
            snapshots(&disk).delete("larger").await.unwrap();
            assert_clean(&core, &disk).await;
        });
    }
}

#[test]
fn refusals_have_the_peers_texts() {
    calm(|core| async move {
        let options = CreateOptions { cluster_size: 512, ..CreateOptions::new(MIB) };
        let disk = image(&core, options).await;
        let cases = [
            (Resize::to(1000), "The new size must be a multiple of 512"),
            (Resize::to(10 << 40), "Failed to grow the L1 table: File too large"),
            (
                Resize { preallocation: Preallocation::Full, ..Resize::to(512) },
                "Preallocation can only be used for growing images",
            ),
        ];
        for (to, text) in cases {
            let error = disk.format.resize_with(to).await.expect_err("is refused");
            assert_eq!(error.to_string(), text);
            assert_eq!(disk.format.size(), MIB);
        }
    });
}

#[test]
fn what_is_added_never_shows_the_layers_below() {
    for mut options in shapes() {
        options.size = 1_000_448;
        calm(|core| async move {
            let version = options.version;
            let mut disk = image(&core, options).await;
            disk.below = |at| if at < 3 << 20 { 9 } else { 0 };
            let to = Resize { below: Some(nines(3 * MIB)), ..Resize::to(4 * MIB) };
            let grown = disk.format.resize_with(to).await;
            if version == 2 {
                let text = grown.expect_err("is refused").to_string();
                assert_eq!(text, "Failed to zero out new clusters: Operation not supported");
                assert_eq!(disk.format.size(), 1_000_448);
                return;
            }
            grown.expect("grows");
            let bytes = disk.read(0, 4 * MIB).await.unwrap();
            assert!(bytes[..1_000_448].iter().all(|byte| *byte == 9));
            assert!(bytes[1_000_448..].iter().all(|byte| *byte == 0));
            assert_clean(&core, &disk).await;
        });
    }
}

#[test]
fn preallocation_gives_the_new_part_space_that_reads_as_zeroes() {
    for mode in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for options in shapes() {
            calm(move |core| async move {
                let disk = image(&core, options).await;
                // Freed clusters hold old data.
                disk.write(0, &vec![1; 1 << 20]).await.unwrap();
                disk.format.flush().await.unwrap();
                disk.zero(65_536, 500_000, ZeroMode::Discard).await.unwrap();
                disk.format.flush().await.unwrap();
                let to = Resize { preallocation: mode, ..Resize::to(2 * MIB + 512) };
                disk.format.resize_with(to).await.expect("grows");
                let bytes = disk.read(MIB, MIB + 512).await.unwrap();
                assert!(bytes.iter().all(|byte| *byte == 0));
                let mut extents = Extents::new();
                disk.read(MIB, MIB).await.unwrap();
                drop(disk.format.resolve(GuestRange::new(MIB, MIB), &mut extents));
                let data = |extent: &liveblk_engine::format::Extent| {
                    matches!(extent.mapping, Mapping::Data(_))
                };
                assert!(extents.iter().all(data), "{extents:?}");
                disk.write(MIB + 5, &[3; 5000]).await.unwrap();
                assert_clean(&core, &disk).await;
            });
        }
    }
}

#[test]
fn a_table_larger_than_a_refcount_block_covers_finds_its_place() {
    calm(|core| async move {
        let options =
            CreateOptions { cluster_size: 512, refcount_order: 6, ..CreateOptions::new(MIB) };
        let disk = image(&core, options).await;
        disk.write(0, &[1; 10_000]).await.unwrap();
        disk.format.resize(4 << 30).await.expect("grows");
        disk.write((4 << 30) - 512, &[2; 512]).await.unwrap();
        take(&disk, "one").await.expect("is taken");
        disk.write(0, &[3; 512]).await.unwrap();
        snapshots(&disk).apply("one").await.expect("is applied");
        assert_eq!(disk.read(0, 512).await.unwrap(), [1; 512]);
        assert_eq!(disk.read((4 << 30) - 512, 512).await.unwrap(), [2; 512]);
        snapshots(&disk).delete("one").await.expect("is deleted");
        assert_clean(&core, &disk).await;
    });
}
