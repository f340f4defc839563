//! The write hook of a mirror: dirty bits for what guests write, or the write itself to the target
//! before the guest is answered.
//!
//! In copy mode *background* a write marks its range dirty after it ended. In *write-blocking* it
//! goes to source and target in parallel and is answered when both are done. The mode is looked at
//! once per write, so it may change at any time: each write is marked or copied, never neither.
//!
//! Order rules of a copied write (under the node's claim of its bytes):
//! 1. the copy claims the granules it touches, after every copy of them that is in flight; no
//!    background copy of them begins before the claim ends;
//! 2. both writes run; 3. if both ended well, granules that lie wholly inside are clean, others
//!    stay as they were; else the whole range is dirty; 4. the claim ends; 5. the guest is
//!    answered.
//!
//! A target that fails makes the range dirty and is answered by the policy of the job; the guest's
//! write has succeeded. What is discarded has no content to keep: it is marked dirty and copied
//! later as it reads then. While the job stands still writes are marked only.
//!
//! Of a job that is to be ready in time (`converge`) it says how long guests' writes wait.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use liveblk_engine::address::GuestRange;
use liveblk_engine::buf::Buf;
use liveblk_engine::error::Result as EngineResult;
use liveblk_engine::executor::Class;
use liveblk_engine::executor::sync::{Either, select};
use liveblk_engine::format::LocalFuture;
use liveblk_engine::node::{Origin, WriteContent, WriteCopy, WriteFlags, WriteHook, ZeroFlags};

use crate::copy::Copy;
use crate::event::{Action, Operation};
use crate::lifecycle::Ending;
use crate::limits::RETRY_DELAY_NS;
use crate::region::Region;
use crate::spec::CopyMode;

/// See the module.
pub(crate) struct MirrorHook {
    copy: Rc<Copy>,
    /// First bytes of the writes that are being copied; the node's claims keep them apart.
    copied: RefCell<BTreeSet<u64>>,
    /// Whether zeroes may give space of the target back.
    unmap: bool,
    /// Whether only whole granules may be written.
    whole: bool,
}

/// One write that goes to the target, too.
struct ActiveWrite {
    hook: Rc<MirrorHook>,
    range: GuestRange,
    landing: Rc<Landing>,
}

/// What the task of a copied write leaves.
#[derive(Default)]
struct Landing {
    result: RefCell<Option<EngineResult<()>>>,
    /// The target has answered.
    over: Cell<bool>,
    region: Cell<Option<Region>>,
}

/// What goes to the target; the bytes are stable.
enum Content {
    Bytes(Buf),
    Zeroes { unmap: bool },
}

impl MirrorHook {
    pub(crate) fn new(copy: &Rc<Copy>, unmap: bool, whole: bool) -> Rc<Self> {
        Rc::new(Self { copy: Rc::clone(copy), copied: RefCell::default(), unmap, whole })
    }

    /// Whether writes that begin now are copied.
    fn is_active(&self) -> bool {
        let job = self.copy.job();
        !self.copy.is_dead() && job.copy_mode() == CopyMode::WriteBlocking && !job.wants_pause()
    }
}

