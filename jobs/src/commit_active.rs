//! Commit of the layer that guests write: the base follows it until the job is told to end.
//!
//! Owns: what is copied at first, and that guests move to the base. The order rules are those of
//! `follow`, and:
//! 1. the base gets only what layers above it hold, and a layer never gives back what it holds
//!    (discarded clusters read as zeroes): as seen from the top nothing changes before the end;
//! 2. after the cut of the end: the section ends, layers that are not needed are closed, events.

use std::cell::RefCell;
use std::rc::{Rc, Weak};

use liveblk_engine::format::LocalFuture;
use liveblk_engine::graph::Graph;
use liveblk_engine::node::{Node, WriteHook};

use crate::active::MirrorHook;
use crate::beside::{Left, carry, check_top, reads_ended};
use crate::chain::{Section, check_section, close_dropped, with_section};
use crate::commit::{CommitSpec, Lot, begin, granularity, hold, layers_of, vouch};
use crate::copy::{BeforeWrite, Bounds, Copy, CopySetup};
use crate::error::{JobError, Result};
use crate::event::Kind;
use crate::follow::{Follower, Takeover};
use crate::job::Job;
use crate::lifecycle::Ending;
use crate::manager::JobManager;
use crate::start::{Body, HookSlot, Prepared, show_filter};
use crate::txn::JobTxn;

/// All of a start over `nodes`, from the top to the base, that comes before the cut.
pub(crate) async fn prepare_active(
    spec: CommitSpec,
    nodes: Vec<Rc<Node>>,
    txn: &Rc<JobTxn>,
) -> Result<Prepared> {
    let manager = JobManager::of(spec.top.core());
    check_section(&manager, &nodes)?;
    check_top(&manager, &spec.top, &spec.base, txn)?;
    for node in nodes.iter().skip(1) {
        if let Some(kind) = manager.any_user(node.id()) {
            return Err(JobError::BusyWithJob { node: (*node.name()).into(), kind: kind.name() });
        }
    }
    let job = manager.create(Kind::Commit, spec.job.clone(), txn)?;
    job.set_nodes(spec.top.id(), spec.base.id());
    job.set_section(nodes.iter().map(|node| node.id()).collect());
    job.set_copy_mode(spec.copy_mode);
    job.set_converge(spec.converge);
    let graph = Graph::of(job.core());
    let section = Section::new(&graph);
    let idle = vouch(&section, &graph, &nodes);
    if let Err(error) = hold(&section, &job, &nodes, true).await {
        section.end().await;
        manager.withdraw(&job);
        return Err(error);
    }
    prepare(job, &spec, section, Lot { nodes, idle })
}

fn prepare(job: Rc<Job>, spec: &CommitSpec, section: Rc<Section>, lot: Lot) -> Result<Prepared> {
    let copy = Copy::new(CopySetup {
        job,
        source: Rc::clone(&spec.top),
        target: Rc::clone(&spec.base),
        granularity: granularity(&spec.base),
        all_dirty: false,
        whole_granules: false,
        compress: false,
        // A guest's own write may wait for the region meanwhile.
        keeps_bytes: false,
        discard_source: false,
        shares: true,
        before: BeforeWrite::default(),
        spill: None,
        bounds: Bounds::default(),
        hold: Rc::clone(&section) as Rc<dyn std::any::Any>,
    });
    show_filter(Kind::Commit, &copy, spec.filter_name.as_deref())?;
    let hook: Rc<dyn WriteHook> = MirrorHook::new(&copy, true, false);
    let slot = HookSlot::new(&spec.top, hook);
    let into = Rc::new(IntoBase {
        nodes: Rc::new(RefCell::new(lot.nodes)),
        section: Rc::clone(&section),
        job: Rc::downgrade(copy.job()),
        left: RefCell::default(),
    });
    let follower = Follower::new(&copy, &slot, Rc::clone(&into) as Rc<dyn Takeover>);
    let (place, inner) = (Rc::clone(&slot), Rc::clone(&copy));
    let work = async move {
        let copy = Rc::clone(follower.copy());
        follower.run(into.plan(&copy, &place, lot.idle)).await
    };
    let body: Body = Box::pin(with_section(section, inner, work));
    Ok(Prepared { copy, slot, body, opened: None })
}

/// Guests move to the base, and the layers above it mean nothing any more.
struct IntoBase {
    /// From where guests are to the base; a snapshot puts another one on top.
    nodes: Rc<RefCell<Vec<Rc<Node>>>>,
    section: Rc<Section>,
    job: Weak<Job>,
    /// Jobs on the top that went on at the base.
    left: RefCell<Vec<Left>>,
}

impl IntoBase {
    /// Makes the base large enough and finds out what is to be copied.
    async fn plan(&self, copy: &Rc<Copy>, slot: &HookSlot, idle: Vec<Rc<Node>>) -> Result<()> {
        let shape = copy.hold_shape().await;
        copy.check()?;
        let nodes = self.nodes.borrow().clone();
        begin(&Lot { nodes, idle }).await?;
        drop(shape);
        let (first, mut nodes) = (slot.first(), self.nodes.borrow().clone());
        // Layers are counted from where the guests were at the start.
        nodes.retain({
            let mut below = false;
            move |node| {
                below |= node.id() == first.id();
                below
            }
        });
        copy.plan_layers(&slot.first(), &layers_of(&nodes), false).await
    }
}

impl Takeover for IntoBase {
    fn switch(&self, graph: &Rc<Graph>, copy: &Rc<Copy>, ending: Ending) {
        if ending != Ending::Complete {
            return;
        }
        let nodes = self.nodes.borrow();
        self.section.give_up_uses(nodes.get(..nodes.len() - 1).unwrap_or_default());
        copy.target().succeed(&copy.source());
        self.left.replace(carry(graph, copy));
        graph.repoint(copy.source().id(), copy.target().id());
    }

    /// The old top is one of the layers between from now on, and what is above it goes into the
    /// base, too: it means nothing by itself.
    fn moved(&self, _: &Rc<Graph>, from: &Rc<Node>, to: &Rc<Node>) {
        self.section.vouch_for(to);
        let Some(job) = self.job.upgrade() else { return };
        if let Err(error) = self.section.put_on_top(&job, from, to) {
            tracing::error!(%error, "a commit does not hold the layer that a snapshot made");
        }
        from.set_stale();
        self.nodes.borrow_mut().insert(0, Rc::clone(to));
        job.set_section(self.nodes.borrow().iter().map(|node| node.id()).collect());
    }

    fn after(&self, ending: Ending) -> LocalFuture<'static, ()> {
        let (nodes, section) = (Rc::clone(&self.nodes), Rc::clone(&self.section));
        let left = self.left.take();
        Box::pin(async move {
            section.end().await;
            reads_ended(left).await;
            let top = nodes.borrow().first().filter(|_| ending == Ending::Complete).cloned();
            let Some(top) = top else { return };
            close_dropped(&Graph::of(top.core()), None, Some(top)).await;
        })
    }
}
