//! The host map of a path: where each run of guest bytes lies, and in which layer.
//!
//! Tells more than a block status: host offsets, compressed clusters, and whether a layer has the
//! bytes at all, in the terms of `qemu-img map` (which `liveblk img map` is compared with). A run
//! that no layer has is told of the lowest layer that covers it: the base, or the one above a base
//! that ends before it. Reads metadata only; bytes of the guest are not looked at.

use std::rc::Rc;

use crate::address::{GuestRange, HostOffset};
use crate::error::Result;
use crate::format::{Extent, Extents, Format, Mapping};

use super::path::Path;

/// A run of guest bytes in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapExtent {
    /// Length in bytes.
    pub len: u64,
    /// How many layers down it was decided: 0 is the node's own layer.
    pub depth: u32,
    /// Whether that layer has it (as data or as zeroes).
    pub present: bool,
    /// Whether it is known to read as zeroes.
    pub zero: bool,
    /// Whether bytes of the storage belong to it.
    pub data: bool,
    /// Whether it is stored compressed.
    pub compressed: bool,
    /// Where it starts in the data storage of its layer, if it is stored as it is.
    pub host: Option<u64>,
}

impl MapExtent {
    /// Whether `next`, which follows this run, continues it.
    pub fn is_continued_by(&self, next: &Self) -> bool {
        let host = self.host.map(|host| host.saturating_add(self.len));
        let same = Self { len: next.len, host: next.host, ..*self };
        same == *next && host == next.host
    }
}

/// What is left to do, the earliest range on top of the stack.
enum Todo {
    /// Ask this layer.
    Look { range: GuestRange, layer: usize },
    /// Already known.
    Known(MapExtent),
}

/// The runs that cover `range`, in order, neighbours that continue each other merged.
pub(crate) async fn map(path: &Path, range: GuestRange) -> Result<Vec<MapExtent>> {
    let mut runs: Vec<MapExtent> = Vec::new();
    let mut todo = vec![Todo::Look { range, layer: 0 }];
    while let Some(part) = todo.pop() {
        match part {
            Todo::Known(run) => push(&mut runs, run),
            Todo::Look { range, layer } => {
                let mut found = look(path, range, layer).await?;
                while let Some(part) = found.pop() {
                    todo.push(part);
                }
            }
        }
    }
    Ok(runs)
}

/// What one layer says about `range` (inside it), in order.
async fn look(path: &Path, range: GuestRange, layer: usize) -> Result<Vec<Todo>> {
    let mut found = Vec::new();
    let Some(format) = path.layers().get(layer).map(|layer| Rc::clone(&layer.format)) else {
        return Ok(found);
    };
    let below = path.layers().get(layer + 1).map_or(0, |below| below.format.size());
    let depth = u32::try_from(layer).unwrap_or(u32::MAX);
    let asks = format.has_holes().await?;
    let mut extents = Extents::new();
    let lease = if range.is_empty() { None } else { format.resolve(range, &mut extents) };
    let mut rest = range;
    for extent in &extents {
        let here = GuestRange { len: extent.len.min(rest.len), ..rest };
        if let Mapping::Miss(miss) = extent.mapping {
            format.load(miss).await?;
            found.push(Todo::Look { range: rest, layer });
            break;
        }
        match known(extent, here, depth)? {
            Some(run) if run.data && asks && !run.compressed => {
                stored(&*format, run, &mut found).await?;
            }
            Some(run) => found.push(Todo::Known(run)),
            None => absent(here, layer, below, &mut found),
        }
        rest = GuestRange { start: here.end(), len: rest.len - here.len };
    }
    drop(lease);
    Ok(found)
}

/// What an extent says by itself; `None` if the layer does not have it.
fn known(extent: &Extent, here: GuestRange, depth: u32) -> Result<Option<MapExtent>> {
    let run = MapExtent {
        len: here.len,
        depth,
        present: true,
        zero: false,
        data: false,
        compressed: false,
        host: None,
    };
    let at = |host: &HostOffset| Some(host.bytes());
    Ok(Some(match &extent.mapping {
        Mapping::Data(host) => MapExtent { data: true, host: at(host), ..run },
        Mapping::Compressed(_) => MapExtent { data: true, compressed: true, ..run },
        Mapping::Zero => MapExtent { zero: true, ..run },
        Mapping::ZeroAllocated(host) => MapExtent { zero: true, host: at(host), ..run },
        Mapping::Damaged(error) => return Err(error.clone()),
        Mapping::Absent | Mapping::Miss(_) => return Ok(None),
    }))
}

/// Asks the storage which parts of `run` are holes.
async fn stored(format: &dyn Format, run: MapExtent, found: &mut Vec<Todo>) -> Result<()> {
    let Some(mut host) = run.host else {
        found.push(Todo::Known(run));
        return Ok(());
    };
    // Where bytes and metadata are one thing (raw), a hole is no data; else the mapping says data.
    let mapped = format.cluster_size() > 1;
    for part in format.data_storage().extents(host, run.len).await? {
        let data = part.data || mapped;
        let part_run = MapExtent { len: part.len, zero: !part.data, data, host: Some(host), ..run };
        found.push(Todo::Known(part_run));
        host = host.saturating_add(part.len);
    }
    Ok(())
}

/// What `layer` does not have: the part inside the layer below is asked there.
fn absent(here: GuestRange, layer: usize, below: u64, found: &mut Vec<Todo>) {
    let inside = here.intersect(GuestRange::new(0, below));
    let rest = here.len - inside.len;
    if !inside.is_empty() {
        found.push(Todo::Look { range: inside, layer: layer + 1 });
    }
    if rest > 0 {
        found.push(Todo::Known(MapExtent {
            len: rest,
            depth: u32::try_from(layer).unwrap_or(u32::MAX),
            present: false,
            zero: true,
            data: false,
            compressed: false,
            host: None,
        }));
    }
}

fn push(runs: &mut Vec<MapExtent>, run: MapExtent) {
    if run.len == 0 {
        return;
    }
    match runs.last_mut() {
        Some(last) if last.is_continued_by(&run) => last.len += run.len,
        _ => runs.push(run),
    }
}
