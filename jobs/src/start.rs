//! How a job starts and how its body ends: hook in, task, hook out, scope.
//!
//! A start is prepare (checks, uses of nodes, job in state `created`) -> swap (hook in, inside a
//! cut) -> commit (the task runs), or abort. One command makes one cut for itself; a transaction
//! makes one for all its jobs.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

use liveblk_engine::Error;
use liveblk_engine::executor::Class;
use liveblk_engine::executor::sync::{Either, select};
use liveblk_engine::format::LocalFuture;
use liveblk_engine::graph::{BeforeSwap, CutPart, Graph, GraphError, Swap, cut};
use liveblk_engine::node::{HookId, Node, NodeId, Origin, Permissions, Role, User, WriteHook};

use crate::bitmap_use::BitmapUse;
use crate::copy::Copy;
use crate::drive::OpenedTarget;
use crate::error::{JobError, Result};
use crate::event::Kind;
use crate::fleecing::JobFilter;
use crate::job::Job;
use crate::lifecycle::Status;
use crate::limits::{CUT_WAIT_NS, LANDING_WAIT_NS, UNHOOK_WAIT_NS};
use crate::manager::JobManager;
use crate::spec::BitmapMode;

/// A hook on a node, or its place.
pub(crate) struct HookSlot {
    node: RefCell<Rc<Node>>,
    /// None: a job that guests' writes do not concern.
    hook: Option<Rc<dyn WriteHook>>,
    id: Cell<Option<HookId>>,
    /// Where it was first: the node whose content at the start the job is about.
    first: RefCell<Rc<Node>>,
    /// The node in whose cut it is to come in, where that is planned ahead.
    planned: Cell<Option<NodeId>>,
    /// What else happens at the instant of the start.
    at_start: RefCell<Option<Box<dyn FnOnce()>>>,
}

/// A job that can start.
pub(crate) struct Prepared {
    pub(crate) copy: Rc<Copy>,
    pub(crate) slot: Rc<HookSlot>,
    pub(crate) body: Body,
    /// A target that was opened for the job.
    pub(crate) opened: Option<OpenedTarget>,
}

/// The work of a job. It may leave a last step for job-finalize.
pub(crate) type Body = LocalFuture<'static, Result<Option<LastStep>>>;

/// What makes the result of a job effective when it is finalized by hand.
pub(crate) type LastStep = LocalFuture<'static, Result<()>>;

impl HookSlot {
    pub(crate) fn new(node: &Rc<Node>, hook: Rc<dyn WriteHook>) -> Rc<Self> {
        Self::place(node, Some(hook))
    }

    /// The place of a job that needs no hook.
    pub(crate) fn empty(node: &Rc<Node>) -> Rc<Self> {
        Self::place(node, None)
    }

    fn place(node: &Rc<Node>, hook: Option<Rc<dyn WriteHook>>) -> Rc<Self> {
        let (first, id) = (RefCell::new(Rc::clone(node)), Cell::new(None));
        let (planned, at_start) = (Cell::new(None), RefCell::new(None));
        Rc::new(Self { node: first.clone(), hook, id, first, planned, at_start })
    }

    /// Does `what` in the cut in which the hook comes in.
    pub(crate) fn at_start(&self, what: Box<dyn FnOnce()>) {
        self.at_start.replace(Some(what));
    }

    /// Whether guests' writes do not concern the job: then its start needs no cut.
    pub(crate) fn is_empty(&self) -> bool {
        self.hook.is_none()
    }

    /// Comes in with a cut of the node that is returned.
    pub(crate) fn plan_cut(&self) -> NodeId {
        let node = self.node().id();
        self.planned.set(Some(node));
        node
    }

    /// The node of the cut that was planned.
    pub(crate) fn planned(&self) -> NodeId {
        self.planned.get().unwrap_or_else(|| self.first().id())
    }

    /// Only inside a cut of the node.
    pub(crate) fn install(&self) {
        if let Some(what) = self.at_start.take() {
            what();
        }
        if let Some(hook) = &self.hook {
            self.id.set(Some(self.node().add_hook(Rc::clone(hook))));
        }
    }

    fn node(&self) -> Rc<Node> {
        Rc::clone(&self.node.borrow())
    }

    /// The hook is that of `to` from now on, if it is in place, else when it comes. Only inside a
    /// cut of both nodes.
    pub(crate) fn move_to(&self, to: &Rc<Node>) {
        let installed = self.id.get().is_some();
        self.remove();
        self.node.replace(Rc::clone(to));
        if installed {
            self.install();
        } else {
            self.first.replace(Rc::clone(to));
        }
    }

