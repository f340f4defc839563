//! Backups under guest writes on the simulator: point in time, failures, ends.
use crate::rig::*;
use liveblk_engine::driver::sim::{FaultRule, HoldPoint, OpFilter, SimOpKind};
use liveblk_jobs::{BackupOptions, BackupSpec, JobManager, OnError, SyncMode, Verb, start_backup};

fn spec(
    id: &str,
    source: &std::rc::Rc<liveblk_engine::node::Node>,
    target: &std::rc::Rc<liveblk_engine::node::Node>,
) -> BackupSpec {
    BackupSpec {
        job: options(id),
        source: source.clone(),
        target: target.clone(),
        sync: SyncMode::Full,
        allow_larger_target: false,
        compress: false,
        more: BackupOptions { use_copy_range: true, ..BackupOptions::default() },
    }
}

#[test]
fn a_backup_is_the_instant_of_its_start_whatever_guests_write() {
    for seed in 0..30 {
        let mut sim = world(seed);
        let first = filled(SIZE);
        sim.fs().create("/d", &first);
        // Old content of the target must not shine through.
        sim.fs().create("/t", &vec![0xaa; SIZE as usize]);
        let expected = first.clone();
        let words = sim.block_on(0, |core| async move {
            let events = Events::of(&core);
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 4);
            core.sleep(2_000_000).await;
            let from = core.now();
            start_backup(spec("j", &d, &t)).await.expect("it starts");
            let to = core.now();
            gone(&core, "j").await;
            let copy = content(&t).await;
            core.sleep(2_000_000).await;
            guests.stop().await;
            assert_eq!(log.failures.get(), 0);
            log.prove_instant(&[(0, &expected, &copy)], from, to);
            assert_eq!(first_difference(&content(&d).await, &log.model(0, &expected)), None);
            events.words()
        });
        let wanted = ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"];
        assert_eq!(words, wanted, "seed {seed}");
    }
}

#[test]
fn a_finished_backup_survives_a_power_cut() {
    for seed in 100..110 {
        let mut sim = world(seed);
        let first = filled(SIZE);
        sim.fs().create("/d", &first);
        sim.fs().create("/t", &vec![0; SIZE as usize]);
        sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            start_backup(spec("j", &d, &t)).await.expect("it starts");
            gone(&core, "j").await;
        });
        let left = sim.crash().read("/t").expect("the target is there");
        assert_eq!(first_difference(&left, &first), None, "seed {seed}");
    }
}

#[test]
fn sync_none_keeps_only_what_guests_overwrite_and_ends_when_cancelled() {
    let mut sim = quick_world(5);
    let first = filled(SIZE);
    sim.fs().create("/d", &first);
    sim.fs().create("/t", &vec![0; SIZE as usize]);
    sim.block_on(0, |core| async move {
        let events = Events::of(&core);
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let (log, guest) = (Log::new(), disk(&d));
        let mut none = spec("j", &d, &t);
        none.sync = SyncMode::None;
        start_backup(none).await.expect("it starts");
        for _ in 0..12 {
            log.write_one(&core, 0, &guest, 0, SIZE / SECTOR).await;
        }
        core.sleep(50_000_000).await;
        JobManager::of(&core).block_job_verb("j", Verb::Cancel, false).expect("cancels");
        gone(&core, "j").await;
        assert_eq!(
            events.words(),
            ["created", "running", "aborting", "CANCELLED", "concluded", "null"]
        );
        let copy = content(&t).await;
        let touched: Vec<u64> = log
            .writes
            .borrow()
            .iter()
            .flat_map(|write| write.first / 128..=(write.first + write.sectors - 1) / 128)
            .collect();
        for (granule, bytes) in copy.chunks(65536).enumerate() {
            let old = &first[granule * 65536..(granule + 1) * 65536];
            if touched.contains(&(granule as u64)) {
                assert!(bytes == old, "granule {granule} was overwritten and is not kept");
            } else {
                assert!(bytes.iter().all(|byte| *byte == 0), "granule {granule} was not touched");
            }
        }
    });
}

