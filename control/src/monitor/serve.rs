//! The monitor thread: all monitors of the process, until it stops.
//!
//! Owns: the tokio-uring runtime, signals, the stages of the end. Order rules: see
//! [`crate::monitor`]. Every operation that was given to the ring is awaited before the runtime is
//! dropped; sockets are shut down so that reads and writes end.

use std::io;
use std::net::Shutdown;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio_uring::{Runtime, builder, uring_builder};

use super::backend::{Backend, ReplySink};
use super::chardev::{Channel, Chardev, Listener};
use super::connection::{Intake, Shared, execute, next_output};
use super::hub::Hub;
use super::output::Output;
use super::stdio::serve_stdio;
use super::transport::{StdStream, Stream};
use crate::json::Layout;
use crate::limits::INPUT_CHUNK_BYTES;

/// Time that a client has at the end to take what is waiting for it.
pub(super) const FLUSH_TIME: Duration = Duration::from_secs(1);

/// Pause after a failed accept (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Entries of the submission ring; the thread has few operations in flight.
const RING_ENTRIES: u32 = 64;

/// A monitor to be served.
#[derive(Debug)]
pub struct MonitorSetup {
    /// The stream.
    pub chardev: Chardev,
    /// How output is laid out.
    pub layout: Layout,
}

/// ```text
/// Running --signal, quit--> Requested --backend is shut down--> Closing
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Stage {
    Running,
    Requested,
    Closing,
}

/// The end of the process, as all tasks see it.
#[derive(Debug, Clone)]
pub(super) struct Stop(watch::Sender<Stage>);

impl Stop {
    fn new() -> Self {
        Self(watch::channel(Stage::Running).0)
    }

    /// Asks for the end.
    pub(super) fn request(&self) {
        self.advance(Stage::Requested);
    }

    /// Ends when connections shall close.
    pub(super) async fn closing(&self) {
        self.reached(Stage::Closing).await;
    }

    fn advance(&self, to: Stage) {
        self.0.send_if_modified(|stage| {
            let advances = *stage < to;
            if advances {
                *stage = to;
            }
            advances
        });
    }

    async fn reached(&self, wanted: Stage) {
        // The sender lives as long as `self`, so waiting cannot fail.
        let _ = self.0.subscribe().wait_for(|stage| *stage >= wanted).await;
    }
}

/// Serves `monitors` on this thread until a signal or `quit` ends the process and `backend` is shut
/// down. The thread's stack must be [`crate::limits::MONITOR_STACK_BYTES`].
///
/// `ready` is called once the signals are caught and before the first request is read.
pub fn serve(
    backend: Arc<dyn Backend>,
    monitors: Vec<MonitorSetup>,
    ready: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    runtime()?.block_on(run(backend, monitors, ready))
}

fn runtime() -> io::Result<Runtime> {
    let mut ring = uring_builder();
    ring.setup_coop_taskrun();
    let mut with_coop = builder();
    with_coop.entries(RING_ENTRIES).uring_builder(&ring);
    Runtime::new(&with_coop).or_else(|error| {
        tracing::info!("the monitor's ring runs without COOP_TASKRUN: {error}");
        Runtime::new(builder().entries(RING_ENTRIES))
    })
}

async fn run(
    backend: Arc<dyn Backend>,
    monitors: Vec<MonitorSetup>,
    ready: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let hub = Arc::new(Hub::default());
    let events = Arc::clone(&hub);
    backend.subscribe(Arc::new(move |event| events.publish(&event)));
    let stop = Stop::new();
    let signals = catch_signals(&stop)?;
    ready()?;
    let shared = Rc::new(Shared { backend: Arc::clone(&backend), hub, stop: stop.clone() });
    let tasks: Vec<_> = monitors
        .into_iter()
        .map(|setup| tokio_uring::spawn(serve_monitor(Rc::clone(&shared), setup)))
        .collect();
    stop.reached(Stage::Requested).await;
    let (done, wait) = oneshot::channel();
    backend.shutdown(ReplySink::new(move |answer| {
        // The receiver waits below.
        let _ = done.send(answer);
    }));
    if let Ok(Err(error)) = wait.await {
        tracing::error!("shutdown: {error}");
    }
    stop.advance(Stage::Closing);
    for task in tasks {
        // A task that panicked has nothing in flight.
        let _ = task.await;
    }
    signals.iter().for_each(JoinHandle::abort);
    Ok(())
}

