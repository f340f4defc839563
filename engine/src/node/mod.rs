//! Nodes: images that can be read and written, and the requests on them.
//!
//! Order of one write, write-zeroes or discard on a node:
//! 1. throttle: a guest's write waits as long as a hook says (a job that is to catch up);
//! 2. gate: requests of external origin wait while a cut runs, and find out afterwards which node
//!    their attachment points to;
//! 3. node claim on the byte range, in order of arrival;
//! 4. pre-hooks (copy-before-write, durable intent), which may wait;
//! 5. data: copy-on-write fill and the bytes themselves (or blocks of another file, see `share`),
//!    and beside them what hooks do with the same bytes (an active mirror's target); memory that a
//!    guest can still change is copied first;
//! 6. mapping: the format's guard is completed;
//! 7. post-hooks and named dirty bitmaps, synchronous, also after a failure;
//! 8. claim released, answer.
//!
//! A request is a task of its node: callers hold a receipt, and dropping it cancels nothing.

mod account;
mod active;
mod attachment;
mod bitmap_error;
mod bitmap_follow;
mod bitmap_hold;
mod bitmap_verbs;
mod bitmaps;
mod chain;
mod fill;
mod gate;
mod hooks;
mod map;
mod object;
mod packed;
mod path;
mod places;
mod plain;
mod reads;
mod request;
mod resize;
mod share;
mod status;
mod transfer;
mod users;
mod view;
mod writers;

pub use account::{NodeStats, WorkStats};
pub use attachment::Disk;
pub use bitmap_error::BitmapError;
pub use bitmap_hold::BitmapHold;
pub use bitmap_verbs::BitmapSources;
pub use bitmaps::{BitmapAccess, BitmapFacts, NewBitmap, NodeBitmap};
pub use chain::ChainStats;
pub use hooks::{HookId, WriteContent, WriteCopy, WriteHook};
pub use map::MapExtent;
pub use object::{DetectZeroes, Node, NodeId, NodeOptions};
pub use request::{Origin, Receipt, WriteFlags, ZeroFlags};
pub use share::{ShareRight, ShareTurn, Shared};
pub use status::{StatusExtent, StatusKind};
pub use users::{Conflict, Permissions, Role, User, UserGuard};
pub use view::View;
pub use writers::KeptWritable;

pub(crate) use bitmap_verbs::load_bitmaps;
pub(crate) use bitmaps::LoadedBitmap;
pub(crate) use object::NodeParts;
pub(crate) use path::Path;
pub(crate) use plain::Plain;
pub(crate) use view::ViewFormat;
