//! The one place that moves guest data between buffers and layers.
//!
//! Reads: (1) resolve from the top layer down, whole extents at a time, below the top from the
//! first layer that the chain's index names; (2) start every storage read, and the unpacking of
//! compressed clusters, as soon as it is known; (3) await all of them; leases live until then.
//!
//! Writes (under the node's claim): (1) begin a piece; (2) read what its allocation needs from the
//! layers below; (3) start the data write; (4) when it ended, complete the guard (the mapping
//! becomes visible). Before waiting for another request's allocation, own pieces are finished, so
//! waits never form a ring.

use std::rc::Rc;

use smallvec::SmallVec;

use super::packed::Unpacks;
use super::path::Path;
use super::places::Places;
use crate::address::GuestRange;
use crate::buf::{Buf, Pool};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Extent, Extents, Fill, Mapping, WriteGuard, WritePiece, WriteStep, ZeroMode, ZeroStep,
};
use crate::lease::Lease;
use crate::storage::IoFuture;

/// Largest block of zeroes that is written explicitly at once, in bytes.
const ZERO_BLOCK: usize = 64 << 10;

/// A part of a read that is still to be resolved in `layer`.
#[derive(Clone, Copy)]
struct Todo {
    range: GuestRange,
    at: usize,
    layer: usize,
}

/// What a read has started and still has to look at.
#[derive(Default)]
struct Reads {
    todo: SmallVec<[Todo; 8]>,
    started: SmallVec<[IoFuture; 8]>,
    unpacks: Unpacks,
    leases: SmallVec<[Lease; 4]>,
    places: SmallVec<[Rc<Places>; 1]>,
}

/// Reads `range` as seen from layer `from` of the path into `buf` (of the same length).
pub(crate) async fn read(path: &Path, from: usize, range: GuestRange, buf: &Buf) -> Result<()> {
    let _watched = path.watch_read(range);
    let mut reads = Reads::default();
    let mut result = Ok(());
    descend(path, Todo { range, at: 0, layer: from }, buf, &mut reads);
    while let Some(part) = reads.todo.pop() {
        if let Err(error) = read_part(path, part, buf, &mut reads).await {
            result = Err(error);
            break;
        }
    }
    for io in reads.started {
        let ended = io.await;
        result = result.and(ended);
    }
    let unpacked = reads.unpacks.end().await;
    drop((reads.leases, reads.places));
    result.and(unpacked)
}

/// Resolves one part in its layer: starts reads, fills zeroes, hands the rest down.
async fn read_part(path: &Path, part: Todo, buf: &Buf, reads: &mut Reads) -> Result<()> {
    let target = |at: usize, len: u64| buf.slice(at..at + length(len));
    let Some(layer) = path.layers().get(part.layer) else {
        target(part.at, part.range.len).fill(0);
        return Ok(());
    };
    let format = &layer.format;
    let below = path.index().zip(part.layer.checked_sub(1));
    let lower = path.lower();
    let inside = part.range.intersect(GuestRange::new(0, format.size()));
    if inside.len < part.range.len {
        let at = part.at + length(inside.len);
        target(at, part.range.len - inside.len).fill(0);
    }
    if inside.is_empty() {
        return Ok(());
    }
    let mut extents = Extents::new();
    if let Some(lease) = format.resolve(inside, &mut extents) {
        reads.leases.push(lease);
    }
    if let Some((index, layer)) = below
        && !matches!(extents.first(), Some(Extent { mapping: Mapping::Miss(_), .. }))
    {
        index.probed(lower, layer, inside.start.bytes());
        if matches!(extents.first(), Some(Extent { mapping: Mapping::Data(_), .. })) {
            index.found(lower, layer, inside.start.bytes());
        }
    }
    let mut rest = Todo { range: inside, ..part };
    for extent in &extents {
        let len = extent.len.min(rest.range.len);
        match &extent.mapping {
            Mapping::Data(host) => {
                let io = format.data_storage().read(host.bytes(), target(rest.at, len));
                reads.started.push(io);
            }
            Mapping::Zero | Mapping::ZeroAllocated(_) => target(rest.at, len).fill(0),
            Mapping::Absent => {
                let range = GuestRange { len, ..rest.range };
                descend(path, Todo { range, at: rest.at, layer: rest.layer + 1 }, buf, reads);
            }
            Mapping::Compressed(packed) => {
                let to = target(rest.at, len);
                reads.unpacks.start(format, *packed, rest.range.start, to).await?;
            }
            Mapping::Damaged(error) => return Err(error.clone()),
            Mapping::Miss(miss) => {
                format.load(*miss).await?;
                reads.todo.push(rest);
                return Ok(());
            }
        }
        rest = advance(rest, len);
    }
    assert!(rest.range.is_empty(), "a resolve covers its range or ends with a miss");
    Ok(())
}

