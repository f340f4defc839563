//! Copies by shared blocks between qcow2 and raw images: what is shared, what guests, power cuts
//! and failures leave. The copy loop's own part is in `jobs/tests/in_process/sharing.rs`.

use std::rc::Rc;

use crate::chains::{Act, Chain, Layer, SIZE, compare, fresh};
use crate::rig::{Log, content, disk, first_difference, gone, options};
use liveblk_engine::driver::sim::{FaultRule, OpFilter, Sim, SimConfig, SimOpKind};
use liveblk_engine::executor::Core;
use liveblk_engine::graph::{Graph, OpenNode};
use liveblk_engine::node::{DetectZeroes, Node};
use liveblk_jobs::{
    BackupOptions, BackupSpec, CommitSpec, CopyMode, Job, JobCounters, JobManager, MirrorSpec,
    Status, StreamSpec, StreamTo, SyncMode, Verb, start_backup, start_commit, start_mirror,
    start_stream,
};

const CLUSTER: u64 = 64 << 10;

fn world(seed: u64) -> Sim {
    let mut config = SimConfig::new(seed);
    config.fs.shares = true;
    Sim::new(config)
}

/// A raw base full of data, an overlay with a third of it, and one with a few clusters.
fn layers() -> Vec<Layer> {
    let layer = |raw, acts| Layer { raw, size: SIZE, cluster: CLUSTER, acts };
    vec![
        layer(true, vec![Act::Write(0, SIZE, 0x11)]),
        layer(false, vec![Act::Write(SIZE / 3 / CLUSTER * CLUSTER, SIZE / 3, 0x22)]),
        layer(false, vec![Act::Write(0, 4 * CLUSTER, 0x33), Act::Zero(8 * CLUSTER, CLUSTER)]),
    ]
}

/// Bytes of the granules in which some layer of `chain` has data of its own above the base.
async fn above_base(top: &Rc<Node>, layers: u32) -> u64 {
    use liveblk_engine::node::StatusKind;
    let runs = top.block_status(0, SIZE).await.expect("known");
    let own = |run: &&liveblk_engine::node::StatusExtent| {
        run.kind == StatusKind::Data && run.depth < layers
    };
    runs.iter().filter(own).map(|run| run.len).sum()
}

async fn mirror_of(core: &Core, d: &Rc<Node>, t: &Rc<Node>) -> Rc<Job> {
    let spec = MirrorSpec {
        job: options("j"),
        source: d.clone(),
        target: t.clone(),
        sync: SyncMode::Full,
        copy_mode: CopyMode::Background,
        granularity: None,
        allow_larger_target: false,
        more: Default::default(),
    };
    let job = start_mirror(spec).await.expect("it starts");
    let manager = JobManager::of(core);
    manager.until("j", |status| status == Status::Ready).await;
    manager.job_verb("j", Verb::Complete).expect("completes");
    gone(core, "j").await;
    job
}

fn backup(source: &Rc<Node>, target: &Rc<Node>) -> BackupSpec {
    BackupSpec {
        job: options("j"),
        source: source.clone(),
        target: target.clone(),
        sync: SyncMode::Full,
        allow_larger_target: false,
        compress: false,
        more: BackupOptions { use_copy_range: true, ..BackupOptions::default() },
    }
}

fn stream(node: &Rc<Node>) -> StreamSpec {
    StreamSpec {
        job: options("j"),
        node: node.clone(),
        to: StreamTo::End,
        backing_file: None,
        mask_protocol: false,
        filter_name: None,
    }
}

fn commit(device: &Rc<Node>, top: &Rc<Node>, base: &Rc<Node>) -> CommitSpec {
    CommitSpec {
        job: options("j"),
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

async fn raw_target(core: &Core, path: &str) -> Rc<Node> {
    let spec = OpenNode::new("raw", path).named("raw-target");
    Graph::of(core).open(spec).await.expect("it opens")
}

#[test]
fn a_chain_is_mirrored_into_raw_and_qcow2_without_a_byte_in_memory() {
    for seed in 0..4 {
        let mut sim = world(seed);
        sim.fs().create("/raw", &vec![0xee; usize::try_from(SIZE).expect("small")]);
        sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &layers(), false).await;
            let d = chain.top();
            let first = content(&d).await;
            let raw = seed % 2 == 0;
            let t = if raw { raw_target(&core, "/raw").await } else { fresh(&core, "t").await };
            let job = mirror_of(&core, &d, &t).await;
            assert_eq!(first_difference(&content(&t).await, &first), None);
            let moved = JobCounters { copied: 0, shared: SIZE - CLUSTER };
            assert_eq!(job.counters(), moved, "seed {seed}");
        });
    }
}

