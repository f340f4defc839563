//! an image, damage, and requests, against the model: see `liveblk_formats::qcow2::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: liveblk_fuzz::start("qcow2_io"),
    |data: &[u8]| liveblk_fuzz::run("qcow2_io", data)
);
