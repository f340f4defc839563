//! What an image format owes the engine, and what the engine owes a format.
//!
//! A format resolves guest addresses to host addresses and keeps the metadata; it never moves
//! guest data. One place moves bytes: `node::transfer`. Everything that a request needs on the hot
//! path is synchronous in memory; what needs I/O answers [`Mapping::Miss`] / [`WriteStep::Miss`]
//! and
//! is loaded by [`Format::load`], after which the request asks again.
//!
//! Duties of the engine (caller):
//! 1. It holds the [`Lease`] of a resolve until the last I/O that used it is complete.
//! 2. Two overlapping writes, zeroes or discards are never in flight together (node claims, byte
//!    granularity); disjoint writes to one cluster may be.
//! 3. A [`WriteGuard`] is completed only after the data (and the copy-on-write fill) was written,
//!    and dropped only after the last completion of that I/O.
//!
//! Duties of the format (implementer):
//! 1. A cluster handed out by `begin_write` is referenced by nobody else until the guard ends;
//!    readers see the old mapping until `complete`. Dropping the guard gives the clusters back.
//! 2. The second writer of a cluster whose first write is pending gets [`WriteStep::Wait`].
//! 3. A freed cluster is handed out again only when its unlink is durable and every older lease is
//!    gone (see [`crate::lease`]).
//! 4. `flush` makes data written before it and all completed mappings durable, in the format's
//!    order
//!    rules. Cache fills and write-backs are tasks of the image: dropping a caller's future never
//!    stops one half-way.
//! 5. Nothing panics on any content of the file.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;

use smallvec::SmallVec;

use crate::address::{GuestOffset, GuestRange, HostOffset};
use crate::bitmap::DirtyBitmap;
use crate::buf::Buf;
use crate::error::Result;
use crate::executor::Core;
use crate::lease::Lease;
use crate::storage::Storage;

/// A boxed future that stays on its core; only for paths that are not per-request hot.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Names something that must be loaded before a resolve can go on (format-defined).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MissId(pub u64);

/// What a piece of the guest address space is mapped to in one layer.
#[derive(Clone, Debug)]
pub enum Mapping {
    /// Data at this offset of the layer's data storage.
    Data(HostOffset),
    /// A compressed cluster, or a part of one; `Format::read_compressed` yields all its bytes.
    /// Every cluster is an extent of its own.
    Compressed(PackedCluster),
    /// Reads as zeroes, here and in no layer below.
    Zero,
    /// Reads as zeroes, and this range of the data storage is kept for it.
    ZeroAllocated(HostOffset),
    /// Not in this layer: the next one decides (zeroes below the last).
    Absent,
    /// Not known without loading a table; nothing is known of the extents that follow.
    Miss(MissId),
    /// The metadata is damaged here; reading gives this error, the rest of the image goes on.
    Damaged(crate::Error),
}

/// Where the bytes of a compressed cluster lie, as a resolve or a step saw it: valid under the
/// lease that came with it, whatever the mapping says later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedCluster {
    /// Start of the cluster in the guest's address space.
    pub at: GuestOffset,
    /// The first packed byte in the layer's data storage.
    pub host: HostOffset,
    /// Packed bytes, with what fills the last sector.
    pub len: u64,
}

/// A run of guest bytes with one mapping.
#[derive(Clone, Debug)]
pub struct Extent {
    /// Length in bytes, never 0.
    pub len: u64,
    /// Where they are.
    pub mapping: Mapping,
}

/// The answer of a resolve: extents that cover the range in order (neighbours that continue each
/// other merged), up to and including the first miss.
pub type Extents = SmallVec<[Extent; 8]>;

/// Where the bytes come from that a first write to a cluster does not bring itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// From the layers below (zeroes beyond their end).
    Below,
    /// Zeroes.
    Zero,
    /// From this offset (the start of the old cluster) of the same layer's storage.
    Old(HostOffset),
    /// What those bytes read as now, through this layer and those below: some are of this layer,
    /// some are not.
    Current,
    /// The old bytes of this compressed cluster, by `Format::read_compressed`.
    OldCompressed(PackedCluster),
}

