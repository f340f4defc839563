//! Commands that act on several disks at one instant: snapshots, and transactions of backups.

use std::cell::Cell;
use std::rc::Rc;

use liveblk::engine::driver::sim::Rng;
use liveblk::engine::node::{Node, NodeOptions};
use liveblk::jobs::{
    Action, BackupAction, CompletionMode, JobError, NewImageMode, SnapshotFile, SyncMode,
    transaction,
};

use super::bitmaps;
use super::images::{Chain, Image, Qcow2, open_chain};
use super::judge::{one_moment, read_node};
use super::ledger::Window;
use super::mixed;
use super::operator::{
    COPY, Target, close, gone, is_excused, judge_copy, on_success, opened, options, target,
};
use super::pattern::{self, Value};
use super::world::World;

/// Does something with all disks.
pub(crate) async fn run(world: &Rc<World>, rng: &mut Rng) {
    let disks: Vec<usize> = (0..world.disks.len()).collect();
    match rng.below(5) {
        0..2 => snapshots(world, &disks, rng).await,
        2..4 => backups(world, rng).await,
        _ => mixed::run(world, &disks, rng).await,
    }
}

/// A new layer of one disk.
pub(crate) struct Layer {
    pub(crate) disk: usize,
    /// The node that will be below it.
    base: Rc<Node>,
    image: Rc<Image>,
    /// The overlay, if it was opened before the command.
    pub(crate) open: Option<Rc<Node>>,
}

/// Takes snapshots of `disks` at one instant.
pub(crate) async fn snapshots(world: &Rc<World>, disks: &[usize], rng: &mut Rng) {
    // A mirror that has failed as planned is still there until it has ended.
    let peaceful = world.plan.is_peaceful();
    let refused = |error: &JobError| !peaceful && error.to_string().ends_with("job: mirror");
    let Some((layers, old, window)) = take(world, disks, rng, &refused).await else { return };
    let parts = layers.iter().zip(old).map(|(layer, old)| (layer.disk, old)).collect();
    world.keep(parts, window);
    judge_bases(world, &layers, window).await;
}

/// A new layer of `disk` under an active commit: what lies below it means nothing by itself. The
/// commit may be about to end, or be watched by another job.
pub(crate) async fn layer(world: &Rc<World>, disk: usize, rng: &mut Rng) {
    let refused = |error: &JobError| {
        error.to_string().ends_with("is busy: block device is in use by block job: commit")
    };
    take(world, &[disk], rng, &refused).await;
}

/// Takes snapshots; the layers, the chains before and when it was, unless they are `refused`.
async fn take(
    world: &Rc<World>,
    disks: &[usize],
    rng: &mut Rng,
    refused: &dyn Fn(&JobError) -> bool,
) -> Option<(Vec<Layer>, Vec<Chain>, Window)> {
    let mut layers = Vec::new();
    let mut actions = Vec::new();
    for disk in disks {
        let (layer, action) = prepare(world, *disk, rng).await;
        layers.push(layer);
        actions.push((world.core.id(), action));
    }
    let old: Vec<Chain> = disks.iter().map(|disk| world.chain(*disk)).collect();
    expect_layers(world, &layers);
    let from = world.clock.tick();
    let answer = transaction(&world.core, actions, CompletionMode::Individual).await;
    let window = Window { from, to: world.clock.tick() };
    settle_layers(world, &layers, &old, answer.is_ok());
    if let Err(error) = answer {
        let fits = refused(&error) || is_excused(world, &error);
        assert!(fits, "a snapshot failed: {error}");
        for node in layers.into_iter().filter_map(|layer| layer.open) {
            close(world, &node).await;
        }
        return None;
    }
    // Bitmaps stayed where they were, or went along, before anything else happens to the disks.
    disks.iter().for_each(|disk| bitmaps::settle(world, *disk, window.from));
    Some((layers, old, window))
}

/// From now on the disks may be in their new layers.
pub(crate) fn expect_layers(world: &World, layers: &[Layer]) {
    for layer in layers {
        let mut new = world.chain(layer.disk);
        new.push(Rc::clone(&layer.image));
        world.disks[layer.disk].active.borrow_mut().push(new);
    }
}

/// The disks are in their new layers, or where they were.
pub(crate) fn settle_layers(world: &World, layers: &[Layer], old: &[Chain], done: bool) {
    for (layer, old) in layers.iter().zip(old) {
        let mut active = world.disks[layer.disk].active.borrow_mut();
        *active = if done {
            vec![active.pop().expect("invariant: pushed before")]
        } else {
            vec![old.clone()]
        };
        if done && layer.open.is_none() {
            world.images.borrow_mut().push(Rc::clone(&layer.image));
        }
    }
}

