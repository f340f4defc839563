//! The plan of a job that works on a section of one chain: what the layers of the section hold.
//!
//! What no layer of the section holds needs no copy: the layer below decides before and after.

use std::ops::Range;
use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::node::{Node, StatusExtent, StatusKind};

use super::plan::{Plan, is_data};
use super::state::Copy;
use crate::error::Result;
use crate::limits::PLAN_STEP;

/// Layers of the source's chain, counted from the source (0).
#[derive(Clone, Debug)]
pub(crate) struct Layers {
    /// The layers whose content is copied.
    pub(crate) copied: Range<u32>,
    /// Where there will be nothing below them any more, zeroes from this byte on need no copy:
    /// the layers end there.
    pub(crate) end: Option<u64>,
}

impl Layers {
    fn holds(&self, at: u64, run: &StatusExtent) -> bool {
        let beyond = run.kind != StatusKind::Data && self.end.is_some_and(|end| at >= end);
        self.copied.contains(&run.depth) && !beyond
    }

    /// The granules of `step` that a run of these layers touches.
    fn granules(&self, step: GuestRange, granularity: u64, runs: &[StatusExtent]) -> DirtyBitmap {
        let mut map = DirtyBitmap::new(step.len, granularity);
        let mut at = 0;
        for run in runs {
            if self.holds(step.start.bytes() + at, run) {
                map.set_range(GuestRange::new(at, run.len));
            }
            at += run.len;
        }
        map
    }
}

impl Copy {
    /// Plans to copy what `layers`, counted from `source`, hold; `source` is that of the start, as
    /// in [`Copy::plan`]. With `all_dirty` everything is dirty already and what needs no copy
    /// counts as done; else nothing is, and only what needs one is counted.
    ///
    /// # Errors
    /// As [`Copy::run_until_clean`].
    pub(crate) async fn plan_layers(
        self: &Rc<Self>,
        source: &Rc<Node>,
        layers: &Layers,
        all_dirty: bool,
    ) -> Result<()> {
        let (size, mut at) = (self.size().min(source.size()), 0);
        while at < size {
            self.check()?;
            self.job.pause_point().await;
            let step = GuestRange::new(at, PLAN_STEP.min(size - at));
            let fresh = DirtyBitmap::new(self.size(), self.granularity());
            self.touched.replace(Some(fresh));
            let runs = self.status_of(source, step).await?;
            let copy = layers.granules(step, self.granularity(), &runs);
            let mut data = DirtyBitmap::new(step.len, self.granularity());
            let mut from = 0;
            for run in &runs {
                if is_data(run) {
                    data.set_range(GuestRange::new(from, run.len));
                }
                from += run.len;
            }
            let plan = Plan { top: !all_dirty, all_dirty, target_is_zero: false };
            self.apply(plan, step, &data, &copy);
            at = step.end().bytes();
        }
        self.touched.replace(None);
        Ok(())
    }
}
