//! What an image may hold: every version of each sector, of the size and of the set of snapshots
//! that a reader, or somebody after a power cut, may find.
//!
//! Rules: a version that certainly happened (`sure`) hides the older ones from readers; after a cut
//! any version may show that is not older than the last sure one that had ended when an answered
//! flush began. A failed request and a discard may have happened in each sector or not. A set of
//! snapshots is durable when the change of it was answered, and so is what an apply brought back,
//! and the set of bitmaps. A change that was refused changed nothing.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::marks::{self, FoundMark, Mark, Marks};

/// Bytes of the unit that is told apart.
pub(super) const SECTOR: u64 = 512;

/// What a sector holds: this number, again and again.
pub(super) type Value = u64;

/// A moment.
pub(super) type Tick = u64;

/// What each sector of a snapshot may hold.
pub(super) type Content = Rc<Vec<Vec<Value>>>;

/// Snapshots by name.
pub(super) type Set = BTreeMap<String, Content>;

const NEVER: Tick = Tick::MAX;

/// What nobody ever wrote.
const ZERO: Version = Version { value: 0, begin: 0, end: 0, sure: true };

#[derive(Clone, Copy, Debug)]
struct Version {
    value: Value,
    /// When it was begun: its name.
    begin: Tick,
    end: Tick,
    sure: bool,
}

#[derive(Clone, Debug)]
struct Register<T> {
    versions: Vec<(T, Tick)>,
}

impl<T> Register<T> {
    fn new(value: T) -> Self {
        Self { versions: vec![(value, 0)] }
    }

    fn live(&self) -> &T {
        &self.versions.last().expect("invariant: never empty").0
    }

    fn flushed(&mut self, tick: Tick) {
        let last = self.versions.iter().rposition(|(_, at)| *at < tick).unwrap_or(0);
        self.versions.drain(..last);
    }
}

/// The history of one image.
#[derive(Clone, Debug)]
pub(super) struct Ledger {
    sectors: Vec<Vec<Version>>,
    sizes: Register<u64>,
    sets: Register<Rc<Set>>,
    /// The sets of bitmaps that may be in the file, the one that shows last.
    marks: Vec<Marks>,
    /// The image is being closed.
    storing: bool,
    now: Tick,
    next: Value,
    revision: u64,
}

/// The bytes of a sector that holds `value`.
pub(super) fn sector_bytes(value: Value) -> [u8; 512] {
    let mut bytes = [0; 512];
    for word in bytes.chunks_mut(8) {
        word.copy_from_slice(&value.to_be_bytes());
    }
    bytes
}

/// The value that a sector's bytes show; none if they are not of one piece.
pub(super) fn value_of(sector: &[u8]) -> Option<Value> {
    let (first, rest) = sector.split_first_chunk::<8>()?;
    let one = *rest == sector[..rest.len()];
    one.then(|| Value::from_be_bytes(*first))
}

impl Ledger {
    /// An image of `values` (one per sector) without snapshots, durable.
    pub(super) fn new(values: impl Iterator<Item = Value>) -> Self {
        let first = |value| vec![Version { value, begin: 0, end: 0, sure: true }];
        let sectors: Vec<_> = values.map(first).collect();
        let size = sectors.len() as u64;
        Self {
            sectors,
            sizes: Register::new(size),
            sets: Register::new(Rc::default()),
            marks: vec![Marks::new()],
            storing: false,
            now: 1,
            next: 1 << 40,
            revision: 0,
        }
    }

    fn tick(&mut self) -> Tick {
        self.now += 1;
        self.revision += 1;
        self.now
    }

    /// A value that no write had before.
    pub(super) fn value(&mut self) -> Value {
        self.next += 1;
        self.next
    }

    /// Changes whenever the history does.
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// The size now, in sectors.
    pub(super) fn size(&self) -> u64 {
        *self.sizes.live()
    }

    fn span(&mut self, first: u64, count: u64) -> &mut [Vec<Version>] {
        let (first, end) = (first as usize, (first + count) as usize);
        &mut self.sectors[first..end]
    }

