//! What a disk may hold: for each block all writes that ever touched it, with their times.
//!
//! Times are ticks of one counter for all disks of a world. A write is between its begin and its
//! end in flight. A write that ended well (`sure`) supersedes every write that had ended before it
//! began; writes that overlapped in time may have happened in either order. A failed or abandoned
//! write, and a discard, may have had an effect in each block or not.
//!
//! Writes that overlap in range and time happen one after the other: all of one, then all of the
//! other. So where both have ended, one of them shows in the whole overlap.
//!
//! After a power cut only durable writes supersede: those that ended before an answered flush was
//! sent, and answered writes with FUA.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::rc::Rc;

use super::pattern::Value;

/// A moment: the number of begins and ends before it.
pub(crate) type Tick = u32;

const NEVER: Tick = Tick::MAX;

/// The clock of a world and the numbers of its writes.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    now: Cell<Tick>,
    values: Cell<Value>,
}

impl Clock {
    /// The next tick.
    pub(crate) fn tick(&self) -> Tick {
        self.now.set(self.now.get() + 1);
        self.now.get()
    }

    /// The last tick.
    pub(crate) fn now(&self) -> Tick {
        self.now.get()
    }

    /// A number that no write had before.
    pub(crate) fn value(&self) -> Value {
        self.values.set(self.values.get() + 1);
        self.values.get()
    }
}

/// A change of some blocks.
#[derive(Clone, Copy, Debug)]
struct Change {
    value: Value,
    begin: Tick,
    end: Tick,
    sure: bool,
    durable: bool,
    /// Not a write: what a read found.
    seen: bool,
    first: u32,
    count: u32,
}

/// A change that guests made, as a recorder of changes sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark {
    pub(crate) first: usize,
    pub(crate) count: usize,
    pub(crate) begin: Tick,
    pub(crate) end: Tick,
    /// Whether it certainly happened.
    pub(crate) sure: bool,
}

/// Names a change of one disk.
pub(crate) type ChangeId = usize;

/// A moment that lies between two ticks: when a cut happened that began and ended then.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) from: Tick,
    pub(crate) to: Tick,
}

/// The history of one disk.
#[derive(Debug)]
pub(crate) struct Ledger {
    clock: Rc<Clock>,
    changes: RefCell<Vec<Change>>,
    /// Those behind the end keep what they had.
    blocks: RefCell<Vec<Vec<u32>>>,
    /// Blocks of the disk.
    len: Cell<usize>,
    /// Blocks that it may have after a cut.
    sizes: RefCell<Vec<usize>>,
    /// Pairs of overlapping writes: the first happened before the second.
    orders: RefCell<HashSet<(u32, u32)>>,
}

impl Ledger {
    /// A disk of `blocks` zero blocks.
    pub(crate) fn new(clock: &Rc<Clock>, blocks: usize) -> Rc<Self> {
        let count = u32::try_from(blocks).expect("invariant: small");
        let zeroes = Change {
            value: 0,
            begin: 0,
            end: 0,
            sure: true,
            durable: true,
            seen: false,
            first: 0,
            count,
        };
        Rc::new(Self {
            clock: Rc::clone(clock),
            changes: RefCell::new(vec![zeroes]),
            blocks: RefCell::new(vec![vec![0]; blocks]),
            len: Cell::new(blocks),
            sizes: RefCell::new(vec![blocks]),
            orders: RefCell::default(),
        })
    }

    /// Number of blocks.
    pub(crate) fn len(&self) -> usize {
        self.len.get()
    }

    /// From now on nobody asks for blocks from `len` on.
    pub(crate) fn leave(&self, len: usize) {
        self.len.set(len);
    }

    /// The disk is about to get `len` blocks.
    pub(crate) fn resizing(&self, len: usize) {
        self.sizes.borrow_mut().push(len);
    }

