//! What the tests of stream and commit share: chains of images made and written in a simulation.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses a part")]

use std::rc::Rc;

use liveblk_engine::executor::Core;
use liveblk_engine::format::{BackingRef, CreateImage, ReferencePolicy};
use liveblk_engine::graph::{BackingSource, Graph, GraphConfig, OpenNode};
use liveblk_engine::node::{Disk, Node, Origin, WriteFlags, ZeroFlags};
use liveblk_engine::storage::{File, FileOptions, Storage, sync_folder_of};
use liveblk_formats::qcow2::check;

/// Bytes of the disks.
pub const SIZE: u64 = crate::rig::SIZE;

/// Something that is done to a layer when it is made.
#[derive(Clone, Copy, Debug)]
pub enum Act {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Discard(u64, u64),
}

/// One image of a chain.
#[derive(Clone, Debug)]
pub struct Layer {
    pub raw: bool,
    pub size: u64,
    pub cluster: u64,
    pub acts: Vec<Act>,
}

impl Layer {
    fn new(index: u64, size: u64, cluster: u64) -> Self {
        let byte = 0x11 * u8::try_from(index + 1).expect("few layers");
        let mut acts = vec![
            Act::Write(index * (400 << 10), 700 << 10, byte),
            Act::Write(SIZE - (64 << 10) * (index + 1), 40_000, byte + 1),
        ];
        if index > 0 {
            acts.push(Act::Zero(index * (400 << 10) + (128 << 10), 200_000));
            acts.push(Act::Discard(index * (300 << 10), 128 << 10));
            acts.push(Act::Write(index * 4096 * 3 + 512, 1024, byte + 2));
        }
        acts.retain(|act| match act {
            Act::Write(at, len, _) | Act::Zero(at, len) | Act::Discard(at, len) => at + len <= size,
        });
        Self { raw: false, size, cluster, acts }
    }

    /// Four layers of different clusters, sometimes of different sizes.
    pub fn usual(seed: u64) -> Vec<Self> {
        let clusters = [4096, 65536, 16384, 32768];
        (0..4)
            .map(|index| {
                let short = seed % 5 == index + 1 && index < 3;
                let size = if short { SIZE / 2 } else { SIZE };
                let cluster = clusters[((seed + index) % 4) as usize];
                Self::new(index, size, cluster)
            })
            .collect()
    }

    /// The same above a raw file.
    pub fn over_raw() -> Vec<Self> {
        let mut layers = Self::usual(0);
        layers[0].raw = true;
        layers
    }

    /// A base with data under two layers that hold zeroes only.
    pub fn zeroes() -> Vec<Self> {
        let acts = vec![Act::Write(0, SIZE, 0x77)];
        let base = Self { raw: false, size: SIZE, cluster: 65536, acts };
        let acts = vec![Act::Zero(0, 256 << 10), Act::Write(512 << 10, 65536, 0)];
        let zero = Self { acts, ..base.clone() };
        let empty = Self { acts: Vec::new(), ..base.clone() };
        vec![base, zero, empty]
    }
}

/// An open chain, base first.
pub struct Chain {
    core: Core,
    layers: Vec<Layer>,
    nodes: Vec<Rc<Node>>,
}

pub fn path(index: usize) -> String {
    format!("/layer{index}.img")
}

async fn create(core: &Core, index: usize, layer: &Layer, below: Option<&Layer>) {
    let path = path(index);
    let options = FileOptions {
        path: path.clone().into(),
        writable: true,
        create_new: true,
        ..FileOptions::default()
    };
    let file = File::open(core, options).await.expect("a new file");
    let format = |layer: &Layer| if layer.raw { "raw" } else { "qcow2" };
    let driver = liveblk_formats::registry().find(format(layer)).expect("known");
    let mut create = CreateImage { size: layer.size, ..CreateImage::default() };
    if !layer.raw {
        create.cluster_size = Some(layer.cluster);
        create.backing = below.map(|below| BackingRef {
            file: self::path(index - 1),
            format: Some(format(below).into()),
        });
    }
    driver.create(core.clone(), Storage::File(file), create).await.expect("an image");
    sync_folder_of(core, path.as_ref()).await.expect("a durable name");
}

fn configure(core: &Core) {
    Graph::of(core).configure(GraphConfig {
        formats: liveblk_formats::registry(),
        policy: ReferencePolicy::Any,
        resolve: liveblk_formats::reference::resolve_reference,
    });
}

/// How layer `index` is opened over the layers below it.
fn spec(layers: &[Layer], index: usize, writable: bool) -> OpenNode {
    let driver = if layers[index].raw { "raw" } else { "qcow2" };
    let mut spec = OpenNode::new(driver, path(index)).named(&format!("n{index}"));
    spec.options.discard_unmap = true;
    spec.writable = writable;
    spec.backing = match index {
        0 => BackingSource::None,
        _ => BackingSource::Open(Box::new(self::spec(layers, index - 1, false))),
    };
    spec
}

