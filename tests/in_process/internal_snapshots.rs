//! Snapshots inside images of running nodes: the instant of the transaction, all or none.
use std::path::PathBuf;
use std::rc::Rc;

use crate::rig::{Log, SIZE, content, disk, first_difference};
use liveblk_engine::driver::sim::{FaultRule, OpFilter, Sim, SimConfig};
use liveblk_engine::executor::{Core, CoreId};
use liveblk_engine::format::{CreateImage, ReferencePolicy};
use liveblk_engine::graph::{BackingSource, Graph, GraphConfig, OpenNode};
use liveblk_engine::node::{Disk, Node};
use liveblk_engine::storage::{File, FileOptions, Storage};
use liveblk_jobs::{
    Action, CompletionMode, InternalSnapshot, NewImageMode, SnapshotFile, delete_internal_snapshot,
    transaction,
};

async fn image(core: &Core, name: &str) -> Rc<Node> {
    Graph::of(core).configure(GraphConfig {
        formats: liveblk_formats::registry(),
        policy: ReferencePolicy::Explicit,
        ..GraphConfig::default()
    });
    let path = format!("/{name}.qcow2");
    let options = FileOptions {
        path: path.clone().into(),
        writable: true,
        create_new: true,
        ..FileOptions::default()
    };
    let file = File::open(core, options).await.expect("a new file");
    let driver = liveblk_formats::registry().find("qcow2").expect("known");
    let create = CreateImage { size: SIZE, ..CreateImage::default() };
    driver.create(core.clone(), Storage::File(file), create).await.expect("an image");
    let mut spec = OpenNode::new("qcow2", path).named(name);
    spec.backing = BackingSource::None;
    spec.monitor_owned = true;
    Graph::of(core).open(spec).await.expect("it opens")
}

fn internal(node: &str, name: &str) -> Action {
    Action::InternalSnapshot(InternalSnapshot {
        node: node.into(),
        name: name.into(),
        date_sec: 1_700_000_000,
        date_nsec: 5,
    })
}

fn external(node: &str, overlay: &str) -> Action {
    Action::SnapshotFile(SnapshotFile {
        node: node.into(),
        file: PathBuf::from(format!("/{overlay}.qcow2")),
        overlay: Some(overlay.into()),
        format: "qcow2".into(),
        mode: NewImageMode::AbsolutePaths,
    })
}

async fn here(core: &Core, actions: Vec<Action>) -> Result<(), String> {
    let actions = actions.into_iter().map(|action| (core.id(), action)).collect();
    let done = transaction(core, actions, CompletionMode::Individual).await;
    done.map_err(|error| error.to_string())
}

fn names(node: &Rc<Node>) -> Vec<String> {
    let held = node.format().abilities().snapshots.expect("qcow2 has snapshots");
    held.list().into_iter().map(|known| known.name).collect()
}

/// What the disk held at a snapshot. The guest is gone.
async fn content_at(node: &Rc<Node>, guest: Disk, name: &str) -> Vec<u8> {
    drop(guest);
    let held = node.format().abilities().snapshots.expect("qcow2 has snapshots");
    held.apply(name).await.expect("it is applied");
    content(node).await
}

#[test]
fn snapshots_inside_one_image_and_beside_another_are_one_instant_under_writes() {
    for seed in 0..12 {
        let mut sim = crate::rig::world(seed);
        sim.block_on(0, |core| async move {
            let (a, b) = (image(&core, "a").await, image(&core, "b").await);
            let (log, disk_a, disk_b) = (Log::new(), disk(&a), disk(&b));
            let guests = [log.guests(&core, 0, &disk_a, 2), log.guests(&core, 1, &disk_b, 2)];
            core.sleep(3_000_000).await;
            let from = core.now();
            let done = here(&core, vec![internal("a", "s"), external("b", "b1")]).await;
            let to = core.now();
            done.expect("all is done");
            core.sleep(2_000_000).await;
            for guests in guests {
                guests.stop().await;
            }
            assert_eq!(log.failures.get(), 0);
            let zero = vec![0; SIZE as usize];
            let live = content(&a).await;
            assert_eq!(first_difference(&live, &log.model(0, &zero)), None);
            let (old_a, old_b) = (content_at(&a, disk_a, "s").await, content(&b).await);
            log.prove_instant(&[(0, &zero, &old_a), (1, &zero, &old_b)], from, to);
        });
    }
}

