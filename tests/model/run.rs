//! One seed from its plan to the last judgement.

use std::rc::Rc;

use liveblk::engine::buf::Pool;
use liveblk::engine::driver::sim::{FaultRule, OpFilter, Rng, Sim, SimOpKind};

use super::judge;
use super::world::{Happening, Plan, Start, World};
use super::{guest, operator};

/// What a failed write answers.
const EIO: i32 = 5;

/// What a run tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) trace: u64,
    pub(crate) requests: u64,
    pub(crate) requests_in_jobs: u64,
    pub(crate) requests_failed: u64,
    pub(crate) jobs: u64,
    pub(crate) cuts: u64,
    pub(crate) peer: u64,
}

/// How a seed is run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Settings {
    /// Whether `qemu-img` looks at the first cut.
    pub(crate) ask_peer: bool,
    /// A rule that is left out.
    #[cfg(feature = "planted-bugs")]
    pub(crate) planted: Option<liveblk::engine::planted::Planted>,
}

impl Settings {
    /// With `qemu-img` as a second judge or not.
    #[allow(dead_code, reason = "not every test has the choice")]
    pub(crate) fn with_peer(ask_peer: bool) -> Self {
        Self {
            ask_peer,
            #[cfg(feature = "planted-bugs")]
            planted: None,
        }
    }
}

/// Runs `seed`.
///
/// # Panics
/// If something is wrong.
pub(crate) fn run(seed: u64, settings: Settings) -> Outcome {
    let plan = Plan::new(seed);
    // All worlds of a seed take their buffers from here: what is not filled shows foreign bytes.
    let pool = Pool::new();
    let mut setup = Start::new(plan.clone(), &pool);
    #[cfg(feature = "planted-bugs")]
    if let Some(bug) = settings.planted {
        liveblk::engine::planted::plant(&setup.sim.core(0), bug);
    }
    let world = setup.open();
    let Start { mut sim, .. } = setup;
    start_tasks(&world);
    let mut outcome = Outcome::default();
    for (requests, happening) in plan.happenings() {
        let seen = Rc::clone(&world);
        sim.run_until(|| seen.requests.get() >= requests);
        match happening {
            Happening::Cut { number, steps } => {
                sim.run_steps(steps);
                let ask_peer = settings.ask_peer && number == 0;
                look(&sim, &world, number, &mut outcome, ask_peer);
            }
            Happening::Full { spare } => {
                world.full_until.set(u32::MAX);
                sim.fs().set_capacity(Some(sim.fs().used() + spare));
            }
            Happening::Space => {
                sim.fs().set_capacity(None);
                world.full_until.set(world.clock.tick());
            }
            Happening::DiskFails(kind) => {
                world.is_broken.set(true);
                for name in ["disk", "layer", "target"] {
                    let chosen = OpFilter::any().file(name).kind(kind);
                    sim.inject(FaultRule::once(chosen, EIO));
                }
            }
            Happening::CopyFails => {
                let writes = OpFilter::any().file("copy").kind(SimOpKind::Write);
                sim.inject(FaultRule::once(writes, EIO));
            }
        }
    }
    let seen = Rc::clone(&world);
    sim.run_until(|| seen.tasks.get() == 0);
    let late = Rc::clone(&world);
    sim.block_on(0, |_| async move { late.judge_late().await });
    let closing = Rc::clone(&world);
    let sent = world.clock.tick();
    let closed = sim.block_on(0, |_| async move { closing.host.close().await });
    match closed {
        Ok(()) => world.disks.iter().for_each(|state| state.ledger.flushed(sent)),
        Err(error) => assert!(world.is_broken.get(), "the chains do not close: {error}"),
    }
    world.is_closed.set(true);
    look(&sim, &world, 0, &mut outcome, false);
    outcome.trace = sim.trace_hash();
    outcome.requests = world.requests.get().into();
    outcome.requests_in_jobs = world.requests_in_jobs.get().into();
    outcome.requests_failed = world.requests_failed.get().into();
    outcome.jobs = world.jobs_ended.get().into();
    outcome
}

fn start_tasks(world: &Rc<World>) {
    let seed = world.plan.seed;
    for index in 0..world.disks.len() {
        let stream = |number: u64| Rng::new(seed ^ (number + 1) << 32 ^ (index as u64) << 48);
        for number in 0..world.plan.depth {
            world.spawn(guest::run(Rc::clone(world), index, stream(number.into())));
        }
        world.spawn(operator::run(Rc::clone(world), index, stream(100)));
    }
}

/// Ends a copy of the world, in three ways, and judges what is left.
fn look(sim: &Sim, world: &World, number: u64, outcome: &mut Outcome, ask_peer: bool) {
    // The first look and the last one are thorough.
    let ways = if number == 0 { 3 } else { 1 };
    for way in 0..ways {
        let cut = (world.plan.seed ^ number).wrapping_mul(3).wrapping_add(way);
        // The last way: only the process ends, all that it wrote is there.
        let fs = if way < 2 { sim.fs().after_power_cut(cut) } else { sim.fs().after_kill() };
        if ask_peer && way == 0 {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let agreed = judge::peer_agrees(world, &fs, folder.path());
            agreed.unwrap_or_else(|wrong| panic!("after power cut {cut}: {wrong}"));
            outcome.peer += 1;
        }
        let judged = judge::power_cut(world, fs, cut, sim.core(0).pool());
        judged.unwrap_or_else(|wrong| panic!("after power cut {cut}: {wrong}"));
        outcome.cuts += 1;
    }
}
