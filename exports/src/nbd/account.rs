//! What a connection may hold: requests in flight, and memory for them.
//!
//! Each connection has a private allowance that nobody can take from it, so small requests of one
//! client go on whatever the others do. What does not fit comes from memory that the connections of
//! a server share. A client that holds shared memory, and neither reads its replies nor sends what
//! it announced, loses its connection once others have waited [`STALL_NS`] for memory.
//!
//! Order rule: a grant is given back after the last byte of its reply was sent or dropped.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::{Rc, Weak};

use liveblk_engine::executor::Core;
use liveblk_engine::executor::sync::{Either, Notify, Semaphore, select};
use liveblk_engine::limits::BUF_CLASSES;
use liveblk_engine::net::Socket;

use crate::limits::{CONNECTION_BYTES, REQUESTS, SERVER_BYTES, STALL_NS};

/// Memory that the connections of a server share.
pub(crate) struct SharedMemory {
    core: Core,
    free: Semaphore,
    accounts: RefCell<Vec<Weak<Account>>>,
}

/// What one connection holds.
pub(crate) struct Account {
    shared: Rc<SharedMemory>,
    socket: Socket,
    slots: Semaphore,
    private: Semaphore,
    /// Shared bytes held.
    held: Cell<u64>,
    /// Since when the peer has to send what it announced.
    receiving: Cell<Option<u64>>,
    /// Since when the peer has to take what is being sent.
    sending: Cell<Option<u64>>,
    closed: Cell<bool>,
    closing: Notify,
}

/// What the server waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The payload of a write.
    Receiving,
    /// Room for replies.
    Sending,
}

/// The right to one request in flight and its memory.
pub(crate) struct Grant {
    account: Rc<Account>,
    private: u64,
    shared: u64,
}

impl SharedMemory {
    pub(crate) fn new(core: &Core) -> Rc<Self> {
        Rc::new(Self {
            core: core.clone(),
            free: Semaphore::new(core, SERVER_BYTES),
            accounts: RefCell::default(),
        })
    }

    /// Ends every connection.
    pub(crate) fn close_all(&self) {
        let accounts: Vec<_> = self.accounts.borrow().iter().filter_map(Weak::upgrade).collect();
        for account in accounts {
            account.close();
        }
    }

    /// Ends the connection that holds the most among those whose peers stand still.
    fn evict(&self) {
        let now = self.core.now();
        let accounts: Vec<_> = self.accounts.borrow().iter().filter_map(Weak::upgrade).collect();
        let stalled = accounts.iter().filter(|account| {
            let stalled = |since: u64| now.saturating_sub(since) >= STALL_NS;
            let sides = [account.receiving.get(), account.sending.get()];
            account.held.get() > 0 && sides.into_iter().flatten().any(stalled)
        });
        if let Some(account) = stalled.max_by_key(|account| account.held.get()) {
            tracing::warn!(
                bytes = account.held.get(),
                "an NBD client stands still while others need its memory: disconnected"
            );
            account.close();
        }
    }
}

impl Account {
    pub(crate) fn new(shared: &Rc<SharedMemory>, socket: &Socket) -> Rc<Self> {
        let core = &shared.core;
        let account = Rc::new(Self {
            shared: Rc::clone(shared),
            socket: socket.clone(),
            slots: Semaphore::new(core, REQUESTS),
            private: Semaphore::new(core, CONNECTION_BYTES),
            held: Cell::new(0),
            receiving: Cell::new(None),
            sending: Cell::new(None),
            closed: Cell::new(false),
            closing: Notify::new(core),
        });
        shared.accounts.borrow_mut().push(Rc::downgrade(&account));
        account
    }

    /// Waits for a request slot and `bytes` of buffers; `None` when the connection was closed.
    pub(crate) async fn grant(self: &Rc<Self>, bytes: u32) -> Option<Grant> {
        if self.slots.free() == 0 {
            let closed = self.closing.until(|| self.closed.get());
            if let Either::First(()) = select(closed, self.slots.acquire(1)).await {
                return None;
            }
        } else {
            self.slots.acquire(1).await;
        }
        let mut grant = Grant { account: Rc::clone(self), private: 0, shared: 0 };
        let charge = charge(bytes);
        if charge <= CONNECTION_BYTES && self.private.try_acquire(charge) {
            grant.private = charge;
        } else if !self.memory(&mut grant, charge).await {
            return None;
        }
        Some(grant)
    }

    /// Waits for memory of whichever kind comes first; false when the connection was closed.
    async fn memory(&self, grant: &mut Grant, charge: u64) -> bool {
        // Never granted if it cannot fit: such a request takes shared memory.
        let private = async {
            if charge > CONNECTION_BYTES {
                std::future::pending().await
            }
            self.private.acquire(charge).await;
        };
        let mut memory = pin!(select(private, self.shared.free.acquire(charge)));
        let mut closed = pin!(self.closing.until(|| self.closed.get()));
        loop {
            let pause = self.shared.core.sleep(STALL_NS);
            match select(closed.as_mut(), select(memory.as_mut(), pause)).await {
                Either::First(()) => return false,
                Either::Second(Either::First(Either::First(()))) => {
                    grant.private = charge;
                    return true;
                }
                Either::Second(Either::First(Either::Second(()))) => {
                    grant.shared = charge;
                    self.held.set(self.held.get() + charge);
                    return true;
                }
                Either::Second(Either::Second(())) => self.shared.evict(),
            }
        }
    }

    /// Resolves when no request is in flight and no reply is unsent; none can start afterwards.
    pub(crate) async fn idle(&self) {
        self.slots.acquire(REQUESTS).await;
    }

    /// The server waits for the peer from now on, or does not.
    pub(crate) fn wait_for_peer(&self, side: Side, waits: bool) {
        let since = match side {
            Side::Receiving => &self.receiving,
            Side::Sending => &self.sending,
        };
        since.set(waits.then(|| self.shared.core.now()));
    }

    /// Ends the connection from this side: nothing more is received or sent.
    pub(crate) fn close(&self) {
        self.closed.set(true);
        self.socket.shutdown();
        self.closing.notify_all();
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.shared.accounts.borrow_mut().retain(|account| account.strong_count() > 0);
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        let account = &self.account;
        if self.private > 0 {
            account.private.release(self.private);
        }
        if self.shared > 0 {
            account.held.set(account.held.get() - self.shared);
            account.shared.free.release(self.shared);
        }
        account.slots.release(1);
    }
}

/// What a buffer of `bytes` takes from the pool.
fn charge(bytes: u32) -> u64 {
    let block = |bytes: u64| {
        let fits = BUF_CLASSES.iter().map(|class| *class as u64).find(|class| *class >= bytes);
        fits.unwrap_or(bytes)
    };
    let largest = BUF_CLASSES.iter().map(|class| *class as u64).max().unwrap_or(1);
    let bytes = u64::from(bytes);
    let (whole, part) = (bytes / largest * largest, bytes % largest);
    whole + if part > 0 { block(part) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::charge;

    #[test]
    fn buffers_are_charged_by_the_blocks_they_take() {
        assert_eq!(charge(0), 0);
        assert_eq!(charge(1), 4 << 10);
        assert_eq!(charge(4096), 4 << 10);
        assert_eq!(charge(65537), 256 << 10);
        assert_eq!(charge(1 << 20), 1 << 20);
        assert_eq!(charge((32 << 20) - 1), 32 << 20);
    }
}
