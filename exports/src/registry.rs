//! Exports by id, and the one NBD server that their clients connect to.
//!
//! Removing an export in order: (1) new clients do not find it; (2) with [`RemoveMode::Hard`] its
//! connections are ended; (3) when the last connection is gone the disk is released; (4) then, and
//! only then, `on_gone` is called with its id.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;

use liveblk_engine::executor::sync::Notify;
use liveblk_engine::executor::{Class, Core};

use crate::error::ExportError;
use crate::limits::EXPORT_BITMAPS;
use crate::nbd::wire::STRING_MAX;
use crate::nbd::{ExportSpec, NbdExport, NbdServer, ServerConfig};

/// What happens to the clients of an export that is removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RemoveMode {
    /// With clients connected the removal fails.
    #[default]
    Safe,
    /// Clients are disconnected; requests that were admitted run to their end.
    Hard,
}

/// What a query shows of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its id.
    pub id: String,
    /// The kind of front door ("nbd").
    pub kind: &'static str,
    /// The node that is served now: it follows snapshots and pivots.
    pub node_name: String,
    /// Whether it is going away.
    pub shutting_down: bool,
}

/// The exports of a core. Clones share them.
#[derive(Clone)]
pub struct Exports(Rc<Inner>);

struct Inner {
    core: Core,
    server: RefCell<Option<NbdServer>>,
    exports: RefCell<Vec<Rc<NbdExport>>>,
    changed: Notify,
    on_gone: Box<dyn Fn(&str)>,
}

impl Exports {
    /// No exports and no server; `on_gone` is called with the id of each export that is gone.
    pub fn new(core: &Core, on_gone: impl Fn(&str) + 'static) -> Self {
        Self(Rc::new(Inner {
            core: core.clone(),
            server: RefCell::default(),
            exports: RefCell::default(),
            changed: Notify::new(core),
            on_gone: Box::new(on_gone),
        }))
    }

    /// Starts the NBD server.
    ///
    /// # Errors
    /// If one runs, or the address cannot be used.
    pub fn start_nbd(&self, config: ServerConfig) -> Result<(), ExportError> {
        let mut server = self.0.server.borrow_mut();
        if server.is_some() {
            return Err(ExportError::ServerRunning);
        }
        *server = Some(NbdServer::start(&self.0.core, config)?);
        Ok(())
    }

    /// Whether an NBD server runs.
    pub fn has_server(&self) -> bool {
        self.0.server.borrow().is_some()
    }

    /// Stops the NBD server: all its exports are removed and its clients disconnected. Resolves
    /// when everything is gone.
    ///
    /// # Errors
    /// If none runs.
    pub async fn stop_nbd(&self) -> Result<(), ExportError> {
        let server = self.0.server.borrow_mut().take().ok_or(ExportError::ServerNotRunning)?;
        let exports = self.0.exports.borrow().clone();
        for export in exports.iter().rev() {
            server.remove(export);
            self.retire(export, RemoveMode::Hard);
        }
        drop(exports);
        server.stop().await;
        self.0.changed.until(|| self.0.exports.borrow().is_empty()).await;
        Ok(())
    }

    /// The TCP address of the NBD server, with the port that the kernel chose.
    pub fn nbd_tcp_address(&self) -> Option<SocketAddr> {
        self.0.server.borrow().as_ref().and_then(NbdServer::tcp_address)
    }

    /// Connections of the NBD server, those in their handshake included.
    pub fn nbd_connections(&self) -> u32 {
        self.0.server.borrow().as_ref().map_or(0, NbdServer::connections)
    }

    /// Checks the id of an export before anything is prepared for it.
    ///
    /// # Errors
    /// If the id is malformed or in use.
    pub fn check_id(&self, id: &str) -> Result<(), ExportError> {
        let mut bytes = id.bytes();
        let starts_well = bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic());
        if !starts_well || !bytes.all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
        {
            return Err(ExportError::InvalidId);
        }
        match self.find(id) {
            Some(_) => Err(ExportError::IdInUse(id.to_owned())),
            None => Ok(()),
        }
    }

    /// Exports a disk over NBD.
    ///
    /// # Errors
    /// If the id or name is in use or too long, no server runs, or the disk is read-only and the
    /// export is not.
    pub fn add_nbd(&self, spec: ExportSpec) -> Result<(), ExportError> {
        self.check_id(&spec.id)?;
        if spec.writable && !spec.disk.is_writable() {
            return Err(ExportError::ReadOnlyNode);
        }
        let server = self.0.server.borrow();
        let server = server.as_ref().ok_or(ExportError::ServerNotRunning)?;
        if spec.name.len() > STRING_MAX {
            return Err(ExportError::NameTooLong(spec.name));
        }
        if let Some(text) = &spec.description
            && text.len() > STRING_MAX
        {
            return Err(ExportError::DescriptionTooLong(text.clone()));
        }
        let bitmaps = spec.contexts.bitmaps.len();
        if bitmaps > EXPORT_BITMAPS {
            return Err(ExportError::TooManyBitmaps(bitmaps));
        }
        if server.has_name(&spec.name) {
            return Err(ExportError::NameInUse(spec.name));
        }
        let export = NbdExport::new(&self.0.core, spec, server.takes_several_connections());
        server.add(Rc::clone(&export));
        self.0.exports.borrow_mut().push(export);
        Ok(())
    }

    /// Removes an export; `on_gone` tells when it is gone, which is after this call.
    ///
    /// # Errors
    /// If there is none of this id, it is going away already, or it is in use and `mode` is safe.
    pub fn remove(&self, id: &str, mode: RemoveMode) -> Result<(), ExportError> {
        let export = self.find(id).ok_or_else(|| ExportError::NotFound(id.to_owned()))?;
        if export.is_shutting_down() {
            return Err(ExportError::ShuttingDown(id.to_owned()));
        }
        if mode == RemoveMode::Safe && export.is_used() {
            return Err(ExportError::InUse(id.to_owned()));
        }
        if let Some(server) = &*self.0.server.borrow() {
            server.remove(&export);
        }
        self.retire(&export, mode);
        Ok(())
    }

    /// All exports, the newest first.
    pub fn list(&self) -> Vec<ExportInfo> {
        let info = |export: &Rc<NbdExport>| ExportInfo {
            id: export.spec.id.clone(),
            kind: "nbd",
            node_name: export.spec.disk.node_name().to_string(),
            shutting_down: export.is_shutting_down(),
        };
        self.0.exports.borrow().iter().rev().map(info).collect()
    }

    fn find(&self, id: &str) -> Option<Rc<NbdExport>> {
        self.0.exports.borrow().iter().find(|export| export.spec.id == id).cloned()
    }

    /// Lets an export go when its last connection has gone.
    fn retire(&self, export: &Rc<NbdExport>, mode: RemoveMode) {
        if mode == RemoveMode::Hard {
            export.disconnect_all();
        }
        if export.is_shutting_down() {
            return;
        }
        export.shut_down();
        let (registry, export) = (Rc::clone(&self.0), Rc::clone(export));
        drop(self.0.core.spawn(Class::Guest, async move {
            export.unused().await;
            registry.exports.borrow_mut().retain(|other| !Rc::ptr_eq(other, &export));
            let id = export.spec.id.clone();
            // The last reference: the disk is released before anybody hears of it.
            drop(export);
            (registry.on_gone)(&id);
            registry.changed.notify_all();
        }));
    }
}

impl std::fmt::Debug for Exports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.list()).finish()
    }
}
