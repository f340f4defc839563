//! A new image file that gets its name only when it is complete and durable.
//!
//! Order: (1) the file that has the name already, if any, is locked for writing, so that an image
//! in use is not replaced; (2) the image is written under a temporary name in the same folder and
//! flushed; (3) rename; (4) the folder is synchronised. Whatever fails before (3), or a signal,
//! removes the temporary file and leaves the old one as it was. What is not a regular file (a block
//! device) cannot be replaced and is refused here.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};

use liveblk::Host;
use liveblk::engine::storage::{File, FileOptions, LockRequest, Storage, sync_folder_of};
use nix::sys::signal::{SigSet, Signal};

use super::failure::Failure;

/// Files to be removed when a signal ends the program.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A file that is being made.
pub(crate) struct NewFile {
    /// As the caller named it.
    name: String,
    target: PathBuf,
    temporary: PathBuf,
    /// The file that has the name, locked.
    old: Option<Rc<File>>,
}

impl NewFile {
    /// Takes the name `name`.
    ///
    /// # Errors
    /// If its folder does not exist, or it names something that is in use or no regular file.
    pub(crate) async fn reserve(host: &Host, name: &str) -> Result<Self, Failure> {
        let failed = |cause: &dyn std::fmt::Display| {
            Failure::new(format!("{name}: Could not create '{name}': {cause}"))
        };
        // A symbolic link stays; what it leads to is replaced.
        let target = std::fs::canonicalize(name).unwrap_or_else(|_| PathBuf::from(name));
        let mut old = None;
        match std::fs::metadata(&target) {
            Ok(facts) if facts.is_file() => old = Some(lock(host, name, &target).await?),
            Ok(_) => {
                return Err(failed(
                    &"it exists and is not a regular file (with convert, -n writes \
                                    into it)",
                ));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(&kind(&error))),
        }
        let Some(last) = target.file_name() else { return Err(failed(&"it names no file")) };
        let unique = host.core().random();
        let temporary =
            target.with_file_name(format!(".{}.{unique:016x}.new", last.to_string_lossy()));
        let folder = folder_of(&target);
        if let Err(error) = std::fs::metadata(&folder) {
            return Err(failed(&kind(&error)));
        }
        unfinished().push(temporary.clone());
        Ok(Self { name: name.to_owned(), target, temporary, old })
    }

    /// Makes the (empty) file.
    ///
    /// # Errors
    /// What the system reports.
    pub(crate) async fn make(&self, host: &Host) -> Result<Storage, Failure> {
        let options = FileOptions {
            path: self.temporary.clone(),
            writable: true,
            create_new: true,
            ..FileOptions::default()
        };
        let file = File::open(host.core(), options).await;
        let name = &self.name;
        file.map(Storage::File).map_err(|error| {
            Failure::new(format!("{name}: Could not create '{name}': {}", error.kind()))
        })
    }

    /// Where the file is until it is finished.
    pub(crate) fn path(&self) -> &Path {
        &self.temporary
    }

    /// A text for people in which the file has its final name.
    pub(crate) fn renamed(&self, failure: Failure) -> Failure {
        let text = failure.text.replace(&self.temporary.display().to_string(), &self.name);
        Failure { text, ..failure }
    }

    /// Gives the file its name; durable when it returns.
    ///
    /// # Errors
    /// What the system reports; if only the last step fails the new file has its name already.
    pub(crate) async fn finish(self, host: &Host) -> Result<(), Failure> {
        let (from, to) = (self.temporary.clone(), self.target.clone());
        let replaces = self.old.is_some();
        let renamed = host.core().work(move || {
            if replaces {
                // As when the old file is written over: who may read it does not change.
                let permissions = std::fs::metadata(&to)?.permissions();
                std::fs::set_permissions(&from, permissions)?;
            }
            std::fs::rename(&from, &to)
        });
        let failed = |cause: &dyn std::fmt::Display| {
            Failure::new(format!("{}: Could not create '{}': {cause}", self.name, self.name))
        };
        renamed.await.map_err(|error| failed(&kind(&error)))?;
        unfinished().retain(|path| *path != self.temporary);
        let synced = sync_folder_of(host.core(), &self.target).await;
        synced.map_err(|error| failed(&error))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        let mut files = unfinished();
        if files.contains(&self.temporary) {
            files.retain(|path| *path != self.temporary);
            // It may not exist yet; nothing can be done about another failure.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Removes a file at the end unless it is kept: a data file that was made for an image.
pub(crate) struct SideFile(Option<PathBuf>);

impl SideFile {
    /// Will remove `path`.
    pub(crate) fn new(path: PathBuf) -> Self {
        unfinished().push(path.clone());
        Self(Some(path))
    }

    /// The file stays.
    pub(crate) fn keep(mut self) {
        if let Some(path) = self.0.take() {
            unfinished().retain(|held| *held != path);
        }
    }
}

impl Drop for SideFile {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            unfinished().retain(|held| *held != path);
            // As above.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Makes signals that end the program remove unfinished files first. Before any thread starts.
pub(crate) fn watch_signals() {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    if signals.thread_block().is_err() {
        return;
    }
    std::thread::spawn(move || {
        let Ok(signal) = signals.wait() else { return };
        for path in unfinished().iter() {
            // Nothing can be done about a failure.
            let _ = std::fs::remove_file(path);
        }
        std::process::exit(128 + signal as i32);
    });
}

fn unfinished() -> std::sync::MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn lock(host: &Host, name: &str, target: &Path) -> Result<Rc<File>, Failure> {
    let options = FileOptions { path: target.into(), locking: true, ..FileOptions::default() };
    let failed =
        |error: liveblk::Error| Failure::new(format!("{name}: Could not create '{name}': {error}"));
    let file = File::open(host.core(), options).await.map_err(failed)?;
    file.lock(LockRequest::Write).await.map_err(failed)?;
    Ok(file)
}

fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// An error of the standard library in the engine's words.
pub(crate) fn kind(error: &std::io::Error) -> liveblk::ErrorKind {
    liveblk::ErrorKind::from_errno(error.raw_os_error().unwrap_or(libc::EIO))
}
