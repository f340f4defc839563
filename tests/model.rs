//! The model test: random requests, jobs and power cuts on a simulated machine, judged by what
//! the guests know.
//!
//! Each seed makes one or two chains of images, lets guests work on them with several requests in
//! flight while mirrors, backups and snapshots run, cuts the power at random moments, and demands:
//! reads give what was written; a backup is the disk at its instant; a mirror is the disk at its
//! end; after a cut everything flushed is there, nothing foreign appears, no image is corrupt, and
//! what a job said to be complete is complete.
//!
//! `LIVEBLK_SEED=N cargo test --test model -- --nocapture` replays one seed;
//! `LIVEBLK_SEEDS=N` and `LIVEBLK_FIRST_SEED=N` choose how many, from which. Only
//! `LIVEBLK_SECONDS=N` bounds the time; without it a run that does not get to its last seed has
//! failed.

#[path = "model/backups.rs"]
mod backups;
#[path = "model/beside.rs"]
mod beside;
#[path = "model/bitmaps.rs"]
mod bitmaps;
#[path = "model/chains.rs"]
mod chains;
#[path = "model/changes.rs"]
mod changes;
#[path = "model/guest.rs"]
mod guest;
#[path = "model/images.rs"]
mod images;
#[path = "model/instants.rs"]
mod instants;
#[path = "model/judge.rs"]
mod judge;
#[path = "model/ledger.rs"]
mod ledger;
#[path = "model/mixed.rs"]
mod mixed;
#[path = "model/operator.rs"]
mod operator;
#[path = "model/pattern.rs"]
mod pattern;
#[path = "model/run.rs"]
mod run;
#[path = "model/together.rs"]
mod together;
#[path = "model/world.rs"]
mod world;

use std::panic::catch_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use run::{Outcome, Settings};

/// One seed in so many is also judged by `qemu-img`.
const PEER_EVERY: u64 = 100;

/// A number from the environment, under the name of this test or of the runner of all tests.
fn number(names: [&str; 2]) -> Option<u64> {
    let text = names.iter().find_map(|name| std::env::var(name).ok())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{} must be a number", names[0])))
}

/// Runs `seed`; a failure is told with the command that replays it.
fn run_seed(seed: u64, settings: Settings) -> Option<Outcome> {
    let outcome = catch_unwind(|| run::run(seed, settings)).ok();
    if outcome.is_none() {
        println!(
            "seed {seed} FAILED; replay: LIVEBLK_SEED={seed} cargo test --test model -- \
             --nocapture"
        );
    }
    outcome
}

#[derive(Default)]
struct Sums {
    seeds: u64,
    outcome: Outcome,
    failed: Vec<u64>,
}

impl Sums {
    fn add(&mut self, seed: u64, outcome: Option<Outcome>) {
        self.seeds += 1;
        let Some(outcome) = outcome else {
            self.failed.push(seed);
            return;
        };
        let sum = &mut self.outcome;
        sum.requests += outcome.requests;
        sum.requests_in_jobs += outcome.requests_in_jobs;
        sum.requests_failed += outcome.requests_failed;
        sum.jobs += outcome.jobs;
        sum.cuts += outcome.cuts;
        sum.peer += outcome.peer;
    }
}

#[test]
fn guests_read_what_they_wrote_and_keep_what_they_flushed() {
    let peer = judge::has_peer();
    if let Some(seed) = number(["LIVEBLK_SEED", "MODEL_SEED"]) {
        let outcome = run_seed(seed, Settings::with_peer(peer)).expect("the seed passes");
        println!("seed {seed}: {outcome:?}");
        return;
    }
    let default = if cfg!(debug_assertions) { 40 } else { 2000 };
    let seeds = number(["LIVEBLK_SEEDS", "MODEL_SEEDS"]).unwrap_or(default);
    let first = number(["LIVEBLK_FIRST_SEED", "MODEL_FIRST_SEED"]).unwrap_or(1);
    let seconds = number(["LIVEBLK_SECONDS", "MODEL_SECONDS"]);
    let next = AtomicU64::new(first);
    let sums = Mutex::new(Sums::default());
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let late = seconds.is_some_and(|bound| began.elapsed().as_secs() >= bound);
                    if late || seed >= first + seeds || sums.lock().unwrap().failed.len() > 4 {
                        return;
                    }
                    let ask_peer = peer && seed.is_multiple_of(PEER_EVERY);
                    let outcome = run_seed(seed, Settings::with_peer(ask_peer));
                    sums.lock().unwrap().add(seed, outcome);
                }
            });
        }
    });
    let sums = sums.into_inner().unwrap();
    let took = began.elapsed().max(Duration::from_millis(1));
    let Outcome { requests, requests_in_jobs, jobs, cuts, peer: asked, .. } = sums.outcome;
    println!(
        "{} seeds in {:.1} s ({:.0} per minute): {requests} requests, {requests_in_jobs} of them \
         while one of {jobs} jobs ran, {} failed as planned, {cuts} power cuts judged, \
         {asked} also by qemu-img{}",
        sums.seeds,
        took.as_secs_f64(),
        sums.seeds as f64 * 60.0 / took.as_secs_f64(),
        sums.outcome.requests_failed,
        if peer { "" } else { " (which is not installed)" }
    );
    assert!(sums.failed.is_empty(), "failed seeds: {:?}", sums.failed);
    assert!(peer, "qemu-img judges a sample: install qemu-utils");
    if sums.seeds < seeds {
        println!("stopped before {seeds} seeds");
        assert!(seconds.is_some(), "every seed runs where no time was given");
    }
    assert!(requests_in_jobs * 5 >= requests, "at least a fifth of the requests beside a job");
}

#[test]
fn equal_seeds_take_equal_decisions() {
    let count = if cfg!(debug_assertions) { 4 } else { 100 };
    for seed in 1..=count {
        let run = || run_seed(seed, Settings::default());
        assert_eq!(run(), run(), "seed {seed}");
    }
}
