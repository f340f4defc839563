//! Storage in memory: for tests, for embedders without files, and as the smallest implementation.
//!
//! Pages are allocated when first written; everything else reads as zeroes. Copies share pages
//! until one of them writes. Operations take effect at the call. A fault can be planted: from the
//! N-th write on, an errno. The size can be fixed, as a device's.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use super::file::IoFuture;
use crate::buf::Buf;
use crate::error::{Error, Result};

const PAGE: u64 = 4096;

/// The bytes of a page, shared with copies.
pub(crate) type Page = Rc<[u8; PAGE as usize]>;

/// Bytes in memory with a size.
#[derive(Debug, Default)]
pub struct Memory {
    pages: RefCell<BTreeMap<u64, Page>>,
    size: Cell<u64>,
    /// Writes until the planted fault, and its errno.
    fault: Cell<Option<(u64, i32)>>,
    /// Whether the size cannot change.
    fixed: Cell<bool>,
    traffic: Cell<Traffic>,
}

/// Bytes that were moved to and from a memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes read.
    pub read: u64,
    /// Bytes written, zeroing not counted.
    pub written: u64,
}

impl Memory {
    /// `size` zero bytes.
    pub fn new(size: u64) -> Rc<Self> {
        let memory = Self::default();
        memory.size.set(size);
        Rc::new(memory)
    }

    /// These bytes.
    pub fn from_bytes(bytes: &[u8]) -> Rc<Self> {
        let memory = Self::new(bytes.len() as u64);
        let pages = (0_u64..).zip(bytes.chunks(PAGE as usize)).map(|(page, part)| {
            let mut whole = [0; PAGE as usize];
            whole.split_at_mut(part.len()).0.copy_from_slice(part);
            (page, Rc::new(whole))
        });
        memory.pages.replace(pages.collect());
        memory
    }

    /// `size` bytes in these pages; what they do not have is zeroes.
    pub(crate) fn from_pages(pages: BTreeMap<u64, Page>, size: u64) -> Rc<Self> {
        let memory = Self::new(size);
        memory.pages.replace(pages);
        memory
    }

    /// The same bytes, without a fault; cheap, and from now on independent.
    pub fn copy(&self) -> Rc<Self> {
        Self::from_pages(self.pages.borrow().clone(), self.size())
    }

