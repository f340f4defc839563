//! Threads for calls that block: path operations, hole queries, fallocate, heavy computing, and all
//! I/O of files that another machine or program answers for.
//!
//! Work is handed over as a `Send` closure; its result comes back through the core's mailbox.
//! The slot of the operation keeps descriptors and buffers alive until then.
//!
//! Order rule: work waits in a *lane*, one per file, one for paths and one for computing. A lane
//! has at most [`LANE_THREADS`] threads, so a file that hangs takes those and no more, and others
//! go on.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::RawFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use super::{FsOutcome, Token};
use crate::executor::{Mailbox, Message};
use crate::limits::{BLOCKING_THREADS, IDLE_THREADS, LANE_THREADS};

type Job = Box<dyn FnOnce() -> (i32, FsOutcome) + Send>;

/// What waits for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lane {
    /// Calls on paths.
    Paths,
    /// Computing.
    Computing,
    /// Calls on this descriptor.
    File(RawFd),
}

struct Work {
    lane: Lane,
    token: Token,
    mailbox: Arc<Mailbox>,
    job: Job,
}

/// A lane with work in it.
#[derive(Default)]
struct Traffic {
    running: usize,
    waiting: VecDeque<Work>,
}

#[derive(Default)]
struct Queue {
    /// May run; counted as running in its lane.
    ready: VecDeque<Work>,
    lanes: BTreeMap<Lane, Traffic>,
    idle: usize,
    threads: usize,
    started: usize,
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
        lane: Lane,
        token: Token,
        mailbox: Arc<Mailbox>,
        job: impl FnOnce() -> (i32, FsOutcome) + Send + 'static,
    ) {
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.add(Work { lane, token, mailbox, job: Box::new(job) });
        if queue.idle < queue.ready.len() && queue.threads < BLOCKING_THREADS {
            let shared = Arc::clone(&self.shared);
            let name = format!("liveblk-work{}", queue.started);
            if thread::Builder::new().name(name).spawn(move || shared.serve()).is_ok() {
                queue.threads += 1;
                queue.started += 1;
            }
        }
        if queue.threads == 0 {
            // No thread can be had: do it here rather than never.
            let work = queue.ready.pop_front();
            drop(queue);
            if let Some(work) = work {
                let lane = work.lane;
                work.finish();
                self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner).done(lane);
            }
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

impl Queue {
    fn add(&mut self, work: Work) {
        let traffic = self.lanes.entry(work.lane).or_default();
        if traffic.running < LANE_THREADS {
            traffic.running += 1;
            self.ready.push_back(work);
        } else {
            traffic.waiting.push_back(work);
        }
    }

    /// Work of `lane` has ended: the next one of it may run.
    fn done(&mut self, lane: Lane) {
        let Some(traffic) = self.lanes.get_mut(&lane) else { return };
        match traffic.waiting.pop_front() {
            Some(next) => self.ready.push_back(next),
            None if traffic.running == 1 => drop(self.lanes.remove(&lane)),
            None => traffic.running -= 1,
        }
    }
}

impl Shared {
    fn serve(&self) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(work) = queue.ready.pop_front() {
                drop(queue);
                let lane = work.lane;
                work.finish();
                queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
                queue.done(lane);
                continue;
            }
            if queue.closed || queue.idle >= IDLE_THREADS {
                queue.threads -= 1;
                return;
            }
            queue.idle += 1;
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// Generous: it only ends a test that hangs.
    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn work_that_hangs_in_one_lane_keeps_no_other_waiting() {
        let pool = BlockingPool::default();
        let mailbox = Arc::new(Mailbox::new(None));
        let token = |index| Token { index, generation: 1 };
        let (release, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let (began, begun) = mpsc::channel();
        for index in 0..100 {
            let (held, began) = (Arc::clone(&held), began.clone());
            pool.run(Lane::File(7), token(index), Arc::clone(&mailbox), move || {
                began.send(index).expect("the test listens");
                let _ = held.lock().expect("no panic").recv();
                (0, FsOutcome::None)
            });
        }
        for _ in 0..LANE_THREADS {
            begun.recv_timeout(PATIENCE).expect("the lane runs");
        }
        for index in 100..200 {
            let began = began.clone();
            let lane = [Lane::File(8), Lane::Paths, Lane::Computing][index as usize % 3];
            pool.run(lane, token(index), Arc::clone(&mailbox), move || {
                began.send(index).expect("the test listens");
                (0, FsOutcome::None)
            });
        }
        let mut ran: Vec<u32> =
            (0..100).map(|_| begun.recv_timeout(PATIENCE).expect("others run")).collect();
        ran.sort_unstable();
        assert!(ran.iter().copied().eq(100..200), "{ran:?}");
        drop(release);
        for _ in LANE_THREADS..100 {
            begun.recv_timeout(PATIENCE).expect("the lane goes on");
        }
    }
}
