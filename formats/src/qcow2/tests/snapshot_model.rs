//! Random work with snapshots and changes of size on one image, with power cuts, against a model.
//!
//! The model keeps, per sector of the disk and of each snapshot, the values that it may hold now
//! and those that it may hold after a cut. A change of the tables that a cut interrupted has
//! happened or not, as a whole. A seed that fails is printed; `LIVEBLK_SEED` replays it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use liveblk_engine::ErrorKind;
use liveblk_engine::driver::sim::{FsConfig, Rng, Sim, SimConfig};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::format::ZeroMode;

use super::mover::{Disk, file, open};
use super::peer;
use super::references::{Counting, References};
use super::snapshots::{snapshots, take};
use crate::qcow2::{CreateOptions, check, create};

const SECTOR: u64 = 512;
const PATH: &str = "/image";

/// The values that each sector may hold.
type Content = Vec<Vec<u64>>;

/// A change of all tables that is under way.
#[derive(Clone, Debug)]
enum Doing {
    Create(String),
    Delete(String),
    Apply(String),
    Resize(u64),
}

#[derive(Clone, Debug)]
struct Model {
    live: Content,
    crash: Content,
    snapshots: BTreeMap<String, Content>,
    doing: Option<Doing>,
    next: u64,
    next_id: u64,
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
    fn new(sectors: u64) -> Self {
        let zeroes = vec![vec![0]; sectors as usize];
        let snapshots = BTreeMap::new();
        Self { live: zeroes.clone(), crash: zeroes, snapshots, doing: None, next: 1, next_id: 1 }
    }

    fn change(&mut self, first: u64, count: u64, value: u64, maybe: bool) {
        for sector in first as usize..(first + count) as usize {
            if !maybe {
                self.live[sector].clear();
            }
            self.live[sector].push(value);
            self.crash[sector].push(value);
        }
    }

    fn settle(&mut self) {
        self.crash.clone_from(&self.live);
    }

    /// `doing` has happened.
    fn done(&mut self) {
        match self.doing.take().expect("something is done") {
            Doing::Create(id) => {
                self.next_id = id.parse::<u64>().unwrap() + 1;
                self.snapshots.insert(id, self.live.clone());
            }
            Doing::Delete(id) => {
                self.snapshots.remove(&id);
            }
            Doing::Apply(id) => self.live.clone_from(&self.snapshots[&id]),
            Doing::Resize(sectors) => self.live.resize(sectors as usize, vec![0]),
        }
        let highest = self.snapshots.keys().map(|id| id.parse::<u64>().unwrap()).max();
        self.next_id = highest.unwrap_or(0) + 1;
        self.settle();
    }
}

fn fits(found: &[u64], content: &Content) -> bool {
    found.len() == content.len()
        && found.iter().zip(content).all(|(value, allowed)| allowed.contains(value))
}

async fn read_all(disk: &Disk) -> Vec<u64> {
    let bytes = disk.read(0, disk.format.size()).await.expect("reads");
    bytes.chunks(SECTOR as usize).map(value_of).collect()
}

struct Work {
    disk: Disk,
    model: Rc<RefCell<Model>>,
    version: u32,
}

impl Work {
    async fn run(self, mut rng: Rng, operations: u64) {
        for _ in 0..operations {
            match rng.bits() % 20 {
                0..=9 => self.input(&mut rng).await,
                10 | 11 => {
                    self.disk.format.flush().await.expect("flushes");
                    self.model.borrow_mut().settle();
                }
                12 | 13 => {
                    let found = read_all(&self.disk).await;
                    assert!(fits(&found, &self.model.borrow().live));
                }
                14..=16 => self.create().await,
                17 => self.with_one(&mut rng, Doing::Delete).await,
                18 => self.with_one(&mut rng, Doing::Apply).await,
                _ => self.resize(&mut rng).await,
            }
        }
    }

