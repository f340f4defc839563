//! Every step of every kind of write is held back in turn, its receipt is dropped, and meanwhile
//! others write, discard and flush, and so reuse what was freed: the write still takes place as a
//! whole, at its place, and nothing else changes (rows Q7, R4 and R15 of the fault catalogue).

use crate::simulated::{CLUSTER, LEN, expect, host, inspect, make, open, read, write};
use liveblk::engine::buf::Buf;
use liveblk::engine::driver::sim::{HoldPoint, OpFilter, Sim, SimConfig};
use liveblk::engine::executor::Class;
use liveblk::engine::format::SnapshotInfo;
use liveblk::engine::node::{Receipt, ZeroFlags};
use liveblk::{Disk, WriteFlags};

/// Clusters of the disk; the first `KEPT` are written and flushed, with 1.
const CLUSTERS: u64 = 64;
const KEPT: u64 = 8;

/// A write whose steps are held: what it does, and what the disk's bytes are afterwards.
struct Case {
    name: &'static str,
    /// Whether the disk is in a snapshot, so that all that it has is shared.
    shared: bool,
    start: fn(&Disk) -> Receipt,
    /// The range that changes, in bytes, and its value.
    range: (u64, u64),
    byte: u8,
}

fn filled(disk: &Disk, len: u64, byte: u8) -> Buf {
    let buf = disk.core().pool().alloc(usize::try_from(len).expect("a small buffer"));
    buf.fill(byte);
    buf
}

fn plain(disk: &Disk, at: u64, len: u64) -> Receipt {
    disk.write(at, filled(disk, len, 2), WriteFlags::default())
}

const HALF: u64 = CLUSTER / 2;

const CASES: [Case; 10] = [
    Case {
        name: "in place",
        shared: false,
        start: |disk| plain(disk, 0, CLUSTER),
        range: (0, CLUSTER),
        byte: 2,
    },
    Case {
        name: "a new cluster",
        shared: false,
        start: |disk| plain(disk, 40 * CLUSTER, CLUSTER),
        range: (40 * CLUSTER, CLUSTER),
        byte: 2,
    },
    Case {
        name: "a part of a new cluster, and of the next",
        shared: false,
        start: |disk| plain(disk, 40 * CLUSTER + HALF, CLUSTER),
        range: (40 * CLUSTER + HALF, CLUSTER),
        byte: 2,
    },
    Case {
        name: "forced to the disk",
        shared: false,
        start: |disk| {
            let flags = WriteFlags { fua: true, ..WriteFlags::default() };
            disk.write(40 * CLUSTER, filled(disk, CLUSTER, 2), flags)
        },
        range: (40 * CLUSTER, CLUSTER),
        byte: 2,
    },
    Case {
        name: "a part of a shared cluster",
        shared: true,
        start: |disk| plain(disk, HALF, HALF / 2),
        range: (HALF, HALF / 2),
        byte: 2,
    },
    Case {
        name: "shared clusters and new ones",
        shared: true,
        start: |disk| plain(disk, (KEPT - 2) * CLUSTER, 4 * CLUSTER),
        range: ((KEPT - 2) * CLUSTER, 4 * CLUSTER),
        byte: 2,
    },
    Case {
        name: "compressed",
        shared: false,
        start: |disk| {
            let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
            disk.write(CLUSTER, filled(disk, 2 * CLUSTER, 2), flags)
        },
        range: (CLUSTER, 2 * CLUSTER),
        byte: 2,
    },
    Case {
        name: "zeroes",
        shared: false,
        start: |disk| disk.write_zeroes(HALF, 2 * CLUSTER, ZeroFlags::default()),
        range: (HALF, 2 * CLUSTER),
        byte: 0,
    },
    Case {
        name: "zeroes that may unmap",
        shared: false,
        start: |disk| {
            let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
            disk.write_zeroes(0, 2 * CLUSTER, flags)
        },
        range: (0, 2 * CLUSTER),
        byte: 0,
    },
    Case {
        name: "a discard",
        shared: false,
        start: |disk| disk.discard(CLUSTER, 2 * CLUSTER, true),
        range: (CLUSTER, 2 * CLUSTER),
        byte: 0,
    },
];

