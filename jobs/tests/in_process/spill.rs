//! The spill file of a backup: a target that is slow, full or hung never keeps a guest waiting; its
//! bounds, its failures, its end, and the snapshot read meanwhile.
use std::rc::Rc;

use crate::rig::*;
use liveblk_engine::driver::sim::{FaultRule, Hold, HoldPoint, OpFilter, Sim, SimOpKind};
use liveblk_engine::executor::Core;
use liveblk_engine::graph::Graph;
use liveblk_engine::node::{NewBitmap, Node, Origin};
use liveblk_jobs::{
    BackupOptions, BackupSpec, BitmapChoice, BitmapMode, JobManager, OnCbwError, OnError,
    SpillOptions, Status, SyncMode, Verb, add_snapshot_access, job_filter_above, start_backup,
};

const GRANULE: u64 = 65536;
const SPILL: &str = "/t.j.spill";

fn spec(source: &Rc<Node>, target: &Rc<Node>) -> BackupSpec {
    let spill = SpillOptions { after: Some(2 * GRANULE), ..SpillOptions::default() };
    BackupSpec {
        job: options("j"),
        source: source.clone(),
        target: target.clone(),
        sync: SyncMode::Full,
        allow_larger_target: false,
        compress: false,
        // The background copy is to leave most of the disk to the guests.
        more: BackupOptions {
            max_workers: 1,
            max_chunk: GRANULE,
            spill,
            ..BackupOptions::default()
        },
    }
}

/// A filled disk `/d` and an empty target `/t`; what the disk holds.
fn files(sim: &Sim) -> Vec<u8> {
    let mut first = filled(SIZE);
    first[5 * GRANULE as usize..9 * GRANULE as usize].fill(0);
    sim.fs().create("/d", &first);
    sim.fs().create("/t", &vec![0xaa; SIZE as usize]);
    first
}

fn writes_of_target() -> OpFilter {
    OpFilter::any().file("/t").not_file("spill").kind(SimOpKind::Write)
}

fn hang(sim: &Sim) -> Hold {
    sim.hold(writes_of_target(), HoldPoint::Start)
}

async fn nodes(core: &Core) -> (Rc<Node>, Rc<Node>) {
    (node(core, "d", "/d").await, node(core, "t", "/t").await)
}

fn has_spill(sim: &Sim) -> bool {
    sim.fs().paths().iter().any(|path| path.to_string_lossy().contains("spill"))
}

/// Writes to every granule of the disk, a sector each: the longest time of one in nanoseconds.
async fn overwrite_all(core: &Core, log: &Log, guest: &liveblk_engine::node::Disk) -> u64 {
    let mut longest = 0;
    for granule in 0..SIZE / GRANULE {
        let asked = core.now();
        let at = granule * GRANULE / SECTOR + core.random() % 128;
        log.write(core, 0, guest, at, 1, false).await;
        longest = longest.max(core.now() - asked);
    }
    longest
}

#[test]
fn a_hung_target_keeps_no_guest_waiting_and_gets_everything_afterwards() {
    for seed in 0..5 {
        let mut sim = world(seed);
        let first = files(&sim);
        let hung = hang(&sim);
        let core = sim.core(0);
        let (log, events) = (Log::new(), Events::of(&core));
        let guests = log.clone();
        let (from, to, t) = sim.block_on(0, |core| async move {
            let (d, t) = nodes(&core).await;
            let guest = disk(&d);
            let from = core.now();
            start_backup(spec(&d, &t)).await.expect("it starts");
            let to = core.now();
            let longest = overwrite_all(&core, &guests, &guest).await;
            assert!(longest <= 50_000_000, "seed {seed}: a guest waited {longest} ns");
            let info = JobManager::of(&core).query_block().remove(0);
            let spill = info.spill.expect("old content is in the spill file");
            assert_eq!((spill.file.as_str(), spill.max), (SPILL, SIZE));
            assert!(spill.bytes > 30 * GRANULE, "{spill:?}");
            assert_eq!(info.facts.len, SIZE, "what is spilled is left to be copied");
            assert!(info.facts.offset <= SIZE - spill.bytes);
            // The guest overwrites the same again: nothing is kept twice.
            overwrite_all(&core, &guests, &guest).await;
            core.sleep(30_000_000_000).await;
            (from, to, t)
        });
        assert!(has_spill(&sim) && hung.held() > 0);
        hung.release();
        sim.block_on(0, |core| async move {
            gone(&core, "j").await;
            assert_eq!(log.failures.get(), 0);
            log.prove_instant(&[(0, &first, &content(&t).await)], from, to);
            let wanted =
                ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"];
            assert_eq!(events.words(), wanted);
        });
        assert!(!has_spill(&sim), "the spill file is gone with the job");
    }
}

