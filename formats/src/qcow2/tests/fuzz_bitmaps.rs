//! What the fuzz target `bitmap_dir` runs: images of ours whose bitmap extension, directory, tables
//! and bits are overwritten, opened and used the way everybody does.
//!
//! The first byte of an input chooses the image (low two bits) and the kind. From 128 on, the next
//! two bytes are the count in the header and the rest is the directory. Else come changes of 12
//! bytes each: what (1: header, extension, directory, a table, bits), where in it (2), how wide
//! (1; with 64 set the value is the number of a cluster), what with (8).
//!
//! Promises: no panic; a list is the same read-only and writable; bits that load are for this disk
//! and of the granularity that is listed; a file grows by what the changes need and no more; what
//! was not damaged loads as it was stored. Memory is bounded by the limit of the fuzzer.

use std::collections::BTreeMap;
use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::buf::Buf;
use liveblk_engine::driver::sim::Rng;
use liveblk_engine::executor::Core;
use liveblk_engine::format::ZeroMode;
use liveblk_engine::storage::{Memory, Storage};

use super::fuzzing::{Input, Session};
use super::mover::{Disk, open};
use crate::qcow2::{CreateOptions, check, create};

/// Cluster bits and size of the images: small, usual, tiny clusters, and a large disk whose finest
/// bitmap has a table of some hundred entries.
const IMAGES: [(u32, u64); 4] = [(12, 1 << 20), (16, 64 << 20), (9, 1 << 19), (12, 1 << 32)];

/// Changes of one input.
const CHANGES_MAX: usize = 64;

/// Bitmaps of one image that are loaded.
const LOADS_MAX: usize = 24;

/// Bytes by which a file may grow.
const GROWTH_MAX: u64 = 8 << 20;

/// Type of the header extension.
const EXTENSION: u64 = 0x2385_2875;

/// Found by the fuzzer: images took their refcount block, and their refcount table, for ones far
/// behind the end of the file, and grew that far.
const BEHIND_THE_END: [[u8; 13]; 2] = [
    [2, 0, 255, 255, 3, 255, 255, 0, 0, 0, 0, 0, 255],
    [0, 0, 47, 0, 67, 31, 25, 0, 0, 0, 0, 0, 0],
];

/// An image and where its parts are.
#[derive(Debug)]
pub(super) struct Base {
    /// Never changed: inputs change copies, which share what they leave as it is.
    memory: Rc<Memory>,
    cluster_bits: u32,
    /// Start and length of what inputs change.
    places: Vec<(usize, usize)>,
    bits: BTreeMap<String, DirtyBitmap>,
}

/// Which of [`Base::places`] is the extension's data, and which the directory.
const POINTER: usize = 1;
const DIRECTORY: usize = 2;

fn number(bytes: &[u8], at: usize, width: usize) -> u64 {
    bytes[at..at + width].iter().fold(0, |all, byte| all << 8 | u64::from(*byte))
}

impl Base {
    /// Bitmaps of several granularities, recording and not, with bits in data clusters, all set and
    /// all clear.
    async fn new(core: Core, cluster_bits: u32, size: u64) -> Self {
        let memory = Memory::new(0);
        let storage = Storage::Memory(Rc::clone(&memory));
        let options = CreateOptions { cluster_size: 1 << cluster_bits, ..CreateOptions::new(size) };
        create(&core, &storage, options).await.expect("a new image");
        let disk = open(&core, storage, true).await.expect("a new image opens");
        let set = disk.format.abilities().bitmaps.expect("qcow2 has bitmaps");
        let written = GuestRange::new(size / 2, 4096);
        let mut bits = BTreeMap::new();
        for (name, granularity, fill, enabled) in [
            ("recording", 512, false, true),
            ("coarse", 65_536, true, true),
            ("all", 4096, true, false),
            ("clean", 1 << 20, false, false),
        ] {
            let mut new = DirtyBitmap::new(size, granularity);
            if fill {
                new.set_all();
            }
            set.store(name, new.clone(), enabled).await.expect("is stored");
            if enabled {
                new.set_range(written);
            }
            bits.insert(name.to_owned(), new);
        }
        disk.write(written.start.bytes(), &[1; 4096]).await.expect("is written");
        disk.format.close().await.expect("closes");
        let mut new = Self { memory, cluster_bits, places: Vec::new(), bits };
        new.locate();
        new
    }

