//! Jobs that were started together end together: mirrors of several disks move all guests in one
//! cut or none, and a failure of one job takes the others with it.
use std::rc::Rc;

use crate::rig::*;
use liveblk_engine::driver::sim::{FaultRule, OpFilter, Sim, SimOpKind};
use liveblk_engine::executor::Core;
use liveblk_engine::graph::Graph;
use liveblk_engine::node::Disk;
use liveblk_jobs::{
    Action, BackupAction, CompletionMode, CopyMode, JobManager, MirrorAction, Status, SyncMode,
    Verb, transaction,
};

fn files(sim: &Sim) -> Vec<u8> {
    let first = filled(SIZE);
    for index in 0..2 {
        sim.fs().create(format!("/d{index}"), &first);
        sim.fs().create(format!("/t{index}"), &vec![0; SIZE as usize]);
    }
    first
}

async fn disks(core: &Core) -> Vec<Disk> {
    let mut disks = Vec::new();
    for index in 0..2 {
        let (name, target) = (format!("d{index}"), format!("t{index}"));
        disks.push(disk(&node(core, &name, &format!("/{name}")).await));
        node(core, &target, &format!("/{target}")).await;
    }
    disks
}

fn mirror(index: usize, by_hand: bool) -> Action {
    let mut job = options(&format!("j{index}"));
    job.auto_finalize = !by_hand;
    Action::Mirror(MirrorAction {
        job,
        source: format!("d{index}"),
        target: format!("t{index}"),
        sync: SyncMode::Full,
        copy_mode: CopyMode::Background,
        granularity: None,
        allow_larger_target: false,
        more: Default::default(),
    })
}

fn backup(index: usize) -> Action {
    Action::Backup(BackupAction {
        job: options(&format!("j{index}")),
        source: format!("d{index}"),
        target: format!("t{index}"),
        sync: SyncMode::Full,
        allow_larger_target: false,
        compress: false,
        more: Default::default(),
    })
}

async fn start(core: &Core, actions: Vec<Action>) {
    let actions = actions.into_iter().map(|action| (core.id(), action)).collect();
    transaction(core, actions, CompletionMode::Grouped).await.expect("they start");
}

async fn until(core: &Core, id: &str, status: Status) {
    JobManager::of(core).until(id, |now| now == status).await;
}

#[test]
fn mirrors_of_a_group_move_their_guests_at_one_instant() {
    for (seed, by_hand) in (0..12).map(|seed| (seed, seed % 2 == 0)) {
        let mut sim = world(seed);
        let first = files(&sim);
        sim.block_on(0, |core| async move {
            let disks = disks(&core).await;
            let log = Log::new();
            let guests = [log.guests(&core, 0, &disks[0], 2), log.guests(&core, 1, &disks[1], 2)];
            start(&core, vec![mirror(0, by_hand), mirror(1, by_hand)]).await;
            let manager = JobManager::of(&core);
            for id in ["j0", "j1"] {
                until(&core, id, Status::Ready).await;
                manager.block_job_verb(id, Verb::Complete, false).expect("completes");
            }
            let from = core.now();
            if by_hand {
                until(&core, "j1", Status::Pending).await;
                assert_eq!(&*disks[0].node_name(), "d0", "nobody moves before the end of all");
                manager.job_verb("j0", Verb::Finalize).expect("finalizes both");
            }
            for id in ["j0", "j1"] {
                gone(&core, id).await;
            }
            let to = core.now();
            for guests in guests {
                guests.stop().await;
            }
            assert_eq!(log.failures.get(), 0);
            let graph = Graph::of(&core);
            let mut old = Vec::new();
            for (index, disk) in disks.iter().enumerate() {
                assert_eq!(*disk.node_name(), *format!("t{index}"));
                let live = content(&disk.node()).await;
                assert_eq!(first_difference(&live, &log.model(index, &first)), None);
                old.push(content(&graph.find(&format!("d{index}")).expect("there")).await);
            }
            // What the sources hold is one cut over both disks.
            log.prove_instant(&[(0, &first, &old[0]), (1, &first, &old[1])], from, to);
        });
    }
}

