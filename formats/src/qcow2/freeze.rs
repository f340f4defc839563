//! Holding an image still: for changes of all its tables at once.
//!
//! While an image is frozen, whoever is about to change an entry is told to wait (all ways of
//! `State` to look one up for a change), reads go on, and a flush has nothing to write. Order: (1)
//! new changes wait; (2) pending writes end; (3) a flush makes their mappings and unlinks durable;
//! (4) the epoch is retired and its leases end, writes in place among them; (5) what was unlinked
//! is freed; (6) `growth` is taken, so that nobody makes tables or takes clusters. (2) to (5) hold
//! no lock: a write in flight may need `growth` before it can end. If (6) finds new work, all is
//! done again; it ends because frozen writers make no new work.

use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::executor::sync::MutexGuard;

use super::image::Image;
use super::state::State;

/// Keeps an image still; it goes on when this is dropped.
#[must_use = "the image goes on when this is dropped"]
pub(super) struct Frozen<'a> {
    pub(super) image: &'a Rc<Image>,
    _growth: MutexGuard<'a, ()>,
    _thaw: Thaw<'a>,
}

struct Thaw<'a>(&'a Rc<Image>);

impl Drop for Thaw<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.borrow_mut();
        // The state is a new one if the image became writable again meanwhile.
        state.frozen = state.frozen.saturating_sub(1);
        drop(state);
        self.0.pending_ended.notify_all();
    }
}

impl Image {
    /// Waits until nothing changes and nothing is dirty, and keeps it so.
    pub(super) async fn freeze(self: &Rc<Self>) -> Result<Frozen<'_>> {
        self.state.borrow_mut().frozen += 1;
        let thaw = Thaw(self);
        loop {
            self.pending_ended.until(|| self.state.borrow().pending.is_empty()).await;
            Rc::clone(self).flush().await?;
            self.leases_end().await;
            Rc::clone(self).reclaim().await;
            let growth = self.growth.lock().await;
            Rc::clone(self).flush().await?;
            if self.state.borrow().is_quiet() {
                return Ok(Frozen { image: self, _growth: growth, _thaw: thaw });
            }
        }
    }

    /// Ends the epoch and waits for its leases.
    pub(super) async fn leases_end(&self) {
        let ended = self.epochs.retire();
        self.pending_ended.until(|| self.epochs.quiesced(ended)).await;
    }
}

impl State {
    /// Whether the file holds everything, and nothing waits to be freed.
    pub(super) fn is_quiet(&self) -> bool {
        self.pending.is_empty()
            && self.is_clean()
            && self.write_outs == 0
            && self.quarantine.is_empty()
            && self.released.is_empty()
    }

    /// Runs a step of the one who froze the image.
    pub(super) fn unfrozen<T>(&mut self, step: impl FnOnce(&mut Self) -> T) -> T {
        let frozen = std::mem::take(&mut self.frozen);
        let outcome = step(self);
        self.frozen = frozen;
        outcome
    }
}
