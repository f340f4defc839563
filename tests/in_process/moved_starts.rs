//! A transaction that starts or ends jobs, and a snapshot from elsewhere that moves the guests, and
//! the jobs with them, after the transaction was prepared and before its cut: everything comes out
//! as if one had come after the other.

use std::cell::Cell;
use std::rc::Rc;

use crate::chains::{self, Chain, Layer};
use crate::rig::{self, Log, content, disk, first_difference};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::graph::Graph;
use liveblk_engine::node::Node;
use liveblk_jobs::{
    Action, BackupAction, CommitAction, CommitSpec, CompletionMode, CopyMode, JobManager,
    MirrorAction, NewImageMode, SnapshotFile, Status, SyncMode, Verb, snapshot_file, transaction,
};

fn snapshot(node: &str, name: &str) -> SnapshotFile {
    SnapshotFile {
        node: node.into(),
        file: format!("/{name}.img").into(),
        overlay: Some(name.into()),
        format: "qcow2".into(),
        mode: NewImageMode::AbsolutePaths,
    }
}

fn mirror(source: &str, target: &str, copy_mode: CopyMode) -> Action {
    Action::Mirror(MirrorAction {
        job: rig::options("j"),
        source: source.into(),
        target: target.into(),
        sync: SyncMode::Full,
        copy_mode,
        granularity: None,
        allow_larger_target: false,
        more: Default::default(),
    })
}

fn commit(top: &Rc<Node>, base: &Rc<Node>, copy_mode: CopyMode) -> Action {
    let spec = CommitSpec { job: rig::options("j"), copy_mode, ..CommitSpec::new(top, top, base) };
    Action::Commit(CommitAction::of(spec))
}

fn backup(source: &str, target: &str) -> Action {
    Action::Backup(BackupAction {
        job: rig::options("b"),
        source: source.into(),
        target: target.into(),
        sync: SyncMode::Full,
        allow_larger_target: false,
        compress: false,
        more: Default::default(),
    })
}

/// Takes the snapshot when job `j` is prepared, and a little later. Whether the job had not begun,
/// and whether it was taken: a commit that is being prepared may have the chain for itself.
async fn snapshot_when_prepared(core: Core, delay: u64) -> (bool, bool) {
    let manager = JobManager::of(&core);
    while manager.find("j").is_none() {
        core.sleep(500).await;
    }
    core.sleep(delay).await;
    let early = manager.find("j").is_some_and(|job| job.status() == Status::Created);
    match snapshot_file(&core, core.id(), snapshot("n3", "e")).await {
        Ok(()) => (early, true),
        Err(error) => {
            let text = error.to_string();
            assert_eq!(text, "Node 'n3' is busy: block device is in use by block job: commit");
            assert!(Graph::of(&core).find("e").is_err());
            (early, false)
        }
    }
}

/// Jobs of a transaction whose source a snapshot moves before the cut of the transaction.
#[test]
fn a_job_that_is_moved_by_a_snapshot_before_its_start_goes_with_the_guests() {
    let early = Cell::new(0);
    for seed in 0..32 {
        let mut sim = rig::world(seed);
        let met = sim.block_on(0, move |core| async move {
            let chain = Chain::make(&core, &Layer::usual(seed), true).await;
            let (d, base) = (chain.top(), chain.node(0));
            let (target, copy) =
                (chains::fresh(&core, "target").await, chains::fresh(&core, "copy").await);
            let other = chains::fresh(&core, "other").await;
            let first = content(&d).await;
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            let copy_mode = [CopyMode::Background, CopyMode::WriteBlocking][(seed % 2) as usize];
            let commits = seed % 4 > 1;
            let job = match commits {
                true => commit(&d, &base, copy_mode),
                false => mirror("n3", "target", copy_mode),
            };
            // What takes its time after the job was prepared.
            let mut actions = vec![job, Action::SnapshotFile(snapshot("other", "o"))];
            if !commits {
                actions.insert(0, backup("n3", "copy"));
            }
            let actions = actions.into_iter().map(|action| (core.id(), action)).collect();
            let moving = snapshot_when_prepared(core.clone(), seed * 10_000);
            let moving = core.spawn(Class::Guest, moving);
            let from = core.now();
            let done = transaction(&core, actions, CompletionMode::Individual).await;
            done.expect("one comes after the other");
            let to = core.now();
            let (early, taken) = moving.await;
            assert!(taken || commits);
            assert_eq!(&*guest.node_name(), if taken { "e" } else { "n3" });
            let manager = JobManager::of(&core);
            manager.until("j", |status| status == Status::Ready).await;
            core.sleep(core.random() % 1_000_000).await;
            manager.job_verb("j", Verb::Complete).expect("completes");
            rig::gone(&core, "j").await;
            rig::gone(&core, "b").await;
            guests.stop().await;
            let end = if commits { &base } else { &target };
            assert_eq!(guest.node_name(), end.name(), "seed {seed}");
            assert_eq!(log.failures.get(), 0);
            let now = log.model(0, &first);
            let found = content(end).await;
            assert_eq!(first_difference(&found[..now.len()], &now), None, "seed {seed}");
            assert!(!d.is_writable() || commits, "seed {seed}");
            if !commits {
                // What `n3` was at the cut of the transaction: with its guests or after them.
                log.prove_instant(&[(0, &first, &content(&copy).await)], from, to);
            }
            assert!(Graph::of(&core).find("o").is_ok() && !other.is_writable());
            early && taken
        });
        early.set(early.get() + u32::from(met));
    }
    assert!(early.get() > 12, "{} snapshots came before the start", early.get());
}

