//! Transactions: snapshots, starts of jobs and changes of dirty bitmaps at one instant, all or
//! nothing.
//!
//! Order: (1) checks; (2) prepare every action in list order, each on the core of its node (files
//! are created, nothing that runs is touched); (3) publish the new files; (4) one cut over all
//! nodes of all actions on all cores: with nothing in flight images take their own snapshots, then
//! every action swaps (memory only); where a snapshot from elsewhere moved a job since (2) the cut
//! is planned again; (5) commit: jobs start; (6) finish: old layers become read-only. The first
//! failure before the swaps of (4) undoes everything in reverse order and is the answer.
//!
//! A transaction runs as a task of its own: dropping the caller's future does not stop it half-way.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use liveblk_engine::ErrorKind;
use liveblk_engine::executor::{Class, Core, CoreId};
use liveblk_engine::graph::{BeforeSwap, CutPart, Graph, Swap, cut};
use liveblk_engine::node::NodeId;

use crate::actions::{BackupAction, CommitAction, MirrorAction, StreamAction};
use crate::bitmaps::{BitmapAction, PreparedBitmap};
use crate::chain_error::ChainError;
use crate::drive::DriveTarget;
use crate::error::{JobError, Result};
use crate::internal::{self, InternalSnapshot, PreparedInternal};
use crate::limits::{ACTIONS, CUT_WAIT_NS};
use crate::snapshot::{self, PreparedSnapshot, SnapshotFile};
use crate::start::Prepared;
use crate::txn::JobTxn;

/// How the jobs of a transaction end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompletionMode {
    /// Each by itself.
    #[default]
    Individual,
    /// All well, or all cancelled.
    Grouped,
}

/// One action of a transaction. Nodes are named, so an action can travel to their core.
#[derive(Clone, Debug)]
pub enum Action {
    /// Fails on purpose.
    Abort,
    /// `blockdev-snapshot`.
    Snapshot {
        /// The node.
        node: String,
        /// The overlay, opened without a backing node.
        overlay: String,
    },
    /// `blockdev-snapshot-sync`.
    SnapshotFile(SnapshotFile),
    /// `blockdev-snapshot-internal-sync`.
    InternalSnapshot(InternalSnapshot),
    /// `blockdev-backup`.
    Backup(BackupAction),
    /// A change of dirty bitmaps.
    Bitmap(BitmapAction),
    /// `drive-backup`.
    DriveBackup(BackupAction, DriveTarget),
    /// `blockdev-mirror`.
    Mirror(MirrorAction),
    /// `drive-mirror`.
    DriveMirror(MirrorAction, DriveTarget),
    /// `block-stream`.
    Stream(StreamAction),
    /// `block-commit`, of intermediate layers and of the one that guests write.
    Commit(CommitAction),
}

impl Action {
    /// Whether it starts a job.
    const fn starts_job(&self) -> bool {
        match self {
            Self::Backup(_) | Self::DriveBackup(..) | Self::Stream(_) | Self::Commit(_) => true,
            Self::Mirror(_) | Self::DriveMirror(..) => true,
            Self::Abort | Self::Bitmap(_) => false,
            Self::Snapshot { .. } | Self::SnapshotFile(_) | Self::InternalSnapshot(_) => false,
        }
    }

    /// The name in QMP.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Abort => "abort",
            Self::Snapshot { .. } => "blockdev-snapshot",
            Self::SnapshotFile(_) => "blockdev-snapshot-sync",
            Self::InternalSnapshot(_) => "blockdev-snapshot-internal-sync",
            Self::Backup(_) => "blockdev-backup",
            Self::Bitmap(action) => action.name(),
            Self::DriveBackup(..) => "drive-backup",
            Self::Mirror(_) => "blockdev-mirror",
            Self::DriveMirror(..) => "drive-mirror",
            Self::Stream(_) => "block-stream",
            Self::Commit(_) => "block-commit",
        }
    }
}

/// Takes the snapshots and starts the backups of `actions`, each on the core beside it (the home
/// of its node), at one instant.
///
/// # Errors
/// The first failure; then nothing was changed and no file is left.
pub async fn transaction(
    core: &Core,
    actions: Vec<(CoreId, Action)>,
    completion: CompletionMode,
) -> Result<()> {
    let coordinator = core.clone();
    core.spawn(Class::Guest, async move { run(&coordinator, actions, completion).await }).await
}