#[test]
fn the_nth_failure_of_the_target_ends_the_job_and_never_reaches_the_guest() {
    let mut failed = 0;
    for nth in 0..12 {
        let mut sim = world(200 + nth);
        let first = filled(SIZE);
        sim.fs().create("/d", &first);
        sim.fs().create("/t", &vec![0; SIZE as usize]);
        let write = OpFilter::any().file("/t").kind(SimOpKind::Write);
        sim.inject(FaultRule::always(write, libc_eio()).after(nth));
        let seen = sim.block_on(0, |core| async move {
            let events = Events::of(&core);
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let (log, guest) = (Log::new(), disk(&d));
            start_backup(spec("j", &d, &t)).await.expect("it starts");
            let guests = log.guests(&core, 0, &guest, 3);
            gone(&core, "j").await;
            core.sleep(1_000_000).await;
            guests.stop().await;
            assert_eq!(log.failures.get(), 0, "the guest saw the target fail");
            assert_eq!(first_difference(&content(&d).await, &log.model(0, &first)), None);
            let words = events.words();
            if !events.has("ERROR") {
                assert!(events.has("COMPLETED"), "{words:?}");
                return false;
            }
            assert_eq!(words[..3], ["created", "running", "ERROR write report"], "{words:?}");
            let end = ["aborting", "COMPLETED Input/output error", "concluded", "null"];
            assert_eq!(words[words.len() - 4..], end);
            assert_eq!(words.len(), 7, "one error is announced once: {words:?}");
            true
        });
        failed += u32::from(seen);
    }
    assert!(failed >= 3, "few runs met the failure: {failed}");
}

#[test]
fn policy_stop_pauses_and_resume_writes_the_old_content_again() {
    for seed in 300..310 {
        let mut sim = copying_world(seed);
        let first = filled(SIZE);
        sim.fs().create("/d", &first);
        sim.fs().create("/t", &vec![0; SIZE as usize]);
        let write = OpFilter::any().file("/t").kind(SimOpKind::Write);
        sim.inject(FaultRule::always(write, 28).after(1));
        let expected = first.clone();
        let core = sim.core(0);
        let log = Log::new();
        let (events, copy) = (Events::of(&core), log.clone());
        let (d, t, from, to) = sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let mut stop = spec("j", &d, &t);
            stop.job.on_target_error = OnError::Enospc;
            let from = core.now();
            start_backup(stop).await.expect("it starts");
            let to = core.now();
            let manager = JobManager::of(&core);
            manager.until("j", |status| status == liveblk_jobs::Status::Paused).await;
            let info = manager.query_block().remove(0);
            assert_eq!(info.io_status, liveblk_jobs::lifecycle::IoStatus::NoSpace);
            // Guests overwrite a little while the target is full: it is held in memory.
            let guest = disk(&d);
            for part in 0..4 {
                copy.write(&core, 0, &guest, part * 1500, 20, false).await;
            }
            (d, t, from, to)
        });
        sim.clear_faults();
        sim.block_on(0, |core| async move {
            JobManager::of(&core).block_job_verb("j", Verb::Resume, false).expect("resumes");
            gone(&core, "j").await;
            assert_eq!(log.failures.get(), 0);
            log.prove_instant(&[(0, &expected, &content(&t).await)], from, to);
            let words = events.words();
            assert!(
                words.iter().filter(|word| *word == "ERROR write stop").count() == 1,
                "{words:?}"
            );
            assert!(events.has("COMPLETED"), "{words:?}");
            drop(d);
        });
    }
}

#[test]
fn policy_ignore_tries_again_until_the_target_takes_it() {
    let mut sim = world(400);
    let first = filled(SIZE);
    sim.fs().create("/d", &first);
    sim.fs().create("/t", &vec![0; SIZE as usize]);
    let write = OpFilter::any().file("/t").kind(SimOpKind::Write);
    sim.inject(FaultRule::once(write, libc_eio()).after(2));
    sim.block_on(0, |core| async move {
        let events = Events::of(&core);
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let mut ignore = spec("j", &d, &t);
        ignore.job.on_target_error = OnError::Ignore;
        start_backup(ignore).await.expect("it starts");
        gone(&core, "j").await;
        assert!(events.has("ERROR write ignore") && events.has("COMPLETED"));
        assert_eq!(first_difference(&content(&t).await, &first), None);
    });
}

