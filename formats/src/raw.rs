//! raw: the disk is the file, or a part of it. The smallest example of a format.
//!
//! There is no metadata: nothing misses, nothing waits, every write is in place. Never chosen by
//! probing; only a caller that says "raw" gets it.

use std::cell::Cell;
use std::rc::Rc;

use liveblk_engine::address::{GuestRange, HostOffset};
use liveblk_engine::buf::Buf;
use liveblk_engine::executor::Core;
use liveblk_engine::format::{
    Abilities, Applied, BackingRef, CreateImage, Driver, Extent, Extents, Fill, Format,
    FormatOptions, ImageInfo, InfoValue, LocalFuture, Mapping, MissId, OpenImage, PackedCluster,
    Preallocation, Resize, RuntimeOptions, WriteGuard, WritePiece, WriteStep, ZeroMode, ZeroStep,
};
use liveblk_engine::lease::Lease;
use liveblk_engine::storage::Storage;
use liveblk_engine::{Error, ErrorKind, Result};

use crate::create_reason::CreateReason;
use crate::limits::TABLE_PIECE;
use crate::reason::Reason;

/// Opens and creates raw images.
#[derive(Clone, Copy, Debug, Default)]
pub struct RawDriver;

struct Raw {
    core: Core,
    storage: Storage,
    place: Rc<Place>,
    writable: Cell<bool>,
}

/// Where the disk lies in the file.
#[derive(Debug, Default)]
struct Place {
    offset: Cell<u64>,
    /// Set if the caller named a size; then only he changes it.
    fixed: Cell<Option<u64>>,
}

impl Place {
    /// Checks that `size` bytes (absent: all there are) at `offset` lie in a file of `file` bytes.
    fn check(offset: u64, size: Option<u64>, file: u64) -> Result<(), Reason> {
        let bytes = size.unwrap_or(0);
        if offset > file {
            return Err(Reason::RawOffset { offset, file });
        }
        if offset.checked_add(bytes).is_none_or(|end| end > file) {
            return Err(Reason::RawRange { offset, size: bytes, file });
        }
        Ok(())
    }
}

/// `offset` and `size` of a disk that is in use; both go back to their defaults if they are not
/// named.
struct Tuning {
    storage: Storage,
    place: Rc<Place>,
}

impl Tuning {
    /// The `offset` and `size` that are asked for.
    fn wanted(given: &FormatOptions) -> Result<(u64, Option<u64>)> {
        let (mut offset, mut size) = (0, None);
        for (name, value) in given {
            match (name.as_str(), value) {
                ("offset", InfoValue::Number(bytes)) => offset = *bytes,
                ("size", InfoValue::Number(bytes)) => size = Some(*bytes),
                _ => return Err(Error::new(ErrorKind::InvalidArgument, "change options")),
            }
        }
        Ok((offset, size))
    }
}

impl RuntimeOptions for Tuning {
    fn moves(&self, given: &FormatOptions) -> bool {
        let bytes = |offset: u64, size: Option<u64>| {
            (offset, size.unwrap_or_else(|| self.storage.size().saturating_sub(offset)))
        };
        let now = bytes(self.place.offset.get(), self.place.fixed.get());
        Self::wanted(given).is_ok_and(|(offset, size)| bytes(offset, size) != now)
    }

    fn prepare(&self, given: &FormatOptions, _: bool) -> Result<Applied> {
        let (offset, size) = Self::wanted(given)?;
        let refuse = |reason: Reason| reason.error("change options").on(self.storage.name());
        Place::check(offset, size, self.storage.size()).map_err(refuse)?;
        if size.is_some_and(|bytes| bytes % 512 != 0) {
            return Err(refuse(Reason::RawSector));
        }
        let place = Rc::clone(&self.place);
        Ok(Box::new(move || {
            place.offset.set(offset);
            place.fixed.set(size);
        }))
    }
}

impl Raw {
    fn open(open: OpenImage) -> Result<Self> {
        let file = open.storage.size();
        Place::check(open.raw_offset, open.raw_size, file)
            .map_err(|reason| reason.error("open").on(&open.filename.to_string_lossy()))?;
        let writable = Cell::new(open.writable);
        let (offset, fixed) = (Cell::new(open.raw_offset), Cell::new(open.raw_size));
        let place = Rc::new(Place { offset, fixed });
        Ok(Self { core: open.core, storage: open.storage, place, writable })
    }

    fn offset(&self) -> u64 {
        self.place.offset.get()
    }

    fn bytes(&self) -> u64 {
        let fixed = self.place.fixed.get();
        fixed.unwrap_or_else(|| self.storage.size().saturating_sub(self.offset()))
    }

    /// Writes zeroes from `from` to `end` of the file, a piece at a time.
    async fn write_out_zeroes(&self, from: u64, end: u64) -> Result<()> {
        let mut at = from;
        while at < end {
            let len = (end - at).min(TABLE_PIECE as u64);
            let zeroes = self.core.pool().zeroed(usize::try_from(len).unwrap_or(0));
            self.storage.write(at, zeroes, false).await?;
            at += len;
        }
        Ok(())
    }

    /// Where a range that is about to be changed lies in the file.
    fn target(&self, range: GuestRange, op: &'static str) -> Result<HostOffset> {
        if !self.writable.get() {
            return Err(Error::new(ErrorKind::ReadOnly, op));
        }
        if range.end().bytes() > self.bytes() || range.is_empty() {
            return Err(Error::new(ErrorKind::OutOfRange, op).at(range.start.bytes()));
        }
        Ok(HostOffset::new(self.offset() + range.start.bytes()))
    }
}