fn catch_signals(stop: &Stop) -> io::Result<Vec<JoinHandle<()>>> {
    [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()]
        .into_iter()
        .map(|kind| {
            let mut caught = signal(kind)?;
            let stop = stop.clone();
            Ok(tokio_uring::spawn(async move {
                while caught.recv().await.is_some() {
                    stop.request();
                }
            }))
        })
        .collect()
}

async fn serve_monitor(shared: Rc<Shared>, setup: MonitorSetup) {
    let MonitorSetup { chardev, layout } = setup;
    let Chardev { id, channel, file } = chardev;
    let result = match channel {
        Channel::Stdio => serve_stdio(shared, layout).await,
        Channel::Connected(stream) => {
            serve_connection(&shared, stream, layout).await;
            Ok(())
        }
        Channel::Listening(listener, first) => {
            serve_listener(&shared, listener, first, layout).await
        }
    };
    if let Err(error) = result {
        tracing::error!("monitor on chardev '{id}': {error}");
    }
    drop(file);
}

/// One client after the other.
async fn serve_listener(
    shared: &Rc<Shared>,
    listener: Listener,
    mut first: Option<StdStream>,
    layout: Layout,
) -> io::Result<()> {
    #[expect(deprecated, reason = "its successor is unsafe; a socket we own keeps what it asks")]
    let listener = AsyncFd::new(listener)?;
    loop {
        let stream = match first.take() {
            Some(stream) => stream,
            None => tokio::select! {
                () = shared.stop.closing() => return Ok(()),
                stream = accept(&listener) => stream?,
            },
        };
        serve_connection(shared, stream, layout).await;
    }
}

async fn accept(listener: &AsyncFd<Listener>) -> io::Result<StdStream> {
    loop {
        let mut ready = listener.readable().await?;
        match listener.get_ref().accept() {
            Ok(stream) => return Ok(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
            Err(error) => {
                tracing::warn!("accepting a monitor's client: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves one client until it or the process ends.
async fn serve_connection(shared: &Rc<Shared>, stream: StdStream, layout: Layout) {
    let stream = Rc::new(stream.register());
    let output = Arc::new(Output::default());
    let (intake, requests) = Intake::new();
    let reader = tokio_uring::spawn(receive(Rc::clone(&stream), intake));
    let executor = {
        let (shared, output) = (Rc::clone(shared), Arc::clone(&output));
        tokio_uring::spawn(async move {
            execute(shared, Arc::clone(&output), requests).await;
            output.close();
        })
    };
    let mut writer = tokio_uring::spawn(send(Rc::clone(&stream), Arc::clone(&output), layout));
    tokio::select! {
        _ = &mut writer => {}
        () = shared.stop.closing() => {
            // The executor waits for the client or the backend, never for the ring.
            executor.abort();
            output.close();
            if tokio::time::timeout(FLUSH_TIME, &mut writer).await.is_err() {
                stream.shutdown(Shutdown::Both);
                let _ = writer.await;
            }
        }
    }
    // The writer has shut the socket down: the read that is in flight ends.
    let _ = reader.await;
    let _ = executor.await;
}

async fn receive(stream: Rc<Stream>, mut intake: Intake) {
    let mut buffer = Vec::with_capacity(INPUT_CHUNK_BYTES);
    loop {
        let (result, filled) = stream.read(buffer).await;
        buffer = filled;
        match result {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                if !intake.take(&buffer).await {
                    return;
                }
            }
        }
        buffer.clear();
    }
}

async fn send(stream: Rc<Stream>, output: Arc<Output>, layout: Layout) {
    while let Some(bytes) = next_output(&output, layout).await {
        if stream.write_all(bytes).await.is_err() {
            output.abandon();
        }
    }
    stream.shutdown(Shutdown::Both);
}
