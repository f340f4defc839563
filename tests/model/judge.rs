//! What a power cut left, judged: every disk, every kept result, every image.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use liveblk::engine::buf::Pool;
use liveblk::engine::driver::sim::{Sim, SimConfig, SimFs};
use liveblk::engine::executor::Core;
use liveblk::engine::format::ReferencePolicy;
use liveblk::engine::node::{Node, NodeOptions, Origin};
use liveblk::engine::storage::{File, FileOptions, Storage};
use liveblk::formats::qcow2::check;
use liveblk::{Host, WriteFlags};

use super::bitmaps::Stored;
use super::images::{Chain, Image, open_chain};
use super::ledger::Window;
use super::pattern::{self, BLOCK, Value};
use super::world::{DiskState, Internal, Kept, World};

/// Judges the file system `fs`; `seed` decides what the world does that looks at it.
pub(crate) fn power_cut(world: &World, fs: SimFs, seed: u64, pool: &Pool) -> Result<(), String> {
    fs.set_capacity(None);
    let mut sim = Sim::with_pool(SimConfig::new(seed).calm(), fs, pool.clone());
    for (index, state) in world.disks.iter().enumerate() {
        let chain =
            surviving_chain(&mut sim, state).map_err(|why| format!("disk {index}: {why}"))?;
        let stored = Stored::of(world, index, chain.last().expect("invariant: not empty"));
        judge_stored(&mut sim, &chain, stored).map_err(|why| format!("disk {index}: {why}"))?;
        if seed.is_multiple_of(4) {
            go_on(&mut sim, &chain).map_err(|why| format!("disk {index} goes on: {why}"))?;
        }
    }
    for kept in world.kept.borrow().iter() {
        let judged = kept_is_there(&mut sim, world, kept);
        judged.map_err(|why| format!("{:?} was complete: {why}", names(kept)))?;
    }
    // The newest first: going back changes what later images show of their lower layers.
    for kept in world.internal.borrow().iter().rev() {
        let values = go_back(&mut sim, kept);
        let judged =
            values.and_then(|values| one_moment(world, &[(kept.disk, values)], kept.window));
        judged.map_err(|why| format!("internal snapshot {} was taken: {why}", kept.name))?;
    }
    let images = world.images.borrow().clone();
    for image in images.iter().filter(|image| image.qcow2.is_some()) {
        check_image(&mut sim, image)?;
    }
    Ok(())
}

fn names(kept: &Kept) -> Vec<&str> {
    let chains = kept.parts.iter().map(|(_, chain)| chain);
    chains.filter_map(|chain| chain.last()).map(|image| image.name.as_str()).collect()
}

fn kept_is_there(sim: &mut Sim, world: &World, kept: &Kept) -> Result<(), String> {
    let mut parts = Vec::new();
    for (disk, chain) in &kept.parts {
        let values = read_chain(sim, chain)?;
        if let Some(blocks) = kept.blocks.filter(|blocks| *blocks != values.len()) {
            return Err(format!("it has {} blocks, not {blocks}", values.len()));
        }
        parts.push((*disk, values));
    }
    one_moment(world, &parts, kept.window)
}

/// Judges images of disks that must all be of one moment within `window`.
pub(crate) fn one_moment(
    world: &World,
    parts: &[(usize, Vec<Value>)],
    window: Window,
) -> Result<(), String> {
    let ledger = |disk: usize| &world.disks[disk].ledger;
    let mut moment = window.from;
    for (disk, values) in parts {
        moment = moment.max(ledger(*disk).point_in_time(values, window)?);
    }
    let mut judged =
        parts.iter().map(|(disk, values)| ledger(*disk).not_before(values, moment, window.to));
    judged.find(Result::is_err).unwrap_or(Ok(()))
}

