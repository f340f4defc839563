//! The least that moves data through a `Format`, for tests: one request at a time per call.

use std::path::PathBuf;
use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::address::{GuestOffset, GuestRange};
use liveblk_engine::buf::Buf;
use liveblk_engine::driver::sim::{Sim, SimConfig};
use liveblk_engine::executor::Core;
use liveblk_engine::format::{
    DataSource, Driver, Extents, Fill, Format, InfoValue, Mapping, OpenData, OpenImage, WriteStep,
    ZeroMode, ZeroStep,
};
use liveblk_engine::storage::{File, FileOptions, Storage, sync_folder_of};

use crate::qcow2::{Options, Qcow2Driver};

const SECTOR: u64 = 512;

/// What the layers below hold: a function of the byte's position, 0 where there is no layer.
pub(super) type Below = fn(u64) -> u8;

/// An image with a layer below.
#[derive(Clone)]
pub(super) struct Disk {
    pub(super) core: Core,
    pub(super) format: Rc<dyn Format>,
    pub(super) below: Below,
    /// Whether the bytes of a sector below are all equal.
    pub(super) even: bool,
}

/// A calm world for one test.
pub(super) fn calm<F: Future + 'static>(make: impl FnOnce(Core) -> F) -> F::Output
where
    F::Output: 'static,
{
    Sim::new(SimConfig::new(1).calm()).block_on(0, make)
}

/// A file of the world.
pub(super) async fn file(core: &Core, path: &str, create_new: bool) -> Storage {
    let options =
        FileOptions { path: path.into(), writable: true, create_new, ..FileOptions::default() };
    let storage = Storage::File(File::open(core, options).await.expect("the file opens"));
    if create_new {
        // Tests cut the power later: the name is not what they are about.
        sync_folder_of(core, path.as_ref()).await.expect("the folder is durable");
    }
    storage
}

/// Opens data files by their names, in the root folder of the world.
fn data_file_opener(core: &Core) -> OpenData {
    let core = core.clone();
    Rc::new(move |reference| {
        let core = core.clone();
        Box::pin(async move {
            let path = PathBuf::from("/").join(reference.file);
            let options = FileOptions { path, writable: true, ..FileOptions::default() };
            Ok(Storage::File(File::open(&core, options).await?))
        })
    })
}

/// Opens the image in `storage`; space that guests give up goes back; its data file, if it has one,
/// by its name.
pub(super) async fn open(core: &Core, storage: Storage, writable: bool) -> Result<Disk> {
    open_with(core, storage, writable, &[]).await
}

/// The same with options of the format.
pub(super) async fn open_with(
    core: &Core,
    storage: Storage,
    writable: bool,
    options: &[(&str, InfoValue)],
) -> Result<Disk> {
    let data = DataSource::FromHeader(data_file_opener(core));
    open_all(core, storage, data, writable, options).await
}

/// Opens the image in `storage` with its data where `data` says.
pub(super) async fn open_data(
    core: &Core,
    storage: Storage,
    data: DataSource,
    writable: bool,
) -> Result<Disk> {
    open_all(core, storage, data, writable, &[]).await
}

async fn open_all(
    core: &Core,
    storage: Storage,
    data: DataSource,
    writable: bool,
    options: &[(&str, InfoValue)],
) -> Result<Disk> {
    let filename = PathBuf::from(storage.name());
    let core = core.clone();
    let image = OpenImage {
        core: core.clone(),
        storage,
        filename,
        writable,
        discard_unmap: true,
        data,
        options: options.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect(),
        raw_offset: 0,
        raw_size: None,
    };
    let driver = Qcow2Driver::with_options(Options { discard_unmap: true, ..Options::default() });
    let format = driver.open(image).await?;
    Ok(Disk { core, format, below: |_| 0, even: false })
}

impl Disk {
    /// A buffer with what lies below `range`.
    fn below(&self, start: u64, len: u64) -> Buf {
        let mut bytes = Vec::with_capacity(len as usize);
        self.add_below(start, len, &mut bytes);
        Buf::from_vec(bytes)
    }

    fn add_below(&self, start: u64, len: u64, bytes: &mut Vec<u8>) {
        if !self.even {
            return bytes.extend((start..start + len).map(self.below));
        }
        let mut at = start;
        while at < start + len {
            let end = (at / SECTOR + 1) * SECTOR;
            let part = end.min(start + len) - at;
            bytes.resize(bytes.len() + part as usize, (self.below)(at));
            at += part;
        }
    }

