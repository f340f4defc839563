//! Tests of the simulator itself: determinism, time, holds, faults, names.

mod cuts;
mod ownership;
mod sharing;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;

use super::*;
use crate::error::ErrorKind;
use crate::executor::{Class, Core, CoreId};
use crate::storage::{File, FileOptions, LockRequest};

pub(super) async fn open(core: &Core, path: &str, options: FileOptions) -> Rc<File> {
    let options = FileOptions { path: path.into(), writable: true, ..options };
    File::open(core, options).await.expect("the simulated file opens")
}

pub(super) async fn create(core: &Core, path: &str) -> Rc<File> {
    open(core, path, FileOptions { create_new: true, ..FileOptions::default() }).await
}

/// Writes and reads random ranges of a file from several tasks, each in its own part, against a
/// vector; syncs now and then.
async fn hammer(core: Core, path: String, direct: bool) {
    const PART: u64 = 64 << 10;
    let options = FileOptions { create_new: true, direct, ..FileOptions::default() };
    let file = open(&core, &path, options).await;
    let work = |task: u64| {
        let (core, file) = (core.clone(), Rc::clone(&file));
        async move {
            let mut model = vec![0_u8; usize::try_from(PART).unwrap()];
            for round in 0..20_u64 {
                let at = usize::try_from(core.random() % PART).unwrap();
                let len = usize::try_from(core.random() % 9000).unwrap().min(model.len() - at);
                let buf = core.pool().alloc(len);
                let offset = task * PART + at as u64;
                if core.random() % 2 == 0 {
                    let byte = (round + task * 31 + 1).to_le_bytes()[0];
                    buf.fill(byte);
                    file.write(offset, buf, core.random() % 8 == 0).await.unwrap();
                    model[at..at + len].fill(byte);
                } else {
                    file.read(offset, buf.clone()).await.unwrap();
                    let seen = buf.to_vec();
                    let differ = (0..len).find(|index| seen[*index] != model[at + index]);
                    assert_eq!(differ, None, "read of {len} bytes at {offset}, direct: {direct}");
                }
                if core.random() % 8 == 0 {
                    file.flush().await.unwrap();
                }
            }
        }
    };
    let tasks: Vec<_> = (0..4).map(|task| core.spawn(Class::Guest, work(task))).collect();
    for task in tasks {
        task.await;
    }
}

fn hammered(seed: u64) -> u64 {
    let mut sim = Sim::new(SimConfig::new(seed).cores(2));
    let other = sim.core(1);
    let direct = seed.is_multiple_of(2);
    let beside = other.spawn(Class::Background, hammer(other.clone(), "/b".into(), direct));
    sim.block_on(0, |core| hammer(core, "/a".into(), direct));
    sim.block_on(1, |_| beside);
    sim.trace_hash()
}

#[test]
fn equal_seeds_give_equal_traces_and_others_differ() {
    let hashes: BTreeSet<u64> = (0..30)
        .map(|seed| {
            let hash = hammered(seed);
            assert_eq!(hash, hammered(seed), "seed {seed} is not deterministic");
            hash
        })
        .collect();
    assert_eq!(hashes.len(), 30, "different seeds give different traces");
}

#[test]
fn content_decides_about_the_trace_too() {
    let trace = |byte: u8| {
        let mut sim = Sim::new(SimConfig::new(1));
        sim.block_on(0, |core| async move {
            let file = create(&core, "/f").await;
            let buf = core.pool().alloc(4096);
            buf.fill(byte);
            file.write(0, buf, false).await.unwrap();
        });
        sim.trace_hash()
    };
    assert_eq!(trace(1), trace(1));
    assert_ne!(trace(1), trace(2));
}

