//! Threads for calls that block: path operations, hole queries, fallocate, heavy computing.
//!
//! Work is handed over as a `Send` closure; its result comes back through the core's mailbox.
//! The slot of the operation keeps descriptors alive until then.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use super::{FsOutcome, Token};
use crate::executor::{Mailbox, Message};
use crate::limits::BLOCKING_THREADS;

type Job = Box<dyn FnOnce() -> (i32, FsOutcome) + Send>;

struct Work {
    token: Token,
    mailbox: Arc<Mailbox>,
    job: Job,
}

#[derive(Default)]
struct Queue {
    work: VecDeque<Work>,
    idle: usize,
    threads: usize,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// Up to [`BLOCKING_THREADS`] threads, started on demand.
#[derive(Default)]
pub(crate) struct BlockingPool {
    shared: Arc<Shared>,
}

impl BlockingPool {
    /// Runs `job` on a thread; its result reaches `mailbox` as the completion of `token`.
    pub(crate) fn run(
        &self,
        token: Token,
        mailbox: Arc<Mailbox>,
        job: impl FnOnce() -> (i32, FsOutcome) + Send + 'static,
    ) {
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.work.push_back(Work { token, mailbox, job: Box::new(job) });
        if queue.idle < queue.work.len() && queue.threads < BLOCKING_THREADS {
            let shared = Arc::clone(&self.shared);
            let name = format!("liveblk-work{}", queue.threads);
            if thread::Builder::new().name(name).spawn(move || shared.serve()).is_ok() {
                queue.threads += 1;
            }
        }
        if queue.threads == 0 {
            // No thread can be had: do it here rather than never.
            let work = queue.work.pop_front();
            drop(queue);
            work.into_iter().for_each(Work::finish);
            return;
        }
        drop(queue);
        self.shared.changed.notify_one();
    }
}

impl Drop for BlockingPool {
    fn drop(&mut self) {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.shared.changed.notify_all();
    }
}

impl Work {
    fn finish(self) {
        let (result, outcome) = (self.job)();
        let outcome = crate::executor::SendOutcome(outcome);
        self.mailbox.push(Message::WorkDone { token: self.token, result, outcome });
    }
}

impl Shared {
    fn serve(&self) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(work) = queue.work.pop_front() {
                drop(queue);
                work.finish();
                queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if queue.closed {
                return;
            }
            queue.idle += 1;
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }
}
