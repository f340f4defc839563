//! A simulated file: what it reads as now, what is durable, and the changes in between.
//!
//! Order rules: (1) a change is live at once and stays in the log until a sync covers it; (2) when
//! a covered change becomes durable, so do the earlier ones that touch the same sectors, because a
//! disk never goes back; (3) sizes become durable together with the first covered change after
//! them.

use std::collections::BTreeMap;

use super::pages::{PAGE, Pages, pieces};
use super::rng::Rng;

/// The unit that a power cut keeps or drops.
pub(super) const SECTOR: u64 = 512;
const SECTORS: usize = 8;

/// Bytes and size.
#[derive(Clone, Debug, Default)]
pub(super) struct Content {
    pub(super) pages: Pages,
    pub(super) size: u64,
}

/// A file of the simulated file system.
#[derive(Clone, Debug, Default)]
pub(super) struct SimFile {
    pub(super) live: Content,
    durable: Content,
    log: Vec<Entry>,
    /// Counts the changes of any of the above.
    revision: u64,
}

#[derive(Clone, Debug)]
struct Entry {
    /// The operation that made the change.
    op: u64,
    change: Change,
    /// A failed sync covered it: no later sync will.
    stranded: bool,
}

#[derive(Clone, Debug)]
enum Change {
    Write { offset: u64, bytes: Vec<u8> },
    Zero { offset: u64, end: u64 },
    Size(u64),
}

/// Which operations a sync covers: those that had completed when it was submitted.
#[derive(Clone, Debug)]
pub(super) struct Covered {
    pub(super) before: u64,
    pub(super) in_flight: Vec<u64>,
}

impl Covered {
    pub(super) fn nothing() -> Self {
        Self { before: 0, in_flight: Vec::new() }
    }

    pub(super) fn covers(&self, op: u64) -> bool {
        op < self.before && !self.in_flight.contains(&op)
    }
}

impl Change {
    /// The sectors touched, as bytes `start..end`.
    fn sectors(&self) -> (u64, u64) {
        let (start, end) = match self {
            Self::Write { offset, bytes } => (*offset, offset + bytes.len() as u64),
            Self::Zero { offset, end } => (*offset, *end),
            Self::Size(_) => (0, 0),
        };
        (start / SECTOR * SECTOR, end.div_ceil(SECTOR) * SECTOR)
    }

    fn apply(&self, content: &mut Content) {
        match self {
            Self::Write { offset, bytes } => content.pages.write(*offset, bytes),
            Self::Zero { offset, end } => content.pages.zero(*offset, *end),
            Self::Size(size) => {
                if *size < content.size {
                    content.pages.zero(*size, content.size);
                }
                content.size = *size;
            }
        }
    }
}

impl SimFile {
    /// A file whose content is durable.
    pub(super) fn durable(content: Content) -> Self {
        Self { live: content.clone(), durable: content, log: Vec::new(), revision: 0 }
    }

    /// The file for the next machine run of the same memory: nobody is writing, and what is not
    /// durable waits for a sync.
    pub(super) fn left_behind(&self) -> Self {
        let mut file = self.clone();
        file.log.iter_mut().for_each(|entry| entry.op = 0);
        file
    }

    pub(super) fn write(&mut self, op: u64, offset: u64, bytes: Vec<u8>) {
        let end = offset + bytes.len() as u64;
        if end > self.live.size {
            self.change(op, Change::Size(end));
        }
        self.change(op, Change::Write { offset, bytes });
    }

    /// Makes the range read as zeroes; the size stays.
    pub(super) fn zero(&mut self, op: u64, offset: u64, end: u64) {
        self.change(op, Change::Zero { offset, end });
    }

    pub(super) fn resize(&mut self, op: u64, size: u64) {
        let old = self.live.size;
        if size < old {
            self.change(op, Change::Zero { offset: size, end: old });
        }
        if size != old {
            self.change(op, Change::Size(size));
        }
    }

    fn change(&mut self, op: u64, change: Change) {
        self.revision += 1;
        change.apply(&mut self.live);
        self.log.push(Entry { op, change, stranded: false });
    }

    /// Makes durable what a sync covers.
    pub(super) fn sync(&mut self, covered: &Covered) {
        self.persist(|entry| !entry.stranded && covered.covers(entry.op));
    }

