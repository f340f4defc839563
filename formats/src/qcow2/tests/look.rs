//! Everything that a file shows: of the disk, its snapshots, its bitmaps, and its raw data file.

use std::rc::Rc;

use liveblk_engine::driver::sim::SimFs;
use liveblk_engine::executor::Core;
use liveblk_engine::format::{DataSource, InfoValue};
use liveblk_engine::storage::{Memory, Storage};
use liveblk_engine::{Error, ErrorKind, Result};

use super::ledger::{Found, SECTOR, Value, values};
use super::marks::FoundMark;
use super::mover::{Below, Disk, open_data};
use super::references::{Counting, References};
use crate::qcow2::check;

/// The files of an image, as something left them.
#[derive(Clone)]
pub(super) struct Left {
    pub(super) image: Rc<Memory>,
    pub(super) data: Option<Rc<Memory>>,
}

impl Left {
    /// The image at `path` of a file system, and its data file if there is one.
    pub(super) fn of(fs: &SimFs, path: &str, data: &str) -> Self {
        let image = fs.memory(path).expect("the image is there");
        Self { image, data: fs.memory(data) }
    }

    /// A copy, opened writable.
    async fn open(&self, core: &Core, below: Below) -> Result<(Disk, Storage), String> {
        let data = match &self.data {
            Some(data) => DataSource::Given(Storage::Memory(data.copy())),
            None => DataSource::None,
        };
        let storage = Storage::Memory(self.image.copy());
        let disk = open_data(core, storage.clone(), data, true).await;
        let mut disk = disk.map_err(|error| failed("open", &error))?;
        (disk.below, disk.even) = (below, true);
        Ok((disk, storage))
    }
}

fn failed(what: &str, error: &Error) -> String {
    format!("{what}: {error}")
}

/// Everything that an image holds; an error says what is corrupt.
pub(super) async fn look(core: &Core, left: &Left, below: Below) -> Result<Found, String> {
    let storage = Storage::Memory(Rc::clone(&left.image));
    let report = check(core, &storage).await.map_err(|error| failed("check", &error))?;
    if report.corruptions > 0 {
        return Err(format!("check: {:?}", report.problems));
    }
    let (disk, _) = left.open(core, below).await?;
    let (size, values) = content(&disk).await?;
    let mut found = Found { size, values, ..Found::default() };
    if disk.format.info().specific.contains(&("data-file-raw", InfoValue::Flag(true))) {
        found.raw = Some(raw_values(left, size)?);
    }
    let bitmaps = disk.format.abilities().bitmaps;
    for info in bitmaps.iter().flat_map(|bitmaps| bitmaps.list()) {
        let loaded = bitmaps.as_ref().expect("invariant: listed above").load(&info.name).await;
        let bits = match (loaded, info.inconsistent) {
            (Ok(bits), false) => Some(bits),
            (Err(error), true) if error.kind() == ErrorKind::InvalidArgument => None,
            (Err(error), _) => return Err(failed("load a bitmap", &error)),
            (Ok(_), true) => return Err("a lost bitmap can be loaded".to_owned()),
        };
        found.marks.insert(info.name, FoundMark { bits });
    }
    let snapshots = disk.format.abilities().snapshots;
    let list = snapshots.map(|snapshots| snapshots.list()).unwrap_or_default();
    for info in list {
        let (disk, storage) = left.open(core, below).await?;
        go_back(core, &disk, &storage, &info.name).await?;
        found.snapshots.insert(info.name, content(&disk).await?.1);
    }
    Ok(found)
}

/// Makes the disk the snapshot `name`.
async fn go_back(core: &Core, disk: &Disk, storage: &Storage, name: &str) -> Result<(), String> {
    let abilities = disk.format.abilities();
    let Some(all) = abilities.snapshots else { return Err("snapshots are gone".to_owned()) };
    // Where there are bitmaps the disk does not go back.
    for info in abilities.bitmaps.iter().flat_map(|bitmaps| bitmaps.list()) {
        let bitmaps = abilities.bitmaps.as_ref().expect("invariant: listed above");
        let gone = bitmaps.remove(&info.name).await;
        gone.map_err(|error| failed("remove a bitmap", &error))?;
    }
    let mut applied = all.apply(name).await;
    if applied.as_ref().is_err_and(|error| error.kind() == ErrorKind::InvalidArgument) {
        let references = References::read(core, storage).await;
        if !references.overflow(Counting::Apply(name)) {
            return Err(format!("{name} could be counted"));
        }
        // Narrow refcounts cannot count one more user; the other snapshots make room.
        for other in all.list().into_iter().filter(|info| info.name != name) {
            let gone = all.delete(&other.name).await;
            gone.map_err(|error| failed("delete", &error))?;
        }
        applied = all.apply(name).await;
    }
    applied.map_err(|error| failed("apply", &error))
}

/// Size in sectors and values.
async fn content(disk: &Disk) -> Result<(u64, Vec<Option<Value>>), String> {
    let size = disk.format.size();
    let bytes = disk.read(0, size).await.map_err(|error| failed("read", &error))?;
    Ok((size / SECTOR, values(&bytes)))
}

/// What a raw data file shows of a disk of `size` sectors.
fn raw_values(left: &Left, size: u64) -> Result<Vec<Option<Value>>, String> {
    let bytes = left.data.as_ref().map(|data| data.to_bytes()).unwrap_or_default();
    let all = bytes.get(..(size * SECTOR) as usize);
    all.map(values).ok_or_else(|| format!("a raw data file has only {} bytes", bytes.len()))
}
