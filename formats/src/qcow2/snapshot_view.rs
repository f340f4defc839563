//! A snapshot inside an image as an image of its own, to be read.
//!
//! It is a second [`Image`] over the same storage with the snapshot's L1 table and size, and with
//! caches of its own. What a snapshot refers to is never written in place (but for COPIED bits,
//! which readers do not look at) and never freed as long as the snapshot exists, whatever happens
//! to the disk; so all that has to be kept is the snapshot. Order: (1) with `growth` held, which
//! every change of the snapshots holds, the view is entered in [`Views`] and the L1 table is read;
//! (2) a deletion looks there after it has frozen the image; (3) the entry goes when the view is
//! dropped. Reads take their leases from the image, not from the view.

use std::cell::RefCell;
use std::rc::{Rc, Weak};

use liveblk_engine::address::GuestRange;
use liveblk_engine::buf::Buf;
use liveblk_engine::format::{
    Abilities, BackingRef, Extents, Format, ImageInfo, LocalFuture, MissId, PackedCluster, Resize,
    SnapshotChoice, WriteStep, ZeroMode, ZeroStep,
};
use liveblk_engine::lease::Lease;
use liveblk_engine::storage::Storage;
use liveblk_engine::{Error, ErrorKind, Result};

use super::header::Header;
use super::image::{Image, Qcow2};
use super::open::{Tables, assemble, state_of};
use super::options::Options;
use super::snapshot_table::Snapshot;
use crate::limits::VIEW_CACHE_BYTES;
use crate::reason::Reason;

const OP: &str = "open a snapshot";

/// The snapshots of an image that are open to be read.
#[derive(Default)]
pub(super) struct Views(RefCell<Vec<Weak<Held>>>);

/// A snapshot that has to stay; snapshots are told apart by their L1 tables.
struct Held {
    l1_offset: u64,
}

/// The disk as it was at a snapshot.
struct SnapshotView {
    /// Declared first: what it reads is kept by the two below.
    view: Qcow2,
    _held: Rc<Held>,
    image: Rc<Image>,
}

impl Views {
    fn enter(&self, snapshot: &Snapshot) -> Rc<Held> {
        let held = Rc::new(Held { l1_offset: snapshot.l1_offset });
        let mut list = self.0.borrow_mut();
        list.retain(|known| known.strong_count() > 0);
        list.push(Rc::downgrade(&held));
        held
    }

    fn has(&self, snapshot: &Snapshot) -> bool {
        let list = self.0.borrow();
        list.iter().filter_map(Weak::upgrade).any(|held| held.l1_offset == snapshot.l1_offset)
    }
}

impl Image {
    /// Refuses to delete a snapshot that somebody reads.
    pub(super) fn check_not_viewed(&self, snapshot: &Snapshot) -> Result<()> {
        match self.views.has(snapshot) {
            true => Err(self.error(Reason::SnapshotViewed, "delete a snapshot")),
            false => Ok(()),
        }
    }

    /// See [`liveblk_engine::format::InternalSnapshots::view`].
    pub(super) async fn view_snapshot(
        self: Rc<Self>,
        which: SnapshotChoice,
    ) -> Result<Rc<dyn Format>> {
        let growth = self.growth.lock().await;
        let snapshot = self.chosen(&which)?;
        let held = self.views.enter(&snapshot);
        let l1 = self.snapshot_l1(&snapshot).await?;
        let (header, reftable, snapshots) = {
            let state = self.state.borrow();
            let size = snapshot.info(state.header.size).disk_size;
            let header = Header {
                size,
                l1_offset: snapshot.l1_offset,
                l1_size: snapshot.l1_size,
                ..state.header.clone()
            };
            (header, state.reftable.clone(), state.snapshots.clone())
        };
        let entries = self.geometry.l1_entries(header.size);
        if entries > l1.len() as u64 || i64::try_from(header.size).is_err() {
            let l1_size = u64::from(snapshot.l1_size);
            return Err(self.error(Reason::BadEntry("Snapshot L1", entries, l1_size), OP));
        }
        let options = Options {
            room_ahead: false,
            l2_cache: self.options.borrow().l2_cache.min(VIEW_CACHE_BYTES),
            refcount_cache: 0,
            ..self.options.borrow().clone()
        };
        let size = self.storage.size();
        let tables = Tables::of(&header, l1, reftable, snapshots, size);
        let state = state_of(header, tables, &options);
        let (core, storage) = (self.core.clone(), self.storage.clone());
        let (data, filename) = (self.data.clone(), self.filename.clone());
        let view = Qcow2(assemble(core, storage, data, filename, options, state));
        drop(growth);
        Ok(Rc::new(SnapshotView { view, _held: held, image: self }))
    }

