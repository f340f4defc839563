//! liveblk-control.
