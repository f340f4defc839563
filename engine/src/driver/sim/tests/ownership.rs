//! Buffers belong to their operation until its completion, whatever happens to futures, tasks and
//! the world; the same canary runs on the real ring.
#![expect(unsafe_code, reason = "a canary is foreign memory with an owner that reports its end")]

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::{create, open};
use crate::buf::Buf;
use crate::driver::sim::*;
use crate::executor::{Class, CoreId, Engine, EngineConfig};
use crate::storage::{File, FileOptions};

/// Page-aligned memory that records, when it is given back, whether it was filled by then.
struct Canary {
    memory: NonNull<u8>,
    len: usize,
    freed: Box<dyn Fn(&[u8])>,
}

impl Canary {
    fn buf(len: usize, freed: impl Fn(&[u8]) + 'static) -> Buf {
        let length = std::num::NonZero::new(len).expect("a canary has bytes");
        // SAFETY: a fresh anonymous mapping aliases nothing.
        let memory = unsafe {
            nix::sys::mman::mmap_anonymous(
                None,
                length,
                nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE,
                nix::sys::mman::MapFlags::MAP_PRIVATE,
            )
        };
        let memory = memory.expect("memory for a canary").cast::<u8>();
        let owner: Box<dyn Any> = Box::new(Self { memory, len, freed: Box::new(freed) });
        // SAFETY: the mapping lives until the owner is dropped and does not move with it.
        unsafe { Buf::foreign(memory, len, owner, true) }
    }
}

impl Drop for Canary {
    fn drop(&mut self) {
        // SAFETY: the mapping has len bytes; nobody else may touch them any more, which is what the
        // test is about.
        let bytes = unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.len) };
        (self.freed)(bytes);
        // SAFETY: mapped by `buf` with this length, unmapped once.
        unsafe { nix::sys::mman::munmap(self.memory.cast(), self.len) }.expect("it was mapped");
    }
}

#[test]
fn buffers_of_dropped_reads_stay_owned_until_their_completion() {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/f", &[6; 8192]);
    let core = sim.core(0);
    let file =
        sim.block_on(0, |core| async move { open(&core, "/f", FileOptions::default()).await });
    let hold = sim.hold(OpFilter::any().kind(SimOpKind::Read), HoldPoint::Start);
    let filled = Rc::new(Cell::new(None));
    let seen = Rc::clone(&filled);
    let buf = Canary::buf(8192, move |bytes| seen.set(Some(bytes == [6; 8192])));
    drop(file.read(0, buf));
    let pooled = core.pool().alloc(4096);
    drop(file.read(0, pooled));
    drop(file);
    sim.run_idle();
    assert_eq!((hold.held(), filled.get(), core.pool().in_use()), (2, None, 4096));
    assert_eq!(core.operations_in_flight(), 2);
    hold.release();
    sim.run_idle();
    assert_eq!((filled.get(), core.pool().in_use()), (Some(true), 0));
    assert_eq!(core.operations_in_flight(), 0);
}

