//! bytes as a compressed cluster: see `liveblk_formats::qcow2::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: liveblk_fuzz::start("compressed_cluster"),
    |data: &[u8]| liveblk_fuzz::run("compressed_cluster", data)
);
