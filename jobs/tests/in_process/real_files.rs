//! Mirror and backup on real files through the ring, under guest writes.
use std::path::Path;

use crate::rig::*;
use liveblk_engine::executor::{CoreId, Engine, EngineConfig};
use liveblk_jobs::{
    BackupOptions, BackupSpec, CopyMode, JobCounters, JobManager, MirrorSpec, Status, SyncMode,
    Verb, start_backup, start_mirror,
};

/// Runs a mirror with pivot, then a backup back, on files in `folder`.
fn there_and_back(folder: &Path) {
    let engine = Engine::start(&EngineConfig { cores: 1 }).expect("an engine starts");
    let path = |name: &str| folder.join(name).display().to_string();
    std::fs::write(path("d"), filled(SIZE * 8)).expect("written");
    std::fs::write(path("t"), vec![0xaa; SIZE as usize * 8]).expect("written");
    std::fs::write(path("b"), vec![0; SIZE as usize * 8]).expect("written");
    let paths = [path("d"), path("t"), path("b")];
    let done = engine.handle().run(CoreId(0), move |core| async move {
        let first = filled(SIZE * 8);
        let d = node(&core, "d", &paths[0]).await;
        let t = node(&core, "t", &paths[1]).await;
        let b = node(&core, "b", &paths[2]).await;
        let manager = JobManager::of(&core);
        let (log, guest) = (Log::new(), disk(&d));
        let guests = log.guests(&core, 0, &guest, 4);
        let mirror = MirrorSpec {
            job: options("m"),
            source: d.clone(),
            target: t.clone(),
            sync: SyncMode::Full,
            copy_mode: CopyMode::Background,
            granularity: None,
            allow_larger_target: false,
            more: Default::default(),
        };
        start_mirror(mirror).await.expect("it starts");
        manager.until("m", |status| status == Status::Ready).await;
        manager.job_verb("m", Verb::Complete).expect("completes");
        gone(&core, "m").await;
        assert_eq!(&*guest.node_name(), "t");
        let backup = BackupSpec {
            job: options("b"),
            source: t.clone(),
            target: b.clone(),
            sync: SyncMode::Full,
            allow_larger_target: false,
            compress: false,
            more: BackupOptions { use_copy_range: true, ..BackupOptions::default() },
        };
        let from = core.now();
        let job = start_backup(backup).await.expect("it starts");
        let to = core.now();
        gone(&core, "b").await;
        guests.stop().await;
        assert_eq!(log.failures.get(), 0);
        // Whether the files can share blocks depends on the folder.
        let moved = job.counters();
        assert!(moved.copied + moved.shared <= SIZE * 8, "{moved:?}");
        assert!(moved.copied + moved.shared > SIZE * 4, "{moved:?}");
        log.prove_instant(&[(0, &first, &content(&b).await)], from, to);
        assert_eq!(first_difference(&content(&t).await, &log.model(0, &first)), None);
    });
    assert_eq!(done.wait(), Some(()));
}

#[test]
fn mirror_and_backup_are_right_on_a_file_system() {
    let folder = tempfile::tempdir().expect("a folder");
    there_and_back(folder.path());
}

#[test]
fn files_that_cannot_share_blocks_are_asked_once_and_copied() {
    let folder = tempfile::tempdir().expect("a folder");
    let (disk, elsewhere) = (folder.path().join("d"), tempfile::tempdir_in("/dev/shm"));
    let elsewhere = elsewhere.expect("a folder");
    std::fs::write(&disk, filled(SIZE)).expect("written");
    let target = elsewhere.path().join("t");
    std::fs::write(&target, vec![0xaa; SIZE as usize]).expect("written");
    let engine = Engine::start(&EngineConfig { cores: 1 }).expect("an engine starts");
    let paths = [disk, target].map(|path| path.display().to_string());
    let done = engine.handle().run(CoreId(0), move |core| async move {
        let d = node(&core, "d", &paths[0]).await;
        let t = node(&core, "t", &paths[1]).await;
        let backup = BackupSpec {
            job: options("b"),
            source: d.clone(),
            target: t.clone(),
            sync: SyncMode::Full,
            allow_larger_target: false,
            compress: false,
            more: BackupOptions { use_copy_range: true, ..BackupOptions::default() },
        };
        let job = start_backup(backup).await.expect("it starts");
        gone(&core, "b").await;
        assert_eq!(job.counters(), JobCounters { copied: SIZE, shared: 0 });
        assert_eq!(first_difference(&content(&t).await, &filled(SIZE)), None);
    });
    assert_eq!(done.wait(), Some(()));
}

#[test]
fn mirror_and_backup_are_right_on_memory_backed_files() {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
    there_and_back(folder.path());
}
