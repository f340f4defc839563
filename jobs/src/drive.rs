//! Targets by file name: `drive-mirror` and `drive-backup` make or open the image that they copy
//! to.
//!
//! Order: (1) the file is created under a temporary name, opened, and gets its name, which must be
//! free and is durable then; (2) the job starts; (3) when the job is over the node is closed,
//! unless guests have moved to it; (4) then the event. A start that fails leaves no file.
//!
//! What the header of a created image refers to is what the copy does not hold: with sync=top the
//! source's own backing file, with sync=none the source.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use liveblk_engine::executor::Core;
use liveblk_engine::format::{BackingRef, CreateImage};
use liveblk_engine::graph::{BackingSource, FileSource, FileSpec, Graph, OpenNode};
use liveblk_engine::node::{Node, NodeOptions};
use liveblk_engine::storage::{File, FileOptions};

use crate::error::{JobError, Result, SnapshotError};
use crate::snapshot::{NewFile, NewImageMode};
use crate::spec::SyncMode;

/// The file of a target.
#[derive(Clone, Debug)]
pub struct DriveTarget {
    /// The file.
    pub file: PathBuf,
    /// Its format; the source's if absent, or for a file that exists the one it proves to have.
    pub format: Option<String>,
    /// Whether it is created.
    pub mode: NewImageMode,
    /// The target's node name; a generated one if absent.
    pub node_name: Option<String>,
    /// Whether space of the target is given back.
    pub unmap: bool,
}

/// A target that was opened for a job.
pub(crate) struct OpenedTarget {
    pub(crate) node: Rc<Node>,
    file: Option<NewFile>,
}

/// What lies below a new target.
pub(crate) fn backing_of(source: &Rc<Node>, sync: SyncMode) -> Option<Rc<Node>> {
    match sync {
        SyncMode::Top => source.backing(),
        SyncMode::None => Some(Rc::clone(source)),
        SyncMode::Full | SyncMode::Incremental | SyncMode::Bitmap => None,
    }
}

impl OpenedTarget {
    /// Makes or opens the target. `attach` puts what lies below a new image below it at once; a
    /// mirror's target gets it when it takes over.
    pub(crate) async fn open(
        core: &Core,
        target: &DriveTarget,
        source: &Rc<Node>,
        sync: SyncMode,
        attach: bool,
    ) -> Result<Self> {
        let graph = Graph::of(core);
        if let Some(name) = &target.node_name {
            graph.check_name(name)?;
        }
        let format = format_of(core, target, source).await?;
        let existing = target.mode == NewImageMode::Existing;
        let below = backing_of(source, sync);
        let mut file = None;
        if !existing {
            let backing = below.as_ref().map(|node| BackingRef {
                file: node.filename(),
                format: Some(node.driver().to_owned()),
            });
            let create = CreateImage { size: source.size(), backing, ..CreateImage::default() };
            let mut made = NewFile::image(core, &target.file, &format, create).await?;
            if let Err(error) = made.publish(core).await {
                made.undo(core).await;
                return Err(error);
            }
            file = Some(made);
        }
        let backing = match below {
            _ if existing => BackingSource::FromHeader,
            Some(below) if attach => BackingSource::Node(below.name().to_string()),
            _ => BackingSource::None,
        };
        match graph.open(spec(target, &format, backing, source)).await {
            Ok(node) => Ok(Self { node, file }),
            Err(error) => {
                if let Some(file) = file {
                    file.undo(core).await;
                }
                Err(error.into())
            }
        }
    }

    /// Undoes everything: the job did not start.
    pub(crate) async fn abort(self, core: &Core) {
        if let Err(error) = Graph::of(core).remove(&self.node).await {
            tracing::warn!(%error, "closing the target of a job that did not start");
        }
        if let Some(file) = self.file {
            file.undo(core).await;
        }
    }
}

fn spec(target: &DriveTarget, format: &str, backing: BackingSource, source: &Rc<Node>) -> OpenNode {
    let mut open = OpenNode::new(format, &target.file);
    open.file = FileSource::Open(FileSpec { path: target.file.clone(), ..FileSpec::default() });
    open.name.clone_from(&target.node_name);
    open.backing = backing;
    open.options = NodeOptions { discard_unmap: target.unmap, ..source.options() };
    open
}

/// The format of the target; raw is never guessed.
async fn format_of(core: &Core, target: &DriveTarget, source: &Rc<Node>) -> Result<String> {
    let known = Graph::of(core).config().formats;
    let format = match &target.format {
        Some(format) => format.clone(),
        None if target.mode == NewImageMode::AbsolutePaths => source.driver().to_owned(),
        None => recognised(core, &target.file).await?,
    };
    if known.find(&format).is_none() {
        return Err(SnapshotError::UnknownFormat { format: format.into() }.into());
    }
    Ok(format)
}

async fn recognised(core: &Core, path: &Path) -> Result<String> {
    let shown = path.display().to_string();
    let options = FileOptions { path: path.to_path_buf(), ..FileOptions::default() };
    let file = File::open(core, options).await.map_err(|source| {
        JobError::from(SnapshotError::CannotOpen { path: shown.as_str().into(), source })
    })?;
    let head = core.pool().alloc(512);
    file.read(0, head.clone()).await?;
    let head = head.to_vec();
    let formats = Graph::of(core).config().formats;
    let mut proven = formats.names().filter_map(|name| formats.find(name));
    match proven.find(|driver| driver.recognises(&head)) {
        Some(driver) => Ok(driver.name().to_owned()),
        None => Err(SnapshotError::FormatMissing { path: shown.into() }.into()),
    }
}
