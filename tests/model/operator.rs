//! Whoever runs jobs on the disks: one after the other, while the guests go on.

use std::cell::Cell;
use std::rc::Rc;

use liveblk::engine::driver::sim::Rng;
use liveblk::engine::node::{Node, NodeOptions};
use liveblk::jobs::lifecycle::Verb;
use liveblk::jobs::{
    BackupOptions, BackupSpec, CopyMode, JobError, JobOptions, Kind, MirrorOptions, MirrorSpec,
    SyncMode, start_backup, start_mirror,
};
use liveblk::{BackingSource, ErrorKind, Job, Status};

use super::backups;
use super::beside;
use super::bitmaps;
use super::chains;
use super::changes;
use super::images::{Chain, Image, Qcow2, open_chain};
use super::instants;
use super::judge::{one_moment, read_node};
use super::ledger::{Tick, Window};
use super::mixed;
use super::pattern;
use super::together;
use super::world::World;

/// How targets of backups are called: files whose writes may be made to fail.
pub(crate) const COPY: &str = "copy";

/// Layers that a chain may have before it is mirrored into one image.
const LAYERS_MAX: usize = 6;

/// Runs jobs on disk `index` until all requests were made.
pub(crate) async fn run(world: Rc<World>, index: usize, mut rng: Rng) {
    while !world.is_over() {
        if rng.chance(300) {
            world.core.sleep(rng.below(1_000_000)).await;
        }
        let both = index == 0 && world.disks.len() > 1 && rng.chance(400);
        let disks = if both { 0..world.disks.len() } else { index..index + 1 };
        for disk in disks.clone() {
            world.disks[disk].permit.acquire(1).await;
        }
        world.jobs_running.set(world.jobs_running.get() + 1);
        let began = world.clock.tick();
        if both {
            together::run(&world, &mut rng).await;
        } else {
            alone(&world, index, &mut rng).await;
        }
        for disk in disks.clone() {
            bitmaps::settle(&world, disk, began);
            bitmaps::judge(&world, disk);
        }
        world.jobs_running.set(world.jobs_running.get() - 1);
        world.jobs_ended.set(world.jobs_ended.get() + 1);
        for disk in disks {
            world.disks[disk].permit.release(1);
        }
    }
}

async fn alone(world: &Rc<World>, index: usize, rng: &mut Rng) {
    let deep = world.chain(index).len() >= LAYERS_MAX;
    match rng.below(28) {
        26 | 27 => mixed::run(world, &[index], rng).await,
        15 | 16 => changes::resize(world, index, rng).await,
        17 => changes::internal(world, index, rng).await,
        18..21 => bitmaps::run(world, index, rng).await,
        21..24 => backups::run(world, index, rng).await,
        24 => changes::reopen(world, index, rng).await,
        25 => instants::run(world, index, rng).await,
        _ if deep => mirror(world, index, rng, Ending::Complete).await,
        0..3 => backup(world, index, rng, 0).await,
        3..6 => mirror(world, index, rng, Ending::Complete).await,
        6..8 => mirror(world, index, rng, Ending::Keep).await,
        8 => mirror(world, index, rng, Ending::Abandon).await,
        9..12 => chains::shorten(world, index, rng).await,
        _ => together::snapshots(world, &[index], rng).await,
    }
}

/// How a mirror ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The disk moves to the target.
    Complete,
    /// The target stays behind as the copy of that instant.
    Keep,
    /// The job is cancelled before it is ready.
    Abandon,
}

/// A target that is open.
pub(crate) struct Target {
    pub(crate) chain: Chain,
    pub(crate) node: Rc<Node>,
}