impl WriteHook for MirrorHook {
    fn before_write(&self, _: GuestRange) -> Option<LocalFuture<'static, EngineResult<()>>> {
        None
    }

    fn after_write(&self, range: GuestRange) {
        if self.copy.is_dead() {
            return;
        }
        if self.copied.borrow().contains(&range.start.bytes()) {
            self.copy.touch(range);
        } else {
            self.copy.job().set_synced(false);
            self.copy.mark(range, true);
        }
    }

    fn copies_bytes(&self) -> bool {
        self.is_active()
    }

    fn may_delay_guests(&self) -> bool {
        self.copy.job().convergence().is_some()
    }

    fn guest_delay(&self) -> Option<LocalFuture<'static, ()>> {
        let convergence = self.copy.job().convergence()?;
        let (copy, delay) = (Rc::clone(&self.copy), convergence.delay());
        let is_over = move || {
            let job = copy.job();
            let stands = job.wants_pause() || job.ending() != Ending::None;
            stands || copy.is_dead() || convergence.delay() == 0
        };
        if is_over() {
            return None;
        }
        let copy = Rc::clone(&self.copy);
        Some(Box::pin(async move {
            let job = copy.job();
            let _: Either<(), ()> =
                select(job.changed().until(is_over), job.core().sleep(delay)).await;
        }))
    }

    fn begin_copy(
        self: Rc<Self>,
        range: GuestRange,
        content: WriteContent<'_>,
    ) -> Option<Box<dyn WriteCopy>> {
        let wide = range.widen(self.copy.granularity());
        // A base that is smaller than its top grows when the commit has begun.
        let fits = range.end().bytes() <= self.copy.target().size();
        if !self.is_active() || !fits || (self.whole && wide != range) {
            return None;
        }
        let content = match content {
            // The mode may have changed since the request asked whether to keep its bytes.
            WriteContent::Bytes(buf) if !buf.is_stable() => return None,
            WriteContent::Bytes(buf) => Content::Bytes(buf.clone()),
            WriteContent::Zeroes { unmap } => Content::Zeroes { unmap: unmap && self.unmap },
            WriteContent::Discard => return None,
        };
        self.copied.borrow_mut().insert(range.start.bytes());
        let landing = Rc::new(Landing::default());
        let work = land(Rc::clone(&self.copy), range, content, Rc::clone(&landing));
        drop(self.copy.job().core().spawn(Class::Guest, work));
        Some(Box::new(ActiveWrite { hook: self, range, landing }))
    }
}

/// Writes to the target when no other copy of the granules is in flight.
async fn land(copy: Rc<Copy>, range: GuestRange, content: Content, landing: Rc<Landing>) {
    let Some(region) = copy.claim_for_guest(range).await else { return };
    landing.region.set(Some(region));
    let _flight = copy.guest_flight(range);
    let (target, start) = (copy.target(), range.start.bytes());
    let written = match content {
        Content::Bytes(buf) => target.write(start, buf, WriteFlags::default(), Origin::Derived),
        Content::Zeroes { unmap } => {
            let flags = ZeroFlags { may_unmap: unmap, ..ZeroFlags::default() };
            target.write_zeroes(start, range.len, flags, Origin::Derived)
        }
    };
    let result = written.await;
    *landing.result.borrow_mut() = Some(result);
    landing.over.set(true);
    copy.job().changed().notify_all();
}

impl WriteCopy for ActiveWrite {
    fn ended(&self) -> LocalFuture<'_, ()> {
        let copy = &self.hook.copy;
        Box::pin(async move {
            let landed = || self.landing.over.get() || copy.is_dead();
            copy.job().changed().until(landed).await;
        })
    }

    fn finish(self: Box<Self>, ok: bool) {
        let copy = &self.hook.copy;
        let result = self.landing.result.take();
        match result {
            Some(Ok(())) if ok => copy.cover(self.range),
            Some(Err(error)) => {
                copy.job().set_synced(false);
                copy.mark(self.range, true);
                self.hook.target_failed(&error);
            }
            // The node's own write failed: what it holds now is anybody's guess. Or the job is
            // over, and this is nobody's business any more.
            _ => {
                copy.job().set_synced(false);
                copy.mark(self.range, true);
            }
        }
    }
}

impl MirrorHook {
    /// Answers a failed write of the target; its range is dirty already.
    fn target_failed(&self, error: &liveblk_engine::Error) {
        if self.copy.is_dead() {
            return;
        }
        match self.copy.job().on_error(Operation::Write, error) {
            Action::Report => self.copy.fail(error.clone().into()),
            Action::Ignore => {
                let now = self.copy.job().core().now();
                self.copy.retry_not_before(now.saturating_add(RETRY_DELAY_NS));
            }
            Action::Stop => {}
        }
    }
}

impl Drop for ActiveWrite {
    fn drop(&mut self) {
        self.hook.copied.borrow_mut().remove(&self.range.start.bytes());
        // A copy that is not waited for any more keeps its region until it has ended.
        if !self.landing.over.get() {
            return;
        }
        drop(self.landing.region.take());
        self.hook.copy.job().changed().notify_all();
    }
}