#[test]
fn a_target_that_fails_at_the_end_moves_no_guest_of_the_group() {
    for (nth, kind) in (0..3).flat_map(|nth| [(nth, SimOpKind::Sync), (nth, SimOpKind::Write)]) {
        let mut sim = copying_world(100 + nth);
        let first = files(&sim);
        let log = Log::new();
        let core = sim.core(0);
        let events = Events::of(&core);
        let disks = sim.block_on(0, |core| async move {
            let disks = disks(&core).await;
            start(&core, vec![mirror(0, true), mirror(1, true)]).await;
            let manager = JobManager::of(&core);
            for id in ["j0", "j1"] {
                until(&core, id, Status::Ready).await;
                manager.block_job_verb(id, Verb::Complete, false).expect("completes");
            }
            until(&core, "j1", Status::Pending).await;
            disks
        });
        sim.inject(FaultRule::always(OpFilter::any().file("/t1").kind(kind), 5));
        let writer = Rc::clone(&log);
        let held = disks.clone();
        sim.block_on(0, |core| async move {
            for (index, disk) in held.iter().enumerate() {
                writer.write(&core, index, disk, 10 + nth, 8, false).await;
            }
            let manager = JobManager::of(&core);
            manager.job_verb("j1", Verb::Finalize).expect("is tried");
            for id in ["j0", "j1"] {
                gone(&core, id).await;
            }
            for (index, disk) in held.iter().enumerate() {
                assert_eq!(*disk.node_name(), *format!("d{index}"), "{kind:?} {nth}");
                writer.write(&core, index, disk, 40, 8, false).await;
                let live = content(&disk.node()).await;
                assert_eq!(first_difference(&live, &writer.model(index, &first)), None);
            }
            assert_eq!(writer.failures.get(), 0);
        });
        let words = events.words();
        assert!(events.has("COMPLETED Input/output error"), "{words:?}");
        assert!(events.has("CANCELLED"), "{words:?}");
    }
}

#[test]
fn a_backup_of_a_group_that_fails_ends_the_mirror_beside_it() {
    let mut sim = world(200);
    files(&sim);
    sim.inject(FaultRule::once(OpFilter::any().file("/t0").kind(SimOpKind::Write), 28).after(1));
    let core = sim.core(0);
    let events = Events::of(&core);
    sim.block_on(0, |core| async move {
        let disks = disks(&core).await;
        start(&core, vec![backup(0), mirror(1, false)]).await;
        for id in ["j0", "j1"] {
            gone(&core, id).await;
        }
        assert_eq!(&*disks[1].node_name(), "d1");
    });
    let words = events.words();
    assert!(events.has("COMPLETED No space left on device"), "{words:?}");
    assert!(events.has("CANCELLED"), "{words:?}");
}

#[test]
fn a_cancel_at_any_moment_of_finalizes_moves_all_guests_or_none() {
    let mut moved = 0;
    for delay in 0..40 {
        let mut sim = world(900 + delay);
        let first = files(&sim);
        let words = sim.block_on(0, |core| async move {
            let events = Events::of(&core);
            let disks = disks(&core).await;
            let log = Log::new();
            let guests = [log.guests(&core, 0, &disks[0], 1), log.guests(&core, 1, &disks[1], 1)];
            start(&core, vec![mirror(0, true), mirror(1, true)]).await;
            let manager = JobManager::of(&core);
            for id in ["j0", "j1"] {
                until(&core, id, Status::Ready).await;
                manager.block_job_verb(id, Verb::Complete, false).expect("completes");
            }
            until(&core, "j1", Status::Pending).await;
            manager.job_verb("j0", Verb::Finalize).expect("finalizes both");
            if delay % 2 == 1 {
                // The other job is told, too; that changes nothing.
                manager.job_verb("j1", Verb::Finalize).expect("finalizes both");
            }
            if delay > 0 {
                core.sleep(delay * delay * 2_000).await;
            }
            // Perhaps they have ended.
            let _ = manager.block_job_verb("j1", Verb::Cancel, true);
            for id in ["j0", "j1"] {
                gone(&core, id).await;
            }
            guests.into_iter().next().expect("two").stop().await;
            assert_eq!(log.failures.get(), 0);
            let at: Vec<_> = disks.iter().map(|disk| disk.node_name().to_string()).collect();
            let all = events.has("COMPLETED");
            let wanted = if all { ["t0", "t1"] } else { ["d0", "d1"] };
            assert_eq!(at, wanted, "delay {delay}: {:?}", events.words());
            let bytes = content(&Graph::of(&core).find(wanted[0]).expect("there")).await;
            assert_eq!(first_difference(&bytes, &log.model(0, &first)), None);
            events.words()
        });
        let ends = words.iter().filter(|word| *word == "null").count();
        assert_eq!(ends, 2, "each job ends once: {words:?}");
        moved += u32::from(words.iter().any(|word| word == "COMPLETED"));
    }
    assert!((1..40).contains(&moved), "one of the two ends was never met: {moved}");
}
