//! Exhaustive small worlds: every sequence of at most three of twelve steps on a disk of four
//! clusters, and a power cut at every change of the file during the last of them.
//!
//! What a cut leaves of the changes that are not durable, at each point where the file or its
//! durable part changed: every subset of them if there are at most three; of more, none, all, each
//! alone and all but each (at most twenty-four choices, spread); and twice a random choice for each
//! sector, which tears what is larger than one. A change that is kept keeps the earlier ones of its
//! sectors. States that were judged before within the sequence are left out, and so are the cuts
//! before the last step, because the shorter sequence had them.
//!
//! Each state is checked (no corruptions), opened writable, read whole, and gone back to each of
//! its snapshots; all must be as the ledger allows.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use liveblk_engine::ErrorKind;
use liveblk_engine::driver::sim::{Sim, SimConfig, SimFs};
use liveblk_engine::executor::Class;
use liveblk_engine::format::ZeroMode;
use liveblk_engine::storage::{Memory, Storage};

use super::ledger::{Ledger, SECTOR};
use super::look::{Left, look};
use super::mover::Below;
use super::peer;
use super::play::{BELOW_BYTES, Op, Place, Player, Span, below_byte, below_value, nothing};
use crate::qcow2::{CreateOptions, create};

const PATH: &str = "/world";

/// Clusters of the disk at first.
const CLUSTERS: u64 = 4;

/// One state in so many is also judged by the peer.
const PEER_EVERY: u64 = 5000;

/// Unflushed changes are kept in at most so many ways per point.
const CHOICES_MAX: usize = 24;

const STEPS: [&str; 12] = [
    "write aligned",
    "write partial",
    "write zeroes",
    "zeroes with unmap",
    "discard",
    "flush",
    "compressed write",
    "snapshot create",
    "snapshot delete",
    "resize up",
    "resize down",
    "reopen",
];

const NAMES: [&str; 3] = ["one", "two", "three"];

/// What a step is on an image of clusters of `c` sectors, as step `number` of a sequence; none if
/// it would do nothing.
fn step(kind: usize, number: usize, c: u64, up: u64, down: u64, ledger: &Ledger) -> Option<Op> {
    let size = ledger.size();
    let span = |first: u64, count: u64| {
        let count = count.min(size.saturating_sub(first));
        (count > 0).then_some(Span { first, count })
    };
    Some(match kind {
        0 => Op::Write(span(c, 2 * c)?),
        1 => Op::Write(span(2 * c - 1, 2)?),
        2 => Op::Zero(span(c, c + c.div_ceil(2))?, ZeroMode::Keep),
        3 => Op::Zero(span(0, 3 * c)?, ZeroMode::Unmap),
        4 => Op::Zero(span(c, 2 * c)?, ZeroMode::Discard),
        5 => Op::Flush,
        6 => Op::Packed(1),
        7 => Op::Take(NAMES[number]),
        8 => {
            let set = ledger.snapshots();
            Op::Remove(NAMES.into_iter().find(|name| set.contains_key(*name))?)
        }
        9 => Op::Resize(if size < up { up } else { size + c }),
        10 => Op::Resize(if size > down { down } else { return None }),
        _ => Op::Reopen,
    })
}

/// What kind of world.
#[derive(Clone)]
struct Kind {
    options: CreateOptions,
    below: Below,
    /// Sectors after the first growth.
    up: u64,
    /// Sectors after shrinking.
    down: u64,
    /// Steps of the longest sequence.
    depth: usize,
}

struct Worlds {
    kind: Kind,
    sim: Sim,
    judge: Sim,
    template: Vec<u8>,
    seen: BTreeSet<(u64, u64)>,
    sequences: u64,
    states: u64,
    asked: u64,
    /// Steps that were refused as unsupported.
    refused: BTreeMap<&'static str, u64>,
}

fn calm_for_ever() -> Sim {
    Sim::new(SimConfig { steps_max: u64::MAX, ..SimConfig::new(1).calm() })
}

impl Worlds {
    fn new(kind: Kind) -> Self {
        let mut judge = calm_for_ever();
        let options = kind.options.clone();
        let template = judge.block_on(0, |core| async move {
            let memory = Memory::new(0);
            let storage = Storage::Memory(Rc::clone(&memory));
            create(&core, &storage, options).await.expect("is created");
            memory.to_bytes()
        });
        Self {
            kind,
            sim: calm_for_ever(),
            judge,
            template,
            seen: BTreeSet::new(),
            sequences: 0,
            states: 0,
            asked: 0,
            refused: BTreeMap::new(),
        }
    }

