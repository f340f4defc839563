//! What queries answer.
//!
//! Owns: the shape of the answers, which is the peer's. Promises: an answer shows one instant; it
//! does no I/O. Numbers of requests are those of what was asked of the node itself (the peer counts
//! only for devices, and shows zeroes for nodes).

use std::path::{Path, PathBuf};
use std::rc::Rc;

use liveblk_engine::format::{BackingRef, InfoValue};
use liveblk_engine::node::{DetectZeroes, Node, NodeStats};
use liveblk_engine::storage::{DiscardStats, Storage};
use serde_json::{Map, Value, json};

use super::bitmaps::dirty_bitmaps;
use super::control::Control;
use super::events::of_convergence;

impl Control {
    /// `query-named-block-nodes`: newest first.
    pub(super) fn named_block_nodes(&self, flat: bool) -> Value {
        self.graph.nodes().iter().map(|node| self.block_device(node, flat)).collect()
    }

    fn block_device(&self, node: &Rc<Node>, flat: bool) -> Value {
        let options = node.options();
        let mut info = Map::new();
        info.insert("iops_rd".to_owned(), json!(0));
        let detect_zeroes = match options.detect_zeroes {
            DetectZeroes::Off => "off",
            DetectZeroes::On => "on",
            DetectZeroes::Unmap => "unmap",
        };
        info.insert("detect_zeroes".to_owned(), json!(detect_zeroes));
        info.insert("active".to_owned(), json!(node.is_active()));
        info.insert("image".to_owned(), image_info(node, flat));
        info.insert("iops_wr".to_owned(), json!(0));
        info.insert("ro".to_owned(), json!(!node.is_writable_when_active()));
        info.insert("node-name".to_owned(), json!(&*node.name()));
        let mut depth = 0;
        if let Some(backing) = node.backing() {
            info.insert("backing_file".to_owned(), json!(backing.filename()));
            if !flat {
                depth = depth_below(node);
            }
        }
        info.insert("backing_file_depth".to_owned(), json!(depth));
        info.insert("drv".to_owned(), json!(node.driver()));
        for name in ["iops", "bps_wr"] {
            info.insert(name.to_owned(), json!(0));
        }
        // A mark of 8 EiB and more is shown as negative, as by the peer.
        let threshold = node.write_watch().threshold().cast_signed();
        info.insert("write_threshold".to_owned(), json!(threshold));
        info.insert("encrypted".to_owned(), json!(false));
        info.insert("bps".to_owned(), json!(0));
        info.insert("bps_rd".to_owned(), json!(0));
        let cache = json!({
            "no-flush": options.no_flush,
            "direct": options.direct,
            "writeback": true,
        });
        info.insert("cache".to_owned(), cache);
        info.insert("file".to_owned(), json!(node.filename()));
        info.extend(dirty_bitmaps(node).map(|bitmaps| ("dirty-bitmaps".to_owned(), bitmaps)));
        Value::Object(info)
    }

    /// `query-blockstats`: one row per node, or per device, of which there are none.
    pub(super) fn block_stats(&self, query_nodes: bool) -> Value {
        if !query_nodes {
            return Value::Array(Vec::new());
        }
        // The oldest first, unlike the list of nodes; as in the peer.
        self.graph.nodes().iter().rev().map(stats).collect()
    }

    /// `query-jobs`.
    pub(super) fn query_jobs(&self) -> Value {
        let row = |job: &liveblk_jobs::JobInfo| {
            let mut row = json!({
                "current-progress": job.current,
                "status": job.status.name(),
                "total-progress": job.total,
                "type": job.kind.name(),
                "id": &*job.id,
            });
            insert_some(&mut row, "error", job.error.as_deref().map(Value::from));
            insert_some(&mut row, "converge", job.converge.as_ref().map(of_convergence));
            row
        };
        self.jobs.query().iter().map(row).collect()
    }

