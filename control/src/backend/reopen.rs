//! `blockdev-reopen` and `blockdev-set-active`: the translation into what the graph changes.
//!
//! Owns: which options may change at all. Everything is translated and checked before anything is
//! done. An empty list does nothing (it ends the peer).

use std::rc::Rc;

use liveblk_engine::format::{FormatOptions, InfoValue};
use liveblk_engine::graph::{GraphError, NewBacking, Reopen};
use liveblk_engine::node::{Node, User};
use liveblk_jobs::limits::CUT_WAIT_NS;

use super::control::{Control, Result};
use super::errors::Failure;
use super::nodes::{Inherited, place_of, qcow2_options, settle};
use crate::schema::{
    BlockdevOptions, BlockdevRef, DriverOptions, FileOptions, Qcow2Options, RawOptions, SetActive,
};

impl Control {
    /// `blockdev-reopen`.
    pub(super) async fn reopen(&self, options: Vec<BlockdevOptions>) -> Result<()> {
        let mut list = Vec::new();
        for options in options {
            let Some(name) = options.node.node_name.clone() else {
                return Err(Failure::generic("node-name not specified"));
            };
            let node = self.graph.find(&name)?;
            let root = Inherited { root: true, ..Inherited::default() };
            self.collect(&node, options, root, &mut list)?;
        }
        Ok(self.graph.reopen(list, CUT_WAIT_NS).await?)
    }

    /// What `options` change of `node` and of children that are described in them.
    fn collect(
        &self,
        node: &Rc<Node>,
        options: BlockdevOptions,
        parent: Inherited,
        list: &mut Vec<Reopen>,
    ) -> Result<()> {
        let (own, node_options) = settle(&options, parent)?;
        // As the peer: blockdev-set-active does it, and nothing of an inactive image changes.
        if !node.is_active() || options.node.active == Some(false) {
            return Err(Failure::generic("Option 'active' cannot be reset to its default value"));
        }
        let gives_backing =
            matches!(&options.driver, DriverOptions::Qcow2(qcow2) if qcow2.backing.is_some());
        if node.has_backing() && !gives_backing {
            let desc = format!("backing is missing for '{}'", node.name());
            return Err(Failure::generic(desc));
        }
        let mut change = Reopen {
            node: Rc::clone(node),
            writable: !own.read_only,
            options: node_options,
            format_options: FormatOptions::new(),
            backing: NewBacking::Keep,
        };
        match options.driver {
            DriverOptions::File(file) => {
                require(node, "file")?;
                check_file(node, &file)?;
                if node_options.direct != node.options().direct {
                    return Err(fixed("cache.direct"));
                }
            }
            DriverOptions::Raw(raw) => {
                require(node, "raw")?;
                change.format_options = raw_options(node, &raw)?;
                self.same_child(node.file(), raw.file, "file", own, list)?;
            }
            DriverOptions::CopyBeforeWrite(_) | DriverOptions::SnapshotAccess(_) => {
                let desc = "Filters cannot be reopened: remove the node and add it again";
                return Err(Failure::generic(desc));
            }
            DriverOptions::Qcow2(qcow2) => {
                require(node, "qcow2")?;
                change.format_options = qcow2_options(&qcow2)?;
                change.backing = self.qcow2(node, *qcow2, own, list)?;
            }
        }
        list.push(change);
        Ok(())
    }

    fn qcow2(
        &self,
        node: &Rc<Node>,
        qcow2: Qcow2Options,
        own: Inherited,
        list: &mut Vec<Reopen>,
    ) -> Result<NewBacking> {
        let backing = match (qcow2.backing, node.backing()) {
            (None, _) => NewBacking::Keep,
            (Some(BlockdevRef::Null), _) => NewBacking::Detach,
            (Some(BlockdevRef::Name(name)), _) if name.is_empty() => NewBacking::Detach,
            (Some(BlockdevRef::Name(name)), _) => {
                let found = self.graph.find(&name);
                NewBacking::Link(found.map_err(|_| Failure::no_node("", &name))?)
            }
            (Some(BlockdevRef::Definition(options)), Some(backing)) => {
                let below = Inherited { read_only: true, ..own };
                let definition = BlockdevRef::Definition(options);
                self.same_child(Some(backing), definition, "backing", below, list)?;
                NewBacking::Keep
            }
            (Some(BlockdevRef::Definition(_)), None) => return Err(fixed("backing.driver")),
        };
        if let Some(data) = qcow2.data_file {
            self.same_child(node.data_file(), data, "data-file", own, list)?;
        }
        self.same_child(node.file(), qcow2.file, "file", own, list)?;
        Ok(backing)
    }

