//! A user's dirty bitmap in a job: what is copied, and what the bitmap is afterwards.
//!
//! Order rules:
//! 1. the bitmap is held when the job is prepared: nobody else changes it from then on;
//! 2. its instant is inside a cut: a backup's first one (writes after it go to a successor), a
//!    mirror's last one (what the target has is decided there);
//! 3. bits are given up only when what they stand for is durable in the target, and only when the
//!    job's transaction has succeeded (or, in mode always, for what was durable when it failed);
//! 4. then the event.
//!
//! Everything else, also a job that is dropped, leaves the bitmap with all its bits and those of
//! what was written meanwhile.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::error::ErrorKind;
use liveblk_engine::node::{BitmapAccess, BitmapHold, Node};

use crate::error::{BitmapRule, JobError, Result};
use crate::spec::{BitmapMode, SyncMode};

/// The bitmap of one job.
pub(crate) struct BitmapUse {
    hold: RefCell<Option<BitmapHold>>,
    mode: BitmapMode,
    frozen: Cell<bool>,
    /// In mode always: what was not copied when all that was copied had become durable.
    left: RefCell<Option<DirtyBitmap>>,
}

impl BitmapUse {
    /// Holds bitmap `name` of `node` for job `id`.
    ///
    /// # Errors
    /// No bitmap of that name, or it cannot be used like this now.
    pub(crate) fn hold(
        node: &Rc<Node>,
        name: &str,
        mode: BitmapMode,
        id: &str,
    ) -> Result<Rc<Self>> {
        let access =
            if mode == BitmapMode::Never { BitmapAccess::Read } else { BitmapAccess::Change };
        let hold = node.hold_bitmap(name, id, access).map_err(|error| missing(error, name))?;
        Ok(Rc::new(Self {
            hold: RefCell::new(Some(hold)),
            mode,
            frozen: Cell::new(false),
            left: RefCell::new(None),
        }))
    }

    /// How the bitmap is used.
    pub(crate) fn mode(&self) -> BitmapMode {
        self.mode
    }

    /// Looks at its bits.
    pub(crate) fn view<R>(&self, look: impl FnOnce(&DirtyBitmap) -> R) -> Option<R> {
        self.hold.borrow().as_ref().map(|hold| hold.view(look))
    }

    /// The instant of rule 2; only inside a cut of the node. A second time does nothing.
    pub(crate) fn freeze(&self) {
        if let (Some(hold), false) = (&*self.hold.borrow(), self.frozen.replace(true)) {
            hold.freeze();
        }
    }

    /// What was copied is durable; `left` was not copied.
    pub(crate) fn durable_except(&self, left: DirtyBitmap) {
        self.left.replace(Some(left));
    }

    /// The job's transaction succeeded.
    pub(crate) fn commit(&self) {
        let Some(hold) = self.hold.take() else { return };
        if self.mode != BitmapMode::Never && self.frozen.get() {
            hold.abdicate();
        }
    }

    /// It failed, or was cancelled.
    pub(crate) fn abort(&self) {
        let Some(hold) = self.hold.take() else { return };
        let left = self.left.take().filter(|_| self.mode == BitmapMode::Always);
        if let (Some(left), true) = (left, self.frozen.get()) {
            hold.abdicate_except(&left);
        }
    }
}

fn missing(error: liveblk_engine::Error, name: &str) -> JobError {
    match error.kind() {
        ErrorKind::NotFound => BitmapRule::NotFound { name: name.into() }.into(),
        _ => JobError::Engine(error),
    }
}

/// Which bitmap a job uses, and how.
#[derive(Clone, Debug, Default)]
pub struct BitmapChoice {
    /// Its name on the source.
    pub name: Option<String>,
    /// What becomes of it.
    pub mode: Option<BitmapMode>,
}

impl BitmapChoice {
    /// Checks the choice against `sync` in the peer's order; the name and mode to be used.
    ///
    /// # Errors
    /// The rule that is broken.
    pub(crate) fn checked(
        &self,
        sync: SyncMode,
        source: &Node,
    ) -> Result<Option<(String, BitmapMode)>> {
        let by_bitmap = matches!(sync, SyncMode::Bitmap | SyncMode::Incremental);
        let Some(name) = &self.name else {
            return match self.mode {
                _ if by_bitmap => Err(JobError::BitmapMissing { mode: sync.name() }),
                Some(_) => Err(BitmapRule::ModeWithoutBitmap.into()),
                None => Ok(None),
            };
        };
        let mode = match (sync, self.mode) {
            (SyncMode::Incremental, None) => Some(BitmapMode::OnSuccess),
            (SyncMode::Incremental, Some(mode)) if mode != BitmapMode::OnSuccess => {
                return Err(BitmapRule::IncrementalMode.into());
            }
            (_, mode) => mode,
        };
        let bitmap = source.bitmap(name).map_err(|error| missing(error, name))?;
        let Some(mode) = mode else { return Err(BitmapRule::ModeMissing.into()) };
        source.check_bitmap(&bitmap, BitmapAccess::Read)?;
        if sync == SyncMode::None {
            return Err(BitmapRule::NoOutput { sync: sync.name() }.into());
        }
        if mode == BitmapMode::Never && !by_bitmap {
            return Err(BitmapRule::NoEffect { sync: sync.name() }.into());
        }
        Ok(Some((name.clone(), mode)))
    }
}