/// A group of mirrors that is finalized while a snapshot of one of the disks is taken.
#[test]
fn mirrors_of_a_group_end_well_when_a_snapshot_moves_one_of_them_before_the_last_cut() {
    for seed in 0..12 {
        let mut sim = rig::world(1000 + seed);
        sim.block_on(0, move |core| async move {
            let chain = Chain::make(&core, &Layer::usual(seed), true).await;
            let (d, other) = (chain.top(), chains::fresh(&core, "other").await);
            let first = [content(&d).await, content(&other).await];
            let targets = [chains::fresh(&core, "t0").await, chains::fresh(&core, "t1").await];
            let (log, disks) = (Log::new(), [disk(&d), disk(&other)]);
            let guests = [log.guests(&core, 0, &disks[0], 2), log.guests(&core, 1, &disks[1], 2)];
            let mut actions = Vec::new();
            for (index, source) in ["n3", "other"].into_iter().enumerate() {
                let Action::Mirror(mut one) =
                    mirror(source, &format!("t{index}"), CopyMode::Background)
                else {
                    unreachable!("it is one")
                };
                one.job = rig::options(&format!("j{index}"));
                one.job.auto_finalize = false;
                actions.push((core.id(), Action::Mirror(one)));
            }
            transaction(&core, actions, CompletionMode::Grouped).await.expect("they start");
            let manager = JobManager::of(&core);
            for id in ["j0", "j1"] {
                manager.until(id, |status| status == Status::Ready).await;
                manager.block_job_verb(id, Verb::Complete, false).expect("completes");
            }
            manager.until("j1", |status| status == Status::Pending).await;
            let mover = core.clone();
            let moving = core.spawn(Class::Guest, async move {
                mover.sleep(seed * 80_000).await;
                snapshot_file(&mover, mover.id(), snapshot("n3", "e")).await
            });
            core.sleep(core.random() % 400_000).await;
            let from = core.now();
            manager.job_verb("j0", Verb::Finalize).expect("finalizes both");
            for id in ["j0", "j1"] {
                rig::gone(&core, id).await;
            }
            let to = core.now();
            let moved = moving.await;
            for guests in guests {
                guests.stop().await;
            }
            assert_eq!(log.failures.get(), 0);
            let mut old = Vec::new();
            for (index, disk) in disks.iter().enumerate() {
                assert_eq!(*disk.node_name(), *format!("t{index}"), "seed {seed}");
                let live = content(&targets[index]).await;
                let now = log.model(index, &first[index]);
                assert_eq!(first_difference(&live, &now), None, "seed {seed} disk {index}");
            }
            let graph = Graph::of(&core);
            let left = match (&moved, graph.find("e")) {
                // The guests went on from there; nothing is left of it otherwise.
                (Ok(()), Ok(layer)) => layer,
                (Err(_), Err(_)) => Rc::clone(&d),
                (moved, found) => panic!("seed {seed}: {moved:?} but {found:?}"),
            };
            old.push(content(&left).await);
            old.push(content(&other).await);
            log.prove_instant(&[(0, &first[0], &old[0]), (1, &first[1], &old[1])], from, to);
        });
    }
}
