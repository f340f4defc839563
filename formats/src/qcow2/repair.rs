//! Repairing a closed image.
//!
//! Order, so that a cut at any point leaves an image that a second repair finishes:
//! 1. everything is looked at (`check_survey`); nothing is written;
//! 2. refcounts that are too low are raised where they are; or, if table or blocks are damaged or
//!    missing (or the snapshot table is), new ones are written behind everything else
//!    (`repair_rebuild`), made durable, and taken over by one sector of the header;
//! 3. barrier; entries that cannot be are reset, COPIED bits are set right, in place;
//! 4. barrier; refcounts that are too high are lowered; barrier;
//! 5. everything is looked at again; if no corruption is left, the dirty and the corrupt bit are
//!    cleared.
//!
//! No cluster that anything refers to is used for something new. Where a part of the tables cannot
//! be followed, leaks are left alone: the lost part may have used them. Where the tables of the
//! disk are behind the end of the file, or lie over other tables so that nobody knows whose bytes
//! they are, nothing is changed. Nothing is written behind the end of a file either that lost a
//! table there, of the disk or of a snapshot: the table would turn into zeroes, which mean
//! "nothing is allocated".

use liveblk_engine::Result;
use liveblk_engine::buf::Buf;
use liveblk_engine::executor::Core;
use liveblk_engine::storage::Storage;

use super::check::{CheckReport, check};
use super::check_survey::Survey;
use super::counts;
use super::layout::{
    COPIED, ENTRY_BYTES, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY, OFFSET_MASK, SECTOR,
};
use super::open::{read, read_header_for_check};
use super::state::{set_word, word};
use crate::limits::{CHECK_PROBLEMS_MAX, TABLE_PIECE};
use crate::reason::Reason;

/// What a repair repairs (`qemu-img check -r`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Clusters that are counted but not used.
    Leaks,
    /// Everything.
    All,
}

/// Which way refcounts are changed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Raise,
    Lower,
}

/// Repairs the image in `storage`, which nobody else uses meanwhile. The report says what was found
/// and repaired, and what is left.
///
/// # Errors
/// As [`check`]; if a write fails; if only leaks are to be repaired, but the refcounts are damaged.
pub async fn repair(core: &Core, storage: &Storage, what: Repair) -> Result<CheckReport> {
    // What is judged is what a power cut leaves.
    storage.flush().await?;
    let header = read_header_for_check(core, storage).await?;
    let before = {
        let mut survey = Survey::new(core, storage, &header, what == Repair::All)?;
        survey.run().await?;
        survey.compare();
        let report = survey.report.clone();
        if survey.lost_tables() {
            tracing::warn!(image = storage.name(), "tables are lost: nothing is repaired");
        } else if !report.is_clean() {
            mend(survey, what).await?;
        }
        report
    };
    let mut after = if before.is_clean() { before } else { recheck(core, storage, before).await? };
    after.problems.truncate(CHECK_PROBLEMS_MAX);
    if after.corruptions == 0
        && header.geometry.version >= 3
        && (header.dirty() || header.corrupt())
    {
        let bits = header.incompatible & !(INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT);
        patch_header(core, storage, &[(72, &bits.to_be_bytes())]).await?;
    }
    Ok(after)
}

/// What is left after a repair, and what was repaired.
async fn recheck(core: &Core, storage: &Storage, before: CheckReport) -> Result<CheckReport> {
    let mut after = check(core, storage).await?;
    after.corruptions_fixed = before.corruptions.saturating_sub(after.corruptions);
    after.leaks_fixed = before.leaks.saturating_sub(after.leaks);
    let left = std::mem::replace(&mut after.problems, before.problems);
    after.problems.extend(left);
    Ok(after)
}

async fn mend(mut survey: Survey<'_>, what: Repair) -> Result<()> {
    let damaged = survey.rebuild || (what == Repair::All && survey.snapshots_damaged);
    if what == Repair::Leaks {
        if damaged {
            return Err(Reason::NeedsRebuild.error("repair").on(survey.storage.name()));
        }
        let others = survey.report.corruptions - survey.copied_errors;
        survey.set_refcounts(Way::Lower).await?;
        survey.storage.flush().await?;
        if others == 0 {
            survey.mend_entries(false).await?;
        }
        return survey.storage.flush().await;
    }
    if damaged {
        survey.rebuild_refcounts().await?;
    } else {
        survey.set_refcounts(Way::Raise).await?;
        survey.storage.flush().await?;
    }
    survey.mend_entries(true).await?;
    survey.storage.flush().await?;
    if !damaged && !survey.incomplete {
        survey.set_refcounts(Way::Lower).await?;
        survey.storage.flush().await?;
    }
    Ok(())
}

