//! Starting jobs, snapshots and transactions.
//!
//! Owns: the translation of arguments, and the refusal of options that this version does not have.
//! Does not: check what the jobs crate checks.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use liveblk_engine::executor::CoreId;
use liveblk_engine::node::{Node, User};
use liveblk_engine::storage;
use liveblk_jobs::{
    Action, Amendment, BackupAction, BackupOptions, BackupSpec, BitmapChoice, BitmapMode,
    CommitAction, CompletionMode, Converge, CopyMode, DriveTarget, JobOptions, MirrorAction,
    MirrorOptions, MirrorSpec, NewImageMode, OnCbwError, OnError, SnapshotFile, SpillOptions,
    StreamAction, SyncMode, start_amend, start_backup, start_drive_backup, start_drive_mirror,
    start_mirror,
};

use super::bitmaps::bitmap_action;
use super::control::{Control, Result};
use super::errors::Failure;
use super::fleecing::{check_granule, on_cbw_error};
use super::internal::internal_snapshot;
use crate::schema::{
    self, BackupPerf, BlockdevAmend, BlockdevBackup, BlockdevMirror, BlockdevSnapshot,
    BlockdevSnapshotSync, ConvergeOptions, Drive, DriveFile, MirrorCopyMode, Transaction,
    TransactionAction,
};

impl Control {
    /// `blockdev-mirror`.
    pub(super) async fn mirror(&self, mirror: BlockdevMirror) -> Result<()> {
        let source = self.node(&mirror.device)?;
        let target = self.node(&mirror.target)?;
        check_no_overlay(&target)?;
        let MirrorAction { job, sync, copy_mode, granularity, allow_larger_target, more, .. } =
            self.mirror_action(mirror)?;
        start_mirror(MirrorSpec {
            job,
            source,
            target,
            sync,
            copy_mode,
            granularity,
            allow_larger_target,
            more,
        })
        .await?;
        Ok(())
    }

    /// `drive-mirror`.
    pub(super) async fn drive_mirror(&self, drive: Drive<BlockdevMirror>) -> Result<()> {
        self.node(&drive.job.device)?;
        check_drive(&drive)?;
        let (file, made) = (drive_target(&drive.file), drive.file.clone());
        let mut mirror = self.mirror_action(drive.job)?;
        mirror.more.keep_zeroes = !made.unmap;
        start_drive_mirror(&self.core, mirror, file).await?;
        Ok(())
    }

    /// `drive-backup`.
    pub(super) async fn drive_backup(&self, drive: Drive<BlockdevBackup>) -> Result<()> {
        self.node(&drive.job.device)?;
        self.check_backup(&drive.job)?;
        self.check_spill(&drive.job).await?;
        let file = drive_target(&drive.file);
        start_drive_backup(&self.core, backup_action(drive.job), file).await?;
        Ok(())
    }

    /// A mirror with its nodes by name.
    fn mirror_action(&self, mirror: BlockdevMirror) -> Result<MirrorAction> {
        let source = self.node(&mirror.device)?;
        self.check_mirror(&mirror, &source)?;
        let buf_size = u64::try_from(mirror.buf_size.unwrap_or(0))
            .map_err(|_| Failure::generic("Invalid parameter 'buf-size'"))?;
        let mode = mirror.bitmap_mode.map(bitmap_mode);
        let more = MirrorOptions {
            buf_size,
            target_is_zero: mirror.target_is_zero,
            filter_name: mirror.filter_node_name,
            bitmap: BitmapChoice { name: mirror.bitmap, mode },
            converge: mirror.converge.map(converging),
            ..MirrorOptions::default()
        };
        Ok(MirrorAction {
            job: JobOptions {
                id: mirror.job_id.unwrap_or_default(),
                speed: mirror.speed,
                auto_finalize: mirror.auto_finalize,
                auto_dismiss: mirror.auto_dismiss,
                on_source_error: on_error(mirror.on_source_error),
                on_target_error: on_error(mirror.on_target_error),
            },
            source: mirror.device,
            target: mirror.target,
            sync: sync_mode(mirror.sync),
            copy_mode: copy_mode(mirror.copy_mode),
            granularity: mirror.granularity.map(u64::from),
            allow_larger_target: mirror.allow_larger_target,
            more,
        })
    }

    /// What the peer's mirror refuses before it looks at the target.
    fn check_mirror(&self, mirror: &BlockdevMirror, source: &Rc<Node>) -> Result<()> {
        if let Some(name) = &mirror.replaces {
            // Nothing here stands between the source and its guests but filters, which move none.
            let replaced = self.graph.find(name).map_err(|_| {
                Failure::generic(format!("Failed to find node with node-name='{name}'"))
            })?;
            if replaced.id() != source.id() {
                return Err(Failure::generic(format!(
                    "Cannot replace '{name}' by a node mirrored from '{}', because it cannot be \
                     guaranteed that doing so would not lead to an abrupt change of visible data",
                    source.name()
                )));
            }
        }
        match &mirror.filter_node_name {
            Some(name) => Ok(self.graph.check_name(name)?),
            None => Ok(()),
        }
    }

    /// `blockdev-backup`.
    pub(super) async fn backup(&self, backup: BlockdevBackup) -> Result<()> {
        let source = self.node(&backup.device)?;
        let target = self.node(&backup.target)?;
        self.check_backup(&backup)?;
        self.check_spill(&backup).await?;
        let BackupAction { job, sync, allow_larger_target, compress, more, .. } =
            backup_action(backup);
        start_backup(BackupSpec { job, source, target, sync, allow_larger_target, compress, more })
            .await?;
        Ok(())
    }

