//! Cuts: the one way to change what requests see, atomically over any number of nodes and cores.
//!
//! Order: (1) take the change permits of all graphs concerned, ascending by core; (2) close the
//! gates of all nodes on all cores; (3) wait until nothing is in flight on any of them; (4) flush
//! the written nodes of parts that ask for it; (5) `before_swap` of each part (may do I/O of
//! derived origin, may fail);
//! (6) every swap, synchronous, cannot fail; (7) when all cores have swapped, open the gates;
//! (8) give the permits back. A failure or a passed deadline before (6) reopens the gates and
//! nothing was changed.
//!
//! The cut is consistent over several disks: an answered request is before it on every disk,
//! because all gates are closed before anything is looked at, and a request that begins later
//! waits.

use std::future::Future;
use std::rc::Rc;

use super::error::GraphError;
use super::registry::Graph;
use crate::error::{Error, Result};
use crate::executor::sync::{Either, select};
use crate::executor::{Class, Core, CoreId};
use crate::format::LocalFuture;
use crate::node::{Node, NodeId};

/// What happens to the nodes of a part while their gates are closed.
pub enum Swap {
    /// On the core that coordinates the cut.
    Local(Box<dyn FnOnce(&Rc<Graph>)>),
    /// On any core.
    Remote(Box<dyn FnOnce(&Rc<Graph>) + Send>),
}

/// The last preparation of a part, run with its gates closed and nothing in flight.
pub type BeforeSwap = Box<dyn FnOnce(Rc<Graph>) -> LocalFuture<'static, Result<()>>>;

/// The nodes of one core that take part in a cut.
pub struct CutPart {
    /// Their home.
    pub core: CoreId,
    /// The nodes: everything that is written or re-pointed.
    pub nodes: Vec<NodeId>,
    /// Whether the nodes are flushed: where one of them stops being written (a snapshot), not where
    /// only hooks or attachments change.
    pub flush: bool,
    /// Runs before any swap, only for parts on the coordinating core.
    pub before_swap: Option<BeforeSwap>,
    /// The change itself.
    pub swap: Swap,
}

impl std::fmt::Debug for CutPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CutPart({:?} {:?})", self.core, self.nodes)
    }
}

/// Runs a cut over `parts`; gives up `deadline_ns` nanoseconds after it began to wait.
///
/// The cut runs as a task of its own: dropping the returned future does not stop it half-way.
///
/// # Errors
/// `TimedOut` naming the slow node; errors of a flush or of `before_swap`. Nothing was changed
/// then.
pub fn cut(
    core: &Core,
    parts: Vec<CutPart>,
    deadline_ns: u64,
) -> impl Future<Output = Result<()>> + use<> {
    let coordinator = core.clone();
    core.spawn(Class::Guest, async move { coordinate(&coordinator, parts, deadline_ns).await })
}

async fn coordinate(core: &Core, mut parts: Vec<CutPart>, deadline_ns: u64) -> Result<()> {
    let mut cores: Vec<CoreId> = parts.iter().map(|part| part.core).collect();
    cores.sort_unstable();
    cores.dedup();
    for id in &cores {
        on_core(core, *id, |graph| async move { graph.changes.acquire(1).await }).await?;
    }
    let closed: Vec<(CoreId, Vec<NodeId>, bool)> =
        parts.iter().map(|part| (part.core, part.nodes.clone(), part.flush)).collect();
    for (id, nodes, _) in closed.clone() {
        on_core(core, id, move |graph| async move { close_gates(&graph, &nodes) }).await?;
    }
    let prepared = prepare(core, &closed, &mut parts, deadline_ns).await;
    if prepared.is_ok() {
        for part in parts {
            swap(core, part).await?;
        }
    }
    for (id, nodes, _) in closed {
        on_core(core, id, move |graph| async move { open_gates(&graph, &nodes) }).await?;
    }
    for id in cores {
        on_core(core, id, |graph| async move { graph.changes.release(1) }).await?;
    }
    prepared
}

/// Steps (3) to (5).
async fn prepare(
    core: &Core,
    closed: &[(CoreId, Vec<NodeId>, bool)],
    parts: &mut [CutPart],
    deadline_ns: u64,
) -> Result<()> {
    for (id, nodes, flush) in closed.iter().cloned() {
        let quiet = move |graph: Rc<Graph>| async move {
            quiesce(&graph, &nodes, flush, deadline_ns).await
        };
        on_core(core, id, quiet).await??;
    }
    for part in parts {
        if let Some(before) = part.before_swap.take() {
            assert_eq!(part.core, core.id(), "before_swap runs on the coordinating core");
            before(Graph::of(core)).await?;
        }
    }
    Ok(())
}

async fn swap(core: &Core, part: CutPart) -> Result<()> {
    match part.swap {
        Swap::Local(swap) => {
            assert_eq!(part.core, core.id(), "a local swap runs on the coordinating core");
            swap(&Graph::of(core));
            Ok(())
        }
        Swap::Remote(swap) => {
            on_core(core, part.core, move |graph| async move { swap(&graph) }).await
        }
    }
}

/// Runs `f` on the graph of core `id`.
async fn on_core<R, Fut>(
    core: &Core,
    id: CoreId,
    f: impl FnOnce(Rc<Graph>) -> Fut + Send + 'static,
) -> Result<R>
where
    R: Send + 'static,
    Fut: Future<Output = R> + 'static,
{
    if id == core.id() {
        return Ok(f(Graph::of(core)).await);
    }
    let answer = core.call(id, move |core| f(Graph::of(&core))).await;
    answer.ok_or_else(|| Error::os(libc::ESHUTDOWN, "reach another core"))
}

fn nodes_of<'a>(graph: &'a Rc<Graph>, ids: &'a [NodeId]) -> impl Iterator<Item = Rc<Node>> + 'a {
    ids.iter().filter_map(|id| graph.node(*id))
}

fn close_gates(graph: &Rc<Graph>, ids: &[NodeId]) {
    nodes_of(graph, ids).for_each(|node| node.gate().close());
}

fn open_gates(graph: &Rc<Graph>, ids: &[NodeId]) {
    nodes_of(graph, ids).for_each(|node| node.gate().open());
}

/// Waits until nothing is in flight on the nodes, then flushes those that are written if asked.
async fn quiesce(graph: &Rc<Graph>, ids: &[NodeId], flush: bool, deadline_ns: u64) -> Result<()> {
    let core = graph.core();
    let deadline = core.now().saturating_add(deadline_ns);
    for node in nodes_of(graph, ids) {
        let idle = select(node.gate().idle(), core.sleep_until(deadline)).await;
        if let Either::Second(()) = idle {
            return Err(GraphError::NotIdle {
                node: node.name().to_string(),
                in_flight: node.gate().in_flight(),
                waited_ms: deadline_ns / 1_000_000,
            }
            .into());
        }
    }
    for node in nodes_of(graph, ids) {
        if flush && node.is_writable() && !node.options().no_flush {
            node.format().flush().await.map_err(|error| error.on(&node.name()))?;
        }
    }
    Ok(())
}
