//! An open qcow2 image: the engine's `Format` over the parts in the other modules.
//!
//! Everything that needs I/O runs as a task of the image, so a caller that goes away stops nothing
//! half-way.

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::{Rc, Weak};

use liveblk_engine::address::{GuestOffset, GuestRange};
use liveblk_engine::buf::Buf;
use liveblk_engine::executor::sync::{Mutex, Notify, Semaphore};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::format::{
    Abilities, BackingRef, CompressedWrites, Extents, Format, ImageInfo, InfoValue,
    InternalSnapshots, LocalFuture, MissId, PackedCluster, Resize, WriteStep, ZeroMode, ZeroStep,
};
use liveblk_engine::lease::{Epochs, Lease};
use liveblk_engine::storage::Storage;
use liveblk_engine::{Error, ErrorKind, Result};

use super::bitmap_api::Handle;
use super::bitmap_track::{Bitmaps, Waits};
use super::layout::{AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW, Geometry, INCOMPATIBLE_CORRUPT};
use super::open::{load_state, read_header, repair_dirty};
use super::options::Options;
use super::pack::Packer;
use super::room::Room;
use super::snapshot::Snapshots;
use super::snapshot_view::Views;
use super::state::{Health, Miss, State};
use super::tuning::Tuning;
use crate::limits::SETTLE_TRIES;
use crate::reason::Reason;

/// An open image.
pub(super) struct Image {
    /// The image itself, for tasks that it starts.
    pub(super) me: Weak<Self>,
    pub(super) core: Core,
    pub(super) storage: Storage,
    /// The external data file.
    pub(super) data: Option<Storage>,
    pub(super) filename: PathBuf,
    pub(super) geometry: Geometry,
    /// What `blockdev-reopen` can change of it.
    pub(super) options: RefCell<Options>,
    pub(super) epochs: Rc<Epochs>,
    pub(super) state: RefCell<State>,
    /// Held while clusters are searched and tables are made. Taken before `tables`.
    pub(super) growth: Mutex<()>,
    /// Held while metadata is written out or tables move. Taken before `header_writes`.
    pub(super) tables: Mutex<()>,
    /// Held while clusters are freed. Taken after `growth`.
    pub(super) frees: Mutex<()>,
    /// Held while the header is read, changed and written.
    pub(super) header_writes: Mutex<()>,
    /// Held while the set of bitmaps changes. Taken before `growth`.
    pub(super) bitmap_changes: Mutex<()>,
    pub(super) bitmaps: RefCell<Bitmaps>,
    pub(super) pending_ended: Notify,
    pub(super) loaded: Notify,
    pub(super) flushed: Notify,
    /// Runs of `reclaim` that have not ended.
    pub(super) reclaims: Cell<u32>,
    /// A cluster was unpacked, or cannot be.
    pub(super) unpacked: Notify,
    /// Clusters that may be packed or unpacked at a time.
    pub(super) packing: Semaphore,
    /// Space reserved ahead of the allocator.
    pub(super) room: Room,
    /// Whether the mapping was made ahead of the data, once it is known.
    pub(super) mapped_ahead: Cell<Option<bool>>,
    /// Snapshots that are open to be read.
    pub(super) views: Views,
    /// A task waits for cached tables to become old.
    pub(super) aging: Cell<bool>,
    /// Counts changes of how long that is; a task of an earlier count ends.
    pub(super) age_run: Cell<u64>,
}

/// The handle that the engine holds.
pub(super) struct Qcow2(pub(super) Rc<Image>);

impl Image {
    /// Stops all writes because metadata contradicts itself, and sets the corrupt bit.
    pub(super) fn mark_corrupt(self: &Rc<Self>, reason: &Reason) {
        {
            let mut state = self.state.borrow_mut();
            if !state.writable || !matches!(state.health, Health::Good) {
                return;
            }
            tracing::error!(image = %self.filename.display(), %reason, "marking image corrupt");
            state.health = Health::Corrupt(self.error(reason.clone(), "write"));
        }
        if self.geometry.version < 3 {
            return;
        }
        let image = Rc::clone(self);
        drop(self.core.spawn(Class::Background, async move {
            let set = |header: &mut super::header::Header| {
                header.incompatible |= INCOMPATIBLE_CORRUPT;
            };
            if let Err(error) = image.update_header(set).await {
                tracing::warn!(%error, "the corrupt bit could not be written");
            }
        }));
    }

