//! Scripts of requests and changes on one image, played against the ledger.
//!
//! Order of each step: the ledger is told that it begins, the image is asked, the ledger is told
//! how it ended. A failure is handed to the caller, who knows whether one was planned; what is
//! refused, and why, is known exactly ([`Player::play`]).

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use liveblk_engine::executor::Core;
use liveblk_engine::format::{BackingRef, ReadBelow, Resize, SnapshotInfo, ZeroMode};
use liveblk_engine::storage::{File, FileOptions, Memory, Storage};
use liveblk_engine::{Error, ErrorKind, Result};

use super::ledger::{Ledger, SECTOR, Value, sector_bytes};
use super::marks::Mark;
use super::mover::{Below, Disk, open};
use super::references::{Counting, References};

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
    /// Makes a bitmap of this name that records.
    Track(&'static str),
    /// Removes the bitmap.
    Untrack(&'static str),
    /// Clears the bitmap.
    Wipe(&'static str),
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
    /// Whether it could not be made writable again.
    pub(super) read_only: Cell<bool>,
    version: u32,
    /// Bytes of a cluster.
    cluster: Cell<u64>,
    /// Whether the data lies in another file.
    external: Cell<bool>,
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
        let storage = place.storage(core).await?;
        let buf = core.pool().alloc(512);
        storage.read(0, buf.clone()).await?;
        let version = u32::from(buf.to_vec()[7]);
        let (core, read_only) = (core.clone(), Cell::new(false));
        let (cluster, external) = (Cell::new(0), Cell::new(false));
        let player =
            Self { core, place, below, disk, ledger, read_only, version, cluster, external };
        let player = Rc::new(player);
        player.reopen().await?;
        Ok(player)
    }

    async fn reopen(&self) -> Result<()> {
        self.open_as(true).await
    }

    async fn open_as(&self, writable: bool) -> Result<()> {
        let mut disk = open(&self.core, self.place.storage(&self.core).await?, writable).await?;
        disk.below = self.below;
        disk.even = true;
        self.read_only.set(!writable);
        if !writable {
            // What shows need not be durable: nothing is learnt from it.
            self.disk.replace(Some(disk));
            return Ok(());
        }
        let bitmaps = disk.format.abilities().bitmaps;
        let list = bitmaps.map(|bitmaps| bitmaps.list()).unwrap_or_default();
        let lost = list.into_iter().map(|info| (info.name, info.inconsistent)).collect();
        self.ledger.borrow_mut().opened(&lost);
        self.ledger.borrow_mut().size_shows(disk.format.size() / SECTOR);
        self.cluster.set(disk.format.cluster_size());
        self.external.set(disk.format.abilities().compress.is_none());
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

    /// Why a step is refused whatever the tables look like; none if it is not.
    pub(super) fn refusal(&self, op: &Op) -> Option<ErrorKind> {
        let ledger = self.ledger.borrow();
        let marks = ledger.marks();
        let external = self.external.get();
        let lost = || marks.values().any(|mark| mark.lost);
        match op {
            Op::Take(name) if external => {
                (!ledger.snapshots().contains_key(*name)).then_some(ErrorKind::Unsupported)
            }
            Op::Apply(name) if ledger.snapshots().contains_key(*name) && !marks.is_empty() => {
                Some(ErrorKind::Busy)
            }
            Op::Resize(size) if self.version < 3 => {
                let cluster = self.cluster.get();
                let end = (ledger.size() * SECTOR).next_multiple_of(cluster);
                let hides = (self.below)(0) != 0 && BELOW_BYTES.min(size * SECTOR) > end;
                let kept = !ledger.snapshots().is_empty();
                (kept || hides).then_some(ErrorKind::Unsupported)
            }
            Op::Resize(_) if lost() => Some(ErrorKind::InvalidArgument),
            Op::Wipe(name) if marks.get(*name).is_some_and(|mark| mark.lost) => {
                Some(ErrorKind::InvalidArgument)
            }
            Op::Track(_) if self.version < 3 => Some(ErrorKind::Unsupported),
            _ => None,
        }
    }

    /// Plays one step of a world without failures: it fails exactly if it has to. Whether it was
    /// done.
    pub(super) async fn play(&self, op: &Op) -> bool {
        let must = self.refusal(op);
        let counting = match op {
            Op::Take(_) => Some(Counting::Take),
            Op::Apply(name) => Some(Counting::Apply(name)),
            _ => None,
        };
        match (self.run(op).await, must, counting) {
            (Ok(()), None, _) => true,
            (Err(error), Some(kind), _) if error.kind() == kind => false,
            (Err(error), None, Some(counting)) if error.kind() == ErrorKind::InvalidArgument => {
                // What is refused was written out before.
                let storage = self.place.storage(&self.core).await.expect("opens");
                let references = References::read(&self.core, &storage).await;
                assert!(references.overflow(counting), "{op:?} could be counted: {error}");
                false
            }
            (result, must, _) => panic!("{op:?} gave {result:?}, expected {must:?}"),
        }
    }

    /// Plays one step; reads are judged on the way.
    pub(super) async fn run(&self, op: &Op) -> Result<()> {
        if self.disk.borrow().is_none() {
            // The step before failed between close and open. What cannot be made durable any more
            // can be read.
            match self.reopen().await {
                Err(error) if matches!(error.kind(), ErrorKind::Io(_)) => {
                    self.open_as(false).await?
                }
                result => result?,
            }
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
                if result.is_ok() && !self.read_only.get() {
                    self.ledger.borrow_mut().flushed(tick);
                }
                result
            }
            Op::Resize(_) | Op::Take(_) | Op::Remove(_) | Op::Apply(_) => {
                let before = self.ledger.borrow().clone();
                let result = match op {
                    Op::Resize(sectors) => self.change_size(&disk, *sectors).await,
                    _ => self.snapshot(&disk, op).await,
                };
                use ErrorKind::{Busy, InvalidArgument, Unsupported};
                let refused = |kind| matches!(kind, Busy | InvalidArgument | Unsupported);
                if result.as_ref().is_err_and(|error| refused(error.kind())) {
                    *self.ledger.borrow_mut() = before;
                }
                result
            }
            Op::Backing(backing) => disk.format.set_backing(backing.clone()).await,
            Op::Track(_) | Op::Untrack(_) | Op::Wipe(_) => self.bitmap(&disk, op).await,
            Op::Settle => self.settle(&disk).await,
            Op::Reopen if self.read_only.get() => {
                self.disk.take();
                disk.format.close().await?;
                self.reopen().await
            }
            Op::Reopen => {
                let tick = self.ledger.borrow_mut().flush_begins();
                self.ledger.borrow_mut().store_begins();
                self.disk.take();
                let closed = disk.format.close().await;
                if closed.is_err() {
                    self.ledger.borrow_mut().lose();
                }
                closed?;
                self.ledger.borrow_mut().flushed(tick);
                self.ledger.borrow_mut().stored();
                drop(disk);
                self.reopen().await
            }
        }
    }

    /// To read-only and back.
    async fn settle(&self, disk: &Disk) -> Result<()> {
        if !self.read_only.get() {
            let tick = self.ledger.borrow_mut().flush_begins();
            self.ledger.borrow_mut().store_begins();
            disk.format.set_writable(false).await?;
            self.ledger.borrow_mut().flushed(tick);
            self.ledger.borrow_mut().stored();
        }
        let result = disk.format.set_writable(true).await;
        self.read_only.set(result.is_err());
        if result.is_ok() {
            self.ledger.borrow_mut().size_shows(disk.format.size() / SECTOR);
        }
        result
    }

    async fn change_size(&self, disk: &Disk, sectors: u64) -> Result<()> {
        if self.read_only.get() {
            // The size that shows may be another than the one that is durable.
            let result = disk.format.resize_with(self.resize(sectors)).await;
            assert!(result.is_err(), "a disk that cannot be written changed its size");
            return result;
        }
        self.ledger.borrow_mut().resize_begins(sectors);
        let result = disk.format.resize_with(self.resize(sectors)).await;
        let size = disk.format.size() / SECTOR;
        self.ledger.borrow_mut().resize_ends(size, result.is_ok());
        result
    }

    async fn bitmap(&self, disk: &Disk, op: &Op) -> Result<()> {
        let Some(all) = disk.format.abilities().bitmaps else {
            return Err(Error::new(ErrorKind::Unsupported, "change bitmaps"));
        };
        let mut marks = self.ledger.borrow().marks().clone();
        let content = self.ledger.borrow().content();
        let (Op::Track(name) | Op::Untrack(name) | Op::Wipe(name)) = op else { return Ok(()) };
        if marks.contains_key(*name) == matches!(op, Op::Track(_)) {
            return Ok(());
        }
        let change = match op {
            Op::Track(name) => {
                marks.insert((*name).to_owned(), Mark::new(granularity(name), content));
                all.add(name, granularity(name), true)
            }
            Op::Untrack(name) => {
                marks.remove(*name);
                all.remove(name)
            }
            _ => {
                marks.entry((*name).to_owned()).and_modify(|mark| *mark = mark.cleared(content));
                all.clear(name)
            }
        };
        let before = self.ledger.borrow().clone();
        self.ledger.borrow_mut().marks_begin(marks);
        let result = change.await;
        let known = all.list().iter().any(|info| info.name == *name);
        let shows = !matches!(op, Op::Wipe(_)) && known == matches!(op, Op::Track(_));
        self.ledger.borrow_mut().marks_end(result.is_ok(), shows);
        let refused = |kind| matches!(kind, ErrorKind::InvalidArgument | ErrorKind::Unsupported);
        if result.as_ref().is_err_and(|error| refused(error.kind())) {
            *self.ledger.borrow_mut() = before;
        }
        result
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

/// Bytes per bit of a bitmap of this name.
fn granularity(name: &str) -> u64 {
    match name {
        "fine" => 512,
        "page" => 4096,
        _ => 64 << 10,
    }
}
