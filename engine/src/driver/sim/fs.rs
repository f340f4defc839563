//! The simulated file system: names, files, capacity, and what a cut leaves of them.
//!
//! Folders exist when they are asked for. Names change in a journal per folder: a cut keeps some
//! beginning of it, at least what a sync of the folder covered. A file without a durable name is
//! gone after a cut, however well it was synced.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use super::file::{Content, Covered, SimFile};
use super::pages::PAGE;
use super::rng::Rng;
use crate::storage::Memory;

/// How a simulated file system behaves.
#[derive(Clone, Debug)]
pub struct FsConfig {
    /// Bytes that fit, in 4 KiB pages over all files; `None` for no limit.
    pub capacity: Option<u64>,
    /// Alignment of offset, length and memory that direct I/O demands.
    pub direct_align: u64,
    /// Whether a new name survives only after a sync of its folder. Otherwise a sync of the file
    /// itself is enough, as on ext4.
    pub folder_sync_needed: bool,
    /// Whether files can share blocks, of 4 KiB; otherwise nobody asks.
    pub shares: bool,
}

impl Default for FsConfig {
    fn default() -> Self {
        Self { capacity: None, direct_align: 512, folder_sync_needed: true, shares: false }
    }
}

/// A simulated file system; clones share it.
#[derive(Clone, Debug)]
pub struct SimFs(Rc<RefCell<FsState>>);

#[derive(Clone, Debug, Default)]
pub(super) struct FsState {
    pub(super) config: FsConfig,
    pub(super) files: BTreeMap<u64, SimFile>,
    pub(super) names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    journal: Vec<NameEntry>,
    next_inode: u64,
    /// Permissions that somebody outside is said to hold: (path, permission, shared).
    pub(super) conflicts: BTreeMap<PathBuf, (u8, bool)>,
}

#[derive(Clone, Debug)]
struct NameEntry {
    op: u64,
    folder: PathBuf,
    change: NameChange,
}

#[derive(Clone, Debug)]
enum NameChange {
    Link { path: PathBuf, inode: u64 },
    Unlink { path: PathBuf },
    Rename { from: PathBuf, to: PathBuf },
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            Self::Link { path, inode } => {
                names.insert(path.clone(), *inode);
            }
            Self::Unlink { path } => {
                names.remove(path);
            }
            Self::Rename { from, to } => {
                if let Some(inode) = names.remove(from) {
                    names.insert(to.clone(), inode);
                }
            }
        }
    }
}

impl SimFs {
    /// An empty file system.
    pub fn new(config: FsConfig) -> Self {
        Self::from_state(FsState { config, next_inode: 1, ..FsState::default() })
    }

    fn from_state(state: FsState) -> Self {
        Self(Rc::new(RefCell::new(state)))
    }