    /// What the peer's backup refuses, and what this version does not have.
    /// Refuses a folder for a spill file that is none.
    async fn check_spill(&self, backup: &BlockdevBackup) -> Result<()> {
        let Some(folder) = &backup.spill_dir else { return Ok(()) };
        match storage::is_folder(&self.core, Path::new(folder)).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Failure::generic(format!("spill-dir '{folder}' is not a directory"))),
            Err(error) => Err(Failure::generic(format!("spill-dir '{folder}': {}", error.kind()))),
        }
    }

    fn check_backup(&self, backup: &BlockdevBackup) -> Result<()> {
        check_perf(&backup.x_perf)?;
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
        for action in &transaction.actions {
            match action {
                TransactionAction::Backup(backup) => self.check_spill(backup).await?,
                TransactionAction::DriveBackup(drive) => self.check_spill(&drive.job).await?,
                _ => {}
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
                Ok(Action::Backup(backup_action(*backup)))
            }
            TransactionAction::Mirror(mirror) => Ok(Action::Mirror(self.mirror_action(*mirror)?)),
            TransactionAction::DriveBackup(drive) => {
                self.check_backup(&drive.job)?;
                let file = drive_target(&drive.file);
                Ok(Action::DriveBackup(backup_action(drive.job), file))
            }
            TransactionAction::DriveMirror(drive) => {
                check_drive(&drive)?;
                let file = drive_target(&drive.file);
                let mut mirror = self.mirror_action(drive.job)?;
                mirror.more.keep_zeroes = !drive.file.unmap;
                Ok(Action::DriveMirror(mirror, file))
            }
            TransactionAction::Stream(stream) => {
                Ok(Action::Stream(StreamAction::of(self.stream_spec(*stream)?)))
            }
            TransactionAction::Commit(commit) => {
                Ok(Action::Commit(CommitAction::of(self.commit_spec(*commit)?)))
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
            mode: new_image_mode(snapshot.mode),
        }))
    }
}

/// A backup with its nodes by name.
fn backup_action(backup: BlockdevBackup) -> BackupAction {
    BackupAction {
        source: backup.device.clone(),
        target: backup.target.clone(),
        sync: sync_mode(backup.sync),
        allow_larger_target: backup.allow_larger_target,
        compress: backup.compress,
        more: backup_options(&backup),
        job: backup_job(backup),
    }
}

/// Refuses to overwrite what an overlay shows.
fn check_no_overlay(target: &Rc<Node>) -> Result<()> {
    let overlay = target.users().into_iter().find_map(|user| match user {
        User::Overlay { node } => Some(node),
        _ => None,
    });
    let Some(overlay) = overlay else { return Ok(()) };
    let target = target.name();
    let desc = format!("Node '{target}' is busy: node is used as backing hd of '{overlay}'");
    Err(Failure::generic(desc))
}

fn check_drive(drive: &Drive<BlockdevMirror>) -> Result<()> {
    if drive.job.replaces.is_some() && drive.file.node_name.is_none() {
        let desc = "a node-name must be provided when replacing a named node of the graph";
        return Err(Failure::generic(desc));
    }
    Ok(())
}

fn drive_target(file: &DriveFile) -> DriveTarget {
    DriveTarget {
        file: file.target.as_str().into(),
        format: file.format.clone(),
        mode: new_image_mode(file.mode),
        node_name: file.node_name.clone(),
        unmap: file.unmap,
    }
}

fn new_image_mode(mode: schema::NewImageMode) -> NewImageMode {
    match mode {
        schema::NewImageMode::Existing => NewImageMode::Existing,
        schema::NewImageMode::AbsolutePaths => NewImageMode::AbsolutePaths,
    }
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

fn backup_options(backup: &BlockdevBackup) -> BackupOptions {
    let number = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok());
    BackupOptions {
        max_workers: number(backup.x_perf.max_workers).unwrap_or(0),
        max_chunk: number(backup.x_perf.max_chunk).unwrap_or(0),
        min_cluster_size: backup.x_perf.min_cluster_size.unwrap_or(0),
        filter_name: backup.filter_node_name.clone(),
        bitmap: BitmapChoice {
            name: backup.bitmap.clone(),
            mode: backup.bitmap_mode.map(bitmap_mode),
        },
        on_cbw_error: backup.on_cbw_error.map_or_else(OnCbwError::default, on_cbw_error),
        discard_source: backup.discard_source,
        spill: SpillOptions {
            folder: backup.spill_dir.as_ref().map(PathBuf::from),
            max: backup.spill_max,
            after: None,
        },
        use_copy_range: backup.x_perf.use_copy_range.unwrap_or(false),
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
    check_granule(perf.min_cluster_size).map_err(|error| error.within("Could not create node"))
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

fn bitmap_mode(mode: schema::BitmapSync) -> BitmapMode {
    match mode {
        schema::BitmapSync::OnSuccess => BitmapMode::OnSuccess,
        schema::BitmapSync::Never => BitmapMode::Never,
        schema::BitmapSync::Always => BitmapMode::Always,
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

/// The convergence as jobs know it.
pub(super) fn converging(options: ConvergeOptions) -> Converge {
    let ConvergeOptions { deadline_ms, max_latency_us } = options;
    Converge { deadline_ms, max_latency_us }
}