    /// The node whose content at the start the job is about: what was written to nodes above it
    /// since, the hook knows.
    pub(crate) fn first(&self) -> Rc<Node> {
        Rc::clone(&self.first.borrow())
    }

    /// Only inside a cut of the node; a second time does nothing.
    pub(crate) fn remove(&self) {
        if let Some(id) = self.id.take() {
            self.node().remove_hook(id);
        }
    }

    /// Takes the hook out; it does nothing any more. Goes on alone when the source is not quiet in
    /// time.
    pub(crate) async fn remove_in_cut(self: &Rc<Self>) {
        if self.id.get().is_none() {
            return;
        }
        let core = self.node().core().clone();
        let slot = Rc::clone(self);
        let removal = core.spawn(Class::Background, async move {
            while slot.id.get().is_some() && still_there(&slot.node()) {
                let (node, inner) = (slot.node(), Rc::clone(&slot));
                let part = cut_of(&node, Swap::Local(Box::new(move |_| inner.remove())));
                if let Err(error) = cut(node.core(), vec![part], CUT_WAIT_NS).await {
                    tracing::warn!(%error, "the hook of an ended job is still in place");
                    node.core().sleep(UNHOOK_WAIT_NS).await;
                }
            }
        });
        let _: Either<(), ()> = select(removal, core.sleep(UNHOOK_WAIT_NS)).await;
    }
}

fn still_there(node: &Rc<Node>) -> bool {
    Graph::of(node.core()).node(node.id()).is_some()
}

/// Flushes `node` while guests go on, so that the flush inside the cut that follows is short. Its
/// failure is found there.
pub(crate) async fn flush_ahead(node: &Rc<Node>) {
    if node.is_writable()
        && let Err(error) = node.flush(Origin::External).await
    {
        tracing::debug!(node = %node.name(), %error, "flush ahead of a cut");
    }
}

/// A cut of one node that goes on being written.
pub(crate) fn cut_of(node: &Rc<Node>, swap: Swap) -> CutPart {
    CutPart {
        core: node.core().id(),
        nodes: vec![node.id()],
        flush: false,
        before_swap: None,
        swap,
    }
}

impl Prepared {
    /// The job.
    pub(crate) fn job(&self) -> Rc<Job> {
        Rc::clone(self.copy.job())
    }

    /// Starts the job; its hook is in place.
    pub(crate) fn commit(self) -> Rc<Job> {
        let job = self.job();
        let core = job.core().clone();
        if let Some(opened) = &self.opened {
            job.own(&opened.node);
        }
        drop(core.spawn(Class::Background, drive(self)));
        job
    }

    /// Takes back a job whose hook never was installed.
    pub(crate) async fn abort(self) {
        let job = self.job();
        let section = self.copy.section();
        self.copy.kill();
        if let Some(manager) = job.manager() {
            manager.call_off(&job);
        }
        drop((self.copy, self.slot, self.body));
        if let Some(section) = section {
            section.end().await;
        }
        if let Some(opened) = self.opened {
            opened.abort(job.core()).await;
        }
    }

    /// Starts a job that a command asked for alone.
    pub(crate) async fn start(self) -> Result<Rc<Job>> {
        if self.slot.is_empty() {
            return Ok(self.commit());
        }
        loop {
            let (source, slot) = (self.copy.source(), Rc::clone(&self.slot));
            let mut part = cut_of(&source, Swap::Local(Box::new(move |_| slot.install())));
            part.before_swap = Some(stays(&self.copy, source.id()));
            match cut(self.job().core(), vec![part], CUT_WAIT_NS).await {
                Ok(()) => return Ok(self.commit()),
                // A snapshot moved the guests first, and the job with them.
                Err(_) if self.copy.source().id() != source.id() => {}
                Err(error) => {
                    self.abort().await;
                    return Err(error.into());
                }
            }
        }
    }
}

/// With the gates of `source` closed: an error if the guests of a job are not there any more.
fn stays(copy: &Rc<Copy>, source: NodeId) -> BeforeSwap {
    let copy = Rc::clone(copy);
    Box::new(move |_| Box::pin(async move { copy.check_source(source) }))
}

