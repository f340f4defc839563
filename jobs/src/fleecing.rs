//! Image fleecing: the content of a disk at an instant, kept by copy-before-write and read while
//! guests go on writing.
//!
//! Two kinds of nodes. A *copy-before-write* filter stands above the disk and keeps, in a target,
//! what guests overwrite; every backup shows one, and clients add their own. A *snapshot-access*
//! view above a filter reads the instant: from the target what was kept, from the disk the rest.
//!
//! Order rules of a read of the snapshot: (1) what is being kept now is waited for; (2) what is
//! still on the disk is read under a mark that holds guests back from overwriting it; (3) the rest
//! is read from the target. The block status follows the same rules and tells the whole chain, so
//! that nothing the chain holds is taken for a hole.
//!
//! A filter needs no cut of anything but the disk it stands on, and moves no guest.

use std::any::Any;
use std::cell::RefCell;
use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::buf::Buf;
use liveblk_engine::executor::Core;
use liveblk_engine::format::LocalFuture;
use liveblk_engine::graph::{Graph, NewView, Swap, cut};
use liveblk_engine::node::{
    Node, NodeId, Origin, Permissions, Role, StatusExtent, StatusKind, User, UserGuard, View,
    WriteHook,
};
use liveblk_engine::{Error, ErrorKind};

use crate::backup::CopyBeforeWrite;
use crate::beside::check_beside;
use crate::copy::{BeforeWrite, Bounds, Copy, CopySetup, Piece};
use crate::error::{JobError, Result};
use crate::event::Kind;
use crate::limits::{BACKUP_GRANULE_MIN, CUT_WAIT_NS};
use crate::manager::JobManager;
use crate::spec::OnCbwError;
use crate::start::{HookSlot, check_target, cut_of};
use crate::txn::JobTxn;

type EngineResult<T> = liveblk_engine::Result<T>;

/// A copy-before-write filter to be added.
pub struct CopyBeforeWriteSpec {
    /// Node name.
    pub name: Option<String>,
    /// The disk whose instant is kept.
    pub source: Rc<Node>,
    /// Where old content goes.
    pub target: Rc<Node>,
    /// A node that was opened for the filter and goes with it.
    pub owned: Option<Rc<Node>>,
    /// What is kept; everything if absent. The rest cannot be read.
    pub bitmap: Option<DirtyBitmap>,
    /// Who suffers when old content cannot be kept.
    pub on_error: OnCbwError,
    /// Nanoseconds that a guest waits before that counts as a failure.
    pub timeout_ns: Option<u64>,
    /// Least bytes of a unit; a power of two.
    pub min_cluster_size: u64,
}

/// The filter node of a job or of a client.
struct Filter {
    driver: &'static str,
    below: Rc<Node>,
    /// What it keeps; a mirror's filter keeps nothing that can be read.
    copy: Option<Rc<Copy>>,
    /// Of a client's filter: its hook.
    slot: RefCell<Option<Rc<HookSlot>>>,
    /// Whether a job made it, which also ends it.
    of_job: bool,
}

/// The filter node that queries show for a job; gone when dropped.
pub(crate) struct JobFilter {
    graph: Rc<Graph>,
    id: NodeId,
}

impl JobFilter {
    /// Shows a filter called `name` above the source of `copy`.
    pub(crate) fn add(kind: Kind, copy: &Rc<Copy>, name: Option<&str>) -> Result<Self> {
        let driver = match kind {
            Kind::Backup => "copy-before-write",
            Kind::Stream => "copy-on-read",
            // An active commit is a mirror, for the peer.
            Kind::Commit if !copy.job().is_active_commit() => "commit_top",
            _ => "mirror_top",
        };
        let kept = (kind == Kind::Backup).then(|| Rc::clone(copy));
        Self::above(copy.source(), driver, kept, name)
    }

    fn above(
        below: Rc<Node>,
        driver: &'static str,
        copy: Option<Rc<Copy>>,
        name: Option<&str>,
    ) -> Result<Self> {
        let graph = Graph::of(below.core());
        let discard_unmap = below.options().discard_unmap;
        let filter = Filter { driver, below, copy, slot: RefCell::new(None), of_job: true };
        let node = graph.add_view(NewView {
            name: name.map(str::to_owned),
            view: Rc::new(filter),
            uses: Vec::new(),
            owned: None,
            monitor_owned: false,
            discard_unmap,
        })?;
        Ok(Self { graph, id: node.id() })
    }

