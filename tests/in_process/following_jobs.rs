//! Jobs that follow guests (mirror, active commit) when the guests' disk changes below them: guest
//! writes that reach the base before they are answered, a disk that grows, snapshots.
use std::rc::Rc;

use crate::chains::{self, Chain, Layer};
use crate::rig::{self, Log, SECTOR, SIZE, content, disk, first_difference};
use liveblk_engine::driver::sim::{FaultRule, HoldPoint, OpFilter, Sim, SimConfig, SimOpKind};
use liveblk_engine::executor::Core;
use liveblk_engine::format::Preallocation;
use liveblk_engine::node::{Disk, Node, WriteFlags};
use liveblk_jobs::{
    BackupSpec, CommitSpec, CopyMode, JobManager, MirrorSpec, NewImageMode, SnapshotFile, Status,
    SyncMode, Verb, resize, snapshot_file, start_backup, start_commit, start_mirror,
};

fn commit(top: &Rc<Node>, base: &Rc<Node>) -> CommitSpec {
    CommitSpec { job: rig::options("j"), ..CommitSpec::new(top, top, base) }
}

async fn ready(core: &Core) {
    JobManager::of(core).until("j", |status| status == Status::Ready).await;
}

#[test]
fn with_write_blocking_an_answered_write_is_in_the_base() {
    for seed in 0..8 {
        let mut sim = rig::world(seed);
        let layers = if seed % 3 == 0 { Layer::over_raw() } else { Layer::usual(seed) };
        sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &layers, seed % 2 == 0).await;
            let (d, base) = (chain.top(), chain.node(0));
            let first = content(&d).await;
            let (log, guest) = (Log::new(), disk(&d));
            let spec = CommitSpec { copy_mode: CopyMode::WriteBlocking, ..commit(&d, &base) };
            start_commit(spec).await.expect("it starts");
            ready(&core).await;
            for _ in 0..20 {
                log.write_one(&core, 0, &guest, 0, SIZE / SECTOR).await;
                let now = log.model(0, &first);
                assert_eq!(first_difference(&content(&base).await, &now), None, "seed {seed}");
                assert_eq!(first_difference(&content(&d).await, &now), None, "seed {seed}");
            }
            let manager = JobManager::of(&core);
            manager.job_verb("j", Verb::Complete).expect("completes");
            rig::gone(&core, "j").await;
            assert_eq!(guest.node_name(), base.name());
            chain.reopen_and_compare(&log.model(0, &first), guest).await;
        });
    }
}

#[test]
fn the_mode_of_an_active_commit_may_change_under_overlapping_writes() {
    for seed in 20..32 {
        let mut sim = rig::world(seed);
        sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &Layer::usual(seed), seed % 2 == 0).await;
            let (d, base) = (chain.top(), chain.node(usize::from(seed % 5 == 0)));
            let first = content(&d).await;
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 4);
            start_commit(commit(&d, &base)).await.expect("it starts");
            let manager = JobManager::of(&core);
            for turn in 0..30 {
                let mode = [CopyMode::WriteBlocking, CopyMode::Background][turn % 2];
                manager.change("j", mode).expect("it runs");
                core.sleep(core.random() % 300_000).await;
            }
            ready(&core).await;
            let complete = seed % 3 > 0;
            if complete {
                manager.job_verb("j", Verb::Complete).expect("completes");
            } else {
                manager.block_job_verb("j", Verb::Cancel, false).expect("ends with a copy");
            }
            rig::gone(&core, "j").await;
            core.sleep(1_000_000).await;
            guests.stop().await;
            assert_eq!(log.failures.get(), 0);
            assert_eq!(guest.node_name(), if complete { base.name() } else { d.name() });
            let now = log.model(0, &first);
            assert_eq!(first_difference(&content(&guest.node()).await, &now), None);
            chain.reopen_and_compare(&now, guest).await;
        });
    }
}

fn mirror(source: &Rc<Node>, target: &Rc<Node>, copy_mode: CopyMode) -> MirrorSpec {
    MirrorSpec {
        job: rig::options("j"),
        source: source.clone(),
        target: target.clone(),
        sync: SyncMode::Full,
        copy_mode,
        granularity: None,
        allow_larger_target: false,
        more: Default::default(),
    }
}

