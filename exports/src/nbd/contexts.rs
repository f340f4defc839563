//! Metadata contexts: which an export offers, which a client asked for, and their runs.
//!
//! Sources: the NBD protocol ("Metadata querying"; context `base:allocation`) and the peer's
//! interop document for its own name space: `qemu:allocation-depth` and
//! `qemu:dirty-bitmap:NAME`. Runs of one context are merged; a reply covers a prefix of the range
//! if there are very many.

use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::node::{BitmapHold, Disk, StatusExtent, StatusKind};

use super::wire::state;
use crate::limits::STATUS_STEP;

/// The name space of the protocol itself, and its one context.
const BASE: &str = "base:";
const ALLOCATION: &str = "allocation";
/// The peer's name space and its contexts.
const QEMU: &str = "qemu:";
const DEPTH: &str = "allocation-depth";
const BITMAP: &str = "dirty-bitmap:";

/// A metadata context of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Context {
    /// `base:allocation`.
    Allocation,
    /// `qemu:allocation-depth`.
    Depth,
    /// `qemu:dirty-bitmap:` of the export's bitmap with this index.
    Bitmap(usize),
}

/// What an export offers beyond `base:allocation`.
#[derive(Clone, Debug, Default)]
pub struct ContextOffer {
    /// Whether it tells how deep in the chain bytes are allocated.
    pub depth: bool,
    /// The dirty bitmaps that it shows.
    pub bitmaps: Rc<[Rc<BitmapHold>]>,
}

impl Context {
    /// Its number in replies.
    pub(crate) fn id(self) -> u32 {
        match self {
            Self::Allocation => 0,
            Self::Depth => 1,
            Self::Bitmap(index) => u32::try_from(index).unwrap_or(u32::MAX).saturating_add(2),
        }
    }
}

impl ContextOffer {
    /// The name of a context.
    pub(crate) fn name(&self, context: Context) -> String {
        match context {
            Context::Allocation => format!("{BASE}{ALLOCATION}"),
            Context::Depth => format!("{QEMU}{DEPTH}"),
            Context::Bitmap(index) => {
                let name = self.bitmaps.get(index).map(|hold| hold.bitmap().name());
                format!("{QEMU}{BITMAP}{}", name.unwrap_or_default())
            }
        }
    }

    /// Everything on offer, in the order of replies.
    fn all(&self) -> impl Iterator<Item = Context> + '_ {
        let depth = self.depth.then_some(Context::Depth);
        let bitmaps = (0..self.bitmaps.len()).map(Context::Bitmap);
        [Context::Allocation].into_iter().chain(depth).chain(bitmaps)
    }

    /// What the queries of a client pick. To list, no query means everything and the start of a
    /// name means what begins with it; to select, only whole names count.
    pub(crate) fn pick(&self, list: bool, queries: &[&[u8]]) -> Vec<Context> {
        let starts = [BASE.to_owned(), QEMU.to_owned(), format!("{QEMU}{BITMAP}")];
        self.all()
            .filter(|context| {
                let name = self.name(*context);
                let matches = |query: &&[u8]| {
                    let begins = starts.iter().any(|start| {
                        start.as_bytes() == *query && name.starts_with(start.as_str())
                    });
                    *query == name.as_bytes() || (list && begins)
                };
                (list && queries.is_empty()) || queries.iter().any(matches)
            })
            .collect()
    }
}

/// Runs of a range as (length in bytes, value), at most `max`, neighbours of one value merged.
struct Runs {
    list: Vec<(u32, u32)>,
    max: usize,
}

impl Runs {
    /// False if there is no room for another run.
    fn push(&mut self, len: u64, value: u32) -> bool {
        // Requests are shorter than 4 GiB, so is every run inside one.
        let length = u32::try_from(len).unwrap_or(u32::MAX);
        let full = self.list.len() == self.max;
        match self.list.last_mut() {
            _ if length == 0 => {}
            Some((last, same)) if *same == value => *last = last.saturating_add(length),
            _ if full => return false,
            _ => self.list.push((length, value)),
        }
        true
    }
}

