//! Stream: a node gets for its own what the layers below it hold, down to a base.
//!
//! Order rules:
//! 1. copies go through the node's fill path: a guest's write that came first wins;
//! 2. when all is filled: data and tables of the node durable -> header with the new reference
//!    durable -> the layers between are unlinked in the graph (the content is the same before and
//!    after, nobody waits) -> requests on the old paths ended, layers closed -> event;
//! 3. cancelled at any time, what was filled stays: it is what the layers below show anyway.
//!
//! The base may change while the job runs: what lies below the bottom layer at the end is it.

use std::rc::Rc;

use liveblk_engine::graph::Graph;
use liveblk_engine::node::{Node, Permissions, Role};

use crate::chain::{
    Section, chain_of, check_section, close_dropped, reference_to, with_section, write_reference,
};
use crate::chain_error::ChainError;
use crate::copy::{BeforeWrite, Bounds, Copy, CopySetup, Layers};
use crate::error::{JobError, Result};
use crate::event::Kind;
use crate::job::Job;
use crate::limits::SECTION_GRANULE_MIN;
use crate::manager::JobManager;
use crate::spec::JobOptions;
use crate::start::{Body, HookSlot, LastStep, Prepared, check_active, show_filter};
use crate::txn::JobTxn;

/// Down to where a stream copies.
#[derive(Clone, Debug, Default)]
pub enum StreamTo {
    /// Everything: nothing is left below.
    #[default]
    End,
    /// Down to this node, without it.
    Base(Rc<Node>),
    /// Down to this node and with it.
    Bottom(Rc<Node>),
}

/// A stream to be started.
#[derive(Clone)]
pub struct StreamSpec {
    /// Common options; `on_source_error` is the policy for reads and writes.
    pub job: JobOptions,
    /// The node that is filled.
    pub node: Rc<Node>,
    /// Down to where.
    pub to: StreamTo,
    /// The string for the header instead of the base's file name.
    pub backing_file: Option<String>,
    /// Write the format "raw" where the base is a plain file.
    pub mask_protocol: bool,
    /// The name under which queries show the job's filter node.
    pub filter_name: Option<String>,
}

impl StreamSpec {
    /// A stream of everything below `node` into it, with the defaults.
    pub fn new(node: &Rc<Node>) -> Self {
        Self {
            job: JobOptions::new("stream"),
            node: Rc::clone(node),
            to: StreamTo::End,
            backing_file: None,
            mask_protocol: false,
            filter_name: None,
        }
    }

    /// Checks the places in the chain.
    ///
    /// # Errors
    /// What cannot work, with the peer's texts.
    pub fn check(&self) -> Result<()> {
        let nodes = section_of(self)?;
        check_section(&JobManager::of(self.node.core()), &nodes)
    }
}

/// Starts a stream.
///
/// # Errors
/// What cannot work, with the peer's texts; no job is left then.
pub async fn start_stream(spec: StreamSpec) -> Result<Rc<Job>> {
    prepare_stream(spec, &JobTxn::new()).await?.start().await
}

/// All of a start that comes before the job's task runs.
pub(crate) async fn prepare_stream(spec: StreamSpec, txn: &Rc<JobTxn>) -> Result<Prepared> {
    let nodes = section_of(&spec)?;
    check_active(&spec.node, "file")?;
    let manager = JobManager::of(spec.node.core());
    check_section(&manager, &nodes)?;
    let job = manager.create(Kind::Stream, spec.job.clone(), txn)?;
    job.set_section(nodes.iter().map(|node| node.id()).collect());
    let section = Section::new(&Graph::of(job.core()));
    if let Err(error) = hold(&section, &job, &nodes).await {
        section.end().await;
        manager.withdraw(&job);
        return Err(error);
    }
    prepare(job, spec, section, nodes)
}

/// The node and everything below it whose content moves; the node alone if there is nothing to do.
fn section_of(spec: &StreamSpec) -> Result<Vec<Rc<Node>>> {
    let device = || (*spec.node.name()).into();
    let mut nodes = chain_of(&spec.node);
    let place = |wanted: &Rc<Node>| nodes.iter().position(|node| node.id() == wanted.id());
    let count = match &spec.to {
        StreamTo::End => nodes.len(),
        StreamTo::Base(base) => match place(base) {
            Some(at) if at > 0 => at,
            _ => {
                let base = (*base.name()).into();
                return Err(ChainError::NotBelow { base, device: device() }.into());
            }
        },
        StreamTo::Bottom(bottom) => {
            let bottom_name = (*bottom.name()).into();
            let missing = ChainError::NotInChain { bottom: bottom_name, device: device() };
            place(bottom).ok_or(missing)? + 1
        }
    };
    if spec.backing_file.is_some() && !matches!(spec.to, StreamTo::Base(_)) {
        return Err(ChainError::WholeChain.into());
    }
    nodes.truncate(count);
    Ok(nodes)
}

