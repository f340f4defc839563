//! An overlay of the disk as the target of copy-before-write: who reads the overlay sees the
//! instant of the start, also a reader that was on its way through to the disk when a guest
//! overwrote it (contract.md §3.4: the peer's serialising writes).

use std::cell::Cell;
use std::rc::Rc;

use crate::simulated::{CLUSTER, LEN, host, make, open, write};
use liveblk::engine::driver::sim::{HoldPoint, OpFilter, Rng, Sim, SimConfig, SimOpKind};
use liveblk::engine::executor::Class;
use liveblk::engine::node::Origin;
use liveblk::jobs::{BackupSpec, JobOptions, SyncMode, start_backup};
use liveblk::{BackingSource, Disk, Node, OpenNode};

/// Clusters of the disks.
const CLUSTERS: u64 = 64;

/// Bytes of a unit of copy-before-write.
const GRANULE: u64 = 65536;

/// A disk full of 1 that is kept in an overlay of itself, and the overlay.
fn world(seed: u64) -> (Sim, Disk, Rc<Node>) {
    let mut sim = Sim::new(SimConfig::new(seed));
    let (disk, overlay) = sim.block_on(0, |core| async move {
        let host = host(&core);
        make(&core, "/source", CLUSTERS).await;
        make(&core, "/target", CLUSTERS).await;
        let disk = open(&host, "/source").await;
        let len = usize::try_from(CLUSTERS).expect("small") * LEN;
        write(&disk, 0, len, 1).await.expect("a write");
        let mut spec = OpenNode::new("qcow2", "/target").named("target");
        spec.backing = BackingSource::Node("source".into());
        let overlay = host.open(spec).await.expect("an overlay of a disk that is written");
        start_backup(BackupSpec {
            job: JobOptions::new("job"),
            source: disk.node(),
            target: Rc::clone(&overlay),
            sync: SyncMode::None,
            allow_larger_target: false,
            compress: false,
            more: Default::default(),
        })
        .await
        .expect("a backup");
        (disk, overlay)
    });
    (sim, disk, overlay)
}

async fn read_ones(node: Rc<Node>, offset: u64, len: usize) {
    let buf = node.core().pool().alloc(len);
    node.read(offset, buf.clone(), Origin::External).await.expect("a read");
    let wrong = buf.to_vec().iter().position(|byte| *byte != 1);
    assert_eq!(wrong, None, "a reader of the overlay saw what came later at {offset}");
}

#[test]
fn a_reader_on_its_way_to_the_disk_is_not_overtaken_by_a_guest() {
    for skip in 0..3 {
        let (mut sim, disk, overlay) = world(skip);
        let filter = OpFilter::any().file("/source").kind(SimOpKind::Read);
        let hold = sim.hold_nth(filter, HoldPoint::Start, skip);
        let core = sim.core(0);
        let len = usize::try_from(GRANULE).expect("small");
        let done = Rc::new(Cell::new(0));
        let seen = Rc::clone(&done);
        drop(core.spawn(Class::Guest, async move {
            read_ones(overlay, 0, len).await;
            seen.set(seen.get() + 1);
        }));
        sim.run_for(1_000_000);
        let seen = Rc::clone(&done);
        drop(core.spawn(Class::Guest, async move {
            write(&disk, 0, len, 2).await.expect("a guest write");
            seen.set(seen.get() + 1);
        }));
        sim.run_for(20_000_000);
        hold.release();
        sim.run_until(|| done.get() == 2);
    }
}

#[test]
fn readers_of_the_overlay_see_the_instant_under_random_writes() {
    for seed in 0..12 {
        let (mut sim, disk, overlay) = world(100 + seed);
        let left = Rc::new(Cell::new(6));
        for number in 0..6 {
            let (disk, overlay, left) = (disk.clone(), Rc::clone(&overlay), Rc::clone(&left));
            drop(sim.core(0).spawn(Class::Guest, async move {
                let mut rng = Rng::new(seed * 8 + number);
                for _ in 0..12 {
                    let at = rng.below(CLUSTERS - 4) * CLUSTER + rng.below(8) * 512;
                    let len = 512 + usize::try_from(rng.below(3 * CLUSTER)).expect("small");
                    if number < 3 {
                        write(&disk, at, len / 512 * 512, 2).await.expect("a guest write");
                    } else {
                        read_ones(Rc::clone(&overlay), at, len).await;
                    }
                }
                left.set(left.get() - 1);
            }));
        }
        sim.run_until(|| left.get() == 0);
    }
}
