//! Mirror and backup of qcow2 chains under guest writes, zeroes and discards.
use std::rc::Rc;

use crate::rig::{Log, SIZE, content, disk, first_difference};
use liveblk_engine::executor::Core;
use liveblk_engine::format::{CreateImage, ReferencePolicy};
use liveblk_engine::graph::{BackingSource, Graph, GraphConfig, OpenNode};
use liveblk_engine::node::{Node, Origin, StatusKind, WriteFlags, ZeroFlags};
use liveblk_engine::storage::{File, FileOptions, Storage};
use liveblk_jobs::{
    BackupOptions, BackupSpec, CopyMode, JobManager, MirrorSpec, Status, SyncMode, Verb,
    start_backup, start_mirror,
};

async fn image(core: &Core, name: &str, backing: Option<&str>) -> Rc<Node> {
    Graph::of(core).configure(GraphConfig {
        formats: liveblk_formats::registry(),
        policy: ReferencePolicy::Explicit,
        ..GraphConfig::default()
    });
    let path = format!("/{name}.qcow2");
    let options = FileOptions {
        path: path.clone().into(),
        writable: true,
        create_new: true,
        ..FileOptions::default()
    };
    let file = File::open(core, options).await.expect("a new file");
    let driver = liveblk_formats::registry().find("qcow2").expect("known");
    let create = CreateImage { size: SIZE, ..CreateImage::default() };
    driver.create(core.clone(), Storage::File(file), create).await.expect("an image");
    let mut spec = OpenNode::new("qcow2", path).named(name);
    spec.options.discard_unmap = true;
    spec.backing = match backing {
        Some(node) => BackingSource::Node(node.into()),
        None => BackingSource::None,
    };
    Graph::of(core).open(spec).await.expect("it opens")
}

async fn fill(node: &Rc<Node>, offset: u64, len: u64, byte: u8) {
    let buf = node.core().pool().alloc(len as usize);
    buf.fill(byte);
    node.write(offset, buf, WriteFlags::default(), Origin::External).await.expect("written");
}

/// a <- b <- d with data in each layer; in d also a zeroed and a discarded part.
async fn chain(core: &Core) -> Rc<Node> {
    let a = image(core, "a", None).await;
    fill(&a, 0, 1 << 20, 0xa1).await;
    let b = image(core, "b", Some("a")).await;
    fill(&b, 512 << 10, 1 << 20, 0xb2).await;
    let d = image(core, "d", Some("b")).await;
    fill(&d, 100_000, 200_000, 0xd3).await;
    d.write_zeroes(640 << 10, 128 << 10, ZeroFlags::default(), Origin::External)
        .await
        .expect("zeroed");
    d.discard(1 << 20, 128 << 10, Origin::External).await.expect("discarded");
    d
}

fn mirror(source: &Rc<Node>, target: &Rc<Node>, sync: SyncMode) -> MirrorSpec {
    MirrorSpec {
        job: crate::rig::options("j"),
        source: source.clone(),
        target: target.clone(),
        sync,
        copy_mode: CopyMode::Background,
        granularity: None,
        allow_larger_target: false,
        more: Default::default(),
    }
}

fn backup(source: &Rc<Node>, target: &Rc<Node>, sync: SyncMode) -> BackupSpec {
    BackupSpec {
        job: crate::rig::options("j"),
        source: source.clone(),
        target: target.clone(),
        sync,
        allow_larger_target: false,
        compress: false,
        more: BackupOptions { use_copy_range: true, ..BackupOptions::default() },
    }
}

/// Bytes of `node`'s own layer that hold data.
async fn own_data(node: &Rc<Node>) -> u64 {
    let runs = node.block_status(0, SIZE).await.expect("known");
    runs.iter().filter(|run| run.kind == StatusKind::Data && run.top()).map(|run| run.len).sum()
}