    /// A change of some sectors to `value` begins; its name is returned.
    pub(super) fn begin(&mut self, first: u64, count: u64, value: Value) -> Tick {
        let begin = self.tick();
        for versions in self.span(first, count) {
            versions.push(Version { value, begin, end: NEVER, sure: false });
        }
        self.each_mark(|mark| mark.begin(first, count));
        begin
    }

    fn each_mark(&mut self, change: impl FnMut(&mut Mark)) {
        self.marks.iter_mut().flat_map(BTreeMap::values_mut).for_each(change);
    }

    /// The change `id` was answered; `sure` if it certainly happened in each sector.
    pub(super) fn end(&mut self, id: Tick, first: u64, count: u64, sure: bool) {
        let end = self.tick();
        for versions in self.span(first, count) {
            for version in versions.iter_mut().rev().filter(|version| version.begin == id) {
                (version.end, version.sure) = (end, sure);
            }
        }
        if sure {
            self.each_mark(|mark| mark.end(first, count));
        }
    }

    /// A flush begins.
    pub(super) fn flush_begins(&mut self) -> Tick {
        self.tick()
    }

    /// The flush that began at `tick` was answered.
    pub(super) fn flushed(&mut self, tick: Tick) {
        self.tick();
        for versions in self.sectors.iter_mut().filter(|versions| versions.len() > 1) {
            let floor = versions.iter().rposition(|version| version.sure && version.end < tick);
            versions.drain(..floor.unwrap_or(0));
        }
        self.sizes.flushed(tick);
    }

    fn shown(versions: &[Version]) -> &[Version] {
        let from = versions.iter().rposition(|version| version.sure).unwrap_or(0);
        &versions[from..]
    }

    /// Judges what a reader saw in the sectors from `first` on, whose task has nothing in flight
    /// there; from now on they hold that.
    pub(super) fn read(&mut self, first: u64, bytes: &[u8]) -> Result<(), String> {
        for (sector, bytes) in (first..).zip(bytes.chunks(SECTOR as usize)) {
            let value = value_of(bytes).ok_or_else(|| format!("sector {sector} is of two pieces"));
            let value = value?;
            let shown = Self::shown(&self.sectors[sector as usize]);
            if !shown.iter().any(|version| version.value == value) {
                return Err(format!("sector {sector}: {value:#x} not in {shown:x?}"));
            }
            if shown.iter().any(|version| version.value != value) {
                let begin = self.tick();
                let end = self.tick();
                let seen = Version { value, begin, end, sure: true };
                self.sectors[sector as usize].push(seen);
            }
        }
        Ok(())
    }

    /// The size is about to become `size` sectors. Until that is answered the disk has the old size
    /// with all of its data, or the new one.
    pub(super) fn resize_begins(&mut self, size: u64) {
        self.tick();
        let old = self.sectors.len() as u64;
        self.sectors.resize_with(size.max(old) as usize, || vec![ZERO]);
        self.sizes.versions.push((size, NEVER));
    }

    /// The change of size was answered; `size` is what the image says now. What was cut off is
    /// gone, and all that is durable, if it went well.
    pub(super) fn resize_ends(&mut self, size: u64, sure: bool) {
        let now = self.tick();
        let (new, _) = self.sizes.versions.pop().expect("invariant: begun");
        if sure {
            self.sizes = Register { versions: vec![(new, now)] };
            self.sectors[new as usize..].iter_mut().for_each(|versions| *versions = vec![ZERO]);
            self.each_mark(|mark| mark.resize(new));
            return;
        }
        let old = *self.sizes.live();
        assert!(size == old || size == new, "size {size}, not {old} or {new}");
        let other = if size == old { new } else { old };
        self.sizes.versions.push((other, now));
        self.sizes.versions.push((size, NEVER - 1));
        for versions in &mut self.sectors[new as usize..] {
            versions.push(Version { end: now, begin: now, sure: false, ..ZERO });
        }
    }

    /// The image was read again and says this size: a change that failed half-way may show now.
    pub(super) fn size_shows(&mut self, size: u64) {
        if *self.sizes.live() == size {
            return;
        }
        let known = self.sizes.versions.iter().any(|(known, _)| *known == size);
        assert!(known, "size {size} is none of {:?}", self.sizes.versions);
        self.sizes.versions.push((size, NEVER - 1));
    }

