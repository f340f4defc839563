//! Dirty bitmaps of nodes: against a vector of bools under random work, and what a crash, a
//! failure and a backup's successor leave of them.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::simulated::{CLUSTER, make, write};
use liveblk::engine::bitmap::DirtyBitmap;
use liveblk::engine::driver::sim::{FaultRule, OpFilter, Sim, SimConfig, SimOpKind};
use liveblk::engine::node::{
    BitmapAccess, BitmapFacts, BitmapHold, NewBitmap, Origin, WriteFlags, ZeroFlags,
};
use liveblk::jobs::{Action, BitmapAction, BitmapName, CompletionMode, transaction};
use liveblk::{Disk, ErrorKind, Host, Node};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn new(name: &str, granularity: u64, persistent: bool) -> NewBitmap {
    NewBitmap {
        name: name.into(),
        granularity: Some(granularity),
        persistent,
        disabled: false,
        follow: false,
    }
}

/// What a bitmap has to be.
#[derive(Clone, Debug)]
struct Model {
    granularity: u64,
    bits: Vec<bool>,
    enabled: bool,
    persistent: bool,
    successor: Option<Vec<bool>>,
}

impl Model {
    fn new(size: u64, granularity: u64, persistent: bool) -> Self {
        let bits = vec![false; size.div_ceil(granularity) as usize];
        Self { granularity, bits, enabled: true, persistent, successor: None }
    }

    fn mark(bits: &mut [bool], granularity: u64, start: u64, len: u64) {
        for (bit, at) in bits.iter_mut().zip((0_u64..).step_by(granularity as usize)) {
            *bit |= at < start + len && start < at + granularity;
        }
    }

    fn write(&mut self, start: u64, len: u64) {
        if self.enabled {
            let bits = self.successor.as_mut().unwrap_or(&mut self.bits);
            Self::mark(bits, self.granularity, start, len);
        }
    }

    fn resize(&mut self, size: u64) {
        let granules = size.div_ceil(self.granularity) as usize;
        self.bits.resize(granules, false);
        if let Some(successor) = &mut self.successor {
            successor.resize(granules, false);
        }
    }

    fn merge(&mut self, other: &Self) {
        for (at, _) in other.bits.iter().enumerate().filter(|(_, bit)| **bit) {
            let start = at as u64 * other.granularity;
            Self::mark(&mut self.bits, self.granularity, start, other.granularity);
        }
    }

    fn same(&self, bits: &DirtyBitmap) {
        let found: Vec<bool> =
            (0..bits.granules()).map(|at| bits.test(at * self.granularity)).collect();
        assert_eq!(found, self.bits);
    }
}

/// Random numbers.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

struct Walk {
    dice: Dice,
    node: Rc<Node>,
    models: BTreeMap<String, Model>,
    holds: BTreeMap<String, BitmapHold>,
}

impl Walk {
    fn range(&mut self) -> (u64, u64) {
        let size = self.node.size();
        let start = self.dice.roll(size);
        (start, 1 + self.dice.roll((size - start).min(3 * CLUSTER)))
    }

    fn pick(&mut self) -> Option<String> {
        let names: Vec<_> =
            self.models.keys().filter(|name| !self.holds.contains_key(*name)).cloned().collect();
        let count = names.len() as u64;
        (count > 0).then(|| names[self.dice.roll(count) as usize].clone())
    }

    async fn change_data(&mut self) {
        let (start, len) = self.range();
        let node = &self.node;
        let outcome = match self.dice.roll(4) {
            0 => node.write_zeroes(start, len, ZeroFlags::default(), Origin::External).await,
            1 => node.discard(start, len, Origin::External).await,
            _ => {
                let buf = node.core().pool().alloc(len as usize);
                buf.fill(7);
                node.write(start, buf, WriteFlags::default(), Origin::External).await
            }
        };
        outcome.expect("the disk takes writes");
        self.models.values_mut().for_each(|model| model.write(start, len));
    }