    /// Runs all sequences that begin with `prefix`, it among them.
    fn run_all(&mut self, prefix: &mut Vec<usize>) {
        if !prefix.is_empty() && !self.run(prefix) {
            return;
        }
        if prefix.len() < self.kind.depth {
            for kind in 0..STEPS.len() {
                prefix.push(kind);
                self.run_all(prefix);
                prefix.pop();
            }
        }
    }

    /// Runs one sequence; false if its last step did nothing.
    fn run(&mut self, kinds: &[usize]) -> bool {
        self.sim.fs().create(PATH, &self.template);
        self.seen.clear();
        let (below, sectors) = (self.kind.below, self.kind.options.size / SECTOR);
        let ledger = Ledger::new((0..sectors).map(|sector| below_value(below, sector)));
        let player = self.sim.block_on(0, |core| async move {
            let place = Place::Path(PATH.into());
            Player::open(&core, place, below, ledger).await.expect("a new image opens")
        });
        let mut effect = true;
        let c = self.kind.options.cluster_size / SECTOR;
        for (number, kind) in kinds.iter().enumerate() {
            let Kind { up, down, .. } = self.kind;
            let op = step(*kind, number, c, up, down, &player.ledger.borrow());
            let op = op.filter(|op| {
                let can = player.can(op);
                if !can && number + 1 == kinds.len() {
                    *self.refused.entry(STEPS[*kind]).or_default() += 1;
                }
                can
            });
            let Some(op) = op else {
                effect = false;
                break;
            };
            if number + 1 < kinds.len() {
                let player = Rc::clone(&player);
                // What it answers was judged when it was the last step.
                let _ = self.sim.block_on(0, |_| async move { player.run(&op).await });
            } else {
                self.last(&player, op, kinds);
            }
        }
        player.abandon();
        drop(player);
        self.sim.run_idle();
        self.sim.fs().remove(PATH);
        self.sequences += u64::from(effect);
        effect
    }

    /// Plays the last step, and cuts the power on the way.
    fn last(&mut self, player: &Rc<Player>, op: Op, kinds: &[usize]) {
        let done = Rc::new(Cell::new(None));
        let (flag, playing) = (Rc::clone(&done), Rc::clone(player));
        drop(self.sim.core(0).spawn(Class::Guest, async move {
            flag.set(Some(playing.run(&op).await));
        }));
        let mut revision = u64::MAX;
        let mut point = 0;
        loop {
            let now =
                self.sim.fs().revision().wrapping_add(player.ledger.borrow().revision() << 32);
            if now != revision {
                revision = now;
                self.cut(player, kinds, point);
                point += 1;
            }
            if !self.sim.run_steps(1) {
                break;
            }
        }
        let result = done.take().expect("a step comes to an end");
        if let Err(error) = result {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{}: {error}", told(kinds));
            *self.refused.entry(STEPS[kinds[kinds.len() - 1]]).or_default() += 1;
        }
        let player = Rc::clone(player);
        self.sim.block_on(0, |_| async move { player.read_all().await }).expect("is readable");
    }

    /// Judges what a power cut now may leave.
    fn cut(&mut self, player: &Player, kinds: &[usize], point: u64) {
        let fs = self.sim.fs();
        for kept in choices(fs.unflushed()) {
            let left = fs.after_power_cut_keeping(|change| kept[change]);
            self.judge(player, &left, || format!("{} point {point} kept {kept:?}", told(kinds)));
        }
        if fs.unflushed() > 0 {
            for seed in 0..2 {
                let left = fs.after_power_cut(point * 2 + seed);
                self.judge(player, &left, || format!("{} point {point} torn", told(kinds)));
            }
        }
    }

    fn judge(&mut self, player: &Player, left: &SimFs, told: impl Fn() -> String) {
        let bytes = left.read(PATH).expect("the file is there");
        let ledger = player.ledger.borrow();
        if !self.seen.insert((hash(&bytes), ledger.revision())) {
            return;
        }
        self.states += 1;
        if self.states.is_multiple_of(PEER_EVERY) {
            peer::check_exported(left, PATH);
            self.asked += 1;
        }
        let below = self.kind.below;
        let left = Left::of(left, PATH, "");
        let found = self.judge.block_on(0, |core| async move { look(&core, &left, below).await });
        let judged = found.and_then(|found| ledger.survived(&found));
        judged.unwrap_or_else(|wrong| panic!("{}: {wrong}", told()));
    }
}

