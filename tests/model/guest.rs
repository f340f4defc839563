//! A guest: requests of every kind, one after the other, each judged by the ledger.

use std::rc::Rc;

use liveblk::engine::buf::Buf;
use liveblk::engine::driver::sim::Rng;
use liveblk::engine::node::StatusKind;
use liveblk::{Error, ErrorKind, WriteFlags, ZeroFlags};

use super::ledger::{Tick, Window};
use super::pattern::{self, BLOCK};
use super::world::{DiskState, World};

/// Bytes of the largest request.
const REQUEST_MAX: u64 = 1 << 20;

/// A range of blocks.
#[derive(Clone, Copy, Debug)]
struct Range {
    first: u64,
    count: u64,
}

impl Range {
    fn offset(self) -> u64 {
        self.first * BLOCK as u64
    }

    fn bytes(self) -> u64 {
        self.count * BLOCK as u64
    }

    fn start(self) -> usize {
        usize::try_from(self.first).expect("invariant: small")
    }

    fn blocks(self) -> usize {
        usize::try_from(self.count).expect("invariant: small")
    }

    fn len(self) -> usize {
        self.blocks() * BLOCK
    }
}

/// Makes requests on disk `index` until enough were made.
pub(crate) async fn run(world: Rc<World>, index: usize, mut rng: Rng) {
    while world.take_request() {
        request(&world, index, &mut rng).await;
        if rng.chance(100) {
            world.core.sleep(rng.below(300_000)).await;
        }
    }
}

async fn request(world: &Rc<World>, index: usize, rng: &mut Rng) {
    let state = &world.disks[index];
    let range = place(state, rng);
    state.reach.borrow_mut().push(range.start() + range.blocks());
    match rng.below(100) {
        0..38 => write(world, state, range, rng).await,
        38..60 => read(world, state, range, rng).await,
        60..74 => zero(world, state, range, rng).await,
        74..84 => discard(world, state, range, rng).await,
        84..94 => flush(world, state).await,
        94..97 => abandon(world, state, range),
        _ => status(world, state, range).await,
    }
    let mut reach = state.reach.borrow_mut();
    let at = reach.iter().position(|end| *end == range.start() + range.blocks());
    reach.swap_remove(at.expect("invariant: pushed above"));
}

/// Memory for a request: sometimes unaligned, sometimes in several parts.
fn memory(world: &World, len: usize, rng: &mut Rng) -> Buf {
    let pool = world.core.pool();
    match rng.below(10) {
        0 => {
            let shift = 8 << rng.below(7);
            pool.alloc(len + shift).slice(shift..shift + len)
        }
        1 => {
            let cut = rng.index(len / BLOCK + 1) * BLOCK;
            let mut buf = pool.alloc(cut);
            buf.append(pool.alloc(len - cut));
            buf
        }
        _ => pool.alloc(len),
    }
}

/// Where: small ranges more often, a part of the disk much more often, half of them on borders.
fn place(state: &DiskState, rng: &mut Rng) -> Range {
    let blocks = state.ledger.len() as u64;
    let largest = (REQUEST_MAX / BLOCK as u64).min(blocks);
    let bits = rng.below(u64::from(largest.ilog2()) + 1);
    let mut count = rng.between(1, 1 << bits).min(blocks);
    let area = if rng.chance(600) { (blocks / 8).max(1) } else { blocks };
    let mut first = rng.below(area).min(blocks - count);
    if rng.chance(400) {
        let border = 1 << rng.below(8);
        first = first / border * border;
        count = count.next_multiple_of(border).min(blocks - first);
    }
    if rng.chance(50) {
        first = blocks - count;
    }
    Range { first, count }
}

async fn write(world: &World, state: &DiskState, range: Range, rng: &mut Rng) {
    let value = world.clock.value();
    let buf = memory(world, range.len(), rng);
    pattern::fill(&buf, value, range.first);
    let flags = WriteFlags { fua: rng.chance(100), ..WriteFlags::default() };
    let began = world.clock.tick();
    let id = state.ledger.begin(value, range.start(), range.blocks());
    let answer = state.disk.write(range.offset(), buf, flags).await;
    let sure = judge(world, "write", began, &answer);
    state.ledger.end(id, sure, sure && flags.fua);
}

