//! One client: from bytes to replies.
//!
//! Owns: the three tasks of a connection (reader, executor, writer) and what passes between them.
//! Promises: at most [`REQUEST_QUEUE_LEN_MAX`] parsed requests wait, then nothing is read; a
//! request begins when the one before it was answered. Requests that were received before the
//! client closed its side are still executed.

use std::rc::Rc;
use std::sync::Arc;

use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use super::backend::{Backend, ReplySink};
use super::hub::Hub;
use super::output::Output;
use super::serve::Stop;
use crate::json::{JsonError, Layout, MessageStream, encode_line};
use crate::limits::REQUEST_QUEUE_LEN_MAX;
use crate::qmp::{Request, Session, Step, greeting, reply};
use crate::schema::Command;

pub(super) type Message = Result<Value, JsonError>;

/// What all connections of the process share.
pub(super) struct Shared {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) hub: Arc<Hub>,
    pub(super) stop: Stop,
}

/// Splits received bytes into messages and queues them.
pub(super) struct Intake {
    stream: MessageStream,
    requests: mpsc::Sender<Message>,
}

impl Intake {
    /// The intake, and the queue it fills.
    pub(super) fn new() -> (Self, mpsc::Receiver<Message>) {
        let (requests, queue) = mpsc::channel(REQUEST_QUEUE_LEN_MAX);
        (Self { stream: MessageStream::new(), requests }, queue)
    }

    /// Takes bytes; waits while the queue is full. False when nobody takes requests any more.
    pub(super) async fn take(&mut self, mut bytes: &[u8]) -> bool {
        while let Some(message) = self.stream.next(&mut bytes) {
            if self.requests.send(message).await.is_err() {
                return false;
            }
        }
        true
    }
}

/// Greets, then executes what is queued until the queue ends or the client is gone.
pub(super) async fn execute(
    shared: Rc<Shared>,
    output: Arc<Output>,
    mut requests: mpsc::Receiver<Message>,
) {
    output.push(Arc::new(greeting()));
    let mut session = Session::new();
    let mut announced = false;
    while let Some(message) = requests.recv().await {
        output.has_room().await;
        if output.is_broken() {
            return;
        }
        match session.receive(message) {
            Step::Reply(value) => output.push(Arc::new(value)),
            Step::Execute(request) => run(&shared, &output, request).await,
        }
        if session.is_negotiated() && !announced {
            announced = true;
            shared.hub.add(&output);
        }
    }
}

async fn run(shared: &Shared, output: &Arc<Output>, request: Request) {
    let Request { id, command } = request;
    let quits = command == Command::Quit;
    let (answered, wait) = oneshot::channel();
    let out = Arc::clone(output);
    let sink = ReplySink::new(move |answer| {
        let succeeded = answer.is_ok();
        out.push(Arc::new(reply(id, answer)));
        // The connection may be gone; then nobody waits.
        let _ = answered.send(succeeded);
    });
    shared.backend.execute(command, sink);
    let succeeded = wait.await.unwrap_or(false);
    if quits && succeeded {
        shared.stop.request();
    }
}

/// The bytes of messages that wait; `None` at the end.
pub(super) async fn next_output(output: &Output, layout: Layout) -> Option<Vec<u8>> {
    let messages = output.take().await?;
    let mut bytes = Vec::new();
    for message in &messages {
        bytes.extend_from_slice(encode_line(message, layout).as_bytes());
    }
    Some(bytes)
}