#[test]
fn a_stream_fills_its_layer_by_sharing_what_lies_below() {
    let mut sim = world(10);
    sim.block_on(0, |core| async move {
        let layers = layers();
        let chain = Chain::make(&core, &layers, false).await;
        let d = chain.top();
        let (first, own) = (content(&d).await, above_base(&d, 1).await);
        let guest = disk(&d);
        let job = start_stream(stream(&d)).await.expect("it starts");
        gone(&core, "j").await;
        let moved = JobCounters { copied: 0, shared: SIZE - CLUSTER - own };
        assert_eq!(job.counters(), moved);
        assert!(!d.has_backing());
        chain.reopen_and_compare(&first, guest).await;
    });
}

#[test]
fn a_commit_brings_its_layers_into_the_base_by_sharing() {
    for seed in 20..24 {
        let mut sim = world(seed);
        sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &layers(), false).await;
            let (d, active) = (chain.top(), seed % 2 == 0);
            let guest = disk(&d);
            let top = if active { chain.top() } else { chain.node(1) };
            let first = content(&d).await;
            let own = above_base(&top, if active { 2 } else { 1 }).await;
            let job = start_commit(commit(&d, &top, &chain.node(0))).await.expect("it starts");
            if active {
                let manager = JobManager::of(&core);
                manager.until("j", |status| status == Status::Ready).await;
                manager.job_verb("j", Verb::Complete).expect("completes");
            }
            gone(&core, "j").await;
            assert_eq!(job.counters(), JobCounters { copied: 0, shared: own }, "seed {seed}");
            assert_eq!(first_difference(&content(&guest.node()).await, &first), None);
        });
    }
}

#[test]
fn compressed_copies_and_nodes_that_look_for_zeroes_get_their_bytes() {
    for looks in [true, false] {
        let mut sim = world(30);
        sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &layers(), false).await;
            let d = chain.top();
            let first = content(&d).await;
            let t = fresh(&core, "t").await;
            let mut spec = backup(&d, &t);
            if looks {
                let detect_zeroes = DetectZeroes::On;
                t.set_options(liveblk_engine::node::NodeOptions { detect_zeroes, ..t.options() });
            } else {
                spec.compress = true;
            }
            let job = start_backup(spec).await.expect("it starts");
            gone(&core, "j").await;
            assert_eq!(job.counters(), JobCounters { copied: SIZE - CLUSTER, shared: 0 });
            assert_eq!(first_difference(&content(&t).await, &first), None);
        });
    }
}

#[test]
fn a_power_cut_after_the_end_leaves_the_whole_copy() {
    for seed in 40..52 {
        let mut sim = world(seed);
        let layers = layers();
        let made = layers.clone();
        let first = sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &made, false).await;
            let d = chain.top();
            let first = content(&d).await;
            if seed % 2 == 0 {
                start_stream(stream(&d)).await.expect("it starts");
            } else {
                start_commit(commit(&d, &chain.node(1), &chain.node(0))).await.expect("it starts");
            }
            gone(&core, "j").await;
            first
        });
        let mut sim = Sim::with_fs(SimConfig::new(seed), sim.crash());
        sim.block_on(0, |core| async move { compare(&core, &layers, 2, &first).await });
    }
}

#[test]
fn a_power_cut_at_any_moment_leaves_what_guests_see() {
    for seed in 60..76 {
        let mut sim = world(seed);
        let layers = layers();
        let made = layers.clone();
        let first = sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &made, false).await;
            let d = chain.top();
            let first = content(&d).await;
            if seed % 2 == 0 {
                start_stream(stream(&d)).await.expect("it starts");
            } else {
                start_commit(commit(&d, &chain.node(1), &chain.node(0))).await.expect("it starts");
            }
            core.sleep(core.random() % 3_000_000).await;
            first
        });
        let mut sim = Sim::with_fs(SimConfig::new(seed), sim.crash());
        sim.block_on(0, |core| async move { compare(&core, &layers, 2, &first).await });
    }
}

/// The place in the target is given back, and the copy takes another one or fails as a copy.
#[test]
fn a_clone_that_fails_leaves_no_corruption_and_is_copied() {
    for seed in 90..98 {
        let mut sim = world(seed);
        let errno = [28, 5, 22, 95][usize::try_from(seed % 4).expect("small")];
        let share = OpFilter::any().kind(SimOpKind::Share);
        sim.inject(FaultRule::once(share, errno).after(seed % 3));
        sim.block_on(0, |core| async move {
            let layers = layers();
            let chain = Chain::make(&core, &layers, false).await;
            let d = chain.top();
            let first = content(&d).await;
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            let job = start_stream(stream(&d)).await.expect("it starts");
            gone(&core, "j").await;
            guests.stop().await;
            assert!(job.counters().copied > 0, "seed {seed}");
            assert_eq!(log.failures.get(), 0);
            chain.reopen_and_compare(&log.model(0, &first), guest).await;
        });
    }
}
