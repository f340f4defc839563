//! Starts of stream, commit and active commit in transactions: all or nothing at the start, and
//! together at the end where they were asked to.
//!
//! Row Q4 (no write is lost between the end of a copy and the switch), for groups.

use std::rc::Rc;

use liveblk_engine::driver::sim::{FaultRule, OpFilter, Sim, SimConfig, SimFs, SimOpKind};
use liveblk_engine::executor::Core;
use liveblk_engine::graph::Graph;
use liveblk_engine::node::Disk;
use liveblk_jobs::{JobManager, Status};
use serde_json::{Value, json};

use crate::rig::{Events, Log, SECTOR, content, gone};
use crate::world::{
    Cells, Refusal, SIZE, add, attach, configure, create, fill, find, qmp, rig_latency, same,
};

/// An input/output error.
const EIO: i32 = 5;

/// Chains low <- mid <- top for each of three disks, and a target.
fn images() -> SimFs {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.block_on(0, |core| async move {
        configure(&core);
        for disk in 0..3 {
            let [low, mid, top, to] = names(disk);
            let chain = [(&low, None), (&mid, Some(&low)), (&top, Some(&mid)), (&to, None)];
            for (nth, (name, below)) in chain.into_iter().enumerate() {
                let below = below.map(String::as_str);
                create(&core, name, SIZE, below).await;
                if *name != to {
                    add(&core, name, below).await;
                    fill(&find(&core, name), nth as u64 * 100_000, 300_000, nth as u8 + 1).await;
                }
            }
        }
        Graph::of(&core).close_all().await.expect("it closes");
    });
    sim.kill()
}

fn names(disk: usize) -> [String; 4] {
    ["low", "mid", "top", "to"].map(|word| format!("{word}{disk}"))
}

/// Three disks with their guests.
struct Disks {
    core: Core,
    disks: Vec<Disk>,
    first: Vec<Vec<u8>>,
    log: Rc<Log>,
    events: Rc<Events>,
}

impl Disks {
    async fn open(core: &Core) -> Rc<Self> {
        configure(core);
        let (mut disks, mut first) = (Vec::new(), Vec::new());
        for disk in 0..3 {
            let [low, mid, top, to] = names(disk);
            add(core, &low, None).await;
            add(core, &mid, Some(&low)).await;
            add(core, &top, Some(&mid)).await;
            add(core, &to, None).await;
            disks.push(attach(&find(core, &top)));
            first.push(content(&find(core, &top)).await);
        }
        let (events, core) = (Events::of(core), core.clone());
        Rc::new(Self { core, disks, first, log: Log::new(), events })
    }

    /// Every guest writes a few times.
    async fn work(&self) {
        for _ in 0..2 {
            for (index, disk) in self.disks.iter().enumerate() {
                self.log.write_one(&self.core, index, disk, 0, SIZE / SECTOR).await;
            }
        }
    }

    async fn transaction(&self, actions: Vec<Value>, grouped: bool) -> Result<Value, Refusal> {
        let mode = if grouped { "grouped" } else { "individual" };
        let arguments = json!({"actions": actions, "properties": {"completion-mode": mode}});
        qmp(&self.core, "transaction", arguments).await
    }

    async fn until(&self, disk: usize, status: Status) {
        let id = format!("j{disk}");
        JobManager::of(&self.core).until(&id, |now| now == status).await;
    }

    fn places(&self) -> Vec<String> {
        self.disks.iter().map(|disk| disk.node_name().to_string()).collect()
    }

    /// Every guest finds what it wrote, and saw no failure.
    async fn prove(&self, what: &str) {
        assert_eq!(self.log.failures.get(), 0, "{what}");
        for (index, disk) in self.disks.iter().enumerate() {
            let now = self.log.model(index, &self.first[index]);
            same(&content(&disk.node()).await, &now, &format!("{what}: disk {index}"));
        }
    }

    /// Names, users, links and rights of all nodes, and jobs: what a failure must not change.
    fn picture(&self) -> Vec<String> {
        let of = |node: Rc<liveblk_engine::node::Node>| {
            let below = node.backing().map(|node| node.name());
            format!("{} {below:?} {:?} {}", node.name(), node.users(), node.is_writable())
        };
        let mut lines: Vec<_> = Graph::of(&self.core).nodes().into_iter().map(of).collect();
        lines.push(format!("{:?}", JobManager::of(&self.core).query()));
        lines
    }
}