    /// The engine error for `reason`, naming this image.
    pub(super) fn error(&self, reason: Reason, op: &'static str) -> Error {
        reason.error(op).on(&self.filename.to_string_lossy())
    }

    /// Turns the outcome of a synchronous step into the caller's answer; contradictions in the
    /// metadata mark the image corrupt.
    pub(super) fn judge<T>(self: &Rc<Self>, outcome: Result<T, Reason>) -> Result<T> {
        outcome.map_err(|reason| {
            if reason.kind() == ErrorKind::Corrupt {
                self.mark_corrupt(&reason);
            }
            self.error(reason, "write")
        })
    }

    /// Starts a flush if so much is dirty that the caches could fill up.
    pub(super) fn wake_flusher(&self) {
        if let Some(image) = self.me.upgrade() {
            image.flush_if_much_is_dirty();
        }
    }

    fn flush_if_much_is_dirty(self: &Rc<Self>) {
        {
            let mut state = self.state.borrow_mut();
            if !state.wants_flush() {
                return;
            }
            state.flushes.own = true;
        }
        let image = Rc::clone(self);
        drop(self.core.spawn(Class::Background, async move {
            if let Err(error) = Rc::clone(&image).flush().await {
                tracing::warn!(%error, "metadata could not be written out");
            }
            image.state.borrow_mut().flushes.own = false;
        }));
    }

    /// What a write at `at` waits at.
    pub(super) fn place_of(&self, at: GuestOffset) -> MissId {
        MissId(at.bytes() >> self.geometry.cluster_bits)
    }

    /// Runs `future` as a task of the image and waits for it.
    pub(super) fn run<T: 'static>(
        &self,
        future: impl Future<Output = T> + 'static,
    ) -> LocalFuture<'static, T> {
        let task = self.core.spawn(Class::Guest, future);
        Box::pin(task)
    }

    async fn settle(self: Rc<Self>) -> Result<()> {
        let stored = self.store_bitmaps().await;
        // Freed clusters become counted as free only after a flush, which makes counts dirty.
        for _ in 0..3 {
            Rc::clone(&self).flush().await?;
            Rc::clone(&self).reclaim_all().await;
            let state = self.state.borrow();
            if state.is_clean() {
                return stored;
            }
        }
        self.flush().await.and(stored)
    }
}