/// Adds a part to what is to be done, each run of it at the first layer that may have it; starts
/// its read where its place is known.
fn descend(path: &Path, part: Todo, buf: &Buf, reads: &mut Reads) {
    let Some((index, from)) = path.index().zip(part.layer.checked_sub(1)) else {
        reads.todo.push(part);
        return;
    };
    if from == 0
        && let Some((layer, host, places)) = index.place(part.range)
        && let Some(layer) = path.lower().get(layer)
    {
        index.count_lookup();
        let target = buf.slice(part.at..part.at + length(part.range.len));
        reads.started.push(layer.format.data_storage().read(host.bytes(), target));
        if !reads.places.iter().any(|kept| Rc::ptr_eq(kept, &places)) {
            reads.places.push(places);
        }
        return;
    }
    let mut rest = part;
    while !rest.range.is_empty() {
        let (len, layer) = index.run(rest.range.start.bytes(), rest.range.len, from);
        if from == 0 {
            index.count_lookup();
        }
        let range = GuestRange { len, ..rest.range };
        reads.todo.push(Todo { range, at: rest.at, layer: layer + 1 });
        rest = advance(rest, len);
    }
}

fn advance(part: Todo, len: u64) -> Todo {
    let range =
        GuestRange { start: part.range.start.plus(len), len: part.range.len.saturating_sub(len) };
    Todo { range, at: part.at + length(len), layer: part.layer }
}

/// A piece of a write whose data is on its way.
pub(super) struct Flying {
    pub(super) io: IoFuture,
    pub(super) guard: WriteGuard,
}

pub(super) type InFlight = SmallVec<[Flying; 4]>;

/// Waits for the pieces and publishes those that landed; the first error wins.
pub(super) async fn land(flying: &mut InFlight) -> Result<()> {
    let mut result = Ok(());
    for piece in flying.drain(..) {
        match piece.io.await {
            Ok(()) => piece.guard.complete(),
            Err(error) => {
                drop(piece.guard);
                result = result.and(Err(error));
            }
        }
    }
    result
}

/// Writes `buf` to `range` of the path's top layer. The caller holds the node claim.
pub(crate) async fn write(
    path: &Rc<Path>,
    pool: &Pool,
    range: GuestRange,
    buf: &Buf,
    fua: bool,
) -> Result<()> {
    let mut flying = InFlight::new();
    let result = write_pieces(path, pool, range, buf, fua, &mut flying).await;
    let landed = land(&mut flying).await;
    result.and(landed)
}

pub(super) async fn write_pieces(
    path: &Rc<Path>,
    pool: &Pool,
    range: GuestRange,
    buf: &Buf,
    fua: bool,
    flying: &mut InFlight,
) -> Result<()> {
    let format = &path.top().format;
    let mut done = 0;
    while done < range.len {
        let rest = GuestRange { start: range.start.plus(done), len: range.len - done };
        match format.begin_write(rest)? {
            WriteStep::Ready(piece) => {
                assert!(piece.len > 0 && piece.len <= rest.len, "a piece covers a prefix");
                let at = length(done);
                let data = buf.slice(at..at + length(piece.len));
                done += piece.len;
                let (host, data) = with_fill(path, pool, rest, &piece, data).await?;
                let io = format.data_storage().write(host, data, fua);
                flying.push(Flying { io, guard: piece.guard });
            }
            WriteStep::Miss(miss) => format.load(miss).await?,
            WriteStep::Wait(wait) => {
                land(flying).await?;
                format.pending(wait).await;
            }
        }
    }
    Ok(())
}

