//! A read that is on its way keeps the clusters that it reads, whatever happens to the mapping.

use std::rc::Rc;

use crate::chains::{self, Act, Layer};
use crate::simulated::{CLUSTER, LEN, expect, host, inspect, make, open, write};
use liveblk::engine::driver::sim::{HoldPoint, OpFilter, Sim, SimConfig, SimOpKind};
use liveblk::engine::format::ReferencePolicy;
use liveblk::engine::node::Origin;
use liveblk::engine::storage::{File, FileOptions, Storage};
use liveblk::formats::qcow2::check;
use liveblk::{Host, WriteFlags};

#[test]
fn a_freed_cluster_is_neither_punched_nor_reused_under_a_read() {
    for seed in 0..40 {
        let mut sim = Sim::new(SimConfig::new(seed));
        let disk = sim.block_on(0, |core| async move {
            make(&core, "/a", 64).await;
            let disk = open(&host(&core), "/a").await;
            write(&disk, 0, LEN, 1).await.expect("a write");
            disk.flush().await.expect("a flush");
            disk
        });
        let reads = OpFilter::any().file("/a").kind(SimOpKind::Read);
        let hold = sim.hold_some(reads, HoldPoint::Start, 1);
        let buf = disk.core().pool().zeroed(LEN);
        let reading = disk.read(0, buf.clone());
        sim.run_for(1_000_000);
        assert_eq!(hold.held(), 1, "the read has resolved its cluster");
        let others = disk.clone();
        sim.block_on(0, |_| async move {
            others.discard(0, CLUSTER, false).await.expect("a discard");
            for cluster in 1..30 {
                // Unlinked and durable after the first of these flushes.
                others.flush().await.expect("a flush");
                write(&others, cluster * CLUSTER, LEN, 3).await.expect("a write beside");
            }
            expect(&others, 0, LEN, 0).await;
            others.flush().await.expect("a flush");
        });
        let before = image_end(&sim);
        hold.release();
        sim.block_on(0, |_| reading).expect("the read");
        assert!(buf.to_vec().iter().all(|byte| *byte == 1), "seed {seed}: what it had resolved");
        // Now the cluster is free: the next allocations take it before the image grows.
        let others = disk.clone();
        sim.block_on(0, |_| async move {
            for cluster in 30..62 {
                others.flush().await.expect("a flush");
                write(&others, cluster * CLUSTER, LEN, 4).await.expect("a write");
            }
            others.flush().await.expect("a flush");
            for cluster in 1..62 {
                expect(&others, cluster * CLUSTER, LEN, if cluster < 30 { 3 } else { 4 }).await;
            }
        });
        let grown = image_end(&sim) - before;
        assert!(grown < 32 * CLUSTER, "seed {seed}: the freed cluster was taken again: {grown}");
        let (_, leaks) = inspect(sim.fs().after_power_cut(seed), "/a");
        assert!(leaks <= 1, "seed {seed}");
    }
}

/// The same through a chain whose reads know the place and ask the layer nothing: it becomes
/// writable while they are on their way, and frees what they read.
#[test]
fn a_read_by_a_known_place_keeps_its_cluster_when_the_layer_becomes_writable() {
    let layer = |acts| Layer { raw: false, size: chains::SIZE, cluster: CLUSTER, acts };
    let layers = [layer(vec![Act::Write(0, 16 * CLUSTER, 1)]), layer(vec![]), layer(vec![])];
    for seed in 0..20 {
        let mut sim = Sim::new(SimConfig::new(seed));
        let layers = layers.clone();
        let (chain, disk) = sim.block_on(0, |core| async move {
            let chain = chains::Chain::make(&core, &layers, true).await;
            let disk = Host::on(&core, ReferencePolicy::Any).attach(&chain.top()).expect("free");
            for _ in 0..3 {
                expect(&disk, 0, LEN, 1).await;
            }
            (chain, disk)
        });
        let before = chain.top().chain_stats();
        let hold = sim.hold_some(OpFilter::any().kind(SimOpKind::Read), HoldPoint::Start, 1);
        let buf = disk.core().pool().zeroed(LEN);
        let reading = disk.read(0, buf.clone());
        sim.run_for(1_000_000);
        assert_eq!(hold.held(), 1, "the read is at the file");
        let after = chain.top().chain_stats();
        assert_eq!(
            (after.placed, after.probes),
            (before.placed + 1, before.probes),
            "by its place"
        );
        let (base, others) = (chain.node(0), disk.clone());
        let writer = Rc::clone(&base);
        sim.block_on(0, |core| async move {
            base.set_writable(true).await.expect("is reopened");
            base.discard(0, CLUSTER, Origin::External).await.expect("a discard");
            for cluster in 16..60 {
                // Unlinked and durable after the first of these flushes.
                base.flush(Origin::External).await.expect("a flush");
                let buf = core.pool().alloc(LEN);
                buf.fill(3);
                let write =
                    base.write(cluster * CLUSTER, buf, WriteFlags::default(), Origin::External);
                write.await.expect("a write beside");
            }
            expect(&others, 0, LEN, 0).await;
            expect(&others, 59 * CLUSTER, LEN, 3).await;
        });
        hold.release();
        sim.block_on(0, |_| reading).expect("the read");
        assert!(buf.to_vec().iter().all(|byte| *byte == 1), "seed {seed}: what it had resolved");
        drop((writer, disk));
    }
}

/// The end of the last cluster that is counted, whatever room the file has behind it.
fn image_end(sim: &Sim) -> u64 {
    let mut copy = Sim::with_fs(SimConfig::new(0).calm(), sim.fs().after_kill());
    copy.block_on(0, |core| async move {
        let options = FileOptions { path: "/a".into(), ..FileOptions::default() };
        let storage = Storage::File(File::open(&core, options).await.expect("the file is there"));
        check(&core, &storage).await.expect("the image can be checked").image_end_offset
    })
}
