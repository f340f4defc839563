//! The images of the demo: names, creation, and comparison as a guest would see them.

use std::path::Path;
use std::rc::Rc;

use liveblk::{Host, HostError, Node, WriteFlags};

/// The first disk's chain, base first.
pub(crate) const CHAIN: [&str; 2] = ["a.qcow2", "b.qcow2"];
/// The second disk.
pub(crate) const SECOND: &str = "second.qcow2";
/// The overlays that the snapshot makes, one for each disk.
pub(crate) const OVERLAYS: [&str; 2] = ["c.qcow2", "second-c.qcow2"];
/// Where the mirror goes.
pub(crate) const NEW_HOME: &str = "e.qcow2";
/// Where the backup goes.
pub(crate) const BACKUP: &str = "backup.qcow2";
/// A copy of the idle disk, for the comparison at the end.
pub(crate) const COPY: &str = "copy.qcow2";
/// Every name that the demo makes.
pub(crate) const ALL: [&str; 8] =
    ["a.qcow2", "b.qcow2", SECOND, "c.qcow2", "second-c.qcow2", NEW_HOME, BACKUP, COPY];

const PIECE: u64 = 1 << 20;

/// Makes and opens an empty qcow2 image.
pub(crate) async fn new_image(
    host: &Host,
    folder: &Path,
    file: &str,
    name: &str,
    size: u64,
) -> Result<Rc<Node>, HostError> {
    let path = folder.join(file);
    host.create(&path, "qcow2", size).await?;
    host.open(host.image(path, "qcow2").named(name)).await
}

/// Makes the chain of the first disk with old data in its base, and opens it.
pub(crate) async fn new_chain(
    host: &Host,
    folder: &Path,
    size: u64,
) -> Result<Rc<Node>, HostError> {
    let [base, top] = CHAIN.map(|name| folder.join(name));
    let node = new_image(host, folder, CHAIN[0], "fill", size).await?;
    let disk = host.attach(&node)?;
    let block = host.space(PIECE as usize);
    block.fill(0xa5);
    // The second half of the disk holds old data that the guest does not touch.
    let mut writes = std::collections::VecDeque::new();
    for at in (size / 2..size * 7 / 8).step_by(PIECE as usize) {
        writes.push_back(disk.write(at, block.clone(), WriteFlags::default()));
        if writes.len() >= 8
            && let Some(oldest) = writes.pop_front()
        {
            oldest.await?;
        }
    }
    for write in writes {
        write.await?;
    }
    disk.flush().await?;
    drop(disk);
    host.graph().remove(&node).await?;
    host.create_overlay(&top, &base, "qcow2").await?;
    host.open_chain("disk", &[("qcow2", &base), ("qcow2", &top)]).await
}

/// The first offset at which two disks of equal size differ.
pub(crate) async fn compare(
    host: &Host,
    first: &Rc<Node>,
    second: &Rc<Node>,
) -> Result<Option<u64>, HostError> {
    use liveblk::engine::node::Origin;
    let (one, two) = (host.space(PIECE as usize), host.space(PIECE as usize));
    for at in (0..first.size()).step_by(PIECE as usize) {
        let len = PIECE.min(first.size() - at) as usize;
        let (one, two) = (one.slice(0..len), two.slice(0..len));
        let left = first.read(at, one.clone(), Origin::External);
        let right = second.read(at, two.clone(), Origin::External);
        left.await?;
        right.await?;
        let (one, two) = (one.to_vec(), two.to_vec());
        if let Some(index) = one.iter().zip(&two).position(|(a, b)| a != b) {
            return Ok(Some(at + index as u64));
        }
    }
    Ok(None)
}
