//! Write-blocking mirrors under guest writes on the simulator: both sides hold a write when it is
//! answered; failures of the target, changes of the mode, cancels and power cuts (reliability.md
//! Q3, Q4, Q5, Q6, R17, R19).
use std::cell::Cell;
use std::rc::Rc;

use crate::rig::*;
use liveblk_engine::buf::Buf;
use liveblk_engine::driver::sim::{FaultRule, HoldPoint, OpFilter, Sim, SimOpKind};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::node::{Disk, Node, WriteFlags, ZeroFlags};
use liveblk_jobs::{
    CopyMode, JobManager, MirrorOptions, MirrorSpec, OnError, Status, SyncMode, Verb, start_mirror,
};

fn spec(source: &Rc<Node>, target: &Rc<Node>) -> MirrorSpec {
    MirrorSpec {
        job: options("j"),
        source: source.clone(),
        target: target.clone(),
        sync: SyncMode::Full,
        copy_mode: CopyMode::WriteBlocking,
        granularity: None,
        allow_larger_target: false,
        more: MirrorOptions::default(),
    }
}

async fn ready(core: &Core) {
    JobManager::of(core).until("j", |status| status == Status::Ready).await;
}

fn synced(core: &Core) -> bool {
    JobManager::of(core).query_block().remove(0).actively_synced == Some(true)
}

async fn write(disk: &Disk, offset: u64, len: usize, byte: u8) -> bool {
    let buf = disk.core().pool().alloc(len);
    buf.fill(byte);
    disk.write(offset, buf, WriteFlags::default()).await.is_ok()
}

/// Files `/d` (filled) and `/t` (`byte` everywhere).
fn files(sim: &Sim, byte: u8) -> Vec<u8> {
    let first = filled(SIZE);
    sim.fs().create("/d", &first);
    sim.fs().create("/t", &vec![byte; SIZE as usize]);
    first
}

#[test]
fn an_answered_write_is_on_both_sides() {
    for seed in 0..10 {
        let mut sim = world(seed);
        let first = files(&sim, 0xaa);
        sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let (log, guest) = (Log::new(), disk(&d));
            start_mirror(spec(&d, &t)).await.expect("it starts");
            ready(&core).await;
            assert!(synced(&core));
            for _ in 0..30 {
                log.write_one(&core, 0, &guest, 0, SIZE / SECTOR).await;
                assert!(synced(&core), "seed {seed}: nothing is left behind");
                let copy = content(&t).await;
                assert_eq!(first_difference(&copy, &log.model(0, &first)), None, "seed {seed}");
            }
            JobManager::of(&core).cancel_all().await;
        });
    }
}

#[test]
fn complete_under_overlapping_writes_loses_none() {
    for seed in 0..25 {
        let mut sim = world(seed);
        let first = files(&sim, if seed % 2 == 0 { 0 } else { 0xaa });
        sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let (log, guest) = (Log::new(), disk(&d));
            // Guests from before the start: writes are in flight when the hook comes.
            let guests = log.guests(&core, 0, &guest, 4);
            core.sleep(core.random() % 2_000_000).await;
            let mut mirror = spec(&d, &t);
            mirror.granularity = Some([512, 4096, 65536][(seed % 3) as usize]);
            mirror.more.buf_size = [0, 1, 300_000][(seed % 3) as usize];
            start_mirror(mirror).await.expect("it starts");
            ready(&core).await;
            core.sleep(core.random() % 3_000_000).await;
            let from = core.now();
            let manager = JobManager::of(&core);
            manager.block_job_verb("j", Verb::Complete, false).expect("completes");
            gone(&core, "j").await;
            let to = core.now();
            core.sleep(2_000_000).await;
            guests.stop().await;
            assert_eq!(log.failures.get(), 0);
            assert_eq!(&*guest.node_name(), "t");
            assert_eq!(first_difference(&content(&t).await, &log.model(0, &first)), None);
            log.prove_instant(&[(0, &first, &content(&d).await)], from, to);
        });
    }
}

#[test]
fn the_mode_may_change_at_any_time_in_both_directions() {
    for seed in 0..15 {
        let mut sim = world(seed + 300);
        let first = files(&sim, 0xaa);
        sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 6);
            start_mirror(spec(&d, &t)).await.expect("it starts");
            let manager = JobManager::of(&core);
            for turn in 0..40 {
                let mode = [CopyMode::Background, CopyMode::WriteBlocking][turn % 2];
                manager.change("j", mode).expect("it changes");
                core.sleep(core.random() % 300_000).await;
            }
            ready(&core).await;
            manager.block_job_verb("j", Verb::Cancel, false).expect("a copy of this instant");
            let from = core.now();
            gone(&core, "j").await;
            let to = core.now();
            guests.stop().await;
            assert_eq!(log.failures.get(), 0);
            log.prove_instant(&[(0, &first, &content(&t).await)], from - 1, to);
        });
    }
}