    async fn change_bitmaps(&mut self) {
        let Some(name) = self.pick() else { return };
        let node = Rc::clone(&self.node);
        let model = self.models.get_mut(&name).expect("it was picked");
        match self.dice.roll(7) {
            0 => {
                node.clear_bitmap(&name).expect("is cleared");
                model.bits.fill(false);
            }
            1 => {
                model.enabled = !model.enabled;
                node.enable_bitmap(&name, model.enabled).await.expect("is switched");
            }
            2 => {
                let source = self.pick().expect("there is one");
                let bits = vec![node.bitmap(&source).expect("is there")];
                node.merge_bitmaps(&name, bits).await.expect("merges");
                let source = self.models[&source].clone();
                self.models.get_mut(&name).expect("is there").merge(&source);
            }
            3 => {
                node.remove_bitmap(&name).await.expect("is removed");
                self.models.remove(&name);
            }
            _ => {
                let hold = node.hold_bitmap(&name, "job", BitmapAccess::Change).expect("is free");
                if self.dice.roll(2) == 0 {
                    hold.freeze();
                    model.successor = Some(vec![false; model.bits.len()]);
                }
                self.holds.insert(name, hold);
            }
        }
    }

    fn end_hold(&mut self) {
        let Some((name, hold)) = self.holds.pop_first() else { return };
        let model = self.models.get_mut(&name).expect("a held one is there");
        let fresh = model.successor.take();
        let frozen = fresh.is_some();
        let fresh = fresh.unwrap_or_else(|| vec![false; model.bits.len()]);
        let mut ended = Model { bits: fresh, ..model.clone() };
        match self.dice.roll(3) {
            0 if frozen => hold.abdicate(),
            1 if frozen => {
                let mut left = DirtyBitmap::new(self.node.size(), 512);
                let (start, len) = (self.node.size() / 2, 700);
                left.set_range(liveblk::engine::address::GuestRange::new(start, len));
                hold.abdicate_except(&left);
                let (first, end) = (start / 512 * 512, (start + len).next_multiple_of(512));
                Model::mark(&mut ended.bits, model.granularity, first, end - first);
            }
            _ => {
                hold.reclaim();
                ended.merge(model);
            }
        }
        *model = ended;
    }

    async fn step(&mut self, number: u64) {
        match self.dice.roll(12) {
            0 if self.models.len() < 6 => {
                let name = format!("b{number}");
                let granularity = [512, 4096, 65536, 1 << 31][self.dice.roll(4) as usize];
                let persistent = self.dice.roll(2) == 0;
                let made = self.node.add_bitmap(new(&name, granularity, persistent)).await;
                made.expect("is added");
                let model = Model::new(self.node.size(), granularity, persistent);
                self.models.insert(name, model);
            }
            1..=3 => self.change_bitmaps().await,
            4 => self.end_hold(),
            5 if self.dice.roll(3) == 0 => {
                let size = 512 * (1 + self.dice.roll(100 * CLUSTER / 512));
                let resized = self.node.resize(size, Default::default()).await;
                resized.expect("the disk takes any size");
                self.models.values_mut().for_each(|model| model.resize(size));
            }
            _ => self.change_data().await,
        }
        for (name, model) in &self.models {
            self.node.bitmap(name).expect("is there").view(|bits| model.same(bits));
        }
    }
}

/// DESIGN.md, "Dirty tracking": bits are what was written, whatever happens to bitmaps and disk.
#[test]
fn bitmaps_are_what_was_written_under_any_work_and_persistent_ones_come_back() {
    for seed in 1..=24 {
        let mut sim = Sim::new(SimConfig::new(seed));
        sim.block_on(0, move |core| async move {
            make(&core, "/a", 60).await;
            let mut models = BTreeMap::new();
            let mut dice = Dice(seed * 0x9e37_79b9);
            for round in 0..4 {
                let host = crate::simulated::host(&core);
                let disk = crate::simulated::open(&host, "/a").await;
                let node = disk.node();
                drop(disk);
                let found: Vec<String> = names(&node);
                let kept: Vec<String> = models.keys().rev().cloned().collect();
                assert_eq!(found.len(), kept.len(), "{found:?} {kept:?}");
                let mut walk = Walk { dice, node, models, holds: BTreeMap::new() };
                for step in 0..60 {
                    walk.step(round * 100 + step).await;
                }
                while !walk.holds.is_empty() {
                    walk.end_hold();
                }
                models = walk.models;
                models.retain(|_, model| model.persistent);
                dice = walk.dice;
                drop(walk.node);
                host.close().await.expect("closes");
            }
        });
        crate::simulated::inspect(sim.fs().clone(), "/a");
    }
}

