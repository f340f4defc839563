//! Room ahead of the allocator: space at the end of the file, reserved before it is needed.
//!
//! A write into space that the file system has not allocated, or behind the end of the file, costs
//! a worker thread each time (with KEEP_SIZE or punched holes as well), so the file itself is made
//! longer by `fallocate` mode 0: an eighth of the file, at most [`ROOM_STEP_MAX`], and the next
//! step when half of the last one is used. It runs in the background and no write waits for it;
//! where it fails for want of space, or cannot be done, writes take exactly what they need as they
//! come.
//!
//! What lies behind the last counted cluster is nobody's: (1) it is cut off at close, when nothing
//! is in flight; (2) after a crash it is cut off by the next open for writing, but only if no block
//! counts it, no table lies there and it reads as zeroes; else it is left alone.

use std::cell::Cell;
use std::rc::Rc;

use liveblk_engine::executor::sync::Notify;
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::storage::Storage;
use liveblk_engine::{ErrorKind, Result};

use super::counts;
use super::image::Image;
use super::open::read;
use super::state::{Health, State};
use crate::limits::{ROOM_CUT_MAX, ROOM_SHARE, ROOM_STEP_MAX, TABLE_PIECE};

/// How far room was made.
#[derive(Debug)]
pub(super) struct Room {
    /// Whether room is made at all.
    wanted: bool,
    /// The file has space up to this byte.
    frontier: Cell<u64>,
    /// Bytes of the last step.
    step: Cell<u64>,
    /// No further step before the allocator's end is here (after a failure).
    not_before: Cell<u64>,
    running: Cell<bool>,
    ended: Notify,
}

impl Room {
    /// For an image in `storage`: on for files that are neither devices nor in memory.
    pub(super) fn new(core: &Core, storage: &Storage, wanted: bool) -> Self {
        Self {
            wanted: wanted && storage.gains_from_room(),
            frontier: Cell::new(storage.size()),
            step: Cell::new(0),
            not_before: Cell::new(0),
            running: Cell::new(false),
            ended: Notify::new(core),
        }
    }
}

impl State {
    /// The first byte behind everything that is counted or about to be.
    fn end_in_use(&self) -> u64 {
        let mut end = self.allocator.end;
        let last = |end: u64| {
            let mut runs = self.allocator.runs.iter().filter(|run| run.count > 0);
            runs.find(|run| run.start.0 + run.count == end).map(|run| run.start.0)
        };
        while let Some(start) = last(end) {
            end = start;
        }
        end << self.geometry.cluster_bits
    }
}

impl Image {
    /// Starts the next step, if half of the last one is used.
    pub(super) fn keep_room(self: &Rc<Self>) {
        let room = &self.room;
        let end = self.geometry.host(super::layout::HostCluster(self.state.borrow().allocator.end));
        if !room.wanted
            || room.running.get()
            || end < room.not_before.get()
            || end + room.step.get() / 2 < room.frontier.get()
        {
            return;
        }
        let cluster = self.geometry.cluster();
        let step = (end / ROOM_SHARE).min(ROOM_STEP_MAX).next_multiple_of(cluster);
        room.running.set(true);
        let image = Rc::clone(self);
        drop(self.core.spawn(Class::Background, async move {
            image.make_room_behind(end, step).await;
            image.room.running.set(false);
            image.room.ended.notify_all();
        }));
    }

    async fn make_room_behind(&self, end: u64, step: u64) {
        let room = &self.room;
        // What others cut off meanwhile has to be reserved again.
        let known = room.frontier.get().min(self.storage.size());
        // Where the allocator left a large gap, the gap stays one.
        let from = if end.saturating_sub(known) > ROOM_STEP_MAX { end } else { known };
        let to = room.frontier.get().max(end) + step;
        match self.storage.reserve(from, to.saturating_sub(from)).await {
            Ok(true) => {
                room.frontier.set(to);
                room.step.set(step);
            }
            // Cannot be done here: never again.
            Ok(false) => room.not_before.set(u64::MAX),
            Err(error) => {
                if error.kind() != ErrorKind::NoSpace {
                    tracing::debug!(%error, "no room was made ahead");
                }
                room.not_before.set(to);
            }
        }
    }

    /// Cuts off what was reserved and not used. Nothing is in flight any more.
    pub(super) async fn cut_room(&self) {
        let room = &self.room;
        room.ended.until(|| !room.running.get()).await;
        if !room.wanted || !matches!(self.state.borrow().health, Health::Good) {
            return;
        }
        let end = self.state.borrow().end_in_use();
        if room.frontier.get() > end && self.storage.size() > end {
            let cut = self.storage.truncate(end).await;
            if let Err(error) = cut {
                tracing::warn!(%error, "space that was reserved ahead stays reserved");
            }
        }
        room.frontier.set(self.storage.size());
        room.step.set(0);
    }

    /// Cuts off what a crash left behind the last cluster in use, and lets the allocator begin
    /// there.
    pub(super) async fn cut_left_room(&self) -> Result<()> {
        let size = self.storage.size();
        if !self.room.wanted {
            return Ok(());
        }
        let Some(end) = self.end_counted().await? else { return Ok(()) };
        if end >= size || size - end > ROOM_CUT_MAX {
            return Ok(());
        }
        if !self.is_zero(end, size - end).await? {
            return Ok(());
        }
        if self.storage.truncate(end).await.is_ok() {
            let mut state = self.state.borrow_mut();
            state.allocator.end = end >> self.geometry.cluster_bits;
        }
        self.room.frontier.set(self.storage.size());
        Ok(())
    }

    /// The first byte behind all clusters that a block counts and all tables; `None`: nobody knows.
    async fn end_counted(&self) -> Result<Option<u64>> {
        let geometry = self.geometry;
        let (blocks, tables) = {
            let state = self.state.borrow();
            if !matches!(state.health, Health::Good) || state.header.dirty() {
                return Ok(None);
            }
            let tables = state.metadata.last().map_or(1, |last| last + 1);
            let blocks = state.reftable.used().len() as u64;
            ((0..blocks).rev().find(|index| state.block(*index) != Ok(0)), tables)
        };
        let Some(index) = blocks else { return Ok(None) };
        let Ok(host) = self.state.borrow().block(index) else { return Ok(None) };
        let block = read(&self.core, &self.storage, host, geometry.cluster()).await?;
        let counted = (0..geometry.block_entries())
            .rev()
            .find(|entry| counts::get(&block, geometry.refcount_order, *entry) != 0);
        let Some(entry) = counted else { return Ok(None) };
        let end = index * geometry.block_entries() + entry + 1;
        Ok(end.max(tables).checked_mul(geometry.cluster()))
    }

    async fn is_zero(&self, offset: u64, len: u64) -> Result<bool> {
        let mut at = offset;
        for run in self.storage.extents(offset, len).await? {
            let end = at + run.len;
            while run.data && at < end {
                let part = (end - at).min(TABLE_PIECE as u64);
                let bytes = read(&self.core, &self.storage, at, part).await?;
                if bytes.iter().any(|byte| *byte != 0) {
                    return Ok(false);
                }
                at += part;
            }
            at = end;
        }
        Ok(true)
    }
}
