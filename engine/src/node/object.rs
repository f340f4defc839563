//! The node object: an open image with its compiled path, gate, claims, hooks and users.

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::{Rc, Weak};

use super::account::Account;
use super::attachment::Attachment;
use super::bitmaps::NodeBitmaps;
use super::chain::{ChainStats, LayerState};
use super::gate::Gate;
use super::hooks::{HookId, Hooks, WriteHook};
use super::path::{Layer, Path};
use super::users::Users;
use super::view::View;
use crate::buf::Buf;
use crate::error::Result;
use crate::executor::sync::Mutex;
use crate::executor::{Core, JoinHandle};
use crate::format::{Format, ImageInfo};
use crate::node::map::MapExtent;
use crate::node::request::{self, Origin, Receipt, WriteFlags, ZeroFlags};
use crate::node::status::StatusExtent;
use crate::ranges::RangeLocks;
use crate::storage::{LockRequest, Storage, WriteWatch};

/// Names a node for good; never reused within an engine core.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

/// Whether writes of zeroes are turned into requests that write zeroes (QMP `detect-zeroes`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// Data is written as it is.
    #[default]
    Off,
    /// Zeroes are written as zeroes.
    On,
    /// Zeroes are written as zeroes and may give space back where discards may.
    Unmap,
}

/// Options of a node that requests and queries look at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeOptions {
    /// Pass discards on (QMP `discard=unmap`); otherwise they succeed without effect.
    pub discard_unmap: bool,
    /// Bypass the page cache (QMP `cache.direct`).
    pub direct: bool,
    /// Ignore flushes (QMP `cache.no-flush`).
    pub no_flush: bool,
    /// What becomes of writes of zeroes.
    pub detect_zeroes: DetectZeroes,
}

/// What a node is made of.
pub(crate) struct NodeParts {
    pub(crate) id: NodeId,
    pub(crate) name: Rc<str>,
    pub(crate) format: Rc<dyn Format>,
    pub(crate) filename: String,
    pub(crate) options: NodeOptions,
    pub(crate) writable: bool,
    pub(crate) monitor_owned: bool,
    pub(crate) file: Option<Rc<Node>>,
    pub(crate) data: Option<Rc<Node>>,
    pub(crate) backing: Option<Rc<Node>>,
    /// What it is if it holds no image.
    pub(crate) view: Option<Rc<dyn View>>,
}

/// An open image (or protocol file) in the graph of its home core.
pub struct Node {
    core: Core,
    id: NodeId,
    name: Rc<str>,
    layer: Layer,
    filename: RefCell<String>,
    options: Cell<NodeOptions>,
    monitor_owned: Cell<bool>,
    /// What its users asked for; jobs may keep it writable meanwhile.
    pub(super) asked_writable: Cell<bool>,
    /// The image belongs to another process.
    pub(super) inactive: Cell<bool>,
    /// The dirty bitmaps that the image holds are the node's.
    pub(super) takes_bitmaps: Cell<bool>,
    /// Jobs that keep it writable.
    pub(super) writers: Cell<u32>,
    /// Held by who makes the image writable or read-only.
    turning: Mutex<()>,
    /// What lies below was changed: its content means nothing any more.
    stale: Cell<bool>,
    file: RefCell<Option<Rc<Node>>>,
    data: RefCell<Option<Rc<Node>>>,
    backing: RefCell<Option<Rc<Node>>>,
    pub(super) view: Option<Rc<dyn View>>,
    path: RefCell<Rc<Path>>,
    pub(super) gate: Rc<Gate>,
    pub(super) claims: Rc<RangeLocks>,
    pub(super) hooks: Hooks,
    pub(super) bitmaps: NodeBitmaps,
    pub(super) watch: Rc<WriteWatch>,
    pub(super) account: Account,
    pub(super) users: Users,
    pub(super) attachments: RefCell<Vec<Weak<Attachment>>>,
}

