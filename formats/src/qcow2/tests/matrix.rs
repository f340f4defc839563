//! The model over the matrix: random work of several tasks on images of every kind, with changes of
//! size, snapshots and reopens in between and power cuts at any moment, against the ledger.
//!
//! Each seed draws version, cluster size, refcount width, subclusters, compression, preallocation,
//! an external data file (raw or not) and a layer below. A round is requests of three tasks, each
//! on a part of the disk of its own; between rounds comes one change of the whole image: its size,
//! its snapshots, its persistent bitmaps, a reopen. In some rounds the power is cut, and the next
//! one goes on with what was left. The rates are printed; `LIVEBLK_SEED` replays a seed,
//! `LIVEBLK_SEEDS` says how many.

use std::rc::Rc;

use liveblk_engine::driver::sim::{Rng, Sim, SimConfig, SimFs};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::format::{Preallocation, ZeroMode};
use liveblk_engine::storage::{Memory, Storage};

use super::ledger::{Found, Ledger, SECTOR};
use super::look::{Left, look};
use super::mover::Below;
use super::peer;
use super::play::{BELOW_BYTES, Op, Place, Player, Span, below_byte, below_value, nothing};
use super::worlds::seconds_on_cpu;
use crate::qcow2::{CompressionType, CreateOptions, check, create_with_data};

const PATH: &str = "/matrix";

/// The data file of images that have one.
const DATA: &str = "/matrix.data";

/// Requests of one seed.
const REQUESTS: u64 = 300;

/// Tasks at a time.
const TASKS: u64 = 3;

/// One seed in so many is also judged by the peer.
const PEER_EVERY: u64 = 100;

const NAMES: [&str; 4] = ["one", "two", "three", "four"];

/// Bitmaps: each has a granularity of its own.
const BITMAPS: [&str; 3] = ["fine", "page", "coarse"];

/// What a seed decides before anything runs.
struct Plan {
    options: CreateOptions,
    below: Below,
}

impl Plan {
    fn new(rng: &mut Rng) -> Self {
        let bits = *rng.pick(&[9, 9, 10, 12, 12, 14, 16]);
        let mut options = CreateOptions::new(0);
        options.cluster_size = 1 << bits;
        options.version = if rng.chance(200) { 2 } else { 3 };
        if options.version == 3 {
            options.refcount_order = u32::try_from(rng.below(7)).expect("invariant: small");
            options.extended_l2 = bits >= 14 && rng.chance(600);
            options.lazy_refcounts = rng.chance(200);
            if rng.chance(300) {
                options.compression_type = CompressionType::Zstd;
            }
        }
        let below: Below = if rng.chance(400) { below_byte } else { nothing };
        if below(0) == 0 && rng.chance(150) {
            options.preallocation = Preallocation::Metadata;
        }
        if options.version == 3 && rng.chance(250) {
            options.data_file = Some(DATA.trim_start_matches('/').to_owned());
            options.data_file_raw = below(0) == 0 && rng.chance(500);
        }
        let sectors = (BELOW_BYTES / SECTOR).max(64 + rng.below(800));
        options.size = sectors * SECTOR;
        Self { options, below }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    seeds: u64,
    requests: u64,
    cuts: u64,
    changes: u64,
    refused: u64,
    /// Seconds on the processor that went into judging crash states.
    judging: f64,
}

/// Machines that all seeds of a run use.
struct Matrix {
    judge: Sim,
    counts: Counts,
}

impl Matrix {
    fn new() -> Self {
        let config = SimConfig { steps_max: u64::MAX, ..SimConfig::new(1).calm() };
        Self { judge: Sim::new(config), counts: Counts::default() }
    }

