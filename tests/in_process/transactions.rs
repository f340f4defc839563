//! Snapshots and transactions on qcow2 under guest writes: one cut, all or nothing.
use std::path::PathBuf;
use std::rc::Rc;

use crate::rig::{Log, SIZE, content, disk, first_difference};
use liveblk_engine::driver::sim::{FaultRule, OpFilter, Sim, SimConfig};
use liveblk_engine::executor::{Class, Core, CoreId};
use liveblk_engine::format::{CreateImage, ReferencePolicy};
use liveblk_engine::graph::{BackingSource, Graph, GraphConfig, OpenNode};
use liveblk_engine::node::{Disk, Node, Origin, User};
use liveblk_engine::storage::{File, FileOptions, Storage};
use liveblk_jobs::{
    Action, BackupAction, CompletionMode, JobManager, NewImageMode, SnapshotFile, SyncMode,
    transaction,
};

fn configure(core: &Core) {
    Graph::of(core).configure(GraphConfig {
        formats: liveblk_formats::registry(),
        policy: ReferencePolicy::Explicit,
        ..GraphConfig::default()
    });
}

/// Makes an empty qcow2 image of [`SIZE`] bytes and opens it without a backing node.
async fn image(core: &Core, name: &str) -> Rc<Node> {
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
    open(core, name, &path).await
}

async fn open(core: &Core, name: &str, path: &str) -> Rc<Node> {
    let mut spec = OpenNode::new("qcow2", path).named(name);
    spec.backing = BackingSource::None;
    spec.monitor_owned = true;
    Graph::of(core).open(spec).await.expect("it opens")
}

fn snapshot(node: &str, overlay: &str) -> Action {
    Action::SnapshotFile(SnapshotFile {
        node: node.into(),
        file: PathBuf::from(format!("/{overlay}.qcow2")),
        overlay: Some(overlay.into()),
        format: "qcow2".into(),
        mode: NewImageMode::AbsolutePaths,
    })
}

fn backup(id: &str, source: &str, target: &str) -> Action {
    Action::Backup(BackupAction {
        job: crate::rig::options(id),
        source: source.into(),
        target: target.into(),
        sync: SyncMode::Full,
        allow_larger_target: false,
        compress: false,
        more: Default::default(),
    })
}

async fn here(core: &Core, actions: Vec<Action>) -> Result<(), String> {
    let actions = actions.into_iter().map(|action| (core.id(), action)).collect();
    let done = transaction(core, actions, CompletionMode::Individual).await;
    done.map_err(|error| error.to_string())
}

#[test]
fn snapshots_of_two_disks_and_a_backup_are_one_instant_under_writes() {
    for seed in 0..12 {
        let mut sim = crate::rig::world(seed);
        sim.block_on(0, |core| async move {
            configure(&core);
            let (a, b) = (image(&core, "a").await, image(&core, "b").await);
            let t = image(&core, "t").await;
            let (log, disk_a, disk_b) = (Log::new(), disk(&a), disk(&b));
            let guests = [log.guests(&core, 0, &disk_a, 2), log.guests(&core, 1, &disk_b, 2)];
            core.sleep(3_000_000).await;
            let from = core.now();
            here(&core, vec![snapshot("a", "a1"), backup("j", "b", "t"), snapshot("b", "b1")])
                .await
                .expect("all is done");
            let to = core.now();
            assert_eq!((&*disk_a.node_name(), &*disk_b.node_name()), ("a1", "b1"));
            assert!(!a.is_writable() && !b.is_writable());
            crate::rig::gone(&core, "j").await;
            for guests in guests {
                guests.stop().await;
            }
            assert_eq!(log.failures.get(), 0);
            let zero = vec![0; SIZE as usize];
            let (old_a, old_b) = (content(&a).await, content(&b).await);
            let copy = content(&t).await;
            log.prove_instant(
                &[(0, &zero, &old_a), (1, &zero, &old_b), (1, &zero, &copy)],
                from,
                to,
            );
            assert_eq!(first_difference(&old_b, &copy), None, "backup and snapshot are one cut");
            for (index, disk) in [(0, &disk_a), (1, &disk_b)] {
                let live = content(&disk.node()).await;
                assert_eq!(first_difference(&live, &log.model(index, &zero)), None);
            }
            assert_eq!(a.users(), [User::Overlay { node: "a1".into() }]);
        });
    }
}

