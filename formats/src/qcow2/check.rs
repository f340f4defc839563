//! Checking a closed image: references against refcounts, COPIED bits, entries that cannot be.
//!
//! Reads only; `repair` changes. A corruption is what can lose or mix data; a leak is a cluster
//! that is counted but not used, which costs space and nothing else. Counted are: header, L1 and L2
//! tables of the disk and of all snapshots, data clusters (unless they are in a data file),
//! compressed clusters, refcount table and blocks, snapshot table, bitmaps, an encryption header.
//! Texts and numbers are the peer's (`qemu-img check`), as far as it has them.

use liveblk_engine::Result;
use liveblk_engine::executor::Core;
use liveblk_engine::storage::Storage;

use super::check_survey::Survey;
use super::open::read_header_for_check;
use crate::limits::CHECK_PROBLEMS_MAX;

/// The outcome of a check; the numbers are those of `qemu-img check --output=json`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Things that can lose or mix data.
    pub corruptions: u64,
    /// Clusters that are counted but not used.
    pub leaks: u64,
    /// Corruptions that a repair removed.
    pub corruptions_fixed: u64,
    /// Leaks that a repair removed.
    pub leaks_fixed: u64,
    /// Things that could not be checked.
    pub check_errors: u64,
    /// End in bytes of the last cluster that is used or counted.
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Guest clusters of the active table that have a host cluster.
    pub allocated_clusters: u64,
    /// Those that do not follow their neighbour in the file (compressed ones included).
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
    /// The first problems, as text.
    pub problems: Vec<String>,
}

impl CheckReport {
    /// Whether nothing was found, leaks included.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }

    pub(super) fn corruption(&mut self, times: u64, text: impl FnOnce() -> String) {
        self.corruptions = self.corruptions.saturating_add(times);
        self.note(text);
    }

    pub(super) fn leak(&mut self, text: impl FnOnce() -> String) {
        self.leaks += 1;
        self.note(text);
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        if self.problems.len() < CHECK_PROBLEMS_MAX {
            self.problems.push(text());
        }
    }
}

/// Checks the image in `storage`, which nobody writes meanwhile.
///
/// # Errors
/// If it is no qcow2 image, a read fails, or its tables are too large to be checked.
pub async fn check(core: &Core, storage: &Storage) -> Result<CheckReport> {
    let header = read_header_for_check(core, storage).await?;
    let mut survey = Survey::new(core, storage, &header, false)?;
    survey.run().await?;
    survey.compare();
    Ok(survey.report)
}
