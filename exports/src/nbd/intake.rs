//! The receive buffer of a connection.
//!
//! One receive brings as many requests as the peer has sent. Large payloads that are not in the
//! buffer yet are received straight into the request's memory, and the next receive is then a small
//! one, so that of a stream of large writes almost nothing is copied.

use liveblk_engine::Result;
use liveblk_engine::buf::Buf;
use liveblk_engine::executor::Core;
use liveblk_engine::net::Socket;

use crate::limits::{DIRECT_PAYLOAD, RECEIVE_SMALL};

/// Longest head that is read at once.
const HEAD_MAX: usize = 64;

/// Bytes received and not used yet: `start..end` of the window.
pub(crate) struct Intake {
    socket: Socket,
    window: Buf,
    start: usize,
    end: usize,
    /// How much the next receive asks for.
    ask: usize,
}

impl Intake {
    pub(crate) fn new(core: &Core, socket: &Socket) -> Self {
        Self {
            socket: socket.clone(),
            window: core.pool().alloc(RECEIVE_SMALL),
            start: 0,
            end: 0,
            ask: RECEIVE_SMALL,
        }
    }

    /// Goes on with a window of `bytes`, at least what is in use.
    pub(crate) fn grow(&mut self, core: &Core, bytes: usize) {
        let window = core.pool().alloc(bytes.max(self.end - self.start));
        let len = self.end - self.start;
        window.slice(0..len).copy_from_buf(&self.window.slice(self.start..self.end));
        (self.window, self.start, self.end, self.ask) = (window, 0, len, bytes);
    }

    /// The next `N` bytes; `None` if the stream ends before.
    pub(crate) async fn head<const N: usize>(&mut self) -> Result<Option<[u8; N]>> {
        const { assert!(N <= HEAD_MAX, "heads are short") };
        while self.end - self.start < N {
            if !self.receive().await? {
                return Ok(None);
            }
        }
        let mut bytes = [0; N];
        self.window.copy_to(self.start, &mut bytes);
        self.start += N;
        Ok(Some(bytes))
    }

    /// The next `len` bytes as a vector; `None` if the stream ends before.
    pub(crate) async fn vector(&mut self, len: usize) -> Result<Option<Vec<u8>>> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            if self.start == self.end && !self.receive().await? {
                return Ok(None);
            }
            let part = (len - bytes.len()).min(self.end - self.start);
            bytes.extend_from_slice(&self.window.slice(self.start..self.start + part).to_vec());
            self.start += part;
        }
        Ok(Some(bytes))
    }

    /// Throws the next `len` bytes away; false if the stream ends before.
    pub(crate) async fn skip(&mut self, len: u32) -> Result<bool> {
        let mut left = len as usize;
        while left > 0 {
            if self.start == self.end && !self.receive().await? {
                return Ok(false);
            }
            let part = left.min(self.end - self.start);
            self.start += part;
            left -= part;
        }
        Ok(true)
    }

    /// Fills `buf` with the next bytes; false if the stream ends before.
    pub(crate) async fn fill(&mut self, buf: &Buf) -> Result<bool> {
        let mut done = self.copy_out(buf, 0);
        if buf.len() - done >= DIRECT_PAYLOAD {
            // The next request is likely one of this kind again.
            self.ask = RECEIVE_SMALL;
            while done < buf.len() {
                match self.socket.recv(buf.slice(done..buf.len())).await? {
                    0 => return Ok(false),
                    count => done += count,
                }
            }
        }
        while done < buf.len() {
            if !self.receive().await? {
                return Ok(false);
            }
            done += self.copy_out(buf, done);
        }
        Ok(true)
    }

    /// Moves what is here to `buf` from position `at`; how much that was.
    fn copy_out(&mut self, buf: &Buf, at: usize) -> usize {
        let len = (buf.len() - at).min(self.end - self.start);
        if len > 0 {
            let here = self.window.slice(self.start..self.start + len);
            buf.slice(at..at + len).copy_from_buf(&here);
            self.start += len;
        }
        len
    }

    /// Whether the next `len` bytes are here already.
    pub(crate) fn has(&self, len: usize) -> bool {
        self.end - self.start >= len
    }

    /// Receives more behind what is there; false at the end of the stream.
    async fn receive(&mut self) -> Result<bool> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 {
            // Only a part of a head is ever left over.
            let len = (self.end - self.start).min(HEAD_MAX);
            let mut rest = [0; HEAD_MAX];
            if let Some(rest) = rest.get_mut(..len) {
                self.window.copy_to(self.start, rest);
                self.window.copy_from(0, rest);
            }
            (self.start, self.end) = (0, len);
        }
        let to = self.window.len().min(self.end + self.ask);
        self.ask = self.window.len();
        let count = self.socket.recv(self.window.slice(self.end..to)).await?;
        self.end += count;
        Ok(count > 0)
    }
}
