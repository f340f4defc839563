//! `blockdev-add` and `blockdev-del`.
//!
//! Owns: the translation of options into what the graph opens, with the inheritance of the peer (a
//! child takes what it does not say from its parent). Does not: open or close; the graph does.

use liveblk_engine::format::{FormatOptions, InfoValue};
use liveblk_engine::graph::{
    BackingSource, DataFileSource, FileSource, FileSpec, GraphError, OpenNode,
};
use liveblk_engine::node::{self, NodeOptions, Role, User};

use super::control::{Control, Result};
use super::errors::Failure;
use serde_json::Value;

use crate::schema::{
    AioMode, BlockdevOptions, BlockdevRef, DetectZeroes, Discard, DriverOptions, FileOptions,
    OnOffAuto, Qcow2Options, RawOptions,
};

/// What a child takes from its parent where it says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Inherited {
    pub(super) read_only: bool,
    pub(super) auto_read_only: bool,
    pub(super) force_share: bool,
    pub(super) direct: bool,
    pub(super) no_flush: bool,
    /// Only the root of a command belongs to the monitor.
    pub(super) root: bool,
}

impl Control {
    /// `blockdev-add`.
    pub(super) async fn add_node(&self, options: BlockdevOptions) -> Result<()> {
        if options.node.node_name.is_none() {
            return Err(liveblk_engine::Error::from(GraphError::NameMissing).into());
        }
        match options.driver {
            DriverOptions::CopyBeforeWrite(cbw) => return self.add_cbw(&options.node, *cbw).await,
            DriverOptions::SnapshotAccess(view) => {
                return self.add_snapshot_access(&options.node, view.file).await;
            }
            _ => {}
        }
        let root = Inherited { root: true, ..Inherited::default() };
        self.graph.open(image(options, root)?).await?;
        Ok(())
    }

    /// `blockdev-del`; the refusals in the peer's order.
    pub(super) async fn remove_node(&self, name: &str) -> Result<()> {
        let node = self.graph.find(name)?;
        if liveblk_jobs::is_job_filter(&node) {
            return Err(liveblk_engine::Error::from(GraphError::InUse(name.to_owned())).into());
        }
        let users = node.users();
        // In the peer a job's filter stands between a guest and the source.
        let is_source = |user: &User| matches!(user, User::Job { role: Role::Source, .. });
        let below_filter = users.iter().any(is_source);
        let is_below = users.iter().any(|user| matches!(user, User::Overlay { .. }));
        let fronts = |user: &User| match user {
            User::Guest { .. } => !below_filter,
            User::Job { kind, role: Role::Target, .. } => matches!(*kind, "mirror" | "commit"),
            // The top of a commit is in the middle of its chain, or guests write it.
            User::Job { kind, role: Role::Source, .. } => *kind == "commit" && is_below,
            _ => false,
        };
        let refusal = if users.iter().any(fronts) {
            Some(GraphError::InUse(name.to_owned()))
        } else {
            // Jobs are named first.
            let (jobs, others): (Vec<_>, Vec<_>) =
                users.iter().partition(|user| matches!(user, User::Job { .. }));
            jobs.into_iter().chain(others).find_map(|user| blocker(name, user))
        };
        if let Some(refusal) = refusal {
            return Err(liveblk_engine::Error::from(refusal).into());
        }
        if !node.is_monitor_owned() {
            let refusal = GraphError::NotMonitorOwned(name.to_owned());
            return Err(liveblk_engine::Error::from(refusal).into());
        }
        if !users.is_empty() {
            return Err(Failure::generic(format!("Block device {name} is in use")));
        }
        Ok(self.graph.remove(&node).await?)
    }
}

/// Uses that the peer names in its refusal.
fn blocker(name: &str, user: &User) -> Option<GraphError> {
    match user {
        User::Overlay { node: parent } => Some(GraphError::BusyAsChild {
            node: name.to_owned(),
            edge: "backing",
            parent: parent.to_string(),
        }),
        User::Job { kind: "backup", role: Role::Source, .. } => None,
        User::Job { kind, .. } => {
            Some(GraphError::BusyWithJob { node: name.to_owned(), kind: (*kind).to_owned() })
        }
        _ => None,
    }
}

