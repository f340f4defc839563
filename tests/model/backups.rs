//! Backups that build on each other: a full one together with a new bitmap, then what the bitmap
//! names, each into an overlay of the one before. Every chain of them is the disk at an instant.

use std::cell::Cell;
use std::rc::Rc;

use liveblk::engine::driver::sim::Rng;
use liveblk::engine::node::{Node, NodeOptions};
use liveblk::jobs::lifecycle::Verb;
use liveblk::jobs::{
    Action, BackupAction, BackupOptions, BackupSpec, BitmapAction, BitmapChoice, BitmapMode,
    CompletionMode, JobError, MirrorOptions, MirrorSpec, SyncMode, start_backup, start_mirror,
    transaction,
};
use liveblk::{Job, Status};

use super::bitmaps::{self, Bitmap};
use super::images::{Chain, Image, Qcow2, open_chain};
use super::ledger::Window;
use super::operator::{
    COPY, Target, close, copy_mode, gone, is_excused, judge_copy, meddle, on_success, opened,
    options, target,
};
use super::world::{Backups, World};

/// How many backups build on each other.
const BACKUPS_MAX: usize = 4;

/// The next backup of disk `index`.
pub(crate) async fn run(world: &Rc<World>, index: usize, rng: &mut Rng) {
    let known = world.disks[index].backups.borrow().clone();
    match known.filter(|known| known.chain.len() < BACKUPS_MAX) {
        Some(known) => next(world, index, known, rng).await,
        None => first(world, index, rng).await,
    }
}

/// The first backup: at its instant the bitmap begins.
async fn first(world: &Rc<World>, index: usize, rng: &mut Rng) {
    let state = &world.disks[index];
    state.backups.borrow_mut().take();
    // An older bitmap of this kind is one like any other now.
    state.bitmaps.borrow_mut().iter_mut().for_each(|bitmap| bitmap.is_of_backups = false);
    let Target { chain, node } = target(world, index, COPY, rng).await;
    let mut new = bitmaps::random(world, index, rng);
    new.disabled = false;
    new.follow = rng.chance(600);
    let backup = BackupAction {
        job: options(world),
        source: state.disk.node_name().to_string(),
        target: node.name().to_string(),
        sync: SyncMode::Full,
        allow_larger_target: false,
        compress: node.can_compress() && rng.chance(200),
        more: BackupOptions::default(),
    };
    let id = backup.job.id.clone();
    let add = BitmapAction::Add { node: backup.source.clone(), new: new.clone() };
    let mut actions = vec![Action::Bitmap(add), Action::Backup(backup)];
    if rng.chance(500) {
        actions.reverse();
    }
    let actions = actions.into_iter().map(|action| (world.core.id(), action)).collect();
    let window = Rc::new(Cell::new(None));
    on_success(world, &id, (index, chain.clone()), &window);
    let from = world.clock.tick();
    let done = transaction(&world.core, actions, CompletionMode::Individual).await;
    if let Err(error) = done {
        assert!(is_excused(world, &error), "a backup with its bitmap does not start: {error}");
        return close(world, &node).await;
    }
    let at = Window { from, to: world.clock.tick() };
    window.set(Some(at));
    bitmaps::added(world, index, &new, at);
    let job = world.host.jobs().find(&id);
    // Without a job it has ended, well or badly, before anybody could look.
    if let Some(job) = job
        && ended(world, index, &job, &node, at, rng).await
    {
        bitmap_of(world, index, &new.name, |bitmap| bitmap.is_of_backups = true);
        *state.backups.borrow_mut() = Some(Backups { chain, bitmap: new.name });
    }
    close(world, &node).await;
}

/// A backup of what the bitmap names.
async fn next(world: &Rc<World>, index: usize, known: Backups, rng: &mut Rng) {
    let state = &world.disks[index];
    let Some(Target { chain, node }) = above(world, index, &known.chain, rng).await else { return };
    let mode = *rng.pick(&[BitmapMode::OnSuccess, BitmapMode::Always, BitmapMode::Never]);
    let sync = if mode == BitmapMode::OnSuccess { SyncMode::Incremental } else { SyncMode::Bitmap };
    let bitmap = BitmapChoice { name: Some(known.bitmap.clone()), mode: Some(mode) };
    bitmap_of(world, index, &known.bitmap, |bitmap| bitmap.is_moving = true);
    let target = Target { chain: chain.clone(), node: Rc::clone(&node) };
    let good = if rng.chance(300) {
        mirrored(world, index, &target, (sync, bitmap), rng).await
    } else {
        backed_up(world, index, &target, (sync, bitmap), rng).await
    };
    let gives_up = mode != BitmapMode::Never;
    bitmap_of(world, index, &known.bitmap, |bitmap| {
        bitmap.is_moving = false;
        if let Some(at) = good.filter(|_| gives_up) {
            bitmap.clear(at);
        }
    });
    if good.is_some() && gives_up {
        *state.backups.borrow_mut() = Some(Backups { chain, bitmap: known.bitmap });
    } else if good.is_none() && mode == BitmapMode::Always {
        // What was copied is in no chain that counts, and the bitmap has given it up.
        state.bitmaps.borrow_mut().retain(|bitmap| bitmap.name != known.bitmap);
        state.backups.borrow_mut().take();
    }
    close(world, &node).await;
}

