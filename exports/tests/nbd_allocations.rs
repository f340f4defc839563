//! Steady state: no heap allocation per request, and few system calls.
#![allow(clippy::unwrap_used)]
#![allow(unsafe_code, reason = "a counting allocator")]

mod rig;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use rig::cmd::{READ, WRITE};
use rig::{Bare, Server, request};

const SIZE: u64 = 16 << 20;
const DEPTH: u64 = 32;
const ROUNDS: u64 = 200;

thread_local! {
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: everything is passed on to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTED.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) };
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Rounds of `DEPTH` requests in flight at once.
fn drive(client: &mut Bare, rounds: u64, structured: bool) {
    for round in 0..rounds {
        let mut bytes = Vec::new();
        for cookie in 0..DEPTH {
            let offset = (round * DEPTH + cookie) * 4096 % SIZE;
            let command = if cookie % 2 == 0 { READ } else { WRITE };
            bytes.extend(request(command, 0, cookie, offset, 4096));
            if command == WRITE {
                bytes.extend(vec![cookie as u8 | 1; 4096]);
            }
        }
        client.send(&bytes);
        for _ in 0..DEPTH {
            let magic = client.take(4);
            let rest = client.take(12);
            let error = u32::from_be_bytes(rest[..4].try_into().unwrap());
            if magic == [0x66, 0x8e, 0x33, 0xef] {
                assert!(structured);
                let length = u32::from_be_bytes(client.take(4).try_into().unwrap());
                client.take(length as usize);
            } else {
                assert_eq!(error, 0);
                let cookie = u64::from_be_bytes(rest[4..].try_into().unwrap());
                if cookie % 2 == 0 {
                    client.take(4096);
                }
            }
        }
    }
}

fn count(server: &Server, on: bool) -> usize {
    server.with(move |_, _| async move { COUNTED.set(on) });
    ALLOCATIONS.swap(0, Ordering::Relaxed)
}

/// Allocations and system calls of the core for `ROUNDS` rounds after a warm-up.
fn measure(server: &Server, structured: bool) -> (usize, u64) {
    let mut client = Bare::ready(&server.socket(), "disk", structured);
    drive(&mut client, 300, structured);
    // The calls that switch counting are warm as well.
    for on in [true, false] {
        count(server, on);
    }
    let mut last = (usize::MAX, 0);
    // A queue may still grow once when requests happen to come closer together than in the warm-up.
    // That is over after a few rounds; a request that allocates does so in every one of them.
    for _ in 0..5 {
        let before = server.with(|core, _| async move { core.counters() });
        count(server, true);
        drive(&mut client, ROUNDS, structured);
        let allocations = count(server, false);
        assert!((allocations as u64) < ROUNDS, "{allocations} allocations in {ROUNDS} rounds");
        let after = server.with(|core, _| async move { core.counters() });
        last = (allocations, after.enters - before.enters);
        if allocations == 0 {
            break;
        }
    }
    last
}

#[test]
fn reads_and_writes_in_steady_state_allocate_nothing() {
    let server = Server::start(SIZE);
    for structured in [false, true] {
        assert_eq!(measure(&server, structured).0, 0, "structured: {structured}");
    }
}

#[test]
fn a_batch_of_requests_on_a_file_in_memory_costs_a_few_system_calls() {
    let server = Server::start_in(std::path::Path::new("/dev/shm"), SIZE, |_| {});
    let (allocations, enters) = measure(&server, false);
    let requests = ROUNDS * DEPTH;
    assert_eq!(allocations, 0);
    assert!(enters <= requests / 2, "{enters} system calls for {requests} requests");
}