fn action(kind: &str, disk: usize, by_hand: bool) -> Value {
    let [low, mid, top, to] = names(disk);
    let mut data = json!({"job-id": format!("j{disk}"), "device": top,
                          "auto-finalize": !by_hand});
    let more = match kind {
        "stream" => json!({"base-node": low}),
        "commit" => json!({"top-node": mid, "base-node": low}),
        "active" => json!({}),
        _ => json!({"target": to, "sync": "full"}),
    };
    data.as_object_mut().expect("one").extend(more.as_object().cloned().expect("one"));
    let name = match kind {
        "stream" => "block-stream",
        "commit" | "active" => "block-commit",
        "mirror" => "blockdev-mirror",
        _ => "blockdev-backup",
    };
    json!({"type": name, "data": data})
}

fn world(images: &SimFs, seed: u64) -> (Sim, Rc<Disks>) {
    let mut config = SimConfig::new(seed);
    config.latency = rig_latency();
    let mut sim = Sim::with_fs(config, images.after_power_cut(0));
    let disks = sim.block_on(0, |core| async move { Disks::open(&core).await });
    (sim, disks)
}

#[test]
fn jobs_on_chains_start_in_a_transaction_and_end_right() {
    let images = images();
    for (seed, grouped) in (0..4).map(|seed| (seed, seed % 2 == 1)) {
        let (mut sim, disks) = world(&images, seed);
        sim.block_on(0, move |core| async move {
            disks.work().await;
            let kinds = if seed < 2 {
                ["stream", "commit", "active"]
            } else {
                ["commit", "backup", "stream"]
            };
            let actions = kinds.iter().enumerate().map(|(disk, kind)| action(kind, disk, false));
            disks.transaction(actions.collect(), grouped).await.expect("they start");
            disks.work().await;
            if let Some(disk) = kinds.iter().position(|kind| *kind == "active") {
                disks.until(disk, Status::Ready).await;
                disks.work().await;
                let id = json!({"id": format!("j{disk}")});
                qmp(&core, "job-complete", id).await.expect("completes");
            }
            for (disk, kind) in kinds.iter().enumerate() {
                gone(&core, &format!("j{disk}")).await;
                let backing = find(&core, &format!("top{disk}")).backing().map(|node| node.name());
                if matches!(*kind, "stream" | "commit") {
                    assert_eq!(backing.as_deref(), Some(&*format!("low{disk}")), "{seed}");
                }
            }
            let words = disks.events.words();
            assert_eq!(words.iter().filter(|word| *word == "COMPLETED").count(), 3, "{words:?}");
            disks.work().await;
            disks.prove("after all").await;
        });
    }
}

#[test]
fn a_transaction_that_fails_after_jobs_were_prepared_leaves_chains_as_they_were() {
    let images = images();
    for kind in ["stream", "commit", "active", "mirror", "backup"] {
        let (mut sim, disks) = world(&images, 9);
        sim.block_on(0, move |core| async move {
            disks.work().await;
            let before = disks.picture();
            let abort = json!({"type": "abort", "data": {}});
            let actions = vec![action(kind, 0, false), action("stream", 1, false), abort];
            let (class, text) = disks.transaction(actions, true).await.expect_err("it aborts");
            assert_eq!(
                (&*class, &*text),
                ("GenericError", "Transaction aborted using Abort action")
            );
            assert_eq!(disks.picture(), before, "{kind}");
            disks.work().await;
            // Nothing is in the way of the same again.
            let again = vec![action(kind, 0, false)];
            disks.transaction(again, false).await.expect("it starts");
            JobManager::of(&core).cancel_all().await;
            disks.prove(kind).await;
        });
    }
}

#[test]
fn the_failure_of_any_operation_of_a_start_leaves_chains_as_they_were() {
    let images = images();
    let mut failures = 0;
    for step in 0..200 {
        let (mut sim, disks) = world(&images, 20);
        sim.inject(FaultRule::once(OpFilter::any(), EIO).after(step));
        let fs = sim.fs();
        let (files, before, other) = (fs.paths(), disks.picture(), Rc::clone(&disks));
        let hit = sim.block_on(0, move |_| async move {
            let disks = other;
            let snapshot = json!({"type": "blockdev-snapshot-sync", "data": {
                "node-name": "top2", "snapshot-node-name": "over", "snapshot-file": "/over"}});
            let actions = vec![action("stream", 0, false), action("active", 1, false), snapshot];
            let started = disks.transaction(actions, false).await;
            if started.is_err() {
                assert_eq!((disks.picture(), fs.paths()), (before, files), "{step} {started:?}");
            }
            started.is_err()
        });
        let fired = sim.faults() > 0;
        sim.clear_faults();
        sim.block_on(0, move |core| async move {
            JobManager::of(&core).cancel_all().await;
            disks.prove(&format!("step {step}")).await;
        });
        failures += u32::from(hit);
        if !fired {
            break;
        }
    }
    assert!(failures > 5, "only {failures} steps failed");
}

