//! Changing the header.
//!
//! Numbers in the fixed fields change by writing one sector, which is all or nothing. A change of
//! the backing reference also moves extensions and the name; then (1) what lies behind the first
//! sector is written to places that the old header does not use, (2) barrier, (3) the first sector
//! is written, (4) barrier. At any cut either the old or the new header is complete. If extensions
//! are in the way, the table of feature names (which is only a help for people) is left out.

use std::ops::Range;
use std::rc::Rc;

use liveblk_engine::format::BackingRef;
use liveblk_engine::{ErrorKind, Result};

use super::header::Header;
use super::image::Image;
use super::layout::{HEADER_V2, HEADER_V3, SECTOR};
use crate::limits::BACKING_NAME_MAX;
use crate::reason::Reason;

impl Image {
    /// Changes fixed fields of the header, durable when it returns. A failed write poisons the
    /// image, because nobody knows then which header is in the file (after one for want of space the
    /// old one is).
    pub(super) async fn update_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let _writes = self.header_writes.lock().await;
        let mut header = self.state.borrow().header.clone();
        change(&mut header);
        let sector = self.core.pool().zeroed(SECTOR);
        self.storage.read(0, sector.clone()).await?;
        let fixed = if self.geometry.version == 3 { HEADER_V3 } else { HEADER_V2 };
        let mut bytes = header.bytes();
        bytes.truncate(fixed as usize);
        sector.copy_from(0, &bytes);
        self.write_sector(&sector).await?;
        self.state.borrow_mut().header = header;
        Ok(())
    }

    async fn write_sector(&self, sector: &liveblk_engine::buf::Buf) -> Result<()> {
        let result = self.storage.write(0, sector.clone(), false).await.map(|_| ());
        // Without space nothing was written: the old header is there.
        if let Err(error) = &result
            && error.kind() != ErrorKind::NoSpace
        {
            self.state.borrow_mut().poison(error);
        }
        result?;
        self.barrier().await
    }

    /// See `Format::set_backing`.
    pub(super) async fn set_backing(self: Rc<Self>, backing: Option<BackingRef>) -> Result<()> {
        self.state.borrow().check_writable()?;
        if backing.is_some() {
            self.check_backing_allowed()?;
        }
        // What the new reference relies on is durable before the reference is.
        Rc::clone(&self).flush().await?;
        let _writes = self.header_writes.lock().await;
        let old = self.state.borrow().header.clone();
        let cluster = usize::try_from(self.geometry.cluster()).unwrap_or(0);
        let area = self.core.pool().zeroed(cluster);
        self.storage.read(0, area.clone()).await?;
        let bytes = area.to_vec();
        let (header, new) = plan(&old, &bytes, backing.as_ref())
            .map_err(|reason| self.error(reason, "change the backing reference"))?;
        let end = changed_end(&bytes, &new);
        if end > SECTOR {
            let rest = new.get(SECTOR..end).unwrap_or_default();
            self.write_bytes(SECTOR as u64, rest).await?;
            self.barrier().await?;
        }
        let sector = self.core.pool().zeroed(SECTOR);
        sector.copy_from(0, new.get(..SECTOR).unwrap_or_default());
        self.write_sector(&sector).await?;
        self.state.borrow_mut().header = header;
        Ok(())
    }
}

/// The end of what differs, rounded up to whole sectors.
fn changed_end(old: &[u8], new: &[u8]) -> usize {
    let last = old.iter().zip(new).rposition(|(old, new)| old != new);
    last.map_or(0, |last| (last + 1).next_multiple_of(SECTOR)).min(new.len())
}

/// The header and the whole first cluster with the new reference, laid out so that the first sector
/// decides, if that is possible at all.
fn plan(
    old: &Header,
    bytes: &[u8],
    backing: Option<&BackingRef>,
) -> Result<(Header, Vec<u8>), Reason> {
    let used = used_ranges(old);
    let mut fallback = None;
    for names in [true, false] {
        let mut header = old.clone();
        header.extensions.set_backing_format(backing.and_then(|b| b.format.as_deref()));
        if !names {
            header.extensions.drop_feature_names();
        }
        header.backing = backing.map(|backing| backing.file.clone());
        let end = header.header_length as usize + header.extensions.bytes().len();
        let behind_old = used.iter().map(|range| range.end).max().unwrap_or(0).max(end);
        for at in [end, behind_old.next_multiple_of(8)] {
            let Some(new) = lay_out(&mut header, bytes, at) else { continue };
            let safe = used.iter().cloned().flatten().filter(|at| *at >= SECTOR);
            if safe.into_iter().all(|at| bytes.get(at) == new.get(at)) {
                return Ok((header, new));
            }
            fallback.get_or_insert((header.clone(), new));
        }
    }
    fallback.ok_or(match backing {
        Some(backing) if backing.file.len() > BACKING_NAME_MAX as usize => Reason::BackingName,
        _ => Reason::HeaderFull,
    })
}

/// The first cluster with this header and its backing name at `at`, if it fits.
fn lay_out(header: &mut Header, bytes: &[u8], at: usize) -> Option<Vec<u8>> {
    let name = header.backing.clone().unwrap_or_default();
    if name.len() > BACKING_NAME_MAX as usize {
        return None;
    }
    header.backing_offset = if name.is_empty() { 0 } else { at as u64 };
    let content = header.bytes();
    header.extensions.stored = content.len() - header.header_length as usize - 8;
    let mut new = bytes.to_vec();
    new.get_mut(..content.len())?.copy_from_slice(&content);
    new.get_mut(at..at.checked_add(name.len())?)?.copy_from_slice(name.as_bytes());
    Some(new)
}

/// What a header makes readers look at: fields, extensions with their end marker, the name.
fn used_ranges(header: &Header) -> [Range<usize>; 2] {
    let end = header.header_length as usize + header.extensions.stored + 8;
    let at = usize::try_from(header.backing_offset).unwrap_or(0);
    let name = header.backing.as_ref().map_or(0, String::len);
    [0..end, at..at + name]
}