fn names(node: &Rc<Node>) -> Vec<String> {
    let facts = node.bitmap_facts();
    facts.into_iter().filter_map(|facts| facts.name).map(|name| name.to_string()).collect()
}

fn facts_of(node: &Node, name: &str) -> BitmapFacts {
    let mut facts = node.bitmap_facts().into_iter();
    facts.find(|facts| facts.name.as_deref() == Some(name)).expect("is there")
}

async fn disk_with(host: &Host, core: &liveblk::engine::executor::Core) -> Disk {
    make(core, "/a", 64).await;
    crate::simulated::open(host, "/a").await
}

/// Row Q12: a bitmap that was recording when the process died can only be removed, and its name
/// is free then. One that nobody wrote to since it was stored is as good as it was.
#[test]
fn after_a_crash_a_bitmap_that_recorded_is_inconsistent_and_removable() {
    for written in [false, true] {
        let mut sim = Sim::new(SimConfig::new(3).calm());
        sim.block_on(0, move |core| async move {
            let host = crate::simulated::host(&core);
            let disk = disk_with(&host, &core).await;
            let node = disk.node();
            node.add_bitmap(new("b", 65536, true)).await.expect("is added");
            write(&disk, 0, 4096, 1).await.expect("a write");
            drop(disk);
            drop(node);
            host.close().await.expect("closes");
        });
        sim.block_on(0, move |core| async move {
            let host = crate::simulated::host(&core);
            let disk = crate::simulated::open(&host, "/a").await;
            assert_eq!(facts_of(&disk.node(), "b").count, 65536);
            if written {
                write(&disk, 1 << 16, 512, 2).await.expect("a write");
            }
            // The world ends here, without a close.
        });
        let fs = sim.crash();
        let mut sim = Sim::with_fs(SimConfig::new(4).calm(), fs);
        sim.block_on(0, move |core| async move {
            let host = crate::simulated::host(&core);
            let disk = crate::simulated::open(&host, "/a").await;
            let node = disk.node();
            let facts = facts_of(&node, "b");
            assert_eq!(facts.inconsistent, written);
            assert_eq!(facts.recording, !written);
            if !written {
                assert_eq!(facts.count, 65536);
                return;
            }
            let refused = node.clear_bitmap("b").expect_err("cannot be trusted");
            assert_eq!(refused.to_string(), "Bitmap 'b' is inconsistent and cannot be used");
            write(&disk, 0, 512, 3).await.expect("a write");
            node.remove_bitmap("b").await.expect("is removed");
            node.add_bitmap(new("b", 512, true)).await.expect("is added again");
            drop((disk, node));
            host.close().await.expect("closes");
        });
    }
}