    /// `query-block-jobs`.
    pub(super) fn query_block_jobs(&self) -> Value {
        let row = |job: &liveblk_jobs::BlockJobInfo| {
            let mut row = json!({
                "auto-finalize": job.auto_finalize,
                "io-status": job.io_status.name(),
                "device": &*job.facts.id,
                "auto-dismiss": job.auto_dismiss,
                "busy": job.busy,
                "len": job.facts.len,
                "offset": job.facts.offset,
                "status": job.status.name(),
                "paused": job.paused,
                "speed": job.facts.speed,
                "ready": job.ready,
                "type": job.facts.kind.name(),
            });
            insert_some(&mut row, "error", job.error.as_deref().map(Value::from));
            insert_some(&mut row, "converge", job.converge.as_ref().map(of_convergence));
            let spill = job
                .spill
                .as_ref()
                .map(|spill| json!({ "file": spill.file, "bytes": spill.bytes, "max": spill.max }));
            insert_some(&mut row, "spill", spill);
            insert_some(&mut row, "actively-synced", job.actively_synced.map(Value::from));
            row
        };
        self.jobs.query_block().iter().map(row).collect()
    }

    /// `query-block-exports`.
    pub(super) fn query_exports(&self) -> Value {
        // Clients expect a job's filter where the job works, though it moves no guest.
        let shown = |name: &str| {
            let node = self.graph.find(name).ok();
            let filter =
                node.and_then(|node| liveblk_jobs::job_filter_above(&self.graph, node.id()));
            filter.map_or_else(|| name.to_owned(), |filter| filter.name().to_string())
        };
        let row = |export: &liveblk_exports::ExportInfo| {
            json!({
                "node-name": shown(&export.node_name),
                "shutting-down": export.shutting_down,
                "type": export.kind,
                "id": export.id,
            })
        };
        self.exports.list().iter().map(row).collect()
    }
}

fn insert_some(row: &mut Value, name: &str, value: Option<Value>) {
    if let (Some(members), Some(value)) = (row.as_object_mut(), value) {
        members.insert(name.to_owned(), value);
    }
}

fn depth_below(node: &Rc<Node>) -> u32 {
    let mut depth = 0;
    let mut below = node.backing();
    while let Some(node) = below {
        depth += 1;
        below = node.backing();
    }
    depth
}

/// `ImageInfo` of a node; without `flat` the images below are nested in it.
fn image_info(node: &Rc<Node>, flat: bool) -> Value {
    let mut layers = vec![one_image(node)];
    let mut below = node.backing().filter(|_| !flat);
    while let Some(node) = below {
        layers.push(one_image(&node));
        below = node.backing();
    }
    // From the base up, so that a deep chain needs no deep stack here.
    let mut nested = None;
    while let Some(mut image) = layers.pop() {
        insert_some(&mut image, "backing-image", nested.take());
        nested = Some(image);
    }
    nested.unwrap_or_default()
}

fn one_image(node: &Rc<Node>) -> Value {
    let info = node.info();
    // A file may have grown since it was opened; the peer counts its size in whole sectors.
    let size = match node.driver() {
        "file" => node.format().data_storage().size().next_multiple_of(512),
        _ => info.virtual_size,
    };
    let filename = node.filename();
    let mut image = json!({"virtual-size": size, "filename": filename});
    if let Some(bytes) = info.cluster_size.filter(|bytes| *bytes > 1) {
        insert_some(&mut image, "cluster-size", Some(bytes.into()));
        if node.view().is_some() {
            insert_some(&mut image, "dirty-flag", Some(false.into()));
        }
    }
    insert_some(&mut image, "format", Some(node.driver().into()));
    if node.driver() == "qcow2" {
        let specific = specific("qcow2", &info.specific);
        insert_some(&mut image, "format-specific", Some(specific));
        insert_some(&mut image, "dirty-flag", Some(info.dirty.into()));
    }
    if let Some(BackingRef { file, format }) = info.backing {
        let full = full_name(&filename, &file);
        insert_some(&mut image, "full-backing-filename", Some(full.into()));
        insert_some(&mut image, "backing-filename", Some(file.into()));
        insert_some(&mut image, "backing-filename-format", format.map(Value::from));
    }
    image
}

