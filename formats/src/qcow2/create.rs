//! New images, laid out as qemu-img lays them out: header, refcount table, refcount blocks, L1;
//! with preallocation the L2 tables and the clusters they map.
//!
//! Order: (1) all options are checked; (2) the data file gets its size and space; (3) the file is
//! emptied and everything but its first sector is written; (4) barrier, the data file first;
//! (5) the first sector, barrier. What is not finished is not a qcow2 image. A failure takes the
//! space back that was taken: the file is empty then, the data file has its old size.

use liveblk_engine::Result;
use liveblk_engine::buf::Buf;
use liveblk_engine::executor::Core;
use liveblk_engine::format::Preallocation;
use liveblk_engine::storage::Storage;

use super::counts;
use super::create_options::{CompressionType, CreateOptions};
use super::extensions::{DATA_FILE, Extension, Extensions, feature_name_table};
use super::header::Header;
use super::layout::{COPIED, ENTRY_BYTES, Geometry, HEADER_V2, HEADER_V3_FULL, SECTOR};
use super::state::set_word;
use crate::create_reason::CreateReason;
use crate::limits::{BACKING_NAME_MAX, TABLE_PIECE};
use crate::reason::Reason;

/// Images with clusters up to this size get no table of feature names, as the peer's.
const FEATURE_NAMES_ABOVE: u64 = 4096;

/// Where the parts of a new image lie, in clusters.
struct Plan {
    geometry: Geometry,
    mode: Preallocation,
    reftable: u64,
    blocks: u64,
    l1: u64,
    /// L2 tables from the start.
    tables: u64,
    /// Guest clusters mapped from the start.
    mapped: u64,
    /// Whether the mapped clusters are in another file.
    external: bool,
    /// Whether every subcluster of a mapped cluster is allocated from the start.
    allocated: bool,
}

impl Plan {
    fn new(geometry: Geometry, options: &CreateOptions) -> Self {
        let entries = geometry.l1_entries(options.size);
        let mode = options.preallocated();
        let all = mode != Preallocation::Off;
        let mut plan = Self {
            geometry,
            mode,
            reftable: 1,
            blocks: 1,
            l1: geometry.clusters(entries * ENTRY_BYTES),
            tables: if all { entries } else { 0 },
            mapped: if all { geometry.clusters(options.size) } else { 0 },
            external: options.data_file.is_some(),
            allocated: options.data_file_raw && geometry.extended,
        };
        loop {
            let blocks = plan.end().div_ceil(geometry.block_entries());
            let reftable = geometry.clusters(blocks * ENTRY_BYTES);
            if blocks <= plan.blocks && reftable <= plan.reftable {
                return plan;
            }
            plan.blocks = blocks.max(plan.blocks);
            plan.reftable = reftable.max(plan.reftable);
        }
    }

    /// The first cluster behind header, refcounts and L1.
    fn fixed(&self) -> u64 {
        1 + self.reftable + self.blocks + self.l1
    }

    /// Mapped clusters in this file.
    fn own(&self) -> u64 {
        if self.external { 0 } else { self.mapped }
    }

    /// The first cluster behind everything.
    fn end(&self) -> u64 {
        self.fixed() + self.tables + self.own()
    }

    /// Whether each L2 table stands before the clusters it maps; else all clusters follow the first
    /// table in one run, so that their space is reserved at once.
    fn interleaved(&self) -> bool {
        self.mode == Preallocation::Metadata
    }

    /// The cluster of L2 table `index`.
    fn table(&self, index: u64) -> u64 {
        let before = match (index, self.interleaved()) {
            (0, _) => 0,
            (_, true) => (index * self.geometry.l2_entries()).min(self.own()),
            (_, false) => self.own(),
        };
        self.fixed() + index + before
    }

    /// The byte in the data's file where guest cluster `at` lies.
    fn data(&self, at: u64) -> u64 {
        let cluster = match (self.external, self.interleaved()) {
            (true, _) => at,
            (false, true) => {
                self.table(at / self.geometry.l2_entries()) + 1 + at % self.geometry.l2_entries()
            }
            (false, false) => self.fixed() + 1 + at,
        };
        cluster << self.geometry.cluster_bits
    }

    /// The content of L2 table `index`.
    fn table_content(&self, index: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.geometry.cluster()).unwrap_or(0)];
        let words = usize::try_from(self.geometry.l2_entry_bytes() / ENTRY_BYTES).unwrap_or(1);
        let first = index * self.geometry.l2_entries();
        let last = (first + self.geometry.l2_entries()).min(self.mapped);
        for (position, at) in (first..last).enumerate() {
            // With subclusters: none is allocated yet, the cluster is kept for them. Not so where
            // the data file is the disk at any time: what a write leaves there before a power cut
            // must not be hidden by a bit that was not durable (the peer leaves the bits out).
            set_word(&mut bytes, position * words, self.data(at) | COPIED);
            if self.allocated {
                set_word(&mut bytes, position * words + 1, u64::from(u32::MAX));
            }
        }
        bytes
    }

    /// The refcount block `index`: one reference to everything.
    fn block(&self, index: u64) -> Vec<u8> {
        let geometry = self.geometry;
        let mut bytes = vec![0; usize::try_from(geometry.cluster()).unwrap_or(0)];
        let first = index * geometry.block_entries();
        for cluster in first..self.end().min(first + geometry.block_entries()) {
            counts::set(&mut bytes, geometry.refcount_order, cluster - first, 1);
        }
        bytes
    }
}

