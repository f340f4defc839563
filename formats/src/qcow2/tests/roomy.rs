//! Room ahead of the allocator: how often it is made, and what a full disk, a crash and a close
//! leave of it.

use liveblk_engine::driver::sim::{Sim, SimConfig, SimFs};
use liveblk_engine::executor::Core;
use liveblk_engine::storage::Storage;

use super::mover::{Disk, file, open};
use super::peer::check_exported;
use crate::qcow2::{CreateOptions, check, create};

const CLUSTER: u64 = 65536;
const MIB: u64 = 1 << 20;

fn world() -> Sim {
    let sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/image", &[]);
    sim
}

async fn image(core: &Core, size: u64) -> (Disk, Storage) {
    let storage = file(core, "/image", false).await;
    create(core, &storage, CreateOptions::new(size)).await.expect("is created");
    (open(core, storage.clone(), true).await.expect("opens"), storage)
}

/// Opens what a crash left, and demands the data and a file without anything behind it.
fn after_crash(fs: SimFs, written: u64) {
    let before = fs.size("/image").unwrap();
    check_exported(&fs, "/image");
    let mut sim = Sim::with_fs(SimConfig::new(2).calm(), fs);
    sim.block_on(0, |core| async move {
        let storage = file(&core, "/image", false).await;
        let disk = open(&core, storage.clone(), true).await.expect("opens");
        assert!(storage.size() <= before);
        for at in 0..written {
            let bytes = disk.read(at * CLUSTER, CLUSTER).await.expect("reads");
            assert!(bytes.iter().all(|byte| *byte == 7), "cluster {at}");
        }
        let end = storage.size();
        disk.write(written * CLUSTER, &[8; CLUSTER as usize]).await.expect("writes");
        disk.format.close().await.expect("closes");
        assert!(storage.size() <= end + 2 * CLUSTER, "nothing was skipped");
        let report = check(&core, &storage).await.expect("is checked");
        assert_eq!(report.corruptions, 0, "{:?}", report.problems);
    });
    check_exported(&sim.fs(), "/image");
}

#[test]
fn room_is_made_in_few_steps_that_grow_with_the_file_and_is_cut_off_at_close() {
    let mut sim = world();
    sim.block_on(0, |core| async move {
        let clusters = 64 * MIB / CLUSTER;
        let (disk, storage) = image(&core, 1 << 30).await;
        let (mut calls, mut size, mut ahead) = (0, storage.size(), 0);
        for at in 0..clusters {
            disk.write(at * CLUSTER, &[7; CLUSTER as usize]).await.expect("writes");
            let used = (at + 6) * CLUSTER;
            if storage.size() > size && storage.size() > used {
                calls += 1;
            }
            size = storage.size();
            ahead += u64::from(size > used);
        }
        assert!(calls <= 60, "{calls} calls for {clusters} clusters");
        assert!(ahead > clusters * 9 / 10, "{ahead} of {clusters} writes found room");
        assert!(storage.size() > 64 * MIB + 2 * MIB, "an eighth ahead");
        disk.format.close().await.expect("closes");
        // Header, refcount table, block, L1 and one L2 table.
        assert_eq!(storage.size(), (clusters + 5) * CLUSTER);
    });
    check_exported(&sim.fs(), "/image");
}

#[test]
fn what_a_kill_or_a_power_cut_leaves_of_the_room_is_cut_off_by_the_next_open() {
    let mut sim = world();
    sim.block_on(0, |core| async move {
        let (disk, storage) = image(&core, 1 << 30).await;
        for at in 0..200 {
            disk.write(at * CLUSTER, &[7; CLUSTER as usize]).await.expect("writes");
        }
        disk.format.flush().await.expect("is durable");
        assert!(storage.size() > 210 * CLUSTER, "there is room ahead");
    });
    after_crash(sim.fs().after_kill(), 200);
    for seed in 0..6 {
        after_crash(sim.fs().after_power_cut(seed), 200);
    }
}

#[test]
fn on_a_full_disk_writes_take_exactly_what_they_need() {
    let mut written = Vec::new();
    for spare in [3, 40, 400] {
        let mut sim = world();
        let disk = sim.block_on(0, |core| async move { image(&core, 1 << 30).await.0 });
        sim.fs().set_capacity(Some(sim.fs().used() + spare * CLUSTER));
        let count = sim.block_on(0, |_| async move {
            let mut count = 0;
            while disk.write(count * CLUSTER, &[7; CLUSTER as usize]).await.is_ok() {
                count += 1;
            }
            count
        });
        assert!(count + 3 >= spare && count <= spare, "{count} of {spare}");
        sim.fs().set_capacity(None);
        written.push(count);
    }
    assert_eq!(written.len(), 3);
}

#[test]
fn what_is_not_zero_behind_the_last_cluster_is_left_alone() {
    let mut sim = world();
    sim.block_on(0, |core| async move {
        let (disk, storage) = image(&core, 1 << 30).await;
        disk.write(0, &[7; CLUSTER as usize]).await.expect("writes");
        disk.format.close().await.expect("closes");
        let end = storage.size();
        let foreign = core.pool().alloc(512);
        foreign.fill(3);
        storage.write(end + MIB, foreign, false).await.expect("writes");
        let disk = open(&core, storage.clone(), true).await.expect("opens");
        assert_eq!(storage.size(), end + MIB + 512, "somebody else's");
        disk.write(CLUSTER, &[7; CLUSTER as usize]).await.expect("writes");
        disk.format.close().await.expect("closes");
        assert!(storage.size() >= end + MIB + 512);
    });
}
