//! Faults of the peer (contract §0), each as the sequence that shows it there.

use std::rc::Rc;

use liveblk_engine::driver::sim::{Sim, SimConfig};
use liveblk_engine::executor::Class;
use liveblk_engine::graph::{Graph, OpenNode};
use liveblk_engine::node::User;
use liveblk_jobs::{JobManager, Status};
use serde_json::json;

use crate::rig::{Events, content, first_difference};
use crate::world::{
    Op, SIZE, World, add, configure, find, gone, images, on, qmp, rig_latency, same,
};

/// P2: a snapshot of a node without a guest under its backup, then the end of the job in each way:
/// the peer aborts at its end.
#[test]
fn a_backup_ends_well_after_a_snapshot_of_its_unused_node() {
    let images = images();
    for end in ["cancel", "done"] {
        let mut config = SimConfig::new(2);
        config.latency = rig_latency();
        let mut sim = Sim::with_fs(config, images.after_power_cut(0));
        sim.block_on(0, move |core| async move {
            configure(&core);
            add(&core, "a", None).await;
            add(&core, "b", Some("a")).await;
            add(&core, "t", None).await;
            let events = Events::of(&core);
            let first = content(&find(&core, "b")).await;
            let backup = json!({"job-id": "j", "device": "b", "target": "t", "sync": "full",
                                "speed": 1});
            qmp(&core, "blockdev-backup", backup).await.expect("it starts");
            let snapshot = json!({"node-name": "b", "snapshot-file": "/s",
                                  "snapshot-node-name": "s"});
            qmp(&core, "blockdev-snapshot-sync", snapshot).await.expect("it is taken");
            if end == "cancel" {
                qmp(&core, "job-cancel", json!({"id": "j"})).await.expect("cancels");
            } else {
                let speed = json!({"device": "j", "speed": 0});
                qmp(&core, "block-job-set-speed", speed).await.expect("goes on");
            }
            gone(&core).await;
            assert_eq!(events.has("CANCELLED"), end == "cancel");
            if end != "cancel" {
                let copy = content(&find(&core, "t")).await;
                assert_eq!(first_difference(&copy, &first), None);
            }
            same(&content(&find(&core, "s")).await, &first, "the new layer");
            Graph::of(&core).close_all().await.expect("it closes");
        });
    }
}

/// P4: a larger size for an exported node that nobody is connected to; the peer dies.
/// P7: a snapshot of a node without any user; the peer's overlay vanishes at once.
#[test]
fn a_node_that_nobody_uses_takes_a_snapshot_and_a_new_size() {
    let images = images();
    on(&images, 3, |world: Rc<World>| async move {
        let core = world.core.clone();
        let snapshot = json!({"node-name": "t", "snapshot-file": "/sk",
                              "snapshot-node-name": "over"});
        qmp(&core, "blockdev-snapshot-sync", snapshot).await.expect("it is taken");
        core.sleep(1_000_000_000).await;
        assert_eq!(find(&core, "t").users(), [User::Overlay { node: "over".into() }]);
        let resize = json!({"node-name": "over", "size": 2 * SIZE});
        qmp(&core, "block_resize", resize).await.expect("it grows");
        assert_eq!(find(&core, "over").size(), 2 * SIZE);
        world.finish().await;
        world.prove("after it").await;
    });
}

/// P5 and P8: the end of everything with a job of each kind at work, which takes a minute there, or
/// aborts.
#[test]
fn quit_with_a_job_at_work_ends_at_once_and_leaves_right_images() {
    let images = images();
    for kind in Op::JOBS {
        for state in [Status::Running, Status::Paused, Status::Pending] {
            on(&images, 4, move |world: Rc<World>| async move {
                world.lead(kind, state, false).await;
                world.work(2).await;
                let asked = world.core.now();
                world.qmp("quit", json!({})).await.expect("is answered");
                assert!(world.core.now() - asked < 1_000_000_000, "{kind:?} {state}");
                assert!(JobManager::of(&world.core).query().is_empty());
                assert!(world.events.has("CANCELLED"), "{kind:?} {state}");
                assert_eq!(world.guest_is_at(), "d", "{kind:?} {state}: never a pivot");
                world.forget_copies();
                world.prove_images(&format!("{kind:?} {state}")).await;
            });
        }
    }
}

/// P9: an empty list of nodes to reopen.
#[test]
fn a_reopen_of_nothing_does_nothing() {
    let images = images();
    on(&images, 5, |world: Rc<World>| async move {
        world.qmp("blockdev-reopen", json!({"options": []})).await.expect("does nothing");
        world.finish().await;
        world.prove("after it").await;
    });
}

/// Row R18: the name of a new layer is there when the answer is, and what has the name is whole.
#[test]
fn a_new_layer_has_its_name_when_it_is_whole_and_keeps_it_through_a_power_cut() {
    let images = images();
    let mut config = SimConfig::new(6);
    config.latency = rig_latency();
    let mut sim = Sim::with_fs(config, images.after_power_cut(0));
    let world = sim.block_on(0, |core| async move { World::open(&core).await });
    let before = world.model();
    let answered = Rc::new(std::cell::Cell::new(false));
    let (told, core) = (Rc::clone(&answered), sim.core(0));
    drop(core.spawn(Class::Guest, async move {
        world.disk.flush().await.expect("flushed");
        world.try_op(Op::Snapshot, "k", "w").await.expect("it is taken");
        told.set(true);
        world.core.sleep(1_000_000_000).await;
    }));
    let mut seen = [0, 0];
    for cut in 0..400 {
        sim.run_steps(3);
        let told = answered.get();
        let fs = sim.fs().after_power_cut(cut);
        let named = fs.size("/sk").is_some();
        assert!(named || !told, "cut {cut}: the answer was given");
        seen[usize::from(named)] += 1;
        if named {
            let before = before.clone();
            let mut sim = Sim::with_fs(SimConfig::new(0).calm(), fs);
            sim.block_on(0, move |core| async move {
                configure(&core);
                let mut spec = OpenNode::new("qcow2", "/sk");
                spec.writable = false;
                let node = Graph::of(&core).open(spec).await.expect("it is whole");
                if told {
                    same(&content(&node).await, &before, &format!("cut {cut}"));
                }
            });
        }
        if told && seen[1] > 20 {
            break;
        }
    }
    assert!(seen[0] > 3 && seen[1] > 3, "{seen:?}");
}
