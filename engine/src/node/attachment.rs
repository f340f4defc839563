//! Attachments: what a guest, an export or an embedder holds, while the node below may change.
//!
//! A cut moves the attachments of a node to another one (snapshot: to the overlay; pivot: to the
//! mirror's target). Requests that wait at the gate meanwhile go to the new node.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::object::Node;
use super::request::{self, Receipt, Target, WriteFlags, ZeroFlags};
use super::status::StatusExtent;
use super::users::{Permissions, User, UserGuard};
use crate::buf::Buf;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::{Class, Core, JoinHandle};
use crate::format::ZeroMode;

/// The shared part of a [`Disk`].
#[derive(Debug)]
pub(crate) struct Attachment {
    node: RefCell<Rc<Node>>,
    user: RefCell<UserGuard>,
    writable: Cell<bool>,
}

impl Attachment {
    pub(super) fn node(&self) -> Rc<Node> {
        Rc::clone(&self.node.borrow())
    }

    /// Whether a job may have its writes wait.
    pub(super) fn may_be_delayed(&self) -> bool {
        self.node.borrow().hooks.may_delay_guests()
    }

    /// Points to `to` from now on. Only inside a cut of both nodes.
    pub(crate) fn move_to(self: &Rc<Self>, to: &Rc<Node>) {
        let guard = {
            let user = self.user.borrow();
            to.users.transfer(to, &user)
        };
        *self.user.borrow_mut() = guard;
        *self.node.borrow_mut() = Rc::clone(to);
        to.attachments.borrow_mut().push(Rc::downgrade(self));
    }
}

/// A virtual disk as its user sees it; follows snapshots and pivots. Cheap to clone, `!Send`.
#[derive(Clone, Debug)]
pub struct Disk {
    core: Core,
    attachment: Rc<Attachment>,
}

impl Disk {
    /// Attaches `user` to `node`.
    ///
    /// # Errors
    /// `Busy` if other users exclude what is wanted; `ReadOnly` if `writable` is asked of a
    /// read-only node.
    pub fn attach(node: &Rc<Node>, user: User, writable: bool) -> Result<Self> {
        let node = &node.served();
        if writable && !node.takes_writers() {
            return Err(Error::new(ErrorKind::ReadOnly, "attach").on(&node.name()));
        }
        let guard = Node::use_by(node, user, Permissions::of_guest(writable))?;
        Ok(Self::at(node, guard, writable))
    }

    /// Attaches `user` to `node`, which may be inactive, now and later: writes and flushes are
    /// refused then, and reads find what the file holds.
    ///
    /// # Errors
    /// As [`Disk::attach`]; an inactive node is writable if it would be so when it is active.
    pub fn attach_resting(node: &Rc<Node>, user: User, writable: bool) -> Result<Self> {
        let node = &node.served();
        if writable && !(node.takes_writers() || !node.is_active() && node.is_asked_writable()) {
            return Err(Error::new(ErrorKind::ReadOnly, "attach").on(&node.name()));
        }
        let guard = Node::use_resting(node, user, Permissions::of_guest(writable))?;
        Ok(Self::at(node, guard, writable))
    }

    fn at(node: &Rc<Node>, guard: UserGuard, writable: bool) -> Self {
        let attachment = Rc::new(Attachment {
            node: RefCell::new(Rc::clone(node)),
            user: RefCell::new(guard),
            writable: Cell::new(writable),
        });
        node.attachments.borrow_mut().push(Rc::downgrade(&attachment));
        Self { core: node.core().clone(), attachment }
    }

    /// The node that serves the disk now.
    pub fn node(&self) -> Rc<Node> {
        self.attachment.node()
    }

    /// The name of the node that serves the disk now.
    pub fn node_name(&self) -> Rc<str> {
        self.attachment.node().name()
    }

    /// Size in bytes, now.
    pub fn size(&self) -> u64 {
        self.attachment.node().size()
    }

    /// Whether this attachment allows writes.
    pub fn is_writable(&self) -> bool {
        self.attachment.writable.get()
    }

    /// The core that the disk lives on.
    pub fn core(&self) -> &Core {
        &self.core
    }

    fn target(&self) -> Target {
        Target::Attachment(Rc::clone(&self.attachment))
    }

    fn refused(&self, op: &'static str) -> Receipt {
        let error = Error::new(ErrorKind::ReadOnly, op).on(&self.node_name());
        self.core.spawn(Class::Guest, async move { Err(error) })
    }

    /// Reads `buf.len()` bytes at `offset` (bytes) into `buf`; keep a clone of it.
    pub fn read(&self, offset: u64, buf: Buf) -> Receipt {
        request::start_read(self.target(), &self.core, offset, buf)
    }

    /// Writes `buf` at `offset` (bytes).
    pub fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Receipt {
        if !self.is_writable() {
            return self.refused("write");
        }
        request::start_write(self.target(), &self.core, offset, buf, flags)
    }

    /// Makes `len` bytes at `offset` read as zeroes.
    pub fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Receipt {
        if !self.is_writable() {
            return self.refused("write zeroes");
        }
        let mode = if flags.may_unmap { ZeroMode::Unmap } else { ZeroMode::Keep };
        request::start_zero(self.target(), &self.core, offset, len, mode, flags)
    }

    /// Gives space back where the node's options allow.
    pub fn discard(&self, offset: u64, len: u64, fua: bool) -> Receipt {
        if !self.is_writable() {
            return self.refused("discard");
        }
        let flags = ZeroFlags { fua, ..ZeroFlags::default() };
        request::start_zero(self.target(), &self.core, offset, len, ZeroMode::Discard, flags)
    }

    /// Makes everything answered before the call durable.
    pub fn flush(&self) -> Receipt {
        request::start_flush(self.target(), &self.core)
    }

    /// What the range holds; runs cover it in order.
    pub fn block_status(&self, offset: u64, len: u64) -> JoinHandle<Result<Vec<StatusExtent>>> {
        request::start_status(self.target(), &self.core, offset, len)
    }
}
