//! Backups with compressed clusters, under guest writes, against the peer's tools.
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use crate::rig::{Log, content, disk, first_difference};
use liveblk_engine::ErrorKind;
use liveblk_engine::driver::sim::{Sim, SimFs};
use liveblk_engine::executor::Core;
use liveblk_engine::format::{CreateImage, InfoValue, ReferencePolicy};
use liveblk_engine::graph::{BackingSource, Graph, GraphConfig, OpenNode};
use liveblk_engine::node::{Node, Origin, WriteFlags};
use liveblk_engine::storage::{File, FileOptions, Storage};
use liveblk_jobs::{BackupSpec, JobError, SyncMode, start_backup};

/// Not a whole number of clusters: the last one ends with the disk.
const DISK: u64 = crate::rig::SIZE - 20 * 512;

async fn image(core: &Core, name: &str, kind: &str) -> Rc<Node> {
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
    let word = InfoValue::Text(kind.to_owned());
    let options = BTreeMap::from([("compression-type".to_owned(), word)]);
    let create = CreateImage { size: DISK, options, ..CreateImage::default() };
    driver.create(core.clone(), Storage::File(file), create).await.expect("an image");
    let mut spec = OpenNode::new("qcow2", path).named(name);
    spec.options.discard_unmap = true;
    spec.backing = BackingSource::None;
    Graph::of(core).open(spec).await.expect("it opens")
}

async fn fill(node: &Rc<Node>, offset: u64, bytes: Vec<u8>, compressed: bool) {
    let flags = WriteFlags { compressed, ..WriteFlags::default() };
    let buf = liveblk_engine::buf::Buf::from_vec(bytes);
    node.write(offset, buf, flags, Origin::External).await.expect("written");
}

fn backup(source: &Rc<Node>, target: &Rc<Node>) -> BackupSpec {
    BackupSpec {
        job: crate::rig::options("j"),
        source: source.clone(),
        target: target.clone(),
        sync: SyncMode::Full,
        allow_larger_target: false,
        compress: true,
        more: Default::default(),
    }
}

fn soft(len: u64) -> Vec<u8> {
    (0..len).map(|at| (at / 97 % 7) as u8 + 1).collect()
}

/// What a tool of the peer prints about the file at `path` of a simulated world.
fn peer(fs: &SimFs, path: &str, folder: &Path, arguments: &[&str]) -> String {
    let copy = folder.join("image");
    fs.export(path, &copy).expect("is exported");
    let output = Command::new("qemu-img").args(arguments).arg(&copy).output();
    let output = output.expect("qemu-img is needed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text}");
    text
}

#[test]
fn a_compressed_backup_is_the_instant_of_its_start_and_clean_for_the_peer() {
    let folder = tempfile::tempdir().expect("a folder");
    for (seed, kind) in [(1, "zlib"), (2, "zstd"), (3, "zlib"), (4, "zstd")] {
        let mut sim: Sim = crate::rig::world(seed);
        let copied = sim.block_on(0, |core| async move {
            let (d, t) = (image(&core, "d", kind).await, image(&core, "t", kind).await);
            fill(&d, 0, soft(DISK), seed % 2 == 0).await;
            let first = content(&d).await;
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            core.sleep(2_000_000).await;
            let from = core.now();
            start_backup(backup(&d, &t)).await.expect("it starts");
            let to = core.now();
            crate::rig::gone(&core, "j").await;
            guests.stop().await;
            assert_eq!(log.failures.get(), 0);
            let copy = content(&t).await;
            log.prove_instant(&[(0, &first, &copy)], from, to);
            assert_eq!(first_difference(&content(&d).await, &log.model(0, &first)), None);
            drop((guest, d, t));
            Graph::of(&core).close_all().await.expect("closes");
            copy
        });
        let report = peer(&sim.fs(), "/t.qcow2", folder.path(), &["check", "-f", "qcow2"]);
        assert!(report.contains("No errors were found"), "{report}");
        assert!(!report.contains(" 0.00% compressed"), "{report}");
        peer(&sim.fs(), "/d.qcow2", folder.path(), &["check", "-f", "qcow2"]);
        let flat = folder.path().join("flat");
        std::fs::write(&flat, copied).expect("written");
        let flat = flat.to_str().expect("text");
        let arguments = ["compare", "-f", "raw", "-F", "qcow2", flat];
        assert!(peer(&sim.fs(), "/t.qcow2", folder.path(), &arguments).contains("identical"));
    }
}

#[test]
fn a_target_that_cannot_compress_is_refused_in_the_peers_words() {
    let mut sim = crate::rig::world(1);
    sim.fs().create("/raw", &vec![0; DISK as usize]);
    sim.block_on(0, |core| async move {
        let d = image(&core, "d", "zlib").await;
        let raw = crate::rig::node(&core, "r", "/raw").await;
        let error = start_backup(backup(&d, &raw)).await.expect_err("is refused");
        assert!(matches!(error, JobError::CompressionUnsupported));
        assert_eq!(error.to_string(), "Compression is not supported for this drive ");
        let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
        let buf = core.pool().zeroed(65536);
        let error = raw.write(0, buf, flags, Origin::External).await.expect_err("is refused");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    });
}

#[test]
fn a_compressed_write_at_odd_places_writes_every_byte_and_no_other() {
    let mut sim = crate::rig::world(3);
    sim.block_on(0, |core| async move {
        let d = image(&core, "d", "zstd").await;
        let mut expected = vec![0; DISK as usize];
        let places = [(0, DISK), (100, 200), (65_000, 200_000), (65_536, 65_536), (DISK - 9, 9)];
        for (round, (at, len)) in places.into_iter().enumerate() {
            let bytes: Vec<u8> = soft(len).iter().map(|byte| byte + round as u8).collect();
            expected[at as usize..(at + len) as usize].copy_from_slice(&bytes);
            fill(&d, at, bytes, true).await;
            assert_eq!(first_difference(&content(&d).await, &expected), None, "round {round}");
        }
    });
}