/// Takes one snapshot into a file.
///
/// # Errors
/// As [`transaction`].
pub async fn snapshot_file(core: &Core, home: CoreId, spec: SnapshotFile) -> Result<()> {
    transaction(core, vec![(home, Action::SnapshotFile(spec))], CompletionMode::Individual).await
}

/// What a core has prepared for transactions, by the number of the transaction.
#[derive(Default)]
struct Staged {
    next: Cell<u64>,
    sets: RefCell<BTreeMap<u64, Set>>,
}

#[derive(Default)]
struct Set {
    steps: Vec<Step>,
    group: Option<Rc<JobTxn>>,
}

enum Step {
    Snapshot(PreparedSnapshot),
    Internal(PreparedInternal),
    Job(Prepared),
    Bitmap(PreparedBitmap),
}

impl Staged {
    fn of(core: &Core) -> Rc<Self> {
        core.extension(Self::default)
    }

    fn new_number(&self, core: &Core) -> u64 {
        self.next.set(self.next.get() + 1);
        u64::from(core.id().0) << 48 | self.next.get()
    }

    fn take(&self, number: u64) -> Vec<Step> {
        self.sets.borrow_mut().remove(&number).map(|set| set.steps).unwrap_or_default()
    }
}

impl Step {
    fn nodes(&self) -> Vec<NodeId> {
        match self {
            Self::Snapshot(snapshot) => snapshot.nodes(),
            Self::Internal(snapshot) => snapshot.nodes(),
            Self::Job(job) if job.slot.is_empty() => Vec::new(),
            Self::Job(job) => vec![job.slot.plan_cut()],
            Self::Bitmap(bitmap) => bitmap.nodes(),
        }
    }

    /// Whether the cut was planned for where its guests are.
    fn stays(&self) -> bool {
        match self {
            Self::Job(job) => job.copy.check_source(job.slot.planned()).is_ok(),
            Self::Snapshot(_) | Self::Internal(_) | Self::Bitmap(_) => true,
        }
    }

    /// With all gates closed, before any swap: images take their own snapshots, and what may have
    /// changed since it was prepared is looked at again.
    async fn begin_cut(&mut self, core: &Core) -> Result<()> {
        match self {
            Self::Internal(snapshot) => snapshot.take().await,
            Self::Snapshot(snapshot) => snapshot.check(core),
            Self::Job(_) | Self::Bitmap(_) => Ok(()),
        }
    }

    fn swap(&self, graph: &Rc<Graph>) {
        match self {
            Self::Snapshot(snapshot) => snapshot.swap(graph),
            // Taken before the swaps.
            Self::Internal(_) => {}
            Self::Job(job) => job.slot.install(),
            Self::Bitmap(bitmap) => bitmap.swap(),
        }
    }
}

async fn run(
    core: &Core,
    actions: Vec<(CoreId, Action)>,
    completion: CompletionMode,
) -> Result<()> {
    check(&actions, completion)?;
    let number = Staged::of(core).new_number(core);
    let grouped = completion == CompletionMode::Grouped;
    let mut parts: BTreeMap<CoreId, Vec<NodeId>> = BTreeMap::new();
    let prepared = prepare_all(core, number, grouped, actions, &mut parts).await;
    let cores: Vec<CoreId> = parts.keys().copied().collect();
    let result = match prepared {
        Ok(()) => publish_and_cut(core, number, parts).await,
        Err(error) => Err(error),
    };
    for home in cores.into_iter().rev() {
        let done = result.is_ok();
        let end = core.call(home, move |core| async move {
            let steps = Staged::of(&core).take(number);
            if done {
                commit(steps).await;
            } else {
                abort(&core, steps).await;
            }
        });
        // A core that is gone has no graph to put in order.
        let _: Option<()> = end.await;
    }
    result
}

fn check(actions: &[(CoreId, Action)], completion: CompletionMode) -> Result<()> {
    if actions.len() > ACTIONS {
        return Err(JobError::TooMany { what: "actions in a transaction", limit: ACTIONS });
    }
    if completion == CompletionMode::Grouped {
        let mut homes = actions.iter().filter(|(_, action)| action.starts_job());
        let first = homes.next().map(|(home, _)| *home);
        if homes.any(|(home, _)| Some(*home) != first) {
            return Err(JobError::NotYet { what: "Grouped completion over several cores" });
        }
    }
    Ok(())
}

