//! What meets a job that follows its disk: the disk grows, a snapshot moves the guests, another
//! job works on the disk beside an active commit and goes on at its base.
//!
//! A target has the size of its disk at the moment of the job's event; a cut after that shows it.

use std::cell::Cell;
use std::rc::Rc;

use liveblk::engine::driver::sim::Rng;
use liveblk::engine::executor::{Class, JoinHandle};
use liveblk::engine::node::Node;
use liveblk::jobs::converge::Converge;
use liveblk::jobs::lifecycle::Verb;
use liveblk::jobs::{
    BackupSpec, CopyMode, JobError, MirrorOptions, MirrorSpec, SyncMode, start_backup, start_mirror,
};
use liveblk::{Job, Status};

use super::changes;
use super::ledger::Window;
use super::operator::{
    Ending, Target, close, copy_mode, end_ready, gone, is_excused, judge_copy, on_success, options,
    target,
};
use super::together;
use super::world::World;

/// Sometimes a job is to be ready in time.
pub(crate) fn converge(rng: &mut Rng) -> Option<Converge> {
    let small = |value: u64| u32::try_from(value).expect("invariant: small");
    rng.chance(200).then(|| Converge {
        deadline_ms: small(rng.between(1, 20)),
        max_latency_us: small(rng.between(50, 5000)),
    })
}

/// The disk of `job`, a mirror or an active commit into `target`, grows under it or gets a new
/// layer. `keeps`: what lies below the new layer stays as it was then.
pub(crate) async fn disturb(
    world: &Rc<World>,
    index: usize,
    (job, target): (&Rc<Job>, &Rc<Node>),
    keeps: bool,
    rng: &mut Rng,
) {
    match rng.below(16) {
        0..2 => {
            let from = world.disks[index].disk.size();
            changes::grow(world, index, rng).await;
            let sizes = (target.size(), world.disks[index].disk.size());
            // A job that is over does not follow any more.
            let lives = job.status() < Status::Waiting;
            let follows = sizes.1 > from && lives && world.plan.is_peaceful();
            assert!(!follows || sizes.0 >= sizes.1, "a target did not grow: {sizes:?}");
        }
        2..4 if keeps => together::snapshots(world, &[index], rng).await,
        2..4 => together::layer(world, index, rng).await,
        _ => {}
    }
}

/// Starts a backup or a mirror of disk `index` beside its active commit `commit`, and sees to its
/// end.
pub(crate) fn start(
    world: &Rc<World>,
    index: usize,
    commit: &Rc<Job>,
    mut rng: Rng,
) -> JoinHandle<()> {
    let (world, commit) = (Rc::clone(world), Rc::clone(commit));
    world.core.clone().spawn(Class::Guest, async move {
        if rng.chance(500) {
            backup(&world, index, &mut rng).await;
        } else {
            mirror(&world, index, &commit, &mut rng).await;
        }
    })
}

/// Whether a job may be refused beside the others: one of them is about to end.
fn is_refused(error: &JobError) -> bool {
    let text = error.to_string();
    text.contains("is busy: block device is in use by block job")
        || text.starts_with("Permission conflict")
}

async fn backup(world: &Rc<World>, index: usize, rng: &mut Rng) {
    let Target { chain, node } = target(world, index, "beside", rng).await;
    let spec = BackupSpec {
        job: options(world),
        source: world.disks[index].disk.node(),
        target: Rc::clone(&node),
        sync: SyncMode::Full,
        allow_larger_target: false,
        compress: node.can_compress() && rng.chance(200),
        more: Default::default(),
    };
    let window = Rc::new(Cell::new(None));
    on_success(world, &spec.job.id, (index, chain), &window);
    let from = world.clock.tick();
    match start_backup(spec).await {
        Ok(job) => {
            window.set(Some(Window { from, to: world.clock.tick() }));
            match gone(world, &job).await {
                Ok(()) => judge_copy(world, index, &node, window.get(), "backup").await,
                Err(error) => assert!(is_excused(world, &error), "a backup failed: {error}"),
            }
        }
        Err(error) => {
            let fits = is_refused(&error) || is_excused(world, &error);
            assert!(fits, "a backup does not start: {error}");
        }
    }
    close(world, &node).await;
}

