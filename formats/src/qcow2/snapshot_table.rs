//! The snapshot table as bytes (specification, "Snapshots"): parsed within bounds, written back.
//!
//! Promises: at most 65,536 entries and 64 MiB, extra data of at most 1024 bytes; what an entry
//! holds that is not known here (longer extra data, text that is no UTF-8) survives a rewrite. Does
//! not look at the L1 tables that entries name; who uses one checks it.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use liveblk_engine::executor::Core;
use liveblk_engine::format::SnapshotInfo;
use liveblk_engine::storage::Storage;
use liveblk_engine::{Error, ErrorKind, Result};

use super::header::Header;
use super::open::read;
use crate::limits::{
    SNAPSHOT_EXTRA_MAX, SNAPSHOT_TABLE_BYTES_MAX, SNAPSHOT_TEXT_MAX, SNAPSHOT_WINDOW, SNAPSHOTS_MAX,
};
use crate::reason::Reason;

/// The fixed part of an entry.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSnapshot {
    l1_table_offset: U64,
    l1_size: U32,
    id_str_size: U16,
    name_size: U16,
    date_sec: U32,
    date_nsec: U32,
    vm_clock_nsec: U64,
    vm_state_size: U32,
    extra_data_size: U32,
}

/// The known extra data.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtra {
    vm_state_size: U64,
    disk_size: U64,
    icount: U64,
}

const _: () = assert!(size_of::<RawSnapshot>() == 40);
const _: () = assert!(size_of::<RawExtra>() == 24);

/// An instruction count that was not recorded.
const NO_ICOUNT: u64 = u64::MAX;

/// An entry of the table.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
    id: Vec<u8>,
    name: Vec<u8>,
    fixed: RawSnapshot,
    extra: Vec<u8>,
}

impl Snapshot {
    /// A new entry; id and name must fit (`SnapshotName` else).
    pub(super) fn new(info: &SnapshotInfo) -> Result<Self, Reason> {
        let text = |text: &str| {
            let fits = text.len() <= SNAPSHOT_TEXT_MAX;
            fits.then(|| text.as_bytes().to_vec()).ok_or(Reason::SnapshotName)
        };
        let extra = RawExtra {
            vm_state_size: info.vm_state_size.into(),
            disk_size: info.disk_size.into(),
            icount: info.icount.unwrap_or(NO_ICOUNT).into(),
        };
        let fixed = RawSnapshot {
            date_sec: info.date_sec.into(),
            date_nsec: info.date_nsec.into(),
            vm_clock_nsec: info.vm_clock_nsec.into(),
            vm_state_size: u32::try_from(info.vm_state_size).unwrap_or(0).into(),
            ..RawSnapshot::new_zeroed()
        };
        Ok(Self {
            l1_offset: 0,
            l1_size: 0,
            id: text(&info.id)?,
            name: text(&info.name)?,
            fixed,
            extra: extra.as_bytes().to_vec(),
        })
    }

    /// What people see of it; `size` is the disk's, for entries that do not say their own.
    pub(super) fn info(&self, size: u64) -> SnapshotInfo {
        let word = |index: usize| {
            let field = self.extra.get(index * 8..index * 8 + 8)?;
            Some(u64::from_be_bytes(field.try_into().ok()?))
        };
        SnapshotInfo {
            id: String::from_utf8_lossy(&self.id).into_owned(),
            name: String::from_utf8_lossy(&self.name).into_owned(),
            vm_state_size: word(0).unwrap_or(self.fixed.vm_state_size.get().into()),
            date_sec: self.fixed.date_sec.get(),
            date_nsec: self.fixed.date_nsec.get(),
            vm_clock_nsec: self.fixed.vm_clock_nsec.get(),
            icount: word(2).filter(|count| *count != NO_ICOUNT),
            disk_size: word(1).unwrap_or(size),
        }
    }

    /// Whether its id is this text.
    pub(super) fn has_id(&self, id: &str) -> bool {
        self.id == id.as_bytes()
    }

    /// Whether its name is this text.
    pub(super) fn has_name(&self, name: &str) -> bool {
        self.name == name.as_bytes()
    }

    /// The number that its id begins with; 0 without one.
    pub(super) fn number(&self) -> u64 {
        let digits = self.id.iter().take_while(|byte| byte.is_ascii_digit());
        digits.fold(0, |number: u64, digit| {
            number.saturating_mul(10).saturating_add(u64::from(digit - b'0'))
        })
    }

