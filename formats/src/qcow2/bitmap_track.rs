//! Recording writes in the enabled bitmaps of an open image.
//!
//! What was written since the image was opened is recorded apart from what the file holds, once per
//! granularity; both are put together when the bitmaps are stored. So opening an image reads no
//! bits, and memory grows with what is written, not with what the file claims. A bitmap whose bits
//! somebody else has ([`KeptBitmap`]) is not recorded here, only marked.
//!
//! Order: (1) a write that finds an enabled bitmap unmarked waits until the directory in the file
//! says, durably, that every enabled bitmap is in use (one flag each, set in place: whatever a cut
//! leaves of it is true); (2) the write goes on; (3) when it has ended, well or not, and before it
//! is answered, its range is recorded; (4) when the image is closed or becomes read-only, the
//! bitmaps are stored without the mark (`bitmap_change`).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::address::{GuestOffset, GuestRange};
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::format::{
    BitmapInfo, KeptBitmap, MissId, WriteGuard, WriteSeen, WriteStep, ZeroStep,
};

use super::bitmap_change::Prepared;
use super::bitmap_dir::{IN_USE, Parser, Pointer, Stored, flag_positions};
use super::extensions::BITMAPS;
use super::image::Image;
use super::layout::{Run, SECTOR};
use super::open::read;
use super::state::{Meta, Miss};
use crate::limits::TABLE_PIECE;

/// What is recorded and not stored yet; shared by bitmaps of one granularity that began together.
pub(super) type Live = Rc<RefCell<DirtyBitmap>>;

/// A bitmap of an open image.
#[derive(Clone, Debug)]
pub(super) struct Bitmap {
    pub(super) stored: Stored,
    /// Present while this image records in it; then the mark in the file is its own.
    pub(super) live: Option<Live>,
    /// Who has the bits and records, if it is not this image.
    pub(super) kept: Option<Rc<dyn KeptBitmap>>,
    /// Made since the bitmaps were stored: the newest of these comes first, as for the peer.
    pub(super) fresh: bool,
}

impl Bitmap {
    /// Whether nobody may trust the bits.
    pub(super) fn is_inconsistent(&self) -> bool {
        let ours = self.live.is_some() || self.kept.is_some();
        (self.stored.is_in_use() && !ours) || self.stored.is_foreign()
    }

    pub(super) fn is_called(&self, name: &str) -> bool {
        self.stored.name == name.as_bytes() || self.stored.text() == name
    }

    /// Whether writes are recorded.
    pub(super) fn is_enabled(&self) -> bool {
        self.kept.as_ref().map_or(self.stored.is_enabled(), |kept| kept.is_enabled())
    }

    /// Whether a write must not begin before the file says that the bitmap is in use.
    fn is_unmarked(&self) -> bool {
        self.is_enabled() && !self.stored.is_in_use()
    }
}

/// The bitmaps of an open image.
#[derive(Default)]
pub(super) struct Bitmaps {
    pub(super) list: Vec<Bitmap>,
    /// Where the directory is.
    pub(super) place: Option<Run>,
    /// Everything that records.
    recording: Vec<Live>,
    /// Some bitmap is enabled and not marked as in use.
    armed: bool,
    /// A change is being made that no write may begin in.
    held: bool,
    /// Writes that have begun and not ended.
    pub(super) in_flight: u64,
    /// A mark may or may not be in the file.
    pub(super) suspect: bool,
    /// The bitmaps for the size that the disk is about to have.
    pub(super) resizing: Option<Prepared>,
}

impl Bitmaps {
    /// The bitmap called `name` with its place in the list.
    pub(super) fn find(&self, name: &str) -> Option<(usize, &Bitmap)> {
        self.list.iter().enumerate().find(|(_, bitmap)| bitmap.is_called(name))
    }

    /// Brings what follows from the list up to date.
    pub(super) fn refresh(&mut self) {
        self.armed = self.list.iter().any(Bitmap::is_unmarked);
        self.recording.clear();
        for live in self.list.iter().filter_map(|bitmap| bitmap.live.as_ref()) {
            if !self.recording.iter().any(|known| Rc::ptr_eq(known, live)) {
                self.recording.push(Rc::clone(live));
            }
        }
    }

    /// What queries show.
    pub(super) fn infos(&self) -> Vec<BitmapInfo> {
        let info = |bitmap: &Bitmap| BitmapInfo {
            name: bitmap.stored.text(),
            granularity: bitmap.stored.granularity(),
            enabled: bitmap.is_enabled(),
            in_use: bitmap.stored.is_in_use(),
            inconsistent: bitmap.is_inconsistent(),
        };
        self.list.iter().map(info).collect()
    }

    fn record(&self, range: GuestRange) {
        for live in &self.recording {
            live.borrow_mut().set_range(range);
        }
    }
}

