//! Dirty bitmaps of the disks: what each must and may hold, and what is done to it.
//!
//! The model of a bitmap is two rows of bits, one per granule: those that must be set and those
//! that may be. They follow from what guests did while the bitmap recorded: a write that was begun
//! after recording had begun and answered before somebody looks must show; one that was in flight
//! at either moment, or that need not have happened, may. A merge adds both rows; clearing empties
//! them but for what is in flight; new granules of a larger disk are clean.
//!
//! A bitmap stays on its node, or follows its disk if it was made so. What has left its disk is
//! judged once more and then forgotten.

use std::rc::Rc;

use liveblk::Error;
use liveblk::engine::bitmap::DirtyBitmap;
use liveblk::engine::driver::sim::Rng;
use liveblk::engine::node::{NewBitmap, Node, NodeId};
use liveblk::jobs::{Action, BitmapAction, BitmapName, CompletionMode, JobError, transaction};

use super::images::Image;
use super::ledger::{Ledger, Window};
use super::operator::is_excused;
use super::pattern::BLOCK;
use super::world::World;

/// How many bitmaps a disk has at most.
const BITMAPS_MAX: usize = 4;

/// A bitmap of a disk and its model.
#[derive(Clone, Debug)]
pub(crate) struct Bitmap {
    pub(crate) name: String,
    node: NodeId,
    /// The file that keeps it, if one does.
    image: Option<Rc<Image>>,
    granularity: u64,
    /// Whether it goes on where the disk goes on.
    follows: bool,
    must: Vec<bool>,
    may: Vec<bool>,
    /// When it began to record; `None`: it does not.
    since: Option<Window>,
    /// A command or a job is changing it: only the file may not be judged then.
    pub(crate) is_moving: bool,
    /// It says what a chain of backups lacks.
    pub(crate) is_of_backups: bool,
}

impl Bitmap {
    /// A clean bitmap of disk `index`; it does not record yet.
    fn new(world: &World, index: usize, new: &NewBitmap) -> Self {
        let state = &world.disks[index];
        let granularity = new.granularity.expect("invariant: always given");
        let granules = granules(state.ledger.len(), granularity);
        let top = world.chain(index).last().cloned();
        Self {
            name: new.name.clone(),
            node: state.disk.node().id(),
            image: top.filter(|_| new.persistent),
            granularity,
            follows: new.follow,
            must: vec![false; granules],
            may: vec![false; granules],
            since: None,
            is_moving: false,
            is_of_backups: false,
        }
    }

    /// Takes in what was recorded until `at`.
    fn fold(&mut self, ledger: &Ledger, at: Window) {
        let Some(since) = self.since else { return };
        ledger.each_change(|change| {
            let must = change.sure && change.begin > since.to && change.end < at.from;
            if !must && (change.end < since.from || change.begin > at.to) {
                return;
            }
            let (first, end) = (change.first * BLOCK, (change.first + change.count) * BLOCK);
            let granule = usize::try_from(self.granularity).expect("small");
            let (first, end) = (first / granule, end.div_ceil(granule).min(self.may.len()));
            for at in first..end {
                self.may[at] = true;
                self.must[at] |= must;
            }
        });
    }

    /// The rows at `at`.
    fn at(&self, ledger: &Ledger, at: Window) -> Self {
        let mut copy = self.clone();
        copy.fold(ledger, at);
        copy
    }

    /// From `at` on it has only what is in flight then and what comes.
    pub(crate) fn clear(&mut self, at: Window) {
        self.must.fill(false);
        self.may.fill(false);
        self.since = self.since.map(|_| at);
    }

    fn merge(&mut self, other: &Self) {
        for (from, to) in [(&other.must, &mut self.must), (&other.may, &mut self.may)] {
            for (at, _) in from.iter().enumerate().filter(|(_, is_set)| **is_set) {
                let (first, end) =
                    (at as u64 * other.granularity, (at as u64 + 1) * other.granularity);
                let (first, end) = (first / self.granularity, end.div_ceil(self.granularity));
                for at in first..end {
                    if let Some(bit) = to.get_mut(usize::try_from(at).expect("small")) {
                        *bit = true;
                    }
                }
            }
        }
    }

    /// Judges the bits of the real one; this is the model at that moment.
    fn judge(&self, bits: &DirtyBitmap) -> Result<(), String> {
        for (at, (must, may)) in self.must.iter().zip(&self.may).enumerate() {
            let offset = at as u64 * self.granularity;
            let is_set = bits.test(offset);
            if (*must && !is_set) || (is_set && !*may) {
                let name = &self.name;
                let has = if is_set { "is set" } else { "is not set" };
                return Err(format!("bitmap {name}: the bit of byte {offset} {has}"));
            }
        }
        Ok(())
    }
}

fn granules(blocks: usize, granularity: u64) -> usize {
    (blocks * BLOCK).div_ceil(usize::try_from(granularity).expect("small"))
}

