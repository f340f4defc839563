//! Who uses a node for what: permissions as in QEMU (`include/block/block-common.h`).
//!
//! Every user states what it does (`perm`) and what it tolerates from others (`shared`). A new user
//! is admitted only if nobody else excludes it and it excludes nobody.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::{Rc, Weak};

use super::object::Node;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::GraphError;

/// What a user does and what it lets others do; bits of the constants below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// Taken.
    pub perm: u8,
    /// Left to others.
    pub shared: u8,
}

impl Permissions {
    /// Reads that must be consistent.
    pub const CONSISTENT_READ: u8 = 1;
    /// Writes that change the visible content.
    pub const WRITE: u8 = 1 << 1;
    /// Writes that do not.
    pub const WRITE_UNCHANGED: u8 = 1 << 2;
    /// Changes of the size.
    pub const RESIZE: u8 = 1 << 3;
    /// Everything.
    pub const ALL: u8 = 15;

    /// A guest's front door: reads (and writes), lets others do anything but resize.
    pub const fn of_guest(writable: bool) -> Self {
        let write = if writable { Self::WRITE } else { 0 };
        Self { perm: Self::CONSISTENT_READ | write, shared: Self::ALL & !Self::RESIZE }
    }

    /// An overlay's use of its backing node. As in the peer others may write it as long as the
    /// overlay's own users do not mind (fleecing: the overlay keeps what is overwritten below).
    pub const fn of_overlay() -> Self {
        Self { perm: Self::CONSISTENT_READ, shared: Self::ALL & !Self::RESIZE }
    }

    /// A use that needs nothing and tolerates everything: an overlay that nobody reads, or one that
    /// a job looks after.
    pub const fn none() -> Self {
        Self { perm: 0, shared: Self::ALL }
    }

    /// A format's use of its file.
    pub const fn of_format(writable: bool) -> Self {
        let write = if writable { Self::WRITE | Self::RESIZE } else { 0 };
        let perm = Self::CONSISTENT_READ | write;
        Self { perm, shared: Self::CONSISTENT_READ | Self::WRITE_UNCHANGED }
    }
}

/// What a job does with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It is copied from.
    Source,
    /// It is copied to.
    Target,
    /// It lies between them in one chain.
    Between,
}

/// Who uses a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// A front door or an embedder, by name.
    Guest {
        /// The export's id, or what the embedder calls itself; empty for a command's own use.
        name: Rc<str>,
    },
    /// The node called `node` has it as its backing node.
    Overlay {
        /// The overlay's name.
        node: Rc<str>,
    },
    /// The node called `node` has it as its file.
    Format {
        /// The format node's name.
        node: Rc<str>,
    },
    /// The node called `node` has it as its external data file.
    Data {
        /// The format node's name.
        node: Rc<str>,
    },
    /// The filter node called `node` stands above it, or writes to it.
    Filter {
        /// The filter's name.
        node: Rc<str>,
        /// What it does with the node.
        role: Role,
    },
    /// A job.
    Job {
        /// The job's id.
        id: Rc<str>,
        /// The job's type ("mirror", "backup").
        kind: &'static str,
        /// What it does with the node.
        role: Role,
    },
}

impl User {
    /// The name of the edge in messages.
    const fn edge(&self) -> &'static str {
        match self {
            Self::Guest { .. } => "root",
            Self::Overlay { .. } => "backing",
            Self::Format { .. } => "file",
            Self::Data { .. } => "data-file",
            Self::Filter { role: Role::Target, .. } => "target",
            Self::Filter { .. } => "file",
            Self::Job { role: Role::Source, .. } => "main node",
            Self::Job { role: Role::Target, .. } => "target",
            Self::Job { role: Role::Between, .. } => "intermediate node",
        }
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest { name } if name.is_empty() => f.write_str("an unnamed block device"),
            Self::Guest { name } => write!(f, "block device '{name}'"),
            Self::Overlay { node }
            | Self::Format { node }
            | Self::Data { node }
            | Self::Filter { node, .. } => {
                write!(f, "node '{node}'")
            }
            Self::Job { id, .. } => write!(f, "block job '{id}'"),
        }
    }
}

#[derive(Clone, Debug)]
struct Entry {
    id: u64,
    user: User,
    permissions: Permissions,
    /// Whether the node may be inactive under it.
    rests: bool,
}

