//! Opening nodes: files, formats, and the chain below.
//!
//! A chain is opened from the top down without recursion, so its depth is bounded by a counter and
//! not by the stack; every file is known by (device, inode), so a loop is found before it is
//! followed. On a failure everything that was opened for the node is closed again.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use super::data::{DataFileSource, Held};
use super::error::GraphError;
use super::registry::{Graph, GraphConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    DataSource, Driver, Format, FormatOptions, OpenImage, ResolvedReference, SnapshotChoice,
};
use crate::limits::CHAIN_DEPTH;
use crate::node::{
    LoadedBitmap, Node, NodeOptions, NodeParts, Permissions, Plain, User, UserGuard, load_bitmaps,
};
use crate::storage::{File, FileOptions, LockRequest, Storage};

/// A file to be opened as a protocol node.
#[derive(Clone, Debug, Default)]
pub struct FileSpec {
    /// Node name; a generated one if absent.
    pub name: Option<String>,
    /// The file.
    pub path: PathBuf,
    /// What queries show instead of `path` (a new image's final name).
    pub shown_as: Option<PathBuf>,
    /// Do not follow anything out of this folder.
    pub beneath: Option<PathBuf>,
    /// Neither take nor honour locks.
    pub no_locking: bool,
    /// Options of the protocol node; those of the node above if absent.
    pub options: Option<NodeOptions>,
    /// Was asked to be inactive by itself, which only a file of an inactive node can be.
    pub inactive: bool,
}

/// What holds an image.
#[derive(Clone, Debug)]
pub enum FileSource {
    /// A node by name.
    Node(String),
    /// A file that is opened for this node.
    Open(FileSpec),
    /// A storage of the embedder.
    Storage(Storage),
}

/// What lies below an image.
#[derive(Clone, Debug)]
pub enum BackingSource {
    /// What the header says, within the reference policy.
    FromHeader,
    /// Nothing, whatever the header says.
    None,
    /// A node by name.
    Node(String),
    /// An image that is opened for this node.
    Open(Box<OpenNode>),
}

/// A node to be opened.
#[derive(Clone, Debug)]
pub struct OpenNode {
    /// Node name; a generated one if absent.
    pub name: Option<String>,
    /// "file" for a protocol node, else a format's name.
    pub driver: String,
    /// What holds it.
    pub file: FileSource,
    /// Where the guest data lies of an image that does not hold it itself.
    pub data_file: DataFileSource,
    /// What lies below.
    pub backing: BackingSource,
    /// Open for writing.
    pub writable: bool,
    /// In use from the start; otherwise the image is another process's until it is activated, and
    /// what is opened below with it, too.
    pub active: bool,
    /// Fall back to read-only if the file cannot be opened for writing.
    pub auto_read_only: bool,
    /// For a read-only node: let others write the file meanwhile.
    pub force_share: bool,
    /// Options of the node (and of a file opened for it).
    pub options: NodeOptions,
    /// Whether `blockdev-del` may remove it.
    pub monitor_owned: bool,
    /// Options of the format by their QMP names.
    pub format_options: FormatOptions,
    /// Whether the node takes over the dirty bitmaps that the image holds (otherwise the format
    /// goes on with them).
    pub bitmaps: bool,
    /// For raw: the first byte of the disk in the file.
    pub raw_offset: u64,
    /// For raw: bytes of the disk.
    pub raw_size: Option<u64>,
    /// Instead of the disk as it is, what it was at this snapshot inside the image; read-only.
    pub snapshot: Option<SnapshotChoice>,
}

impl OpenNode {
    /// A node of `driver` on the file `path`, chain as the header says, not monitor-owned.
    pub fn new(driver: &str, path: impl Into<PathBuf>) -> Self {
        let spec = FileSpec { path: path.into(), ..FileSpec::default() };
        Self {
            name: None,
            driver: driver.into(),
            file: FileSource::Open(spec),
            data_file: DataFileSource::FromHeader,
            backing: BackingSource::FromHeader,
            writable: true,
            active: true,
            auto_read_only: false,
            force_share: false,
            options: NodeOptions::default(),
            monitor_owned: false,
            format_options: FormatOptions::new(),
            bitmaps: true,
            raw_offset: 0,
            raw_size: None,
            snapshot: None,
        }
    }