#[test]
fn failed_reads_follow_the_source_policy() {
    for (policy, word) in
        [(OnError::Report, "COMPLETED Input/output error"), (OnError::Ignore, "COMPLETED")]
    {
        let mut sim = world(450);
        let first = filled(SIZE);
        sim.fs().create("/d", &first);
        sim.fs().create("/t", &vec![0; SIZE as usize]);
        let read = OpFilter::any().file("/d").kind(SimOpKind::Read);
        sim.inject(FaultRule::once(read, libc_eio()).after(2));
        sim.block_on(0, |core| async move {
            let events = Events::of(&core);
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let mut spec = spec("j", &d, &t);
            spec.job.on_source_error = policy;
            start_backup(spec).await.expect("it starts");
            gone(&core, "j").await;
            assert!(events.words().contains(&word.to_owned()), "{:?}", events.words());
            assert!(events.has("ERROR read"));
            if policy == OnError::Ignore {
                assert_eq!(first_difference(&content(&t).await, &first), None);
            }
        });
    }
}

#[test]
fn cancel_with_a_hung_target_frees_guest_and_source_within_a_second() {
    let mut sim = world(500);
    let first = filled(SIZE);
    sim.fs().create("/d", &first);
    sim.fs().create("/t", &vec![0; SIZE as usize]);
    let hung = sim.hold(OpFilter::any().file("/t").kind(SimOpKind::Write), HoldPoint::Start);
    let core = sim.core(0);
    let events = Events::of(&core);
    let t = sim.block_on(0, |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        start_backup(spec("j", &d, &t)).await.expect("it starts");
        let (log, guest) = (Log::new(), disk(&d));
        let guests = log.guests(&core, 0, &guest, 3);
        core.sleep(100_000_000).await;
        let asked = core.now();
        JobManager::of(&core).job_verb("j", Verb::Cancel).expect("cancels");
        gone(&core, "j").await;
        assert!(core.now() - asked < 1_000_000_000, "cancel took {} ns", core.now() - asked);
        core.sleep(1_000_000).await;
        guests.stop().await;
        assert_eq!(log.failures.get(), 0);
        let users = d.users();
        assert_eq!(users.len(), 1, "only the guest uses the source: {users:?}");
        assert!(!t.users().is_empty(), "orphan writes keep the target in use");
        t
    });
    assert!(hung.held() > 0);
    hung.release();
    sim.run_idle();
    assert!(t.users().is_empty(), "the orphans have ended: {:?}", t.users());
    assert!(events.has("CANCELLED"));
}

#[test]
fn copy_before_write_goes_on_into_a_drained_target_and_a_paused_job() {
    let mut sim = world(600);
    let first = filled(SIZE);
    sim.fs().create("/d", &first);
    sim.fs().create("/t", &vec![0; SIZE as usize]);
    sim.block_on(0, |core| async move {
        use liveblk_engine::graph::{CutPart, Swap, cut};
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let (log, guest) = (Log::new(), disk(&d));
        let from = core.now();
        start_backup(spec("j", &d, &t)).await.expect("it starts");
        let to = core.now();
        let (inner, writer, node, drained) = (core.clone(), log.clone(), guest.clone(), t.clone());
        let part = CutPart {
            core: core.id(),
            nodes: vec![t.id()],
            flush: false,
            before_swap: Some(Box::new(move |_| {
                Box::pin(async move {
                    assert!(drained.is_drained());
                    for round in 0..40 {
                        writer.write(&inner, 0, &node, round * 150, 100, false).await;
                    }
                    Ok(())
                })
            })),
            swap: Swap::Local(Box::new(|_| {})),
        };
        cut(&core, vec![part], 1_000_000_000).await.expect("the drain ends");
        gone(&core, "j").await;
        log.prove_instant(&[(0, &first, &content(&t).await)], from, to);
    });
}

#[test]
fn several_backups_of_one_source_stack_and_each_is_its_own_instant() {
    let mut sim = world(700);
    let first = filled(SIZE);
    sim.fs().create("/d", &first);
    for target in 0..3 {
        sim.fs().create(format!("/t{target}"), &vec![0; SIZE as usize]);
    }
    sim.block_on(0, |core| async move {
        let d = node(&core, "d", "/d").await;
        let (log, guest) = (Log::new(), disk(&d));
        let guests = log.guests(&core, 0, &guest, 3);
        let mut instants = Vec::new();
        for target in 0..3 {
            let t = node(&core, &format!("t{target}"), &format!("/t{target}")).await;
            core.sleep(1_000_000).await;
            let from = core.now();
            start_backup(spec(&format!("j{target}"), &d, &t)).await.expect("it starts");
            instants.push((t, from, core.now()));
        }
        for target in 0..3 {
            gone(&core, &format!("j{target}")).await;
        }
        guests.stop().await;
        for (t, from, to) in instants {
            log.prove_instant(&[(0, &first, &content(&t).await)], from, to);
        }
    });
}