async fn hold(section: &Section, job: &Job, nodes: &[Rc<Node>]) -> Result<()> {
    let read = Permissions::CONSISTENT_READ;
    for (index, node) in nodes.iter().enumerate() {
        let (role, with) = if index == 0 {
            let perm = read | Permissions::WRITE_UNCHANGED;
            (Role::Source, Permissions { perm, shared: Permissions::ALL & !Permissions::RESIZE })
        } else {
            // Read through the node alone: a layer may mean nothing by itself after a commit.
            let shared = read | Permissions::WRITE_UNCHANGED;
            (Role::Between, Permissions { perm: 0, shared })
        };
        section.take(job, node, role, with)?;
    }
    match nodes {
        [node, ..] if node.has_backing() => section.keep_writable(node).await,
        _ => Ok(()),
    }
}

fn prepare(
    job: Rc<Job>,
    spec: StreamSpec,
    section: Rc<Section>,
    nodes: Vec<Rc<Node>>,
) -> Result<Prepared> {
    let node = Rc::clone(&spec.node);
    let copy = Copy::new(CopySetup {
        job,
        source: Rc::clone(&node),
        target: Rc::clone(&node),
        granularity: node.cluster_size().max(SECTION_GRANULE_MIN),
        all_dirty: nodes.len() > 1,
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
    copy.fill_source();
    show_filter(Kind::Stream, &copy, spec.filter_name.as_deref())?;
    let slot = HookSlot::empty(&node);
    let stream = Rc::new(Stream { copy: Rc::clone(&copy), spec, nodes });
    let work = Rc::clone(&section);
    let inner = Rc::clone(&copy);
    let body: Body = Box::pin(async move {
        let held = Rc::clone(&section);
        with_section(work, inner, async move { stream.run(held).await }).await
    });
    Ok(Prepared { copy, slot, body, opened: None })
}

struct Stream {
    copy: Rc<Copy>,
    spec: StreamSpec,
    /// The node, then what is unlinked at the end.
    nodes: Vec<Rc<Node>>,
}

impl Stream {
    async fn run(self: Rc<Self>, section: Rc<Section>) -> Result<Option<LastStep>> {
        if self.nodes.len() > 1 {
            let end = self.bottom().filter(|bottom| !bottom.has_backing());
            let last = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
            let layers = Layers { copied: 1..last, end: end.map(|bottom| bottom.size()) };
            self.copy.plan_layers(&self.spec.node, &layers, true).await?;
            self.copy.run_until_clean().await?;
            if let Some(error) = self.copy.skipped() {
                return Err(error);
            }
        }
        if !self.spec.node.has_backing() {
            return Ok(Some(Box::pin(async move {
                section.end().await;
                Ok(())
            })));
        }
        // The flush that the link needs is then a short one.
        self.copy.flush_target().await?;
        Ok(Some(Box::pin(async move { self.finish(section).await })))
    }

    fn bottom(&self) -> Option<&Rc<Node>> {
        self.nodes.last()
    }

    /// Links the node to its new base. Runs as a task: a cancel does not leave it half-way.
    async fn finish(self: Rc<Self>, section: Rc<Section>) -> Result<()> {
        let job = Rc::clone(self.copy.job());
        let held = Rc::clone(&section);
        let link = job.core().spawn(liveblk_engine::executor::Class::Background, async move {
            self.link(&held).await
        });
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
        let node = &self.spec.node;
        let graph = Graph::of(node.core());
        let below = || self.bottom().and_then(|bottom| bottom.backing());
        let (base, free) = loop {
            let base = below();
            // Whoever excludes the link is found before the header says that it is there.
            let free = base.as_ref().map(|base| graph.use_as_backing(node, base)).transpose()?;
            let string = self.spec.backing_file.as_deref();
            let mask = self.spec.mask_protocol;
            let reference = base.as_ref().map(|base| reference_to(base, string, mask));
            write_reference(node, reference).await?;
            // A commit below may have changed it meanwhile.
            if below().map(|node| node.id()) == base.as_ref().map(|node| node.id()) {
                break (base, free);
            }
        };
        // From here on the job has succeeded; what follows cannot fail.
        self.copy.job().decide();
        let dropped = node.backing().filter(|_| self.nodes.len() > 1);
        let retired = match dropped {
            Some(_) => Some(graph.relink(std::slice::from_ref(node), base.as_ref())?),
            None => None,
        };
        drop(free);
        section.end().await;
        close_dropped(&graph, retired, dropped).await;
        Ok(())
    }
}