/// What is added; no multiple of a granule.
const MORE: u64 = 300 * SECTOR;

async fn grow(node: &Rc<Node>) -> Result<(), String> {
    let grown = resize(node, SIZE + MORE, Preallocation::Off).await;
    grown.map_err(|error| error.to_string())
}

async fn write(disk: &Disk, offset: u64, len: usize, byte: u8) {
    let buf = disk.core().pool().alloc(len);
    buf.fill(byte);
    disk.write(offset, buf, WriteFlags::default()).await.expect("the guest writes");
}

/// Guests that go on and one that writes what was added, as soon as it can.
async fn grow_and_write(core: &Core, log: &Rc<Log>, guest: &Disk, node: &Rc<Node>) {
    grow(node).await.expect("it grows");
    assert_eq!(guest.size(), SIZE + MORE);
    let first = SIZE / SECTOR;
    for _ in 0..6 {
        log.write_one(core, 0, guest, first, MORE / SECTOR).await;
    }
    log.write(core, 0, guest, first - 8, 16, false).await;
}

fn longer(mut first: Vec<u8>) -> Vec<u8> {
    first.resize((SIZE + MORE) as usize, 0);
    first
}

#[test]
fn a_disk_grows_under_a_mirror_and_what_is_written_there_reaches_the_target() {
    for seed in 100..124 {
        let mut sim = rig::world(seed);
        sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &Layer::usual(0), true).await;
            let d = chain.top();
            let target = chains::fresh(&core, "target").await;
            let first = longer(content(&d).await);
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            let mode = [CopyMode::Background, CopyMode::WriteBlocking][(seed % 2) as usize];
            start_mirror(mirror(&d, &target, mode)).await.expect("it starts");
            if seed % 3 > 0 {
                ready(&core).await;
            }
            core.sleep(core.random() % 1_000_000).await;
            grow_and_write(&core, &log, &guest, &d).await;
            assert_eq!(target.size(), SIZE + MORE);
            ready(&core).await;
            let manager = JobManager::of(&core);
            let smaller = resize(&d, SIZE, Preallocation::Off).await.expect_err("too late");
            assert!(smaller.to_string().contains("job 'j' follows can grow, not shrink"));
            manager.job_verb("j", Verb::Complete).expect("completes");
            rig::gone(&core, "j").await;
            core.sleep(500_000).await;
            guests.stop().await;
            assert_eq!(&*guest.node_name(), "target");
            assert_eq!(log.failures.get(), 0);
            let now = log.model(0, &first);
            assert_eq!(first_difference(&content(&target).await, &now), None, "seed {seed}");
        });
    }
}

#[test]
fn a_disk_grows_under_an_active_commit_over_smaller_and_larger_bases() {
    for seed in 130..154 {
        let mut sim = rig::world(seed);
        sim.block_on(0, |core| async move {
            let mut layers = if seed % 4 == 0 { Layer::over_raw() } else { Layer::usual(seed) };
            // One that is larger holds bytes where the disk grows.
            let large = seed % 3 == 0;
            if large {
                layers[0].size = 2 * SIZE;
                layers[0].acts.push(chains::Act::Write(SIZE, 65536, 0x99));
            }
            let chain = Chain::make(&core, &layers, seed % 2 == 0).await;
            let (d, base) = (chain.top(), chain.node(0));
            let first = longer(content(&d).await);
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            let copy_mode = [CopyMode::Background, CopyMode::WriteBlocking][(seed % 2) as usize];
            start_commit(CommitSpec { copy_mode, ..commit(&d, &base) }).await.expect("it starts");
            if seed % 5 > 1 {
                ready(&core).await;
            }
            core.sleep(core.random() % 1_000_000).await;
            grow_and_write(&core, &log, &guest, &d).await;
            ready(&core).await;
            JobManager::of(&core).job_verb("j", Verb::Complete).expect("completes");
            rig::gone(&core, "j").await;
            core.sleep(500_000).await;
            guests.stop().await;
            assert_eq!(guest.node_name(), base.name());
            assert_eq!(guest.size(), if large { 2 * SIZE } else { SIZE + MORE });
            assert_eq!(log.failures.get(), 0);
            let now = log.model(0, &first);
            let found = content(&base).await;
            assert_eq!(first_difference(&found[..now.len()], &now), None, "seed {seed}");
        });
    }
}