    async fn input(&self, rng: &mut Rng) {
        let sectors = self.model.borrow().live.len() as u64;
        if sectors == 0 {
            return;
        }
        let first = rng.bits() % sectors;
        let count = (1 + rng.bits() % [1, 40, 300][(rng.bits() % 3) as usize]).min(sectors - first);
        let (at, len) = (first * SECTOR, count * SECTOR);
        let mode = [ZeroMode::Keep, ZeroMode::Unmap, ZeroMode::Discard][(rng.bits() % 3) as usize];
        if rng.bits().is_multiple_of(3) {
            self.model.borrow_mut().change(first, count, 0, mode == ZeroMode::Discard);
            self.disk.zero(at, len, mode).await.expect("zeroes");
            return;
        }
        let value = {
            let mut model = self.model.borrow_mut();
            model.next += 1;
            let value = model.next;
            model.change(first, count, value, false);
            value
        };
        self.disk.write(at, &sector_bytes(value).repeat(count as usize)).await.expect("writes");
    }

    /// Runs a change of the tables; those that are refused change nothing.
    async fn table_change(&self, doing: Doing) {
        self.model.borrow_mut().doing = Some(doing.clone());
        let all = snapshots(&self.disk);
        let result = match &doing {
            Doing::Create(id) => take(&self.disk, "n").await.map(|info| assert_eq!(&info.id, id)),
            Doing::Delete(id) => all.delete(id).await,
            Doing::Apply(id) => all.apply(id).await,
            Doing::Resize(sectors) => self.disk.format.resize(sectors * SECTOR).await,
        };
        match result {
            Ok(()) => self.model.borrow_mut().done(),
            Err(error) => {
                self.model.borrow_mut().doing = None;
                assert!(is_beyond(&self.disk.core, &doing).await, "{doing:?}: {error}");
                assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            }
        }
    }

    async fn create(&self) {
        let id = self.model.borrow().next_id.to_string();
        if self.model.borrow().snapshots.len() < 5 {
            self.table_change(Doing::Create(id)).await;
        }
    }

    async fn with_one(&self, rng: &mut Rng, doing: fn(String) -> Doing) {
        let ids: Vec<String> = self.model.borrow().snapshots.keys().cloned().collect();
        if !ids.is_empty() {
            self.table_change(doing(ids[rng.bits() as usize % ids.len()].clone())).await;
        }
    }

    async fn resize(&self, rng: &mut Rng) {
        if self.version == 3 || self.model.borrow().snapshots.is_empty() {
            self.table_change(Doing::Resize(rng.bits() % 2500)).await;
        }
    }
}

/// Whether a change needs more references than the refcounts of the image can count.
async fn is_beyond(core: &Core, doing: &Doing) -> bool {
    let references = References::read(core, &file(core, PATH, false).await).await;
    match doing {
        Doing::Create(_) => references.overflow(Counting::Take),
        Doing::Apply(id) => references.overflow(Counting::Apply(id)),
        Doing::Delete(_) | Doing::Resize(_) => false,
    }
}

async fn work(core: Core, model: Rc<RefCell<Model>>, seed: u64, version: u32, operations: u64) {
    let disk = open(&core, file(&core, PATH, false).await, true).await.expect("opens");
    let work = Work { disk: disk.clone(), model, version };
    work.run(Rng::new(seed), operations).await;
    disk.format.close().await.expect("closes");
}

/// What the image holds is possible; the model goes on from there.
async fn verify(core: Core, model: Rc<RefCell<Model>>) {
    let storage = file(&core, PATH, false).await;
    let report = check(&core, &storage).await.expect("is checked");
    assert_eq!(report.corruptions, 0, "{:?}", report.problems);
    let disk = open(&core, storage, false).await.expect("opens");
    let found = read_all(&disk).await;
    let ids: Vec<String> = snapshots(&disk).list().into_iter().map(|info| info.id).collect();
    let mut model = model.borrow_mut();
    let happened = match &model.doing {
        None => false,
        Some(Doing::Create(id)) => ids.contains(id),
        Some(Doing::Delete(id)) => !ids.contains(id),
        Some(Doing::Apply(id)) => fits(&found, &model.snapshots[id]),
        Some(Doing::Resize(sectors)) => found.len() as u64 == *sectors,
    };
    if happened {
        model.done();
    }
    model.doing = None;
    let mut expected: Vec<String> = model.snapshots.keys().cloned().collect();
    expected.sort_by_key(|id| id.parse::<u64>().unwrap());
    assert_eq!(ids, expected);
    assert!(fits(&found, &model.crash), "happened: {happened}");
    model.live = found.into_iter().map(|value| vec![value]).collect();
    model.settle();
}

