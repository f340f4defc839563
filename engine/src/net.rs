//! Stream sockets on a core: listen, accept, receive, send.
//!
//! Owns the sockets and, for unix sockets that it made, their file. Everything goes through the
//! core's operations, so a buffer belongs to the kernel until the last completion whatever happens
//! to the future. Dropping a future of this module asks the kernel to end its operation early:
//! receiving and accepting may wait for ever, and a core only stops when nothing is in flight.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt};

use crate::buf::Buf;
use crate::driver::{Descriptor, Handle, IoClass, OpKind, Token};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::{Core, Op, OpDone};

/// A listening socket of a core.
#[derive(Debug)]
pub struct Listener {
    core: Core,
    handle: Rc<Handle>,
    /// The accept in flight, to be cancelled by `close`.
    accepting: Cell<Option<Token>>,
    closed: Cell<bool>,
    file: Option<SocketFile>,
}

/// A connected stream socket of a core; clones share it.
#[derive(Clone, Debug)]
pub struct Socket {
    core: Core,
    handle: Rc<Handle>,
}

/// The file of a unix socket, removed on drop unless somebody replaced it.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

/// Takes over descriptor `number`, which the process inherited and nothing here owns yet.
///
/// # Errors
/// If no such descriptor is open, or it is standard input, output or error.
pub fn adopt_fd(number: i32) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: only borrowed for the call that finds out whether the descriptor is open; the number
    // is not -1.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let ours = borrowed.try_clone_to_owned()?;
    nix::unistd::close(number)?;
    Ok(ours)
}

impl Listener {
    /// Listens on a unix socket at `path`; a socket file left behind there is replaced.
    ///
    /// # Errors
    /// If the kernel refuses, or something that is not a socket is there.
    pub fn unix(core: &Core, path: &Path) -> Result<Self> {
        let failed = |error: io::Error| os_error(&error, "listen").on(&path.to_string_lossy());
        if path.symlink_metadata().is_ok_and(|meta| meta.file_type().is_socket()) {
            std::fs::remove_file(path).map_err(failed)?;
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        let meta = path.symlink_metadata().map_err(failed)?;
        let mut listener = Self::from_fd(core, listener.into());
        listener.file =
            Some(SocketFile { path: path.to_owned(), identity: (meta.dev(), meta.ino()) });
        Ok(listener)
    }

    /// Listens on a TCP address.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn tcp(core: &Core, address: SocketAddr) -> Result<Self> {
        let failed = |error: io::Error| os_error(&error, "listen").on(&address.to_string());
        TcpListener::bind(address)
            .map(|listener| Self::from_fd(core, listener.into()))
            .map_err(failed)
    }

    /// Takes over a socket that listens already.
    pub fn from_fd(core: &Core, socket: OwnedFd) -> Self {
        Self {
            core: core.clone(),
            handle: handle(socket),
            accepting: Cell::new(None),
            closed: Cell::new(false),
            file: None,
        }
    }

    /// The TCP address listened on, with the port that the kernel chose.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        let socket = descriptor(&self.handle)?.try_clone_to_owned().ok()?;
        TcpListener::from(socket).local_addr().ok()
    }

    /// The next connection. One call at a time.
    ///
    /// # Errors
    /// `Cancelled` after [`Listener::close`]; else what the kernel reports.
    pub async fn accept(&self) -> Result<Socket> {
        if self.closed.get() {
            return Err(Error::new(ErrorKind::Cancelled, "accept"));
        }
        let operation =
            InFlight::start(&self.core, OpKind::Accept { socket: Rc::clone(&self.handle) });
        self.accepting.set(Some(operation.token()));
        let done = operation.await;
        self.accepting.set(None);
        check(&done, "accept")?;
        let socket = accepted(done.result);
        Ok(Socket::from_fd(&self.core, socket))
    }

    /// Accepts no more: the accept in flight ends with `Cancelled`. The file of a unix socket goes
    /// away when the listener is dropped.
    pub fn close(&self) {
        self.closed.set(true);
        if let Some(target) = self.accepting.take() {
            drop(self.core.submit(OpKind::Cancel { target }));
        }
    }
}

