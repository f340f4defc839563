//! images with changed bytes, checked and repaired: see `liveblk_formats::qcow2::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: liveblk_fuzz::start("qcow2_check_repair"),
    |data: &[u8]| liveblk_fuzz::run("qcow2_check_repair", data)
);