/// Does something with the bitmaps of disk `index`.
pub(crate) async fn run(world: &Rc<World>, index: usize, rng: &mut Rng) {
    for _ in 0..rng.between(1, 4) {
        let known = world.disks[index].bitmaps.borrow().len();
        match rng.below(10) {
            0..4 if known < BITMAPS_MAX => add(world, index, rng).await,
            _ if known == 0 => add(world, index, rng).await,
            4 => remove(world, index, rng).await,
            kind => verb(world, index, kind, rng).await,
        }
        judge(world, index);
        world.core.sleep(rng.below(200_000)).await;
    }
}

/// What a new bitmap is like.
pub(crate) fn random(world: &World, index: usize, rng: &mut Rng) -> NewBitmap {
    let node = world.disks[index].disk.node();
    let like = world.chain(index).last().and_then(|top| top.qcow2);
    let can_keep =
        like.is_some_and(|like| like.version > 2) && node.format().abilities().bitmaps.is_some();
    NewBitmap {
        name: world.name("bitmap"),
        granularity: Some(512 << rng.below(9)),
        persistent: can_keep && rng.chance(600),
        disabled: rng.chance(250),
        follow: rng.chance(300),
    }
}

/// The model of a bitmap that was added within `at`.
pub(crate) fn added(world: &World, index: usize, new: &NewBitmap, at: Window) {
    let mut bitmap = Bitmap::new(world, index, new);
    bitmap.since = (!new.disabled).then_some(at);
    world.disks[index].bitmaps.borrow_mut().push(bitmap);
}

/// Runs `action` by itself as a transaction, or as the command.
async fn act(world: &Rc<World>, index: usize, action: BitmapAction, rng: &mut Rng) -> bool {
    let node = world.disks[index].disk.node();
    let done = if rng.chance(500) {
        let actions = vec![(world.core.id(), Action::Bitmap(action))];
        transaction(&world.core, actions, CompletionMode::Individual).await
    } else {
        command(&node, action).await.map_err(JobError::Engine)
    };
    if let Err(error) = &done {
        assert!(is_excused(world, error), "a command on a bitmap failed: {error}");
    }
    done.is_ok()
}

async fn command(node: &Rc<Node>, action: BitmapAction) -> Result<(), Error> {
    match action {
        BitmapAction::Add { new, .. } => node.add_bitmap(new).await.map(drop),
        BitmapAction::Remove(of) => node.remove_bitmap(&of.name).await,
        BitmapAction::Clear(of) => node.clear_bitmap(&of.name),
        BitmapAction::Enable(of) => node.enable_bitmap(&of.name, true).await,
        BitmapAction::Disable(of) => node.enable_bitmap(&of.name, false).await,
        BitmapAction::Merge { target, sources } => {
            let sources = sources.iter().map(|of| node.bitmap(&of.name));
            node.merge_bitmaps(&target.name, sources.collect::<Result<_, _>>()?).await
        }
    }
}

async fn add(world: &Rc<World>, index: usize, rng: &mut Rng) {
    let new = random(world, index, rng);
    let node = world.disks[index].disk.node_name().to_string();
    let from = world.clock.tick();
    if act(world, index, BitmapAction::Add { node, new: new.clone() }, rng).await {
        added(world, index, &new, Window { from, to: world.clock.tick() });
    }
}

async fn remove(world: &Rc<World>, index: usize, rng: &mut Rng) {
    let state = &world.disks[index];
    let at = state.bitmaps.borrow().iter().position(|bitmap| !bitmap.is_of_backups);
    let Some(at) = at else { return };
    let bitmap = state.bitmaps.borrow_mut().remove(at);
    let (node, name) = (state.disk.node_name().to_string(), bitmap.name);
    act(world, index, BitmapAction::Remove(BitmapName { node, name }), rng).await;
}

/// Clears, starts, stops or merges.
async fn verb(world: &Rc<World>, index: usize, kind: u64, rng: &mut Rng) {
    let state = &world.disks[index];
    let names: Vec<String> =
        state.bitmaps.borrow().iter().map(|bitmap| bitmap.name.clone()).collect();
    let at = rng.index(names.len());
    let node = state.disk.node_name().to_string();
    let of = |name: &String| BitmapName { node: node.clone(), name: name.clone() };
    let other = rng.index(names.len());
    let is_kept = state.bitmaps.borrow()[at].is_of_backups;
    let action = match kind {
        5 if !is_kept => BitmapAction::Clear(of(&names[at])),
        6 if !is_kept => BitmapAction::Disable(of(&names[at])),
        7 if !is_kept => BitmapAction::Enable(of(&names[at])),
        _ => BitmapAction::Merge { target: of(&names[at]), sources: vec![of(&names[other])] },
    };
    state.bitmaps.borrow_mut()[at].is_moving = true;
    let from = world.clock.tick();
    let done = act(world, index, action.clone(), rng).await;
    let window = Window { from, to: world.clock.tick() };
    let bitmaps = &mut *state.bitmaps.borrow_mut();
    let source = bitmaps[other].at(&state.ledger, window);
    let bitmap = &mut bitmaps[at];
    bitmap.is_moving = false;
    match action {
        _ if !done => drop(bitmaps.remove(at)),
        BitmapAction::Clear(_) => bitmap.clear(window),
        BitmapAction::Enable(_) if bitmap.since.is_none() => bitmap.since = Some(window),
        BitmapAction::Disable(_) => {
            bitmap.fold(&state.ledger, window);
            bitmap.since = None;
        }
        BitmapAction::Merge { .. } => bitmap.merge(&source),
        _ => {}
    }
}