/// Prepares the actions in order; `parts` names the cores touched and the nodes of the cut, also
/// after a failure.
async fn prepare_all(
    core: &Core,
    number: u64,
    grouped: bool,
    actions: Vec<(CoreId, Action)>,
    parts: &mut BTreeMap<CoreId, Vec<NodeId>>,
) -> Result<()> {
    for (home, action) in actions {
        let nodes = parts.entry(home).or_default();
        let prepared = core
            .call(home, move |core| async move { prepare(&core, number, grouped, action).await });
        let found = prepared.await.ok_or_else(core_gone)??;
        for id in found {
            if !nodes.contains(&id) {
                nodes.push(id);
            }
        }
    }
    Ok(())
}

async fn prepare(core: &Core, number: u64, grouped: bool, action: Action) -> Result<Vec<NodeId>> {
    let staged = Staged::of(core);
    let txn = || if grouped { staged.group(number) } else { JobTxn::new() };
    let step = match action {
        Action::Abort => return Err(JobError::AbortAction),
        Action::Snapshot { node, overlay } => {
            Step::Snapshot(snapshot::prepare_nodes(core, &node, &overlay)?)
        }
        Action::SnapshotFile(spec) => Step::Snapshot(snapshot::prepare_file(core, spec).await?),
        Action::InternalSnapshot(spec) => Step::Internal(internal::prepare(core, spec)?),
        Action::Backup(backup) => Step::Job(backup.prepare(core, None, &txn()).await?),
        Action::DriveBackup(backup, file) => {
            Step::Job(backup.prepare(core, Some(file), &txn()).await?)
        }
        Action::Mirror(mirror) => Step::Job(mirror.prepare(core, None, &txn()).await?),
        Action::DriveMirror(mirror, file) => {
            Step::Job(mirror.prepare(core, Some(file), &txn()).await?)
        }
        Action::Stream(stream) => {
            staged.check_no_overlay(number, &stream.node)?;
            Step::Job(stream.prepare(core, &txn()).await?)
        }
        Action::Commit(commit) => {
            staged.check_no_overlay(number, &commit.device)?;
            Step::Job(commit.prepare(core, &txn()).await?)
        }
        Action::Bitmap(action) => Step::Bitmap(PreparedBitmap::new(core, action).await?),
    };
    let nodes = step.nodes();
    staged.sets.borrow_mut().entry(number).or_default().steps.push(step);
    Ok(nodes)
}

impl Staged {
    /// The job transaction of a grouped transaction.
    fn group(&self, number: u64) -> Rc<JobTxn> {
        let mut sets = self.sets.borrow_mut();
        Rc::clone(sets.entry(number).or_default().group.get_or_insert_with(JobTxn::new))
    }

    /// Refuses a job on a chain whose head gets what lies below it only by this transaction.
    fn check_no_overlay(&self, number: u64, name: &str) -> Result<()> {
        let sets = self.sets.borrow();
        let mut steps = sets.get(&number).into_iter().flat_map(|set| &set.steps);
        let is_new = |step: &Step| match step {
            Step::Snapshot(snapshot) => &*snapshot.overlay().name() == name,
            _ => false,
        };
        if steps.any(is_new) {
            return Err(ChainError::NewOverlay(name.into()).into());
        }
        Ok(())
    }
}

async fn publish_and_cut(
    core: &Core,
    number: u64,
    mut parts: BTreeMap<CoreId, Vec<NodeId>>,
) -> Result<()> {
    let homes: Vec<CoreId> = parts.keys().copied().collect();
    for home in homes.clone() {
        with_steps(core, home, number, async |core, steps| publish(core, steps).await).await?;
    }
    loop {
        let ended: Rc<Cell<Option<Stop>>> = Rc::default();
        match cut_once(core, number, parts, Rc::clone(&ended)).await {
            Ok(()) => return Ok(()),
            Err(error) => match ended.take() {
                // A snapshot moved guests first, and a job with them: it starts where they are.
                Some(Stop::Moved) => parts = plan_again(core, number, &homes).await?,
                Some(Stop::Failed(error)) => return Err(error),
                None => return Err(error),
            },
        }
    }
}

/// Why a cut ended before its swaps.
enum Stop {
    /// A job is at another node than the one whose gates are closed; nothing was done.
    Moved,
    Failed(JobError),
}

