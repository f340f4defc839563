//! Create: makes a file, or a new image in a node.
//!
//! A job without a source: it runs by itself, waits for `job-dismiss`, and touches nothing but the
//! places it was given. What the options contradict is found inside the job, as by the peer.
//!
//! Order: (1) the places are opened and taken into use for writing and resizing, so that nobody
//! else has them; (2) the format writes the image (its own order makes it an image last) or the
//! file gets its size; (3) durable; (4) the places are given back; (5) the job concludes.
//! A file that did not exist before is removed again if it cannot be made as asked.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use liveblk_engine::executor::{Class, Core};
use liveblk_engine::format::{CreateImage, InfoValue, Preallocation};
use liveblk_engine::graph::{Graph, GraphError, OpenNode};
use liveblk_engine::node::{Node, Permissions, User, UserGuard};
use liveblk_engine::storage::{self, File, FileOptions, LockRequest, Storage};
use liveblk_engine::{Error, ErrorKind};

use crate::error::{CreateError, JobError, Result, SnapshotError};
use crate::event::Kind;
use crate::job::Job;
use crate::lifecycle::Status;
use crate::limits::ZERO_PIECE;
use crate::manager::JobManager;
use crate::spec::JobOptions;
use crate::txn::JobTxn;

/// Where a new image or its data goes.
#[derive(Clone, Debug)]
pub enum NewPlace {
    /// Into a node by name; it must be a file's.
    Node(String),
    /// Into a file that is opened for it; it must exist.
    Open(Box<OpenNode>),
}

/// What is to be made.
#[derive(Clone, Debug)]
pub enum Creation {
    /// A file; one that exists loses its content.
    File {
        /// Its path.
        path: PathBuf,
        /// Bytes.
        size: u64,
        /// What of it is allocated.
        preallocation: Preallocation,
    },
    /// An image of a format.
    Image {
        /// The format's name.
        driver: String,
        /// What holds it; its content is lost.
        file: NewPlace,
        /// What holds the guest data, if the image does not.
        data: Option<NewPlace>,
        /// Size and options; the data file's name is added here.
        image: CreateImage,
    },
}

/// Starts a job called `id` that makes `creation`. It waits to be dismissed.
///
/// # Errors
/// A bad or used id. Everything else is found inside the job.
pub fn start_create(core: &Core, id: &str, creation: Creation) -> Result<Rc<Job>> {
    let manager = JobManager::of(core);
    let options = JobOptions { auto_dismiss: false, ..JobOptions::new(id) };
    let job = manager.create(Kind::Create, options, &JobTxn::new())?;
    job.progress().set_left(1);
    job.enter(Status::Running);
    let running = Rc::clone(&job);
    drop(core.spawn(Class::Background, async move {
        running.set_busy(true);
        let result = run(running.core(), creation).await;
        running.progress().advance(1);
        if let Some(manager) = running.manager() {
            manager.body_ended(&running, result);
        }
    }));
    Ok(job)
}

async fn run(core: &Core, creation: Creation) -> Result<()> {
    match creation {
        Creation::File { path, size, preallocation } => {
            create_file(core, &path, size, preallocation).await
        }
        Creation::Image { driver, file, data, image } => {
            create_image(core, &driver, file, data, image).await
        }
    }
}

/// A place in use.
struct Taken {
    node: Rc<Node>,
    _user: UserGuard,
}

impl Taken {
    async fn take(core: &Core, place: NewPlace) -> Result<Self> {
        let graph = Graph::of(core);
        let (node, opened) = match place {
            NewPlace::Node(name) => {
                let found = graph.find(&name);
                (found.map_err(|_| refusal(GraphError::ReferenceNotFound(name)))?, false)
            }
            NewPlace::Open(spec) => (graph.open(*spec).await?, true),
        };
        match Self::admit(&node) {
            Ok(user) => Ok(Self { node, _user: user }),
            Err(error) => {
                if opened {
                    graph.remove_if_unused(&node).await?;
                }
                Err(error)
            }
        }
    }

    fn admit(node: &Rc<Node>) -> Result<UserGuard> {
        if !node.is_protocol() {
            return Err(refusal(GraphError::NotAFile(node.name().to_string())));
        }
        if !node.is_writable() {
            return Err(refusal(GraphError::ReadOnly));
        }
        let with = Permissions {
            perm: Permissions::WRITE | Permissions::RESIZE,
            shared: Permissions::ALL,
        };
        Ok(Node::use_by(node, User::Guest { name: "".into() }, with)?)
    }

    fn storage(&self) -> &Storage {
        self.node.format().data_storage()
    }

    /// Gives the place back; a file that was opened for it is closed.
    async fn give_back(self, core: &Core) -> Result<()> {
        let Self { node, _user } = self;
        drop(_user);
        Ok(Graph::of(core).remove_if_unused(&node).await?)
    }
}

