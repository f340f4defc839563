//! Bitmaps of a disk whose size changes.
//!
//! Order: (1) tables for the new size and a directory are written to new places and made durable;
//! (2) the sector of the header that changes the size also changes to that directory: at any cut
//! the bitmaps fit the size; (3) the old ones are freed. What is added to a disk is clean; what is
//! cut off is forgotten.

use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::format::Resize;

use super::bitmap_change::Prepared;
use super::bitmap_reason::BitmapReason;
use super::bitmap_table::Change;
use super::header::Header;
use super::image::Image;

impl Image {
    /// See `Format::resize_with`; the size itself is changed by `resize`.
    pub(super) async fn resize_with_bitmaps(self: Rc<Self>, to: Resize) -> Result<()> {
        let _changes = self.bitmap_changes.lock().await;
        self.state.borrow().check_writable()?;
        let (old, size) = (self.state.borrow().header.size, to.size);
        let prepared = self.prepare_bitmaps_for(size).await?;
        if prepared.is_some()
            && let Err(error) = Rc::clone(&self).flush().await
        {
            prepared.into_iter().for_each(|prepared| self.give_up(prepared));
            return Err(error);
        }
        // A write behind the old end may end before this function goes on after the change.
        self.resize_records(old.max(size));
        self.bitmaps.borrow_mut().resizing = prepared;
        let result = Rc::clone(&self).resize(to).await;
        let now = self.state.borrow().header.size;
        self.resize_records(now);
        let Some(prepared) = self.bitmaps.borrow_mut().resizing.take() else { return result };
        if prepared.is_applied(&self.state.borrow().header) {
            self.finish_bitmaps(prepared).await;
        } else {
            self.give_up(prepared);
        }
        result
    }

    /// For the header change that makes a new size true: the bitmaps follow.
    pub(super) fn apply_bitmaps(&self, header: &mut Header) {
        if let Some(prepared) = &self.bitmaps.borrow().resizing {
            prepared.apply(header);
        }
    }

    /// Writes the bitmaps for a disk of `size` bytes; `None` if they are right as they are.
    async fn prepare_bitmaps_for(self: &Rc<Self>, size: u64) -> Result<Option<Prepared>> {
        let mut list = self.bitmaps.borrow().list.clone();
        if let Some(bitmap) = list.iter().find(|bitmap| bitmap.is_inconsistent()) {
            let reason = BitmapReason::Inconsistent(bitmap.stored.text());
            return Err(self.bitmap_error(reason, "resize"));
        }
        let mut change = Change::default();
        let mut changed = false;
        for bitmap in &mut list {
            match self.resized_table(&mut bitmap.stored, size, &mut change).await {
                Ok(one) => changed |= one,
                Err(error) => {
                    self.undo(change);
                    return Err(error);
                }
            }
        }
        if !changed {
            self.undo(change);
            return Ok(None);
        }
        self.prepare(list, change).await.map(Some)
    }
}
