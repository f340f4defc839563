//! What a job holds of a section of one chain, and how it gives it back.
//!
//! A section is the nodes from one that stays (stream: the node; commit: the top) down to the last
//! whose content moves. While a job has it nobody else drops or relinks these nodes, and nobody
//! uses those whose content means nothing for a while.
//!
//! Order of the end: uses of the job -> links need again what they needed -> nodes that were made
//! writable become what their users asked for. Whoever drops the section unended ends it in the
//! background; copies in flight keep it, so a target that hangs stays in use and says so.

use std::cell::RefCell;
use std::future::Future;
use std::path::PathBuf;
use std::rc::Rc;

use liveblk_engine::executor::Class;
use liveblk_engine::executor::sync::{Either, select};
use liveblk_engine::format::BackingRef;
use liveblk_engine::graph::{Graph, Retired};
use liveblk_engine::node::{KeptWritable, Node, Permissions, Role, User, UserGuard};

use crate::copy::Copy;
use crate::error::{JobError, Result};
use crate::job::Job;
use crate::limits::{RETIRE_WAIT_NS, SECTION_WAIT_NS};
use crate::manager::JobManager;
use crate::read_only::become_read_only;
use crate::start::LastStep;

/// See the module.
pub(crate) struct Section {
    graph: Rc<Graph>,
    held: RefCell<Held>,
}

#[derive(Default)]
struct Held {
    uses: Vec<UserGuard>,
    /// Overlays whose need of their backing node the job vouches for.
    vouched: Vec<Rc<Node>>,
    writable: Vec<(Rc<Node>, KeptWritable)>,
}

impl Section {
    pub(crate) fn new(graph: &Rc<Graph>) -> Rc<Self> {
        Rc::new(Self { graph: Rc::clone(graph), held: RefCell::default() })
    }

    /// Takes `node` into use.
    pub(crate) fn take(
        &self,
        job: &Job,
        node: &Rc<Node>,
        role: Role,
        with: Permissions,
    ) -> Result<()> {
        let user = User::Job { id: Rc::clone(job.id()), kind: job.kind().name(), role };
        let guard = self.graph.use_node(node, user, with)?;
        self.held.borrow_mut().uses.push(guard);
        Ok(())
    }

    /// An overlay was put above the source: it is the source now, and `from` lies between. Memory
    /// only; the overlay is vouched for.
    pub(crate) fn put_on_top(&self, job: &Job, from: &Rc<Node>, to: &Rc<Node>) -> Result<()> {
        let of_source = |held: &UserGuard| held.is_use_of(from);
        let old: Vec<_> =
            self.held.borrow_mut().uses.extract_if(.., |held| of_source(held)).collect();
        let carried = old.iter().map(|held| Node::carry_use(to, held));
        self.held.borrow_mut().uses.extend(carried);
        drop(old);
        let shared = Permissions::WRITE_UNCHANGED;
        self.take(job, from, Role::Between, Permissions { perm: 0, shared })
    }

    /// What lies below `overlay` may change: it does not show.
    pub(crate) fn vouch_for(&self, overlay: &Rc<Node>) {
        self.graph.set_backing_permissions(overlay, Permissions::none());
        self.held.borrow_mut().vouched.push(Rc::clone(overlay));
    }

    /// Makes `node` writable for as long as the section is held.
    pub(crate) async fn keep_writable(&self, node: &Rc<Node>) -> Result<()> {
        let kept = node.keep_writable().await?;
        self.held.borrow_mut().writable.push((Rc::clone(node), kept));
        Ok(())
    }

    /// The content of the section is elsewhere: nodes that are left over mean nothing.
    pub(crate) fn give_up_uses(&self, stale: &[Rc<Node>]) {
        let mut held = self.held.borrow_mut();
        held.uses.clear();
        // Whoever still lies above the base that way is of no use, and must not be in the way.
        held.vouched.clear();
        stale.iter().for_each(|node| node.set_stale());
    }

    /// Ends the section; a second time does nothing.
    pub(crate) async fn end(&self) {
        let held = self.held.take();
        held.end(&self.graph).await;
    }
}

impl Held {
    fn is_empty(&self) -> bool {
        self.uses.is_empty() && self.vouched.is_empty() && self.writable.is_empty()
    }

