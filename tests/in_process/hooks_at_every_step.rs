//! A hook that is added at any step of a write: it sees the write whole or not at all, and what it
//! does not see had ended before it came.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::simulated::{CLUSTER, LEN, host, make, open, write};
use liveblk::engine::Result;
use liveblk::engine::address::GuestRange;
use liveblk::engine::driver::sim::{Rng, Sim, SimConfig};
use liveblk::engine::format::LocalFuture;
use liveblk::engine::graph::{CutPart, Swap, cut};
use liveblk::engine::node::WriteHook;
use liveblk::{Disk, ZeroFlags};

/// Counts writes; a request is in the middle while `begun` is larger than `ended`.
#[derive(Default)]
struct Watch {
    begun: RefCell<Vec<GuestRange>>,
    ended: RefCell<Vec<GuestRange>>,
}

impl WriteHook for Watch {
    fn before_write(&self, range: GuestRange) -> Option<LocalFuture<'static, Result<()>>> {
        self.begun.borrow_mut().push(range);
        None
    }

    fn after_write(&self, range: GuestRange) {
        self.ended.borrow_mut().push(range);
    }
}

impl Watch {
    /// The requests seen from their begin, and to their end, in a fixed order.
    fn seen(&self) -> [Vec<(u64, u64)>; 2] {
        [&self.begun, &self.ended].map(|list| {
            let mut list: Vec<_> =
                list.borrow().iter().map(|range| (range.start.bytes(), range.len)).collect();
            list.sort_unstable();
            list
        })
    }
}

async fn add_hook(disk: Disk, hook: Rc<Watch>, then: impl FnOnce() + 'static) {
    let node = disk.node();
    let swap = {
        let node = Rc::clone(&node);
        move |_: &Rc<liveblk::engine::graph::Graph>| {
            node.add_hook(hook);
            then();
        }
    };
    let part = CutPart {
        core: node.core().id(),
        nodes: vec![node.id()],
        flush: false,
        before_swap: None,
        swap: Swap::Local(Box::new(swap)),
    };
    cut(node.core(), vec![part], 10_000_000_000).await.expect("a cut");
}

/// Writes that allocate, write in place, zero and discard, several in flight.
async fn guest(disk: Disk, number: u64) {
    let mut rng = Rng::new(number);
    for _ in 0..6 {
        let offset = rng.below(30) * 512;
        match rng.below(4) {
            0 => disk
                .write_zeroes(
                    offset,
                    3 * CLUSTER,
                    ZeroFlags { may_unmap: true, ..ZeroFlags::default() },
                )
                .await
                .expect("zeroes"),
            1 => disk.discard(offset, 3 * CLUSTER, false).await.expect("a discard"),
            _ => write(&disk, offset, 2 * LEN + 512, 1).await.expect("a write"),
        }
    }
}

/// Adds a second hook after `steps` steps; false if the guests had ended by then.
fn run(seed: u64, steps: u64) -> bool {
    let mut sim = Sim::new(SimConfig::new(seed));
    let first = Rc::new(Watch::default());
    let hook = Rc::clone(&first);
    let disk = sim.block_on(0, |core| async move {
        make(&core, "/a", 16).await;
        let disk = open(&host(&core), "/a").await;
        add_hook(disk.clone(), hook, || {}).await;
        disk
    });
    let left = Rc::new(Cell::new(4));
    for number in 0..4 {
        let (disk, left) = (disk.clone(), Rc::clone(&left));
        drop(sim.core(0).spawn(liveblk::engine::executor::Class::Guest, async move {
            guest(disk, seed * 4 + number).await;
            left.set(left.get() - 1);
        }));
    }
    sim.run_steps(steps);
    let during = left.get() > 0;
    let second = Rc::new(Watch::default());
    let at_swap = Rc::new(RefCell::new([Vec::new(), Vec::new()]));
    let (hook, seen, noted) = (Rc::clone(&second), Rc::clone(&first), Rc::clone(&at_swap));
    sim.block_on(0, |_| add_hook(disk, hook, move || *noted.borrow_mut() = seen.seen()));
    sim.run_until(|| left.get() == 0);
    let [begun, ended] = at_swap.take();
    assert_eq!(begun, ended, "seed {seed} step {steps}: a write was in the middle of the swap");
    let [begun, ended] = second.seen();
    assert_eq!(begun, ended, "seed {seed} step {steps}: the new hook saw half of a write");
    let [all, _] = first.seen();
    let mut apart = at_swap_and(&first, &second, all.len());
    apart.sort_unstable();
    assert_eq!(all, apart, "seed {seed} step {steps}: each write is before or after, none is lost");
    during
}

/// What the first hook saw before the second came, with what the second saw.
fn at_swap_and(first: &Watch, second: &Watch, all: usize) -> Vec<(u64, u64)> {
    let later = second.begun.borrow().len();
    let range = |range: &GuestRange| (range.start.bytes(), range.len);
    let before = first.begun.borrow().iter().take(all - later).map(range).collect::<Vec<_>>();
    before.into_iter().chain(second.begun.borrow().iter().map(range)).collect()
}

#[test]
fn a_hook_added_at_any_step_sees_whole_writes_only() {
    for seed in 0..3 {
        let mut steps = 0;
        while run(seed, steps) {
            steps += 3;
        }
        assert!(steps > 100, "seed {seed}: the guests were there for {steps} steps");
    }
}