/// A target that shares all layers of disk `index` but the top one, if that can be.
async fn target_of_top(world: &World, index: usize, rng: &mut Rng) -> Option<Target> {
    let mut chain = world.chain(index);
    let top = chain.pop()?;
    let below = world.disks[index].disk.node().backing()?;
    let name = world.name("target");
    drop(top);
    let size = world.disks[index].disk.size();
    let qcow2 = Some(Qcow2::random(rng, chain.is_empty()));
    let image = Rc::new(Image { name, size, qcow2 });
    world.make(&image, chain.last()).await;
    let options =
        NodeOptions { discard_unmap: true, direct: rng.chance(500), ..NodeOptions::default() };
    let mut spec = open_chain(&[Rc::clone(&image)], &options, true).named(&world.name("node"));
    spec.backing = BackingSource::Node(below.name().to_string());
    let node = opened(world.host.open(spec).await)?;
    chain.push(image);
    Some(Target { chain, node })
}

/// A target without a backing file.
pub(crate) async fn target(world: &World, index: usize, what: &str, rng: &mut Rng) -> Target {
    let size = world.disks[index].disk.size();
    loop {
        let qcow2 = rng.chance(800).then(|| Qcow2::random(rng, true));
        let image = Rc::new(Image { name: world.name(what), size, qcow2 });
        world.make(&image, None).await;
        let options =
            NodeOptions { discard_unmap: true, direct: rng.chance(500), ..NodeOptions::default() };
        let spec = open_chain(&[Rc::clone(&image)], &options, true).named(&world.name("node"));
        if let Some(node) = opened(world.host.open(spec).await) {
            return Target { chain: vec![image], node };
        }
    }
}

/// The node of a new image; none if the barrier before its first use failed as planned. Such an
/// image is not opened for writing again, so another is made.
pub(crate) fn opened(result: Result<Rc<Node>, liveblk::HostError>) -> Option<Rc<Node>> {
    match result {
        Ok(node) => Some(node),
        Err(error) => {
            let text = error.to_string();
            // The layer below may have been dropped by a job that ended meanwhile, or is between
            // the layers of a commit that was called off.
            let planned = ["flush", "Cannot find device", "cannot be used any more"];
            let planned = planned.iter().any(|known| text.contains(known));
            assert!(planned, "a new image opens: {error}");
            None
        }
    }
}

pub(crate) fn copy_mode(rng: &mut Rng) -> CopyMode {
    if rng.chance(400) { CopyMode::WriteBlocking } else { CopyMode::Background }
}

pub(crate) fn options(world: &World) -> JobOptions {
    JobOptions::new(world.name("job"))
}

/// Resolves when `job` is gone.
pub(crate) async fn gone(world: &World, job: &Rc<Job>) -> Result<(), JobError> {
    world.host.jobs().until(job.id(), |_| false).await;
    job.error().map_or(Ok(()), Err)
}

/// Whether a job may have failed so.
pub(crate) fn is_excused(world: &World, error: &JobError) -> bool {
    match error {
        JobError::Engine(error) => world.is_planned(error),
        // A layer could not be created.
        error => {
            let text = error.to_string();
            (world.plan.full.is_some() && text.contains("No space left"))
                || (world.plan.broken_at.is_some() && !matches!(error, JobError::Cancelled))
        }
    }
}

/// Runs a backup; sometimes something else of the disk begins and ends meanwhile.
async fn backup(world: &Rc<World>, index: usize, rng: &mut Rng, nested: u32) {
    let source = world.disks[index].disk.node();
    let top = if rng.chance(200) { target_of_top(world, index, rng).await } else { None };
    let sync = if top.is_some() { SyncMode::Top } else { SyncMode::Full };
    let Target { chain, node } = match top {
        Some(target) => target,
        None => target(world, index, COPY, rng).await,
    };
    let spec = BackupSpec {
        job: options(world),
        source,
        target: Rc::clone(&node),
        sync,
        allow_larger_target: false,
        compress: node.can_compress() && rng.chance(300),
        more: BackupOptions { use_copy_range: true, ..BackupOptions::default() },
    };
    let id = spec.job.id.clone();
    let from = world.clock.tick();
    let window = Rc::new(Cell::new(None));
    on_success(world, &id, (index, chain), &window);
    let job = match start_backup(spec).await {
        Ok(job) => job,
        Err(error) if is_excused(world, &error) => return close(world, &node).await,
        Err(error) => panic!("a backup does not start: {error}"),
    };
    window.set(Some(Window { from, to: world.clock.tick() }));
    meddle(world, &job, rng).await;
    match rng.below(20) {
        0..2 => {
            // Perhaps it is gone already.
            let _ = world.host.jobs().block_job_verb(job.id(), Verb::Cancel, true);
        }
        2..5 if nested < 2 => Box::pin(backup(world, index, rng, nested + 1)).await,
        5..8 => together::snapshots(world, &[index], rng).await,
        8..10 => changes::grow(world, index, rng).await,
        _ => {}
    }
    match gone(world, &job).await {
        Ok(()) => judge_copy(world, index, &node, window.get(), "backup").await,
        Err(JobError::Cancelled) => {}
        Err(error) => assert!(is_excused(world, &error), "a backup failed: {error}"),
    }
    close(world, &node).await;
}

