//! The life cycle of a job: a pure table of states, verbs and what a verb changes.
//!
//! No clock, no I/O, no events: callers send `JOB_STATUS_CHANGE` for every status that
//! [`Life::enter`] reports as new.
//!
//! ```text
//! created -> running <-> paused
//!    |          |  \
//!    |          |   ready <-> standby
//!    |          v     v
//!    |        waiting -> pending -> concluded -> null
//!    |          |           |           ^
//!    +----> aborting <------+           |
//!    |          +-----------------------+
//!    +-> null (never started)
//! ```
//!
//! Four words:
//! - *pause*: no new I/O at once; `paused` (or `standby`) when what was in flight has ended; undone
//!   by resume. Copy-before-write goes on, the guest needs it.
//! - *drain*: the engine waits until a node is quiet; a job neither sees it nor delays it.
//! - *cancel*: the job ends without its result. Soft, at `ready`: it ends with a consistent copy
//!   and without the switch. Forced: it is `null` within a second whatever the target does.
//! - *complete*: a ready job ends with its result and the switch.

use std::fmt;

use crate::error::JobError;

/// Where a job is in its life (contract: the peer's job states).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Status {
    /// Not announced yet.
    Undefined,
    /// Announced, not started.
    Created,
    /// At work.
    Running,
    /// Quiescent, before ready.
    Paused,
    /// The result is at hand; waits for complete or cancel while keeping up.
    Ready,
    /// Quiescent, after ready.
    Standby,
    /// Done; waits for the other jobs of its transaction.
    Waiting,
    /// All are done; waits to be finalized.
    Pending,
    /// Failed or cancelled; cleans up.
    Aborting,
    /// Over; waits to be dismissed.
    Concluded,
    /// Gone.
    Null,
}

/// What a client can ask of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verb {
    /// End without the result.
    Cancel,
    /// Stop I/O until resumed.
    Pause,
    /// Go on.
    Resume,
    /// Limit the rate.
    SetSpeed,
    /// Take the result (at ready).
    Complete,
    /// Make the result of a pending job effective.
    Finalize,
    /// Forget a concluded job.
    Dismiss,
    /// Change options of a running job.
    Change,
}

impl Status {
    /// All states, in the order of the table.
    pub const ALL: [Self; 11] = [
        Self::Undefined,
        Self::Created,
        Self::Running,
        Self::Paused,
        Self::Ready,
        Self::Standby,
        Self::Waiting,
        Self::Pending,
        Self::Aborting,
        Self::Concluded,
        Self::Null,
    ];

    /// The name in QMP.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Undefined => "undefined",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    /// Whether a job may go from this state to `next`.
    pub const fn may_become(self, next: Self) -> bool {
        use Status::*;
        match self {
            Undefined => matches!(next, Created),
            Created => matches!(next, Running | Aborting | Null),
            Running => matches!(next, Paused | Ready | Waiting | Aborting),
            Paused => matches!(next, Running),
            Ready => matches!(next, Standby | Waiting | Aborting),
            Standby => matches!(next, Ready),
            Waiting => matches!(next, Pending | Aborting),
            Pending => matches!(next, Aborting | Concluded),
            Aborting => matches!(next, Aborting | Concluded),
            Concluded => matches!(next, Null),
            Null => false,
        }
    }

    /// Whether the job's own work is over.
    pub const fn is_completed(self) -> bool {
        matches!(
            self,
            Self::Waiting | Self::Pending | Self::Aborting | Self::Concluded | Self::Null
        )
    }

    /// Whether a job in this state takes `verb`.
    pub const fn accepts(self, verb: Verb) -> bool {
        use Status::*;
        match verb {
            Verb::Cancel => {
                matches!(self, Created | Running | Paused | Ready | Standby | Waiting | Pending)
            }
            Verb::Pause | Verb::Resume | Verb::SetSpeed | Verb::Change => {
                matches!(self, Created | Running | Paused | Ready | Standby)
            }
            Verb::Complete => matches!(self, Ready | Standby),
            Verb::Finalize => matches!(self, Pending),
            Verb::Dismiss => matches!(self, Concluded),
        }
    }
}

