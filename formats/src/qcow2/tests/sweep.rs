//! The N-th failure: every operation of every script fails once, or from then on, with EIO or
//! ENOSPC, or moves only half of its bytes.
//!
//! What must hold: a short transfer is not noticed; for want of space only requests fail, and all
//! goes on when there is space; after EIO writing may be over (with the first cause), what can be
//! read is right. Whatever happened, after a power cut or the death of the process the image has no
//! corruption, what was flushed, and nothing foreign.
//!
//! Each scenario fails every third operation, beginning at another one than its neighbours;
//! `LIVEBLK_SWEEP_STRIDE=1` fails all.

use std::collections::BTreeMap;
use std::rc::Rc;

use liveblk_engine::driver::sim::{FaultRule, OpFilter, Sim, SimConfig, SimOpKind};
use liveblk_engine::format::{BackingRef, ZeroMode};
use liveblk_engine::storage::{Memory, Storage};
use liveblk_engine::{Error, ErrorKind};

use super::ledger::{Ledger, SECTOR};
use super::look::{Left, look};
use super::mover::{Below, file, open};
use super::peer;
use super::play::{Op, Place, Player, Span, below_byte, below_value, nothing};
use super::worlds::seconds_on_cpu;
use crate::qcow2::{CompressionType, CreateOptions, check, create, create_with_data};

const PATH: &str = "/sweep";

/// The data file of images that have one; failures of `PATH` are also failures of it.
const DATA: &str = "/sweep.data";

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// One run in so many is also judged by the peer.
const PEER_EVERY: u64 = 400;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Once(i32),
    FromThenOn(i32),
    Short,
}

pub(super) const FAULTS: [Fault; 5] = [
    Fault::Once(EIO),
    Fault::FromThenOn(EIO),
    Fault::Once(ENOSPC),
    Fault::FromThenOn(ENOSPC),
    Fault::Short,
];

impl Fault {
    pub(super) fn rule(self, path: &str, nth: u64) -> FaultRule {
        let all = OpFilter::any().file(path);
        let rule = match self {
            Self::Once(ENOSPC) => FaultRule::once(takes_space(all), ENOSPC),
            Self::FromThenOn(ENOSPC) => FaultRule::always(takes_space(all), ENOSPC),
            Self::Once(errno) => FaultRule::once(all, errno),
            Self::FromThenOn(errno) => FaultRule::always(all, errno),
            Self::Short => FaultRule::short(all.kind(SimOpKind::Read).kind(SimOpKind::Write)),
        };
        rule.after(nth)
    }

    pub(super) fn explains(self, kind: ErrorKind) -> bool {
        match self {
            Self::Once(ENOSPC) | Self::FromThenOn(ENOSPC) => kind == ErrorKind::NoSpace,
            Self::Once(_) | Self::FromThenOn(_) => {
                matches!(kind, ErrorKind::Io(EIO) | ErrorKind::Poisoned)
            }
            Self::Short => false,
        }
    }
}

fn takes_space(filter: OpFilter) -> OpFilter {
    let kinds = [SimOpKind::Write, SimOpKind::Allocate, SimOpKind::ZeroRange, SimOpKind::Truncate];
    kinds.into_iter().fold(filter, OpFilter::kind)
}

/// What an image is like that scripts run on.
struct Kind {
    name: &'static str,
    options: CreateOptions,
    below: Below,
}

fn kinds() -> Vec<Kind> {
    let base = |clusters: u64, cluster_size: u64| CreateOptions {
        cluster_size,
        ..CreateOptions::new(clusters * cluster_size)
    };
    let kind = |name, options, below: Below| Kind { name, options, below };
    vec![
        kind("small clusters", base(200, 512), nothing),
        kind("wide refcounts", CreateOptions { refcount_order: 6, ..base(200, 512) }, nothing),
        kind("backing", base(40, 4096), below_byte),
        kind("version 2", CreateOptions { version: 2, ..base(40, 4096) }, below_byte),
        kind("subclusters", CreateOptions { extended_l2: true, ..base(16, 16 << 10) }, below_byte),
        kind(
            "zstd, lazy",
            CreateOptions {
                compression_type: CompressionType::Zstd,
                lazy_refcounts: true,
                ..base(40, 4096)
            },
            nothing,
        ),
        kind("data file", external(false, base(40, 4096)), below_byte),
        kind("raw data file", external(true, base(40, 4096)), nothing),
    ]
}

fn external(data_file_raw: bool, options: CreateOptions) -> CreateOptions {
    let data_file = Some(DATA.trim_start_matches('/').to_owned());
    CreateOptions { data_file, data_file_raw, ..options }
}

