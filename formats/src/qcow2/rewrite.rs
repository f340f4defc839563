//! Changing the header.
//!
//! Numbers in the fixed fields, and where the bitmaps are, change by writing one sector, which is
//! all or nothing. Everything else moves extensions and the name: `header_plan` says in which steps
//! that is safe. Each step: (1) what lies behind the first sector is written to places that the
//! header in the file does not use; (2) barrier; (3) the sector that decides is written;
//! (4) barrier. At any cut either the old or the new header is complete.
//!
//! A failure before (3) leaves no trace; one in (3) or (4) poisons the image: nobody knows then
//! which header is in the file. Unknown extensions and fields are kept.

use std::rc::Rc;

use liveblk_engine::format::BackingRef;
use liveblk_engine::{ErrorKind, Result};

use super::extensions::BITMAPS;
use super::header::Header;
use super::header_plan::{Content, area, changed_sectors, plan};
use super::image::Image;
use super::layout::{HEADER_V2, HEADER_V3, SECTOR};

impl Image {
    /// Changes the header, durable when it returns; see the module header.
    pub(super) async fn update_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let _writes = self.header_writes.lock().await;
        let old = self.state.borrow().header.clone();
        let mut new = old.clone();
        change(&mut new);
        if new.backing == old.backing && new.extensions.list == old.extensions.list {
            return self.patch(0, new, |header| header.fixed_bytes()).await;
        }
        if only_bitmaps_differ(&old, &new)
            && let Some(at) = old.data_of(BITMAPS)
            && at.start / SECTOR == (at.end - 1) / SECTOR
        {
            let within = at.start % SECTOR;
            let sector = at.start - within;
            return self.patch_bitmaps(sector, within, &old, new).await;
        }
        self.relocate(&old, new).await
    }

    /// Writes `bytes` of the new header over the beginning of the sector at `at`.
    async fn patch(
        &self,
        at: usize,
        new: Header,
        bytes: impl Fn(&Header) -> Vec<u8>,
    ) -> Result<()> {
        let sector = self.core.pool().zeroed(SECTOR);
        self.storage.read(at as u64, sector.clone()).await?;
        sector.copy_from(0, &bytes(&new));
        self.write_deciding(at, &sector).await?;
        self.state.borrow_mut().header = new;
        Ok(())
    }

    /// Writes where the bitmaps are, together with the fixed fields if they share the sector.
    async fn patch_bitmaps(
        &self,
        at: usize,
        within: usize,
        old: &Header,
        new: Header,
    ) -> Result<()> {
        if at != 0 && new.fixed_bytes() != old.fixed_bytes() {
            return self.relocate(old, new).await;
        }
        let sector = self.core.pool().zeroed(SECTOR);
        self.storage.read(at as u64, sector.clone()).await?;
        if at == 0 {
            sector.copy_from(0, &new.fixed_bytes());
        }
        sector.copy_from(within, new.extensions.find(BITMAPS).unwrap_or_default());
        self.write_deciding(at, &sector).await?;
        self.state.borrow_mut().header = new;
        Ok(())
    }

    /// Writes a header with other extensions or another name.
    async fn relocate(&self, old: &Header, mut new: Header) -> Result<()> {
        if !new.bitmaps_valid() {
            // Nobody maintained them: as the peer, leave out what nobody may use.
            new.extensions.list.retain(|extension| extension.kind != BITMAPS);
        }
        let first = self.core.pool().zeroed(area(old, &new));
        self.storage.read(0, first.clone()).await?;
        let mut bytes = first.to_vec();
        let steps = plan(old, &bytes, &new);
        let steps = steps.map_err(|reason| self.error(reason, "change the header"))?;
        for Content { header, bytes: next } in steps {
            self.write_step(&bytes, &next).await?;
            self.state.borrow_mut().header = header;
            bytes = next;
        }
        Ok(())
    }

    async fn write_step(&self, old: &[u8], new: &[u8]) -> Result<()> {
        let mut sectors = changed_sectors(old, new);
        if sectors.is_empty() {
            return Ok(());
        }
        // In a single changed sector lies what decides, wherever it is; else in the first one.
        let deciding = sectors.remove(0) * SECTOR;
        for sector in &sectors {
            let at = sector * SECTOR;
            let rest = new.get(at..at + SECTOR).unwrap_or_default();
            self.write_bytes(at as u64, rest).await?;
        }
        if !sectors.is_empty() {
            self.barrier().await?;
        }
        let sector = self.core.pool().zeroed(SECTOR);
        sector.copy_from(0, new.get(deciding..deciding + SECTOR).unwrap_or_default());
        self.write_deciding(deciding, &sector).await
    }

    async fn write_deciding(&self, at: usize, sector: &liveblk_engine::buf::Buf) -> Result<()> {
        let result = self.storage.write(at as u64, sector.clone(), false).await.map(|_| ());
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
        self.update_header(|header| {
            let format = backing.as_ref().and_then(|backing| backing.format.as_deref());
            header.extensions.set_backing_format(format);
            header.backing = backing.map(|backing| backing.file);
        })
        .await
    }
}

/// Whether the lists of extensions differ in nothing but where the bitmaps are.
fn only_bitmaps_differ(old: &Header, new: &Header) -> bool {
    let (old_list, new_list) = (&old.extensions.list, &new.extensions.list);
    old.backing == new.backing
        && old_list.len() == new_list.len()
        && old_list.iter().zip(new_list).all(|(old, new)| {
            old == new
                || (old.kind == new.kind && old.kind == BITMAPS && old.data.len() == new.data.len())
        })
}

/// Bytes of the fields that have a fixed place.
impl Header {
    fn fixed_bytes(&self) -> Vec<u8> {
        let fixed = if self.geometry.version == 3 { HEADER_V3 } else { HEADER_V2 };
        let mut bytes = self.bytes();
        bytes.truncate(fixed as usize);
        bytes
    }

    /// Where the data of the first extension of this kind lies in the file.
    pub(super) fn data_of(&self, kind: u32) -> Option<std::ops::Range<usize>> {
        let mut at = self.header_length as usize;
        for extension in &self.extensions.list {
            let data = at + 8..at + 8 + extension.data.len();
            if extension.kind == kind {
                return Some(data);
            }
            at = data.end.next_multiple_of(8);
        }
        None
    }
}
