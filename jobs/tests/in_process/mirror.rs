//! Mirrors under guest writes on the simulator: pivot, copy at ready, failures, ends.
use std::rc::Rc;

use crate::rig::*;
use liveblk_engine::driver::sim::{FaultRule, HoldPoint, OpFilter};
use liveblk_engine::executor::Core;
use liveblk_engine::node::Node;
use liveblk_jobs::lifecycle::IoStatus;
use liveblk_jobs::{JobManager, MirrorSpec, OnError, Status, SyncMode, Verb, start_mirror};

fn spec(id: &str, source: &Rc<Node>, target: &Rc<Node>) -> MirrorSpec {
    MirrorSpec {
        job: options(id),
        source: source.clone(),
        target: target.clone(),
        sync: SyncMode::Full,
        copy_mode: liveblk_jobs::CopyMode::Background,
        granularity: None,
        allow_larger_target: false,
        more: Default::default(),
    }
}

async fn ready(core: &Core, id: &str) {
    JobManager::of(core).until(id, |status| status == Status::Ready).await;
}

/// Waits until a ready mirror of silent guests is idle.
async fn idle(core: &Core) {
    loop {
        let facts = JobManager::of(core).query_block().remove(0).facts;
        if facts.len == facts.offset {
            return;
        }
        core.sleep(100_000).await;
    }
}

#[test]
fn complete_moves_the_guests_to_the_target_and_loses_no_write() {
    for seed in 0..25 {
        let mut sim = world(seed);
        let first = filled(SIZE);
        sim.fs().create("/d", &first);
        sim.fs().create("/t", &vec![if seed % 2 == 0 { 0 } else { 0xaa }; SIZE as usize]);
        let (words, source) = sim.block_on(0, |core| async move {
            let events = Events::of(&core);
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 4);
            start_mirror(spec("j", &d, &t)).await.expect("it starts");
            ready(&core, "j").await;
            core.sleep(core.random() % 3_000_000).await;
            let from = core.now();
            JobManager::of(&core).block_job_verb("j", Verb::Complete, false).expect("completes");
            gone(&core, "j").await;
            let to = core.now();
            assert_eq!(&*guest.node_name(), "t");
            core.sleep(2_000_000).await;
            guests.stop().await;
            assert_eq!(log.failures.get(), 0);
            assert_eq!(first_difference(&content(&t).await, &log.model(0, &first)), None);
            // The source stays as it was at the pivot.
            log.prove_instant(&[(0, &first, &content(&d).await)], from, to);
            assert!(d.users().is_empty(), "{:?}", d.users());
            (events.words(), d)
        });
        drop(source);
        let wanted = [
            "created",
            "running",
            "ready",
            "READY",
            "waiting",
            "pending",
            "COMPLETED",
            "concluded",
            "null",
        ];
        assert_eq!(words, wanted, "seed {seed}");
    }
}

#[test]
fn soft_cancel_at_ready_leaves_the_copy_of_an_instant_and_the_guest_where_it_is() {
    for seed in 50..70 {
        let mut sim = world(seed);
        let first = filled(SIZE);
        sim.fs().create("/d", &first);
        sim.fs().create("/t", &vec![0; SIZE as usize]);
        let (log, from, to) = sim.block_on(0, |core| async move {
            let events = Events::of(&core);
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 4);
            start_mirror(spec("j", &d, &t)).await.expect("it starts");
            ready(&core, "j").await;
            let from = core.now();
            JobManager::of(&core).block_job_verb("j", Verb::Cancel, false).expect("cancels");
            gone(&core, "j").await;
            let to = core.now();
            assert_eq!(&*guest.node_name(), "d");
            core.sleep(1_000_000).await;
            guests.stop().await;
            assert_eq!(first_difference(&content(&d).await, &log.model(0, &filled(SIZE))), None);
            assert!(events.has("COMPLETED") && !events.has("CANCELLED"));
            assert!(t.users().is_empty());
            (log, from, to)
        });
        // Durable before the event: it survives a power cut.
        let left = sim.crash().read("/t").expect("the target is there");
        log.prove_instant(&[(0, &first, &left)], from, to);
    }
}

