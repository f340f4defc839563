//! Transactions of several kinds of actions: snapshots, backups with new bitmaps, mirrors, streams
//! and commits of layers between, on one or more disks. All of it is of one instant. Sometimes one
//! action cannot work: then nothing is there that was not there before.

use std::cell::Cell;
use std::rc::Rc;

use liveblk::engine::driver::sim::Rng;
use liveblk::engine::node::NewBitmap;
use liveblk::engine::storage::stat;
use liveblk::jobs::lifecycle::Verb;
use liveblk::jobs::{
    Action, BackupAction, BitmapAction, CommitAction, CommitSpec, CompletionMode, MirrorAction,
    NewImageMode, SnapshotFile, StreamAction, StreamSpec, StreamTo, SyncMode, transaction,
};
use liveblk::{ErrorKind, Status};

use super::bitmaps;
use super::chains;
use super::images::Chain;
use super::judge::{one_moment, read_node};
use super::ledger::Window;
use super::operator::{
    COPY, Target, close, copy_mode, gone, is_excused, judge_copy, on_success, options, target,
};
use super::pattern::{self, Value};
use super::together::{Layer, bases, expect_layers, prepare, settle_layers};
use super::world::World;

/// What a transaction starts.
#[derive(Default)]
struct Lot {
    actions: Vec<Action>,
    layers: Vec<Layer>,
    /// Disk, id and target.
    backups: Vec<(usize, String, Target)>,
    mirrors: Vec<(usize, String, Target)>,
    bitmaps: Vec<(usize, NewBitmap)>,
    /// Disk, id and chain of jobs on chains.
    chains: Vec<(usize, String, Chain)>,
}

/// Does several things to `disks` at one instant.
pub(crate) async fn run(world: &Rc<World>, disks: &[usize], rng: &mut Rng) {
    let mut lot = Lot::default();
    let window = Rc::new(Cell::new(None));
    for disk in disks {
        lot.draw(world, *disk, &window, rng).await;
    }
    let wrong = rng.chance(350).then(|| wrong(world, disks[0], rng));
    let mut actions = std::mem::take(&mut lot.actions);
    if let Some(wrong) = &wrong {
        actions.insert(rng.index(actions.len() + 1), wrong.clone());
    }
    let old: Vec<Chain> = lot.layers.iter().map(|layer| world.chain(layer.disk)).collect();
    let before = wrong.as_ref().map(|_| picture(world, disks));
    expect_layers(world, &lot.layers);
    let files = new_files(&actions);
    let actions = actions.into_iter().map(|action| (world.core.id(), action)).collect();
    let from = world.clock.tick();
    let answer = transaction(&world.core, actions, CompletionMode::Individual).await;
    let at = Window { from, to: world.clock.tick() };
    settle_layers(world, &lot.layers, &old, answer.is_ok());
    match answer {
        Ok(()) => {
            assert!(wrong.is_none(), "{wrong:?} cannot work");
            window.set(Some(at));
            lot.ended(world, at, old, rng).await;
        }
        Err(error) => {
            // A layer below a snapshot that an active commit went through and was called off.
            let stale = error.to_string().contains("cannot be used any more");
            let fits = wrong.is_some() || stale || is_excused(world, &error);
            assert!(fits, "a transaction failed: {error}");
            lot.called_off(world).await;
            if let Some(before) = before.filter(|_| world.plan.is_peaceful()) {
                assert_eq!(before, picture(world, disks), "after {error}");
                for file in files {
                    let found = stat(&world.core, file.as_ref()).await;
                    let kind = found.map(drop).map_err(|error| error.kind());
                    assert_eq!(kind, Err(ErrorKind::NotFound), "{file} is left after {error}");
                }
            }
        }
    }
}

/// The files that snapshots would make.
fn new_files(actions: &[Action]) -> Vec<String> {
    let file = |action: &Action| match action {
        Action::SnapshotFile(spec) if spec.format == "qcow2" => {
            Some(spec.file.display().to_string())
        }
        _ => None,
    };
    actions.iter().filter_map(file).collect()
}

/// An action that cannot work.
fn wrong(world: &World, disk: usize, rng: &mut Rng) -> Action {
    let node = world.disks[disk].disk.node_name().to_string();
    let nowhere = "nowhere".to_owned();
    match rng.below(4) {
        0 => Action::Abort,
        1 => Action::Snapshot { node, overlay: nowhere },
        2 => Action::Bitmap(BitmapAction::Clear(liveblk::jobs::BitmapName { node, name: nowhere })),
        _ => Action::SnapshotFile(SnapshotFile {
            node,
            file: "/nowhere".into(),
            overlay: Some(world.name("node")),
            format: "unknown".into(),
            mode: NewImageMode::AbsolutePaths,
        }),
    }
}