    pub(super) fn state(&self) -> std::cell::RefMut<'_, FsState> {
        self.0.borrow_mut()
    }

    /// Puts a file with `bytes` at `path`, durable at once; replaces what was there.
    pub fn create(&self, path: impl AsRef<Path>, bytes: &[u8]) {
        let mut content = Content { size: bytes.len() as u64, ..Content::default() };
        content.pages.write(0, bytes);
        // Pages of zeroes are holes, as an image-making tool would leave them.
        for (index, page) in (0_u64..).zip(bytes.chunks(4096)) {
            if page.iter().all(|byte| *byte == 0) {
                content.pages.zero(index * PAGE, (index + 1) * PAGE);
            }
        }
        let mut state = self.state();
        let inode = state.next_inode;
        state.next_inode += 1;
        state.files.insert(inode, SimFile::durable(content));
        let path = normal(path.as_ref());
        state.names.insert(path.clone(), inode);
        state.durable_names.insert(path, inode);
    }

    /// What the file reads as now.
    pub fn read(&self, path: impl AsRef<Path>) -> Option<Vec<u8>> {
        let state = self.0.borrow();
        let content = &state.file(path.as_ref())?.live;
        let mut bytes = vec![0; usize::try_from(content.size).ok()?];
        content.pages.read(0, &mut bytes);
        Some(bytes)
    }

    /// The file as it is now, as memory; its pages are shared until somebody writes.
    pub fn memory(&self, path: impl AsRef<Path>) -> Option<Rc<Memory>> {
        let state = self.0.borrow();
        let content = &state.file(path.as_ref())?.live;
        Some(Memory::from_pages(content.pages.all(), content.size))
    }

    /// Bytes of the file at `offset`; zeroes beyond its end. False if there is no such file.
    pub fn read_at(&self, path: impl AsRef<Path>, offset: u64, bytes: &mut [u8]) -> bool {
        let state = self.0.borrow();
        let Some(file) = state.file(path.as_ref()) else { return false };
        file.live.pages.read(offset, bytes);
        true
    }

    /// The file's size in bytes.
    pub fn size(&self, path: impl AsRef<Path>) -> Option<u64> {
        self.0.borrow().file(path.as_ref()).map(|file| file.live.size)
    }

    /// All files.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.0.borrow().names.keys().cloned().collect()
    }

    /// Writes the file, sparse, to `target` of the real file system.
    ///
    /// # Errors
    /// If it does not exist, or the real file cannot be written.
    pub fn export(&self, path: impl AsRef<Path>, target: impl AsRef<Path>) -> io::Result<()> {
        let state = self.0.borrow();
        let file = state.file(path.as_ref()).ok_or(io::ErrorKind::NotFound)?;
        let mut target = std::fs::File::create(target)?;
        target.set_len(file.live.size)?;
        let mut page = vec![0; 4096];
        for index in file.live.pages.present(0, file.live.size) {
            let len = PAGE.min(file.live.size - index * PAGE);
            let len = usize::try_from(len).expect("invariant: at most a page");
            file.live.pages.read(index * PAGE, &mut page[..len]);
            target.seek(SeekFrom::Start(index * PAGE))?;
            target.write_all(&page[..len])?;
        }
        Ok(())
    }

    /// Changes the capacity in bytes; `None` for no limit.
    pub fn set_capacity(&self, capacity: Option<u64>) {
        self.state().config.capacity = capacity;
    }

    /// Bytes in use, in whole pages.
    pub fn used(&self) -> u64 {
        self.0.borrow().used()
    }

    /// Lets lock requests for `path` find that somebody else holds `permission` against them
    /// (`shared`: the half that says others may not have it); `None` lets them succeed again.
    pub fn set_lock_conflict(&self, path: impl AsRef<Path>, conflict: Option<(u8, bool)>) {
        let path = normal(path.as_ref());
        let mut state = self.state();
        match conflict {
            Some(conflict) => state.conflicts.insert(path, conflict),
            None => state.conflicts.remove(&path),
        };
    }

    /// What a power cut now may leave, chosen by `seed`; this file system goes on unharmed.
    pub fn after_power_cut(&self, seed: u64) -> Self {
        Self::from_state(self.0.borrow().after_cut(&mut Rng::new(seed)))
    }

    /// Counts changes of what is live and of what is durable, over all files.
    pub fn revision(&self) -> u64 {
        let state = self.0.borrow();
        state.files.values().map(SimFile::revision).sum::<u64>() + state.next_inode
    }

    /// Number of changes to files that are not durable.
    pub fn unflushed(&self) -> usize {
        self.0.borrow().files.values().map(SimFile::unflushed).sum()
    }

    /// What a power cut now leaves that keeps those unflushed changes that `keep` says (by number,
    /// files in the order of their making, oldest change first) and with them the earlier ones of
    /// the same sectors; names are as they are now.
    pub fn after_power_cut_keeping(&self, keep: impl Fn(usize) -> bool) -> Self {
        let state = self.0.borrow();
        let mut before = 0;
        let files = state.files.iter().map(|(inode, file)| {
            let content = file.after_cut_keeping(&mut |index| keep(before + index));
            before += file.unflushed();
            (*inode, SimFile::durable(content))
        });
        let files = files.collect();
        Self::from_state(state.restarted(files, state.names.clone()))
    }

    /// Removes the file at `path` at once and for good.
    pub fn remove(&self, path: impl AsRef<Path>) {
        let mut state = self.state();
        let path = normal(path.as_ref());
        state.durable_names.remove(&path);
        if let Some(inode) = state.names.remove(&path) {
            state.files.remove(&inode);
        }
    }

    /// What is left if the process is killed now but the machine lives: everything written.
    pub fn after_kill(&self) -> Self {
        let state = self.0.borrow();
        let files = state.files.iter();
        let files =
            files.map(|(inode, file)| (*inode, SimFile::durable(file.live.clone()))).collect();
        Self::from_state(state.restarted(files, state.names.clone()))
    }

    /// The same for those who go on and lose the power later: everything written shows, and what no
    /// sync covered is not durable yet.
    pub fn left_behind(&self) -> Self {
        let state = self.0.borrow();
        let files = state.files.iter();
        let files = files.map(|(inode, file)| (*inode, file.left_behind())).collect();
        Self::from_state(state.restarted(files, state.names.clone()))
    }

    /// Whether everything that was written to the file is durable, its name included.
    pub fn is_durable(&self, path: impl AsRef<Path>) -> bool {
        let state = self.0.borrow();
        let path = normal(path.as_ref());
        let (Some(live), Some(durable)) = (state.names.get(&path), state.durable_names.get(&path))
        else {
            return false;
        };
        live == durable && state.files.get(live).is_some_and(SimFile::is_clean)
    }
}

