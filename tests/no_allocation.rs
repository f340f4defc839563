//! In steady state a guest request on allocated clusters allocates no heap memory, and a loop turn
//! enters the kernel at most once.
//!
//! The counting allocator counts only on the core's thread while it is switched on.

#![expect(unsafe_code, reason = "a global allocator is an unsafe trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;

use liveblk::{Disk, Host, WriteFlags, run};

struct Counting;

thread_local! {
    static COUNT: Cell<Option<u64>> = const { Cell::new(None) };
}

fn count() {
    let _ = COUNT.try_with(|count| count.set(count.get().map(|n| n + 1)));
}

// SAFETY: every call is passed on to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One round of guest requests: 4 KiB, cluster-crossing and 1 MiB reads and writes, 32 in flight.
async fn round(host: &Host, disk: &Disk, receipts: &mut Vec<liveblk::engine::node::Receipt>) {
    for index in 0..16_u64 {
        let small = host.core().pool().alloc(4096);
        receipts.push(disk.write(index * 65536 + 4096, small.clone(), WriteFlags::default()));
        receipts.push(disk.read(index * 65536 + 8192, small));
    }
    for receipt in receipts.drain(..) {
        receipt.await.unwrap();
    }
    // What the top does not have.
    let absent = host.core().pool().alloc(65536);
    disk.read(12 << 20, absent.clone()).await.unwrap();
    disk.read((12 << 20) + 4096, absent.slice(0..4096)).await.unwrap();
    let large = host.core().pool().alloc(1 << 20);
    disk.write(65536 - 512, large.clone(), WriteFlags::default()).await.unwrap();
    disk.read(65536 - 512, large).await.unwrap();
    let crossing = host.core().pool().alloc(16384);
    disk.write(
        3 * 65536 - 8192,
        crossing.clone(),
        WriteFlags { fua: false, ..WriteFlags::default() },
    )
    .await
    .unwrap();
    disk.read(3 * 65536 - 8192, crossing).await.unwrap();
}

fn measured(folder: &Path) -> (u64, u64, u64) {
    let dir = tempfile::tempdir_in(folder).unwrap();
    let [base, middle, top] = ["a.qcow2", "b.qcow2", "c.qcow2"].map(|name| dir.path().join(name));
    run(move |host| async move {
        host.create(&base, "qcow2", 16 << 20).await?;
        host.create_overlay(&middle, &base, "qcow2").await?;
        host.create_overlay(&top, &middle, "qcow2").await?;
        let images = [("qcow2", &*base), ("qcow2", &*middle), ("qcow2", &*top)];
        let node = host.open_chain("disk", &images).await?;
        let disk = host.attach(&node)?;
        for index in 0..8 {
            disk.write(index << 20, host.space(1 << 20), WriteFlags::default()).await?;
        }
        disk.flush().await?;
        let mut receipts = Vec::with_capacity(64);
        for _ in 0..50 {
            round(&host, &disk, &mut receipts).await;
        }
        let before = host.core().counters();
        COUNT.set(Some(0));
        for _ in 0..50 {
            round(&host, &disk, &mut receipts).await;
        }
        let allocations = COUNT.take().unwrap();
        let after = host.core().counters();
        Ok((allocations, after.enters - before.enters, after.turns - before.turns))
    })
    .unwrap()
}

#[test]
fn a_guest_request_allocates_nothing_and_a_turn_enters_once() {
    for folder in [".", "/dev/shm"] {
        let (allocations, enters, turns) = measured(Path::new(folder));
        println!("{folder}: {allocations} allocations, {enters} enters in {turns} turns");
        assert_eq!(allocations, 0, "allocations for 1,800 requests in {folder}");
        assert!(enters <= turns, "{enters} enters in {turns} turns");
        assert!(turns > 0);
    }
}
