//! Bitmaps of one image: recorded, stored, changed, and what a crash leaves of them.

use std::rc::Rc;

use liveblk_engine::ErrorKind;
use liveblk_engine::address::GuestRange;
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::driver::sim::{Sim, SimConfig};
use liveblk_engine::executor::Core;
use liveblk_engine::format::{BitmapInfo, StoredBitmaps, ZeroMode};
use liveblk_engine::storage::{Memory, Storage};

use super::mover::{Disk, calm, file, open};
use crate::qcow2::{CreateOptions, check, create};

pub(super) fn bitmaps(disk: &Disk) -> Rc<dyn StoredBitmaps> {
    disk.format.abilities().bitmaps.expect("qcow2 has bitmaps")
}

/// The dirty ranges of a bitmap as (offset, length).
pub(super) fn runs(bits: &DirtyBitmap) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(run) = bits.next_dirty_range(from, u64::MAX) {
        found.push((run.start.bytes(), run.len));
        from = run.end().bytes();
    }
    found
}

pub(super) fn info(name: &str, granularity: u64, enabled: bool) -> BitmapInfo {
    BitmapInfo { name: name.into(), granularity, enabled, in_use: false, inconsistent: false }
}

async fn image(core: &Core, options: CreateOptions) -> (Storage, Disk) {
    let storage = Storage::Memory(Memory::new(0));
    create(core, &storage, options).await.expect("is created");
    let disk = open(core, storage.clone(), true).await.expect("opens");
    (storage, disk)
}

async fn clean(core: &Core, storage: &Storage) {
    let report = check(core, storage).await.expect("is checked");
    assert!(report.is_clean(), "{:?}", report.problems);
}

#[test]
fn writes_are_recorded_in_enabled_bitmaps_of_any_granularity_and_stored_at_close() {
    calm(|core| async move {
        let (storage, disk) = image(&core, CreateOptions::new(64 << 20)).await;
        let set = bitmaps(&disk);
        assert_eq!(set.default_granularity(), 65536);
        set.add("coarse", 65536, true).await.expect("is added");
        set.add("fine", 512, true).await.expect("is added");
        set.add("off", 4096, false).await.expect("is added");
        disk.write(70_000, &[1; 1000]).await.expect("writes");
        assert!(set.list().iter().all(|info| info.in_use == info.enabled && !info.inconsistent));
        disk.zero(1 << 20, 131_072, ZeroMode::Unmap).await.expect("zeroes");
        disk.zero(2 << 20, 65_536, ZeroMode::Discard).await.expect("discards");
        disk.write(70_100, &[2; 100]).await.expect("writes in place");
        let expected = [(65536, 65536), (1 << 20, 131_072), (2 << 20, 65536)];
        assert_eq!(runs(&set.load("coarse").await.expect("loads")), expected);
        disk.format.close().await.expect("closes");
        clean(&core, &storage).await;
        let again = open(&core, storage.clone(), true).await.expect("opens");
        let set = bitmaps(&again);
        let wanted =
            [info("coarse", 65536, true), info("fine", 512, true), info("off", 4096, false)];
        assert_eq!(set.list(), wanted);
        assert_eq!(runs(&set.load("coarse").await.expect("loads")), expected);
        let fine = [(69632, 1536), (1 << 20, 131_072), (2 << 20, 65536)];
        assert_eq!(runs(&set.load("fine").await.expect("loads")), fine);
        assert!(set.load("off").await.expect("loads").is_clean());
        again.write(63 << 20, &[3; 512]).await.expect("writes");
        again.format.set_writable(false).await.expect("is stored");
        assert_eq!(set.list(), wanted);
        assert!(set.load("fine").await.expect("loads").test(63 << 20));
        again.format.close().await.expect("closes");
        clean(&core, &storage).await;
    });
}