/// The host offset and the bytes of a piece with everything that its allocation must contain.
async fn with_fill(
    path: &Rc<Path>,
    pool: &Pool,
    rest: GuestRange,
    piece: &WritePiece,
    data: Buf,
) -> Result<(u64, Buf)> {
    if piece.head == 0 && piece.tail == 0 {
        return Ok((piece.host.bytes(), data));
    }
    let head = pool.alloc(length(piece.head));
    let tail = pool.alloc(length(piece.tail));
    let before = GuestRange::new(rest.start.bytes() - piece.head, piece.head);
    let after = GuestRange::new(rest.start.bytes() + piece.len, piece.tail);
    match piece.fill {
        Fill::Zero => {
            head.fill(0);
            tail.fill(0);
        }
        Fill::Below => {
            read_from(path, 1, before, &head).await?;
            read_from(path, 1, after, &tail).await?;
        }
        Fill::Current => {
            read_from(path, 0, before, &head).await?;
            read_from(path, 0, after, &tail).await?;
        }
        Fill::Old(host) => {
            let storage = path.top().format.data_storage();
            let after_host = host.plus(piece.head + piece.len);
            let first = storage.read(host.bytes(), head.clone());
            let last = storage.read(after_host.bytes(), tail.clone());
            let first = first.await;
            last.await.and(first)?;
        }
        Fill::OldCompressed(packed) => {
            let old = path.top().format.read_compressed(packed).await?;
            head.copy_from_buf(&old.slice(0..head.len()));
            let from = old.len() - tail.len();
            tail.copy_from_buf(&old.slice(from..old.len()));
        }
    }
    let mut whole = head;
    whole.append(data);
    whole.append(tail);
    Ok((piece.host.bytes() - piece.head, whole))
}

async fn read_from(path: &Path, layer: usize, range: GuestRange, buf: &Buf) -> Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    read(path, layer, range, buf).await
}

/// Zeroes or discards `range` of the path's top layer. The caller holds the node claim.
///
/// With `fast` it fails with `Unsupported` where explicit zeroes would have to be written.
pub(crate) async fn zero(
    path: &Rc<Path>,
    pool: &Pool,
    range: GuestRange,
    mode: ZeroMode,
    fast: bool,
) -> Result<()> {
    let format = &path.top().format;
    let mut done = 0;
    while done < range.len {
        let rest = GuestRange { start: range.start.plus(done), len: range.len - done };
        match format.begin_zero(rest, mode)? {
            ZeroStep::Done { len } => done += len,
            ZeroStep::Storage { len, host, guard } => {
                let storage = format.data_storage();
                match mode {
                    ZeroMode::Discard => {
                        storage.discard(host.bytes(), len).await?;
                    }
                    ZeroMode::Unmap => storage.write_zeroes(host.bytes(), len, true).await?,
                    ZeroMode::Keep => storage.write_zeroes(host.bytes(), len, false).await?,
                }
                guard.complete();
                done += len;
            }
            ZeroStep::Write { len } => {
                if mode != ZeroMode::Discard {
                    if fast {
                        return Err(Error::new(ErrorKind::Unsupported, "write zeroes fast"));
                    }
                    write_explicit(path, pool, GuestRange { len, ..rest }).await?;
                }
                done += len;
            }
            ZeroStep::Miss(miss) => format.load(miss).await?,
            ZeroStep::Wait(wait) => format.pending(wait).await,
        }
    }
    Ok(())
}

/// Writes zero bytes from one shared block.
async fn write_explicit(path: &Rc<Path>, pool: &Pool, range: GuestRange) -> Result<()> {
    let block = pool.zeroed(ZERO_BLOCK.min(length(range.len)));
    let mut done = 0;
    while done < range.len {
        let mut zeroes = Buf::empty();
        let step = (range.len - done).min(1 << 20);
        while (zeroes.len() as u64) < step {
            let part = block.len().min(length(step) - zeroes.len());
            zeroes.append(block.slice(0..part));
        }
        let part = GuestRange { start: range.start.plus(done), len: step };
        write(path, pool, part, &zeroes, false).await?;
        done += step;
    }
    Ok(())
}

pub(super) fn length(len: u64) -> usize {
    usize::try_from(len).expect("invariant: requests are bounded by REQUEST_MAX")
}
