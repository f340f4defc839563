//! Which requests are refused, and what the others do.
//!
//! A request is looked at in this order: (1) length of data; (2) read-only; (3) range; (4) flags;
//! (5) the command itself. The numbers of refusals are the peer's, which answers EINVAL to all of
//! them; the message of a structured reply says what is wrong.

use std::rc::Rc;

use liveblk_engine::buf::Buf;
use liveblk_engine::executor::Core;
use liveblk_engine::node::{Disk, StatusExtent, StatusKind, WriteFlags, ZeroFlags};
use liveblk_engine::{Error, ErrorKind, Result};
use smallvec::SmallVec;

use super::account::Grant;
use super::contexts;
use super::export::Attached;
use super::handshake::Features;
use super::outbox::{Outbox, Reply};
use super::wire::{
    ChunkHead, Command, CommandFlags, ErrorCode, PAYLOAD_MAX, RequestHeader, Transmission,
    WireError, chunk_type, encode_error_payload, encode_status, encode_status_context, magic,
};
use crate::limits::{CACHE_STEP, READ_CHUNKS, SMALL_READ, STATUS_RUNS};

/// A connection that serves requests.
pub(crate) struct Session {
    core: Core,
    outbox: Rc<Outbox>,
    disk: Disk,
    attached: Attached,
    features: Features,
}

/// A request as received.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    command: Command,
    flags: CommandFlags,
    cookie: u64,
    offset: u64,
    length: u32,
}

/// What becomes of a request.
#[derive(Debug)]
pub(crate) enum Admission {
    Serve,
    Refuse(Refusal),
    /// The client ends the connection.
    Disconnect,
}

/// Why a request is refused.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) code: ErrorCode,
    pub(crate) message: String,
    /// The stream cannot go on, because a payload will not be read.
    pub(crate) fatal: bool,
}

impl Session {
    pub(crate) fn new(
        core: &Core,
        outbox: Rc<Outbox>,
        attached: Attached,
        features: Features,
    ) -> Self {
        let disk = attached.export.spec.disk.clone();
        Self { core: core.clone(), outbox, disk, attached, features }
    }

    pub(crate) fn core(&self) -> &Core {
        &self.core
    }

    fn is_read_only(&self) -> bool {
        self.attached.export.flags().has(Transmission::READ_ONLY)
    }

    fn push(&self, head: ChunkHead, data: Buf, grant: Option<Grant>) {
        self.outbox.push(Reply { head, data, grant });
    }

    /// Answers without data.
    fn done(&self, request: &Request, grant: Grant) {
        self.push(ChunkHead::simple(request.cookie, None), Buf::empty(), Some(grant));
    }

    fn fail(&self, request: &Request, code: ErrorCode, message: &str, grant: Grant) {
        if !self.features.structured {
            let head = ChunkHead::simple(request.cookie, Some(code));
            return self.push(head, Buf::empty(), Some(grant));
        }
        self.last_chunk(request, chunk_type::ERROR, encode_error_payload(code, message), grant);
    }

    fn last_chunk(&self, request: &Request, kind: u16, payload: Vec<u8>, grant: Grant) {
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let head = ChunkHead::last(request.cookie, kind, length);
        self.push(head, Buf::from_vec(payload), Some(grant));
    }
}

impl Request {
    /// Reads the head of a request.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let head = RequestHeader::decode(bytes)?;
        if head.magic.get() != magic::REQUEST {
            return Err(WireError::BadMagic(head.magic.get().into()));
        }
        Ok(Self {
            command: Command::from_number(head.command.get()),
            flags: CommandFlags(head.flags.get()),
            cookie: head.cookie.get(),
            offset: head.offset.get(),
            length: head.length.get(),
        })
    }

    /// Bytes that follow the head.
    pub(crate) fn payload(&self) -> u32 {
        if self.command == Command::Write { self.length } else { 0 }
    }

    /// Bytes of buffers that serving or refusing it takes.
    pub(crate) fn memory(&self, admission: &Admission) -> u32 {
        match (admission, self.command) {
            (Admission::Serve, Command::Read | Command::Write) => self.length,
            (Admission::Serve, Command::BlockStatus) => 8 * (STATUS_RUNS as u32),
            (Admission::Serve, Command::Cache) => CACHE_STEP as u32,
            _ => 0,
        }
    }
}

/// Decides about a request before any memory is given to it.
pub(crate) fn admit(session: &Session, request: &Request) -> Admission {
    if request.command == Command::Disconnect {
        return Admission::Disconnect;
    }
    match check(session, request) {
        None => Admission::Serve,
        Some(message) => Admission::Refuse(Refusal {
            code: ErrorCode::Inval,
            message,
            fatal: request.payload() > PAYLOAD_MAX,
        }),
    }
}

