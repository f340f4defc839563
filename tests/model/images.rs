//! Images of the model: what they are like, how they are made and opened.

use std::rc::Rc;

use liveblk::engine::driver::sim::Rng;
use liveblk::engine::executor::Core;
use liveblk::engine::format::BackingRef;
use liveblk::engine::node::NodeOptions;
use liveblk::engine::storage::{File, FileOptions, Storage, sync_folder_of};
use liveblk::formats::qcow2::{CreateOptions, create};
use liveblk::{BackingSource, Error, OpenNode};

/// An image file; its path is its name in the root folder.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) name: String,
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// `None`: raw.
    pub(crate) qcow2: Option<Qcow2>,
}

/// What a qcow2 image is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Qcow2 {
    pub(crate) version: u32,
    pub(crate) cluster_size: u64,
    pub(crate) refcount_order: u32,
}

/// A chain, base first.
pub(crate) type Chain = Vec<Rc<Image>>;

impl Qcow2 {
    /// Any cluster size from 512 bytes to 64 KiB, small ones more often; mostly version 3.
    pub(crate) fn random(rng: &mut Rng) -> Self {
        let cluster_size = 512 << rng.below(8);
        if rng.chance(250) {
            return Self { version: 2, cluster_size, refcount_order: 4 };
        }
        let order = if rng.chance(700) { 4 } else { rng.below(7) };
        let refcount_order = u32::try_from(order).expect("invariant: below 7");
        Self { version: 3, cluster_size, refcount_order }
    }
}

impl Image {
    /// The name of the driver.
    pub(crate) fn driver(&self) -> &'static str {
        if self.qcow2.is_some() { "qcow2" } else { "raw" }
    }

    /// The file.
    pub(crate) fn path(&self) -> String {
        format!("/{}", self.name)
    }

    /// Makes the image, durable with its name.
    pub(crate) async fn create(&self, core: &Core, backing: Option<&Self>) -> Result<(), Error> {
        let options = FileOptions {
            path: self.path().into(),
            writable: true,
            create_new: true,
            ..FileOptions::default()
        };
        let file = File::open(core, options).await?;
        let storage = Storage::File(file);
        match self.qcow2 {
            None => storage.truncate(self.size).await?,
            Some(like) => {
                let backing = backing.map(|image| BackingRef {
                    file: image.name.clone(),
                    format: Some(image.driver().into()),
                });
                let options = CreateOptions {
                    backing,
                    cluster_size: like.cluster_size,
                    version: like.version,
                    refcount_order: like.refcount_order,
                    ..CreateOptions::new(self.size)
                };
                create(core, &storage, options).await?;
            }
        }
        storage.flush().await?;
        sync_folder_of(core, self.path().as_ref()).await
    }
}

/// How to open a chain, its top writable or not.
pub(crate) fn open_chain(chain: &[Rc<Image>], options: &NodeOptions, writable: bool) -> OpenNode {
    let mut below: Option<OpenNode> = None;
    for image in chain {
        let mut spec = OpenNode::new(image.driver(), image.path());
        spec.options = *options;
        spec.writable = false;
        spec.backing = match below.take() {
            Some(below) => BackingSource::Open(Box::new(below)),
            None => BackingSource::None,
        };
        below = Some(spec);
    }
    let mut top = below.expect("invariant: a chain has images");
    top.writable = writable;
    top.monitor_owned = true;
    top
}
