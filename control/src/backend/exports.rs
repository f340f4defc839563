//! The NBD server and exports.
//!
//! Owns: the order of the peer's refusals. Does not: speak NBD.

use liveblk_engine::ErrorKind;
use liveblk_engine::node::{Disk, User};
use liveblk_exports::nbd::{ExportSpec, ServerConfig};
use liveblk_exports::{ExportError, RemoveMode};
use liveblk_jobs::limits::CUT_WAIT_NS;

use super::control::{Control, Result};
use super::errors::Failure;
use super::sockets;
use crate::schema::{
    BitmapRef, BlockExportAdd, BlockExportDel, ExportKind, ExportRemoveMode, NbdExportOptions,
    NbdServerOptions,
};

impl Control {
    /// `nbd-server-start`.
    pub(super) async fn start_server(&self, options: NbdServerOptions) -> Result<()> {
        if self.exports.has_server() {
            return Err(ExportError::ServerRunning.into());
        }
        if let Some(id) = options.tls_creds {
            return Err(Failure::generic(format!("No TLS credentials with id '{id}'")));
        }
        if options.tls_authz.is_some() {
            return Err(Failure::generic("Option 'tls-authz' needs 'tls-creds'"));
        }
        let wanted = options.addr;
        // Names are looked up, which may take long.
        let address = self.core.work(move || sockets::listen(wanted)).await?;
        let mut config = ServerConfig::new(address);
        config.max_connections = options.max_connections;
        config.handshake_seconds = options.handshake_max_seconds;
        self.exports.start_nbd(config)?;
        Ok(())
    }

    /// `block-export-add`.
    pub(super) async fn add_export(&self, export: BlockExportAdd) -> Result<()> {
        self.exports.check_id(&export.id)?;
        let node = self
            .graph
            .find(&export.node_name)
            .map_err(|_| Failure::no_node("", &export.node_name))?;
        if let Some(iothread) = &export.iothread {
            self.objects.find(iothread)?;
        } else if export.fixed_iothread {
            return Err(Failure::generic("Option 'fixed-iothread' needs 'iothread'"));
        }
        let ExportKind::Nbd(nbd) = export.kind;
        check_contexts(&nbd)?;
        if !node.is_active() {
            // As the peer: who is exported is in use here.
            self.graph.activate(&node, CUT_WAIT_NS).await?;
        }
        if export.writable && !node.is_writable() {
            return Err(ExportError::ReadOnlyNode.into());
        }
        let user = User::Guest { name: export.id.as_str().into() };
        let disk =
            Disk::attach(&node, user, export.writable).map_err(|error| match error.kind() {
                ErrorKind::ReadOnly => ExportError::ReadOnlyNode.into(),
                _ => Failure::from(error),
            })?;
        self.exports.add_nbd(ExportSpec {
            id: export.id.clone(),
            name: nbd.name.unwrap_or(export.node_name),
            description: nbd.description,
            disk,
            writable: export.writable,
            writethrough: export.writethrough,
        })?;
        if let Some(iothread) = &export.iothread {
            self.objects.used_by(iothread, &export.id);
        }
        Ok(())
    }

    /// `block-export-del`.
    pub(super) fn remove_export(&self, export: &BlockExportDel) -> Result<()> {
        let mode = match export.mode {
            ExportRemoveMode::Safe => RemoveMode::Safe,
            ExportRemoveMode::Hard => RemoveMode::Hard,
        };
        self.exports.remove(&export.id, mode)?;
        Ok(())
    }
}

/// Metadata contexts that this version cannot offer.
fn check_contexts(nbd: &NbdExportOptions) -> Result<()> {
    if nbd.allocation_depth {
        let desc = "Option 'allocation-depth' is not supported by this version";
        return Err(Failure::generic(desc));
    }
    match nbd.bitmaps.first() {
        None => Ok(()),
        Some(BitmapRef::Name(name) | BitmapRef::OnNode { name, .. }) => {
            Err(Failure::generic(format!("Bitmap '{name}' is not found")))
        }
    }
}