/// The chain that holds the disk after a cut; fails if none of those that may does.
fn surviving_chain(sim: &mut Sim, state: &DiskState) -> Result<Chain, String> {
    let mut wrong = Vec::new();
    for chain in state.active.borrow().iter().rev() {
        let judged = read_chain(sim, chain).and_then(|values| state.ledger.survived(&values));
        match judged {
            Ok(()) => return Ok(chain.clone()),
            Err(why) => wrong.push(why),
        }
    }
    Err(wrong.join("; "))
}

/// All blocks of the disk as a snapshot inside its image has it; the disk goes back to that.
fn go_back(sim: &mut Sim, kept: &Internal) -> Result<Vec<Value>, String> {
    let spec = open_chain(&kept.chain, &NodeOptions::default(), true);
    let name = kept.name.clone();
    let bytes = sim.block_on(0, |core| async move {
        let host = Host::on(&core, ReferencePolicy::Explicit);
        let node = host.open(spec).await.map_err(|error| format!("open: {error}"))?;
        // A disk with bitmaps does not go back.
        for facts in node.bitmap_facts() {
            let name = facts.name.unwrap_or_default();
            let removed = node.remove_bitmap(&name).await;
            removed.map_err(|error| format!("remove {name}: {error}"))?;
        }
        let all = node.format().abilities().snapshots.ok_or("no snapshots")?;
        all.apply(&name).await.map_err(|error| format!("apply: {error}"))?;
        let bytes = read_node(&node).await;
        drop(all);
        host.close().await.map_err(|error| format!("close: {error}"))?;
        bytes
    })?;
    pattern::values(&bytes, 0)
}

/// Judges the bitmaps that the top of `chain` keeps.
fn judge_stored(sim: &mut Sim, chain: &Chain, stored: Stored) -> Result<(), String> {
    let spec = open_chain(chain, &NodeOptions::default(), false);
    sim.block_on(0, |core| async move {
        let host = Host::on(&core, ReferencePolicy::Explicit);
        let node = host.open(spec).await.map_err(|error| format!("open: {error}"))?;
        let judged = stored.judge(&node);
        drop(node);
        host.close().await.map_err(|error| format!("close: {error}"))?;
        judged
    })
}

/// All blocks of a chain.
fn read_chain(sim: &mut Sim, chain: &Chain) -> Result<Vec<Value>, String> {
    let spec = open_chain(chain, &NodeOptions::default(), false);
    let bytes = sim.block_on(0, |core| async move {
        let host = Host::on(&core, ReferencePolicy::Explicit);
        let node = host.open(spec).await.map_err(|error| format!("open: {error}"))?;
        let bytes = read_node(&node).await;
        host.close().await.map_err(|error| format!("close: {error}"))?;
        bytes
    })?;
    pattern::values(&bytes, 0)
}

/// All bytes of a node.
pub(crate) async fn read_node(node: &Rc<Node>) -> Result<Vec<u8>, String> {
    let len = usize::try_from(node.size()).expect("invariant: small");
    let buf = node.core().pool().alloc(len);
    let read = node.read(0, buf.clone(), Origin::External).await;
    read.map_err(|error| format!("read: {error}"))?;
    Ok(buf.to_vec())
}

/// The disk takes writes again, and they are there afterwards.
fn go_on(sim: &mut Sim, chain: &Chain) -> Result<(), String> {
    let spec = open_chain(chain, &NodeOptions::default(), true);
    sim.block_on(0, |core| async move {
        let host = Host::on(&core, ReferencePolicy::Explicit);
        let node = host.open(spec).await.map_err(|error| error.to_string())?;
        let disk = host.attach(&node).map_err(|error| error.to_string())?;
        let blocks = disk.size() / BLOCK as u64;
        for part in 0..4 {
            let first = blocks * part / 4;
            let len = usize::try_from((blocks / 4).min(100)).expect("invariant: small") * BLOCK;
            let buf = core.pool().alloc(len);
            pattern::fill(&buf, 1, first);
            let write = disk.write(first * BLOCK as u64, buf, WriteFlags::default());
            write.await.map_err(|error| error.to_string())?;
            let back = core.pool().alloc(len);
            let read = disk.read(first * BLOCK as u64, back.clone());
            read.await.map_err(|error| error.to_string())?;
            let values = pattern::values(&back.to_vec(), first)?;
            if values.iter().any(|value| *value != 1) {
                return Err("a write does not read back".to_owned());
            }
        }
        drop(disk);
        host.close().await.map_err(|error| error.to_string())
    })
}

