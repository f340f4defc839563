//! Opening an image: header first, then the two tables that stay in memory.
//!
//! Order: whoever is about to write waits for a barrier before he reads. The writer before may have
//! been killed, or have failed, before one: what he left shows and is not durable. A mark that a
//! power cut takes back protects nothing, and what a new table gave up is what the old one, which
//! comes back then, refers to.
//!
//! Nothing is allocated before the header's bounds are checked; damaged entries of the tables do
//! not stop an open, they give errors where they are used.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::executor::Core;
use liveblk_engine::executor::sync::{Mutex, Notify, Semaphore};
use liveblk_engine::format::OpenImage;
use liveblk_engine::lease::Epochs;
use liveblk_engine::storage::Storage;

use super::cache::{Cache, IntMap};
use super::claims::Claims;
use super::datafile::DataPlace;
use super::guard::claim_bitmaps;
use super::header::Header;
use super::image::Image;
use super::layout::{ENTRY_BYTES, Geometry, HEADER_V3, MAGIC, OFFSET_MASK, REFTABLE_MASK};
use super::mapped::Mapped;
use super::options::Options;
use super::repair::{Repair, repair};
use super::room::Room;
use super::snapshot::claim_snapshots;
use super::snapshot_table::{self, Snapshot};
use super::snapshot_view::Views;
use super::state::{Allocator, FlushRuns, Health, Meta, State};
use super::unpack::Unpacked;
use super::words::Words;
use crate::limits::{CACHE_SLICES_MIN, PACKING_BYTES, PACKING_MAX, TABLE_PIECE};
use crate::reason::Reason;

/// Bytes that are read to learn the cluster size.
const FIRST_READ: u64 = 4096;

/// Bytes of the fields that every header is parsed for.
const SHORTEST: usize = HEADER_V3 as usize;

/// Reads and validates the header.
pub(super) async fn read_header(core: &Core, storage: &Storage) -> Result<Header> {
    let bytes = read_header_bytes(core, storage).await?;
    let parsed = Header::parse(&bytes, storage.size());
    parsed.map_err(|reason| reason.error("open").on(storage.name()))
}

/// Reads the header for a check or a repair.
pub(super) async fn read_header_for_check(core: &Core, storage: &Storage) -> Result<Header> {
    let bytes = read_header_bytes(core, storage).await?;
    let parsed = Header::parse_for_check(&bytes, storage.size());
    parsed.map_err(|reason| reason.error("check").on(storage.name()))
}

async fn read_header_bytes(core: &Core, storage: &Storage) -> Result<Vec<u8>> {
    let size = storage.size();
    let first = read(core, storage, 0, size.min(FIRST_READ)).await?;
    // The field is read again, and checked, by `parse`; here it only says how much to read.
    let bits = first.get(20..24).and_then(|field| field.try_into().ok()).map(u32::from_be_bytes);
    let cluster = 1_u64 << bits.filter(|bits| *bits <= 21).unwrap_or(9);
    let bytes = if cluster > FIRST_READ && size > FIRST_READ {
        read(core, storage, 0, cluster.min(size)).await?
    } else {
        first
    };
    let mut bytes = bytes;
    if bytes.starts_with(&MAGIC.to_be_bytes()) {
        // What a short file does not have reads as zeroes; the checks of the fields refuse it.
        bytes.resize(bytes.len().max(SHORTEST), 0);
    }
    Ok(bytes)
}

/// Reads `len` bytes at `offset`.
pub(super) async fn read(core: &Core, storage: &Storage, offset: u64, len: u64) -> Result<Vec<u8>> {
    let buf = core.pool().zeroed(usize::try_from(len).unwrap_or(0));
    storage.read(offset, buf.clone()).await?;
    Ok(buf.to_vec())
}

/// Reads a table of `entries` words at `offset`.
pub(super) async fn read_words(
    core: &Core,
    storage: &Storage,
    offset: u64,
    entries: u64,
) -> Result<Vec<u64>> {
    let mut words = Vec::with_capacity(usize::try_from(entries).unwrap_or(0));
    let (mut at, end) = (offset, offset + entries * ENTRY_BYTES);
    while at < end {
        let bytes = read(core, storage, at, (end - at).min(TABLE_PIECE as u64)).await?;
        let (piece, _) = bytes.as_chunks::<8>();
        words.extend(piece.iter().map(|word| u64::from_be_bytes(*word)));
        at += bytes.len() as u64;
    }
    Ok(words)
}

/// The tables that stay in memory, and what follows from them.
pub(super) struct Tables {
    l1: Vec<u64>,
    reftable: Words,
    snapshots: Vec<Snapshot>,
    metadata: Claims,
    /// The first cluster behind everything known.
    end: u64,
}

