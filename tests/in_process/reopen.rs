//! Reopening several nodes: all of the list or none, whatever operation fails.
//!
//! Every operation of a reopen is made to fail in turn. Afterwards the nodes are either all as they
//! were or all as asked, their guests still write and read what they wrote, and the images are
//! right on disk.
use std::rc::Rc;

use crate::simulated::{LEN, expect, host, inspect, make, open, write};
use liveblk::engine::driver::sim::{FaultRule, OpFilter, Sim, SimConfig};
use liveblk::engine::format::FormatOptions;
use liveblk::engine::graph::{Graph, NewBacking, Reopen};
use liveblk::engine::node::{DetectZeroes, NodeOptions};
use liveblk::{Disk, Node};

const CLUSTERS: u64 = 16;
const WAIT_NS: u64 = 10_000_000_000;

fn changed(node: &Rc<Node>, writable: bool, backing: NewBacking) -> Reopen {
    let options = NodeOptions { detect_zeroes: DetectZeroes::On, ..node.options() };
    let format_options = FormatOptions::new();
    Reopen { node: Rc::clone(node), writable, options, format_options, backing }
}

/// What a reopen changes, of both nodes.
fn state(nodes: [&Rc<Node>; 2]) -> [(bool, bool, bool); 2] {
    nodes.map(|node| {
        let found = node.options().detect_zeroes == DetectZeroes::On;
        (node.is_writable(), node.has_backing(), found)
    })
}

#[test]
fn a_reopen_that_fails_anywhere_leaves_every_node_as_it_was() {
    let (mut failed, mut done) = (0, 0);
    for step in 0..60 {
        let mut sim = Sim::new(SimConfig::new(step).calm());
        sim.block_on(0, |core| async move {
            for path in ["/a", "/b", "/c"] {
                make(&core, path, CLUSTERS).await;
            }
            let host = host(&core);
            let (a, b) = (open(&host, "/a").await, open(&host, "/b").await);
            write(&a, 0, LEN, 1).await.expect("a write");
            write(&b, 0, LEN, 2).await.expect("a write");
            b.flush().await.expect("a flush");
            drop((a, b));
            host.close().await.expect("the images close");
        });
        let (disk, b, below) = sim.block_on(0, |core| async move {
            let host = host(&core);
            let (a, b) = (open(&host, "/a").await, open(&host, "/b").await);
            let c = open(&host, "/c").await;
            write(&a, 4096, LEN, 3).await.expect("a write");
            write(&b, 4096, LEN, 4).await.expect("a write");
            (a, b.node(), c.node())
        });
        let a = disk.node();
        let was = state([&a, &b]);
        sim.inject(FaultRule::once(OpFilter::any(), 5).after(step));
        let list =
            vec![changed(&a, true, NewBacking::Link(below)), changed(&b, false, NewBacking::Keep)];
        let ended =
            sim.block_on(0, |core| async move { Graph::of(&core).reopen(list, WAIT_NS).await });
        let is = state([&a, &b]);
        let faults = sim.faults();
        sim.clear_faults();
        drop((a, b));
        match &ended {
            Ok(()) => {
                assert_eq!(is, [(true, true, true), (false, false, true)], "step {step}");
                done += 1;
            }
            Err(_) => {
                assert_eq!(is, was, "step {step}: {ended:?}");
                failed += 1;
            }
        }
        judge(&mut sim, disk, ended.is_err());
        if faults == 0 {
            break;
        }
    }
    assert!(failed > 0 && done > 0, "{failed} failed, {done} done");
}

/// The guest of the first node goes on; both images are right.
fn judge(sim: &mut Sim, disk: Disk, had_fault: bool) {
    sim.block_on(0, |core| async move {
        expect(&disk, 0, LEN, 1).await;
        expect(&disk, 4096, LEN, 3).await;
        // A flush that failed is remembered for good: then the image takes no more.
        let written = write(&disk, 8192, LEN, 5).await;
        let flushed = disk.flush().await;
        assert!(had_fault || (written.is_ok() && flushed.is_ok()), "{written:?} {flushed:?}");
        drop(disk);
        let closed = Graph::of(&core).close_all().await;
        assert!(had_fault || closed.is_ok(), "{closed:?}");
    });
    sim.run_idle();
    for path in ["/a", "/b"] {
        inspect(sim.fs(), path);
    }
}
