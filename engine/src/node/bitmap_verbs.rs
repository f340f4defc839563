//! What users do to the bitmaps of a node: each verb in two halves.
//!
//! The first half checks and does what needs I/O (a place in the image file, the mark that says
//! that the file is behind); it changes nothing that a request or a query sees. The second half is
//! memory only and cannot fail; inside a cut it is the same instant as everything else there. A
//! verb by itself is both halves in a row.
//!
//! Order with a bitmap that the image keeps: (1) the file says, durably, that the bitmap is in
//! use; (2) bits are added, or it begins to record. Clearing, and stopping to record, need no mark:
//! a file that is behind has more bits than needed then, never fewer. Removing: (1) it is taken
//! out of the file, durably; (2) it is gone.

use std::rc::Rc;

use super::bitmap_error::BitmapError;
use super::bitmaps::{BitmapAccess, BitmapFacts, LoadedBitmap, NewBitmap, NodeBitmap};
use super::object::Node;
use crate::bitmap::DirtyBitmap;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Format, KeptBitmap};
use crate::limits::{BITMAP_GRANULARITY_MAX, BITMAP_NAME_MAX};

/// The bits of one or more bitmaps, to be added to a bitmap.
pub type BitmapSources = Vec<Rc<NodeBitmap>>;

impl Node {
    /// What queries show of the bitmaps, the newest first.
    pub fn bitmap_facts(&self) -> Vec<BitmapFacts> {
        self.bitmaps.facts()
    }

