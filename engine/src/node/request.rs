//! Requests on a node as tasks: admission, claim, hooks, transfer, in the order of the module
//! header.

use std::rc::Rc;

use super::account::{Counting, Work};
use super::attachment::Attachment;
use super::gate::Pass;
use super::hooks::WriteContent;
use super::map::{self, MapExtent};
use super::object::{DetectZeroes, Node};
use super::packed;
use super::status::{self, StatusExtent};
use super::transfer;
use crate::address::GuestRange;
use crate::buf::{Buf, Pool};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::{Class, JoinHandle};
use crate::format::ZeroMode;

/// The right to learn how a request ended. The request runs to its end also without it.
pub type Receipt = JoinHandle<Result<()>>;

/// Who causes a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A guest, a job or an embedder: waits at the gate.
    External,
    /// An admitted request of another node (copy-before-write): passes the gate, because the
    /// drain waits for the request that caused it.
    Derived,
}

/// How data is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// Data and mapping are durable when the request is answered.
    pub fua: bool,
    /// Store whole clusters compressed; what covers a cluster only in part, and what does not get
    /// smaller, is stored as it is. `Unsupported` where [`Node::can_compress`] says no.
    pub compressed: bool,
}

/// How zeroes are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// Space may be given back.
    pub may_unmap: bool,
    /// Durable when the request is answered.
    pub fua: bool,
    /// Fail with `Unsupported` instead of writing zero bytes.
    pub fast: bool,
}

/// What a request acts on: a node itself, or whatever an attachment points to when it is admitted.
pub(super) enum Target {
    Node(Rc<Node>, Origin),
    Attachment(Rc<Attachment>),
}

/// A node and the pass that keeps it from being cut.
pub(super) struct Admitted {
    pub(super) node: Rc<Node>,
    _pass: Option<Pass>,
}

impl Target {
    /// Has a guest's write wait as long as jobs say; over before the gate, so that no cut waits for
    /// it.
    async fn throttle(&self) {
        if let Self::Attachment(attachment) = self
            && attachment.may_be_delayed()
        {
            attachment.node().hooks.delay_guest().await;
        }
    }

    pub(super) async fn admit(self) -> Admitted {
        match self {
            Self::Node(node, Origin::Derived) => Admitted { node: node.served(), _pass: None },
            Self::Node(node, Origin::External) => loop {
                let node = node.served();
                if let Some(pass) = node.gate.try_pass() {
                    return Admitted { node, _pass: Some(pass) };
                }
                node.gate.opened().await;
            },
            Self::Attachment(attachment) => loop {
                // The node is looked up again after each wait: a cut may have moved the attachment.
                let node = attachment.node();
                if let Some(pass) = node.gate.try_pass() {
                    return Admitted { node, _pass: Some(pass) };
                }
                node.gate.opened().await;
            },
        }
    }
}

fn checked(node: &Node, offset: u64, len: u64, op: &'static str) -> Result<GuestRange> {
    match offset.checked_add(len) {
        Some(end) if end <= node.size() => Ok(GuestRange::new(offset, len)),
        _ => Err(Error::new(ErrorKind::OutOfRange, op).on(&node.name()).at(offset)),
    }
}

pub(super) fn checked_write(
    node: &Node,
    offset: u64,
    len: u64,
    op: &'static str,
) -> Result<GuestRange> {
    if !node.is_writable() {
        return Err(Error::new(ErrorKind::ReadOnly, op).on(&node.name()));
    }
    checked(node, offset, len, op)
}

pub(super) fn start_read(
    target: Target,
    core: &crate::executor::Core,
    offset: u64,
    buf: Buf,
) -> Receipt {
    core.spawn(Class::Guest, async move {
        let admitted = target.admit().await;
        let node = &admitted.node;
        let mut counting = Counting::admitted(node, Work::Read, buf.len() as u64);
        let range = checked(node, offset, buf.len() as u64, "read")?;
        counting.begun();
        if let Some(view) = node.view() {
            let read = Rc::clone(view).read(range, buf);
            read.await.map_err(|error| error.on(&node.name()))?;
            counting.done();
            return Ok(());
        }
        let path = node.path();
        transfer::read(&path, 0, range, &buf).await.map_err(|error| error.on(&node.name()))?;
        counting.done();
        Ok(())
    })
}

