//! A user's bitmap beside the copies: what it makes dirty, and what of it has reached the target.

use liveblk_engine::address::GuestRange;
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::executor::sync::{Either, select};

use super::state::Copy;
use crate::bitmap_use::BitmapUse;
use crate::error::{JobError, Result};
use crate::limits::BITMAP_FLUSH_WAIT_NS;
use crate::spec::BitmapMode;

impl Copy {
    /// The copy begins with what the bitmap names, or (`all`) with everything. Inside the cut of
    /// the start, before any copy.
    pub(crate) fn begin_with(&self, bitmap: &BitmapUse, all: bool) {
        if !all {
            bitmap.view(|bits| self.restrict_to(bits));
        }
        if bitmap.mode() == BitmapMode::Always {
            self.pending.replace(Some(self.todo.borrow().clone()));
        }
    }

    /// Adds what the bitmap names to what is to be copied.
    pub(crate) fn add_from(&self, bits: &DirtyBitmap) {
        self.todo.borrow_mut().merge(bits);
        self.note_left();
    }

    /// `range` is in the target (not yet on its disk).
    pub(super) fn note_landed(&self, range: GuestRange) {
        if let Some(pending) = &mut *self.pending.borrow_mut() {
            pending.clear_range(range);
        }
    }

    /// The work is over: in mode always the bitmap learns what of it is durable in the target, also
    /// after a failure. A target that hangs is not waited for; then nothing is given up.
    pub(crate) async fn settle_bitmap(&self, result: &Result<()>) {
        let (Some(bitmap), Some(left)) = (self.job.bitmap(), self.pending.borrow().clone()) else {
            return;
        };
        let failed: Option<&JobError> = result.as_ref().err();
        if failed.is_some() {
            let flush = self.target.flush(self.origin());
            match select(flush, self.job.core().sleep(BITMAP_FLUSH_WAIT_NS)).await {
                Either::First(Ok(())) => {}
                Either::First(Err(_)) | Either::Second(()) => return,
            }
        }
        bitmap.durable_except(left);
    }
}