    /// The same filter above `node`; a name that was generated is another one then.
    pub(crate) fn moved_above(self, node: &Rc<Node>) -> Option<Self> {
        let old = self.graph.node(self.id)?;
        let (driver, copy) = filter_of(&old).map(|filter| (filter.driver, filter.copy.clone()))?;
        drop(self);
        let name = Some(old.name()).filter(|name| !name.starts_with('#'));
        let moved = Self::above(Rc::clone(node), driver, copy, name.as_deref());
        moved.inspect_err(|error| tracing::error!(%error, "the filter of a job is gone")).ok()
    }
}

impl Drop for JobFilter {
    fn drop(&mut self) {
        self.graph.forget_view(self.id);
    }
}

/// The filter that a job shows above `node`, the newest if there are several.
pub fn job_filter_above(graph: &Graph, node: NodeId) -> Option<Rc<Node>> {
    let of_job = |node: &Rc<Node>| filter_of(node).is_some_and(|filter| filter.of_job);
    graph.filters_above(node).into_iter().find(of_job)
}

/// Whether `node` is the filter of a job: it goes with the job only.
pub fn is_job_filter(node: &Node) -> bool {
    filter_of(node).is_some_and(|filter| filter.of_job)
}

fn filter_of(node: &Node) -> Option<&Filter> {
    node.view()?.any().downcast_ref::<Filter>()
}

/// Adds a copy-before-write filter above a disk, while guests write to it: when the future ends
/// well, the instant that it keeps is in the past.
///
/// # Errors
/// What cannot work; nothing is left then.
pub async fn add_copy_before_write(spec: CopyBeforeWriteSpec) -> Result<Rc<Node>> {
    let core = spec.source.core().clone();
    let graph = Graph::of(&core);
    if let Some(name) = &spec.name {
        graph.check_name(name)?;
    }
    let (source, target) = (spec.source.size(), spec.target.size());
    if spec.source.id() == spec.target.id() {
        return Err(JobError::SameNode { verb: "backup" });
    }
    if source != target {
        return Err(JobError::SizesDifferBytes { source, target });
    }
    let manager = JobManager::of(&core);
    check_beside(&manager, &spec.source, Kind::Backup, false, &JobTxn::new())?;
    check_target(&manager, &spec.target)?;
    let name: Rc<str> = spec.name.as_deref().unwrap_or("copy-before-write").into();
    let uses = uses_of(&spec, &name)?;
    let copy = keeper(&manager, &spec, &name);
    let hook: Rc<dyn WriteHook> = Rc::new(CopyBeforeWrite(Rc::clone(&copy)));
    let slot = HookSlot::new(&spec.source, hook);
    let filter = Filter {
        driver: "copy-before-write",
        below: Rc::clone(&spec.source),
        copy: Some(Rc::clone(&copy)),
        slot: RefCell::new(Some(Rc::clone(&slot))),
        of_job: false,
    };
    let node = graph.add_view(NewView {
        name: spec.name.clone(),
        view: Rc::new(filter),
        uses,
        owned: spec.owned.clone(),
        monitor_owned: true,
        discard_unmap: spec.source.options().discard_unmap,
    })?;
    let part = cut_of(&spec.source, Swap::Local(Box::new(move |_| slot.install())));
    if let Err(error) = cut(&core, vec![part], CUT_WAIT_NS).await {
        copy.kill();
        graph.forget_view(node.id());
        return Err(error.into());
    }
    Ok(node)
}

/// The copies of a client's filter: those of a backup without a background loop, by a job that
/// nobody sees.
fn keeper(manager: &Rc<JobManager>, spec: &CopyBeforeWriteSpec, name: &str) -> Rc<Copy> {
    let overlay = shows(&spec.target, &spec.source);
    if overlay {
        spec.target.watch_reads();
    }
    let least = spec.min_cluster_size.max(BACKUP_GRANULE_MIN);
    let copy = Copy::new(CopySetup {
        job: manager.hidden_job(name),
        source: Rc::clone(&spec.source),
        target: Rc::clone(&spec.target),
        granularity: spec.target.cluster_size().max(least),
        all_dirty: spec.bitmap.is_none(),
        whole_granules: true,
        compress: false,
        keeps_bytes: true,
        discard_source: false,
        spill: None,
        shares: false,
        before: BeforeWrite { on_error: spec.on_error, timeout_ns: spec.timeout_ns, overlay },
        bounds: Bounds::default(),
        hold: Rc::new(()),
    });
    if let Some(bitmap) = &spec.bitmap {
        copy.restrict_to(bitmap);
    }
    copy
}

