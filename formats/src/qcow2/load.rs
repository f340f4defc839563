//! What requests missed, loaded by tasks of the image; one load per slice, others wait for it.

use std::rc::Rc;

use liveblk_engine::Result;

use super::image::Image;
use super::state::{Miss, State, Table};
use crate::reason::Reason;

impl Image {
    /// Loads or makes what `miss` names. Success means "ask again", not "it is there": it may have
    /// been taken by somebody else meanwhile.
    pub(super) async fn load(self: Rc<Self>, miss: Miss) -> Result<()> {
        match miss {
            Miss::Bitmaps => self.mark_in_use().await,
            Miss::L2Slice(slice) => self.load_once(miss, Self::read_l2_slice(&self, slice)).await,
            Miss::RefSlice(slice) => self.load_ref_slice(slice).await,
            Miss::L2Table(index) => {
                self.state.borrow().check_writable()?;
                let _growth = self.growth.lock().await;
                self.make_l2_table(index).await
            }
            Miss::Clusters(count) => {
                self.state.borrow().check_writable()?;
                let _growth = self.growth.lock().await;
                self.refill(count).await
            }
        }
    }

    /// Loads a slice of the refcounts, if it has a block and is not cached.
    pub(super) async fn load_ref_slice(self: &Rc<Self>, slice: u64) -> Result<()> {
        while !self.state.borrow().refs.contains(slice) {
            let covered = {
                let block = slice / self.geometry.block_slices();
                let host = self.state.borrow().block(block);
                self.judge(host)? != 0
            };
            if !covered {
                return Ok(());
            }
            self.load_once(Miss::RefSlice(slice), Self::read_ref_slice(self, slice)).await?;
        }
        Ok(())
    }

    /// Runs `load` unless the same load is running: then waits for that one.
    async fn load_once(&self, key: Miss, load: impl Future<Output = Result<()>>) -> Result<()> {
        if !self.state.borrow_mut().loading.insert(key) {
            self.loaded.until(|| !self.state.borrow().loading.contains(&key)).await;
            return Ok(());
        }
        let result = load.await;
        self.state.borrow_mut().loading.remove(&key);
        self.loaded.notify_all();
        result
    }

    async fn read_l2_slice(self: &Rc<Self>, slice: u64) -> Result<()> {
        let index = self.geometry.l1_of_slice(slice);
        let table = || match self.state.borrow().l2_table(index) {
            Ok(Table::Own(host) | Table::Shared(host)) => Some(host),
            _ => None,
        };
        let Some(host) = table() else { return Ok(()) };
        if self.state.borrow().l2.contains(slice) {
            return Ok(());
        }
        if host >= self.storage.size() {
            // A table is written before its entry is: this is a file that lost its end.
            return Err(self.error(Reason::Truncated("L2 table"), "read"));
        }
        let within = (slice % self.geometry.l2_slices()) * self.geometry.slice_bytes();
        let bytes = self.read_slice(host + within, self.geometry.slice_bytes()).await?;
        self.make_room(State::make_l2_room).await;
        // The table may have moved meanwhile; then the caller misses again. An image that became
        // writable while this was read has the slice already, maybe changed.
        if table() == Some(host) && !self.state.borrow().l2.contains(slice) {
            let mut state = self.state.borrow_mut();
            state.note_mapped(&bytes);
            state.l2.insert(slice, bytes);
        }
        Ok(())
    }

    async fn read_ref_slice(self: &Rc<Self>, slice: u64) -> Result<()> {
        let block = slice / self.geometry.block_slices();
        let host = self.state.borrow().block(block).unwrap_or(0);
        if host == 0 || self.state.borrow().refs.contains(slice) {
            return Ok(());
        }
        let within = (slice % self.geometry.block_slices()) * self.geometry.ref_slice_bytes();
        if host >= self.storage.size() {
            // As zeroes it would say that everything is free.
            return Err(self.error(Reason::Truncated("refcount block"), "read"));
        }
        let bytes = self.read_slice(host + within, self.geometry.ref_slice_bytes()).await?;
        self.make_room(State::make_ref_room).await;
        let mut state = self.state.borrow_mut();
        if !state.refs.contains(slice) {
            state.refs.insert(slice, bytes);
        }
        Ok(())
    }

    async fn read_slice(&self, offset: u64, bytes: u64) -> Result<Box<[u8]>> {
        self.watch_age();
        let len = usize::try_from(bytes).unwrap_or(0);
        let buf = self.core.pool().alloc(len);
        self.storage.read(offset, buf.clone()).await?;
        Ok(buf.to_vec().into_boxed_slice())
    }

    /// Evicts until one more slice fits; if all are dirty, writes them out first. If even that
    /// does not help (all are needed by writes in flight, or writing fails), goes on: reads of good
    /// data must not fail because of it.
    pub(super) async fn make_room(self: &Rc<Self>, room: fn(&mut State) -> bool) {
        if !room(&mut self.state.borrow_mut()) {
            if let Err(error) = Rc::clone(self).flush().await {
                tracing::debug!(%error, "no room in a metadata cache");
            }
            room(&mut self.state.borrow_mut());
        }
    }
}

impl State {
    /// Makes room for an L2 slice; those with pending clusters stay.
    pub(super) fn make_l2_room(&mut self) -> bool {
        let Self { l2, pending, geometry, .. } = self;
        let entries = geometry.slice_entries();
        l2.make_room(|slice| pending.range(slice * entries..(slice + 1) * entries).next().is_some())
    }

    /// Makes room for a refcount slice; those under reserved clusters stay.
    pub(super) fn make_ref_room(&mut self) -> bool {
        let Self { refs, allocator, geometry, .. } = self;
        let entries = geometry.ref_slice_entries();
        refs.make_room(|slice| Self::reserves(&allocator.runs, slice, entries))
    }
}
