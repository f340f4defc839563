//! Job starts as actions of transactions: nodes are named, so that an action can travel to the core
//! of its node.

use std::rc::Rc;

use liveblk_engine::executor::Core;

use crate::commit::{CommitSpec, prepare_commit};
use crate::converge::Converge;
use crate::drive::{DriveTarget, OpenedTarget, backing_of};
use crate::error::Result;
use crate::mirror::prepare_mirror;
use crate::snapshot::{NewImageMode, find};
use crate::spec::{
    BackupOptions, BackupSpec, CopyMode, JobOptions, MirrorOptions, MirrorSpec, SyncMode,
};
use crate::start::Prepared;
use crate::stream::{StreamSpec, StreamTo, prepare_stream};
use crate::txn::JobTxn;

/// A backup in a transaction.
#[derive(Clone, Debug)]
pub struct BackupAction {
    /// Common options.
    pub job: JobOptions,
    /// What is copied, by node name.
    pub source: String,
    /// Where to, by node name; not looked at where the target is a file.
    pub target: String,
    /// What of the source.
    pub sync: SyncMode,
    /// Accept a larger target.
    pub allow_larger_target: bool,
    /// Store whole clusters of the target compressed.
    pub compress: bool,
    /// What most backups leave alone.
    pub more: BackupOptions,
}

/// A mirror in a transaction.
#[derive(Clone, Debug)]
pub struct MirrorAction {
    /// Common options.
    pub job: JobOptions,
    /// What is copied, by node name.
    pub source: String,
    /// Where to, by node name; not looked at where the target is a file.
    pub target: String,
    /// What of the source.
    pub sync: SyncMode,
    /// When guest writes are copied.
    pub copy_mode: CopyMode,
    /// Bytes per dirty bit.
    pub granularity: Option<u64>,
    /// Accept a larger target.
    pub allow_larger_target: bool,
    /// What most mirrors leave alone.
    pub more: MirrorOptions,
}

impl BackupAction {
    /// Prepares the backup; into the file `drive` if there is one.
    pub(crate) async fn prepare(
        self,
        core: &Core,
        drive: Option<DriveTarget>,
        txn: &Rc<JobTxn>,
    ) -> Result<Prepared> {
        let source = find(core, &self.source, &self.source)?.served();
        // What needs no target is refused before a file is made.
        self.more.bitmap.checked(self.sync, &source)?;
        let opened = match &drive {
            Some(drive) => Some(OpenedTarget::open(core, drive, &source, self.sync, true).await?),
            None => None,
        };
        let target = match &opened {
            Some(opened) => Rc::clone(&opened.node),
            None => find(core, &self.target, &self.target)?.served(),
        };
        let spec = BackupSpec {
            source,
            target,
            job: self.job,
            sync: self.sync,
            allow_larger_target: self.allow_larger_target,
            compress: self.compress,
            more: self.more,
        };
        with_target(core, crate::backup::prepare_backup(spec, txn), opened).await
    }
}

impl MirrorAction {
    /// Prepares the mirror; into the file `drive` if there is one.
    pub(crate) async fn prepare(
        self,
        core: &Core,
        drive: Option<DriveTarget>,
        txn: &Rc<JobTxn>,
    ) -> Result<Prepared> {
        let source = find(core, &self.source, &self.source)?.served();
        self.more.bitmap.checked(self.sync, &source)?;
        let opened = match &drive {
            Some(drive) => Some(OpenedTarget::open(core, drive, &source, self.sync, false).await?),
            None => None,
        };
        let created = drive.is_some_and(|drive| drive.mode == NewImageMode::AbsolutePaths);
        let target = match &opened {
            Some(opened) => Rc::clone(&opened.node),
            None => find(core, &self.target, &self.target)?.served(),
        };
        let mut more = self.more;
        more.target_is_zero |= created;
        more.backing_at_pivot =
            if created { backing_of(&source, self.sync).map(|node| node.id()) } else { None };
        let spec = MirrorSpec {
            source,
            target,
            job: self.job,
            sync: self.sync,
            copy_mode: self.copy_mode,
            granularity: self.granularity,
            allow_larger_target: self.allow_larger_target,
            more,
        };
        with_target(core, prepare_mirror(spec, txn), opened).await
    }
}

/// A stream in a transaction.
#[derive(Clone, Debug)]
pub struct StreamAction {
    /// Common options.
    pub job: JobOptions,
    /// The node that is filled, by name.
    pub node: String,
    /// The last node that is not copied, by name.
    pub base: Option<String>,
    /// The last node that is copied, by name; looked at only without a base.
    pub bottom: Option<String>,
    /// The string for the header instead of the base's file name.
    pub backing_file: Option<String>,
    /// Write the format "raw" where the base is a plain file.
    pub mask_protocol: bool,
    /// The name under which queries show the job's filter node.
    pub filter_name: Option<String>,
}

