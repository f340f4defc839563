//! Whoever runs jobs on the disks: one after the other, while the guests go on.

use std::cell::Cell;
use std::rc::Rc;

use liveblk::engine::driver::sim::Rng;
use liveblk::engine::node::{Node, NodeOptions};
use liveblk::jobs::lifecycle::Verb;
use liveblk::jobs::{
    BackupSpec, CopyMode, Event, JobError, JobOptions, MirrorSpec, SyncMode, start_backup,
    start_mirror,
};
use liveblk::{ErrorKind, Job, Status};

use super::images::{Chain, Image, Qcow2, open_chain};
use super::judge::read_node;
use super::ledger::{Tick, Window};
use super::pattern;
use super::world::{Kept, World};

/// Runs jobs on disk `index` until all requests were made.
pub(crate) async fn run(world: Rc<World>, index: usize, mut rng: Rng) {
    while !world.is_over() {
        if rng.chance(300) {
            world.core.sleep(rng.below(1_000_000)).await;
        }
        world.jobs_running.set(world.jobs_running.get() + 1);
        match rng.below(10) {
            0..4 => backup(&world, index, &mut rng).await,
            4..7 => mirror(&world, index, &mut rng, Ending::Complete).await,
            7..9 => mirror(&world, index, &mut rng, Ending::Keep).await,
            _ => mirror(&world, index, &mut rng, Ending::Abandon).await,
        }
        world.jobs_running.set(world.jobs_running.get() - 1);
        world.jobs_ended.set(world.jobs_ended.get() + 1);
    }
}

/// How a mirror ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// The disk moves to the target.
    Complete,
    /// The target stays behind as the copy of that instant.
    Keep,
    /// The job is cancelled before it is ready.
    Abandon,
}

/// A target image that is open.
struct Target {
    image: Rc<Image>,
    node: Rc<Node>,
}

async fn target(world: &World, index: usize, rng: &mut Rng) -> Target {
    let size = world.disks[index].disk.size();
    let qcow2 = rng.chance(800).then(|| Qcow2::random(rng));
    let image = Rc::new(Image { name: world.name("target"), size, qcow2 });
    image.create(&world.core, None).await;
    world.images.borrow_mut().push(Rc::clone(&image));
    let options = NodeOptions { discard_unmap: true, direct: rng.chance(500), no_flush: false };
    let spec = open_chain(&vec![Rc::clone(&image)], &options, true).named(&world.name("node"));
    let node = world.host.open(spec).await.expect("a new target opens");
    Target { image, node }
}

fn options(world: &World) -> JobOptions {
    JobOptions::new(world.name("job"))
}

/// Resolves when `job` is gone.
async fn gone(world: &World, job: &Rc<Job>) -> Result<(), JobError> {
    world.host.jobs().until(job.id(), |_| false).await;
    job.error().map_or(Ok(()), Err)
}

/// Whether a job may have failed so.
fn is_excused(world: &World, error: &JobError) -> bool {
    matches!(error, JobError::Engine(error) if error.kind() == ErrorKind::NoSpace)
        && world.plan.full_at.is_some()
}

async fn backup(world: &Rc<World>, index: usize, rng: &mut Rng) {
    let source = world.disks[index].disk.node();
    let Target { image, node } = target(world, index, rng).await;
    let spec = BackupSpec {
        job: options(world),
        source,
        target: Rc::clone(&node),
        sync: SyncMode::Full,
        allow_larger_target: false,
    };
    let id = spec.job.id.clone();
    let from = world.clock.tick();
    let window = Rc::new(Cell::new(None));
    on_success(world, &id, &image, index, &window);
    let job = match start_backup(spec).await {
        Ok(job) => job,
        Err(error) if is_excused(world, &error) => return close(world, &node).await,
        Err(error) => panic!("a backup does not start: {error}"),
    };
    window.set(Some(Window { from, to: world.clock.tick() }));
    if rng.chance(100) {
        // Perhaps it is gone already.
        let _ = world.host.jobs().block_job_verb(job.id(), Verb::Cancel, true);
    }
    match gone(world, &job).await {
        Ok(()) => judge_copy(world, index, &node, window.get(), "backup").await,
        Err(JobError::Cancelled) => {}
        Err(error) => assert!(is_excused(world, &error), "a backup failed: {error}"),
    }
    close(world, &node).await;
}

/// At the moment of the job's event, its target becomes something that survives every cut.
fn on_success(
    world: &Rc<World>,
    id: &str,
    image: &Rc<Image>,
    disk: usize,
    window: &Rc<Cell<Option<Window>>>,
) {
    let (weak, id) = (Rc::downgrade(world), id.to_owned());
    let (image, window) = (Rc::clone(image), Rc::clone(window));
    world.host.on_event(move |event| {
        let Event::Completed { facts, error: None } = event else { return };
        if let Some(world) = weak.upgrade()
            && *facts.id == *id
            && let Some(window) = window.get()
        {
            world.kept.borrow_mut().push(Kept { image: Rc::clone(&image), disk, window });
        }
    });
}

