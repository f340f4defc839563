//! liveblk-exports.