/// What there is to see of `disks` and of jobs.
fn picture(world: &World, disks: &[usize]) -> String {
    let mut lines = Vec::new();
    for disk in disks {
        let node = world.disks[*disk].disk.node();
        let chain: Vec<_> = chains::nodes(world, *disk).iter().map(|node| node.name()).collect();
        let bitmaps = node.bitmap_facts().into_iter();
        let bitmaps: Vec<_> =
            bitmaps.map(|facts| (facts.name, facts.recording, facts.busy)).collect();
        lines.push(format!("{chain:?} {bitmaps:?}"));
    }
    if world.disks.len() == disks.len() {
        let jobs = world.host.jobs().query();
        let ids: Vec<_> = jobs.into_iter().map(|job| job.id).collect();
        lines.push(format!("{ids:?}"));
    }
    lines.join("; ")
}

impl Lot {
    /// What happens to `disk`.
    async fn draw(
        &mut self,
        world: &Rc<World>,
        disk: usize,
        window: &Rc<Cell<Option<Window>>>,
        rng: &mut Rng,
    ) {
        match rng.below(10) {
            0..2 => self.layer(world, disk, rng).await,
            2..4 => {
                self.layer(world, disk, rng).await;
                self.backup(world, disk, window, rng).await;
            }
            4..6 => {
                self.bitmap(world, disk, rng);
                self.backup(world, disk, window, rng).await;
            }
            6..8 => self.mirror(world, disk, rng).await,
            _ if world.chain(disk).len() > 1 => self.chain(world, disk, rng),
            _ => self.bitmap(world, disk, rng),
        }
    }

    async fn layer(&mut self, world: &Rc<World>, disk: usize, rng: &mut Rng) {
        let (layer, action) = prepare(world, disk, rng).await;
        self.layers.push(layer);
        self.actions.push(action);
    }

    fn bitmap(&mut self, world: &World, disk: usize, rng: &mut Rng) {
        let new = bitmaps::random(world, disk, rng);
        let node = world.disks[disk].disk.node_name().to_string();
        self.actions.push(Action::Bitmap(BitmapAction::Add { node, new: new.clone() }));
        self.bitmaps.push((disk, new));
    }

    async fn backup(
        &mut self,
        world: &Rc<World>,
        disk: usize,
        window: &Rc<Cell<Option<Window>>>,
        rng: &mut Rng,
    ) {
        let target = target(world, disk, COPY, rng).await;
        let action = BackupAction {
            job: options(world),
            source: world.disks[disk].disk.node_name().to_string(),
            target: target.node.name().to_string(),
            sync: SyncMode::Full,
            allow_larger_target: false,
            compress: target.node.can_compress() && rng.chance(200),
            more: Default::default(),
        };
        let id = action.job.id.clone();
        on_success(world, &id, (disk, target.chain.clone()), window);
        self.actions.push(Action::Backup(action));
        self.backups.push((disk, id, target));
    }

    async fn mirror(&mut self, world: &Rc<World>, disk: usize, rng: &mut Rng) {
        let target = target(world, disk, "target", rng).await;
        let action = MirrorAction {
            job: options(world),
            source: world.disks[disk].disk.node_name().to_string(),
            target: target.node.name().to_string(),
            sync: SyncMode::Full,
            copy_mode: copy_mode(rng),
            granularity: None,
            allow_larger_target: false,
            more: Default::default(),
        };
        self.mirrors.push((disk, action.job.id.clone(), target));
        self.actions.push(Action::Mirror(action));
    }

    /// A commit of the layer below the top, or a stream into the top.
    fn chain(&mut self, world: &Rc<World>, disk: usize, rng: &mut Rng) {
        let (chain, nodes) = (world.chain(disk), chains::nodes(world, disk));
        if nodes.len() != chain.len() {
            return; // a job that ends has relinked them already
        }
        let top = chain.len() - 1;
        let job = options(world);
        let id = job.id.clone();
        let new = if chain.len() > 2 && rng.chance(500) {
            chains::forget(world, &chain, top - 2, Some(top - 1));
            let spec = CommitSpec {
                job,
                ..CommitSpec::new(&nodes[top], &nodes[top - 1], &nodes[top - 2])
            };
            self.actions.push(Action::Commit(CommitAction::of(spec)));
            chain[..top - 1].iter().chain(&chain[top..]).cloned().collect()
        } else {
            let spec = StreamSpec { job, to: StreamTo::End, ..StreamSpec::new(&nodes[top]) };
            self.actions.push(Action::Stream(StreamAction::of(spec)));
            vec![Rc::clone(&chain[top])]
        };
        chains::expect(world, disk, &id, &[chain.clone(), new]);
        self.chains.push((disk, id, chain));
    }

