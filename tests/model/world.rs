//! A simulated machine with disks, guests and jobs, made from a seed.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use liveblk::engine::buf::Pool;
use liveblk::engine::driver::sim::{Rng, Sim, SimConfig, SimFs, SimOpKind};
use liveblk::engine::executor::sync::Semaphore;
use liveblk::engine::executor::{Class, Core};
use liveblk::engine::format::ReferencePolicy;
use liveblk::engine::node::{Node, NodeOptions, User};
use liveblk::engine::storage::unlink;
use liveblk::jobs::limits::READ_ONLY_RETRY_MAX_NS;
use liveblk::{Disk, Error, ErrorKind, Event, Host, WriteFlags};

use super::bitmaps::Bitmap;
use super::images::{Chain, Image, Qcow2, open_chain};
use super::ledger::{Clock, Ledger, Tick, Window};
use super::pattern::{self, BLOCK};

/// What a seed decides before anything runs.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// Requests of all guests together.
    pub(crate) requests: u32,
    /// Requests in flight per disk.
    pub(crate) depth: u32,
    pub(crate) disks: Vec<DiskPlan>,
    /// Power cuts that are looked at on the way: after how many requests, and steps after those.
    pub(crate) cuts: Vec<(u32, u64)>,
    /// When the file system becomes full for a while.
    pub(crate) full: Option<Full>,
    /// After how many requests a write to a target of a backup fails, with EIO.
    pub(crate) fault_at: Option<u32>,
    /// After how many requests a write or a sync of a disk's own files fails, with EIO.
    pub(crate) broken_at: Option<(u32, SimOpKind)>,
}

/// A time without space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Full {
    /// After how many requests it begins and ends.
    from: u32,
    to: u32,
    /// Bytes that are left.
    spare: u64,
}

/// Something that happens to a world.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Happening {
    /// The power is cut, in a copy of the world.
    Cut { number: u64, steps: u64 },
    /// Few bytes are left.
    Full { spare: u64 },
    /// There is space again.
    Space,
    /// One write to a target of a backup fails.
    CopyFails,
    /// One operation on a file that a disk may live in fails.
    DiskFails(SimOpKind),
}

/// What a disk starts as.
#[derive(Clone, Debug)]
pub(crate) struct DiskPlan {
    pub(crate) chain: Chain,
    pub(crate) options: NodeOptions,
}

/// Disks as they were at one moment within `window`: must survive every cut from now on.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) parts: Vec<(usize, Chain)>,
    pub(crate) window: Window,
    /// Blocks of each, where that was certain.
    pub(crate) blocks: Option<usize>,
}

/// A snapshot inside an image: the disk as it was at one moment within `window`.
#[derive(Clone, Debug)]
pub(crate) struct Internal {
    pub(crate) disk: usize,
    /// The chain whose last image has it.
    pub(crate) chain: Chain,
    pub(crate) name: String,
    pub(crate) window: Window,
}

impl Internal {
    /// Whether it is in this image.
    pub(crate) fn is_in(&self, image: &Rc<Image>) -> bool {
        self.chain.last().is_some_and(|top| Rc::ptr_eq(top, image))
    }
}

/// Backups that build on each other.
#[derive(Clone, Debug)]
pub(crate) struct Backups {
    /// What they are, the first one first.
    pub(crate) chain: Chain,
    /// What was written since the last one.
    pub(crate) bitmap: String,
}

/// Steps after which a world counts as hanging; a usual one takes 50,000.
const STEPS_MAX: u64 = 2_000_000;

/// How many results are looked at after each cut.
const KEPT_MAX: usize = 4;