/// The job's own task.
async fn drive(prepared: Prepared) {
    let job = prepared.job();
    let Prepared { copy, slot, body, .. } = prepared;
    job.enter(Status::Running);
    job.set_busy(true);
    let result = match body.await {
        _ if job.is_forced() => Err(JobError::Cancelled),
        Ok(Some(step)) => {
            // The hook stays until the step was done or the job is cancelled.
            job.keep(Box::new(Cleanup { copy: Rc::clone(&copy), slot: Rc::clone(&slot) }));
            job.set_last_step(step);
            Ok(())
        }
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    if !job.has_last_step() {
        copy.settle_bitmap(&result).await;
        copy.kill();
        slot.remove_in_cut().await;
        // Who hears of the end may remove the target; only one that hangs stays in use.
        let landed = job.changed().until(|| copy.has_landed());
        let _: Either<(), ()> = select(landed, job.core().sleep(LANDING_WAIT_NS)).await;
        copy.end_spill().await;
    }
    if let Some(manager) = job.manager() {
        manager.body_ended(&job, result);
    }
}

/// Ends the copies and takes the hook out when the scope of the job ends.
struct Cleanup {
    copy: Rc<Copy>,
    slot: Rc<HookSlot>,
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        self.copy.kill();
        let slot = Rc::clone(&self.slot);
        let core = slot.node().core().clone();
        drop(core.spawn(Class::Background, async move { slot.remove_in_cut().await }));
    }
}

/// Uses of a job's nodes: the source for the scope of the job, the target for as long as anything
/// of the job may write to it.
pub(crate) fn use_nodes(job: &Job, source: &Rc<Node>, target: &Rc<Node>) -> Result<Rc<dyn Any>> {
    let graph = Graph::of(job.core());
    let user = |role| User::Job { id: Rc::clone(job.id()), kind: job.kind().name(), role };
    let read = Permissions {
        perm: Permissions::CONSISTENT_READ,
        shared: Permissions::ALL & !Permissions::RESIZE,
    };
    // What a backup has written so far may be looked at; a mirror's target is nothing until READY.
    let shared = match job.kind() {
        Kind::Mirror => Permissions::WRITE_UNCHANGED,
        Kind::Backup | Kind::Create | Kind::Amend | Kind::Stream | Kind::Commit => {
            Permissions::ALL & !Permissions::RESIZE
        }
    };
    let write = Permissions { perm: Permissions::WRITE, shared };
    let source = graph.use_node(source, user(Role::Source), read)?;
    let target: Rc<dyn Any> = Rc::new(graph.use_node(target, user(Role::Target), write)?);
    job.set_source_use(source);
    job.keep(Box::new(Rc::clone(&target)));
    Ok(target)
}

/// Holds a user's bitmap of the source for the job. A job that cannot is taken back.
pub(crate) fn use_bitmap(copy: &Rc<Copy>, name: &str, mode: BitmapMode) -> Result<Rc<BitmapUse>> {
    let job = copy.job();
    match BitmapUse::hold(&copy.source(), name, mode, job.id()) {
        Ok(bitmap) => {
            job.set_bitmap(&bitmap);
            Ok(bitmap)
        }
        Err(error) => {
            copy.kill();
            if let Some(manager) = job.manager() {
                manager.withdraw(job);
            }
            Err(error)
        }
    }
}

/// Shows the job's filter node in queries, until the job is over. A job that cannot is taken back.
pub(crate) fn show_filter(kind: Kind, copy: &Rc<Copy>, name: Option<&str>) -> Result<()> {
    match JobFilter::add(kind, copy, name) {
        Ok(filter) => {
            copy.job().set_filter(filter);
            Ok(())
        }
        Err(error) => {
            copy.kill();
            if let Some(manager) = copy.job().manager() {
                manager.withdraw(copy.job());
            }
            Err(error)
        }
    }
}

/// Refuses to copy from an image that is another process's.
pub(crate) fn check_active(source: &Node, edge: &'static str) -> Result<()> {
    if source.is_active() {
        return Ok(());
    }
    let (child, parent) = (source.name().to_string(), "#block000".to_owned());
    Err(Error::from(GraphError::InactiveChild { child, edge, parent }).into())
}

/// Refuses a target that another job works on.
pub(crate) fn check_target(manager: &JobManager, target: &Rc<Node>) -> Result<()> {
    match manager.any_user(target.id()) {
        Some(kind) => {
            Err(JobError::BusyWithJob { node: (*target.name()).into(), kind: kind.name() })
        }
        None => Ok(()),
    }
}