/// The runs of `context` from `offset` on, at most `max`.
pub(crate) async fn runs(
    disk: &Disk,
    offer: &ContextOffer,
    context: Context,
    offset: u64,
    len: u64,
    max: usize,
) -> Result<Vec<(u32, u32)>> {
    let mut runs = Runs { list: Vec::new(), max };
    match context {
        Context::Bitmap(index) => {
            if let Some(hold) = offer.bitmaps.get(index) {
                hold.view(|bits| dirty_runs(bits, offset, len, &mut runs));
            }
        }
        Context::Allocation => status_runs(disk, offset, len, &mut runs, allocation).await?,
        Context::Depth => status_runs(disk, offset, len, &mut runs, depth).await?,
    }
    Ok(runs.list)
}

fn allocation(extent: &StatusExtent) -> u32 {
    if extent.kind == StatusKind::Data { 0 } else { state::HOLE | state::ZERO }
}

/// 1 for the node's own layer, and so on down; 0 if no layer has the bytes.
fn depth(extent: &StatusExtent) -> u32 {
    if extent.absent { 0 } else { extent.depth.saturating_add(1) }
}

async fn status_runs(
    disk: &Disk,
    offset: u64,
    len: u64,
    runs: &mut Runs,
    value: fn(&StatusExtent) -> u32,
) -> Result<()> {
    let end = offset + len;
    let mut at = offset;
    while at < end {
        let step = STATUS_STEP.min(end - at);
        for extent in disk.block_status(at, step).await? {
            if !runs.push(extent.len, value(&extent)) {
                return Ok(());
            }
        }
        at += step;
    }
    Ok(())
}

/// Dirty and clean runs; what lies beyond the disk that the bitmap is for is clean.
fn dirty_runs(bits: &DirtyBitmap, offset: u64, len: u64, runs: &mut Runs) {
    let end = offset + len;
    let mut at = offset;
    while at < end {
        let dirty = bits.next_dirty(at).map_or(end, |dirty| dirty.min(end));
        let clean = bits.next_clean(dirty).clamp(dirty, end);
        if !runs.push(dirty - at, 0) || !runs.push(clean - dirty, state::DIRTY) {
            return;
        }
        at = clean;
    }
}

#[cfg(test)]
mod tests {
    use liveblk_engine::address::GuestRange;

    use super::*;

    #[test]
    fn dirty_runs_cover_the_range_and_begin_and_end_anywhere() {
        let mut bits = DirtyBitmap::new(10_000, 4096);
        bits.set_range(GuestRange::new(4096, 1));
        let found = |offset, len, max| {
            let mut runs = Runs { list: Vec::new(), max };
            dirty_runs(&bits, offset, len, &mut runs);
            runs.list
        };
        assert_eq!(found(0, 10_000, 9), [(4096, 0), (4096, 1), (1808, 0)]);
        assert_eq!(found(5000, 100, 9), [(100, 1)]);
        assert_eq!(found(5000, 15_000, 9), [(3192, 1), (11_808, 0)], "clean beyond its disk");
        assert_eq!(found(0, 10_000, 1), [(4096, 0)]);
        assert_eq!(found(8192, 1808, 9), [(1808, 0)]);
    }

    #[test]
    fn queries_pick_whole_names_and_lists_take_their_starts() {
        let offer = ContextOffer { depth: true, bitmaps: Rc::new([]) };
        let pick = |list, queries: &[&str]| {
            let queries: Vec<_> = queries.iter().map(|query| query.as_bytes()).collect();
            offer.pick(list, &queries)
        };
        let both = [Context::Allocation, Context::Depth];
        assert_eq!(pick(true, &[]), both);
        assert_eq!(pick(false, &[]), []);
        assert_eq!(pick(true, &["base:"]), [Context::Allocation]);
        assert_eq!(pick(false, &["base:", "qemu:"]), []);
        assert_eq!(pick(true, &["qemu:"]), [Context::Depth]);
        assert_eq!(pick(true, &["qemu:alloc", "x:", "qemu:dirty-bitmap:"]), []);
        assert_eq!(pick(false, &["qemu:allocation-depth", "base:allocation"]), both);
        let plain = ContextOffer::default();
        let depth = "qemu:allocation-depth";
        assert_eq!(plain.pick(false, &[depth.as_bytes()]), []);
    }
}