/// A write that may go ahead now.
#[derive(Debug)]
pub struct WritePiece {
    /// Bytes of the request, from its start, that this piece covers.
    pub len: u64,
    /// Where those bytes go in the layer's data storage.
    pub host: HostOffset,
    /// Bytes before the request's start that must be filled so that the allocation is whole.
    pub head: u64,
    /// Bytes after the piece that must be filled.
    pub tail: u64,
    /// What head and tail are filled with.
    pub fill: Fill,
    /// Makes the mapping visible, or undoes the allocation.
    pub guard: WriteGuard,
}

/// What a format answers when a write begins; it covers a prefix of the range.
#[derive(Debug)]
pub enum WriteStep {
    /// Write this piece, then complete its guard.
    Ready(WritePiece),
    /// Load this first (tables, refcounts, growth), then ask again.
    Miss(MissId),
    /// Another write is allocating this cluster: wait for it (`Format::pending`), then ask again.
    Wait(MissId),
}

/// What kind of zeroing is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// The range must read as zeroes; clusters stay allocated where they are.
    Keep,
    /// The range must read as zeroes; clusters may be given back.
    Unmap,
    /// The guest does not need the data: whole clusters may be given back, the rest is untouched.
    /// What is given back reads as zeroes (never as what the layers below hold).
    Discard,
}

/// What a format answers when a zero-write or discard begins; it covers a prefix of the range.
#[derive(Debug)]
pub enum ZeroStep {
    /// The first `len` bytes are done, in metadata alone.
    Done {
        /// Bytes of the range's start that are done.
        len: u64,
    },
    /// The first `len` bytes are data at `host` of the layer's storage: zero that storage range
    /// (by the cheapest means), then complete the guard.
    Storage {
        /// Bytes of the range's start concerned.
        len: u64,
        /// Where they are.
        host: HostOffset,
        /// Ends the step.
        guard: WriteGuard,
    },
    /// Metadata cannot express the first `len` bytes: write explicit zeroes for them (for a
    /// discard: nothing needs to be done).
    Write {
        /// Bytes of the range's start concerned.
        len: u64,
    },
    /// Load this first, then ask again.
    Miss(MissId),
    /// Another write is allocating here: wait for it, then ask again.
    Wait(MissId),
}

/// What ends a pending write; implemented by formats, called through [`WriteGuard`].
pub trait WriteEnd {
    /// The data is in place: publish the mapping `token` in memory.
    fn complete_write(&self, token: u64);
    /// The data did not land: forget `token` and give its clusters back.
    fn abort_write(&self, token: u64);
}

/// What wants to know when a piece of a write has ended; implemented by formats that keep dirty
/// bitmaps, called through [`WriteGuard`].
pub trait WriteSeen {
    /// A write, zeroing or discard of `range` has ended, well or not: all of it may have changed.
    fn write_ended(&self, range: GuestRange);
}

/// The right and duty to end one piece of a write.
#[must_use = "complete the guard after the data landed; dropping it undoes the allocation"]
pub struct WriteGuard {
    end: Option<(Rc<dyn WriteEnd>, u64)>,
    seen: Option<(Rc<dyn WriteSeen>, GuestRange)>,
    _lease: Option<Lease>,
}

impl WriteGuard {
    /// A guard for a write in place: nothing to publish, the lease keeps the target allocated.
    pub fn in_place(lease: Option<Lease>) -> Self {
        Self { end: None, seen: None, _lease: lease }
    }

    /// A guard for the pending allocation `token` of `format`.
    pub fn pending(format: Rc<dyn WriteEnd>, token: u64, lease: Option<Lease>) -> Self {
        Self { end: Some((format, token)), seen: None, _lease: lease }
    }

