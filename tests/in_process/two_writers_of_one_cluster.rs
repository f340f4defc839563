//! Two writers of one cluster that has no space yet: one allocates, the other waits for it, and
//! both writes are in the one cluster, also when the first fails.

use crate::simulated::{expect, host, inspect, make, open};
use liveblk::WriteFlags;
use liveblk::engine::driver::sim::{FaultRule, HoldPoint, OpFilter, Sim, SimConfig, SimOpKind};

const HALF: usize = 2048;

fn world(seed: u64) -> (Sim, liveblk::Disk) {
    let mut sim = Sim::new(SimConfig::new(seed));
    let disk = sim.block_on(0, |core| async move {
        make(&core, "/a", 16).await;
        let disk = open(&host(&core), "/a").await;
        // The tables exist, so that the next write to the file is data.
        crate::simulated::write(&disk, 8 * crate::simulated::CLUSTER, 512, 9)
            .await
            .expect("a write");
        disk.flush().await.expect("a flush");
        disk
    });
    (sim, disk)
}

fn half(disk: &liveblk::Disk, index: u64, byte: u8) -> liveblk::engine::node::Receipt {
    let buf = disk.core().pool().alloc(HALF);
    buf.fill(byte);
    disk.write(index * HALF as u64, buf, WriteFlags::default())
}

#[test]
fn both_writes_land_in_one_cluster() {
    for seed in 0..40 {
        let (mut sim, disk) = world(seed);
        let data = OpFilter::any().file("/a").kind(SimOpKind::Write);
        let hold = sim.hold_some(data, HoldPoint::Completion, 1);
        let first = half(&disk, 0, 1);
        sim.run_for(1_000_000);
        assert_eq!(hold.held(), 1);
        let second = half(&disk, 1, 2);
        sim.run_for(5_000_000);
        let looker = disk.clone();
        sim.block_on(0, |_| async move {
            expect(&looker, 0, 2 * HALF, 0).await;
            looker.flush().await.expect("a flush");
        });
        let (bytes, _) = inspect(sim.fs().after_power_cut(seed), "/a");
        assert!(bytes[..2 * HALF].iter().all(|byte| *byte == 0), "neither is visible yet");
        hold.release();
        let looker = disk.clone();
        sim.block_on(0, |_| async move {
            first.await.expect("the first write");
            second.await.expect("the second write");
            expect(&looker, 0, HALF, 1).await;
            expect(&looker, HALF as u64, HALF, 2).await;
            looker.flush().await.expect("a flush");
        });
        let (bytes, leaks) = inspect(sim.fs().after_power_cut(seed), "/a");
        assert!(bytes[..HALF].iter().all(|byte| *byte == 1));
        assert!(bytes[HALF..2 * HALF].iter().all(|byte| *byte == 2));
        assert_eq!(leaks, 0, "one cluster was enough");
    }
}

#[test]
fn the_second_allocates_when_the_first_fails() {
    const ENOSPC: i32 = 28;
    for seed in 0..40 {
        let (mut sim, disk) = world(seed);
        let data = OpFilter::any().file("/a").kind(SimOpKind::Write);
        sim.inject(FaultRule::once(data, ENOSPC));
        let (first, second) = (half(&disk, 0, 1), half(&disk, 1, 2));
        let looker = disk.clone();
        sim.block_on(0, |_| async move {
            first.await.expect_err("the first write fails");
            second.await.expect("the second write");
            expect(&looker, 0, HALF, 0).await;
            expect(&looker, HALF as u64, HALF, 2).await;
            looker.flush().await.expect("a flush");
        });
        let (bytes, _) = inspect(sim.fs().after_power_cut(seed), "/a");
        assert!(bytes[..HALF].iter().all(|byte| *byte == 0), "nothing of a failed write");
        assert!(bytes[HALF..2 * HALF].iter().all(|byte| *byte == 2));
    }
}
