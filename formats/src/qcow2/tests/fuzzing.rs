//! What the fuzz targets of `fuzz/` run, and the ordinary tests replay: bytes in, a panic if a
//! promise is broken.
//!
//! Each target is a method of [`Session`], which keeps one simulated machine for all inputs. An
//! input is a program in bytes ([`Input`]): where it ends, zeroes follow, so every input is valid.
//! A new target is a method here (or in a file of its own, called from here), a generator in
//! [`corpus`], and five lines in `fuzz/fuzz_targets`.

use std::collections::BTreeMap;
use std::rc::Rc;

use liveblk_engine::ErrorKind;
use liveblk_engine::driver::sim::{Rng, Sim, SimConfig};
use liveblk_engine::executor::Core;
use liveblk_engine::format::{Preallocation, ZeroMode};
use liveblk_engine::storage::{Memory, Storage};

use super::ledger::Ledger;
use super::look::{Left, look};
use super::mover::open;
use super::play::{BELOW_BYTES, Op, Place, Player, Span, below_byte, below_value, nothing};
use super::{fuzz_bitmaps, fuzz_packed, fuzz_repair};
use crate::qcow2::{CompressionType, CreateOptions, check, create};

/// The targets by name, as they are called in `fuzz/fuzz_targets`.
pub const TARGETS: [Target; 5] = [
    Target { name: "qcow2_open", len_max: 4096, run: Session::qcow2_open, corpus: open_corpus },
    Target { name: "qcow2_io", len_max: 96, run: Session::qcow2_io, corpus: io_corpus },
    Target {
        name: "compressed_cluster",
        len_max: 2048,
        run: fuzz_packed::compressed_cluster,
        corpus: fuzz_packed::corpus,
    },
    Target {
        name: "bitmap_dir",
        len_max: 1024,
        run: fuzz_bitmaps::bitmap_dir,
        corpus: fuzz_bitmaps::corpus,
    },
    Target {
        name: "qcow2_check_repair",
        len_max: 8192,
        run: fuzz_repair::qcow2_check_repair,
        corpus: fuzz_repair::corpus,
    },
];

/// A fuzz target.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Bytes of the longest input that means something.
    pub len_max: usize,
    /// Runs one input; panics if a promise is broken.
    pub run: fn(&mut Session, &[u8]),
    /// Inputs that reach all parts, made by our own code: the seed corpus.
    pub corpus: fn() -> Vec<Vec<u8>>,
}

/// Bytes read as numbers; zeroes after the end.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// The program in `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// The next two bytes, little-endian.
    pub fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// The next eight bytes, little-endian.
    pub fn long(&mut self) -> u64 {
        (0..8).fold(0, |long, at| long | u64::from(self.byte()) << (8 * at))
    }

    /// What is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}

/// A machine that inputs run on, one after the other.
pub struct Session {
    sim: Sim,
    /// What `bitmap_dir` starts from.
    pub(super) bitmap_images: BTreeMap<usize, Rc<fuzz_bitmaps::Base>>,
    /// What `qcow2_check_repair` starts from.
    pub(super) specimens: BTreeMap<usize, Rc<Memory>>,
}

/// The largest image that an input is taken for, in bytes.
const IMAGE_MAX: usize = 1 << 20;

/// The largest disk that `qcow2_io` makes at first, in bytes: two L2 tables of the smallest
/// clusters, or one and a half of the largest. All of it is looked at again and again.
const DISK_MAX: u64 = 40 << 10;

/// Steps of one input: short programs find the same and run more often.
const OPS_MAX: usize = 16;

impl Session {
    /// A new machine.
    pub fn new() -> Self {
        let config = SimConfig { steps_max: u64::MAX, ..SimConfig::new(1).calm() };
        let (bitmap_images, specimens) = (BTreeMap::new(), BTreeMap::new());
        Self { sim: Sim::new(config), bitmap_images, specimens }
    }

    pub(super) fn run<F: Future + 'static>(&mut self, make: impl FnOnce(Core) -> F) -> F::Output
    where
        F::Output: 'static,
    {
        let output = self.sim.block_on(0, make);
        self.sim.run_idle();
        output
    }

    /// Bytes of a file: checks it, then opens it writable or read-only, reads and writes some.
    ///
    /// The first byte says whether it is writable (below 128), and how many KiB of zeroes follow
    /// the rest, which is the file.
    pub fn qcow2_open(&mut self, data: &[u8]) {
        let mut input = Input::new(data);
        let head = input.byte();
        let bytes = input.rest();
        let bytes = &bytes[..bytes.len().min(IMAGE_MAX)];
        let memory = Memory::from_bytes(bytes);
        let more = u64::from(head & 127) << 10;
        memory.truncate(memory.size() + more).expect("memory has no end");
        let writable = head < 128;
        self.run(|core| async move {
            let storage = Storage::Memory(memory);
            drop(check(&core, &storage).await);
            let Ok(disk) = open(&core, storage, writable).await else { return };
            touch(&disk, disk.format.size(), writable).await;
            if writable {
                drop(disk.format.flush().await);
                drop(disk.format.close().await);
            }
        });
    }

