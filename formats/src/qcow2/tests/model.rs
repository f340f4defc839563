//! Random work by several tasks on one image, with power cuts, against a model per sector.
//!
//! After a cut each sector holds the last value known to be durable or one written since, the own
//! check finds no corruption, and (on a sample) so does the peer's. A seed that fails is printed;
//! `LIVEBLK_SEED` replays it.

use std::cell::RefCell;
use std::rc::Rc;

use liveblk_engine::driver::sim::{FsConfig, Rng, Sim, SimConfig};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::format::{InfoValue, ZeroMode};

use super::mover::{Disk, file, open};
use super::peer;
use crate::qcow2::{CompressionType, CreateOptions, check, create_with_data};

const SECTOR: u64 = 512;
const PATH: &str = "/image";
const TASKS: u64 = 3;

/// A value that a sector may hold, in the order of writing.
#[derive(Clone, Copy, Debug)]
struct Version {
    /// Zeroes occur often: what tells versions apart is their number.
    id: u64,
    value: u64,
    complete: bool,
    /// A discard: the value before it stays possible.
    maybe: bool,
}

/// What each sector may hold.
struct Model {
    sectors: Vec<Vec<Version>>,
    next: u64,
}

fn below_byte(at: u64) -> u8 {
    ((at / SECTOR) % 251) as u8 + 1
}

fn nothing(_: u64) -> u8 {
    0
}

fn below_value(sector: u64) -> u64 {
    u64::from_be_bytes([below_byte(sector * SECTOR); 8])
}

fn sector_bytes(value: u64) -> Vec<u8> {
    value.to_be_bytes().repeat(64)
}

fn value_of(sector: &[u8]) -> u64 {
    let value = u64::from_be_bytes(sector[..8].try_into().unwrap());
    assert!(sector == sector_bytes(value), "a sector is of one piece");
    value
}

impl Model {
    fn new(sectors: u64, below: bool) -> Self {
        let initial = |sector| Version {
            id: 0,
            value: if below { below_value(sector) } else { 0 },
            complete: true,
            maybe: false,
        };
        Self { sectors: (0..sectors).map(|sector| vec![initial(sector)]).collect(), next: 1 << 40 }
    }

    fn begin(&mut self, first: u64, count: u64, value: u64, maybe: bool) {
        self.next += 1;
        let id = self.next;
        for sector in first..first + count {
            self.sectors[sector as usize].push(Version { id, value, complete: false, maybe });
        }
    }

    fn end(&mut self, first: u64, count: u64) {
        for sector in first..first + count {
            self.sectors[sector as usize].last_mut().unwrap().complete = true;
        }
    }

    /// The oldest version that a flush that begins now leaves possible, per sector.
    fn floors(&self) -> Vec<u64> {
        let sure = |version: &&Version| version.complete && !version.maybe;
        self.sectors.iter().map(|s| s.iter().rfind(sure).unwrap().id).collect()
    }

    /// A flush that began at `floors` has ended; a later one may have ended before it.
    fn flushed(&mut self, floors: &[u64]) {
        for (sector, id) in self.sectors.iter_mut().zip(floors) {
            if let Some(at) = sector.iter().position(|version| version.id == *id) {
                sector.drain(..at);
            }
        }
    }

    /// What a reader whose task has nothing in flight here may see.
    fn live(&self, sector: u64) -> Vec<u64> {
        let versions = &self.sectors[sector as usize];
        let sure = |version: &Version| version.complete && !version.maybe;
        let from = versions.iter().rposition(sure).unwrap();
        versions[from..].iter().map(|version| version.value).collect()
    }
}

struct Work {
    disk: Disk,
    model: Rc<RefCell<Model>>,
    task: u64,
    sectors: u64,
    /// Sectors that belong to one task before those of the next one begin.
    stripe: u64,
}

impl Work {
    /// A random piece of at most `len` sectors that belong to this task.
    fn piece(&self, rng: &mut Rng, len: u64) -> (u64, u64) {
        let rounds = self.sectors / (self.stripe * TASKS);
        let start = (rng.bits() % rounds * TASKS + self.task) * self.stripe;
        let first = start + rng.bits() % self.stripe;
        (first, len.min(start + self.stripe - first))
    }

