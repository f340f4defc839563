//! The bitmap directory: parsed with all limits, and written back as it was found.
//!
//! Section names: qcow2 specification, "Bitmaps extension" and "Bitmap directory". Promises:
//! nothing is allocated for an entry before its length is known to lie inside the directory, whose
//! length is bounded; extra data and the order of the entries are kept. Does no I/O.

use std::collections::BTreeSet;

use zerocopy::{FromBytes, IntoBytes};

use super::bitmap_reason::BitmapReason;
use super::layout::{Geometry, RawBitmapEntry, RawBitmapPointer};
use crate::limits::{
    BITMAP_BYTES_MAX, BITMAP_DIRECTORY_BYTES_MAX, BITMAP_GRANULARITY_BITS, BITMAP_NAME_MAX,
    BITMAP_TABLE_MAX, BITMAPS_MAX,
};

/// Flag: the bits in the file may be older than the data.
pub(super) const IN_USE: u32 = 1;
/// Flag: writes are recorded.
pub(super) const AUTO: u32 = 2;
/// Flag: who does not know the extra data may use the bitmap all the same.
const EXTRA_COMPATIBLE: u32 = 4;
/// Bits of the flags that have a meaning.
const FLAGS_KNOWN: u32 = IN_USE | AUTO | EXTRA_COMPATIBLE;
/// The one type of bitmap there is.
const DIRTY_TRACKING: u8 = 1;
/// Bytes of an entry before its extra data and its name.
const FIXED: u64 = size_of::<RawBitmapEntry>() as u64;
/// Where the flags are in an entry.
const FLAGS_AT: u64 = 12;

/// What the header extension says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pointer {
    pub(super) count: u32,
    pub(super) bytes: u64,
    pub(super) offset: u64,
}

impl Pointer {
    /// Reads and checks the data of the extension.
    pub(super) fn parse(data: &[u8], geometry: Geometry) -> Result<Self, BitmapReason> {
        let raw =
            RawBitmapPointer::read_from_bytes(data).map_err(|_| BitmapReason::ExtensionLength)?;
        let (count, bytes, offset) = (raw.count.get(), raw.bytes.get(), raw.offset.get());
        if raw.reserved.get() != 0 {
            return Err(BitmapReason::ExtensionReserved);
        }
        if count > BITMAPS_MAX {
            return Err(BitmapReason::TooMany(count));
        }
        if count == 0 {
            return Err(BitmapReason::None);
        }
        if !geometry.aligned(offset) || offset > super::layout::OFFSET_MASK {
            return Err(BitmapReason::DirectoryOffset);
        }
        if bytes > BITMAP_DIRECTORY_BYTES_MAX {
            return Err(BitmapReason::DirectorySize(bytes));
        }
        if bytes == 0 {
            return Err(BitmapReason::DirectoryEmpty);
        }
        Ok(Self { count, bytes, offset })
    }

    /// The data of the extension.
    pub(super) fn data(&self) -> Vec<u8> {
        let raw = RawBitmapPointer {
            count: self.count.into(),
            reserved: 0.into(),
            bytes: self.bytes.into(),
            offset: self.offset.into(),
        };
        raw.as_bytes().to_vec()
    }
}

/// A bitmap as the directory describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    /// As stored; usually UTF-8.
    pub(super) name: Vec<u8>,
    pub(super) flags: u32,
    pub(super) granularity_bits: u32,
    /// Where the table is, in bytes.
    pub(super) table: u64,
    pub(super) entries: u64,
    pub(super) extra: Vec<u8>,
}

impl Stored {
    /// The name for people.
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Bytes per bit.
    pub(super) fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    pub(super) fn is_in_use(&self) -> bool {
        self.flags & IN_USE != 0
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.flags & AUTO != 0
    }

    /// Whether extra data, unknown as it is, forbids the use of the bits.
    pub(super) fn is_foreign(&self) -> bool {
        !self.extra.is_empty() && self.flags & EXTRA_COMPATIBLE == 0
    }

    /// Bytes of the entry in the directory.
    pub(super) fn len(&self) -> u64 {
        entry_len(self.extra.len() as u64, self.name.len() as u64)
    }

    fn check(&self, kind: u8, geometry: Geometry, size: u64) -> Result<(), BitmapReason> {
        // At most 2^27 * 2^21, and 2^29 * 2^3 * 2^31.
        let bytes = self.entries << geometry.cluster_bits;
        let bad = self.entries == 0
            || self.entries > BITMAP_TABLE_MAX
            || self.table == 0
            || self.table > super::layout::OFFSET_MASK
            || !geometry.aligned(self.table)
            || !BITMAP_GRANULARITY_BITS.contains(&self.granularity_bits)
            || self.flags & !FLAGS_KNOWN != 0
            || self.name.is_empty()
            || self.name.len() > BITMAP_NAME_MAX
            || kind != DIRTY_TRACKING
            || bytes > BITMAP_BYTES_MAX
            || (!self.is_in_use() && size > (bytes * 8) << self.granularity_bits);
        if bad { Err(BitmapReason::Constraints(self.text())) } else { Ok(()) }
    }