#[test]
fn time_jumps_over_sleep_and_runs_on_demand() {
    let mut sim = Sim::new(SimConfig::new(3));
    let hour = 3_600_000_000_000;
    sim.block_on(0, |core| async move { core.sleep(hour).await });
    assert!(sim.now() >= hour && sim.steps() < 100);
    let woken = Rc::new(Cell::new(false));
    let flag = Rc::clone(&woken);
    let core = sim.core(0);
    let sleeper = core.clone();
    drop(core.spawn(Class::Guest, async move {
        sleeper.sleep(1_000_000).await;
        flag.set(true);
    }));
    sim.run_for(500_000);
    assert!(!woken.get());
    sim.run_for(600_000);
    assert!(woken.get());
}

#[test]
#[should_panic(expected = "seed 77: nothing can make progress")]
fn a_world_that_waits_for_nothing_says_so() {
    let mut sim = Sim::new(SimConfig::new(77));
    sim.block_on(0, |core| async move {
        crate::executor::sync::Notify::new(&core).wait().await;
    });
}

#[test]
#[should_panic(expected = "Write '/stuck' 0+512 of core 0, held")]
fn a_dead_world_names_the_operations_in_flight() {
    let mut sim = Sim::new(SimConfig::new(5).calm());
    let file = sim.block_on(0, |core| async move { create(&core, "/stuck").await });
    let _hold = sim.hold(OpFilter::any().file("stuck").kind(SimOpKind::Write), HoldPoint::Start);
    sim.block_on(0, |core| async move { file.write(0, core.pool().zeroed(512), false).await })
        .unwrap();
}

#[test]
fn calls_between_cores_and_from_outside_are_answered() {
    let mut sim = Sim::new(SimConfig::new(9).cores(3));
    let call = sim.handle().run(CoreId(2), |core| async move {
        let id = core.id().0;
        let other = core.call(CoreId(1), |core| async move {
            core.sleep(10_000).await;
            core.work(move || core_square(7)).await
        });
        (id, other.await.unwrap())
    });
    assert_eq!(sim.wait(call), Some((2, 49)));
}

fn core_square(value: u32) -> u32 {
    value * value
}

#[test]
fn a_held_write_has_no_effect_before_its_start_and_all_before_its_completion() {
    for (point, expected) in [(HoldPoint::Start, 0), (HoldPoint::Completion, 9)] {
        let mut sim = Sim::new(SimConfig::new(11).calm());
        let file = sim.block_on(0, |core| async move { create(&core, "/f").await });
        let filter = OpFilter::any().kind(SimOpKind::Write).range(4096..8192);
        let hold = sim.hold_some(filter, point, 1);
        let core = sim.core(0);
        let buf = core.pool().alloc(4096);
        buf.fill(9);
        let held = file.write(4096, buf.clone(), false);
        sim.block_on(0, |_| file.write(0, buf.clone(), false)).unwrap();
        sim.run_idle();
        assert_eq!((hold.held(), sim.in_flight()), (1, 1));
        let mut seen = [0; 4096];
        assert!(sim.fs().read_at("/f", 4096, &mut seen));
        assert_eq!(seen, [expected; 4096]);
        hold.release();
        sim.block_on(0, |_| held).unwrap();
        assert_eq!(sim.fs().read("/f").unwrap(), vec![9; 8192]);
    }
}

#[test]
fn injected_failures_hit_the_chosen_operations() {
    let mut sim = Sim::new(SimConfig::new(13).calm());
    let (a, b) = sim
        .block_on(0, |core| async move { (create(&core, "/a").await, create(&core, "/b").await) });
    let filter = OpFilter::any().file("/a").kind(SimOpKind::Write);
    sim.inject(FaultRule::once(filter.clone(), libc::ENOSPC).after(1));
    let results = sim.block_on(0, |core| async move {
        let mut results = Vec::new();
        for file in [&a, &b, &a, &a] {
            results.push(file.write(0, core.pool().zeroed(512), false).await.map_err(|e| e.kind()));
        }
        results
    });
    assert_eq!(results, [Ok(()), Ok(()), Err(ErrorKind::NoSpace), Ok(())]);
}

