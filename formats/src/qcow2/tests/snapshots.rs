//! Snapshots inside an image: what each change does, at every cut and with every failure.

use std::cell::Cell;
use std::rc::Rc;

use liveblk_engine::driver::sim::{FaultRule, OpFilter, Sim, SimConfig, SimOpKind};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::format::{InternalSnapshots, SnapshotInfo, ZeroMode};
use liveblk_engine::storage::{Memory, Storage};
use liveblk_engine::{ErrorKind, Result};

use super::mover::{Disk, calm, file, open};
use super::peer;
use crate::qcow2::{CreateOptions, check, create};

const KIB: u64 = 1024;
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

pub(super) fn snapshots(disk: &Disk) -> Rc<dyn InternalSnapshots> {
    disk.format.abilities().snapshots.expect("qcow2 has snapshots")
}

pub(super) async fn take(disk: &Disk, name: &str) -> Result<SnapshotInfo> {
    let info = SnapshotInfo { name: name.to_owned(), date_sec: 1_000_000, ..Default::default() };
    snapshots(disk).create(info).await
}

fn names(disk: &Disk) -> Vec<String> {
    snapshots(disk).list().into_iter().map(|info| info.name).collect()
}

async fn image(core: &Core, options: CreateOptions) -> Disk {
    let storage = file(core, "/image", true).await;
    create(core, &storage, options).await.expect("is created");
    open(core, storage, true).await.expect("opens")
}

async fn assert_sound(core: &Core, disk: &Disk, clean: bool) {
    let report = check(core, disk.format.data_storage()).await.expect("is checked");
    assert_eq!(report.corruptions, 0, "{:?}", report.problems);
    assert!(!clean || report.leaks == 0, "{:?}", report.problems);
}

pub(super) fn shapes() -> Vec<CreateOptions> {
    let shape = |bits: u32, order, version, extended_l2| CreateOptions {
        cluster_size: 1 << bits,
        refcount_order: order,
        version,
        extended_l2,
        ..CreateOptions::new(1 << 20)
    };
    vec![
        shape(16, 4, 3, false),
        shape(9, 6, 3, false),
        shape(12, 1, 3, false),
        shape(16, 4, 2, false),
        shape(14, 3, 3, true),
        shape(10, 2, 3, false),
    ]
}

#[test]
fn a_snapshot_keeps_what_was_and_apply_brings_it_back() {
    for options in shapes() {
        println!("{options:?}");
        calm(|core| async move {
            let disk = image(&core, options).await;
            disk.write(700, &[1; 300_000]).await.unwrap();
            disk.write(800_000, &[2; 70_000]).await.unwrap();
            let before = disk.read(0, 1 << 20).await.unwrap();
            let info = take(&disk, "first").await.expect("is taken");
            assert_eq!((info.id.as_str(), info.disk_size), ("1", 1 << 20));
            assert_sound(&core, &disk, false).await;
            assert_eq!(disk.read(0, 1 << 20).await.unwrap(), before);
            disk.write(100_000, &[3; 100_000]).await.unwrap();
            disk.write(900_000, &[4; 512]).await.unwrap();
            disk.zero(0, 65_536, ZeroMode::Unmap).await.unwrap();
            let after = disk.read(0, 1 << 20).await.unwrap();
            assert_ne!(after, before);
            let info = take(&disk, "second").await.expect("is taken");
            assert_eq!(info.id, "2");
            disk.write(0, &[5; 600_000]).await.unwrap();
            disk.format.flush().await.unwrap();
            assert_sound(&core, &disk, false).await;
            snapshots(&disk).apply("first").await.expect("is applied");
            assert_eq!(disk.read(0, 1 << 20).await.unwrap(), before);
            disk.write(0, &[6; 1024]).await.unwrap();
            disk.format.flush().await.unwrap();
            assert_sound(&core, &disk, false).await;
            snapshots(&disk).apply("second").await.expect("is applied");
            assert_eq!(disk.read(0, 1 << 20).await.unwrap(), after);
            snapshots(&disk).delete("1").await.expect("is deleted");
            assert_eq!(names(&disk), ["second"]);
            disk.write(2048, &[7; 512]).await.unwrap();
            disk.format.flush().await.unwrap();
            assert_sound(&core, &disk, false).await;
            snapshots(&disk).delete("second").await.expect("is deleted");
            disk.write(300_000, &[8; 5000]).await.unwrap();
            disk.format.close().await.expect("closes");
            assert_sound(&core, &disk, true).await;
            let again = open(&core, disk.format.data_storage().clone(), true).await.unwrap();
            assert_eq!(again.read(2048, 512).await.unwrap(), [7; 512]);
            assert!(names(&again).is_empty());
        });
    }
}

