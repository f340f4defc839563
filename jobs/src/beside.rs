//! Mirrors and backups beside an active commit: who may work on the node whose guests it takes
//! away, and how they go on at its base.
//!
//! When an active commit ends well its base shows what its top did, at one instant: the cut of the
//! end. So jobs that copy all of the top go on at the base, in that cut: their hooks, uses and
//! filters move, guests' next writes meet them there. Whoever copies only a layer, or by a
//! bitmap of the top, or shows the top below its target, cannot: the top means nothing then.
//!
//! Rules: (1) moves are memory only; (2) the top is closed after the reads of it that began before
//! the cut have ended; (3) a mirror that ends first takes the guests, and the commit then brings to
//! the base what they left; (4) both never end in one cut: a group of the two is refused; (5) a
//! base larger than its top is another disk, so nobody moves there.

use std::rc::Rc;

use liveblk_engine::executor::sync::{Either, select};
use liveblk_engine::graph::Graph;
use liveblk_engine::node::Node;

use crate::copy::{Copy, EarlierReads};
use crate::error::Result;
use crate::event::{Kind, SpillInfo};
use crate::follow_error::FollowError;
use crate::job::Job;
use crate::lifecycle::Status;
use crate::limits::RETIRE_WAIT_NS;
use crate::manager::JobManager;
use crate::start::HookSlot;
use crate::txn::JobTxn;

/// Where a job that copies an instant reads and keeps guests back.
pub(crate) struct Seat {
    copy: Rc<Copy>,
    slot: Rc<HookSlot>,
}

impl Seat {
    pub(crate) fn new(copy: &Rc<Copy>, slot: &Rc<HookSlot>) -> Rc<Self> {
        Rc::new(Self { copy: Rc::clone(copy), slot: Rc::clone(slot) })
    }

    pub(crate) fn spill_info(&self) -> Option<SpillInfo> {
        self.copy.spill_info()
    }
}

/// Refuses a mirror or backup of `source` that cannot go with the jobs that are on it. `whole`: it
/// copies all of the source.
pub(crate) fn check_beside(
    manager: &JobManager,
    source: &Rc<Node>,
    kind: Kind,
    whole: bool,
    txn: &Rc<JobTxn>,
) -> Result<()> {
    for job in at_work(manager) {
        let Some((from, to)) = job.nodes() else { continue };
        let reads_too = from == source.id();
        let follows = matches!(job.kind(), Kind::Mirror | Kind::Commit);
        if to != source.id() && !(reads_too && follows) {
            continue;
        }
        let together = kind == Kind::Mirror && Rc::ptr_eq(job.txn(), txn);
        let fits = |base: Rc<Node>| base.size() <= source.size();
        let goes = to != source.id()
            && job.is_active_commit()
            && job.follower().is_some()
            && whole
            && !together
            && Graph::of(source.core()).node(to).is_some_and(fits);
        if !goes {
            return Err(busy(source, &job));
        }
    }
    Ok(())
}

/// Refuses an active commit of `top` into `base` beside jobs that cannot go with it.
pub(crate) fn check_top(
    manager: &JobManager,
    top: &Rc<Node>,
    base: &Rc<Node>,
    txn: &Rc<JobTxn>,
) -> Result<()> {
    for job in at_work(manager) {
        let Some((from, to)) = job.nodes() else { continue };
        if from != top.id() && to != top.id() {
            continue;
        }
        let together = job.kind() == Kind::Mirror && Rc::ptr_eq(job.txn(), txn);
        // A mirror that is about to end has the guests already, or has let them go.
        let ends = job.kind() == Kind::Mirror && job.follower().is_none();
        if to == top.id() || !job.is_portable() || together || ends || base.size() > top.size() {
            return Err(busy(top, &job));
        }
    }
    Ok(())
}

/// Moves the jobs on the top of `commit` to its base. Only inside the cut in which guests move.
pub(crate) fn carry(graph: &Rc<Graph>, commit: &Rc<Copy>) -> Vec<Left> {
    let (top, base) = (commit.source(), commit.target());
    let manager = JobManager::of(graph.core());
    let mut left = Vec::new();
    for job in at_work(&manager) {
        let of_top = job.nodes().is_some_and(|(from, _)| from == top.id());
        if !of_top || Rc::ptr_eq(&job, commit.job()) {
            continue;
        }
        if let Some(follower) = job.follower() {
            let copy = Rc::clone(follower.copy());
            left.push(Left { reads: follower.move_to(graph, base), copy });
            continue;
        }
        if let Some(seat) = job.seat() {
            seat.slot.move_to(base);
            let copy = Rc::clone(&seat.copy);
            left.push(Left { reads: copy.set_source(base), copy });
        }
        if let Some((_, target)) = job.nodes() {
            job.set_nodes(base.id(), target);
        }
        job.carry_source_use(base);
        job.move_filter(base);
        job.changed().notify_all();
    }
    left
}

/// A job that left a node.
pub(crate) struct Left {
    copy: Rc<Copy>,
    reads: EarlierReads,
}

/// Waits until nobody reads what was left, or for so long that it does not matter any more.
pub(crate) async fn reads_ended(left: Vec<Left>) {
    for Left { copy, reads } in left {
        let job = copy.job();
        let ended = job.changed().until(|| reads.are_over());
        let _: Either<(), ()> = select(ended, job.core().sleep(RETIRE_WAIT_NS)).await;
    }
}

fn at_work(manager: &JobManager) -> Vec<Rc<Job>> {
    let mut jobs = manager.all();
    jobs.retain(|job| job.status() < Status::Concluded);
    jobs
}

fn busy(node: &Node, job: &Job) -> crate::error::JobError {
    FollowError::Beside {
        node: (*node.name()).into(),
        job: (**job.id()).into(),
        kind: job.kind().name(),
    }
    .into()
}