/// Every snapshot holds what the model says (found by applying it in a copy of the world).
async fn verify_snapshots(core: Core, model: Rc<RefCell<Model>>) {
    let disk = open(&core, file(&core, PATH, false).await, true).await.expect("opens");
    for info in snapshots(&disk).list() {
        match snapshots(&disk).apply(&info.id).await {
            Ok(()) => {}
            Err(error) => {
                // Three snapshots of a cluster that the disk does not use any more.
                let apply = Doing::Apply(info.id.clone());
                assert!(is_beyond(&core, &apply).await, "{apply:?}: {error}");
                assert_eq!(error.kind(), ErrorKind::InvalidArgument);
                continue;
            }
        }
        let found = read_all(&disk).await;
        let mut model = model.borrow_mut();
        let content = model.snapshots.get_mut(&info.id).expect("is known");
        assert!(fits(&found, content), "snapshot {}", info.id);
        *content = found.into_iter().map(|value| vec![value]).collect();
    }
    disk.format.close().await.expect("closes");
    let report = check(&core, disk.format.data_storage()).await.expect("is checked");
    assert_eq!(report.corruptions, 0, "{:?}", report.problems);
}

fn options(rng: &mut Rng, size: u64) -> CreateOptions {
    let mut options = CreateOptions::new(size);
    options.cluster_size = 1 << [9, 9, 10, 12, 14, 16][(rng.bits() % 6) as usize];
    options.version = if rng.bits().is_multiple_of(5) { 2 } else { 3 };
    if options.version == 3 {
        options.refcount_order = 1 + (rng.bits() % 6) as u32;
        options.extended_l2 = options.cluster_size >= 1 << 14 && rng.bits().is_multiple_of(2);
    }
    options
}

fn run_seed(seed: u64) {
    let mut rng = Rng::new(seed);
    let sectors = 200 + rng.bits() % 1500;
    let options = options(&mut rng, sectors * SECTOR);
    let version = options.version;
    println!("seed {seed}: {options:?}");
    let mut sim = Sim::new(SimConfig { fs: FsConfig::default(), ..SimConfig::new(seed).calm() });
    sim.fs().create(PATH, &[]);
    sim.block_on(0, |core| async move {
        let storage = file(&core, PATH, false).await;
        create(&core, &storage, options).await.expect("is created");
    });
    let mut fs = sim.crash();
    let model = Rc::new(RefCell::new(Model::new(sectors)));
    for round in 0..4 {
        let mut sim = Sim::with_fs(SimConfig::new(seed * 7 + round), fs);
        let (shared, at) = (Rc::clone(&model), seed * 11 + round);
        if round == 3 {
            sim.block_on(0, |core| work(core, shared, at, version, 25));
        } else {
            let core = sim.core(0);
            drop(core.spawn(Class::Guest, work(core.clone(), shared, at, version, 60)));
            sim.run_steps(100 + rng.bits() % 3000);
        }
        fs = sim.crash();
        if seed.is_multiple_of(16) {
            peer::check_exported(&fs, PATH);
        }
        let mut sim = Sim::with_fs(SimConfig::new(seed).calm(), fs.after_kill());
        sim.block_on(0, |core| verify(core, Rc::clone(&model)));
        sim.block_on(0, |core| verify_snapshots(core, Rc::clone(&model)));
    }
}

#[test]
fn snapshots_and_sizes_survive_power_cuts_as_a_whole() {
    let first = std::env::var("LIVEBLK_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = first.map_or(0..100, |seed: u64| seed..seed + 1);
    for seed in seeds {
        run_seed(seed);
    }
}