impl Node {
    pub(crate) fn new(core: &Core, parts: NodeParts) -> Rc<Self> {
        let below = parts.backing.as_ref().map(|backing| backing.path());
        let layer = Layer { format: parts.format, state: LayerState::new(parts.writable) };
        let path = Path::compile(layer.clone(), below.as_deref());
        Rc::new(Self {
            core: core.clone(),
            id: parts.id,
            name: parts.name,
            layer,
            filename: RefCell::new(parts.filename),
            options: Cell::new(parts.options),
            monitor_owned: Cell::new(parts.monitor_owned),
            asked_writable: Cell::new(parts.writable),
            inactive: Cell::new(false),
            takes_bitmaps: Cell::new(false),
            writers: Cell::new(0),
            turning: Mutex::new(core, ()),
            stale: Cell::new(false),
            file: RefCell::new(parts.file),
            data: RefCell::new(parts.data),
            backing: RefCell::new(parts.backing),
            view: parts.view,
            path: RefCell::new(path),
            gate: Gate::new(core),
            claims: RangeLocks::new(core),
            hooks: Hooks::new(),
            bitmaps: NodeBitmaps::default(),
            watch: Rc::default(),
            account: Account::default(),
            users: Users::default(),
            attachments: RefCell::default(),
        })
    }

    /// The home core.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// The node's identity.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// The node's name.
    pub fn name(&self) -> Rc<str> {
        Rc::clone(&self.name)
    }

