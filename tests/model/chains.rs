//! Jobs that shorten the chain of a disk: stream, and commit of layers between and of the top.
//!
//! While such a job runs the disk can be read through its old chain; from its last step on also
//! through the new one, and once the job says that it succeeded only that one has to hold.

use std::rc::Rc;

use liveblk::engine::driver::sim::Rng;
use liveblk::engine::node::Node;
use liveblk::jobs::lifecycle::Verb;
use liveblk::jobs::{CommitSpec, JobError, StreamSpec, StreamTo, start_commit, start_stream};
use liveblk::{Job, Status};

use super::beside;
use super::images::{Chain, Image};
use super::operator::{copy_mode, gone, is_excused, meddle, options};
use super::world::World;

/// Shortens the chain of disk `index`, if it has one.
pub(crate) async fn shorten(world: &Rc<World>, index: usize, rng: &mut Rng) {
    let chain = world.chain(index);
    if chain.len() < 2 {
        return;
    }
    match rng.below(4) {
        0..2 => stream(world, index, &chain, rng).await,
        2 if chain.len() > 2 => commit(world, index, &chain, rng).await,
        _ => commit_active(world, index, &chain, rng).await,
    }
}

/// The nodes of disk `index`, base first.
pub(crate) fn nodes(world: &World, index: usize) -> Vec<Rc<Node>> {
    let mut nodes = vec![world.disks[index].disk.node()];
    while let Some(below) = nodes.last().and_then(|node| node.backing()) {
        nodes.push(below);
    }
    nodes.reverse();
    nodes
}

/// A number from `from` to `to`, both included.
fn pick(rng: &mut Rng, from: usize, to: usize) -> usize {
    let many = u64::try_from(to - from + 1).expect("invariant: small");
    from + usize::try_from(rng.below(many)).expect("invariant: small")
}

/// A layer gets what lies below it, down to a base or to the end.
async fn stream(world: &Rc<World>, index: usize, chain: &Chain, rng: &mut Rng) {
    let nodes = nodes(world, index);
    if nodes.len() != chain.len() {
        return; // a job that ends has relinked them already
    }
    let node = pick(rng, 1, chain.len() - 1);
    let base = rng.chance(500).then(|| pick(rng, 0, node - 1));
    let to = match base {
        Some(base) if rng.chance(500) => StreamTo::Base(Rc::clone(&nodes[base])),
        Some(base) => StreamTo::Bottom(Rc::clone(&nodes[base + 1])),
        None => StreamTo::End,
    };
    let to = match to {
        // That is the node itself: nothing is to be copied.
        StreamTo::Bottom(bottom) if bottom.id() == nodes[node].id() => {
            StreamTo::Base(Rc::clone(&nodes[node - 1]))
        }
        to => to,
    };
    let kept = base.map_or(0, |base| base + 1);
    let new: Chain = chain[..kept].iter().chain(&chain[node..]).cloned().collect();
    let spec = StreamSpec {
        job: options(world),
        node: Rc::clone(&nodes[node]),
        to,
        ..StreamSpec::new(&nodes[node])
    };
    let id = spec.job.id.clone();
    expect(world, index, &id, &[chain.clone(), new]);
    match start_stream(spec).await {
        Ok(job) => {
            meddle(world, &job, rng).await;
            perhaps_cancel(world, &job, rng).await;
            ended(world, index, &job, chain).await;
        }
        Err(error) => failed(world, index, chain, &error, "a stream"),
    }
    clean_up(world, index, &nodes).await;
}

/// Layers below the top go into one below them.
async fn commit(world: &Rc<World>, index: usize, chain: &Chain, rng: &mut Rng) {
    let nodes = nodes(world, index);
    if nodes.len() != chain.len() {
        return; // a job that ends has relinked them already
    }
    let top = pick(rng, 1, chain.len() - 2);
    let base = pick(rng, 0, top - 1);
    forget(world, chain, base, Some(top));
    let new: Chain = chain[..=base].iter().chain(&chain[top + 1..]).cloned().collect();
    let spec = CommitSpec {
        job: options(world),
        ..CommitSpec::new(&nodes[chain.len() - 1], &nodes[top], &nodes[base])
    };
    let id = spec.job.id.clone();
    expect(world, index, &id, &[chain.clone(), new]);
    match start_commit(spec).await {
        Ok(job) => {
            meddle(world, &job, rng).await;
            perhaps_cancel(world, &job, rng).await;
            ended(world, index, &job, chain).await;
        }
        Err(error) => failed(world, index, chain, &error, "a commit"),
    }
    clean_up(world, index, &nodes).await;
}