    async fn run(self, mut rng: Rng, operations: u64) {
        for _ in 0..operations {
            let len = match rng.bits() % 8 {
                0 => 1,
                1..=5 => 1 + rng.bits() % 40,
                _ => 1 + rng.bits() % 300,
            };
            let (first, count) = self.piece(&mut rng, len);
            let bits = rng.bits();
            match bits % 16 {
                0..=3 if bits >> 63 == 0 => self.write_compressed(first, count).await,
                0..=6 => self.write(first, count).await,
                7 => self.zero(first, count, ZeroMode::Keep).await,
                8 | 9 => self.zero(first, count, ZeroMode::Unmap).await,
                10 | 11 => self.zero(first, count, ZeroMode::Discard).await,
                12 | 13 => self.flush().await,
                _ => self.read(first, count).await,
            }
        }
    }

    async fn write(&self, first: u64, count: u64) {
        let value = {
            let mut model = self.model.borrow_mut();
            model.next += 1;
            let value = model.next;
            model.begin(first, count, value, false);
            value
        };
        let bytes = sector_bytes(value).repeat(count as usize);
        self.disk.write(first * SECTOR, &bytes).await.expect("writes succeed");
        self.model.borrow_mut().end(first, count);
    }

    /// The whole clusters among these sectors, compressed.
    async fn write_compressed(&self, first: u64, count: u64) {
        let cluster = self.disk.format.cluster_size() / SECTOR;
        let start = first.next_multiple_of(cluster);
        let to_end = (first + count) * SECTOR == self.disk.format.size();
        let end = if to_end { first + count } else { (first + count) / cluster * cluster };
        if start >= end || self.disk.format.abilities().compress.is_none() {
            return self.write(first, count).await;
        }
        let (first, count) = (start, end - start);
        let value = {
            let mut model = self.model.borrow_mut();
            model.next += 1;
            let value = model.next;
            model.begin(first, count, value, false);
            value
        };
        let bytes = sector_bytes(value).repeat(count as usize);
        self.disk.write_compressed(first * SECTOR, &bytes).await.expect("writes succeed");
        self.model.borrow_mut().end(first, count);
    }

    async fn zero(&self, first: u64, count: u64, mode: ZeroMode) {
        self.model.borrow_mut().begin(first, count, 0, mode == ZeroMode::Discard);
        self.disk.zero(first * SECTOR, count * SECTOR, mode).await.expect("zeroes succeed");
        self.model.borrow_mut().end(first, count);
    }

    async fn flush(&self) {
        let floors = self.model.borrow().floors();
        self.disk.format.flush().await.expect("flushes succeed");
        self.model.borrow_mut().flushed(&floors);
    }

    async fn read(&self, first: u64, count: u64) {
        let bytes = self.disk.read(first * SECTOR, count * SECTOR).await.expect("reads succeed");
        for (sector, bytes) in (first..).zip(bytes.chunks(SECTOR as usize)) {
            let value = value_of(bytes);
            let allowed = self.model.borrow().live(sector);
            assert!(allowed.contains(&value), "sector {sector}: {value:#x} not in {allowed:x?}");
        }
    }
}

/// Opens the image and starts the tasks; answers when all have ended.
async fn work(core: Core, model: Rc<RefCell<Model>>, seed: u64, below: bool, operations: u64) {
    let mut disk = open(&core, file(&core, PATH, false).await, true).await.expect("opens");
    disk.below = if below { below_byte } else { nothing };
    let sectors = model.borrow().sectors.len() as u64;
    // Far from each other, or in the same clusters all the time.
    let stripe = [sectors / TASKS, 3, 8, 17][(seed % 4) as usize];
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let (disk, model) = (disk.clone(), Rc::clone(&model));
            let work = Work { disk, model, task, sectors, stripe };
            core.spawn(Class::Guest, work.run(Rng::new(seed * 31 + task), operations))
        })
        .collect();
    for task in tasks {
        task.await;
    }
    disk.format.close().await.expect("closes");
}