async fn create_image(
    core: &Core,
    driver: &str,
    file: NewPlace,
    data: Option<NewPlace>,
    image: CreateImage,
) -> Result<()> {
    let place = Taken::take(core, file).await?;
    let data = match data {
        None => None,
        Some(data) => match Taken::take(core, data).await {
            Ok(taken) => Some(taken),
            Err(error) => {
                place.give_back(core).await?;
                return Err(error);
            }
        },
    };
    let made = write_image(core, driver, &place, data.as_ref(), image).await;
    for taken in data.into_iter().chain([place]) {
        let given = taken.give_back(core).await;
        if made.is_ok() {
            given?;
        }
    }
    made
}

async fn write_image(
    core: &Core,
    driver: &str,
    place: &Taken,
    data: Option<&Taken>,
    mut image: CreateImage,
) -> Result<()> {
    let driver =
        Graph::of(core).config().formats.find(driver).ok_or_else(|| {
            JobError::from(SnapshotError::UnknownFormat { format: driver.into() })
        })?;
    if let Some(data) = data {
        if is_same_file(place.storage(), data.storage()) {
            return Err(refusal(GraphError::DataFileLoop(data.node.filename())));
        }
        image.options.insert("data-file".to_owned(), InfoValue::Text(data.node.filename()));
        image.data = Some(data.storage().clone());
    }
    Ok(driver.create(core.clone(), place.storage().clone(), image).await?)
}

fn is_same_file(one: &Storage, other: &Storage) -> bool {
    match (one, other) {
        (Storage::File(one), Storage::File(other)) => one.identity() == other.identity(),
        _ => false,
    }
}

fn refusal(error: GraphError) -> JobError {
    JobError::Engine(Error::from(error))
}

async fn create_file(
    core: &Core,
    path: &Path,
    size: u64,
    preallocation: Preallocation,
) -> Result<()> {
    if preallocation == Preallocation::Metadata {
        return Err(CreateError::PreallocationMode("metadata").into());
    }
    let (file, is_new) = open_or_create(core, path).await?;
    file.lock(LockRequest::Write).await?;
    let mut made = fill(core, &file, size, preallocation).await;
    if made.is_ok() && is_new {
        made = storage::sync_folder_of(core, path).await.map_err(JobError::from);
    }
    if made.is_err() {
        // The first error is the one to report; this only gives space back.
        let _ = file.truncate(0).await;
        if is_new {
            let _ = storage::unlink(core, path).await;
        }
    }
    let _ = file.lock(LockRequest::None).await;
    made
}

/// The file, and whether it was made here.
async fn open_or_create(core: &Core, path: &Path) -> Result<(Rc<File>, bool)> {
    let open = |create_new| {
        let options = FileOptions {
            path: path.to_path_buf(),
            writable: true,
            create_new,
            locking: true,
            ..FileOptions::default()
        };
        File::open(core, options)
    };
    let failed = |error: Error| {
        let path = path.display().to_string().into();
        JobError::from(SnapshotError::File { path, source: error })
    };
    match open(false).await {
        Ok(file) => return Ok((file, false)),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    match open(true).await {
        Ok(file) => Ok((file, true)),
        // Somebody was faster.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            Ok((open(false).await.map_err(failed)?, false))
        }
        Err(error) => Err(failed(error)),
    }
}

async fn fill(core: &Core, file: &Rc<File>, size: u64, mode: Preallocation) -> Result<()> {
    let failed = |what: &'static str| move |error: Error| CreateError::Resize { what, error };
    file.truncate(0).await.map_err(failed("Could not clear file"))?;
    if i64::try_from(size).is_err() {
        return Err(CreateError::NegativeSize.into());
    }
    match mode {
        Preallocation::Off | Preallocation::Metadata => {
            file.truncate(size).await.map_err(|error| match error.kind() {
                // The only limit that a size without space can meet.
                ErrorKind::NoSpace => CreateError::TooLarge,
                _ => failed("Could not resize file")(error),
            })?
        }
        Preallocation::Falloc if size > 0 => file
            .allocate(0, size)
            .await
            .map_err(failed("Could not preallocate data for the new file"))?,
        Preallocation::Falloc => {}
        Preallocation::Full => {
            let zeroes = core.pool().zeroed(ZERO_PIECE.min(length(size)));
            let mut at = 0;
            while at < size {
                let part = zeroes.len().min(length(size - at));
                file.write(at, zeroes.slice(0..part), false)
                    .await
                    .map_err(failed("Could not write zeros for preallocation"))?;
                at += part as u64;
            }
        }
    }
    Ok(file.flush().await?)
}

fn length(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