async fn judge_copy(
    world: &World,
    index: usize,
    node: &Rc<Node>,
    window: Option<Window>,
    what: &str,
) {
    let window = window.expect("invariant: the job started");
    let bytes = read_node(node).await.expect("the target can be read");
    let ledger = &world.disks[index].ledger;
    let judged = pattern::values(&bytes, 0).and_then(|values| {
        let moment = ledger.point_in_time(&values, window)?;
        ledger.not_before(&values, moment, window.to)
    });
    judged.unwrap_or_else(|wrong| panic!("a {what} is wrong: {wrong}"));
}

async fn close(world: &World, node: &Rc<Node>) {
    match world.host.graph().remove(node).await {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NoSpace && world.plan.full_at.is_some() => {}
        Err(error) => panic!("a node does not close: {error}"),
    }
}

async fn mirror(world: &Rc<World>, index: usize, rng: &mut Rng, ending: Ending) {
    let state = &world.disks[index];
    let source = state.disk.node();
    let Target { image, node } = target(world, index, rng).await;
    let spec = MirrorSpec {
        job: options(world),
        source: Rc::clone(&source),
        target: Rc::clone(&node),
        sync: SyncMode::Full,
        copy_mode: CopyMode::Background,
        granularity: rng.chance(500).then(|| 512 << rng.below(9)),
        allow_larger_target: false,
    };
    let id = spec.job.id.clone();
    let job = match start_mirror(spec).await {
        Ok(job) => job,
        Err(error) if is_excused(world, &error) => return close(world, &node).await,
        Err(error) => panic!("a mirror does not start: {error}"),
    };
    let jobs = world.host.jobs();
    if ending == Ending::Abandon {
        world.core.sleep(rng.below(2_000_000)).await;
        // Perhaps it failed already.
        let _ = jobs.block_job_verb(job.id(), Verb::Cancel, true);
    } else {
        jobs.until(job.id(), |status| status == Status::Ready || status.is_completed()).await;
    }
    if job.status() == Status::Ready && ending != Ending::Abandon {
        world.core.sleep(rng.below(1_000_000)).await;
        return end_ready(world, index, &job, &id, Target { image, node }, ending).await;
    }
    match gone(world, &job).await {
        Err(JobError::Cancelled) if ending == Ending::Abandon => {}
        Err(error) => assert!(is_excused(world, &error), "a mirror failed: {error}"),
        Ok(()) => panic!("a mirror ended by itself"),
    }
    close(world, &node).await;
}

/// Ends a mirror that is ready.
async fn end_ready(
    world: &Rc<World>,
    index: usize,
    job: &Rc<Job>,
    id: &str,
    target: Target,
    ending: Ending,
) {
    let state = &world.disks[index];
    let source = state.disk.node();
    let old = state.active.borrow().clone();
    let new: Chain = vec![Rc::clone(&target.image)];
    let from: Tick = world.clock.tick();
    let verb = if ending == Ending::Complete { Verb::Complete } else { Verb::Cancel };
    if ending == Ending::Complete {
        state.active.borrow_mut().push(new.clone());
    }
    let window = Rc::new(Cell::new(None));
    let (weak, wanted) = (Rc::downgrade(world), id.to_owned());
    let (image, at_event) = (Rc::clone(&target.image), Rc::clone(&window));
    world.host.on_event(move |event| {
        let Event::Completed { facts, error: None } = event else { return };
        let Some(world) = weak.upgrade().filter(|_| *facts.id == *wanted) else { return };
        let window = Window { from, to: world.clock.tick() };
        at_event.set(Some(window));
        if ending == Ending::Complete {
            *world.disks[index].active.borrow_mut() = vec![new.clone()];
        } else {
            world.kept.borrow_mut().push(Kept { image: Rc::clone(&image), disk: index, window });
        }
    });
    let verb = world.host.jobs().block_job_verb(id, verb, false);
    verb.unwrap_or_else(|error| panic!("a ready mirror does not end: {error}"));
    match gone(world, job).await {
        Ok(()) if ending == Ending::Complete => {
            assert_eq!(state.disk.node().id(), target.node.id(), "the disk moved to the target");
            close(world, &source).await;
        }
        Ok(()) => {
            judge_copy(world, index, &target.node, window.get(), "mirror").await;
            close(world, &target.node).await;
        }
        Err(error) => {
            assert!(is_excused(world, &error), "a ready mirror failed: {error}");
            *state.active.borrow_mut() = old;
            close(world, &target.node).await;
        }
    }
}
