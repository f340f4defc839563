//! Copies by shared blocks on the simulator: nothing goes through memory, and guests, failures and
//! power cuts find what they find with other copies.
use std::rc::Rc;

use crate::rig::*;
use liveblk_engine::driver::sim::{FaultRule, FsConfig, HoldPoint, OpFilter, Sim, SimConfig};
use liveblk_engine::driver::sim::{SimFs, SimOpKind};
use liveblk_engine::executor::Class;
use liveblk_engine::node::Node;
use liveblk_jobs::{
    BackupOptions, BackupSpec, CopyMode, JobCounters, JobManager, MirrorSpec, Status, SyncMode,
    Verb, start_backup, start_mirror,
};

const EOPNOTSUPP: i32 = 95;
const EXDEV: i32 = 18;
const EINVAL: i32 = 22;
const ENOSPC: i32 = 28;
const EIO: i32 = 5;

/// A world whose files can share blocks, with a disk and an old target.
fn sharing_world(seed: u64, first: &[u8]) -> Sim {
    let fs = SimFs::new(FsConfig { shares: true, ..FsConfig::default() });
    fs.create("/d", first);
    // Old content of the target must not shine through.
    fs.create("/t", &vec![0xaa; first.len()]);
    Sim::with_fs(SimConfig::new(seed), fs)
}

fn backup(source: &Rc<Node>, target: &Rc<Node>) -> BackupSpec {
    BackupSpec {
        job: options("j"),
        source: source.clone(),
        target: target.clone(),
        sync: SyncMode::Full,
        allow_larger_target: false,
        compress: false,
        more: BackupOptions { use_copy_range: true, ..BackupOptions::default() },
    }
}

fn mirror(source: &Rc<Node>, target: &Rc<Node>, copy_mode: CopyMode) -> MirrorSpec {
    MirrorSpec {
        job: options("j"),
        source: source.clone(),
        target: target.clone(),
        sync: SyncMode::Full,
        copy_mode,
        granularity: None,
        allow_larger_target: false,
        more: Default::default(),
    }
}

fn shares() -> OpFilter {
    OpFilter::any().kind(SimOpKind::Share)
}

/// An undisturbed backup and what its copies moved.
fn quiet_backup(sim: &mut Sim, asks: bool) -> JobCounters {
    let first = sim.fs().read("/d").expect("a disk");
    sim.block_on(0, move |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let mut spec = backup(&d, &t);
        spec.more.use_copy_range = asks;
        let job = start_backup(spec).await.expect("it starts");
        gone(&core, "j").await;
        assert_eq!(first_difference(&content(&t).await, &first), None);
        job.counters()
    })
}

#[test]
fn a_copy_between_files_that_can_share_moves_no_byte_through_memory() {
    let all = JobCounters { copied: 0, shared: SIZE };
    assert_eq!(quiet_backup(&mut sharing_world(1, &filled(SIZE)), true), all);
    let none = JobCounters { copied: SIZE, shared: 0 };
    assert_eq!(quiet_backup(&mut sharing_world(3, &filled(SIZE)), false), none);
}

#[test]
fn what_is_no_whole_block_is_copied_and_holes_stay_zero() {
    let mut first = filled(SIZE);
    first[1 << 20..2 << 20].fill(0);
    first.truncate((SIZE - 1024) as usize);
    let moved = quiet_backup(&mut sharing_world(4, &first), true);
    // The granule of the end is copied as a whole, the hole is neither.
    let tail = (64 << 10) - 1024;
    assert_eq!(moved, JobCounters { copied: tail, shared: SIZE - (1 << 20) - (64 << 10) });
}

#[test]
fn a_refusal_is_asked_for_once_and_everything_is_copied() {
    for errno in [EOPNOTSUPP, EXDEV, EINVAL] {
        let mut sim = sharing_world(5, &filled(SIZE));
        // The second one would succeed.
        sim.inject(FaultRule::once(shares(), errno));
        let moved = quiet_backup(&mut sim, true);
        assert_eq!(moved, JobCounters { copied: SIZE, shared: 0 }, "errno {errno}");
    }
}