#[test]
fn a_bitmap_is_cleared_disabled_enabled_merged_replaced_and_removed() {
    calm(|core| async move {
        let (storage, disk) = image(&core, CreateOptions::new(64 << 20)).await;
        let set = bitmaps(&disk);
        set.add("a", 65536, true).await.expect("is added");
        disk.write(0, &[1; 512]).await.expect("writes");
        set.set_enabled("a", false).await.expect("is disabled");
        assert_eq!(set.list(), [info("a", 65536, false)]);
        disk.write(1 << 20, &[1; 512]).await.expect("writes");
        assert_eq!(runs(&set.load("a").await.unwrap()), [(0, 65536)], "it missed nothing it had");
        set.set_enabled("a", true).await.expect("is enabled");
        disk.write(2 << 20, &[1; 512]).await.expect("writes");
        let bits = set.load("a").await.unwrap();
        assert_eq!(runs(&bits), [(0, 65536), (2 << 20, 65536)]);
        set.clear("a").await.expect("is cleared");
        assert!(set.load("a").await.unwrap().is_clean());
        disk.write(3 << 20, &[1; 512]).await.expect("writes");
        set.add("b", 1 << 20, false).await.expect("is added");
        set.merge("b", set.load("a").await.unwrap()).await.expect("merges");
        set.merge("b", bits).await.expect("merges");
        let merged = [(0, 1 << 20), (2 << 20, 2 << 20)];
        assert_eq!(runs(&set.load("b").await.unwrap()), merged);
        let mut all = DirtyBitmap::new(64 << 20, 1 << 20);
        all.set_all();
        set.store("c", all.clone(), false).await.expect("is stored");
        let mut one = DirtyBitmap::new(64 << 20, 512);
        one.set_range(GuestRange::new(5 << 20, 1));
        set.store("b", one, true).await.expect("is replaced");
        disk.format.close().await.expect("closes");
        clean(&core, &storage).await;
        let disk = open(&core, storage.clone(), true).await.expect("opens");
        let set = bitmaps(&disk);
        assert_eq!(runs(&set.load("a").await.unwrap()), [(3 << 20, 65536)]);
        assert_eq!(runs(&set.load("b").await.unwrap()), [(5 << 20, 512)]);
        assert_eq!(set.load("c").await.unwrap(), all, "without a data cluster");
        for name in ["b", "a", "c"] {
            set.remove(name).await.expect("is removed");
        }
        assert_eq!(set.list(), []);
        disk.format.close().await.expect("closes");
        clean(&core, &storage).await;
        let buf = core.pool().alloc(96);
        storage.read(0, buf.clone()).await.unwrap();
        assert_eq!(buf.to_vec()[88..96], [0; 8], "no autoclear bit without bitmaps");
    });
}

#[test]
fn refusals_have_the_peers_words() {
    calm(|core| async move {
        let (_, disk) = image(&core, CreateOptions::new(64 << 20)).await;
        let set = bitmaps(&disk);
        set.add("b0", 65536, false).await.expect("is added");
        let long = "x".repeat(1024);
        let refused = [
            (set.add("b0", 65536, true).await, "Bitmap already exists: b0"),
            (set.add("b1", 100, true).await, "Granularity must be power of 2 and at least 512"),
            (set.add("b1", 256, true).await, "Granularity must be power of 2 and at least 512"),
            (set.add("b1", 4 << 30, true).await, "Granularity exceeds maximum (2147483648 bytes)"),
            (set.add("", 512, true).await, "Bitmap name cannot be empty"),
            (set.add(&long, 512, true).await, "Name length exceeds maximum (1023 characters)"),
            (set.remove("nn").await, "Dirty bitmap 'nn' not found"),
            (set.clear("nn").await, "Dirty bitmap 'nn' not found"),
            (set.set_enabled("nn", true).await, "Dirty bitmap 'nn' not found"),
            (
                set.merge("b0", DirtyBitmap::new(32 << 20, 65536)).await,
                "Bitmaps are of different sizes (destination size is 67108864, source size is \
                 33554432) and can't be merged",
            ),
        ];
        for (result, text) in refused {
            assert_eq!(result.expect_err("is refused").to_string(), text);
        }
        disk.format.set_writable(false).await.expect("is read-only");
        let error = set.remove("b0").await.expect_err("is read-only");
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        let (_, large) = image(&core, CreateOptions::new(16 << 40)).await;
        let error = bitmaps(&large).add("b", 2048, true).await.expect_err("too fine");
        let text = "Too much space will be occupied by the bitmap. Use larger granularity";
        assert_eq!(error.to_string(), text);
        let (_, old) =
            image(&core, CreateOptions { version: 2, ..CreateOptions::new(1 << 20) }).await;
        let error = bitmaps(&old).add("b", 65536, true).await.expect_err("version 2");
        assert_eq!(error.to_string(), "Cannot store dirty bitmaps in qcow2 v2 files");
        old.write(0, &[1; 512]).await.expect("writes go on");
    });
}