/// The users of a node.
#[derive(Debug, Default)]
pub(crate) struct Users {
    entries: RefCell<Vec<Entry>>,
    next: Cell<u64>,
}

/// A use of a node; ends when dropped.
#[derive(Debug)]
#[must_use = "dropping it ends the use"]
pub struct UserGuard {
    node: Weak<Node>,
    id: u64,
}

impl Users {
    fn insert(&self, node: &Rc<Node>, user: User, permissions: Permissions) -> UserGuard {
        let id = self.next.get();
        self.next.set(id + 1);
        self.entries.borrow_mut().push(Entry { id, user, permissions, rests: false });
        UserGuard { node: Rc::downgrade(node), id }
    }

    /// The same user with the same permissions on the node that these users belong to. Only inside
    /// a
    /// cut, where the caller has made sure that it fits.
    pub(super) fn transfer(&self, node: &Rc<Node>, guard: &UserGuard) -> UserGuard {
        let entry = guard.node.upgrade().and_then(|old| {
            old.users.entries.borrow().iter().find(|entry| entry.id == guard.id).cloned()
        });
        let entry = entry.expect("invariant: the guard of a use is held as long as the use");
        let moved = self.insert(node, entry.user, entry.permissions);
        if entry.rests {
            moved.rest();
        }
        moved
    }
}

impl UserGuard {
    /// Whether it is a use of `node`.
    pub fn is_use_of(&self, node: &Node) -> bool {
        self.node.upgrade().is_some_and(|used| used.id() == node.id())
    }

    /// Whether it is an overlay's use of the backing node `node`.
    pub(crate) fn is_backing_use_of(&self, node: &Node) -> bool {
        self.node.upgrade().is_some_and(|used| {
            let entries = used.users.entries.borrow();
            let own = entries.iter().find(|entry| entry.id == self.id);
            used.id() == node.id()
                && own.is_some_and(|entry| matches!(entry.user, User::Overlay { .. }))
        })
    }

    /// The node may be inactive under this use from now on.
    fn rest(&self) {
        let Some(node) = self.node.upgrade() else { return };
        let mut entries = node.users.entries.borrow_mut();
        if let Some(entry) = entries.iter_mut().find(|entry| entry.id == self.id) {
            entry.rests = true;
        }
    }

    /// Changes what this use needs and tolerates. The caller makes sure that it fits.
    pub(crate) fn set_permissions(&self, permissions: Permissions) {
        let Some(node) = self.node.upgrade() else { return };
        let mut entries = node.users.entries.borrow_mut();
        if let Some(entry) = entries.iter_mut().find(|entry| entry.id == self.id) {
            entry.permissions = permissions;
        }
    }
}

impl Node {
    /// Admits a user.
    ///
    /// # Errors
    /// `Busy` with a [`Conflict`] if another user excludes it, or if the content of the node means
    /// nothing any more ([`Node::is_stale`]).
    pub fn use_by(node: &Rc<Self>, user: User, permissions: Permissions) -> Result<UserGuard> {
        node.check_stale(permissions)?;
        Self::use_unseen(node, user, permissions)
    }

    /// Refuses readers of content that means nothing any more.
    fn check_stale(&self, permissions: Permissions) -> Result<()> {
        if self.is_stale() && permissions.perm & Permissions::CONSISTENT_READ != 0 {
            let source = GraphError::Stale(self.name().to_string());
            return Err(Error::new(ErrorKind::Busy, "use").with_source(source));
        }
        Ok(())
    }

    /// Admits a user who lets the node be inactive, now and later: it can only read then.
    ///
    /// # Errors
    /// As [`Node::use_by`].
    pub(crate) fn use_resting(
        node: &Rc<Self>,
        user: User,
        permissions: Permissions,
    ) -> Result<UserGuard> {
        node.check_stale(permissions)?;
        let guard = Self::admit(node, user, permissions)?;
        guard.rest();
        Ok(guard)
    }

    /// Whether a front door or a job has the node that does not let it be inactive.
    pub fn is_held_active(&self) -> bool {
        let entries = self.users.entries.borrow();
        entries.iter().any(|entry| match entry.user {
            User::Guest { .. } => !entry.rests,
            User::Job { .. } => true,
            _ => false,
        })
    }