impl Tables {
    async fn load(core: &Core, storage: &Storage, header: &Header, name: &str) -> Result<Self> {
        let geometry = header.geometry;
        let l1_end = header.l1_offset.saturating_add(u64::from(header.l1_size) * ENTRY_BYTES);
        if l1_end > storage.size() {
            // Missing entries would read as "nothing is allocated", which is wrong data.
            return Err(Reason::Truncated("L1 table").error("open").on(name));
        }
        let l1 = read_words(core, storage, header.l1_offset, header.l1_size.into()).await?;
        let entries = (u64::from(header.reftable_clusters) << geometry.cluster_bits) / ENTRY_BYTES;
        let reftable = read_words(core, storage, header.reftable_offset, entries).await?;
        let snapshots = snapshot_table::load(core, storage, header).await?;
        Ok(Self::of(header, l1, Words::new(reftable), snapshots, storage.size()))
    }

    /// With what follows from the tables of a file of `size` bytes.
    pub(super) fn of(
        header: &Header,
        l1: Vec<u64>,
        reftable: Words,
        snapshots: Vec<Snapshot>,
        size: u64,
    ) -> Self {
        let geometry = header.geometry;
        let mut metadata = metadata_of(header, &l1, reftable.used());
        claim_snapshots(&mut metadata, geometry, header.snapshots_offset, &snapshots, size);
        claim_bitmaps(header, &mut metadata);
        let last = metadata.last().unwrap_or(0);
        let file_end = geometry.clusters(size);
        // Absurd table entries must not move the end; using them gives an error anyway.
        let sane = file_end + (crate::limits::BEYOND_END_MAX >> geometry.cluster_bits);
        let end = if last < sane { file_end.max(last + 1) } else { file_end };
        Self { l1, reftable, snapshots, metadata, end }
    }
}

/// Opens the image.
pub(super) async fn open(open: OpenImage, options: Options) -> Result<Rc<Image>> {
    let OpenImage { core, storage, filename, writable, discard_unmap, data, .. } = open;
    let options = Options { discard_unmap: options.discard_unmap || discard_unmap, ..options };
    let options = options.with(&open.options);
    let refuse = |fault| Reason::Option(fault).error("open").on(storage.name());
    let options = options.map_err(refuse)?;
    if writable {
        storage.flush().await?;
    }
    let mut header = read_header(&core, &storage).await?;
    let name = filename.to_string_lossy().into_owned();
    let checked = header.check_features(writable);
    checked.map_err(|reason| reason.error("open").on(&name))?;
    let data = super::datafile::open(&header, &data, &filename).await?;
    let geometry = header.geometry;
    options.check(geometry.version, geometry.cluster()).map_err(refuse)?;
    if writable && header.dirty() {
        header = repair_dirty(&core, &storage).await?;
    }
    header.geometry.slice_bits = options.l2_cache_entry.map_or(0, u64::trailing_zeros);
    let state = load_state(&core, &storage, header, &options, &name).await?;
    let image = assemble(core, storage, data, filename, options, state);
    image.load_directory().await?;
    if writable {
        image.guard_snapshots().await;
        image.state.borrow_mut().writable = true;
        image.become_writable().await?;
        image.cut_left_room().await?;
    }
    Ok(image)
}

/// The image around its state.
pub(super) fn assemble(
    core: Core,
    storage: Storage,
    data: Option<Storage>,
    filename: std::path::PathBuf,
    options: Options,
    state: State,
) -> Rc<Image> {
    let geometry = state.geometry;
    // Each holds a cluster and its packed bytes, both twice for a moment.
    let packing = (PACKING_BYTES / (4 * geometry.cluster())).clamp(1, PACKING_MAX);
    let image = Rc::new_cyclic(|me| Image {
        me: me.clone(),
        growth: Mutex::new(&core, ()),
        tables: Mutex::new(&core, ()),
        frees: Mutex::new(&core, ()),
        header_writes: Mutex::new(&core, ()),
        bitmap_changes: Mutex::new(&core, ()),
        bitmaps: RefCell::default(),
        pending_ended: Notify::new(&core),
        loaded: Notify::new(&core),
        flushed: Notify::new(&core),
        reclaims: Cell::new(0),
        unpacked: Notify::new(&core),
        packing: Semaphore::new(&core, packing),
        room: Room::new(&core, &storage, options.room_ahead),
        mapped_ahead: Cell::new(None),
        views: Views::default(),
        aging: Cell::new(false),
        age_run: Cell::new(0),
        core,
        storage,
        data,
        filename,
        geometry,
        options: RefCell::new(options),
        epochs: Epochs::new(),
        state: RefCell::new(state),
    });
    let me = image.me.clone();
    image.epochs.on_quiesced(move || {
        if let Some(image) = me.upgrade() {
            image.pending_ended.notify_all();
        }
    });
    image
}

