//! Stream and commit of qcow2 and raw chains under guest writes, zeroes and discards.
use std::rc::Rc;

use crate::chains::{Chain, Layer, open, report};
use crate::rig::{Events, Log, content, disk, first_difference};
use liveblk_engine::node::{Node, StatusKind};
use liveblk_jobs::{
    BackupSpec, CommitSpec, JobManager, JobOptions, NewImageMode, SnapshotFile, Status, StreamSpec,
    StreamTo, SyncMode, Verb, snapshot_file, start_backup, start_commit, start_stream,
};

fn stream(node: &Rc<Node>, to: StreamTo) -> StreamSpec {
    StreamSpec {
        job: crate::rig::options("j"),
        node: node.clone(),
        to,
        backing_file: None,
        mask_protocol: false,
        filter_name: None,
    }
}

fn commit(device: &Rc<Node>, top: &Rc<Node>, base: &Rc<Node>, job: JobOptions) -> CommitSpec {
    CommitSpec {
        job,
        device: device.clone(),
        top: top.clone(),
        base: base.clone(),
        backing_file: None,
        mask_protocol: false,
        filter_name: None,
        copy_mode: Default::default(),
        converge: None,
    }
}

const COMPLETE: [&str; 7] =
    ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"];

#[test]
fn a_chain_under_writes_is_flattened() {
    for seed in 0..12 {
        let mut sim = crate::rig::world(seed);
        let layers = if seed % 3 == 0 { Layer::over_raw() } else { Layer::usual(seed) };
        sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &layers, seed % 2 == 0).await;
            let d = chain.top();
            let first = content(&d).await;
            let events = Events::of(&core);
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            let to = match seed % 4 {
                0 => StreamTo::End,
                1 => StreamTo::Base(chain.node(0)),
                2 => StreamTo::Bottom(chain.node(1)),
                _ => StreamTo::Base(chain.node(1)),
            };
            start_stream(stream(&d, to)).await.expect("it starts");
            crate::rig::gone(&core, "j").await;
            assert_eq!(events.words(), COMPLETE, "{:?}", report(&core));
            guests.stop().await;
            assert_eq!(log.failures.get(), 0);
            assert_eq!(first_difference(&content(&d).await, &log.model(0, &first)), None);
            let below = d.backing().map(|node| node.id());
            let wanted = match seed % 4 {
                0 => None,
                3 => Some(chain.node(1).id()),
                _ => Some(chain.node(0).id()),
            };
            assert_eq!(below, wanted, "seed {seed}");
            let reference = d.info().backing.map(|backing| backing.file);
            assert_eq!(reference, d.backing().map(|node| node.filename()));
            chain.reopen_and_compare(&log.model(0, &first), guest).await;
        });
    }
}

#[test]
fn an_intermediate_layer_is_filled_below_a_guest() {
    for seed in 20..30 {
        let mut sim = crate::rig::world(seed);
        sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &Layer::usual(seed), true).await;
            let (d, c) = (chain.top(), chain.node(2));
            let first = content(&d).await;
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            let to = if seed % 2 == 0 { StreamTo::End } else { StreamTo::Base(chain.node(0)) };
            start_stream(stream(&c, to)).await.expect("it starts");
            crate::rig::gone(&core, "j").await;
            guests.stop().await;
            assert!(!c.is_writable(), "the layer is what it was");
            assert_eq!(log.failures.get(), 0);
            assert_eq!(first_difference(&content(&d).await, &log.model(0, &first)), None);
            chain.reopen_and_compare(&log.model(0, &first), guest).await;
        });
    }
}

#[test]
fn zero_clusters_stay_zero() {
    let mut sim = crate::rig::quick_world(40);
    sim.block_on(0, |core| async move {
        let chain = Chain::make(&core, &Layer::zeroes(), true).await;
        let d = chain.top();
        let first = content(&d).await;
        start_stream(stream(&d, StreamTo::Base(chain.node(0)))).await.expect("it starts");
        crate::rig::gone(&core, "j").await;
        assert_eq!(first_difference(&content(&d).await, &first), None);
        let runs = d.block_status(0, d.size()).await.expect("known");
        let own = runs.iter().filter(|run| run.top());
        assert!(own.clone().count() > 0, "the layer hides the base");
        assert!(own.clone().all(|run| run.kind == StatusKind::Zero), "{runs:?}");
    });
}

#[test]
fn layers_under_a_writing_guest_are_committed() {
    for seed in 50..66 {
        let mut sim = crate::rig::world(seed);
        let layers = if seed % 3 == 0 { Layer::over_raw() } else { Layer::usual(seed) };
        sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &layers, seed % 2 == 0).await;
            let d = chain.top();
            let (top, base) = match seed % 4 {
                0 => (2, 0),
                1 => (2, 1),
                _ => (1, 0),
            };
            let (top, base) = (chain.node(top), chain.node(base));
            let writable = base.is_writable();
            let first = content(&d).await;
            let events = Events::of(&core);
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            let spec = commit(&d, &top, &base, crate::rig::options("j"));
            start_commit(spec).await.expect("it starts");
            crate::rig::gone(&core, "j").await;
            assert_eq!(events.words(), COMPLETE, "{:?}", report(&core));
            guests.stop().await;
            assert_eq!(log.failures.get(), 0);
            assert_eq!(base.is_writable(), writable, "the base is what it was");
            assert_eq!(first_difference(&content(&d).await, &log.model(0, &first)), None);
            chain.reopen_and_compare(&log.model(0, &first), guest).await;
        });
    }
}