/// A script: what is done in peace, then under failures. `c` is the sectors of a cluster.
struct Script {
    name: &'static str,
    before: Vec<Op>,
    steps: Vec<Op>,
}

fn write(first: u64, count: u64) -> Op {
    Op::Write(Span { first, count })
}

fn zero(first: u64, count: u64, mode: ZeroMode) -> Op {
    Op::Zero(Span { first, count }, mode)
}

fn backing(name: &str) -> Op {
    let reference = BackingRef { file: name.into(), format: Some("qcow2".into()) };
    Op::Backing(Some(reference))
}

fn scripts(c: u64, size: u64) -> Vec<Script> {
    use Op::{Apply, Flush, Packed, Remove, Reopen, Resize, Settle, Take, Track, Untrack, Wipe};
    use ZeroMode::{Discard, Keep, Unmap};
    let script = |name, before: &[Op], steps: &[Op]| Script {
        name,
        before: before.to_vec(),
        steps: steps.to_vec(),
    };
    let full: Vec<Op> = vec![write(0, 10 * c), Flush];
    let mut many = Vec::new();
    for at in 0..size / c / 2 {
        many.push(write(at * 2 * c, c.min(2)));
        if at % 16 == 15 {
            many.push(Flush);
        }
    }
    many.push(Flush);
    let snap = [write(0, 4 * c), Take("one")];
    vec![
        script("first write", &[], &[write(c, 2 * c), Flush]),
        script("unaligned first write", &[], &[write(c + c / 2, 3 * c), Flush]),
        script("writes in place", &full, &[write(1, c), Flush, write(3 * c, c), Flush]),
        script("zeroes kept", &full, &[zero(c, 3 * c, Keep), Flush, write(c, c), Flush]),
        script("zeroes unmapped", &full, &[zero(c, 5 * c, Unmap), Flush, write(c, 3 * c), Flush]),
        script(
            "discard and reuse",
            &full,
            &[zero(0, 6 * c, Discard), Flush, write(11 * c, 5 * c), Flush, write(0, c), Flush],
        ),
        script("refcount blocks", &[], &many),
        script("growth", &full, &[Resize(size + 2 * c), write(size, 2 * c), Flush]),
        script("growth of L1", &full, &[Resize(size + 4096), write(size + 4000, c), Flush]),
        script("shrink", &full, &[Resize(5 * c), Flush, Resize(size), write(7 * c, c), Flush]),
        script("snapshot", &full, &[Take("one"), write(0, 2 * c), Flush]),
        script(
            "writes after a snapshot",
            &snap,
            &[write(1, 2 * c), Flush, zero(0, c, Unmap), Flush],
        ),
        script("snapshot removed", &snap, &[write(0, c), Remove("one"), write(c, c), Flush]),
        script(
            "snapshot applied",
            &snap,
            &[write(0, 2 * c), Flush, Apply("one"), write(c, c), Flush],
        ),
        script("two snapshots", &snap, &[Take("two"), Remove("one"), Flush, Apply("two"), Flush]),
        script("compressed", &[], &[Packed(1), Packed(2), Flush, Packed(1), Flush]),
        script(
            "compressed, then written",
            &[Packed(0), Packed(1), Flush],
            &[write(1, 1), Flush, zero(c, c, Unmap), Packed(3), Flush],
        ),
        script("backing named", &full, &[backing("base.qcow2"), write(0, c), Flush]),
        script(
            "backing removed",
            &[backing("base"), Flush],
            &[Op::Backing(None), write(0, c), Flush],
        ),
        script("read-only and back", &full, &[write(9 * c, 3 * c), Settle, write(0, c), Flush]),
        script("closed and opened", &full, &[write(9 * c, 3 * c), Reopen, write(0, c), Flush]),
        script("bitmap made", &full, &[Track("page"), write(0, c), Flush, Reopen, write(c, c)]),
        script(
            "bitmaps stored",
            &[Track("fine"), Track("coarse")],
            &[write(0, c), Flush, write(3 * c, 2 * c), Reopen, zero(0, c, Unmap), Settle],
        ),
        script(
            "bitmap cleared",
            &[Track("fine"), write(0, 2 * c)],
            &[Wipe("fine"), write(c, c), Flush, Wipe("fine"), Reopen],
        ),
        script(
            "bitmap removed",
            &[Track("fine"), Track("page"), write(0, 2 * c)],
            &[Untrack("fine"), write(c, c), Reopen, Untrack("page"), write(0, c), Flush],
        ),
        script(
            "size with bitmaps",
            &[Track("page"), write(0, 8 * c)],
            &[write(c, c), Resize(5 * c), Flush, Resize(size + 2 * c), write(size, c), Reopen],
        ),
        script("closed after frees", &full, &[zero(0, 4 * c, Unmap), Reopen, write(0, c), Flush]),
    ]
}