    /// Options, changes of bytes, steps: an image is made, damaged, and used against the ledger.
    ///
    /// Without damage each read must be right, and so must be the image that is left; with damage
    /// nothing may panic, hang or grow without bound.
    pub fn qcow2_io(&mut self, data: &[u8]) {
        let mut input = Input::new(data);
        let below = if input.byte().is_multiple_of(2) { nothing } else { below_byte };
        let mut options = options(&mut input);
        options.size = options.size.max(if below(0) == 0 { 512 } else { BELOW_BYTES });
        let damage: Vec<(u16, u8)> =
            (0..input.byte() % 8).map(|_| (input.short(), input.byte())).collect();
        if below(0) != 0 {
            // What is allocated from the start hides the layers below.
            options.preallocation = Preallocation::Off;
        }
        let sectors = options.size / 512;
        let mut ops = Vec::new();
        while !input.is_empty() && ops.len() < OPS_MAX {
            ops.push(op(&mut input, sectors));
        }
        self.run(|core| async move {
            let memory = Memory::new(0);
            let storage = Storage::Memory(Rc::clone(&memory));
            if create(&core, &storage, options).await.is_err() {
                return;
            }
            if damage.is_empty() {
                play(&core, memory, below, sectors, &ops).await;
            } else {
                play_damaged(&core, &memory, &damage, &ops).await;
            }
        });
    }
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads, and perhaps writes and discards, at the start, in the middle and at the end.
async fn touch(disk: &super::mover::Disk, size: u64, write: bool) {
    let cluster = disk.format.cluster_size();
    for at in [0, size / 2 / 512 * 512, size.saturating_sub(512) / 512 * 512] {
        let len = size.saturating_sub(at).min(cluster.min(4096) + 512);
        if len == 0 {
            continue;
        }
        drop(disk.read(at, len).await);
        if write {
            drop(disk.write(at, &vec![7; len as usize]).await);
            drop(disk.zero(at, len, ZeroMode::Unmap).await);
        }
    }
}

fn options(input: &mut Input<'_>) -> CreateOptions {
    let flags = input.byte();
    let bits = [9, 9, 9, 10, 12, 12, 14, 16][usize::from(flags & 7)];
    let version = if flags & 8 == 0 { 3 } else { 2 };
    let order = u32::from(input.byte() % 7);
    let order = if version == 2 { 4 } else { order };
    // Mostly not a whole number of clusters.
    let most = DISK_MAX.max(3 << (bits - 1));
    let size = ((1 + u64::from(input.byte())) * most / 256 / 512 * 512).max(512);
    let more = input.byte();
    CreateOptions {
        extended_l2: version == 3 && bits >= 14 && more & 1 != 0,
        compression_type: match version == 3 && more & 2 != 0 {
            true => CompressionType::Zstd,
            false => CompressionType::Zlib,
        },
        preallocation: if more & 4 != 0 { Preallocation::Metadata } else { Preallocation::Off },
        cluster_size: 1 << bits,
        version,
        refcount_order: order,
        ..CreateOptions::new(size)
    }
}

const NAMES: [&str; 3] = ["one", "two", "three"];

/// The next step for a disk of `sectors` at first; the player leaves out what lies outside.
fn op(input: &mut Input<'_>, sectors: u64) -> Op {
    let kind = input.byte();
    let first = u64::from(input.short()) % sectors;
    let mut count = 1 + u64::from(input.byte() % 32);
    if kind >= 0xe0 {
        count *= 8;
    }
    let span = Span { first, count };
    let name = NAMES[first as usize % NAMES.len()];
    match kind & 15 {
        0..=3 => Op::Write(span),
        4 => Op::Packed(first),
        5 => Op::Zero(span, ZeroMode::Keep),
        6 => Op::Zero(span, ZeroMode::Unmap),
        7 => Op::Zero(span, ZeroMode::Discard),
        8 => Op::Read(span),
        9 => Op::Flush,
        10 => Op::Resize(first + count),
        11 => Op::Take(name),
        12 => Op::Remove(name),
        13 => Op::Apply(name),
        14 => Op::Settle,
        _ => Op::Reopen,
    }
}

/// The step with its range cut to the disk; none if nothing is left, or the image cannot do it.
fn fitted(player: &Player, op: &Op) -> Option<Op> {
    let size = player.ledger.borrow().size();
    let cut = |span: Span| {
        let count = span.count.min(size.checked_sub(span.first)?);
        (count > 0).then_some(Span { count, ..span })
    };
    let op = match op {
        Op::Write(span) => Op::Write(cut(*span)?),
        Op::Zero(span, mode) => Op::Zero(cut(*span)?, *mode),
        Op::Read(span) => Op::Read(cut(*span)?),
        op => op.clone(),
    };
    player.can(&op).then_some(op)
}

async fn play(core: &Core, memory: Rc<Memory>, below: fn(u64) -> u8, sectors: u64, ops: &[Op]) {
    let ledger = Ledger::new((0..sectors).map(|sector| below_value(below, sector)));
    let place = Place::Memory(Rc::clone(&memory));
    let player = match Player::open(core, place, below, ledger).await {
        Ok(player) => player,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "a new image opens: {error}");
            return;
        }
    };
    for op in ops {
        let Some(op) = fitted(&player, op) else { continue };
        // Some changes are refused, for known reasons; all others work on memory without end.
        player.play(&op).await;
    }
    player.read_all().await.expect("the disk can be read");
    player.disk().format.close().await.expect("closes");
    let found = look(core, &Left { image: memory, data: None }, below).await;
    let found = found.unwrap_or_else(|wrong| panic!("the image is wrong: {wrong}"));
    player.ledger.borrow().survived(&found).unwrap_or_else(|wrong| panic!("{wrong}"));
}

