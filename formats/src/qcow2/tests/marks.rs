//! What persistent bitmaps must and may say, by what was asked of the disk and what it shows.
//!
//! A bitmap that can be trusted has a bit for every sector that differs from when the bitmap was
//! clean, for all that was certainly written, and for nothing that nobody asked to write. One that
//! missed an ended write cannot be trusted; one that no write began for since it was stored can.

use std::collections::{BTreeMap, BTreeSet};

use liveblk_engine::bitmap::DirtyBitmap;

use super::ledger::{Content, SECTOR, Value};

/// Bitmaps by name.
pub(super) type Marks = BTreeMap<String, Mark>;

/// One bitmap of an image, enabled.
#[derive(Clone, Debug)]
pub(super) struct Mark {
    granularity: u64,
    /// What the disk held when the bitmap was clean.
    base: Content,
    /// Granules of writes that ended well.
    must: BTreeSet<u64>,
    /// Granules that anybody began to write to.
    may: BTreeSet<u64>,
    /// A write has begun since the bitmap was last stored.
    began: bool,
    /// A write has ended since then.
    ended: bool,
    /// It missed something: nobody may trust it, but it may be removed.
    pub(super) lost: bool,
}

/// A bitmap as it was found.
#[derive(Clone, Debug)]
pub(super) struct FoundMark {
    /// None: it cannot be trusted.
    pub(super) bits: Option<DirtyBitmap>,
}

impl Mark {
    /// A clean bitmap of a disk that holds `base`.
    pub(super) fn new(granularity: u64, base: Content) -> Self {
        let (must, may) = (BTreeSet::new(), BTreeSet::new());
        Self { granularity, base, must, may, began: false, ended: false, lost: false }
    }

    /// The bitmap after it was cleared; the mark of use stays.
    pub(super) fn cleared(&self, base: Content) -> Self {
        let clean = Self::new(self.granularity, base);
        Self { began: self.began, ended: self.ended, ..clean }
    }

    fn granules(&self, first: u64, count: u64) -> std::ops::RangeInclusive<u64> {
        let (from, end) = (first * SECTOR, (first + count) * SECTOR);
        from / self.granularity..=(end - 1) / self.granularity
    }

    /// Somebody begins to change these sectors.
    pub(super) fn begin(&mut self, first: u64, count: u64) {
        self.began = true;
        self.may.extend(self.granules(first, count));
    }

    /// These sectors were changed for sure.
    pub(super) fn end(&mut self, first: u64, count: u64) {
        self.ended = true;
        self.must.extend(self.granules(first, count));
    }

    /// All is in the file.
    pub(super) fn stored(&mut self) {
        (self.began, self.ended) = (false, false);
    }

    /// The image was opened and shows the bitmap as `lost`.
    pub(super) fn opened(&mut self, lost: bool) -> Result<(), String> {
        if lost != self.lost && !(lost && self.began) {
            return Err(format!("is lost: {lost}, not as in {self:?}"));
        }
        self.lost = lost;
        Ok(())
    }

    /// The disk has `size` sectors now; what was behind them is forgotten.
    pub(super) fn resize(&mut self, size: u64) {
        let granularity = self.granularity;
        let inside = |granule: &u64| granule * granularity < size * SECTOR;
        self.must.retain(inside);
        self.may.retain(inside);
        if self.base.len() as u64 > size {
            self.base = self.base.iter().take(size as usize).cloned().collect::<Vec<_>>().into();
        }
    }

    fn held(&self, sector: usize, value: Value) -> bool {
        self.base.get(sector).map_or(value == 0, |held| held.contains(&value))
    }

    /// Judges what was found on a disk of these `values`; `storing`: the image was being closed.
    fn judge(
        &self,
        found: &FoundMark,
        values: &[Option<Value>],
        storing: bool,
    ) -> Result<(), String> {
        let Some(bits) = &found.bits else {
            return match self.lost || self.began {
                true => Ok(()),
                false => Err("lost without a write".to_owned()),
            };
        };
        if self.lost || (self.ended && !storing) {
            return Err("is trusted but missed a write".to_owned());
        }
        let bytes = values.len() as u64 * SECTOR;
        if (bits.size(), bits.granularity()) != (bytes, self.granularity) {
            return Err(format!("is of {} bytes by {}", bits.size(), bits.granularity()));
        }
        for (sector, value) in values.iter().enumerate() {
            let at = sector as u64 * SECTOR;
            if !value.is_some_and(|value| self.held(sector, value)) && !bits.test(at) {
                return Err(format!("misses sector {sector}"));
            }
        }
        let inside = self.must.iter().filter(|granule| *granule * self.granularity < bytes);
        if let Some(missed) = inside.clone().find(|granule| !bits.test(*granule * self.granularity))
        {
            return Err(format!("misses granule {missed}"));
        }
        let mut from = 0;
        while let Some(run) = bits.next_dirty_range(from, u64::MAX) {
            from = run.end().bytes();
            for granule in run.start.bytes() / self.granularity..from.div_ceil(self.granularity) {
                if !self.may.contains(&granule) {
                    return Err(format!("granule {granule} was never written"));
                }
            }
        }
        Ok(())
    }

    /// From now on it is what was found.
    fn restart(&mut self, found: &FoundMark, size: u64) {
        self.resize(size);
        self.stored();
        self.lost = found.bits.is_none();
    }
}

/// Judges the bitmaps that were found on a disk of these `values`.
pub(super) fn judge(
    marks: &Marks,
    found: &BTreeMap<String, FoundMark>,
    values: &[Option<Value>],
    storing: bool,
) -> Result<(), String> {
    if !marks.keys().eq(found.keys()) {
        let (known, found) = (marks.keys(), found.keys());
        return Err(format!("bitmaps {:?}, not {:?}", found, known));
    }
    for ((name, mark), found) in marks.iter().zip(found.values()) {
        mark.judge(found, values, storing).map_err(|wrong| format!("bitmap {name} {wrong}"))?;
    }
    Ok(())
}

/// Goes on with what was found, which was judged.
pub(super) fn restart(marks: &mut Marks, found: &BTreeMap<String, FoundMark>, size: u64) {
    for (mark, found) in marks.values_mut().zip(found.values()) {
        mark.restart(found, size);
    }
}
