//! What the tests of jobs share: disks on the simulator, guests that log what they write, proofs
//! of what a copy holds.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses a part")]

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use liveblk_engine::driver::sim::{FaultRule, Latency, OpFilter, Sim, SimConfig, SimOpKind};
use liveblk_engine::executor::{Class, Core, JoinHandle};
use liveblk_engine::graph::{Graph, OpenNode};
use liveblk_engine::node::{Disk, Node, User, WriteFlags, ZeroFlags};
use liveblk_jobs::{Event, JobManager, JobOptions};

/// Bytes of a sector: the unit of content.
pub const SECTOR: u64 = 512;

/// Bytes of the disks.
pub const SIZE: u64 = 3 << 20;

/// A world for `seed`; in every other one files can share blocks.
pub fn world(seed: u64) -> Sim {
    let mut config = SimConfig::new(seed);
    config.fs.shares = seed % 2 == 1;
    Sim::new(config)
}

/// A world for `seed` in which every byte of a copy goes through memory, at the latest at a second
/// try.
pub fn copying_world(seed: u64) -> Sim {
    let sim = world(seed);
    sim.inject(FaultRule::always(OpFilter::any().kind(SimOpKind::Share), 28));
    sim
}

/// A world in which nothing takes long.
pub fn quick_world(seed: u64) -> Sim {
    let mut config = SimConfig::new(seed);
    config.latency = Latency { sync: 1_000..5_000, ..Latency::default() };
    Sim::new(config)
}

/// Opens the file `path` as a node called `name`.
pub async fn node(core: &Core, name: &str, path: &str) -> Rc<Node> {
    let mut open = OpenNode::new("file", path).named(name);
    open.monitor_owned = true;
    open.options.discard_unmap = true;
    Graph::of(core).open(open).await.expect("the image opens")
}

/// Attaches a guest to `node`.
pub fn disk(node: &Rc<Node>) -> Disk {
    Disk::attach(node, User::Guest { name: "guest".into() }, true).expect("the guest attaches")
}

/// Content of a fresh disk: each sector holds its number, with a mark.
pub fn filled(size: u64) -> Vec<u8> {
    (0..size / SECTOR).flat_map(|sector| stamp(1 << 63 | sector)).collect()
}

fn stamp(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(SECTOR as usize / 8)
}

/// One write of a guest.
#[derive(Clone, Debug)]
pub struct Write {
    pub disk: usize,
    pub sequence: u64,
    pub first: u64,
    pub sectors: u64,
    pub zero: bool,
    pub issued: u64,
    pub answered: u64,
}

/// What guests wrote, in order of issue.
#[derive(Default)]
pub struct Log {
    pub writes: RefCell<Vec<Write>>,
    next: Cell<u64>,
    pub stop: Cell<bool>,
    pub failures: Cell<u64>,
}

impl Log {
    pub fn new() -> Rc<Self> {
        Rc::default()
    }

    /// Content of a sector written by `write`.
    fn content(write: &Write) -> Vec<u8> {
        if write.zero { vec![0; SECTOR as usize] } else { stamp(write.sequence) }
    }

    /// Starts `count` guests on `disk`, each in a part of its own, that write until stopped.
    pub fn guests(self: &Rc<Self>, core: &Core, index: usize, disk: &Disk, count: u64) -> Guests {
        let tasks = (0..count)
            .map(|guest| {
                let part = disk.size() / SECTOR / count;
                let work =
                    Rc::clone(self).guest(core.clone(), index, disk.clone(), guest * part, part);
                core.spawn(Class::Guest, work)
            })
            .collect();
        Guests { log: Rc::clone(self), tasks }
    }

    async fn guest(self: Rc<Self>, core: Core, index: usize, disk: Disk, first: u64, count: u64) {
        while !self.stop.get() {
            self.write_one(&core, index, &disk, first, count).await;
            core.sleep(core.random() % 200_000).await;
        }
    }

    pub async fn write_one(&self, core: &Core, index: usize, disk: &Disk, first: u64, count: u64) {
        let at = first + core.random() % count;
        let longest = if core.random().is_multiple_of(8) { 300 } else { 24 };
        let sectors = (1 + core.random() % longest).min(first + count - at);
        let zero = core.random().is_multiple_of(6);
        self.write(core, index, disk, at, sectors, zero).await;
    }

    pub async fn write(
        &self,
        core: &Core,
        index: usize,
        disk: &Disk,
        at: u64,
        sectors: u64,
        zero: bool,
    ) {
        let sequence = self.next.get() + 1;
        self.next.set(sequence);
        let issued = core.now();
        let entry = self.writes.borrow().len();
        let write =
            Write { disk: index, sequence, first: at, sectors, zero, issued, answered: u64::MAX };
        self.writes.borrow_mut().push(write);
        let receipt = if zero {
            let flags =
                ZeroFlags { may_unmap: core.random().is_multiple_of(2), ..ZeroFlags::default() };
            disk.write_zeroes(at * SECTOR, sectors * SECTOR, flags)
        } else {
            let buf = core.pool().alloc((sectors * SECTOR) as usize);
            buf.copy_from(0, &stamp(sequence).repeat(sectors as usize));
            disk.write(
                at * SECTOR,
                buf,
                WriteFlags { fua: core.random().is_multiple_of(16), ..WriteFlags::default() },
            )
        };
        if receipt.await.is_err() {
            self.failures.set(self.failures.get() + 1);
        }
        self.writes.borrow_mut()[entry].answered = core.now();
    }

