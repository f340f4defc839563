//! The end of mirrors that end together: one cut over all their sources, all or none.
//!
//! Order: (1) every mirror copies in the background until little is left; (2) one cut: all gates
//! closed, the last pass of each, its target durable; (3) all swaps; (4) the gates open. A failure
//! before (3) moves no guest, and the transaction of the jobs fails, or goes back to (1) if the
//! policy of the job that failed says so.

use std::rc::Rc;

use liveblk_engine::executor::Core;
use liveblk_engine::format::LocalFuture;
use liveblk_engine::graph::{CutPart, cut};

use crate::copy::Copy;
use crate::error::{JobError, Result};
use crate::event::Operation;
use crate::job::Job;
use crate::limits::CUT_WAIT_NS;

/// How one mirror ends when its transaction is finalized.
pub(crate) struct Pivot {
    pub(crate) copy: Rc<Copy>,
    /// Copies until little is left.
    pub(crate) approach: Box<dyn Fn() -> LocalFuture<'static, Result<()>>>,
    /// What its source contributes to the cut.
    pub(crate) part: Box<dyn Fn() -> CutPart>,
}

/// Ends the mirrors together.
///
/// # Errors
/// The job that failed and why; no guest has moved then.
pub(crate) async fn pivot_together(
    core: &Core,
    pivots: &[(Rc<Job>, Pivot)],
) -> Result<(), (Rc<Job>, JobError)> {
    loop {
        for (job, pivot) in pivots {
            (pivot.approach)().await.map_err(|error| (Rc::clone(job), error))?;
        }
        let mut shapes = Vec::new();
        for (_, pivot) in pivots {
            shapes.push(pivot.copy.hold_shape().await);
        }
        let parts: Vec<_> = pivots.iter().map(|(_, pivot)| (pivot.part)()).collect();
        let known: Vec<_> = pivots.iter().map(|(_, pivot)| pivot.copy.source().id()).collect();
        let Err(error) = cut(core, parts, CUT_WAIT_NS).await else { return Ok(()) };
        drop(shapes);
        let stays = |((_, pivot), known): (&(_, Pivot), _)| pivot.copy.check_source(known).is_ok();
        if !pivots.iter().zip(known).all(stays) {
            // A snapshot moved guests first, and the jobs with them.
            continue;
        }
        let mut answered = false;
        for (job, pivot) in pivots {
            let failed = |error| (Rc::clone(job), error);
            pivot.copy.check().map_err(failed)?;
            if let Some((operation, error)) = pivot.copy.take_pass_failure() {
                pivot.copy.answer(operation, error).await.map_err(failed)?;
                answered = true;
            }
        }
        if !answered {
            let Some((job, pivot)) = pivots.first() else { return Ok(()) };
            let answer = pivot.copy.answer(Operation::Read, error).await;
            answer.map_err(|error| (Rc::clone(job), error))?;
        }
    }
}