    fn seed(&mut self, seed: u64) {
        let mut rng = Rng::new(seed);
        let Plan { options, below } = Plan::new(&mut rng);
        println!("matrix seed {seed}: {options:?}, below: {}", below(0) != 0);
        let sectors = options.size / SECTOR;
        let external = options.data_file.is_some();
        let (bytes, data) = self.judge.block_on(0, |core| async move {
            let (memory, data) = (Memory::new(0), Memory::new(0));
            let storage = |memory: &Rc<Memory>| Storage::Memory(Rc::clone(memory));
            let data_storage = external.then(|| storage(&data));
            let made =
                create_with_data(&core, &storage(&memory), data_storage.as_ref(), options).await;
            made.expect("is created");
            (memory.to_bytes(), data.to_bytes())
        });
        let mut ledger = Ledger::new((0..sectors).map(|sector| below_value(below, sector)));
        let pool = self.judge.core(0).pool().clone();
        let config = SimConfig::new(seed);
        let fs = SimFs::new(config.fs.clone());
        // New buffers hold what others left in them, and cost no fresh pages.
        let mut sim = Sim::with_pool(config, fs, pool.clone());
        sim.fs().create(PATH, &bytes);
        if external {
            sim.fs().create(DATA, &data);
        }
        let mut left = REQUESTS;
        while left > 0 {
            // Rounds are longer where no cut ends them.
            let cut = rng.chance(300);
            let requests = 30 + rng.below(90);
            let player = sim.block_on(0, |core| async move {
                let place = Place::Path(PATH.into());
                Player::open(&core, place, below, ledger).await.expect("opens")
            });
            let tasks = Tasks::start(&sim.core(0), &player, requests, &mut rng);
            if cut {
                sim.run_steps(rng.below(requests * 40));
            } else {
                sim.run_until(|| tasks.are_done());
            }
            self.counts.requests += tasks.made();
            left = left.saturating_sub(tasks.made().max(1));
            if !cut {
                let change = change(&player, &mut rng);
                self.counts.changes += 1;
                if rng.chance(300) {
                    // The power is cut in the middle of the change.
                    let playing = Rc::clone(&player);
                    drop(sim.core(0).spawn(Class::Guest, async move {
                        let _ = playing.run(&change).await;
                    }));
                    sim.run_steps(rng.below(200));
                } else {
                    self.whole(&mut sim, &player, &change);
                }
            }
            let (found, fs) = self.cut(&sim, &player, seed, rng.bits());
            ledger = player.ledger.replace(Ledger::new(std::iter::empty()));
            ledger.restart(&found);
            drop((tasks, player, sim));
            sim = Sim::with_pool(SimConfig::new(rng.bits()), fs, pool.clone());
        }
        self.last(sim, ledger, below);
        self.counts.seeds += 1;
    }

    fn whole(&mut self, sim: &mut Sim, player: &Rc<Player>, change: &Op) {
        let (playing, op) = (Rc::clone(player), change.clone());
        let done = sim.block_on(0, |_| async move {
            let done = playing.play(&op).await;
            playing.read_all().await.expect("is readable");
            done
        });
        self.counts.refused += u64::from(!done);
    }

    /// Cuts the power, sometimes only kills the process; judges some possible outcomes and goes on
    /// with the last.
    fn cut(&mut self, sim: &Sim, player: &Player, seed: u64, chance: u64) -> (Found, SimFs) {
        let began = seconds_on_cpu();
        // Where all is durable there is one outcome.
        let last = if sim.fs().unflushed() == 0 { 0 } else { 1 + chance % 3 };
        for way in 0.. {
            let fs = match way {
                0 => sim.fs().after_kill(),
                way => sim.fs().after_power_cut(chance ^ way),
            };
            let left = Left::of(&fs, PATH, DATA);
            let below = player.below();
            let found =
                self.judge.block_on(0, |core| async move { look(&core, &left, below).await });
            let judged = found.and_then(|found| {
                player.ledger.borrow().survived(&found)?;
                Ok(found)
            });
            let found = judged.unwrap_or_else(|wrong| panic!("after a power cut: {wrong}"));
            self.counts.cuts += 1;
            if way == last {
                self.counts.judging += seconds_on_cpu() - began;
                if seed.is_multiple_of(PEER_EVERY) {
                    peer::check_exported(&fs, PATH);
                }
                return (found, fs);
            }
        }
        unreachable!("the loop ends by itself")
    }

    /// Closes in good order: nothing is lost but what earlier cuts leaked, and bitmaps are exact.
    fn last(&mut self, mut sim: Sim, ledger: Ledger, below: Below) {
        let player = sim.block_on(0, |core| async move {
            let place = Place::Path(PATH.into());
            let storage = place.storage(&core).await.expect("opens");
            let player = Player::open(&core, place, below, ledger).await.expect("opens");
            player.run(&Op::Reopen).await.expect("closes");
            player.read_all().await.expect("is readable");
            player.disk().format.close().await.expect("closes");
            player.abandon();
            let report = check(&core, &storage).await.expect("is checked");
            assert_eq!(report.corruptions, 0, "{:?}", report.problems);
            player
        });
        let left = Left::of(&sim.fs(), PATH, DATA);
        let found = self.judge.block_on(0, |core| async move { look(&core, &left, below).await });
        let judged = found.and_then(|found| player.ledger.borrow().survived(&found));
        judged.unwrap_or_else(|wrong| panic!("after the end: {wrong}"));
    }
}

/// Tasks that make requests, each on its part of the disk.
struct Tasks(Vec<Rc<std::cell::Cell<(u64, u64)>>>);

impl Tasks {
    fn start(core: &Core, player: &Rc<Player>, requests: u64, rng: &mut Rng) -> Self {
        let size = player.ledger.borrow().size();
        let part = size / TASKS;
        let start = |task: u64| {
            let count = Rc::new(std::cell::Cell::new((0, requests / TASKS)));
            if part > 0 {
                let area = Span { first: task * part, count: part };
                let work = work(Rc::clone(player), area, Rng::new(rng.bits()), Rc::clone(&count));
                drop(core.spawn(Class::Guest, work));
            } else {
                count.set((0, 0));
            }
            count
        };
        Self((0..TASKS).map(start).collect())
    }