    /// The same guard; when it has ended, `who` is told that `range` may have changed.
    pub fn seen_by(mut self, who: Rc<dyn WriteSeen>, range: GuestRange) -> Self {
        self.seen = Some((who, range));
        self
    }

    /// The data is written: the mapping becomes visible.
    pub fn complete(mut self) {
        if let Some((format, token)) = self.end.take() {
            format.complete_write(token);
        }
    }
}

impl Drop for WriteGuard {
    fn drop(&mut self) {
        if let Some((format, token)) = self.end.take() {
            format.abort_write(token);
        }
        if let Some((who, range)) = self.seen.take() {
            who.write_ended(range);
        }
    }
}

impl std::fmt::Debug for WriteGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteGuard").field("token", &self.end.as_ref().map(|(_, t)| *t)).finish()
    }
}

/// An open image: one layer of a chain.
pub trait Format {
    /// The driver's name in QMP ("raw", "qcow2").
    fn driver(&self) -> &'static str;

    /// Virtual size in bytes, now.
    fn size(&self) -> u64;

    /// Bytes that one allocation covers; 1 where there is no allocation (raw).
    fn cluster_size(&self) -> u64;

    /// Bytes of the smallest part of a cluster that can be mapped by itself: what a first write
    /// must fill. The cluster size where clusters have no parts.
    fn subcluster_size(&self) -> u64;

    /// What only some formats can do.
    fn abilities(&self) -> Abilities;

    /// The storage that [`Mapping::Data`] and [`WritePiece::host`] refer to.
    fn data_storage(&self) -> &Storage;

    /// Maps `range` (inside the virtual size) and takes a lease on what it hands out.
    fn resolve(&self, range: GuestRange, extents: &mut Extents) -> Option<Lease>;

    /// A lease on all that the image has now, for who keeps what was resolved for as long as the
    /// image is read-only; `None` where that may change meanwhile, or costs nothing to ask for.
    fn lease(&self) -> Option<Lease>;

    /// Loads what a resolve or a step missed. Runs as a task of the image: when the returned future
    /// is dropped the load still ends.
    fn load(&self, miss: MissId) -> LocalFuture<'_, Result<()>>;

    /// Whether mapped data may be holes of the data storage (raw; images whose mapping was made
    /// ahead of the data), so that a block status is to ask the storage as well.
    fn has_holes(&self) -> LocalFuture<'_, Result<bool>>;

    /// Reads and decompresses `packed` into a buffer of `cluster_size` bytes, which others may be
    /// looking at too: the caller does not change it. Starts at once, so that several run in
    /// parallel; the caller holds the lease that `packed` came with until the future ends.
    fn read_compressed(&self, packed: PackedCluster) -> LocalFuture<'static, Result<Buf>>;

    /// Begins to write `range`; the answer covers a prefix.
    fn begin_write(&self, range: GuestRange) -> Result<WriteStep>;

    /// Begins to zero or discard `range`; the answer covers a prefix.
    fn begin_zero(&self, range: GuestRange, mode: ZeroMode) -> Result<ZeroStep>;

    /// Resolves when the pending write behind `wait` has ended.
    fn pending(&self, wait: MissId) -> LocalFuture<'_, ()>;

    /// Makes everything written and completed so far durable.
    fn flush(&self) -> LocalFuture<'_, Result<()>>;

    /// Changes the virtual size to `size` bytes; see [`Format::resize_with`].
    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        self.resize_with(Resize::to(size))
    }

    /// Changes the virtual size, durable when the future ends. What is added reads as zeroes; what
    /// is cut off is gone, also after growing again. At any cut the disk has the old size and all
    /// of its data, or the new size.
    fn resize_with(&self, to: Resize) -> LocalFuture<'_, Result<()>>;

    /// Makes a read-only image writable or the reverse; on the way to read-only everything is
    /// flushed and the file is left clean. Asked to be read-only while it is, the image is read
    /// again, because another process may have changed it: nothing is in flight then, and bitmaps
    /// that somebody kept are those of the file.
    fn set_writable(&self, writable: bool) -> LocalFuture<'_, Result<()>>;

    /// Facts for queries and jobs.
    fn info(&self) -> ImageInfo;

    /// Rewrites the reference to the backing file in the header (`None` removes it); durable when
    /// the future ends. Formats without one answer `Unsupported`.
    fn set_backing(&self, backing: Option<BackingRef>) -> LocalFuture<'_, Result<()>>;

    /// Flushes and closes in good order; the object is not used afterwards. Errors of deferred
    /// writes come out here.
    fn close(&self) -> LocalFuture<'_, Result<()>>;
}