#[test]
fn a_hook_added_at_any_step_of_a_write_misses_none() {
    for delay in 0..60 {
        let mut sim = world(800 + delay);
        let first = filled(SIZE);
        sim.fs().create("/d", &first);
        sim.fs().create("/t", &vec![0; SIZE as usize]);
        sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let (log, guest) = (Log::new(), disk(&d));
            let (inner, writer, disk) = (core.clone(), log.clone(), guest.clone());
            let write = core.spawn(liveblk_engine::executor::Class::Guest, async move {
                for round in 0..3 {
                    writer.write(&inner, 0, &disk, 100 + round, 64, false).await;
                }
            });
            core.sleep(delay * 7_000).await;
            let from = core.now();
            start_backup(spec("j", &d, &t)).await.expect("it starts");
            let to = core.now();
            write.await;
            gone(&core, "j").await;
            log.prove_instant(&[(0, &first, &content(&t).await)], from, to);
        });
    }
}

#[test]
fn bad_requests_are_refused_with_the_peers_texts_and_leave_nothing() {
    let mut sim = world(900);
    sim.fs().create("/d", &filled(SIZE));
    sim.fs().create("/t", &vec![0; SIZE as usize]);
    sim.fs().create("/s", &vec![0; SIZE as usize / 2]);
    sim.block_on(0, |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let s = node(&core, "s", "/s").await;
        let text =
            |spec| async move { start_backup(spec).await.map(|_| ()).unwrap_err().to_string() };
        assert_eq!(text(spec("", &d, &t)).await, "Invalid job ID ''");
        assert_eq!(text(spec("j", &d, &s)).await, "Source and target image have different sizes");
        let mut negative = spec("j", &d, &t);
        negative.job.speed = -1;
        assert_eq!(text(negative).await, "Parameter 'speed' expects a non-negative value");
        let mut slow = spec("j", &d, &t);
        slow.job.speed = 1;
        start_backup(slow).await.expect("it starts");
        assert_eq!(text(spec("j", &d, &s)).await, "Source and target image have different sizes");
        let busy = "Node 't' is busy: block device is in use by block job: backup";
        assert_eq!(text(spec("k", &d, &t)).await, busy);
        assert_eq!(text(spec("j", &d, &t)).await, busy);
        let manager = JobManager::of(&core);
        let unknown = manager.block_job_verb("x", Verb::Pause, false).unwrap_err().to_string();
        assert_eq!(unknown, "Block job 'x' not found");
        assert_eq!(manager.job_verb("x", Verb::Pause).unwrap_err().to_string(), "Job not found");
        assert_eq!(manager.query().len(), 1);
        manager.cancel_all().await;
        assert!(manager.query().is_empty());
        assert!(d.users().is_empty() && t.users().is_empty());
    });
}

fn libc_eio() -> i32 {
    5
}

#[test]
fn a_cut_of_the_source_in_the_middle_of_a_backup_is_short() {
    use liveblk_engine::graph::{CutPart, Swap, cut};
    for seed in 0..30 {
        let mut sim = quick_world(1100 + seed);
        let first = filled(SIZE);
        sim.fs().create("/d", &first);
        sim.fs().create("/t", &vec![0; SIZE as usize]);
        sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 8);
            let from = core.now();
            start_backup(spec("j", &d, &t)).await.expect("it starts");
            let to = core.now();
            while JobManager::of(&core).find("j").is_some() {
                let part = CutPart {
                    core: core.id(),
                    nodes: vec![d.id()],
                    flush: false,
                    before_swap: None,
                    swap: Swap::Local(Box::new(|_| {})),
                };
                let asked = core.now();
                cut(&core, vec![part], 10_000_000_000).await.expect("it drains");
                assert!(core.now() - asked < 500_000_000, "{} ns", core.now() - asked);
                core.sleep(50_000).await;
            }
            guests.stop().await;
            log.prove_instant(&[(0, &first, &content(&t).await)], from, to);
        });
    }
}