    pub(super) async fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let storage = self.format.data_storage().clone();
        let mut done = 0;
        while done < bytes.len() as u64 {
            let range = GuestRange::new(at + done, bytes.len() as u64 - done);
            match self.format.begin_write(range)? {
                WriteStep::Miss(miss) => self.format.load(miss).await?,
                WriteStep::Wait(wait) => self.format.pending(wait).await,
                WriteStep::Ready(piece) => {
                    let start = range.start.bytes() - piece.head;
                    let (head, tail) = match piece.fill {
                        Fill::Below => (
                            self.below(start, piece.head),
                            self.below(range.start.bytes() + piece.len, piece.tail),
                        ),
                        Fill::Zero => {
                            let zeroed = |len: u64| self.core.pool().zeroed(len as usize);
                            (zeroed(piece.head), zeroed(piece.tail))
                        }
                        Fill::Old(old) => {
                            let pool = self.core.pool();
                            let head = pool.alloc(piece.head as usize);
                            let tail = pool.alloc(piece.tail as usize);
                            storage.read(old.bytes(), head.clone()).await?;
                            let after = old.bytes() + piece.head + piece.len;
                            storage.read(after, tail.clone()).await?;
                            (head, tail)
                        }
                        Fill::Current => {
                            let after = range.start.bytes() + piece.len;
                            let head = self.read(start, piece.head).await?;
                            let tail = self.read(after, piece.tail).await?;
                            (Buf::from_vec(head), Buf::from_vec(tail))
                        }
                        Fill::OldCompressed(packed) => {
                            let old = self.format.read_compressed(packed).await?;
                            let tail = old.len() - piece.tail as usize;
                            (old.slice(0..piece.head as usize), old.slice(tail..old.len()))
                        }
                    };
                    let mut whole = head;
                    let part = &bytes[done as usize..(done + piece.len) as usize];
                    whole.append(Buf::from_vec(part.to_vec()));
                    whole.append(tail);
                    let host = piece.host.bytes() - piece.head;
                    storage.write(host, whole, false).await?;
                    piece.guard.complete();
                    done += piece.len;
                }
            }
        }
        Ok(())
    }

    /// Writes whole clusters compressed, one after the other; the last one may end with the disk.
    pub(super) async fn write_compressed(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let compress = self.format.abilities().compress.expect("compresses");
        let storage = self.format.data_storage().clone();
        let cluster = self.format.cluster_size() as usize;
        for (index, part) in bytes.chunks(cluster).enumerate() {
            let at = at + (index * cluster) as u64;
            let Some(packed) = compress.pack(Buf::from_vec(part.to_vec())).await? else {
                self.write(at, part).await?;
                continue;
            };
            let piece = loop {
                match compress.begin_packed(GuestOffset::new(at), packed.len() as u64)? {
                    WriteStep::Miss(miss) => self.format.load(miss).await?,
                    WriteStep::Wait(wait) => self.format.pending(wait).await,
                    WriteStep::Ready(piece) => break piece,
                }
            };
            storage.write(piece.host.bytes(), packed, false).await?;
            piece.guard.complete();
        }
        Ok(())
    }

    pub(super) async fn zero(&self, at: u64, len: u64, mode: ZeroMode) -> Result<()> {
        let mut done = 0;
        while done < len {
            let range = GuestRange::new(at + done, len - done);
            match self.format.begin_zero(range, mode)? {
                ZeroStep::Miss(miss) => self.format.load(miss).await?,
                ZeroStep::Wait(wait) => self.format.pending(wait).await,
                ZeroStep::Done { len } => {
                    assert!(len > 0 && len <= range.len);
                    done += len;
                }
                ZeroStep::Write { len } => {
                    if mode != ZeroMode::Discard {
                        self.write(at + done, &vec![0; len as usize]).await?;
                    }
                    done += len;
                }
                ZeroStep::Storage { len, host, guard } => {
                    let storage = self.format.data_storage();
                    match mode {
                        ZeroMode::Discard => drop(storage.discard(host.bytes(), len).await?),
                        _ => storage.write_zeroes(host.bytes(), len, true).await?,
                    }
                    guard.complete();
                    done += len;
                }
            }
        }
        Ok(())
    }

    pub(super) async fn read(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(len as usize);
        while (out.len() as u64) < len {
            let from = at + out.len() as u64;
            let range = GuestRange::new(from, len - out.len() as u64);
            let mut extents = Extents::new();
            let lease = self.format.resolve(range, &mut extents);
            let mut position = from;
            for extent in &extents {
                match &extent.mapping {
                    Mapping::Data(host) => {
                        let buf = self.core.pool().alloc(extent.len as usize);
                        let storage = self.format.data_storage();
                        storage.read(host.bytes(), buf.clone()).await?;
                        let from = out.len();
                        out.resize(from + extent.len as usize, 0);
                        buf.copy_to(0, &mut out[from..]);
                    }
                    Mapping::Zero | Mapping::ZeroAllocated(_) => {
                        out.resize(out.len() + extent.len as usize, 0)
                    }
                    Mapping::Absent => {
                        self.add_below(position, extent.len, &mut out);
                    }
                    Mapping::Damaged(error) => return Err(error.clone()),
                    Mapping::Compressed(packed) => {
                        let bytes = self.format.read_compressed(*packed).await?.to_vec();
                        let from = (position - packed.at.bytes()) as usize;
                        out.extend(&bytes[from..from + extent.len as usize]);
                    }
                    Mapping::Miss(miss) => {
                        self.format.load(*miss).await?;
                        break;
                    }
                }
                position += extent.len;
            }
            drop(lease);
        }
        Ok(out)
    }
}