/// A target that fails the N-th operation: the guest notices nothing, the range is dirty, and the
/// job does what its policy says.
#[test]
fn a_failed_write_of_the_target_is_made_up_for_and_never_reaches_the_guest() {
    for (nth, policy) in (0..24).flat_map(|nth| [(nth, OnError::Ignore), (nth, OnError::Stop)]) {
        let mut sim = world(500 + nth);
        let first = files(&sim, 0);
        let filter = OpFilter::any().file("/t").kind(SimOpKind::Write);
        sim.inject(FaultRule::once(filter, 5).after(nth));
        sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            let mut mirror = spec(&d, &t);
            mirror.job.on_target_error = policy;
            start_mirror(mirror).await.expect("it starts");
            let manager = JobManager::of(&core);
            core.sleep(8_000_000).await;
            guests.stop().await;
            while manager.query_block()[0].status != Status::Ready || !synced(&core) {
                // A job that stopped is paused for good; at any other time this is refused.
                let _ = manager.block_job_verb("j", Verb::Resume, false);
                core.sleep(300_000).await;
            }
            manager.block_job_verb("j", Verb::Complete, false).expect("completes");
            gone(&core, "j").await;
            assert_eq!(log.failures.get(), 0, "{policy:?} {nth}");
            let copy = content(&t).await;
            assert_eq!(first_difference(&copy, &log.model(0, &first)), None, "{policy:?} {nth}");
        });
    }
}

#[test]
fn a_target_that_fails_for_good_ends_the_job_and_not_the_guest() {
    let mut sim = world(61);
    let first = files(&sim, 0);
    let core = sim.core(0);
    let events = Events::of(&core);
    let (log, left) = (Log::new(), Rc::new(Cell::new(false)));
    let (guest, writer) = sim.block_on(0, |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let guest = disk(&d);
        start_mirror(spec(&d, &t)).await.expect("it starts");
        ready(&core).await;
        (guest, log)
    });
    sim.inject(FaultRule::always(OpFilter::any().file("/t"), 5));
    let (disk, log, done) = (guest.clone(), Rc::clone(&writer), Rc::clone(&left));
    sim.block_on(0, |core| async move {
        log.write_one(&core, 0, &disk, 0, SIZE / SECTOR).await;
        gone(&core, "j").await;
        log.write_one(&core, 0, &disk, 0, SIZE / SECTOR).await;
        assert_eq!(log.failures.get(), 0);
        assert_eq!(first_difference(&content(&disk.node()).await, &log.model(0, &first)), None);
        done.set(true);
    });
    assert!(left.get() && events.has("COMPLETED Input/output error"), "{:?}", events.words());
}

#[test]
fn a_failed_write_of_the_source_leaves_both_sides_alike() {
    for nth in 0..12 {
        let mut sim = world(700 + nth);
        files(&sim, 0);
        let (d, t, guest) = sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let guest = disk(&d);
            start_mirror(spec(&d, &t)).await.expect("it starts");
            ready(&core).await;
            (d, t, guest)
        });
        let filter = OpFilter::any().file("/d").kind(SimOpKind::Write);
        sim.inject(FaultRule::once(filter, 5).after(nth));
        sim.block_on(0, |core| async move {
            let mut failed = 0;
            for at in 0..12_u64 {
                let ok = write(&guest, at * 100_000 / 512 * 512, 3 * 4096 + 512, 7).await;
                failed += u32::from(!ok);
            }
            assert_eq!(failed, 1);
            let manager = JobManager::of(&core);
            manager.block_job_verb("j", Verb::Complete, false).expect("completes");
            gone(&core, "j").await;
            // What the failed write left is on both sides, whatever it is.
            assert_eq!(first_difference(&content(&d).await, &content(&t).await), None);
        });
    }
}

#[test]
fn a_cancel_frees_guests_that_wait_for_a_hung_target() {
    let mut sim = world(62);
    let first = files(&sim, 0);
    let (t, guest) = sim.block_on(0, |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let guest = disk(&d);
        start_mirror(spec(&d, &t)).await.expect("it starts");
        ready(&core).await;
        (t, guest)
    });
    let hold = sim.hold(OpFilter::any().file("/t").kind(SimOpKind::Write), HoldPoint::Start);
    let answered = Rc::new(Cell::new(false));
    let (disk, seen) = (guest.clone(), Rc::clone(&answered));
    drop(sim.core(0).spawn(Class::Guest, async move {
        assert!(write(&disk, 4096, 8192, 9).await);
        seen.set(true);
    }));
    sim.run_for(5_000_000);
    assert!(!answered.get(), "a write is answered only when both sides have it");
    let before = sim.now();
    let seen = Rc::clone(&answered);
    sim.block_on(0, |core| async move {
        JobManager::of(&core).job_verb("j", Verb::Cancel).expect("cancels");
        gone(&core, "j").await;
        assert!(seen.get());
    });
    assert!(sim.now() - before < 1_000_000_000, "gone within a second");
    assert!(!t.users().is_empty(), "the write in flight keeps the target");
    hold.release();
    sim.run_for(5_000_000);
    assert!(t.users().is_empty(), "{:?}", t.users());
    sim.block_on(0, |_| async move {
        let mut model = first;
        model[4096..4096 + 8192].fill(9);
        assert_eq!(first_difference(&content(&guest.node()).await, &model), None);
    });
}

