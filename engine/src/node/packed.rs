//! Compressed clusters on their way: unpacked for reads, packed for writes of whole clusters.
//!
//! Several clusters of one request are unpacked or packed at a time, each by a task of the format
//! that leaves the core's loop for the heavy part; the windows bound the memory.
//!
//! A compressed write keeps the order of a write (see the module above and `transfer`): packing
//! reads the caller's bytes only; then each piece is begun, written, and its guard completed.
//! Clusters that the request does not cover whole, and those that do not get smaller, are written
//! as they are.

use std::collections::VecDeque;
use std::rc::Rc;

use super::path::Path;
use super::transfer::{Flying, InFlight, land, length, write_pieces};
use crate::address::{GuestOffset, GuestRange};
use crate::buf::{Buf, Pool};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{CompressedWrites, Format, LocalFuture, PackedCluster, WriteStep};
use crate::limits::{PACK_WINDOW, PACKED_FLYING, UNPACK_WINDOW};

/// The clusters of one read that are being unpacked, in the order of their start.
#[derive(Default)]
pub(super) struct Unpacks(VecDeque<Unpack>);

struct Unpack {
    bytes: LocalFuture<'static, Result<Buf>>,
    /// Where in the cluster the wanted bytes begin.
    from: usize,
    to: Buf,
}

impl Unpacks {
    /// Starts to unpack `packed`; its bytes from `position` on go into `to`. Waits for the oldest
    /// first if the window is full, and answers with the failure of that one.
    pub(super) async fn start(
        &mut self,
        format: &Rc<dyn Format>,
        packed: PackedCluster,
        position: GuestOffset,
        to: Buf,
    ) -> Result<()> {
        let mut result = Ok(());
        while self.0.len() >= UNPACK_WINDOW {
            let ended = self.end_oldest().await;
            result = result.and(ended);
        }
        let from = length(position.since(packed.at));
        self.0.push_back(Unpack { bytes: format.read_compressed(packed), from, to });
        result
    }

    async fn end_oldest(&mut self) -> Result<()> {
        let Some(oldest) = self.0.pop_front() else { return Ok(()) };
        let bytes = oldest.bytes.await?;
        let wanted = bytes.slice(oldest.from..oldest.from + oldest.to.len());
        oldest.to.copy_from_buf(&wanted);
        Ok(())
    }

    /// Waits for all; the first failure wins.
    pub(super) async fn end(mut self) -> Result<()> {
        let mut result = Ok(());
        while !self.0.is_empty() {
            let ended = self.end_oldest().await;
            result = result.and(ended);
        }
        result
    }
}

/// Writes `buf` to `range` of the path's top layer, whole clusters compressed. The caller holds the
/// node claim.
///
/// # Errors
/// `Unsupported` if the layer does not store compressed clusters; else as a write.
pub(crate) async fn write(
    path: &Rc<Path>,
    pool: &Pool,
    range: GuestRange,
    buf: &Buf,
) -> Result<()> {
    let Some(compress) = path.top().format.abilities().compress else {
        return Err(Error::new(ErrorKind::Unsupported, "write compressed"));
    };
    let mut flying = InFlight::new();
    let request = Request { path, pool, range, buf, compress: &*compress };
    let result = request.run(&mut flying).await;
    let landed = land(&mut flying).await;
    result.and(landed)
}

struct Request<'a> {
    path: &'a Rc<Path>,
    pool: &'a Pool,
    range: GuestRange,
    buf: &'a Buf,
    compress: &'a dyn CompressedWrites,
}

/// A cluster that is being packed.
struct Packing {
    range: GuestRange,
    packed: LocalFuture<'static, Result<Option<Buf>>>,
}

impl Request<'_> {
    /// The part of the range that consists of whole clusters, as its start and end in bytes.
    fn whole_clusters(&self) -> (u64, u64) {
        let format = &self.path.top().format;
        let (cluster, range) = (format.cluster_size(), self.range);
        let first = range.start.bytes().next_multiple_of(cluster).min(range.end().bytes());
        let to_end = range.end().bytes() == format.size();
        let last = if to_end { range.end() } else { range.end().align_down(cluster) };
        (first, last.bytes().max(first))
    }

    fn bytes(&self, range: GuestRange) -> Buf {
        let at = length(range.start.since(self.range.start));
        self.buf.slice(at..at + length(range.len))
    }

    async fn run(&self, flying: &mut InFlight) -> Result<()> {
        let (first, last) = self.whole_clusters();
        let (start, end) = (self.range.start.bytes(), self.range.end().bytes());
        self.write_plain(GuestRange::new(start, first - start), flying).await?;
        let cluster = self.path.top().format.cluster_size();
        let mut packing: VecDeque<Packing> = VecDeque::new();
        let mut next = first;
        loop {
            while next < last && packing.len() < PACK_WINDOW {
                let range = GuestRange::new(next, cluster.min(last - next));
                let packed = self.compress.pack(self.bytes(range));
                packing.push_back(Packing { range, packed });
                next = range.end().bytes();
            }
            let Some(Packing { range, packed }) = packing.pop_front() else { break };
            match packed.await? {
                Some(packed) => self.write_packed(range.start, packed, flying).await?,
                None => self.write_plain(range, flying).await?,
            }
            if flying.len() >= PACKED_FLYING {
                land(flying).await?;
            }
        }
        self.write_plain(GuestRange::new(last, end - last), flying).await
    }

    async fn write_plain(&self, range: GuestRange, flying: &mut InFlight) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let bytes = self.bytes(range);
        write_pieces(self.path, self.pool, range, &bytes, false, flying).await
    }

    async fn write_packed(
        &self,
        at: GuestOffset,
        packed: Buf,
        flying: &mut InFlight,
    ) -> Result<()> {
        let format = &self.path.top().format;
        loop {
            match self.compress.begin_packed(at, packed.len() as u64)? {
                WriteStep::Ready(piece) => {
                    assert_eq!(piece.len, packed.len() as u64, "packed bytes are of one piece");
                    let io = format.data_storage().write(piece.host.bytes(), packed, false);
                    flying.push(Flying { io, guard: piece.guard });
                    return Ok(());
                }
                WriteStep::Miss(miss) => format.load(miss).await?,
                WriteStep::Wait(wait) => {
                    land(flying).await?;
                    format.pending(wait).await;
                }
            }
        }
    }
}
