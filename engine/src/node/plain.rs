//! A protocol node's own layer: the bytes of a file (or memory) as they are, driver "file".
//!
//! Everything is mapped in place; there is no metadata. The smallest implementation of `Format`.

use std::cell::Cell;

use crate::address::{GuestRange, HostOffset};
use crate::buf::Buf;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Abilities, BackingRef, Extent, Extents, Format, ImageInfo, LocalFuture, Mapping, MissId,
    PackedCluster, Resize, WriteGuard, WritePiece, WriteStep, ZeroMode, ZeroStep,
};
use crate::lease::Lease;
use crate::storage::Storage;

/// The bytes of a storage as a disk.
pub(crate) struct Plain {
    driver: &'static str,
    storage: Storage,
    size: Cell<u64>,
}

impl Plain {
    /// All of `storage`, under the driver name `driver`.
    pub(crate) fn new(driver: &'static str, storage: Storage) -> Self {
        let size = Cell::new(storage.size());
        Self { driver, storage, size }
    }
}

impl Format for Plain {
    fn driver(&self) -> &'static str {
        self.driver
    }

    fn size(&self) -> u64 {
        self.size.get()
    }

    fn cluster_size(&self) -> u64 {
        1
    }

    fn subcluster_size(&self) -> u64 {
        1
    }

    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    fn data_storage(&self) -> &Storage {
        &self.storage
    }

    fn resolve(&self, range: GuestRange, extents: &mut Extents) -> Option<Lease> {
        let mapping = Mapping::Data(HostOffset::new(range.start.bytes()));
        extents.push(Extent { len: range.len, mapping });
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

    fn read_compressed(&self, _: PackedCluster) -> LocalFuture<'static, Result<Buf>> {
        Box::pin(async { Err(Error::new(ErrorKind::Unsupported, "read compressed")) })
    }

    fn begin_write(&self, range: GuestRange) -> Result<WriteStep> {
        Ok(WriteStep::Ready(WritePiece {
            len: range.len,
            host: HostOffset::new(range.start.bytes()),
            head: 0,
            tail: 0,
            fill: crate::format::Fill::Zero,
            guard: WriteGuard::in_place(None),
        }))
    }

    fn begin_zero(&self, range: GuestRange, _: ZeroMode) -> Result<ZeroStep> {
        Ok(ZeroStep::Storage {
            len: range.len,
            host: HostOffset::new(range.start.bytes()),
            guard: WriteGuard::in_place(None),
        })
    }

    fn pending(&self, _: MissId) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.storage.flush())
    }

    fn resize_with(&self, to: Resize) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.storage.truncate(to.size).await?;
            self.size.set(to.size);
            Ok(())
        })
    }

    fn set_writable(&self, writable: bool) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            if writable {
                // Others may have changed it meanwhile.
                self.size.set(self.storage.size());
                return Ok(());
            }
            self.storage.flush().await
        })
    }

    fn info(&self) -> ImageInfo {
        ImageInfo { virtual_size: self.size.get(), ..ImageInfo::default() }
    }

    fn set_backing(&self, _: Option<BackingRef>) -> LocalFuture<'_, Result<()>> {
        Box::pin(async { Err(Error::new(ErrorKind::Unsupported, "set backing file")) })
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.storage.flush())
    }
}
