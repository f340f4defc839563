//! The use of a bitmap by a job or an export: it is busy, and may be frozen.
//!
//! Order of a backup that uses one: (1) `Node::hold_bitmap` when it is prepared: from then on
//! nobody else changes the bitmap; (2) [`BitmapHold::freeze`] inside the cut that is its point in
//! time: writes after it go to a successor; (3) it copies what [`BitmapHold::view`] shows;
//! (4) the target is durable; (5) [`BitmapHold::abdicate`] (what was copied is forgotten, the
//! successor takes over), [`BitmapHold::abdicate_except`] (so it is, but for what was not copied)
//! or [`BitmapHold::reclaim`] (as if there had been no backup). Dropping a hold reclaims.

use std::rc::{Rc, Weak};

use super::bitmaps::{BitmapAccess, NodeBitmap};
use super::object::Node;
use crate::bitmap::DirtyBitmap;
use crate::error::Result;

/// A bitmap that somebody uses; nobody else can until this ends.
#[derive(Debug)]
#[must_use = "dropping it ends the use"]
pub struct BitmapHold {
    bitmap: Rc<NodeBitmap>,
    node: Weak<Node>,
}

impl Node {
    /// Uses the bitmap called `name`, as `by` (shown in messages), for reading or for a change at
    /// the end.
    ///
    /// # Errors
    /// `NotFound`, `Busy`, `ReadOnly` (for a change), or that it is inconsistent.
    pub fn hold_bitmap(
        self: &Rc<Self>,
        name: &str,
        by: &str,
        access: BitmapAccess,
    ) -> Result<BitmapHold> {
        let bitmap = self.bitmap(name)?;
        self.check_bitmap(&bitmap, access)?;
        bitmap.set_busy(by);
        Ok(BitmapHold { bitmap, node: Rc::downgrade(self) })
    }
}

impl BitmapHold {
    /// The bitmap.
    pub fn bitmap(&self) -> &Rc<NodeBitmap> {
        &self.bitmap
    }

    /// Looks at the bits: of a frozen bitmap those of the instant it was frozen, else those of now.
    pub fn view<R>(&self, look: impl FnOnce(&DirtyBitmap) -> R) -> R {
        self.bitmap.view(look)
    }

    /// From now on writes are recorded in a successor (if the bitmap records at all). Once, inside
    /// a cut of the node.
    ///
    /// # Panics
    /// If it is frozen already.
    pub fn freeze(&self) {
        self.bitmap.freeze();
    }

    /// The bitmap is what its successor recorded; what it held is forgotten.
    pub fn abdicate(self) {
        let none = self.bitmap.view(|bits| DirtyBitmap::new(bits.size(), bits.granularity()));
        self.abdicate_except(&none);
    }

    /// The same, but the bits of `left` stay, too: they were not dealt with. Granularities may
    /// differ.
    pub fn abdicate_except(self, left: &DirtyBitmap) {
        self.bitmap.release(Some(left));
        if let Some(node) = self.node.upgrade() {
            // As for the peer, it is the successor that goes on.
            node.bitmaps.renew(&self.bitmap);
        }
    }

    /// The bitmap is what it was and what its successor recorded.
    pub fn reclaim(self) {
        drop(self);
    }
}

impl Drop for BitmapHold {
    fn drop(&mut self) {
        // After an abdication this changes nothing.
        self.bitmap.release(None);
    }
}