/// The options of a node with what it inherits, checked for what never works together.
pub(super) fn settle(
    options: &BlockdevOptions,
    parent: Inherited,
) -> Result<(Inherited, NodeOptions)> {
    let node = &options.node;
    let own = Inherited {
        read_only: node.read_only.unwrap_or(parent.read_only),
        auto_read_only: node.auto_read_only.unwrap_or(parent.auto_read_only),
        force_share: node.force_share.unwrap_or(parent.force_share),
        direct: node.cache.direct.unwrap_or(parent.direct),
        no_flush: node.cache.no_flush.unwrap_or(parent.no_flush),
        root: false,
    };
    // Formats send discards only where they may, so a child of one passes them on.
    let default = if parent.root { Discard::Ignore } else { Discard::Unmap };
    let discard_unmap = node.discard.unwrap_or(default) == Discard::Unmap;
    if own.force_share && !own.read_only {
        return Err(Failure::generic("force-share=on can only be used with read-only images"));
    }
    if node.detect_zeroes == DetectZeroes::Unmap && !discard_unmap {
        return Err(Failure::generic(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to \
             unmap",
        ));
    }
    let detect_zeroes = match node.detect_zeroes {
        DetectZeroes::Off => node::DetectZeroes::Off,
        DetectZeroes::On => node::DetectZeroes::On,
        DetectZeroes::Unmap => node::DetectZeroes::Unmap,
    };
    let (direct, no_flush) = (own.direct, own.no_flush);
    Ok((own, NodeOptions { discard_unmap, direct, no_flush, detect_zeroes }))
}

/// A node that no command names.
pub(super) fn standalone(options: BlockdevOptions) -> Result<OpenNode> {
    image(options, Inherited { root: true, ..Inherited::default() })
}

/// An image or file that is opened for a filter or a job.
pub(super) fn child_image(options: BlockdevOptions) -> Result<OpenNode> {
    image(options, Inherited::default())
}

/// A node of any driver.
fn image(options: BlockdevOptions, parent: Inherited) -> Result<OpenNode> {
    let (own, node_options) = settle(&options, parent)?;
    let mut open = match options.driver {
        DriverOptions::File(file) => {
            let mut open = OpenNode::new("file", "");
            open.file = FileSource::Open(file_spec(&file, own)?);
            open
        }
        DriverOptions::Raw(raw) => raw_image(raw, own)?,
        DriverOptions::Qcow2(qcow2) => qcow2_image(*qcow2, own)?,
        DriverOptions::CopyBeforeWrite(_) | DriverOptions::SnapshotAccess(_) => {
            return Err(Failure::generic(
                "Filters stand above the nodes of a chain: add this one by itself and name it",
            ));
        }
    };
    open.name = options.node.node_name;
    open.writable = !own.read_only;
    open.active = options.node.active.unwrap_or(true);
    open.auto_read_only |= own.auto_read_only;
    open.force_share |= own.force_share;
    open.options = node_options;
    open.monitor_owned = parent.root;
    Ok(open)
}

fn raw_image(raw: RawOptions, own: Inherited) -> Result<OpenNode> {
    let mut open = OpenNode::new("raw", "");
    (open.raw_offset, open.raw_size) = place_of(&raw)?;
    place(&mut open, raw.file, own)?;
    open.backing = BackingSource::None;
    Ok(open)
}

/// The first byte of a raw disk in its file, and how many it has if that was said.
pub(super) fn place_of(raw: &RawOptions) -> Result<(u64, Option<u64>)> {
    let positive = |name: &str, value: i64| {
        u64::try_from(value).map_err(|_| {
            Failure::generic(format!("Value '{value}' is out of range for parameter '{name}'"))
        })
    };
    let offset = raw.offset.map_or(Ok(0), |offset| positive("offset", offset))?;
    Ok((offset, raw.size.map(|size| positive("size", size)).transpose()?))
}

fn qcow2_image(qcow2: Qcow2Options, own: Inherited) -> Result<OpenNode> {
    let mut open = OpenNode::new("qcow2", "");
    open.format_options = qcow2_options(&qcow2)?;
    place(&mut open, qcow2.file, own)?;
    if let Some(data) = qcow2.data_file {
        open.data_file = data_place(data, own)?;
    }
    open.backing = match qcow2.backing {
        None => BackingSource::FromHeader,
        Some(BlockdevRef::Null) => BackingSource::None,
        // The peer accepts the empty name for "none".
        Some(BlockdevRef::Name(name)) if name.is_empty() => BackingSource::None,
        Some(BlockdevRef::Name(name)) => BackingSource::Node(name),
        Some(BlockdevRef::Definition(options)) => {
            let below = Inherited { read_only: true, ..own };
            BackingSource::Open(Box::new(image(*options, below)?))
        }
    };
    Ok(open)
}

