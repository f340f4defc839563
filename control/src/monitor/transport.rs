//! A connected stream socket on the ring.
//!
//! Owns: reads and writes of one socket. Promises: after `shutdown` every operation ends by itself,
//! so that all of them can be awaited before the runtime goes.

use std::io;
use std::net::{Shutdown, TcpStream as StdTcp};
use std::os::unix::net::UnixStream as StdUnix;

use tokio_uring::net::{TcpStream, UnixStream};

/// A stream socket of either family, not yet on the ring.
#[derive(Debug)]
pub(super) enum StdStream {
    Unix(StdUnix),
    Tcp(StdTcp),
}

/// The same on the ring.
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl StdStream {
    /// Puts the socket on the ring of this thread.
    pub(super) fn register(self) -> Stream {
        match self {
            Self::Unix(stream) => Stream::Unix(UnixStream::from_std(stream)),
            Self::Tcp(stream) => Stream::Tcp(TcpStream::from_std(stream)),
        }
    }
}

impl Stream {
    pub(super) async fn read(&self, buffer: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
        match self {
            Self::Unix(stream) => stream.read(buffer).await,
            Self::Tcp(stream) => stream.read(buffer).await,
        }
    }

    pub(super) async fn write_all(&self, data: Vec<u8>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.write_all(data).await.0,
            Self::Tcp(stream) => stream.write_all(data).await.0,
        }
    }

    pub(super) fn shutdown(&self, how: Shutdown) {
        // A socket that is closed already needs no shutdown.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }
}