    /// The same with a name.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Whether the file is opened without locks.
    pub(super) fn has_no_locks(&self) -> bool {
        matches!(&self.file, FileSource::Open(file) if file.no_locking)
    }
}

/// One image of a chain that is being opened.
struct Level {
    spec: OpenNode,
    name: Rc<str>,
    file: Option<Rc<Node>>,
    /// The node of the external data file.
    data: Option<Rc<Node>>,
    format: Rc<dyn Format>,
    /// The dirty bitmaps that the file holds.
    bitmaps: Vec<LoadedBitmap>,
    filename: PathBuf,
    /// Whether it is to take writes, now or once it is active.
    asked_writable: bool,
}

/// Files seen so far, to find loops.
pub(super) type Seen = Vec<(u64, u64)>;

impl Graph {
    /// Opens a node with everything below it.
    ///
    /// # Errors
    /// What is wrong with the name, the file, the image or a reference; nothing stays open then.
    pub async fn open(self: &Rc<Self>, spec: OpenNode) -> Result<Rc<Node>> {
        let mut levels: Vec<Level> = Vec::new();
        let result = self.open_levels(spec, &mut levels).await;
        let error = match result {
            Ok(base) => match self.link(&mut levels, base) {
                Ok(node) => return Ok(node),
                Err((linked, error)) => {
                    if let Some(linked) = linked {
                        self.remove_if_unused(&linked).await?;
                    }
                    error
                }
            },
            Err(error) => error,
        };
        for level in levels {
            // The first error is the one to report; closing a fresh image loses nothing.
            let _ = level.format.close().await;
            for file in level.file.into_iter().chain(level.data) {
                let _ = self.remove_if_unused(&file).await;
            }
        }
        Err(error)
    }

    /// Opens the chain top-down; returns the existing node that ends it, if any.
    async fn open_levels(
        self: &Rc<Self>,
        spec: OpenNode,
        levels: &mut Vec<Level>,
    ) -> Result<Option<Rc<Node>>> {
        let config = self.config();
        let mut seen = Seen::new();
        let mut next = Some(spec);
        while let Some(spec) = next.take() {
            let file = spec_file(&spec);
            if levels.len() >= CHAIN_DEPTH {
                return Err(GraphError::TooDeep(file).into());
            }
            let level = match self.open_level(&config, spec, &mut seen).await {
                Ok(level) => level,
                Err(error) if levels.is_empty() => return Err(error),
                Err(error) => return Err(as_backing(&file, &error)),
            };
            let backing = level.spec.backing.clone();
            let writable_top = level.spec.clone();
            let reference = level.format.info().backing;
            let image = level.filename.clone();
            levels.push(level);
            match backing {
                BackingSource::None => {}
                BackingSource::Node(name) => {
                    let found = self.find(&name).map_err(|_| GraphError::BackingNotFound(name))?;
                    check_active(&found, "backing", &writable_top)?;
                    return Ok(Some(found));
                }
                BackingSource::Open(spec) => {
                    let active = spec.active && writable_top.active;
                    next = Some(OpenNode { writable: false, active, ..*spec });
                }
                BackingSource::FromHeader => {
                    if let Some(reference) = reference {
                        let found = match self.known_reference(&image, &reference) {
                            Some(found) => found,
                            None => (config.resolve)(&image, &reference, &config.policy)?,
                        };
                        next = Some(self.header_backing(&config, found, &writable_top).await?);
                    }
                }
            }
        }
        Ok(None)
    }

    /// The backing image that a header names.
    async fn header_backing(
        &self,
        config: &GraphConfig,
        found: ResolvedReference,
        overlay: &OpenNode,
    ) -> Result<OpenNode> {
        let driver = match found.driver {
            Some(driver) => driver,
            None => self.recognise(config, &found).await?,
        };
        let mut spec = OpenNode::new(&driver, found.path.clone());
        spec.file = FileSource::Open(FileSpec {
            path: found.path,
            beneath: found.beneath,
            ..FileSpec::default()
        });
        spec.writable = false;
        spec.active = overlay.active;
        spec.force_share = overlay.force_share;
        spec.bitmaps = overlay.bitmaps;
        spec.options = overlay.options;
        Ok(spec)
    }

