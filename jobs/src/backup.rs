//! Backup: the source as it was at the start, while guests go on writing.
//!
//! Order rules:
//! 1. the start is a cut: everything is dirty and the hook is in before the first write passes;
//! 2. the hook runs under the node's claim, before the data: it lets the write go when the old
//!    content of every granule it touches is in memory or copied;
//! 3. a copy clears the bits before it reads;
//! 4. the target is durable before the end is announced.
//!
//! A target that fails never reaches the guest, unless the client asked for that. Old content that
//! a guest overwrote is written again by the policy of the job. A reserve in memory and then the
//! spill file hold it until then; beyond their bounds the job fails.

use std::path::Path;
use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::error::Result as EngineResult;
use liveblk_engine::format::LocalFuture;
use liveblk_engine::node::WriteHook;

use crate::beside::{Seat, check_beside};
use crate::copy::{BeforeWrite, Bounds, Copy, CopySetup, Plan, SpillPlan};
use crate::error::{JobError, Result};
use crate::event::Kind;
use crate::fleecing::shows;
use crate::job::Job;
use crate::manager::JobManager;
use crate::spec::{BackupSpec, OnCbwError, SyncMode};
use crate::start::{
    Body, HookSlot, Prepared, check_active, check_target, show_filter, use_bitmap, use_nodes,
};
use crate::txn::JobTxn;

/// Starts a backup. When the future ends well, the point in time is in the past: every write
/// answered before the call is in the backup, none sent after the end of the future is.
///
/// # Errors
/// What cannot work, with the peer's texts; no job is left then.
pub async fn start_backup(spec: BackupSpec) -> Result<Rc<Job>> {
    prepare_backup(spec, &JobTxn::new())?.start().await
}

/// All of a start that comes before the cut.
pub(crate) fn prepare_backup(spec: BackupSpec, txn: &Rc<JobTxn>) -> Result<Prepared> {
    let bitmap = spec.more.bitmap.checked(spec.sync, &spec.source)?;
    spec.check()?;
    let manager = JobManager::of(spec.source.core());
    check_active(&spec.source, "file")?;
    let overlay = shows(&spec.target, &spec.source);
    let whole = matches!(spec.sync, SyncMode::Full | SyncMode::None)
        && spec.more.bitmap.name.is_none()
        && !overlay;
    check_beside(&manager, &spec.source, Kind::Backup, whole, txn)?;
    check_target(&manager, &spec.target)?;
    let (source, target) = (spec.source.size(), spec.target.size());
    if !(target == source || (spec.allow_larger_target && target > source)) {
        return Err(JobError::SizesDifferBytes { source, target });
    }
    let job = manager.create(Kind::Backup, spec.job.clone(), txn)?;
    job.set_nodes(spec.source.id(), spec.target.id());
    job.set_portable(whole);
    let hold = match use_nodes(&job, &spec.source, &spec.target) {
        Ok(hold) => hold,
        Err(error) => {
            manager.withdraw(&job);
            return Err(error);
        }
    };
    if overlay {
        spec.target.watch_reads();
    }
    let by_bitmap = spec.sync.is_by_bitmap();
    let copy = Copy::new(CopySetup {
        job,
        source: Rc::clone(&spec.source),
        target: Rc::clone(&spec.target),
        granularity: spec.granularity(),
        before: BeforeWrite { on_error: spec.more.on_cbw_error, timeout_ns: None, overlay },
        spill: spill_plan(&spec, overlay),
        bounds: bounds(&spec),
        all_dirty: !by_bitmap,
        whole_granules: true,
        compress: spec.compress,
        keeps_bytes: true,
        discard_source: spec.more.discard_source,
        shares: spec.more.use_copy_range,
        hold,
    });
    show_filter(Kind::Backup, &copy, spec.more.filter_name.as_deref())?;
    let hook: Rc<dyn WriteHook> = Rc::new(CopyBeforeWrite(Rc::clone(&copy)));
    let slot = HookSlot::new(&spec.source, hook);
    if let Some((name, mode)) = bitmap {
        let used = use_bitmap(&copy, &name, mode)?;
        let begun = Rc::clone(&copy);
        slot.at_start(Box::new(move || {
            used.freeze();
            begun.begin_with(&used, !by_bitmap);
        }));
    }
    let seat = Seat::new(&copy, &slot);
    copy.job().set_seat(&seat);
    let inner = Rc::clone(&copy);
    let body: Body = Box::pin(async move {
        let ended = run(inner, spec).await;
        drop(seat);
        ended.map(|()| None)
    });
    Ok(Prepared { copy, slot, body, opened: None })
}

/// What the client's tuning allows.
fn bounds(spec: &BackupSpec) -> Bounds {
    let mut bounds = Bounds::default();
    if let Ok(workers @ 1..) = usize::try_from(spec.more.max_workers) {
        bounds.units = bounds.units.min(workers);
    }
    if spec.more.max_chunk > 0 {
        bounds.chunk = spec.more.max_chunk;
    }
    bounds
}

/// Where old content goes that the target does not take in time; nowhere if guests are to wait.
fn spill_plan(spec: &BackupSpec, overlay: bool) -> Option<SpillPlan> {
    let max = spec.more.spill.max.unwrap_or_else(|| spec.source.size());
    if max == 0 || overlay || spec.more.on_cbw_error == OnCbwError::BreakGuestWrite {
        return None;
    }
    let target = spec.target.local_path();
    let name = target.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy());
    let name = name.map_or_else(|| spec.target.name().to_string(), |name| name.into_owned());
    let name = format!("{name}.{}.spill", spec.job.id);
    let path = match &spec.more.spill.folder {
        Some(folder) => folder.join(name),
        None => target.or_else(|| spec.source.local_path())?.with_file_name(name),
    };
    let after = spec.more.spill.after.unwrap_or(u64::MAX);
    Some(SpillPlan { path, max, after })
}

/// Lets a write go when the old content is safe.
pub(crate) struct CopyBeforeWrite(pub(crate) Rc<Copy>);

impl WriteHook for CopyBeforeWrite {
    fn before_write(&self, range: GuestRange) -> Option<LocalFuture<'static, EngineResult<()>>> {
        if !self.0.is_needed_before_write(range) {
            return None;
        }
        let copy = Rc::clone(&self.0);
        Some(Box::pin(async move { copy.before_guest_write(range).await }))
    }

    fn after_write(&self, _: GuestRange) {}
}

async fn run(copy: Rc<Copy>, spec: BackupSpec) -> Result<()> {
    copy.zero_tail().await?;
    // Without a backing file the top layer is everything, as for the peer.
    let top = spec.sync == SyncMode::Top && spec.source.has_backing();
    if spec.sync == SyncMode::None {
        return keep_old(&copy).await;
    }
    if !spec.sync.is_by_bitmap() {
        copy.plan(&spec.source, Plan { top, all_dirty: true, target_is_zero: false }).await?;
    }
    copy.run_until_clean().await?;
    copy.flush_target().await?;
    // Who reads an overlay may be on the way to the source, which guests are about to change.
    let readers = copy.target().reads_ended(GuestRange::new(0, copy.size()));
    copy.job().unless_dead(readers, || copy.is_dead()).await;
    copy.check()
}

/// Keeps what guests overwrite until the job is cancelled.
async fn keep_old(copy: &Rc<Copy>) -> Result<()> {
    let job = copy.job();
    loop {
        let changed = job.changed().wait();
        copy.check()?;
        if job.wants_pause() {
            job.pause_point().await;
        } else {
            job.set_busy(false);
            changed.await;
        }
    }
}