impl Format for Qcow2 {
    fn driver(&self) -> &'static str {
        "qcow2"
    }

    fn size(&self) -> u64 {
        self.0.state.borrow().header.size
    }

    fn cluster_size(&self) -> u64 {
        self.0.geometry.cluster()
    }

    fn subcluster_size(&self) -> u64 {
        self.0.geometry.subcluster()
    }

    fn abilities(&self) -> Abilities {
        // What lies in another file lies there as it is.
        let external = self.0.geometry.external;
        let packer = || -> Rc<dyn CompressedWrites> { Rc::new(Packer(Rc::clone(&self.0))) };
        let snapshots: Rc<dyn InternalSnapshots> = Rc::new(Snapshots(Rc::clone(&self.0)));
        Abilities {
            compress: (!external).then(packer),
            snapshots: Some(snapshots),
            options: Some(Rc::new(Tuning(Rc::clone(&self.0)))),
            bitmaps: Some(Rc::new(Handle(Rc::clone(&self.0)))),
        }
    }

    fn data_storage(&self) -> &Storage {
        self.0.data_storage()
    }

    fn resolve(&self, range: GuestRange, extents: &mut Extents) -> Option<Lease> {
        self.0.resolve(range, extents);
        Some(self.0.epochs.lease())
    }

    fn lease(&self) -> Option<Lease> {
        Some(self.0.epochs.lease())
    }

    fn load(&self, miss: MissId) -> LocalFuture<'_, Result<()>> {
        let image = Rc::clone(&self.0);
        match Miss::of(miss) {
            Some(miss) => self.0.run(image.load(miss)),
            None => Box::pin(async { Ok(()) }),
        }
    }

    fn has_holes(&self) -> LocalFuture<'_, Result<bool>> {
        let image = Rc::clone(&self.0);
        Box::pin(async move { image.is_mapped_ahead().await })
    }

    fn read_compressed(&self, packed: PackedCluster) -> LocalFuture<'static, Result<Buf>> {
        self.0.run(Rc::clone(&self.0).read_packed(packed))
    }

    fn begin_write(&self, range: GuestRange) -> Result<WriteStep> {
        match self.0.write_waits_for()? {
            Some(Waits::Mark(miss)) => return Ok(WriteStep::Miss(miss)),
            Some(Waits::Held) => return Ok(WriteStep::Wait(self.0.place_of(range.start))),
            None => {}
        }
        let step = self.0.begin_write(range)?;
        Ok(self.0.watch_write(range, step))
    }

    fn begin_zero(&self, range: GuestRange, mode: ZeroMode) -> Result<ZeroStep> {
        match self.0.write_waits_for()? {
            Some(Waits::Mark(miss)) => return Ok(ZeroStep::Miss(miss)),
            Some(Waits::Held) => return Ok(ZeroStep::Wait(self.0.place_of(range.start))),
            None => {}
        }
        let step = self.0.begin_zero(range, mode)?;
        Ok(self.0.watch_zero(range, step))
    }

    fn pending(&self, wait: MissId) -> LocalFuture<'_, ()> {
        let image = &self.0;
        Box::pin(async move {
            let ended = || {
                let state = image.state.borrow();
                state.frozen == 0 && !state.pending.contains_key(&wait.0) && !image.holds_writes()
            };
            image.pending_ended.until(ended).await;
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        {
            let state = self.0.state.borrow();
            if !state.writable {
                return Box::pin(async { Ok(()) });
            }
            let good = matches!(state.health, Health::Good);
            if good && state.write_outs == 0 && !state.flushes.running && state.is_clean() {
                return Box::pin(self.0.data_barrier());
            }
        }
        self.0.run(Rc::clone(&self.0).flush())
    }

    fn resize_with(&self, to: Resize) -> LocalFuture<'_, Result<()>> {
        self.0.run(Rc::clone(&self.0).resize_with_bitmaps(to))
    }

    fn set_writable(&self, writable: bool) -> LocalFuture<'_, Result<()>> {
        self.0.run(Rc::clone(&self.0).set_writable(writable))
    }

    fn info(&self) -> ImageInfo {
        let state = self.0.state.borrow();
        let header = &state.header;
        let geometry = self.0.geometry;
        let text = |text: &str| InfoValue::Text(text.to_owned());
        let mut specific = vec![
            ("compat", text(if geometry.version == 3 { "1.1" } else { "0.10" })),
            (
                "compression-type",
                text(if header.compression_type() == 1 { "zstd" } else { "zlib" }),
            ),
        ];
        if geometry.version == 3 {
            specific.push(("lazy-refcounts", InfoValue::Flag(header.lazy_refcounts())));
        }
        specific.extend(self.0.bitmap_facts().map(|facts| ("bitmaps", facts)));
        specific.push(("refcount-bits", InfoValue::Number(geometry.refcount_bits().into())));
        if geometry.version == 3 {
            if let Some(name) = header.data_file() {
                specific.push(("data-file", InfoValue::Text(name)));
                specific.push(("data-file-raw", InfoValue::Flag(header.data_file_raw())));
            }
            specific.push(("corrupt", InfoValue::Flag(header.corrupt())));
            specific.push(("extended-l2", InfoValue::Flag(geometry.extended)));
        }
        let backing = header.backing.clone();
        ImageInfo {
            virtual_size: header.size,
            cluster_size: Some(geometry.cluster()),
            dirty: header.dirty(),
            backing: backing
                .map(|file| BackingRef { file, format: header.extensions.backing_format() }),
            specific,
        }
    }

    fn set_backing(&self, backing: Option<BackingRef>) -> LocalFuture<'_, Result<()>> {
        self.0.run(Rc::clone(&self.0).set_backing(backing))
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        let image = Rc::clone(&self.0);
        self.0.run(async move {
            let writable = image.state.borrow().writable;
            if !writable {
                return Ok(());
            }
            let result = Rc::clone(&image).settle().await;
            image.cut_room().await;
            image.state.borrow_mut().writable = false;
            result
        })
    }
}