/// A disk with its guest's view.
pub(crate) struct DiskState {
    pub(crate) disk: Disk,
    pub(crate) ledger: Rc<Ledger>,
    /// The permit to run a job or take a snapshot.
    pub(crate) permit: Semaphore,
    /// Bitmaps of the node that holds the disk.
    pub(crate) bitmaps: RefCell<Vec<Bitmap>>,
    /// Backups, each on the one before, and the bitmap that says what they lack.
    pub(crate) backups: RefCell<Option<Backups>>,
    /// Where the ranges of the guests' requests in flight end, in blocks.
    pub(crate) reach: RefCell<Vec<usize>>,
    /// The chains one of which holds the disk now: two while a command is changing that.
    pub(crate) active: RefCell<Vec<Chain>>,
}

/// Everything that tasks of a world share.
pub(crate) struct World {
    pub(crate) core: Core,
    pub(crate) host: Host,
    pub(crate) plan: Plan,
    pub(crate) clock: Rc<Clock>,
    pub(crate) disks: Vec<DiskState>,
    pub(crate) kept: RefCell<Vec<Kept>>,
    /// Snapshots inside images, in the order of their making.
    pub(crate) internal: RefCell<Vec<Internal>>,
    /// Images that exist and must be free of corruptions whenever the power is cut.
    pub(crate) images: RefCell<Vec<Rc<Image>>>,
    pub(crate) next_name: Cell<u32>,
    pub(crate) requests: Cell<u32>,
    pub(crate) requests_in_jobs: Cell<u32>,
    /// Requests that failed as the plan of the world allows.
    pub(crate) requests_failed: Cell<u32>,
    pub(crate) jobs_running: Cell<u32>,
    pub(crate) jobs_ended: Cell<u32>,
    pub(crate) tasks: Cell<u32>,
    /// All images were closed.
    pub(crate) is_closed: Cell<bool>,
    /// An operation on a disk's own file may have failed: so may requests from now on.
    pub(crate) is_broken: Cell<bool>,
    /// Requests that began before this may fail for want of space.
    pub(crate) full_until: Cell<Tick>,
    /// Layers that found no space to become read-only.
    pub(crate) late: RefCell<Vec<Rc<Node>>>,
    /// What happens at the very moment when a job says that it is complete, by its id.
    at_success: RefCell<Vec<(String, Box<dyn FnOnce()>)>>,
}

impl Plan {
    /// The plan of `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let requests = 300 + number(rng.below(100));
        let disks = *rng.pick(&[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4]);
        let disks = (0..disks).map(|index| DiskPlan::random(&mut rng, index)).collect();
        let cuts = 2 + rng.below(3);
        let mut cuts: Vec<_> =
            (0..cuts).map(|_| (number(rng.below(u64::from(requests))), rng.below(400))).collect();
        cuts.sort_unstable();
        let depth = number(rng.between(1, 8));
        let full = rng.chance(100).then(|| {
            let from = number(rng.below(250));
            let to = (from + number(rng.between(5, 100))).min(290);
            Full { from, to, spare: rng.below(64) * 4096 }
        });
        let fault_at = rng.chance(100).then(|| number(rng.below(250)));
        let broken_at = rng.chance(100).then(|| {
            let kind = *rng.pick(&[SimOpKind::Write, SimOpKind::Sync]);
            (number(rng.below(280)), kind)
        });
        Self { seed, requests, depth, disks, cuts, full, fault_at, broken_at }
    }

    /// Whether nothing fails.
    pub(crate) fn is_peaceful(&self) -> bool {
        self.full.is_none() && self.fault_at.is_none() && self.broken_at.is_none()
    }

    /// What happens, by the number of requests made before.
    pub(crate) fn happenings(&self) -> Vec<(u32, Happening)> {
        let cuts = (0..).zip(&self.cuts);
        let mut all: Vec<_> = cuts
            .map(|(number, (at, steps))| (*at, Happening::Cut { number, steps: *steps }))
            .collect();
        if let Some(Full { from, to, spare }) = self.full {
            all.push((from, Happening::Full { spare }));
            all.push((to, Happening::Space));
        }
        all.extend(self.fault_at.map(|at| (at, Happening::CopyFails)));
        all.extend(self.broken_at.map(|(at, kind)| (at, Happening::DiskFails(kind))));
        all.sort_by_key(|(at, _)| *at);
        all
    }
}

