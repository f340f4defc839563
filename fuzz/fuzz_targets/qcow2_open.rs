//! bytes of a file, opened, checked, read and written: see `liveblk_formats::qcow2::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: liveblk_fuzz::start("qcow2_open"),
    |data: &[u8]| liveblk_fuzz::run("qcow2_open", data)
);
