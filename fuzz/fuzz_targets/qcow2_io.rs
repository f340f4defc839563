//! an image, damage, and requests, against the model: see `liveblk_formats::qcow2::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| liveblk_fuzz::run("qcow2_io", data));