#[test]
fn refusals_say_why_and_change_nothing() {
    calm(|core| async move {
        let disk = image(&core, CreateOptions::new(1 << 20)).await;
        for result in [snapshots(&disk).delete("x").await, snapshots(&disk).apply("x").await] {
            let error = result.expect_err("there is none");
            assert_eq!(error.to_string(), "snapshot not found");
            assert_eq!(error.kind(), ErrorKind::NotFound);
        }
        take(&disk, "a").await.unwrap();
        take(&disk, "a").await.expect("names need not be unique");
        let ids: Vec<String> = snapshots(&disk).list().into_iter().map(|info| info.id).collect();
        assert_eq!(ids, ["1", "2"]);
        let long = take(&disk, &"n".repeat(70_000)).await.expect_err("too long");
        assert_eq!(long.kind(), ErrorKind::InvalidArgument);
        snapshots(&disk).delete("a").await.expect("the first of that name");
        assert_eq!(take(&disk, "b").await.unwrap().id, "3");
        disk.format.set_writable(false).await.unwrap();
        let error = take(&disk, "c").await.expect_err("read-only");
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        assert_eq!(snapshots(&disk).list().len(), 2);
        assert_sound(&core, &disk, true).await;
    });
}

#[test]
fn narrow_refcounts_refuse_what_they_cannot_count_and_nothing_changes() {
    for order in [0, 1] {
        calm(move |core| async move {
            let options = CreateOptions {
                cluster_size: 4096,
                refcount_order: order,
                ..CreateOptions::new(1 << 20)
            };
            let disk = image(&core, options).await;
            take(&disk, "empty").await.expect("refers to nothing");
            disk.write(0, &[1; 100_000]).await.unwrap();
            let fits = (1 << (1 << order)) - 2;
            for count in 0..fits {
                take(&disk, &format!("{count}")).await.expect("fits");
            }
            let error = take(&disk, "more").await.expect_err("does not fit");
            assert_eq!(error.errno(), 22);
            assert!(error.to_string().contains("refcount of"), "{error}");
            assert_eq!(snapshots(&disk).list().len(), fits + 1);
            disk.write(5000, &[2; 5000]).await.expect("goes on");
            disk.format.close().await.unwrap();
            assert_sound(&core, &disk, true).await;
        });
    }
}

#[test]
fn a_snapshot_waits_for_writes_in_flight_and_holds_new_ones_back() {
    use liveblk_engine::address::GuestRange;
    use liveblk_engine::format::WriteStep;
    calm(|core| async move {
        let disk = image(&core, CreateOptions::new(1 << 20)).await;
        disk.write(0, &[9; 4096]).await.unwrap();
        let new = GuestRange::new(128 * KIB, 512);
        let piece = loop {
            match disk.format.begin_write(new).unwrap() {
                WriteStep::Ready(piece) => break piece,
                WriteStep::Miss(miss) => disk.format.load(miss).await.unwrap(),
                WriteStep::Wait(_) => panic!("nobody else writes"),
            }
        };
        let WriteStep::Ready(in_place) = disk.format.begin_write(GuestRange::new(0, 512)).unwrap()
        else {
            panic!("is in place")
        };
        let snapshot = snapshots(&disk).create(SnapshotInfo::default());
        disk.format.flush().await.unwrap();
        let WriteStep::Wait(wait) = disk.format.begin_write(GuestRange::new(512, 512)).unwrap()
        else {
            panic!("is held back")
        };
        let pending = disk.format.pending(wait);
        assert!(snapshots(&disk).list().is_empty(), "two writes are in flight");
        let storage = disk.format.data_storage().clone();
        let bytes = core.pool().zeroed(65_536);
        bytes.fill(7);
        storage.write(piece.host.bytes() - piece.head, bytes, false).await.unwrap();
        piece.guard.complete();
        disk.format.flush().await.unwrap();
        assert!(snapshots(&disk).list().is_empty(), "one write is in flight");
        storage.write(in_place.host.bytes(), core.pool().zeroed(512), false).await.unwrap();
        in_place.guard.complete();
        snapshot.await.expect("goes on");
        pending.await;
        disk.write(0, &[1; 200_000]).await.unwrap();
        snapshots(&disk).apply("1").await.unwrap();
        assert_eq!(disk.read(0, 512).await.unwrap(), [0; 512]);
        assert_eq!(disk.read(512, 512).await.unwrap(), [9; 512]);
        assert_eq!(disk.read(128 * KIB, 512).await.unwrap(), [7; 512]);
    });
}

