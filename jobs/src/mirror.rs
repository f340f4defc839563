//! Mirror: a target follows the source in the background until the job is told to end.
//!
//! Owns: what is copied at first, and that guests move to the target. The order rules are those of
//! `follow`.
//!
//! A user's bitmap that names what is copied goes on recording until the cut of the end and is
//! given up only when the job has succeeded.

use std::rc::Rc;

use liveblk_engine::format::LocalFuture;
use liveblk_engine::graph::Graph;
use liveblk_engine::node::{Node, NodeId, WriteHook};

use crate::active::MirrorHook;
use crate::beside::check_beside;
use crate::copy::{BeforeWrite, Bounds, Copy, CopySetup, Plan};
use crate::error::{JobError, Result};
use crate::event::Kind;
use crate::follow::{Follower, Takeover};
use crate::job::Job;
use crate::lifecycle::Ending;
use crate::limits::BUF_SIZE_MAX;
use crate::manager::JobManager;
use crate::spec::{MirrorSpec, SyncMode};
use crate::start::{
    Body, HookSlot, Prepared, check_active, check_target, show_filter, use_bitmap, use_nodes,
};
use crate::txn::JobTxn;

/// Starts a mirror.
///
/// # Errors
/// What cannot work, with the peer's texts; no job is left then. Sizes that differ are found inside
/// the job, as the peer does.
pub async fn start_mirror(spec: MirrorSpec) -> Result<Rc<Job>> {
    prepare_mirror(spec, &JobTxn::new())?.start().await
}

/// All of a start that comes before the cut.
pub(crate) fn prepare_mirror(spec: MirrorSpec, txn: &Rc<JobTxn>) -> Result<Prepared> {
    let granularity = spec.check()?;
    let bitmap = spec.more.bitmap.checked(spec.sync, &spec.source)?;
    let manager = JobManager::of(spec.source.core());
    check_active(&spec.source, "backing")?;
    // One mirror, or several backups; a mirror may begin beside backups, not the other way round.
    let whole = spec.sync == SyncMode::Full && spec.more.backing_at_pivot.is_none();
    check_beside(&manager, &spec.source, Kind::Mirror, whole, txn)?;
    check_target(&manager, &spec.target)?;
    let job = manager.create(Kind::Mirror, spec.job.clone(), txn)?;
    job.set_nodes(spec.source.id(), spec.target.id());
    job.set_copy_mode(spec.copy_mode);
    job.set_converge(spec.more.converge);
    job.set_portable(whole);
    let hold = match use_nodes(&job, &spec.source, &spec.target) {
        Ok(hold) => hold,
        Err(error) => {
            manager.withdraw(&job);
            return Err(error);
        }
    };
    let copy = Copy::new(CopySetup {
        compress: false,
        keeps_bytes: false,
        discard_source: false,
        shares: true,
        job,
        source: Rc::clone(&spec.source),
        target: Rc::clone(&spec.target),
        granularity,
        all_dirty: false,
        whole_granules: false,
        before: BeforeWrite::default(),
        spill: None,
        bounds: bounds(spec.more.buf_size, granularity),
        hold,
    });
    show_filter(Kind::Mirror, &copy, spec.more.filter_name.as_deref())?;
    let hook: Rc<dyn WriteHook> =
        MirrorHook::new(&copy, !spec.more.keep_zeroes, spec.needs_whole_clusters());
    let slot = HookSlot::new(&spec.source, hook);
    if let Some((name, mode)) = bitmap {
        let used = use_bitmap(&copy, &name, mode)?;
        let (begun, by_bitmap) = (Rc::clone(&copy), spec.sync.is_by_bitmap());
        slot.at_start(Box::new(move || {
            if by_bitmap {
                used.view(|bits| begun.add_from(bits));
            }
        }));
    }
    let follower = Follower::new(&copy, &slot, Rc::new(ToTarget(spec.more.backing_at_pivot)));
    let (planned, place) = (Rc::clone(&copy), Rc::clone(&slot));
    let body: Body =
        Box::pin(async move { follower.run(plan(&planned, &place.first(), &spec)).await });
    Ok(Prepared { copy, slot, body, opened: None })
}

/// What `buf-size` allows: half of it in one copy at most, so that two are in flight.
fn bounds(buf_size: u64, granularity: u64) -> Bounds {
    if buf_size == 0 {
        return Bounds::default();
    }
    let bytes = buf_size.next_multiple_of(granularity).min(BUF_SIZE_MAX);
    Bounds { bytes, chunk: (bytes / 2).max(granularity), ..Bounds::default() }
}

/// Finds out what is to be copied of `source`, where the guests were at the start.
async fn plan(copy: &Rc<Copy>, source: &Rc<Node>, spec: &MirrorSpec) -> Result<()> {
    let shape = copy.hold_shape().await;
    // A job that failed while its disk grew has a target of another size, which is not why.
    copy.check()?;
    let (size, target) = (copy.source().size(), spec.target.size());
    let fits = target == size || (spec.allow_larger_target && target > size);
    if !fits {
        return Err(JobError::SizesDiffer);
    }
    copy.zero_tail().await?;
    drop(shape);
    // Without a backing file the top layer is everything, as for the peer.
    let top = spec.sync == SyncMode::Top && source.has_backing();
    if spec.sync != SyncMode::None && !spec.sync.is_by_bitmap() {
        let target_is_zero = spec.more.target_is_zero;
        copy.plan(source, Plan { top, all_dirty: false, target_is_zero }).await?;
    }
    Ok(())
}

/// Guests move to the target, and the node of this id is put below it.
struct ToTarget(Option<NodeId>);

impl Takeover for ToTarget {
    fn switch(&self, graph: &Rc<Graph>, copy: &Rc<Copy>, ending: Ending) {
        if ending != Ending::Complete {
            return;
        }
        graph.repoint(copy.source().id(), copy.target().id());
        let Some(below) = self.0.and_then(|id| graph.node(id)) else { return };
        if let Err(error) = graph.set_backing(copy.target(), Some(&below)) {
            // Nobody excludes an overlay of a node that is read by overlays already.
            tracing::error!(%error, node = %below.name(), "no backing node below the target");
        }
    }

    fn after(&self, _: Ending) -> LocalFuture<'static, ()> {
        Box::pin(async {})
    }
}
