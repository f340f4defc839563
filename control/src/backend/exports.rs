//! The NBD server and exports.
//!
//! Owns: the order of the peer's refusals. Does not: speak NBD.

use std::rc::Rc;

use liveblk_engine::ErrorKind;
use liveblk_engine::node::{BitmapAccess, BitmapHold, Disk, Node, User};
use liveblk_exports::nbd::{ContextOffer, ExportSpec, ServerConfig};
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
        let ExportKind::Nbd(nbd) = export.kind.clone();
        if !node.is_active() && !export.allow_inactive {
            // As the peer: who is exported is in use here.
            self.graph.activate(&node, CUT_WAIT_NS).await?;
        }
        let user = User::Guest { name: export.id.as_str().into() };
        let attached = if export.allow_inactive {
            Disk::attach_resting(&node, user, export.writable)
        } else {
            Disk::attach(&node, user, export.writable)
        };
        let disk = attached.map_err(|error| match error.kind() {
            ErrorKind::ReadOnly => ExportError::ReadOnlyNode.into(),
            _ => Failure::from(error),
        })?;
        let contexts = self.contexts(&node, &nbd, &export)?;
        self.exports.add_nbd(ExportSpec {
            contexts,
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

    /// The metadata contexts of an export; its bitmaps are busy from now on.
    fn contexts(
        &self,
        node: &Rc<Node>,
        nbd: &NbdExportOptions,
        export: &BlockExportAdd,
    ) -> Result<ContextOffer> {
        let one = nbd.bitmap.iter().cloned().map(BitmapRef::Name);
        let mut held: Vec<Rc<BitmapHold>> = Vec::new();
        for reference in one.chain(nbd.bitmaps.iter().cloned()) {
            let (node, name) = match reference {
                BitmapRef::Name(name) => (holder(node, &name)?, name),
                BitmapRef::OnNode { node, name } => (self.bitmap_node(&node)?, name),
            };
            let name = name.as_str();
            let bitmap = node.bitmap(name)?;
            // One that is named twice is shown twice, as by the peer.
            if let Some(hold) = held.iter().find(|hold| Rc::ptr_eq(hold.bitmap(), &bitmap)) {
                let again = Rc::clone(hold);
                held.push(again);
                continue;
            }
            if !export.writable && bitmap.is_enabled() && node.is_writable() {
                let desc = format!("Enabled bitmap '{name}' incompatible with readonly export");
                return Err(Failure::generic(desc));
            }
            held.push(Rc::new(node.hold_bitmap(name, &export.id, BitmapAccess::Read)?));
        }
        Ok(ContextOffer { depth: nbd.allocation_depth, bitmaps: held.into() })
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

/// The first node from `node` down that has a bitmap called `name`.
fn holder(node: &Rc<Node>, name: &str) -> Result<Rc<Node>> {
    let mut at = Some(Rc::clone(node));
    while let Some(node) = at {
        if node.bitmap(name).is_ok() {
            return Ok(node);
        }
        at = node.backing();
    }
    Err(Failure::generic(format!("Bitmap '{name}' is not found")))
}