    /// What disk `index` must hold after all writes, given what it held at first.
    pub fn model(&self, index: usize, first: &[u8]) -> Vec<u8> {
        let mut bytes = first.to_vec();
        for write in self.writes.borrow().iter().filter(|write| write.disk == index) {
            for sector in write.first..write.first + write.sectors {
                let at = (sector * SECTOR) as usize;
                bytes[at..at + SECTOR as usize].copy_from_slice(&Self::content(write));
            }
        }
        bytes
    }

    /// Proves that `images` (disk, bytes) are one instant between times `from` and `to`: every
    /// write answered before `from` is in, none issued after `to` is, and no write is in while one
    /// that was answered before it began is not, on whatever disk.
    pub fn prove_instant(&self, images: &[(usize, &[u8], &[u8])], from: u64, to: u64) {
        let writes = self.writes.borrow();
        let (mut newest_in, mut oldest_out) = (0, u64::MAX);
        for (disk, first, image) in images {
            assert_eq!(first.len(), image.len(), "disk {disk}");
            for sector in 0..first.len() as u64 / SECTOR {
                let at = (sector * SECTOR) as usize;
                let found = &image[at..at + SECTOR as usize];
                let here: Vec<&Write> = writes
                    .iter()
                    .filter(|write| write.disk == *disk)
                    .filter(|write| (write.first..write.first + write.sectors).contains(&sector))
                    .collect();
                let last_before = here.iter().rposition(|write| write.answered < from);
                let allowed = last_before.map_or(0, |index| index + 1)..=here.len();
                let fits = allowed.clone().rev().find(|count| match count.checked_sub(1) {
                    None => found == &first[at..at + SECTOR as usize],
                    Some(last) => here[last].issued <= to && found == Self::content(here[last]),
                });
                // Two zeroings in a row look alike: the earliest that fits is the kindest reading.
                let kindest = allowed.clone().find(|count| match count.checked_sub(1) {
                    None => found == &first[at..at + SECTOR as usize],
                    Some(last) => here[last].issued <= to && found == Self::content(here[last]),
                });
                let Some(count) = fits else {
                    panic!(
                        "disk {disk} sector {sector}: {:?} fits none of {here:?}, \
                         allowed {allowed:?}, {from}..{to}",
                        &found[..8]
                    );
                };
                let sure = kindest == Some(count);
                if let Some(last) = count.checked_sub(1).filter(|_| sure) {
                    newest_in = newest_in.max(here[last].issued);
                }
                if let Some(next) = here.get(count).filter(|_| sure) {
                    oldest_out = oldest_out.min(next.answered);
                }
            }
        }
        assert!(
            newest_in <= oldest_out,
            "a write of {newest_in} is in, one answered {oldest_out} not"
        );
    }
}

/// Running guests.
pub struct Guests {
    log: Rc<Log>,
    tasks: Vec<JoinHandle<()>>,
}

impl Guests {
    /// Lets them finish their last write.
    pub async fn stop(self) {
        self.log.stop.set(true);
        for task in self.tasks {
            task.await;
        }
        self.log.stop.set(false);
    }
}

/// All events of a core's jobs.
#[derive(Default)]
pub struct Events(RefCell<Vec<Event>>);

impl Events {
    pub fn of(core: &Core) -> Rc<Self> {
        let events = Rc::new(Self::default());
        let seen = Rc::clone(&events);
        JobManager::of(core)
            .subscribe(Rc::new(move |event| seen.0.borrow_mut().push(event.clone())));
        events
    }

    /// The events as short words, such as `running`, `READY`, `COMPLETED`, `ERROR write stop`.
    pub fn words(&self) -> Vec<String> {
        let word = |event: &Event| match event {
            Event::StatusChange { status, .. } => status.to_string(),
            Event::Ready(_) => "READY".into(),
            Event::Pending { .. } => "PENDING".into(),
            Event::Completed { error: None, .. } => "COMPLETED".into(),
            Event::Completed { error: Some(text), .. } => format!("COMPLETED {text}"),
            Event::Cancelled(_) => "CANCELLED".into(),
            Event::Error { operation, action, .. } => {
                format!("ERROR {} {}", operation.name(), action.name())
            }
            Event::Converge { info, .. } => {
                let missed = if info.missed { " missed" } else { "" };
                format!("CONVERGE {}{missed}", info.phase.name())
            }
        };
        self.0.borrow().iter().map(word).collect()
    }

    pub fn all(&self) -> Vec<Event> {
        self.0.borrow().clone()
    }

    pub fn has(&self, word: &str) -> bool {
        self.words().iter().any(|known| known.starts_with(word))
    }
}

/// Waits until job `id` is gone.
pub async fn gone(core: &Core, id: &str) {
    JobManager::of(core).until(id, |_| false).await;
}

/// Reads all of `node`.
pub async fn content(node: &Rc<Node>) -> Vec<u8> {
    let buf = node.core().pool().alloc(node.size() as usize);
    node.read(0, buf.clone(), liveblk_engine::node::Origin::External).await.expect("readable");
    buf.to_vec()
}

/// Where two images differ, in sectors.
pub fn first_difference(one: &[u8], other: &[u8]) -> Option<u64> {
    if one.len() != other.len() {
        return Some(u64::MAX);
    }
    one.chunks(SECTOR as usize)
        .zip(other.chunks(SECTOR as usize))
        .position(|(one, other)| one != other)
        .map(|sector| sector as u64)
}

/// Options for job `id`.
pub fn options(id: &str) -> JobOptions {
    JobOptions::new(id)
}
