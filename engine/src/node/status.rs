//! Block status of a path: what is data, what reads as zeroes, and which layer decides.

use crate::address::GuestRange;
use crate::error::Result;
use crate::format::{Extents, Mapping};

use super::path::Path;

/// What a run of guest bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusKind {
    /// Data.
    Data,
    /// Reads as zeroes because a layer says so.
    Zero,
    /// Reads as zeroes because no layer has it (or a hole in a file).
    Hole,
}

/// A run of guest bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Length in bytes.
    pub len: u64,
    /// What it is.
    pub kind: StatusKind,
    /// How many layers down it was decided: 0 is the node's own layer; the number of layers if
    /// none has it.
    pub depth: u32,
    /// Whether no layer has it.
    pub absent: bool,
}

impl StatusExtent {
    /// Whether the node's own layer decides (sync=top copies these).
    pub const fn top(&self) -> bool {
        self.depth == 0
    }
}

/// What is left to do, the earliest range on top of the stack.
#[derive(Clone, Copy)]
enum Todo {
    /// Ask this layer.
    Look { range: GuestRange, layer: usize },
    /// Already known.
    Known { len: u64, kind: StatusKind, layer: usize },
}

/// The runs that cover `range`, in order, neighbours of one kind merged.
pub(crate) async fn status(path: &Path, range: GuestRange) -> Result<Vec<StatusExtent>> {
    let mut runs: Vec<StatusExtent> = Vec::new();
    let mut todo = vec![Todo::Look { range, layer: 0 }];
    while let Some(part) = todo.pop() {
        match part {
            Todo::Known { len, kind, layer } => push(&mut runs, len, kind, layer, path),
            Todo::Look { range, .. } if range.is_empty() => {}
            Todo::Look { range, layer } if layer == path.layers().len() => {
                push(&mut runs, range.len, StatusKind::Hole, layer, path);
            }
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

/// What one layer says about `range`, in order.
async fn look(path: &Path, range: GuestRange, layer: usize) -> Result<Vec<Todo>> {
    let format = &path.layers()[layer].format;
    let inside = range.intersect(GuestRange::new(0, format.size()));
    let asks = format.has_holes().await?;
    let mut found = Vec::new();
    let mut extents = Extents::new();
    let lease = if inside.is_empty() { None } else { format.resolve(inside, &mut extents) };
    let mut rest = inside;
    for extent in &extents {
        let here = GuestRange { len: extent.len.min(rest.len), ..rest };
        let known = |kind| Todo::Known { len: here.len, kind, layer };
        match &extent.mapping {
            Mapping::Miss(miss) => {
                format.load(*miss).await?;
                found.push(Todo::Look { range: rest, layer });
                rest = GuestRange { start: rest.end(), len: 0 };
                break;
            }
            Mapping::Data(host) if asks => {
                let hole =
                    if format.cluster_size() == 1 { StatusKind::Hole } else { StatusKind::Zero };
                for run in format.data_storage().extents(host.bytes(), here.len).await? {
                    let kind = if run.data { StatusKind::Data } else { hole };
                    found.push(Todo::Known { len: run.len, kind, layer });
                }
            }
            Mapping::Data(_) | Mapping::Compressed(_) | Mapping::Damaged(_) => {
                found.push(known(StatusKind::Data));
            }
            Mapping::Zero | Mapping::ZeroAllocated(_) => found.push(known(StatusKind::Zero)),
            Mapping::Absent => found.push(Todo::Look { range: here, layer: layer + 1 }),
        }
        rest = GuestRange { start: here.end(), len: rest.len - here.len };
    }
    drop(lease);
    debug_assert!(rest.is_empty(), "a resolve covers its range or ends with a miss");
    if inside.len < range.len {
        let len = range.len - inside.len;
        found.push(Todo::Known { len, kind: StatusKind::Zero, layer });
    }
    Ok(found)
}

fn push(runs: &mut Vec<StatusExtent>, len: u64, kind: StatusKind, depth: usize, path: &Path) {
    if len == 0 {
        return;
    }
    let absent = depth == path.layers().len();
    let depth = u32::try_from(depth).unwrap_or(u32::MAX);
    match runs.last_mut() {
        Some(last) if last.kind == kind && last.depth == depth => last.len += len,
        _ => runs.push(StatusExtent { len, kind, depth, absent }),
    }
}