/// What only some formats can do; `None`: this one cannot, or not with this image.
#[derive(Clone, Default)]
pub struct Abilities {
    /// Writing clusters compressed.
    pub compress: Option<Rc<dyn CompressedWrites>>,
    /// Snapshots inside the image file.
    pub snapshots: Option<Rc<dyn InternalSnapshots>>,
    /// Options that can change while the image is in use.
    pub options: Option<Rc<dyn RuntimeOptions>>,
    /// Dirty bitmaps inside the image file.
    pub bitmaps: Option<Rc<dyn StoredBitmaps>>,
}

/// What makes prepared options effective: memory only, cannot fail.
pub type Applied = Box<dyn FnOnce()>;

/// Options of an open image that can change while it is in use.
pub trait RuntimeOptions {
    /// Checks all options by their QMP names (those that are not named get their defaults) and
    /// whether freed space is given back to the storage. Changes nothing; the answer does.
    fn prepare(&self, options: &FormatOptions, discard_unmap: bool) -> Result<Applied>;

    /// Whether these options make the disk other bytes of the file than it is now: none of what
    /// was written by somebody who remembers it need be there afterwards.
    fn moves(&self, _options: &FormatOptions) -> bool {
        false
    }
}

/// Writes that store whole clusters compressed.
///
/// Duties of the caller: as for [`Format::begin_write`]; the range is one whole cluster (at the end
/// of the disk: what is left of it). The format moves no data: it packs in memory and says where
/// the packed bytes go.
pub trait CompressedWrites {
    /// Packs the bytes of one cluster (at the end of the disk: what is left of it) away from the
    /// core's loop. Starts at once, so that several run in parallel; `data` does not change until
    /// the future ends. `None`: they do not get smaller, write them as they are.
    fn pack(&self, data: Buf) -> LocalFuture<'static, Result<Option<Buf>>>;

    /// Begins to write `len` packed bytes (as [`CompressedWrites::pack`] gave them) for the cluster
    /// at `at`. A ready piece has `len` = the packed bytes, no head and no tail; its host offset is
    /// a multiple of the sector size only.
    fn begin_packed(&self, at: GuestOffset, len: u64) -> Result<WriteStep>;
}

/// A snapshot inside an image file (qcow2 specification, "Snapshots").
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Unique text id, by default a number.
    pub id: String,
    /// Name.
    pub name: String,
    /// Size of the saved machine state in bytes (0: a disk snapshot).
    pub vm_state_size: u64,
    /// Creation time: seconds since the epoch, and nanoseconds.
    pub date_sec: u32,
    /// Nanoseconds of the creation time.
    pub date_nsec: u32,
    /// Run time of the machine in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instruction count of the machine, if recorded.
    pub icount: Option<u64>,
    /// Virtual size of the disk then, in bytes.
    pub disk_size: u64,
}

/// Snapshots inside the image.
///
/// Every change holds new writes back, waits until those in flight have ended, and is durable when
/// its future ends; at any cut in between the image has either the old or the new set.
pub trait InternalSnapshots {
    /// The snapshots in the order of the table.
    fn list(&self) -> Vec<SnapshotInfo>;

    /// Takes a snapshot of the disk as it is; `info` gives name and times, an empty id means that
    /// the next free number is taken.
    fn create(&self, info: SnapshotInfo) -> LocalFuture<'static, Result<SnapshotInfo>>;

