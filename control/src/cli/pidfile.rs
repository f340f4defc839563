//! The pid file.
//!
//! Owns: its lock, content and removal. Promises: at most one live process holds the lock; mode is
//! 0600; the file is removed when the value is dropped.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};

use crate::monitor::system_text;

/// A locked pid file.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    /// Holds the lock.
    _file: File,
}

impl PidFile {
    /// Creates or takes over the file and writes our process id. The error is the whole text.
    pub fn create(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        let fail = |text: String| format!("cannot create PID file: {text}");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|error| {
                fail(format!("Could not create '{shown}': {}", system_text(&error)))
            })?;
        let whole = nix::libc::flock {
            l_type: nix::libc::F_WRLCK as i16,
            l_whence: nix::libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_OFD_SETLK(&whole)).map_err(|errno| {
            fail(format!("Cannot lock pid file: {}", system_text(&errno.into())))
        })?;
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(|error| fail(format!("Failed to write pid file: {}", system_text(&error))))?;
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Ok(Self { path, _file: file })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Nobody is left who could be told.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_refused_and_the_file_goes_with_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let first = PidFile::create(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, format!("{}\n", std::process::id()));
        let error = PidFile::create(&path).unwrap_err();
        assert_eq!(
            error,
            "cannot create PID file: Cannot lock pid file: Resource temporarily unavailable"
        );
        drop(first);
        assert!(!path.exists());
    }
}