/// A run of dirty bytes that ended at the old end, within a granule, was copied again and again.
#[test]
fn a_mirror_becomes_ready_when_its_disk_grew_from_the_middle_of_a_granule() {
    for seed in 0..12 {
        let mut sim = rig::world(seed);
        sim.block_on(0, move |core| async move {
            let chain = Chain::make(&core, &Layer::usual(0), true).await;
            let d = chain.top();
            let target = chains::fresh(&core, "target").await;
            let mut first = content(&d).await;
            let (log, guest) = (Log::new(), disk(&d));
            let spec = MirrorSpec {
                granularity: Some(128 << 10),
                ..mirror(&d, &target, CopyMode::Background)
            };
            start_mirror(spec).await.expect("it starts");
            for step in 1..=8 {
                let end = d.size() / SECTOR;
                log.write(&core, 0, &guest, end - 8, 8, false).await;
                core.sleep(core.random() % 60_000).await;
                let size = SIZE + step * 77 * SECTOR;
                resize(&d, size, Preallocation::Off).await.expect("it grows");
                first.resize(size as usize, 0);
                log.write(&core, 0, &guest, end, 8, false).await;
            }
            let late = core.sleep(10_000_000_000);
            let found = liveblk_engine::executor::sync::select(ready(&core), late).await;
            assert!(
                matches!(found, liveblk_engine::executor::sync::Either::First(())),
                "seed {seed}: the mirror copies the same bytes for ever"
            );
            JobManager::of(&core).job_verb("j", Verb::Complete).expect("completes");
            rig::gone(&core, "j").await;
            let now = log.model(0, &first);
            assert_eq!(first_difference(&content(&target).await, &now), None, "seed {seed}");
        });
    }
}

#[test]
fn a_target_that_cannot_grow_is_told_and_nothing_has_changed() {
    let mut refused = 0;
    for nth in 0..6 {
        let mut sim = rig::world(160);
        let (chain, d, target) = sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &Layer::usual(0), true).await;
            let d = chain.top();
            let target = chains::fresh(&core, "target").await;
            start_mirror(mirror(&d, &target, CopyMode::Background)).await.expect("it starts");
            ready(&core).await;
            (chain, d, target)
        });
        // A failed flush would be remembered for good.
        let filter = OpFilter::any().file("/target.img").kind(SimOpKind::Write);
        sim.inject(FaultRule::once(filter, 28).after(nth));
        let (node, other) = (d.clone(), target.clone());
        refused += sim.block_on(0, |_| async move {
            let Err(text) = grow(&node).await else {
                assert_eq!((node.size(), other.size()), (SIZE + MORE, SIZE + MORE));
                return 0;
            };
            let begins = "Node 'n3' cannot grow: mirror job 'j' follows it, and its target \
                          'target' cannot grow: ";
            assert!(text.starts_with(begins), "{text}");
            assert_eq!((node.size(), other.size()), (SIZE, SIZE));
            1
        });
        // There is room again.
        sim.clear_faults();
        sim.block_on(0, |core| async move {
            let guest = disk(&d);
            let mut now = longer(content(&d).await);
            write(&guest, SIZE - 4096, 4096, 0x5c).await;
            if d.size() == SIZE {
                grow(&d).await.expect("there is room again");
            }
            write(&guest, SIZE, 8192, 0x5d).await;
            JobManager::of(&core).job_verb("j", Verb::Complete).expect("completes");
            rig::gone(&core, "j").await;
            assert_eq!(&*guest.node_name(), "target", "write {nth} of the target fails");
            let at = SIZE as usize;
            now[at - 4096..at].fill(0x5c);
            now[at..at + 8192].fill(0x5d);
            assert_eq!(first_difference(&content(&target).await, &now), None);
            drop(chain);
        });
    }
    assert!(refused > 0, "no failure hit the growth of the target");
}

