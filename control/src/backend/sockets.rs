//! Where servers listen: from addresses of options to sockets.
//!
//! Blocks (name look-ups), so it runs on a thread for such work. Promises: texts of failures name
//! the address as it was given.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener};

use liveblk_exports::nbd::Address;

use super::errors::Failure;
use crate::limits::UNIX_PATH_BYTES_MAX;
use crate::monitor::{adopt_listener, system_text};
use crate::schema::{InetAddress, SocketAddress, UnixAddress};

/// The address as the NBD server takes it; TCP sockets listen already.
pub(super) fn listen(address: SocketAddress) -> Result<Address, Failure> {
    match address {
        SocketAddress::Unix(unix) => listen_unix(unix),
        SocketAddress::Inet(inet) => listen_inet(&inet).map(Address::Listening),
        SocketAddress::Fd(text) => {
            adopt_listener(&text).map(Address::Listening).map_err(Failure::generic)
        }
    }
}

fn listen_unix(unix: UnixAddress) -> Result<Address, Failure> {
    let path = unix.path;
    if path.len() > UNIX_PATH_BYTES_MAX {
        let hint = format!("Path must be less than {} bytes", UNIX_PATH_BYTES_MAX + 1);
        return Err(Failure::generic(format!("UNIX socket path '{path}' is too long")).hinted(hint));
    }
    if !unix.is_abstract {
        return Ok(Address::Unix(path.into()));
    }
    let bound = UnixAddr::from_abstract_name(&path).and_then(|name| UnixListener::bind_addr(&name));
    bound.map(|listener| Address::Listening(listener.into())).map_err(|error| {
        Failure::generic(format!("Failed to bind socket to {path}: {}", system_text(&error)))
    })
}

fn listen_inet(inet: &InetAddress) -> Result<OwnedFd, Failure> {
    let InetAddress { host, port, .. } = inet;
    let unknown =
        |why: &str| Failure::generic(format!("address resolution failed for {host}:{port}: {why}"));
    let number: u16 =
        port.parse().map_err(|_| unknown("Servname not supported for ai_socktype"))?;
    let name = match (host.as_str(), inet.ipv6) {
        ("", Some(false)) => "0.0.0.0",
        ("", _) => "::",
        (name, _) => name,
    };
    let allowed = |address: &SocketAddr| match address {
        SocketAddr::V4(_) => inet.ipv4.unwrap_or(inet.ipv6 != Some(true)),
        SocketAddr::V6(_) => inet.ipv6.unwrap_or(inet.ipv4 != Some(true)),
    };
    let found = (name, number).to_socket_addrs();
    let found = found.map_err(|_| unknown("Name or service not known"))?;
    let mut failure = None;
    for address in found.filter(allowed) {
        for port in number..=inet.to.unwrap_or(number).max(number) {
            match TcpListener::bind((address.ip(), port)) {
                Ok(listener) => return Ok(listener.into()),
                Err(error) => failure = Some(error),
            }
        }
    }
    Err(match failure {
        Some(error) => {
            let why = system_text(&error);
            Failure::generic(format!("Failed to find an available port: {why}"))
        }
        None => unknown("Address family for hostname not supported"),
    })
}
