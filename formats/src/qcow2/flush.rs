//! Making the image durable. The one order of all metadata write-outs:
//!
//! 1. copy, at one instant: dirty refcount slices, dirty L2 slices, changed sectors of the refcount
//!    table and of L1, the list of unlinked clusters (the memory may change from now on);
//! 2. write the refcount slices;
//! 3. barrier, of an external data file first: guest data that was complete at (1), contents of new
//!    tables, refcounts;
//! 4. refcount table sectors (new blocks), barrier;
//! 5. L2 slices;
//! 6. barrier, then L1 sectors (new L2 tables), if any;
//! 7. barrier;
//! 8. the epoch is retired; the clusters of the list may be freed when its leases are gone.
//!
//! Parts without work are left out, a flush with nothing dirty is one storage flush. A table entry
//! is 8 bytes inside one sector, and at any cut both its old and its new value are valid: what the
//! old one names is not freed before (8), what the new one names is durable since (3) or (6).
//!
//! A write that fails for want of space leaves its slices dirty: nothing durable depends on it yet
//! and the next flush tries again. Any other failure poisons the image.

use std::rc::Rc;

use liveblk_engine::buf::Buf;
use liveblk_engine::executor::{Class, Core};
#[cfg(feature = "planted-bugs")]
use liveblk_engine::planted::{self, Planted};
use liveblk_engine::{ErrorKind, Result};

use super::freed::Freed;
use super::image::Image;
use super::layout::{ENTRY_BYTES, SECTOR};
use super::state::{Health, State, Table, set_word};
use crate::limits::FLUSH_WINDOW;
use crate::reason::Reason;

/// A copied piece of metadata: slice or sector number, where it goes, its bytes.
struct Piece {
    key: u64,
    host: u64,
    buf: Buf,
}

/// Everything that one write-out writes.
#[derive(Default)]
struct Copies {
    refs: Vec<Piece>,
    reftable: Vec<Piece>,
    l2: Vec<Piece>,
    l1: Vec<Piece>,
    unlinked: Vec<Freed>,
    /// How far the write-out came: slices before this step are in the file.
    refs_done: bool,
    reftable_done: bool,
    l2_done: bool,
    l1_done: bool,
}

impl Image {
    /// Makes everything complete at the time of the call durable. Concurrent calls share a run:
    /// one runs, at most one waits to begin.
    pub(super) async fn flush(self: Rc<Self>) -> Result<()> {
        let ticket = self.state.borrow().flushes.started + 1;
        loop {
            {
                let mut state = self.state.borrow_mut();
                let flushes = &mut state.flushes;
                if flushes.finished >= ticket {
                    return flushes.result.clone();
                }
                if !flushes.running {
                    flushes.running = true;
                    flushes.started += 1;
                    break;
                }
            }
            self.flushed.until(|| !self.state.borrow().flushes.running).await;
        }
        let result = {
            let _tables = self.tables.lock().await;
            self.write_out().await
        };
        let freed = {
            let mut state = self.state.borrow_mut();
            let flushes = &mut state.flushes;
            flushes.finished = flushes.started;
            flushes.running = false;
            flushes.result.clone_from(&result);
            !state.quarantine.is_empty() || !state.released.is_empty()
        };
        self.flushed.notify_all();
        if freed {
            drop(self.core.spawn(Class::Background, Rc::clone(&self).reclaim()));
        }
        result
    }

    /// One storage flush; a failure poisons the image.
    pub(super) async fn barrier(&self) -> Result<()> {
        let result = self.storage.flush().await;
        if let Err(error) = &result {
            self.state.borrow_mut().poison(error);
        }
        result
    }

    /// Writes all dirty metadata in order. The caller holds `tables`.
    pub(super) async fn write_out(&self) -> Result<()> {
        let mut copies = {
            let mut state = self.state.borrow_mut();
            match &state.health {
                Health::Good if !state.writable => return Ok(()),
                Health::Good => {
                    if let Err(reason) = state.check_targets() {
                        drop(state);
                        return self.refuse(reason);
                    }
                }
                Health::Poisoned(_) | Health::Corrupt(_) => return state.check_writable(),
            }
            state.write_outs += 1;
            state.copy(&self.core)
        };
        let result = self.write_copies(&mut copies).await;
        let mut state = self.state.borrow_mut();
        state.write_outs -= 1;
        if let Err(error) = &result
            && error.kind() != ErrorKind::NoSpace
        {
            state.poison(error);
        }
        let unlinked = state.settle(copies, result.is_ok());
        self.watch_age();
        if result.is_ok() && !unlinked.is_empty() {
            state.quarantine.push_back((self.epochs.retire(), unlinked));
        }
        result
    }