    /// Removes the snapshot with this id, else the one with this name.
    fn delete(&self, id_or_name: &str) -> LocalFuture<'static, Result<()>>;

    /// Makes the disk what it was at the snapshot.
    fn apply(&self, id_or_name: &str) -> LocalFuture<'static, Result<()>>;

    /// The disk as it was at the snapshot, with the size that it had: a read-only image over the
    /// same storage. Reads of it take leases on this image; while it is open the snapshot cannot be
    /// deleted (`Busy`), everything else of this image goes on. It can never become writable.
    fn view(&self, which: SnapshotChoice) -> LocalFuture<'static, Result<Rc<dyn Format>>>;
}

/// Which snapshot inside an image is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotChoice {
    /// The one with this id, else the first with this name.
    Text(String),
    /// The one with this id and this name, of which one may be left out.
    Exact {
        /// The id.
        id: Option<String>,
        /// The name.
        name: Option<String>,
    },
}

/// What of an image's new part is allocated at once (QMP `PreallocMode`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The format's metadata.
    Metadata,
    /// The metadata, and space by `fallocate`.
    Falloc,
    /// The metadata, and space by writing zeroes.
    Full,
}

/// A change of the virtual size.
#[derive(Clone)]
pub struct Resize {
    /// The new size in bytes.
    pub size: u64,
    /// What of an added part is allocated at once; must be `Off` for a smaller size.
    pub preallocation: Preallocation,
    /// The layers below, if there are any: they must not show up in what is added.
    pub below: Option<Below>,
}

impl Resize {
    /// A change to `size` bytes without preallocation, of an image without layers below.
    pub fn to(size: u64) -> Self {
        Self { size, preallocation: Preallocation::Off, below: None }
    }
}

impl std::fmt::Debug for Resize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let below = self.below.as_ref().map(|below| below.size);
        let fields = (self.size, self.preallocation, below);
        f.debug_tuple("Resize").field(&fields).finish()
    }
}

/// Reads a range of the layers below into a buffer of its length (zeroes beyond their end).
pub type ReadBelow = Rc<dyn Fn(GuestRange, Buf) -> LocalFuture<'static, Result<()>>>;

/// The layers below an image, for what the image itself has to copy from them.
#[derive(Clone)]
pub struct Below {
    /// Their size in bytes.
    pub size: u64,
    /// How they are read.
    pub read: ReadBelow,
}

/// A dirty bitmap inside an image file (qcow2 specification, "Bitmaps extension").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Name; bytes that are no UTF-8 are shown as replacement characters.
    pub name: String,
    /// Bytes per bit.
    pub granularity: u64,
    /// Whether writes are recorded in it (the flag `auto`).
    pub enabled: bool,
    /// Whether the file says that it is being written to (the flag `in-use`).
    pub in_use: bool,
    /// Whether it can no longer be trusted: somebody stopped without storing it, or it holds
    /// extra data that forbids its use. It can only be removed.
    pub inconsistent: bool,
}

/// Dirty bitmaps inside the image.
///
/// Duties of the format: writes are recorded in the enabled bitmaps, as long as the image is open
/// for writing; before the first recorded write begins, the file says that they are in use; when
/// the image is closed or becomes read-only they are stored. A bitmap that missed a write is never
/// left without the mark that says so. Every change is durable when its future ends; at any cut in
/// between the file has either the old or the new bitmap.
///
/// Duties of the caller: a change that shall exclude or include certain writes is made while no
/// write is in flight.
pub trait StoredBitmaps {
    /// The bitmaps in the order of the directory.
    fn list(&self) -> Vec<BitmapInfo>;

    /// Bytes per bit that a new bitmap has if nobody says otherwise.
    fn default_granularity(&self) -> u64;

    /// The bits of a bitmap with everything recorded so far.
    fn load(&self, name: &str) -> LocalFuture<'static, Result<DirtyBitmap>>;