/// Row Q12: a crash with a persistent bitmap leaves one that is listed as inconsistent, and that
/// can be removed and made anew.
#[test]
fn after_a_crash_a_bitmap_that_missed_writes_is_inconsistent_and_removable() {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.block_on(0, |core| async move {
        let storage = file(&core, "/image", true).await;
        create(&core, &storage, CreateOptions::new(64 << 20)).await.expect("is created");
        let disk = open(&core, storage, true).await.expect("opens");
        let set = bitmaps(&disk);
        set.add("on", 65536, true).await.expect("is added");
        set.add("off", 65536, false).await.expect("is added");
        disk.format.close().await.expect("closes");
        let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
        assert_eq!(bitmaps(&disk).list(), [info("on", 65536, true), info("off", 65536, false)]);
    });
    let mut sim = Sim::with_fs(SimConfig::new(2).calm(), sim.kill());
    sim.block_on(0, |core| async move {
        let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
        let known = [info("on", 65536, true), info("off", 65536, false)];
        assert_eq!(bitmaps(&disk).list(), known, "nothing was written");
        disk.write(0, &[1; 512]).await.expect("writes");
    });
    let mut sim = Sim::with_fs(SimConfig::new(3).calm(), sim.crash().after_power_cut(1));
    sim.block_on(0, |core| async move {
        let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
        let set = bitmaps(&disk);
        let lost = BitmapInfo { in_use: true, inconsistent: true, ..info("on", 65536, true) };
        assert_eq!(set.list(), [lost, info("off", 65536, false)]);
        let text = "Bitmap 'on' is inconsistent and cannot be used\n\
                    Try block-dirty-bitmap-remove to delete this bitmap from disk";
        let source = DirtyBitmap::new(64 << 20, 65536);
        let refused = [
            set.load("on").await.map(drop),
            set.clear("on").await,
            set.set_enabled("on", false).await,
            set.merge("on", source.clone()).await,
            set.store("on", source, true).await,
            disk.format.resize(128 << 20).await,
        ];
        for result in refused {
            assert_eq!(result.expect_err("is refused").to_string(), text);
        }
        let text = "Bitmap already exists: on";
        assert_eq!(set.add("on", 65536, true).await.expect_err("is there").to_string(), text);
        disk.write(0, &[2; 512]).await.expect("writes go on");
        set.remove("on").await.expect("is removed");
        set.add("on", 65536, true).await.expect("is made anew");
        disk.write(1 << 20, &[2; 512]).await.expect("writes");
        disk.format.close().await.expect("closes");
        let storage = file(&core, "/image", false).await;
        clean(&core, &storage).await;
        let disk = open(&core, storage, false).await.expect("opens");
        assert_eq!(runs(&bitmaps(&disk).load("on").await.unwrap()), [(1 << 20, 65536)]);
    });
}

#[test]
fn resizing_keeps_the_bits_that_stay_and_adds_clean_ones() {
    calm(|core| async move {
        let options = CreateOptions { cluster_size: 512, ..CreateOptions::new(3 << 20) };
        let (storage, disk) = image(&core, options).await;
        let set = bitmaps(&disk);
        let mut all = DirtyBitmap::new(3 << 20, 512);
        all.set_all();
        set.store("all", all, true).await.expect("is stored");
        set.add("some", 512, true).await.expect("is added");
        set.add("off", 4096, false).await.expect("is added");
        disk.write(1000, &[1; 100]).await.expect("writes");
        for size in [5_u64 << 20, (3 << 20) + 512, 1 << 20, 64 << 20, 2 << 20] {
            disk.format.resize(size).await.expect("is resized");
            let kept = size.min(1 << 20).max(if size > 1 << 20 { 0 } else { size });
            let bits = set.load("all").await.expect("loads");
            assert_eq!(bits.size(), size);
            assert!(bits.next_clean(0) >= kept.min(1 << 20), "{size}");
            assert_eq!(runs(&set.load("some").await.unwrap())[0], (512, 1024));
        }
        let bits = set.load("all").await.expect("loads");
        assert_eq!(runs(&bits), [(0, 1 << 20)], "what was cut off does not come back");
        disk.write((2 << 20) - 512, &[1; 512]).await.expect("writes");
        disk.format.close().await.expect("closes");
        clean(&core, &storage).await;
        let disk = open(&core, storage, false).await.expect("opens");
        let set = bitmaps(&disk);
        let some = [(512, 1024), ((2 << 20) - 512, 512)];
        assert_eq!(runs(&set.load("some").await.unwrap()), some);
        let all = [(0, 1 << 20), ((2 << 20) - 512, 512)];
        assert_eq!(runs(&set.load("all").await.unwrap()), all);
        assert_eq!(set.load("off").await.unwrap().size(), 2 << 20);
    });
}