/// A small random number as the counters here hold it.
fn number(value: u64) -> u32 {
    u32::try_from(value).expect("invariant: small")
}

impl DiskPlan {
    fn random(rng: &mut Rng, disk: usize) -> Self {
        let largest = 1 << rng.between(8, 12);
        let size = BLOCK as u64 * rng.between(largest / 2, largest);
        let layers = rng.between(1, 3);
        let mut chain = Chain::new();
        for layer in 0..layers {
            let raw = layer == 0 && rng.chance(if layers == 1 { 50 } else { 300 });
            let qcow2 = (!raw).then(|| Qcow2::random(rng, layer == 0));
            let shorter = layer + 1 < layers && rng.chance(100);
            let size = if shorter { size / 2 / BLOCK as u64 * BLOCK as u64 } else { size };
            let name = format!("disk{disk}-{layer}.img");
            chain.push(Rc::new(Image { name, size, qcow2 }));
        }
        let options = NodeOptions {
            discard_unmap: rng.chance(700),
            direct: rng.chance(500),
            ..NodeOptions::default()
        };
        Self { chain, options }
    }

    fn blocks(&self) -> usize {
        let size = self.chain.last().expect("invariant: a chain has images").size;
        usize::try_from(size).expect("invariant: small") / BLOCK
    }

    /// Makes the images and writes something into each layer, all durable.
    async fn make(&self, core: Core, ledger: Rc<Ledger>, clock: Rc<Clock>, mut rng: Rng) {
        let host = Host::on(&core, ReferencePolicy::Explicit);
        for (index, image) in self.chain.iter().enumerate() {
            let below = index.checked_sub(1).map(|below| &*self.chain[below]);
            image.create(&core, below).await.expect("a new image");
            let spec = open_chain(&self.chain[..=index], &NodeOptions::default(), true);
            let node = host.open(spec).await.expect("a new chain opens");
            let disk = host.attach(&node).expect("a new chain is free");
            let blocks = image.size / BLOCK as u64;
            for _ in 0..rng.below(12) {
                let first = rng.below(blocks);
                let count = rng.between(1, (blocks - first).min(200));
                write_for_sure(&disk, &ledger, &clock, first, count).await;
            }
            // A layer that ends early hides what the layers below have behind its end.
            drop(disk);
            host.close().await.expect("a new chain closes");
            if (index + 1) < self.chain.len() && self.chain[index + 1].size > image.size {
                let first = usize::try_from(blocks).expect("invariant: small");
                let count = ledger.len() - first;
                let id = ledger.begin(0, first, count);
                ledger.end(id, true, true);
            }
        }
    }
}

async fn write_for_sure(disk: &Disk, ledger: &Ledger, clock: &Clock, first: u64, count: u64) {
    let value = clock.value();
    let at = |blocks: u64| usize::try_from(blocks).expect("invariant: small");
    let buf = disk.core().pool().alloc(at(count) * BLOCK);
    pattern::fill(&buf, value, first);
    let id = ledger.begin(value, at(first), at(count));
    let written = disk.write(first * BLOCK as u64, buf, WriteFlags::default());
    written.await.expect("a write to a new image");
    ledger.end(id, true, true);
}

/// A world that is about to run.
pub(crate) struct Start {
    pub(crate) sim: Sim,
    plan: Plan,
    clock: Rc<Clock>,
    ledgers: Vec<Rc<Ledger>>,
}