#[test]
fn a_backups_successor_takes_over_or_is_merged_back() {
    let mut sim = Sim::new(SimConfig::new(5).calm());
    sim.block_on(0, |core| async move {
        let host = crate::simulated::host(&core);
        let disk = disk_with(&host, &core).await;
        let node = disk.node();
        for (name, end) in [("done", 0), ("failed", 1), ("part", 2), ("dropped", 3)] {
            node.add_bitmap(new(name, 4096, false)).await.expect("is added");
            write(&disk, 0, 8192, 1).await.expect("a write");
            let hold = node.hold_bitmap(name, "job0", BitmapAccess::Change).expect("is free");
            let busy = node.hold_bitmap(name, "job1", BitmapAccess::Read).expect_err("is held");
            assert_eq!(busy.kind(), ErrorKind::Busy);
            assert!(node.remove_bitmap(name).await.is_err(), "a busy bitmap stays");
            hold.freeze();
            write(&disk, 16384, 1, 2).await.expect("a write");
            assert_eq!(hold.view(DirtyBitmap::count), 2, "writes go to the successor");
            assert!(facts_of(&node, name).recording && facts_of(&node, name).busy);
            assert_eq!(node.bitmap_facts()[0].name, None, "the successor is shown before it");
            let mut left = DirtyBitmap::new(node.size(), 4096);
            left.set_range(liveblk::engine::address::GuestRange::new(4096, 1));
            match end {
                0 => hold.abdicate(),
                1 => hold.reclaim(),
                2 => hold.abdicate_except(&left),
                _ => drop(hold),
            }
            let expected: &[u64] = match end {
                0 => &[4],
                1 | 3 => &[0, 1, 4],
                _ => &[1, 4],
            };
            let dirty: Vec<u64> = node
                .bitmap(name)
                .unwrap()
                .view(|bits| (0..bits.granules()).filter(|at| bits.test(at * 4096)).collect());
            assert_eq!(dirty, expected, "{name}");
            node.remove_bitmap(name).await.expect("is free again");
        }
        let mut off = new("off", 4096, false);
        off.disabled = true;
        node.add_bitmap(off).await.expect("is added");
        let hold = node.hold_bitmap("off", "job0", BitmapAccess::Change).expect("is free");
        hold.freeze();
        write(&disk, 0, 1, 2).await.expect("a write");
        hold.abdicate();
        assert_eq!(facts_of(&node, "off").count, 0, "a disabled bitmap has a disabled successor");
    });
}

/// Order of one write (`engine::node`): bits are set after the data, also when the write failed or
/// was cut short, in memory and in what is stored.
#[test]
fn a_write_that_failed_or_was_cut_short_is_recorded() {
    for errno in [0, ENOSPC, EIO] {
        let mut sim = Sim::new(SimConfig::new(6).calm());
        let disk = sim.block_on(0, |core| async move {
            let host = crate::simulated::host(&core);
            let disk = disk_with(&host, &core).await;
            disk.node().add_bitmap(new("memory", 4096, false)).await.expect("is added");
            disk.node().add_bitmap(new("file", 4096, true)).await.expect("is added");
            write(&disk, 0, 32768, 1).await.expect("a write");
            for name in ["memory", "file"] {
                disk.node().clear_bitmap(name).expect("is cleared");
            }
            disk
        });
        let filter = OpFilter::any().file("/a").kind(SimOpKind::Write);
        sim.inject(FaultRule::once(filter, errno));
        sim.block_on(0, |_| async move {
            let ended = write(&disk, 8192, 16384, 2).await;
            assert_eq!(ended.is_err(), errno != 0);
            let node = disk.node();
            for name in ["memory", "file"] {
                assert_eq!(facts_of(&node, name).count, 16384, "{name} after errno {errno}");
            }
        });
    }
}

/// What there is to see of bitmaps, with a checksum of their bits.
fn picture(node: &Node) -> Vec<(BitmapFacts, Vec<u64>)> {
    let bits = |facts: &BitmapFacts| {
        let name = facts.name.as_deref().expect("nothing is frozen");
        let bitmap = node.bitmap(name).expect("is there");
        bitmap.view(|bits| {
            let granules = 0..bits.granules();
            granules.filter(|at| bits.test(at * bits.granularity())).collect()
        })
    };
    node.bitmap_facts().into_iter().map(|facts| (facts.clone(), bits(&facts))).collect()
}

fn of(name: &str) -> BitmapName {
    BitmapName { node: "a".into(), name: name.into() }
}

