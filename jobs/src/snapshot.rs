//! Snapshots: a new layer above a node; guests go on at the layer, the node stays as it was.
//!
//! A snapshot is a step of a transaction (a single one is a transaction of one). Order:
//! 1. prepare: checks; a new file is created under a temporary name and opened without a backing
//!    node; nobody uses it yet; 2. publish: the file gets its name, which must still be free, and
//!    the name is durable; 3. swap, inside the cut: guests move to the overlay, the node goes below
//!    it (memory only, cannot fail); 4. finish: the node becomes read-only and clean on disk.
//!
//! Abort at any time before 3 closes the overlay and removes what was created. A file that existed
//! before is never truncated or removed; an empty one may be used, and is empty again afterwards.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use liveblk_engine::executor::Core;
use liveblk_engine::format::{BackingRef, CreateImage};
use liveblk_engine::graph::{BackingSource, FileSource, FileSpec, Graph, GraphError, OpenNode};
use liveblk_engine::node::{Node, NodeId, Permissions, User};
use liveblk_engine::storage::{self, File, FileOptions, LockRequest, Storage};
use liveblk_engine::{Error, ErrorKind};

use crate::error::{JobError, Result, SnapshotError};
use crate::event::Kind;
use crate::limits::CUT_WAIT_NS;
use crate::manager::JobManager;
use crate::read_only::become_read_only;
use crate::start::flush_ahead;

/// Where the image of a new layer comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NewImageMode {
    /// It is created, with the node's file name as its backing file.
    #[default]
    AbsolutePaths,
    /// It exists.
    Existing,
}

/// A snapshot into a file (`blockdev-snapshot-sync`).
#[derive(Clone, Debug)]
pub struct SnapshotFile {
    /// The node, by name.
    pub node: String,
    /// The new layer's file.
    pub file: PathBuf,
    /// The new layer's node name.
    pub overlay: Option<String>,
    /// The new layer's format.
    pub format: String,
    /// Whether the file is created.
    pub mode: NewImageMode,
}

/// A snapshot that can be taken.
pub(crate) struct PreparedSnapshot {
    base: Rc<Node>,
    overlay: Rc<Node>,
    origin: Origin,
    /// The overlay was made inactive because the base is.
    rested: bool,
}

/// Where the overlay comes from, and what an abort must undo.
enum Origin {
    /// The client had opened it.
    Client,
    /// Opened here from a file that existed with content.
    Opened,
    /// Created here.
    Created(NewFile),
}

/// A file that was created here.
pub(crate) struct NewFile {
    path: PathBuf,
    state: FileState,
}

enum FileState {
    /// Has a temporary name.
    Temporary(PathBuf),
    /// An empty file of the client was filled.
    Filled,
    /// Has its name; (device, inode) proves that it is ours.
    Published((u64, u64)),
}

/// The node that a snapshot command names.
///
/// # Errors
/// The peer's text; `device` is what the command gave as device.
pub(crate) fn find(core: &Core, device: &str, node: &str) -> Result<Rc<Node>> {
    Graph::of(core)
        .find(node)
        .map_err(|_| JobError::NodeNotFound { device: device.into(), node: node.into() })
}

/// Prepares a snapshot of `node` into the node `overlay` (`blockdev-snapshot`).
pub(crate) fn prepare_nodes(core: &Core, node: &str, overlay: &str) -> Result<PreparedSnapshot> {
    let base = find(core, node, node)?;
    check_base(core, &base)?;
    let overlay = find(core, overlay, overlay)?;
    check_overlay(core, &base, &overlay)?;
    let guests = base.users().iter().any(|user| matches!(user, User::Guest { .. }));
    let written = |(_, with): &(User, Permissions)| with.perm & Permissions::WRITE != 0;
    // A job goes on writing to its target: guests must not come to it, too.
    let followers = JobManager::of(core).followers(base.id());
    // A job that follows the guests comes to the overlay, too.
    let guests = guests || !followers.is_empty();
    let two_writers = guests && overlay.uses().iter().any(written);
    if overlay.id() == base.id() || two_writers {
        return Err(SnapshotError::OverlayInUse.into());
    }
    Ok(PreparedSnapshot { base, overlay, origin: Origin::Client, rested: false })
}