impl Image {
    async fn set_writable(self: Rc<Self>, writable: bool) -> Result<()> {
        let was = self.state.borrow().writable;
        match (was, writable) {
            (true, true) => return Ok(()),
            (false, false) => {
                // Nobody goes on with bits that he had before.
                self.bitmaps.borrow_mut().list.clear();
                return Rc::clone(&self).read_again().await;
            }
            (true, false) | (false, true) => {}
        }
        if !writable {
            // What could not be made durable must not be forgotten: asked again, it fails again.
            Rc::clone(&self).settle().await?;
            self.cut_room().await;
            for _ in 0..SETTLE_TRIES {
                {
                    // Who marks a bitmap holds this; who comes later finds the image read-only.
                    let _changes = self.bitmap_changes.lock().await;
                    if !self.has_late_bitmaps() {
                        self.state.borrow_mut().writable = false;
                        return Ok(());
                    }
                }
                Rc::clone(&self).settle().await?;
            }
            self.state.borrow_mut().writable = false;
            return Ok(());
        }
        let checked = self.state.borrow().header.check_features(true);
        checked.map_err(|reason| self.error(reason, "open"))?;
        self.storage.flush().await?;
        if self.state.borrow().header.dirty() {
            repair_dirty(&self.core, &self.storage).await?;
        }
        Rc::clone(&self).read_again().await?;
        self.guard_snapshots().await;
        self.state.borrow_mut().writable = true;
        let result = match self.become_writable().await {
            Ok(()) => self.cut_left_room().await,
            failed => failed,
        };
        if result.is_err() {
            self.state.borrow_mut().writable = false;
        }
        result
    }

    /// Reads again what was read while the file was another process's; nothing is in flight.
    async fn read_again(self: Rc<Self>) -> Result<()> {
        let name = self.filename.to_string_lossy();
        let mut header = read_header(&self.core, &self.storage).await?;
        header.geometry.slice_bits = self.geometry.slice_bits;
        if header.geometry != self.geometry {
            return Err(self.error(Reason::Replaced, "open"));
        }
        let options = self.options.borrow().clone();
        let state = load_state(&self.core, &self.storage, header, &options, &name).await?;
        *self.state.borrow_mut() = state;
        self.load_directory().await
    }

    /// Clears the autoclear bits of what this version does not maintain: all but those of a raw
    /// data file and of bitmaps, if there are any. An image that lost its end is refused.
    pub(super) async fn become_writable(&self) -> Result<()> {
        self.writable_data()?;
        let whole = self.state.borrow().check_whole(self.storage.size());
        whole.map_err(|reason| self.error(reason, "open"))?;
        let bitmaps = if self.bitmaps.borrow().list.is_empty() { 0 } else { AUTOCLEAR_BITMAPS };
        let kept = {
            let header = &self.state.borrow().header;
            let data = if header.has_data_file() { AUTOCLEAR_DATA_FILE_RAW } else { 0 };
            if header.autoclear & !(data | bitmaps) == 0 {
                return Ok(());
            }
            data | bitmaps
        };
        self.update_header(|header| header.autoclear &= kept).await
    }
}