    /// The disk has `len` blocks, durably; those that are gone or new are zeroes from now on.
    pub(crate) fn resized(&self, len: usize) {
        let known = self.blocks.borrow().len();
        if len < known {
            let id = self.begin(0, len, known - len);
            self.end(id, true, true);
        }
        self.blocks.borrow_mut().resize(known.max(len), vec![0]);
        self.clock.tick();
        self.len.set(len);
        *self.sizes.borrow_mut() = vec![len];
    }

    /// The disk did not get another size, for sure.
    pub(crate) fn not_resized(&self) {
        *self.sizes.borrow_mut() = vec![self.len.get()];
    }

    /// Whether a write behind `len` blocks was not answered, and never may be.
    pub(crate) fn is_open_behind(&self, len: usize) -> bool {
        let (changes, blocks) = (self.changes.borrow(), self.blocks.borrow());
        let mut all = blocks[len..].iter().flatten().map(|index| &changes[*index as usize]);
        all.any(|change| change.end == NEVER)
    }

    /// Everything that guests did, in no order.
    pub(crate) fn each_change(&self, mut seen: impl FnMut(Mark)) {
        for change in self.changes.borrow().iter().skip(1).filter(|change| !change.seen) {
            let Change { begin, end, sure, first, count, .. } = *change;
            let (first, count) = (first as usize, count as usize);
            seen(Mark { first, count, begin, end, sure });
        }
    }

    /// A change of blocks `first..first + count` to `value` begins.
    pub(crate) fn begin(&self, value: Value, first: usize, count: usize) -> ChangeId {
        let begin = self.clock.tick();
        let (end, sure, durable, seen) = (NEVER, false, false, false);
        let (at, many) = (number(first), number(count));
        let change = Change { value, begin, end, sure, durable, seen, first: at, count: many };
        self.add(change)
    }

    fn add(&self, change: Change) -> ChangeId {
        let (first, count) = (change.first as usize, change.count as usize);
        let mut changes = self.changes.borrow_mut();
        changes.push(change);
        let id = changes.len() - 1;
        let index = u32::try_from(id).expect("invariant: few changes");
        for block in &mut self.blocks.borrow_mut()[first..first + count] {
            block.push(index);
        }
        id
    }

    /// A change was answered: `sure` if it certainly happened, `durable` if it survives a cut.
    pub(crate) fn end(&self, id: ChangeId, sure: bool, durable: bool) {
        let end = self.clock.tick();
        let change = &mut self.changes.borrow_mut()[id];
        (change.end, change.sure, change.durable) = (end, sure, durable);
    }

    /// What ended before `sent` is durable: a flush sent then was answered.
    pub(crate) fn flushed(&self, sent: Tick) {
        for change in self.changes.borrow_mut().iter_mut().filter(|change| change.end < sent) {
            change.durable = true;
        }
    }

    /// What `block` certainly held no more at `at`: changes that ended before this.
    fn floor(&self, block: usize, at: Tick) -> Tick {
        self.floor_of(block, |change| change.sure && change.end < at)
    }

    fn floor_of(&self, block: usize, counts: impl Fn(&Change) -> bool) -> Tick {
        let (changes, blocks) = (self.changes.borrow(), self.blocks.borrow());
        let certain = blocks[block].iter().map(|index| &changes[*index as usize]);
        certain.filter(|change| counts(change)).map(|change| change.begin).max().unwrap_or(0)
    }

    /// The first tick at which `block` may hold `value`, if it may within `window`.
    fn earliest(&self, block: usize, value: Value, floor: Tick, to: Tick) -> Option<Tick> {
        let (changes, blocks) = (self.changes.borrow(), self.blocks.borrow());
        let known = blocks[block].iter().map(|index| &changes[*index as usize]);
        known
            .filter(|change| change.value == value && change.begin < to && change.end >= floor)
            .map(|change| change.begin)
            .min()
    }

    fn describe(&self, block: usize) -> String {
        let (changes, blocks) = (self.changes.borrow(), self.blocks.borrow());
        let show = |index: &u32| {
            let Change { value, begin, end, sure, durable, .. } = changes[*index as usize];
            let end = if end == NEVER { "..".to_owned() } else { end.to_string() };
            let sure = if sure { "" } else { "?" };
            let durable = if durable { "!" } else { "" };
            format!("{value}{sure}{durable}@{begin}-{end}")
        };
        let all: Vec<String> = blocks[block].iter().map(show).collect();
        all.join(" ")
    }

