//! Listening, the bound on connections, and stopping.
//!
//! Stopping in order: (1) no more accepts; (2) every connection, also those in their handshake, is
//! ended; (3) their tasks end, each after the requests it admitted; (4) the socket's file goes.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;

use liveblk_engine::executor::sync::{Notify, select};
use liveblk_engine::executor::{Class, Core, JoinHandle};
use liveblk_engine::net::{Listener, Socket};

use super::account::{Account, SharedMemory};
use super::connection::{Answer, run};
use super::export::NbdExport;
use super::handshake::{Negotiation, Offer, Step};
use super::wire::OptionCode;
use crate::error::ExportError;
use crate::limits::{ACCEPT_RETRY_NS, CONNECTIONS, HANDSHAKE_SECONDS};

/// Where a server listens.
#[derive(Debug)]
pub enum Address {
    /// A unix socket at this path; its file is removed at the end.
    Unix(PathBuf),
    /// A TCP address.
    Inet(SocketAddr),
    /// A socket that listens already.
    Listening(OwnedFd),
}

/// How an NBD server is started.
#[derive(Debug)]
pub struct ServerConfig {
    /// Where it listens.
    pub address: Address,
    /// Connections at a time, further ones wait; 0 for any number.
    pub max_connections: u32,
    /// Seconds that a client has for its handshake; 0 for any time.
    pub handshake_seconds: u32,
    /// Whether TLS is asked for, which is refused.
    pub tls: bool,
}

impl ServerConfig {
    /// A server with the usual bounds.
    pub fn new(address: Address) -> Self {
        Self {
            address,
            max_connections: CONNECTIONS,
            handshake_seconds: HANDSHAKE_SECONDS,
            tls: false,
        }
    }
}

/// A running NBD server.
pub(crate) struct NbdServer {
    state: Rc<ServerState>,
    listener: Rc<Listener>,
    accepting: JoinHandle<()>,
}

/// What the connections of a server share.
pub(crate) struct ServerState {
    core: Core,
    handshake_seconds: u32,
    max_connections: u32,
    memory: Rc<SharedMemory>,
    exports: RefCell<Vec<Rc<NbdExport>>>,
    connections: Cell<u32>,
    stopping: Cell<bool>,
    changed: Notify,
}

impl NbdServer {
    /// Listens from now on.
    pub(crate) fn start(core: &Core, config: ServerConfig) -> Result<Self, ExportError> {
        if config.tls {
            return Err(ExportError::TlsUnsupported);
        }
        let listener = listen(core, config.address)?;
        let state = Rc::new(ServerState {
            core: core.clone(),
            handshake_seconds: config.handshake_seconds,
            max_connections: config.max_connections,
            memory: SharedMemory::new(core),
            exports: RefCell::default(),
            connections: Cell::new(0),
            stopping: Cell::new(false),
            changed: Notify::new(core),
        });
        let listener = Rc::new(listener);
        let accepting = core.spawn(Class::Guest, accept(Rc::clone(&state), Rc::clone(&listener)));
        Ok(Self { state, listener, accepting })
    }

    /// The TCP address listened on.
    pub(crate) fn tcp_address(&self) -> Option<SocketAddr> {
        self.listener.tcp_address()
    }

    /// Connections that are open now.
    pub(crate) fn connections(&self) -> u32 {
        self.state.connections.get()
    }

    /// Whether clients may use more than one connection at a time.
    pub(crate) fn takes_several_connections(&self) -> bool {
        self.state.max_connections != 1
    }

    pub(crate) fn has_name(&self, name: &str) -> bool {
        self.state.exports.borrow().iter().any(|export| export.spec.name == name)
    }

    pub(crate) fn add(&self, export: Rc<NbdExport>) {
        self.state.exports.borrow_mut().push(export);
    }

    /// New clients do not find `export` any more.
    pub(crate) fn remove(&self, export: &Rc<NbdExport>) {
        self.state.exports.borrow_mut().retain(|other| !Rc::ptr_eq(other, export));
    }

    /// Ends all connections and resolves when nothing of the server is left.
    pub(crate) async fn stop(self) {
        let state = self.state;
        state.stopping.set(true);
        state.changed.notify_all();
        self.listener.close();
        state.memory.close_all();
        self.accepting.await;
        state.changed.until(|| state.connections.get() == 0).await;
    }
}

impl ServerState {
    pub(crate) fn core(&self) -> &Core {
        &self.core
    }

    /// Seconds for a handshake; 0 for any time.
    pub(crate) fn handshake_seconds(&self) -> u32 {
        self.handshake_seconds
    }

    /// Answers an option; an export that is picked gets `account` as its user.
    pub(crate) fn answer(
        &self,
        negotiation: &mut Negotiation,
        option: OptionCode,
        data: &[u8],
        account: &Rc<Account>,
    ) -> Answer {
        let exports = self.exports.borrow();
        let offers: Vec<_> = exports
            .iter()
            .map(|export| Offer {
                name: &export.spec.name,
                description: export.spec.description.as_deref(),
                size: export.spec.disk.size(),
                flags: export.flags(),
                contexts: &export.spec.contexts,
            })
            .collect();
        match negotiation.answer(&offers, option, data) {
            Step::Start(reply, index, features) => match exports.get(index) {
                Some(export) => Answer::Start(reply, export.attach(account), features),
                None => Answer::End(Vec::new()),
            },
            step => Answer::of(step),
        }
    }
}

/// A connection that counts.
struct Counted(Rc<ServerState>);

impl Counted {
    fn new(state: &Rc<ServerState>) -> Self {
        state.connections.set(state.connections.get() + 1);
        Self(Rc::clone(state))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.set(self.0.connections.get() - 1);
        self.0.changed.notify_all();
    }
}

fn listen(core: &Core, address: Address) -> Result<Listener, ExportError> {
    let (listener, address) = match address {
        Address::Unix(path) => (Listener::unix(core, &path), path.display().to_string()),
        Address::Inet(address) => (Listener::tcp(core, address), address.to_string()),
        Address::Listening(socket) => return Ok(Listener::from_fd(core, socket)),
    };
    listener.map_err(|source| ExportError::Listen { address, source })
}

/// Takes connections until the server stops, as many at a time as it may.
async fn accept(state: Rc<ServerState>, listener: Rc<Listener>) {
    loop {
        let room = || {
            let max = state.max_connections;
            state.stopping.get() || max == 0 || state.connections.get() < max
        };
        state.changed.until(room).await;
        if state.stopping.get() {
            return;
        }
        match listener.accept().await {
            Ok(socket) => serve(&state, socket),
            Err(_) if state.stopping.get() => return,
            Err(error) => {
                tracing::warn!(%error, "an NBD client could not be taken");
                let stopped = state.changed.until(|| state.stopping.get());
                select(stopped, state.core.sleep(ACCEPT_RETRY_NS)).await;
            }
        }
    }
}

fn serve(state: &Rc<ServerState>, socket: Socket) {
    let counted = Counted::new(state);
    let account = Account::new(&state.memory, &socket);
    if state.stopping.get() {
        return;
    }
    let task = run(Rc::clone(state), socket, account);
    drop(state.core.spawn(Class::Guest, async move {
        task.await;
        drop(counted);
    }));
}