/// Conventions, rule 30: each step of a transaction fails in turn, and all is as it was.
#[test]
fn a_transaction_of_bitmaps_that_fails_anywhere_leaves_all_as_it_was() {
    let mut failed = 0;
    for after in 0..40 {
        let mut sim = Sim::new(SimConfig::new(7).calm());
        let disk = sim.block_on(0, |core| async move {
            let host = crate::simulated::host(&core);
            let disk = disk_with(&host, &core).await;
            let node = disk.node();
            node.add_bitmap(new("one", 4096, true)).await.expect("is added");
            node.add_bitmap(new("two", 65536, true)).await.expect("is added");
            write(&disk, 0, 32768, 1).await.expect("a write");
            // Stored once, so that marks have to be written again.
            node.set_writable(false).await.expect("becomes read-only");
            node.set_writable(true).await.expect("becomes writable");
            node.enable_bitmap("two", false).await.expect("is disabled");
            disk
        });
        let node = disk.node();
        let before = picture(&node);
        let kinds = [SimOpKind::Write, SimOpKind::Allocate];
        let filter = kinds.into_iter().fold(OpFilter::any().file("/a"), OpFilter::kind);
        sim.inject(FaultRule::once(filter, ENOSPC).after(after));
        let ended = sim.block_on(0, |core| async move {
            let add =
                |name: &str| BitmapAction::Add { node: "a".into(), new: new(name, 512, true) };
            let actions = [
                add("three"),
                BitmapAction::Merge { target: of("two"), sources: vec![of("one")] },
                BitmapAction::Enable(of("two")),
                BitmapAction::Clear(of("one")),
                BitmapAction::Disable(of("one")),
                add("four"),
            ];
            let actions = actions.map(|action| (core.id(), Action::Bitmap(action))).to_vec();
            transaction(&core, actions, CompletionMode::Individual).await
        });
        let now = picture(&node);
        match ended {
            Err(_) => {
                assert_eq!(now, before, "after {after} writes");
                failed += 1;
            }
            Ok(()) => {
                let names = names(&node);
                assert_eq!(names, ["four", "three", "two", "one"]);
                assert_eq!(facts_of(&node, "one").count, 0);
                assert_eq!(facts_of(&node, "two").count, 65536);
                assert!(facts_of(&node, "two").recording && !facts_of(&node, "one").recording);
            }
        }
        sim.clear_faults();
        drop(node);
        sim.block_on(0, |core| async move {
            drop(disk);
            crate::simulated::host(&core).close().await.expect("closes");
        });
        crate::simulated::inspect(sim.fs().clone(), "/a");
    }
    assert!((4..40).contains(&failed), "{failed} failed");
}

/// A bitmap that follows has every change of the disk, whichever node took it.
#[test]
fn a_bitmap_that_follows_goes_where_the_guests_go() {
    let mut sim = Sim::new(SimConfig::new(8).calm());
    sim.block_on(0, |core| async move {
        let host = crate::simulated::host(&core);
        let disk = disk_with(&host, &core).await;
        make(&core, "/b", 64).await;
        let (a, b) = (disk.node(), crate::simulated::open(&host, "/b").await.node());
        let follow = NewBitmap { follow: true, ..new("f", 4096, true) };
        a.add_bitmap(follow).await.expect("is added");
        a.add_bitmap(new("stays", 4096, true)).await.expect("is added");
        write(&disk, 0, 1, 1).await.expect("a write");
        let snapshot = Action::Snapshot { node: "a".into(), overlay: "b".into() };
        let actions = vec![(core.id(), snapshot)];
        transaction(&core, actions, CompletionMode::Individual).await.expect("is taken");
        write(&disk, 8192, 1, 2).await.expect("a write");
        assert_eq!(names(&b), ["f"]);
        assert_eq!(facts_of(&b, "f").count, 8192);
        assert_eq!(facts_of(&a, "f").count, 4096, "the old one stays as it was");
        assert_eq!(names(&a), ["stays", "f"]);
        drop((disk, a, b));
        host.close().await.expect("closes");
    });
    sim.block_on(0, |core| async move {
        let host = crate::simulated::host(&core);
        let disk = crate::simulated::open(&host, "/b").await;
        assert_eq!(facts_of(&disk.node(), "f").count, 8192);
        drop(disk);
        host.close().await.expect("closes");
    });
}
