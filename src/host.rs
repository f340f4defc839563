//! What an embedding program holds: one core's graph and jobs behind a few verbs.
//!
//! A [`Host`] lives on an engine core and is `!Send`; [`run`] makes one on an engine of its own,
//! [`Host::on`] on any core. Direct I/O is on by default; header references are followed only to
//! what the policy allows (default: only what the program names).

use std::fmt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use liveblk_engine::buf::Buf;
use liveblk_engine::executor::{Core, CoreId, Engine, EngineConfig};
use liveblk_engine::format::{BackingRef, CreateImage, ReferencePolicy};
use liveblk_engine::graph::{BackingSource, Graph, GraphConfig, GraphError, OpenNode};
use liveblk_engine::node::{Disk, Node, User};
use liveblk_engine::storage::{File, FileOptions, Storage};
use liveblk_engine::{Error, ErrorKind, Result};
use liveblk_formats::reference::resolve_reference;
use liveblk_jobs::{
    Action, BackupSpec, CompletionMode, CopyMode, Event, Job, JobError, JobManager, JobOptions,
    MirrorSpec, NewImageMode, SnapshotFile, Status, SyncMode, Verb,
};

/// Why a host's operation failed.
#[derive(Clone, Debug)]
pub enum HostError {
    /// The engine: files, images, requests.
    Engine(Error),
    /// A job.
    Job(JobError),
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Engine(error) => error.fmt(f),
            Self::Job(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for HostError {}

impl From<Error> for HostError {
    fn from(error: Error) -> Self {
        Self::Engine(error)
    }
}

impl From<JobError> for HostError {
    fn from(error: JobError) -> Self {
        Self::Job(error)
    }
}

/// Starts an engine with one core, runs `f` there, closes all images and stops.
///
/// # Errors
/// What `f` answers, or the first error while images are closed.
pub fn run<R, Fut>(f: impl FnOnce(Host) -> Fut + Send + 'static) -> Result<R, HostError>
where
    R: Send + 'static,
    Fut: Future<Output = Result<R, HostError>> + 'static,
{
    let engine = Engine::start(&EngineConfig::default())?;
    let answer = engine.handle().run(CoreId(0), |core| async move {
        let host = Host::on(&core, ReferencePolicy::Explicit);
        let result = f(host.clone()).await;
        let closed = host.close().await;
        result.and_then(|value| closed.map(|()| value))
    });
    answer.wait().unwrap_or_else(|| Err(Error::new(ErrorKind::Cancelled, "run").into()))
}

/// The verbs of an embedding program on one core.
#[derive(Clone, Debug)]
pub struct Host {
    core: Core,
    graph: Rc<Graph>,
    jobs: Rc<JobManager>,
}

impl Host {
    /// The host of `core`, following header references as `policy` allows.
    pub fn on(core: &Core, policy: ReferencePolicy) -> Self {
        let graph = Graph::of(core);
        graph.configure(GraphConfig {
            formats: liveblk_formats::registry(),
            policy,
            resolve: resolve_reference,
        });
        Self { core: core.clone(), graph, jobs: JobManager::of(core) }
    }

    /// The core.
    pub fn core(&self) -> &Core {
        &self.core
    }

    /// The nodes.
    pub fn graph(&self) -> &Rc<Graph> {
        &self.graph
    }

    /// The jobs.
    pub fn jobs(&self) -> &Rc<JobManager> {
        &self.jobs
    }

    /// Creates an image of `size` bytes without a backing file; never replaces a file.
    ///
    /// # Errors
    /// `AlreadyExists`, or what the file system reports; no file is left then.
    pub async fn create(
        &self,
        path: impl AsRef<Path>,
        driver: &str,
        size: u64,
    ) -> Result<(), HostError> {
        self.create_image(path.as_ref(), driver, size, None).await
    }

    /// Creates an overlay as large as the image `base` of format `base_driver`.
    ///
    /// # Errors
    /// As [`Host::create`].
    pub async fn create_overlay(
        &self,
        path: impl AsRef<Path>,
        base: impl AsRef<Path>,
        base_driver: &str,
    ) -> Result<(), HostError> {
        let base = base.as_ref();
        let mut spec = self.image(base, base_driver);
        spec.writable = false;
        let node = self.graph.open(spec).await?;
        let size = node.size();
        self.graph.remove(&node).await?;
        let file = base.display().to_string();
        let backing = BackingRef { file, format: Some(base_driver.into()) };
        self.create_image(path.as_ref(), "qcow2", size, Some(backing)).await
    }

    async fn create_image(
        &self,
        path: &Path,
        driver: &str,
        size: u64,
        backing: Option<BackingRef>,
    ) -> Result<(), HostError> {
        let formats = self.graph.config().formats;
        let Some(format) = formats.find(driver) else {
            return Err(Error::from(GraphError::UnknownDriver(driver.into())).into());
        };
        let options = FileOptions {
            path: path.into(),
            writable: true,
            create_new: true,
            ..FileOptions::default()
        };
        let file = File::open(&self.core, options).await?;
        let create = CreateImage { size, backing, ..CreateImage::default() };
        let made = format.create(self.core.clone(), Storage::File(file), create).await;
        if made.is_err() {
            liveblk_engine::storage::unlink(&self.core, path).await?;
        }
        Ok(made?)
    }

    /// How to open the image at `path`: writable, direct I/O, nothing below unless said.
    pub fn image(&self, path: impl Into<PathBuf>, driver: &str) -> OpenNode {
        let mut spec = OpenNode::new(driver, path);
        spec.options.direct = true;
        spec.monitor_owned = true;
        if self.graph.config().policy == ReferencePolicy::Explicit {
            spec.backing = BackingSource::None;
        }
        spec
    }

    /// Opens an image with what lies below.
    ///
    /// # Errors
    /// What is wrong with the file, the image or a reference.
    pub async fn open(&self, spec: OpenNode) -> Result<Rc<Node>, HostError> {
        Ok(self.graph.open(spec).await?)
    }

    /// Opens a chain of images, base first, and returns the writable top; `name` is the top's.
    ///
    /// # Errors
    /// As [`Host::open`].
    pub async fn open_chain(
        &self,
        name: &str,
        images: &[(&str, &Path)],
    ) -> Result<Rc<Node>, HostError> {
        let mut below: Option<OpenNode> = None;
        for (driver, path) in images {
            let mut spec = self.image(*path, driver);
            spec.monitor_owned = false;
            if let Some(below) = below.take() {
                spec.backing = BackingSource::Open(Box::new(below));
            }
            below = Some(spec);
        }
        match below {
            Some(top) => self.open(OpenNode { monitor_owned: true, ..top.named(name) }).await,
            None => Err(Error::from(GraphError::NotFound(name.into())).into()),
        }
    }

    /// Attaches to `node` for reading and writing; follows snapshots and pivots.
    ///
    /// # Errors
    /// If others exclude it, or the node is read-only.
    pub fn attach(&self, node: &Rc<Node>) -> Result<Disk, HostError> {
        Ok(Disk::attach(node, User::Guest { name: "host".into() }, true)?)
    }

    /// I/O memory with these bytes.
    pub fn buffer(&self, bytes: &[u8]) -> Buf {
        let buf = self.core.pool().alloc(bytes.len());
        buf.copy_from(0, bytes);
        buf
    }

    /// I/O memory of `len` bytes, to read into.
    pub fn space(&self, len: usize) -> Buf {
        self.core.pool().zeroed(len)
    }

    /// Takes snapshots of several nodes at one instant: each (node name, new file, overlay's name).
    /// The files are created as qcow2 overlays; disks go on at the overlays.
    ///
    /// # Errors
    /// The first failure; then nothing was changed and no file is left.
    pub async fn snapshot(&self, disks: &[(&str, &Path, &str)]) -> Result<(), HostError> {
        let action = |(node, file, overlay): &(&str, &Path, &str)| {
            let spec = SnapshotFile {
                node: (*node).into(),
                file: file.to_path_buf(),
                overlay: Some((*overlay).into()),
                format: "qcow2".into(),
                mode: NewImageMode::AbsolutePaths,
            };
            (self.core.id(), Action::SnapshotFile(spec))
        };
        let actions = disks.iter().map(action).collect();
        Ok(liveblk_jobs::transaction(&self.core, actions, CompletionMode::Individual).await?)
    }

    /// Starts to mirror `source` to `target`; see [`Host::ready`] and [`Host::complete`].
    ///
    /// # Errors
    /// If the job cannot start.
    pub async fn mirror(
        &self,
        id: &str,
        source: &Rc<Node>,
        target: &Rc<Node>,
    ) -> Result<Rc<Job>, HostError> {
        let spec = MirrorSpec {
            job: JobOptions::new(id),
            source: Rc::clone(source),
            target: Rc::clone(target),
            sync: SyncMode::Full,
            copy_mode: CopyMode::Background,
            granularity: None,
            allow_larger_target: false,
            more: Default::default(),
        };
        Ok(liveblk_jobs::start_mirror(spec).await?)
    }

    /// Starts a backup of `source` as it is now to `target`.
    ///
    /// # Errors
    /// If the job cannot start.
    pub async fn backup(
        &self,
        id: &str,
        source: &Rc<Node>,
        target: &Rc<Node>,
    ) -> Result<Rc<Job>, HostError> {
        let spec = BackupSpec {
            job: JobOptions::new(id),
            source: Rc::clone(source),
            target: Rc::clone(target),
            sync: SyncMode::Full,
            allow_larger_target: false,
            compress: false,
            more: Default::default(),
        };
        Ok(liveblk_jobs::start_backup(spec).await?)
    }

    /// Resolves when `job` is ready to be completed.
    ///
    /// # Errors
    /// The job's error, if it ended instead.
    pub async fn ready(&self, job: &Rc<Job>) -> Result<(), HostError> {
        self.jobs.until(job.id(), |status| status == Status::Ready || status.is_completed()).await;
        if job.status() == Status::Ready { Ok(()) } else { self.outcome(job) }
    }

    /// Completes a ready mirror: its disks move to the target. Resolves when the job is gone.
    ///
    /// # Errors
    /// The job's error; the disks stay where they were then.
    pub async fn complete(&self, job: &Rc<Job>) -> Result<(), HostError> {
        self.jobs.block_job_verb(job.id(), Verb::Complete, false)?;
        self.wait(job).await
    }

    /// Resolves when `job` is gone.
    ///
    /// # Errors
    /// The job's error.
    pub async fn wait(&self, job: &Rc<Job>) -> Result<(), HostError> {
        self.jobs.until(job.id(), |_| false).await;
        self.outcome(job)
    }

    fn outcome(&self, job: &Rc<Job>) -> Result<(), HostError> {
        job.error().map_or(Ok(()), |error| Err(error.into()))
    }

    /// Calls `subscriber` with every job event, in order.
    pub fn on_event(&self, subscriber: impl Fn(&Event) + 'static) {
        self.jobs.subscribe(Rc::new(subscriber));
    }

    /// Cancels all jobs and closes all images.
    ///
    /// # Errors
    /// The first error of a deferred write.
    pub async fn close(&self) -> Result<(), HostError> {
        self.jobs.cancel_all().await;
        Ok(self.graph.close_all().await?)
    }
}