#[test]
fn a_chain_under_writes_is_mirrored_and_pivoted() {
    for seed in 0..10 {
        let mut sim = crate::rig::world(seed);
        sim.block_on(0, |core| async move {
            let d = chain(&core).await;
            let first = content(&d).await;
            let t = image(&core, "t", None).await;
            // Old content of the target must not shine through.
            fill(&t, 0, SIZE, 0xee).await;
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            start_mirror(mirror(&d, &t, SyncMode::Full)).await.expect("it starts");
            let manager = JobManager::of(&core);
            manager.until("j", |status| status == Status::Ready).await;
            manager.job_verb("j", Verb::Complete).expect("completes");
            crate::rig::gone(&core, "j").await;
            core.sleep(1_000_000).await;
            guests.stop().await;
            assert_eq!((log.failures.get(), &*guest.node_name()), (0, "t"));
            assert_eq!(first_difference(&content(&t).await, &log.model(0, &first)), None);
        });
    }
}

#[test]
fn a_chain_under_writes_is_backed_up_at_its_instant() {
    for seed in 20..30 {
        let mut sim = crate::rig::world(seed);
        sim.block_on(0, |core| async move {
            let d = chain(&core).await;
            let first = content(&d).await;
            let t = image(&core, "t", None).await;
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            core.sleep(500_000).await;
            let from = core.now();
            start_backup(backup(&d, &t, SyncMode::Full)).await.expect("it starts");
            let to = core.now();
            crate::rig::gone(&core, "j").await;
            let copy = content(&t).await;
            guests.stop().await;
            assert_eq!(log.failures.get(), 0);
            log.prove_instant(&[(0, &first, &copy)], from, to);
        });
    }
}

#[test]
fn sync_top_copies_the_top_layer_only_zeroes_included() {
    for job in ["mirror", "backup"] {
        let mut sim = crate::rig::quick_world(40);
        sim.block_on(0, |core| async move {
            let d = chain(&core).await;
            let first = content(&d).await;
            let t = image(&core, "t", Some("b")).await;
            let manager = JobManager::of(&core);
            if job == "mirror" {
                start_mirror(mirror(&d, &t, SyncMode::Top)).await.expect("it starts");
                manager.until("j", |status| status == Status::Ready).await;
                let facts = manager.query_block().remove(0).facts;
                let runs = d.block_status(0, SIZE).await.expect("known");
                let own: u64 = runs.iter().filter(|run| run.top()).map(|run| run.len).sum();
                assert_eq!((facts.len, facts.offset), (own, own), "what d holds");
                manager.block_job_verb("j", Verb::Cancel, false).expect("cancels");
            } else {
                start_backup(backup(&d, &t, SyncMode::Top)).await.expect("it starts");
            }
            crate::rig::gone(&core, "j").await;
            assert_eq!(first_difference(&content(&t).await, &first), None, "{job}");
            assert!(own_data(&t).await <= own_data(&d).await, "{job} copies what d holds");
        });
    }
}

#[test]
fn a_source_without_content_costs_the_target_nothing() {
    for job in ["mirror", "backup"] {
        let mut sim = crate::rig::quick_world(50);
        sim.block_on(0, |core| async move {
            let (d, t) = (image(&core, "d", None).await, image(&core, "t", None).await);
            if job == "mirror" {
                start_mirror(mirror(&d, &t, SyncMode::Full)).await.expect("it starts");
                let manager = JobManager::of(&core);
                manager.until("j", |status| status == Status::Ready).await;
                let facts = manager.query_block().remove(0).facts;
                assert_eq!((facts.len, facts.offset), (SIZE, SIZE));
                manager.block_job_verb("j", Verb::Cancel, false).expect("cancels");
            } else {
                start_backup(backup(&d, &t, SyncMode::Full)).await.expect("it starts");
            }
            crate::rig::gone(&core, "j").await;
            let runs = t.block_status(0, SIZE).await.expect("known");
            assert!(runs.iter().all(|run| run.kind == StatusKind::Hole), "{job}: {runs:?}");
        });
    }
}