impl Format for Raw {
    fn driver(&self) -> &'static str {
        "raw"
    }

    fn size(&self) -> u64 {
        self.bytes()
    }

    fn cluster_size(&self) -> u64 {
        1
    }

    fn subcluster_size(&self) -> u64 {
        1
    }

    fn abilities(&self) -> Abilities {
        let tuning = Tuning { storage: self.storage.clone(), place: Rc::clone(&self.place) };
        Abilities { options: Some(Rc::new(tuning)), ..Abilities::default() }
    }

    fn data_storage(&self) -> &Storage {
        &self.storage
    }

    fn resolve(&self, range: GuestRange, extents: &mut Extents) -> Option<Lease> {
        extents.clear();
        let host = HostOffset::new(self.offset()).plus(range.start.bytes());
        extents.push(Extent { len: range.len, mapping: Mapping::Data(host) });
        None
    }

    fn lease(&self) -> Option<Lease> {
        None
    }

    fn load(&self, _: MissId) -> LocalFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn has_holes(&self) -> LocalFuture<'_, Result<bool>> {
        Box::pin(async { Ok(true) })
    }

    fn read_compressed(&self, packed: PackedCluster) -> LocalFuture<'static, Result<Buf>> {
        let error =
            Error::new(ErrorKind::Unsupported, "read a compressed cluster").at(packed.at.bytes());
        Box::pin(async { Err(error) })
    }

    fn begin_write(&self, range: GuestRange) -> Result<WriteStep> {
        let host = self.target(range, "write")?;
        let guard = WriteGuard::in_place(None);
        let len = range.len;
        Ok(WriteStep::Ready(WritePiece { len, host, head: 0, tail: 0, fill: Fill::Zero, guard }))
    }

    fn begin_zero(&self, range: GuestRange, _: ZeroMode) -> Result<ZeroStep> {
        let host = self.target(range, "write zeroes")?;
        Ok(ZeroStep::Storage { len: range.len, host, guard: WriteGuard::in_place(None) })
    }

    fn pending(&self, _: MissId) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        if !self.writable.get() {
            return Box::pin(async { Ok(()) });
        }
        Box::pin(self.storage.flush())
    }

    fn resize_with(&self, to: Resize) -> LocalFuture<'_, Result<()>> {
        let Resize { size, preallocation, .. } = to;
        Box::pin(async move {
            if self.place.fixed.get().is_some() {
                return Err(Reason::RawFixed.error("resize").on(self.storage.name()));
            }
            if !self.writable.get() {
                return Err(Error::new(ErrorKind::ReadOnly, "resize"));
            }
            let Some(end) = self.offset().checked_add(size) else {
                return Err(Error::new(ErrorKind::InvalidArgument, "resize"));
            };
            let old = self.storage.size();
            if end <= old && preallocation != Preallocation::Off {
                return Err(Reason::PreallocationShrink.error("resize").on(self.storage.name()));
            }
            match preallocation {
                Preallocation::Metadata => {
                    let reason = Reason::PreallocationMode("metadata");
                    Err(reason.error("resize").on(self.storage.name()))
                }
                Preallocation::Off => self.storage.truncate(end).await,
                Preallocation::Falloc => self.storage.allocate(old, end - old).await,
                Preallocation::Full => self.write_out_zeroes(old, end).await,
            }?;
            // The caller tells guests of the size at once, or that it is as it was.
            let flushed = self.storage.flush().await;
            if flushed.is_err() && end > old {
                self.storage.truncate(old).await?;
            }
            flushed
        })
    }

    fn set_writable(&self, writable: bool) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            if !writable {
                self.flush().await?;
            }
            self.writable.set(writable);
            Ok(())
        })
    }

    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.bytes(), ..ImageInfo::default() }
    }

    fn set_backing(&self, _: Option<BackingRef>) -> LocalFuture<'_, Result<()>> {
        let error = Reason::NoBackingSupport("raw").error("change the backing reference");
        Box::pin(async { Err(error) })
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        self.flush()
    }
}

impl Driver for RawDriver {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn supports_backing(&self) -> bool {
        false
    }

    fn recognises(&self, _: &[u8]) -> bool {
        false
    }

    fn open(&self, open: OpenImage) -> LocalFuture<'static, Result<Rc<dyn Format>>> {
        Box::pin(async move {
            let format: Rc<dyn Format> = Rc::new(Raw::open(open)?);
            Ok(format)
        })
    }

    fn create(
        &self,
        core: Core,
        storage: Storage,
        create: CreateImage,
    ) -> LocalFuture<'static, Result<()>> {
        Box::pin(async move {
            if create.backing.is_some() {
                let reason = Reason::NoBackingSupport("raw");
                return Err(reason.error("create").on(storage.name()));
            }
            let preallocation = preallocation(&create);
            let preallocation = preallocation
                .map_err(|reason| Reason::Create(reason).error("create").on(storage.name()))?;
            storage.truncate(0).await?;
            let writable = Cell::new(true);
            let raw = Raw { core, storage: storage.clone(), place: Rc::default(), writable };
            if create.size > 0 {
                raw.resize_with(Resize { preallocation, ..Resize::to(create.size) }).await?;
            }
            storage.flush().await
        })
    }
}

/// The one option of a raw image.
fn preallocation(create: &CreateImage) -> Result<Preallocation, CreateReason> {
    let mut mode = Preallocation::Off;
    for (name, value) in &create.options {
        mode = match (name.as_str(), value) {
            ("preallocation", InfoValue::Text(text)) => match text.as_str() {
                "off" => Preallocation::Off,
                "metadata" => Preallocation::Metadata,
                "falloc" => Preallocation::Falloc,
                "full" => Preallocation::Full,
                other => {
                    let value = other.to_owned();
                    return Err(CreateReason::Value { option: "preallocation", value });
                }
            },
            _ => return Err(CreateReason::Unknown(name.clone())),
        };
    }
    Ok(mode)
}