    /// The bitmap called `name`.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn bitmap(&self, name: &str) -> Result<Rc<NodeBitmap>> {
        let found = self.bitmaps.find(name);
        found.ok_or_else(|| BitmapError::NotFound(name.to_owned()).into())
    }

    /// The granularity of a bitmap if nobody says otherwise: the cluster size within 4 to 64 KiB.
    pub fn default_granularity(&self) -> u64 {
        match self.cluster_size() {
            0 | 1 => 64 << 10,
            cluster => cluster.clamp(4 << 10, 64 << 10),
        }
    }

    /// Whether `bitmap` can be used like this now.
    ///
    /// # Errors
    /// `Busy`, `ReadOnly`, or that it is inconsistent.
    pub fn check_bitmap(&self, bitmap: &NodeBitmap, access: BitmapAccess) -> Result<()> {
        Ok(bitmap.check(access, !self.is_writable())?)
    }

    /// Makes a bitmap; if it is persistent, the file has a place for it then.
    ///
    /// # Errors
    /// What is wrong with the name, the granularity, or why the image cannot keep it.
    pub async fn add_bitmap(self: &Rc<Self>, new: NewBitmap) -> Result<Rc<NodeBitmap>> {
        let enabled = !new.disabled;
        let bitmap = self.prepare_bitmap(new).await?;
        bitmap.set_enabled(enabled);
        Ok(bitmap)
    }

    /// The first half of [`Node::add_bitmap`]: the bitmap is there and records nothing.
    /// [`Node::start_bitmap`] or [`Node::withdraw_bitmap`] must follow.
    ///
    /// # Errors
    /// As [`Node::add_bitmap`].
    pub async fn prepare_bitmap(self: &Rc<Self>, mut new: NewBitmap) -> Result<Rc<NodeBitmap>> {
        let granularity = self.check_new(&new)?;
        new.disabled = true;
        let bitmap = NodeBitmap::new(&new, self.size(), granularity);
        // The name is taken while the file is written.
        self.bitmaps.insert(Rc::clone(&bitmap));
        if !new.persistent {
            return Ok(bitmap);
        }
        bitmap.set_busy("block-dirty-bitmap-add");
        match self.keep_in_file(&bitmap).await {
            Ok(()) => {
                bitmap.release(None);
                Ok(bitmap)
            }
            Err(error) => {
                self.bitmaps.remove(&bitmap);
                Err(error)
            }
        }
    }

    /// Clean, and recording from now on if `enabled`: the second half of adding one.
    pub fn start_bitmap(&self, bitmap: &NodeBitmap, enabled: bool) {
        bitmap.change(DirtyBitmap::clear_all);
        bitmap.set_enabled(enabled);
    }

    /// Undoes [`Node::prepare_bitmap`]; what cannot be taken out of the file is dropped from it
    /// when the image is closed.
    pub async fn withdraw_bitmap(&self, bitmap: &Rc<NodeBitmap>) {
        if let Err(error) = self.forget_in_file(bitmap).await {
            tracing::warn!(bitmap = %bitmap.name(), %error, "a bitmap stays in its image");
        }
        self.bitmaps.remove(bitmap);
    }

    fn check_new(&self, new: &NewBitmap) -> Result<u64> {
        if new.name.is_empty() {
            return Err(BitmapError::NameEmpty.into());
        }
        let granularity = new.granularity.unwrap_or_else(|| self.default_granularity());
        let powers = crate::bitmap::GRANULARITY_MIN..=BITMAP_GRANULARITY_MAX;
        if !granularity.is_power_of_two() || !powers.contains(&granularity) {
            return Err(BitmapError::Granularity.into());
        }
        let too_long = new.name.len() > BITMAP_NAME_MAX;
        if new.persistent {
            let node = self.name().to_string();
            if self.format().abilities().bitmaps.is_none() {
                return Err(BitmapError::CannotStore { node }.into());
            }
            if too_long {
                let cause = format!("Name length exceeds maximum ({BITMAP_NAME_MAX} characters)");
                return Err(BitmapError::NotStored { node, name: new.name.clone(), cause }.into());
            }
        }
        if self.bitmaps.find(&new.name).is_some() {
            return Err(BitmapError::Exists(new.name.clone()).into());
        }
        if too_long {
            return Err(BitmapError::NameTooLong(new.name.clone()).into());
        }
        Ok(granularity)
    }

    /// Gives `bitmap` a place in the file, marked as in use.
    pub(super) async fn keep_in_file(&self, bitmap: &Rc<NodeBitmap>) -> Result<()> {
        let name = bitmap.name();
        let Some(file) = self.format().abilities().bitmaps else {
            return Err(BitmapError::CannotStore { node: self.name().to_string() }.into());
        };
        let kept: Rc<dyn KeptBitmap> = Rc::<NodeBitmap>::clone(bitmap);
        let added = file.add_kept(&name, bitmap.granularity(), kept).await;
        added.map_err(|error| {
            let (node, name) = (self.name().to_string(), name.to_string());
            let cause = error.to_string();
            let kind = error.kind();
            Error::new(kind, "add a bitmap").with_source(BitmapError::NotStored {
                node,
                name,
                cause,
            })
        })
    }

    async fn forget_in_file(&self, bitmap: &NodeBitmap) -> Result<()> {
        let Some(file) = self.format().abilities().bitmaps.filter(|_| bitmap.is_persistent())
        else {
            return Ok(());
        };
        match file.remove(&bitmap.name()).await {
            // Somebody else took it out of the file.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Removes a bitmap, from the file too.
    ///
    /// # Errors
    /// `NotFound`, `Busy`, `ReadOnly`, or why the file could not be changed; it is there then.
    pub async fn remove_bitmap(&self, name: &str) -> Result<()> {
        let bitmap = self.bitmap(name)?;
        self.check_bitmap(&bitmap, BitmapAccess::Remove)?;
        let removed = self.forget_in_file(&bitmap).await;
        removed.map_err(|error| {
            let (node, name) = (self.name().to_string(), name.to_owned());
            let cause = error.to_string();
            let source = BitmapError::NotRemoved { node, name, cause };
            Error::new(error.kind(), "remove a bitmap").with_source(source)
        })?;
        self.bitmaps.remove(&bitmap);
        Ok(())
    }

    /// The second half of removing, inside a cut: nobody finds the bitmap any more.
    pub fn drop_bitmap(&self, bitmap: &Rc<NodeBitmap>) {
        self.bitmaps.remove(bitmap);
    }

    /// What is left to do after [`Node::drop_bitmap`]: takes the bitmap out of the file.
    pub async fn finish_drop(&self, bitmap: &NodeBitmap) {
        if let Err(error) = self.forget_in_file(bitmap).await {
            tracing::warn!(bitmap = %bitmap.name(), %error, "a bitmap stays in its image");
        }
    }

    /// Clears all bits.
    ///
    /// # Errors
    /// `NotFound`, `Busy`, `ReadOnly`, or that it is inconsistent.
    pub fn clear_bitmap(&self, name: &str) -> Result<()> {
        let bitmap = self.bitmap(name)?;
        self.check_bitmap(&bitmap, BitmapAccess::Change)?;
        self.wipe_bitmap(&bitmap);
        Ok(())
    }

    /// The second half of [`Node::clear_bitmap`].
    pub fn wipe_bitmap(&self, bitmap: &NodeBitmap) {
        bitmap.change(DirtyBitmap::clear_all);
    }

    /// Starts or stops recording.
    ///
    /// # Errors
    /// `NotFound`, `Busy`, that it is inconsistent, or that the file could not be marked.
    pub async fn enable_bitmap(&self, name: &str, enabled: bool) -> Result<()> {
        let bitmap = self.bitmap(name)?;
        self.check_bitmap(&bitmap, BitmapAccess::Read)?;
        if enabled && !bitmap.is_enabled() {
            self.mark_bitmap(&bitmap).await?;
            // It may have been taken meanwhile.
            self.check_bitmap(&bitmap, BitmapAccess::Read)?;
        }
        self.switch_bitmap(&bitmap, enabled);
        Ok(())
    }

    /// The second half of [`Node::enable_bitmap`]; the first is [`Node::mark_bitmap`].
    pub fn switch_bitmap(&self, bitmap: &NodeBitmap, enabled: bool) {
        bitmap.set_enabled(enabled);
    }

    /// Makes the file say that it is behind, durably, before something is added to `bitmap`.
    ///
    /// # Errors
    /// What writing reports.
    pub async fn mark_bitmap(&self, bitmap: &NodeBitmap) -> Result<()> {
        if !bitmap.is_persistent() || !self.is_writable() {
            return Ok(());
        }
        match self.format().abilities().bitmaps {
            Some(file) => file.mark(&bitmap.name()).await,
            None => Ok(()),
        }
    }

    /// Adds the bits of `sources` to a bitmap.
    ///
    /// # Errors
    /// What forbids the use of one of them, sizes that differ, or that the file could not be
    /// marked; nothing was added then.
    pub async fn merge_bitmaps(&self, target: &str, sources: BitmapSources) -> Result<()> {
        let target = self.prepare_merge(target, &sources).await?;
        // One of them may have been taken meanwhile.
        sources.iter().try_for_each(|source| self.check_merge(&target, source))?;
        self.pour_bitmaps(&target, &sources);
        Ok(())
    }

    /// The first half of [`Node::merge_bitmaps`].
    ///
    /// # Errors
    /// As [`Node::merge_bitmaps`].
    pub async fn prepare_merge(
        &self,
        target: &str,
        sources: &BitmapSources,
    ) -> Result<Rc<NodeBitmap>> {
        let target = self.bitmap(target)?;
        self.check_bitmap(&target, BitmapAccess::Change)?;
        sources.iter().try_for_each(|source| self.check_merge(&target, source))?;
        self.mark_bitmap(&target).await?;
        Ok(target)
    }

    /// Whether the bits of `source` can be added to `target`, a bitmap of this node.
    ///
    /// # Errors
    /// What forbids the use of one of them, or sizes that differ.
    pub fn check_merge(&self, target: &NodeBitmap, source: &NodeBitmap) -> Result<()> {
        self.check_bitmap(target, BitmapAccess::Change)?;
        // A read-only image does not keep its bitmaps from being read.
        source.check(BitmapAccess::Read, false)?;
        if source.size() != target.size() {
            return Err(BitmapError::Sizes(target.size(), source.size()).into());
        }
        Ok(())
    }

    /// The second half of [`Node::merge_bitmaps`].
    pub fn pour_bitmaps(&self, target: &NodeBitmap, sources: &BitmapSources) {
        for source in sources.iter().filter(|source| !std::ptr::eq(source.as_ref(), target)) {
            source.view(|bits| target.change(|to| to.merge(bits)));
        }
    }

    /// Takes over the bitmaps that the image file holds; before anybody uses the node.
    pub(crate) fn adopt_bitmaps(&self, loaded: Vec<LoadedBitmap>) {
        self.takes_bitmaps.set(true);
        let Some(file) = self.format().abilities().bitmaps else { return };
        for loaded in loaded {
            let trusted = loaded.bits.is_some();
            let bitmap = NodeBitmap::stored(loaded, self.size());
            if trusted {
                file.keep(&bitmap.name(), Rc::<NodeBitmap>::clone(&bitmap));
            }
            self.bitmaps.insert(bitmap);
        }
    }

    /// The same after the file was another process's for a while: what it holds now takes the place
    /// of what it held before. Only inside a cut.
    pub(super) fn renew_bitmaps(&self, loaded: Vec<LoadedBitmap>) {
        let old = self.bitmaps.remove_persistent();
        let follow: Vec<_> = old.iter().filter(|old| old.follows()).map(|old| old.name()).collect();
        self.adopt_bitmaps(loaded);
        for bitmap in follow.iter().filter_map(|name| self.bitmaps.find(name)) {
            bitmap.set_follow(true);
        }
    }
}

/// The bitmaps that an image holds. One that cannot be read is inconsistent: it keeps nobody from
/// the disk.
pub(crate) async fn load_bitmaps(format: &Rc<dyn Format>) -> Vec<LoadedBitmap> {
    let Some(file) = format.abilities().bitmaps else { return Vec::new() };
    let mut loaded = Vec::new();
    for info in file.list() {
        let bits = match info.inconsistent {
            true => None,
            false => match file.load(&info.name).await {
                Ok(bits) => Some(bits),
                Err(error) => {
                    tracing::warn!(bitmap = info.name, %error, "a bitmap cannot be read");
                    None
                }
            },
        };
        let (name, granularity, enabled) = (info.name, info.granularity, info.enabled);
        loaded.push(LoadedBitmap { name, granularity, enabled, bits });
    }
    loaded
}
