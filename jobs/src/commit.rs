//! Commit of intermediate layers: what they hold goes into a layer below, then they are dropped.
//!
//! Order rules:
//! 1. the base gets only what layers above it hold: as seen from the top nothing ever changes, so
//!    the job may end anywhere;
//! 2. when all is copied: the base durable -> the header of every overlay of the top refers to the
//!    base, durably -> the layers are unlinked in the graph (the content is the same before and
//!    after, nobody waits) -> requests on the old paths ended, layers closed -> event;
//! 3. the layers between mean nothing by themselves from the first copy on: nobody may use them.
//!
//! A base that is smaller than the top grows first; one that is larger, below an overlay that is
//! larger than the top, loses what the end of the top hid.

use std::rc::Rc;

use liveblk_engine::executor::Class;
use liveblk_engine::format::Preallocation;
use liveblk_engine::graph::Graph;
use liveblk_engine::node::{Node, Permissions, Role, User};

use crate::chain::{
    Section, chain_of, check_section, close_dropped, reference_to, with_section, write_reference,
};
use crate::chain_error::ChainError;
use crate::commit_active::prepare_active;
use crate::converge::Converge;
use crate::copy::{BeforeWrite, Bounds, Copy, CopySetup, Layers};
use crate::error::{JobError, Result};
use crate::event::Kind;
use crate::follow_error::FollowError;
use crate::job::Job;
use crate::manager::JobManager;
use crate::spec::{CopyMode, JobOptions};
use crate::start::{Body, HookSlot, LastStep, Prepared, check_active, show_filter};
use crate::txn::JobTxn;

/// A commit to be started.
#[derive(Clone)]
pub struct CommitSpec {
    /// Common options.
    pub job: JobOptions,
    /// The node at the head of the chain; nothing lies above it.
    pub device: Rc<Node>,
    /// The first layer that is committed; the device itself, or one that is written, makes the
    /// commit an active one.
    pub top: Rc<Node>,
    /// The layer that everything goes into.
    pub base: Rc<Node>,
    /// The string for the headers of the overlays instead of the base's file name.
    pub backing_file: Option<String>,
    /// Write the format "raw" where the base is a plain file.
    pub mask_protocol: bool,
    /// The name under which queries show the job's filter node.
    pub filter_name: Option<String>,
    /// Of an active commit: when guest writes reach the base.
    pub copy_mode: CopyMode,
    /// Of an active commit: be ready in time.
    pub converge: Option<Converge>,
}

impl CommitSpec {
    /// A commit of the layers from `top` on into `base`, below `device`, with the defaults.
    pub fn new(device: &Rc<Node>, top: &Rc<Node>, base: &Rc<Node>) -> Self {
        Self {
            job: JobOptions::new("commit"),
            device: Rc::clone(device),
            top: Rc::clone(top),
            base: Rc::clone(base),
            backing_file: None,
            mask_protocol: false,
            filter_name: None,
            copy_mode: CopyMode::Background,
            converge: None,
        }
    }

    /// The nodes from the top down to the base, both included.
    pub(crate) fn nodes(&self) -> Result<Vec<Rc<Node>>> {
        let mut nodes = chain_of(&self.top);
        let place = nodes.iter().position(|node| node.id() == self.base.id());
        let missing = || ChainError::NotInThisChain((*self.base.name()).into());
        match place.ok_or_else(missing)? {
            0 => Err(ChainError::IntoItself.into()),
            at => {
                nodes.truncate(at + 1);
                Ok(nodes)
            }
        }
    }

    /// Checks the places in the chain, and what cannot go together.
    ///
    /// # Errors
    /// What cannot work, with the peer's texts.
    pub fn check(&self) -> Result<()> {
        self.nodes()?;
        if self.is_active() && self.backing_file.is_some() {
            return Err(ChainError::ActiveLayer.into());
        }
        if !self.is_active() && self.copy_mode != CopyMode::Background {
            return Err(FollowError::NotActive("copy-mode").into());
        }
        if !self.is_active() && self.converge.is_some() {
            return Err(FollowError::NotActive("converge").into());
        }
        self.converge.map_or(Ok(()), |converge| converge.check())?;
        Ok(())
    }

    fn is_active(&self) -> bool {
        let written = |(_, with): &(User, Permissions)| with.perm & Permissions::WRITE != 0;
        self.top.id() == self.device.id() || self.top.uses().iter().any(written)
    }
}

