//! The command line of `liveblkd`.
//!
//! Owns: options and their syntaxes, the order in which they take effect, the texts of their
//! errors, the process's pid file and its way to the background. Promises: what the peer takes is
//! taken, in the peer's order; nothing is opened here. Does not: perform the options;
//! [`Plan::actions`] hands them out one by one.

mod chardev;
mod daemonize;
mod getopt;
mod help;
mod keyval;
mod pidfile;
mod plan;
mod qemuopts;

pub(crate) use chardev::is_identifier;
pub use chardev::{ChardevKind, ChardevSpec, SocketSpec, parse_chardev};
pub use daemonize::{Launch, Readiness, launch};
pub use getopt::{Given, Item, Opt, Scanner};
pub use help::{usage, version};
pub use keyval::{KeyvalError, Parsed, parse_keyval};
pub use pidfile::PidFile;
pub use plan::{Action, Early, HeaderRefs, Plan, Step, plan};
pub use qemuopts::{OptionList, parse_options};