    /// A sync failed: what it covered will not be tried again.
    pub(super) fn strand(&mut self, covered: &Covered) {
        for entry in &mut self.log {
            entry.stranded |= covered.covers(entry.op);
        }
    }

    /// Makes durable what operation `op` wrote, so that bytes up to `end` can be read back.
    pub(super) fn persist_op(&mut self, op: u64, end: u64) {
        self.persist(|entry| entry.op == op);
        self.durable.size = self.durable.size.max(end);
    }

    fn persist(&mut self, covered: impl Fn(&Entry) -> bool) {
        self.revision += 1;
        let mut taken = vec![false; self.log.len()];
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let mut any = false;
        for (index, entry) in self.log.iter().enumerate().rev() {
            let (start, end) = entry.change.sectors();
            let touched = || ranges.iter().any(|(from, to)| *from < end && start < *to);
            let size = matches!(entry.change, Change::Size(_));
            taken[index] = covered(entry) || (any && size) || touched();
            if taken[index] {
                any = true;
                merge(&mut ranges, start, end);
            }
        }
        let mut index = 0;
        let durable = &mut self.durable;
        self.log.retain(|entry| {
            let take = taken[index];
            index += 1;
            if take {
                entry.change.apply(durable);
            }
            !take
        });
    }

    /// Counts changes of what is live and of what is durable.
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// Number of changes that are not durable.
    pub(super) fn unflushed(&self) -> usize {
        self.log.len()
    }

    /// What a power cut leaves that keeps the chosen changes, and with them the earlier ones of the
    /// same sectors.
    pub(super) fn after_cut_keeping(&self, keep: &mut dyn FnMut(usize) -> bool) -> Content {
        let kept: Vec<bool> = (0..self.log.len()).map(keep).collect();
        let mut content = self.durable.clone();
        if kept.iter().all(|kept| !kept) {
            return content;
        }
        let mut counts: BTreeMap<u64, [u32; SECTORS]> = BTreeMap::new();
        let mut limits = self.version_counts();
        limits.values_mut().for_each(|sectors| *sectors = [0; SECTORS]);
        for (entry, kept) in self.log.iter().zip(&kept) {
            let (start, end) = entry.change.sectors();
            for (page, limit) in limits.range_mut(start / PAGE..end.div_ceil(PAGE)) {
                let count = counts.entry(*page).or_default();
                for sector in touched_sectors(*page, start, end) {
                    count[sector] += 1;
                    if *kept {
                        limit[sector] = count[sector];
                    }
                }
            }
            if let (Change::Size(size), true) = (&entry.change, kept) {
                content.size = *size;
            }
        }
        for entry in &self.log {
            apply_sectors(&entry.change, &mut limits, &mut content);
        }
        let size = content.size;
        content.pages.zero(size, u64::MAX - PAGE);
        content
    }

    /// Whether everything is durable.
    pub(super) fn is_clean(&self) -> bool {
        self.log.is_empty()
    }

    /// What a power cut may leave.
    pub(super) fn after_cut(&self, rng: &mut Rng) -> Content {
        if self.log.is_empty() {
            return self.durable.clone();
        }
        match rng.below(5) {
            0 => self.durable.clone(),
            1 => self.live.clone(),
            2 => self.cut_in_order(rng),
            _ => self.cut_by_sector(rng),
        }
    }

    /// The log up to some entry, which is torn.
    fn cut_in_order(&self, rng: &mut Rng) -> Content {
        let mut content = self.durable.clone();
        let cut = rng.index(self.log.len());
        for entry in &self.log[..cut] {
            entry.change.apply(&mut content);
        }
        if let Change::Write { offset, bytes } = &self.log[cut].change {
            let sectors = (bytes.len() as u64).div_ceil(SECTOR);
            let first = rng.below(sectors + 1) * SECTOR;
            // The sector borders are those of the file, not of the write.
            let end = (offset + first) / SECTOR * SECTOR;
            let keep = end.saturating_sub(*offset).min(bytes.len() as u64);
            let keep = usize::try_from(keep).expect("invariant: at most a length");
            content.pages.write(*offset, &bytes[..keep]);
        }
        let size = content.size;
        content.pages.zero(size, u64::MAX - PAGE);
        content
    }

