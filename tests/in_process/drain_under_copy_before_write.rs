//! A drain of source and target together while a guest write waits for its old content to be
//! copied: the copy passes the closed gate of the target, because the drain waits for the write
//! that waits for the copy.

use std::cell::Cell;
use std::rc::Rc;

use crate::simulated::{CLUSTER, LEN, host, make, open, write};
use liveblk::engine::driver::sim::{HoldPoint, OpFilter, Sim, SimConfig, SimOpKind};
use liveblk::engine::executor::Class;
use liveblk::engine::graph::{CutPart, Graph, Swap, cut};
use liveblk::jobs::{BackupSpec, JobOptions, SyncMode, start_backup};
use liveblk::{Disk, Node};

/// Clusters of the disks.
const CLUSTERS: u64 = 320;

fn part(node: &Rc<Node>) -> CutPart {
    CutPart {
        core: node.core().id(),
        nodes: vec![node.id()],
        flush: true,
        before_swap: None,
        swap: Swap::Local(Box::new(|_: &Rc<Graph>| {})),
    }
}

/// A source full of 1 under backup to a target, whose node is returned too.
fn world(seed: u64) -> (Sim, Disk, Rc<Node>) {
    let mut sim = Sim::new(SimConfig::new(seed));
    let (disk, target) = sim.block_on(0, |core| async move {
        let host = host(&core);
        make(&core, "/source", CLUSTERS).await;
        make(&core, "/target", CLUSTERS).await;
        let disk = open(&host, "/source").await;
        let target = open(&host, "/target").await.node();
        let len = usize::try_from(CLUSTERS).expect("small") * LEN;
        write(&disk, 0, len, 1).await.expect("a write");
        let spec = BackupSpec {
            job: JobOptions::new("job"),
            source: disk.node(),
            target: Rc::clone(&target),
            sync: SyncMode::Full,
            allow_larger_target: false,
            compress: false,
            more: Default::default(),
        };
        start_backup(spec).await.expect("a backup");
        (disk, target)
    });
    (sim, disk, target)
}

/// Drains both nodes `steps` steps after the backup began, guests writing.
fn run(seed: u64, steps: u64) {
    let (mut sim, disk, target) = world(seed);
    let writes = OpFilter::any().file("/target").kind(SimOpKind::Write);
    let hold = sim.hold_some(writes, HoldPoint::Start, 3);
    let left = Rc::new(Cell::new(8));
    for number in 0..8 {
        let (disk, left) = (disk.clone(), Rc::clone(&left));
        drop(sim.core(0).spawn(Class::Guest, async move {
            let offset = (number * 37 + 40) * CLUSTER;
            write(&disk, offset, LEN, 2).await.expect("a guest write");
            left.set(left.get() - 1);
        }));
    }
    sim.run_steps(steps);
    let (source, core) = (disk.node(), sim.core(0));
    let parts = vec![part(&source), part(&target)];
    let drained = core.spawn(Class::Guest, cut(&core, parts, 10_000_000_000));
    sim.run_for(2_000_000);
    hold.release();
    let drained = sim.block_on(0, |_| drained);
    drained.unwrap_or_else(|error| panic!("seed {seed} step {steps}: no drain: {error}"));
    sim.run_until(|| left.get() == 0);
    let manager = host(&sim.core(0));
    sim.block_on(0, |_| async move { manager.jobs().until("job", |_| false).await });
    let bytes = sim.block_on(0, |core| async move {
        let buf = core.pool().alloc(usize::try_from(CLUSTERS).expect("small") * LEN);
        let read = target.read(0, buf.clone(), liveblk::engine::node::Origin::External);
        read.await.expect("a read of the target");
        buf.to_vec()
    });
    assert!(bytes.iter().all(|byte| *byte == 1), "seed {seed} step {steps}: the backup is wrong");
}

#[test]
fn a_drain_of_both_ends_while_a_copy_is_waited_for() {
    for seed in 0..2 {
        for steps in (0..40).map(|step| step * 7) {
            run(seed, steps);
        }
    }
}
