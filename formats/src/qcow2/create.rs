//! New images, laid out as qemu-img lays them out: header, refcount table, refcount blocks, L1.
//!
//! Order: everything but the first cluster, barrier, the first cluster, barrier. A file that is not
//! finished is not a qcow2 image.

use liveblk_engine::Result;
use liveblk_engine::executor::Core;
use liveblk_engine::format::BackingRef;
use liveblk_engine::storage::Storage;

use super::counts;
use super::extensions::{Extensions, feature_name_table};
use super::header::Header;
use super::layout::{
    CLUSTER_BITS, ENTRY_BYTES, Geometry, HEADER_V2, HEADER_V3_FULL, INCOMPATIBLE_EXTENDED_L2,
};
use super::state::set_word;
use crate::limits::{BACKING_NAME_MAX, L1_BYTES_MAX, TABLE_PIECE};
use crate::reason::Reason;

/// Images with clusters up to this size get no table of feature names, as the peer's.
const FEATURE_NAMES_ABOVE: u64 = 4096;

/// Smallest clusters that can have subclusters, in bytes.
const EXTENDED_CLUSTER_MIN: u64 = 16 << 10;

/// What a new image is like.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// The backing reference to store, as it is.
    pub backing: Option<BackingRef>,
    /// Bytes per cluster, a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// 2 (compat 0.10) or 3 (compat 1.1).
    pub version: u32,
    /// Width of a refcount as a power of two, 0 to 6; version 2 has 4.
    pub refcount_order: u32,
    /// Subclusters (version 3, clusters of at least 16 KiB).
    pub extended_l2: bool,
}

impl CreateOptions {
    /// The defaults of qemu-img: version 3, 64 KiB clusters, 16-bit refcounts.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            backing: None,
            cluster_size: 64 << 10,
            version: 3,
            refcount_order: 4,
            extended_l2: false,
        }
    }
}

/// Where the parts of a new image lie, in clusters.
struct Plan {
    reftable: u64,
    blocks: u64,
    l1: u64,
}

impl Plan {
    fn new(geometry: Geometry, l1_bytes: u64) -> Self {
        let l1 = geometry.clusters(l1_bytes);
        let mut plan = Self { reftable: 1, blocks: 1, l1 };
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

    fn end(&self) -> u64 {
        1 + self.reftable + self.blocks + self.l1
    }
}

/// Makes `storage` (whose content is lost) a new image; durable when it returns.
pub async fn create(core: &Core, storage: &Storage, options: CreateOptions) -> Result<()> {
    let refuse = |reason: Reason| Err(reason.error("create").on(storage.name()));
    let cluster_bits = options.cluster_size.trailing_zeros();
    if !options.cluster_size.is_power_of_two() || !CLUSTER_BITS.contains(&cluster_bits) {
        return refuse(Reason::CreateClusterSize);
    }
    if !(2..=3).contains(&options.version) {
        return refuse(Reason::Version(options.version));
    }
    if options.refcount_order > 6 || (options.version == 2 && options.refcount_order != 4) {
        return refuse(Reason::RefcountOrder);
    }
    if options.extended_l2 && options.version < 3 {
        return refuse(Reason::CreateExtendedVersion);
    }
    if options.extended_l2 && options.cluster_size < EXTENDED_CLUSTER_MIN {
        return refuse(Reason::CreateExtendedClusterSize);
    }
    if !options.size.is_multiple_of(512) {
        return refuse(Reason::SizeAlignment);
    }
    let geometry = Geometry {
        version: options.version,
        cluster_bits,
        refcount_order: options.refcount_order,
        extended: options.extended_l2,
    };
    let l1_bytes = geometry.l1_entries(options.size) * ENTRY_BYTES;
    if l1_bytes > L1_BYTES_MAX {
        return refuse(Reason::SizeTooBig);
    }
    let plan = Plan::new(geometry, l1_bytes);
    let first = match first_cluster(geometry, &plan, options) {
        Ok(bytes) => bytes,
        Err(reason) => return refuse(reason),
    };
    storage.truncate(0).await?;
    let at = |cluster: u64| cluster << cluster_bits;
    let mut table = vec![0; usize::try_from(at(plan.reftable)).unwrap_or(0)];
    for index in 0..plan.blocks {
        let entry = at(1 + plan.reftable + index);
        set_word(&mut table, usize::try_from(index).unwrap_or(0), entry);
    }
    write(core, storage, at(1), &table).await?;
    for index in 0..plan.blocks {
        let block = block(geometry, index, plan.end());
        write(core, storage, at(1 + plan.reftable + index), &block).await?;
    }
    let l1 = vec![0; usize::try_from(l1_bytes).unwrap_or(0)];
    write(core, storage, at(1 + plan.reftable + plan.blocks), &l1).await?;
    storage.flush().await?;
    write(core, storage, 0, &first).await?;
    storage.flush().await
}

/// The refcount block `index` of an image whose first `end` clusters are in use.
fn block(geometry: Geometry, index: u64, end: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(geometry.cluster()).unwrap_or(0)];
    let first = index * geometry.block_entries();
    for cluster in first..end.min(first + geometry.block_entries()) {
        counts::set(&mut bytes, geometry.refcount_order, cluster - first, 1);
    }
    bytes
}

fn first_cluster(
    geometry: Geometry,
    plan: &Plan,
    options: CreateOptions,
) -> Result<Vec<u8>, Reason> {
    let v3 = geometry.version == 3;
    let mut extensions = Extensions::default();
    let room = geometry.cluster() as usize;
    if v3 && geometry.cluster() > FEATURE_NAMES_ABOVE {
        extensions.list.push(feature_name_table());
    }
    let (name, format) = options.backing.map_or((None, None), |b| (Some(b.file), b.format));
    extensions.set_backing_format(format.as_deref());
    let mut header = Header {
        geometry,
        size: options.size,
        backing: name,
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
        incompatible: if geometry.extended { INCOMPATIBLE_EXTENDED_L2 } else { 0 },
        compatible: 0,
        autoclear: 0,
        header_length: if v3 { HEADER_V3_FULL } else { HEADER_V2 },
        further: if v3 { vec![0; 8] } else { Vec::new() },
        extensions,
    };
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

async fn write(core: &Core, storage: &Storage, offset: u64, bytes: &[u8]) -> Result<()> {
    let mut at = offset;
    for piece in bytes.chunks(TABLE_PIECE) {
        let buf = core.pool().alloc(piece.len());
        buf.copy_from(0, piece);
        storage.write(at, buf, false).await?;
        at += piece.len() as u64;
    }
    Ok(())
}