    fn write(&self, out: &mut Vec<u8>) {
        let raw = RawBitmapEntry {
            table: self.table.into(),
            entries: u32::try_from(self.entries).unwrap_or(0).into(),
            flags: self.flags.into(),
            kind: DIRTY_TRACKING,
            granularity_bits: u8::try_from(self.granularity_bits).unwrap_or(0),
            name_len: u16::try_from(self.name.len()).unwrap_or(0).into(),
            extra_len: u32::try_from(self.extra.len()).unwrap_or(0).into(),
        };
        out.extend_from_slice(raw.as_bytes());
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

fn entry_len(extra: u64, name: u64) -> u64 {
    (FIXED + extra + name).next_multiple_of(8)
}

/// Reads a directory piece by piece.
pub(super) struct Parser {
    geometry: Geometry,
    /// Virtual size in bytes.
    size: u64,
    count: usize,
    /// Bytes of the directory that are not parsed yet.
    left: u64,
    /// What was fed and is not parsed yet: less than one entry.
    rest: Vec<u8>,
    found: Vec<Stored>,
}

impl Parser {
    pub(super) fn new(pointer: Pointer, geometry: Geometry, size: u64) -> Self {
        let count = pointer.count as usize;
        Self { geometry, size, count, left: pointer.bytes, rest: Vec::new(), found: Vec::new() }
    }

    /// Takes the next bytes of the directory.
    pub(super) fn feed(&mut self, piece: &[u8]) -> Result<(), BitmapReason> {
        self.rest.extend_from_slice(piece);
        let mut at = 0;
        while let Some(raw) = self.rest.get(at..).and_then(fixed_part) {
            let (extra, name) = (raw.extra_len.get(), u32::from(raw.name_len.get()));
            let len = entry_len(extra.into(), name.into());
            if len > self.left {
                return Err(BitmapReason::Broken);
            }
            let end = at.saturating_add(usize::try_from(len).unwrap_or(usize::MAX));
            let Some(body) = self.rest.get(at + FIXED as usize..end) else { break };
            if self.found.len() == self.count {
                return Err(BitmapReason::More);
            }
            let (extra, name) = (extra as usize, name as usize);
            let stored = Stored {
                name: body.get(extra..extra + name).unwrap_or_default().to_vec(),
                flags: raw.flags.get(),
                granularity_bits: raw.granularity_bits.into(),
                table: raw.table.get(),
                entries: raw.entries.get().into(),
                extra: body.get(..extra).unwrap_or_default().to_vec(),
            };
            stored.check(raw.kind, self.geometry, self.size)?;
            self.found.push(stored);
            self.left -= len;
            at = end;
        }
        self.rest.drain(..at);
        Ok(())
    }

    /// The bitmaps, if the directory is complete.
    pub(super) fn finish(self) -> Result<Vec<Stored>, BitmapReason> {
        if self.left != 0 {
            return Err(BitmapReason::Broken);
        }
        if self.found.len() < self.count {
            return Err(BitmapReason::Less);
        }
        let mut names = BTreeSet::new();
        for stored in &self.found {
            if !names.insert(&stored.name) {
                return Err(BitmapReason::Exists(stored.text()));
            }
        }
        Ok(self.found)
    }
}

fn fixed_part(bytes: &[u8]) -> Option<RawBitmapEntry> {
    RawBitmapEntry::read_from_prefix(bytes).ok().map(|(raw, _)| raw)
}

/// The directory as bytes.
pub(super) fn directory<'a>(list: impl Iterator<Item = &'a Stored>) -> Vec<u8> {
    let mut out = Vec::new();
    list.for_each(|stored| stored.write(&mut out));
    out
}

/// Where the flags of the entries are, in bytes from the start of the directory.
pub(super) fn flag_positions<'a>(list: impl Iterator<Item = &'a Stored>) -> Vec<u64> {
    let mut at = 0;
    list.map(|stored| {
        let flags = at + FLAGS_AT;
        at += stored.len();
        flags
    })
    .collect()
}

/// Entries of the table of a bitmap.
pub(super) fn table_entries(geometry: Geometry, size: u64, granularity_bits: u32) -> u64 {
    size.div_ceil(1 << granularity_bits).div_ceil(geometry.cluster() * 8)
}

/// Whether a bitmap of this granularity can be stored for a disk of `size` bytes.
pub(super) fn check_size(
    geometry: Geometry,
    size: u64,
    granularity_bits: u32,
) -> Result<(), BitmapReason> {
    if size == 0 {
        return Err(BitmapReason::NoDisk);
    }
    let entries = table_entries(geometry, size, granularity_bits);
    let bytes = entries.saturating_mul(geometry.cluster());
    if entries > BITMAP_TABLE_MAX || bytes > BITMAP_BYTES_MAX {
        return Err(BitmapReason::TooFine);
    }
    Ok(())
}

