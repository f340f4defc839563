//! Reads of images in pieces: a unit that is large enough to be fast and small enough to be many.

use std::rc::Rc;

use liveblk::engine::buf::Buf;
use liveblk::engine::node::{Origin, Receipt};
use liveblk::{Host, Node};

use super::failure::Failure;

/// Bytes of one read.
pub(crate) const UNIT: u64 = 1 << 20;

/// Bytes of what is given up as one where something cannot be read.
const SECTOR: u64 = 512;

/// A read that was started.
pub(crate) struct Read {
    node: Rc<Node>,
    at: u64,
    bytes: Buf,
    receipt: Option<Receipt>,
}

/// Starts to read `len` bytes of `node` at `at`; behind its end there are zeroes.
pub(crate) fn read(host: &Host, node: &Rc<Node>, at: u64, len: u64) -> Read {
    let inside = node.size().saturating_sub(at).min(len);
    let (len, inside) = (length(len), length(inside));
    let bytes = host.core().pool().alloc(len);
    bytes.slice(inside..len).fill(0);
    let part = bytes.slice(0..inside);
    let receipt = (inside > 0).then(|| node.read(at, part, Origin::External));
    Read { node: Rc::clone(node), at, bytes, receipt }
}

impl Read {
    /// The bytes.
    ///
    /// # Errors
    /// Where reading failed and why.
    pub(crate) async fn end(self) -> Result<Buf, Failure> {
        if let Some(receipt) = self.receipt {
            receipt.await.map_err(|error| {
                Failure::new(format!("error while reading at byte {}: {error}", self.at))
            })?;
        }
        Ok(self.bytes)
    }

    /// The bytes, read sector by sector if they cannot be read at once; a sector that cannot be
    /// read is zeroes, with a warning if `tells`.
    pub(crate) async fn salvaged(self, tells: bool) -> Buf {
        let Some(receipt) = self.receipt else { return self.bytes };
        if receipt.await.is_ok() {
            return self.bytes;
        }
        let len = self.bytes.len() as u64;
        let inside = self.node.size().saturating_sub(self.at).min(len);
        for (at, len) in split(self.at, inside, SECTOR) {
            let start = length(at - self.at);
            let part = self.bytes.slice(start..start + length(len));
            if let Err(error) = self.node.read(at, part.clone(), Origin::External).await {
                if tells {
                    eprintln!("liveblk img: warning: error while reading offset {at}: {error}");
                }
                part.fill(0);
            }
        }
        self.bytes
    }
}

/// The pieces of a range, cut at multiples of `unit`: offset and length of each.
pub(crate) fn split(start: u64, len: u64, unit: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = start + len;
    let mut at = start;
    std::iter::from_fn(move || {
        let here = at;
        let next = (here / unit + 1).saturating_mul(unit).min(end);
        at = next;
        (here < end).then_some((here, next - here))
    })
}

fn length(len: u64) -> usize {
    usize::try_from(len).unwrap_or(0)
}
