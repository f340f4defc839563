//! Heads of replies as inline bytes, and payloads of status and error chunks.

use zerocopy::IntoBytes;

use super::codes::{ErrorCode, chunk_type};
use super::error::WireError;
use super::layout::{ChunkHeader, SimpleReplyHeader, StatusDescriptor};

/// Bytes of the longest head: a chunk header with offset and length of a hole.
const HEAD_MAX: usize = ChunkHeader::SIZE + 12;

/// What goes before a reply's data: a few bytes, kept inline.
#[derive(Clone, Copy, Debug)]
pub struct ChunkHead {
    bytes: [u8; HEAD_MAX],
    len: usize,
}

impl ChunkHead {
    /// A simple reply; data of a successful READ follows.
    pub fn simple(cookie: u64, error: Option<ErrorCode>) -> Self {
        let error = error.map_or(0, |code| code as u32);
        Self::from_parts(SimpleReplyHeader::new(cookie, error).as_bytes(), &[])
    }

    /// A chunk without payload that ends a reply.
    pub fn none(cookie: u64) -> Self {
        let header = ChunkHeader::new(cookie, chunk_type::NONE, chunk_type::DONE, 0);
        Self::from_parts(header.as_bytes(), &[])
    }

    /// A chunk of `length` bytes of data at `offset`; the data follows.
    pub fn data(cookie: u64, offset: u64, length: u32, last: bool) -> Self {
        let length = length.saturating_add(8);
        let header = ChunkHeader::new(cookie, chunk_type::OFFSET_DATA, u16::from(last), length);
        Self::from_parts(header.as_bytes(), &offset.to_be_bytes())
    }

    /// A chunk of `length` zero bytes at `offset`.
    pub fn hole(cookie: u64, offset: u64, length: u32, last: bool) -> Self {
        let header = ChunkHeader::new(cookie, chunk_type::OFFSET_HOLE, u16::from(last), 12);
        let mut tail = [0; 12];
        let (at, len) = tail.split_at_mut(8);
        at.copy_from_slice(&offset.to_be_bytes());
        len.copy_from_slice(&length.to_be_bytes());
        Self::from_parts(header.as_bytes(), &tail)
    }

    /// A chunk with `length` bytes of payload that follow, before others.
    pub fn part(cookie: u64, kind: u16, length: u32) -> Self {
        let header = ChunkHeader::new(cookie, kind, 0, length);
        Self::from_parts(header.as_bytes(), &[])
    }

    /// The last chunk of a reply, with `length` bytes of payload that follow.
    pub fn last(cookie: u64, kind: u16, length: u32) -> Self {
        let header = ChunkHeader::new(cookie, kind, chunk_type::DONE, length);
        Self::from_parts(header.as_bytes(), &[])
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    fn from_parts(first: &[u8], second: &[u8]) -> Self {
        let mut bytes = [0; HEAD_MAX];
        let len = (first.len() + second.len()).min(HEAD_MAX);
        for (to, from) in bytes.iter_mut().zip(first.iter().chain(second)) {
            *to = *from;
        }
        Self { bytes, len }
    }
}

/// The longest start of `text` that has at most `max` bytes and ends between two characters.
pub(crate) fn prefix(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    end.and_then(|end| text.get(..end)).unwrap_or_default()
}

/// The payload of an error chunk.
pub fn encode_error_payload(code: ErrorCode, message: &str) -> Vec<u8> {
    let message = prefix(message, super::STRING_MAX).as_bytes();
    let mut payload = (code as u32).to_be_bytes().to_vec();
    payload.extend_from_slice(&u16::try_from(message.len()).unwrap_or(0).to_be_bytes());
    payload.extend_from_slice(message);
    payload
}

/// Starts the payload of a status chunk for context `id`.
pub fn encode_status_context(payload: &mut Vec<u8>, id: u32) {
    payload.extend_from_slice(&id.to_be_bytes());
}

/// Adds a run to the payload of a status chunk.
pub fn encode_status(payload: &mut Vec<u8>, length: u32, flags: u32) {
    let run = StatusDescriptor { length: length.into(), flags: flags.into() };
    payload.extend_from_slice(run.as_bytes());
}

/// Reads the payload of a status chunk: context id and runs of (length, flags).
///
/// # Errors
/// If the payload has no run, half a run, or a run of no bytes.
pub fn decode_status(
    payload: &[u8],
) -> Result<(u32, impl Iterator<Item = (u32, u32)> + '_), WireError> {
    let (id, runs) = payload.split_first_chunk::<4>().ok_or(WireError::Inconsistent)?;
    let runs = runs.chunks_exact(StatusDescriptor::SIZE);
    if !runs.remainder().is_empty() || runs.len() == 0 {
        return Err(WireError::Inconsistent);
    }
    let mut runs = runs.filter_map(|run| StatusDescriptor::decode(run).ok());
    let runs_ok = runs.clone().all(|run| run.length.get() != 0);
    if !runs_ok {
        return Err(WireError::Inconsistent);
    }
    let pairs =
        std::iter::from_fn(move || runs.next()).map(|run| (run.length.get(), run.flags.get()));
    Ok((u32::from_be_bytes(*id), pairs))
}
