//! A change of a node's virtual size, with what lies below in view.
//!
//! Order: (1) claim of everything from the smaller of both sizes on, so that no write is in flight
//! there; (2) the format changes the size; (3) so do the dirty bitmaps: what is added is clean;
//! (4) the claim ends. What is added reads as zeroes also where the layers below hold bytes.

use std::rc::Rc;

use super::object::Node;
use super::transfer;
use crate::address::GuestRange;
use crate::buf::Buf;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Below, Preallocation, ReadBelow, Resize};

impl Node {
    /// Sets the virtual size to `size` bytes, durable when it returns.
    ///
    /// # Errors
    /// `ReadOnly`, or what the format reports; the disk then has its old size and all of its data.
    pub async fn resize(self: &Rc<Self>, size: u64, preallocation: Preallocation) -> Result<()> {
        if !self.is_writable() {
            return Err(Error::new(ErrorKind::ReadOnly, "resize").on(&self.name()));
        }
        let start = size.min(self.size());
        let claim = self.claims.claim(GuestRange::new(start, u64::MAX - start));
        claim.held().await;
        let path = self.path();
        let below = path.layers().get(1).map(|layer| layer.format.size()).map(|size| {
            let read: ReadBelow = Rc::new(move |range: GuestRange, buf: Buf| {
                let path = Rc::clone(&path);
                Box::pin(async move { transfer::read(&path, 1, range, &buf).await })
            });
            Below { size, read }
        });
        let resized = self.format().resize_with(Resize { size, preallocation, below }).await;
        if resized.is_ok() {
            self.bitmaps.resize(self.size());
        }
        drop(claim);
        resized.map_err(|error| error.on(&self.name()))
    }

    /// The disk is other bytes of its file now, perhaps of another size: for who looks at dirty
    /// bitmaps all of it has changed. Only in a cut.
    pub(crate) fn other_bytes(&self) {
        self.bitmaps.resize(self.size());
        self.bitmaps.record(GuestRange::new(0, self.size()));
    }
}