/// A guest on core 0 that writes a counter to two disks in turn; disk 1 lives on core 1.
async fn count(core: Core, near: Disk, rounds: u64) {
    for number in 1..=rounds {
        let bytes = number.to_le_bytes().repeat(64);
        if number % 2 == 1 {
            let buf = core.pool().alloc(512);
            buf.copy_from(0, &bytes);
            near.write(0, buf, Default::default()).await.expect("written");
        } else {
            let far = core.call(CoreId(1), move |core| async move {
                let disk = core.extension(|| FarDisk(attach(&core)));
                let buf = core.pool().alloc(512);
                buf.copy_from(0, &bytes);
                disk.0.write(0, buf, Default::default()).await.is_ok()
            });
            assert_eq!(far.await, Some(true));
        }
    }
}

struct FarDisk(Disk);

fn attach(core: &Core) -> Disk {
    disk(&Graph::of(core).find("d1").expect("opened before"))
}

async fn counter(core: &Core, name: &str) -> u64 {
    let node = Graph::of(core).find(name).expect("there");
    let buf = core.pool().alloc(8);
    node.read(0, buf.clone(), Origin::External).await.expect("readable");
    u64::from_le_bytes(buf.to_vec().try_into().expect("eight bytes"))
}

#[test]
fn a_counter_written_to_two_disks_on_two_cores_in_turn_is_cut_once() {
    for seed in 0..20 {
        let mut sim = Sim::new(SimConfig::new(seed).cores(2));
        sim.block_on(1, |core| async move {
            configure(&core);
            drop(image(&core, "d1").await);
        });
        sim.block_on(0, |core| async move {
            configure(&core);
            let near = disk(&image(&core, "d0").await);
            let counting = core.spawn(Class::Guest, count(core.clone(), near, 200));
            let mut last = ("d0".to_owned(), "d1".to_owned());
            for round in 0..4 {
                core.sleep(core.random() % 5_000_000).await;
                let next = (format!("s0{round}"), format!("s1{round}"));
                let actions = vec![
                    (CoreId(0), snapshot(&last.0, &next.0)),
                    (CoreId(1), snapshot(&last.1, &next.1)),
                ];
                transaction(&core, actions, CompletionMode::Individual).await.expect("it is cut");
                let near = counter(&core, &last.0).await;
                let name = last.1.clone();
                let far =
                    core.call(CoreId(1), move |core| async move { counter(&core, &name).await });
                let far = far.await.expect("core 1 answers");
                assert!(near.abs_diff(far) <= 1, "seed {seed}: {near} and {far} are two instants");
                last = next;
            }
            counting.await;
        });
    }
}

/// Names of nodes, guests and files: what a failed transaction must not change.
fn picture(core: &Core, sim_paths: Vec<PathBuf>) -> String {
    let nodes = Graph::of(core).nodes();
    let mut text: Vec<String> = nodes
        .iter()
        .map(|node| {
            let below = node.backing().map(|node| node.name());
            format!("{} {below:?} {:?} {}", node.name(), node.users(), node.is_writable())
        })
        .collect();
    text.push(format!("{sim_paths:?} {:?}", JobManager::of(core).query()));
    text.join("\n")
}

