//! Scripts of requests and changes on one image, played against the ledger.
//!
//! Order of each step: the ledger is told that it begins, the image is asked, the ledger is told
//! how it ended. A failure is handed to the caller, who knows whether one was planned.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use liveblk_engine::executor::Core;
use liveblk_engine::format::{BackingRef, ReadBelow, Resize, SnapshotInfo, ZeroMode};
use liveblk_engine::storage::{File, FileOptions, Memory, Storage};
use liveblk_engine::{Error, ErrorKind, Result};

use super::ledger::{Found, Ledger, SECTOR, Value, sector_bytes, values};
use super::mover::{Below, Disk, open};
use crate::qcow2::check;

/// Sectors `first..first + count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) first: u64,
    pub(super) count: u64,
}

/// One step of a script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Write(Span),
    /// The cluster with this number, compressed.
    Packed(u64),
    Zero(Span, ZeroMode),
    Read(Span),
    Flush,
    /// To so many sectors.
    Resize(u64),
    /// Takes a snapshot of this name.
    Take(&'static str),
    /// Removes the snapshot.
    Remove(&'static str),
    /// Goes back to the snapshot.
    Apply(&'static str),
    Backing(Option<BackingRef>),
    /// To read-only and back.
    Settle,
    Reopen,
}

/// Where an image lies.
#[derive(Clone)]
pub(super) enum Place {
    /// A file of the simulated machine.
    Path(String),
    Memory(Rc<Memory>),
}

impl Place {
    pub(super) async fn storage(&self, core: &Core) -> Result<Storage> {
        match self {
            Self::Path(path) => {
                let path = path.into();
                let options = FileOptions { path, writable: true, ..FileOptions::default() };
                Ok(Storage::File(File::open(core, options).await?))
            }
            Self::Memory(memory) => Ok(Storage::Memory(Rc::clone(memory))),
        }
    }
}

/// What the layers below hold, if there are any.
pub(super) fn below_byte(at: u64) -> u8 {
    if at < BELOW_BYTES { ((at / SECTOR) % 251) as u8 + 1 } else { 0 }
}

/// How much the layers below hold in bytes.
pub(super) const BELOW_BYTES: u64 = 16 << 10;

/// No layer below.
pub(super) fn nothing(_: u64) -> u8 {
    0
}

/// What a sector of the layer below shows.
pub(super) fn below_value(below: Below, sector: u64) -> Value {
    Value::from_be_bytes([below(sector * SECTOR); 8])
}

/// An image with its ledger.
pub(super) struct Player {
    core: Core,
    place: Place,
    below: Below,
    disk: RefCell<Option<Disk>>,
    pub(super) ledger: RefCell<Ledger>,
    /// Whether a close failed, after which it was opened again.
    pub(super) close_failed: Cell<bool>,
}

impl Player {
    /// Opens the image.
    pub(super) async fn open(
        core: &Core,
        place: Place,
        below: Below,
        ledger: Ledger,
    ) -> Result<Rc<Self>> {
        let (disk, ledger) = (RefCell::new(None), RefCell::new(ledger));
        let close_failed = Cell::new(false);
        let core = core.clone();
        let player = Rc::new(Self { core, place, below, disk, ledger, close_failed });
        player.reopen().await?;
        Ok(player)
    }

    async fn reopen(&self) -> Result<()> {
        let mut disk = open(&self.core, self.place.storage(&self.core).await?, true).await?;
        disk.below = self.below;
        self.disk.replace(Some(disk));
        Ok(())
    }

    /// What lies below.
    pub(super) fn below(&self) -> Below {
        self.below
    }

    /// The image that is open.
    pub(super) fn disk(&self) -> Disk {
        self.disk.borrow().clone().expect("invariant: open between steps")
    }

    /// Whether the step touches only what the disk has.
    pub(super) fn is_inside(&self, op: &Op) -> bool {
        match op {
            Op::Write(span) | Op::Zero(span, _) | Op::Read(span) => {
                span.first + span.count <= self.ledger.borrow().size()
            }
            _ => true,
        }
    }

    /// Forgets the image without closing it.
    pub(super) fn abandon(&self) {
        self.disk.take();
    }

    /// Whether the image can do this step.
    pub(super) fn can(&self, op: &Op) -> bool {
        let abilities = self.disk().format.abilities();
        match op {
            Op::Packed(_) => abilities.compress.is_some(),
            Op::Take(_) | Op::Remove(_) | Op::Apply(_) => abilities.snapshots.is_some(),
            _ => true,
        }
    }

    /// Plays one step; reads are judged on the way.
    pub(super) async fn run(&self, op: &Op) -> Result<()> {
        if self.disk.borrow().is_none() {
            // The step before failed between close and open.
            self.reopen().await?;
        }
        let disk = self.disk();
        match op {
            Op::Write(span) => self.write(&disk, *span).await,
            Op::Packed(cluster) => self.packed(&disk, *cluster).await,
            Op::Zero(span, mode) => self.zero(&disk, *span, *mode).await,
            Op::Read(span) => self.read(&disk, *span).await,
            Op::Flush => {
                let tick = self.ledger.borrow_mut().flush_begins();
                let result = disk.format.flush().await;
                if result.is_ok() {
                    self.ledger.borrow_mut().flushed(tick);
                }
                result
            }
            Op::Resize(sectors) => {
                self.ledger.borrow_mut().resize_begins(*sectors);
                let result = disk.format.resize_with(self.resize(*sectors)).await;
                let size = disk.format.size() / SECTOR;
                self.ledger.borrow_mut().resize_ends(size, result.is_ok());
                result
            }
            Op::Take(_) | Op::Remove(_) | Op::Apply(_) => self.snapshot(&disk, op).await,
            Op::Backing(backing) => disk.format.set_backing(backing.clone()).await,
            Op::Settle => {
                let tick = self.ledger.borrow_mut().flush_begins();
                disk.format.set_writable(false).await?;
                self.ledger.borrow_mut().flushed(tick);
                disk.format.set_writable(true).await
            }
            Op::Reopen => {
                let tick = self.ledger.borrow_mut().flush_begins();
                self.disk.take();
                let closed = disk.format.close().await;
                if closed.is_err() {
                    self.ledger.borrow_mut().lose();
                    self.close_failed.set(true);
                }
                closed?;
                self.ledger.borrow_mut().flushed(tick);
                drop(disk);
                self.reopen().await
            }
        }
    }

    fn resize(&self, sectors: u64) -> Resize {
        let read: ReadBelow = {
            let below = self.below;
            Rc::new(move |range, buf| {
                let bytes = (range.start.bytes()..range.end().bytes()).map(below);
                buf.copy_from(0, &bytes.collect::<Vec<u8>>());
                Box::pin(async { Ok(()) })
            })
        };
        let is_any = (self.below)(0) != 0;
        let below = is_any.then(|| liveblk_engine::format::Below { size: BELOW_BYTES, read });
        Resize { below, ..Resize::to(sectors * SECTOR) }
    }

    async fn write(&self, disk: &Disk, Span { first, count }: Span) -> Result<()> {
        let (id, bytes) = self.begin_value(first, count);
        let result = disk.write(first * SECTOR, &bytes).await;
        self.ledger.borrow_mut().end(id, first, count, result.is_ok());
        result
    }

    async fn packed(&self, disk: &Disk, cluster: u64) -> Result<()> {
        let sectors = disk.format.cluster_size() / SECTOR;
        let first = cluster * sectors;
        let count = sectors.min(self.ledger.borrow().size().saturating_sub(first));
        if count == 0 {
            return Ok(());
        }
        let (id, bytes) = self.begin_value(first, count);
        let result = disk.write_compressed(first * SECTOR, &bytes).await;
        self.ledger.borrow_mut().end(id, first, count, result.is_ok());
        result
    }

    fn begin_value(&self, first: u64, count: u64) -> (u64, Vec<u8>) {
        let mut ledger = self.ledger.borrow_mut();
        let value = ledger.value();
        let id = ledger.begin(first, count, value);
        (id, sector_bytes(value).repeat(count as usize))
    }

    async fn zero(&self, disk: &Disk, span: Span, mode: ZeroMode) -> Result<()> {
        let Span { first, count } = span;
        let id = self.ledger.borrow_mut().begin(first, count, 0);
        let result = disk.zero(first * SECTOR, count * SECTOR, mode).await;
        let sure = result.is_ok() && mode != ZeroMode::Discard;
        self.ledger.borrow_mut().end(id, first, count, sure);
        result
    }

    async fn read(&self, disk: &Disk, Span { first, count }: Span) -> Result<()> {
        let bytes = disk.read(first * SECTOR, count * SECTOR).await?;
        let judged = self.ledger.borrow_mut().read(first, &bytes);
        judged.unwrap_or_else(|wrong| panic!("a read is wrong: {wrong}"));
        Ok(())
    }

    async fn snapshot(&self, disk: &Disk, op: &Op) -> Result<()> {
        let Some(snapshots) = disk.format.abilities().snapshots else {
            return Err(Error::new(ErrorKind::Unsupported, "snapshot"));
        };
        let mut set = (*self.ledger.borrow().snapshots()).clone();
        match op {
            Op::Take(name) => {
                if set.contains_key(*name) {
                    return Ok(());
                }
                set.insert((*name).to_owned(), self.ledger.borrow().content());
                self.ledger.borrow_mut().set_begins(set);
                let info = SnapshotInfo { name: (*name).to_owned(), ..SnapshotInfo::default() };
                let result = snapshots.create(info).await;
                let shows = snapshots.list().iter().any(|info| info.name == *name);
                self.ledger.borrow_mut().set_ends(result.is_ok(), shows);
                result.map(|_| ())
            }
            Op::Remove(name) => {
                if set.remove(*name).is_none() {
                    return Ok(());
                }
                self.ledger.borrow_mut().set_begins(set);
                let result = snapshots.delete(name).await;
                let shows = !snapshots.list().iter().any(|info| info.name == *name);
                self.ledger.borrow_mut().set_ends(result.is_ok(), shows);
                result
            }
            Op::Apply(name) => {
                let Some(content) = set.get(*name) else { return Ok(()) };
                self.ledger.borrow_mut().apply_begins(content);
                let result = snapshots.apply(name).await;
                let size = disk.format.size() / SECTOR;
                self.ledger.borrow_mut().apply_ends(content, size, result.is_ok());
                result
            }
            _ => Ok(()),
        }
    }

    /// Reads and judges the whole disk.
    pub(super) async fn read_all(&self) -> Result<()> {
        let count = self.ledger.borrow().size();
        self.run(&Op::Read(Span { first: 0, count })).await
    }
}

/// Everything that an image holds; an error says what is corrupt.
pub(super) async fn look(core: &Core, bytes: &[u8], below: Below) -> Result<Found, String> {
    let storage = Storage::Memory(Memory::from_bytes(bytes));
    let report = check(core, &storage).await.map_err(|error| format!("check: {error}"))?;
    if report.corruptions > 0 {
        return Err(format!("check: {:?}", report.problems));
    }
    let (size, values) = content(core, storage, below, None).await?;
    let mut found = Found { size, values, snapshots: Default::default() };
    for name in found_names(core, bytes).await? {
        let storage = Storage::Memory(Memory::from_bytes(bytes));
        let (_, values) = content(core, storage, below, Some(&name)).await?;
        found.snapshots.insert(name, values);
    }
    Ok(found)
}

async fn found_names(core: &Core, bytes: &[u8]) -> Result<Vec<String>, String> {
    let storage = Storage::Memory(Memory::from_bytes(bytes));
    let disk = open(core, storage, false).await.map_err(|error| format!("open: {error}"))?;
    let snapshots = disk.format.abilities().snapshots;
    let list = snapshots.map(|snapshots| snapshots.list()).unwrap_or_default();
    Ok(list.into_iter().map(|info| info.name).collect())
}

/// Size and values, after going back to a snapshot if one is named.
async fn content(
    core: &Core,
    storage: Storage,
    below: Below,
    snapshot: Option<&str>,
) -> Result<(u64, Vec<Option<Value>>), String> {
    let failed = |what: &str, error: &Error| format!("{what}: {error}");
    let mut disk = open(core, storage, true).await.map_err(|error| failed("open", &error))?;
    disk.below = below;
    if let (Some(name), Some(all)) = (snapshot, disk.format.abilities().snapshots) {
        let mut applied = all.apply(name).await;
        if applied.as_ref().is_err_and(|error| error.kind() == ErrorKind::InvalidArgument) {
            // Narrow refcounts may not count one more user; the other snapshots make room.
            for other in all.list().into_iter().filter(|info| info.name != name) {
                let gone = all.delete(&other.name).await;
                gone.map_err(|error| failed("delete", &error))?;
            }
            applied = all.apply(name).await;
        }
        applied.map_err(|error| failed("apply", &error))?;
    }
    let size = disk.format.size();
    let bytes = disk.read(0, size).await.map_err(|error| failed("read", &error))?;
    Ok((size / SECTOR, values(&bytes)))
}