    /// The format that a file proves to have; raw is never guessed.
    async fn recognise(&self, config: &GraphConfig, found: &ResolvedReference) -> Result<String> {
        let options = FileOptions {
            path: found.path.clone(),
            beneath: found.beneath.clone(),
            ..FileOptions::default()
        };
        let shown = found.path.display().to_string();
        let file =
            File::open(self.core(), options).await.map_err(|error| as_backing(&shown, &error))?;
        let head = self.core().pool().alloc(512);
        file.read(0, head.clone()).await?;
        let head = head.to_vec();
        let drivers = config.formats.names().filter_map(|name| config.formats.find(name));
        let mut known = drivers.filter(|driver| driver.recognises(&head));
        match known.next() {
            Some(driver) => Ok(driver.name().into()),
            None => Err(GraphError::FormatMissing(shown).into()),
        }
    }

    async fn open_level(
        self: &Rc<Self>,
        config: &GraphConfig,
        mut spec: OpenNode,
        seen: &mut Seen,
    ) -> Result<Level> {
        let protocol = spec.driver == "file";
        let asked_writable = spec.writable;
        // Until it is activated nothing is written.
        spec.writable &= spec.active;
        let driver = config.formats.find(&spec.driver);
        if !protocol && driver.is_none() {
            return Err(GraphError::UnknownDriver(spec.driver).into());
        }
        if protocol {
            // As the peer: what is wrong with the name comes first for a file, else the file does.
            self.name_for(spec.name.as_deref())?;
        }
        let (file, storage, filename) = self.open_storage(&mut spec, protocol, seen).await?;
        let driver = driver.filter(|_| !protocol);
        let held = Held::default();
        let opened = match self.data_source(config, &mut spec, &filename, seen, &held).await {
            Ok(data) => self.open_image(&spec, driver, storage, &filename, data).await,
            Err(error) => Err(error),
        };
        let data = held.take();
        if let Some(Storage::File(data)) = data.as_ref().map(|node| node.format().data_storage()) {
            seen.push(data.identity());
        }
        match opened {
            Ok((name, format)) => {
                let loads = spec.bitmaps && spec.active;
                let bitmaps = if loads { load_bitmaps(&format).await } else { Vec::new() };
                let files = file.iter().chain(&data).filter(|file| !file.is_monitor_owned());
                for file in files.filter(|_| !spec.active) {
                    file.begin_inactive(asked_writable);
                }
                Ok(Level { spec, name, file, data, format, bitmaps, filename, asked_writable })
            }
            Err(error) => {
                for file in file.iter().chain(&data) {
                    // The first error is the one to report.
                    let _ = self.remove_if_unused(file).await;
                }
                Err(error)
            }
        }
    }

    /// Opens the image in `storage` with `driver`, or takes its bytes as they are.
    async fn open_image(
        &self,
        spec: &OpenNode,
        driver: Option<Arc<dyn Driver>>,
        storage: Storage,
        filename: &Path,
        data: DataSource,
    ) -> Result<(Rc<str>, Rc<dyn Format>)> {
        let name = self.name_for(spec.name.as_deref())?;
        let Some(driver) = driver else {
            return Ok((name, Rc::new(Plain::new("file", storage))));
        };
        let open = OpenImage {
            core: self.core().clone(),
            storage,
            filename: filename.to_path_buf(),
            writable: spec.writable,
            discard_unmap: spec.options.discard_unmap,
            data,
            options: spec.format_options.clone(),
            raw_offset: spec.raw_offset,
            raw_size: spec.raw_size,
        };
        let format = driver.open(open).await?;
        match &spec.snapshot {
            None => Ok((name, format)),
            Some(which) => Ok((name, snapshot_view(format, which.clone(), spec.writable).await?)),
        }
    }

    /// A node that is referred to by name in options.
    pub(super) fn referenced(&self, name: &str) -> Result<Rc<Node>> {
        self.find(name).map_err(|_| GraphError::ReferenceNotFound(name.into()).into())
    }