/// Repairs an image whose refcounts may be stale; its header afterwards.
pub(super) async fn repair_dirty(core: &Core, storage: &Storage) -> Result<Header> {
    tracing::warn!(image = storage.name(), "the image is marked dirty: repairing its refcounts");
    let report = repair(core, storage, Repair::All)
        .await
        .map_err(|error| Reason::DirtyRepair(error.to_string()).error("open").on(storage.name()))?;
    if !report.is_clean() {
        tracing::warn!(image = storage.name(), ?report, "damage is left after the repair");
    }
    read_header(core, storage).await
}

/// The tables that stay in memory, of an image that is not written yet.
pub(super) async fn load_state(
    core: &Core,
    storage: &Storage,
    header: Header,
    options: &Options,
    name: &str,
) -> Result<State> {
    let tables = Tables::load(core, storage, &header, name).await?;
    #[cfg_attr(not(feature = "planted-bugs"), expect(unused_mut))]
    let mut state = state_of(header, tables, options);
    #[cfg(feature = "planted-bugs")]
    {
        use liveblk_engine::planted::{Planted, has};
        state.reuses_at_once = has(core, Planted::FreedReusedAtOnce);
    }
    Ok(state)
}

/// The state of an image with these tables, of which nothing is cached yet.
pub(super) fn state_of(header: Header, tables: Tables, options: &Options) -> State {
    let geometry = header.geometry;
    let Tables { l1, reftable, snapshots, metadata, end } = tables;
    State {
        geometry,
        data_place: DataPlace::of(&header, options.discard_unmap),
        header,
        writable: false,
        health: Health::Good,
        l1,
        l1_dirty: BTreeSet::new(),
        reftable,
        reftable_dirty: BTreeSet::new(),
        l2: cache(options.l2_cache, geometry.slice_bytes()),
        refs: cache(options.refcount_cache, geometry.ref_slice_bytes()),
        metadata,
        overlap: options.overlap,
        inactive_l2: IntMap::default(),
        passes: options.passes(),
        no_unref: options.no_unref,
        mapped: Mapped::default(),
        pending: BTreeMap::new(),
        writes: IntMap::default(),
        next_token: 1,
        allocator: Allocator { end, ..Allocator::default() },
        loading: BTreeSet::new(),
        unpacked: Unpacked::new(geometry),
        unlinked: Vec::new(),
        quarantine: VecDeque::new(),
        released: Vec::new(),
        flushes: FlushRuns { started: 0, finished: 0, running: false, own: false, result: Ok(()) },
        frozen: 0,
        snapshots,
        write_outs: 0,
        #[cfg(feature = "planted-bugs")]
        reuses_at_once: false,
    }
}

fn cache(bytes: u64, slice: u64) -> Cache {
    Cache::new(cache_slices(bytes, slice))
}

/// How many slices of `slice` bytes a cache of `bytes` has.
pub(super) fn cache_slices(bytes: u64, slice: u64) -> usize {
    usize::try_from(bytes / slice).unwrap_or(usize::MAX).max(CACHE_SLICES_MIN)
}

/// Which clusters hold metadata. Where two claim one cluster, the first keeps it and the use of the
/// other is an error.
fn metadata_of(header: &Header, l1: &[u64], reftable: &[u64]) -> Claims {
    let geometry = header.geometry;
    let mut claims = Claims::default();
    let mut claim = |offset: u64, bytes: u64, meta: Meta| {
        let first = geometry.host_cluster(offset).0;
        for cluster in first..first + geometry.clusters(bytes) {
            claims.claim(cluster, meta);
        }
    };
    claim(0, geometry.cluster(), Meta::Header);
    let table = u64::from(header.reftable_clusters) << geometry.cluster_bits;
    claim(header.reftable_offset, table, Meta::RefTable);
    claim(header.l1_offset, u64::from(header.l1_size) * ENTRY_BYTES, Meta::L1);
    claims.claim_tables(Meta::RefBlock, tables_of(reftable, REFTABLE_MASK, geometry));
    claims.claim_tables(Meta::L2, tables_of(l1, OFFSET_MASK, geometry));
    claims
}

/// The index and the cluster of each table that entries name.
pub(super) fn tables_of(
    entries: &[u64],
    mask: u64,
    geometry: Geometry,
) -> impl Iterator<Item = (u64, u64)> + Clone {
    let hosts = (0_u64..).zip(entries).map(move |(index, raw)| (index, raw & mask));
    let there = hosts.filter(|(_, host)| *host != 0);
    there.map(move |(index, host)| (index, geometry.host_cluster(host).0))
}
