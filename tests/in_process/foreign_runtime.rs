//! A host with a runtime of its own drives the engine through `Handle`: its futures are
//! runtime-neutral and `Send`, and dropping one stops nothing.

use std::path::PathBuf;

use liveblk::{CoreId, Engine, EngineConfig, Handle, Host, HostError, ReferencePolicy, WriteFlags};

/// Writes and reads back a block of a new image, from whatever runtime polls it.
async fn roundtrip(handle: Handle, path: PathBuf, byte: u8) -> Vec<u8> {
    let answer = handle.run(CoreId(0), move |core| async move {
        let host = Host::on(&core, ReferencePolicy::Explicit);
        host.create(&path, "qcow2", 1 << 20).await?;
        let node = host.open(host.image(&path, "qcow2")).await?;
        let disk = host.attach(&node)?;
        disk.write(
            512,
            host.buffer(&[byte; 512]),
            WriteFlags { fua: true, ..WriteFlags::default() },
        )
        .await?;
        let back = host.space(512);
        disk.read(512, back.clone()).await?;
        Ok::<_, HostError>(back.to_vec())
    });
    answer.await.expect("the engine runs").expect("the requests succeed")
}

#[test]
fn a_tokio_uring_runtime_awaits_the_engine() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::start(&EngineConfig::default()).unwrap();
    let handle = engine.handle();
    let (first, second) = (dir.path().join("a"), dir.path().join("b"));
    tokio_uring::start(async move {
        let one = tokio_uring::spawn(roundtrip(handle.clone(), first, 1));
        let two = tokio_uring::spawn(roundtrip(handle, second, 2));
        assert_eq!(one.await.unwrap(), [1; 512]);
        assert_eq!(two.await.unwrap(), [2; 512]);
    });
}

#[test]
fn a_dropped_answer_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let engine = Engine::start(&EngineConfig::default()).unwrap();
    let handle = engine.handle();
    let shown = path.clone();
    drop(handle.run(CoreId(0), move |core| async move {
        let host = Host::on(&core, ReferencePolicy::Explicit);
        host.create(&shown, "qcow2", 1 << 20).await
    }));
    // Calls of one core run in order of arrival, so this one sees the effect of the first in time.
    let found = handle.run(CoreId(0), move |core| async move {
        while liveblk::engine::storage::stat(&core, &path).await.is_err() {
            core.sleep(1_000_000).await;
        }
        true
    });
    assert_eq!(found.wait(), Some(true));
}