#[test]
fn a_slow_target_under_busy_guests_ends_as_the_instant_of_the_start() {
    let mut spilled = 0;
    for seed in 100..108 {
        let mut sim = world(seed);
        let first = files(&sim);
        let slow = hang(&sim);
        let log = Log::new();
        let guests = log.clone();
        let (from, to, t) = sim.block_on(0, |core| async move {
            let (d, t) = nodes(&core).await;
            let guest = disk(&d);
            let from = core.now();
            start_backup(spec(&d, &t)).await.expect("it starts");
            let to = core.now();
            drop(guests.guests(&core, 0, &guest, 4));
            (from, to, t)
        });
        for _ in 0..25 {
            sim.block_on(0, |core| async move { core.sleep(core.random() % 8_000_000).await });
            spilled += u32::from(has_spill(&sim));
            slow.release_one();
        }
        log.stop.set(true);
        slow.release();
        let ended = log.clone();
        sim.block_on(0, |core| async move {
            gone(&core, "j").await;
            ended.stop.set(true);
            core.sleep(100_000_000).await;
            assert_eq!(ended.failures.get(), 0);
            ended.prove_instant(&[(0, &first, &content(&t).await)], from, to);
        });
        assert!(!has_spill(&sim));
    }
    assert!(spilled > 50, "few looks met a spill file: {spilled}");
}

#[test]
fn at_its_bound_the_backup_fails_and_the_guest_goes_on() {
    let mut sim = world(200);
    let first = files(&sim);
    let hung = hang(&sim);
    let core = sim.core(0);
    let (log, events) = (Log::new(), Events::of(&core));
    sim.block_on(0, |core| async move {
        let (d, t) = nodes(&core).await;
        let guest = disk(&d);
        let mut spec = spec(&d, &t);
        spec.more.spill.max = Some(4 * GRANULE);
        start_backup(spec).await.expect("it starts");
        let longest = overwrite_all(&core, &log, &guest).await;
        assert!(longest <= 50_000_000, "a guest waited {longest} ns");
        gone(&core, "j").await;
        assert_eq!(log.failures.get(), 0);
        assert_eq!(first_difference(&content(&d).await, &log.model(0, &first)), None);
        let words = events.words();
        assert_eq!(words[..3], ["created", "running", "ERROR write report"], "{words:?}");
        let text = "COMPLETED The target is too slow for what guests overwrite: spill file \
                    '/t.j.spill' has reached its bound of 262144 bytes (give it more with \
                    'spill-max', or slow the guests)";
        assert!(words.iter().any(|word| word == text), "{words:?}");
    });
    drop(hung);
    assert!(!has_spill(&sim));
}

#[test]
fn without_a_spill_file_guests_wait_for_the_target() {
    type Change = fn(&mut BackupSpec);
    let changes: [Change; 2] = [
        |spec| spec.more.spill.max = Some(0),
        |spec| spec.more.on_cbw_error = OnCbwError::BreakGuestWrite,
    ];
    for change in changes {
        let mut sim = world(300);
        let first = files(&sim);
        let hung = hang(&sim);
        let log = Log::new();
        let guests = log.clone();
        let (from, to, t, all) = sim.block_on(0, |core| async move {
            let (d, t) = nodes(&core).await;
            let guest = disk(&d);
            let mut spec = spec(&d, &t);
            spec.more.spill.after = None;
            change(&mut spec);
            let from = core.now();
            start_backup(spec).await.expect("it starts");
            let to = core.now();
            let inner = core.clone();
            let all = core.spawn(liveblk_engine::executor::Class::Guest, async move {
                overwrite_all(&inner, &guests, &guest).await;
            });
            core.sleep(1_000_000_000).await;
            (from, to, t, all)
        });
        assert!(!has_spill(&sim));
        hung.release();
        sim.block_on(0, |core| async move {
            all.await;
            gone(&core, "j").await;
            log.prove_instant(&[(0, &first, &content(&t).await)], from, to);
        });
    }
}