/// Makes `storage` (whose content is lost) a new image without a data file; durable when it
/// returns.
///
/// # Errors
/// Options that do not go together, before anything is touched; what the storage reports.
pub async fn create(core: &Core, storage: &Storage, options: CreateOptions) -> Result<()> {
    create_with_data(core, storage, None, options).await
}

/// Makes `storage` (whose content is lost) a new image with the external data file `data` (which
/// grows to the size of the disk and is not changed otherwise); durable when it returns.
///
/// # Errors
/// Options that do not go together, before anything is touched; what a storage reports.
pub async fn create_with_data(
    core: &Core,
    storage: &Storage,
    data: Option<&Storage>,
    options: CreateOptions,
) -> Result<()> {
    let prepared = options.geometry().and_then(|geometry| {
        if data.is_some() != options.data_file.is_some() {
            return Err(Reason::Create(CreateReason::DataFileMissing));
        }
        let plan = Plan::new(geometry, &options);
        let first = first_cluster(&plan, &options).map_err(|reason| unfit(reason, &options))?;
        Ok((plan, first))
    });
    let (plan, first) = prepared.map_err(|reason| reason.error("create").on(storage.name()))?;
    let image = New { core, storage, data, plan, first, size: options.size };
    let before = data.map_or(0, Storage::size);
    let result = image.write().await;
    if result.is_err() {
        // The first error is the one to report; this only gives space back.
        let _ = storage.truncate(0).await;
        if let Some(data) = data.filter(|data| data.size() > before) {
            let _ = data.truncate(before).await;
        }
    }
    result
}

/// An image that is being written.
struct New<'a> {
    core: &'a Core,
    storage: &'a Storage,
    data: Option<&'a Storage>,
    plan: Plan,
    /// The first cluster.
    first: Vec<u8>,
    size: u64,
}

impl New<'_> {
    async fn write(&self) -> Result<()> {
        if let Some(data) = self.data {
            self.fit_data(data).await?;
        }
        self.storage.truncate(0).await?;
        self.write_fixed().await?;
        self.write_mapping().await?;
        let rest = self.first.get(SECTOR..).unwrap_or_default();
        self.put(SECTOR as u64, rest).await?;
        if let Some(data) = self.data {
            data.flush().await?;
        }
        self.storage.flush().await?;
        self.put(0, self.first.get(..SECTOR).unwrap_or_default()).await?;
        self.storage.flush().await
    }

    /// Gives the data file the size of the disk, if it is smaller, and the space that is asked for.
    async fn fit_data(&self, data: &Storage) -> Result<()> {
        let plan = &self.plan;
        let old = data.size();
        let size = match plan.mode {
            Preallocation::Off => self.size,
            _ => self.size.next_multiple_of(plan.geometry.subcluster()),
        };
        if size <= old {
            return Ok(());
        }
        match plan.mode {
            Preallocation::Off | Preallocation::Metadata => data.truncate(size).await,
            Preallocation::Falloc => data.allocate(old, size - old).await,
            Preallocation::Full => self.fill(data, old, size - old).await,
        }
    }

    /// Refcounts and L1.
    async fn write_fixed(&self) -> Result<()> {
        let plan = &self.plan;
        let at = |cluster: u64| cluster << plan.geometry.cluster_bits;
        let mut table = vec![0; usize::try_from(at(plan.reftable)).unwrap_or(0)];
        for index in 0..plan.blocks {
            let entry = at(1 + plan.reftable + index);
            set_word(&mut table, usize::try_from(index).unwrap_or(0), entry);
        }
        self.put(at(1), &table).await?;
        for index in 0..plan.blocks {
            self.put(at(1 + plan.reftable + index), &plan.block(index)).await?;
        }
        let entries = plan.geometry.l1_entries(self.size);
        let mut l1 = vec![0; usize::try_from(entries * ENTRY_BYTES).unwrap_or(0)];
        for index in 0..plan.tables {
            let entry = at(plan.table(index)) | COPIED;
            set_word(&mut l1, usize::try_from(index).unwrap_or(0), entry);
        }
        self.put(at(1 + plan.reftable + plan.blocks), &l1).await
    }

    /// L2 tables and the clusters that they map.
    async fn write_mapping(&self) -> Result<()> {
        let plan = &self.plan;
        if plan.tables == 0 {
            return Ok(());
        }
        let bits = plan.geometry.cluster_bits;
        let (start, len) = (plan.data(0), plan.own() << bits);
        match plan.mode {
            _ if len == 0 => {}
            Preallocation::Off | Preallocation::Metadata => {}
            Preallocation::Falloc => self.storage.allocate(start, len).await?,
            Preallocation::Full => self.fill(self.storage, start, len).await?,
        }
        for index in 0..plan.tables {
            self.put(plan.table(index) << bits, &plan.table_content(index)).await?;
        }
        let mut end = plan.end() << bits;
        if plan.interleaved() && len > 0 {
            // As the peer: what lies behind the disk's last subcluster is not there yet.
            end -= len - (self.size.next_multiple_of(plan.geometry.subcluster()));
        }
        if self.storage.size() < end { self.storage.truncate(end).await } else { Ok(()) }
    }

    /// Writes zeroes, as data.
    async fn fill(&self, storage: &Storage, offset: u64, len: u64) -> Result<()> {
        let zeroes = self.core.pool().zeroed(TABLE_PIECE);
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let part = usize::try_from(end - at).unwrap_or(TABLE_PIECE).min(TABLE_PIECE);
            storage.write(at, part_of(&zeroes, part), false).await?;
            at += part as u64;
        }
        Ok(())
    }

    async fn put(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut at = offset;
        for piece in bytes.chunks(TABLE_PIECE) {
            let buf = self.core.pool().alloc(piece.len());
            buf.copy_from(0, piece);
            self.storage.write(at, buf, false).await?;
            at += piece.len() as u64;
        }
        Ok(())
    }
}