/// Writers that never stop: what a snapshot holds of each sector is no older than what was complete
/// before it began, no younger than what had begun before it ended.
#[test]
fn snapshots_under_writes_in_flight_are_of_one_instant() {
    const SECTORS: u64 = 400;
    for seed in 0..6 {
        let mut sim = Sim::new(SimConfig::new(seed));
        sim.block_on(0, move |core| async move {
            let options = CreateOptions { cluster_size: 4096, ..CreateOptions::new(SECTORS * 512) };
            let disk = image(&core, options).await;
            let (begun, ended) = (Rc::new(Cell::new(0_u64)), Rc::new(Cell::new(0_u64)));
            let stop = Rc::new(Cell::new(false));
            let writer = {
                let (disk, begun, ended) = (disk.clone(), Rc::clone(&begun), Rc::clone(&ended));
                let stop = Rc::clone(&stop);
                core.spawn(Class::Guest, async move {
                    while !stop.get() {
                        begun.set(begun.get() + 1);
                        // Every sector in turn, so that an instant is one number.
                        let at = begun.get() % SECTORS * 512;
                        let bytes = begun.get().to_be_bytes().repeat(64);
                        disk.write(at, &bytes).await.expect("writes");
                        ended.set(begun.get());
                    }
                })
            };
            let mut instants = Vec::new();
            for round in 0..5 {
                for _ in 0..150 {
                    disk.read(0, 512).await.unwrap();
                }
                let before = ended.get();
                take(&disk, &format!("{round}")).await.expect("is taken");
                instants.push((round, before, begun.get()));
                if round == 2 {
                    snapshots(&disk).delete("1").await.expect("is deleted");
                }
            }
            stop.set(true);
            writer.await;
            for (round, before, after) in instants.into_iter().filter(|(round, ..)| *round != 0) {
                snapshots(&disk).apply(&format!("{}", round + 1)).await.expect("is applied");
                let bytes = disk.read(0, SECTORS * 512).await.unwrap();
                let values: Vec<u64> = bytes
                    .chunks(512)
                    .map(|sector| u64::from_be_bytes(sector[..8].try_into().unwrap()))
                    .collect();
                let last = values.iter().copied().max().unwrap();
                assert!((before..=after).contains(&last), "{before} {last} {after}");
                for (sector, value) in values.iter().enumerate() {
                    let behind = (last + SECTORS - sector as u64) % SECTORS;
                    assert_eq!(*value, last.saturating_sub(behind), "sector {sector}");
                }
            }
            disk.format.close().await.expect("closes");
            assert_sound(&core, &disk, true).await;
        });
    }
}

/// What is done to an image with one snapshot, "old", and content over it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Change {
    Create,
    Delete,
    Apply,
    Shrink,
    Grow,
}

const CHANGES: [Change; 5] =
    [Change::Create, Change::Delete, Change::Apply, Change::Shrink, Change::Grow];

async fn prepare(core: Core) {
    let options = CreateOptions { cluster_size: 512, ..CreateOptions::new(64 * KIB) };
    let disk = image(&core, options).await;
    disk.write(0, &[1; 20_000]).await.unwrap();
    take(&disk, "old").await.unwrap();
    disk.write(10_000, &[2; 50_000]).await.unwrap();
    disk.zero(4096, 4096, ZeroMode::Unmap).await.unwrap();
    disk.format.close().await.unwrap();
}

impl Change {
    async fn run(self, disk: &Disk) -> Result<()> {
        match self {
            Self::Create => take(disk, "new").await.map(drop),
            Self::Delete => snapshots(disk).delete("old").await,
            Self::Apply => snapshots(disk).apply("old").await,
            Self::Shrink => disk.format.resize(30_208).await,
            Self::Grow => disk.format.resize(9 << 20).await,
        }
    }
}

