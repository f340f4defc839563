//! Starting jobs, snapshots and transactions.
//!
//! Owns: the translation of arguments, and the refusal of options that this version does not have.
//! Does not: check what the jobs crate checks.

use liveblk_engine::executor::CoreId;
use liveblk_jobs::{
    Action, Amendment, BackupAction, BackupSpec, CompletionMode, CopyMode, JobError, JobOptions,
    MirrorSpec, NewImageMode, OnError, SnapshotFile, SyncMode, start_amend, start_backup,
    start_mirror,
};

use super::bitmaps::bitmap_action;
use super::control::{Control, Result};
use super::errors::Failure;
use super::internal::internal_snapshot;
use crate::schema::{
    self, BackupPerf, BlockdevAmend, BlockdevBackup, BlockdevMirror, BlockdevSnapshot,
    BlockdevSnapshotSync, MirrorCopyMode, Transaction, TransactionAction,
};

impl Control {
    /// `blockdev-mirror`.
    pub(super) async fn mirror(&self, mirror: BlockdevMirror) -> Result<()> {
        let source = self.node(&mirror.device)?;
        let target = self.node(&mirror.target)?;
        if mirror.replaces.as_ref().is_some_and(|replaces| *replaces != mirror.device) {
            return Err(not_yet("Option 'replaces' for another node than the source"));
        }
        if let Some(name) = &mirror.filter_node_name {
            self.graph.check_name(name)?;
        }
        if mirror.buf_size.is_some_and(|size| size < 0) {
            return Err(Failure::generic("Invalid parameter 'buf-size'"));
        }
        let job = JobOptions {
            id: mirror.job_id.unwrap_or_default(),
            speed: mirror.speed,
            auto_finalize: mirror.auto_finalize,
            auto_dismiss: mirror.auto_dismiss,
            on_source_error: on_error(mirror.on_source_error),
            on_target_error: on_error(mirror.on_target_error),
        };
        let spec = MirrorSpec {
            job,
            source,
            target,
            sync: sync_mode(mirror.sync),
            copy_mode: copy_mode(mirror.copy_mode),
            granularity: mirror.granularity.map(u64::from),
            allow_larger_target: mirror.allow_larger_target,
        };
        start_mirror(spec).await?;
        Ok(())
    }

    /// `blockdev-backup`.
    pub(super) async fn backup(&self, backup: BlockdevBackup) -> Result<()> {
        let source = self.node(&backup.device)?;
        let target = self.node(&backup.target)?;
        self.check_backup(&backup)?;
        let spec = BackupSpec {
            source,
            target,
            sync: sync_mode(backup.sync),
            allow_larger_target: backup.allow_larger_target,
            compress: backup.compress,
            job: backup_job(backup),
        };
        start_backup(spec).await?;
        Ok(())
    }

    /// What the peer's backup refuses, and what this version does not have.
    fn check_backup(&self, backup: &BlockdevBackup) -> Result<()> {
        if backup.bitmap.is_none() && backup.bitmap_mode.is_some() {
            let desc = "Cannot specify bitmap sync mode without a bitmap";
            return Err(Failure::generic(desc));
        }
        if let Some(bitmap) = &backup.bitmap {
            return Err(Failure::generic(format!("Bitmap '{bitmap}' could not be found")));
        }
        check_perf(&backup.x_perf)?;
        if backup.discard_source {
            return Err(not_yet("Option 'discard-source'"));
        }
        let Some(name) = &backup.filter_node_name else { return Ok(()) };
        self.graph
            .check_name(name)
            .map_err(|error| Failure::generic(format!("Could not create node: {error}")))
    }

    /// `x-blockdev-amend`.
    pub(super) fn amend(&self, amend: &BlockdevAmend) -> Result<()> {
        let node = self.graph.find(&amend.node_name);
        let node = node.map_err(|_| Failure::no_node("", &amend.node_name))?;
        if node.driver() != amend.options.driver {
            let desc = "x-blockdev-amend doesn't support changing the block driver";
            return Err(Failure::generic(desc));
        }
        if node.driver() != "qcow2" {
            return Err(Failure::generic("Driver does not support x-blockdev-amend"));
        }
        let amendment = match amend.options.encrypt {
            None => Amendment::Nothing,
            Some(_) => Amendment::Encryption,
        };
        start_amend(&self.core, &amend.job_id, amendment)?;
        Ok(())
    }

    /// `blockdev-snapshot`.
    pub(super) async fn snapshot(&self, snapshot: BlockdevSnapshot) -> Result<()> {
        let action = self.action(TransactionAction::Snapshot(snapshot))?;
        self.run_transaction(vec![action], CompletionMode::Individual).await
    }

    /// `blockdev-snapshot-sync`.
    pub(super) async fn snapshot_sync(&self, snapshot: BlockdevSnapshotSync) -> Result<()> {
        let action = self.action(TransactionAction::SnapshotSync(snapshot))?;
        self.run_transaction(vec![action], CompletionMode::Individual).await
    }

    /// `transaction`.
    pub(super) async fn transaction(&self, transaction: Transaction) -> Result<()> {
        let completion = match transaction.completion_mode() {
            schema::CompletionMode::Individual => CompletionMode::Individual,
            schema::CompletionMode::Grouped => CompletionMode::Grouped,
        };
        if completion == CompletionMode::Grouped {
            let other = transaction.actions.iter().find(|action| !may_be_grouped(action));
            if let Some(action) = other {
                return Err(JobError::NotGrouped { action: action.name() }.into());
            }
        }
        let actions = transaction.actions.into_iter().map(|action| self.action(action));
        let actions = actions.collect::<Result<Vec<_>>>()?;
        self.run_transaction(actions, completion).await
    }