/// An image that a script begins with.
struct Start {
    bytes: Vec<u8>,
    data: Option<Vec<u8>>,
    ledger: Ledger,
}

/// A step that failed.
struct Failed {
    error: Error,
    /// How it had to be refused anyway.
    refusal: Option<ErrorKind>,
    /// Whether the image could not be made writable again before.
    read_only: bool,
}

impl Failed {
    /// Whether `fault` or the rules of the image explain it.
    fn is_explained(&self, fault: Fault) -> bool {
        let kind = self.error.kind();
        // Nobody writes to an image that could not be made writable again.
        let refused = if self.read_only { Some(ErrorKind::ReadOnly) } else { self.refusal };
        Some(kind) == refused || fault.explains(kind)
    }
}

struct Sweep {
    sim: Sim,
    judge: Sim,
    runs: u64,
    scenarios: u64,
    /// One operation in so many fails.
    stride: u64,
    left_out: BTreeMap<&'static str, u64>,
}

fn calm_for_ever() -> Sim {
    Sim::new(SimConfig { steps_max: u64::MAX, ..SimConfig::new(1).calm() })
}

impl Sweep {
    fn new() -> Self {
        let (sim, judge) = (calm_for_ever(), calm_for_ever());
        let stride = std::env::var("LIVEBLK_SWEEP_STRIDE").ok().and_then(|text| text.parse().ok());
        let stride = stride.unwrap_or(3).max(1);
        Self { sim, judge, runs: 0, scenarios: 0, stride, left_out: BTreeMap::new() }
    }

    /// The image after the peaceful part; none if it cannot do all of the script.
    fn start(&mut self, kind: &Kind, script: &Script) -> Option<Start> {
        let (options, below) = (kind.options.clone(), kind.below);
        let (before, steps) = (script.before.clone(), script.steps.clone());
        let named = |op: &Op| matches!(op, Op::Backing(Some(_)));
        if options.data_file_raw && before.iter().chain(&steps).any(named) {
            // A raw data file shows all of the disk: nothing can lie below.
            return None;
        }
        let fs = self.sim.fs();
        fs.create(PATH, &[]);
        let external = options.data_file.is_some();
        if external {
            fs.create(DATA, &[]);
        }
        let start = self.sim.block_on(0, |core| async move {
            let sectors = options.size / SECTOR;
            let storage = file(&core, PATH, false).await;
            let data = if external { Some(file(&core, DATA, false).await) } else { None };
            let made = create_with_data(&core, &storage, data.as_ref(), options).await;
            made.expect("is created");
            let ledger = Ledger::new((0..sectors).map(|sector| below_value(below, sector)));
            let place = Place::Path(PATH.into());
            let player = Player::open(&core, place, below, ledger).await.expect("opens");
            if !before.iter().chain(&steps).all(|op| player.can(op)) {
                return None;
            }
            for op in before.iter().chain([&Op::Reopen]) {
                if !player.play(op).await {
                    return None;
                }
            }
            player.abandon();
            Some(player.ledger.borrow().clone())
        });
        self.sim.run_idle();
        let (bytes, data) = (fs.read(PATH).expect("is there"), fs.read(DATA));
        fs.remove(PATH);
        fs.remove(DATA);
        start.map(|ledger| Start { bytes, data, ledger })
    }

    fn script(&mut self, kind: &Kind, script: &Script) {
        let Some(start) = self.start(kind, script) else {
            *self.left_out.entry(script.name).or_default() += 1;
            return;
        };
        self.scenarios += 1;
        let first = self.scenarios % self.stride;
        for fault in FAULTS {
            for nth in (first..).step_by(self.stride as usize) {
                let told = format!("{}, {}, {fault:?} at {nth}", kind.name, script.name);
                if !self.run(kind, script, &start, fault, nth, &told) {
                    break;
                }
            }
        }
    }