/// Prepares a snapshot into a file (`blockdev-snapshot-sync`).
pub(crate) async fn prepare_file(core: &Core, spec: SnapshotFile) -> Result<PreparedSnapshot> {
    let base = find(core, "", &spec.node)?;
    check_base(core, &base)?;
    let name = spec.overlay.clone().ok_or(SnapshotError::NameMissing)?;
    let graph = Graph::of(core);
    if graph.find(&name).is_ok() {
        return Err(SnapshotError::NameInUse { name: name.into() }.into());
    }
    if spec.mode == NewImageMode::Existing {
        let overlay = open(core, &spec, &spec.file, &base).await?;
        let snapshot = PreparedSnapshot { base, overlay, origin: Origin::Opened, rested: false };
        return match check_overlay(core, &snapshot.base, &snapshot.overlay) {
            Ok(()) => Ok(snapshot),
            Err(error) => {
                snapshot.abort(core).await;
                Err(error)
            }
        };
    }
    let file = NewFile::create(core, &spec, &base).await?;
    match open(core, &spec, file.current(), &base).await {
        Ok(overlay) => {
            Ok(PreparedSnapshot { base, overlay, origin: Origin::Created(file), rested: false })
        }
        Err(error) => {
            file.undo(core).await;
            Err(error)
        }
    }
}

/// Refuses a node that somebody would go on writing below the overlay.
fn check_base(core: &Core, base: &Rc<Node>) -> Result<()> {
    let manager = JobManager::of(core);
    let busy = |kind: &'static str| JobError::BusyWithJob { node: (*base.name()).into(), kind };
    let id = base.id();
    if let Some(kind) = manager.target_user(id).or_else(|| manager.ending_user(id)) {
        return Err(busy(kind.name()));
    }
    if let Some(kind) = stays_below(&manager, base) {
        return Err(busy(kind));
    }
    for (user, permissions) in base.uses() {
        let stays = !matches!(user, User::Guest { .. });
        if stays && permissions.perm & Permissions::WRITE != 0 {
            return Err(JobError::InUse {
                node: (*base.name()).into(),
                by: user.to_string().into(),
            });
        }
    }
    Ok(())
}

/// Who would go on reading `base` as the snapshot, though an active commit that follows the guests
/// puts what they write above it into the layers below.
fn stays_below(manager: &JobManager, base: &Rc<Node>) -> Option<&'static str> {
    let followers = manager.followers(base.id());
    followers.iter().find(|follower| follower.copy().job().kind() == Kind::Commit)?;
    let follows = |id: &str| followers.iter().any(|known| &**known.copy().job().id() == id);
    base.users().iter().find_map(|user| match user {
        User::Guest { .. } => None,
        User::Job { id, .. } if follows(id) => None,
        User::Job { kind, .. } => Some(*kind),
        _ => Some(Kind::Commit.name()),
    })
}

/// Refuses an inactive overlay for guests who do not let their disk be inactive.
fn check_activity(base: &Node, overlay: &Node) -> Result<()> {
    if !overlay.is_active() && base.is_held_active() {
        return Err(Error::from(GraphError::InactivePermission("write")).into());
    }
    Ok(())
}

fn check_overlay(core: &Core, base: &Node, overlay: &Rc<Node>) -> Result<()> {
    check_activity(base, overlay)?;
    let reads = |permissions: &Permissions| permissions.perm & Permissions::CONSISTENT_READ != 0;
    if overlay.uses().iter().any(|(_, permissions)| reads(permissions)) {
        return Err(SnapshotError::OverlayInUse.into());
    }
    if overlay.has_backing() {
        return Err(SnapshotError::HasBacking.into());
    }
    let driver = Graph::of(core).config().formats.find(overlay.driver());
    if !driver.is_some_and(|driver| driver.supports_backing()) {
        return Err(SnapshotError::NoBackingSupport.into());
    }
    Ok(())
}

async fn open(core: &Core, spec: &SnapshotFile, path: &Path, base: &Rc<Node>) -> Result<Rc<Node>> {
    let mut node = OpenNode::new(&spec.format, path);
    node.file = FileSource::Open(FileSpec {
        path: path.to_path_buf(),
        shown_as: Some(spec.file.clone()),
        ..FileSpec::default()
    });
    node.name.clone_from(&spec.overlay);
    node.backing = BackingSource::None;
    node.options = base.options();
    node.monitor_owned = true;
    Ok(Graph::of(core).open(node).await?)
}

