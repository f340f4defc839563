//! Cache modes of `-t` and `-T`, in QEMU's words.

use super::failure::Failure;

/// Whether files are read and written past the page cache; the rest of a mode changes nothing here,
/// because what was written is always flushed before success is told.
pub(crate) fn is_direct(mode: Option<&str>, what: &str) -> Result<bool, Failure> {
    match mode {
        Some("none" | "off" | "directsync") => Ok(true),
        None | Some("writeback" | "writethrough" | "unsafe") => Ok(false),
        Some(other) => Err(Failure::new(format!(
            "Invalid {what} option: {other} (there are none, directsync, writeback, writethrough \
             and unsafe)"
        ))),
    }
}