impl FsState {
    fn file(&self, path: &Path) -> Option<&SimFile> {
        self.files.get(self.names.get(&normal(path))?)
    }

    pub(super) fn used(&self) -> u64 {
        self.files.values().map(|file| file.live.pages.count()).sum::<u64>() * PAGE
    }

    /// Pages that can still be added.
    pub(super) fn free_pages(&self) -> u64 {
        let capacity = self.config.capacity;
        capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(self.used()) / PAGE)
    }

    pub(super) fn is_folder(&self, path: &Path) -> bool {
        self.names.keys().any(|name| name != path && name.starts_with(path))
    }

    /// Makes a new file; its name is not durable yet.
    pub(super) fn link_new(&mut self, op: u64, path: &Path) -> u64 {
        let inode = self.next_inode;
        self.next_inode += 1;
        self.files.insert(inode, SimFile::default());
        let path = path.to_path_buf();
        self.change(op, folder_of(&path), NameChange::Link { path, inode });
        inode
    }

    pub(super) fn unlink(&mut self, op: u64, path: &Path) {
        let path = path.to_path_buf();
        self.change(op, folder_of(&path), NameChange::Unlink { path });
    }

    pub(super) fn rename(&mut self, op: u64, from: &Path, to: &Path) {
        let change = NameChange::Rename { from: from.to_path_buf(), to: to.to_path_buf() };
        self.change(op, folder_of(to), change);
    }

    fn change(&mut self, op: u64, folder: PathBuf, change: NameChange) {
        change.apply(&mut self.names);
        self.journal.push(NameEntry { op, folder, change });
    }

    /// A sync of a folder: its journal up to the last covered entry becomes durable.
    pub(super) fn sync_folder(&mut self, folder: &Path, covered: &Covered) {
        let last = self
            .journal
            .iter()
            .rposition(|entry| entry.folder == folder && covered.covers(entry.op));
        let Some(last) = last else { return };
        self.settle(folder, last);
    }

    /// A sync of a file; in the lenient variant its name becomes durable too.
    pub(super) fn sync_file(&mut self, inode: u64, covered: &Covered) {
        if let Some(file) = self.files.get_mut(&inode) {
            file.sync(covered);
        }
        if self.config.folder_sync_needed {
            return;
        }
        let made = self.journal.iter().rposition(
            |entry| matches!(entry.change, NameChange::Link { inode: made, .. } if made == inode),
        );
        if let Some(index) = made {
            let folder = self.journal[index].folder.clone();
            self.settle(&folder, index);
        }
    }

    /// Makes the folder's part of the journal durable up to entry `last`.
    fn settle(&mut self, folder: &Path, last: usize) {
        let mut index = 0;
        let durable = &mut self.durable_names;
        self.journal.retain(|entry| {
            let take = index <= last && entry.folder == folder;
            index += 1;
            if take {
                entry.change.apply(durable);
            }
            !take
        });
    }

    fn after_cut(&self, rng: &mut Rng) -> Self {
        let mut names = self.durable_names.clone();
        let folders: BTreeSet<&PathBuf> = self.journal.iter().map(|entry| &entry.folder).collect();
        let mut keep: BTreeMap<&PathBuf, u64> = BTreeMap::new();
        for folder in folders {
            let count = self.journal.iter().filter(|entry| entry.folder == *folder).count();
            keep.insert(folder, rng.below(count as u64 + 1));
        }
        for entry in &self.journal {
            let left = keep.get_mut(&entry.folder).expect("invariant: counted above");
            if *left > 0 {
                *left -= 1;
                entry.change.apply(&mut names);
            }
        }
        let named: BTreeSet<u64> = names.values().copied().collect();
        let mut files = BTreeMap::new();
        for (inode, file) in self.files.iter().filter(|(inode, _)| named.contains(inode)) {
            files.insert(*inode, SimFile::durable(file.after_cut(rng)));
        }
        self.restarted(files, names)
    }

    fn restarted(&self, files: BTreeMap<u64, SimFile>, names: BTreeMap<PathBuf, u64>) -> Self {
        Self {
            config: self.config.clone(),
            files,
            durable_names: names.clone(),
            names,
            journal: Vec::new(),
            next_inode: self.next_inode,
            conflicts: self.conflicts.clone(),
        }
    }
}

/// The path without `.` and `..`, resolved by name only.
pub(super) fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}

fn folder_of(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).to_path_buf()
}
