//! The part of the tests that the fuzz targets are made of.
#![allow(dead_code, reason = "the fuzz targets need a part of it")]

mod fuzz_bitmaps;
mod fuzz_packed;
mod fuzz_repair;
pub mod fuzzing;
mod ledger;
mod look;
mod marks;
mod mover;
mod play;
mod references;
mod specimen;