/// What lies below the new layers is the disks at one moment.
async fn judge_bases(world: &Rc<World>, layers: &[Layer], window: Window) {
    let parts = bases(world, layers, window).await;
    let judged = one_moment(world, &parts, window);
    judged.unwrap_or_else(|wrong| panic!("a snapshot is wrong: {wrong}"));
}

/// What lies below the new layers.
pub(crate) async fn bases(
    world: &Rc<World>,
    layers: &[Layer],
    window: Window,
) -> Vec<(usize, Vec<Value>)> {
    let mut parts = Vec::new();
    for layer in layers {
        if layer.base.is_writable() {
            // Without space a base may keep its bitmaps in memory, and stay writable for a while.
            let excused = world.is_broken.get() || window.from < world.full_until.get();
            assert!(excused, "a base is read-only");
            world.late.borrow_mut().push(Rc::clone(&layer.base));
        }
        let bytes = read_node(&layer.base).await.expect("the base can be read");
        let values = pattern::values(&bytes, 0);
        parts.push((layer.disk, values.unwrap_or_else(|wrong| panic!("a base is bad: {wrong}"))));
    }
    parts
}

/// A new layer, made by the command or before it.
pub(crate) async fn prepare(world: &Rc<World>, disk: usize, rng: &mut Rng) -> (Layer, Action) {
    let base = world.disks[disk].disk.node();
    let size = base.size();
    let name = world.name("layer");
    let node = base.name().to_string();
    let overlay = world.name("node");
    if rng.chance(500) {
        let image = Rc::new(Image { name, size, qcow2: Some(Qcow2::plain()) });
        let spec = SnapshotFile {
            node,
            file: image.path().into(),
            overlay: Some(overlay),
            format: "qcow2".into(),
            mode: NewImageMode::AbsolutePaths,
        };
        return (Layer { disk, base, image, open: None }, Action::SnapshotFile(spec));
    }
    let mut name = name;
    loop {
        let image = Rc::new(Image { name, size, qcow2: Some(Qcow2::random(rng, false)) });
        world.make(&image, world.chain(disk).last()).await;
        let options = NodeOptions {
            discard_unmap: rng.chance(700),
            direct: rng.chance(500),
            ..NodeOptions::default()
        };
        let spec = open_chain(&[Rc::clone(&image)], &options, true).named(&overlay);
        if let Some(open) = opened(world.host.open(spec).await) {
            let action = Action::Snapshot { node, overlay };
            return (Layer { disk, base, image, open: Some(open) }, action);
        }
        name = world.name("layer");
    }
}

/// Starts backups of all disks at one instant.
async fn backups(world: &Rc<World>, rng: &mut Rng) {
    let window = Rc::new(Cell::new(None));
    let (mut targets, mut ids, mut actions) = (Vec::new(), Vec::new(), Vec::new());
    for disk in 0..world.disks.len() {
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
        on_success(world, &action.job.id, (disk, target.chain.clone()), &window);
        ids.push(action.job.id.clone());
        actions.push((world.core.id(), Action::Backup(action)));
        targets.push(target);
    }
    let grouped = rng.chance(500);
    let mode = if grouped { CompletionMode::Grouped } else { CompletionMode::Individual };
    let from = world.clock.tick();
    match transaction(&world.core, actions, mode).await {
        Ok(()) => {
            window.set(Some(Window { from, to: world.clock.tick() }));
            ended(world, &ids, &targets, &window, grouped).await;
        }
        Err(error) => assert!(is_excused(world, &error), "backups do not start: {error}"),
    }
    for target in targets {
        close(world, &target.node).await;
    }
}

/// Waits for the jobs and judges their targets together.
async fn ended(
    world: &Rc<World>,
    ids: &[String],
    targets: &[Target],
    window: &Rc<Cell<Option<Window>>>,
    grouped: bool,
) {
    let jobs: Vec<_> = ids.iter().filter_map(|id| world.host.jobs().find(id)).collect();
    let mut good = jobs.len() == ids.len();
    for job in &jobs {
        if let Err(error) = gone(world, job).await {
            let cancelled = matches!(error, JobError::Cancelled) && grouped;
            assert!(cancelled || is_excused(world, &error), "a backup failed: {error}");
            good = false;
        }
    }
    if !good {
        return;
    }
    let mut parts = Vec::new();
    for (disk, target) in targets.iter().enumerate() {
        judge_copy(world, disk, &target.node, window.get(), "backup").await;
        let bytes = read_node(&target.node).await.expect("the target can be read");
        parts.push((disk, pattern::values(&bytes, 0).expect("judged before")));
    }
    let window = window.get().expect("invariant: the jobs started");
    let judged = one_moment(world, &parts, window);
    judged.unwrap_or_else(|wrong| panic!("backups of a transaction: {wrong}"));
    let chains = targets.iter().map(|target| target.chain.clone()).enumerate().collect();
    world.keep(chains, window);
}
