//! Mirrors and active commits that are to be ready in time, by QMP: what is told of them, what is
//! refused, and that their results are right.
//!
//! Row of users.md "mirror never gets READY under load".

use std::rc::Rc;

use liveblk_engine::driver::sim::{OpFilter, Sim, SimConfig, SlowDisk};
use liveblk_jobs::{JobManager, Status};
use serde_json::{Value, json};

use crate::world::{Op, World, images, rig_latency};

/// A world whose node `slow` takes a second for all of a disk.
fn slow(slow: &'static str) -> (Sim, Rc<World>) {
    let filter = OpFilter::any().file(slow);
    let config = SimConfig {
        latency: rig_latency(),
        slow: Some(SlowDisk { filter, bytes_per_second: 1 << 20 }),
        ..SimConfig::new(3)
    };
    let mut sim = Sim::with_fs(config, images().after_power_cut(0));
    let world = sim.block_on(0, |core| async move { World::open(&core).await });
    (sim, world)
}

fn converge(deadline_ms: u32) -> Value {
    json!({"deadline-ms": deadline_ms, "max-latency-us": 50_000})
}

async fn start(world: &Rc<World>, op: Op, more: Value) -> Result<Value, (String, String)> {
    let (name, mut arguments) = op.command("j", "t");
    arguments.as_object_mut().expect("one").extend(more.as_object().cloned().expect("one"));
    world.qmp(name, arguments).await
}

#[test]
fn queries_tell_where_a_job_is_that_is_to_be_ready_in_time() {
    for (op, target) in [(Op::Mirror, "/t"), (Op::Active, "/a")] {
        let (mut sim, world) = slow(target);
        sim.block_on(0, move |core| async move {
            start(&world, op, json!({"converge": converge(200)})).await.expect("it starts");
            core.sleep(10_000_000).await;
            let rows = world.qmp("query-block-jobs", json!({})).await.expect("is answered");
            let told = &rows[0]["converge"];
            assert_eq!((&told["phase"], &told["delay-us"]), (&json!("background"), &json!(0)));
            assert_eq!(told["deadline-missed"], json!(false));
            assert!(told["remaining"].as_u64().is_some_and(|bytes| bytes > 0), "{told}");
            assert!(told["dirty-rate"].is_u64(), "{told}");
            core.sleep(230_000_000).await;
            let rows = world.qmp("query-jobs", json!({})).await.expect("is answered");
            let told = &rows[0]["converge"];
            assert_eq!(told["phase"], json!("throttling"), "{op:?}: {told}");
            assert_eq!(told["deadline-missed"], json!(true), "{op:?}: {told}");
            assert!(told["delay-us"].as_u64().is_some_and(|delay| delay <= 25_000), "{told}");
            world.work(3).await;
            world.finish().await;
            let words = world.events.words();
            let has = |word: &str| words.iter().any(|known| known == word);
            assert!(has("CONVERGE write-blocking") && has("CONVERGE throttling"), "{words:?}");
            world.prove(&format!("{op:?}")).await;
        });
    }
}

#[test]
fn what_is_not_to_be_ready_in_time_says_nothing_of_it() {
    let (mut sim, world) = slow("/t");
    sim.block_on(0, move |core| async move {
        start(&world, Op::Mirror, json!({})).await.expect("it starts");
        core.sleep(300_000_000).await;
        for query in ["query-jobs", "query-block-jobs"] {
            let rows = world.qmp(query, json!({})).await.expect("is answered");
            assert_eq!(rows[0].get("converge"), None, "{query}");
        }
        world.finish().await;
        assert!(!world.events.has("CONVERGE"), "{:?}", world.events.words());
        world.prove("a mirror").await;
    });
}

#[test]
fn a_transaction_starts_jobs_that_are_to_be_ready_in_time() {
    for (op, name, target) in
        [(Op::Mirror, "blockdev-mirror", "/t"), (Op::Active, "block-commit", "/a")]
    {
        let (mut sim, world) = slow(target);
        sim.block_on(0, move |core| async move {
            let (_, mut data) = op.command("j", "t");
            data["converge"] = converge(60_000);
            let actions = json!({"actions": [{"type": name, "data": data}]});
            world.qmp("transaction", actions).await.expect("it starts");
            core.sleep(50_000_000).await;
            let rows = world.qmp("query-jobs", json!({})).await.expect("is answered");
            assert_eq!(rows[0]["converge"]["phase"], json!("background"), "{op:?}");
            JobManager::of(&core).until("j", |status| status == Status::Ready).await;
            world.finish().await;
            world.prove(&format!("{op:?}")).await;
        });
    }
}

#[test]
fn a_convergence_that_means_nothing_is_refused() {
    let (mut sim, world) = slow("/t");
    sim.block_on(0, move |_| async move {
        let cases = [
            (
                Op::Mirror,
                converge(0),
                "Parameter 'deadline-ms' expects a value between 1 and \
                                       4294967295",
            ),
            (
                Op::Active,
                json!({"deadline-ms": 1, "max-latency-us": 10_000_001}),
                "Parameter 'max-latency-us' expects a value between 1 and 10000000",
            ),
            (Op::Commit, converge(10), "'converge' specified, but 'top' is not the active layer"),
        ];
        for (op, wrong, text) in cases {
            let refused = start(&world, op, json!({"converge": wrong})).await.expect_err(text);
            assert_eq!(refused, ("GenericError".to_owned(), text.to_owned()), "{op:?}");
        }
        let wrong = json!({"copy-mode": "write-blocking"});
        let (_, text) = start(&world, Op::Commit, wrong).await.expect_err("it is not active");
        assert_eq!(text, "'copy-mode' specified, but 'top' is not the active layer");
        world.prove("nothing began").await;
    });
}
