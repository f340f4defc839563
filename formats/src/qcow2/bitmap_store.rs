//! Storing the bitmaps when an image is closed or becomes read-only, and bitmaps whose bits
//! somebody else has.
//!
//! Order: (1) nothing is in flight; (2) tables and data of every bitmap that is behind are written
//! to new places, with all its bits; (3) a directory without marks is made true (`bitmap_change`).
//! Whatever cannot be stored keeps its mark.

use std::cell::RefCell;
use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::format::KeptBitmap;

use super::bitmap_dir::{AUTO, IN_USE};
use super::bitmap_table::Change;
use super::bitmap_track::Bitmap;
use super::image::Image;

impl Bitmap {
    /// Whether the file is behind.
    fn is_behind(&self) -> bool {
        match &self.kept {
            Some(kept) => {
                let switched = kept.is_enabled() != self.stored.is_enabled();
                self.stored.is_in_use() || kept.is_changed() || switched
            }
            None => self.live.is_some(),
        }
    }
}

impl Image {
    /// See `StoredBitmaps::keep`. An inconsistent bitmap has nothing to be kept.
    pub(super) fn keep_bitmap(&self, name: &str, kept: Rc<dyn KeptBitmap>) {
        let mut bitmaps = self.bitmaps.borrow_mut();
        let found = bitmaps.list.iter_mut().find(|bitmap| bitmap.is_called(name));
        if let Some(bitmap) = found.filter(|bitmap| !bitmap.is_inconsistent()) {
            bitmap.kept = Some(kept);
            bitmap.live = None;
        }
        bitmaps.refresh();
    }

    /// Whether a bitmap changed since they were stored: one that goes on at this image may come
    /// while it is being settled.
    pub(super) fn has_late_bitmaps(&self) -> bool {
        let bitmaps = self.bitmaps.borrow();
        bitmaps.in_flight == 0
            && bitmaps.list.iter().any(|bitmap| bitmap.is_behind() && !bitmap.is_inconsistent())
    }

    /// Stores what was recorded and takes the marks away that bitmaps are in use. Nothing may be
    /// written afterwards, before the image is made writable again.
    pub(super) async fn store_bitmaps(self: &Rc<Self>) -> Result<()> {
        let _changes = self.bitmap_changes.lock().await;
        let mut list = {
            let bitmaps = self.bitmaps.borrow();
            let behind = bitmaps.list.iter().any(Bitmap::is_behind);
            let idle = !(behind || bitmaps.suspect) || bitmaps.in_flight > 0;
            if idle || !self.state.borrow().writable {
                return Ok(());
            }
            bitmaps.list.clone()
        };
        self.state.borrow().check_writable()?;
        list.iter_mut().for_each(|bitmap| bitmap.fresh = false);
        let mut change = Change::default();
        let mut kept = Vec::new();
        for bitmap in list.iter_mut().filter(|bitmap| bitmap.is_behind()) {
            match self.store_one(bitmap, &mut change).await {
                Ok(()) => {
                    bitmap.stored.flags &= !IN_USE;
                    kept.extend(bitmap.kept.clone());
                }
                Err(error) if error.kind() == liveblk_engine::ErrorKind::Corrupt => {
                    // It cannot be read, so it cannot be brought up to date: it stays marked.
                    tracing::warn!(%error, "a bitmap is inconsistent from now on");
                }
                Err(error) => {
                    self.undo(change);
                    return Err(error);
                }
            }
        }
        let result = self.conclude(Ok(list), change).await;
        if result.is_ok() {
            self.bitmaps.borrow_mut().suspect = false;
            kept.iter().for_each(|kept| kept.stored());
        }
        result
    }

    async fn store_one(self: &Rc<Self>, bitmap: &mut Bitmap, change: &mut Change) -> Result<()> {
        let stored = &mut bitmap.stored;
        let Some(kept) = &bitmap.kept else {
            let Some(live) = bitmap.live.take() else { return Ok(()) };
            return self.merged_table(stored, &live, change).await;
        };
        stored.flags = stored.flags & !AUTO | if kept.is_enabled() { AUTO } else { 0 };
        self.free_bitmap(stored, change).await;
        self.new_table(stored, &RefCell::new(kept.bits()), change).await
    }
}
