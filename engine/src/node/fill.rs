//! Writes that change nothing: a layer gets for its own what the layers below show through it.
//!
//! Order of one fill: (1) gate; (2) claim of the whole clusters, so that nobody else begins to
//! allocate one of them meanwhile; (3) the layer is asked *again* what it has there: a write that
//! came first wins; (4) only what is absent is written. The content of the node stays equal, so
//! hooks are not called: nothing has to be kept or marked.

use std::rc::Rc;

use super::object::Node;
use super::request::{Admitted, Origin, Receipt, Target, checked_write};
use super::transfer;
use crate::address::GuestRange;
use crate::buf::Buf;
use crate::error::Result;
use crate::executor::Class;
use crate::format::{Extents, Format, Mapping, ZeroMode};

impl Node {
    /// Writes `buf` at `offset` (bytes) where this node's own layer has nothing (stream, copies on
    /// read). The caller has read the bytes through this node.
    pub fn fill(self: &Rc<Self>, offset: u64, buf: Buf, origin: Origin) -> Receipt {
        let (node, len) = (Rc::clone(self), buf.len() as u64);
        self.core().spawn(Class::Background, async move {
            fill(Target::Node(node, origin), offset, len, Some(&buf)).await
        })
    }

    /// The same for `len` bytes that read as zeroes: the layer then says so itself.
    pub fn fill_zeroes(self: &Rc<Self>, offset: u64, len: u64, origin: Origin) -> Receipt {
        let node = Rc::clone(self);
        self.core().spawn(Class::Background, async move {
            fill(Target::Node(node, origin), offset, len, None).await
        })
    }
}

async fn fill(target: Target, offset: u64, len: u64, bytes: Option<&Buf>) -> Result<()> {
    let Admitted { node, .. } = &target.admit().await;
    let range = checked_write(node, offset, len, "fill")?;
    let path = node.path();
    let claim = node.claims.claim(range.widen(path.top().format.cluster_size()));
    claim.held().await;
    let filled = async {
        for run in absent(&*path.top().format, range).await? {
            match bytes {
                Some(bytes) => {
                    let at = transfer::length(run.start.bytes() - offset);
                    let part = bytes.slice(at..at + transfer::length(run.len));
                    transfer::write(&path, node.core().pool(), run, &part, false).await?;
                }
                None => {
                    let pool = node.core().pool();
                    transfer::zero(&path, pool, run, ZeroMode::Unmap, false).await?;
                }
            }
        }
        Ok(())
    };
    let result: Result<()> = filled.await;
    drop(claim);
    result.map_err(|error| error.on(&node.name()))
}

/// The runs of `range` that the layer does not have; they stay so while the claim is held.
pub(super) async fn absent(format: &dyn Format, range: GuestRange) -> Result<Vec<GuestRange>> {
    let mut runs: Vec<GuestRange> = Vec::new();
    let mut rest = range;
    while !rest.is_empty() {
        let mut extents = Extents::new();
        let lease = format.resolve(rest, &mut extents);
        let mut miss = None;
        for extent in &extents {
            let len = extent.len.min(rest.len);
            match extent.mapping {
                Mapping::Miss(id) => {
                    miss = Some(id);
                    break;
                }
                Mapping::Absent => match runs.last_mut() {
                    Some(last) if last.end() == rest.start => last.len += len,
                    _ => runs.push(GuestRange { len, ..rest }),
                },
                _ => {}
            }
            rest = GuestRange { start: rest.start.plus(len), len: rest.len - len };
        }
        drop(lease);
        match miss {
            Some(miss) => format.load(miss).await?,
            None => assert!(rest.is_empty(), "a resolve covers its range or ends with a miss"),
        }
    }
    Ok(runs)
}