fn world(seed: u64, shared: bool) -> (Sim, Disk) {
    let mut sim = Sim::new(SimConfig::new(seed));
    let disk = sim.block_on(0, move |core| async move {
        make(&core, "/a", CLUSTERS).await;
        let disk = open(&host(&core), "/a").await;
        for cluster in 0..KEPT {
            write(&disk, cluster * CLUSTER, LEN, 1).await.expect("a write");
        }
        disk.flush().await.expect("a flush");
        if shared {
            let snapshots = disk.node().format().abilities().snapshots.expect("qcow2 has them");
            let info = SnapshotInfo { name: "s".into(), ..SnapshotInfo::default() };
            snapshots.create(info).await.expect("a snapshot");
        }
        disk
    });
    (sim, disk)
}

/// What others do meanwhile: frees, flushes, and writes that take what was freed.
async fn others(disk: Disk) {
    for round in 0..3 {
        disk.discard((3 + round) * CLUSTER, CLUSTER, false).await.expect("a discard");
        disk.flush().await.expect("a flush");
        for cluster in 0..4 {
            let at = 12 + round * 4 + cluster;
            write(&disk, at * CLUSTER, LEN, 3).await.expect("a write beside");
        }
    }
    disk.flush().await.expect("a flush");
}

/// The bytes of the disk when all has ended.
fn expected(case: &Case) -> Vec<u8> {
    let mut bytes = vec![0; LEN * CLUSTERS as usize];
    let mut set = |at: u64, len: u64, byte: u8| {
        bytes[at as usize..(at + len) as usize].fill(byte);
    };
    set(0, KEPT * CLUSTER, 1);
    set(3 * CLUSTER, 3 * CLUSTER, 0);
    set(12 * CLUSTER, 12 * CLUSTER, 3);
    set(case.range.0, case.range.1, case.byte);
    bytes
}

/// Holds operation `nth` of the case; false if it does not have so many.
fn hold(case: &Case, seed: u64, point: HoldPoint, nth: u64) -> bool {
    let (mut sim, disk) = world(seed, case.shared);
    let hold = sim.hold_nth(OpFilter::any().file("/a"), point, nth);
    drop((case.start)(&disk));
    sim.run_for(1_000_000);
    let met = hold.held() == 1;
    let beside = disk.core().spawn(Class::Guest, others(disk.clone()));
    // Those who need what is held wait for it; the rest goes on.
    sim.run_for(50_000_000);
    hold.release();
    let looker = disk.clone();
    sim.block_on(0, |_| async move {
        beside.await;
        expect(&looker, (CLUSTERS - 1) * CLUSTER, LEN, 0).await;
    });
    sim.run_idle();
    let again = disk.clone();
    let found = sim.block_on(0, |_| async move {
        again.flush().await.expect("a flush");
        read(&again, 0, LEN * CLUSTERS as usize).await
    });
    let what = format!("{}, seed {seed}, {point:?} of operation {nth}", case.name);
    assert!(found == expected(case), "{what}: not what was written");
    let (bytes, _) = inspect(sim.fs().after_power_cut(seed), "/a");
    assert!(bytes == expected(case), "{what}: flushed data is gone");
    met
}

#[test]
fn a_write_held_at_any_step_ends_whole_while_others_reuse_what_was_freed() {
    let mut steps = 0;
    for case in &CASES {
        for (seed, point) in [(1, HoldPoint::Start), (2, HoldPoint::Completion)] {
            let mut nth = 0;
            while hold(case, seed, point, nth) {
                nth += 1;
            }
            assert!(nth > 0 || case.byte == 0, "{}: no operation was held", case.name);
            steps += nth;
        }
    }
    println!("{steps} steps held");
    assert!(steps > 40, "{steps}");
}
