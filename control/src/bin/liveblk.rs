//! `liveblk`.
fn main() {}