/// Finalized by hand, each target in turn failing at the very end.
#[test]
fn guests_of_a_group_move_all_or_none() {
    let (images, mut cells) = (images(), Cells::default());
    let groups: [&[&str]; 7] = [
        &["mirror", "mirror"],
        &["mirror", "mirror", "mirror"],
        &["stream", "mirror", "mirror"],
        &["active", "active"],
        &["mirror", "active"],
        &["active", "mirror", "active"],
        &["stream", "active", "mirror"],
    ];
    for (nth, kinds) in groups.into_iter().enumerate() {
        for failing in std::iter::once(None).chain((0..kinds.len()).map(Some)) {
            for kind in [SimOpKind::Write, SimOpKind::Sync] {
                let failing = failing.map(|disk| (disk, kind));
                let what = format!("{kinds:?} {failing:?}");
                cells.run(&what, || end(&images, nth as u64, kinds, failing));
            }
        }
    }
    cells.demand();
}

fn end(images: &SimFs, seed: u64, kinds: &[&'static str], failing: Option<(usize, SimOpKind)>) {
    let what = format!("{kinds:?} {failing:?}");
    let (mut sim, disks) = world(images, seed);
    let (other, set) = (Rc::clone(&disks), kinds.to_vec());
    sim.block_on(0, move |core| async move {
        other.work().await;
        let actions = set.iter().enumerate().map(|(disk, kind)| action(kind, disk, true));
        other.transaction(actions.collect(), true).await.expect("they start");
        for (disk, kind) in set.iter().enumerate().filter(|(_, kind)| **kind != "stream") {
            other.until(disk, Status::Ready).await;
            other.work().await;
            let id = json!({"id": format!("j{disk}")});
            qmp(&core, "job-complete", id).await.unwrap_or_else(|error| panic!("{kind} {error:?}"));
        }
        other.until(0, Status::Pending).await;
    });
    if let Some((disk, kind)) = failing {
        let file = match kinds[disk] {
            "active" => format!("/low{disk}"),
            "stream" => format!("/top{disk}"),
            _ => format!("/to{disk}"),
        };
        // A stream's own file is its guest's: that one writes nothing any more.
        sim.inject(FaultRule::always(OpFilter::any().file(&file).kind(kind), EIO));
    }
    let set = kinds.to_vec();
    sim.block_on(0, move |core| async move {
        if !matches!(failing, Some((disk, _)) if set[disk] == "stream") {
            disks.work().await;
        }
        let places = disks.places();
        qmp(&core, "job-finalize", json!({"id": "j0"})).await.expect("finalizes");
        for disk in 0..set.len() {
            gone(&core, &format!("j{disk}")).await;
        }
        let words = disks.events.words();
        let has = |wanted: &str| words.iter().any(|word| word == wanted);
        if failing.is_some() {
            assert_eq!(disks.places(), places, "{what}: nobody moved");
            assert!(has("COMPLETED Input/output error"), "{what}: {words:?}");
            assert!(has("CANCELLED") && !has("COMPLETED"), "{what}: {words:?}");
        } else {
            let moved = set.iter().enumerate().map(|(disk, kind)| match *kind {
                "active" => format!("low{disk}"),
                "mirror" => format!("to{disk}"),
                _ => format!("top{disk}"),
            });
            assert!(disks.places().into_iter().zip(moved).all(|(at, wanted)| at == wanted));
            assert!(has("COMPLETED") && !has("CANCELLED"), "{what}: {words:?}");
            disks.work().await;
        }
        if !matches!(failing, Some((disk, _)) if set[disk] == "stream") {
            disks.prove(&what).await;
        }
    });
}

#[test]
fn a_job_on_a_chain_that_the_same_transaction_makes_is_refused() {
    let images = images();
    let (mut sim, disks) = world(&images, 30);
    sim.block_on(0, move |core| async move {
        create(&core, "over", SIZE, None).await;
        add(&core, "over", None).await;
        let before = disks.picture();
        for name in ["block-stream", "block-commit"] {
            let snapshot = json!({"type": "blockdev-snapshot",
                                  "data": {"node": "top0", "overlay": "over"}});
            let mut data = json!({"job-id": "j", "device": "over"});
            if name == "block-commit" {
                data["top-node"] = "over".into();
            }
            let job = json!({"type": name, "data": data});
            let answer = disks.transaction(vec![snapshot, job], false).await;
            let text = "Node 'over' gets its backing node by this transaction: start the job after \
                        it";
            assert_eq!(answer, Err(("GenericError".into(), text.into())), "{name}");
            assert_eq!(disks.picture(), before);
        }
    });
}