#[test]
fn every_failure_of_the_spill_file_ends_the_job_and_never_reaches_the_guest() {
    let kinds = [SimOpKind::Open, SimOpKind::Write, SimOpKind::Read, SimOpKind::Lock];
    let mut failed = 0;
    for (kind, errno) in kinds.into_iter().zip([28, 28, 5, 5]) {
        for nth in [0, 1, 3] {
            let mut sim = world(400 + nth);
            let first = files(&sim);
            let fault = FaultRule::always(OpFilter::any().file("spill").kind(kind), errno);
            sim.inject(fault.after(nth));
            let hung = hang(&sim);
            let core = sim.core(0);
            let (log, events) = (Log::new(), Events::of(&core));
            let guests = log.clone();
            let (d, t, from, to) = sim.block_on(0, |core| async move {
                let (d, t) = nodes(&core).await;
                let guest = disk(&d);
                let from = core.now();
                start_backup(spec(&d, &t)).await.expect("it starts");
                let to = core.now();
                let longest = overwrite_all(&core, &guests, &guest).await;
                assert!(longest <= 50_000_000, "{kind:?} {nth}: a guest waited {longest} ns");
                (d, t, from, to)
            });
            hung.release();
            let words = sim.block_on(0, |core| async move {
                gone(&core, "j").await;
                assert_eq!(log.failures.get(), 0, "{kind:?} {nth}: the guest saw it");
                assert_eq!(first_difference(&content(&d).await, &log.model(0, &first)), None);
                if !events.has("ERROR") {
                    log.prove_instant(&[(0, &first, &content(&t).await)], from, to);
                }
                events.words()
            });
            if words.iter().any(|word| word.starts_with("ERROR")) {
                failed += 1;
                let text = "COMPLETED Old content could not be kept for the backup in spill file";
                assert!(words.iter().any(|word| word.starts_with(text)), "{words:?}");
            } else {
                assert!(words.iter().any(|word| word == "COMPLETED"), "{words:?}");
            }
            assert!(!has_spill(&sim), "{kind:?} {nth}");
        }
    }
    assert!(failed >= 8, "few runs met the failure: {failed}");
}

#[test]
fn a_full_target_that_pauses_the_job_does_not_end_it_when_memory_is_used_up() {
    let mut sim = world(500);
    let first = files(&sim);
    sim.inject(FaultRule::always(writes_of_target(), 28).after(1));
    let core = sim.core(0);
    let (log, events) = (Log::new(), Events::of(&core));
    let guests = log.clone();
    let (from, to, t) = sim.block_on(0, |core| async move {
        let (d, t) = nodes(&core).await;
        let guest = disk(&d);
        let mut spec = spec(&d, &t);
        spec.job.on_target_error = OnError::Enospc;
        let from = core.now();
        start_backup(spec).await.expect("it starts");
        let to = core.now();
        JobManager::of(&core).until("j", |status| status == Status::Paused).await;
        let longest = overwrite_all(&core, &guests, &guest).await;
        assert!(longest <= 50_000_000, "a guest waited {longest} ns");
        assert_eq!(JobManager::of(&core).find("j").map(|job| job.status()), Some(Status::Paused));
        (from, to, t)
    });
    assert!(has_spill(&sim));
    sim.clear_faults();
    sim.block_on(0, |core| async move {
        JobManager::of(&core).block_job_verb("j", Verb::Resume, false).expect("resumes");
        gone(&core, "j").await;
        log.prove_instant(&[(0, &first, &content(&t).await)], from, to);
        assert!(events.has("COMPLETED"));
    });
    assert!(!has_spill(&sim));
}

#[test]
fn a_cancel_takes_the_file_away_within_a_second_though_the_target_hangs() {
    let mut sim = world(600);
    files(&sim);
    let hung = hang(&sim);
    sim.block_on(0, |core| async move {
        let (d, t) = nodes(&core).await;
        let (log, guest) = (Log::new(), disk(&d));
        start_backup(spec(&d, &t)).await.expect("it starts");
        overwrite_all(&core, &log, &guest).await;
        let asked = core.now();
        JobManager::of(&core).job_verb("j", Verb::Cancel).expect("cancels");
        gone(&core, "j").await;
        assert!(core.now() - asked <= 1_000_000_000, "cancel took {} ns", core.now() - asked);
        overwrite_all(&core, &log, &guest).await;
        assert_eq!(log.failures.get(), 0);
    });
    assert!(!has_spill(&sim));
    drop(hung);
    sim.run_idle();
    assert!(!has_spill(&sim));
}