/// Starts a commit.
///
/// # Errors
/// What cannot work, with the peer's texts; no job is left then.
pub async fn start_commit(spec: CommitSpec) -> Result<Rc<Job>> {
    prepare_commit(spec, &JobTxn::new()).await?.start().await
}

/// All of a start that comes before the job's task runs.
pub(crate) async fn prepare_commit(spec: CommitSpec, txn: &Rc<JobTxn>) -> Result<Prepared> {
    spec.check()?;
    let nodes = spec.nodes()?;
    check_active(&spec.device, "backing")?;
    if spec.is_active() {
        check_filter(&Graph::of(spec.top.core()), spec.filter_name.as_deref())?;
        return prepare_active(spec, nodes, txn).await;
    }
    let manager = JobManager::of(spec.top.core());
    let graph = Graph::of(spec.top.core());
    let mut held = graph.overlays(&spec.top);
    held.extend(nodes.iter().cloned());
    check_section(&manager, &held)?;
    let job = manager.create(Kind::Commit, spec.job.clone(), txn)?;
    job.set_section(held.iter().map(|node| node.id()).collect());
    let section = Section::new(&graph);
    let idle = vouch(&section, &graph, &nodes);
    // As the peer: a job between is announced before its filter's name is looked at.
    let named = check_filter(&graph, spec.filter_name.as_deref());
    let held = match named {
        Ok(()) => hold(&section, &job, &nodes, false).await,
        Err(error) => Err(error),
    };
    if let Err(error) = held {
        section.end().await;
        manager.withdraw(&job);
        return Err(error);
    }
    prepare(job, spec, section, Lot { nodes, idle })
}

/// Checks the name of a filter.
pub(crate) fn check_filter(graph: &Graph, name: Option<&str>) -> Result<()> {
    Ok(name.map_or(Ok(()), |name| graph.check_name(name))?)
}

/// The nodes that a commit concerns.
pub(crate) struct Lot {
    /// From the top to the base.
    pub(crate) nodes: Vec<Rc<Node>>,
    /// Others above the base and between, which nobody uses.
    pub(crate) idle: Vec<Rc<Node>>,
}

/// Vouches for the links of the section, and for overlays that nobody uses; returns the latter.
pub(crate) fn vouch(section: &Section, graph: &Graph, nodes: &[Rc<Node>]) -> Vec<Rc<Node>> {
    let mut idle = Vec::new();
    for (above, node) in nodes.iter().zip(nodes.iter().skip(1)) {
        section.vouch_for(above);
        for overlay in graph.overlays(node) {
            if overlay.id() != above.id() && graph.is_idle(&overlay) {
                section.vouch_for(&overlay);
                idle.push(overlay);
            }
        }
    }
    let mut at = 0;
    while let Some(node) = idle.get(at).cloned() {
        idle.extend(graph.overlays(&node));
        at += 1;
    }
    idle
}

/// Takes the section into use: the top is read, nobody reads between, the base is written.
pub(crate) async fn hold(
    section: &Section,
    job: &Job,
    nodes: &[Rc<Node>],
    active: bool,
) -> Result<()> {
    let [top, between @ .., base] = nodes else { return Err(ChainError::IntoItself.into()) };
    let (read, unchanged) = (Permissions::CONSISTENT_READ, Permissions::WRITE_UNCHANGED);
    let shared = if active { Permissions::ALL & !Permissions::RESIZE } else { read | unchanged };
    section.take(job, top, Role::Source, Permissions { perm: read, shared })?;
    for node in between {
        section.take(job, node, Role::Between, Permissions { perm: 0, shared: unchanged })?;
    }
    let grows = if base.size() < top.size() { Permissions::RESIZE } else { 0 };
    let perm = read | Permissions::WRITE | grows;
    section.take(job, base, Role::Target, Permissions { perm, shared: read | unchanged })?;
    section.keep_writable(base).await
}

/// Makes the base as large as the top; from now on the layers between are of no use.
pub(crate) async fn begin(lot: &Lot) -> Result<()> {
    let [top, between @ .., base] = &*lot.nodes else { return Ok(()) };
    if base.size() < top.size() {
        base.resize(top.size(), Preallocation::Off).await?;
    }
    between.iter().chain(&lot.idle).for_each(|node| node.set_stale());
    Ok(())
}

