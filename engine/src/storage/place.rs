//! The enum over the places for bytes: one dispatch per operation, no boxes.

use std::rc::Rc;

use super::file::{File, IoFuture};
use super::memory::Memory;
use crate::buf::Buf;
use crate::error::Result;

/// A place for bytes.
#[derive(Clone, Debug)]
pub enum Storage {
    /// A regular file or block device.
    File(Rc<File>),
    /// Memory of this process.
    Memory(Rc<Memory>),
}

/// A run of storage bytes: data or hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageExtent {
    /// Length in bytes.
    pub len: u64,
    /// Whether there may be data (false: certainly zeroes, no space used).
    pub data: bool,
}

impl Storage {
    /// The name for messages (a path, or "memory").
    pub fn name(&self) -> &str {
        match self {
            Self::File(file) => file.name(),
            Self::Memory(_) => "memory",
        }
    }

    /// Current size in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::File(file) => file.size(),
            Self::Memory(memory) => memory.size(),
        }
    }

    /// Whether writes behind the end make it larger: not so for devices.
    pub fn can_grow(&self) -> bool {
        match self {
            Self::File(file) => file.can_grow(),
            Self::Memory(memory) => memory.can_grow(),
        }
    }

    /// Offsets and lengths that are multiples of this are served without read-modify-write.
    pub fn alignment(&self) -> u64 {
        match self {
            Self::File(file) => file.alignment(),
            Self::Memory(_) => 1,
        }
    }

    /// Starts to read `buf.len()` bytes at `offset`; beyond the end the buffer gets zeroes.
    pub fn read(&self, offset: u64, buf: Buf) -> IoFuture {
        match self {
            Self::File(file) => file.read(offset, buf),
            Self::Memory(memory) => memory.read(offset, &buf),
        }
    }

    /// Starts to write `buf` at `offset`, growing the storage if needed. With `fua` the data is
    /// durable when the future ends.
    pub fn write(&self, offset: u64, buf: Buf, fua: bool) -> IoFuture {
        match self {
            Self::File(file) => file.write(offset, buf, fua),
            Self::Memory(memory) => memory.write(offset, &buf),
        }
    }

    /// Makes all writes that ended before the call durable. A failed flush is remembered: later
    /// ones fail too.
    pub async fn flush(&self) -> Result<()> {
        match self {
            Self::File(file) => file.flush().await,
            Self::Memory(_) => Ok(()),
        }
    }

    /// Makes the range read as zeroes; with `unmap` space may be given back. Grows the storage if
    /// the range ends beyond it.
    pub async fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        match self {
            Self::File(file) => file.write_zeroes(offset, len, unmap).await,
            Self::Memory(memory) => memory.write_zeroes(offset, len),
        }
    }

    /// Gives the range's space back if the storage can; the range then reads as zeroes. Otherwise
    /// does nothing and answers false.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<bool> {
        match self {
            Self::File(file) => file.discard(offset, len).await,
            Self::Memory(memory) => memory.write_zeroes(offset, len).map(|()| true),
        }
    }

    /// Reserves space for the range and grows the storage to its end; the new bytes read as zeroes.
    pub async fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        match self {
            Self::File(file) => file.allocate(offset, len).await,
            Self::Memory(memory) => memory.grow(offset.saturating_add(len)),
        }
    }

    /// As [`Storage::allocate`], but where the storage has no such thing as reserved space nothing
    /// happens, and the answer is false.
    pub async fn reserve(&self, offset: u64, len: u64) -> Result<bool> {
        match self {
            Self::File(file) => file.reserve(offset, len).await,
            Self::Memory(memory) => memory.grow(offset.saturating_add(len)).map(|()| true),
        }
    }

    /// Whether writes get cheaper where space was reserved.
    pub fn gains_from_room(&self) -> bool {
        match self {
            Self::File(file) => file.gains_from_room(),
            Self::Memory(_) => false,
        }
    }

    /// Sets the size; new bytes read as zeroes.
    pub async fn truncate(&self, size: u64) -> Result<()> {
        match self {
            Self::File(file) => file.truncate(size).await,
            Self::Memory(memory) => memory.truncate(size),
        }
    }

    /// Which parts of the range hold data; runs cover the range in order. Beyond the end: hole.
    pub async fn extents(&self, offset: u64, len: u64) -> Result<Vec<StorageExtent>> {
        match self {
            Self::File(file) => file.extents(offset, len).await,
            Self::Memory(_) => Ok(vec![StorageExtent { len, data: true }]),
        }
    }
}
