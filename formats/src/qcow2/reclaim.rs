//! Giving freed clusters back to the allocator.
//!
//! Order: (1) the unlink is durable (`flush` moves the cluster into quarantine and retires the
//! epoch); (2) every lease of that epoch or an older one is gone; (3) the space is punched, if
//! asked for (`freed`); (4) the refcount is decreased in memory, from now on the cluster can be
//! taken. What a crash interrupts is a leak.

use std::rc::Rc;

use super::freed::Freed;
use super::image::Image;
use super::layout::{HostCluster, Run};
use crate::reason::Reason;

impl Image {
    /// Frees what may be freed now.
    pub(super) async fn reclaim(self: Rc<Self>) {
        self.reclaims.set(self.reclaims.get() + 1);
        Rc::clone(&self).reclaim_ready().await;
        self.reclaims.set(self.reclaims.get() - 1);
        self.flushed.notify_all();
    }

    /// Frees what may be freed now, and waits for others that are freeing: what they took out of
    /// the quarantine is not counted as free before they end.
    pub(super) async fn reclaim_all(self: Rc<Self>) {
        Rc::clone(&self).reclaim().await;
        self.flushed.until(|| self.reclaims.get() == 0).await;
    }

    async fn reclaim_ready(self: Rc<Self>) {
        let _frees = self.frees.lock().await;
        loop {
            let runs = {
                let mut state = self.state.borrow_mut();
                let ready =
                    state.quarantine.front().is_some_and(|(epoch, _)| self.epochs.quiesced(*epoch));
                match state.quarantine.pop_front() {
                    Some((_, runs)) if ready => runs,
                    kept => {
                        if let Some(kept) = kept {
                            state.quarantine.push_front(kept);
                        }
                        if state.released.is_empty() {
                            return;
                        }
                        let released = std::mem::take(&mut state.released);
                        released.into_iter().map(Freed::kept).collect()
                    }
                }
            };
            for freed in runs {
                self.free(freed).await;
            }
        }
    }

    async fn free(self: &Rc<Self>, Freed { run, punch }: Freed) {
        if punch {
            self.punch(run).await;
        }
        for cluster in run.clusters() {
            let (slice, _) = self.state.borrow().ref_position(cluster);
            if let Err(error) = self.load_ref_slice(slice).await {
                tracing::warn!(%error, cluster = cluster.0, "cluster stays allocated");
                continue;
            }
            let count = self.state.borrow().refcount(cluster).unwrap_or(0);
            if count == 0 {
                self.mark_corrupt(&Reason::Refcount(self.geometry.host(cluster)));
                continue;
            }
            let mut state = self.state.borrow_mut();
            state.set_refcount(cluster, count - 1);
            if count == 1 {
                state.note_free(cluster);
            }
        }
    }

    /// Gives the space of the clusters that lose their last reference back to the storage, whole
    /// stretches at a time. Only an optimisation: where it fails the space is reused later.
    async fn punch(self: &Rc<Self>, run: Run) {
        let mut stretch = Run { start: run.start, count: 0 };
        for cluster in run.clusters() {
            if self.last_reference(cluster).await {
                self.state.borrow_mut().close_packing(cluster);
                stretch.count += 1;
                continue;
            }
            self.punch_stretch(stretch).await;
            stretch = Run { start: cluster.plus(1), count: 0 };
        }
        self.punch_stretch(stretch).await;
    }

    async fn punch_stretch(&self, run: Run) {
        if run.count > 0 {
            let len = run.count << self.geometry.cluster_bits;
            let _ = self.storage.discard(self.geometry.host(run.start), len).await;
        }
    }

    async fn last_reference(self: &Rc<Self>, cluster: HostCluster) -> bool {
        let (slice, _) = self.state.borrow().ref_position(cluster);
        self.load_ref_slice(slice).await.is_ok() && self.state.borrow().refcount(cluster) == Some(1)
    }
}
