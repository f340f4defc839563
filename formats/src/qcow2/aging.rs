//! The option `cache-clean-interval`: cached tables that nobody used for so long leave memory.
//!
//! A task of the image wakes after each interval, as long as there is something in the caches, and
//! forgets the clean slices that were not used since it last woke; when none is left it ends, and
//! the next slice that is loaded or written out starts it again. Dirty slices and those that
//! pending writes need stay. The task keeps no image open.

use std::rc::Rc;

use liveblk_engine::executor::Class;

use super::image::Image;
use super::state::State;

const NANOS: u64 = 1_000_000_000;

impl Image {
    /// Sees to it that what was just loaded is forgotten some day.
    pub(super) fn watch_age(&self) {
        let (seconds, run) = (self.options.borrow().cache_clean, self.age_run.get());
        if seconds == 0 || self.aging.replace(true) {
            return;
        }
        let (core, me) = (self.core.clone(), self.me.clone());
        drop(self.core.spawn(Class::Background, async move {
            loop {
                core.sleep(seconds.saturating_mul(NANOS)).await;
                let Some(image) = me.upgrade().filter(|image| image.age_run.get() == run) else {
                    return;
                };
                if Rc::clone(&image).forget_unused() {
                    image.aging.set(false);
                    return;
                }
            }
        }));
    }

    /// The interval is another one from now on.
    pub(super) fn watch_age_anew(&self) {
        self.age_run.set(self.age_run.get() + 1);
        self.aging.set(false);
        self.watch_age();
    }

    /// Forgets what was not used since the last time; whether time alone will free nothing more.
    fn forget_unused(&self) -> bool {
        let mut state = self.state.borrow_mut();
        let State { l2, refs, pending, allocator, geometry, .. } = &mut *state;
        let entries = geometry.slice_entries();
        let tables = l2.forget_unused(|slice| {
            pending.range(slice * entries..(slice + 1) * entries).next().is_some()
        });
        let entries = geometry.ref_slice_entries();
        let counts = refs.forget_unused(|slice| State::reserves(&allocator.runs, slice, entries));
        !tables && !counts
    }
}