impl Survey<'_> {
    /// Whether tables of the disk lie behind the end, over each other, or over other metadata that
    /// does not move; or the file would have to grow over a table that it lost.
    fn lost_tables(&self) -> bool {
        let geometry = self.header.geometry;
        let first = geometry.host_cluster(self.header.l1_offset).0;
        let bytes = u64::from(self.header.l1_size) * ENTRY_BYTES;
        let inside = self.is_inside(self.header.l1_offset, bytes);
        let mut l1 = first..first + geometry.clusters(bytes);
        let mut tables = self.tables.iter().filter(|(_, uses)| uses.active > 0);
        let grows = self.rebuild || self.snapshots_damaged;
        (bytes > 0 && !inside)
            || (grows && self.behind)
            || l1.any(|cluster| self.fixed.at(cluster) != 1)
            || tables.any(|(host, _)| self.fixed.at(geometry.host_cluster(*host).0) != 0)
    }

    /// What the refcount of `cluster` is in the end.
    pub(super) fn final_count(&self, cluster: u64) -> u64 {
        let used = self.references.at(cluster).min(self.refcount_max());
        if self.incomplete { used.max(self.stored.at(cluster)) } else { used }
    }

    /// Raises or lowers refcounts where they are stored.
    async fn set_refcounts(&self, way: Way) -> Result<()> {
        let geometry = self.header.geometry;
        let most = self.refcount_max();
        for (index, host) in &self.blocks {
            let mut bytes = read(self.core, self.storage, *host, geometry.cluster()).await?;
            let mut changed = false;
            for entry in 0..geometry.block_entries() {
                let count = counts::get(&bytes, geometry.refcount_order, entry);
                let cluster = index.saturating_mul(geometry.block_entries()).saturating_add(entry);
                let used = self.references.at(cluster).min(most);
                if (way == Way::Raise && count < used) || (way == Way::Lower && count > used) {
                    counts::set(&mut bytes, geometry.refcount_order, entry, used);
                    changed = true;
                }
            }
            if changed {
                write(self.core, self.storage, *host, &bytes).await?;
            }
        }
        Ok(())
    }

    /// Sets COPIED bits right and, with `resets`, resets entries that cannot be.
    async fn mend_entries(&mut self, resets: bool) -> Result<()> {
        self.mend_l1(resets).await?;
        let bytes = usize::try_from(self.header.geometry.cluster()).unwrap_or(0);
        let once = |cluster: u64| self.final_count(cluster) == 1;
        for (host, uses) in &self.tables {
            let own = self.fixed.at(self.header.geometry.host_cluster(*host).0) == 0;
            if !own || (uses.active == 0 && !resets) {
                continue;
            }
            let mut table = read(self.core, self.storage, *host, bytes as u64).await?;
            if self.mend_table(&mut table, *uses, resets, once) {
                write(self.core, self.storage, *host, &table).await?;
            }
        }
        Ok(())
    }

    async fn mend_l1(&self, resets: bool) -> Result<()> {
        let geometry = self.header.geometry;
        let (start, bytes) = (self.header.l1_offset, u64::from(self.header.l1_size) * ENTRY_BYTES);
        if !self.is_inside(start, bytes) {
            return Ok(());
        }
        let mut done = 0;
        while done < bytes {
            let len = (bytes - done).min(TABLE_PIECE as u64);
            let mut piece = read(self.core, self.storage, start + done, len).await?;
            let mut changed = false;
            for index in 0..piece.len() / 8 {
                let raw = word(&piece, index);
                let host = raw & OFFSET_MASK;
                let once = self.final_count(geometry.host_cluster(host).0) == 1;
                let wanted = match (host, geometry.aligned(host)) {
                    (0, _) if resets => 0,
                    (0, _) | (_, false) => raw,
                    _ => raw & !COPIED | if once { COPIED } else { 0 },
                };
                if wanted != raw {
                    set_word(&mut piece, index, wanted);
                    changed = true;
                }
            }
            if changed {
                write(self.core, self.storage, start + done, &piece).await?;
            }
            done += len;
        }
        Ok(())
    }
}

/// Writes bytes at `offset`, in pieces.
pub(super) async fn write(core: &Core, storage: &Storage, offset: u64, bytes: &[u8]) -> Result<()> {
    let mut at = offset;
    for piece in bytes.chunks(TABLE_PIECE) {
        let buf: Buf = core.pool().alloc(piece.len());
        buf.copy_from(0, piece);
        storage.write(at, buf, false).await?;
        at += piece.len() as u64;
    }
    Ok(())
}

/// Changes fields of the header, all in its first sector, durable when it returns.
pub(super) async fn patch_header(
    core: &Core,
    storage: &Storage,
    fields: &[(usize, &[u8])],
) -> Result<()> {
    let mut sector = read(core, storage, 0, SECTOR as u64).await?;
    for (at, field) in fields {
        if let Some(target) = sector.get_mut(*at..at + field.len()) {
            target.copy_from_slice(field);
        }
    }
    write(core, storage, 0, &sector).await?;
    storage.flush().await
}
