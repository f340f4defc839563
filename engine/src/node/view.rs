//! Nodes that are no images: filters, which pass requests on to the node below, and views, which
//! show something else of it (a snapshot that is being fleeced).
//!
//! A filter never has requests of its own: whoever attaches to it, or asks it, is served by the
//! node below, whose hooks do the filter's work. So adding or removing one moves no guest. A view
//! answers reads, block status and discards itself and takes no other writes.

use std::any::Any;
use std::rc::Rc;

use super::object::Node;
use super::status::StatusExtent;
use crate::address::GuestRange;
use crate::buf::Buf;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Abilities, BackingRef, Extent, Extents, Format, ImageInfo, LocalFuture, Mapping, MissId,
    PackedCluster, Resize, WriteStep, ZeroMode, ZeroStep,
};
use crate::lease::Lease;
use crate::storage::Storage;

/// What a node is that holds no image.
///
/// Duties of the implementer: reads of any range inside the size; no call blocks a drain of the
/// node below (its reads there are of derived origin). Never called: `read`, `status`, `discard` of
/// a filter.
pub trait View {
    /// The driver's name in QMP.
    fn driver(&self) -> &'static str;

    /// The node below; size, options and file name are its own.
    fn below(&self) -> &Rc<Node>;

    /// Whether requests go to the node below as they are.
    fn is_filter(&self) -> bool;

    /// Reads `range` into `buf` (of the same length).
    fn read(self: Rc<Self>, range: GuestRange, buf: Buf) -> LocalFuture<'static, Result<()>>;

    /// What `range` holds; runs cover it in order.
    fn status(self: Rc<Self>, range: GuestRange)
    -> LocalFuture<'static, Result<Vec<StatusExtent>>>;

    /// The user does not need `range` any more.
    fn discard(self: Rc<Self>, range: GuestRange) -> LocalFuture<'static, Result<()>>;

    /// The node goes away: everything it did to other nodes is undone when the future ends.
    fn close(&self) -> LocalFuture<'_, Result<()>>;

    /// For whoever made it.
    fn any(&self) -> &dyn Any;
}

/// A view in the place of an image.
pub(crate) struct ViewFormat(pub(crate) Rc<dyn View>);

impl ViewFormat {
    fn below(&self) -> &Rc<dyn Format> {
        self.0.below().format()
    }

    fn refused<T>(&self, op: &'static str) -> Result<T> {
        Err(Error::new(ErrorKind::Unsupported, op))
    }
}

impl Format for ViewFormat {
    fn driver(&self) -> &'static str {
        self.0.driver()
    }

    fn size(&self) -> u64 {
        self.below().size()
    }

    fn cluster_size(&self) -> u64 {
        if self.0.is_filter() { self.below().cluster_size() } else { 1 }
    }

    fn subcluster_size(&self) -> u64 {
        if self.0.is_filter() { self.below().subcluster_size() } else { 1 }
    }

    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    fn data_storage(&self) -> &Storage {
        self.below().data_storage()
    }

    /// Only asked for an image above a view, which then cannot be read.
    fn resolve(&self, range: GuestRange, extents: &mut Extents) -> Option<Lease> {
        let error = Error::new(ErrorKind::Unsupported, "read through a view as a backing file");
        extents.push(Extent { len: range.len, mapping: Mapping::Damaged(error) });
        None
    }

    fn lease(&self) -> Option<Lease> {
        None
    }

    fn load(&self, _: MissId) -> LocalFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn has_holes(&self) -> LocalFuture<'_, Result<bool>> {
        Box::pin(async { Ok(false) })
    }

    fn read_compressed(&self, _: PackedCluster) -> LocalFuture<'static, Result<Buf>> {
        Box::pin(async { Err(Error::new(ErrorKind::Unsupported, "unpack")) })
    }

    fn begin_write(&self, _: GuestRange) -> Result<WriteStep> {
        self.refused("write")
    }

    fn begin_zero(&self, _: GuestRange, _: ZeroMode) -> Result<ZeroStep> {
        self.refused("write zeroes")
    }

    fn pending(&self, _: MissId) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn resize_with(&self, _: Resize) -> LocalFuture<'_, Result<()>> {
        Box::pin(async { Err(Error::new(ErrorKind::Unsupported, "resize")) })
    }

    fn set_writable(&self, _: bool) -> LocalFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn info(&self) -> ImageInfo {
        let below = self.below().info();
        let cluster_size = below.cluster_size.filter(|_| self.0.is_filter());
        ImageInfo { virtual_size: below.virtual_size, cluster_size, ..ImageInfo::default() }
    }

    fn set_backing(&self, _: Option<BackingRef>) -> LocalFuture<'_, Result<()>> {
        Box::pin(async { Err(Error::new(ErrorKind::Unsupported, "change the backing file")) })
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        self.0.close()
    }
}

impl Node {
    /// What the node is if it holds no image.
    pub fn view(&self) -> Option<&Rc<dyn View>> {
        self.view.as_ref()
    }

    /// The node that serves requests: this one, or the one below the filters.
    pub fn served(self: &Rc<Self>) -> Rc<Self> {
        let mut node = Rc::clone(self);
        while let Some(below) = node.filtered() {
            node = below;
        }
        node
    }

    /// The node below, if this one is a filter.
    pub fn filtered(&self) -> Option<Rc<Self>> {
        let view = self.view.as_ref().filter(|view| view.is_filter())?;
        Some(Rc::clone(view.below()))
    }
}