#[test]
fn the_layer_that_a_guest_writes_is_committed_and_the_guest_goes_on_below() {
    for seed in 80..100 {
        let mut sim = crate::rig::world(seed);
        let layers = if seed % 3 == 0 { Layer::over_raw() } else { Layer::usual(seed) };
        sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &layers, seed % 2 == 0).await;
            let d = chain.top();
            let base = chain.node(if seed % 5 == 0 { 1 } else { 0 });
            let first = content(&d).await;
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            let spec = commit(&d, &d, &base, crate::rig::options("j"));
            start_commit(spec).await.expect("it starts");
            let manager = JobManager::of(&core);
            manager.until("j", |status| status == Status::Ready).await;
            core.sleep(core.random() % 2_000_000).await;
            if seed % 4 == 3 {
                manager.block_job_verb("j", Verb::Cancel, seed % 8 == 3).expect("cancels");
            } else {
                manager.job_verb("j", Verb::Complete).expect("completes");
            }
            crate::rig::gone(&core, "j").await;
            core.sleep(1_000_000).await;
            guests.stop().await;
            assert_eq!(log.failures.get(), 0);
            let at = if seed % 4 == 3 { d.name() } else { base.name() };
            assert_eq!(guest.node_name(), at);
            let now = log.model(0, &first);
            assert_eq!(first_difference(&content(&guest.node()).await, &now), None);
            chain.reopen_and_compare(&now, guest).await;
        });
    }
}

#[test]
fn a_cancelled_job_leaves_the_chain_as_it_is_seen_and_nothing_in_use() {
    for seed in 110..126 {
        let mut sim = crate::rig::world(seed);
        sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &Layer::usual(seed), seed % 2 == 0).await;
            let d = chain.top();
            let first = content(&d).await;
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 2);
            let slow = JobOptions { speed: 1 << 20, ..crate::rig::options("j") };
            let (c, a) = (chain.node(2), chain.node(0));
            match seed % 4 {
                0 => {
                    drop(start_stream(StreamSpec { job: slow, ..stream(&d, StreamTo::End) }).await)
                }
                1 => {
                    drop(start_stream(StreamSpec { job: slow, ..stream(&c, StreamTo::End) }).await)
                }
                2 => drop(start_commit(commit(&d, &c, &a, slow)).await),
                _ => drop(start_commit(commit(&d, &d, &a, slow)).await),
            }
            let manager = JobManager::of(&core);
            core.sleep(core.random() % 3_000_000).await;
            assert!(manager.find("j").is_some(), "it runs");
            let asked = core.now();
            manager.job_verb("j", Verb::Cancel).expect("cancels");
            crate::rig::gone(&core, "j").await;
            assert!(core.now() - asked < 1_000_000_000, "null within a second");
            guests.stop().await;
            core.sleep(2_000_000_000).await;
            assert!(!c.is_writable() && !a.is_writable(), "{:?}", report(&core));
            let now = log.model(0, &first);
            assert_eq!(first_difference(&content(&d).await, &now), None);
            // What was left is of use: the same job again, to its end.
            drop(start_stream(stream(&d, StreamTo::End)).await.expect("it starts"));
            crate::rig::gone(&core, "j").await;
            assert_eq!(first_difference(&content(&d).await, &now), None);
            drop(open(&core));
            chain.reopen_and_compare(&now, guest).await;
        });
    }
}

/// What is well defined runs: a snapshot, a backup and a mirror of the node that is filled.
#[test]
fn other_jobs_and_a_snapshot_of_the_node_run_beside_a_stream() {
    for seed in 130..142 {
        let mut sim = crate::rig::world(seed);
        sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &Layer::usual(seed), true).await;
            let d = chain.top();
            let first = content(&d).await;
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 2);
            let slow = JobOptions { speed: 4 << 20, ..crate::rig::options("j") };
            let spec = StreamSpec { job: slow, ..stream(&d, StreamTo::End) };
            start_stream(spec).await.expect("it starts");
            core.sleep(core.random() % 1_000_000).await;
            if seed % 2 == 0 {
                let snapshot = SnapshotFile {
                    node: "n3".into(),
                    file: "/over.img".into(),
                    overlay: Some("over".into()),
                    format: "qcow2".into(),
                    mode: NewImageMode::AbsolutePaths,
                };
                snapshot_file(&core, core.id(), snapshot).await.expect("it is taken");
                assert_eq!(&*guest.node_name(), "over");
            } else {
                let target = crate::chains::fresh(&core, "target").await;
                let spec = BackupSpec {
                    job: crate::rig::options("b"),
                    source: d.clone(),
                    target: target.clone(),
                    sync: SyncMode::Full,
                    allow_larger_target: false,
                    compress: false,
                    more: Default::default(),
                };
                let from = core.now();
                start_backup(spec).await.expect("it starts");
                let to = core.now();
                crate::rig::gone(&core, "b").await;
                let copy = content(&target).await;
                log.prove_instant(&[(0, &first, &copy)], from, to);
            }
            let manager = JobManager::of(&core);
            manager.set_speed("j", 0).expect("it runs");
            crate::rig::gone(&core, "j").await;
            core.sleep(1_000_000).await;
            guests.stop().await;
            assert_eq!(log.failures.get(), 0);
            assert!(d.backing().is_none(), "the stream stayed on its node");
            assert_eq!(d.is_writable(), seed % 2 != 0, "{:?}", report(&core));
            let now = log.model(0, &first);
            assert_eq!(first_difference(&content(&guest.node()).await, &now), None);
        });
    }
}