fn specific(kind: &str, facts: &[(&'static str, InfoValue)]) -> Value {
    json!({"type": kind, "data": record(facts)})
}

fn record(facts: &[(&'static str, InfoValue)]) -> Value {
    let mut data = Map::new();
    for (name, value) in facts {
        data.insert((*name).to_owned(), fact(value));
    }
    Value::Object(data)
}

fn fact(value: &InfoValue) -> Value {
    match value {
        InfoValue::Text(text) => Value::from(text.as_str()),
        InfoValue::Number(number) => Value::from(*number),
        InfoValue::Flag(flag) => Value::from(*flag),
        InfoValue::List(values) => values.iter().map(fact).collect(),
        InfoValue::Record(facts) => record(facts),
    }
}

/// A reference of a header as a path: relative ones start at the image's folder.
fn full_name(image: &str, reference: &str) -> String {
    let protocol = reference.find([':', '/']).is_some_and(|at| reference[at..].starts_with(':'));
    if protocol || reference.starts_with('/') {
        return reference.to_owned();
    }
    let folder = Path::new(image).parent().map(PathBuf::from).unwrap_or_default();
    folder.join(reference).display().to_string()
}

/// `BlockStats` of a node and of what holds it.
fn stats(node: &Rc<Node>) -> Value {
    let mut row = one_stats(node);
    insert_some(&mut row, "parent", node.file().map(|file| one_stats(&file)));
    row
}

fn one_stats(node: &Rc<Node>) -> Value {
    let mut counters = Map::new();
    for name in COUNTERS {
        counters.insert((*name).to_owned(), json!(0));
    }
    for (name, value) in counted(&node.stats()) {
        counters.insert(name.to_owned(), json!(value));
    }
    counters.insert("account_invalid".to_owned(), json!(false));
    counters.insert("account_failed".to_owned(), json!(false));
    let mut row = json!({"stats": counters, "node-name": &*node.name()});
    let file = (node.driver() == "file").then(|| {
        let discards = match node.format().data_storage() {
            Storage::File(file) => file.discards(),
            Storage::Memory(_) => DiscardStats::default(),
        };
        json!({
            "driver": "file",
            "discard-nb-ok": discards.done,
            "discard-nb-failed": discards.failed,
            "discard-bytes-ok": discards.bytes,
        })
    });
    insert_some(&mut row, "driver-specific", file);
    row
}

/// The counters that are not zero for nodes.
fn counted(stats: &NodeStats) -> [(&'static str, u64); 20] {
    let NodeStats { read, write, unmap, flush, highest_write } = stats;
    [
        ("rd_operations", read.operations),
        ("rd_bytes", read.bytes),
        ("rd_total_time_ns", read.total_time_ns),
        ("failed_rd_operations", read.failed),
        ("invalid_rd_operations", read.invalid),
        ("wr_operations", write.operations),
        ("wr_bytes", write.bytes),
        ("wr_total_time_ns", write.total_time_ns),
        ("failed_wr_operations", write.failed),
        ("invalid_wr_operations", write.invalid),
        ("unmap_operations", unmap.operations),
        ("unmap_bytes", unmap.bytes),
        ("unmap_total_time_ns", unmap.total_time_ns),
        ("failed_unmap_operations", unmap.failed),
        ("invalid_unmap_operations", unmap.invalid),
        ("flush_operations", flush.operations),
        ("flush_total_time_ns", flush.total_time_ns),
        ("failed_flush_operations", flush.failed),
        ("invalid_flush_operations", flush.invalid),
        ("wr_highest_offset", *highest_write),
    ]
}

static COUNTERS: &[&str] = &[
    "unmap_operations",
    "unmap_merged",
    "failed_zone_append_operations",
    "flush_total_time_ns",
    "wr_highest_offset",
    "wr_total_time_ns",
    "failed_wr_operations",
    "failed_rd_operations",
    "zone_append_merged",
    "wr_merged",
    "wr_bytes",
    "zone_append_bytes",
    "failed_unmap_operations",
    "failed_flush_operations",
    "rd_merged",
    "rd_bytes",
    "unmap_total_time_ns",
    "invalid_flush_operations",
    "flush_operations",
    "zone_append_total_time_ns",
    "zone_append_operations",
    "invalid_zone_append_operations",
    "wr_operations",
    "rd_operations",
    "rd_total_time_ns",
    "invalid_wr_operations",
    "invalid_unmap_operations",
    "unmap_bytes",
    "invalid_rd_operations",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_references_start_at_the_folder_of_the_image() {
        assert_eq!(full_name("/a/b.qcow2", "c.qcow2"), "/a/c.qcow2");
        assert_eq!(full_name("/a/b.qcow2", "/c.qcow2"), "/c.qcow2");
        assert_eq!(full_name("b.qcow2", "c.qcow2"), "c.qcow2");
        assert_eq!(full_name("/a/b.qcow2", "nbd://x/y"), "nbd://x/y");
    }
}
