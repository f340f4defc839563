//! A new size of a node that mirrors and active commits follow: their targets grow with it.
//!
//! Order: (1) no job that follows the node can end meanwhile; (2) every target is grown, or nothing
//! is changed; (3) the jobs know the new size, their copies stand still; (4) the node grows;
//! (5) the copies go on. A failure before (4) ended undoes what was done, targets included.
//!
//! A smaller size is refused while a job follows the node: what it copied would be too much.

use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::executor::Class;
use liveblk_engine::format::Preallocation;
use liveblk_engine::node::Node;

use crate::copy::{Copy, Shape};
use crate::error::{JobError, Result};
use crate::event::Kind;
use crate::follow_error::FollowError;
use crate::manager::JobManager;

/// A follower of a node that is being grown.
struct Grown {
    copy: Rc<Copy>,
    shape: Shape,
    /// Bytes of the target before.
    target: u64,
}

/// Sets the virtual size of `node` to `size` bytes, and that of the targets of jobs that follow it.
/// Runs to its end also when the caller goes away.
///
/// # Errors
/// What the node, or the first target that cannot grow, reports; nothing has changed then.
pub async fn resize(node: &Rc<Node>, size: u64, preallocation: Preallocation) -> Result<()> {
    let work = run(Rc::clone(node), size, preallocation);
    node.core().spawn(Class::Guest, work).await
}

async fn run(node: Rc<Node>, size: u64, preallocation: Preallocation) -> Result<()> {
    let mut grown = Vec::new();
    for follower in JobManager::of(node.core()).followers(node.id()) {
        let copy = Rc::clone(follower.copy());
        drop(follower);
        if size < node.size() {
            return Err(shrinks(&node, &copy));
        }
        match grow_target(&node, copy, size).await {
            Ok(one) => grown.extend(one),
            Err(error) => {
                undo(grown).await;
                return Err(error);
            }
        }
    }
    let old = node.size();
    for one in &grown {
        one.shape.begin_growth(size);
    }
    if let Err(error) = node.resize(size, preallocation).await {
        for one in &grown {
            one.shape.undo_growth(old);
        }
        undo(grown).await;
        return Err(error.into());
    }
    for one in &grown {
        // What a base holds beyond its top's old end is hidden by the top from now on.
        let hides = one.copy.job().kind() == Kind::Commit;
        let stale = if hides { one.target.clamp(old, size) - old } else { 0 };
        one.shape.end_growth(GuestRange::new(old, stale));
    }
    Ok(())
}

/// Makes the target of `copy` large enough; `None` if the job is over.
async fn grow_target(node: &Rc<Node>, copy: Rc<Copy>, size: u64) -> Result<Option<Grown>> {
    let shape = copy.hold_shape().await;
    let job = copy.job();
    let over = || copy.is_dead() || job.is_decided() || copy.source().id() != node.id();
    let Some(hold) = copy.hold().filter(|_| !over()) else { return Ok(None) };
    let target = copy.target().size();
    if target < size {
        let inner = Rc::clone(copy.target());
        // A task: a job that is cancelled while its target hangs leaves it to its end.
        let work = node.core().spawn(Class::Background, async move {
            let resized = inner.resize(size, Preallocation::Off).await;
            drop(hold);
            resized
        });
        match job.unless_dead(work, || copy.is_dead()).await {
            None => return Ok(None),
            Some(Ok(())) => {}
            Some(Err(error)) => {
                let refused = FollowError::TargetCannotGrow {
                    node: (*node.name()).into(),
                    job: (**job.id()).into(),
                    kind: job.kind().name(),
                    target: (*copy.target().name()).into(),
                    source: error,
                };
                return Err(refused.into());
            }
        }
    }
    Ok(Some(Grown { copy, shape, target }))
}

/// Targets become what they were. One that does not is larger than its source: what is more reads
/// as zeroes.
async fn undo(grown: Vec<Grown>) {
    for one in grown.into_iter().rev() {
        let (target, hold) = (Rc::clone(one.copy.target()), one.copy.hold());
        if target.size() == one.target || hold.is_none() {
            continue;
        }
        let work = target.core().clone().spawn(Class::Background, async move {
            if let Err(error) = target.resize(one.target, Preallocation::Off).await {
                tracing::warn!(node = %target.name(), %error, "a target stays larger");
            }
            drop(hold);
        });
        one.copy.job().unless_dead(work, || one.copy.is_dead()).await;
        drop(one.shape);
    }
}

fn shrinks(node: &Rc<Node>, copy: &Copy) -> JobError {
    let job = copy.job();
    FollowError::Shrinks {
        node: (*node.name()).into(),
        job: (**job.id()).into(),
        kind: job.kind().name(),
    }
    .into()
}
