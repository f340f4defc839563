//! Chains of images in memory for the tests of layers: made, opened, written, compared.
#![allow(dead_code, reason = "each test uses its part")]

use std::rc::Rc;

use liveblk::engine::executor::Core;
use liveblk::engine::storage::{Memory, Storage};
use liveblk::formats::qcow2::{CreateOptions, create};
use liveblk::{BackingSource, Disk, FileSource, Host, Node, OpenNode, ReferencePolicy, WriteFlags};

/// Makes an image in memory.
pub(crate) async fn make(core: &Core, options: CreateOptions) -> Rc<Memory> {
    let memory = Memory::new(0);
    create(core, &Storage::Memory(Rc::clone(&memory)), options).await.expect("a new image");
    memory
}

/// A host on `core`.
pub(crate) fn host(core: &Core) -> Host {
    Host::on(core, ReferencePolicy::Explicit)
}

/// Opens a chain, base first, the top writable; the nodes are named by their depth.
pub(crate) async fn open(host: &Host, chain: &[Rc<Memory>]) -> Rc<Node> {
    let mut below: Option<OpenNode> = None;
    for (number, image) in chain.iter().enumerate() {
        let depth = chain.len() - 1 - number;
        let mut spec = OpenNode::new("qcow2", "memory").named(&format!("depth{depth}"));
        spec.file = FileSource::Storage(Storage::Memory(Rc::clone(image)));
        spec.backing =
            below.take().map_or(BackingSource::None, |below| BackingSource::Open(Box::new(below)));
        spec.options.discard_unmap = true;
        spec.writable = depth == 0;
        below = Some(spec);
    }
    host.open(below.expect("a chain has an image")).await.expect("the chain opens")
}

/// Writes `bytes` at `offset`.
pub(crate) async fn write(disk: &Disk, offset: u64, bytes: &[u8]) {
    let buf = disk.core().pool().alloc(bytes.len());
    buf.copy_from(0, bytes);
    disk.write(offset, buf, WriteFlags::default()).await.expect("a write");
}

/// Reads `len` bytes at `offset`.
pub(crate) async fn read(disk: &Disk, offset: u64, len: usize) -> Vec<u8> {
    let buf = disk.core().pool().alloc(len);
    disk.read(offset, buf.clone()).await.expect("a read");
    buf.to_vec()
}
