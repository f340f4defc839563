//! liveblk.