impl PreparedSnapshot {
    /// The node that guests will be at.
    pub(crate) fn overlay(&self) -> &Rc<Node> {
        &self.overlay
    }

    /// The nodes that the cut must hold still.
    pub(crate) fn nodes(&self) -> Vec<NodeId> {
        vec![self.base.id(), self.overlay.id()]
    }

    /// Gives a created file its name, and makes the flush inside the cut short.
    pub(crate) async fn publish(&mut self, core: &Core) -> Result<()> {
        flush_ahead(&self.base).await;
        if !self.base.is_active() && self.overlay.is_active() {
            // As the peer: who stops a machine and gives its disks away may take snapshots then.
            Graph::of(core).inactivate(&self.overlay, CUT_WAIT_NS).await?;
            self.rested = true;
        }
        self.check(core)?;
        match &mut self.origin {
            Origin::Created(file) => {
                file.publish(core).await?;
                if let Storage::File(open) = self.overlay.format().data_storage() {
                    open.renamed(&file.path);
                }
                Ok(())
            }
            Origin::Client | Origin::Opened => Ok(()),
        }
    }

    /// With the gates closed: what was true when it was prepared may have changed since.
    pub(crate) fn check(&self, core: &Core) -> Result<()> {
        check_base(core, &self.base)?;
        if !self.base.is_active() && self.overlay.is_active() {
            let (child, parent) = (self.base.name().to_string(), self.overlay.name().to_string());
            let edge = "backing";
            return Err(Error::from(GraphError::InactiveChild { child, edge, parent }).into());
        }
        check_activity(&self.base, &self.overlay)?;
        if self.base.is_stale() {
            let kind = Kind::Commit.name();
            return Err(JobError::BusyWithJob { node: (*self.base.name()).into(), kind });
        }
        let sizes = (self.base.size(), self.overlay.size());
        let follows = !JobManager::of(core).followers(self.base.id()).is_empty();
        if follows && sizes.0 != sizes.1 {
            return Err(JobError::SizesDiffer);
        }
        Ok(())
    }

    /// Moves the guests. Only inside the cut of [`PreparedSnapshot::nodes`].
    pub(crate) fn swap(&self, graph: &Rc<Graph>) {
        graph.repoint(self.base.id(), self.overlay.id());
        if let Err(error) = graph.set_backing(&self.overlay, Some(&self.base)) {
            // Writers of the base moved away just now and jobs on it were refused before.
            unreachable!("invariant: nobody writes the base of a snapshot: {error}");
        }
        // Jobs that are to take the guests over go with them.
        for follower in JobManager::of(graph.core()).followers(self.base.id()) {
            follower.move_to(graph, &self.overlay);
        }
    }

    /// Makes the old node read-only and clean on disk, if that must be later: the overlay is in use
    /// and nothing writes to the node any more.
    pub(crate) async fn finish(&self) {
        become_read_only(&self.base, None).await;
    }

    /// Undoes what was prepared and published.
    pub(crate) async fn abort(self, core: &Core) {
        if matches!(self.origin, Origin::Client) {
            if self.rested
                && let Err(error) = Graph::of(core).activate(&self.overlay, CUT_WAIT_NS).await
            {
                tracing::warn!(%error, "the overlay of a failed snapshot is still inactive");
            }
            return;
        }
        if let Err(error) = Graph::of(core).remove(&self.overlay).await {
            tracing::warn!(%error, "closing the overlay of a failed snapshot");
        }
        if let Origin::Created(file) = self.origin {
            file.undo(core).await;
        }
    }
}

impl NewFile {
    /// Creates the image of a snapshot under a temporary name beside its final one.
    async fn create(core: &Core, spec: &SnapshotFile, base: &Rc<Node>) -> Result<Self> {
        let create = CreateImage {
            size: base.size(),
            backing: Some(BackingRef {
                file: base.filename(),
                format: Some(base.driver().to_owned()),
            }),
            ..CreateImage::default()
        };
        Self::image(core, &spec.file, &spec.format, create).await
    }

