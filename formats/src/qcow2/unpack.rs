//! Compressed clusters read: loaded, unpacked away from the loop, and kept for a while.
//!
//! Guests read a cluster piece by piece, so the last ones stay in memory, known by where their
//! packed bytes lie. That place keeps its bytes as long as it is counted: packed clusters are never
//! changed where they are. When the last reference to a host cluster is given up (`set_refcount`),
//! what was kept of it is dropped, and what is being unpacked from it will not be kept: nothing
//! stale is ever found. Requests for a cluster that is being unpacked wait for it.

use std::collections::VecDeque;
use std::rc::Rc;

use liveblk_engine::Result;
use liveblk_engine::buf::Buf;
use liveblk_engine::format::PackedCluster;

use super::image::Image;
use super::layout::Geometry;
use super::layout::HostCluster;
use super::packed::Packed;
use crate::limits::{UNPACKED_BYTES, UNPACKED_CLUSTERS};
use crate::reason::Reason;

/// Unpacked clusters, the one used last at the end.
#[derive(Debug)]
pub(super) struct Unpacked {
    kept: VecDeque<(Packed, Buf)>,
    most: usize,
    /// What is being unpacked; false: it must not be kept.
    busy: Vec<(Packed, bool)>,
}

impl Unpacked {
    /// Nothing is kept yet.
    pub(super) fn new(geometry: Geometry) -> Self {
        let most = usize::try_from(UNPACKED_BYTES / geometry.cluster()).unwrap_or(usize::MAX);
        Self { kept: VecDeque::new(), most: most.min(UNPACKED_CLUSTERS), busy: Vec::new() }
    }

    fn find(&mut self, packed: Packed) -> Option<Buf> {
        let at = self.kept.iter().rposition(|(known, _)| *known == packed)?;
        let found = self.kept.remove(at)?;
        let buf = found.1.clone();
        self.kept.push_back(found);
        Some(buf)
    }

    fn is_busy(&self, packed: Packed) -> bool {
        self.busy.iter().any(|(known, _)| *known == packed)
    }

    fn begin(&mut self, packed: Packed) {
        self.busy.push((packed, true));
    }

    fn end(&mut self, packed: Packed, buf: Option<&Buf>) {
        let at = self.busy.iter().position(|(known, _)| *known == packed);
        let valid = at.is_some_and(|at| self.busy.swap_remove(at).1);
        if let (true, Some(buf)) = (valid, buf) {
            if self.kept.len() >= self.most {
                self.kept.pop_front();
            }
            self.kept.push_back((packed, buf.clone()));
        }
    }

    /// The bytes of `cluster` may change from now on.
    pub(super) fn forget(&mut self, cluster: HostCluster, geometry: Geometry) {
        if self.kept.is_empty() && self.busy.is_empty() {
            return;
        }
        let touches = |packed: &Packed| {
            let run = packed.run(geometry);
            run.start <= cluster && cluster < run.start.plus(run.count)
        };
        self.kept.retain(|(packed, _)| !touches(packed));
        for (packed, valid) in &mut self.busy {
            *valid &= !touches(packed);
        }
    }
}

impl Image {
    /// The bytes of a compressed cluster.
    pub(super) async fn read_packed(self: Rc<Self>, cluster: PackedCluster) -> Result<Buf> {
        let _lease = self.epochs.lease();
        let packed = Packed { host: cluster.host.bytes(), len: cluster.len };
        loop {
            {
                let unpacked = &mut self.state.borrow_mut().unpacked;
                if let Some(buf) = unpacked.find(packed) {
                    return Ok(buf);
                }
                if !unpacked.is_busy(packed) {
                    unpacked.begin(packed);
                    break;
                }
            }
            self.unpacked.until(|| !self.state.borrow().unpacked.is_busy(packed)).await;
        }
        self.packing.acquire(1).await;
        let result = self.unpack(cluster, packed).await;
        self.packing.release(1);
        self.state.borrow_mut().unpacked.end(packed, result.as_ref().ok());
        self.unpacked.notify_all();
        result
    }

    async fn unpack(&self, cluster: PackedCluster, packed: Packed) -> Result<Buf> {
        let buf = self.core.pool().alloc(usize::try_from(packed.len).unwrap_or(0));
        self.storage.read(packed.host, buf.clone()).await?;
        let bytes = buf.to_vec();
        drop(buf);
        let codec = self.codec();
        let len = usize::try_from(self.geometry.cluster()).unwrap_or(0);
        let unpacked = self.crunch(move || {
            let mut out = vec![0; len];
            codec.unpack(&bytes, &mut out).map(|()| out)
        });
        let out = unpacked.await.map_err(|why| {
            self.error(Reason::CannotUnpack(cluster.at.bytes(), packed.host, why), "read")
        })?;
        Ok(Buf::from_vec(out))
    }
}
