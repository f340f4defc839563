//! Inactive nodes: the image belongs to another process for a while.
//!
//! Order of inactivation, in a cut of the node: flush; the format stores what it keeps in memory
//! and becomes read-only; the locks on the files are given up. Activation takes the locks first;
//! then the format looks at the file again, because another process may have changed it, and the
//! bitmaps that the file holds take the place of those that it held before.
//!
//! A node may also begin inactive: its file is opened for reading and without a lock, and nothing
//! is written to it. Files that were opened for it are inactive with it.

use super::bitmap_verbs::load_bitmaps;
use super::object::Node;
use crate::error::Result;
use crate::storage::{LockRequest, Storage};

impl Node {
    /// Whether the image is in use by this process.
    pub fn is_active(&self) -> bool {
        !self.inactive.get()
    }

    /// Whether somebody may come to write: not where only a job keeps the image writable, or where
    /// it could not become read-only yet.
    pub fn takes_writers(&self) -> bool {
        self.filtered().map_or_else(
            || self.is_writable() && self.is_asked_writable(),
            |below| below.takes_writers(),
        )
    }

    /// Whether it takes writes, or would if it were active.
    pub fn is_writable_when_active(&self) -> bool {
        if self.is_active() { self.is_writable() } else { self.is_asked_writable() }
    }

    /// Whether its users want it writable, also while it is inactive.
    pub fn is_asked_writable(&self) -> bool {
        self.asked_writable.get()
    }

    /// The node was opened inactive; `writable` is what its users ask for. Before anybody uses it.
    pub(crate) fn begin_inactive(&self, writable: bool) {
        self.asked_writable.set(writable);
        self.inactive.set(true);
    }

    /// Gives the image up until [`Node::activate`]. Only inside a cut of this node.
    ///
    /// # Errors
    /// What flushing reports; the node is then as active as it was.
    pub(crate) async fn inactivate(&self) -> Result<()> {
        if self.inactive.get() {
            return Ok(());
        }
        self.turn_for_now(false).await?;
        if self.takes_bitmaps.get() {
            // The bits in memory are not those of the file any more.
            self.format().set_writable(false).await?;
        }
        self.lock_all(LockRequest::None).await?;
        self.inactive.set(true);
        Ok(())
    }

    /// Takes the image into use again. Only inside a cut of this node.
    ///
    /// # Errors
    /// If another process has the image, or its file cannot be read; the node stays inactive.
    pub(crate) async fn activate(&self) -> Result<()> {
        if !self.inactive.get() {
            return Ok(());
        }
        self.look_again().await?;
        self.layer_state().changed(&**self.format());
        let started = match self.asked_writable.get() {
            true => self.turn_for_now(true).await,
            false if self.is_protocol() || self.cluster_size() == 1 => {
                self.lock_all(LockRequest::ReadShared).await
            }
            false => match self.lock_all(LockRequest::ReadStable).await {
                Ok(()) => self.format().set_writable(false).await,
                refused => refused,
            },
        };
        if let Err(error) = started {
            // The error is what counts; a lock too much only keeps others out.
            let _ = self.lock_all(LockRequest::None).await;
            return Err(error);
        }
        if self.takes_bitmaps.get() {
            let loaded = load_bitmaps(self.format()).await;
            self.renew_bitmaps(loaded);
        }
        self.inactive.set(false);
        Ok(())
    }

    /// Other processes may have written the files.
    async fn look_again(&self) -> Result<()> {
        for storage in self.storages() {
            if let Storage::File(file) = storage {
                file.look_again().await?;
            }
        }
        Ok(())
    }

    /// Every file of the image.
    fn storages(&self) -> Vec<Storage> {
        let files = self.file().into_iter().chain(self.data_file());
        let held = files.map(|file| file.format().data_storage().clone());
        held.chain([self.format().data_storage().clone()]).collect()
    }

    /// Asks the same lock of every file of the image.
    async fn lock_all(&self, request: LockRequest) -> Result<()> {
        for storage in self.storages() {
            if let Storage::File(file) = storage {
                file.lock(request).await?;
            }
        }
        Ok(())
    }
}