fn uses_of(spec: &CopyBeforeWriteSpec, name: &Rc<str>) -> Result<Vec<UserGuard>> {
    let user = |role| User::Filter { node: Rc::clone(name), role };
    let shared = Permissions::ALL & !Permissions::RESIZE;
    let read = Permissions { perm: Permissions::CONSISTENT_READ, shared };
    let write = Permissions { perm: Permissions::WRITE, shared };
    Ok(vec![
        Node::use_by(&spec.source, user(Role::Source), read)?,
        Node::use_by(&spec.target, user(Role::Target), write)?,
    ])
}

/// Whether `target` shows `source` where it has nothing itself.
pub(crate) fn shows(target: &Rc<Node>, source: &Rc<Node>) -> bool {
    let mut below = target.backing();
    while let Some(node) = below {
        if node.served().id() == source.id() {
            return true;
        }
        below = node.backing();
    }
    false
}

impl View for Filter {
    fn driver(&self) -> &'static str {
        self.driver
    }

    fn below(&self) -> &Rc<Node> {
        &self.below
    }

    fn is_filter(&self) -> bool {
        true
    }

    fn read(self: Rc<Self>, range: GuestRange, buf: Buf) -> LocalFuture<'static, EngineResult<()>> {
        let below = Rc::clone(&self.below);
        Box::pin(async move { below.read(range.start.bytes(), buf, Origin::External).await })
    }

    fn status(
        self: Rc<Self>,
        range: GuestRange,
    ) -> LocalFuture<'static, EngineResult<Vec<StatusExtent>>> {
        let below = Rc::clone(&self.below);
        Box::pin(async move { below.block_status(range.start.bytes(), range.len).await })
    }

    fn discard(self: Rc<Self>, range: GuestRange) -> LocalFuture<'static, EngineResult<()>> {
        let below = Rc::clone(&self.below);
        Box::pin(
            async move { below.discard(range.start.bytes(), range.len, Origin::External).await },
        )
    }

    fn close(&self) -> LocalFuture<'_, EngineResult<()>> {
        Box::pin(async move {
            let slot = self.slot.take();
            if let (Some(slot), Some(copy)) = (slot, &self.copy) {
                copy.kill();
                slot.remove_in_cut().await;
            }
            Ok(())
        })
    }

    fn any(&self) -> &dyn Any {
        self
    }
}

/// The view of an instant.
struct SnapshotAccess {
    below: Rc<Node>,
    copy: Option<Rc<Copy>>,
}

/// Adds a snapshot-access node above `filter`. (As in the peer one above any other node can be
/// added; it cannot be read.)
///
/// # Errors
/// If the name is malformed, too long or in use.
pub fn add_snapshot_access(
    core: &Core,
    name: Option<&str>,
    filter: &Rc<Node>,
    discard_unmap: bool,
) -> Result<Rc<Node>> {
    let copy = filter_of(filter).and_then(|filter| filter.copy.clone());
    let user = User::Filter { node: name.unwrap_or_default().into(), role: Role::Source };
    // The instant stays as it is, whoever writes.
    let any = Permissions { perm: 0, shared: Permissions::ALL };
    // A job's filter goes with the job, whoever looks at it.
    let uses = match filter_of(filter) {
        Some(filter) if filter.of_job => Vec::new(),
        _ => vec![Node::use_by(filter, user, any)?],
    };
    let view = SnapshotAccess { below: filter.served(), copy };
    let node = Graph::of(core).add_view(NewView {
        name: name.map(str::to_owned),
        view: Rc::new(view),
        uses,
        owned: None,
        monitor_owned: true,
        discard_unmap,
    })?;
    Ok(node)
}

impl SnapshotAccess {
    fn copy(&self) -> EngineResult<Rc<Copy>> {
        self.copy.clone().ok_or_else(|| Error::new(ErrorKind::Unsupported, "read the snapshot"))
    }
}

