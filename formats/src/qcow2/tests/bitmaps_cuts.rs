//! Bitmaps under power cuts and failing storage: a bitmap that is trusted afterwards never lies.

use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::driver::sim::{Sim, SimConfig, SimFs};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::storage::{Memory, Storage};
use liveblk_engine::{ErrorKind, Result};

use super::bitmaps::{bitmaps, runs};
use super::mover::{Disk, file, open};
use crate::qcow2::{CreateOptions, check, create};

const SIZE: u64 = 4 << 20;

/// Bitmaps of the image that every run begins with: the second half of "kept" is dirty.
async fn image(core: &Core, storage: &Storage, cluster_size: u64) {
    let options = CreateOptions { cluster_size, ..CreateOptions::new(SIZE) };
    create(core, storage, options).await.expect("is created");
    let disk = open(core, storage.clone(), true).await.expect("opens");
    let set = bitmaps(&disk);
    disk.write(0, &[1; 300_000]).await.expect("writes");
    let mut half = DirtyBitmap::new(SIZE, 4096);
    half.set_range(GuestRange::new(SIZE / 2, SIZE / 2));
    set.store("kept", half, true).await.expect("is stored");
    set.add("fine", 512, true).await.expect("is added");
    set.add("gone", 65536, true).await.expect("is added");
    set.add("off", 65536, false).await.expect("is added");
    disk.format.close().await.expect("closes");
}

/// Writes, and every kind of change of the bitmaps.
async fn script(disk: &Disk) -> Vec<Result<()>> {
    let set = bitmaps(disk);
    let mut results = vec![disk.write(4096, &[2; 512]).await];
    results.push(disk.write(1_000_000, &[2; 70_000]).await);
    results.push(disk.format.flush().await);
    results.push(set.remove("gone").await);
    results.push(disk.write(2_000_000, &[2; 512]).await);
    results.push(set.set_enabled("fine", false).await);
    results.push(set.set_enabled("off", true).await);
    results.push(set.add("new", 4096, true).await);
    results.push(disk.write(3_000_000, &[2; 512]).await);
    results.push(disk.format.resize(SIZE + (1 << 20)).await);
    results.push(disk.write(SIZE, &[2; 512]).await);
    results.push(disk.format.close().await);
    results
}

/// What differs from the beginning must be dirty in each bitmap that was enabled all the time and
/// is trusted; the bits that were there stay.
async fn judge(core: &Core, storage: Storage, context: &str) {
    let report = check(core, &storage).await.expect("is checked");
    assert_eq!(report.corruptions, 0, "{context}: {:?}", report.problems);
    let disk = open(core, storage, true).await.expect("opens");
    let set = bitmaps(&disk);
    let list = set.list();
    for name in ["kept", "off"] {
        assert!(list.iter().any(|info| info.name == name), "{context}: {name} is gone");
    }
    for info in list {
        if info.inconsistent {
            assert!(set.load(&info.name).await.is_err(), "{context}");
            assert!(info.enabled, "{context}: {} never recorded", info.name);
            set.remove(&info.name).await.expect("is removable");
            continue;
        }
        let bits = set.load(&info.name).await.expect("is readable");
        assert_eq!(bits.size(), disk.format.size(), "{context}");
        if info.name == "kept" {
            assert!(bits.next_clean(SIZE / 2) >= SIZE, "{context}: {:?}", runs(&bits));
            let written = [(4096, 512), (1_000_000, 70_000), (2_000_000, 512), (3_000_000, 512)];
            for (at, len) in written {
                for at in (at..at + len).step_by(512) {
                    let bytes = disk.read(at, 1).await.expect("reads");
                    assert!(bytes != [2] || bits.test(at), "{context}: {at} was missed");
                }
            }
            if disk.format.size() > SIZE {
                let bytes = disk.read(SIZE, 1).await.expect("reads");
                assert!(bytes != [2] || bits.test(SIZE), "{context}: the new part was missed");
            }
        }
    }
    disk.write(0, &[3; 512]).await.expect("the image goes on");
    disk.format.close().await.expect("closes");
    let report = check(core, disk.format.data_storage()).await.expect("is checked");
    assert_eq!(report.corruptions, 0, "{context}: {:?}", report.problems);
}

fn start(cluster_size: u64) -> SimFs {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/image", &[]);
    sim.block_on(0, move |core| async move {
        let storage = file(&core, "/image", false).await;
        image(&core, &storage, cluster_size).await;
    });
    sim.crash()
}

/// Reliability §3, row "power cut", bitmap store; and rows Q12, R9.
#[test]
fn a_cut_at_any_step_leaves_no_bitmap_that_lies() {
    for cluster_size in [512, 65536] {
        let start = start(cluster_size);
        let mut steps = 1;
        loop {
            let mut sim = Sim::with_fs(SimConfig::new(steps).calm(), start.after_kill());
            let core = sim.core(0);
            let task = core.clone();
            drop(core.spawn(Class::Guest, async move {
                let storage = file(&task, "/image", false).await;
                let disk = open(&task, storage, true).await.expect("opens");
                for result in script(&disk).await {
                    result.expect("nothing fails");
                }
            }));
            let ended = !sim.run_steps(steps);
            for seed in 0..2 {
                let left = sim.fs().after_power_cut(seed);
                let mut after = Sim::with_fs(SimConfig::new(seed).calm(), left);
                after.block_on(0, move |core| async move {
                    let storage = file(&core, "/image", false).await;
                    judge(&core, storage, &format!("{cluster_size}: cut after {steps}")).await;
                });
            }
            if ended {
                assert!(steps > 100, "the script has many steps: {steps}");
                break;
            }
            steps += if cluster_size == 512 { 7 } else { 3 };
        }
    }
}

/// The N-th failure of any write: out of space is undone, an error of the device poisons; either
/// way no bitmap lies afterwards.
#[test]
fn a_failure_of_any_write_leaves_no_bitmap_that_lies() {
    for errno in [28, 5] {
        let mut nth = 0;
        loop {
            let mut sim = Sim::new(SimConfig::new(1).calm());
            let failed = sim.block_on(0, move |core| async move {
                let memory = Memory::new(0);
                let storage = Storage::Memory(Rc::clone(&memory));
                image(&core, &storage, 4096).await;
                let disk = open(&core, storage.clone(), true).await.expect("opens");
                memory.plant_fault(Some((nth, errno)));
                let mut results = script(&disk).await;
                memory.plant_fault(None);
                let failed = results.iter().any(Result::is_err);
                if errno == 28 {
                    results.retain(Result::is_err);
                    for error in results.into_iter().filter_map(Result::err) {
                        let known = [ErrorKind::NoSpace, ErrorKind::ReadOnly, ErrorKind::NotFound];
                        let known = known.contains(&error.kind())
                            || error.kind() == ErrorKind::OutOfRange
                            || error.kind() == ErrorKind::Poisoned
                            || error.to_string().contains("inconsistent");
                        assert!(known, "write {nth}: {error}");
                    }
                }
                judge(&core, storage, &format!("errno {errno} at write {nth}")).await;
                failed
            });
            if !failed {
                assert!(nth > 40, "the script has many writes: {nth}");
                break;
            }
            nth += 1;
        }
    }
}