    fn locate(&mut self) {
        let bytes = &self.memory.to_bytes();
        let word = |at, width| number(bytes, at, width) as usize;
        let mut at = word(100, 4);
        while number(bytes, at, 4) != EXTENSION {
            assert_ne!(number(bytes, at, 4), 0, "the image has bitmaps");
            at += 8 + word(at + 4, 4).next_multiple_of(8);
        }
        let pointer = at + 8;
        let (len, directory) = (word(pointer + 8, 8), word(pointer + 16, 8));
        self.places = vec![(0, 512), (pointer, 24), (directory, len)];
        let mut at = directory;
        while at < directory + len {
            let (table, entries) = (word(at, 8), word(at + 8, 4));
            self.places.push((table, entries * 8));
            let host = word(table, 8);
            if host > 1 {
                self.places.push((host, 1 << self.cluster_bits));
            }
            at += (24 + word(at + 20, 4) + word(at + 18, 2)).next_multiple_of(8);
        }
    }

    /// Writes the low bytes of `value` to a copy.
    fn set(image: &Memory, at: usize, width: usize, value: u64) {
        put(image, at, &value.to_be_bytes()[8 - width..]);
    }

    fn change(&self, image: &Memory, input: &mut Input<'_>) {
        let (start, len) = self.places[usize::from(input.byte()) % self.places.len()];
        let at = start + usize::from(input.short()) % len;
        let width = input.byte();
        let value = input.long();
        let value = if width & 64 == 0 { value } else { (value & 63) << self.cluster_bits };
        Self::set(image, at, 1 << (width & 3), value);
    }

    fn replace_directory(&self, image: &Memory, input: &mut Input<'_>) {
        let count = u64::from(input.short());
        let (at, _) = self.places[DIRECTORY];
        let rest = input.rest();
        let rest = &rest[..rest.len().min(1 << self.cluster_bits)];
        let (pointer, _) = self.places[POINTER];
        Self::set(image, pointer, 4, count);
        Self::set(image, pointer + 8, 8, rest.len() as u64);
        put(image, at, rest);
    }
}

/// Writes `bytes` as far as the file goes.
fn put(image: &Memory, at: usize, bytes: &[u8]) {
    let room = (image.size() as usize).saturating_sub(at).min(bytes.len());
    if room > 0 {
        drop(image.write(at as u64, &Buf::from_vec(bytes[..room].to_vec())));
    }
}

/// The image of [`IMAGES`], made when it is first needed.
fn base(session: &mut Session, which: usize) -> Rc<Base> {
    if let Some(known) = session.bitmap_images.get(&which) {
        return Rc::clone(known);
    }
    let (cluster_bits, size) = IMAGES[which];
    let new = Rc::new(session.run(|core| Base::new(core, cluster_bits, size)));
    session.bitmap_images.insert(which, Rc::clone(&new));
    new
}

/// Runs one input.
pub(super) fn bitmap_dir(session: &mut Session, data: &[u8]) {
    let mut input = Input::new(data);
    let head = input.byte();
    let base = base(session, usize::from(head) % IMAGES.len());
    let image = base.memory.copy();
    let whole = input.is_empty();
    if head >= 128 {
        base.replace_directory(&image, &mut input);
    }
    for _ in 0..CHANGES_MAX {
        if input.is_empty() {
            break;
        }
        base.change(&image, &mut input);
    }
    let whole = whole && head < 128;
    session.run(|core| async move { keep_promises(&core, &base, image, whole).await });
}

async fn keep_promises(core: &Core, base: &Base, memory: Rc<Memory>, whole: bool) {
    let before = memory.copy();
    let storage = || Storage::Memory(Rc::clone(&memory));
    drop(check(core, &storage()).await);
    let mut listed = None;
    if let Ok(disk) = open(core, storage(), false).await {
        let loaded = load_all(&disk).await;
        assert!(!whole || loaded == base.bits, "what nobody damaged");
        listed = disk.format.abilities().bitmaps.map(|set| set.list());
        drop(disk.format.close().await);
    }
    assert!(!whole || listed.is_some(), "what nobody damaged opens");
    assert!(memory.is_like(&before), "a read-only image does not change");
    let Ok(disk) = open(core, storage(), true).await else { return };
    load_all(&disk).await;
    let again = disk.format.abilities().bitmaps.map(|set| set.list());
    assert!(listed.is_none() || listed == again, "{listed:?} {again:?}");
    change_all(&disk).await;
    drop(disk.format.flush().await);
    let closed = disk.format.close().await;
    assert!(!whole || closed.is_ok(), "{closed:?}");
    drop(disk);
    let grown = memory.size().saturating_sub(before.size());
    assert!(grown < GROWTH_MAX, "{grown} bytes more");
    if let Ok(disk) = open(core, storage(), false).await {
        load_all(&disk).await;
        drop(disk.format.close().await);
    }
}