    /// The storage of an image, and the protocol node that owns it.
    async fn open_storage(
        self: &Rc<Self>,
        spec: &mut OpenNode,
        protocol: bool,
        seen: &mut Seen,
    ) -> Result<(Option<Rc<Node>>, Storage, PathBuf)> {
        match spec.file.clone() {
            FileSource::Storage(storage) => Ok((None, storage, PathBuf::from("memory"))),
            FileSource::Node(name) => {
                let node = self.referenced(&name)?;
                if node.driver() != "file" {
                    return Err(GraphError::NotAFile(name).into());
                }
                check_active(&node, "file", spec)?;
                if spec.writable && !node.is_writable() {
                    return Err(GraphError::ReadOnly.into());
                }
                let storage = node.format().data_storage().clone();
                self.check_own_name(spec)?;
                self.lock_for(&storage, spec).await?;
                let filename = PathBuf::from(node.filename());
                Ok((Some(node), storage, filename))
            }
            FileSource::Open(file_spec) => {
                if file_spec.inactive && spec.active {
                    let child = file_spec.name.unwrap_or_default();
                    return Err(inactive_child(child, "file", spec));
                }
                let file = self.open_file(&file_spec, spec).await?;
                if seen.contains(&file.identity()) {
                    return Err(GraphError::Loop(file.name().into()).into());
                }
                seen.push(file.identity());
                let storage = Storage::File(file);
                self.check_own_name(spec)?;
                self.lock_for(&storage, spec).await?;
                let filename = file_spec.shown_as.clone().unwrap_or(file_spec.path.clone());
                if protocol {
                    return Ok((None, storage, filename));
                }
                let node = self.protocol_node(&file_spec, &storage, &filename, spec)?;
                Ok((Some(node), storage, filename))
            }
        }
    }

    /// A bad name is told before a lock of somebody else, as the peer does.
    fn check_own_name(&self, spec: &OpenNode) -> Result<()> {
        spec.name.as_ref().map_or(Ok(()), |name| self.check_name(name))
    }

    pub(super) async fn open_file(&self, file: &FileSpec, spec: &mut OpenNode) -> Result<Rc<File>> {
        let direct = file.options.as_ref().unwrap_or(&spec.options).direct;
        let options = |writable| FileOptions {
            path: file.path.clone(),
            shown_as: file.shown_as.clone(),
            writable,
            direct,
            create_new: false,
            beneath: file.beneath.clone(),
            locking: !file.no_locking,
        };
        let opened = File::open(self.core(), options(spec.writable)).await;
        let opened = match opened {
            Err(error) if spec.writable && spec.auto_read_only && is_read_only(&error) => {
                let opened = File::open(self.core(), options(false)).await;
                spec.writable = false;
                opened
            }
            other => other,
        };
        opened.map_err(|error| {
            if error.detail().is_some() {
                return error;
            }
            let cause = error.kind().to_string().into();
            let source = GraphError::Open { file: file.path.display().to_string(), cause };
            Error::new(error.kind(), "open").with_source(source)
        })
    }

    /// Takes the locks that the image's use of the file needs.
    pub(super) async fn lock_for(&self, storage: &Storage, spec: &OpenNode) -> Result<()> {
        let Storage::File(file) = storage else { return Ok(()) };
        let request = match (spec.writable, spec.driver.as_str()) {
            _ if !spec.active => return Ok(()),
            (true, _) => LockRequest::Write,
            (false, _) if spec.force_share => LockRequest::ReadShared,
            (false, "file" | "raw") => LockRequest::ReadShared,
            (false, _) => LockRequest::ReadStable,
        };
        file.lock(request).await
    }

    pub(super) fn protocol_node(
        self: &Rc<Self>,
        file: &FileSpec,
        storage: &Storage,
        filename: &Path,
        spec: &OpenNode,
    ) -> Result<Rc<Node>> {
        let name = self.name_for(file.name.as_deref())?;
        let parts = NodeParts {
            id: self.next_id(),
            name,
            format: Rc::new(Plain::new("file", storage.clone())),
            filename: filename.display().to_string(),
            options: file.options.unwrap_or(spec.options),
            writable: spec.writable,
            monitor_owned: false,
            file: None,
            data: None,
            backing: None,
            view: None,
        };
        let node = Node::new(self.core(), parts);
        self.insert(&node, Vec::new());
        Ok(node)
    }