fn now_content() -> Vec<u8> {
    let mut bytes = vec![1; 10_000];
    bytes.resize(60_000, 2);
    bytes.resize(65_536, 0);
    bytes[4096..8192].fill(0);
    bytes
}

fn old_content() -> Vec<u8> {
    let mut bytes = vec![1; 20_000];
    bytes.resize(65_536, 0);
    bytes
}

/// The image is as before or as after `change`; answers whether it is as after.
async fn judge(disk: &Disk, change: Change) -> bool {
    let (size, list) = (disk.format.size(), names(disk));
    let bytes = disk.read(0, size.min(65_536)).await.expect("reads");
    let (now, old) = (now_content(), old_content());
    let after = match change {
        Change::Create => list.len() == 2,
        Change::Delete => list.is_empty(),
        Change::Apply => bytes == old,
        Change::Shrink => size == 30_208,
        Change::Grow => size == 9 << 20,
    };
    let expected = if change == Change::Apply && after { &old } else { &now };
    assert!(bytes[..] == expected[..bytes.len()], "{change:?} after: {after}");
    let resized = matches!(change, Change::Shrink | Change::Grow) && after;
    assert_eq!(size == 64 * KIB, !resized, "{size}");
    let whole = matches!(change, Change::Create | Change::Delete) && after;
    assert_eq!(list.len() == 1, !whole);
    if change == Change::Grow && after {
        assert_eq!(disk.read(9 * KIB * KIB - 4096, 4096).await.unwrap(), [0; 4096]);
    }
    after
}

/// Work after a change: everything can be used, and both snapshots are what they were.
async fn use_it(core: &Core, disk: &Disk) {
    disk.write(0, &[3; 25_000]).await.expect("writes");
    for name in names(disk) {
        let expected = if name == "old" { old_content() } else { now_content() };
        snapshots(disk).apply(&name).await.expect("is applied");
        assert_eq!(disk.format.size(), 64 * KIB);
        assert!(disk.read(0, 65_536).await.unwrap() == expected, "{name}");
        disk.write(3, &[4; 6000]).await.expect("writes");
    }
    for name in names(disk) {
        snapshots(disk).delete(&name).await.expect("is deleted");
    }
    disk.format.close().await.expect("closes");
    let report = check(core, disk.format.data_storage()).await.expect("is checked");
    assert_eq!(report.corruptions, 0, "{:?}", report.problems);
}

/// Rows R1 and R3 of the list of known failures: nothing live is ever free, at any cut.
#[test]
fn a_cut_at_every_step_of_a_change_leaves_the_old_or_the_new_image() {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.block_on(0, prepare);
    let start = sim.crash();
    for change in CHANGES {
        let (mut before, mut after, mut step) = (0, 0, 0);
        loop {
            let mut sim = Sim::with_fs(SimConfig::new(7).calm(), start.after_kill());
            let core = sim.core(0);
            let (task_core, done) = (core.clone(), Rc::new(Cell::new(false)));
            let ended = Rc::clone(&done);
            drop(core.spawn(Class::Guest, async move {
                let storage = file(&task_core, "/image", false).await;
                let disk = open(&task_core, storage, true).await.expect("opens");
                change.run(&disk).await.expect("is done");
                ended.set(true);
            }));
            sim.run_steps(step);
            for seed in 0..3 {
                let left = sim.fs().after_power_cut(seed);
                if step % 16 == 0 && seed == 0 {
                    peer::check_exported(&left, "/image");
                }
                let mut sim = Sim::with_fs(SimConfig::new(seed).calm(), left);
                let durable = done.get();
                let is_after = sim.block_on(0, move |core| async move {
                    let storage = file(&core, "/image", false).await;
                    let report = check(&core, &storage).await.expect("is checked");
                    assert_eq!(report.corruptions, 0, "{change:?}: {:?}", report.problems);
                    let disk = open(&core, storage, true).await.expect("opens");
                    let after = judge(&disk, change).await;
                    assert!(after || !durable, "{change:?} was answered");
                    if step % 8 == 0 && seed == 1 {
                        use_it(&core, &disk).await;
                    }
                    after
                });
                if is_after { after += 1 } else { before += 1 }
            }
            if done.get() {
                break;
            }
            step += 1;
        }
        println!("{change:?}: {step} steps, {before} states before, {after} after");
        assert!(before > 0 && after > 0);
    }
}

