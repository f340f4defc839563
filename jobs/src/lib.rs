//! liveblk-jobs.