    /// All bytes, for instance to go on with a copy.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.size()).unwrap_or(0)];
        let pages = self.pages.borrow();
        for (page, part) in (0_u64..).zip(bytes.chunks_mut(PAGE as usize)) {
            if let Some(whole) = pages.get(&page) {
                let (from, _) = whole.split_at(part.len());
                part.copy_from_slice(from);
            }
        }
        bytes
    }

    /// Whether it has the same bytes as `other`; pages that copies share are not looked at.
    pub fn is_like(&self, other: &Self) -> bool {
        let (ours, theirs) = (self.pages.borrow(), other.pages.borrow());
        let zeroes = |page: &Page| page.iter().all(|byte| *byte == 0);
        let alike = |page: &u64, bytes: &Page, others: &BTreeMap<u64, Page>| {
            let same = |other: &Page| Rc::ptr_eq(bytes, other) || bytes == other;
            others.get(page).map_or_else(|| zeroes(bytes), same)
        };
        self.size() == other.size()
            && ours.iter().all(|(page, bytes)| alike(page, bytes, &theirs))
            && theirs.iter().all(|(page, bytes)| alike(page, bytes, &ours))
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size.get()
    }

    /// What was moved since it was made.
    pub fn traffic(&self) -> Traffic {
        self.traffic.get()
    }

    /// After `writes` more writes every write fails with `errno`; `None` heals.
    pub fn plant_fault(&self, fault: Option<(u64, i32)>) {
        self.fault.set(fault);
    }

    /// From now on the size stays: what needs more fails with ENOSPC.
    pub fn fix_size(&self) {
        self.fixed.set(true);
    }

    /// Whether the size can change.
    pub fn can_grow(&self) -> bool {
        !self.fixed.get()
    }

    fn check_room(&self, end: u64, op: &'static str) -> Result<()> {
        match self.fixed.get() && end > self.size.get() {
            true => Err(Error::os(libc::ENOSPC, op)),
            false => Ok(()),
        }
    }

    /// Reads into `buf`.
    pub fn read(&self, offset: u64, buf: &Buf) -> IoFuture {
        let before = self.traffic.get();
        self.traffic.set(Traffic { read: before.read + buf.len() as u64, ..before });
        let pages = self.pages.borrow();
        each_page(offset, buf.len(), |page, within, at, len| match pages.get(&page) {
            Some(bytes) => {
                buf.copy_from(at, bytes.get(within..within + len).unwrap_or_default());
            }
            None => buf.slice(at..at + len).fill(0),
        });
        IoFuture::ready(Ok(()))
    }

    /// Writes `buf`, growing if needed.
    pub fn write(&self, offset: u64, buf: &Buf) -> IoFuture {
        let end = offset.saturating_add(buf.len() as u64);
        let checked = self.check_fault("write").and_then(|()| self.check_room(end, "write"));
        IoFuture::ready(checked.map(|()| {
            let before = self.traffic.get();
            self.traffic.set(Traffic { written: before.written + buf.len() as u64, ..before });
            let mut pages = self.pages.borrow_mut();
            each_page(offset, buf.len(), |page, within, at, len| {
                let bytes = pages.entry(page).or_insert_with(|| Rc::new([0; PAGE as usize]));
                if let Some(target) = Rc::make_mut(bytes).get_mut(within..within + len) {
                    buf.copy_to(at, target);
                }
            });
            self.size.set(self.size.get().max(offset + buf.len() as u64));
        }))
    }

    /// Zeroes a range, growing if needed.
    ///
    /// # Errors
    /// A planted fault.
    pub fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check_fault("write zeroes")?;
        self.check_room(offset.saturating_add(len), "write zeroes")?;
        let end = offset.saturating_add(len);
        let mut pages = self.pages.borrow_mut();
        // However long the range is: only what was written has to be touched.
        for (page, bytes) in pages.range_mut(offset / PAGE..end.div_ceil(PAGE)) {
            let start = page * PAGE;
            let inside = |at: u64| usize::try_from(at.saturating_sub(start).min(PAGE)).unwrap_or(0);
            if let Some(target) = Rc::make_mut(bytes).get_mut(inside(offset)..inside(end)) {
                target.fill(0);
            }
        }
        self.size.set(self.size.get().max(offset.saturating_add(len)));
        Ok(())
    }

    /// Grows to at least `size`.
    ///
    /// # Errors
    /// A planted fault.
    pub fn grow(&self, size: u64) -> Result<()> {
        self.check_fault("allocate")?;
        self.check_room(size, "allocate")?;
        self.size.set(self.size.get().max(size));
        Ok(())
    }

    /// Sets the size.
    ///
    /// # Errors
    /// A planted fault.
    pub fn truncate(&self, size: u64) -> Result<()> {
        self.check_fault("truncate")?;
        self.check_room(size, "truncate")?;
        if size < self.size.get() {
            let mut pages = self.pages.borrow_mut();
            drop(pages.split_off(&size.div_ceil(PAGE)));
            let within = usize::try_from(size % PAGE).expect("invariant: below a page");
            if let Some(tail) =
                pages.get_mut(&(size / PAGE)).and_then(|page| Rc::make_mut(page).get_mut(within..))
            {
                tail.fill(0);
            }
        }
        self.size.set(size);
        Ok(())
    }

    fn check_fault(&self, op: &'static str) -> Result<()> {
        match self.fault.get() {
            Some((0, errno)) => Err(Error::os(errno, op)),
            Some((writes, errno)) => {
                self.fault.set(Some((writes - 1, errno)));
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// Calls `visit(page, offset in page, position, len)` for each piece of the range.
fn each_page(offset: u64, len: usize, mut visit: impl FnMut(u64, usize, usize, usize)) {
    let mut at = 0;
    while at < len {
        let position = offset + at as u64;
        let within = usize::try_from(position % PAGE).expect("invariant: below a page");
        let part = (len - at).min(PAGE as usize - within);
        visit(position / PAGE, within, at, part);
        at += part;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroing_touches_what_was_written_and_copies_are_alike_until_one_changes() {
        let memory = Memory::from_bytes(&[7; 10_000]);
        let copy = memory.copy();
        assert!(copy.is_like(&memory));
        copy.write_zeroes(4000, 4500).expect("no fault is planted");
        let mut expected = vec![7; 10_000];
        expected[4000..8500].fill(0);
        assert!(copy.to_bytes() == expected && !copy.is_like(&memory));
        memory.write_zeroes(4000, 4500).expect("no fault is planted");
        assert!(copy.is_like(&memory) && memory.is_like(&copy));
        copy.write_zeroes(0, 1 << 50).expect("no fault is planted");
        assert_eq!(copy.size(), 1 << 50);
        assert!(copy.is_like(&Memory::new(1 << 50)) && Memory::new(1 << 50).is_like(&copy));
    }
}
