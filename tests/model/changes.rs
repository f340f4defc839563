//! Changes of a disk's own image under its guests: another size, snapshots inside the image, other
//! options.

use std::rc::Rc;

use liveblk::engine::driver::sim::Rng;
use liveblk::engine::format::{FormatOptions, InfoValue, Preallocation, SnapshotInfo};
use liveblk::engine::graph::{NewBacking, Reopen};
use liveblk::engine::node::{DetectZeroes, Node, NodeOptions};
use liveblk::jobs;
use liveblk::{ErrorKind, JobError};

use super::bitmaps;
use super::images::Image;
use super::ledger::Window;
use super::operator::is_excused;
use super::pattern::BLOCK;
use super::world::{Internal, World};

/// How long a reopen waits for requests in flight.
const REOPEN_WAIT_NS: u64 = 10_000_000_000;

/// Gives disk `index` another size: mostly a larger one.
pub(crate) async fn resize(world: &Rc<World>, index: usize, rng: &mut Rng) {
    if rng.chance(700) { grow(world, index, rng).await } else { shrink(world, index, rng).await }
}

/// The image that disk `index` is in, if its size may change: a version 2 image knows no sizes of
/// its snapshots.
fn resizable(world: &World, index: usize) -> Option<Rc<Image>> {
    let top = Rc::clone(world.chain(index).last().expect("invariant: a disk has a chain"));
    let is_old = top.qcow2.is_some_and(|like| like.version < 3);
    let fixed = is_old && world.internal.borrow().iter().any(|kept| kept.is_in(&top));
    (!fixed).then_some(top)
}

/// Makes disk `index` some blocks larger.
pub(crate) async fn grow(world: &Rc<World>, index: usize, rng: &mut Rng) {
    let Some(top) = resizable(world, index) else { return };
    let state = &world.disks[index];
    let node = state.disk.node();
    let blocks = state.ledger.len() + usize::try_from(rng.between(1, 300)).expect("small");
    let size = (blocks * BLOCK) as u64;
    // It did not become small when it should: nobody asks for its end any more.
    if size <= node.size() {
        return;
    }
    // Such an image has no entry that hides what lies below.
    let is_old = top.qcow2.is_some_and(|like| like.version < 3);
    if is_old && node.backing().is_some_and(|below| below.size() > node.size()) {
        return;
    }
    state.ledger.resizing(blocks);
    let from = world.clock.tick();
    match jobs::resize(&node, size, Preallocation::Off).await {
        Ok(()) => {
            state.ledger.resized(blocks);
            bitmaps::resized(world, index, Window { from, to: world.clock.tick() });
            assert_eq!(state.disk.size(), size, "the disk has its new size");
        }
        Err(error) if is_fixed(&error) => state.ledger.not_resized(),
        Err(error) => {
            assert!(is_excused(world, &error), "a disk does not grow: {error}");
            state.bitmaps.borrow_mut().clear();
        }
    }
}

/// Whether the disk, or the target of a job, cannot grow as it is: an old image that cannot say
/// which size its snapshots had, or has no entry that hides what lies below, be it only the base
/// of a commit that has just grown.
fn is_fixed(error: &JobError) -> bool {
    let text = error.to_string();
    let known = ["v2 image which has snapshots", "Failed to zero out new clusters"];
    known.iter().any(|known| text.contains(known))
}

/// Makes disk `index` smaller, if what its guests do at its end ends.
async fn shrink(world: &Rc<World>, index: usize, rng: &mut Rng) {
    if resizable(world, index).is_none() {
        return;
    }
    let state = &world.disks[index];
    let old = state.ledger.len();
    let less = usize::try_from(rng.between(1, 200)).expect("small");
    let Some(blocks) = old.checked_sub(less).filter(|blocks| *blocks >= 64) else { return };
    state.ledger.leave(blocks);
    for _ in 0..100 {
        if state.reach.borrow().iter().all(|end| *end <= blocks) {
            break;
        }
        world.core.sleep(100_000).await;
    }
    let is_used = state.reach.borrow().iter().any(|end| *end > blocks);
    if is_used || state.ledger.is_open_behind(blocks) {
        return state.ledger.leave(old);
    }
    // Backups above a larger one would show again what is cut off here.
    state.backups.borrow_mut().take();
    state.ledger.resizing(blocks);
    let from = world.clock.tick();
    match state.disk.node().resize((blocks * BLOCK) as u64, Preallocation::Off).await {
        Ok(()) => {
            state.ledger.resized(blocks);
            bitmaps::resized(world, index, Window { from, to: world.clock.tick() });
        }
        // It may be small or as it was, which a cut would show; nobody asks for its end again.
        Err(error) => {
            assert!(world.is_planned(&error), "a disk does not shrink: {error}");
            let id = state.ledger.begin(0, blocks, old - blocks);
            state.ledger.end(id, false, false);
            state.bitmaps.borrow_mut().clear();
        }
    }
}