/// Why a write may not begin.
pub(super) enum Waits {
    /// The mark in the file is missing.
    Mark(MissId),
    /// A change is being made.
    Held,
}

/// Holds new writes back.
pub(super) struct Held<'a>(&'a Image);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.bitmaps.borrow_mut().held = false;
        self.0.pending_ended.notify_all();
    }
}

impl WriteSeen for Image {
    fn write_ended(&self, range: GuestRange) {
        let mut bitmaps = self.bitmaps.borrow_mut();
        bitmaps.in_flight = bitmaps.in_flight.saturating_sub(1);
        bitmaps.record(range);
    }
}

impl Image {
    /// Reads the directory, if the header says that it is valid.
    pub(super) async fn load_directory(&self) -> Result<()> {
        let (pointer, size) = {
            let state = self.state.borrow();
            let header = &state.header;
            let data = header.extensions.find(BITMAPS).filter(|_| header.bitmaps_valid());
            let Some(data) = data else {
                let mut bitmaps = self.bitmaps.borrow_mut();
                (bitmaps.list, bitmaps.place) = (Vec::new(), None);
                bitmaps.refresh();
                return Ok(());
            };
            (Pointer::parse(data, self.geometry), header.size)
        };
        let refuse = |reason| self.bitmap_error(reason, "open");
        let pointer = pointer.map_err(refuse)?;
        let mut parser = Parser::new(pointer, self.geometry, size);
        let (mut at, end) = (pointer.offset, pointer.offset + pointer.bytes);
        if end > self.storage.size() {
            return Err(refuse(super::bitmap_reason::BitmapReason::Broken));
        }
        while at < end {
            let len = (end - at).min(TABLE_PIECE as u64);
            let piece = read(&self.core, &self.storage, at, len).await?;
            parser.feed(&piece).map_err(refuse)?;
            at += len;
        }
        let list = parser.finish().map_err(refuse)?;
        let start = self.geometry.host_cluster(pointer.offset);
        let place = Run { start, count: self.geometry.clusters(pointer.bytes) };
        let mut bitmaps = self.bitmaps.borrow_mut();
        // Whoever has the bits goes on, also after a while of being read-only.
        let known = std::mem::take(&mut bitmaps.list);
        let bitmap = |stored: Stored| {
            let same = known.iter().find(|bitmap| bitmap.stored.name == stored.name);
            let kept = same.and_then(|bitmap| bitmap.kept.clone());
            let kept = kept.filter(|_| !stored.is_in_use() && !stored.is_foreign());
            Bitmap { stored, live: None, kept, fresh: false }
        };
        bitmaps.list = list.into_iter().map(bitmap).collect();
        bitmaps.place = Some(place);
        bitmaps.refresh();
        let mut state = self.state.borrow_mut();
        for cluster in place.clusters() {
            state.metadata.claim(cluster.0, Meta::Bitmaps);
        }
        Ok(())
    }

    /// What a write has to wait for before it may begin.
    ///
    /// The mark is never missing while a write is in flight, so a request that waits for it holds
    /// no piece back; a change may be on its way then, so whoever is held finishes its pieces
    /// first.
    pub(super) fn write_waits_for(&self) -> Result<Option<Waits>> {
        let waits = {
            let bitmaps = self.bitmaps.borrow();
            match (bitmaps.held, bitmaps.armed) {
                (true, _) => Some(Waits::Held),
                (false, true) => Some(Waits::Mark(Miss::Bitmaps.id())),
                (false, false) => None,
            }
        };
        if waits.is_some() {
            self.state.borrow().check_writable()?;
        }
        Ok(waits)
    }

    /// Whether no write may begin.
    pub(super) fn holds_writes(&self) -> bool {
        self.bitmaps.borrow().held
    }

    /// Sees to it that the write of `range` is recorded when it has ended.
    pub(super) fn watch_write(self: &Rc<Self>, range: GuestRange, step: WriteStep) -> WriteStep {
        let WriteStep::Ready(mut piece) = step else { return step };
        let range = GuestRange { len: piece.len.min(range.len), ..range };
        piece.guard = self.watched(piece.guard, range);
        WriteStep::Ready(piece)
    }

    /// The same for the whole cluster at `at`, which is written compressed.
    pub(super) fn watch_packed(self: &Rc<Self>, at: GuestOffset, step: WriteStep) -> WriteStep {
        let WriteStep::Ready(mut piece) = step else { return step };
        let range = GuestRange { start: at, len: self.geometry.cluster() };
        piece.guard = self.watched(piece.guard, range);
        WriteStep::Ready(piece)
    }

