//! The size of what is copied, and who may change it when.
//!
//! Order of a growth, under the shape of the copy: target grown -> bitmaps here -> source grown. So
//! a write beyond the old end finds room for its dirty bit and for its bytes.

use std::rc::Rc;

use liveblk_engine::address::GuestRange;

use super::state::Copy;

/// The right to change the size, or to rely on it over an await.
#[must_use = "the size may change as soon as this is dropped"]
pub(crate) struct Shape(Rc<Copy>);

impl Copy {
    /// Waits for the shape.
    pub(crate) async fn hold_shape(self: &Rc<Self>) -> Shape {
        self.job.changed().until(|| !self.shape.replace(true)).await;
        Shape(Rc::clone(self))
    }
}

impl Shape {
    /// From now on writes up to `size` are followed, and nothing is copied until the growth ends.
    /// What is new is clean.
    pub(crate) fn begin_growth(&self, size: u64) {
        self.0.growing.set(true);
        self.resize(size);
    }

    /// The source has grown. In `stale` the target holds what the source does not.
    pub(crate) fn end_growth(&self, stale: GuestRange) {
        self.0.growing.set(false);
        self.0.mark(stale, false);
        self.0.job.changed().notify_all();
    }

    /// The source is what it was: `size` bytes.
    pub(crate) fn undo_growth(&self, size: u64) {
        self.resize(size);
        self.end_growth(GuestRange::new(size, 0));
    }

    fn resize(&self, size: u64) {
        let copy = &self.0;
        copy.size.set(size);
        copy.todo.borrow_mut().resize(size);
        copy.zero.borrow_mut().resize(size);
        for bits in [&copy.touched, &copy.pending, &copy.access] {
            if let Some(bits) = &mut *bits.borrow_mut() {
                bits.resize(size);
            }
        }
        copy.note_left();
    }
}

impl Drop for Shape {
    fn drop(&mut self) {
        self.0.shape.set(false);
        self.0.job.changed().notify_all();
    }
}
