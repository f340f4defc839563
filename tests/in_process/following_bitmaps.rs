//! Bitmaps made with `follow`, through commits and pivots: each has every change of its disk since
//! it was made and nothing else, whichever node serves the disk, also in the file afterwards.

use std::rc::Rc;

use crate::chains::{Chain, Layer, fresh};
use crate::rig::{gone, options};
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::driver::sim::Sim;
use liveblk_engine::executor::Core;
use liveblk_engine::graph::Graph;
use liveblk_engine::node::{Disk, NewBitmap, Node, User};
use liveblk_jobs::{
    CommitSpec, CopyMode, JobManager, MirrorSpec, NewImageMode, SnapshotFile, Status, SyncMode,
    Verb, snapshot_file, start_commit, start_mirror,
};

const GRANULE: u64 = 4096;

/// A guest at the top of a chain, and what it changed since the bitmap was made.
struct Writer {
    core: Core,
    disk: Disk,
    changed: DirtyBitmap,
}

impl Writer {
    /// A guest of `node`, which has the bitmap from now on.
    async fn at(core: &Core, node: &Rc<Node>, persistent: bool) -> Self {
        let new = NewBitmap {
            name: "f".into(),
            granularity: Some(GRANULE),
            persistent,
            disabled: false,
            follow: true,
        };
        node.add_bitmap(new).await.expect("a bitmap");
        let disk =
            Disk::attach(node, User::Guest { name: "guest".into() }, true).expect("attaches");
        let changed = DirtyBitmap::new(node.size(), GRANULE);
        Self { core: core.clone(), disk, changed }
    }

    /// Changes something in each of the ways that there are.
    async fn work(&mut self, count: u64) {
        for _ in 0..count {
            let size = self.disk.node().size();
            let at = self.core.random() % (size / 512) * 512;
            let len = (512 * (1 + self.core.random() % 40)).min(size - at);
            // A node that does not pass discards on does not change by one.
            let unmaps = self.disk.node().options().discard_unmap;
            let way = self.core.random() % 4;
            match way {
                0 => self.disk.write_zeroes(at, len, Default::default()).await.expect("zeroed"),
                1 => self.disk.discard(at, len, false).await.expect("discarded"),
                _ => {
                    let buf = self.core.pool().alloc(usize::try_from(len).expect("small"));
                    buf.fill(self.core.random() as u8);
                    self.disk.write(at, buf, Default::default()).await.expect("written");
                }
            }
            if way != 1 || unmaps {
                self.changed.set_range(liveblk_engine::address::GuestRange::new(at, len));
            }
        }
    }

    /// The bitmap of the node where the guest is now has all of it, and nothing else.
    fn judge(&self, what: &str) {
        let node = self.disk.node();
        let bits = bits(&node);
        assert!(self.changed.size() <= node.size());
        assert_eq!(marks(&bits), marks(&self.changed), "{what}: at '{}'", node.name());
        let facts = node.bitmap_facts();
        let facts = facts.iter().find(|facts| facts.name.as_deref() == Some("f")).expect("there");
        assert!(facts.recording && facts.follow && !facts.busy, "{what}: {facts:?}");
    }

    async fn snapshot(&self, index: usize) {
        let spec = SnapshotFile {
            node: self.disk.node_name().to_string(),
            file: format!("/over{index}.img").into(),
            overlay: Some(format!("o{index}")),
            format: "qcow2".into(),
            mode: NewImageMode::AbsolutePaths,
        };
        snapshot_file(&self.core, self.core.id(), spec).await.expect("it is taken");
    }
}

fn bits(node: &Node) -> DirtyBitmap {
    node.bitmap("f").expect("the bitmap is there").view(Clone::clone)
}

fn marks(bits: &DirtyBitmap) -> Vec<u64> {
    (0..bits.granules()).filter(|at| bits.test(at * GRANULE)).collect()
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
        copy_mode: CopyMode::default(),
        converge: None,
    }
}

async fn completed_when_ready(core: &Core, writer: &mut Writer) {
    let manager = JobManager::of(core);
    manager.until("j", |status| status == Status::Ready).await;
    writer.work(8).await;
    manager.job_verb("j", Verb::Complete).expect("completes");
    gone(core, "j").await;
}

/// What the file `name` holds once everything is closed.
async fn reopened(core: &Core, path: &str) -> Option<Vec<u64>> {
    let graph = Graph::of(core);
    graph.close_all().await.expect("it closes");
    let open = liveblk_engine::graph::OpenNode::new("qcow2", path).named("again");
    let node = graph.open(open).await.expect("it opens");
    let found = node.bitmap("f").ok();
    let facts = node.bitmap_facts();
    assert!(facts.iter().all(|facts| !facts.inconsistent), "{facts:?}");
    found.map(|bitmap| bitmap.view(marks))
}

