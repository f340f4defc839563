//! Changes of the set of bitmaps, each durable and all or nothing.
//!
//! Order: (1) data, tables and the directory are written to new places; (2) a flush makes them and
//! the refcounts of their clusters durable; (3) one sector of the header changes to the new
//! directory (and has autoclear bit 0 set if there are bitmaps, clear if there are none); (4) it is
//! durable; (5) the old clusters are unlinked and freed as any others are. A failure before (3)
//! gives the new clusters back. One change at a time: `bitmap_changes` is held.

use std::cell::RefCell;
use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::format::KeptBitmap;

use super::bitmap_dir::{
    AUTO, IN_USE, Pointer, Stored, check_list, check_new, check_size, directory,
};
use super::bitmap_reason::BitmapReason;
use super::bitmap_table::Change;
use super::bitmap_track::Bitmap;
use super::extensions::{BITMAPS, Extension};
use super::header::Header;
use super::image::Image;
use super::layout::{AUTOCLEAR_BITMAPS, Run};
use super::state::{Health, Meta};
use crate::limits::TABLE_PIECE;

/// A set of bitmaps that is in the file, but that the header does not point to yet.
#[must_use = "finish or undo"]
pub(super) struct Prepared {
    list: Vec<Bitmap>,
    place: Option<Run>,
    pointer: Option<Pointer>,
    pub(super) change: Change,
}

impl Prepared {
    /// Whether a header points to the new directory.
    pub(super) fn is_applied(&self, header: &Header) -> bool {
        let data = self.pointer.as_ref().map(Pointer::data);
        header.extensions.find(BITMAPS) == data.as_deref()
    }

    /// Makes a header point to the new directory.
    pub(super) fn apply(&self, header: &mut Header) {
        let list = &mut header.extensions.list;
        let Some(pointer) = &self.pointer else {
            list.retain(|extension| extension.kind != BITMAPS);
            header.autoclear &= !AUTOCLEAR_BITMAPS;
            return;
        };
        header.autoclear |= AUTOCLEAR_BITMAPS;
        let data = pointer.data();
        match list.iter_mut().find(|extension| extension.kind == BITMAPS) {
            Some(extension) => extension.data = data,
            None => list.push(Extension { kind: BITMAPS, data }),
        }
    }
}

impl Image {
    /// Steps 1 to 5. On failure nothing has changed, or the image is poisoned.
    async fn publish(self: &Rc<Self>, list: Vec<Bitmap>, change: Change) -> Result<()> {
        let prepared = self.prepare(list, change).await?;
        let mut result = Rc::clone(self).flush().await;
        if result.is_ok() {
            result = self.update_header(|header| prepared.apply(header)).await;
        }
        match result {
            Ok(()) => {
                self.finish_bitmaps(prepared).await;
                Ok(())
            }
            Err(error) => {
                self.give_up(prepared);
                Err(error)
            }
        }
    }

    /// Step 1 for the directory.
    pub(super) async fn prepare(
        self: &Rc<Self>,
        list: Vec<Bitmap>,
        mut change: Change,
    ) -> Result<Prepared> {
        match self.write_directory(&list, &mut change).await {
            Ok((place, pointer)) => Ok(Prepared { list, place, pointer, change }),
            Err(error) => {
                self.undo(change);
                Err(error)
            }
        }
    }

    async fn write_directory(
        self: &Rc<Self>,
        list: &[Bitmap],
        change: &mut Change,
    ) -> Result<(Option<Run>, Option<Pointer>)> {
        change.freed.extend(self.bitmaps.borrow().place);
        let entries = || list.iter().map(|bitmap| &bitmap.stored);
        check_list(entries()).map_err(|reason| self.bitmap_error(reason, "store bitmaps"))?;
        if list.is_empty() {
            return Ok((None, None));
        }
        let bytes = directory(entries());
        let run = self.some_clusters(bytes.len() as u64, change).await?;
        let offset = self.geometry.host(run.start);
        for (at, piece) in (offset..).step_by(TABLE_PIECE).zip(bytes.chunks(TABLE_PIECE)) {
            self.write_bytes(at, piece).await?;
        }
        let count = u32::try_from(list.len()).unwrap_or(0);
        let pointer = Pointer { count, bytes: bytes.len() as u64, offset };
        Ok((Some(run), Some(pointer)))
    }