impl Start {
    /// Makes the disks of `plan`.
    pub(crate) fn new(plan: Plan, pool: &Pool) -> Self {
        let clock = Rc::new(Clock::default());
        let ledgers: Vec<_> =
            plan.disks.iter().map(|disk| Ledger::new(&clock, disk.blocks())).collect();
        let fs = Self::make_images(&plan, &clock, &ledgers, pool);
        let config = SimConfig { steps_max: STEPS_MAX, ..SimConfig::new(plan.seed) };
        let sim = Sim::with_pool(config, fs, pool.clone());
        Self { sim, plan, clock, ledgers }
    }

    /// Opens the disks.
    pub(crate) fn open(&mut self) -> Rc<World> {
        let (plan, clock, ledgers) =
            (self.plan.clone(), Rc::clone(&self.clock), self.ledgers.clone());
        self.sim.block_on(0, |core| World::open(core, plan, clock, ledgers))
    }

    fn make_images(plan: &Plan, clock: &Rc<Clock>, ledgers: &[Rc<Ledger>], pool: &Pool) -> SimFs {
        let mut config = SimConfig::new(plan.seed).calm();
        // Every other world has files that can share blocks.
        config.fs.shares = plan.seed % 2 == 1;
        let fs = SimFs::new(config.fs.clone());
        let mut sim = Sim::with_pool(config, fs, pool.clone());
        for (index, (disk, ledger)) in plan.disks.iter().zip(ledgers).enumerate() {
            let rng = Rng::new(plan.seed ^ (index as u64 + 1) << 40);
            let (disk, ledger, clock) = (disk.clone(), Rc::clone(ledger), Rc::clone(clock));
            sim.block_on(0, |core| async move { disk.make(core, ledger, clock, rng).await });
        }
        sim.kill()
    }
}

impl World {
    async fn open(core: Core, plan: Plan, clock: Rc<Clock>, ledgers: Vec<Rc<Ledger>>) -> Rc<Self> {
        let host = Host::on(&core, ReferencePolicy::Explicit);
        let mut disks = Vec::new();
        let mut images = Vec::new();
        for (index, (disk, ledger)) in plan.disks.iter().zip(ledgers).enumerate() {
            let spec = open_chain(&disk.chain, &disk.options, true);
            let node = host.open(spec.named(&format!("disk{index}"))).await;
            let node = node.expect("the chain opens");
            let user = User::Guest { name: format!("guest{index}").into() };
            let attached = Disk::attach(&node, user, true).expect("the disk is free");
            images.extend(disk.chain.iter().cloned());
            disks.push(DiskState {
                disk: attached,
                ledger,
                permit: Semaphore::new(&core, 1),
                bitmaps: RefCell::default(),
                backups: RefCell::default(),
                reach: RefCell::default(),
                active: RefCell::new(vec![disk.chain.clone()]),
            });
        }
        let world = Rc::new(Self {
            core,
            host,
            plan,
            clock,
            disks,
            kept: RefCell::default(),
            internal: RefCell::default(),
            images: RefCell::new(images),
            next_name: Cell::new(0),
            requests: Cell::new(0),
            requests_in_jobs: Cell::new(0),
            requests_failed: Cell::new(0),
            jobs_running: Cell::new(0),
            jobs_ended: Cell::new(0),
            tasks: Cell::new(0),
            is_closed: Cell::new(false),
            is_broken: Cell::new(false),
            full_until: Cell::new(0),
            late: RefCell::default(),
            at_success: RefCell::default(),
        });
        let weak = Rc::downgrade(&world);
        world.host.on_event(move |event| {
            if let Event::Completed { facts, error: None } = event
                && let Some(world) = weak.upgrade()
            {
                world.succeeded(&facts.id);
            }
        });
        world
    }

    /// Calls `then` inside the event that says that job `id` is complete.
    pub(crate) fn at_success(&self, id: &str, then: impl FnOnce() + 'static) {
        self.at_success.borrow_mut().push((id.to_owned(), Box::new(then)));
    }