/// One cut over `parts`; `ended` says why its steps ended it.
async fn cut_once(
    core: &Core,
    number: u64,
    mut parts: BTreeMap<CoreId, Vec<NodeId>>,
    ended: Rc<Cell<Option<Stop>>>,
) -> Result<()> {
    let homes = parts.keys().copied().collect();
    let mut begin = Some(begin_steps(core, number, homes, ended));
    // What runs before the swaps belongs to the part of this core.
    parts.entry(core.id()).or_default();
    let part = |(home, nodes)| {
        let swap = move |graph: &Rc<Graph>| {
            let staged = Staged::of(graph.core());
            let sets = staged.sets.borrow();
            for step in sets.get(&number).into_iter().flat_map(|set| &set.steps) {
                step.swap(graph);
            }
        };
        let swap = Swap::Remote(Box::new(swap));
        let before_swap = if home == core.id() { begin.take() } else { None };
        CutPart { core: home, nodes, flush: true, before_swap, swap }
    };
    let parts = parts.into_iter().map(part).collect();
    Ok(cut(core, parts, CUT_WAIT_NS).await?)
}

/// The nodes of the cut, as they are now.
async fn plan_again(
    core: &Core,
    number: u64,
    homes: &[CoreId],
) -> Result<BTreeMap<CoreId, Vec<NodeId>>> {
    let mut parts = BTreeMap::new();
    for home in homes {
        let nodes = with_steps(core, *home, number, async |_, steps| {
            let mut nodes: Vec<NodeId> = steps.iter().flat_map(Step::nodes).collect();
            nodes.sort_unstable();
            nodes.dedup();
            Ok(nodes)
        });
        parts.insert(*home, nodes.await?);
    }
    Ok(parts)
}

/// With all gates closed: everything is looked at, then images take their own snapshots. What goes
/// wrong is left in `ended`.
fn begin_steps(
    core: &Core,
    number: u64,
    homes: Vec<CoreId>,
    ended: Rc<Cell<Option<Stop>>>,
) -> BeforeSwap {
    let core = core.clone();
    Box::new(move |_| {
        Box::pin(async move {
            let stop = begin_all(&core, number, &homes).await.err();
            let Some(stop) = stop else { return Ok(()) };
            ended.set(Some(stop));
            let (kind, what) = (ErrorKind::Cancelled, "begin the transaction");
            Err(liveblk_engine::Error::new(kind, what))
        })
    })
}

async fn begin_all(core: &Core, number: u64, homes: &[CoreId]) -> Result<(), Stop> {
    for home in homes {
        let stay =
            with_steps(core, *home, number, async |_, steps| Ok(steps.iter().all(Step::stays)));
        if !stay.await.map_err(Stop::Failed)? {
            return Err(Stop::Moved);
        }
    }
    for home in homes {
        let begun = with_steps(core, *home, number, async |core, steps| {
            for step in steps {
                step.begin_cut(core).await?;
            }
            Ok(())
        });
        begun.await.map_err(Stop::Failed)?;
    }
    Ok(())
}

/// Runs `work` on the steps that a core has prepared.
async fn with_steps<T: Send + 'static>(
    core: &Core,
    home: CoreId,
    number: u64,
    work: impl AsyncFnOnce(&Core, &mut [Step]) -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = core.call(home, move |core| async move {
        let mut steps = Staged::of(&core).take(number);
        let result = work(&core, &mut steps).await;
        let set = Set { steps, group: None };
        Staged::of(&core).sets.borrow_mut().insert(number, set);
        result
    });
    done.await.ok_or_else(core_gone)?
}

async fn publish(core: &Core, steps: &mut [Step]) -> Result<()> {
    for step in steps {
        if let Step::Snapshot(snapshot) = step {
            snapshot.publish(core).await?;
        }
    }
    Ok(())
}

async fn commit(steps: Vec<Step>) {
    let (mut snapshots, mut bitmaps) = (Vec::new(), Vec::new());
    for step in steps {
        match step {
            Step::Job(job) => drop(job.commit()),
            Step::Snapshot(snapshot) => snapshots.push(snapshot),
            Step::Internal(_) => {}
            Step::Bitmap(bitmap) => bitmaps.push(bitmap),
        }
    }
    // Bitmaps first: a node that becomes read-only stores what is left.
    for bitmap in bitmaps {
        bitmap.finish().await;
    }
    for snapshot in snapshots {
        snapshot.finish().await;
    }
}

async fn abort(core: &Core, steps: Vec<Step>) {
    for step in steps.into_iter().rev() {
        match step {
            Step::Job(job) => job.abort().await,
            Step::Snapshot(snapshot) => snapshot.abort(core).await,
            Step::Internal(snapshot) => snapshot.abort().await,
            Step::Bitmap(bitmap) => bitmap.abort().await,
        }
    }
}

fn core_gone() -> JobError {
    JobError::Engine(liveblk_engine::Error::new(ErrorKind::Cancelled, "reach another core"))
}