#[test]
fn tasks_dropped_by_a_cut_never_run_on_and_give_everything_back() {
    struct Guard(Rc<RefCell<Vec<&'static str>>>, crate::executor::Core);
    impl Drop for Guard {
        fn drop(&mut self) {
            self.0.borrow_mut().push("dropped");
            // What undoing guards do: start a task. It must not run either.
            let log = Rc::clone(&self.0);
            drop(self.1.spawn(Class::Guest, async move { log.borrow_mut().push("undo ran") }));
        }
    }
    let mut sim = Sim::new(SimConfig::new(2).cores(2));
    let log = Rc::new(RefCell::new(Vec::new()));
    let freed = Rc::new(Cell::new(0));
    sim.fs().create("/f", &[1; 65_536]);
    for index in 0..2 {
        let core = sim.core(index);
        let guard = Guard(Rc::clone(&log), core.clone());
        let (inside, count) = (core.clone(), Rc::clone(&freed));
        drop(core.spawn(Class::Guest, async move {
            let guard = guard;
            let file = open(&inside, "/f", FileOptions::default()).await;
            loop {
                let count = Rc::clone(&count);
                let buf = Canary::buf(65_536, move |_| count.set(count.get() + 1));
                file.read(0, buf).await.unwrap();
                // The other core is told something that it will never hear in full.
                inside.call(CoreId(1 - index), |core| async move { core.sleep(5).await }).await;
                guard.0.borrow_mut().push("ran");
            }
        }));
    }
    sim.run_steps(500);
    let rounds = log.borrow().iter().filter(|entry| **entry == "ran").count();
    assert!(rounds > 2);
    let core = sim.core(0);
    let _survivors = sim.crash();
    let log = log.borrow();
    assert_eq!(log.iter().filter(|entry| **entry == "dropped").count(), 2);
    assert!(!log.contains(&"undo ran"));
    assert_eq!(log.iter().filter(|entry| **entry == "ran").count(), rounds);
    assert_eq!(core.operations_in_flight(), 0);
    assert!(freed.get() >= rounds);
}

#[test]
#[should_panic(expected = "changed while it was written")]
fn a_write_buffer_that_changes_in_flight_is_caught() {
    let mut sim = Sim::new(SimConfig::new(3).calm());
    sim.block_on(0, |core| async move {
        let file = create(&core, "/f").await;
        let buf = core.pool().zeroed(4096);
        let write = file.write(0, buf.clone(), false);
        buf.copy_from(100, &[1]);
        write.await
    })
    .unwrap();
}

#[test]
fn a_read_buffer_is_poison_until_its_completion() {
    let mut sim = Sim::new(SimConfig::new(4).calm());
    sim.fs().create("/f", &[0; 4096]);
    let buf = sim.core(0).pool().zeroed(4096);
    let file =
        sim.block_on(0, |core| async move { open(&core, "/f", FileOptions::default()).await });
    let hold = sim.hold(OpFilter::any(), HoldPoint::Start);
    let read = file.read(0, buf.clone());
    assert!(!buf.is_zero());
    hold.release();
    sim.block_on(0, |_| read).unwrap();
    assert!(buf.is_zero());
}

/// A ring that is closed does not stop the kernel from writing: the engine must wait for its reads.
#[test]
fn a_real_engine_dropped_with_reads_in_flight_frees_no_buffer_early() {
    const READ: usize = 1 << 20;
    const READS: usize = 16;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("canary");
    std::fs::write(&path, vec![0xc5; READ * READS]).expect("a file to read");
    for direct in [true, false] {
        let early = Arc::new(Mutex::new(Vec::new()));
        let freed = Arc::new(AtomicUsize::new(0));
        let engine = Engine::start(&EngineConfig { cores: 1 }).expect("a ring");
        let (path, early_inside, freed_inside) =
            (path.clone(), Arc::clone(&early), Arc::clone(&freed));
        let started = engine.handle().run(CoreId(0), move |core| async move {
            let options = FileOptions { path: path.clone(), direct, ..FileOptions::default() };
            let file = match File::open(&core, options).await {
                Ok(file) => file,
                // Not every file system takes O_DIRECT.
                Err(_) => File::open(&core, FileOptions { path, ..FileOptions::default() }).await?,
            };
            for index in 0..READS {
                let (early, freed) = (Arc::clone(&early_inside), Arc::clone(&freed_inside));
                let buf = Canary::buf(READ, move |bytes| {
                    freed.fetch_add(1, Ordering::SeqCst);
                    if !bytes.iter().all(|byte| *byte == 0xc5) {
                        early.lock().unwrap().push(index);
                    }
                });
                let read = file.read((index * READ) as u64, buf);
                if index % 2 == 0 {
                    drop(read);
                } else {
                    let task = core.spawn(Class::Guest, async move { drop(read.await) });
                    drop(task);
                }
            }
            Ok::<(), crate::Error>(())
        });
        started.wait().expect("the engine runs").expect("the file opens");
        drop(engine);
        assert_eq!(freed.load(Ordering::SeqCst), READS, "every buffer came back");
        assert_eq!(*early.lock().unwrap(), Vec::<usize>::new(), "freed before it was filled");
    }
}