#[test]
fn forced_cancel_at_ready_is_cancelled_and_pivots_nothing() {
    let mut sim = world(80);
    sim.fs().create("/d", &filled(SIZE));
    sim.fs().create("/t", &vec![0; SIZE as usize]);
    sim.block_on(0, |core| async move {
        let events = Events::of(&core);
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let guest = disk(&d);
        start_mirror(spec("j", &d, &t)).await.expect("it starts");
        ready(&core, "j").await;
        idle(&core).await;
        let facts = JobManager::of(&core).query_block().remove(0).facts;
        assert_eq!((facts.len, facts.offset), (SIZE, SIZE), "everything is counted");
        JobManager::of(&core).job_verb("j", Verb::Cancel).expect("cancels");
        gone(&core, "j").await;
        assert_eq!(&*guest.node_name(), "d");
        let words = events.words();
        assert_eq!(words[4..], ["aborting", "CANCELLED", "concluded", "null"], "{words:?}");
    });
}

#[test]
fn sync_none_copies_only_what_is_written_after_the_start() {
    let mut sim = quick_world(90);
    let first = filled(SIZE);
    sim.fs().create("/d", &first);
    sim.fs().create("/t", &vec![0; SIZE as usize]);
    sim.block_on(0, |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let (log, guest) = (Log::new(), disk(&d));
        let mut none = spec("j", &d, &t);
        none.sync = SyncMode::None;
        none.granularity = Some(65536);
        start_mirror(none).await.expect("it starts");
        ready(&core, "j").await;
        log.write(&core, 0, &guest, 300, 10, false).await;
        log.write(&core, 0, &guest, 3000, 1, true).await;
        idle(&core).await;
        JobManager::of(&core).block_job_verb("j", Verb::Cancel, false).expect("cancels");
        gone(&core, "j").await;
        let (live, copy) = (content(&d).await, content(&t).await);
        for granule in 0..(SIZE / 65536) as usize {
            let range = granule * 65536..(granule + 1) * 65536;
            if [2, 23].contains(&granule) {
                assert_eq!(first_difference(&copy[range.clone()], &live[range]), None);
            } else {
                assert!(copy[range].iter().all(|byte| *byte == 0), "granule {granule}");
            }
        }
    });
}

#[test]
fn sizes_that_differ_end_the_job_inside_unless_a_larger_target_is_allowed() {
    let mut sim = world(95);
    let first = filled(SIZE);
    sim.fs().create("/d", &first);
    sim.fs().create("/t", &vec![0xaa; SIZE as usize + 70_000]);
    sim.block_on(0, |core| async move {
        let events = Events::of(&core);
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        start_mirror(spec("j", &d, &t)).await.expect("it starts");
        gone(&core, "j").await;
        let error = "COMPLETED Source and target image have different sizes";
        assert_eq!(events.words(), ["created", "running", "aborting", error, "concluded", "null"]);
        let mut larger = spec("j", &d, &t);
        larger.allow_larger_target = true;
        start_mirror(larger).await.expect("it starts");
        ready(&core, "j").await;
        JobManager::of(&core).block_job_verb("j", Verb::Cancel, false).expect("cancels");
        gone(&core, "j").await;
        let copy = content(&t).await;
        assert_eq!(first_difference(&copy[..SIZE as usize], &first), None);
        assert!(copy[SIZE as usize..].iter().all(|byte| *byte == 0), "the tail reads zero");
    });
}

#[test]
fn a_second_mirror_and_the_target_of_another_job_are_busy() {
    let mut sim = world(97);
    sim.fs().create("/d", &filled(SIZE));
    sim.fs().create("/t", &vec![0; SIZE as usize]);
    sim.fs().create("/u", &vec![0; SIZE as usize]);
    sim.block_on(0, |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let u = node(&core, "u", "/u").await;
        start_mirror(spec("j", &d, &t)).await.expect("it starts");
        let text =
            |spec| async move { start_mirror(spec).await.map(|_| ()).unwrap_err().to_string() };
        let busy =
            |node| format!("Node '{node}' is busy: block device is in use by block job: mirror");
        assert_eq!(text(spec("k", &d, &u)).await, busy("d") + " (job 'j')");
        assert_eq!(text(spec("k", &u, &t)).await, busy("t"));
        assert_eq!(text(spec("k", &u, &u)).await, "Can't mirror node into itself");
        let mut odd = spec("k", &d, &u);
        odd.granularity = Some(5000);
        assert_eq!(text(odd).await, "Parameter 'granularity' expects a power of 2");
        ready(&core, "j").await;
        let manager = JobManager::of(&core);
        manager.change("j", liveblk_jobs::CopyMode::Background).expect("nothing to change");
        manager.cancel_all().await;
    });
}

