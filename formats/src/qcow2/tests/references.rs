//! How often the clusters of a file are referred to and counted, read from its bytes by code of its
//! own: what a refcount width must be able to count, and so what a change of snapshots may be
//! refused for. A leak of an earlier power cut counts too.
//!
//! Only for images without damage; offsets are taken as they are.

use std::collections::BTreeMap;

use liveblk_engine::executor::Core;
use liveblk_engine::storage::Storage;

const OFFSETS: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

/// References from one L1 table, by cluster of the file.
type Counts = BTreeMap<u64, u128>;

/// What the tables of an image refer to.
pub(super) struct References {
    live: Counts,
    /// With id and name.
    snapshots: Vec<(String, String, Counts)>,
    /// What the file counts.
    counted: Counts,
    /// The largest refcount.
    most: u128,
}

/// A change that counts further references.
#[derive(Clone, Copy, Debug)]
pub(super) enum Counting<'a> {
    /// A new snapshot.
    Take,
    /// The disk becomes the snapshot of this id, or else of this name.
    Apply(&'a str),
}

impl References {
    /// Reads the image in `storage`, in whose memory nothing is that the file does not have.
    pub(super) async fn read(core: &Core, storage: &Storage) -> Self {
        let buf = core.pool().zeroed(storage.size() as usize);
        storage.read(0, buf.clone()).await.expect("the file can be read");
        Self::of(&buf.to_vec())
    }

    /// The references in the image `bytes`.
    pub(super) fn of(bytes: &[u8]) -> Self {
        let order = if word(bytes, 4) < 3 { 4 } else { word(bytes, 96) };
        let mut snapshots = Vec::new();
        let mut at = long(bytes, 64) as usize;
        for _ in 0..word(bytes, 60) {
            let (id_len, name_len) = (half(bytes, at + 12), half(bytes, at + 14));
            let name = at + 40 + word(bytes, at + 36) as usize + id_len;
            let text = |at: usize, len| String::from_utf8_lossy(&bytes[at..at + len]).into_owned();
            let (id, name_text) = (text(name - id_len, id_len), text(name, name_len));
            let counts = counts(bytes, long(bytes, at), word(bytes, at + 8));
            snapshots.push((id, name_text, counts));
            at = (name + name_len).next_multiple_of(8);
        }
        let live = counts(bytes, long(bytes, 40), word(bytes, 36));
        let counted = refcounts(bytes, order);
        Self { live, snapshots, counted, most: u128::MAX >> (128 - (1 << order)) }
    }

    /// Whether some cluster would have more references after the change than can be counted.
    pub(super) fn overflow(&self, change: Counting<'_>) -> bool {
        let mut after = self.counted.clone();
        let more = match change {
            Counting::Take => &self.live,
            Counting::Apply(text) => {
                for (cluster, count) in &self.live {
                    *after.entry(*cluster).or_default() -= count;
                }
                let mut list = self.snapshots.iter();
                let by_name = list.clone().find(|(_, name, _)| name == text);
                let found = list.find(|(id, ..)| id == text).or(by_name);
                &found.expect("the snapshot is there").2
            }
        };
        for (cluster, count) in more {
            *after.entry(*cluster).or_default() += count;
        }
        after.values().any(|count| *count > self.most)
    }
}

/// The refcounts of `1 << order` bits in the file.
fn refcounts(bytes: &[u8], order: u64) -> Counts {
    let cluster = 1_usize << word(bytes, 20);
    let (table, entries) = (long(bytes, 48) as usize, word(bytes, 56) as usize * cluster / 8);
    let bits = 1_usize << order;
    let per_block = cluster * 8 / bits;
    let mut found = Counts::new();
    for index in 0..entries {
        let block = (long(bytes, table + index * 8) & !511) as usize;
        if block == 0 {
            continue;
        }
        for at in 0..per_block {
            let count = if bits < 8 {
                let byte = bytes[block + at * bits / 8];
                u128::from(byte >> (at * bits % 8)) & ((1 << bits) - 1)
            } else {
                let field = &bytes[block + at * bits / 8..][..bits / 8];
                field.iter().fold(0, |count, byte| count << 8 | u128::from(*byte))
            };
            if count != 0 {
                found.insert((index * per_block + at) as u64, count);
            }
        }
    }
    found
}

/// What the L1 table with `entries` entries at `offset` refers to.
fn counts(bytes: &[u8], offset: u64, entries: u64) -> Counts {
    let bits = word(bytes, 20);
    let features = if word(bytes, 4) < 3 { 0 } else { long(bytes, 72) };
    let (external, extended) = (features & 4 != 0, features & 16 != 0);
    let mut found = Counts::new();
    for index in 0..entries {
        let table = long(bytes, (offset + index * 8) as usize) & OFFSETS;
        if table == 0 {
            continue;
        }
        *found.entry(table >> bits).or_default() += 1;
        for at in (0..1 << bits).step_by(if extended { 16 } else { 8 }) {
            let entry = long(bytes, table as usize + at);
            let (start, end) = if entry & COMPRESSED != 0 {
                let shift = 62 - (bits - 8);
                let start = entry & ((1 << shift) - 1);
                let sectors = ((entry & !(3 << 62)) >> shift) + 1;
                (start, (start & !511) + sectors * 512)
            } else {
                (entry & OFFSETS, (entry & OFFSETS) + 1)
            };
            if start != 0 && !external {
                for cluster in start >> bits..=(end - 1) >> bits {
                    *found.entry(cluster).or_default() += 1;
                }
            }
        }
    }
    found
}

fn half(bytes: &[u8], at: usize) -> usize {
    usize::from(bytes[at]) << 8 | usize::from(bytes[at + 1])
}

fn word(bytes: &[u8], at: usize) -> u64 {
    (half(bytes, at) as u64) << 16 | half(bytes, at + 2) as u64
}

fn long(bytes: &[u8], at: usize) -> u64 {
    word(bytes, at) << 32 | word(bytes, at + 4)
}
