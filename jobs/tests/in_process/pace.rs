//! The rate limit of a job in simulated time: the background keeps it, guests do not feel it.
use crate::rig::*;
use liveblk_jobs::{BackupSpec, JobManager, SyncMode, start_backup};

const SPEED: i64 = 1 << 20;

fn slow_backup(
    source: &std::rc::Rc<liveblk_engine::node::Node>,
    target: &std::rc::Rc<liveblk_engine::node::Node>,
) -> BackupSpec {
    let mut job = options("j");
    job.speed = SPEED;
    BackupSpec {
        job,
        source: source.clone(),
        target: target.clone(),
        sync: SyncMode::Full,
        allow_larger_target: false,
        compress: false,
        more: Default::default(),
    }
}

/// Nanoseconds that `SIZE` bytes take at `SPEED`.
fn whole() -> u64 {
    SIZE * 1_000_000_000 / SPEED.unsigned_abs()
}

#[test]
fn a_copy_takes_the_time_that_its_limit_says() {
    let mut sim = quick_world(700);
    sim.fs().create("/d", &filled(SIZE));
    sim.fs().create("/t", &vec![0; SIZE as usize]);
    let took = sim.block_on(0, |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let began = core.now();
        start_backup(slow_backup(&d, &t)).await.expect("it starts");
        gone(&core, "j").await;
        core.now() - began
    });
    // The last unit is issued when all others are paid for.
    let unit = whole() / (SIZE >> 16);
    assert!(took.abs_diff(whole() - unit) * 50 <= whole(), "{took} of {}", whole());
}

#[test]
fn guests_are_not_delayed_by_the_limit_and_the_background_pays_for_them() {
    let mut sim = quick_world(701);
    let first = filled(SIZE);
    sim.fs().create("/d", &first);
    sim.fs().create("/t", &vec![0; SIZE as usize]);
    sim.block_on(0, |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let (log, guest) = (Log::new(), disk(&d));
        let began = core.now();
        start_backup(slow_backup(&d, &t)).await.expect("it starts");
        // The last third, which the background would reach after two seconds.
        let sectors = SIZE / SECTOR;
        for at in (sectors * 2 / 3..sectors).step_by(128) {
            log.write(&core, 0, &guest, at, 128, false).await;
        }
        let answered = core.now() - began;
        assert!(answered < whole() / 10, "16 writes took {answered} ns");
        let manager = JobManager::of(&core);
        let copied = manager.query_block().remove(0).facts.offset;
        // The last ones are in memory and on their way.
        assert!(copied + (128 << 10) >= SIZE / 3, "{copied} bytes were kept for the backup");
        // What was copied before its turn is paid for: the rest waits for a second.
        core.sleep(whole() / 4).await;
        let later = manager.query_block().remove(0).facts.offset;
        assert!(later - copied <= 128 << 10, "{} bytes beside the debt", later - copied);
        gone(&core, "j").await;
        let took = core.now() - began;
        assert!(took.abs_diff(whole()) * 25 <= whole(), "{took} of {}", whole());
        assert_eq!(first_difference(&content(&t).await, &first), None);
    });
}