async fn play_damaged(core: &Core, memory: &Rc<Memory>, damage: &[(u16, u8)], ops: &[Op]) {
    let mut bytes = memory.to_bytes();
    for (at, value) in damage {
        let at = usize::from(*at) % bytes.len();
        bytes[at] ^= value;
    }
    let storage = Storage::Memory(Memory::from_bytes(&bytes));
    drop(check(core, &storage).await);
    let Ok(disk) = open(core, storage, true).await else { return };
    for op in ops {
        let size = disk.format.size();
        let range = |span: &Span| {
            let at = (span.first * 512).min(size);
            (at, (span.count * 512).min(size - at).min(1 << 18))
        };
        match op {
            Op::Write(span) => {
                let (at, len) = range(span);
                drop(disk.write(at, &vec![3; len as usize]).await);
            }
            Op::Zero(span, mode) => {
                let (at, len) = range(span);
                drop(disk.zero(at, len, *mode).await);
            }
            Op::Read(span) => {
                let (at, len) = range(span);
                drop(disk.read(at, len).await);
            }
            Op::Resize(sectors) => drop(disk.format.resize(*sectors * 512).await),
            Op::Reopen | Op::Settle => drop(disk.format.set_writable(false).await),
            _ => drop(disk.format.flush().await),
        }
    }
    drop(disk.format.close().await);
}

/// Small images of every kind, whole and damaged: the first cluster and more.
fn open_corpus() -> Vec<Vec<u8>> {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    let mut out = Vec::new();
    let mut rng = Rng::new(7);
    for number in 0..48_u8 {
        let input = [number % 16, number / 2, number * 5, number / 3, number];
        let options = options(&mut Input::new(&input));
        let bytes = sim.block_on(0, |core| async move {
            let memory = Memory::new(0);
            let storage = Storage::Memory(Rc::clone(&memory));
            create(&core, &storage, options).await.ok()?;
            Some(memory.to_bytes())
        });
        let Some(mut bytes) = bytes else { continue };
        bytes.truncate(4095);
        let with = |more: u8, bytes: &[u8]| [&[more], bytes].concat();
        out.push(with(number, &bytes));
        out.push(with(128 + number, &bytes));
        for _ in 0..6 {
            let mut damaged = bytes.clone();
            for _ in 0..1 + rng.bits() % 3 {
                // Mostly in the header, where each byte means something.
                let limit = if rng.bits().is_multiple_of(4) { damaged.len() } else { 112 };
                let at = (rng.bits() % limit.min(damaged.len()) as u64) as usize;
                let any = (rng.bits() & 255) as u8;
                damaged[at] = *rng.pick(&[0, 1, 0x7f, 0x80, 0xff, any]);
            }
            out.push(with((rng.bits() & 255) as u8, &damaged));
        }
        out.push(with(0, &bytes[..(rng.bits() % bytes.len() as u64) as usize]));
    }
    out
}

/// Programs that broke a promise once, made short.
const IO_FOUND: [&[u8]; 1] = [
    // Growth above layers that end where the disk ended (see `resizing`).
    &[1, 7, 0, 199, 1, 0, 10, 63, 0, 211, 0, 211, 0, 211, 10, 0, 1, 0],
];

/// Programs of random steps, one in four on a damaged image.
fn io_corpus() -> Vec<Vec<u8>> {
    let mut rng = Rng::new(11);
    let program = |number: u64| {
        let mut bytes: Vec<u8> = (0..5).map(|_| (rng.bits() & 255) as u8).collect();
        let damage = if number.is_multiple_of(4) { 1 + number as u8 % 7 } else { 0 };
        bytes.push(damage);
        let steps = 4 * (4 + rng.bits() % (OPS_MAX as u64 - 3)) + u64::from(damage) * 3;
        bytes.extend((0..steps).map(|_| (rng.bits() & 255) as u8));
        bytes
    };
    (0..400).map(program).chain(IO_FOUND.map(<[u8]>::to_vec)).collect()
}
