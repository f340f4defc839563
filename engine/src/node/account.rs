//! What was asked of a node and how it went: the numbers of `query-blockstats`.
//!
//! Every request is counted once, when it ends: done, failed, or refused before it began. Times
//! reach from admission to the end. Nothing here allocates or waits; of one core.

use std::cell::Cell;
use std::rc::Rc;

use super::object::Node;

/// Kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Read,
    Write,
    Unmap,
    Flush,
}

/// The numbers of one kind of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkStats {
    /// Requests that were done.
    pub operations: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Nanoseconds that they took, from admission to the end, one after the other.
    pub total_time_ns: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that were refused: outside the disk, or a change of a read-only node.
    pub invalid: u64,
}

/// The numbers of a node since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeStats {
    /// Reads.
    pub read: WorkStats,
    /// Writes, zeroes included.
    pub write: WorkStats,
    /// Discards.
    pub unmap: WorkStats,
    /// Flushes.
    pub flush: WorkStats,
    /// The end of the farthest write in bytes.
    pub highest_write: u64,
}

/// Counts the requests of a node.
#[derive(Debug, Default)]
pub(super) struct Account([Cell<WorkStats>; 4]);

impl Account {
    fn of(&self, work: Work) -> &Cell<WorkStats> {
        let [read, write, unmap, flush] = &self.0;
        match work {
            Work::Read => read,
            Work::Write => write,
            Work::Unmap => unmap,
            Work::Flush => flush,
        }
    }
}

/// A request that is being counted: failed when dropped, unless it was said how it ended.
pub(super) struct Counting {
    node: Rc<Node>,
    work: Work,
    bytes: u64,
    began: u64,
    end: End,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Failed,
    Invalid,
    Done,
    /// It was nothing that counts.
    Withdrawn,
}

impl Counting {
    /// A request that was admitted just now and counts as refused until [`Counting::begun`].
    pub(super) fn admitted(node: &Rc<Node>, work: Work, bytes: u64) -> Self {
        let began = node.core().now();
        Self { node: Rc::clone(node), work, bytes, began, end: End::Invalid }
    }

    /// It is within the disk and allowed.
    pub(super) fn begun(&mut self) {
        self.end = End::Failed;
    }

    /// It counts only if it is [`Counting::done`].
    pub(super) fn withdrawn(mut self) -> Self {
        self.end = End::Withdrawn;
        self
    }

    /// It is done.
    pub(super) fn done(mut self) {
        self.end = End::Done;
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        let cell = self.node.account.of(self.work);
        let mut stats = cell.get();
        match self.end {
            End::Failed => stats.failed += 1,
            End::Invalid => stats.invalid += 1,
            End::Withdrawn => {}
            End::Done => {
                stats.operations += 1;
                stats.bytes = stats.bytes.saturating_add(self.bytes);
                let took = self.node.core().now().saturating_sub(self.began);
                stats.total_time_ns = stats.total_time_ns.saturating_add(took);
            }
        }
        cell.set(stats);
    }
}

impl Node {
    /// What was asked of the node since it was opened.
    pub fn stats(&self) -> NodeStats {
        NodeStats {
            read: self.account.of(Work::Read).get(),
            write: self.account.of(Work::Write).get(),
            unmap: self.account.of(Work::Unmap).get(),
            flush: self.account.of(Work::Flush).get(),
            highest_write: self.write_watch().highest(),
        }
    }
}