    /// The same for zeroing and discarding, whose steps may be done at once.
    pub(super) fn watch_zero(self: &Rc<Self>, range: GuestRange, step: ZeroStep) -> ZeroStep {
        match step {
            ZeroStep::Done { len } => {
                self.bitmaps.borrow().record(GuestRange { len, ..range });
                step
            }
            ZeroStep::Storage { len, host, guard } => {
                let guard = self.watched(guard, GuestRange { len, ..range });
                ZeroStep::Storage { len, host, guard }
            }
            step => step,
        }
    }

    /// A guard whose end is recorded.
    pub(super) fn watched(self: &Rc<Self>, guard: WriteGuard, range: GuestRange) -> WriteGuard {
        if self.geometry.version < 3 {
            return guard;
        }
        self.bitmaps.borrow_mut().in_flight += 1;
        let who: Rc<dyn WriteSeen> = Rc::<Self>::clone(self);
        guard.seen_by(who, range)
    }

    /// No write begins until the answer is dropped.
    pub(super) fn hold_writes(&self) -> Held<'_> {
        self.bitmaps.borrow_mut().held = true;
        Held(self)
    }

    /// For a bitmap that is being enabled: while writes are in flight it has to record them, and
    /// so be marked, at once; else the next write marks it.
    pub(super) fn start_recording(&self, enabled: bool, granularity: u64) -> Option<Live> {
        let busy = self.bitmaps.borrow().in_flight > 0;
        (enabled && busy).then(|| self.record_anew(granularity))
    }

    /// A new, clean record that takes part from now on.
    pub(super) fn record_anew(&self, granularity: u64) -> Live {
        let size = self.state.borrow().header.size;
        let live: Live = Rc::new(RefCell::new(DirtyBitmap::new(size, granularity)));
        self.bitmaps.borrow_mut().recording.push(Rc::clone(&live));
        live
    }

    /// Marks every enabled bitmap as in use, durably, and begins to record.
    pub(super) async fn mark_in_use(self: &Rc<Self>) -> Result<()> {
        self.mark_those(Bitmap::is_unmarked).await
    }

    /// The same for the bitmaps that `which` picks among those without a mark.
    pub(super) async fn mark_those(self: &Rc<Self>, which: impl Fn(&Bitmap) -> bool) -> Result<()> {
        let which = |bitmap: &Bitmap| !bitmap.stored.is_in_use() && which(bitmap);
        let _changes = self.bitmap_changes.lock().await;
        self.state.borrow().check_writable()?;
        let (marks, place) = {
            let bitmaps = self.bitmaps.borrow();
            let any = bitmaps.list.iter().any(which);
            let Some(place) = bitmaps.place.filter(|_| any) else { return Ok(()) };
            let positions = flag_positions(bitmaps.list.iter().map(|bitmap| &bitmap.stored));
            let mut marks: BTreeMap<u64, Vec<(usize, u32)>> = BTreeMap::new();
            for (bitmap, at) in bitmaps.list.iter().zip(positions) {
                if which(bitmap) {
                    let within = usize::try_from(at % SECTOR as u64).unwrap_or(0);
                    let flags = bitmap.stored.flags | IN_USE;
                    marks.entry(at - within as u64).or_default().push((within, flags));
                }
            }
            (marks, self.geometry.host(place.start))
        };
        let written = self.write_marks(place, marks).await;
        let mut bitmaps = self.bitmaps.borrow_mut();
        bitmaps.suspect |= written.is_err();
        written?;
        let size = self.state.borrow().header.size;
        let mut records: BTreeMap<u32, Live> = BTreeMap::new();
        for bitmap in bitmaps.list.iter_mut().filter(|bitmap| which(bitmap)) {
            let Bitmap { stored, live, kept, .. } = bitmap;
            stored.flags |= IN_USE;
            if !stored.is_foreign() && kept.is_none() {
                let record = records.entry(stored.granularity_bits).or_insert_with(|| {
                    Rc::new(RefCell::new(DirtyBitmap::new(size, stored.granularity())))
                });
                *live = Some(Rc::clone(record));
            }
        }
        bitmaps.refresh();
        Ok(())
    }

    async fn write_marks(&self, place: u64, marks: BTreeMap<u64, Vec<(usize, u32)>>) -> Result<()> {
        for (sector, flags) in marks {
            let buf = self.core.pool().zeroed(SECTOR);
            let at = place + sector;
            let there = self.storage.size().saturating_sub(at).min(SECTOR as u64);
            let there = usize::try_from(there).unwrap_or(SECTOR);
            self.storage.read(at, buf.slice(0..there)).await?;
            for (within, flags) in flags {
                buf.copy_from(within, &flags.to_be_bytes());
            }
            self.storage.write(at, buf, false).await?;
        }
        self.barrier().await
    }

    /// The records follow the size of the disk.
    pub(super) fn resize_records(&self, size: u64) {
        for live in &self.bitmaps.borrow().recording {
            live.borrow_mut().resize(size);
        }
    }
}