/// Takes a snapshot inside the image of disk `index`, or removes one.
pub(crate) async fn internal(world: &Rc<World>, index: usize, rng: &mut Rng) {
    let chain = world.chain(index);
    let top = Rc::clone(chain.last().expect("invariant: a disk has a chain"));
    let known = world.internal.borrow().iter().filter(|kept| kept.is_in(&top)).count();
    let format = Rc::clone(world.disks[index].disk.node().format());
    let Some(all) = format.abilities().snapshots.filter(|_| top.snapshots_max() > 0) else {
        return;
    };
    if known == top.snapshots_max() || (known > 0 && rng.chance(300)) {
        let name = {
            let mut kept = world.internal.borrow_mut();
            let at = kept.iter().position(|kept| kept.is_in(&top));
            kept.remove(at.expect("invariant: counted above")).name
        };
        if let Err(error) = all.delete(&name).await {
            assert!(world.is_planned(&error), "a snapshot is not removed: {error}");
            // It may be there or not, and count or not.
            world.internal.borrow_mut().retain(|kept| !kept.is_in(&top));
        }
        return;
    }
    let name = world.name("internal");
    let from = world.clock.tick();
    let info = SnapshotInfo { name: name.clone(), ..SnapshotInfo::default() };
    match all.create(info).await {
        Ok(_) => {
            let window = Window { from, to: world.clock.tick() };
            world.internal.borrow_mut().push(Internal { disk: index, chain, name, window });
        }
        Err(error) => assert!(world.is_planned(&error), "no internal snapshot: {error}"),
    }
}

/// Gives the node of disk `index` other options, makes a layer below writable for a while, or
/// learns that the disk cannot be taken away from its guests.
pub(crate) async fn reopen(world: &Rc<World>, index: usize, rng: &mut Rng) {
    let node = world.disks[index].disk.node();
    if rng.chance(200) {
        let refused = change(world, vec![as_it_is(&node, false)]).await;
        let text = refused.expect_err("guests write to the disk").to_string();
        assert!(text.contains("read-write users"), "{text}");
        return;
    }
    if let Some(below) = node.backing().filter(|below| !below.is_writable() && rng.chance(400)) {
        for writable in [true, false] {
            let done = change(world, vec![as_it_is(&below, writable)]).await;
            if let Err(error) = done {
                assert!(world.is_planned(&error), "a layer is not reopened: {error}");
            }
            world.core.sleep(rng.below(500_000)).await;
        }
        return;
    }
    let mut new = as_it_is(&node, true);
    new.options.discard_unmap = rng.chance(700);
    new.options.detect_zeroes =
        *rng.pick(&[DetectZeroes::Off, DetectZeroes::On, DetectZeroes::Unmap]);
    let like = world.chain(index).last().and_then(|top| top.qcow2);
    if like.is_some_and(|like| like.version > 2) {
        let flag = |on| InfoValue::Flag(on);
        new.format_options.insert("lazy-refcounts".into(), flag(rng.chance(300)));
        new.format_options.insert("discard-no-unref".into(), flag(rng.chance(200)));
    }
    if let Err(error) = change(world, vec![new]).await {
        assert!(world.is_planned(&error), "options do not change: {error}");
    }
}

fn as_it_is(node: &Rc<Node>, writable: bool) -> Reopen {
    let options = NodeOptions { ..node.options() };
    let format_options = FormatOptions::new();
    Reopen { node: Rc::clone(node), writable, options, format_options, backing: NewBacking::Keep }
}

async fn change(world: &World, list: Vec<Reopen>) -> Result<(), liveblk::Error> {
    let done = world.host.graph().reopen(list, REOPEN_WAIT_NS).await;
    // What is not there was dropped by a job that ended meanwhile.
    done.or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) })
}