impl Verb {
    /// All verbs, in the order of the table.
    pub const ALL: [Self; 8] = [
        Self::Cancel,
        Self::Pause,
        Self::Resume,
        Self::SetSpeed,
        Self::Complete,
        Self::Finalize,
        Self::Dismiss,
        Self::Change,
    ];

    /// The name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed => "set-speed",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
            Self::Change => "change",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How far a request to end has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// Nobody asked.
    None,
    /// Complete: take the result and switch.
    Complete,
    /// Soft cancel at ready: take the copy of this instant, do not switch.
    Copy,
    /// Forced: no result.
    Force,
}

/// Why a job stands still of itself, as the queries show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoStatus {
    /// No failure stopped it.
    Ok,
    /// Stopped for want of space.
    NoSpace,
    /// Stopped by another failure.
    Failed,
}

impl IoStatus {
    /// The name in QMP.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::NoSpace => "nospace",
            Self::Failed => "failed",
        }
    }
}

/// The state of one job's life.
#[derive(Clone, Debug)]
pub struct Life {
    status: Status,
    /// Reasons to stand still: the user's and the job's own (error policy).
    pause_count: u32,
    user_paused: bool,
    io_status: IoStatus,
    ending: Ending,
}

/// What a verb asks the caller to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// The job's task looks at the new state.
    Wake,
    /// The work is over already: abort the job's transaction.
    AbortFinished,
    /// Finalize the job's transaction.
    Finalize,
    /// Forget the job.
    Dismiss,
    /// The caller's own business (speed, change), allowed in this state.
    Allowed,
}

impl Default for Life {
    fn default() -> Self {
        Self {
            status: Status::Undefined,
            pause_count: 0,
            user_paused: false,
            io_status: IoStatus::Ok,
            ending: Ending::None,
        }
    }
}

impl Life {
    /// The state.
    pub fn status(&self) -> Status {
        self.status
    }

    /// Whether the job is to stand still.
    pub fn wants_pause(&self) -> bool {
        self.pause_count > 0
    }

    /// Whether the user paused it (a job that stopped on an error counts: only resume helps).
    pub fn user_paused(&self) -> bool {
        self.user_paused
    }

    /// Why it stopped of itself.
    pub fn io_status(&self) -> IoStatus {
        self.io_status
    }

    /// How it was asked to end.
    pub fn ending(&self) -> Ending {
        self.ending
    }

    /// Whether a cancel, soft or forced, was asked for.
    pub fn cancel_requested(&self) -> bool {
        matches!(self.ending, Ending::Copy | Ending::Force)
    }

    /// Moves to `next`; true if that is a change to be announced.
    ///
    /// # Panics
    /// If the table does not have this move: a programming error.
    pub fn enter(&mut self, next: Status) -> bool {
        assert!(self.status.may_become(next), "job cannot go from {} to {next}", self.status);
        let changed = self.status != next;
        self.status = next;
        changed
    }

    /// The status that stands for quiescent, here.
    pub fn quiet_status(&self) -> Status {
        if matches!(self.status, Status::Ready | Status::Standby) {
            Status::Standby
        } else {
            Status::Paused
        }
    }

    /// Applies a verb of the user to job `id`. `force` matters to cancel only; `completable` says
    /// whether this kind of job can be completed.
    ///
    /// # Errors
    /// The peer's refusals; nothing changed then.
    pub fn apply(
        &mut self,
        id: &str,
        verb: Verb,
        force: bool,
        completable: bool,
    ) -> Result<Effect, JobError> {
        // As by the peer, in every state.
        if verb == Verb::Resume && !self.user_paused {
            return Err(JobError::NotPaused);
        }
        if !self.status.accepts(verb) {
            return Err(JobError::VerbRefused { id: id.into(), status: self.status, verb });
        }
        match verb {
            Verb::Pause => {
                if self.user_paused {
                    return Err(JobError::AlreadyPaused);
                }
                self.user_paused = true;
                self.pause_count += 1;
                Ok(Effect::Wake)
            }
            Verb::Resume => {
                self.io_status = IoStatus::Ok;
                self.end_user_pause();
                Ok(Effect::Wake)
            }
            Verb::Cancel => Ok(self.cancel(force)),
            Verb::Complete => {
                if self.cancel_requested() || !completable {
                    return Err(JobError::CannotComplete { id: id.into() });
                }
                self.ending = self.ending.max(Ending::Complete);
                Ok(Effect::Wake)
            }
            Verb::Finalize => Ok(Effect::Finalize),
            Verb::Dismiss => Ok(Effect::Dismiss),
            Verb::SetSpeed | Verb::Change => Ok(Effect::Allowed),
        }
    }

