//! Clusters that lost a reference, and whether their space goes back to the storage.
//!
//! Why a cluster was given up decides with the options `pass-discard-request`, `-snapshot` and
//! `-other` (QMP `BlockdevOptionsQcow2`) whether its space is given back when it is freed; as the
//! peer, what a rewrite gave up is kept, because the next write takes it anyway.

use super::layout::{HostCluster, Run};
use super::state::State;

/// Why a cluster loses a reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// A guest discarded it, or zeroed it and allowed that it goes.
    Request,
    /// A snapshot was deleted or applied.
    Snapshot,
    /// The disk became smaller.
    Shrink,
    /// A table moved, or bitmaps changed.
    Other,
    /// Its content was written into another place.
    Rewrite,
}

/// For which causes space goes back to the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Passes {
    pub(super) request: bool,
    pub(super) snapshot: bool,
    pub(super) other: bool,
}

impl Passes {
    /// Whether what is freed for `cause` goes back.
    pub(super) const fn has(self, cause: Cause) -> bool {
        match cause {
            Cause::Request => self.request,
            Cause::Snapshot => self.snapshot,
            Cause::Shrink => true,
            Cause::Other => self.other,
            Cause::Rewrite => false,
        }
    }
}

/// Clusters that each lost one reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    pub(super) run: Run,
    /// Their space goes back where it was the last one.
    pub(super) punch: bool,
}

impl Freed {
    /// Clusters whose space stays.
    pub(super) const fn kept(run: Run) -> Self {
        Self { run, punch: false }
    }
}

impl State {
    /// What becomes of `run`, given up for `cause`.
    pub(super) const fn freed(&self, run: Run, cause: Cause) -> Freed {
        Freed { run, punch: self.passes.has(cause) }
    }

    /// Notes that each cluster of `run` lost one reference in memory.
    pub(super) fn unlink_run(&mut self, run: Run, cause: Cause) {
        for cluster in run.clusters() {
            self.unlink(cluster, cause);
        }
    }

    /// Notes that `cluster` lost one reference in memory; it is freed when that is durable.
    pub(super) fn unlink(&mut self, cluster: HostCluster, cause: Cause) {
        #[cfg(feature = "planted-bugs")]
        if self.reuses_at_once {
            return push_cluster(&mut self.released, cluster);
        }
        let punch = self.passes.has(cause);
        if let Some(last) = self.unlinked.last_mut()
            && last.punch == punch
            && last.run.start.plus(last.run.count) == cluster
        {
            last.run.count += 1;
            return;
        }
        self.unlinked.push(Freed { run: Run { start: cluster, count: 1 }, punch });
    }

    /// Notes that the data cluster at the decoded place `host` lost a reference.
    pub(super) fn unlink_data(&mut self, host: u64, cause: Cause) {
        if !self.geometry.external {
            self.unlink(self.geometry.host_cluster(host), cause);
        }
    }
}

/// Adds a cluster to the last run if it continues it.
pub(super) fn push_cluster(runs: &mut Vec<Run>, cluster: HostCluster) {
    if let Some(last) = runs.last_mut()
        && last.start.plus(last.count) == cluster
    {
        last.count += 1;
        return;
    }
    runs.push(Run { start: cluster, count: 1 });
}