    async fn end(self, graph: &Graph) {
        drop(self.uses);
        for overlay in self.vouched {
            graph.set_backing_permissions(&overlay, Permissions::of_overlay());
        }
        for (node, kept) in self.writable {
            let ended = kept.end().await;
            if ended.is_err() {
                // What it did not take cannot be forgotten; nobody writes to it any more.
                become_read_only(&node, Some(ended)).await;
            }
        }
    }
}

impl Drop for Section {
    fn drop(&mut self) {
        let held = self.held.take();
        if held.is_empty() {
            return;
        }
        let (graph, core) = (Rc::clone(&self.graph), self.graph.core().clone());
        drop(core.spawn(Class::Background, async move { held.end(&graph).await }));
    }
}

impl Copy {
    /// The section of a chain that the copies work on, if that is what they hold.
    pub(crate) fn section(&self) -> Option<Rc<Section>> {
        self.hold().and_then(|hold| hold.downcast().ok())
    }
}

/// The nodes from `node` down, itself first.
pub(crate) fn chain_of(node: &Rc<Node>) -> Vec<Rc<Node>> {
    let mut nodes = vec![Rc::clone(node)];
    while let Some(below) = nodes.last().and_then(|last| last.backing()) {
        nodes.push(below);
    }
    nodes
}

/// Refuses nodes that another job has for itself.
pub(crate) fn check_section(manager: &JobManager, nodes: &[Rc<Node>]) -> Result<()> {
    for node in nodes {
        let user = manager.section_user(node.id()).or_else(|| manager.target_user(node.id()));
        if let Some(kind) = user {
            return Err(JobError::BusyWithJob { node: (*node.name()).into(), kind: kind.name() });
        }
    }
    Ok(())
}

/// Runs the work of a job; if it fails, ends what the job holds before anybody hears of it, unless
/// that takes long.
pub(crate) async fn with_section(
    section: Rc<Section>,
    copy: Rc<Copy>,
    work: impl Future<Output = Result<Option<LastStep>>>,
) -> Result<Option<LastStep>> {
    let result = work.await;
    if result.is_err() {
        copy.kill();
        let job = copy.job();
        let landed = job.changed().until(|| copy.has_landed());
        if let Either::First(()) = select(landed, job.core().sleep(SECTION_WAIT_NS)).await {
            let core = job.core().clone();
            let end = core.spawn(Class::Background, async move { section.end().await });
            let _: Either<(), ()> = select(end, core.sleep(SECTION_WAIT_NS)).await;
        }
    }
    result
}

/// The reference that a header gets for `base`: the string that the user wants there, or the name
/// of the file as it was opened.
pub(crate) fn reference_to(base: &Node, string: Option<&str>, mask_protocol: bool) -> BackingRef {
    let format = if mask_protocol && base.driver() == "file" { "raw" } else { base.driver() };
    BackingRef {
        file: string.map_or_else(|| base.filename(), str::to_owned),
        format: Some(format.to_owned()),
    }
}

/// Writes `reference` into the header of `node`, durably and after everything that it relies on.
pub(crate) async fn write_reference(node: &Rc<Node>, reference: Option<BackingRef>) -> Result<()> {
    if let Some(reference) = &reference {
        let graph = Graph::of(node.core());
        graph.know_reference(PathBuf::from(node.filename()), reference.clone());
    }
    Ok(node.format().set_backing(reference).await?)
}

/// Waits until requests have left the old paths, then closes what nobody uses any more of the
/// chain below and including `dropped`. Where old requests hang, that is left to a task.
pub(crate) async fn close_dropped(
    graph: &Rc<Graph>,
    retired: Option<Retired>,
    dropped: Option<Rc<Node>>,
) {
    let core = graph.core().clone();
    let graph = Rc::clone(graph);
    let work = core.spawn(Class::Background, async move {
        if let Some(retired) = retired {
            retired.gone().await;
        }
        let Some(dropped) = dropped else { return };
        if let Err(error) = graph.remove_if_unused(&dropped).await {
            tracing::warn!(%error, "closing a layer that is not needed any more");
        }
    });
    let _: Either<(), ()> = select(work, core.sleep(RETIRE_WAIT_NS)).await;
}