/// The guest can change its memory while the write runs; both sides hold the same bytes.
#[test]
#[allow(unsafe_code, reason = "memory of a guest that changes it")]
fn memory_that_the_guest_changes_meanwhile_is_the_same_on_both_sides() {
    for seed in 0..10 {
        let mut sim = world(800 + seed);
        files(&sim, 0);
        let (d, t, guest) = sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let guest = disk(&d);
            start_mirror(spec(&d, &t)).await.expect("it starts");
            ready(&core).await;
            (d, t, guest)
        });
        let memory: &'static mut [u8] = vec![1_u8; 16384].leak();
        let address = memory.as_mut_ptr();
        let pointer = std::ptr::NonNull::new(address).expect("a vector has an address");
        // SAFETY: the memory is leaked, so it outlives every use.
        let foreign = || unsafe { Buf::foreign(pointer, 16384, Box::new(()), false) };
        let buf = foreign();
        assert!(!buf.is_stable());
        let (disk, done) = (guest.clone(), Rc::new(Cell::new(false)));
        let seen = Rc::clone(&done);
        drop(sim.core(0).spawn(Class::Guest, async move {
            disk.write(65536, buf, WriteFlags::default()).await.expect("a write");
            seen.set(true);
        }));
        let scribble = foreign();
        let mut byte = 2;
        while !done.get() {
            sim.run_steps(1);
            scribble.fill(byte);
            byte = byte.wrapping_add(1);
        }
        sim.block_on(0, |core| async move {
            assert!(synced(&core));
            assert_eq!(first_difference(&content(&d).await, &content(&t).await), None);
            JobManager::of(&core).cancel_all().await;
        });
    }
}

#[test]
fn a_power_cut_after_completion_finds_the_target_exact() {
    for seed in 0..10 {
        let mut sim = world(900 + seed);
        let first = files(&sim, 0xaa);
        let model = sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 4);
            start_mirror(spec(&d, &t)).await.expect("it starts");
            ready(&core).await;
            core.sleep(core.random() % 2_000_000).await;
            guests.stop().await;
            let manager = JobManager::of(&core);
            manager.block_job_verb("j", Verb::Complete, false).expect("completes");
            gone(&core, "j").await;
            log.model(0, &first)
        });
        let left = sim.crash().after_power_cut(seed).read("/t").expect("the target is there");
        assert_eq!(first_difference(&left, &model), None, "seed {seed}");
    }
}

#[test]
fn discards_and_zeroes_leave_both_sides_alike() {
    let mut sim = world(63);
    files(&sim, 0);
    sim.block_on(0, |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let guest = disk(&d);
        start_mirror(spec(&d, &t)).await.expect("it starts");
        ready(&core).await;
        for at in 0..10 {
            let (offset, len) = (at * 150_528, 90_112);
            let flags = ZeroFlags { may_unmap: at % 2 == 0, ..ZeroFlags::default() };
            guest.write_zeroes(offset, len, flags).await.expect("zeroes");
            guest.discard(offset + len, 40_960, false).await.expect("a discard");
        }
        JobManager::of(&core).block_job_verb("j", Verb::Complete, false).expect("completes");
        gone(&core, "j").await;
        assert_eq!(first_difference(&content(&d).await, &content(&t).await), None);
    });
}

#[test]
fn a_target_known_to_be_zero_is_not_written_with_zeroes() {
    let mut sim = world(64);
    let mut first = vec![0; SIZE as usize];
    first[65536..131_072].fill(5);
    sim.fs().create("/d", &first);
    sim.fs().create("/t", &vec![0; SIZE as usize]);
    sim.block_on(0, |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let mut mirror = spec(&d, &t);
        mirror.more.target_is_zero = true;
        start_mirror(mirror).await.expect("it starts");
        ready(&core).await;
        JobManager::of(&core).block_job_verb("j", Verb::Complete, false).expect("completes");
        gone(&core, "j").await;
        assert_eq!(first_difference(&content(&t).await, &first), None);
    });
}
