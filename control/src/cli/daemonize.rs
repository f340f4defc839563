//! Going to the background.
//!
//! Owns: the hand-over from the process that was started to the one that stays. Order rules: the
//! started process runs the same command line again as a child in a session of its own; the child
//! does all start-up with standard error still attached; when it is ready it says so on a pipe, and
//! only then the parent exits 0. If the child ends before, the parent exits with its status.
//! The process is started anew instead of forked because threads and rings do not survive a fork.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::unistd::{chdir, dup2_stderr, dup2_stdin, dup2_stdout, setsid};

/// Set for the child; its value is the parent's process id, so that it means nothing elsewhere.
const MARK: &str = "LIVEBLKD_BACKGROUND_OF";

/// The byte that says "ready".
const READY: u8 = b'r';

/// Which side of the hand-over this process is.
#[derive(Debug)]
pub enum Launch {
    /// The parent; it exits with this status.
    Parent(u8),
    /// The process that stays, to be told when start-up is done.
    Daemon(Readiness),
}

/// What the process that stays owes its parent.
#[derive(Debug)]
#[must_use]
pub struct Readiness {
    detaches: bool,
}

/// Starts the background process, or recognises that this is it. Without `--daemonize` the process
/// just stays.
pub fn launch(daemonize: bool, program: &str, words: &[String]) -> io::Result<Launch> {
    if !daemonize {
        return Ok(Launch::Daemon(Readiness { detaches: false }));
    }
    let parent = std::os::unix::process::parent_id().to_string();
    if std::env::var(MARK).is_ok_and(|mark| mark == parent) {
        setsid()?;
        return Ok(Launch::Daemon(Readiness { detaches: true }));
    }
    let mut child = Command::new("/proc/self/exe")
        .arg0(program)
        .args(words)
        .env(MARK, std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut byte = [0];
    let ready = match child.stdout.take() {
        Some(mut pipe) => matches!(pipe.read(&mut byte), Ok(1)) && byte == [READY],
        None => false,
    };
    if ready {
        return Ok(Launch::Parent(0));
    }
    let status = child.wait()?;
    Ok(Launch::Parent(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}

impl Readiness {
    /// Start-up is done: in the background, detach from terminal and folder and tell the parent.
    pub fn report(self) -> io::Result<()> {
        if !self.detaches {
            return Ok(());
        }
        chdir(Path::new("/"))?;
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
        dup2_stdin(&null)?;
        dup2_stderr(&null)?;
        let mut pipe = io::stdout();
        pipe.write_all(&[READY])?;
        pipe.flush()?;
        dup2_stdout(&null)?;
        Ok(())
    }
}