#[test]
fn the_snapshot_reads_right_while_its_old_content_is_spilled() {
    for seed in 700..704 {
        let mut sim = world(seed);
        let first = files(&sim);
        let hung = hang(&sim);
        let log = Log::new();
        let (guests, expected) = (log.clone(), first.clone());
        let (from, to, t) = sim.block_on(0, |core| async move {
            let (d, t) = nodes(&core).await;
            let guest = disk(&d);
            let mut spec = spec(&d, &t);
            // Nothing of the background copy is on its way to the target then.
            spec.sync = SyncMode::None;
            let from = core.now();
            start_backup(spec).await.expect("it starts");
            let to = core.now();
            let filter = job_filter_above(&Graph::of(&core), d.id()).expect("the job's filter");
            let view = add_snapshot_access(&core, Some("sa"), &filter, true).expect("a view");
            drop(guests.guests(&core, 0, &guest, 3));
            core.sleep(80_000_000).await;
            // Pieces that the hung target has are not asked for.
            let mut read = 0;
            for granule in 0..SIZE / GRANULE {
                let buf = core.pool().alloc(GRANULE as usize);
                let asked = view.read(granule * GRANULE, buf.clone(), Origin::External);
                let late = core.sleep(20_000_000);
                let result = liveblk_engine::executor::sync::select(asked, late).await;
                if let liveblk_engine::executor::sync::Either::First(result) = result {
                    result.expect("the snapshot reads");
                    let at = (granule * GRANULE) as usize;
                    assert!(buf.to_vec() == expected[at..at + GRANULE as usize], "{granule}");
                    read += 1;
                }
            }
            assert!(read >= 24, "seed {seed}: only {read} granules could be read");
            guests.stop.set(true);
            core.sleep(50_000_000).await;
            (from, to, t)
        });
        assert!(has_spill(&sim), "seed {seed}");
        hung.release();
        sim.block_on(0, |core| async move {
            core.sleep(1_000_000_000).await;
            let info = JobManager::of(&core).query_block().remove(0);
            assert_eq!(info.spill.map(|spill| spill.bytes), Some(0), "all of it was brought over");
            JobManager::of(&core).job_verb("j", Verb::Cancel).expect("cancels");
            gone(&core, "j").await;
            // What guests touched is in the target as it was.
            let copy = content(&t).await;
            let touched: std::collections::BTreeSet<u64> = log
                .writes
                .borrow()
                .iter()
                .flat_map(|write| write.first / 128..=(write.first + write.sectors - 1) / 128)
                .collect();
            for granule in touched {
                let at = (granule * GRANULE) as usize;
                let old = &first[at..at + GRANULE as usize];
                assert!(copy[at..at + GRANULE as usize] == *old, "granule {granule}");
            }
            assert!(from <= to && log.failures.get() == 0);
        });
        assert!(!has_spill(&sim));
    }
}

#[test]
fn a_bitmap_in_mode_always_keeps_what_only_the_spill_file_has() {
    let mut sim = world(800);
    files(&sim);
    let hung = hang(&sim);
    sim.block_on(0, |core| async move {
        let (d, t) = nodes(&core).await;
        let (log, guest) = (Log::new(), disk(&d));
        let new = NewBitmap {
            name: "b".into(),
            granularity: Some(GRANULE),
            persistent: false,
            disabled: false,
            follow: false,
        };
        d.add_bitmap(new).await.expect("a bitmap");
        let mut spec = spec(&d, &t);
        spec.more.bitmap = BitmapChoice { name: Some("b".into()), mode: Some(BitmapMode::Always) };
        spec.sync = SyncMode::Full;
        start_backup(spec).await.expect("it starts");
        overwrite_all(&core, &log, &guest).await;
        JobManager::of(&core).job_verb("j", Verb::Cancel).expect("cancels");
        gone(&core, "j").await;
        let bits = d.bitmap_facts().remove(0);
        assert_eq!(bits.count, SIZE, "nothing of it is in the target");
    });
    drop(hung);
}

#[test]
fn a_file_that_a_dead_process_left_is_taken_over_and_any_other_is_left_alone() {
    for (left, ours) in [
        (&b"liveblk spill file of the job 'j'"[..], true),
        (&b"liveblk spill"[..], false),
        (&b"somebody's data, which happens to have this name"[..], false),
    ] {
        let mut sim = world(900);
        let first = files(&sim);
        sim.fs().create(SPILL, left);
        let hung = hang(&sim);
        let log = Log::new();
        let guests = log.clone();
        let (from, to, t) = sim.block_on(0, |core| async move {
            let (d, t) = nodes(&core).await;
            let guest = disk(&d);
            let from = core.now();
            start_backup(spec(&d, &t)).await.expect("it starts");
            let to = core.now();
            overwrite_all(&core, &guests, &guest).await;
            let info = JobManager::of(&core).query_block().remove(0);
            let file = info.spill.expect("it spills").file;
            assert_eq!(file == SPILL, ours, "{file}");
            (from, to, t)
        });
        hung.release();
        sim.block_on(0, |core| async move {
            gone(&core, "j").await;
            log.prove_instant(&[(0, &first, &content(&t).await)], from, to);
        });
        let expected = (!ours).then(|| left.to_vec());
        assert_eq!(sim.fs().read(SPILL), expected);
    }
}