/// Which of `count` changes are kept, in each way.
fn choices(count: usize) -> Vec<Vec<bool>> {
    if count <= 3 {
        let subset = |mask: usize| (0..count).map(|change| mask >> change & 1 != 0).collect();
        return (0..1 << count).map(subset).collect();
    }
    let mut all = vec![vec![false; count], vec![true; count]];
    let stride = (2 * count).div_ceil(CHOICES_MAX - 2);
    for one in (0..count).step_by(stride) {
        all.push((0..count).map(|change| change == one).collect());
        all.push((0..count).map(|change| change != one).collect());
    }
    all
}

fn told(kinds: &[usize]) -> String {
    let names: Vec<_> = kinds.iter().map(|kind| STEPS[*kind]).collect();
    names.join(", ")
}

/// Tells states apart (FNV-1a by words).
fn hash(bytes: &[u8]) -> u64 {
    let word = |chunk: &[u8]| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    };
    let step = |hash: u64, chunk: &[u8]| {
        (hash.rotate_left(5) ^ word(chunk)).wrapping_mul(0x0000_0100_0000_01b3)
    };
    bytes.chunks(8).fold(bytes.len() as u64 ^ 0xcbf2_9ce4_8422_2325, step)
}

/// Seconds that this thread was on a processor.
pub(super) fn seconds_on_cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = stat.split(' ').next().and_then(|field| field.parse::<f64>().ok());
    nanos.unwrap_or(0.0) / 1e9
}

/// Runs all sequences of a kind of world and prints the rate.
fn explore(what: &str, kind: Kind) {
    let mut worlds = Worlds::new(kind);
    let began = seconds_on_cpu();
    worlds.run_all(&mut Vec::new());
    let took = (seconds_on_cpu() - began).max(1e-3);
    println!(
        "small worlds, {what}: {} sequences, {} crash states ({} also by qemu-img) in {took:.1} s: \
         {:.0} states per minute per core; refused: {:?}",
        worlds.sequences,
        worlds.states,
        worlds.asked,
        worlds.states as f64 * 60.0 / took,
        worlds.refused,
    );
    assert!(worlds.sequences > 80);
}

fn kind(cluster_size: u64, depth: usize) -> Kind {
    let options = CreateOptions { cluster_size, ..CreateOptions::new(CLUSTERS * cluster_size) };
    let c = cluster_size / SECTOR;
    Kind { options, below: nothing, up: 8 * c, down: 2 * c, depth }
}

/// How long sequences are: one step more if `LIVEBLK_DEEP` is set.
fn depth(usual: usize) -> usize {
    usual + usize::from(std::env::var_os("LIVEBLK_DEEP").is_some())
}

#[test]
fn all_three_steps_on_clusters_of_two_sectors_survive_every_cut() {
    explore("1 KiB clusters", kind(1024, depth(3)));
}

#[test]
fn all_pairs_of_steps_survive_every_cut_where_growth_moves_the_l1_table() {
    let kind = kind(512, depth(2));
    explore("512-byte clusters, growth beyond L1", Kind { up: 66, ..kind });
}

#[test]
fn all_pairs_of_steps_survive_every_cut_over_a_backing_file() {
    let mut kind = kind(4096, depth(2));
    assert_eq!(kind.options.size, BELOW_BYTES);
    kind.below = below_byte;
    explore("4 KiB clusters over a backing file", kind.clone());
    kind.options.version = 2;
    explore("version 2 over a backing file", kind);
}

#[test]
fn all_pairs_of_steps_survive_every_cut_with_subclusters() {
    let mut kind = kind(16 << 10, depth(2));
    kind.options.extended_l2 = true;
    kind.below = below_byte;
    explore("subclusters over a backing file", kind);
}

#[test]
fn all_pairs_of_steps_survive_every_cut_with_other_refcounts() {
    for order in [1, 6] {
        let mut kind = kind(1024, depth(2));
        kind.options.refcount_order = order;
        explore(&format!("{}-bit refcounts", 1 << order), kind);
    }
}
