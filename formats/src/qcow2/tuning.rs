//! Options that change while the image is open.
//!
//! All options are checked as at opening, and take effect at once: where freed space goes, which
//! metadata is guarded against overlaps, the sizes of the caches and when unused tables leave them.
//! `l2-cache-entry-size` stays what the image was opened with: it decides how much of a table is
//! read at a time, never a result. `lazy-refcounts` changes nothing: refcounts are never late.

use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::executor::Class;
use liveblk_engine::format::{Applied, FormatOptions, RuntimeOptions};

use super::datafile::DataPlace;
use super::image::Image;
use super::open::cache_slices;
use super::options::{OptionFault, Options};
use super::state::State;
use crate::reason::Reason;

/// See the module.
pub(super) struct Tuning(pub(super) Rc<Image>);

impl RuntimeOptions for Tuning {
    fn prepare(&self, given: &FormatOptions, discard_unmap: bool) -> Result<Applied> {
        let image = Rc::clone(&self.0);
        let name = image.filename.to_string_lossy().into_owned();
        let refuse = |fault: OptionFault| Reason::Option(fault).error("change options").on(&name);
        let room_ahead = image.options.borrow().room_ahead;
        let options = Options { discard_unmap, room_ahead, ..Options::default() };
        let options = options.with(given).map_err(refuse)?;
        options.check(image.geometry.version, image.geometry.cluster()).map_err(refuse)?;
        Ok(Box::new(move || image.retune(options)))
    }
}

impl Image {
    /// From now on these are the options.
    fn retune(self: &Rc<Self>, options: Options) {
        {
            let state = &mut *self.state.borrow_mut();
            state.overlap = options.overlap;
            state.passes = options.passes();
            state.no_unref = options.no_unref;
            state.data_place = DataPlace::of(&state.header, options.discard_unmap);
            state.set_cache_sizes(options.l2_cache, options.refcount_cache);
        }
        let guards = options.overlap.guards_inactive_l2();
        let ages = options.cache_clean != self.options.borrow().cache_clean;
        self.options.replace(options);
        if ages {
            self.watch_age_anew();
        }
        if guards && self.state.borrow().writable {
            let image = Rc::clone(self);
            let learn = async move { image.guard_snapshots().await };
            drop(self.core.spawn(Class::Background, learn));
        }
    }
}

impl State {
    /// Changes what both caches may hold, in bytes; slices that pending writes need stay.
    fn set_cache_sizes(&mut self, tables: u64, counts: u64) {
        let Self { l2, refs, pending, allocator, geometry, .. } = self;
        let entries = geometry.slice_entries();
        l2.set_capacity(cache_slices(tables, geometry.slice_bytes()), |slice| {
            pending.range(slice * entries..(slice + 1) * entries).next().is_some()
        });
        let entries = geometry.ref_slice_entries();
        refs.set_capacity(cache_slices(counts, geometry.ref_slice_bytes()), |slice| {
            Self::reserves(&allocator.runs, slice, entries)
        });
    }
}
