//! Bitmaps that follow the disk: when guests move to another node, so do they.
//!
//! A bitmap made with `follow` tells what a disk changed since somebody looked, whichever node
//! serves the disk. Order, inside the cut that moves the guests: (1) the new node gets a bitmap of
//! the same name with the same bits (and those of a successor), or the one it has takes them
//! instead of its own: what was written to it while it was filled was no change of the disk;
//! (2) it records as the old one did; the old one stays where it is, for whoever goes back to that
//! node; (3) after the cut, a persistent one gets its place in the new image. A crash before (3)
//! leaves the new image without the bitmap, never with a wrong one.

use std::rc::Rc;

use super::bitmaps::{NewBitmap, NodeBitmap};
use super::object::Node;
use crate::bitmap::DirtyBitmap;
use crate::executor::Class;
use crate::format::KeptBitmap;

impl Node {
    /// See the module; inside the cut of both nodes, when guests have moved from `from` to `to`.
    pub(crate) fn carry_bitmaps(from: &Node, to: &Rc<Self>) {
        for bitmap in from.bitmaps.followers() {
            let mut bits = DirtyBitmap::new(to.size(), bitmap.granularity());
            bits.merge(&bitmap.bits());
            let new = match to.bitmap(&bitmap.name()) {
                Ok(known) if known.user().is_some() => {
                    let (name, node) = (bitmap.name(), to.name());
                    tracing::warn!(%name, %node, "a bitmap is in use and does not go on");
                    continue;
                }
                Ok(known) => known,
                Err(_) => to.follower(&bitmap),
            };
            new.change(|old| {
                old.clear_all();
                old.merge(&bits);
            });
            new.set_enabled(bitmap.is_enabled());
            let (node, bitmap) = (Rc::clone(to), Rc::clone(&bitmap));
            drop(to.core().spawn(Class::Guest, async move {
                node.keep_follower(&new, bitmap.is_persistent()).await;
            }));
        }
    }

    /// A bitmap like `bitmap`, in memory.
    fn follower(&self, bitmap: &NodeBitmap) -> Rc<NodeBitmap> {
        let granularity = bitmap.granularity();
        let new = NewBitmap {
            name: bitmap.name().to_string(),
            granularity: Some(granularity),
            persistent: false,
            disabled: true,
            follow: true,
        };
        let new = NodeBitmap::new(&new, self.size(), granularity);
        self.bitmaps.insert(Rc::clone(&new));
        new
    }

    async fn keep_follower(&self, bitmap: &Rc<NodeBitmap>, persistent: bool) {
        let kept = match bitmap.is_persistent() {
            true => self.mark_bitmap(bitmap).await,
            false if persistent => self.keep_in_file(bitmap).await,
            false => return,
        };
        match kept {
            Ok(()) => bitmap.set_persistent(true),
            Err(error) => {
                let (name, node) = (bitmap.name(), self.name());
                tracing::warn!(%name, %node, %error, "a bitmap goes on in memory only");
            }
        }
    }
}