/// The bitmaps that load.
async fn load_all(disk: &Disk) -> BTreeMap<String, DirtyBitmap> {
    let mut loaded = BTreeMap::new();
    let Some(set) = disk.format.abilities().bitmaps else { return loaded };
    for info in set.list().into_iter().take(LOADS_MAX) {
        let Ok(bits) = set.load(&info.name).await else { continue };
        assert!(!info.inconsistent, "{info:?} loads");
        let size = disk.format.size();
        assert_eq!(bits.size(), size);
        // Names of bytes that are no text may look the same.
        if !info.name.contains(char::REPLACEMENT_CHARACTER) {
            assert_eq!(bits.granularity(), info.granularity);
        }
        assert!(bits.dirty_bytes() <= size.next_multiple_of(bits.granularity()));
        loaded.insert(info.name, bits);
    }
    loaded
}

/// Writes, and every change of the set.
async fn change_all(disk: &Disk) {
    let size = disk.format.size();
    for at in [0, size / 2 / 512 * 512, size.saturating_sub(512) / 512 * 512] {
        let len = size.saturating_sub(at).min(512);
        if len > 0 {
            drop(disk.write(at, &vec![7; len as usize]).await);
            drop(disk.zero(at, len, ZeroMode::Unmap).await);
        }
    }
    let Some(set) = disk.format.abilities().bitmaps else { return };
    for (at, info) in set.list().into_iter().take(LOADS_MAX).enumerate() {
        match at % 5 {
            0 => drop(set.set_enabled(&info.name, !info.enabled).await),
            1 => drop(set.clear(&info.name).await),
            2 => {
                let mut bits = DirtyBitmap::new(size, 65_536);
                bits.set_range(GuestRange::new(0, size.min(1)));
                drop(set.merge(&info.name, bits).await);
            }
            3 => drop(set.remove(&info.name).await),
            _ => {}
        }
    }
    drop(set.add("new", set.default_granularity(), true).await);
    drop(disk.write(0, &vec![8; size.min(512) as usize]).await);
}

/// Every image whole, with changes where something means something, and with other directories.
pub(super) fn corpus() -> Vec<Vec<u8>> {
    let mut session = Session::new();
    let mut rng = Rng::new(29);
    let mut all: Vec<Vec<u8>> = (0..IMAGES.len() as u8).map(|which| vec![which]).collect();
    all.extend(BEHIND_THE_END.map(Vec::from));
    for number in 0..160_u8 {
        let mut input = vec![number % 4];
        for _ in 0..1 + rng.bits() % 4 {
            let field = (rng.bits() % 32) as u16 * *rng.pick(&[1, 4, 8]);
            input.push((rng.bits() % 16) as u8);
            input.extend(field.to_le_bytes());
            input.push(*rng.pick(&[0, 1, 2, 3, 64 + 3, 64 + 3]));
            let any = rng.bits();
            let value = *rng.pick(&[0, 1, 2, 3, 9, 31, 0xffff, any, any & 63, 1 << 63, u64::MAX]);
            input.extend(value.to_le_bytes());
        }
        all.push(input);
    }
    for round in 0..64_u8 {
        let which = usize::from(round) % IMAGES.len();
        let base = base(&mut session, which);
        let (at, len) = base.places[DIRECTORY];
        let mut directory = base.memory.to_bytes()[at..at + len].to_vec();
        let mut count = 4_u16;
        match round / 4 % 4 {
            // The same bitmaps again: with another name, in the same places.
            0 => {
                let mut more = directory.clone();
                let mut at = 0;
                while at < len {
                    more[at + 24] ^= round / 16;
                    at += (24 + number(&more, at + 18, 2) as usize).next_multiple_of(8);
                }
                directory.extend(more);
                count += 4;
            }
            1 => directory.truncate((rng.bits() % len as u64) as usize),
            2 => count = (rng.bits() % 9) as u16,
            _ => {
                for _ in 0..1 + rng.bits() % 3 {
                    let at = (rng.bits() % len as u64) as usize;
                    directory[at] = (rng.bits() & 255) as u8;
                }
            }
        }
        let head = 128 + round % 4;
        all.push([&[head][..], &count.to_le_bytes(), &directory].concat());
    }
    all
}
