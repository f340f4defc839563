//! Images of the model: what they are like, how they are made and opened.

use std::rc::Rc;

use liveblk::engine::driver::sim::Rng;
use liveblk::engine::executor::Core;
use liveblk::engine::format::BackingRef;
use liveblk::engine::graph::{DataFileSource, FileSpec};
use liveblk::engine::node::NodeOptions;
use liveblk::engine::storage::{File, FileOptions, Storage, sync_folder_of};
use liveblk::formats::qcow2::{CompressionType, CreateOptions, create_with_data};
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
    pub(crate) extended_l2: bool,
    pub(crate) lazy_refcounts: bool,
    pub(crate) zstd: bool,
    /// Guest data lies in a file of its own; if so, whether that is a raw image of the disk.
    pub(crate) data_file: Option<bool>,
}

/// A chain, base first.
pub(crate) type Chain = Vec<Rc<Image>>;

impl Qcow2 {
    /// What the engine makes for a new layer if nobody says otherwise.
    pub(crate) const fn plain() -> Self {
        Self {
            version: 3,
            cluster_size: 64 << 10,
            refcount_order: 4,
            extended_l2: false,
            lazy_refcounts: false,
            zstd: false,
            data_file: None,
        }
    }

    /// Any cluster size from 512 bytes to 64 KiB, small ones more often; mostly version 3, then
    /// with any other feature. `alone`: nothing is below.
    pub(crate) fn random(rng: &mut Rng, alone: bool) -> Self {
        let cluster_size = 512 << rng.below(8);
        if rng.chance(250) {
            return Self { version: 2, cluster_size, ..Self::plain() };
        }
        let order = if rng.chance(700) { 4 } else { rng.below(7) };
        let raw = alone && rng.chance(500);
        Self {
            cluster_size,
            refcount_order: u32::try_from(order).expect("invariant: below 7"),
            extended_l2: cluster_size >= 16 << 10 && rng.chance(500),
            lazy_refcounts: rng.chance(150),
            zstd: rng.chance(300),
            data_file: rng.chance(150).then_some(raw),
            ..Self::plain()
        }
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

    /// The name of the file with guest data, if that is apart.
    pub(crate) fn data_name(&self) -> Option<String> {
        self.qcow2?.data_file?;
        Some(format!("{}.data", self.name))
    }

    /// All files of the image.
    pub(crate) fn paths(&self) -> Vec<String> {
        let data = self.data_name().map(|name| format!("/{name}"));
        std::iter::once(self.path()).chain(data).collect()
    }

    /// How many internal snapshots its refcounts can count, the disk being one more.
    pub(crate) fn snapshots_max(&self) -> usize {
        match self.qcow2 {
            Some(Qcow2 { data_file: None, refcount_order: 1, .. }) => 2,
            Some(Qcow2 { data_file: None, refcount_order: 2.., .. }) => 3,
            _ => 0,
        }
    }

    /// Makes the image, durable with its name.
    pub(crate) async fn create(&self, core: &Core, backing: Option<&Self>) -> Result<(), Error> {
        let mut files = Vec::new();
        for path in self.paths() {
            let path = path.into();
            let options = FileOptions { path, writable: true, ..FileOptions::default() };
            let file = File::open(core, FileOptions { create_new: true, ..options }).await?;
            files.push(Storage::File(file));
        }
        let (storage, data) = (files[0].clone(), files.get(1));
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
                    extended_l2: like.extended_l2,
                    lazy_refcounts: like.lazy_refcounts,
                    compression_type: match like.zstd {
                        true => CompressionType::Zstd,
                        false => CompressionType::Zlib,
                    },
                    data_file: self.data_name(),
                    data_file_raw: like.data_file == Some(true),
                    ..CreateOptions::new(self.size)
                };
                create_with_data(core, &storage, data, options).await?;
            }
        }
        for storage in files {
            storage.flush().await?;
        }
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
        if let Some(name) = image.data_name() {
            let path = format!("/{name}").into();
            spec.data_file = DataFileSource::Open(FileSpec { path, ..FileSpec::default() });
        }
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