/// What is wrong with a request, if anything.
fn check(session: &Session, request: &Request) -> Option<String> {
    let Request { command, flags, offset, length, .. } = *request;
    let mut valid = CommandFlags::FUA;
    let (mut limited, mut writes) = (false, false);
    match command {
        Command::Read => {
            limited = true;
            if session.features.structured {
                valid = valid.with(CommandFlags::DF);
            }
        }
        Command::Write => (limited, writes) = (true, true),
        Command::Trim => writes = true,
        Command::Cache => limited = true,
        Command::WriteZeroes => {
            writes = true;
            valid = valid.with(CommandFlags::NO_HOLE).with(CommandFlags::FAST_ZERO);
        }
        Command::BlockStatus => valid = valid.with(CommandFlags::REQ_ONE),
        Command::Flush | Command::Disconnect | Command::Unknown(_) => {}
    }
    let size = session.disk.size();
    if limited && length > PAYLOAD_MAX {
        Some(format!("{} of {length} bytes: at most {PAYLOAD_MAX} at once", command.name()))
    } else if writes && session.is_read_only() {
        Some("the export is read-only".to_owned())
    } else if offset.checked_add(length.into()).is_none_or(|end| end > size) {
        Some(format!("{length} bytes at {offset} do not lie within the export's {size}"))
    } else if flags.exceed(valid) {
        Some(format!("flags {:#x} are not valid for {}", flags.0, command.name()))
    } else {
        match command {
            Command::BlockStatus if length == 0 => Some("block status of no bytes".to_owned()),
            Command::BlockStatus if session.features.contexts.is_empty() => {
                Some("no metadata context was negotiated".to_owned())
            }
            Command::Unknown(number) => Some(format!("command {number} is not known")),
            _ => None,
        }
    }
}

/// Answers a refused request.
pub(crate) fn refuse(session: &Session, request: &Request, refusal: &Refusal, grant: Grant) {
    session.fail(request, refusal.code, &refusal.message, grant);
}

/// Serves an admitted request to its end, whether the client is still there or not.
pub(crate) async fn serve(session: Rc<Session>, request: Request, payload: Buf, grant: Grant) {
    let served = match request.command {
        Command::Read => read(&session, &request).await,
        Command::BlockStatus => status(&session, &request).await,
        _ => change(&session, &request, payload).await.map(|()| Outcome::Done),
    };
    match served {
        Ok(Outcome::Done) => session.done(&request, grant),
        Ok(Outcome::Last(head, data)) => session.push(head, data, Some(grant)),
        Err(error) => {
            let code = ErrorCode::from_errno(error.errno());
            let message = format!("{} failed: {}", request.command.name(), error.kind());
            session.fail(&request, code, &message, grant);
        }
    }
}

/// What ends the reply of a request that went well.
enum Outcome {
    /// A simple reply.
    Done,
    /// This, with data.
    Last(ChunkHead, Buf),
}

/// Every command that is answered without data.
async fn change(session: &Session, request: &Request, payload: Buf) -> Result<()> {
    let disk = &session.disk;
    let (offset, length) = (request.offset, u64::from(request.length));
    let writethrough = session.attached.export.spec.writethrough;
    let fua = writethrough || request.flags.has(CommandFlags::FUA);
    match request.command {
        Command::Flush => disk.flush().await,
        Command::Cache => prefetch(session, request).await,
        // Nothing to write is nothing to do, but it may still have to be durable.
        _ if length == 0 => {
            if fua {
                disk.flush().await?;
            }
            Ok(())
        }
        Command::Write => {
            disk.write(offset, payload, WriteFlags { fua, ..WriteFlags::default() }).await
        }
        Command::Trim => disk.discard(offset, length, fua).await,
        Command::WriteZeroes => {
            let flags = ZeroFlags {
                may_unmap: !request.flags.has(CommandFlags::NO_HOLE),
                fast: request.flags.has(CommandFlags::FAST_ZERO),
                fua,
            };
            disk.write_zeroes(offset, length, flags).await
        }
        _ => Err(Error::new(ErrorKind::InvalidArgument, "serve")),
    }
}

/// Reads the range and forgets it, so that caches below hold it.
async fn prefetch(session: &Session, request: &Request) -> Result<()> {
    let end = request.offset + u64::from(request.length);
    let mut at = request.offset;
    while at < end {
        let step = CACHE_STEP.min(end - at);
        session.disk.read(at, session.core.pool().alloc(step as usize)).await?;
        at += step;
    }
    Ok(())
}

