//! bytes as a compressed cluster: see `liveblk_formats::qcow2::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| liveblk_fuzz::run("compressed_cluster", data));