/// The disk got another size within `at`; the ledger knows it already.
pub(crate) fn resized(world: &World, index: usize, at: Window) {
    let state = &world.disks[index];
    for bitmap in &mut *state.bitmaps.borrow_mut() {
        bitmap.fold(&state.ledger, Window { from: at.from, to: at.from });
        let granules = granules(state.ledger.len(), bitmap.granularity);
        bitmap.must.resize(granules, false);
        bitmap.may.resize(granules, false);
        bitmap.since = bitmap.since.map(|_| at);
    }
}

/// Judges all bitmaps of disk `index` as they are now.
pub(crate) fn judge(world: &World, index: usize) {
    let state = &world.disks[index];
    let node = state.disk.node();
    let now = world.clock.tick();
    for bitmap in state.bitmaps.borrow().iter().filter(|bitmap| bitmap.node == node.id()) {
        let real = node.bitmap(&bitmap.name).expect("a bitmap that was added is there");
        let model = bitmap.at(&state.ledger, Window { from: now, to: now });
        let judged = real.view(|bits| model.judge(bits));
        judged.unwrap_or_else(|wrong| panic!("{wrong}"));
    }
}

/// What has left disk `index` during what began at `began` is judged and forgotten.
pub(crate) fn settle(world: &World, index: usize, began: u32) {
    let state = &world.disks[index];
    let node = state.disk.node().id();
    let now = world.clock.tick();
    for bitmap in state.bitmaps.borrow_mut().iter_mut().filter(|b| b.follows && b.node != node) {
        // Its place in the new file comes later, if there is one.
        (bitmap.node, bitmap.image) = (node, None);
    }
    let gone: Vec<Bitmap> = state.bitmaps.borrow_mut().extract_if(.., |b| b.node != node).collect();
    for bitmap in gone {
        let Some(node) = world.host.graph().node(bitmap.node) else { continue };
        let Ok(real) = node.bitmap(&bitmap.name) else { continue };
        let model = bitmap.at(&state.ledger, Window { from: began, to: now });
        let judged = real.view(|bits| model.judge(bits));
        judged.unwrap_or_else(|wrong| panic!("on a node that was left: {wrong}"));
    }
    let has = |name: &str| state.bitmaps.borrow().iter().any(|bitmap| bitmap.name == name);
    let lost = state.backups.borrow().as_ref().is_some_and(|backups| !has(&backups.bitmap));
    if lost {
        state.backups.borrow_mut().take();
    }
}

/// What a file must say about the bitmaps that it keeps, after a cut now.
pub(crate) struct Stored {
    bitmaps: Vec<Bitmap>,
    is_closed: bool,
}

impl Stored {
    /// Of disk `index`, if `image` is the one that holds it.
    pub(crate) fn of(world: &World, index: usize, image: &Rc<Image>) -> Self {
        let state = &world.disks[index];
        let now = world.clock.now();
        let is_sure = state.active.borrow().len() == 1;
        let kept = |bitmap: &&Bitmap| {
            is_sure
                && !bitmap.is_moving
                && bitmap.image.as_ref().is_some_and(|kept| Rc::ptr_eq(kept, image))
        };
        let bitmaps = state.bitmaps.borrow();
        let at = Window { from: now + 1, to: now + 1 };
        let bitmaps = bitmaps.iter().filter(kept).map(|known| known.at(&state.ledger, at));
        Self {
            bitmaps: bitmaps.collect(),
            is_closed: world.is_closed.get() && world.plan.is_peaceful(),
        }
    }

    /// Judges the bitmaps of `node`, which was opened from the file.
    pub(crate) fn judge(&self, node: &Node) -> Result<(), String> {
        let facts = node.bitmap_facts();
        for bitmap in &self.bitmaps {
            let name = &bitmap.name;
            let found = facts.iter().find(|facts| facts.name.as_deref() == Some(name.as_str()));
            let Some(found) = found else {
                return Err(format!("bitmap {name} is not in the file"));
            };
            if found.inconsistent && self.is_closed {
                return Err(format!("bitmap {name} is not stored, but the image was closed"));
            }
            if found.inconsistent {
                continue;
            }
            if found.recording != bitmap.since.is_some() {
                return Err(format!("bitmap {name}: recording is {}", found.recording));
            }
            let real = node.bitmap(name).map_err(|error| error.to_string())?;
            real.view(|bits| bitmap.judge(bits))
                .map_err(|wrong| format!("in the file: {wrong}"))?;
        }
        Ok(())
    }
}
