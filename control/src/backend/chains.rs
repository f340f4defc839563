//! Starting stream and commit: names and file names become nodes.
//!
//! Owns: the order in which the peer finds what is wrong with names. Does not: check what the jobs
//! crate checks.

use std::path::Path;
use std::rc::Rc;

use liveblk_engine::node::{Node, User};
use liveblk_jobs::{
    ChainError, CommitSpec, JobError, JobOptions, StreamSpec, StreamTo, start_commit, start_stream,
};

use super::control::{Control, Result};
use super::errors::Failure;
use super::jobs::{converging, copy_mode, on_error};
use crate::schema::{BlockCommit, BlockStream, ChainJob};

impl Control {
    /// `block-stream`.
    pub(super) async fn stream(&self, stream: BlockStream) -> Result<()> {
        start_stream(self.stream_spec(stream)?).await?;
        Ok(())
    }

    /// A stream with its nodes found and checked.
    pub(super) fn stream_spec(&self, stream: BlockStream) -> Result<StreamSpec> {
        let BlockStream { job, bottom } = stream;
        exclusive(&[("base", &job.base), ("base-node", &job.base_node)], true)?;
        exclusive(&[("base", &job.base), ("bottom", &bottom)], true)?;
        exclusive(&[("bottom", &bottom), ("base-node", &job.base_node)], true)?;
        let node = self.node(&job.device)?;
        let to = match (&job.base, &job.base_node, &bottom) {
            (Some(file), _, _) => StreamTo::Base(below_by_file(&node, file)?),
            (_, Some(base), _) => StreamTo::Base(self.chain_node(base)?),
            (_, _, Some(bottom)) => StreamTo::Bottom(self.chain_node(bottom)?),
            (None, None, None) => StreamTo::End,
        };
        let spec = StreamSpec {
            job: job_options(&job),
            node,
            to,
            backing_file: job.backing_file,
            mask_protocol: job.backing_mask_protocol,
            filter_name: job.filter_node_name,
        };
        spec.check()?;
        if let Some(name) = &spec.filter_name {
            let free = self.graph.check_name(name);
            free.map_err(|error| Failure::generic(format!("Could not create node: {error}")))?;
        }
        Ok(spec)
    }

    /// `block-commit`.
    pub(super) async fn commit(&self, commit: BlockCommit) -> Result<()> {
        start_commit(self.commit_spec(commit)?).await?;
        Ok(())
    }

    /// A commit with its nodes found.
    pub(super) fn commit_spec(&self, commit: BlockCommit) -> Result<CommitSpec> {
        let BlockCommit { job, top_node, top, copy_mode: mode, converge } = commit;
        // Clients probe for this class; it comes before everything else.
        let device = self.graph.find(&job.device);
        let device = device.map_err(|_| refused(ChainError::DeviceNotFound(text(&job.device))))?;
        if device.users().iter().any(|user| matches!(user, User::Overlay { .. })) {
            return Err(refused(ChainError::NotRoot));
        }
        exclusive(&[("top-node", &top_node), ("top", &top)], false)?;
        let top = match (top_node, top) {
            (Some(name), _) => within(&device, self.chain_node(&name)?)?,
            (_, Some(file)) if device.filename() == file => Rc::clone(&device),
            (_, Some(file)) => below_by_file(&device, &file)
                .map_err(|_| refused(ChainError::NoTopFile(text(&file))))?,
            (None, None) => Rc::clone(&device),
        };
        exclusive(&[("base-node", &job.base_node), ("base", &job.base)], false)?;
        let base = match (&job.base_node, &job.base) {
            (Some(name), _) => within(&top, self.chain_node(name)?)?,
            (_, Some(file)) => below_by_file(&top, file)?,
            (None, None) => deepest(&top),
        };
        Ok(CommitSpec {
            job: job_options(&job),
            device,
            top,
            base,
            backing_file: job.backing_file,
            mask_protocol: job.backing_mask_protocol,
            filter_name: job.filter_node_name,
            copy_mode: copy_mode(mode),
            converge: converge.map(converging),
        })
    }

    /// A node that an argument names as node, not as device.
    fn chain_node(&self, name: &str) -> Result<Rc<Node>> {
        self.graph.find(name).map_err(|_| Failure::no_node("", name))
    }
}

fn refused(error: ChainError) -> Failure {
    JobError::from(error).into()
}

fn text(name: &str) -> Box<str> {
    name.into()
}

/// `node`, if it is `head` or lies below it.
fn within(head: &Rc<Node>, node: Rc<Node>) -> Result<Rc<Node>> {
    let mut at = Some(Rc::clone(head));
    while let Some(here) = at {
        if here.id() == node.id() {
            return Ok(node);
        }
        at = here.backing();
    }
    Err(refused(ChainError::NotInThisChain(text(&node.name()))))
}

fn deepest(head: &Rc<Node>) -> Rc<Node> {
    let mut node = Rc::clone(head);
    while let Some(below) = node.backing() {
        node = below;
    }
    node
}

fn exclusive(options: &[(&'static str, &Option<String>); 2], stream: bool) -> Result<()> {
    let [(one, first), (other, second)] = options;
    if first.is_some() && second.is_some() {
        return Err(refused(ChainError::Exclusive { one, other, stream }));
    }
    Ok(())
}

fn job_options(job: &ChainJob) -> JobOptions {
    JobOptions {
        id: job.job_id.clone().unwrap_or_default(),
        speed: job.speed,
        auto_finalize: job.auto_finalize,
        auto_dismiss: job.auto_dismiss,
        on_source_error: on_error(job.on_error),
        on_target_error: on_error(job.on_error),
    }
}

/// The image below `node` that `file` names: as it was opened, or relative to its overlay.
fn below_by_file(node: &Rc<Node>, file: &str) -> Result<Rc<Node>> {
    let mut overlay = Rc::clone(node);
    while let Some(below) = overlay.backing() {
        let name = overlay.filename();
        let folder = Path::new(&name).parent().unwrap_or(Path::new(""));
        let opened = below.filename();
        if opened == file || folder.join(file) == Path::new(&opened) {
            return Ok(below);
        }
        overlay = below;
    }
    Err(refused(ChainError::NoSuchFile(text(file))))
}