/// Checks name and granularity (bytes) of a new bitmap; the granularity as a power of two.
pub(super) fn check_new(name: &str, granularity: u64) -> Result<u32, BitmapReason> {
    if name.is_empty() {
        return Err(BitmapReason::NameEmpty);
    }
    if name.len() > BITMAP_NAME_MAX {
        return Err(BitmapReason::NameLong);
    }
    let bits = granularity.trailing_zeros();
    if !granularity.is_power_of_two() || bits < *BITMAP_GRANULARITY_BITS.start() {
        return Err(BitmapReason::Granularity);
    }
    if bits > *BITMAP_GRANULARITY_BITS.end() {
        return Err(BitmapReason::GranularityLarge);
    }
    Ok(bits)
}

/// Checks the limits of the whole list.
pub(super) fn check_list<'a>(list: impl Iterator<Item = &'a Stored>) -> Result<(), BitmapReason> {
    let (mut count, mut bytes) = (0_u64, 0_u64);
    for stored in list {
        count += 1;
        bytes += stored.len();
    }
    if count > u64::from(BITMAPS_MAX) {
        return Err(BitmapReason::Full);
    }
    if bytes > BITMAP_DIRECTORY_BYTES_MAX {
        return Err(BitmapReason::DirectoryFull);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        version: 3,
        cluster_bits: 16,
        refcount_order: 4,
        extended: false,
        external: false,
        slice_bits: 0,
    };

    fn stored(name: &str, extra: &[u8]) -> Stored {
        Stored {
            name: name.into(),
            flags: AUTO | EXTRA_COMPATIBLE,
            granularity_bits: 16,
            table: 1 << 16,
            entries: 1,
            extra: extra.to_vec(),
        }
    }

    fn parse(bytes: &[u8], count: u32, piece: usize) -> Result<Vec<Stored>, BitmapReason> {
        let pointer = Pointer { count, bytes: bytes.len() as u64, offset: 1 << 16 };
        let mut parser = Parser::new(pointer, GEOMETRY, 1 << 30);
        for part in bytes.chunks(piece) {
            parser.feed(part)?;
        }
        parser.finish()
    }

    #[test]
    fn a_directory_survives_in_pieces_of_any_size_with_its_extra_data() {
        let list =
            [stored("a", &[]), stored("long-name-of-a-bitmap", &[1, 2, 3]), stored("b", &[9; 99])];
        let bytes = directory(list.iter());
        for piece in [1, 3, 7, 8, 24, 31, 4096] {
            assert_eq!(parse(&bytes, 3, piece).as_deref(), Ok(&list[..]), "pieces of {piece}");
        }
        for (position, stored) in flag_positions(list.iter()).into_iter().zip(&list) {
            let at = position as usize;
            assert_eq!(bytes[at..at + 4], stored.flags.to_be_bytes());
        }
        assert_eq!(parse(&bytes, 2, 4096), Err(BitmapReason::More));
        assert_eq!(parse(&bytes, 4, 4096), Err(BitmapReason::Less));
        for cut in [1, 8, 24] {
            let short = &bytes[..bytes.len() - cut];
            assert!(parse(short, 3, 5).is_err(), "{cut} bytes are missing");
        }
        let twice = directory([stored("a", &[]), stored("a", &[])].iter());
        assert_eq!(parse(&twice, 2, 64), Err(BitmapReason::Exists("a".into())));
    }

    #[test]
    fn an_entry_that_claims_gibibytes_is_refused_before_anything_is_allocated() {
        let mut bytes = directory([stored("a", &[])].iter());
        bytes[20..24].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(parse(&bytes, 1, 8), Err(BitmapReason::Broken));
    }

    #[test]
    fn entries_outside_the_limits_are_refused() {
        let changes: [fn(&mut Stored); 11] = [
            |stored| stored.entries = 0,
            |stored| stored.entries = 0x800_0001,
            |stored| stored.entries = (512 << 20 >> 16) + 1,
            |stored| stored.table = 0,
            |stored| stored.table = 512,
            |stored| stored.table = 1 << 60,
            |stored| stored.granularity_bits = 8,
            |stored| stored.granularity_bits = 32,
            |stored| stored.flags = 8,
            |stored| stored.name = vec![b'n'; 1024],
            |stored| stored.granularity_bits = 9,
        ];
        let size = (1 << 16) * 8 * 1024;
        for (number, change) in changes.into_iter().enumerate() {
            let mut one = stored("a", &[]);
            change(&mut one);
            let bytes = directory([one].iter());
            let pointer = Pointer { count: 1, bytes: bytes.len() as u64, offset: 0 };
            let mut parser = Parser::new(pointer, GEOMETRY, size);
            let refused = parser.feed(&bytes);
            assert!(matches!(refused, Err(BitmapReason::Constraints(_))), "case {number}");
        }
    }
}