    /// One run; false if the script has no `nth` operation.
    fn run(
        &mut self,
        kind: &Kind,
        script: &Script,
        start: &Start,
        fault: Fault,
        nth: u64,
        told: &str,
    ) -> bool {
        let fs = self.sim.fs();
        fs.create(PATH, &start.bytes);
        if let Some(data) = &start.data {
            fs.create(DATA, data);
        }
        let (below, ledger) = (kind.below, start.ledger.clone());
        let player = self.sim.block_on(0, |core| async move {
            Player::open(&core, Place::Path(PATH.into()), below, ledger).await.expect("opens")
        });
        self.sim.inject(fault.rule(PATH, nth));
        let failures = self.play(&player, script);
        self.sim.run_idle();
        let hit = self.sim.faults() > 0;
        self.sim.clear_faults();
        for failed in failures {
            assert!(failed.is_explained(fault), "{told}: {}", failed.error);
        }
        self.afterwards(&player, script, fault, told);
        self.runs += 1;
        for left in [fs.after_power_cut(nth), fs.after_kill()] {
            let files = Left::of(&left, PATH, DATA);
            let found =
                self.judge.block_on(0, |core| async move { look(&core, &files, below).await });
            let judged = found.and_then(|found| player.ledger.borrow().survived(&found));
            judged.unwrap_or_else(|wrong| panic!("{told}: {wrong}"));
            if self.runs.is_multiple_of(PEER_EVERY) {
                peer::check_exported(&left, PATH);
            }
        }
        player.abandon();
        drop(player);
        self.sim.run_idle();
        fs.remove(PATH);
        fs.remove(DATA);
        hit
    }

    /// Plays the steps and answers what failed.
    fn play(&mut self, player: &Rc<Player>, script: &Script) -> Vec<Failed> {
        let (player, steps) = (Rc::clone(player), script.steps.clone());
        self.sim.block_on(0, |_| async move {
            let mut failures = Vec::new();
            for op in &steps {
                // A growth may have failed.
                if !player.is_inside(op) {
                    continue;
                }
                let (refusal, before) = (player.refusal(op), player.read_only.get());
                if let Err(error) = player.run(op).await {
                    let read_only = before || player.read_only.get();
                    failures.push(Failed { error, refusal, read_only });
                }
            }
            failures
        })
    }

    /// What still works when the failures are over.
    fn afterwards(&mut self, player: &Rc<Player>, script: &Script, fault: Fault, told: &str) {
        let reading = Rc::clone(player);
        let read = self.sim.block_on(0, |_| async move {
            // After a failed reopen it is opened here.
            reading.read_all().await
        });
        read.unwrap_or_else(|error| panic!("{told}: reading goes on: {error}"));
        let again = self.play(player, script);
        let over = fault.explains(ErrorKind::Poisoned);
        for failed in again {
            let peaceful = failed.is_explained(Fault::Short);
            let explained = peaceful || (over && failed.is_explained(fault));
            assert!(explained, "{told}, afterwards: {}", failed.error);
        }
    }
}

/// Rows Q9, R2, R3, R10, R16.
#[test]
fn every_operation_of_every_script_may_fail() {
    let mut sweep = Sweep::new();
    let began = seconds_on_cpu();
    for kind in kinds() {
        let c = kind.options.cluster_size / SECTOR;
        for script in scripts(c, kind.options.size / SECTOR) {
            sweep.script(&kind, &script);
        }
    }
    println!(
        "failure sweep: {} scenarios, {} runs in {:.1} s; left out: {:?}",
        sweep.scenarios,
        sweep.runs,
        seconds_on_cpu() - began,
        sweep.left_out
    );
    assert!(sweep.scenarios >= 40);
}

/// Row R2: what is not finished is not an image, or is a good one.
#[test]
fn a_creation_that_fails_anywhere_leaves_no_half_image() {
    for fault in FAULTS {
        for nth in 0..200 {
            let mut sim = Sim::new(SimConfig::new(nth).calm());
            sim.fs().create(PATH, &[7; 4096]);
            let storage = sim.block_on(0, |core| async move { file(&core, PATH, false).await });
            sim.inject(fault.rule(PATH, nth));
            let options = CreateOptions { cluster_size: 512, ..CreateOptions::new(1 << 20) };
            let made =
                sim.block_on(0, |core| async move { create(&core, &storage, options).await });
            let hit = sim.faults() > 0;
            sim.clear_faults();
            if let Err(error) = &made {
                assert!(fault.explains(error.kind()), "{fault:?} {nth}: {error}");
            }
            let left =
                if made.is_ok() { sim.fs().after_power_cut(nth) } else { sim.fs().after_kill() };
            let bytes = left.read(PATH).expect("is there");
            sim.block_on(0, |core| async move {
                let storage = Storage::Memory(Memory::from_bytes(&bytes));
                let opened = open(&core, storage.clone(), true).await;
                assert!(opened.is_ok() || made.is_err(), "{fault:?} {nth}: what was made opens");
                if opened.is_ok() {
                    let report = check(&core, &storage).await.expect("is checked");
                    assert_eq!(report.corruptions, 0, "{:?}", report.problems);
                }
            });
            if !hit {
                break;
            }
        }
    }
}
