//! Targets that hang or are full, under each kind of job: a pause, a drain and a cancel do not wait
//! for a target, and a job that stopped for want of space goes on when it is told to.
//!
//! Rows: the fault model's "slow I/O" and "ENOSPC", Q20 (state machine corners).

use std::rc::Rc;

use liveblk_engine::driver::sim::{
    FaultRule, Hold, HoldPoint, OpFilter, Sim, SimConfig, SimFs, SimOpKind,
};
use liveblk_jobs::{JobManager, Status};
use serde_json::{Value, json};

use crate::world::{Cells, Op, World, gone, images, rig_latency};

/// No space left on the device.
const ENOSPC: i32 = 28;

/// A second of simulated time.
const SECOND: u64 = 1_000_000_000;

/// The file that a job of this kind writes.
fn target_of(kind: Op) -> &'static str {
    match kind {
        Op::Stream => "/d",
        Op::Commit | Op::Active => "/a",
        _ => "/t",
    }
}

fn writes_to(kind: Op) -> OpFilter {
    OpFilter::any().kind(SimOpKind::Write).file(target_of(kind))
}

fn open(images: &SimFs, kind: Op) -> (Sim, Rc<World>) {
    let mut config = SimConfig::new(kind as u64);
    config.latency = rig_latency();
    let mut sim = Sim::with_fs(config, images.after_power_cut(0));
    let world = sim.block_on(0, |core| async move { World::open(&core).await });
    (sim, world)
}

/// Starts job j with `more` arguments.
async fn start(world: &Rc<World>, kind: Op, more: Value) {
    let (name, mut arguments) = kind.command("j", "t");
    arguments.as_object_mut().expect("one").extend(more.as_object().cloned().expect("one"));
    world.qmp(name, arguments).await.expect("it starts");
}

/// A world in which the job's target has hung for a while.
fn hung(images: &SimFs, kind: Op) -> (Sim, Rc<World>, Hold) {
    let (mut sim, world) = open(images, kind);
    let hold = sim.hold(writes_to(kind), HoldPoint::Start);
    let other = Rc::clone(&world);
    sim.block_on(0, move |core| async move {
        start(&other, kind, json!({})).await;
        core.sleep(SECOND / 5).await;
        assert_eq!(other.status(), Some(Status::Running), "{kind:?}");
    });
    assert!(hold.held() > 0, "{kind:?}: something hangs");
    (sim, world, hold)
}

#[test]
fn a_pause_begins_nothing_more_and_ends_when_the_target_wakes_up() {
    let (images, mut cells) = (images(), Cells::default());
    for kind in Op::JOBS {
        cells.run(&format!("{kind:?}"), || paused(&images, kind));
    }
    cells.demand();
}

fn paused(images: &SimFs, kind: Op) {
    let (mut sim, world, hold) = hung(images, kind);
    let other = Rc::clone(&world);
    sim.block_on(0, move |core| async move {
        let asked = core.now();
        other.qmp("job-pause", json!({"id": "j"})).await.expect("is taken at once");
        assert!(core.now() - asked < SECOND / 10, "{kind:?}");
    });
    let held = hold.held();
    let other = Rc::clone(&world);
    sim.block_on(0, move |core| async move {
        let asked = core.now();
        if kind != Op::Stream {
            other.work(3).await;
        }
        assert!(core.now() - asked < SECOND, "{kind:?}: guests go on");
        core.sleep(SECOND).await;
        let row = other.qmp("query-block-jobs", json!({})).await.expect("is answered");
        assert_eq!(row[0]["paused"], json!(true), "{kind:?}");
    });
    // What guests overwrite under a backup is its only new work.
    if kind != Op::Backup {
        assert_eq!(hold.held(), held, "{kind:?}: a paused job begins nothing");
    }
    hold.release();
    sim.block_on(0, move |core| async move {
        JobManager::of(&core).until("j", |now| now == Status::Paused).await;
        other_end(world, &format!("{kind:?}")).await;
    });
}

/// The job comes to its good end.
async fn other_end(world: Rc<World>, what: &str) {
    world.finish().await;
    world.prove(what).await;
}

/// A drain of the source never waits for a target; where the target is the source it gives up after
/// its deadline, and nothing was changed.
#[test]
fn a_drain_of_the_source_does_not_wait_for_the_target() {
    let (images, mut cells) = (images(), Cells::default());
    for kind in Op::JOBS {
        cells.run(&format!("{kind:?}"), || drained(&images, kind));
    }
    cells.demand();
}

fn drained(images: &SimFs, kind: Op) {
    let (mut sim, world, hold) = hung(images, kind);
    let other = Rc::clone(&world);
    sim.block_on(0, move |core| async move {
        let asked = core.now();
        let answer = other.try_op(Op::Reopen, "k", "w").await;
        let waited = core.now() - asked;
        if kind == Op::Stream {
            let (class, text) = answer.expect_err("its own writes hang");
            assert!(class == "GenericError" && text.contains("'d'"), "{text}");
            assert!(waited < 40 * SECOND, "{waited}");
        } else {
            answer.unwrap_or_else(|error| panic!("{kind:?}: {error:?}"));
            assert!(waited < SECOND, "{kind:?}: {waited}");
            other.work(2).await;
        }
    });
    hold.release();
    sim.block_on(0, move |_| async move { other_end(world, &format!("{kind:?}")).await });
}