#[test]
fn a_full_file_system_refuses_new_pages_until_some_are_given_back() {
    let mut config = SimConfig::new(17).calm();
    config.fs.capacity = Some(64 << 10);
    let mut sim = Sim::new(config);
    sim.block_on(0, |core| async move {
        let file = create(&core, "/f").await;
        let data = core.pool().alloc(48 << 10);
        data.fill(1);
        file.write(0, data.clone(), false).await.unwrap();
        let error = file.write(48 << 10, data.clone(), false).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        file.write(0, data.clone(), false).await.expect("no new page is needed");
        assert!(file.discard(0, 48 << 10).await.unwrap());
        file.write(48 << 10, data, false).await.expect("there is room again");
    });
    assert_eq!(sim.fs().used(), 48 << 10);
}

#[test]
fn holes_are_found_and_direct_files_demand_alignment() {
    let mut sim = Sim::new(SimConfig::new(19));
    sim.block_on(0, |core| async move {
        let options = FileOptions { create_new: true, direct: true, ..FileOptions::default() };
        let file = open(&core, "/f", options).await;
        assert_eq!(file.alignment(), 512);
        let data = core.pool().alloc(1000);
        data.fill(3);
        file.write(70_000, data, false).await.unwrap();
        assert_eq!(file.size(), 71_000, "padding of the last block is given back");
        let runs = file.extents(0, 100_000).await.unwrap();
        let runs: Vec<_> = runs.iter().map(|run| (run.len, run.data)).collect();
        assert_eq!(runs, [(69_632, false), (4096, true), (26_272, false)]);
        file.truncate(10).await.unwrap();
        file.truncate(100_000).await.unwrap();
        let back = core.pool().alloc(100_000);
        file.read(0, back.clone()).await.unwrap();
        assert!(back.is_zero());
    });
}

#[test]
fn locks_conflict_between_handles_and_with_the_configured_outside() {
    let mut sim = Sim::new(SimConfig::new(23));
    sim.fs().create("/f", b"x");
    let outside = sim.fs();
    sim.block_on(0, |core| async move {
        let locked = || FileOptions { locking: true, ..FileOptions::default() };
        let (first, second) =
            (open(&core, "/f", locked()).await, open(&core, "/f", locked()).await);
        let writer = LockRequest::Write;
        first.lock(writer).await.unwrap();
        assert_eq!(second.lock(writer).await.unwrap_err().kind(), ErrorKind::Locked);
        drop(first);
        second.lock(writer).await.expect("locks end with their handle");
        drop(second);
        outside.set_lock_conflict("/f", Some((1, false)));
        let third = open(&core, "/f", locked()).await;
        assert_eq!(third.lock(writer).await.unwrap_err().kind(), ErrorKind::Locked);
    });
}

#[test]
fn cutting_the_padding_of_a_last_block_leaves_a_neighbour_in_flight_alone() {
    let mut sim = Sim::new(SimConfig::new(29).calm());
    let options = FileOptions { create_new: true, direct: true, ..FileOptions::default() };
    let file = sim.block_on(0, |core| async move { open(&core, "/f", options).await });
    let filter = OpFilter::any().kind(SimOpKind::Write).range(512..1024);
    let hold = sim.hold(filter, HoldPoint::Completion);
    let buf = sim.core(0).pool().alloc(512);
    buf.fill(4);
    let neighbour = file.write(512, buf.clone(), false);
    sim.run_idle();
    let padded = file.write(0, buf.slice(0..100), false);
    sim.run_idle();
    hold.release();
    sim.block_on(0, |_| async move {
        neighbour.await.unwrap();
        padded.await.unwrap();
    });
    let content = sim.fs().read("/f").unwrap();
    assert!(content[..100] == [4; 100] && content[100..512] == [0; 412]);
    assert!(content[512..] == [4; 512]);
}