    /// Creates an image under a temporary name beside `path`.
    pub(crate) async fn image(
        core: &Core,
        path: &Path,
        format: &str,
        create: CreateImage,
    ) -> Result<Self> {
        let driver = Graph::of(core).config().formats.find(format).ok_or_else(|| {
            JobError::from(SnapshotError::UnknownFormat { format: format.into() })
        })?;
        if create.backing.is_some() && !driver.supports_backing() {
            return Err(SnapshotError::FormatWithoutBacking { format: format.into() }.into());
        }
        let path = path.to_path_buf();
        let state = match storage::stat(core, &path).await {
            Ok(facts) if facts.size > 0 || facts.block_device => {
                return Err(not_ours_to_fill(core, &path).await);
            }
            Ok(_) => FileState::Filled,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                FileState::Temporary(temporary_name(core, &path))
            }
            Err(error) => return Err(cannot_create(&path, error)),
        };
        let file = Self { path, state };
        match file.fill(core, &*driver, create).await {
            Ok(()) => Ok(file),
            Err((created, error)) => {
                let error = cannot_create(&file.path, error);
                if created {
                    file.undo(core).await;
                }
                Err(error)
            }
        }
    }

    /// Writes the image; on failure also whether the file is ours to clean up.
    async fn fill(
        &self,
        core: &Core,
        driver: &dyn liveblk_engine::format::Driver,
        create: CreateImage,
    ) -> Result<(), (bool, Error)> {
        let options = FileOptions {
            path: self.current().to_path_buf(),
            writable: true,
            create_new: matches!(self.state, FileState::Temporary(_)),
            locking: true,
            ..FileOptions::default()
        };
        // A create that failed after the file was made leaves it to be removed: the temporary name
        // is nobody else's.
        let temporary = options.create_new;
        let file = File::open(core, options).await.map_err(|error| (temporary, error))?;
        file.lock(LockRequest::Write).await.map_err(|error| (temporary, error))?;
        let created = driver.create(core.clone(), Storage::File(file), create).await;
        created.map_err(|error| (true, error))
    }

    /// The name that the file has now.
    fn current(&self) -> &Path {
        match &self.state {
            FileState::Temporary(path) => path,
            FileState::Filled | FileState::Published(_) => &self.path,
        }
    }

    pub(crate) async fn publish(&mut self, core: &Core) -> Result<()> {
        let FileState::Temporary(temporary) = &self.state else { return Ok(()) };
        let failed = |error| cannot_create(&self.path, error);
        let identity = storage::stat(core, temporary).await.map_err(failed)?.identity;
        match storage::rename(core, temporary, &self.path).await {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                let path = self.path.display().to_string().into();
                return Err(SnapshotError::FileExists { path }.into());
            }
            Err(error) => return Err(failed(error)),
        }
        self.state = FileState::Published(identity);
        let durable = storage::sync_folder_of(core, &self.path).await;
        durable.map_err(|error| cannot_create(&self.path, error))
    }

    /// Removes what was created; a file that the client had made is empty again.
    pub(crate) async fn undo(self, core: &Core) {
        let undone = match &self.state {
            FileState::Temporary(path) => storage::unlink(core, path).await,
            FileState::Filled => empty_again(core, &self.path).await,
            FileState::Published(identity) => match storage::stat(core, &self.path).await {
                Ok(facts) if facts.identity == *identity => storage::unlink(core, &self.path).await,
                // Somebody else's by now.
                _ => Ok(()),
            },
        };
        match undone {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!(%error, "cleaning up after a failed snapshot");
            }
            _ => {}
        }
    }
}

/// Why a file that holds something cannot become a new image: somebody uses it, it cannot be
/// written, or it would be lost.
async fn not_ours_to_fill(core: &Core, path: &Path) -> JobError {
    let options = FileOptions {
        path: path.to_path_buf(),
        writable: true,
        locking: true,
        ..FileOptions::default()
    };
    let asked = async { File::open(core, options).await?.lock(LockRequest::Write).await };
    match asked.await {
        Ok(()) => SnapshotError::FileExists { path: path.display().to_string().into() }.into(),
        Err(error) => cannot_create(path, error),
    }
}

async fn empty_again(core: &Core, path: &Path) -> liveblk_engine::Result<()> {
    let options = FileOptions {
        path: path.to_path_buf(),
        writable: true,
        locking: false,
        ..FileOptions::default()
    };
    File::open(core, options).await?.truncate(0).await
}

fn temporary_name(core: &Core, path: &Path) -> PathBuf {
    path.with_file_name(format!(".liveblk-{:016x}.tmp", core.random()))
}

fn cannot_create(path: &Path, error: Error) -> JobError {
    let path = path.display().to_string().into();
    SnapshotError::File { path, source: error }.into()
}