#[test]
fn a_cancelled_job_is_null_within_a_second_and_its_source_free() {
    let (images, mut cells) = (images(), Cells::default());
    for kind in Op::JOBS {
        for paused in [false, true] {
            let what = format!("{kind:?}, paused: {paused}");
            cells.run(&what, || cancelled(&images, kind, paused));
        }
    }
    cells.demand();
}

fn cancelled(images: &SimFs, kind: Op, paused: bool) {
    let (mut sim, world, hold) = hung(images, kind);
    let other = Rc::clone(&world);
    sim.block_on(0, move |core| async move {
        if paused {
            other.qmp("job-pause", json!({"id": "j"})).await.expect("pauses");
            core.sleep(SECOND / 10).await;
        }
        let asked = core.now();
        other.qmp("job-cancel", json!({"id": "j"})).await.expect("cancels");
        gone(&core).await;
        assert!(core.now() - asked < SECOND, "{kind:?}: {}", core.now() - asked);
        assert!(other.events.has("CANCELLED"), "{kind:?}");
        if target_of(kind) == "/t" {
            let answer = other.qmp("blockdev-del", json!({"node-name": "t"})).await;
            let (_, text) = answer.expect_err("orphans still write to it");
            assert!(text.contains("in use"), "{kind:?}: {text}");
            other.try_op(Op::Snapshot, "j", "w").await.expect("the source is free");
            other.work(3).await;
            assert_eq!(other.guest_is_at(), "sj", "{kind:?}");
        }
    });
    hold.release();
    sim.block_on(0, move |core| async move {
        core.sleep(SECOND).await;
        world.work(2).await;
        world.prove_images(&format!("{kind:?}")).await;
    });
}

async fn io_status(world: &Rc<World>) -> (String, String, bool) {
    let rows = world.qmp("query-block-jobs", json!({})).await.expect("is answered");
    let text = |member: &str| rows[0][member].as_str().expect("a word").to_owned();
    (text("io-status"), text("status"), rows[0]["paused"] == json!(true))
}

#[test]
fn a_full_target_pauses_the_job_and_resume_brings_it_to_its_end() {
    let (images, mut cells) = (images(), Cells::default());
    for kind in Op::JOBS {
        for ready in [false, true] {
            if ready && !kind.follows() {
                continue;
            }
            cells.run(&format!("{kind:?}, ready: {ready}"), || full(&images, kind, ready));
        }
    }
    cells.demand();
}

fn full(images: &SimFs, kind: Op, ready: bool) {
    let what = format!("{kind:?}, ready: {ready}");
    let (mut sim, world) = open(images, kind);
    let quiet = if ready { Status::Standby } else { Status::Paused };
    let policy = if matches!(kind, Op::Mirror | Op::Backup) {
        json!({"on-target-error": "enospc"})
    } else {
        json!({"on-error": "enospc"})
    };
    if ready {
        let other = Rc::clone(&world);
        let policy = policy.clone();
        sim.block_on(0, move |core| async move {
            start(&other, kind, policy).await;
            JobManager::of(&core).until("j", |now| now == Status::Ready).await;
        });
    }
    sim.inject(FaultRule::always(writes_to(kind), ENOSPC));
    let other = Rc::clone(&world);
    sim.block_on(0, move |core| async move {
        if ready {
            other.work(1).await;
        } else {
            start(&other, kind, policy).await;
        }
        let manager = JobManager::of(&core);
        manager.until("j", |now| now == quiet).await;
        // A stream reads through a filter: what it cannot write is a failed read, there and here.
        let word = if kind == Op::Stream { "ERROR read stop" } else { "ERROR write stop" };
        assert!(other.events.has(word), "{kind:?}: {:?}", other.events.words());
        let wanted = ("nospace".to_owned(), quiet.to_string(), true);
        assert_eq!(io_status(&other).await, wanted, "{kind:?}");
        // Still full: it tries, and stops again.
        other.qmp("job-resume", json!({"id": "j"})).await.expect("resumes");
        core.sleep(SECOND).await;
        assert_eq!(io_status(&other).await, wanted, "{kind:?}");
    });
    sim.clear_faults();
    sim.block_on(0, move |core| async move {
        world.qmp("job-resume", json!({"id": "j"})).await.expect("resumes");
        assert_eq!(io_status(&world).await.0, "ok", "{what}");
        core.sleep(SECOND / 100).await;
        world.finish().await;
        let words = world.events.words();
        assert!(words.iter().any(|word| word == "COMPLETED"), "{what}: {words:?}");
        world.prove_images(&what).await;
    });
}
