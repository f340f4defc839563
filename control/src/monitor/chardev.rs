//! Chardevs: the streams that `--chardev` opens.
//!
//! Owns: binding, connecting, waiting for a first client, the socket file. Promises: an error names
//! the address; a unix socket's file is removed when its chardev is dropped; at most one chardev
//! uses standard input.

use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use liveblk_engine::net::adopt_fd;
use nix::sys::socket::{
    AddressFamily, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};

use super::system_text;
use super::transport::StdStream;
use crate::cli::{ChardevKind, ChardevSpec, SocketSpec};
use crate::limits::UNIX_PATH_BYTES_MAX;

/// An open chardev.
#[derive(Debug)]
pub struct Chardev {
    pub(super) id: String,
    pub(super) channel: Channel,
    /// Removes the socket file at the end.
    pub(super) file: Option<SocketFile>,
}

/// What a monitor speaks on.
#[derive(Debug)]
pub(super) enum Channel {
    /// Standard input and output.
    Stdio,
    /// A connected socket; its end is the end of the channel.
    Connected(StdStream),
    /// A listening socket that serves one client at a time; the first may be there already.
    Listening(Listener, Option<StdStream>),
}

/// A listening socket.
#[derive(Debug)]
pub(super) enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    pub(super) fn accept(&self) -> io::Result<StdStream> {
        match self {
            Self::Unix(listener) => Ok(StdStream::Unix(listener.accept()?.0)),
            Self::Tcp(listener) => Ok(StdStream::Tcp(listener.accept()?.0)),
        }
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Unix(listener) => listener.set_nonblocking(true),
            Self::Tcp(listener) => listener.set_nonblocking(true),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl std::os::fd::AsRawFd for Listener {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// A socket's file, removed when dropped.
#[derive(Debug)]
pub(super) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Nobody is left who could be told.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The chardevs of a process that no monitor uses yet.
#[derive(Debug, Default)]
pub struct Chardevs {
    open: Vec<Chardev>,
    used: Vec<String>,
    stdio: bool,
}

impl Chardevs {
    /// Opens a chardev. `tell` gets texts that people should see while it waits for a client.
    pub fn open(&mut self, spec: ChardevSpec, tell: &mut dyn FnMut(String)) -> Result<(), String> {
        let taken = self.open.iter().any(|chardev| chardev.id == spec.id);
        let (channel, file) = match spec.kind {
            ChardevKind::Stdio if self.stdio => {
                return Err("cannot use stdio by multiple character devices".to_owned());
            }
            _ if taken || self.used.contains(&spec.id) => {
                return Err(format!("Chardev with id '{}' already exists", spec.id));
            }
            ChardevKind::Stdio => {
                self.stdio = true;
                (Channel::Stdio, None)
            }
            ChardevKind::Socket { address, server: false, .. } => {
                (Channel::Connected(connect(&address)?), None)
            }
            ChardevKind::Socket { address, wait, .. } => listen(&address, wait, tell)?,
        };
        self.open.push(Chardev { id: spec.id, channel, file });
        Ok(())
    }

    /// Hands a chardev to a monitor.
    pub fn claim(&mut self, id: &str) -> Result<Chardev, String> {
        if self.used.iter().any(|used| used == id) {
            return Err(format!("chardev '{id}' is already in use"));
        }
        let at = self.open.iter().position(|chardev| chardev.id == id);
        let at = at.ok_or_else(|| format!("chardev \"{id}\" not found"))?;
        self.used.push(id.to_owned());
        Ok(self.open.swap_remove(at))
    }
}

type Opened = (Channel, Option<SocketFile>);

fn listen(
    address: &SocketSpec,
    wait: bool,
    tell: &mut dyn FnMut(String),
) -> Result<Opened, String> {
    let (listener, file, shown) = match address {
        SocketSpec::Unix { path, is_abstract } => {
            let (listener, file) = listen_unix(path, *is_abstract)?;
            (Listener::Unix(listener), file, format!("unix:{path}"))
        }
        SocketSpec::Tcp { host, port, to } => {
            let listener = listen_tcp(host, port, *to)?;
            let shown = listener.local_addr().map(|address| format!("tcp:{address}"));
            let shown = shown.unwrap_or_else(|_| format!("tcp:{host}:{port}"));
            (Listener::Tcp(listener), None, shown)
        }
        SocketSpec::Fd(fd) => {
            let socket = inherited(*fd, true)?;
            let listener = match family(&socket) {
                Some(AddressFamily::Unix) => Listener::Unix(socket.into()),
                _ => Listener::Tcp(socket.into()),
            };
            (listener, None, format!("fd:{fd}"))
        }
    };
    let mut first = None;
    if wait {
        tell(format!("info: waiting for connection on: {shown}"));
        let accepted = listener.accept();
        first = Some(accepted.map_err(|e| format!("Failed to accept: {}", system_text(&e)))?);
    }
    listener.set_nonblocking().map_err(|error| system_text(&error))?;
    Ok((Channel::Listening(listener, first), file))
}

fn listen_unix(
    path: &str,
    is_abstract: bool,
) -> Result<(UnixListener, Option<SocketFile>), String> {
    let fail =
        |error: &io::Error| format!("Failed to bind socket to {path}: {}", system_text(error));
    if path.len() > UNIX_PATH_BYTES_MAX {
        let limit = UNIX_PATH_BYTES_MAX + 1;
        return Err(format!(
            "UNIX socket path '{path}' is too long\nPath must be less than {limit} bytes"
        ));
    }
    if is_abstract {
        let address = SocketAddr::from_abstract_name(path).map_err(|error| fail(&error))?;
        let listener = UnixListener::bind_addr(&address).map_err(|error| fail(&error))?;
        return Ok((listener, None));
    }
    // The socket of an earlier process is replaced; anything else is left alone.
    if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
        std::fs::remove_file(path)
            .map_err(|error| format!("Failed to unlink socket {path}: {}", system_text(&error)))?;
    }
    let listener = UnixListener::bind(path).map_err(|error| fail(&error))?;
    let path = std::path::absolute(path).unwrap_or_else(|_| Path::new(path).to_owned());
    Ok((listener, Some(SocketFile(path))))
}

fn listen_tcp(host: &str, port: &str, to: Option<u16>) -> Result<TcpListener, String> {
    let first = resolve(host, port)?;
    let last = to.unwrap_or(0);
    let mut failure = None;
    for address in first {
        for number in address.port()..=last.max(address.port()) {
            let mut address = address;
            address.set_port(number);
            match TcpListener::bind(address) {
                Ok(listener) => return Ok(listener),
                Err(error) => failure = Some(error),
            }
        }
    }
    let why = failure.map_or_else(|| "no address".to_owned(), |error| system_text(&error));
    Err(format!("Failed to find an available port: {why}"))
}

fn connect(address: &SocketSpec) -> Result<StdStream, String> {
    match address {
        SocketSpec::Unix { path, is_abstract } => {
            let stream = if *is_abstract {
                SocketAddr::from_abstract_name(path)
                    .and_then(|address| UnixStream::connect_addr(&address))
            } else {
                UnixStream::connect(path)
            };
            stream
                .map(StdStream::Unix)
                .map_err(|e| format!("Failed to connect to '{path}': {}", system_text(&e)))
        }
        SocketSpec::Tcp { host, port, .. } => {
            let addresses: Vec<_> = resolve(host, port)?.collect();
            TcpStream::connect(addresses.as_slice())
                .map(StdStream::Tcp)
                .map_err(|e| format!("Failed to connect to '{host}:{port}': {}", system_text(&e)))
        }
        SocketSpec::Fd(fd) => {
            let socket = inherited(*fd, false)?;
            Ok(match family(&socket) {
                Some(AddressFamily::Unix) => StdStream::Unix(socket.into()),
                _ => StdStream::Tcp(socket.into()),
            })
        }
    }
}

fn resolve(
    host: &str,
    port: &str,
) -> Result<impl Iterator<Item = std::net::SocketAddr> + use<>, String> {
    let fail = |why: &str| format!("address resolution failed for {host}:{port}: {why}");
    let number: u16 = port.parse().map_err(|_| fail("Servname not supported for ai_socktype"))?;
    let host_name = if host.is_empty() { "::" } else { host };
    (host_name, number).to_socket_addrs().map_err(|_| fail("Name or service not known"))
}

/// Takes over an inherited descriptor, which must be a stream socket that listens or not.
fn inherited(number: i32, listens: bool) -> Result<OwnedFd, String> {
    let fail = |why: &str| format!("File descriptor '{number}' cannot be used: {why}");
    let socket = adopt_fd(number).map_err(|error| fail(&system_text(&error)))?;
    match family(&socket) {
        Some(AddressFamily::Unix | AddressFamily::Inet | AddressFamily::Inet6) => {}
        _ => return Err(fail("it is no unix or TCP socket")),
    }
    match getsockopt(&socket, sockopt::AcceptConn) {
        Ok(is_listening) if is_listening == listens => Ok(socket),
        Ok(true) => Err(fail("it is a listening socket (server=on is missing)")),
        _ => Err(fail("it is not a listening socket")),
    }
}

fn family(socket: &OwnedFd) -> Option<AddressFamily> {
    let name: SockaddrStorage = getsockname(std::os::fd::AsRawFd::as_raw_fd(socket)).ok()?;
    name.family()
}

/// Takes over the listening socket whose number is `text`.
pub(crate) fn adopt_listener(text: &str) -> Result<OwnedFd, String> {
    let number =
        text.parse().map_err(|_| format!("File descriptor named '{text}' has not been found"))?;
    inherited(number, true)
}
