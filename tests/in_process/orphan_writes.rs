//! A client that goes away in the middle of a write: the write runs to its end, and what it writes
//! to belongs to it until then.

use crate::simulated::{CLUSTER, LEN, expect, host, inspect, make, open, write};
use liveblk::engine::buf::Buf;
use liveblk::engine::driver::sim::{HoldPoint, OpFilter, Sim, SimConfig, SimOpKind};
use liveblk::{Disk, WriteFlags};

fn filled(disk: &Disk, byte: u8) -> Buf {
    let buf = disk.core().pool().alloc(LEN);
    buf.fill(byte);
    buf
}

/// A world with an image of which cluster 0 is written (`1`) and flushed.
fn world(seed: u64) -> (Sim, Disk) {
    let mut sim = Sim::new(SimConfig::new(seed));
    let disk = sim.block_on(0, |core| async move {
        make(&core, "/a", 64).await;
        let disk = open(&host(&core), "/a").await;
        write(&disk, 0, LEN, 1).await.expect("a write");
        disk.flush().await.expect("a flush");
        disk
    });
    (sim, disk)
}

const POINTS: [HoldPoint; 2] = [HoldPoint::Start, HoldPoint::Completion];

#[test]
fn the_cluster_of_an_orphan_write_is_not_given_to_others() {
    for (seed, point) in (0..20).flat_map(|seed| POINTS.map(|point| (seed, point))) {
        let (mut sim, disk) = world(seed);
        let data = OpFilter::any().file("/a").kind(SimOpKind::Write);
        let hold = sim.hold_some(data, point, 1);
        drop(disk.write(0, filled(&disk, 2), WriteFlags::default()));
        sim.run_for(1_000_000);
        assert_eq!(hold.held(), 1, "the data of the orphan is on its way");
        // The client's last wish: the cluster goes away. Others take all space that is free.
        let discard = disk.discard(0, CLUSTER, false);
        let others = disk.clone();
        sim.block_on(0, |_| async move {
            for cluster in 1..20 {
                write(&others, cluster * CLUSTER, LEN, 3).await.expect("a write beside");
                others.flush().await.expect("a flush beside");
            }
        });
        hold.release();
        let looker = disk.clone();
        sim.block_on(0, |_| async move {
            discard.await.expect("the discard");
            expect(&looker, 0, LEN, 0).await;
            for cluster in 1..20 {
                expect(&looker, cluster * CLUSTER, LEN, 3).await;
            }
            looker.flush().await.expect("a flush");
        });
        inspect(sim.fs().after_power_cut(seed), "/a");
    }
}

#[test]
fn an_orphan_write_to_new_space_ends_and_shows() {
    for (seed, point) in (0..20).flat_map(|seed| POINTS.map(|point| (seed, point))) {
        let (mut sim, disk) = world(seed);
        let data = OpFilter::any().file("/a").kind(SimOpKind::Write);
        let hold = sim.hold_some(data, point, 1);
        drop(disk.write(CLUSTER, filled(&disk, 2), WriteFlags::default()));
        sim.run_for(1_000_000);
        assert_eq!(hold.held(), 1);
        let others = disk.clone();
        sim.block_on(0, |_| async move {
            expect(&others, CLUSTER, LEN, 0).await;
            for cluster in 2..20 {
                write(&others, cluster * CLUSTER, LEN, 3).await.expect("a write beside");
            }
            others.flush().await.expect("a flush beside");
        });
        let (bytes, _) = inspect(sim.fs().after_power_cut(seed), "/a");
        assert!(bytes[LEN..2 * LEN].iter().all(|byte| *byte == 0), "not visible before its end");
        assert!(bytes[2 * LEN..20 * LEN].iter().all(|byte| *byte == 3));
        hold.release();
        sim.run_idle();
        let looker = disk.clone();
        sim.block_on(0, |_| async move {
            expect(&looker, CLUSTER, LEN, 2).await;
            looker.flush().await.expect("a flush");
        });
        let (bytes, leaks) = inspect(sim.fs().after_power_cut(seed), "/a");
        assert!(bytes[LEN..2 * LEN].iter().all(|byte| *byte == 2));
        assert_eq!(leaks, 0);
    }
}