/// The layer that the guest writes goes into one below, and the guest with it.
async fn commit_active(world: &Rc<World>, index: usize, chain: &Chain, rng: &mut Rng) {
    let nodes = nodes(world, index);
    if nodes.len() != chain.len() {
        return; // a job that ends has relinked them already
    }
    let top = chain.len() - 1;
    let base = pick(rng, 0, top - 1);
    if nodes[base].size() > nodes[top].size() {
        return;
    }
    forget(world, chain, base, None);
    let spec = CommitSpec {
        job: options(world),
        copy_mode: copy_mode(rng),
        converge: beside::converge(rng),
        ..CommitSpec::new(&nodes[top], &nodes[top], &nodes[base])
    };
    let complete = rng.chance(700);
    let new: Chain = chain[..=base].to_vec();
    let id = spec.job.id.clone();
    let job = match start_commit(spec).await {
        Ok(job) => job,
        Err(error) => return failed(world, index, chain, &error, "an active commit"),
    };
    meddle(world, &job, rng).await;
    beside::disturb(world, index, (&job, &nodes[base]), false, rng).await;
    let other = rng.chance(200).then(|| beside::start(world, index, &job, Rng::new(rng.bits())));
    let jobs = world.host.jobs();
    jobs.until(job.id(), |status| status == Status::Ready || status.is_completed()).await;
    world.core.sleep(rng.below(1_000_000)).await;
    if other.is_none() {
        beside::disturb(world, index, (&job, &nodes[base]), false, rng).await;
    }
    let left = other.is_none() && rng.chance(100) && beside::takes_over(world, index, rng).await;
    // Snapshots may have made new layers meanwhile.
    let (chain, all) = (world.chain(index), self::nodes(world, index));
    if complete {
        if !left {
            expect(world, index, &id, &[chain.clone(), new]);
        }
        // Perhaps it failed already.
        let _ = jobs.block_job_verb(job.id(), Verb::Complete, false);
    } else {
        let _ = jobs.block_job_verb(job.id(), Verb::Cancel, rng.chance(500));
    }
    ended(world, index, &job, &chain).await;
    if let Some(other) = other {
        other.await;
    }
    clean_up(world, index, &nodes).await;
    clean_up(world, index, &all).await;
}

/// From now on the disk is in one of `chains`; in the last one as soon as the job says so.
pub(crate) fn expect(world: &Rc<World>, index: usize, id: &str, chains: &[Chain]) {
    *world.disks[index].active.borrow_mut() = chains.to_vec();
    let (weak, new) = (Rc::downgrade(world), chains.last().cloned());
    world.at_success(id, move || {
        if let Some(world) = weak.upgrade() {
            *world.disks[index].active.borrow_mut() = new.into_iter().collect();
        }
    });
}

async fn perhaps_cancel(world: &Rc<World>, job: &Rc<Job>, rng: &mut Rng) {
    if rng.chance(150) {
        world.core.sleep(rng.below(2_000_000)).await;
        // Perhaps it is gone already.
        let _ = world.host.jobs().block_job_verb(job.id(), Verb::Cancel, true);
    }
}

pub(crate) async fn ended(world: &Rc<World>, index: usize, job: &Rc<Job>, old: &Chain) {
    let result = gone(world, job).await;
    if let Err(error) = result {
        failed(world, index, old, &error, "a job on a chain");
    }
}

pub(crate) fn failed(world: &World, index: usize, old: &Chain, error: &JobError, what: &str) {
    // Another job has a node of this chain as its target or source.
    let conflict = error.to_string().starts_with("Permission conflict");
    // A base that must grow, but cannot say which size its snapshots had,
    // or has no entry that hides what lies below.
    let fixed = ["v2 image which has snapshots", "Failed to zero out new clusters"];
    let fixed = fixed.iter().any(|known| error.to_string().contains(known));
    // An active commit that was called off went on through a snapshot: the layer below that one is
    // of use to nobody but the chain.
    let stale = error.to_string().contains("cannot be used any more");
    let excused = conflict
        || stale
        || fixed
        || matches!(error, JobError::Cancelled)
        || is_excused(world, error);
    assert!(excused, "{what} failed: {error}");
    *world.disks[index].active.borrow_mut() = vec![old.clone()];
}

/// What was kept of layers from `base` on means something no longer; with the whole of what goes
/// down it still does.
pub(crate) fn forget(world: &World, chain: &Chain, base: usize, top: Option<usize>) {
    let has = |chain: &Chain, image: &Rc<Image>| chain.iter().any(|known| Rc::ptr_eq(known, image));
    let stays =
        |kept: &Chain| !has(kept, &chain[base]) || top.is_some_and(|top| has(kept, &chain[top]));
    let mut kept = world.kept.borrow_mut();
    kept.retain(|kept| kept.parts.iter().all(|(_, chain)| stays(chain)));
    // A snapshot inside the base is of the base; one inside a layer that goes down is lost.
    let mut internal = world.internal.borrow_mut();
    internal.retain(|kept| {
        let is_lost = top.is_some_and(|top| kept.is_in(&chain[top]));
        kept.is_in(&chain[base]) || (stays(&kept.chain) && !is_lost)
    });
}

/// Closes the nodes that the disk does not need any more.
pub(crate) async fn clean_up(world: &Rc<World>, index: usize, old: &[Rc<Node>]) {
    let now = nodes(world, index);
    for node in old.iter().rev() {
        let used = now.iter().any(|known| known.id() == node.id());
        let there = world.host.graph().node(node.id()).is_some();
        if !used && there && node.users().is_empty() {
            super::operator::close(world, node).await;
        }
    }
}