async fn read(session: &Session, request: &Request) -> Result<Outcome> {
    if request.flags.has(CommandFlags::FUA) {
        session.disk.flush().await?;
    }
    let Request { cookie, offset, length, .. } = *request;
    if length == 0 {
        let head = if session.features.structured {
            ChunkHead::none(cookie)
        } else {
            ChunkHead::simple(cookie, None)
        };
        return Ok(Outcome::Last(head, Buf::empty()));
    }
    let sparse = session.features.structured && !request.flags.has(CommandFlags::DF);
    if sparse && length > SMALL_READ {
        return sparse_read(session, request).await;
    }
    let buf = session.core.pool().alloc(length as usize);
    session.disk.read(offset, buf.clone()).await?;
    Ok(if !session.features.structured {
        Outcome::Last(ChunkHead::simple(cookie, None), buf)
    } else if sparse && buf.is_zero() {
        Outcome::Last(ChunkHead::hole(cookie, offset, length, true), Buf::empty())
    } else {
        Outcome::Last(ChunkHead::data(cookie, offset, length, true), buf)
    })
}

/// Reads what holds data, and reports the rest as holes.
async fn sparse_read(session: &Session, request: &Request) -> Result<Outcome> {
    let pieces = pieces(session, request).await?;
    let reads: SmallVec<[_; 4]> = pieces
        .iter()
        .map(|piece| {
            piece.data.then(|| {
                let buf = session.core.pool().alloc(piece.length as usize);
                (session.disk.read(piece.offset, buf.clone()), buf)
            })
        })
        .collect();
    let count = pieces.len();
    for (index, (piece, read)) in pieces.iter().zip(reads).enumerate() {
        let last = index + 1 == count;
        let (head, data) = match read {
            Some((receipt, buf)) => {
                receipt.await?;
                (ChunkHead::data(request.cookie, piece.offset, piece.length, last), buf)
            }
            None => {
                let head = ChunkHead::hole(request.cookie, piece.offset, piece.length, last);
                (head, Buf::empty())
            }
        };
        if last {
            return Ok(Outcome::Last(head, data));
        }
        session.push(head, data, None);
    }
    Err(Error::new(ErrorKind::InvalidArgument, "read"))
}

/// A part of a read: data, or zeroes.
struct Piece {
    offset: u64,
    length: u32,
    data: bool,
}

/// Cuts a read into data and holes: at most [`READ_CHUNKS`] pieces, the last one data if the disk
/// is more fragmented than that.
async fn pieces(session: &Session, request: &Request) -> Result<SmallVec<[Piece; 4]>> {
    let extents = session.disk.block_status(request.offset, request.length.into()).await?;
    let mut pieces: SmallVec<[Piece; 4]> = SmallVec::new();
    let mut left = request.length;
    let mut offset = request.offset;
    for StatusExtent { len, kind, .. } in extents {
        let length = u32::try_from(len).unwrap_or(u32::MAX).min(left);
        let data = kind == StatusKind::Data;
        if length == 0 {
            continue;
        }
        if pieces.len() + 1 >= READ_CHUNKS {
            break;
        }
        match pieces.last_mut() {
            Some(last) if last.data == data => last.length += length,
            _ => pieces.push(Piece { offset, length, data }),
        }
        left -= length;
        offset += u64::from(length);
    }
    if left > 0 {
        pieces.push(Piece { offset, length: left, data: true });
    }
    Ok(pieces)
}

/// One chunk for each context that the client selected; the contexts share the bound on runs.
async fn status(session: &Session, request: &Request) -> Result<Outcome> {
    let selected = &session.features.contexts;
    let max = match request.flags.has(CommandFlags::REQ_ONE) {
        true => 1,
        false => (STATUS_RUNS / selected.len().max(1)).max(1),
    };
    let offer = &session.attached.export.spec.contexts;
    let (offset, len) = (request.offset, u64::from(request.length));
    let mut payloads = Vec::with_capacity(selected.len());
    for context in selected {
        let runs = contexts::runs(&session.disk, offer, *context, offset, len, max).await?;
        let mut payload = Vec::with_capacity(4 + 8 * runs.len());
        encode_status_context(&mut payload, context.id());
        for (length, flags) in runs {
            encode_status(&mut payload, length, flags);
        }
        payloads.push(payload);
    }
    let last = payloads.pop().ok_or_else(|| Error::new(ErrorKind::InvalidArgument, "serve"))?;
    let length = |payload: &[u8]| u32::try_from(payload.len()).unwrap_or(u32::MAX);
    for payload in payloads {
        let kind = chunk_type::BLOCK_STATUS;
        let head = ChunkHead::part(request.cookie, kind, length(&payload));
        session.push(head, Buf::from_vec(payload), None);
    }
    let head = ChunkHead::last(request.cookie, chunk_type::BLOCK_STATUS, length(&last));
    Ok(Outcome::Last(head, Buf::from_vec(last)))
}