    /// Judges a read of the blocks from `first` on that took place within `window`; what it found
    /// in blocks that nobody changed meanwhile, they hold from now on.
    pub(crate) fn read(
        &self,
        first: usize,
        values: &[Value],
        window: Window,
    ) -> Result<(), String> {
        for (at, value) in values.iter().enumerate() {
            let block = first + at;
            let floor = self.floor(block, window.from);
            if self.earliest(block, *value, floor, window.to).is_none() {
                return Err(format!(
                    "block {block} read as {value} in {window:?}; it has {}",
                    self.describe(block)
                ));
            }
            self.learn_order(block, *value, window.from)?;
            self.observe(block, *value, window);
        }
        Ok(())
    }

    /// `block` shows write `value`, so overlapping writes that ended before `at` came before it.
    fn learn_order(&self, block: usize, value: Value, at: Tick) -> Result<(), String> {
        let (changes, blocks) = (self.changes.borrow(), self.blocks.borrow());
        let known = || {
            let all = blocks[block].iter().map(|index| (*index, &changes[*index as usize]));
            all.filter(|(_, change)| change.sure && !change.seen && change.end < at)
        };
        let Some((shown, write)) = known().find(|(_, change)| value != 0 && change.value == value)
        else {
            return Ok(());
        };
        let mut orders = self.orders.borrow_mut();
        for (other, _) in known().filter(|(id, o)| *id != shown && o.end >= write.begin) {
            orders.insert((other, shown));
            if orders.contains(&(shown, other)) {
                return Err(format!(
                    "block {block} shows write {value}, another block that it shares with {:?} \
                     shows that one; it has {}",
                    changes[other as usize],
                    self.describe(block)
                ));
            }
        }
        Ok(())
    }

    /// If nothing changed `block` during `window`, but it could have held several values: it holds
    /// `value`.
    fn observe(&self, block: usize, value: Value, window: Window) {
        let others = {
            let (changes, blocks) = (self.changes.borrow(), self.blocks.borrow());
            let floor = self.floor(block, window.from);
            let mut known = blocks[block].iter().map(|index| &changes[*index as usize]);
            let moving = |change: &&Change| change.end >= window.from;
            if known.clone().any(|change| moving(&change)) {
                return;
            }
            known.any(|change| change.value != value && change.end >= floor)
        };
        if others {
            let Window { from, to } = window;
            let first = number(block);
            let (sure, durable, seen, count) = (true, false, true, 1);
            self.add(Change { value, begin: from, end: to, sure, durable, seen, first, count });
        }
    }

    /// Judges an image that must be the whole disk at one moment within `window`, and returns the
    /// earliest moment that it can be.
    pub(crate) fn point_in_time(&self, values: &[Value], window: Window) -> Result<Tick, String> {
        let mut moment = window.from;
        for (block, value) in values.iter().enumerate() {
            let floor = self.floor(block, window.from);
            match self.earliest(block, *value, floor, window.to) {
                Some(begin) => moment = moment.max(begin),
                None => {
                    return Err(format!(
                        "block {block} of the image is {value} in {window:?}; the disk has {}",
                        self.describe(block)
                    ));
                }
            }
        }
        Ok(moment)
    }

    /// Judges an image that must not be older than `moment`: some block shows a write that began
    /// then, so writes that had ended before must show too.
    pub(crate) fn not_before(
        &self,
        values: &[Value],
        moment: Tick,
        to: Tick,
    ) -> Result<(), String> {
        for (block, value) in values.iter().enumerate() {
            let floor = self.floor(block, moment);
            if self.earliest(block, *value, floor, to).is_none() {
                return Err(format!(
                    "no cut: block {block} is {value}, but the image has writes begun at {moment}; \
                     the disk has {}",
                    self.describe(block)
                ));
            }
        }
        Ok(())
    }

