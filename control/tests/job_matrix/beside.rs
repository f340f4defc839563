//! A mirror and backups beside an active commit, whoever comes first and whoever ends first.
//!
//! The guest's disk, the mirror's target and every backup must be exact; what goes on at the base
//! holds nothing of the top. Peers refuse these pairs.

use std::rc::Rc;

use liveblk_engine::driver::sim::{HoldPoint, OpFilter, Sim, SimConfig, SimOpKind};
use liveblk_engine::graph::Graph;
use liveblk_engine::node::User;
use liveblk_jobs::{JobManager, Status};
use serde_json::{Value, json};

use crate::world::{Cells, Op, SIZE, World, content_of, images, on, rig_latency, same};

/// Starts job `id` with `more` members.
async fn start(world: &Rc<World>, op: Op, id: &str, target: &str, more: Value) {
    world.try_with(op, id, target, more).await.unwrap_or_else(|error| panic!("{id}: {error:?}"));
}

async fn until(world: &Rc<World>, id: &str, status: Status) {
    JobManager::of(&world.core).until(id, |now| now == status).await;
}

async fn end(world: &Rc<World>, id: &str, verb: &str) {
    world.qmp(verb, json!({"id": id})).await.unwrap_or_else(|error| panic!("{id}: {error:?}"));
    JobManager::of(&world.core).until(id, |_| false).await;
}

/// The node is left to whoever opened it: no job, no guest.
fn is_left(world: &World, name: &str) -> bool {
    Graph::of(&world.core).find(name).is_ok_and(|node| {
        node.users().iter().all(|user| !matches!(user, User::Job { .. } | User::Guest { .. }))
    })
}

#[test]
fn a_mirror_goes_on_at_the_base_when_the_active_commit_ends_first() {
    let (images, mut cells) = (images(), Cells::default());
    for seed in 0..8 {
        let what = format!("seed {seed}");
        cells.run(&what, || {
            on(&images, seed, move |world: Rc<World>| async move {
                let blocking = if seed % 2 == 0 { "background" } else { "write-blocking" };
                let mirror =
                    json!({"copy-mode": blocking, "speed": if seed % 4 < 2 { 0 } else { 200_000 }});
                if seed < 4 {
                    start(&world, Op::Active, "j", "a", json!({})).await;
                    world.work(2).await;
                    start(&world, Op::Mirror, "m", "t", mirror).await;
                } else {
                    start(&world, Op::Mirror, "m", "t", mirror).await;
                    world.work(2).await;
                    start(&world, Op::Active, "j", "a", json!({})).await;
                }
                until(&world, "j", Status::Ready).await;
                let guest = world.works();
                world.core.sleep(5_000_000).await;
                end(&world, "j", "job-complete").await;
                assert_eq!(world.guest_is_at(), "a");
                assert!(is_left(&world, "d"), "nobody is at the top");
                world.core.sleep(20_000_000).await;
                world
                    .qmp("block-job-set-speed", json!({"device": "m", "speed": 0}))
                    .await
                    .expect("m");
                until(&world, "m", Status::Ready).await;
                end(&world, "m", "job-complete").await;
                world.rest(guest).await;
                assert_eq!(world.guest_is_at(), "t");
                world.work(2).await;
                world.prove(&format!("seed {seed}")).await;
            });
        });
    }
    cells.demand();
}

#[test]
fn an_active_commit_ends_after_a_mirror_took_its_guests() {
    let (images, mut cells) = (images(), Cells::default());
    for seed in 0..4 {
        let what = format!("seed {seed}");
        cells.run(&what, || {
            on(&images, seed, move |world: Rc<World>| async move {
                start(&world, Op::Active, "j", "a", json!({})).await;
                start(&world, Op::Mirror, "m", "t", json!({})).await;
                until(&world, "m", Status::Ready).await;
                until(&world, "j", Status::Ready).await;
                world.work(3).await;
                end(&world, "m", "job-complete").await;
                assert_eq!(world.guest_is_at(), "t");
                let left = world.model();
                world.work(3).await;
                if seed % 2 == 0 {
                    end(&world, "j", "job-complete").await;
                    assert!(is_left(&world, "d") && is_left(&world, "a"));
                    same(&content_of(&world, "a").await, &left, "what the guests left");
                } else {
                    world.qmp("block-job-cancel", json!({"device": "j"})).await.expect("j");
                    JobManager::of(&world.core).until("j", |_| false).await;
                    same(&content_of(&world, "d").await, &left, "what the guests left");
                }
                world.prove(&format!("seed {seed}")).await;
            });
        });
    }
    cells.demand();
}

#[test]
fn a_backup_stays_the_disk_at_its_start_when_an_active_commit_ends_under_it() {
    let (images, mut cells) = (images(), Cells::default());
    for seed in 0..8 {
        let what = format!("seed {seed}");
        cells.run(&what, || {
            on(&images, seed, move |world: Rc<World>| async move {
                let backup = json!({"speed": if seed % 2 == 0 { 1000 } else { 1 << 20 }});
                let first = seed < 4;
                if first {
                    start(&world, Op::Active, "j", "a", json!({})).await;
                    until(&world, "j", Status::Ready).await;
                    world.work(3).await;
                    start(&world, Op::Backup, "b", "t", backup).await;
                } else {
                    start(&world, Op::Backup, "b", "t", backup).await;
                    world.work(3).await;
                    start(&world, Op::Active, "j", "a", json!({})).await;
                    until(&world, "j", Status::Ready).await;
                }
                // What guests overwrite is copied for them: a busy one leaves nothing to do.
                let slow = seed % 2 == 0;
                let mut guest = (!slow).then(|| world.works());
                world.core.sleep(30_000_000).await;
                end(&world, "j", "job-complete").await;
                assert_eq!(world.guest_is_at(), "a");
                assert!(is_left(&world, "d"), "nobody is at the top");
                world.work(1).await;
                if slow {
                    assert!(JobManager::of(&world.core).find("b").is_some(), "it goes on");
                }
                let guest = guest.take().unwrap_or_else(|| world.works());
                // It may have ended.
                let _ = world.qmp("block-job-set-speed", json!({"device": "b", "speed": 0})).await;
                JobManager::of(&world.core).until("b", |_| false).await;
                world.rest(guest).await;
                world.prove(&format!("seed {seed}")).await;
            });
        });
    }
    cells.demand();
}