#[test]
fn pause_at_ready_is_standby_and_complete_there_takes_effect_on_resume() {
    let mut sim = world(98);
    sim.fs().create("/d", &filled(SIZE));
    sim.fs().create("/t", &vec![0; SIZE as usize]);
    sim.block_on(0, |core| async move {
        let events = Events::of(&core);
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let guest = disk(&d);
        let manager = JobManager::of(&core);
        start_mirror(spec("j", &d, &t)).await.expect("it starts");
        ready(&core, "j").await;
        manager.block_job_verb("j", Verb::Pause, false).expect("pauses");
        manager.until("j", |status| status == Status::Standby).await;
        let soft = manager.block_job_verb("j", Verb::Cancel, false).unwrap_err().to_string();
        assert_eq!(soft, "The block job for device 'j' is currently paused");
        manager.block_job_verb("j", Verb::Complete, false).expect("is accepted");
        core.sleep(50_000_000).await;
        assert_eq!(&*guest.node_name(), "d");
        manager.block_job_verb("j", Verb::Resume, false).expect("resumes");
        gone(&core, "j").await;
        assert_eq!(&*guest.node_name(), "t");
        let words = events.words();
        assert_eq!(words[4..7], ["standby", "ready", "waiting"], "{words:?}");
    });
}

#[test]
fn a_failing_target_stops_the_job_at_any_point_and_resume_goes_on() {
    for nth in 0..8 {
        let mut sim = world(120 + nth);
        let first = filled(SIZE);
        sim.fs().create("/d", &first);
        sim.fs().create("/t", &vec![0; SIZE as usize]);
        let core = sim.core(0);
        let (log, events) = (Log::new(), Events::of(&core));
        let writer = log.clone();
        let (d, t, guest) = sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let mut stop = spec("j", &d, &t);
            stop.job.on_target_error = OnError::Stop;
            start_mirror(stop).await.expect("it starts");
            let guest = disk(&d);
            (d, t, guest)
        });
        let filter = OpFilter::any().file("/t");
        sim.inject(FaultRule::once(filter, 5).after(nth));
        let (disk, target) = (guest.clone(), t.clone());
        sim.block_on(0, |core| async move {
            let manager = JobManager::of(&core);
            for _ in 0..20 {
                writer.write_one(&core, 0, &disk, 0, SIZE / SECTOR).await;
            }
            let mut asked = false;
            while let Some(info) = manager.query_block().pop() {
                if info.io_status != IoStatus::Ok && info.status.name() != "running" {
                    assert!(info.paused);
                    let _ = manager.block_job_verb("j", Verb::Resume, false);
                }
                if info.status == Status::Ready && !asked {
                    asked = manager.block_job_verb("j", Verb::Complete, false).is_ok();
                }
                core.sleep(200_000).await;
            }
            assert_eq!(&*disk.node_name(), "t");
            assert_eq!(writer.failures.get(), 0);
            assert_eq!(first_difference(&content(&target).await, &writer.model(0, &first)), None);
        });
        assert!(events.has("COMPLETED"), "{:?}", events.words());
        drop((d, guest));
    }
}

#[test]
fn cancel_with_a_hung_target_is_prompt_also_in_the_middle_of_the_pivot() {
    for at_pivot in [false, true] {
        let mut sim = world(140);
        sim.fs().create("/d", &filled(SIZE));
        sim.fs().create("/t", &vec![0; SIZE as usize]);
        let (d, t) = sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            start_mirror(spec("j", &d, &t)).await.expect("it starts");
            if at_pivot {
                ready(&core, "j").await;
                idle(&core).await;
            }
            (d, t)
        });
        let hung = sim.hold(OpFilter::any().file("/t"), HoldPoint::Start);
        sim.block_on(0, |core| async move {
            let manager = JobManager::of(&core);
            let (log, guest) = (Log::new(), disk(&d));
            if at_pivot {
                log.write(&core, 0, &guest, 0, 8, false).await;
                manager.block_job_verb("j", Verb::Complete, false).expect("completes");
            }
            core.sleep(100_000_000).await;
            let asked = core.now();
            manager.job_verb("j", Verb::Cancel).expect("cancels");
            gone(&core, "j").await;
            assert!(core.now() - asked < 1_000_000_000, "{} ns", core.now() - asked);
            assert_eq!(&*guest.node_name(), "d");
            log.write(&core, 0, &guest, 8, 8, false).await;
            assert_eq!(log.failures.get(), 0);
            assert_eq!(d.users().len(), 1);
        });
        hung.release();
        sim.run_idle();
        assert!(t.users().is_empty());
    }
}

