//! The NBD server: many exports behind one socket, many requests in flight on many connections.
//!
//! - [`wire`]: the protocol as bytes, for servers and clients;
//! - `server`: listening, the bound on connections, stopping;
//! - `export`: a disk under a name, and who uses it;
//! - `handshake`: what each option is answered, a pure function of what was negotiated before;
//! - `connection`: the life of one connection; receives requests and starts them;
//! - `request`: which requests are refused and what the others do;
//! - `outbox`: replies on their way out, gathered into few sends;
//! - `account`: what a connection may hold in requests and memory;
//! - `contexts`: what a block status can tell;
//! - `intake`: the receive buffer.
//!
//! Everything of a server runs on one core.

mod account;
mod connection;
mod contexts;
mod export;
mod handshake;
mod intake;
mod outbox;
mod request;
mod server;
pub mod wire;

pub use self::contexts::ContextOffer;
pub use self::export::ExportSpec;
pub use self::server::{Address, ServerConfig};

pub(crate) use self::export::NbdExport;
pub(crate) use self::server::NbdServer;
