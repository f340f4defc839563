//! `liveblkd`.
fn main() {}