/// A backup into `target`; when its instant was, if it succeeded.
async fn backed_up(
    world: &Rc<World>,
    index: usize,
    target: &Target,
    (sync, bitmap): (SyncMode, BitmapChoice),
    rng: &mut Rng,
) -> Option<Window> {
    let node = Rc::clone(&target.node);
    let spec = BackupSpec {
        job: options(world),
        source: world.disks[index].disk.node(),
        sync,
        allow_larger_target: false,
        compress: node.can_compress() && rng.chance(200),
        // Whether that is possible is the world's choice.
        more: BackupOptions { bitmap, use_copy_range: true, ..BackupOptions::default() },
        target: node,
    };
    let window = Rc::new(Cell::new(None));
    on_success(world, &spec.job.id, (index, target.chain.clone()), &window);
    let from = world.clock.tick();
    match start_backup(spec).await {
        Ok(job) => {
            let at = Window { from, to: world.clock.tick() };
            window.set(Some(at));
            ended(world, index, &job, &target.node, at, rng).await.then_some(at)
        }
        Err(error) => {
            assert!(is_excused(world, &error), "a backup by a bitmap does not start: {error}");
            None
        }
    }
}

/// A mirror into `target` that follows the disk for a while; when its end was, if it succeeded.
async fn mirrored(
    world: &Rc<World>,
    index: usize,
    target: &Target,
    (sync, bitmap): (SyncMode, BitmapChoice),
    rng: &mut Rng,
) -> Option<Window> {
    let spec = MirrorSpec {
        job: options(world),
        source: world.disks[index].disk.node(),
        target: Rc::clone(&target.node),
        sync,
        copy_mode: copy_mode(rng),
        granularity: None,
        allow_larger_target: false,
        more: MirrorOptions { bitmap, ..MirrorOptions::default() },
    };
    let id = spec.job.id.clone();
    let job = match start_mirror(spec).await {
        Ok(job) => job,
        Err(error) => {
            assert!(is_excused(world, &error), "a mirror by a bitmap does not start: {error}");
            return None;
        }
    };
    meddle(world, &job, rng).await;
    let jobs = world.host.jobs();
    jobs.until(&id, |status| status == Status::Ready || status.is_completed()).await;
    world.core.sleep(rng.below(1_000_000)).await;
    let window = Rc::new(Cell::new(None));
    let (weak, at_event, part) =
        (Rc::downgrade(world), Rc::clone(&window), (index, target.chain.clone()));
    let from = world.clock.tick();
    world.at_success(&id, move || {
        let Some(world) = weak.upgrade() else { return };
        let window = Window { from, to: world.clock.tick() };
        at_event.set(Some(window));
        world.keep(vec![part], window);
    });
    // Perhaps it failed already.
    let _ = jobs.block_job_verb(&id, Verb::Cancel, false);
    match gone(world, &job).await {
        Ok(()) => {
            judge_copy(world, index, &target.node, window.get(), "mirror by a bitmap").await;
            window.get()
        }
        Err(error) => {
            assert!(is_excused(world, &error), "a mirror by a bitmap failed: {error}");
            None
        }
    }
}

fn bitmap_of(world: &World, index: usize, name: &str, change: impl FnOnce(&mut Bitmap)) {
    let mut all = world.disks[index].bitmaps.borrow_mut();
    if let Some(bitmap) = all.iter_mut().find(|bitmap| bitmap.name == name) {
        change(bitmap);
    }
}

/// A new image above `below`, as large as the disk.
async fn above(world: &World, index: usize, below: &Chain, rng: &mut Rng) -> Option<Target> {
    let size = world.disks[index].disk.size();
    let qcow2 = Some(Qcow2::random(rng, false));
    let image = Rc::new(Image { name: world.name(COPY), size, qcow2 });
    world.make(&image, below.last()).await;
    let mut chain = below.clone();
    chain.push(image);
    let options =
        NodeOptions { discard_unmap: true, direct: rng.chance(500), ..NodeOptions::default() };
    let spec = open_chain(&chain, &options, true).named(&world.name("node"));
    let node = opened(world.host.open(spec).await)?;
    Some(Target { chain, node })
}

/// Waits for the end of `job`; whether its target is the disk at its instant, which is judged.
async fn ended(
    world: &Rc<World>,
    index: usize,
    job: &Rc<Job>,
    node: &Rc<Node>,
    at: Window,
    rng: &mut Rng,
) -> bool {
    meddle(world, job, rng).await;
    if rng.chance(150) {
        world.core.sleep(rng.below(1_000_000)).await;
        // Perhaps it is gone already.
        let _ = world.host.jobs().block_job_verb(job.id(), Verb::Cancel, true);
    }
    match gone(world, job).await {
        Ok(()) => {
            judge_copy(world, index, node, Some(at), "backup by a bitmap").await;
            true
        }
        Err(JobError::Cancelled) => false,
        Err(error) => {
            assert!(is_excused(world, &error), "a backup by a bitmap failed: {error}");
            false
        }
    }
}