#[test]
fn a_source_that_does_not_grow_leaves_the_target_as_it_was() {
    let mut sim = rig::world(170);
    let (chain, d, target) = sim.block_on(0, |core| async move {
        let chain = Chain::make(&core, &Layer::usual(0), true).await;
        let d = chain.top();
        let target = chains::fresh(&core, "target").await;
        start_mirror(mirror(&d, &target, CopyMode::Background)).await.expect("it starts");
        ready(&core).await;
        (chain, d, target)
    });
    let filter = OpFilter::any().file(&chains::path(3)).kind(SimOpKind::Write);
    sim.inject(FaultRule::once(filter, 28));
    sim.block_on(0, |core| async move {
        let first = content(&d).await;
        grow(&d).await.expect_err("the source is full");
        assert_eq!((d.size(), target.size()), (SIZE, SIZE));
        let guest = disk(&d);
        write(&guest, SIZE - 512, 512, 0x5e).await;
        JobManager::of(&core).job_verb("j", Verb::Complete).expect("completes");
        rig::gone(&core, "j").await;
        let mut now = first;
        now[SIZE as usize - 512..].fill(0x5e);
        assert_eq!(first_difference(&content(&target).await, &now), None);
        drop(chain);
    });
}

#[test]
fn a_cancel_ends_a_growth_that_waits_for_a_hung_target() {
    let mut sim = rig::world(172);
    let (chain, d) = sim.block_on(0, |core| async move {
        let chain = Chain::make(&core, &Layer::usual(0), true).await;
        let d = chain.top();
        let target = chains::fresh(&core, "target").await;
        start_mirror(mirror(&d, &target, CopyMode::Background)).await.expect("it starts");
        ready(&core).await;
        (chain, d)
    });
    let hung = sim.hold(OpFilter::any().file("/target.img"), HoldPoint::Start);
    sim.block_on(0, |core| async move {
        let growing = {
            let d = d.clone();
            core.spawn(liveblk_engine::executor::Class::Guest, async move { grow(&d).await })
        };
        core.sleep(50_000_000).await;
        assert_eq!(d.size(), SIZE, "the target comes first");
        let asked = core.now();
        JobManager::of(&core).job_verb("j", Verb::Cancel).expect("cancels");
        rig::gone(&core, "j").await;
        growing.await.expect("nobody is in the way any more");
        assert!(core.now() - asked < 1_000_000_000);
        assert_eq!(d.size(), SIZE + MORE);
        drop(chain);
    });
    hung.release();
    sim.run_idle();
}

/// Both sides are what they were or have grown, whenever the power goes.
#[test]
fn a_power_cut_in_a_growth_leaves_both_disks_whole() {
    for cut_after in 0..12 {
        let mut sim = rig::world(180);
        let (first, chain, d) = sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &Layer::usual(0), true).await;
            let d = chain.top();
            let target = chains::fresh(&core, "target").await;
            start_mirror(mirror(&d, &target, CopyMode::WriteBlocking)).await.expect("it starts");
            ready(&core).await;
            d.flush(liveblk_engine::node::Origin::External).await.expect("durable");
            (content(&d).await, chain, d)
        });
        let node = d.clone();
        let _held = sim.hold_nth(OpFilter::any(), HoldPoint::Start, cut_after);
        sim.core(0).spawn(liveblk_engine::executor::Class::Guest, async move {
            drop(grow(&node).await);
        });
        sim.run_idle();
        let disk = sim.crash();
        drop((chain, d));
        let mut after = Sim::with_fs(SimConfig::new(1), disk);
        after.block_on(0, |core| async move {
            let chain = Chain::open(&core, &Layer::usual(0), true).await;
            let found = content(&chain.top()).await;
            assert_eq!(first_difference(&found[..first.len()], &first), None);
            assert!(found[first.len()..].iter().all(|byte| *byte == 0));
        });
    }
}

async fn snapshot(core: &Core, node: &str, name: &str) -> Result<(), String> {
    let snapshot = SnapshotFile {
        node: node.into(),
        file: format!("/{name}.img").into(),
        overlay: Some(name.into()),
        format: "qcow2".into(),
        mode: NewImageMode::AbsolutePaths,
    };
    snapshot_file(core, core.id(), snapshot).await.map_err(|error| error.to_string())
}

