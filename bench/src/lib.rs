//! liveblk-bench.