fn part_of(buf: &Buf, len: usize) -> Buf {
    if len == buf.len() { buf.clone() } else { buf.slice(0..len) }
}

/// What a header that cannot hold the backing file's name is called when it is made.
fn unfit(reason: Reason, options: &CreateOptions) -> Reason {
    let full = matches!(reason, Reason::HeaderFull);
    match &options.backing {
        Some(backing) if full || matches!(reason, Reason::BackingName) => {
            let (file, format) = (backing.file.clone(), backing.format.clone());
            Reason::Create(CreateReason::Backing { file, format, full })
        }
        _ => reason,
    }
}

/// The bytes of the first cluster: header, extensions, backing name.
fn first_cluster(plan: &Plan, options: &CreateOptions) -> Result<Vec<u8>, Reason> {
    let geometry = plan.geometry;
    let v3 = geometry.version == 3;
    let mut extensions = Extensions::default();
    if let Some(name) = &options.data_file {
        extensions.list.push(Extension { kind: DATA_FILE, data: name.as_bytes().to_vec() });
    }
    if v3 && geometry.cluster() > FEATURE_NAMES_ABOVE {
        extensions.list.push(feature_name_table());
    }
    let backing = options.backing.as_ref().filter(|backing| !backing.file.is_empty());
    extensions.set_backing_format(backing.and_then(|backing| backing.format.as_deref()));
    let (incompatible, compatible, autoclear) = options.features();
    let packing = u8::from(options.compression_type == CompressionType::Zstd);
    let mut header = Header {
        geometry,
        size: options.size,
        backing: backing.map(|backing| backing.file.clone()),
        backing_offset: 0,
        l1_size: u32::try_from(geometry.l1_entries(options.size)).unwrap_or(0),
        l1_offset: match plan.l1 {
            0 => 0,
            _ => (1 + plan.reftable + plan.blocks) << geometry.cluster_bits,
        },
        reftable_offset: geometry.cluster(),
        reftable_clusters: u32::try_from(plan.reftable).unwrap_or(0),
        nb_snapshots: 0,
        snapshots_offset: 0,
        incompatible,
        compatible,
        autoclear,
        header_length: if v3 { HEADER_V3_FULL } else { HEADER_V2 },
        further: if v3 { vec![packing, 0, 0, 0, 0, 0, 0, 0] } else { Vec::new() },
        extensions,
    };
    encode(&mut header)
}

/// The header with the backing name behind it, as a whole cluster.
fn encode(header: &mut Header) -> Result<Vec<u8>, Reason> {
    let room = header.geometry.cluster() as usize;
    let name = header.backing.clone().unwrap_or_default();
    if name.len() > BACKING_NAME_MAX as usize {
        return Err(Reason::BackingName);
    }
    if header.bytes().len() + name.len() > room {
        // The names of features are only a help for people.
        header.extensions.drop_feature_names();
    }
    if !name.is_empty() {
        header.backing_offset = header.bytes().len() as u64;
    }
    let mut bytes = header.bytes();
    bytes.extend_from_slice(name.as_bytes());
    if bytes.len() > room {
        return Err(Reason::HeaderFull);
    }
    bytes.resize(room, 0);
    Ok(bytes)
}