    /// Nothing was done.
    async fn called_off(self, world: &Rc<World>) {
        for (disk, _, chain) in self.chains {
            *world.disks[disk].active.borrow_mut() = vec![chain];
        }
        for node in self.layers.into_iter().filter_map(|layer| layer.open) {
            close(world, &node).await;
        }
        for (_, _, target) in self.backups.into_iter().chain(self.mirrors) {
            close(world, &target.node).await;
        }
    }

    /// All was started at `at`: waits for the ends, and judges everything together.
    async fn ended(self, world: &Rc<World>, at: Window, old: Vec<Chain>, rng: &mut Rng) {
        for (disk, new) in &self.bitmaps {
            bitmaps::added(world, *disk, new, at);
        }
        let mut parts = bases(world, &self.layers, at).await;
        if !self.layers.is_empty() {
            let kept = self.layers.iter().zip(old).map(|(layer, old)| (layer.disk, old));
            world.keep(kept.collect(), at);
        }
        for (disk, id, chain) in &self.chains {
            let nodes = chains::nodes(world, *disk);
            if let Some(job) = world.host.jobs().find(id) {
                chains::ended(world, *disk, &job, chain).await;
            }
            chains::clean_up(world, *disk, &nodes).await;
        }
        for (disk, id, target) in self.mirrors {
            mirrored(world, disk, &id, &target, rng).await;
        }
        for (disk, id, target) in self.backups {
            parts.extend(backed_up(world, disk, &id, &target, at).await);
        }
        let judged = one_moment(world, &parts, at);
        judged.unwrap_or_else(|wrong| panic!("a transaction is wrong: {wrong}"));
    }
}

/// Lets a mirror follow its disk for a while and leaves its target behind.
async fn mirrored(world: &Rc<World>, disk: usize, id: &str, target: &Target, rng: &mut Rng) {
    let jobs = world.host.jobs();
    if let Some(job) = jobs.find(id) {
        jobs.until(id, |status| status == Status::Ready || status.is_completed()).await;
        world.core.sleep(rng.below(500_000)).await;
        let from = world.clock.tick();
        let window = Rc::new(Cell::new(None));
        let (weak, at_event) = (Rc::downgrade(world), Rc::clone(&window));
        let part = (disk, target.chain.clone());
        world.at_success(id, move || {
            let Some(world) = weak.upgrade() else { return };
            let window = Window { from, to: world.clock.tick() };
            at_event.set(Some(window));
            let size = world.disks[disk].disk.size();
            world.keep_of_size(part, window, size);
        });
        // Perhaps it failed already.
        let _ = jobs.block_job_verb(id, Verb::Cancel, false);
        match gone(world, &job).await {
            Ok(()) => judge_copy(world, disk, &target.node, window.get(), "mirror").await,
            Err(error) => assert!(is_excused(world, &error), "a mirror failed: {error}"),
        }
    }
    close(world, &target.node).await;
}

/// What a backup of the transaction holds, if it succeeded.
async fn backed_up(
    world: &Rc<World>,
    disk: usize,
    id: &str,
    target: &Target,
    at: Window,
) -> Option<(usize, Vec<Value>)> {
    let ended = match world.host.jobs().find(id) {
        Some(job) => gone(world, &job).await,
        // It has ended before anybody could look, well or badly.
        None => return closed(world, target).await,
    };
    if let Err(error) = ended {
        assert!(is_excused(world, &error), "a backup failed: {error}");
        return closed(world, target).await;
    }
    judge_copy(world, disk, &target.node, Some(at), "backup").await;
    let bytes = read_node(&target.node).await.expect("the target can be read");
    close(world, &target.node).await;
    Some((disk, pattern::values(&bytes, 0).expect("judged before")))
}

async fn closed(world: &Rc<World>, target: &Target) -> Option<(usize, Vec<Value>)> {
    close(world, &target.node).await;
    None
}