async fn read(world: &World, state: &DiskState, range: Range, rng: &mut Rng) {
    let buf = memory(world, range.len(), rng);
    let from = world.clock.tick();
    let answer = state.disk.read(range.offset(), buf.clone()).await;
    let window = Window { from, to: world.clock.tick() };
    if judge(world, "read", from, &answer) {
        let found = pattern::values(&buf.to_vec(), range.first)
            .and_then(|values| state.ledger.read(range.start(), &values, window));
        found.unwrap_or_else(|wrong| panic!("a read is wrong: {wrong}"));
    }
}

async fn zero(world: &World, state: &DiskState, range: Range, rng: &mut Rng) {
    let flags = ZeroFlags { may_unmap: rng.chance(600), fua: rng.chance(80), fast: rng.chance(60) };
    let began = world.clock.tick();
    let id = state.ledger.begin(0, range.start(), range.blocks());
    let answer = state.disk.write_zeroes(range.offset(), range.bytes(), flags).await;
    let slow = flags.fast && answer.as_ref().is_err_and(is(ErrorKind::Unsupported));
    let sure = !slow && judge(world, "write zeroes", began, &answer);
    state.ledger.end(id, sure, sure && flags.fua);
}

async fn discard(world: &World, state: &DiskState, range: Range, rng: &mut Rng) {
    let began = world.clock.tick();
    let id = state.ledger.begin(0, range.start(), range.blocks());
    let answer = state.disk.discard(range.offset(), range.bytes(), rng.chance(80)).await;
    judge(world, "discard", began, &answer);
    // Each block may have kept what it had.
    state.ledger.end(id, false, false);
}

async fn flush(world: &World, state: &DiskState) {
    let sent = world.clock.tick();
    let answer = state.disk.flush().await;
    if judge(world, "flush", sent, &answer) {
        state.ledger.flushed(sent);
    }
}

/// A write whose client goes away: it may happen at any later time.
fn abandon(world: &World, state: &DiskState, range: Range) {
    let value = world.clock.value();
    let buf = world.core.pool().alloc(range.len());
    pattern::fill(&buf, value, range.first);
    state.ledger.begin(value, range.start(), range.blocks());
    drop(state.disk.write(range.offset(), buf, WriteFlags::default()));
}

async fn status(world: &World, state: &DiskState, range: Range) {
    let from = world.clock.tick();
    let answer = state.disk.block_status(range.offset(), range.bytes()).await;
    let window = Window { from, to: world.clock.tick() };
    let Ok(runs) = &answer else {
        judge(world, "block status", from, &answer);
        return;
    };
    assert_eq!(runs.iter().map(|run| run.len).sum::<u64>(), range.bytes(), "runs cover the range");
    let mut at = range.offset();
    for run in runs {
        let blocks = at.div_ceil(BLOCK as u64)..(at + run.len) / BLOCK as u64;
        at += run.len;
        if run.kind == StatusKind::Data {
            continue;
        }
        for block in blocks {
            let block = usize::try_from(block).expect("invariant: small");
            assert!(
                state.ledger.may_hold(block, 0, window),
                "block {block} is called {:?} but holds data",
                run.kind
            );
        }
    }
}

/// Whether the answer is good; a failure that nothing explains ends the test.
fn judge<T>(world: &World, what: &str, began: Tick, answer: &Result<T, Error>) -> bool {
    let Err(error) = answer else { return true };
    let explained = match error.kind() {
        ErrorKind::NoSpace => began < world.full_until.get(),
        ErrorKind::Io(_) | ErrorKind::Poisoned => world.is_broken.get(),
        _ => false,
    };
    assert!(explained, "{what} failed: {error}");
    world.requests_failed.set(world.requests_failed.get() + 1);
    false
}

fn is(kind: ErrorKind) -> impl Fn(&Error) -> bool {
    move |error| error.kind() == kind
}
