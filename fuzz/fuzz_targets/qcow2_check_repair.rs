//! images with changed bytes, checked and repaired: see `liveblk_formats::qcow2::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| liveblk_fuzz::run("qcow2_check_repair", data));