async fn act(node: &Rc<Node>, act: Act) {
    match act {
        Act::Write(at, len, byte) => {
            let buf = node.core().pool().alloc(usize::try_from(len).expect("small"));
            buf.fill(byte);
            node.write(at, buf, WriteFlags::default(), Origin::External).await.expect("written");
        }
        Act::Zero(at, len) => {
            let flags = ZeroFlags::default();
            node.write_zeroes(at, len, flags, Origin::External).await.expect("zeroed");
        }
        Act::Discard(at, len) => node.discard(at, len, Origin::External).await.expect("discarded"),
    }
}

impl Chain {
    /// Makes the images, all durable, and opens them: the top by name, those below by name too if
    /// `named`, else as they come.
    pub async fn make(core: &Core, layers: &[Layer], named: bool) -> Self {
        configure(core);
        let graph = Graph::of(core);
        for (index, layer) in layers.iter().enumerate() {
            create(core, index, layer, index.checked_sub(1).map(|below| &layers[below])).await;
            let node = graph.open(spec(layers, index, true)).await.expect("it opens");
            for part in &layer.acts {
                act(&node, *part).await;
            }
            graph.close_all().await.expect("it closes");
        }
        Self::open(core, layers, named).await
    }

    /// Opens what [`Chain::make`] made.
    pub async fn open(core: &Core, layers: &[Layer], named: bool) -> Self {
        configure(core);
        let top = layers.len() - 1;
        let node = Graph::of(core).open(spec(layers, top, true)).await.expect("it opens");
        let mut nodes = vec![node];
        while let Some(below) = nodes.last().and_then(|node| node.backing()) {
            below.set_monitor_owned(named);
            nodes.push(below);
        }
        nodes.reverse();
        nodes[top].set_monitor_owned(true);
        Self { core: core.clone(), layers: layers.to_vec(), nodes }
    }

    pub fn top(&self) -> Rc<Node> {
        Rc::clone(self.nodes.last().expect("a chain has layers"))
    }

    pub fn node(&self, index: usize) -> Rc<Node> {
        Rc::clone(&self.nodes[index])
    }

    /// Closes everything; the image that the guest was at, opened as its header says, must hold
    /// `bytes`, and every image must be free of corruptions.
    pub async fn reopen_and_compare(self, bytes: &[u8], guest: Disk) {
        let at = self.nodes.iter().position(|node| node.id() == guest.node().id());
        let at = at.expect("the guest is in the chain");
        let Self { core, layers, nodes } = self;
        drop((guest, nodes));
        let graph = Graph::of(&core);
        graph.close_all().await.expect("it closes");
        assert!(graph.nodes().is_empty(), "{:?}", graph.nodes());
        compare(&core, &layers, at, bytes).await;
    }
}

/// Opens image `at` as its header says: it must hold `bytes`; nothing is corrupt.
pub async fn compare(core: &Core, layers: &[Layer], at: usize, bytes: &[u8]) {
    configure(core);
    let graph = Graph::of(core);
    let driver = if layers[at].raw { "raw" } else { "qcow2" };
    let mut spec = OpenNode::new(driver, path(at));
    spec.writable = false;
    let node = graph.open(spec).await.expect("it opens");
    let found = crate::rig::content(&node).await;
    let len = found.len().min(bytes.len());
    assert!(bytes[len..].iter().chain(&found[len..]).all(|byte| *byte == 0), "the tail is zero");
    assert_eq!(crate::rig::first_difference(&found[..len], &bytes[..len]), None, "image {at}");
    drop(node);
    graph.close_all().await.expect("it closes");
    for (index, layer) in layers.iter().enumerate().filter(|(_, layer)| !layer.raw) {
        let options = FileOptions { path: path(index).into(), ..FileOptions::default() };
        let storage = Storage::File(File::open(core, options).await.expect("the file is there"));
        let report = check(core, &storage).await.expect("it can be checked");
        assert_eq!(report.corruptions, 0, "layer {index} {layer:?}: {:?}", report.problems);
    }
}

/// Who uses which node now.
pub fn report(core: &Core) -> Vec<String> {
    let graph = Graph::of(core);
    let of = |node: Rc<Node>| format!("{node:?} {} {:?}", node.is_writable(), node.users());
    graph.nodes().into_iter().map(of).collect()
}

/// The images that are open now, by file.
pub fn open(core: &Core) -> Vec<String> {
    Graph::of(core).nodes().iter().map(|node| node.filename()).collect()
}

/// A new, empty image of the disk's size, open.
pub async fn fresh(core: &Core, name: &str) -> Rc<Node> {
    let path = format!("/{name}.img");
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
    let mut spec = OpenNode::new("qcow2", path).named(name);
    spec.backing = BackingSource::None;
    Graph::of(core).open(spec).await.expect("it opens")
}