pub(super) fn start_write(
    target: Target,
    core: &crate::executor::Core,
    offset: u64,
    buf: Buf,
    flags: WriteFlags,
) -> Receipt {
    core.spawn(Class::Guest, async move {
        target.throttle().await;
        let admitted = target.admit().await;
        let node = &admitted.node;
        let mut counting = Counting::admitted(node, Work::Write, buf.len() as u64);
        let range = checked_write(node, offset, buf.len() as u64, "write")?;
        counting.begun();
        if range.is_empty() {
            counting.done();
            return Ok(());
        }
        node.watch.note(offset, range.len);
        let path = node.path();
        let pool = node.core().pool();
        // Only where data alone is the whole truth can the data write itself be made durable.
        let in_place = path.top().format.cluster_size() == 1 && !node.options().no_flush;
        let claim = node.claims.claim(range);
        claim.held().await;
        let hooks = node.hooks.current();
        hooks.before(range).await?;
        let buf = if hooks.copies_bytes() { stable(pool, buf) } else { buf };
        // What is looked at here is what is copied.
        let zeroes = zeroes_found(node, &buf, flags);
        let data_fua = flags.fua && in_place && zeroes.is_none();
        #[cfg(feature = "planted-bugs")]
        let claim =
            (!crate::planted::has(node.core(), crate::planted::Planted::ClaimReleasedEarly))
                .then_some(claim);
        let copies = hooks.begin_copies(range, WriteContent::Bytes(&buf));
        let result = match zeroes {
            Some(mode) => transfer::zero(&path, pool, range, mode, false).await,
            None if flags.compressed => packed::write(&path, pool, range, &buf).await,
            None => transfer::write(&path, pool, range, &buf, data_fua).await,
        };
        hooks.after(range, copies, result.is_ok()).await;
        node.bitmaps.record(range);
        drop(claim);
        result.map_err(|error| error.on(&node.name()))?;
        if flags.fua && !data_fua {
            flush_node(node).await?;
        }
        counting.done();
        Ok(())
    })
}

/// The same bytes in memory that nobody else changes.
fn stable(pool: &Pool, buf: Buf) -> Buf {
    if buf.is_stable() {
        return buf;
    }
    let copy = pool.alloc(buf.len());
    copy.copy_from_buf(&buf);
    copy
}

/// How a write is done as one of zeroes, where the node is to find them.
fn zeroes_found(node: &Node, buf: &Buf, flags: WriteFlags) -> Option<ZeroMode> {
    let options = node.options();
    let mode = match options.detect_zeroes {
        DetectZeroes::Off => return None,
        DetectZeroes::Unmap if options.discard_unmap => ZeroMode::Unmap,
        DetectZeroes::On | DetectZeroes::Unmap => ZeroMode::Keep,
    };
    (!flags.compressed && buf.is_zero()).then_some(mode)
}

pub(super) fn start_zero(
    target: Target,
    core: &crate::executor::Core,
    offset: u64,
    len: u64,
    mode: ZeroMode,
    flags: ZeroFlags,
) -> Receipt {
    let op = if mode == ZeroMode::Discard { "discard" } else { "write zeroes" };
    core.spawn(Class::Guest, async move {
        target.throttle().await;
        let admitted = target.admit().await;
        let node = &admitted.node;
        let work = if mode == ZeroMode::Discard { Work::Unmap } else { Work::Write };
        let mut counting = Counting::admitted(node, work, len);
        let range = checked_write(node, offset, len, op)?;
        counting.begun();
        let unmap = node.options().discard_unmap;
        if let (Some(view), ZeroMode::Discard, true) = (node.view(), mode, unmap) {
            let discard = Rc::clone(view).discard(range);
            discard.await.map_err(|error| error.on(&node.name()))?;
            counting.done();
            return Ok(());
        }
        let mode = match mode {
            ZeroMode::Discard if !unmap => {
                counting.done();
                return Ok(());
            }
            ZeroMode::Unmap if !unmap => ZeroMode::Keep,
            mode => mode,
        };
        if range.is_empty() {
            counting.done();
            return Ok(());
        }
        if mode != ZeroMode::Discard {
            node.watch.note(offset, len);
        }
        let path = node.path();
        let claim = node.claims.claim(range);
        claim.held().await;
        let hooks = node.hooks.current();
        hooks.before(range).await?;
        let content = match mode {
            ZeroMode::Keep => WriteContent::Zeroes { unmap: false },
            ZeroMode::Unmap => WriteContent::Zeroes { unmap: true },
            ZeroMode::Discard => WriteContent::Discard,
        };
        let copies = hooks.begin_copies(range, content);
        let result = transfer::zero(&path, node.core().pool(), range, mode, flags.fast).await;
        hooks.after(range, copies, result.is_ok()).await;
        record_zeroes(node, range);
        drop(claim);
        result.map_err(|error| error.on(&node.name()))?;
        if flags.fua {
            flush_node(node).await?;
        }
        counting.done();
        Ok(())
    })
}

