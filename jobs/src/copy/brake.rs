//! Holding guest writes back, so that a copy catches up with them.
//!
//! A write waits in the pre-hook, at most as long as the client allowed; a job that is over holds
//! nobody back.

use super::state::Copy;

impl Copy {
    /// Nanoseconds that a guest write is to be held back now.
    pub(crate) fn brake(&self) -> u64 {
        if self.is_dead() { 0 } else { self.brake_ns.get() }
    }

    /// Holds every guest write back for `nanos` from now on.
    pub(crate) fn set_brake(&self, nanos: u64) {
        self.brake_ns.set(nanos);
        self.job.changed().notify_all();
    }

    /// Holds one guest write back for `nanos`, less if the brake is let go meanwhile.
    pub(crate) async fn hold_back(&self, nanos: u64) {
        let core = self.job.core();
        let until = core.now().saturating_add(nanos);
        loop {
            let now = core.now();
            if now >= until || self.brake() == 0 {
                return;
            }
            self.job.nap(until - now).await;
        }
    }
}