    /// For each sector any of its versions; for the size too.
    fn cut_by_sector(&self, rng: &mut Rng) -> Content {
        let favour_latest = *rng.pick(&[50, 300, 500, 950]);
        let mut limits = self.version_counts();
        for sectors in limits.values_mut() {
            for count in sectors.iter_mut().filter(|count| **count > 0) {
                if !rng.chance(favour_latest) {
                    let choice = rng.below(u64::from(*count) + 1);
                    *count = u32::try_from(choice).expect("invariant: at most a u32");
                }
            }
        }
        let mut content = self.durable.clone();
        for entry in &self.log {
            apply_sectors(&entry.change, &mut limits, &mut content);
        }
        let sizes = || {
            self.log.iter().filter_map(|entry| match entry.change {
                Change::Size(size) => Some(size),
                _ => None,
            })
        };
        let latest = rng.chance(favour_latest);
        let count = sizes().count();
        let choice = if latest { count } else { rng.index(count + 1) };
        if choice > 0 {
            content.size = sizes().nth(choice - 1).unwrap_or(content.size);
        }
        let size = content.size;
        content.pages.zero(size, u64::MAX - PAGE);
        content
    }

    /// Per page and sector, how many changes of the log touch it.
    fn version_counts(&self) -> BTreeMap<u64, [u32; SECTORS]> {
        let mut counts: BTreeMap<u64, [u32; SECTORS]> = BTreeMap::new();
        for entry in &self.log {
            match &entry.change {
                Change::Write { offset, bytes } => {
                    for piece in pieces(*offset, bytes.len()) {
                        counts.entry(piece.page).or_default();
                    }
                }
                Change::Zero { offset, end } => {
                    for page in self.durable.pages.present(*offset, *end) {
                        counts.entry(page).or_default();
                    }
                }
                Change::Size(_) => {}
            }
        }
        for entry in &self.log {
            let (start, end) = entry.change.sectors();
            for (page, sectors) in counts.range_mut(start / PAGE..end.div_ceil(PAGE)) {
                for sector in touched_sectors(*page, start, end) {
                    sectors[sector] += 1;
                }
            }
        }
        counts
    }
}

/// Sectors of `page` that overlap `start..end`.
fn touched_sectors(page: u64, start: u64, end: u64) -> std::ops::Range<usize> {
    let base = page * PAGE;
    let index = |at: u64| {
        let at = at.clamp(base, base + PAGE) - base;
        usize::try_from(at / SECTOR).expect("invariant: inside a page")
    };
    index(start)..index(end)
}

/// Applies the sectors of a change whose turn it still is, and counts them down.
fn apply_sectors(
    change: &Change,
    limits: &mut BTreeMap<u64, [u32; SECTORS]>,
    content: &mut Content,
) {
    let (start, end) = change.sectors();
    for (page, sectors) in limits.range_mut(start / PAGE..end.div_ceil(PAGE)) {
        for sector in touched_sectors(*page, start, end) {
            if sectors[sector] == 0 {
                continue;
            }
            sectors[sector] -= 1;
            let from = page * PAGE + sector as u64 * SECTOR;
            apply_range(change, from, from + SECTOR, content);
        }
    }
}

/// Applies the part of a change that lies in `from..to`.
fn apply_range(change: &Change, from: u64, to: u64, content: &mut Content) {
    match change {
        Change::Write { offset, bytes } => {
            let start = from.max(*offset);
            let end = to.min(offset + bytes.len() as u64);
            let at = |position: u64| {
                usize::try_from(position - offset).expect("invariant: inside the bytes")
            };
            content.pages.write(start, &bytes[at(start)..at(end)]);
        }
        Change::Zero { offset, end } => {
            content.pages.zero(from.max(*offset), to.min(*end));
        }
        Change::Size(_) => {}
    }
}

/// Adds a range to a short list, joining it to the one before if they touch.
fn merge(ranges: &mut Vec<(u64, u64)>, start: u64, end: u64) {
    if start >= end {
        return;
    }
    match ranges.last_mut() {
        Some(last) if start <= last.1 && last.0 <= end => {
            *last = (last.0.min(start), last.1.max(end));
        }
        _ => ranges.push((start, end)),
    }
}
