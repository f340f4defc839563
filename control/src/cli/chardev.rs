//! `--chardev`: which stream a monitor speaks on.
//!
//! Owns: the options of the two back-ends, `stdio` and `socket`, and their refusals. Does not: open
//! anything; [`crate::monitor`] does.

use super::qemuopts::{OptionList, parse_options};

/// Options of all back-ends; the ones that only tune are accepted and have no effect.
static KNOWN: &[&str] = &[
    "backend", "id", "path", "host", "port", "fd", "to", "ipv4", "ipv6", "server", "wait",
    "nodelay", "delay", "abstract", "tight", "signal", "mux",
];

/// A chardev.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChardevSpec {
    /// Its id.
    pub id: String,
    /// What it is.
    pub kind: ChardevKind,
}

/// The back-ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChardevKind {
    /// Standard input and output.
    Stdio,
    /// A stream socket.
    Socket {
        /// Where.
        address: SocketSpec,
        /// Listen instead of connecting.
        server: bool,
        /// Wait for the first client before going on.
        wait: bool,
    },
}

/// Where a socket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketSpec {
    /// In the file system, or in the abstract name space.
    Unix {
        /// Path or abstract name.
        path: String,
        /// In the abstract name space.
        is_abstract: bool,
    },
    /// TCP.
    Tcp {
        /// Name or number; empty is every address.
        host: String,
        /// Name or number.
        port: String,
        /// Last port to try when listening.
        to: Option<u16>,
    },
    /// A descriptor that the process inherited.
    Fd(i32),
}

/// Parses an argument of `--chardev`. The second value of success is warnings; the error has its
/// hint, if any, on further lines.
pub fn parse_chardev(text: &str) -> Result<(ChardevSpec, Vec<String>), String> {
    let options = parse_options(text, "backend", KNOWN)
        .map_err(|name| format!("Invalid parameter '{name}'"))?;
    let warnings = options
        .deprecated
        .iter()
        .map(|(name, instead)| {
            format!(
                "warning: short-form boolean option '{name}' deprecated\n\
                 Please use {instead} instead"
            )
        })
        .collect();
    let id = options.last("id").ok_or("chardev: no id specified")?.to_owned();
    if !is_identifier(&id) {
        return Err("Parameter 'id' expects an identifier\n\
                    Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
            .to_owned());
    }
    let kind = match options.last("backend") {
        None => return Err(format!("chardev: \"{id}\" missing backend")),
        Some("stdio") => ChardevKind::Stdio,
        Some("socket") => socket(&options)?,
        Some(other) => return Err(format!("'{other}' is not a valid char driver name")),
    };
    Ok((ChardevSpec { id, kind }, warnings))
}

fn socket(options: &OptionList) -> Result<ChardevKind, String> {
    let switch = |name| options.switch(name).map_err(|error| error.to_string());
    let server = switch("server")?.unwrap_or(false);
    let wait = switch("wait")?;
    let is_abstract = switch("abstract")?.unwrap_or(false);
    for name in ["nodelay", "delay", "tight", "ipv4", "ipv6", "mux", "signal"] {
        switch(name)?;
    }
    let (path, host, fd) = (options.last("path"), options.last("host"), options.last("fd"));
    let named = [path, host, fd].iter().filter(|place| place.is_some()).count();
    if named > 1 {
        return Err("None or one of 'path', 'fd' or 'host' option required.".to_owned());
    }
    if wait.is_some() && !server {
        return Err("'wait' option is incompatible with socket in client connect mode".to_owned());
    }
    let address = if let Some(path) = path {
        SocketSpec::Unix { path: path.to_owned(), is_abstract }
    } else if let Some(host) = host {
        let port = options.last("port").ok_or("chardev: socket: no port given")?.to_owned();
        let to = options.last("to").map(str::parse).transpose();
        let to = to.map_err(|_| "Parameter 'to' expects a number".to_owned())?;
        SocketSpec::Tcp { host: host.to_owned(), port, to }
    } else {
        let text = fd.unwrap_or_default();
        let fd = text.parse().map_err(|_| format!("Unable to parse FD number {text}"))?;
        SocketSpec::Fd(fd)
    };
    Ok(ChardevKind::Socket { address, server, wait: server && wait.unwrap_or(true) })
}

/// Whether a text is an identifier: a letter, then letters, digits, `-`, `.`, `_`.
pub(crate) fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listening_socket_waits_unless_told_otherwise() {
        let (spec, _) = parse_chardev("socket,id=m,path=/run/m.sock,server=on").unwrap();
        assert!(matches!(spec.kind, ChardevKind::Socket { wait: true, server: true, .. }));
        let (spec, warnings) = parse_chardev("socket,id=m,path=/p,server,nowait").unwrap();
        assert!(matches!(spec.kind, ChardevKind::Socket { wait: false, server: true, .. }));
        assert_eq!(warnings.len(), 2);
    }
}