#[test]
fn the_disks_own_goes_on_above_a_commit_of_layers_between_and_the_bases_has_what_they_had() {
    for seed in 0..10 {
        let persistent = seed % 2 == 0;
        let mut sim = crate::rig::world(700 + seed);
        sim.block_on(0, move |core| async move {
            let chain = Chain::make(&core, &Layer::usual(0)[..1], true).await;
            let mut writer = Writer::at(&core, &chain.top(), persistent).await;
            let mut between = Vec::new();
            for index in 0..3 {
                writer.work(6).await;
                between.push(marks(&writer.changed));
                writer.snapshot(index).await;
                writer.judge("a snapshot");
            }
            writer.work(6).await;
            let graph = Graph::of(&core);
            let top = graph.find("o1").expect("it is there");
            let spec = commit(&writer.disk.node(), &top, &chain.top());
            start_commit(spec).await.expect("it starts");
            writer.work(6).await;
            gone(&core, "j").await;
            writer.work(6).await;
            writer.judge("a commit of layers between");
            let base = marks(&bits(&chain.top()));
            let had = between.last().expect("there were some");
            assert!(had.iter().all(|mark| base.contains(mark)), "seed {seed}: of the layers");
            let (own, at) = (marks(&writer.changed), "/over2.img");
            drop((writer, top, chain));
            let stored = reopened(&core, at).await;
            assert_eq!(stored, persistent.then_some(own), "seed {seed}");
            let stored = reopened(&core, &crate::chains::path(0)).await;
            assert_eq!(stored.is_some(), persistent, "seed {seed}: the base's");
            let kept = stored.unwrap_or(base);
            assert!(had.iter().all(|mark| kept.contains(mark)), "seed {seed}: in the base's file");
        });
    }
}

#[test]
fn it_goes_down_with_the_guests_of_an_active_commit() {
    for seed in 0..10 {
        let persistent = seed % 2 == 0;
        let mut sim = crate::rig::world(720 + seed);
        sim.block_on(0, move |core| async move {
            let chain = Chain::make(&core, &Layer::usual(0), seed % 3 == 0).await;
            let base = chain.node((seed % 3) as usize);
            let mut writer = Writer::at(&core, &chain.top(), persistent).await;
            writer.work(10).await;
            let mut spec = commit(&chain.top(), &chain.top(), &base);
            if seed % 4 == 1 {
                spec.copy_mode = CopyMode::WriteBlocking;
            }
            start_commit(spec).await.expect("it starts");
            writer.work(10).await;
            completed_when_ready(&core, &mut writer).await;
            assert_eq!(writer.disk.node().id(), base.id());
            writer.judge("an active commit");
            writer.work(10).await;
            writer.judge("after an active commit");
            let own = marks(&writer.changed);
            drop((writer, base, chain));
            let path = crate::chains::path((seed % 3) as usize);
            assert_eq!(reopened(&core, &path).await, persistent.then_some(own), "seed {seed}");
        });
    }
}

#[test]
fn a_pivot_moves_it_and_what_the_target_had_of_its_name_is_not_the_disks() {
    for seed in 0..10 {
        let mut sim: Sim = crate::rig::world(740 + seed);
        sim.block_on(0, move |core| async move {
            let chain = Chain::make(&core, &Layer::usual(0)[..1], true).await;
            let target = fresh(&core, "t").await;
            if seed % 2 == 0 {
                let other = NewBitmap {
                    name: "f".into(),
                    granularity: Some(GRANULE),
                    persistent: seed % 4 == 0,
                    disabled: false,
                    follow: true,
                };
                target.add_bitmap(other).await.expect("a bitmap");
            }
            let mut writer = Writer::at(&core, &chain.top(), true).await;
            writer.work(10).await;
            let spec = MirrorSpec {
                job: options("j"),
                source: chain.top(),
                target: target.clone(),
                sync: SyncMode::Full,
                copy_mode: [CopyMode::Background, CopyMode::WriteBlocking][seed as usize % 2],
                granularity: None,
                allow_larger_target: false,
                more: Default::default(),
            };
            start_mirror(spec).await.expect("it starts");
            writer.work(10).await;
            completed_when_ready(&core, &mut writer).await;
            assert_eq!(writer.disk.node().id(), target.id());
            writer.judge("a pivot");
            writer.work(10).await;
            writer.judge("after a pivot");
        });
    }
}