/// The options that the format takes itself.
pub(super) fn qcow2_options(qcow2: &Qcow2Options) -> Result<FormatOptions> {
    let mut options = FormatOptions::new();
    let flags = [
        ("lazy-refcounts", qcow2.lazy_refcounts),
        ("pass-discard-request", qcow2.pass_discard_request),
        ("pass-discard-snapshot", qcow2.pass_discard_snapshot),
        ("pass-discard-other", qcow2.pass_discard_other),
        ("discard-no-unref", qcow2.discard_no_unref),
    ];
    for (name, value) in flags {
        options.extend(value.map(|on| (name.to_owned(), InfoValue::Flag(on))));
    }
    options.extend(overlap_options(qcow2.overlap_check.as_ref()));
    let interval = qcow2.cache_clean_interval;
    if interval.is_some_and(|seconds| !(0..=i64::from(u32::MAX)).contains(&seconds)) {
        return Err(Failure::generic("Cache clean interval too big"));
    }
    let numbers = [
        ("cache-size", qcow2.cache_size),
        ("l2-cache-size", qcow2.l2_cache_size),
        ("l2-cache-entry-size", qcow2.l2_cache_entry_size),
        ("refcount-cache-size", qcow2.refcount_cache_size),
        ("cache-clean-interval", qcow2.cache_clean_interval),
    ];
    for (name, value) in numbers {
        let Some(value) = value else { continue };
        let number = u64::try_from(value).map_err(|_| {
            Failure::generic(format!("Value '{value}' is out of range for parameter '{name}'"))
        })?;
        options.insert(name.to_owned(), InfoValue::Number(number));
    }
    Ok(options)
}

/// The overlap checks as flat options: a template, or its members by their names.
fn overlap_options(checks: Option<&Value>) -> Vec<(String, InfoValue)> {
    const NAME: &str = "overlap-check";
    let option = |name: String, value: &Value| match value {
        Value::Bool(on) => Some((name, InfoValue::Flag(*on))),
        Value::String(text) => Some((name, InfoValue::Text(text.clone()))),
        _ => None,
    };
    match checks {
        None => Vec::new(),
        Some(Value::Object(members)) => {
            let named = members.iter();
            named.filter_map(|(name, value)| option(format!("{NAME}.{name}"), value)).collect()
        }
        Some(template) => option(NAME.to_owned(), template).into_iter().collect(),
    }
}

/// What holds an image.
fn place(open: &mut OpenNode, file: BlockdevRef, own: Inherited) -> Result<()> {
    let definition = match file {
        BlockdevRef::Name(name) => {
            open.file = FileSource::Node(name);
            return Ok(());
        }
        BlockdevRef::Null => return Err(Failure::generic("Parameter 'file' is missing")),
        BlockdevRef::Definition(definition) => definition,
    };
    let (child, child_options) = settle(&definition, own)?;
    let DriverOptions::File(file) = &definition.driver else {
        return Err(Failure::generic(
            "An image lies in a node of driver 'file'; other drivers cannot hold one",
        ));
    };
    if child.read_only && !own.read_only && !child.auto_read_only {
        return Err(liveblk_engine::Error::from(GraphError::ReadOnly).into());
    }
    let mut spec = file_spec(file, child)?;
    spec.name = definition.node.node_name;
    spec.inactive = definition.node.active == Some(false);
    spec.options = Some(child_options);
    open.auto_read_only = child.auto_read_only && own.auto_read_only;
    open.force_share = child.force_share;
    open.file = FileSource::Open(spec);
    Ok(())
}

/// What holds the guest data of an image that does not hold it itself.
fn data_place(data: BlockdevRef, own: Inherited) -> Result<DataFileSource> {
    let definition = match data {
        BlockdevRef::Name(name) => return Ok(DataFileSource::Node(name)),
        BlockdevRef::Null => return Err(Failure::generic("Parameter 'data-file' is missing")),
        BlockdevRef::Definition(definition) => definition,
    };
    let (child, child_options) = settle(&definition, own)?;
    let DriverOptions::File(file) = &definition.driver else {
        return Err(Failure::generic(
            "A data file lies in a node of driver 'file'; other drivers cannot hold one",
        ));
    };
    if child.read_only && !own.read_only {
        return Err(liveblk_engine::Error::from(GraphError::ReadOnly).into());
    }
    let mut spec = file_spec(file, child)?;
    spec.name = definition.node.node_name;
    spec.options = Some(child_options);
    Ok(DataFileSource::Open(spec))
}

fn file_spec(file: &FileOptions, own: Inherited) -> Result<FileSpec> {
    if file.aio == AioMode::Native && !own.direct {
        return Err(Failure::generic(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ));
    }
    Ok(FileSpec {
        path: file.filename.as_str().into(),
        no_locking: file.locking == OnOffAuto::Off,
        ..FileSpec::default()
    })
}