    /// Admits a user who vouches that what the node lost its meaning by does not show through it.
    ///
    /// # Errors
    /// `Busy` with a [`Conflict`] if another user excludes it.
    pub(crate) fn use_unseen(
        node: &Rc<Self>,
        user: User,
        permissions: Permissions,
    ) -> Result<UserGuard> {
        node.check_active_for(&user, permissions)?;
        Self::admit(node, user, permissions)
    }

    /// Lets a user in whom nobody excludes.
    fn admit(node: &Rc<Self>, user: User, permissions: Permissions) -> Result<UserGuard> {
        if let Some(conflict) = conflict(node, &user, permissions) {
            return Err(Error::new(ErrorKind::Busy, "use").with_source(conflict));
        }
        Ok(node.users.insert(node, user, permissions))
    }

    /// An inactive image is written by another process: nobody here writes it, no job reads it.
    fn check_active_for(&self, user: &User, permissions: Permissions) -> Result<()> {
        if self.is_active() {
            return Ok(());
        }
        if permissions.perm & Permissions::WRITE != 0 {
            return Err(GraphError::InactivePermission("write").into());
        }
        match user {
            User::Job { id, .. } => {
                let (child, parent) = (self.name().to_string(), id.to_string());
                Err(GraphError::InactiveChild { child, edge: "file", parent }.into())
            }
            _ => Ok(()),
        }
    }

    /// The same user with the same permissions at `node`. Only inside a cut of both nodes, where
    /// the caller has made sure that it fits.
    ///
    /// # Panics
    /// If the use has ended: a programming error.
    pub fn carry_use(node: &Rc<Self>, guard: &UserGuard) -> UserGuard {
        node.users.transfer(node, guard)
    }

    /// Everybody who uses the node now.
    pub fn users(&self) -> Vec<User> {
        self.users.entries.borrow().iter().map(|entry| entry.user.clone()).collect()
    }

    /// Everybody who uses the node now, with what they do.
    pub fn uses(&self) -> Vec<(User, Permissions)> {
        let entries = self.users.entries.borrow();
        entries.iter().map(|entry| (entry.user.clone(), entry.permissions)).collect()
    }
}

/// The conflict that the peer names: first what the new user excludes, then who excludes it, the
/// latest of the others first.
fn conflict(node: &Node, user: &User, permissions: Permissions) -> Option<Conflict> {
    let entries = node.users.entries.borrow();
    let excluded = entries.iter().rev().find_map(|other| {
        let refused = other.permissions.perm & !permissions.shared;
        (refused != 0).then(|| Conflict::new(node, refused, &other.user, user))
    });
    excluded.or_else(|| {
        entries.iter().rev().find_map(|other| {
            let denied = permissions.perm & !other.permissions.shared;
            (denied != 0).then(|| Conflict::new(node, denied, user, &other.user))
        })
    })
}

impl Drop for UserGuard {
    fn drop(&mut self) {
        if let Some(node) = self.node.upgrade() {
            node.users.entries.borrow_mut().retain(|entry| entry.id != self.id);
        }
    }
}

/// Two users of a node exclude each other; the text is the peer's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    node: String,
    permissions: String,
    needed_by: (String, &'static str),
    unshared_by: (String, &'static str),
}

impl Conflict {
    fn new(node: &Node, permissions: u8, needed_by: &User, unshared_by: &User) -> Self {
        const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];
        let names: Vec<&str> = NAMES
            .iter()
            .enumerate()
            .filter(|(bit, _)| permissions & (1 << bit) != 0)
            .map(|(_, name)| *name)
            .collect();
        Self {
            node: node.name().to_string(),
            permissions: names.join(", "),
            needed_by: (needed_by.to_string(), needed_by.edge()),
            unshared_by: (unshared_by.to_string(), unshared_by.edge()),
        }
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, permissions, needed_by, unshared_by } = self;
        write!(
            f,
            "Permission conflict on node '{node}': permissions '{permissions}' are both required \
             by {} (uses node '{node}' as '{}' child) and unshared by {} (uses node '{node}' as \
             '{}' child).",
            needed_by.0, needed_by.1, unshared_by.0, unshared_by.1
        )
    }
}

impl std::error::Error for Conflict {}