async fn verify(core: Core, model: Rc<RefCell<Model>>, below: bool, clean: bool) {
    let storage = file(&core, PATH, false).await;
    let report = check(&core, &storage).await.expect("is checked");
    assert_eq!(report.corruptions, 0, "{:?}", report.problems);
    assert!(!clean || report.leaks == 0, "{:?}", report.problems);
    let mut disk = open(&core, storage, false).await.expect("opens");
    disk.below = if below { below_byte } else { nothing };
    let raw = ("data-file-raw", InfoValue::Flag(true));
    let raw = disk.format.info().specific.contains(&raw);
    let sectors = model.borrow().sectors.len() as u64;
    for first in (0..sectors).step_by(256) {
        let count = 256.min(sectors - first);
        let bytes = disk.read(first * SECTOR, count * SECTOR).await.expect("reads");
        if raw {
            let buf = core.pool().alloc(bytes.len());
            disk.format.data_storage().read(first * SECTOR, buf.clone()).await.unwrap();
            assert!(buf.to_vec() == bytes, "the data file is a raw image of the disk");
        }
        for (sector, bytes) in (first..).zip(bytes.chunks(SECTOR as usize)) {
            let value = value_of(bytes);
            let versions = &mut model.borrow_mut().sectors[sector as usize];
            assert!(
                versions.iter().any(|version| version.value == value),
                "sector {sector}: {value:#x} not in {versions:x?}"
            );
            *versions = vec![Version { id: 0, value, complete: true, maybe: false }];
        }
    }
}

fn options(rng: &mut Rng, size: u64, below: bool) -> CreateOptions {
    let mut options = CreateOptions::new(size);
    options.cluster_size = 1 << [9, 10, 12, 12, 14, 16][(rng.bits() % 6) as usize];
    options.version = if rng.bits().is_multiple_of(4) && !below { 2 } else { 3 };
    if options.version == 3 {
        let bits = rng.bits();
        options.refcount_order = (bits % 7) as u32;
        if bits >> 63 == 0 {
            options.compression_type = CompressionType::Zstd;
        }
    }
    if options.version == 3 && rng.bits().is_multiple_of(3) {
        options.cluster_size = 1 << [14, 14, 15, 17][(rng.bits() % 4) as usize];
        options.extended_l2 = true;
    }
    if options.version == 3 && rng.bits().is_multiple_of(4) {
        options.data_file = Some("image.data".to_owned());
        options.data_file_raw = !below && rng.bits().is_multiple_of(2);
    }
    options
}

/// Three rounds of work, each but the last ended by a power cut.
fn run_seed(seed: u64) {
    let mut rng = Rng::new(seed);
    let size = SECTOR * (600 + rng.bits() % 3000);
    let below = rng.bits().is_multiple_of(2);
    let options = options(&mut rng, size, below);
    println!("seed {seed}: {options:?} below: {below}");
    let mut sim = Sim::new(SimConfig { fs: FsConfig::default(), ..SimConfig::new(seed).calm() });
    sim.fs().create(PATH, &[]);
    sim.fs().create(peer::DATA_FILE, &[]);
    sim.block_on(0, |core| async move {
        let storage = file(&core, PATH, false).await;
        let data = match &options.data_file {
            Some(_) => Some(file(&core, peer::DATA_FILE, false).await),
            None => None,
        };
        create_with_data(&core, &storage, data.as_ref(), options).await.expect("is created");
    });
    let mut fs = sim.crash();
    let model = Rc::new(RefCell::new(Model::new(size / SECTOR, below)));
    for round in 0..3 {
        let mut sim = Sim::with_fs(SimConfig::new(seed * 7 + round), fs);
        let (shared, at) = (Rc::clone(&model), seed * 11 + round);
        let last = round == 2;
        if last {
            sim.block_on(0, |core| work(core, shared, at, below, 40));
        } else {
            let core = sim.core(0);
            drop(core.spawn(Class::Guest, work(core.clone(), shared, at, below, 60)));
            sim.run_steps(200 + rng.bits() % 4000);
        }
        fs = sim.crash();
        if seed.is_multiple_of(16) {
            peer::check_exported(&fs, PATH);
        }
        let mut sim = Sim::with_fs(SimConfig::new(seed).calm(), fs);
        let shared = Rc::clone(&model);
        sim.block_on(0, |core| verify(core, shared, below, false));
        fs = sim.fs();
    }
}

#[test]
fn flushed_data_survives_power_cuts_and_nothing_foreign_appears() {
    let first = std::env::var("LIVEBLK_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = first.map_or(0..150, |seed: u64| seed..seed + 1);
    for seed in seeds {
        run_seed(seed);
    }
}