    /// Makes a new, clean bitmap.
    fn add(&self, name: &str, granularity: u64, enabled: bool) -> LocalFuture<'static, Result<()>>;

    /// Makes a bitmap with these bits, or replaces one of this name.
    fn store(
        &self,
        name: &str,
        bits: DirtyBitmap,
        enabled: bool,
    ) -> LocalFuture<'static, Result<()>>;

    /// Removes a bitmap, also an inconsistent one.
    fn remove(&self, name: &str) -> LocalFuture<'static, Result<()>>;

    /// Clears all bits.
    fn clear(&self, name: &str) -> LocalFuture<'static, Result<()>>;

    /// Starts or stops recording writes.
    fn set_enabled(&self, name: &str, enabled: bool) -> LocalFuture<'static, Result<()>>;

    /// Adds the bits of `source`, which is for a disk of the same size; granularities may differ.
    fn merge(&self, name: &str, source: DirtyBitmap) -> LocalFuture<'static, Result<()>>;

    /// From now on `kept` has the bits of this bitmap, which are those of the file now, and records
    /// what is written; the format only marks the bitmap as in use and stores what `kept` says.
    /// Changes of its bits through this trait are refused then.
    fn keep(&self, name: &str, kept: Rc<dyn KeptBitmap>);

    /// Makes a new bitmap whose bits `kept` has, marked as in use.
    fn add_kept(
        &self,
        name: &str,
        granularity: u64,
        kept: Rc<dyn KeptBitmap>,
    ) -> LocalFuture<'static, Result<()>>;

    /// Says in the file, durably, that the bitmap is in use.
    fn mark(&self, name: &str) -> LocalFuture<'static, Result<()>>;
}

/// Who has the bits of a bitmap while its image is open.
///
/// Duties: the bits contain everything that was written, when nothing is in flight; nothing is
/// added to them before the file has the mark ([`StoredBitmaps::mark`]; for recorded writes the
/// format sees to it before the first one begins).
pub trait KeptBitmap: std::fmt::Debug {
    /// The bits, to be stored.
    fn bits(&self) -> DirtyBitmap;

    /// Whether writes are recorded.
    fn is_enabled(&self) -> bool;

    /// Whether the file is behind although it has no mark.
    fn is_changed(&self) -> bool;

    /// The bits are in the file.
    fn stored(&self);
}

/// A reference to a backing file as a header holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingRef {
    /// The string, exactly as stored.
    pub file: String,
    /// The format's name, if the header names one.
    pub format: Option<String>,
}