    /// Cancels without asking the table (a member of a failing transaction, quit).
    pub fn cancel(&mut self, force: bool) -> Effect {
        let ready = matches!(self.status, Status::Ready | Status::Standby);
        let finished = self.status.is_completed();
        // Work that is done has no softer end than none: the result is given up, as by the peer.
        let force = force || !ready;
        if self.user_paused {
            self.end_user_pause();
        }
        let asked = if force { Ending::Force } else { Ending::Copy };
        self.ending = self.ending.max(asked);
        if finished { Effect::AbortFinished } else { Effect::Wake }
    }

    /// The job stops itself after a failure; only the user's resume lets it go on.
    pub fn stop_on_error(&mut self, io_status: IoStatus) {
        if self.io_status == IoStatus::Ok {
            self.io_status = io_status;
        }
        if !self.user_paused {
            self.user_paused = true;
            self.pause_count += 1;
        }
    }

    fn end_user_pause(&mut self) {
        self.user_paused = false;
        self.pause_count -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A life that was led to `status` by legal moves.
    fn life_at(status: Status) -> Life {
        use Status::*;
        let path: &[Status] = match status {
            Undefined => &[],
            Created => &[Created],
            Running => &[Created, Running],
            Paused => &[Created, Running, Paused],
            Ready => &[Created, Running, Ready],
            Standby => &[Created, Running, Ready, Standby],
            Waiting => &[Created, Running, Waiting],
            Pending => &[Created, Running, Waiting, Pending],
            Aborting => &[Created, Running, Aborting],
            Concluded => &[Created, Running, Aborting, Concluded],
            Null => &[Created, Running, Aborting, Concluded, Null],
        };
        let mut life = Life::default();
        for next in path {
            life.enter(*next);
        }
        life
    }

    /// The peer's table, row by row: created, running, paused, ready, standby, waiting, pending,
    /// aborting, concluded.
    const TABLE: [(Verb, [u8; 9]); 8] = [
        (Verb::Cancel, [1, 1, 1, 1, 1, 1, 1, 0, 0]),
        (Verb::Pause, [1, 1, 1, 1, 1, 0, 0, 0, 0]),
        (Verb::Resume, [1, 1, 1, 1, 1, 0, 0, 0, 0]),
        (Verb::SetSpeed, [1, 1, 1, 1, 1, 0, 0, 0, 0]),
        (Verb::Change, [1, 1, 1, 1, 1, 0, 0, 0, 0]),
        (Verb::Complete, [0, 0, 0, 1, 1, 0, 0, 0, 0]),
        (Verb::Finalize, [0, 0, 0, 0, 0, 0, 1, 0, 0]),
        (Verb::Dismiss, [0, 0, 0, 0, 0, 0, 0, 0, 1]),
    ];

    #[test]
    fn every_verb_in_every_state_is_accepted_or_refused_as_by_the_peer() {
        for (verb, row) in TABLE {
            for (status, allowed) in Status::ALL[1..10].iter().zip(row) {
                let mut life = life_at(*status);
                if verb == Verb::Resume {
                    (life.user_paused, life.pause_count) = (true, 1);
                }
                let answer = life.apply("j", verb, true, true);
                let refused = matches!(answer, Err(JobError::VerbRefused { .. }));
                assert_eq!(refused, allowed == 0, "{verb} in {status}");
                if refused {
                    let text = answer.map(|_| ()).unwrap_err().to_string();
                    assert_eq!(
                        text,
                        format!("Job 'j' in state '{status}' cannot accept command verb '{verb}'")
                    );
                    assert_eq!(life.ending(), Ending::None);
                }
            }
            for status in [Status::Undefined, Status::Null] {
                assert!(life_at(status).apply("j", verb, true, true).is_err());
            }
        }
    }

    #[test]
    fn resume_of_what_nobody_paused_says_so_in_every_state() {
        for status in Status::ALL {
            let answer = life_at(status).apply("j", Verb::Resume, false, true);
            assert_eq!(answer.map(|_| ()), Err(JobError::NotPaused), "{status}");
        }
    }

    #[test]
    fn every_pair_of_states_moves_as_the_peer_allows() {
        use Status::*;
        let legal = [
            (Undefined, Created),
            (Created, Running),
            (Created, Aborting),
            (Created, Null),
            (Running, Paused),
            (Running, Ready),
            (Running, Waiting),
            (Running, Aborting),
            (Paused, Running),
            (Ready, Standby),
            (Ready, Waiting),
            (Ready, Aborting),
            (Standby, Ready),
            (Waiting, Pending),
            (Waiting, Aborting),
            (Pending, Aborting),
            (Pending, Concluded),
            (Aborting, Aborting),
            (Aborting, Concluded),
            (Concluded, Null),
        ];
        for from in Status::ALL {
            for to in Status::ALL {
                assert_eq!(from.may_become(to), legal.contains(&(from, to)), "{from} -> {to}");
            }
        }
    }

    #[test]
    fn pausing_twice_and_resuming_an_unpaused_job_are_refused_with_the_peers_texts() {
        let mut life = life_at(Status::Running);
        let text = |answer: Result<Effect, JobError>| answer.unwrap_err().to_string();
        assert_eq!(
            text(life.apply("j", Verb::Resume, false, true)),
            "Can't resume a job that was not paused"
        );
        assert_eq!(life.apply("j", Verb::Pause, false, true), Ok(Effect::Wake));
        assert_eq!(text(life.apply("j", Verb::Pause, false, true)), "Job is already paused");
        assert!(life.wants_pause());
        assert_eq!(life.apply("j", Verb::Resume, false, true), Ok(Effect::Wake));
        assert!(!life.wants_pause());
    }

    #[test]
    fn cancel_is_soft_only_at_ready_and_force_wins() {
        let mut life = life_at(Status::Running);
        life.cancel(false);
        assert_eq!(life.ending(), Ending::Force);
        let mut life = life_at(Status::Ready);
        life.cancel(false);
        assert_eq!(life.ending(), Ending::Copy);
        let refusal = life.apply("j", Verb::Complete, false, true).unwrap_err();
        assert_eq!(refusal.to_string(), "The active block job 'j' cannot be completed");
        life.cancel(true);
        assert_eq!(life.ending(), Ending::Force);
        let mut life = life_at(Status::Pending);
        assert_eq!((life.cancel(false), life.ending()), (Effect::AbortFinished, Ending::Force));
        let mut life = life_at(Status::Waiting);
        assert_eq!(life.cancel(true), Effect::AbortFinished);
    }

    #[test]
    fn cancelling_a_paused_job_resumes_it_and_resume_clears_the_io_status() {
        let mut life = life_at(Status::Running);
        life.stop_on_error(IoStatus::NoSpace);
        assert_eq!(life.io_status(), IoStatus::NoSpace);
        assert!(life.wants_pause() && life.user_paused());
        assert_eq!(life.apply("j", Verb::Resume, false, true), Ok(Effect::Wake));
        assert_eq!(life.io_status(), IoStatus::Ok);
        life.stop_on_error(IoStatus::Failed);
        life.cancel(true);
        assert!(!life.wants_pause());
    }

    #[test]
    fn complete_in_standby_takes_effect_on_resume() {
        let mut life = life_at(Status::Ready);
        life.apply("j", Verb::Pause, false, true).unwrap();
        life.enter(life.quiet_status());
        assert_eq!(life.status(), Status::Standby);
        assert_eq!(life.apply("j", Verb::Complete, false, true), Ok(Effect::Wake));
        assert!(life.wants_pause());
        assert_eq!(life.ending(), Ending::Complete);
    }
}
