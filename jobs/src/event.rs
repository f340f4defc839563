//! What jobs tell the outside, in exact order, and what queries show. No JSON here.

use std::rc::Rc;

use crate::converge::ConvergeInfo;
use crate::lifecycle::{IoStatus, Status};

/// The kinds of jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Keeps a target equal to the source until told to end.
    Mirror,
    /// Copies the source as it was at the start.
    Backup,
    /// Makes a file or an image.
    Create,
    /// Changes options of an image.
    Amend,
    /// Gives a layer for its own what layers below it hold.
    Stream,
    /// Puts what layers hold into a layer below them.
    Commit,
}

impl Kind {
    /// The name in QMP.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mirror => "mirror",
            Self::Backup => "backup",
            Self::Create => "create",
            Self::Amend => "amend",
            Self::Stream => "stream",
            Self::Commit => "commit",
        }
    }

    /// Whether it is a block job: one of `query-block-jobs` and the `block-job-*` commands.
    pub const fn is_block_job(self) -> bool {
        match self {
            Self::Mirror | Self::Backup | Self::Stream | Self::Commit => true,
            Self::Create | Self::Amend => false,
        }
    }
}

/// Which half of a copy failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reading the source.
    Read,
    /// Writing the target.
    Write,
}

impl Operation {
    /// The name in QMP.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// What a job did about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Tries again later.
    Ignore,
    /// Ends with the error.
    Report,
    /// Pauses until resumed.
    Stop,
}

impl Action {
    /// The name in QMP.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ignore => "ignore",
            Self::Report => "report",
            Self::Stop => "stop",
        }
    }
}

/// Numbers that end and ready events carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockJobFacts {
    /// The kind.
    pub kind: Kind,
    /// The job's id (`device` in QMP).
    pub id: Rc<str>,
    /// Bytes done and left.
    pub len: u64,
    /// Bytes done.
    pub offset: u64,
    /// Rate limit in bytes per second; 0 means none.
    pub speed: u64,
}

/// Something happened to a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// `JOB_STATUS_CHANGE`.
    StatusChange {
        /// The job.
        id: Rc<str>,
        /// Its new state.
        status: Status,
    },
    /// `BLOCK_JOB_READY`.
    Ready(BlockJobFacts),
    /// `BLOCK_JOB_PENDING`: waits for finalize.
    Pending {
        /// The kind.
        kind: Kind,
        /// The job.
        id: Rc<str>,
    },
    /// `BLOCK_JOB_COMPLETED`; with a text if it failed.
    Completed {
        /// Its numbers.
        facts: BlockJobFacts,
        /// Why it failed.
        error: Option<String>,
    },
    /// `BLOCK_JOB_CANCELLED`.
    Cancelled(BlockJobFacts),
    /// `BLOCK_JOB_ERROR`.
    Error {
        /// The job.
        id: Rc<str>,
        /// What failed.
        operation: Operation,
        /// What is done about it.
        action: Action,
    },
    /// `BLOCK_JOB_CONVERGE`, ours: a job that is to be ready in time went on to another phase, or
    /// missed its deadline.
    Converge {
        /// The job.
        id: Rc<str>,
        /// Where it is.
        info: ConvergeInfo,
    },
}

/// The spill file of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpillInfo {
    /// Its path.
    pub file: String,
    /// Bytes of old content in it that the target does not have yet.
    pub bytes: u64,
    /// Most bytes of it.
    pub max: u64,
}

/// A row of `query-jobs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobInfo {
    /// The job.
    pub id: Rc<str>,
    /// Its kind.
    pub kind: Kind,
    /// Its state.
    pub status: Status,
    /// Bytes done.
    pub current: u64,
    /// Bytes done and left.
    pub total: u64,
    /// Why it failed.
    pub error: Option<String>,
    /// Where it is, if it is to be ready in time.
    pub converge: Option<ConvergeInfo>,
}

/// A row of `query-block-jobs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockJobInfo {
    /// Kind, id, progress and speed.
    pub facts: BlockJobFacts,
    /// Whether it is doing something now.
    pub busy: bool,
    /// Whether it stands still or is about to.
    pub paused: bool,
    /// Why it stopped of itself.
    pub io_status: IoStatus,
    /// Whether it can be completed.
    pub ready: bool,
    /// Its state.
    pub status: Status,
    /// Whether it finalizes itself.
    pub auto_finalize: bool,
    /// Whether it goes away when concluded.
    pub auto_dismiss: bool,
    /// Why it failed.
    pub error: Option<String>,
    /// Where it is, if it is to be ready in time.
    pub converge: Option<ConvergeInfo>,
    /// The spill file, if one was needed.
    pub spill: Option<SpillInfo>,
    /// Mirror only: whether every write reaches the target before it is answered.
    pub actively_synced: Option<bool>,
}