/// A mirror that may only take the guests when the commit has ended.
async fn mirror(world: &Rc<World>, index: usize, commit: &Rc<Job>, rng: &mut Rng) {
    let Some((job, target)) = mirroring(world, index, rng).await else { return };
    let jobs = world.host.jobs();
    let ending = *rng.pick(&[Ending::Keep, Ending::Complete]);
    if ending == Ending::Complete {
        jobs.until(commit.id(), |_| false).await;
        // Who waits for the commit, too, comes first.
        world.core.sleep(1_000).await;
    }
    jobs.until(job.id(), |status| status == Status::Ready || status.is_completed()).await;
    if job.status() == Status::Ready && ending == Ending::Complete {
        return take(world, index, &job, target).await;
    }
    if job.status() == Status::Ready {
        let id = job.id().to_string();
        return end_ready(world, index, &job, &id, target, ending).await;
    }
    let error = gone(world, &job).await.expect_err("a mirror does not end by itself");
    assert!(is_excused(world, &error), "a mirror failed: {error}");
    close(world, &target.node).await;
}

/// A mirror that takes the guests away from under an active commit; whether it did.
pub(crate) async fn takes_over(world: &Rc<World>, index: usize, rng: &mut Rng) -> bool {
    let Some((job, target)) = mirroring(world, index, rng).await else { return false };
    let jobs = world.host.jobs();
    jobs.until(job.id(), |status| status == Status::Ready || status.is_completed()).await;
    let node = Rc::clone(&target.node);
    if job.status() != Status::Ready {
        let error = gone(world, &job).await.expect_err("a mirror does not end by itself");
        assert!(is_excused(world, &error), "a mirror failed: {error}");
        close(world, &node).await;
        return false;
    }
    take(world, index, &job, target).await;
    world.disks[index].disk.node().id() == node.id()
}

/// Completes a mirror whose source another job holds: who started that one closes it.
async fn take(world: &Rc<World>, index: usize, job: &Rc<Job>, target: Target) {
    let state = &world.disks[index];
    let (old, new) = (state.active.borrow().clone(), target.chain.clone());
    state.active.borrow_mut().push(new.clone());
    let (weak, size) = (Rc::downgrade(world), Rc::clone(&target.node));
    world.at_success(job.id(), move || {
        let Some(world) = weak.upgrade() else { return };
        let sizes = (size.size(), world.disks[index].disk.size());
        assert!(sizes.0 == sizes.1 || !world.plan.is_peaceful(), "of target and disk: {sizes:?}");
        *world.disks[index].active.borrow_mut() = vec![new];
    });
    // Perhaps it failed already.
    let _ = world.host.jobs().block_job_verb(job.id(), Verb::Complete, false);
    if let Err(error) = gone(world, job).await {
        assert!(is_excused(world, &error), "a ready mirror failed: {error}");
        *state.active.borrow_mut() = old;
        close(world, &target.node).await;
    }
}

async fn mirroring(world: &Rc<World>, index: usize, rng: &mut Rng) -> Option<(Rc<Job>, Target)> {
    let target = target(world, index, "target", rng).await;
    let mode: CopyMode = copy_mode(rng);
    let spec = MirrorSpec {
        job: options(world),
        source: world.disks[index].disk.node(),
        target: Rc::clone(&target.node),
        sync: SyncMode::Full,
        copy_mode: mode,
        granularity: None,
        allow_larger_target: false,
        more: MirrorOptions { converge: converge(rng), ..MirrorOptions::default() },
    };
    match start_mirror(spec).await {
        Ok(job) => Some((job, target)),
        Err(error) => {
            let fits = is_refused(&error) || is_excused(world, &error);
            assert!(fits, "a mirror does not start: {error}");
            close(world, &target.node).await;
            None
        }
    }
}