    /// Judges what a power cut left now.
    pub(crate) fn survived(&self, values: &[Value]) -> Result<(), String> {
        let sizes = self.sizes.borrow();
        if !sizes.contains(&values.len()) {
            return Err(format!("a disk of {sizes:?} blocks has {} now", values.len()));
        }
        let (values, new) =
            values.split_at_checked(self.blocks.borrow().len()).unwrap_or((values, &[]));
        if new.iter().any(|value| *value != 0) {
            return Err("what was added is not zero".to_owned());
        }
        for (block, value) in values.iter().enumerate() {
            let floor = self.floor_of(block, |change| change.sure && change.durable);
            if self.earliest(block, *value, floor, NEVER).is_none() {
                return Err(format!(
                    "block {block} is {value} after the power cut; the disk had {}",
                    self.describe(block)
                ));
            }
        }
        Ok(())
    }

    /// Whether `block` may have held `value` within `window`.
    pub(crate) fn may_hold(&self, block: usize, value: Value, window: Window) -> bool {
        let floor = self.floor(block, window.from);
        self.earliest(block, value, floor, window.to).is_some()
    }
}

/// A small number as it is kept here.
fn number(value: usize) -> u32 {
    u32::try_from(value).expect("invariant: small")
}

#[cfg(test)]
mod ledger_rules {
    use super::*;

    fn disk() -> (Rc<Clock>, Rc<Ledger>) {
        let clock = Rc::new(Clock::default());
        let ledger = Ledger::new(&clock, 2);
        (clock, ledger)
    }

    fn write(ledger: &Ledger, value: Value) {
        let id = ledger.begin(value, 0, 1);
        ledger.end(id, true, false);
    }

    fn now(clock: &Clock) -> Window {
        Window { from: clock.tick(), to: clock.tick() }
    }

    #[test]
    fn an_answered_write_supersedes_what_ended_before_it() {
        let (clock, ledger) = disk();
        write(&ledger, 1);
        write(&ledger, 2);
        assert!(ledger.read(0, &[2], now(&clock)).is_ok());
        assert!(ledger.read(0, &[1], now(&clock)).is_err());
        assert!(ledger.read(0, &[0], now(&clock)).is_err());
    }

    #[test]
    fn overlapping_writes_leave_either_until_a_read_decides() {
        let (clock, ledger) = disk();
        let (first, second) = (ledger.begin(1, 0, 1), ledger.begin(2, 0, 1));
        ledger.end(second, true, false);
        ledger.end(first, true, false);
        assert!(ledger.read(0, &[2], now(&clock)).is_ok());
        assert!(ledger.read(0, &[1], now(&clock)).is_err(), "the block was seen to hold 2");
    }

    #[test]
    fn overlapping_writes_are_not_mixed() {
        let (clock, ledger) = disk();
        let (first, second) = (ledger.begin(1, 0, 2), ledger.begin(2, 0, 2));
        ledger.end(second, true, false);
        ledger.end(first, true, false);
        assert!(ledger.read(0, &[2, 1], now(&clock)).is_err());
    }

    #[test]
    fn only_flushed_writes_survive_for_sure() {
        let (clock, ledger) = disk();
        write(&ledger, 1);
        let sent = clock.tick();
        write(&ledger, 2);
        ledger.flushed(sent);
        for (value, fits) in [(0, false), (1, true), (2, true), (3, false)] {
            assert_eq!(ledger.survived(&[value, 0]).is_ok(), fits, "{value}");
        }
    }

    #[test]
    fn an_image_of_two_moments_is_no_point_in_time() {
        let (clock, ledger) = disk();
        let from = clock.tick();
        write(&ledger, 1);
        let id = ledger.begin(2, 1, 1);
        ledger.end(id, true, false);
        let window = Window { from, to: clock.tick() };
        let moment = ledger.point_in_time(&[0, 2], window).expect("each block was so at some time");
        assert!(ledger.not_before(&[0, 2], moment, window.to).is_err());
        assert!(ledger.not_before(&[1, 2], moment, window.to).is_ok());
    }
}
