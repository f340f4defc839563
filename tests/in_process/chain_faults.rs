//! Stream and commit when the power goes, when a single operation fails, when the target hangs.
//!
//! Rows Q1 and R9 (what a finished job says is on disk), R17 (a stop in the middle).
use std::rc::Rc;

use crate::chains::{Chain, Layer, compare, report};
use crate::rig::content;
use liveblk_engine::driver::sim::{
    FaultRule, HoldPoint, OpFilter, Sim, SimConfig, SimFs, SimOpKind,
};
use liveblk_engine::executor::Core;
use liveblk_jobs::{
    CommitSpec, JobError, JobManager, Status, StreamSpec, StreamTo, Verb, start_commit,
    start_stream,
};

/// What a failed operation answers.
const EIO: i32 = 5;

/// The same for want of space.
const ENOSPC: i32 = 28;

/// A job on the chain 0 <- 1 <- 2 <- 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// 3 gets everything.
    Flatten,
    /// 2 gets what 1 holds, below 3.
    Fill,
    /// 2 and 1 go into 0.
    Commit,
    /// The same into a raw file.
    CommitToRaw,
    /// 3, 2 and 1 go into 0, and the guest with them.
    Active,
}

const ALL: [Work; 5] = [Work::Flatten, Work::Fill, Work::Commit, Work::CommitToRaw, Work::Active];

impl Work {
    fn layers(self) -> Vec<Layer> {
        let mut layers =
            if self == Self::CommitToRaw { Layer::over_raw() } else { Layer::usual(2) };
        // Small enough to stop at each step of the work.
        for layer in &mut layers {
            layer.acts.truncate(3);
        }
        layers
    }

    async fn start(self, chain: &Chain) -> Result<(), JobError> {
        let (job, top) = (crate::rig::options("j"), chain.top());
        let stream = |node, to| StreamSpec {
            job: job.clone(),
            node,
            to,
            backing_file: None,
            mask_protocol: false,
            filter_name: None,
        };
        let commit = |top, base| CommitSpec {
            job: job.clone(),
            device: chain.top(),
            top,
            base,
            backing_file: None,
            mask_protocol: false,
            filter_name: None,
            copy_mode: Default::default(),
            converge: None,
        };
        match self {
            Self::Flatten => start_stream(stream(top, StreamTo::End)).await.map(drop),
            Self::Fill => {
                let to = StreamTo::Base(chain.node(0));
                start_stream(stream(chain.node(2), to)).await.map(drop)
            }
            Self::Commit | Self::CommitToRaw => {
                start_commit(commit(chain.node(2), chain.node(0))).await.map(drop)
            }
            Self::Active => start_commit(commit(top, chain.node(0))).await.map(drop),
        }
    }

    /// Runs the job to its end; true if it succeeded.
    async fn run(self, core: &Core, chain: &Chain) -> bool {
        let manager = JobManager::of(core);
        if self.start(chain).await.is_err() {
            return false;
        }
        let job = manager.find("j");
        if self == Self::Active {
            manager.until("j", |status| status == Status::Ready || status.is_completed()).await;
            // It may have failed already.
            let _ = manager.job_verb("j", Verb::Complete);
        }
        crate::rig::gone(core, "j").await;
        job.is_none_or(|job| job.error().is_none())
    }
}

/// Makes the chain of `work`, all durable; what it holds as seen from the top.
fn make(work: Work) -> (SimFs, Vec<u8>) {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    let bytes = sim.block_on(0, move |core| async move {
        let chain = Chain::make(&core, &work.layers(), false).await;
        content(&chain.top()).await
    });
    (sim.kill(), bytes)
}

/// What is on disk must open and show `bytes` at image `at`.
fn inspect(fs: SimFs, work: Work, at: usize, bytes: &[u8], say: &str) {
    let bytes = bytes.to_vec();
    let mut sim = Sim::with_fs(SimConfig::new(0).calm(), fs);
    eprintln!("{work:?}: looking at image {at} {say}");
    sim.block_on(0, move |core| async move { compare(&core, &work.layers(), at, &bytes).await });
}