#[test]
fn a_snapshot_inside_an_image_of_another_core_is_taken_there() {
    let mut sim = Sim::new(SimConfig::new(5).cores(2));
    sim.block_on(1, |core| async move { drop(image(&core, "far").await) });
    sim.block_on(0, |core| async move {
        drop(image(&core, "near").await);
        let actions = vec![(CoreId(1), internal("far", "s")), (CoreId(0), internal("near", "s"))];
        transaction(&core, actions, CompletionMode::Individual).await.expect("both are taken");
        assert_eq!(names(&Graph::of(&core).find("near").expect("there")), ["s"]);
    });
    sim.block_on(1, |core| async move {
        assert_eq!(names(&Graph::of(&core).find("far").expect("there")), ["s"]);
    });
}

#[test]
fn a_transaction_that_fails_after_a_snapshot_inside_was_taken_removes_it() {
    let mut sim = crate::rig::world(3);
    sim.block_on(0, |core| async move {
        let a = image(&core, "a").await;
        let twice = here(&core, vec![internal("a", "s"), internal("a", "s")]).await;
        assert_eq!(twice.unwrap_err(), "Snapshot with name 's' already exists on device 'a'");
        assert_eq!(names(&a), Vec::<String>::new());
        here(&core, vec![internal("a", "s")]).await.expect("taken");
        let again = here(&core, vec![internal("a", "t"), internal("a", "s")]).await;
        assert_eq!(again.unwrap_err(), "Snapshot with name 's' already exists on device 'a'");
        let aborted = here(&core, vec![internal("a", "t"), Action::Abort]).await;
        assert!(aborted.is_err());
        assert_eq!(names(&a), ["s"]);
        assert_eq!(here(&core, vec![internal("a", "")]).await.unwrap_err(), "Name is empty");
    });
}

#[test]
fn each_operation_of_a_transaction_with_snapshots_inside_fails_in_turn() {
    let mut failures = 0;
    for step in 0.. {
        let mut sim = Sim::new(SimConfig::new(11).calm());
        let guest = sim.block_on(0, |core| async move {
            let (a, b) = (image(&core, "a").await, image(&core, "b").await);
            let (guest, log) = (disk(&a), Log::new());
            for _ in 0..5 {
                log.write_one(&core, 0, &guest, 0, SIZE / 512).await;
            }
            guest.flush().await.expect("flushed");
            drop(b);
            (guest, log)
        });
        sim.inject(FaultRule::once(OpFilter::any(), 28).after(step));
        let done = sim.block_on(0, |core| async move {
            let actions = vec![internal("a", "s"), internal("b", "s"), external("a", "a1")];
            (here(&core, actions).await, core)
        });
        sim.clear_faults();
        let over = sim.block_on(0, |core| async move {
            let find = |name: &str| Graph::of(&core).find(name).expect("there");
            let taken = [names(&find("a")), names(&find("b"))];
            let (guest, log) = guest;
            let zero = vec![0; SIZE as usize];
            let live = content(&guest.node()).await;
            assert_eq!(first_difference(&live, &log.model(0, &zero)), None, "step {step}");
            match done.0 {
                Ok(()) => {
                    assert_eq!(taken, [["s"], ["s"]], "step {step}");
                    assert_eq!(&*guest.node_name(), "a1");
                    true
                }
                Err(text) => {
                    assert_eq!(&*guest.node_name(), "a", "step {step}: {text}");
                    assert_eq!(taken, [[""; 0], [""; 0]], "step {step}: {text}");
                    false
                }
            }
        });
        if over && failures > 0 && step > 100 {
            break;
        }
        failures += u32::from(!over);
        assert!(step < 500, "the operations never end");
    }
    assert!(failures > 20, "only {failures} operations failed");
}

#[test]
fn a_snapshot_inside_is_removed_by_its_id_and_its_name() {
    let mut sim = crate::rig::world(4);
    sim.block_on(0, |core| async move {
        let a = image(&core, "a").await;
        for name in ["one", "two", "three"] {
            here(&core, vec![internal("a", name)]).await.expect("taken");
        }
        let delete = async |id: Option<&str>, name: Option<&str>| {
            let done = delete_internal_snapshot(&core, "a", id, name).await;
            done.map(|gone| gone.name).map_err(|error| error.to_string())
        };
        let wrong = delete(Some("1"), Some("two")).await.unwrap_err();
        assert_eq!(wrong, "Snapshot with id '1' and name 'two' does not exist on device 'a'");
        assert_eq!(delete(Some("2"), None).await.expect("gone"), "two");
        assert_eq!(delete(Some("1"), Some("one")).await.expect("gone"), "one");
        let none = delete(None, Some("one")).await.unwrap_err();
        assert_eq!(none, "Snapshot with id 'null' and name 'one' does not exist on device 'a'");
        assert_eq!(names(&a), ["three"]);
    });
}