/// Pauses and resumes a job, and limits its speed for a while.
pub(crate) async fn meddle(world: &Rc<World>, job: &Rc<Job>, rng: &mut Rng) {
    if rng.chance(700) {
        return;
    }
    let jobs = world.host.jobs();
    // The job may be gone before each of these.
    let _ = jobs.set_speed(job.id(), 1 << rng.below(24));
    let _ = jobs.block_job_verb(job.id(), Verb::Pause, false);
    if matches!(job.kind(), Kind::Mirror | Kind::Commit) {
        let _ = jobs.change(job.id(), copy_mode(rng));
    }
    world.core.sleep(rng.below(1_000_000)).await;
    let _ = jobs.block_job_verb(job.id(), Verb::Resume, false);
    world.core.sleep(rng.below(1_000_000)).await;
    let _ = jobs.set_speed(job.id(), 0);
}

/// At the moment of the job's event, its target becomes something that survives every cut.
pub(crate) fn on_success(
    world: &Rc<World>,
    id: &str,
    part: (usize, Chain),
    window: &Rc<Cell<Option<Window>>>,
) {
    let (weak, window) = (Rc::downgrade(world), Rc::clone(window));
    world.at_success(id, move || {
        if let (Some(world), Some(window)) = (weak.upgrade(), window.get()) {
            world.keep(vec![part], window);
        }
    });
}

pub(crate) async fn judge_copy(
    world: &World,
    index: usize,
    node: &Rc<Node>,
    window: Option<Window>,
    what: &str,
) {
    let window = window.expect("invariant: the job started");
    let bytes = read_node(node).await.expect("the target can be read");
    let judged =
        pattern::values(&bytes, 0).and_then(|values| one_moment(world, &[(index, values)], window));
    judged.unwrap_or_else(|wrong| panic!("a {what} is wrong: {wrong}"));
}

/// Closes a node; writes of a cancelled job may still be on their way to it.
pub(crate) async fn close(world: &World, node: &Rc<Node>) {
    for _ in 0..1000 {
        match world.host.graph().remove(node).await {
            Ok(()) => return,
            Err(error) if error.kind() == ErrorKind::Busy => world.core.sleep(10_000_000).await,
            Err(error) if world.is_planned(&error) => return,
            Err(error) => panic!("a node does not close: {error}"),
        }
    }
    panic!("{node:?} stays busy: {:?}", node.users());
}

