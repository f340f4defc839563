//! `convert --bitmaps`: the persistent bitmaps of the source, made again in the target.
//!
//! Order: what cannot be copied is found before the target exists; bitmaps are made after the data
//! is written, so that the copy itself is not recorded in them.

use std::rc::Rc;

use liveblk::engine::format::BitmapInfo;
use liveblk::{Host, Node};

use super::failure::Failure;
use super::source::{self, Wanted};

/// The source of bitmaps, open, and those that are to be copied.
pub(crate) struct Bitmaps {
    node: Rc<Node>,
    list: Vec<BitmapInfo>,
}

impl Bitmaps {
    /// The bitmaps of `file`. Inconsistent ones are left out with a warning if `skips` says so.
    ///
    /// # Errors
    /// If it can hold no bitmaps, or one is inconsistent.
    pub(crate) async fn of(
        host: &Host,
        file: &str,
        wanted: Wanted<'_>,
        skips: bool,
    ) -> Result<Self, Failure> {
        let wanted = Wanted { alone: true, snapshot: None, ..wanted };
        let node = source::open(host, file, wanted).await?;
        let Some(held) = node.format().abilities().bitmaps else {
            return Err(Failure::new("Source lacks bitmap support"));
        };
        let (broken, list): (Vec<_>, Vec<_>) =
            held.list().into_iter().partition(|bitmap| bitmap.inconsistent);
        for BitmapInfo { name, .. } in broken {
            if !skips {
                return Err(Failure::new(format!(
                    "Cannot copy inconsistent bitmap '{name}'\nTry --skip-broken-bitmaps, or use \
                     'liveblk img bitmap --remove' to delete it"
                )));
            }
            eprintln!("liveblk img: warning: Skipping inconsistent bitmap '{name}'");
        }
        Ok(Self { node, list })
    }

    /// Makes them in `target`; which are enabled stays.
    ///
    /// # Errors
    /// Which one could not be made, or filled, and why.
    pub(crate) async fn copy_to(&self, target: &Rc<Node>) -> Result<(), Failure> {
        let abilities = self.node.format().abilities();
        let (Some(from), Some(to)) = (abilities.bitmaps, target.format().abilities().bitmaps)
        else {
            return Err(unsupported(target.driver()));
        };
        for BitmapInfo { name, granularity, enabled, .. } in &self.list {
            let create = |cause: &dyn std::fmt::Display| {
                Failure::new(format!("Failed to create bitmap {name}: {cause}"))
            };
            let fill = |error: liveblk::Error| {
                Failure::new(format!("Failed to populate bitmap {name}: {error}"))
            };
            if to.list().iter().any(|known| known.name == *name) {
                return Err(create(&format!("Bitmap already exists: {name}")));
            }
            let bits = from.load(name).await.map_err(fill)?;
            let made = to.add(name, *granularity, *enabled).await;
            made.map_err(|error| create(&error))?;
            to.merge(name, bits).await.map_err(fill)?;
        }
        Ok(())
    }
}

/// The refusal of a format without bitmaps.
pub(crate) fn unsupported(format: &str) -> Failure {
    Failure::new(format!("Format driver '{format}' does not support bitmaps"))
}