#[test]
fn each_step_of_a_transaction_fails_in_turn_and_nothing_is_left() {
    let mut failures = 0;
    for step in 0.. {
        let mut sim = Sim::new(SimConfig::new(7).calm());
        let fs = sim.fs();
        let (guest, before) = sim.block_on(0, |core| async move {
            configure(&core);
            let (a, b) = (image(&core, "a").await, image(&core, "b").await);
            drop(image(&core, "t").await);
            let guest = disk(&a);
            let log = Log::new();
            for _ in 0..5 {
                log.write_one(&core, 0, &guest, 0, SIZE / 512).await;
            }
            assert!(guest.flush().await.is_ok());
            drop(b);
            let before = picture(&core, fs.paths());
            (guest, before)
        });
        sim.inject(FaultRule::once(OpFilter::any(), 5).after(step));
        let done = sim.block_on(0, |core| async move {
            here(&core, vec![snapshot("a", "a1"), backup("j", "b", "t"), snapshot("b", "b1")]).await
        });
        sim.clear_faults();
        let fs = sim.fs();
        let over = sim.block_on(0, |core| async move {
            match done {
                Ok(()) => {
                    assert_eq!(&*guest.node_name(), "a1");
                    JobManager::of(&core).cancel_all().await;
                    true
                }
                Err(text) => {
                    assert_eq!(picture(&core, fs.paths()), before, "step {step}: {text}");
                    assert!(!text.is_empty());
                    false
                }
            }
        });
        if over && failures > 0 && step > 60 {
            break;
        }
        failures += u32::from(!over);
        assert!(step < 400, "the steps never end");
    }
    assert!(failures > 20, "only {failures} steps failed");
}

#[test]
fn files_that_exist_are_neither_truncated_nor_removed() {
    let mut sim = crate::rig::world(3);
    sim.fs().create("/full.qcow2", b"precious");
    sim.fs().create("/empty.qcow2", b"");
    let fs = sim.fs();
    sim.block_on(0, |core| async move {
        configure(&core);
        let (a, b) = (image(&core, "a").await, image(&core, "b").await);
        let text = here(&core, vec![snapshot("b", "b1"), snapshot("a", "full")]).await.unwrap_err();
        assert!(text.contains("/full.qcow2") && text.contains("exists"), "{text}");
        assert_eq!(fs.read("/full.qcow2").as_deref(), Some(&b"precious"[..]));
        let aborted = here(&core, vec![snapshot("a", "empty"), Action::Abort]).await.unwrap_err();
        assert_eq!(aborted, "Transaction aborted using Abort action");
        assert_eq!(fs.read("/empty.qcow2").as_deref(), Some(&b""[..]), "empty again");
        assert!(fs.read("/b1.qcow2").is_none() && a.is_writable() && b.is_writable());
        here(&core, vec![snapshot("a", "empty")]).await.expect("an empty file may be filled");
        assert!(fs.size("/empty.qcow2") > Some(0));
        let names: Vec<_> = fs.paths().into_iter().filter(|path| path.ends_with(".tmp")).collect();
        assert!(names.is_empty(), "{names:?}");
    });
}

#[test]
fn refusals_have_the_texts_of_the_peer() {
    let mut sim = crate::rig::world(4);
    sim.block_on(0, |core| async move {
        configure(&core);
        let a = image(&core, "a").await;
        let (t, u) = (image(&core, "t").await, image(&core, "u").await);
        let missing = here(&core, vec![snapshot("x", "o")]).await.unwrap_err();
        assert_eq!(missing, "Cannot find device='' nor node-name='x'");
        let used = here(&core, vec![snapshot("a", "t")]).await.unwrap_err();
        assert_eq!(used, "New overlay node-name already in use");
        let nodes = |node: &str, overlay: &str| Action::Snapshot {
            node: node.into(),
            overlay: overlay.into(),
        };
        here(&core, vec![nodes("t", "u")]).await.expect("both are free");
        let backed = here(&core, vec![nodes("a", "u")]).await.unwrap_err();
        assert_eq!(backed, "The overlay already has a backing image");
        let guest = disk(&u);
        let busy = here(&core, vec![nodes("a", "u")]).await.unwrap_err();
        assert_eq!(busy, "The overlay is already in use");
        // The peer takes nothing but backups there.
        let grouped =
            transaction(&core, vec![(core.id(), snapshot("a", "o"))], CompletionMode::Grouped);
        grouped.await.expect("a snapshot goes with jobs that end together");
        drop((a, t, guest));
    });
}