#[test]
fn what_fails_for_another_reason_is_copied_and_the_rest_is_shared() {
    for errno in [ENOSPC, EIO] {
        for after in 0..3 {
            let mut sim = sharing_world(6 + after, &filled(8 * SIZE));
            sim.inject(FaultRule::once(shares(), errno).after(after));
            let moved = quiet_backup(&mut sim, true);
            assert_eq!(moved.copied + moved.shared, 8 * SIZE, "errno {errno}");
            assert!(moved.copied > 0 && moved.shared > 0, "errno {errno}: {moved:?}");
        }
    }
    // A refusal of files that have shared before is about that range.
    let mut sim = sharing_world(9, &filled(8 * SIZE));
    sim.inject(FaultRule::once(shares(), EINVAL).after(1));
    let moved = quiet_backup(&mut sim, true);
    assert!(moved.copied > 0 && moved.shared > 0, "{moved:?}");
}

#[test]
fn a_failing_target_fails_the_job_as_a_copy_does() {
    let mut sim = sharing_world(10, &filled(SIZE));
    sim.inject(FaultRule::always(OpFilter::any().file("/t").kind(SimOpKind::Share), ENOSPC));
    sim.inject(FaultRule::always(OpFilter::any().file("/t").kind(SimOpKind::Write), ENOSPC));
    let words = sim.block_on(0, |core| async move {
        let events = Events::of(&core);
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        start_backup(backup(&d, &t)).await.expect("it starts");
        gone(&core, "j").await;
        events.words()
    });
    assert!(words.contains(&"ERROR write report".into()), "{words:?}");
    assert!(words.iter().any(|word| word.starts_with("COMPLETED No space")), "{words:?}");
}

#[test]
fn what_is_shared_counts_in_the_limit_and_pauses_as_a_copy_does() {
    let mut sim = sharing_world(12, &filled(SIZE));
    let speed = 1 << 20;
    let took = sim.block_on(0, move |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let began = core.now();
        let mut spec = backup(&d, &t);
        spec.job.speed = speed;
        let job = start_backup(spec).await.expect("it starts");
        core.sleep(500_000_000).await;
        let manager = JobManager::of(&core);
        manager.job_verb("j", Verb::Pause).expect("pauses");
        manager.until("j", |status| status == Status::Paused).await;
        let before = job.counters();
        core.sleep(5_000_000_000).await;
        assert_eq!(job.counters(), before, "it went on");
        assert!(before.shared > 0 && before.shared < SIZE / 3, "{before:?}");
        manager.job_verb("j", Verb::Resume).expect("resumes");
        gone(&core, "j").await;
        assert_eq!(job.counters(), JobCounters { copied: 0, shared: SIZE });
        core.now() - began - 5_000_000_000
    });
    let whole = SIZE * 1_000_000_000 / speed.unsigned_abs();
    // What was saved up during the pause is at most half a slice.
    assert!(took > whole * 9 / 10 && took < whole * 11 / 10, "{took} of {whole}");
}

#[test]
fn a_backup_by_sharing_is_the_instant_of_its_start_whatever_guests_write() {
    let mut shared = 0;
    for seed in 0..20 {
        let first = filled(SIZE);
        let mut sim = sharing_world(seed, &first);
        if seed % 4 == 3 {
            sim.inject(FaultRule::once(shares(), [ENOSPC, EIO][(seed / 4) as usize % 2]));
        }
        shared += sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 4);
            core.sleep(2_000_000).await;
            let from = core.now();
            let job = start_backup(backup(&d, &t)).await.expect("it starts");
            let to = core.now();
            gone(&core, "j").await;
            let copy = content(&t).await;
            core.sleep(2_000_000).await;
            guests.stop().await;
            assert_eq!(log.failures.get(), 0);
            log.prove_instant(&[(0, &first, &copy)], from, to);
            assert_eq!(first_difference(&content(&d).await, &log.model(0, &first)), None);
            job.counters().shared
        });
    }
    assert!(shared > 5 * SIZE, "guests take little of it: {shared}");
}