    /// A child that stays: named, or described again where it was made with its parent.
    fn same_child(
        &self,
        child: Option<Rc<Node>>,
        given: BlockdevRef,
        role: &str,
        parent: Inherited,
        list: &mut Vec<Reopen>,
    ) -> Result<()> {
        match (child, given) {
            (Some(child), BlockdevRef::Name(name)) if *name == *child.name() => Ok(()),
            (_, BlockdevRef::Name(name)) => match self.graph.find(&name) {
                Ok(_) => Err(fixed(role)),
                Err(_) => Err(Failure::no_node("", &name)),
            },
            (Some(child), BlockdevRef::Definition(options)) if !child.is_monitor_owned() => {
                let same = options.node.node_name.as_ref().is_none_or(|n| **n == *child.name());
                if !same {
                    return Err(fixed(&format!("{role}.node-name")));
                }
                if let DriverOptions::File(file) = &options.driver {
                    require(&child, "file").map_err(|_| fixed(&format!("{role}.driver")))?;
                    // The child goes with its parent: locks and descriptor are the parent's.
                    return check_file(&child, file)
                        .map_err(|_| fixed(&format!("{role}.filename")));
                }
                self.collect(&child, *options, parent, list)
            }
            _ => Err(fixed(&format!("{role}.driver"))),
        }
    }

    /// `blockdev-set-active`.
    pub(super) async fn set_active(&self, change: SetActive) -> Result<()> {
        let nodes = match &change.node_name {
            Some(name) => vec![self.graph.find(name)?],
            None => self.graph.nodes(),
        };
        if change.active {
            for node in nodes {
                self.graph.activate(&node, CUT_WAIT_NS).await?;
            }
            return Ok(());
        }
        let failed = |which: &'static str| {
            move |error: liveblk_engine::Error| {
                let text = error.to_string();
                match text.as_str() {
                    "Node has active parent node" => Failure::generic(text),
                    _ => Failure::generic(format!("Failed to inactivate {which}: {text}")),
                }
            }
        };
        match (change.node_name, nodes.first()) {
            (Some(_), Some(node)) => {
                let done = self.graph.inactivate(node, CUT_WAIT_NS).await;
                done.map_err(failed("node"))
            }
            _ => {
                let done = self.graph.inactivate_all(CUT_WAIT_NS).await;
                done.map_err(failed("all nodes"))
            }
        }
    }
}

fn require(node: &Node, driver: &str) -> Result<()> {
    if node.driver() == driver { Ok(()) } else { Err(fixed("driver")) }
}

/// Where a raw disk lies in its file; what a job has of it stays where it is.
fn raw_options(node: &Node, raw: &RawOptions) -> Result<FormatOptions> {
    let (offset, size) = place_of(raw)?;
    let mut options = FormatOptions::new();
    options.insert("offset".to_owned(), InfoValue::Number(offset));
    options.extend(size.map(|bytes| ("size".to_owned(), InfoValue::Number(bytes))));
    let file = node.file().map_or(0, |file| file.size());
    let stays = offset == 0 && size.unwrap_or(file) == node.size();
    let job = node.users().into_iter().find_map(|user| match user {
        User::Job { kind, .. } => Some(kind.to_owned()),
        _ => None,
    });
    let overlay = node.users().into_iter().find_map(|user| match user {
        User::Overlay { node } => Some(node.to_string()),
        _ => None,
    });
    let name = node.name().to_string();
    match (job, overlay) {
        (_, Some(parent)) if !stays => {
            let refusal = GraphError::BusyAsChild { node: name, edge: "backing", parent };
            Err(liveblk_engine::Error::from(refusal).into())
        }
        (Some(kind), None) if !stays => {
            let refusal = GraphError::BusyWithJob { node: name, kind };
            Err(liveblk_engine::Error::from(refusal).into())
        }
        _ => Ok(options),
    }
}

fn check_file(node: &Node, file: &FileOptions) -> Result<()> {
    if node.filename() == file.filename { Ok(()) } else { Err(fixed("filename")) }
}

/// An option that a node keeps.
fn fixed(option: &str) -> Failure {
    Failure::generic(format!("Cannot change the option '{option}'"))
}
