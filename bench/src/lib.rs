//! Benches of liveblk; the crate itself is empty.
//!
//! - `benches/`: criterion benches of the engine without a front door;
//! - `qcow2_side_by_side.py`: qcow2 images beside `qemu-img bench`, with `examples/pattern.rs`;
//! - `side_by_side.py`: ours and qemu-storage-daemon interleaved, through NBD and QMP;
//! - `RESULTS.md`: what was measured, with the command.