#[test]
fn a_grouped_transaction_of_backups_ends_all_or_none() {
    for fail in [false, true] {
        let mut sim = crate::rig::world(5);
        let core = sim.core(0);
        let events = crate::rig::Events::of(&core);
        if fail {
            sim.fs().create("/unused", b"");
        }
        let first = sim.block_on(0, |core| async move {
            configure(&core);
            let (a, b) = (image(&core, "a").await, image(&core, "b").await);
            drop((image(&core, "t").await, image(&core, "u").await));
            let (log, near, far) = (Log::new(), disk(&a), disk(&b));
            for _ in 0..20 {
                log.write_one(&core, 0, &near, 0, SIZE / 512).await;
                log.write_one(&core, 1, &far, 0, SIZE / 512).await;
            }
            content(&a).await
        });
        if fail {
            let writes = OpFilter::any().file("/u.qcow2");
            sim.inject(FaultRule::always(writes, 28));
        }
        sim.block_on(0, |core| async move {
            let actions =
                vec![(core.id(), backup("j", "a", "t")), (core.id(), backup("k", "b", "u"))];
            transaction(&core, actions, CompletionMode::Grouped).await.expect("they start");
            crate::rig::gone(&core, "j").await;
            crate::rig::gone(&core, "k").await;
            if !fail {
                let t = Graph::of(&core).find("t").expect("there");
                assert_eq!(first_difference(&content(&t).await, &first), None);
            }
        });
        let words = events.words();
        let ends: Vec<_> =
            words.iter().filter(|word| word.starts_with('C')).map(String::as_str).collect();
        if fail {
            assert_eq!(ends, ["COMPLETED No space left on device", "CANCELLED"], "{words:?}");
        } else {
            assert_eq!(ends, ["COMPLETED", "COMPLETED"], "{words:?}");
            let first_end = words.iter().position(|word| word == "COMPLETED");
            let last_waiting = words.iter().rposition(|word| word == "pending");
            assert!(last_waiting < first_end, "{words:?}");
        }
    }
}

#[test]
fn a_snapshot_under_a_backup_moves_the_guest_and_the_backup_stays_at_its_instant() {
    for seed in 30..40 {
        let mut sim = crate::rig::world(seed);
        sim.block_on(0, |core| async move {
            configure(&core);
            let a = image(&core, "a").await;
            let t = image(&core, "t").await;
            let (log, guest) = (Log::new(), disk(&a));
            let guests = log.guests(&core, 0, &guest, 3);
            core.sleep(3_000_000).await;
            let from = core.now();
            here(&core, vec![backup("j", "a", "t")]).await.expect("it starts");
            let to = core.now();
            here(&core, vec![snapshot("a", "a1")]).await.expect("allowed under a backup");
            assert_eq!(&*guest.node_name(), "a1");
            crate::rig::gone(&core, "j").await;
            core.sleep(1_000_000).await;
            guests.stop().await;
            let zero = vec![0; SIZE as usize];
            log.prove_instant(&[(0, &zero, &content(&t).await)], from, to);
            let live = content(&guest.node()).await;
            assert_eq!(first_difference(&live, &log.model(0, &zero)), None);
            assert_eq!(log.failures.get(), 0);
        });
    }
}

#[test]
fn a_snapshot_of_the_target_of_a_mirror_is_refused_and_changes_nothing() {
    let mut sim = crate::rig::world(41);
    let fs = sim.fs();
    sim.block_on(0, |core| async move {
        configure(&core);
        let (a, t) = (image(&core, "a").await, image(&core, "t").await);
        let guest = disk(&a);
        liveblk_jobs::start_mirror(liveblk_jobs::MirrorSpec {
            job: crate::rig::options("m"),
            source: a.clone(),
            target: t.clone(),
            sync: SyncMode::Full,
            copy_mode: liveblk_jobs::CopyMode::Background,
            granularity: None,
            allow_larger_target: false,
            more: Default::default(),
        })
        .await
        .expect("it starts");
        let text = here(&core, vec![snapshot("t", "t1")]).await.unwrap_err();
        assert_eq!(text, "Node 't' is busy: block device is in use by block job: mirror");
        assert!(fs.read("/t1.qcow2").is_none());
        assert_eq!(&*guest.node_name(), "a");
        JobManager::of(&core).cancel_all().await;
    });
}