impl View for SnapshotAccess {
    fn driver(&self) -> &'static str {
        "snapshot-access"
    }

    fn below(&self) -> &Rc<Node> {
        &self.below
    }

    fn is_filter(&self) -> bool {
        false
    }

    fn read(self: Rc<Self>, range: GuestRange, buf: Buf) -> LocalFuture<'static, EngineResult<()>> {
        Box::pin(async move { read(&self.copy()?, range, &buf).await })
    }

    fn status(
        self: Rc<Self>,
        range: GuestRange,
    ) -> LocalFuture<'static, EngineResult<Vec<StatusExtent>>> {
        Box::pin(async move { status(&self.copy()?, range).await })
    }

    fn discard(self: Rc<Self>, range: GuestRange) -> LocalFuture<'static, EngineResult<()>> {
        Box::pin(async move { discard(&self.copy()?, range).await })
    }

    fn close(&self) -> LocalFuture<'_, EngineResult<()>> {
        Box::pin(async { Ok(()) })
    }

    fn any(&self) -> &dyn Any {
        self
    }
}

/// The next piece of the snapshot at or after `at` that is not being kept just now.
async fn next_piece(copy: &Rc<Copy>, at: u64, end: u64) -> EngineResult<Piece> {
    loop {
        let changed = copy.job().changed().wait();
        copy.check_snapshot()?;
        match copy.piece(at, end) {
            Some(Piece::Refused) => {
                let refused = Error::new(ErrorKind::PolicyRefused, "read the snapshot");
                return Err(refused.at(at));
            }
            Some(piece) => return Ok(piece),
            None => changed.await,
        }
    }
}

async fn read(copy: &Rc<Copy>, range: GuestRange, buf: &Buf) -> EngineResult<()> {
    let (start, end) = (range.start.bytes(), range.end().bytes());
    let mut at = start;
    while at < end {
        let piece = next_piece(copy, at, end).await?;
        let run = piece.range();
        let from = usize::try_from(at - start).unwrap_or(usize::MAX);
        let len = usize::try_from(run.len).unwrap_or(usize::MAX);
        let part = buf.slice(from..from + len);
        match piece {
            Piece::Source(_) => {
                let reading = copy.begin_reading(run);
                copy.source().read(at, part, Origin::Derived).await?;
                drop(reading);
            }
            Piece::Kept(_) => copy.read_kept(run, part).await?,
            _ => copy.target().read(at, part, Origin::Derived).await?,
        }
        at += run.len;
    }
    copy.check_snapshot()
}

async fn status(copy: &Rc<Copy>, range: GuestRange) -> EngineResult<Vec<StatusExtent>> {
    let (mut at, end) = (range.start.bytes(), range.end().bytes());
    let mut runs: Vec<StatusExtent> = Vec::new();
    while at < end {
        let piece = next_piece(copy, at, end).await?;
        let len = piece.range().len;
        let found = match piece {
            Piece::Kept(_) => {
                vec![StatusExtent { len, kind: StatusKind::Data, depth: 0, absent: false }]
            }
            Piece::Source(run) => {
                let reading = copy.begin_reading(run);
                let found = copy.source().derived_status(at, len).await?;
                drop(reading);
                found
            }
            _ => copy.target().derived_status(at, len).await?,
        };
        // The view is one layer, whatever lies below it.
        for run in found {
            match runs.last_mut() {
                Some(last) if last.kind == run.kind => last.len += run.len,
                _ => runs.push(StatusExtent { depth: 0, ..run }),
            }
        }
        at += len;
    }
    copy.check_snapshot()?;
    Ok(runs)
}

/// Whole granules of `range` are not needed any more: guests overwrite them freely, and what was
/// kept of them is given back.
async fn discard(copy: &Rc<Copy>, range: GuestRange) -> EngineResult<()> {
    copy.check_snapshot()?;
    let Some(inner) = copy.whole_granules_in(range) else { return Ok(()) };
    let mut at = inner.start.bytes();
    while at < inner.end().bytes() {
        at += next_piece(copy, at, inner.end().bytes()).await?.range().len;
    }
    copy.forget(inner);
    copy.target().discard(inner.start.bytes(), inner.len, Origin::Derived).await
}