    /// Step 5: the header points to the new directory, durably.
    pub(super) async fn finish_bitmaps(self: &Rc<Self>, prepared: Prepared) {
        let old = {
            let mut bitmaps = self.bitmaps.borrow_mut();
            bitmaps.list = prepared.list;
            bitmaps.refresh();
            std::mem::replace(&mut bitmaps.place, prepared.place)
        };
        {
            let mut state = self.state.borrow_mut();
            for cluster in old.into_iter().flat_map(Run::clusters) {
                state.metadata.remove(cluster.0);
            }
            for cluster in prepared.place.into_iter().flat_map(Run::clusters) {
                state.metadata.insert(cluster.0, Meta::Bitmaps);
            }
        }
        self.release(prepared.change.freed).await;
    }

    /// The header could not be changed: if that is sure, the new clusters are given back.
    pub(super) fn give_up(&self, prepared: Prepared) {
        let known = matches!(self.state.borrow().health, Health::Good);
        if known {
            self.undo(prepared.change);
        }
    }

    /// Ends a change: `list` is what it wants the bitmaps to be.
    pub(super) async fn conclude(
        self: &Rc<Self>,
        list: Result<Vec<Bitmap>>,
        change: Change,
    ) -> Result<()> {
        let result = match list {
            Ok(list) => self.publish(list, change).await,
            Err(error) => {
                self.undo(change);
                Err(error)
            }
        };
        // Bitmaps that began to record for a change that failed stop.
        self.bitmaps.borrow_mut().refresh();
        result
    }

    fn check_changeable(&self) -> Result<()> {
        self.state.borrow().check_writable()?;
        if self.geometry.version < 3 {
            return Err(self.bitmap_error(BitmapReason::Version2, "change bitmaps"));
        }
        Ok(())
    }

    /// The bitmap called `name` and its place in the list, if it can be used.
    fn usable(&self, name: &str) -> Result<(usize, Bitmap)> {
        let bitmaps = self.bitmaps.borrow();
        let refuse = |reason| Err(self.bitmap_error(reason, "use a bitmap"));
        match bitmaps.find(name) {
            None => refuse(BitmapReason::NotFound(name.to_owned())),
            Some((_, bitmap)) if bitmap.is_inconsistent() => {
                refuse(BitmapReason::Inconsistent(name.to_owned()))
            }
            Some((_, bitmap)) if bitmap.kept.is_some() => {
                refuse(BitmapReason::Kept(name.to_owned()))
            }
            Some((at, bitmap)) => Ok((at, bitmap.clone())),
        }
    }

    fn list_with(&self, at: Option<usize>, bitmap: Bitmap) -> Vec<Bitmap> {
        let mut list = self.bitmaps.borrow().list.clone();
        match at.and_then(|at| list.get_mut(at)) {
            Some(known) => *known = bitmap,
            None => {
                let before = list.iter().position(|known| known.fresh && bitmap.fresh);
                list.insert(before.unwrap_or(list.len()), bitmap);
            }
        }
        list
    }

    /// The bits of a bitmap with everything recorded so far.
    pub(super) async fn load_bitmap(self: Rc<Self>, name: String) -> Result<DirtyBitmap> {
        let _changes = self.bitmap_changes.lock().await;
        let (_, bitmap) = self.usable(&name)?;
        let mut bits = self.stored_bits(&bitmap.stored).await?;
        if let Some(live) = &bitmap.live {
            bits.merge(&live.borrow());
        }
        Ok(bits)
    }

    /// Makes a bitmap: a clean one that must be new, or one with `bits` that may replace another.
    pub(super) async fn put_bitmap(
        self: Rc<Self>,
        name: String,
        bits: Option<DirtyBitmap>,
        granularity: u64,
        enabled: bool,
        kept: Option<Rc<dyn KeptBitmap>>,
    ) -> Result<()> {
        let _changes = self.bitmap_changes.lock().await;
        self.check_changeable()?;
        let refuse = |reason| self.bitmap_error(reason, "add a bitmap");
        let granularity_bits = check_new(&name, granularity).map_err(refuse)?;
        let size = self.state.borrow().header.size;
        check_size(self.geometry, size, granularity_bits).map_err(refuse)?;
        let old = self.bitmaps.borrow().find(&name).map(|(at, bitmap)| (at, bitmap.clone()));
        let new = bits.is_none();
        let bits = bits.unwrap_or_else(|| DirtyBitmap::new(size, granularity));
        if bits.size() != size {
            return Err(refuse(BitmapReason::Sizes(size, bits.size())));
        }
        if old.is_some() {
            if new {
                return Err(refuse(BitmapReason::Exists(name)));
            }
            self.usable(&name)?;
        }
        // No write begins before the file says whether the bitmap is in use.
        let _held = self.hold_writes();
        let live = self.start_recording(enabled && kept.is_none(), granularity);
        let fresh = kept.is_some();
        let marked = live.is_some() || fresh;
        let flags = if enabled { AUTO } else { 0 } | if marked { IN_USE } else { 0 };
        let mut stored = Stored {
            name: name.into_bytes(),
            flags,
            granularity_bits,
            table: 0,
            entries: 0,
            extra: Vec::new(),
        };
        let mut change = Change::default();
        if let Some((_, old)) = &old {
            self.free_bitmap(&old.stored, &mut change).await;
        }
        let built = self.new_table(&mut stored, &RefCell::new(bits), &mut change).await;
        let at = old.map(|(at, _)| at);
        let list = built.map(|()| self.list_with(at, Bitmap { stored, live, kept, fresh }));
        self.conclude(list, change).await
    }