fn check_image(sim: &mut Sim, image: &Rc<Image>) -> Result<(), String> {
    let image = Rc::clone(image);
    sim.block_on(0, |core| async move {
        let name = &image.name;
        let storage = open_storage(&core, &image).await?;
        let report = check(&core, &storage).await.map_err(|error| format!("{name}: {error}"))?;
        if report.corruptions > 0 {
            return Err(format!("{name} is corrupt: {:?}", report.problems));
        }
        Ok(())
    })
}

async fn open_storage(core: &Core, image: &Image) -> Result<Storage, String> {
    let options = FileOptions { path: image.path().into(), ..FileOptions::default() };
    let file = File::open(core, options).await;
    file.map(Storage::File).map_err(|error| format!("{}: {error}", image.name))
}

/// Whether `qemu-img` is there.
#[allow(dead_code, reason = "not every test asks it")]
pub(crate) fn has_peer() -> bool {
    Command::new("qemu-img").arg("--version").output().is_ok_and(|out| out.status.success())
}

/// Lets `qemu-img` judge what a power cut left: no corruptions, and the bytes that we read.
pub(crate) fn peer_agrees(world: &World, fs: &SimFs, folder: &Path) -> Result<(), String> {
    for path in fs.paths() {
        let target = folder.join(path.file_name().unwrap_or_default());
        fs.export(&path, &target).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    for image in world.images.borrow().iter().filter(|image| image.qcow2.is_some()) {
        let alone = peer_name(std::slice::from_ref(image));
        let out = peer(folder, &["check", &alone])?;
        // 3: leaks, which are allowed.
        if !matches!(out.status.code(), Some(0 | 3)) {
            return Err(format!("qemu-img check {}: {}", image.name, told(&out)));
        }
    }
    let mut sim = Sim::with_fs(SimConfig::new(0).calm(), fs.clone());
    for state in &world.disks {
        let chain = surviving_chain(&mut sim, state)?;
        let ours = read_chain(&mut sim, &chain)?;
        let top = chain.last().expect("invariant: a chain has images");
        let raw = folder.join("disk.raw");
        let args = ["convert", "-O", "raw", &peer_name(&chain), "disk.raw"];
        let out = peer(folder, &args)?;
        if !out.status.success() {
            return Err(format!("qemu-img convert {}: {}", top.name, told(&out)));
        }
        let bytes = std::fs::read(&raw).map_err(|error| error.to_string())?;
        if pattern::values(&bytes, 0)? != ours {
            return Err(format!("qemu-img reads {} differently", top.name));
        }
    }
    Ok(())
}

/// A chain as the peer is told it, without a look at the headers' references.
fn peer_name(chain: &[Rc<Image>]) -> String {
    let mut below = "null".to_owned();
    for image in chain {
        let (driver, name) = (image.driver(), &image.name);
        let backing =
            if driver == "raw" { String::new() } else { format!(r#","backing":{below}"#) };
        let file = |name: &str| format!(r#"{{"driver":"file","filename":"{name}"}}"#);
        let data = image.data_name().map(|name| format!(r#","data-file":{}"#, file(&name)));
        let (file, data) = (file(name), data.unwrap_or_default());
        below = format!(r#"{{"driver":"{driver}","file":{file}{data}{backing}}}"#);
    }
    format!("json:{below}")
}

fn peer(folder: &Path, args: &[&str]) -> Result<std::process::Output, String> {
    let out = Command::new("qemu-img").current_dir(folder).args(args).output();
    out.map_err(|error| format!("qemu-img: {error}"))
}

fn told(out: &std::process::Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{} {}", text(&out.stdout), text(&out.stderr))
}