/// What queries show about an image.
#[derive(Clone, Debug, Default)]
pub struct ImageInfo {
    /// Virtual size in bytes.
    pub virtual_size: u64,
    /// Cluster size in bytes, if the format has clusters.
    pub cluster_size: Option<u64>,
    /// Whether the image is marked dirty.
    pub dirty: bool,
    /// The backing reference of the header.
    pub backing: Option<BackingRef>,
    /// Format-specific facts by QMP name (for example `compat`, `refcount-bits`).
    pub specific: Vec<(&'static str, InfoValue)>,
}

/// A value of [`ImageInfo::specific`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InfoValue {
    /// A text.
    Text(String),
    /// A number.
    Number(u64),
    /// A truth value.
    Flag(bool),
    /// Values in order.
    List(Vec<InfoValue>),
    /// Values by name, in order.
    Record(Vec<(&'static str, InfoValue)>),
}

/// Which files an image's header may make the engine open (DESIGN.md, "qcow2 order rules").
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReferencePolicy {
    /// Only what the caller names; header references are not followed.
    Explicit,
    /// Regular files in the image's own folder or below it, or below one of these folders.
    SameDir {
        /// Further folders that are allowed.
        allow: Vec<PathBuf>,
    },
    /// Any regular file or block device by plain path.
    Any,
}

/// Where a header's reference leads, after the policy allowed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedReference {
    /// The file to open.
    pub path: PathBuf,
    /// Nothing outside of this folder may be reached through symbolic links.
    pub beneath: Option<PathBuf>,
    /// The driver to open it with; `None` means that the magic number must name a format
    /// (raw is never probed).
    pub driver: Option<String>,
}

/// Checks the reference in the header of `image` against a policy.
pub type ResolveReference =
    fn(image: &Path, reference: &BackingRef, policy: &ReferencePolicy) -> Result<ResolvedReference>;

/// Options of a format by their QMP names; the driver validates them and refuses unknown ones.
pub type FormatOptions = BTreeMap<String, InfoValue>;

/// Opens the storage that an image keeps its guest data in, given what the header says about it.
pub type OpenData = Rc<dyn Fn(BackingRef) -> LocalFuture<'static, Result<Storage>>>;

/// Where the guest data of an image lies that does not hold it itself.
#[derive(Clone, Default)]
pub enum DataSource {
    /// Nowhere: an image that refers to a data file is refused.
    #[default]
    None,
    /// In this storage, whatever the header says.
    Given(Storage),
    /// Where the header says, opened by this function (which applies the reference policy).
    FromHeader(OpenData),
}

/// How an image is opened by a [`Driver`].
#[derive(Clone)]
pub struct OpenImage {
    /// The core that will own it.
    pub core: Core,
    /// The file that holds it.
    pub storage: Storage,
    /// The file's name, for messages and for relative references.
    pub filename: PathBuf,
    /// Whether guest writes will be allowed.
    pub writable: bool,
    /// Whether space that guests give back is given back to the storage.
    pub discard_unmap: bool,
    /// The external data file.
    pub data: DataSource,
    /// Options of the format.
    pub options: FormatOptions,
    /// For raw: the virtual disk starts here …
    pub raw_offset: u64,
    /// … and has this many bytes (default: to the end of the file).
    pub raw_size: Option<u64>,
}

/// What a [`Driver`] is asked to create.
#[derive(Clone, Debug, Default)]
pub struct CreateImage {
    /// Virtual size in bytes (multiple of 512).
    pub size: u64,
    /// Backing reference to store, unvalidated.
    pub backing: Option<BackingRef>,
    /// Bytes per cluster; the format's default if absent.
    pub cluster_size: Option<u64>,
    /// Further options of the format.
    pub options: FormatOptions,
    /// The file that will hold the guest data, opened and empty, if the options name one.
    pub data: Option<Storage>,
}

/// A format by name: opens and creates images. Registered in a [`Registry`].
pub trait Driver: Send + Sync {
    /// The name in QMP.
    fn name(&self) -> &'static str;

    /// Whether overlays of this format can have a backing file.
    fn supports_backing(&self) -> bool;

    /// Whether `head` (the first bytes of a file, up to 512) is an image of this format for sure.
    /// Never true for formats without a magic number.
    fn recognises(&self, head: &[u8]) -> bool;

    /// Opens the image in `open.storage`.
    fn open(&self, open: OpenImage) -> LocalFuture<'static, Result<Rc<dyn Format>>>;

    /// Writes a new image into `storage` (empty or to be overwritten) and makes it durable.
    fn create(
        &self,
        core: Core,
        storage: Storage,
        create: CreateImage,
    ) -> LocalFuture<'static, Result<()>>;
}

/// The formats that an engine knows, by name.
#[derive(Clone, Default)]
pub struct Registry {
    drivers: Vec<std::sync::Arc<dyn Driver>>,
}

impl Registry {
    /// No formats.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `driver`; a second one of the same name wins.
    pub fn register(&mut self, driver: std::sync::Arc<dyn Driver>) {
        self.drivers.retain(|known| known.name() != driver.name());
        self.drivers.push(driver);
    }

    /// The format called `name`.
    pub fn find(&self, name: &str) -> Option<std::sync::Arc<dyn Driver>> {
        self.drivers.iter().find(|driver| driver.name() == name).cloned()
    }

    /// The names, in order of registration.
    pub fn names(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.drivers.iter().map(|driver| driver.name())
    }
}
