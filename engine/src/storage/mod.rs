//! Where bytes live below an image: a file, or memory.
//!
//! Storage is positional and byte-addressed: callers may use any offset and length, alignment is
//! handled here. Short transfers are retried; reads beyond the end give zeroes. Operations start
//! when the method is called, not when the future is polled, so a batch is: call all, await each.

mod file;
mod lock;
mod memory;
mod paths;
mod place;
mod share;
mod watch;

pub use file::{DiscardStats, File, FileOptions, IoFuture};
pub use lock::LockRequest;
pub use memory::{Memory, Traffic};
pub use paths::{PathFacts, is_folder, rename, stat, sync_folder_of, unlink};
pub use place::{Storage, StorageExtent};
pub use share::Sharing;
pub use watch::{Exceeded, Tell, WriteWatch};