    fn succeeded(&self, id: &str) {
        let mut waiting = self.at_success.borrow_mut();
        if let Some(at) = waiting.iter().position(|(known, _)| known == id) {
            let (_, then) = waiting.swap_remove(at);
            drop(waiting);
            then();
        }
    }

    /// Starts a task that the world waits for.
    pub(crate) fn spawn(self: &Rc<Self>, task: impl Future<Output = ()> + 'static) {
        let world = Rc::clone(self);
        world.tasks.set(world.tasks.get() + 1);
        drop(self.core.spawn(Class::Guest, async move {
            task.await;
            world.tasks.set(world.tasks.get() - 1);
        }));
    }

    /// From now on these disks can be read as of a moment within `window`, also after a cut.
    pub(crate) fn keep(&self, parts: Vec<(usize, Chain)>, window: Window) {
        self.keep_one(Kept { parts, window, blocks: None });
    }

    /// The same of one disk, which has `size` bytes.
    pub(crate) fn keep_of_size(&self, part: (usize, Chain), window: Window, size: u64) {
        let blocks = usize::try_from(size).expect("invariant: small") / BLOCK;
        self.keep_one(Kept { parts: vec![part], window, blocks: Some(blocks) });
    }

    fn keep_one(&self, new: Kept) {
        let mut kept = self.kept.borrow_mut();
        if kept.len() == KEPT_MAX {
            kept.remove(0);
        }
        kept.push(new);
    }

    /// Whether the plan explains the error of a job, or of an image that no guest works on.
    pub(crate) fn is_planned(&self, error: &Error) -> bool {
        match error.kind() {
            ErrorKind::NoSpace => self.plan.full.is_some(),
            ErrorKind::Io(_) | ErrorKind::Poisoned => {
                self.plan.fault_at.is_some() || self.plan.broken_at.is_some()
            }
            _ => false,
        }
    }

    /// Makes a new image; waits for space if there is none.
    pub(crate) async fn make(&self, image: &Rc<Image>, backing: Option<&Rc<Image>>) {
        loop {
            match image.create(&self.core, backing.map(|image| &**image)).await {
                Ok(()) => break,
                Err(error) if self.is_planned(&error) => {
                    for path in image.paths() {
                        // The second of two files may not have been made.
                        let _ = unlink(&self.core, path.as_ref()).await;
                    }
                    self.core.sleep(200_000).await;
                }
                Err(error) => panic!("no new image: {error}"),
            }
        }
        self.images.borrow_mut().push(Rc::clone(image));
    }

    /// There is space again: layers that could not become read-only do so by themselves.
    pub(crate) async fn judge_late(&self) {
        let late = self.late.take();
        if late.is_empty() || self.is_broken.get() {
            return;
        }
        self.core.sleep(2 * READ_ONLY_RETRY_MAX_NS).await;
        for node in late {
            let there = self.host.graph().node(node.id()).is_some();
            let forgotten = there && node.is_writable() && !node.is_asked_writable();
            assert!(!forgotten, "{node:?} stays writable");
        }
    }

    /// The chain that holds disk `index`.
    pub(crate) fn chain(&self, index: usize) -> Chain {
        let active = self.disks[index].active.borrow();
        active.last().expect("invariant: a disk has a chain").clone()
    }

    /// Takes one of the requests that are still to be made.
    pub(crate) fn take_request(&self) -> bool {
        let made = self.requests.get();
        if made >= self.plan.requests {
            return false;
        }
        self.requests.set(made + 1);
        if self.jobs_running.get() > 0 {
            self.requests_in_jobs.set(self.requests_in_jobs.get() + 1);
        }
        true
    }

    /// Whether all requests were made.
    pub(crate) fn is_over(&self) -> bool {
        self.requests.get() >= self.plan.requests
    }

    /// A name that nothing else has.
    pub(crate) fn name(&self, what: &str) -> String {
        let number = self.next_name.get();
        self.next_name.set(number + 1);
        format!("{what}{number}")
    }
}