    /// The image is being closed, or becomes read-only.
    pub(super) fn store_begins(&mut self) {
        self.tick();
        self.storing = true;
    }

    /// All that bitmaps recorded is in the file.
    pub(super) fn stored(&mut self) {
        self.tick();
        self.storing = false;
        self.each_mark(Mark::stored);
    }

    /// The bitmaps now.
    pub(super) fn marks(&self) -> &Marks {
        self.marks.last().expect("invariant: never empty")
    }

    /// The set of bitmaps is about to become `marks`.
    pub(super) fn marks_begin(&mut self, marks: Marks) {
        self.tick();
        self.marks.push(marks);
    }

    /// The change of the bitmaps was answered: for sure, or readers see the new or the old set.
    pub(super) fn marks_end(&mut self, sure: bool, shows: bool) {
        self.tick();
        let last = self.marks.len() - 1;
        if sure {
            self.marks.drain(..last);
        } else if !shows {
            self.marks.swap(last, last - 1);
        }
    }

    /// The image was opened and shows these bitmaps, the lost ones as such. What a failure left in
    /// doubt before may be as in any of the sets.
    pub(super) fn opened(&mut self, lost: &BTreeMap<String, bool>) {
        let fits = |marks: &Marks| marks.keys().eq(lost.keys());
        let at = self.marks.iter().rposition(fits);
        let at = at.unwrap_or_else(|| panic!("bitmaps {lost:?} are not as in {:?}", self.marks));
        let last = self.marks.len() - 1;
        self.marks.swap(at, last);
        for ((name, mark), lost) in self.marks[last].iter_mut().zip(lost.values()) {
            mark.opened(*lost).unwrap_or_else(|wrong| panic!("bitmap {name} {wrong}"));
        }
    }

    /// What is not durable may be lost: the image could not be closed.
    pub(super) fn lose(&mut self) {
        self.tick();
        for versions in self.sectors.iter_mut().filter(|versions| versions.len() > 1) {
            versions.iter_mut().skip(1).for_each(|version| version.sure = false);
        }
    }

    /// The snapshots now.
    pub(super) fn snapshots(&self) -> Rc<Set> {
        Rc::clone(self.sets.live())
    }

    /// What the image holds now.
    pub(super) fn content(&self) -> Content {
        let values = |versions: &Vec<Version>| {
            let mut values: Vec<Value> = Self::shown(versions).iter().map(|v| v.value).collect();
            values.dedup();
            values
        };
        Rc::new(self.sectors.iter().take(self.size() as usize).map(values).collect())
    }

    /// The set of snapshots is about to become `set`.
    pub(super) fn set_begins(&mut self, set: Set) {
        self.tick();
        self.sets.versions.push((Rc::new(set), NEVER));
    }

    /// The change of the set was answered: for sure, or readers see the new or the old one.
    pub(super) fn set_ends(&mut self, sure: bool, shows: bool) {
        let now = self.tick();
        if sure {
            let last = self.sets.versions.len() - 1;
            self.sets.versions.drain(..last);
            self.sets.versions[0].1 = now;
        } else if !shows {
            // Readers go on with the old set; either may be durable.
            let last = self.sets.versions.len() - 1;
            self.sets.versions.swap(last, last - 1);
        }
    }

    /// The image is about to become `content`.
    pub(super) fn apply_begins(&mut self, content: &Content) {
        self.resize_begins(content.len() as u64);
        let begin = self.tick();
        for (versions, values) in self.sectors.iter_mut().zip(content.iter()) {
            for value in values {
                versions.push(Version { value: *value, begin, end: NEVER, sure: false });
            }
        }
    }

    /// The change to `content` was answered; `size` is what the image says now. It is durable if it
    /// went well.
    pub(super) fn apply_ends(&mut self, content: &Content, size: u64, sure: bool) {
        self.resize_ends(size, sure);
        if !sure {
            return;
        }
        let tick = self.tick();
        for (versions, values) in self.sectors.iter_mut().zip(content.iter()) {
            versions.clear();
            for (at, value) in values.iter().enumerate() {
                versions.push(Version { value: *value, begin: tick, end: tick, sure: at == 0 });
            }
        }
    }

