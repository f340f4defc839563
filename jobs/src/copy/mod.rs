//! The one copy loop: what is dirty on a source goes to a target while guests write.
//!
//! Jobs give it policy (what is dirty at first, which hook marks it, when it is done); the loop
//! plans, keeps a window of copies in flight, limits the rate, counts progress, answers failures by
//! the job's policy, pauses between units and ends at once when the job is forced to.
//!
//! Order of one copy, which nothing may change:
//! 1. claim the region; 2. clear its dirty bits; 3. read the source; 4. (copy-before-write: let
//!    waiting guests go); 5. write the target; 6. on a failed read: set the bits again before the
//!    region is free; on a failed write: keep the bytes and write again (copy-before-write),
//!    set the bits again (mirror), or fail the job.
//!
//! Reads of the source pass its gate, because somebody whom a drain waits for may wait for them.
//! Writes to the target wait at the target's gate, except those that a guest or a cut waits for.
//!
//! Where both sides are files that can share blocks, steps 3 to 5 are one (see `offload`).
//!
//! A copy in flight is a task of its own that holds the use of the target: when the job is forced
//! to end nobody waits for it, and the target stays in use until it has ended.

mod before;
mod bitmap;
mod chunk;
mod offload;
mod pieces;
mod plan;
mod run;
mod section;
mod shape;
mod spill;
mod state;

pub(crate) use self::before::BeforeWrite;
pub(crate) use self::pieces::Piece;
pub(crate) use self::plan::Plan;
pub(crate) use self::section::Layers;
pub(crate) use self::shape::Shape;
pub(crate) use self::spill::SpillPlan;
pub(crate) use self::state::{Bounds, Copy, CopySetup, EarlierReads};