#[test]
fn a_mirror_follows_the_guests_through_snapshots() {
    for seed in 200..230 {
        let mut sim = rig::world(seed);
        sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &Layer::usual(0), true).await;
            let d = chain.top();
            let target = chains::fresh(&core, "target").await;
            let first = content(&d).await;
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            let mode = [CopyMode::Background, CopyMode::WriteBlocking][(seed % 2) as usize];
            start_mirror(mirror(&d, &target, mode)).await.expect("it starts");
            if seed % 3 == 0 {
                ready(&core).await;
            }
            core.sleep(core.random() % 2_000_000).await;
            snapshot(&core, "n3", "e").await.expect("it is taken");
            let from = core.now();
            assert_eq!(&*guest.node_name(), "e");
            if seed % 4 == 0 {
                core.sleep(core.random() % 1_000_000).await;
                snapshot(&core, "e", "f").await.expect("it is taken");
            }
            ready(&core).await;
            log.prove_instant(&[(0, &first, &content(&d).await)], 0, from);
            core.sleep(core.random() % 2_000_000).await;
            JobManager::of(&core).job_verb("j", Verb::Complete).expect("completes");
            rig::gone(&core, "j").await;
            core.sleep(500_000).await;
            guests.stop().await;
            assert_eq!(&*guest.node_name(), "target", "seed {seed}");
            assert_eq!(log.failures.get(), 0);
            let now = log.model(0, &first);
            assert_eq!(first_difference(&content(&target).await, &now), None, "seed {seed}");
            assert!(!d.is_writable() && d.users().len() == 1, "{:?}", d.users());
        });
    }
}

#[test]
fn an_active_commit_follows_the_guests_and_takes_the_snapshot_in() {
    for seed in 240..264 {
        let mut sim = rig::world(seed);
        sim.block_on(0, |core| async move {
            let layers = if seed % 5 == 0 { Layer::over_raw() } else { Layer::usual(seed) };
            let chain = Chain::make(&core, &layers, true).await;
            let (d, base) = (chain.top(), chain.node(0));
            let first = content(&d).await;
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            let copy_mode = [CopyMode::Background, CopyMode::WriteBlocking][(seed % 2) as usize];
            start_commit(CommitSpec { copy_mode, ..commit(&d, &base) }).await.expect("it starts");
            if seed % 3 == 0 {
                ready(&core).await;
            }
            core.sleep(core.random() % 1_000_000).await;
            snapshot(&core, "n3", "e").await.expect("it is taken");
            assert_eq!(&*guest.node_name(), "e");
            assert!(d.is_stale(), "what lies below it changes with the guests");
            core.sleep(core.random() % 2_000_000).await;
            ready(&core).await;
            let manager = JobManager::of(&core);
            let complete = seed % 4 > 0;
            if complete {
                manager.job_verb("j", Verb::Complete).expect("completes");
            } else {
                manager.block_job_verb("j", Verb::Cancel, seed % 8 == 0).expect("cancels");
            }
            rig::gone(&core, "j").await;
            core.sleep(500_000).await;
            guests.stop().await;
            let at = if complete { base.name() } else { "e".into() };
            assert_eq!(guest.node_name(), at, "seed {seed}");
            assert_eq!(log.failures.get(), 0);
            let now = log.model(0, &first);
            let found = content(&guest.node()).await;
            assert_eq!(first_difference(&found[..now.len()], &now), None, "seed {seed}");
        });
    }
}

#[test]
fn a_backup_stays_with_the_disk_of_its_start_under_a_snapshot() {
    for seed in 270..278 {
        let mut sim = rig::world(seed);
        sim.block_on(0, |core| async move {
            let chain = Chain::make(&core, &Layer::usual(0), true).await;
            let d = chain.top();
            let target = chains::fresh(&core, "target").await;
            let first = content(&d).await;
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            core.sleep(core.random() % 1_000_000).await;
            let from = core.now();
            let mut spec = BackupSpec {
                job: rig::options("j"),
                source: d.clone(),
                target: target.clone(),
                sync: SyncMode::Full,
                allow_larger_target: false,
                compress: false,
                more: Default::default(),
            };
            spec.job.speed = 8 << 20;
            start_backup(spec).await.expect("it starts");
            let to = core.now();
            core.sleep(core.random() % 1_000_000).await;
            snapshot(&core, "n3", "e").await.expect("it is taken");
            rig::gone(&core, "j").await;
            guests.stop().await;
            assert_eq!(log.failures.get(), 0);
            log.prove_instant(&[(0, &first, &content(&target).await)], from, to);
        });
    }
}
