//! images whose bitmaps are overwritten: see `liveblk_formats::qcow2::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: liveblk_fuzz::start("bitmap_dir"),
    |data: &[u8]| liveblk_fuzz::run("bitmap_dir", data)
);
