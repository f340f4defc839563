//! Checking a closed image: references against refcounts, COPIED bits, entries that cannot be.
//!
//! Reads only. A corruption is what can lose or mix data; a leak is a cluster that is counted but
//! not used, which costs space and nothing else. Internal snapshots, compressed clusters and
//! persistent bitmaps are counted as references too.

use liveblk_engine::executor::Core;
use liveblk_engine::storage::Storage;
use liveblk_engine::{Error, ErrorKind, Result};

use super::check_walk::Walk;
use super::counts;
use super::header::Header;
use super::layout::{ENTRY_BYTES, REFTABLE_MASK};
use super::open::{read, read_header, read_words};
use crate::limits::{CHECK_BYTES_MAX, CHECK_PROBLEMS_MAX};

/// The outcome of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Things that can lose or mix data.
    pub corruptions: u64,
    /// Clusters that are counted but not used.
    pub leaks: u64,
    /// Guest clusters of the active table that have a host cluster.
    pub allocated_clusters: u64,
    /// The first problems, as text.
    pub problems: Vec<String>,
}

impl CheckReport {
    /// Whether nothing was found, leaks included.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0
    }

    pub(super) fn corruption(&mut self, text: String) {
        self.corruptions += 1;
        self.note(text);
    }

    fn leak(&mut self, text: String) {
        self.leaks += 1;
        self.note(text);
    }

    fn note(&mut self, text: String) {
        if self.problems.len() < CHECK_PROBLEMS_MAX {
            self.problems.push(text);
        }
    }
}

/// Checks the image in `storage`, which nobody writes meanwhile.
///
/// # Errors
/// If it is no qcow2 image, a read fails, or its tables are too large to be checked.
pub async fn check(core: &Core, storage: &Storage) -> Result<CheckReport> {
    let header = read_header(core, storage).await?;
    let geometry = header.geometry;
    // A last cluster that the file does not hold completely, or not at all yet, is allowed.
    let clusters = geometry.clusters(storage.size()) + 1;
    if clusters.saturating_mul(8) > CHECK_BYTES_MAX {
        return Err(Error::new(ErrorKind::Unsupported, "check so large a file"));
    }
    let mut report = CheckReport::default();
    let refcounts = refcounts(core, storage, &header, clusters, &mut report).await?;
    let mut walk = Walk::new(core, storage, &header, refcounts, report);
    walk.run().await?;
    let (mut report, refcounts, references) = walk.finish();
    for (index, (count, used)) in refcounts.iter().zip(&references).enumerate() {
        if count < used {
            report.corruption(format!("cluster {index}: refcount {count}, references {used}"));
        } else if count > used {
            report.leak(format!("leaked cluster {index}: refcount {count}, references {used}"));
        }
    }
    Ok(report)
}

/// The refcounts of the file's clusters as stored.
async fn refcounts(
    core: &Core,
    storage: &Storage,
    header: &Header,
    clusters: u64,
    report: &mut CheckReport,
) -> Result<Vec<u32>> {
    let geometry = header.geometry;
    let entries = (u64::from(header.reftable_clusters) << geometry.cluster_bits) / ENTRY_BYTES;
    let table = read_words(core, storage, header.reftable_offset, entries).await?;
    let mut out = vec![0_u32; usize::try_from(clusters).unwrap_or(0)];
    for (index, raw) in table.iter().enumerate().filter(|(_, raw)| **raw != 0) {
        let host = raw & REFTABLE_MASK;
        if host != *raw || !geometry.aligned(host) || geometry.host_cluster(host).0 >= clusters {
            report.corruption(format!("refcount table entry {index}: {raw:#x}"));
            continue;
        }
        let bytes = read(core, storage, host, geometry.cluster()).await?;
        let first = index as u64 * geometry.block_entries();
        for entry in 0..geometry.block_entries() {
            let count = counts::get(&bytes, geometry.refcount_order, entry);
            let at = usize::try_from(first + entry).unwrap_or(usize::MAX);
            match out.get_mut(at) {
                Some(slot) => *slot = u32::try_from(count).unwrap_or(u32::MAX),
                None if count > 0 => report.leak(format!("leaked cluster {at} behind the end")),
                None => {}
            }
        }
    }
    Ok(out)
}
