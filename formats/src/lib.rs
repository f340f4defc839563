//! liveblk-formats.