impl Socket {
    /// Takes over a connected stream socket.
    pub fn from_fd(core: &Core, socket: OwnedFd) -> Self {
        // Not every stream socket is TCP; then these options do not exist and nothing is lost.
        let _ = setsockopt(&socket, sockopt::TcpNoDelay, &true);
        let _ = setsockopt(&socket, sockopt::KeepAlive, &true);
        Self { core: core.clone(), handle: handle(socket) }
    }

    /// Receives into a prefix of `buf` (not empty); resolves with its length, 0 at the end of the
    /// stream. Starts now.
    pub fn recv(&self, buf: Buf) -> impl Future<Output = Result<usize>> + use<> {
        let operation =
            InFlight::start(&self.core, OpKind::Recv { socket: Rc::clone(&self.handle), buf });
        async move { check(&operation.await, "receive") }
    }

    /// Sends all of `buf`. Starts when polled.
    ///
    /// # Errors
    /// What the kernel reports; a prefix may have been sent then.
    pub async fn send(&self, mut buf: Buf) -> Result<()> {
        while !buf.is_empty() {
            let (sent, back) = self.send_part(buf).await;
            let sent = sent?;
            buf = back.slice(sent..back.len());
        }
        Ok(())
    }

    /// Sends a prefix of `buf` (not empty); gives its length and the buffer back. Starts now.
    pub fn send_part(&self, buf: Buf) -> impl Future<Output = (Result<usize>, Buf)> + use<> {
        let operation =
            InFlight::start(&self.core, OpKind::Send { socket: Rc::clone(&self.handle), buf });
        async move {
            let mut done = operation.await;
            let sent = check(&done, "send");
            let buf = match std::mem::replace(&mut done.kind, OpKind::Vacant) {
                OpKind::Send { buf, .. } => buf,
                _ => Buf::empty(),
            };
            match sent {
                Ok(0) => (Err(Error::os(libc::EPIPE, "send")), buf),
                sent => (sent, buf),
            }
        }
    }

    /// Ends the connection in both directions: operations in flight end, the peer sees the end.
    pub fn shutdown(&self) {
        if let Some(socket) = descriptor(&self.handle) {
            // Fails only if the peer ended it before.
            let _ = shutdown(socket_number(socket), Shutdown::Both);
        }
    }

    /// Announces that nothing more is sent; receiving goes on.
    pub fn shutdown_send(&self) {
        if let Some(socket) = descriptor(&self.handle) {
            // Fails only if the peer ended it before.
            let _ = shutdown(socket_number(socket), Shutdown::Write);
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = self
            .path
            .symlink_metadata()
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if ours {
            // It may have gone in between; then there is nothing to remove.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// An operation that the kernel is asked to cancel when nobody waits for it any more.
struct InFlight {
    core: Core,
    operation: Op,
    done: bool,
}

impl InFlight {
    fn start(core: &Core, kind: OpKind) -> Self {
        Self { core: core.clone(), operation: core.submit(kind), done: false }
    }

    fn token(&self) -> Token {
        self.operation.token()
    }
}

impl Future for InFlight {
    type Output = OpDone;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<OpDone> {
        let polled = Pin::new(&mut self.operation).poll(context);
        self.done = polled.is_ready();
        polled
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if !self.done {
            let target = self.operation.token();
            drop(self.core.submit(OpKind::Cancel { target }));
        }
    }
}

fn check(done: &OpDone, op: &'static str) -> Result<usize> {
    usize::try_from(done.result).map_err(|_| Error::os(-done.result, op))
}

fn handle(socket: OwnedFd) -> Rc<Handle> {
    Rc::new(Handle { descriptor: Descriptor::Os(socket), class: IoClass::Ring })
}

fn descriptor(handle: &Handle) -> Option<BorrowedFd<'_>> {
    match &handle.descriptor {
        Descriptor::Os(socket) => Some(socket.as_fd()),
        Descriptor::Sim(_) => None,
    }
}

fn socket_number(socket: BorrowedFd<'_>) -> i32 {
    std::os::fd::AsRawFd::as_raw_fd(&socket)
}

fn os_error(error: &io::Error, op: &'static str) -> Error {
    let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
    Error::os(errno, op)
}

/// Owns the descriptor that a successful accept returned as its result.
pub(crate) fn accepted(result: i32) -> OwnedFd {
    // SAFETY: a successful accept returns a new descriptor that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(result) }
}