    fn chosen(&self, which: &SnapshotChoice) -> Result<Snapshot> {
        let (id, name) = match which {
            SnapshotChoice::Text(text) => {
                return self.find_snapshot(text, OP).map(|(_, snapshot)| snapshot);
            }
            SnapshotChoice::Exact { id, name } => (id, name),
        };
        let state = self.state.borrow();
        let fits = |snapshot: &&Snapshot| {
            id.as_ref().is_none_or(|id| snapshot.has_id(id))
                && name.as_ref().is_none_or(|name| snapshot.has_name(name))
                && (id.is_some() || name.is_some())
        };
        let found = state.snapshots.iter().find(fits).cloned();
        found.ok_or_else(|| self.error(Reason::SnapshotNotFound, OP))
    }
}

impl SnapshotView {
    fn refuse<T>(&self, op: &'static str) -> Result<T> {
        Err(Error::new(ErrorKind::ReadOnly, op).on(&self.image.filename.to_string_lossy()))
    }

    fn refuse_later(&self, op: &'static str) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move { self.refuse(op) })
    }
}

impl Format for SnapshotView {
    fn driver(&self) -> &'static str {
        self.view.driver()
    }

    fn size(&self) -> u64 {
        self.view.size()
    }

    fn cluster_size(&self) -> u64 {
        self.view.cluster_size()
    }

    fn subcluster_size(&self) -> u64 {
        self.view.subcluster_size()
    }

    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    fn data_storage(&self) -> &Storage {
        self.view.data_storage()
    }

    fn resolve(&self, range: GuestRange, extents: &mut Extents) -> Option<Lease> {
        self.view.0.resolve(range, extents);
        Some(self.image.epochs.lease())
    }

    /// The snapshot may go while the view stays.
    fn lease(&self) -> Option<Lease> {
        None
    }

    fn load(&self, miss: MissId) -> LocalFuture<'_, Result<()>> {
        self.view.load(miss)
    }

    fn has_holes(&self) -> LocalFuture<'_, Result<bool>> {
        self.view.has_holes()
    }

    fn read_compressed(&self, packed: PackedCluster) -> LocalFuture<'static, Result<Buf>> {
        self.view.read_compressed(packed)
    }

    fn begin_write(&self, _range: GuestRange) -> Result<WriteStep> {
        self.refuse("write")
    }

    fn begin_zero(&self, _range: GuestRange, _mode: ZeroMode) -> Result<ZeroStep> {
        self.refuse("write")
    }

    fn pending(&self, _wait: MissId) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn resize_with(&self, _to: Resize) -> LocalFuture<'_, Result<()>> {
        self.refuse_later("resize")
    }

    fn set_writable(&self, writable: bool) -> LocalFuture<'_, Result<()>> {
        match writable {
            true => self.refuse_later("reopen"),
            false => Box::pin(async { Ok(()) }),
        }
    }

    fn info(&self) -> ImageInfo {
        self.view.info()
    }

    fn set_backing(&self, _backing: Option<BackingRef>) -> LocalFuture<'_, Result<()>> {
        self.refuse_later("change the backing reference")
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}