/// Row Q1: the peer loses the link before the tables are on disk.
#[test]
fn the_power_may_go_at_any_step_and_the_top_shows_what_it_showed() {
    for work in ALL {
        let (fs, bytes) = make(work);
        for seed in 0..3 {
            let mut sim = Sim::with_fs(SimConfig::new(seed), fs.after_power_cut(0));
            let done = Rc::new(std::cell::Cell::new(None));
            let (told, layers) = (Rc::clone(&done), work.layers());
            let running = sim.core(0);
            drop(running.clone().spawn(liveblk_engine::executor::Class::Guest, async move {
                let chain = Chain::open(&running, &layers, seed == 1).await;
                let result = work.run(&running, &chain).await;
                told.set(Some(result));
                drop(chain);
            }));
            let mut cuts = 0;
            while done.get().is_none() {
                sim.run_steps(23);
                for loss in 0..2 {
                    let fs = sim.fs().after_power_cut(seed * 1000 + cuts * 2 + loss);
                    let at = if loss == 0 { "one loss" } else { "another" };
                    inspect(fs, work, 3, &bytes, at);
                }
                cuts += 1;
            }
            assert_eq!(done.get(), Some(true), "{work:?} {seed}");
            assert!(cuts > 5, "{work:?}: {cuts} cuts");
            let fs = sim.fs().after_power_cut(seed);
            let at = if work == Work::Active { 0 } else { 3 };
            inspect(fs, work, at, &bytes, "after the end");
        }
    }
}

#[test]
fn each_operation_may_fail_and_nothing_is_lost_or_left_in_use() {
    let kinds = [(SimOpKind::Write, EIO), (SimOpKind::Sync, EIO), (SimOpKind::Write, ENOSPC)];
    for work in ALL {
        let (fs, bytes) = make(work);
        for (kind, errno) in kinds {
            let mut failed = 0;
            for after in 0..400 {
                let mut sim = Sim::with_fs(SimConfig::new(after).calm(), fs.after_power_cut(0));
                let layers = work.layers();
                let chain =
                    sim.block_on(
                        0,
                        move |core| async move { Chain::open(&core, &layers, false).await },
                    );
                sim.inject(FaultRule::once(OpFilter::any().kind(kind), errno).after(after));
                let wanted = bytes.clone();
                let ended = sim.block_on(0, move |core| async move {
                    let succeeded = work.run(&core, &chain).await;
                    core.sleep(3_000_000_000).await;
                    let at = if succeeded && work == Work::Active { 0 } else { 3 };
                    let seen = content(&chain.node(at)).await;
                    assert_eq!(crate::rig::first_difference(&seen, &wanted), None, "{work:?}");
                    let jobs = report(&core).into_iter().filter(|line| line.contains("Job {"));
                    assert_eq!(jobs.collect::<Vec<_>>(), Vec::<String>::new());
                    // An image that lost a write cannot be left clean.
                    if errno == ENOSPC && !(succeeded && work == Work::Active) {
                        assert!(!chain.node(0).is_writable(), "{:?}", report(&core));
                    }
                    (succeeded, at)
                });
                let hit = sim.faults() > 0;
                inspect(sim.fs().after_power_cut(after), work, ended.1, &bytes, "after a failure");
                failed += u32::from(!ended.0);
                if !hit {
                    break;
                }
            }
            assert!(failed > 0, "{work:?} {kind:?}: some failure is one of the job");
        }
    }
}

#[test]
fn a_job_whose_target_hangs_is_gone_within_a_second_of_its_cancel() {
    for work in ALL {
        let (fs, bytes) = make(work);
        let mut sim = Sim::with_fs(SimConfig::new(5).calm(), fs);
        let layers = work.layers();
        let chain =
            sim.block_on(0, move |core| async move { Chain::open(&core, &layers, false).await });
        let target = match work {
            Work::Flatten => "layer3",
            Work::Fill => "layer2",
            _ => "layer0",
        };
        let hold = sim.hold(OpFilter::any().kind(SimOpKind::Write).file(target), HoldPoint::Start);
        let chain = sim.block_on(0, move |core| async move {
            work.start(&chain).await.expect("it starts");
            core.sleep(1_000_000_000).await;
            let manager = JobManager::of(&core);
            manager.job_verb("j", Verb::Cancel).expect("cancels");
            let asked = core.now();
            crate::rig::gone(&core, "j").await;
            assert!(core.now() - asked < 1_000_000_000, "{work:?}: {}", core.now() - asked);
            chain
        });
        hold.release();
        sim.block_on(0, move |core| async move {
            core.sleep(3_000_000_000).await;
            assert_eq!(crate::rig::first_difference(&content(&chain.top()).await, &bytes), None);
            assert!(!chain.node(0).is_writable() && !chain.node(2).is_writable());
            let jobs = report(&core).into_iter().filter(|line| line.contains("Job {"));
            assert_eq!(jobs.collect::<Vec<_>>(), Vec::<String>::new(), "{work:?}");
        });
    }
}