/// A commit in a transaction.
#[derive(Clone, Debug)]
pub struct CommitAction {
    /// Common options.
    pub job: JobOptions,
    /// The node at the head of the chain, by name.
    pub device: String,
    /// The first layer that is committed, by node name.
    pub top: String,
    /// The layer that everything goes into, by node name.
    pub base: String,
    /// The string for the headers of the overlays instead of the base's file name.
    pub backing_file: Option<String>,
    /// Write the format "raw" where the base is a plain file.
    pub mask_protocol: bool,
    /// The name under which queries show the job's filter node.
    pub filter_name: Option<String>,
    /// Of an active commit: when guest writes reach the base.
    pub copy_mode: CopyMode,
    /// Of an active commit: be ready in time.
    pub converge: Option<Converge>,
}

impl StreamAction {
    /// `spec` with its nodes by name.
    pub fn of(spec: StreamSpec) -> Self {
        let (base, bottom) = match &spec.to {
            StreamTo::End => (None, None),
            StreamTo::Base(base) => (Some(base.name().to_string()), None),
            StreamTo::Bottom(bottom) => (None, Some(bottom.name().to_string())),
        };
        Self {
            node: spec.node.name().to_string(),
            base,
            bottom,
            job: spec.job,
            backing_file: spec.backing_file,
            mask_protocol: spec.mask_protocol,
            filter_name: spec.filter_name,
        }
    }

    /// Prepares the stream.
    pub(crate) async fn prepare(self, core: &Core, txn: &Rc<JobTxn>) -> Result<Prepared> {
        let node = find(core, &self.node, &self.node)?;
        let to = match (&self.base, &self.bottom) {
            (Some(base), _) => StreamTo::Base(find(core, "", base)?),
            (None, Some(bottom)) => StreamTo::Bottom(find(core, "", bottom)?),
            (None, None) => StreamTo::End,
        };
        let spec = StreamSpec {
            node,
            to,
            job: self.job,
            backing_file: self.backing_file,
            mask_protocol: self.mask_protocol,
            filter_name: self.filter_name,
        };
        prepare_stream(spec, txn).await
    }
}

impl CommitAction {
    /// `spec` with its nodes by name.
    pub fn of(spec: CommitSpec) -> Self {
        Self {
            device: spec.device.name().to_string(),
            top: spec.top.name().to_string(),
            base: spec.base.name().to_string(),
            job: spec.job,
            backing_file: spec.backing_file,
            mask_protocol: spec.mask_protocol,
            filter_name: spec.filter_name,
            copy_mode: spec.copy_mode,
            converge: spec.converge,
        }
    }

    /// Prepares the commit.
    pub(crate) async fn prepare(self, core: &Core, txn: &Rc<JobTxn>) -> Result<Prepared> {
        let spec = CommitSpec {
            device: find(core, &self.device, &self.device)?,
            top: find(core, "", &self.top)?,
            base: find(core, "", &self.base)?,
            job: self.job,
            backing_file: self.backing_file,
            mask_protocol: self.mask_protocol,
            filter_name: self.filter_name,
            copy_mode: self.copy_mode,
            converge: self.converge,
        };
        prepare_commit(spec, txn).await
    }
}

async fn with_target(
    core: &Core,
    prepared: Result<Prepared>,
    opened: Option<OpenedTarget>,
) -> Result<Prepared> {
    match (prepared, opened) {
        (Ok(mut prepared), opened) => {
            prepared.opened = opened;
            Ok(prepared)
        }
        (Err(error), None) => Err(error),
        (Err(error), Some(opened)) => {
            opened.abort(core).await;
            Err(error)
        }
    }
}

/// Starts a backup into a file.
///
/// # Errors
/// What cannot work; no job and no file is left then.
pub async fn start_drive_backup(
    core: &Core,
    backup: BackupAction,
    target: DriveTarget,
) -> Result<Rc<crate::job::Job>> {
    backup.prepare(core, Some(target), &JobTxn::new()).await?.start().await
}

/// Starts a mirror into a file.
///
/// # Errors
/// What cannot work; no job and no file is left then.
pub async fn start_drive_mirror(
    core: &Core,
    mirror: MirrorAction,
    target: DriveTarget,
) -> Result<Rc<crate::job::Job>> {
    mirror.prepare(core, Some(target), &JobTxn::new()).await?.start().await
}