async fn mirror(world: &Rc<World>, index: usize, rng: &mut Rng, ending: Ending) {
    let state = &world.disks[index];
    let source = state.disk.node();
    let top = if rng.chance(300) { target_of_top(world, index, rng).await } else { None };
    let sync = if top.is_some() { SyncMode::Top } else { SyncMode::Full };
    let target = match top {
        Some(target) => target,
        None => target(world, index, "target", rng).await,
    };
    let node = Rc::clone(&target.node);
    let spec = MirrorSpec {
        job: options(world),
        source: Rc::clone(&source),
        target: Rc::clone(&node),
        sync,
        copy_mode: copy_mode(rng),
        granularity: rng.chance(500).then(|| 512 << rng.below(9)),
        allow_larger_target: false,
        more: MirrorOptions { converge: beside::converge(rng), ..MirrorOptions::default() },
    };
    let id = spec.job.id.clone();
    let job = match start_mirror(spec).await {
        Ok(job) => job,
        Err(error) if is_excused(world, &error) => return close(world, &node).await,
        Err(error) => panic!("a mirror does not start: {error}"),
    };
    meddle(world, &job, rng).await;
    beside::disturb(world, index, (&job, &node), true, rng).await;
    let jobs = world.host.jobs();
    if ending == Ending::Abandon {
        world.core.sleep(rng.below(2_000_000)).await;
        // Perhaps it failed already.
        let _ = jobs.block_job_verb(job.id(), Verb::Cancel, true);
    } else {
        jobs.until(job.id(), |status| status == Status::Ready || status.is_completed()).await;
    }
    if job.status() == Status::Ready && ending != Ending::Abandon {
        world.core.sleep(rng.below(500_000)).await;
        // Perhaps it failed already.
        let _ = jobs.change(job.id(), copy_mode(rng));
        if rng.chance(200) {
            let _ = jobs.block_job_verb(job.id(), Verb::Pause, false);
            world.core.sleep(rng.below(500_000)).await;
            let _ = jobs.block_job_verb(job.id(), Verb::Resume, false);
        }
        world.core.sleep(rng.below(500_000)).await;
        beside::disturb(world, index, (&job, &node), true, rng).await;
        return end_ready(world, index, &job, &id, target, ending).await;
    }
    match gone(world, &job).await {
        Err(JobError::Cancelled) if ending == Ending::Abandon => {}
        Err(error) => assert!(is_excused(world, &error), "a mirror failed: {error}"),
        Ok(()) => panic!("a mirror ended by itself"),
    }
    close(world, &node).await;
}

/// Ends a mirror that is ready.
pub(crate) async fn end_ready(
    world: &Rc<World>,
    index: usize,
    job: &Rc<Job>,
    id: &str,
    target: Target,
    ending: Ending,
) {
    let state = &world.disks[index];
    let source = state.disk.node();
    let nodes = chains::nodes(world, index);
    let old = state.active.borrow().clone();
    let new = target.chain.clone();
    let from: Tick = world.clock.tick();
    let verb = if ending == Ending::Complete { Verb::Complete } else { Verb::Cancel };
    if ending == Ending::Complete {
        state.active.borrow_mut().push(new.clone());
    }
    let window = Rc::new(Cell::new(None));
    let (weak, at_event) = (Rc::downgrade(world), Rc::clone(&window));
    let copy = Rc::clone(&target.node);
    world.at_success(id, move || {
        let Some(world) = weak.upgrade() else { return };
        let window = Window { from, to: world.clock.tick() };
        at_event.set(Some(window));
        let size = world.disks[index].disk.size();
        let fits = copy.size() == size || !world.plan.is_peaceful();
        assert!(fits, "the target has {} bytes, its disk {size}", copy.size());
        if ending == Ending::Complete {
            *world.disks[index].active.borrow_mut() = vec![new];
        } else {
            world.keep_of_size((index, new), window, copy.size());
        }
    });
    let verb = world.host.jobs().block_job_verb(id, verb, false);
    if let Err(error) = verb {
        assert!(job.error().is_some(), "a ready mirror does not end: {error}");
    }
    match gone(world, job).await {
        Ok(()) if ending == Ending::Complete => {
            assert_eq!(state.disk.node().id(), target.node.id(), "the disk moved to the target");
            close(world, &source).await;
            // Snapshots left layers below it that have no other user.
            chains::clean_up(world, index, &nodes).await;
        }
        Ok(()) => {
            judge_copy(world, index, &target.node, window.get(), "mirror").await;
            close(world, &target.node).await;
        }
        Err(error) => {
            assert!(is_excused(world, &error), "a ready mirror failed: {error}");
            if ending == Ending::Complete {
                *state.active.borrow_mut() = old;
            }
            close(world, &target.node).await;
        }
    }
}
