//! Nodes that nobody writes any more become read-only and clean on disk, at once or later.
//!
//! That may fail: a full file system has no place for what the image keeps in memory, such as its
//! dirty bitmaps. Nothing is lost then: the node stays writable (queries say so, the log says why)
//! with everything it holds, and what is durable says that it is behind. It is tried again until it
//! succeeds, somebody wants to write, or the node is closed, which reports what is lost then.

use std::rc::{Rc, Weak};

use liveblk_engine::Result;
use liveblk_engine::executor::Class;
use liveblk_engine::graph::Graph;
use liveblk_engine::node::{Node, Permissions};

use crate::limits::{FINISH_TRIES, READ_ONLY_RETRY_MAX_NS, READ_ONLY_RETRY_NS};

/// Makes `node` read-only now or, where that fails some times, in the background. It was tried
/// before with the result `tried`.
pub(crate) async fn become_read_only(node: &Rc<Node>, tried: Option<Result<()>>) {
    let (mut result, mut tries) = match tried {
        Some(result) => (result, 1),
        None => (node.set_writable(false).await, 1),
    };
    while result.is_err() && tries < FINISH_TRIES {
        result = node.set_writable(false).await;
        tries += 1;
    }
    let Err(error) = result else { return };
    let name = node.name();
    tracing::warn!(node = %name, %error, "an old layer is still writable; it is tried again");
    let (core, late) = (node.core().clone(), Rc::downgrade(node));
    drop(node.core().spawn(Class::Background, async move {
        let mut wait = READ_ONLY_RETRY_NS;
        loop {
            core.sleep(wait).await;
            wait = (wait * 2).min(READ_ONLY_RETRY_MAX_NS);
            let Some(node) = still_late(&late) else { return };
            if is_written(&node) {
                continue;
            }
            match node.set_writable(false).await {
                Ok(()) => {
                    tracing::info!(node = %node.name(), "an old layer is read-only now");
                    return;
                }
                Err(error) => tracing::debug!(node = %node.name(), %error, "still writable"),
            }
        }
    }));
}

/// The node, if it is there, and still writable though nobody asked for that.
fn still_late(node: &Weak<Node>) -> Option<Rc<Node>> {
    let node = node.upgrade()?;
    let there = Graph::of(node.core()).node(node.id()).is_some();
    (there && node.is_active() && node.is_writable() && !node.is_asked_writable()).then_some(node)
}

/// Whether somebody came to write before it was read-only.
fn is_written(node: &Node) -> bool {
    node.uses().iter().any(|(_, with)| with.perm & Permissions::WRITE != 0)
}
