//! Cores on threads, and the way in from outside.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;

use super::call::{RemoteCall, remote_call};
use super::core::{Core, CoreId};
use super::mailbox::{Mailbox, Message};
use crate::driver::blocking::BlockingPool;
use crate::driver::ring::RingDriver;
use crate::error::{Error, Result};

/// How an engine is started.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Number of cores, each one thread (at least 1).
    pub cores: u32,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self { cores: 1 }
    }
}

/// Running cores; stops and joins them when dropped.
#[derive(Debug)]
pub struct Engine {
    handle: Handle,
    threads: Vec<thread::JoinHandle<()>>,
}

/// The way into an engine from any thread and any async runtime. Cheap to clone.
#[derive(Clone)]
pub struct Handle {
    mailboxes: Arc<[Arc<Mailbox>]>,
}

impl Engine {
    /// Starts the cores.
    ///
    /// # Errors
    /// If the kernel refuses a ring or a thread.
    pub fn start(config: &EngineConfig) -> Result<Self> {
        let mut mailboxes = Vec::new();
        for _ in 0..config.cores.max(1) {
            mailboxes.push(Arc::new(Mailbox::new(Some(wake_descriptor()?))));
        }
        let mailboxes: Arc<[Arc<Mailbox>]> = mailboxes.into();
        let pool = Arc::new(BlockingPool::default());
        let mut engine =
            Self { handle: Handle { mailboxes: Arc::clone(&mailboxes) }, threads: Vec::new() };
        for index in 0..mailboxes.len() {
            let (mailboxes, pool) = (Arc::clone(&mailboxes), Arc::clone(&pool));
            let id = CoreId(u32::try_from(index).expect("invariant: few cores"));
            let (started, result) = std::sync::mpsc::sync_channel(1);
            let thread = thread::Builder::new()
                .name(format!("liveblk-core{index}"))
                .spawn(move || run_core(id, &mailboxes, pool, &started))
                .map_err(|error| os_error(&error, "start core thread"))?;
            engine.threads.push(thread);
            result.recv().unwrap_or_else(|_| Err(Error::os(libc::EIO, "start core")))?;
        }
        Ok(engine)
    }

    /// The way in.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for mailbox in self.handle.mailboxes.iter() {
            mailbox.push(Message::Stop);
        }
        for thread in self.threads.drain(..) {
            // A panic on a core has aborted the process already.
            let _ = thread.join();
        }
    }
}

impl Handle {
    pub(crate) fn new(mailboxes: Arc<[Arc<Mailbox>]>) -> Self {
        Self { mailboxes }
    }

    /// Runs a task made by `f` on core `core`; the answer can be awaited anywhere, or waited for.
    ///
    /// # Panics
    /// If the engine has no such core.
    pub fn run<R, Fut>(
        &self,
        core: CoreId,
        f: impl FnOnce(Core) -> Fut + Send + 'static,
    ) -> RemoteCall<R>
    where
        R: Send + 'static,
        Fut: Future<Output = R> + 'static,
    {
        remote_call(&self.mailboxes[core.0 as usize], f)
    }

    /// Number of cores.
    pub fn core_count(&self) -> usize {
        self.mailboxes.len()
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Handle({} cores)", self.mailboxes.len())
    }
}

fn run_core(
    id: CoreId,
    mailboxes: &Arc<[Arc<Mailbox>]>,
    pool: Arc<BlockingPool>,
    started: &std::sync::mpsc::SyncSender<Result<()>>,
) {
    // A core that panics would leave guests hanging for ever: end the process instead.
    let guard = AbortOnPanic;
    let mailbox = Arc::clone(&mailboxes[id.0 as usize]);
    let driver = match RingDriver::new(mailbox, pool) {
        Ok(driver) => driver,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let core = Core::new(id, Box::new(driver), Arc::clone(mailboxes));
    let _ = started.send(Ok(()));
    while !core.is_stopping() {
        core.turn(true);
    }
    core.drain();
    drop(core);
    drop(guard);
}

struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            tracing::error!("a core panicked; stopping the process so that no guest hangs");
            std::process::abort();
        }
    }
}

fn wake_descriptor() -> Result<OwnedFd> {
    use nix::sys::eventfd::{EfdFlags, EventFd};
    EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map(Into::into)
        .map_err(|errno| Error::os(errno as i32, "create wake descriptor"))
}

fn os_error(error: &std::io::Error, op: &'static str) -> Error {
    Error::os(error.raw_os_error().unwrap_or(libc::EIO), op)
}