    /// Nothing is written where something else lies.
    fn refuse(&self, reason: Reason) -> Result<()> {
        match self.me.upgrade() {
            Some(image) => image.judge(Err(reason)),
            None => Err(self.error(reason, "write")),
        }
    }

    async fn write_copies(&self, copies: &mut Copies) -> Result<()> {
        self.write_pieces(&copies.refs).await?;
        copies.refs_done = true;
        #[cfg(feature = "planted-bugs")]
        if planted::has(&self.core, Planted::FlushLeftOut) {
            return self.write_rest(copies).await;
        }
        self.data_barrier().await?;
        self.write_rest(copies).await
    }

    /// Steps 4 to 7.
    async fn write_rest(&self, copies: &mut Copies) -> Result<()> {
        if !copies.reftable.is_empty() {
            self.write_pieces(&copies.reftable).await?;
            self.barrier().await?;
        }
        copies.reftable_done = true;
        let more = !copies.l2.is_empty() || !copies.l1.is_empty();
        self.write_pieces(&copies.l2).await?;
        copies.l2_done = true;
        if !copies.l1.is_empty() {
            if !copies.l2.is_empty() {
                self.barrier().await?;
            }
            self.write_pieces(&copies.l1).await?;
        }
        copies.l1_done = true;
        if more { self.barrier().await } else { Ok(()) }
    }

    /// Writes all pieces, some at a time; on failure the first error, after all have ended.
    async fn write_pieces(&self, pieces: &[Piece]) -> Result<()> {
        for window in pieces.chunks(FLUSH_WINDOW) {
            let writes: Vec<_> = window
                .iter()
                .map(|piece| self.storage.write(piece.host, piece.buf.clone(), false))
                .collect();
            let mut first = Ok(());
            for write in writes {
                let result = write.await;
                if first.is_ok() {
                    first = result.map(|_| ());
                }
            }
            first?;
        }
        Ok(())
    }
}

impl State {
    /// Step 1: copies what is dirty and marks it as being written.
    fn copy(&mut self, core: &Core) -> Copies {
        let geometry = self.geometry;
        let into_buf = |bytes: &[u8]| {
            let buf = core.pool().alloc(bytes.len());
            buf.copy_from(0, bytes);
            buf
        };
        let mut copies = Copies::default();
        for key in self.refs.dirty_keys() {
            let block = self.block(key / geometry.block_slices()).unwrap_or(0);
            let host = block + key % geometry.block_slices() * geometry.ref_slice_bytes();
            if let Some(bytes) = self.refs.begin_write(key)
                && block != 0
            {
                copies.refs.push(Piece { key, host, buf: into_buf(bytes) });
            }
        }
        for key in self.l2.dirty_keys() {
            let Ok(Table::Own(table)) = self.l2_table(geometry.l1_of_slice(key)) else { continue };
            let host = table + key % geometry.l2_slices() * geometry.slice_bytes();
            if let Some(bytes) = self.l2.begin_write(key) {
                copies.l2.push(Piece { key, host, buf: into_buf(bytes) });
            }
        }
        let sector = |table: &[u64], offset: u64, key: u64| {
            let words = SECTOR as u64 / ENTRY_BYTES;
            let first = usize::try_from(key * words).unwrap_or(usize::MAX);
            let mut bytes = [0; SECTOR];
            let entries = table.get(first..).unwrap_or_default();
            for (index, entry) in entries.iter().take(SECTOR / 8).enumerate() {
                set_word(&mut bytes, index, *entry);
            }
            Piece { key, host: offset + key * SECTOR as u64, buf: into_buf(&bytes) }
        };
        for key in std::mem::take(&mut self.reftable_dirty) {
            copies.reftable.push(sector(self.reftable.used(), self.header.reftable_offset, key));
        }
        for key in std::mem::take(&mut self.l1_dirty) {
            copies.l1.push(sector(&self.l1, self.header.l1_offset, key));
        }
        copies.unlinked = std::mem::take(&mut self.unlinked);
        copies
    }

    /// After a write-out: what is not in the file is dirty again. Returns the clusters whose unlink
    /// is durable now.
    fn settle(&mut self, copies: Copies, ok: bool) -> Vec<Freed> {
        for piece in &copies.refs {
            self.refs.end_write(piece.key, copies.refs_done);
        }
        for piece in &copies.l2 {
            self.l2.end_write(piece.key, copies.l2_done);
        }
        if !copies.reftable_done {
            self.reftable_dirty.extend(copies.reftable.iter().map(|piece| piece.key));
        }
        if !copies.l1_done {
            self.l1_dirty.extend(copies.l1.iter().map(|piece| piece.key));
        }
        if ok {
            return copies.unlinked;
        }
        self.unlinked.extend(copies.unlinked);
        Vec::new()
    }
}