    /// Judges what a power cut left.
    pub(super) fn survived(&self, found: &Found) -> Result<(), String> {
        if found.raw.as_ref().is_some_and(|raw| *raw != found.values) {
            let pairs = || found.values.iter().zip(found.raw.iter().flatten());
            let at = pairs().position(|(ours, raw)| ours != raw);
            return Err(format!("a raw data file is not the disk: sector {at:?}"));
        }
        let sizes: Vec<u64> = self.sizes.versions.iter().map(|(size, _)| *size).collect();
        if !sizes.contains(&found.size) {
            return Err(format!("size {} is not in {sizes:?}", found.size));
        }
        for (sector, value) in found.values.iter().enumerate() {
            let versions = &self.sectors[sector];
            if !versions.iter().any(|version| Some(version.value) == *value) {
                return Err(format!("sector {sector}: {value:x?} is not in {versions:x?}"));
            }
        }
        let fits = |(set, _): &(Rc<Set>, Tick)| found.has(set);
        if !self.sets.versions.iter().any(fits) {
            let names = |(set, _): &(Rc<Set>, Tick)| set.keys().cloned().collect::<Vec<_>>();
            let known: Vec<_> = self.sets.versions.iter().map(names).collect();
            let names: Vec<_> = found.snapshots.keys().collect();
            return Err(format!("snapshots {names:?} are not as in {known:?}"));
        }
        let judge = |marks: &Marks| marks::judge(marks, &found.marks, &found.values, self.storing);
        let judged: Vec<_> = self.marks.iter().map(judge).collect();
        if judged.iter().all(Result::is_err) {
            return Err(judged.into_iter().filter_map(Result::err).collect::<Vec<_>>().join("; "));
        }
        Ok(())
    }

    /// What the image holds after a cut that was judged: what was found, durable.
    pub(super) fn restart(&mut self, found: &Found) {
        let mut after = Self::new(found.values.iter().map(|value| value.unwrap_or(0)));
        let set = self.sets.versions.iter().find(|(set, _)| found.has(set));
        after.sets = Register::new(set.map(|(set, _)| Rc::clone(set)).unwrap_or_default());
        let judge = |marks: &Marks| marks::judge(marks, &found.marks, &found.values, self.storing);
        let fits = self.marks.iter().find(|marks| judge(marks).is_ok());
        let mut marks = fits.cloned().unwrap_or_default();
        marks::restart(&mut marks, &found.marks, found.size);
        after.marks = vec![marks];
        (after.now, after.next, after.revision) = (self.now, self.next, self.revision + 1);
        for versions in &mut after.sectors {
            versions[0].end = 0;
        }
        *self = after;
    }
}

/// What was found in an image.
#[derive(Clone, Debug, Default)]
pub(super) struct Found {
    /// In sectors.
    pub(super) size: u64,
    /// Per sector; none: of several pieces.
    pub(super) values: Vec<Option<Value>>,
    /// Per snapshot, the values of its sectors.
    pub(super) snapshots: BTreeMap<String, Vec<Option<Value>>>,
    /// Its bitmaps.
    pub(super) marks: BTreeMap<String, FoundMark>,
    /// What a raw data file shows without the image, per sector.
    pub(super) raw: Option<Vec<Option<Value>>>,
}

impl Found {
    /// Whether its snapshots are those of `set`, with their content.
    fn has(&self, set: &Set) -> bool {
        let same = |(name, values): (&String, &Vec<Option<Value>>)| {
            let fits = |(value, allowed): (&Option<Value>, &Vec<Value>)| {
                value.is_some_and(|value| allowed.contains(&value))
            };
            set.get(name).is_some_and(|content| {
                content.len() == values.len() && values.iter().zip(content.iter()).all(fits)
            })
        };
        self.snapshots.len() == set.len() && self.snapshots.iter().all(same)
    }
}

/// The values of all sectors of `bytes`.
pub(super) fn values(bytes: &[u8]) -> Vec<Option<Value>> {
    bytes.chunks(SECTOR as usize).map(value_of).collect()
}
