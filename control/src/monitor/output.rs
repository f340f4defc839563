//! The queue of messages to one client.
//!
//! Owns: their order, and the bound. Promises: what is pushed first leaves first, whoever pushes,
//! from any thread; pushing never blocks. When [`OUTPUT_QUEUE_LEN_MAX`] messages wait, the queue
//! overflows: nothing more is taken and the connection ends, because a client that missed an event
//! must notice.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::Notify;

use crate::limits::OUTPUT_QUEUE_LEN_MAX;

/// Replies that may wait before the next request is taken up.
const REPLIES_AHEAD_MAX: usize = 16;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Output {
    state: Mutex<State>,
    /// Something was pushed or the queue was closed.
    filled: Notify,
    /// Something was taken or the queue was closed.
    drained: Notify,
}

#[derive(Debug, Default)]
struct State {
    messages: VecDeque<Arc<Value>>,
    end: End,
}

/// How far the queue is from its end.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum End {
    #[default]
    Open,
    /// What waits is still delivered.
    Closing,
    /// Nothing is delivered any more.
    Broken,
}

impl Output {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere cannot leave the queue half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a message, unless the queue has ended.
    pub(super) fn push(&self, message: Arc<Value>) {
        let mut state = self.state();
        if state.end != End::Open {
            return;
        }
        if state.messages.len() >= OUTPUT_QUEUE_LEN_MAX {
            tracing::warn!("a monitor's client does not read; its connection is closed");
            state.messages.clear();
            state.end = End::Broken;
            self.drained.notify_one();
        } else {
            state.messages.push_back(message);
        }
        drop(state);
        self.filled.notify_one();
    }

    /// Ends the queue once what waits is delivered.
    pub(super) fn close(&self) {
        let mut state = self.state();
        if state.end == End::Open {
            state.end = End::Closing;
        }
        drop(state);
        self.filled.notify_one();
        self.drained.notify_one();
    }

    /// Ends the queue at once: the client is gone.
    pub(super) fn abandon(&self) {
        let mut state = self.state();
        state.end = End::Broken;
        state.messages.clear();
        drop(state);
        self.filled.notify_one();
        self.drained.notify_one();
    }

    /// Whether the client is gone.
    pub(super) fn is_broken(&self) -> bool {
        self.state().end == End::Broken
    }

    /// The messages that wait, at least one; `None` at the end. One taker only.
    pub(super) async fn take(&self) -> Option<VecDeque<Arc<Value>>> {
        loop {
            {
                let mut state = self.state();
                if !state.messages.is_empty() {
                    let taken = std::mem::take(&mut state.messages);
                    drop(state);
                    self.drained.notify_one();
                    return Some(taken);
                }
                if state.end != End::Open {
                    return None;
                }
            }
            self.filled.notified().await;
        }
    }

    /// Waits until few enough messages wait for another request to be taken up.
    pub(super) async fn has_room(&self) {
        loop {
            {
                let state = self.state();
                if state.messages.len() < REPLIES_AHEAD_MAX || state.end == End::Broken {
                    return;
                }
            }
            self.drained.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn messages_leave_in_order_and_a_closed_queue_drains_first() {
        let output = Output::default();
        output.push(Arc::new(json!(1)));
        output.push(Arc::new(json!(2)));
        output.close();
        output.push(Arc::new(json!(3)));
        let taken: Vec<Value> =
            output.take().await.unwrap().iter().map(|value| Value::clone(value)).collect();
        assert_eq!(taken, [json!(1), json!(2)]);
        assert!(output.take().await.is_none());
    }

    #[tokio::test]
    async fn an_overflow_ends_the_queue() {
        let output = Output::default();
        for _ in 0..=OUTPUT_QUEUE_LEN_MAX {
            output.push(Arc::new(Value::Null));
        }
        assert!(output.is_broken());
        assert!(output.take().await.is_none());
    }
}