    fn are_done(&self) -> bool {
        self.0.iter().all(|count| count.get().0 >= count.get().1)
    }

    fn made(&self) -> u64 {
        self.0.iter().map(|count| count.get().0).sum()
    }
}

async fn work(
    player: Rc<Player>,
    area: Span,
    mut rng: Rng,
    count: Rc<std::cell::Cell<(u64, u64)>>,
) {
    let cluster = player.disk().format.cluster_size() / SECTOR;
    loop {
        let (made, all) = count.get();
        if made >= all {
            return;
        }
        let op = request(&player, area, cluster, &mut rng);
        player.run(&op).await.unwrap_or_else(|error| panic!("{op:?}: {error}"));
        count.set((made + 1, all));
    }
}

/// A request inside of `area`.
fn request(player: &Player, area: Span, cluster: u64, rng: &mut Rng) -> Op {
    let most = *rng.pick(&[1, 8, 40, 200]);
    let first = area.first + rng.below(area.count);
    let count = rng.between(1, most).min(area.first + area.count - first);
    let span = Span { first, count };
    let packed = |rng: &mut Rng| {
        let from = area.first.div_ceil(cluster);
        let to = (area.first + area.count) / cluster;
        (from < to && player.can(&Op::Packed(0))).then(|| Op::Packed(from + rng.below(to - from)))
    };
    match rng.below(20) {
        0..8 => Op::Write(span),
        8 => Op::Zero(span, ZeroMode::Keep),
        9 | 10 => Op::Zero(span, ZeroMode::Unmap),
        11 | 12 => Op::Zero(span, ZeroMode::Discard),
        13 | 14 => packed(rng).unwrap_or(Op::Write(span)),
        15 | 16 => Op::Flush,
        _ => Op::Read(span),
    }
}

/// A change of the whole image.
fn change(player: &Player, rng: &mut Rng) -> Op {
    let size = player.ledger.borrow().size();
    let name = *rng.pick(&NAMES);
    let set = player.ledger.borrow().snapshots();
    let known = NAMES.into_iter().filter(|name| set.contains_key(*name)).collect::<Vec<_>>();
    let bitmap = *rng.pick(&BITMAPS);
    let tracked = player.ledger.borrow().marks().contains_key(bitmap);
    let op = match rng.below(15) {
        0..3 if !set.contains_key(name) => Op::Take(name),
        0..5 if !known.is_empty() => {
            let name = *rng.pick(&known);
            if rng.chance(500) { Op::Remove(name) } else { Op::Apply(name) }
        }
        5 => Op::Resize(size + rng.below(200)),
        6 => Op::Resize((size / 2).max(64) + rng.below(size / 2)),
        7 => Op::Settle,
        8 => Op::Flush,
        10..13 if !tracked => Op::Track(bitmap),
        10 => Op::Untrack(bitmap),
        11 => Op::Wipe(bitmap),
        _ => Op::Reopen,
    };
    if player.can(&op) { op } else { Op::Reopen }
}

#[test]
fn every_kind_of_image_keeps_what_was_flushed_through_any_work_and_any_cut() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let mut matrix = Matrix::new();
    let began = seconds_on_cpu();
    let seeds = match number("LIVEBLK_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("LIVEBLK_SEEDS").unwrap_or(400),
    };
    for seed in seeds {
        matrix.seed(seed);
    }
    let took = (seconds_on_cpu() - began).max(1e-3);
    let Counts { seeds, requests, cuts, changes, refused, judging } = matrix.counts;
    println!(
        "matrix: {seeds} seeds, {requests} requests, {changes} changes ({refused} refused), {cuts} \
         crash states in {took:.1} s ({judging:.1} s of them judging): {:.0} seeds and {:.0} crash \
         states per minute per core; judged alone {:.0} per minute",
        seeds as f64 * 60.0 / took,
        cuts as f64 * 60.0 / took,
        cuts as f64 * 60.0 / judging.max(1e-3),
    );
}