#[test]
fn directories_and_tables_span_many_small_clusters_and_refcount_blocks() {
    calm(|core| async move {
        let options =
            CreateOptions { cluster_size: 512, refcount_order: 6, ..CreateOptions::new(8 << 30) };
        let (storage, disk) = image(&core, options).await;
        let set = bitmaps(&disk);
        // 4,096 table entries: 64 clusters, more than one refcount block counts.
        set.add("fine", 512, true).await.expect("is added");
        for number in 0..40 {
            let name = format!("{number}-{}", "n".repeat(number * 25));
            set.add(&name, 1 << 20, number % 2 == 0).await.expect("is added");
        }
        disk.write((8 << 30) - 4096, &[1; 4096]).await.expect("writes");
        disk.format.close().await.expect("closes");
        clean(&core, &storage).await;
        let disk = open(&core, storage.clone(), true).await.expect("opens");
        let set = bitmaps(&disk);
        let list = set.list();
        assert_eq!(list.len(), 41);
        assert_eq!(runs(&set.load("fine").await.unwrap()), [((8 << 30) - 4096, 4096)]);
        for info in list.iter().skip(1) {
            let dirty = !set.load(&info.name).await.unwrap().is_clean();
            assert_eq!(dirty, info.enabled, "{}", info.name);
        }
        for info in list {
            set.remove(&info.name).await.expect("is removed");
        }
        disk.format.close().await.expect("closes");
        clean(&core, &storage).await;
    });
}

#[test]
fn a_sparse_bitmap_of_16_tib_takes_little_room_in_memory_and_in_the_file() {
    calm(|core| async move {
        let (storage, disk) = image(&core, CreateOptions::new(16 << 40)).await;
        let set = bitmaps(&disk);
        set.add("b", 4096, true).await.expect("is added");
        for step in 0..16_u64 {
            disk.write(step << 40, &[1; 512]).await.expect("writes");
        }
        let mut most = DirtyBitmap::new(16 << 40, 4096);
        most.set_range(GuestRange::new(1 << 30, 15 << 40));
        set.store("most", most.clone(), false).await.expect("is stored");
        disk.format.close().await.expect("closes");
        assert!(storage.size() < 16 << 20, "the file has {} bytes", storage.size());
        let disk = open(&core, storage, false).await.expect("opens");
        let bits = bitmaps(&disk).load("b").await.expect("loads");
        assert_eq!(bits.count(), 16);
        assert_eq!(bitmaps(&disk).load("most").await.expect("loads"), most);
    });
}

#[test]
fn a_change_while_writes_are_in_flight_loses_none_of_them() {
    use liveblk_engine::format::WriteStep;
    calm(|core| async move {
        let (storage, disk) = image(&core, CreateOptions::new(64 << 20)).await;
        let set = bitmaps(&disk);
        let begin = async |at: u64| loop {
            match disk.format.begin_write(GuestRange::new(at, 512)).expect("begins") {
                WriteStep::Miss(miss) => disk.format.load(miss).await.expect("loads"),
                WriteStep::Ready(piece) => return piece,
                WriteStep::Wait(_) => panic!("nobody else writes"),
            }
        };
        let before_add = begin(0).await;
        set.add("b", 65536, true).await.expect("is added");
        assert!(set.list()[0].in_use, "a write is in flight");
        let before_clear = begin(1 << 20).await;
        drop(before_add.guard);
        set.clear("b").await.expect("is cleared");
        assert!(set.load("b").await.unwrap().is_clean());
        before_clear.guard.complete();
        assert_eq!(runs(&set.load("b").await.unwrap()), [(1 << 20, 65536)]);
        let before_enable = begin(2 << 20).await;
        set.add("c", 65536, false).await.expect("is added");
        set.set_enabled("c", true).await.expect("is enabled");
        before_enable.guard.complete();
        assert_eq!(runs(&set.load("c").await.unwrap()), [(2 << 20, 65536)]);
        let size = storage.size().next_multiple_of(65536) + 65536;
        storage.truncate(size).await.unwrap();
        disk.format.close().await.expect("closes");
        let disk = open(&core, storage, false).await.expect("opens");
        assert!(bitmaps(&disk).list().iter().all(|info| !info.in_use));
    });
}