    fn put(&self, out: &mut Vec<u8>) {
        let fixed = RawSnapshot {
            l1_table_offset: self.l1_offset.into(),
            l1_size: self.l1_size.into(),
            id_str_size: u16::try_from(self.id.len()).unwrap_or(0).into(),
            name_size: u16::try_from(self.name.len()).unwrap_or(0).into(),
            extra_data_size: u32::try_from(self.extra.len()).unwrap_or(0).into(),
            ..self.fixed
        };
        out.extend_from_slice(fixed.as_bytes());
        out.extend_from_slice(&self.extra);
        out.extend_from_slice(&self.id);
        out.extend_from_slice(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

/// The table as bytes; an error if it is larger than allowed.
pub(super) fn encode(list: &[Snapshot]) -> Result<Vec<u8>, Reason> {
    let mut out = Vec::new();
    for snapshot in list {
        snapshot.put(&mut out);
        if out.len() as u64 > SNAPSHOT_TABLE_BYTES_MAX {
            return Err(Reason::SnapshotsMany);
        }
    }
    if list.len() > SNAPSHOTS_MAX as usize { Err(Reason::SnapshotsMany) } else { Ok(out) }
}

/// Reads the table that `header` names.
///
/// # Errors
/// If an entry breaks a bound, or a read fails.
pub(super) async fn load(core: &Core, storage: &Storage, header: &Header) -> Result<Vec<Snapshot>> {
    let mut window = Window { core, storage, base: 0, bytes: Vec::new() };
    let start = header.snapshots_offset;
    let (mut at, mut list) = (start, Vec::new());
    for index in 0..header.nb_snapshots {
        let bad = |reason: Reason| reason.error("open").on(storage.name());
        let fixed = window.bytes(at, size_of::<RawSnapshot>() as u64).await?;
        let fixed = RawSnapshot::read_from_bytes(&fixed).map_err(|_| bad(broken(index)))?;
        let extra = u64::from(fixed.extra_data_size.get());
        if extra > SNAPSHOT_EXTRA_MAX {
            return Err(bad(Reason::SnapshotExtra(index)));
        }
        let (id, name) = (fixed.id_str_size.get(), fixed.name_size.get());
        let texts = u64::from(id) + u64::from(name);
        let body = at + size_of::<RawSnapshot>() as u64;
        let end = body + extra + texts;
        if end - start > SNAPSHOT_TABLE_BYTES_MAX {
            return Err(bad(Reason::SnapshotsMany));
        }
        if end > storage.size() {
            return Err(bad(Reason::Truncated("snapshot table")));
        }
        let rest = window.bytes(body, extra + texts).await?;
        let part = |from: u64, len: u64| {
            let from = usize::try_from(from).unwrap_or(usize::MAX);
            let len = usize::try_from(len).unwrap_or(0);
            rest.get(from..from.saturating_add(len)).unwrap_or_default().to_vec()
        };
        list.push(Snapshot {
            l1_offset: fixed.l1_table_offset.get(),
            l1_size: fixed.l1_size.get(),
            id: part(extra, id.into()),
            name: part(extra + u64::from(id), name.into()),
            extra: part(0, extra),
            fixed,
        });
        at = end.next_multiple_of(8);
    }
    Ok(list)
}

fn broken(index: u32) -> Reason {
    Reason::SnapshotEntry(index)
}

/// A part of the file in memory, for many small reads in a row.
struct Window<'a> {
    core: &'a Core,
    storage: &'a Storage,
    base: u64,
    bytes: Vec<u8>,
}

impl Window<'_> {
    async fn bytes(&mut self, at: u64, len: u64) -> Result<Vec<u8>> {
        let inside = at >= self.base && at + len <= self.base + self.bytes.len() as u64;
        if !inside {
            self.base = at;
            self.bytes = read(self.core, self.storage, at, len.max(SNAPSHOT_WINDOW)).await?;
        }
        let from = usize::try_from(at - self.base).unwrap_or(usize::MAX);
        let len = usize::try_from(len).unwrap_or(0);
        let found = self.bytes.get(from..from.saturating_add(len));
        found.map(<[u8]>::to_vec).ok_or_else(|| Error::new(ErrorKind::Io(5), "read"))
    }
}
