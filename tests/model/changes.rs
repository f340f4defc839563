//! Changes of a disk's own image under its guests: a larger disk, snapshots inside the image.

use std::rc::Rc;

use liveblk::engine::driver::sim::Rng;
use liveblk::engine::format::{Preallocation, SnapshotInfo};

use super::ledger::Window;
use super::pattern::BLOCK;
use super::world::{Internal, World};

/// Makes disk `index` some blocks larger.
pub(crate) async fn grow(world: &Rc<World>, index: usize, rng: &mut Rng) {
    let state = &world.disks[index];
    let top = Rc::clone(world.chain(index).last().expect("invariant: a disk has a chain"));
    let has_internal = world.internal.borrow().iter().any(|kept| kept.is_in(&top));
    if has_internal && top.qcow2.is_some_and(|like| like.version < 3) {
        return;
    }
    let blocks = rng.between(1, 300);
    let size = state.disk.size() + blocks * BLOCK as u64;
    match state.disk.node().resize(size, Preallocation::Off).await {
        Ok(()) => state.ledger.grow(usize::try_from(blocks).expect("invariant: small")),
        Err(error) => assert!(world.is_planned(&error), "a disk does not grow: {error}"),
    }
    assert!(state.disk.size() == size || !world.plan.is_peaceful(), "the disk has its new size");
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
