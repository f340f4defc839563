//! The demo's guest: workers that write stamped 4 KiB blocks and read them back, all the time.
//!
//! Every block carries its number and its version. Each worker owns the blocks of its residue
//! class,
//! so the guest always knows which version a read must return. For every block it keeps the version
//! last sent and the version last answered: that proves what a point-in-time copy must hold.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use liveblk::engine::executor::{Class, JoinHandle};
use liveblk::{Core, Disk, HostError, WriteFlags};

/// Bytes of a guest block.
pub(crate) const BLOCK: u64 = 4096;
/// Requests in flight.
const WORKERS: u64 = 4;

/// What the guest knows of its disk, and what it felt.
pub(crate) struct Guest {
    core: Core,
    disk: Disk,
    sent: RefCell<Vec<u32>>,
    answered: RefCell<Vec<u32>>,
    stopping: Cell<bool>,
    requests: Cell<u64>,
    stall_ns: Cell<u64>,
    failure: RefCell<Option<String>>,
}

/// A running guest.
pub(crate) struct Running {
    guest: Rc<Guest>,
    workers: Vec<JoinHandle<()>>,
}

/// The bytes of `block` at `version`; version 0 was never written.
fn stamp(block: u64, version: u32) -> [u8; 24] {
    let mut bytes = [0; 24];
    let (head, rest) = bytes.split_at_mut(8);
    let (middle, tail) = rest.split_at_mut(8);
    head.copy_from_slice(&block.to_le_bytes());
    middle.copy_from_slice(&u64::from(version).to_le_bytes());
    tail.copy_from_slice(&(block ^ u64::from(version) ^ 0x6c69_7665_626c_6b21).to_le_bytes());
    bytes
}

/// The version that a block's bytes carry; `None` if they are no version of this block.
fn version_of(block: u64, bytes: &[u8]) -> Option<u32> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Some(0);
    }
    let field = |at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
    let version = u32::try_from(field(8)?).ok()?;
    let (head, last) = (stamp(block, version), bytes.len().checked_sub(24)?);
    (bytes.get(..24)? == head && bytes.get(last..)? == head).then_some(version)
}

impl Running {
    /// Starts a guest on the first `bytes` of `disk`.
    pub(crate) fn start(disk: &Disk, bytes: u64) -> Self {
        let blocks = usize::try_from(bytes / BLOCK).unwrap_or(0);
        let guest = Rc::new(Guest {
            core: disk.core().clone(),
            disk: disk.clone(),
            sent: RefCell::new(vec![0; blocks]),
            answered: RefCell::new(vec![0; blocks]),
            stopping: Cell::new(false),
            requests: Cell::new(0),
            stall_ns: Cell::new(0),
            failure: RefCell::new(None),
        });
        let workers = (0..WORKERS)
            .map(|worker| {
                let guest = Rc::clone(&guest);
                disk.core().spawn(Class::Guest, async move { guest.work(worker).await })
            })
            .collect();
        Self { guest, workers }
    }

    /// Ends the workers; what they saw.
    pub(crate) async fn stop(self) -> Result<Rc<Guest>, HostError> {
        self.guest.stopping.set(true);
        for worker in self.workers {
            worker.await;
        }
        Ok(self.guest)
    }
}

impl std::ops::Deref for Running {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
}

impl Guest {
    async fn work(&self, worker: u64) {
        let blocks = self.sent.borrow().len() as u64;
        let buf = self.core.pool().zeroed(BLOCK as usize);
        while !self.stopping.get() {
            let block = self.core.random() % (blocks / WORKERS) * WORKERS + worker;
            let begun = self.core.now();
            let result = if self.core.random().is_multiple_of(4) {
                self.verify(block, &buf).await
            } else {
                self.write(block, &buf).await
            };
            let took = self.core.now() - begun;
            self.stall_ns.set(self.stall_ns.get().max(took));
            self.requests.set(self.requests.get() + 1);
            if let Err(error) = result {
                self.failure.borrow_mut().get_or_insert(error);
                return;
            }
        }
    }

    async fn write(&self, block: u64, buf: &liveblk::engine::buf::Buf) -> Result<(), String> {
        let index = usize::try_from(block).unwrap_or(0);
        let version = self.sent.borrow().get(index).map_or(1, |version| version + 1);
        let stamp = stamp(block, version);
        buf.copy_from(0, &stamp);
        buf.copy_from(BLOCK as usize - stamp.len(), &stamp);
        set(&self.sent, index, version);
        let written = self.disk.write(block * BLOCK, buf.clone(), WriteFlags::default()).await;
        written.map_err(|error| format!("the guest's write of block {block} failed: {error}"))?;
        set(&self.answered, index, version);
        Ok(())
    }

    async fn verify(&self, block: u64, buf: &liveblk::engine::buf::Buf) -> Result<(), String> {
        let index = usize::try_from(block).unwrap_or(0);
        let read = self.disk.read(block * BLOCK, buf.clone()).await;
        read.map_err(|error| format!("the guest's read of block {block} failed: {error}"))?;
        let expected = self.answered.borrow().get(index).copied();
        let found = version_of(block, &buf.to_vec());
        if found != expected {
            return Err(format!("block {block} holds {found:?} instead of {expected:?}"));
        }
        Ok(())
    }

    /// What the guest has seen go wrong.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.failure.borrow().clone().map_or(Ok(()), Err)
    }

    /// Requests answered since the figures were taken.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.get()
    }

    /// Requests answered, and the longest since the last call in nanoseconds.
    pub(crate) fn take_figures(&self) -> (u64, u64) {
        (self.requests.take(), self.stall_ns.take())
    }

    /// The versions answered by now: what a copy begun later must hold at least.
    pub(crate) fn floor(&self) -> Vec<u32> {
        self.answered.borrow().clone()
    }

    /// The versions sent by now: what a copy begun earlier can hold at most.
    pub(crate) fn ceiling(&self) -> Vec<u32> {
        self.sent.borrow().clone()
    }
}

fn set(versions: &RefCell<Vec<u32>>, index: usize, version: u32) {
    if let Some(slot) = versions.borrow_mut().get_mut(index) {
        *slot = version;
    }
}

/// Checks that every block of `bytes` (from block `first`) lies between `floor` and `ceiling`.
pub(crate) fn check_versions(
    first: u64,
    bytes: &[u8],
    floor: &[u32],
    ceiling: &[u32],
) -> Result<(), String> {
    for (block, content) in (first..).zip(bytes.chunks(BLOCK as usize)) {
        let index = usize::try_from(block).unwrap_or(usize::MAX);
        let (Some(least), Some(most)) = (floor.get(index), ceiling.get(index)) else {
            return Ok(());
        };
        match version_of(block, content) {
            Some(version) if (*least..=*most).contains(&version) => {}
            found => {
                return Err(format!(
                    "block {block} holds version {found:?}, not one of {least} to {most}"
                ));
            }
        }
    }
    Ok(())
}