    pub(super) async fn run_transaction(
        &self,
        actions: Vec<Action>,
        mode: CompletionMode,
    ) -> Result<()> {
        let home: CoreId = self.core.id();
        let created: Vec<SnapshotFile> = actions.iter().filter_map(created_file).collect();
        let actions = actions.into_iter().map(|action| (home, action)).collect();
        liveblk_jobs::transaction(&self.core, actions, mode).await?;
        for snapshot in created {
            let overlay = snapshot.overlay.and_then(|name| self.graph.find(&name).ok());
            if let Some(reference) = overlay.and_then(|overlay| overlay.info().backing) {
                self.graph.know_reference(snapshot.file, reference);
            }
        }
        Ok(())
    }

    fn action(&self, action: TransactionAction) -> Result<Action> {
        match action {
            TransactionAction::Abort => Ok(Action::Abort),
            TransactionAction::Snapshot(BlockdevSnapshot { node, overlay }) => {
                Ok(Action::Snapshot { node, overlay })
            }
            TransactionAction::SnapshotInternal(snapshot) => {
                Ok(Action::InternalSnapshot(internal_snapshot(snapshot)))
            }
            TransactionAction::SnapshotSync(snapshot) => self.snapshot_action(snapshot),
            TransactionAction::Bitmap(change) => Ok(Action::Bitmap(bitmap_action(change)?)),
            TransactionAction::Backup(backup) => {
                self.check_backup(&backup)?;
                Ok(Action::Backup(BackupAction {
                    source: backup.device.clone(),
                    target: backup.target.clone(),
                    sync: sync_mode(backup.sync),
                    allow_larger_target: backup.allow_larger_target,
                    compress: backup.compress,
                    job: backup_job(*backup),
                }))
            }
        }
    }

    fn snapshot_action(&self, snapshot: BlockdevSnapshotSync) -> Result<Action> {
        // Nodes are no devices here: only a node's name finds one.
        let device = snapshot.device.unwrap_or_default();
        let node = snapshot.node_name.unwrap_or_default();
        if !device.is_empty() && self.graph.find(&node).is_err() {
            return Err(Failure::no_node(&device, &node));
        }
        Ok(Action::SnapshotFile(SnapshotFile {
            node,
            file: snapshot.snapshot_file.into(),
            overlay: snapshot.snapshot_node_name,
            format: snapshot.format.unwrap_or_else(|| "qcow2".to_owned()),
            mode: match snapshot.mode {
                schema::NewImageMode::Existing => NewImageMode::Existing,
                schema::NewImageMode::AbsolutePaths => NewImageMode::AbsolutePaths,
            },
        }))
    }
}

/// Whether an action goes with jobs that end together; the peer takes nothing but backups.
fn may_be_grouped(action: &TransactionAction) -> bool {
    matches!(action, TransactionAction::Backup(_) | TransactionAction::Bitmap(_))
}

/// The snapshot, if its file is made here.
fn created_file(action: &Action) -> Option<SnapshotFile> {
    match action {
        Action::SnapshotFile(snapshot) if snapshot.mode == NewImageMode::AbsolutePaths => {
            Some(snapshot.clone())
        }
        _ => None,
    }
}

fn backup_job(backup: BlockdevBackup) -> JobOptions {
    JobOptions {
        id: backup.job_id.unwrap_or_default(),
        speed: backup.speed,
        auto_finalize: backup.auto_finalize,
        auto_dismiss: backup.auto_dismiss,
        on_source_error: on_error(backup.on_source_error),
        on_target_error: on_error(backup.on_target_error),
    }
}

fn check_perf(perf: &BackupPerf) -> Result<()> {
    if perf.max_workers.is_some_and(|workers| !(1..=i64::from(i32::MAX)).contains(&workers)) {
        return Err(Failure::generic("max-workers must be between 1 and 2147483647"));
    }
    if perf.max_chunk.is_some_and(|chunk| chunk < 0) {
        let desc = "max-chunk must be zero (which means no limit) or positive";
        return Err(Failure::generic(desc));
    }
    Ok(())
}

fn not_yet(what: &'static str) -> Failure {
    JobError::NotYet { what }.into()
}

fn sync_mode(mode: schema::SyncMode) -> SyncMode {
    match mode {
        schema::SyncMode::Top => SyncMode::Top,
        schema::SyncMode::Full => SyncMode::Full,
        schema::SyncMode::None => SyncMode::None,
        schema::SyncMode::Incremental => SyncMode::Incremental,
        schema::SyncMode::Bitmap => SyncMode::Bitmap,
    }
}

/// The policy as jobs know it.
pub(super) fn on_error(policy: schema::OnError) -> OnError {
    match policy {
        schema::OnError::Report => OnError::Report,
        schema::OnError::Ignore => OnError::Ignore,
        schema::OnError::Enospc => OnError::Enospc,
        schema::OnError::Stop => OnError::Stop,
        schema::OnError::Auto => OnError::Auto,
    }
}

/// The copy mode as jobs know it.
pub(super) fn copy_mode(mode: MirrorCopyMode) -> CopyMode {
    match mode {
        MirrorCopyMode::Background => CopyMode::Background,
        MirrorCopyMode::WriteBlocking => CopyMode::WriteBlocking,
    }
}
