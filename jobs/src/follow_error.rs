//! What is wrong with a job that follows guests, or with a new size under it. The peer has none of
//! these: it refuses every new size under a job.

use std::fmt;

/// Refusals of jobs that follow guests.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum FollowError {
    /// A smaller size of a node that a job follows.
    Shrinks {
        /// The node.
        node: Box<str>,
        /// The job.
        job: Box<str>,
        /// Its kind ("mirror").
        kind: &'static str,
    },
    /// A larger size of a node that a job follows, whose target does not take it.
    TargetCannotGrow {
        /// The node.
        node: Box<str>,
        /// The job.
        job: Box<str>,
        /// Its kind ("mirror").
        kind: &'static str,
        /// The target.
        target: Box<str>,
        /// Why it does not.
        source: liveblk_engine::Error,
    },
    /// A job that cannot go with another one on the same node.
    Beside {
        /// The node.
        node: Box<str>,
        /// The job that has it.
        job: Box<str>,
        /// Its kind ("mirror").
        kind: &'static str,
    },
    /// A number of a convergence that is out of its bounds.
    BadConverge {
        /// The member, as in QMP.
        member: &'static str,
        /// The largest that is allowed; the least is 1.
        most: u32,
    },
    /// An option of active commits, where the top is not the layer that guests write.
    NotActive(&'static str),
}

impl fmt::Display for FollowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shrinks { node, job, kind } => write!(
                f,
                "Node '{node}' is busy: block device is in use by block job: {kind} (a disk that \
                 job '{job}' follows can grow, not shrink)"
            ),
            Self::TargetCannotGrow { node, job, kind, target, source } => write!(
                f,
                "Node '{node}' cannot grow: {kind} job '{job}' follows it, and its target \
                 '{target}' cannot grow: {source}"
            ),
            Self::Beside { node, job, kind } => write!(
                f,
                "Node '{node}' is busy: block device is in use by block job: {kind} (job '{job}')"
            ),
            Self::BadConverge { member, most } => {
                write!(f, "Parameter '{member}' expects a value between 1 and {most}")
            }
            Self::NotActive(option) => {
                write!(f, "'{option}' specified, but 'top' is not the active layer")
            }
        }
    }
}

impl std::error::Error for FollowError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::TargetCannotGrow { source, .. } => Some(source),
            _ => None,
        }
    }
}