/// What the layers above the base hold.
pub(crate) fn layers_of(nodes: &[Rc<Node>]) -> Layers {
    let base = u32::try_from(nodes.len() - 1).unwrap_or(u32::MAX);
    Layers { copied: 0..base, end: None }
}

/// Bytes per dirty bit: the base's cluster size within 4 KiB to 64 KiB, as the peer's default.
pub(crate) fn granularity(base: &Node) -> u64 {
    match base.cluster_size() {
        0 | 1 => 65536,
        bytes => bytes.clamp(4096, 65536),
    }
}

fn prepare(job: Rc<Job>, spec: CommitSpec, section: Rc<Section>, lot: Lot) -> Result<Prepared> {
    let copy = Copy::new(CopySetup {
        job,
        source: Rc::clone(&spec.top),
        target: Rc::clone(&spec.base),
        granularity: granularity(&spec.base),
        all_dirty: true,
        whole_granules: false,
        compress: false,
        keeps_bytes: true,
        discard_source: false,
        shares: true,
        before: BeforeWrite::default(),
        spill: None,
        bounds: Bounds::default(),
        hold: Rc::clone(&section) as Rc<dyn std::any::Any>,
    });
    show_filter(Kind::Commit, &copy, spec.filter_name.as_deref())?;
    let slot = HookSlot::empty(&spec.top);
    let commit = Rc::new(Commit { copy: Rc::clone(&copy), spec, lot });
    let (held, inner) = (Rc::clone(&section), Rc::clone(&copy));
    let body: Body = Box::pin(async move {
        with_section(held, inner, async move { commit.run(section).await }).await
    });
    Ok(Prepared { copy, slot, body, opened: None })
}

struct Commit {
    copy: Rc<Copy>,
    spec: CommitSpec,
    lot: Lot,
}

impl Commit {
    async fn run(self: Rc<Self>, section: Rc<Section>) -> Result<Option<LastStep>> {
        begin(&self.lot).await?;
        if self.hides_a_tail() {
            self.copy.zero_tail().await?;
        }
        let layers = layers_of(&self.lot.nodes);
        self.copy.plan_layers(&self.spec.top, &layers, true).await?;
        self.copy.run_until_clean().await?;
        self.copy.flush_target().await?;
        Ok(Some(Box::pin(async move { self.finish(section).await })))
    }

    /// Whether the end of the top hides something of the base from a larger overlay.
    fn hides_a_tail(&self) -> bool {
        let (top, base) = (self.spec.top.size(), self.spec.base.size());
        let graph = Graph::of(self.spec.top.core());
        base > top && graph.overlays(&self.spec.top).iter().any(|overlay| overlay.size() > top)
    }

    /// Runs as a task: a cancel does not leave it half-way.
    async fn finish(self: Rc<Self>, section: Rc<Section>) -> Result<()> {
        let job = Rc::clone(self.copy.job());
        let held = Rc::clone(&section);
        let link = job.core().spawn(Class::Background, async move { self.link(&held).await });
        match job.unless_dead(link, || false).await {
            None => Err(JobError::Cancelled),
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => {
                section.end().await;
                Err(error)
            }
        }
    }

    async fn link(self: Rc<Self>, section: &Rc<Section>) -> Result<()> {
        let Self { copy, spec, lot } = &*self;
        let graph = Graph::of(spec.top.core());
        let mut done: Vec<Rc<Node>> = Vec::new();
        // An overlay may come while a header is written.
        loop {
            let overlays = graph.overlays(&spec.top);
            let known = |node: &Rc<Node>| done.iter().any(|known| known.id() == node.id());
            let Some(overlay) = overlays.iter().find(|overlay| !known(overlay)) else { break };
            section.keep_writable(overlay).await?;
            let string = spec.backing_file.as_deref();
            let reference = reference_to(&spec.base, string, spec.mask_protocol);
            write_reference(overlay, Some(reference)).await?;
            done.push(Rc::clone(overlay));
        }
        // From here on the job has succeeded; nothing waits until the graph says so, too.
        copy.job().decide();
        let dropped = lot.nodes.get(..lot.nodes.len() - 1).unwrap_or_default();
        section.give_up_uses(dropped);
        let overlays = graph.overlays(&spec.top);
        let retired = graph.relink(&overlays, Some(&spec.base))?;
        // Readers of the top find the same at the base.
        graph.repoint(spec.top.id(), spec.base.id());
        section.end().await;
        close_dropped(&graph, Some(retired), Some(Rc::clone(&spec.top))).await;
        Ok(())
    }
}