    /// Removes a bitmap, whatever state it is in.
    pub(super) async fn remove_bitmap(self: Rc<Self>, name: String) -> Result<()> {
        let _changes = self.bitmap_changes.lock().await;
        self.state.borrow().check_writable()?;
        let found = self.bitmaps.borrow().find(&name).map(|(at, bitmap)| (at, bitmap.clone()));
        let Some((at, bitmap)) = found else {
            return Err(self.bitmap_error(BitmapReason::NotFound(name), "remove a bitmap"));
        };
        let mut change = Change::default();
        self.free_bitmap(&bitmap.stored, &mut change).await;
        let mut list = self.bitmaps.borrow().list.clone();
        list.remove(at);
        self.conclude(Ok(list), change).await
    }

    /// Clears all bits.
    pub(super) async fn clear_bitmap(self: Rc<Self>, name: String) -> Result<()> {
        let _changes = self.bitmap_changes.lock().await;
        self.check_changeable()?;
        let (at, Bitmap { mut stored, live, .. }) = self.usable(&name)?;
        // What ends from now on is recorded anew; the old record goes on until this is durable.
        let live = live.map(|_| self.record_anew(stored.granularity()));
        let size = self.state.borrow().header.size;
        let bits = RefCell::new(DirtyBitmap::new(size, stored.granularity()));
        let mut change = Change::default();
        self.free_bitmap(&stored, &mut change).await;
        let built = self.new_table(&mut stored, &bits, &mut change).await;
        let list = built
            .map(|()| self.list_with(Some(at), Bitmap { stored, live, kept: None, fresh: false }));
        self.conclude(list, change).await
    }

    /// Starts or stops recording.
    pub(super) async fn enable_bitmap(self: Rc<Self>, name: String, enabled: bool) -> Result<()> {
        let _changes = self.bitmap_changes.lock().await;
        self.check_changeable()?;
        let (at, Bitmap { mut stored, live, .. }) = self.usable(&name)?;
        if stored.is_enabled() == enabled {
            return Ok(());
        }
        let mut change = Change::default();
        if enabled {
            let _held = self.hold_writes();
            let live = self.start_recording(true, stored.granularity());
            stored.flags |= AUTO | if live.is_some() { IN_USE } else { 0 };
            let list = self.list_with(Some(at), Bitmap { stored, live, kept: None, fresh: false });
            return self.conclude(Ok(list), change).await;
        }
        let built = match &live {
            Some(live) => self.merged_table(&mut stored, live, &mut change).await,
            None => Ok(()),
        };
        stored.flags &= !(AUTO | IN_USE);
        let list = built.map(|()| {
            self.list_with(Some(at), Bitmap { stored, live: None, kept: None, fresh: false })
        });
        self.conclude(list, change).await
    }

    /// Adds the bits of another bitmap.
    pub(super) async fn merge_bitmap(
        self: Rc<Self>,
        name: String,
        source: DirtyBitmap,
    ) -> Result<()> {
        let _changes = self.bitmap_changes.lock().await;
        self.check_changeable()?;
        let (at, Bitmap { mut stored, live, .. }) = self.usable(&name)?;
        let size = self.state.borrow().header.size;
        if source.size() != size {
            let reason = BitmapReason::Sizes(size, source.size());
            return Err(self.bitmap_error(reason, "merge bitmaps"));
        }
        let bits = if source.granularity() == stored.granularity() {
            source
        } else {
            let mut bits = DirtyBitmap::new(size, stored.granularity());
            bits.merge(&source);
            bits
        };
        let mut change = Change::default();
        let built = self.merged_table(&mut stored, &RefCell::new(bits), &mut change).await;
        let list = built
            .map(|()| self.list_with(Some(at), Bitmap { stored, live, kept: None, fresh: false }));
        self.conclude(list, change).await
    }
}