#[test]
fn a_rate_limit_bounds_the_copy_and_can_be_lifted() {
    let mut sim = quick_world(150);
    sim.fs().create("/d", &filled(SIZE));
    sim.fs().create("/t", &vec![0; SIZE as usize]);
    sim.block_on(0, |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let mut slow = spec("j", &d, &t);
        slow.job.speed = 1;
        start_mirror(slow).await.expect("it starts");
        let manager = JobManager::of(&core);
        core.sleep(2_000_000_000).await;
        let done = manager.query_block().remove(0).facts.offset;
        assert!(done <= 1 << 20, "one unit goes through: {done}");
        manager.set_speed("j", 0).expect("is accepted");
        ready(&core, "j").await;
        manager.cancel_all().await;
    });
}

#[test]
fn manual_finalize_keeps_the_guest_going_until_the_pivot_and_can_be_cancelled() {
    for cancel in [false, true] {
        let mut sim = world(160);
        let first = filled(SIZE);
        sim.fs().create("/d", &first);
        sim.fs().create("/t", &vec![0; SIZE as usize]);
        sim.block_on(0, |core| async move {
            let events = Events::of(&core);
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            let manager = JobManager::of(&core);
            let mut manual = spec("j", &d, &t);
            manual.job.auto_finalize = false;
            manual.job.auto_dismiss = false;
            start_mirror(manual).await.expect("it starts");
            ready(&core, "j").await;
            manager.block_job_verb("j", Verb::Complete, false).expect("completes");
            manager.until("j", |status| status == Status::Pending).await;
            core.sleep(5_000_000).await;
            assert_eq!(&*guest.node_name(), "d", "no pivot before it is finalized");
            let verb = if cancel { Verb::Cancel } else { Verb::Finalize };
            manager.block_job_verb("j", verb, true).expect("is accepted");
            manager.until("j", |status| status == Status::Concluded).await;
            assert_eq!(&*guest.node_name(), if cancel { "d" } else { "t" });
            core.sleep(1_000_000).await;
            guests.stop().await;
            let live = content(&guest.node()).await;
            assert_eq!(first_difference(&live, &log.model(0, &first)), None);
            assert_eq!(log.failures.get(), 0);
            manager.job_verb("j", Verb::Dismiss).expect("is concluded");
            let words = events.words();
            let end = if cancel { ["aborting", "CANCELLED"] } else { ["PENDING", "COMPLETED"] };
            let at = words.len() - 4;
            assert_eq!(words[at..at + 2], end, "{words:?}");
            assert_eq!(if cancel { &d } else { &t }.users().len(), 1);
        });
    }
}

#[test]
fn a_pivot_never_waits_for_a_copy_that_waits_at_its_gate() {
    // The pivot begins while copies are about to start; writes keep them coming.
    for seed in 0..8 {
        let mut sim = quick_world(1000 + seed);
        let first = filled(SIZE);
        sim.fs().create("/d", &first);
        sim.fs().create("/t", &vec![0; SIZE as usize]);
        sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 6);
            start_mirror(spec("j", &d, &t)).await.expect("it starts");
            ready(&core, "j").await;
            core.sleep(seed * 50_000).await;
            let asked = core.now();
            JobManager::of(&core).job_verb("j", Verb::Complete).expect("completes");
            gone(&core, "j").await;
            assert!(core.now() - asked < 2_000_000_000, "{} ns", core.now() - asked);
            guests.stop().await;
            assert_eq!(first_difference(&content(&t).await, &log.model(0, &first)), None);
        });
    }
}