#[test]
fn what_cannot_go_with_an_active_commit_is_told_which_job_has_the_node() {
    let images = images();
    on(&images, 1, move |world: Rc<World>| async move {
        let busy = "Node 'd' is busy: block device is in use by block job: commit (job 'j')";
        world.qmp("block-dirty-bitmap-add", json!({"node": "d", "name": "m"})).await.expect("m");
        start(&world, Op::Active, "j", "a", json!({})).await;
        let refused = async |op: Op, more: Value| {
            let (_, text) = world.try_with(op, "k", "t", more).await.expect_err("it is refused");
            text
        };
        assert_eq!(refused(Op::Mirror, json!({"sync": "top"})).await, busy);
        assert_eq!(refused(Op::Mirror, json!({"sync": "none"})).await, busy);
        assert_eq!(refused(Op::Backup, json!({"sync": "top"})).await, busy);
        let by_bitmap = json!({"sync": "incremental", "bitmap": "m"});
        assert_eq!(refused(Op::Backup, by_bitmap).await, busy);
        start(&world, Op::Mirror, "k", "t", json!({})).await;
        let (_, text) = world.try_op(Op::Mirror, "l", "w").await.expect_err("there is one");
        assert!(text.contains("busy") && text.contains("(job '"), "{text}");
        world.finish().await;
        world.prove("refusals").await;
    });
    on(&images, 2, move |world: Rc<World>| async move {
        // A base that is larger is another disk.
        let grow = json!({"node-name": "a", "size": 2 * SIZE});
        let grown = world.qmp("block_resize", grow).await;
        start(&world, Op::Backup, "b", "t", json!({"sync": "top", "speed": 1000})).await;
        let (_, text) = world.try_op(Op::Active, "j", "a").await.expect_err("it is refused");
        let busy = "Node 'd' is busy: block device is in use by block job: backup (job 'b')";
        assert_eq!(text, busy, "{grown:?}");
        world.qmp("job-cancel", json!({"id": "b"})).await.expect("b");
        JobManager::of(&world.core).until("b", |_| false).await;
        world.forget_copies();
        world.prove_images("a backup of the top").await;
    });
}

#[test]
fn a_mirror_and_an_active_commit_do_not_end_in_one_cut() {
    let images = images();
    on(&images, 3, move |world: Rc<World>| async move {
        let (commit, data) = Op::Active.command("j", "a");
        let (mirror, more) = Op::Mirror.command("m", "t");
        let actions = json!([{"type": commit, "data": data}, {"type": mirror, "data": more}]);
        let group = json!({"actions": actions, "properties": {"completion-mode": "grouped"}});
        let (_, text) = world.qmp("transaction", group).await.expect_err("who takes the guests?");
        let busy = "Node 'd' is busy: block device is in use by block job: commit (job 'j')";
        assert_eq!(text, busy);
        world.qmp("transaction", json!({"actions": actions})).await.expect("one after the other");
        world.finish().await;
        world.prove("one after the other").await;
    });
}

#[test]
fn the_top_is_closed_after_the_reads_that_began_before_guests_left_it() {
    let mut config = SimConfig::new(4);
    config.latency = rig_latency();
    let mut sim = Sim::with_fs(config, images().after_power_cut(0));
    let world = sim.block_on(0, |core| async move { World::open(&core).await });
    let other = Rc::clone(&world);
    sim.block_on(0, move |_| async move {
        start(&other, Op::Active, "j", "a", json!({})).await;
        until(&other, "j", Status::Ready).await;
        start(&other, Op::Backup, "b", "t", json!({"speed": 1})).await;
    });
    let reads = OpFilter::any().kind(SimOpKind::Read).file("/d");
    let hold = sim.hold(reads, HoldPoint::Start);
    let other = Rc::clone(&world);
    sim.block_on(0, move |core| async move {
        let speed = json!({"device": "b", "speed": 0});
        other.qmp("block-job-set-speed", speed).await.expect("it goes on");
        core.sleep(100_000_000).await;
    });
    assert!(hold.held() > 0, "the backup reads the top");
    let other = Rc::clone(&world);
    sim.block_on(0, move |core| async move {
        other.qmp("job-complete", json!({"id": "j"})).await.expect("completes");
        core.sleep(1_000_000_000).await;
        assert_eq!(other.guest_is_at(), "a");
        assert!(other.status().is_some(), "the top is read still");
    });
    hold.release();
    sim.block_on(0, move |core| async move {
        let manager = JobManager::of(&core);
        manager.until("j", |_| false).await;
        assert!(is_left(&world, "d"), "nobody is at the top");
        world.work(3).await;
        manager.until("b", |_| false).await;
        world.prove("a held read").await;
    });
}
