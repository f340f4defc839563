//! A disk under a name of the NBD server, and the connections that use it.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use liveblk_engine::executor::Core;
use liveblk_engine::executor::sync::Notify;
use liveblk_engine::node::Disk;

use super::account::Account;
use super::contexts::ContextOffer;
use super::wire::Transmission;

/// What to export, and how.
#[derive(Clone)]
pub struct ExportSpec {
    /// The id that the monitor uses.
    pub id: String,
    /// The name that clients ask for, at most 4096 bytes.
    pub name: String,
    /// A text for people, at most 4096 bytes.
    pub description: Option<String>,
    /// The disk; it follows snapshots and pivots by itself.
    pub disk: Disk,
    /// Whether clients may write.
    pub writable: bool,
    /// Whether every write is durable before it is answered.
    pub writethrough: bool,
    /// What a block status tells beyond `base:allocation`; bitmaps are in use as long as the
    /// export is.
    pub contexts: ContextOffer,
}

/// An export of the NBD server.
pub(crate) struct NbdExport {
    pub(crate) spec: ExportSpec,
    flags: Transmission,
    shutting_down: Cell<bool>,
    users: RefCell<Vec<Weak<Account>>>,
    user_count: Cell<usize>,
    unused: Notify,
}

/// The use of an export by one connection.
pub(crate) struct Attached {
    pub(crate) export: Rc<NbdExport>,
}

impl NbdExport {
    pub(crate) fn new(core: &Core, spec: ExportSpec, several_connections: bool) -> Rc<Self> {
        let flags = flags(spec.writable, several_connections);
        Rc::new(Self {
            spec,
            flags,
            shutting_down: Cell::new(false),
            users: RefCell::default(),
            user_count: Cell::new(0),
            unused: Notify::new(core),
        })
    }

    /// Transmission flags, without what a client negotiates.
    pub(crate) fn flags(&self) -> Transmission {
        self.flags
    }

    pub(crate) fn is_used(&self) -> bool {
        self.user_count.get() > 0
    }

    pub(crate) fn is_shutting_down(&self) -> bool {
        self.shutting_down.get()
    }

    /// No new connection finds the export from now on.
    pub(crate) fn shut_down(&self) {
        self.shutting_down.set(true);
    }

    /// Ends every connection to this export; their admitted requests run to their end.
    pub(crate) fn disconnect_all(&self) {
        let users: Vec<_> = self.users.borrow().iter().filter_map(Weak::upgrade).collect();
        for account in users {
            account.close();
        }
    }

    /// Resolves when no connection uses the export.
    pub(crate) async fn unused(&self) {
        self.unused.until(|| !self.is_used()).await;
    }

    pub(crate) fn attach(self: &Rc<Self>, account: &Rc<Account>) -> Attached {
        let mut users = self.users.borrow_mut();
        users.retain(|user| user.strong_count() > 0);
        users.push(Rc::downgrade(account));
        self.user_count.set(self.user_count.get() + 1);
        Attached { export: Rc::clone(self) }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let export = &self.export;
        export.user_count.set(export.user_count.get() - 1);
        export.unused.notify_all();
    }
}

fn flags(writable: bool, several_connections: bool) -> Transmission {
    let mut flags = Transmission::HAS_FLAGS
        .with(Transmission::FLUSH)
        .with(Transmission::FUA)
        .with(Transmission::CACHE);
    if several_connections {
        flags = flags.with(Transmission::MULTI_CONN);
    }
    if writable {
        flags
            .with(Transmission::TRIM)
            .with(Transmission::WRITE_ZEROES)
            .with(Transmission::FAST_ZERO)
    } else {
        flags.with(Transmission::READ_ONLY)
    }
}