/// Zeroes are a change of the disk like any other.
fn record_zeroes(node: &Node, range: GuestRange) {
    #[cfg(feature = "planted-bugs")]
    if crate::planted::has(node.core(), crate::planted::Planted::ZeroesUnrecorded) {
        return;
    }
    node.bitmaps.record(range);
}

pub(super) fn start_flush(target: Target, core: &crate::executor::Core) -> Receipt {
    core.spawn(Class::Guest, async move {
        let admitted = target.admit().await;
        let mut counting = Counting::admitted(&admitted.node, Work::Flush, 0);
        if !admitted.node.is_active() {
            // Another process has the image; nothing of it is ours to make durable.
            return Err(Error::new(ErrorKind::ReadOnly, "flush").on(&admitted.node.name()));
        }
        counting.begun();
        flush_node(&admitted.node).await?;
        counting.done();
        Ok(())
    })
}

async fn flush_node(node: &Rc<Node>) -> Result<()> {
    if node.options().no_flush || !node.is_writable() {
        return Ok(());
    }
    node.format().flush().await.map_err(|error| error.on(&node.name()))
}

pub(super) fn start_status(
    target: Target,
    core: &crate::executor::Core,
    offset: u64,
    len: u64,
) -> JoinHandle<Result<Vec<StatusExtent>>> {
    core.spawn(Class::Guest, async move {
        let admitted = target.admit().await;
        let node = &admitted.node;
        let range = checked(node, offset, len, "get block status")?;
        if let Some(view) = node.view() {
            let status = Rc::clone(view).status(range);
            return status.await.map_err(|error| error.on(&node.name()));
        }
        let path = node.path();
        status::status(&path, range).await.map_err(|error| error.on(&node.name()))
    })
}

pub(super) fn read(node: Rc<Node>, offset: u64, buf: Buf, origin: Origin) -> Receipt {
    let core = node.core().clone();
    start_read(Target::Node(node, origin), &core, offset, buf)
}

pub(super) fn write(
    node: Rc<Node>,
    offset: u64,
    buf: Buf,
    flags: WriteFlags,
    origin: Origin,
) -> Receipt {
    let core = node.core().clone();
    start_write(Target::Node(node, origin), &core, offset, buf, flags)
}

pub(super) fn write_zeroes(
    node: Rc<Node>,
    offset: u64,
    len: u64,
    flags: ZeroFlags,
    origin: Origin,
) -> Receipt {
    let core = node.core().clone();
    let mode = if flags.may_unmap { ZeroMode::Unmap } else { ZeroMode::Keep };
    start_zero(Target::Node(node, origin), &core, offset, len, mode, flags)
}

pub(super) fn discard(node: Rc<Node>, offset: u64, len: u64, origin: Origin) -> Receipt {
    let core = node.core().clone();
    let flags = ZeroFlags::default();
    start_zero(Target::Node(node, origin), &core, offset, len, ZeroMode::Discard, flags)
}

pub(super) fn flush(node: Rc<Node>, origin: Origin) -> Receipt {
    let core = node.core().clone();
    start_flush(Target::Node(node, origin), &core)
}

pub(super) fn block_status(
    node: Rc<Node>,
    offset: u64,
    len: u64,
    origin: Origin,
) -> JoinHandle<Result<Vec<StatusExtent>>> {
    let core = node.core().clone();
    start_status(Target::Node(node, origin), &core, offset, len)
}

pub(super) fn map(node: Rc<Node>, offset: u64, len: u64) -> JoinHandle<Result<Vec<MapExtent>>> {
    let core = node.core().clone();
    core.spawn(Class::Guest, async move {
        let admitted = Target::Node(node, Origin::External).admit().await;
        let node = &admitted.node;
        let range = checked(node, offset, len, "map")?;
        map::map(&node.path(), range).await.map_err(|error| error.on(&node.name()))
    })
}