    /// The driver's name in QMP.
    pub fn driver(&self) -> &'static str {
        self.layer.format.driver()
    }

    /// The file that holds the image, as it was named when it was opened.
    pub fn filename(&self) -> String {
        self.filename.borrow().clone()
    }

    /// The image file was renamed (a new image got its final name).
    pub fn set_filename(&self, filename: &str) {
        filename.clone_into(&mut self.filename.borrow_mut());
    }

    /// Virtual size in bytes, now.
    pub fn size(&self) -> u64 {
        self.layer.format.size()
    }

    /// Bytes that one allocation covers; 1 where there is no allocation.
    pub fn cluster_size(&self) -> u64 {
        self.layer.format.cluster_size()
    }

    /// Whether writes can be stored compressed.
    pub fn can_compress(&self) -> bool {
        self.layer.format.abilities().compress.is_some()
    }

    /// Facts for queries.
    pub fn info(&self) -> ImageInfo {
        self.layer.format.info()
    }

    /// The node's options, now.
    pub fn options(&self) -> NodeOptions {
        self.options.get()
    }

    /// Changes the options for requests that begin from now on. `direct` only tells what the file
    /// was opened with.
    pub fn set_options(&self, options: NodeOptions) {
        self.options.set(options);
    }

    /// How far the node was written; that of the file where the node is the file.
    pub fn write_watch(&self) -> Rc<WriteWatch> {
        match self.format().data_storage() {
            Storage::File(file) if self.is_protocol() => Rc::clone(file.watch()),
            _ => Rc::clone(&self.watch),
        }
    }

    /// Whether the node is a file of the host and no image in one.
    pub fn is_protocol(&self) -> bool {
        self.driver() == "file"
    }

    /// The image itself.
    pub fn format(&self) -> &Rc<dyn Format> {
        &self.layer.format
    }

    /// Whether the image takes writes.
    pub fn is_writable(&self) -> bool {
        if let Some(below) = self.filtered() {
            return below.is_writable();
        }
        self.layer.state.is_writable()
    }

    /// Whether `blockdev-del` may remove it.
    pub fn is_monitor_owned(&self) -> bool {
        self.monitor_owned.get()
    }

    /// Gives the node to the monitor, or takes it away.
    pub fn set_monitor_owned(&self, owned: bool) {
        self.monitor_owned.set(owned);
    }

    /// The protocol node below a format node.
    pub fn file(&self) -> Option<Rc<Self>> {
        self.file.borrow().clone()
    }

    /// The protocol node of the external data file.
    pub fn data_file(&self) -> Option<Rc<Self>> {
        self.data.borrow().clone()
    }

    /// The backing node.
    pub fn backing(&self) -> Option<Rc<Self>> {
        self.backing.borrow().clone()
    }

    /// Whether there is a backing node.
    pub fn has_backing(&self) -> bool {
        self.backing.borrow().is_some()
    }

    /// Whether the bytes live in memory (small, cache-hot units are best then).
    pub fn is_memory_backed(&self) -> bool {
        match self.layer.format.data_storage() {
            Storage::File(file) => file.is_memory_backed(),
            Storage::Memory(_) => true,
        }
    }

    /// The path of the file that holds the bytes, if that is a regular one on a file system of this
    /// machine.
    pub fn local_path(&self) -> Option<PathBuf> {
        match self.layer.format.data_storage() {
            Storage::File(file) => file.local_path(),
            Storage::Memory(_) => None,
        }
    }

    pub(crate) fn path(&self) -> Rc<Path> {
        match self.filtered() {
            Some(below) => below.path(),
            None => Rc::clone(&self.path.borrow()),
        }
    }

    /// The state of the node's own layer, which all paths through it share.
    pub(super) fn layer_state(&self) -> &Rc<LayerState> {
        &self.layer.state
    }

    /// What reads through the chain below have cost so far; zeroes where there is at most one layer
    /// below.
    pub fn chain_stats(&self) -> ChainStats {
        self.path.borrow().index().map(|index| index.stats()).unwrap_or_default()
    }

    pub(crate) fn gate(&self) -> &Rc<Gate> {
        &self.gate
    }

    /// Takes the children away (the node is being closed).
    pub(crate) fn take_children(&self) -> [Option<Rc<Self>>; 3] {
        [self.file.take(), self.data.take(), self.backing.take()]
    }

    /// Takes the attachments away, to move them to another node.
    pub(crate) fn take_attachments(&self) -> Vec<Rc<Attachment>> {
        self.attachments.borrow_mut().drain(..).filter_map(|held| held.upgrade()).collect()
    }

    /// Puts `backing` below this node and compiles the path anew. Only inside a cut, or where the
    /// content stays equal.
    pub(crate) fn link_backing(&self, backing: Option<Rc<Self>>) -> Rc<Path> {
        *self.backing.borrow_mut() = backing;
        self.recompile()
    }

    /// Compiles the path anew, because that of the backing node is another one; returns the old
    /// path, which requests in flight go on using.
    pub(crate) fn recompile(&self) -> Rc<Path> {
        let below = self.backing.borrow().as_ref().map(|node| node.path());
        self.path.replace(Path::compile(self.layer.clone(), below.as_deref()))
    }

    /// Whether what lies below was changed, so that the content means nothing any more.
    pub fn is_stale(&self) -> bool {
        self.stale.get()
    }

    /// From now on nobody may use the content: what lies below is written by others.
    pub fn set_stale(&self) {
        self.stale.set(true);
    }

    /// Installs a write hook. Only inside a cut of this node.
    pub fn add_hook(&self, hook: Rc<dyn WriteHook>) -> HookId {
        self.hooks.add(hook)
    }

    /// Removes a write hook. Only inside a cut of this node.
    pub fn remove_hook(&self, id: HookId) {
        self.hooks.remove(id);
    }

    /// Whether a request of external origin would wait.
    pub fn is_drained(&self) -> bool {
        self.gate.is_closed()
    }

    /// Makes the image writable or read-only (then it is flushed and left clean on disk).
    ///
    /// # Errors
    /// What flushing or the locks report; the node then keeps its state.
    pub async fn set_writable(&self, writable: bool) -> Result<()> {
        self.asked_writable.set(writable);
        let _turn = self.turning.lock().await;
        // Where something else was asked meanwhile, that call decides.
        if self.asked_writable.get() == writable { self.turn(writable).await } else { Ok(()) }
    }

    /// As [`Node::set_writable`], whatever the users asked for. A job that comes while the image
    /// becomes read-only makes it writable afterwards.
    pub(super) async fn turn_for_now(&self, writable: bool) -> Result<()> {
        let _turn = self.turning.lock().await;
        self.turn(writable).await
    }

    async fn turn(&self, writable: bool) -> Result<()> {
        if self.layer.state.is_writable() == writable {
            return Ok(());
        }
        if writable {
            self.lock_file(true).await?;
            if let Err(error) = self.layer.format.set_writable(true).await {
                // The error is what counts; a lock too much only keeps others out.
                let _ = self.lock_file(false).await;
                return Err(error);
            }
            self.show_writable(true);
        } else if self.writers.get() == 0 {
            self.layer.format.set_writable(false).await?;
            self.show_writable(false);
            self.lock_file(false).await?;
        }
        Ok(())
    }

    /// Sets what requests and queries see; a file that was opened for this node goes with it.
    fn show_writable(&self, writable: bool) {
        self.layer.state.set_writable(writable, &**self.format());
        let files = self.file().into_iter().chain(self.data_file());
        for file in files.filter(|file| !file.is_monitor_owned()) {
            file.layer.state.set_writable(writable, &**file.format());
        }
    }

    /// Gives up the locks on the file of a protocol node that is being closed.
    pub(crate) async fn unlock_file(&self) -> Result<()> {
        match self.layer.format.data_storage() {
            Storage::File(file) => file.lock(LockRequest::None).await,
            Storage::Memory(_) => Ok(()),
        }
    }

    /// Locks the file of the image, and its data file.
    async fn lock_file(&self, write: bool) -> Result<()> {
        let Some(data) = self.data_file() else {
            return self.lock_storage(self.format().data_storage(), write).await;
        };
        if let Some(file) = self.file() {
            self.lock_storage(file.format().data_storage(), write).await?;
        }
        self.lock_storage(data.format().data_storage(), write).await
    }

    async fn lock_storage(&self, storage: &Storage, write: bool) -> Result<()> {
        let Storage::File(file) = storage else { return Ok(()) };
        if write {
            file.make_writable().await?;
        }
        let read = if self.layer.format.cluster_size() == 1 {
            LockRequest::ReadShared
        } else {
            LockRequest::ReadStable
        };
        file.lock(if write { LockRequest::Write } else { read }).await
    }

    /// Reads `buf.len()` bytes at `offset` (bytes) into `buf`, below the hooks and without a claim.
    pub fn read(self: &Rc<Self>, offset: u64, buf: Buf, origin: Origin) -> Receipt {
        request::read(Rc::clone(self), offset, buf, origin)
    }

    /// Writes `buf` at `offset` (bytes) through the node's write path.
    pub fn write(
        self: &Rc<Self>,
        offset: u64,
        buf: Buf,
        flags: WriteFlags,
        origin: Origin,
    ) -> Receipt {
        request::write(Rc::clone(self), offset, buf, flags, origin)
    }

    /// Makes the range read as zeroes through the node's write path.
    pub fn write_zeroes(
        self: &Rc<Self>,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
        origin: Origin,
    ) -> Receipt {
        request::write_zeroes(Rc::clone(self), offset, len, flags, origin)
    }

    /// Gives the range's space back where the node's options allow; what is given back reads as
    /// zeroes.
    pub fn discard(self: &Rc<Self>, offset: u64, len: u64, origin: Origin) -> Receipt {
        request::discard(Rc::clone(self), offset, len, origin)
    }

    /// Makes all writes that were answered before the call durable.
    pub fn flush(self: &Rc<Self>, origin: Origin) -> Receipt {
        request::flush(Rc::clone(self), origin)
    }

    /// What the range holds; runs cover it in order.
    pub fn block_status(
        self: &Rc<Self>,
        offset: u64,
        len: u64,
    ) -> JoinHandle<Result<Vec<StatusExtent>>> {
        request::block_status(Rc::clone(self), offset, len, Origin::External)
    }

    /// As [`Node::block_status`], past the gate: for somebody whom a drain may wait for.
    pub fn derived_status(
        self: &Rc<Self>,
        offset: u64,
        len: u64,
    ) -> JoinHandle<Result<Vec<StatusExtent>>> {
        request::block_status(Rc::clone(self), offset, len, Origin::Derived)
    }

    /// Where the range lies on the host; runs cover it in order.
    pub fn map(self: &Rc<Self>, offset: u64, len: u64) -> JoinHandle<Result<Vec<MapExtent>>> {
        request::map(Rc::clone(self), offset, len)
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Node({} '{}', {})", self.id.0, self.name, self.layer.format.driver())
    }
}
