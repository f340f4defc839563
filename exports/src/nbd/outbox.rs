//! Replies on their way out.
//!
//! Requests push replies; one task gathers what is there into one send (heads and data by
//! reference, no copy of data) and sends again what came meanwhile. One send is in flight per
//! connection. Once the peer is gone, replies are dropped where they come in.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::buf::Buf;
use liveblk_engine::executor::Core;
use liveblk_engine::executor::sync::Notify;
use liveblk_engine::net::Socket;

use super::account::{Account, Grant, Side};
use super::wire::ChunkHead;
use crate::limits::{BATCH_BYTES, BATCH_REPLIES};

/// Bytes for the heads of a batch.
const HEADS: usize = 4096;

/// A reply, or one chunk of it.
pub(crate) struct Reply {
    pub(crate) head: ChunkHead,
    /// What follows the head.
    pub(crate) data: Buf,
    /// Given back when this was sent; carried by the last chunk.
    pub(crate) grant: Option<Grant>,
}

/// Replies that wait to be sent.
pub(crate) struct Outbox {
    queue: RefCell<VecDeque<Reply>>,
    changed: Notify,
    state: Cell<State>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// The peer takes no more.
    Broken,
    /// No more replies will come.
    Closed,
}

/// Memory that the sender uses again for each batch.
struct Batch {
    heads: Buf,
    bytes: Buf,
    grants: Vec<Grant>,
}

impl Outbox {
    pub(crate) fn new(core: &Core) -> Rc<Self> {
        Rc::new(Self {
            queue: RefCell::default(),
            changed: Notify::new(core),
            state: Cell::new(State::Open),
        })
    }

    /// Queues a reply; bounded by the grants of the connection.
    pub(crate) fn push(&self, reply: Reply) {
        if self.state.get() == State::Open {
            self.queue.borrow_mut().push_back(reply);
            self.changed.notify_all();
        }
    }

    /// No reply will be pushed any more.
    pub(crate) fn close(&self) {
        self.state.set(State::Closed);
        self.changed.notify_all();
    }

    /// Sends replies until the outbox is closed and empty.
    pub(crate) async fn run(self: Rc<Self>, core: Core, socket: Socket, account: Rc<Account>) {
        let mut batch = Batch {
            heads: core.pool().alloc(HEADS),
            bytes: Buf::empty(),
            grants: Vec::with_capacity(BATCH_REPLIES),
        };
        loop {
            let wake = || !self.queue.borrow().is_empty() || self.state.get() == State::Closed;
            self.changed.until(wake).await;
            if self.queue.borrow().is_empty() {
                return;
            }
            self.gather(&mut batch);
            account.wait_for_peer(Side::Sending, true);
            let sent = send(&socket, &mut batch.bytes).await;
            account.wait_for_peer(Side::Sending, false);
            batch.bytes.clear();
            batch.grants.clear();
            if sent.is_err() {
                if self.state.get() == State::Open {
                    self.state.set(State::Broken);
                }
                // Taken out first: dropping replies gives grants back, which wakes tasks.
                let dropped = self.queue.take();
                drop(dropped);
                account.close();
            }
        }
    }

    /// Moves replies from the queue into the batch.
    fn gather(&self, batch: &mut Batch) {
        let mut queue = self.queue.borrow_mut();
        // Heads without data between them lie side by side in memory: one segment.
        let (mut from, mut to) = (0, 0);
        for _ in 0..BATCH_REPLIES {
            let Some(reply) = queue.pop_front() else { break };
            let head = reply.head.as_bytes();
            batch.heads.copy_from(to, head);
            to += head.len();
            if !reply.data.is_empty() {
                batch.bytes.append(batch.heads.slice(from..to));
                batch.bytes.append(reply.data);
                from = to;
            }
            batch.grants.extend(reply.grant);
            if batch.bytes.len() >= BATCH_BYTES {
                break;
            }
        }
        if from < to {
            batch.bytes.append(batch.heads.slice(from..to));
        }
    }
}

/// Sends all of `bytes`, which keeps its memory for the next batch.
async fn send(socket: &Socket, bytes: &mut Buf) -> Result<()> {
    let (sent, back) = socket.send_part(std::mem::take(bytes)).await;
    *bytes = back;
    let sent = sent?;
    if sent < bytes.len() {
        socket.send(bytes.slice(sent..bytes.len())).await?;
    }
    Ok(())
}
