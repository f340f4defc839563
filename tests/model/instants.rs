//! Instants that are kept while guests go on: a backup with sync=none into an overlay of the disk,
//! and a copy-before-write filter with its view (fleecing). Whoever reads the overlay or the view
//! sees the disk at one moment of the start, however often and in whatever pieces it is read.
//!
//! A target that fails costs the snapshot and never a guest: where the plan of a world lets
//! something fail, reads may fail, too, and are not judged.

use std::rc::Rc;

use liveblk::BackingSource;
use liveblk::engine::driver::sim::Rng;
use liveblk::engine::node::{Node, NodeOptions, Origin};
use liveblk::jobs::lifecycle::Verb;
use liveblk::jobs::{
    BackupSpec, CopyBeforeWriteSpec, JobError, OnCbwError, SyncMode, add_copy_before_write,
    add_snapshot_access, start_backup,
};

use super::images::{Image, Qcow2, open_chain};
use super::judge::one_moment;
use super::ledger::Window;
use super::operator::{COPY, Target, close, gone, is_excused, judge_copy, opened, options, target};
use super::pattern;
use super::world::World;

/// Bytes that are read at a time.
const PIECE: u64 = 48 << 10;

/// Keeps an instant of disk `index` and looks at it.
pub(crate) async fn run(world: &Rc<World>, index: usize, rng: &mut Rng) {
    if rng.chance(500) {
        in_an_overlay(world, index, rng).await;
    } else {
        fleeced(world, index, rng).await;
    }
}

/// A backup with sync=none into an overlay of the disk itself.
async fn in_an_overlay(world: &Rc<World>, index: usize, rng: &mut Rng) {
    let source = world.disks[index].disk.node();
    let qcow2 = Some(Qcow2::random(rng, false));
    let image = Rc::new(Image { name: world.name(COPY), size: source.size(), qcow2 });
    world.make(&image, world.chain(index).last()).await;
    let options_of_node = NodeOptions { discard_unmap: true, ..NodeOptions::default() };
    let mut spec = open_chain(&[image], &options_of_node, true).named(&world.name("node"));
    spec.backing = BackingSource::Node(source.name().to_string());
    let Some(overlay) = opened(world.host.open(spec).await) else { return };
    let spec = BackupSpec {
        job: options(world),
        source,
        target: Rc::clone(&overlay),
        sync: SyncMode::None,
        allow_larger_target: false,
        compress: false,
        more: Default::default(),
    };
    let from = world.clock.tick();
    match start_backup(spec).await {
        Ok(job) => {
            let window = Window { from, to: world.clock.tick() };
            look(world, index, &overlay, window, rng).await;
            // Perhaps it has failed already.
            let _ = world.host.jobs().block_job_verb(job.id(), Verb::Cancel, true);
            match gone(world, &job).await {
                Ok(()) | Err(JobError::Cancelled) => {}
                Err(error) => assert!(is_excused(world, &error), "sync=none failed: {error}"),
            }
        }
        Err(error) => assert!(is_excused(world, &error), "sync=none does not start: {error}"),
    }
    close(world, &overlay).await;
}

/// A filter above the disk and a view of what it keeps, which is sometimes copied by a job.
async fn fleeced(world: &Rc<World>, index: usize, rng: &mut Rng) {
    let Target { node: kept, .. } = target(world, index, COPY, rng).await;
    let spec = CopyBeforeWriteSpec {
        name: Some(world.name("filter")),
        source: world.disks[index].disk.node(),
        target: Rc::clone(&kept),
        owned: None,
        bitmap: None,
        on_error: OnCbwError::BreakSnapshot,
        timeout_ns: None,
        min_cluster_size: 0,
    };
    let from = world.clock.tick();
    let filter = match add_copy_before_write(spec).await {
        Ok(filter) => filter,
        Err(error) => {
            assert!(is_excused(world, &error), "a filter is not added: {error}");
            return close(world, &kept).await;
        }
    };
    let window = Window { from, to: world.clock.tick() };
    let name = world.name("view");
    let view = add_snapshot_access(&world.core, Some(&name), &filter, true).expect("a view");
    look(world, index, &view, window, rng).await;
    if rng.chance(400) {
        copied(world, index, &view, window, rng).await;
    }
    for node in [view, filter, kept] {
        close(world, &node).await;
    }
}

/// A backup of the view is the instant of the filter, not its own.
async fn copied(world: &Rc<World>, index: usize, view: &Rc<Node>, at: Window, rng: &mut Rng) {
    let Target { node, .. } = target(world, index, "pulled", rng).await;
    let spec = BackupSpec {
        job: options(world),
        source: Rc::clone(view),
        target: Rc::clone(&node),
        sync: SyncMode::Full,
        allow_larger_target: false,
        compress: false,
        more: Default::default(),
    };
    let ended = match start_backup(spec).await {
        Ok(job) => gone(world, &job).await,
        Err(error) => Err(error),
    };
    match ended {
        Ok(()) if world.plan.is_peaceful() => {
            judge_copy(world, index, &node, Some(at), "backup of a view").await;
        }
        Ok(()) => {}
        Err(error) => assert!(!world.plan.is_peaceful(), "a backup of a view failed: {error}"),
    }
    close(world, &node).await;
}

/// Reads all of `node` some times while guests write: each time it is the disk within `at`.
async fn look(world: &Rc<World>, index: usize, node: &Rc<Node>, at: Window, rng: &mut Rng) {
    for _ in 0..rng.between(1, 3) {
        world.core.sleep(rng.below(1_000_000)).await;
        let found = slowly(world, node, rng).await;
        if !world.plan.is_peaceful() {
            continue;
        }
        let bytes = found.unwrap_or_else(|wrong| panic!("an instant cannot be read: {wrong}"));
        let judged =
            pattern::values(&bytes, 0).and_then(|values| one_moment(world, &[(index, values)], at));
        judged.unwrap_or_else(|wrong| panic!("an instant is wrong: {wrong}"));
    }
}

/// Reads `node` piece by piece in a random order.
async fn slowly(world: &World, node: &Rc<Node>, rng: &mut Rng) -> Result<Vec<u8>, String> {
    let size = node.size();
    let at = |offset: u64| usize::try_from(offset).expect("invariant: small");
    let mut bytes = vec![0; at(size)];
    let mut left: Vec<u64> = (0..size.div_ceil(PIECE)).collect();
    while !left.is_empty() {
        let start = left.swap_remove(at(rng.below(left.len() as u64))) * PIECE;
        let end = size.min(start + PIECE);
        let buf = world.core.pool().alloc(at(end - start));
        let read = node.read(start, buf.clone(), Origin::External).await;
        read.map_err(|error| error.to_string())?;
        bytes[at(start)..at(end)].copy_from_slice(&buf.to_vec());
        if rng.chance(300) {
            world.core.sleep(rng.below(100_000)).await;
        }
    }
    Ok(bytes)
}