/// Rows Q9 and R2: whatever operation fails, the change is undone or done, and work goes on.
#[test]
fn the_failure_of_any_operation_undoes_a_change() {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.block_on(0, prepare);
    let start = sim.crash();
    let kinds = [
        (SimOpKind::Write, ENOSPC),
        (SimOpKind::Write, EIO),
        (SimOpKind::Read, EIO),
        (SimOpKind::Sync, EIO),
    ];
    for (change, (kind, errno)) in
        CHANGES.into_iter().flat_map(|change| kinds.map(|kind| (change, kind)))
    {
        let (mut failures, mut passed) = (0, 0);
        for nth in 0.. {
            let mut sim = Sim::with_fs(SimConfig::new(3).calm(), start.after_kill());
            let disk = sim.block_on(0, |core| async move {
                let storage = file(&core, "/image", false).await;
                open(&core, storage, true).await.expect("opens")
            });
            sim.inject(FaultRule::once(OpFilter::any().kind(kind), errno).after(nth));
            let changed = disk.clone();
            let result = sim.block_on(0, move |_| async move { change.run(&changed).await });
            sim.clear_faults();
            let healthy = sim.block_on(0, move |core| async move {
                let after = judge(&disk, change).await;
                assert!(after || result.is_err());
                let healthy = disk.write(0, &[1; 100]).await.is_ok();
                assert!(healthy || errno == EIO, "{change:?} {nth}: space is back");
                if healthy {
                    assert_eq!(result.is_ok(), after, "{change:?} {nth}: {result:?}");
                    use_it(&core, &disk).await;
                }
                let report = check(&core, disk.format.data_storage()).await.expect("is checked");
                assert_eq!(report.corruptions, 0, "{change:?}: {:?}", report.problems);
                (healthy, result.is_err())
            });
            failures += u64::from(healthy.1);
            let left = sim.fs();
            let mut sim = Sim::with_fs(SimConfig::new(3).calm(), left);
            sim.block_on(0, move |core| async move {
                let storage = file(&core, "/image", false).await;
                let disk = open(&core, storage, true).await.expect("opens");
                if !healthy.0 {
                    judge(&disk, change).await;
                    use_it(&core, &disk).await;
                }
            });
            // Some failures only cost space: go on until no operation is left to fail.
            passed = if healthy.1 { 0 } else { passed + 1 };
            if passed == 8 {
                println!("{change:?} {kind:?} {errno}: {nth} operations, {failures} failures");
                break;
            }
        }
    }
}

/// Clusters of packed data are shared by many entries: going back takes references from where the
/// disk has them and adds them elsewhere, and only what comes of it must be countable.
#[test]
fn going_back_needs_no_more_references_than_the_disk_has_afterwards() {
    calm(|core| async move {
        let storage = Storage::Memory(Memory::new(0));
        // At most 15 references.
        let options =
            CreateOptions { cluster_size: 4096, refcount_order: 2, ..CreateOptions::new(1 << 20) };
        create(&core, &storage, options).await.expect("is created");
        let disk = open(&core, storage.clone(), true).await.expect("opens");
        disk.write_compressed(0, &[1; 5 * 4096]).await.expect("writes one cluster of the file");
        take(&disk, "all").await.expect("10 references");
        disk.write(0, &[2; 4096]).await.expect("writes");
        take(&disk, "but one").await.expect("13 references");
        snapshots(&disk).apply("all").await.expect("14 references");
        disk.write(4096, &[3; 3 * 4096]).await.expect("writes");
        take(&disk, "two of them").await.expect("13 references");
        snapshots(&disk).apply("but one").await.expect("15 references, on the way there 16");
        let bytes = disk.read(0, 5 * 4096).await.expect("reads");
        assert!(bytes[..4096] == [2; 4096] && bytes[4096..] == [1; 4 * 4096]);
        let error = take(&disk, "no more").await.expect_err("19 references");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        let error = snapshots(&disk).apply("all").await.expect_err("16 references");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert_eq!(disk.read(0, 5 * 4096).await.expect("reads"), bytes, "nothing changed");
        disk.format.close().await.expect("closes");
        let report = check(&core, &storage).await.expect("is checked");
        assert!(report.is_clean(), "{:?}", report.problems);
    });
}