    /// Makes nodes of the opened images, base first, and links them. On a conflict: what was linked
    /// so far and the error; the levels that were not linked stay in the list.
    fn link(
        self: &Rc<Self>,
        levels: &mut Vec<Level>,
        base: Option<Rc<Node>>,
    ) -> Result<Rc<Node>, (Option<Rc<Node>>, Error)> {
        let mut below = base;
        while let Some(level) = levels.pop() {
            match self.level_uses(&level, below.as_ref()) {
                Ok(uses) => below = Some(self.link_level(level, below.take(), uses)),
                Err(error) => {
                    levels.push(level);
                    return Err((below, error));
                }
            }
        }
        Ok(below.expect("invariant: at least one level was opened"))
    }

    /// A level's uses of its file and of what lies below.
    fn level_uses(&self, level: &Level, backing: Option<&Rc<Node>>) -> Result<Vec<UserGuard>> {
        if self.find(&level.name).is_ok() {
            return Err(GraphError::Duplicate(level.name.to_string()).into());
        }
        let mut uses = Vec::new();
        if let Some(file) = &level.file {
            let user = User::Format { node: Rc::clone(&level.name) };
            uses.push(Node::use_by(file, user, Permissions::of_format(level.spec.writable))?);
        }
        if let Some(data) = &level.data {
            let user = User::Data { node: Rc::clone(&level.name) };
            uses.push(Node::use_by(data, user, Permissions::of_format(level.spec.writable))?);
        }
        if let Some(backing) = backing {
            let user = User::Overlay { node: Rc::clone(&level.name) };
            uses.push(Node::use_by(backing, user, Permissions::of_overlay())?);
        }
        Ok(uses)
    }

    fn link_level(
        self: &Rc<Self>,
        level: Level,
        backing: Option<Rc<Node>>,
        uses: Vec<UserGuard>,
    ) -> Rc<Node> {
        let parts = NodeParts {
            id: self.next_id(),
            name: level.name,
            format: level.format,
            filename: level.filename.display().to_string(),
            options: level.spec.options,
            writable: level.spec.writable,
            monitor_owned: level.spec.monitor_owned,
            file: level.file,
            data: level.data,
            backing,
            view: None,
        };
        let node = Node::new(self.core(), parts);
        if level.spec.bitmaps {
            node.adopt_bitmaps(level.bitmaps);
        }
        if !level.spec.active {
            node.begin_inactive(level.asked_writable);
        }
        self.insert(&node, uses);
        node
    }
}

/// What the disk of `image` was at a snapshot; `image` is closed if that cannot be shown.
async fn snapshot_view(
    image: Rc<dyn Format>,
    which: SnapshotChoice,
    writable: bool,
) -> Result<Rc<dyn Format>> {
    const OP: &str = "open a snapshot";
    let held = image.abilities().snapshots;
    let view = match held {
        _ if writable => Err(Error::new(ErrorKind::ReadOnly, OP)),
        Some(held) => held.view(which).await,
        None => Err(Error::new(ErrorKind::Unsupported, OP)),
    };
    if view.is_err() {
        // The first error is the one to report.
        let _ = image.close().await;
    }
    view
}

/// Refuses an inactive node below an active one.
pub(super) fn check_active(child: &Node, edge: &'static str, parent: &OpenNode) -> Result<()> {
    if child.is_active() || !parent.active {
        return Ok(());
    }
    Err(inactive_child(child.name().to_string(), edge, parent))
}

fn inactive_child(child: String, edge: &'static str, parent: &OpenNode) -> Error {
    let parent = parent.name.clone().unwrap_or_default();
    GraphError::InactiveChild { child, edge, parent }.into()
}

fn spec_file(spec: &OpenNode) -> String {
    match &spec.file {
        FileSource::Open(file) => file.path.display().to_string(),
        FileSource::Node(name) => name.clone(),
        FileSource::Storage(storage) => storage.name().into(),
    }
}

fn is_read_only(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Io(libc::EACCES | libc::EROFS | libc::EPERM) | ErrorKind::ReadOnly
    )
}

/// An error below the top, with the file that it is about.
fn as_backing(file: &str, error: &Error) -> Error {
    let text = error.to_string();
    let prefix = format!("Could not open '{file}': ");
    let cause = text.strip_prefix(&prefix).unwrap_or(&text).into();
    let source = GraphError::Backing { file: file.into(), cause };
    Error::new(error.kind(), "open backing file").with_source(source)
}
