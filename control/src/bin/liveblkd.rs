//! `liveblkd`: qemu-storage-daemon's command line and QMP on the engine of liveblk.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    liveblk_control::daemon::main()
}
