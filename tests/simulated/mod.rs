//! What the directed tests on the simulator share: images, disks, judgements of what is left.
#![allow(dead_code, reason = "each test uses its part")]

use std::rc::Rc;

use liveblk::engine::driver::sim::{Sim, SimConfig, SimFs};
use liveblk::engine::executor::Core;
use liveblk::engine::format::ReferencePolicy;
use liveblk::engine::node::NodeOptions;
use liveblk::engine::storage::{File, FileOptions, Storage, sync_folder_of};
use liveblk::formats::qcow2::{CreateOptions, check, create};
use liveblk::{BackingSource, Disk, Host, Node, OpenNode, WriteFlags};

/// Bytes of a cluster of the images here.
pub(crate) const CLUSTER: u64 = 4096;

/// Bytes of a cluster, as a length.
pub(crate) const LEN: usize = 4096;

/// Makes an empty qcow2 image at `path`, durable with its name.
pub(crate) async fn make(core: &Core, path: &str, clusters: u64) {
    let options = FileOptions {
        path: path.into(),
        writable: true,
        create_new: true,
        ..FileOptions::default()
    };
    let storage = Storage::File(File::open(core, options).await.expect("a new file"));
    let options = CreateOptions { cluster_size: CLUSTER, ..CreateOptions::new(clusters * CLUSTER) };
    create(core, &storage, options).await.expect("a new image");
    sync_folder_of(core, path.as_ref()).await.expect("a durable name");
}

/// Opens the image at `path`, with discards passed on, and attaches to it.
pub(crate) async fn open(host: &Host, path: &str) -> Disk {
    let node = host.open(spec(path, true)).await.expect("the image opens");
    host.attach(&node).expect("the image is free")
}

fn spec(path: &str, writable: bool) -> OpenNode {
    let mut spec = OpenNode::new("qcow2", path).named(path.trim_start_matches('/'));
    spec.backing = BackingSource::None;
    spec.options = NodeOptions { discard_unmap: true, ..NodeOptions::default() };
    spec.writable = writable;
    spec.monitor_owned = true;
    spec
}

/// A host on `core`.
pub(crate) fn host(core: &Core) -> Host {
    Host::on(core, ReferencePolicy::Explicit)
}

/// Writes `len` bytes of `byte` at `offset`.
pub(crate) async fn write(
    disk: &Disk,
    offset: u64,
    len: usize,
    byte: u8,
) -> liveblk::engine::Result<()> {
    let buf = disk.core().pool().alloc(len);
    buf.fill(byte);
    disk.write(offset, buf, WriteFlags::default()).await
}

/// Reads `len` bytes at `offset`.
pub(crate) async fn read(disk: &Disk, offset: u64, len: usize) -> Vec<u8> {
    let buf = disk.core().pool().alloc(len);
    disk.read(offset, buf.clone()).await.expect("a read");
    buf.to_vec()
}

/// Demands that all `len` bytes at `offset` are `byte`.
pub(crate) async fn expect(disk: &Disk, offset: u64, len: usize, byte: u8) {
    let bytes = read(disk, offset, len).await;
    let wrong = bytes.iter().position(|found| *found != byte);
    assert!(
        wrong.is_none(),
        "byte {wrong:?} at {offset} is not {byte} but {:?}",
        wrong.map(|at| bytes[at])
    );
}

/// Demands that `fs` holds the image at `path` without corruptions; returns its content and leaks.
pub(crate) fn inspect(fs: SimFs, path: &str) -> (Vec<u8>, u64) {
    let mut sim = Sim::with_fs(SimConfig::new(0).calm(), fs);
    let path = path.to_owned();
    sim.block_on(0, |core| async move {
        let host = host(&core);
        let node: Rc<Node> = host.open(spec(&path, false)).await.expect("the image opens");
        let disk =
            Disk::attach(&node, liveblk::engine::node::User::Guest { name: "eye".into() }, false);
        let disk = disk.expect("the image is free");
        let len = usize::try_from(disk.size()).expect("a small disk");
        let bytes = read(&disk, 0, len).await;
        drop(disk);
        drop(node);
        host.close().await.expect("the image closes");
        let options = FileOptions { path: path.into(), ..FileOptions::default() };
        let storage = Storage::File(File::open(&core, options).await.expect("the file is there"));
        let report = check(&core, &storage).await.expect("the image can be checked");
        assert_eq!(report.corruptions, 0, "{:?}", report.problems);
        (bytes, report.leaks)
    })
}