#[test]
fn a_mirror_by_sharing_is_the_disk_at_its_end_in_both_copy_modes() {
    for seed in 30..46 {
        let mode = [CopyMode::Background, CopyMode::WriteBlocking][(seed % 2) as usize];
        let first = filled(SIZE);
        let mut sim = sharing_world(seed, &first);
        sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 4);
            let job = start_mirror(mirror(&d, &t, mode)).await.expect("it starts");
            let manager = JobManager::of(&core);
            manager.until("j", |status| status == Status::Ready).await;
            core.sleep(3_000_000).await;
            manager.job_verb("j", Verb::Complete).expect("completes");
            gone(&core, "j").await;
            assert_eq!(&*guest.node_name(), "t");
            guests.stop().await;
            assert_eq!(log.failures.get(), 0);
            assert!(job.counters().shared > 0, "{:?}", job.counters());
            assert_eq!(first_difference(&content(&t).await, &log.model(0, &first)), None);
        });
    }
}

#[test]
fn a_finished_backup_by_sharing_survives_a_power_cut() {
    for seed in 60..70 {
        let first = filled(SIZE);
        let mut sim = sharing_world(seed, &first);
        assert_eq!(quiet_backup(&mut sim, true).copied, 0);
        let left = sim.crash().read("/t").expect("the target is there");
        assert_eq!(first_difference(&left, &first), None, "seed {seed}");
    }
}

#[test]
fn a_guest_gets_a_region_back_that_waits_for_its_target() {
    let first = filled(SIZE);
    let mut sim = sharing_world(80, &first);
    // Somebody else's write to the target hangs, and holds its range there.
    let write = OpFilter::any().file("/t").kind(SimOpKind::Write);
    let held = sim.hold_some(write, HoldPoint::Start, 1);
    let log = Log::new();
    let inner = Rc::clone(&log);
    let (job, t) = sim.block_on(0, |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let guest = disk(&d);
        let foreign = core.pool().alloc(4096);
        let flags = liveblk_engine::node::WriteFlags::default();
        drop(t.write(0, foreign, flags, liveblk_engine::node::Origin::External));
        core.sleep(1_000_000).await;
        let job = start_backup(backup(&d, &t)).await.expect("it starts");
        core.sleep(1_000_000).await;
        // It would wait for ever.
        inner.write(&core, 0, &guest, 16, 8, false).await;
        (job, t)
    });
    assert_eq!(held.held(), 1);
    assert_eq!(job.counters(), JobCounters::default());
    held.release();
    let copy = sim.block_on(0, |core| async move {
        gone(&core, "j").await;
        content(&t).await
    });
    assert!(job.counters().shared > 0, "{:?}", job.counters());
    assert_eq!(first_difference(&copy, &first), None);
}

#[test]
fn a_guest_waits_for_what_is_being_shared_and_not_longer() {
    let first = filled(SIZE);
    let mut sim = sharing_world(81, &first);
    let held = sim.hold_some(shares(), HoldPoint::Completion, 1);
    let log = Log::new();
    let t = sim.block_on(0, |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        start_backup(backup(&d, &t)).await.expect("it starts");
        core.sleep(1_000_000).await;
        (d, t)
    });
    let (guest, core, writing) = (disk(&t.0), sim.core(0), Rc::clone(&log));
    let inner = core.clone();
    let write = async move { writing.write(&inner, 0, &guest, 16, 8, false).await };
    let write = core.spawn(Class::Guest, write);
    sim.run_for(50_000_000);
    assert_eq!(held.held(), 1);
    assert_eq!(log.writes.borrow()[0].answered, u64::MAX, "it overtook the copy");
    held.release();
    let copy = sim.block_on(0, |core| async move {
        write.await;
        gone(&core, "j").await;
        content(&t.1).await
    });
    assert_eq!(first_difference(&copy, &first), None);
}

#[test]
fn a_job_that_is_cancelled_while_blocks_are_being_shared_is_gone_in_time() {
    let mut sim = sharing_world(82, &filled(SIZE));
    let held = sim.hold_some(shares(), HoldPoint::Completion, 1);
    sim.block_on(0, |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        start_backup(backup(&d, &t)).await.expect("it starts");
        core.sleep(1_000_000).await;
        let before = core.now();
        JobManager::of(&core).block_job_verb("j", Verb::Cancel, true).expect("cancels");
        gone(&core, "j").await;
        assert!(core.now() - before < 1_000_000_000);
    });
    held.release();
}
