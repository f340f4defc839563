//! Mirrors that are to be ready in time, under guests that write faster than a slow target takes.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use liveblk_engine::driver::sim::{FaultRule, OpFilter, Sim, SimConfig, SimOpKind, SlowDisk};
use liveblk_engine::executor::{Class, Core, JoinHandle};
use liveblk_engine::node::{Disk, Node, WriteFlags};
use liveblk_jobs::{Converge, Event, JobManager, MirrorSpec, Phase, Status, Verb, start_mirror};

use super::rig::*;

const MS: u64 = 1_000_000;

/// Bytes of the disks here.
const BYTES: u64 = 8 << 20;

/// Bytes per second that the target takes.
const TARGET: u64 = 20 << 20;

/// A world whose target is slow. It takes each write as a whole: the rest of a short one would
/// wait for its turn again, which is nobody's fault here.
fn slow_world(seed: u64) -> Sim {
    let filter = OpFilter::any().file("/t");
    let config = SimConfig {
        slow: Some(SlowDisk { filter, bytes_per_second: TARGET }),
        short_per_mille: 0,
        ..SimConfig::new(seed)
    };
    let sim = Sim::new(config);
    sim.fs().create("/d", &filled(BYTES));
    sim.fs().create("/t", &vec![0; BYTES as usize]);
    sim
}

/// Most microseconds that a guest's write may take longer.
const LATENCY_US: u32 = 20_000;

/// The same in nanoseconds.
const LATENCY: u64 = 20 * MS;

/// Nanoseconds that the target takes for what guests have in flight: once before a copy of the
/// granule that a write goes to, once before the write itself.
const OWN: u64 = 2 * 4 * (64 << 10) * 1_000_000_000 / TARGET;

fn spec(source: &Rc<Node>, target: &Rc<Node>, deadline_ms: u32) -> MirrorSpec {
    let mut spec = MirrorSpec {
        job: options("j"),
        source: source.clone(),
        target: target.clone(),
        sync: liveblk_jobs::SyncMode::Full,
        copy_mode: liveblk_jobs::CopyMode::Background,
        granularity: None,
        allow_larger_target: false,
        more: Default::default(),
    };
    spec.more.converge = Some(Converge { deadline_ms, max_latency_us: LATENCY_US });
    spec
}

/// Guests that together offer `bytes_per_second`, in writes of 64 KiB anywhere, each in a part of
/// its own: no write waits for another one of the same bytes.
struct Writers {
    stop: Rc<Cell<bool>>,
    written: Rc<Cell<u64>>,
    /// Nanoseconds that each write took.
    took: Rc<RefCell<Vec<u64>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Writers {
    fn start(core: &Core, disk: &Disk, bytes_per_second: u64) -> Self {
        const COUNT: u64 = 4;
        const LEN: u64 = 64 << 10;
        let (stop, written) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(0)));
        let took = Rc::new(RefCell::new(Vec::new()));
        let pause = LEN * COUNT * 1_000_000_000 / bytes_per_second;
        let tasks = (0..COUNT)
            .map(|guest| {
                let (core, disk) = (core.clone(), disk.clone());
                let (stop, written, took) = (stop.clone(), written.clone(), took.clone());
                core.clone().spawn(Class::Guest, async move {
                    while !stop.get() {
                        let began = core.now();
                        let buf = core.pool().alloc(LEN as usize);
                        buf.fill(core.random() as u8);
                        let part = BYTES / LEN / COUNT;
                        let at = (guest * part + core.random() % part) * LEN;
                        let write = disk.write(at, buf, WriteFlags::default());
                        write.await.expect("the guest's write succeeds");
                        written.set(written.get() + LEN);
                        took.borrow_mut().push(core.now() - began);
                        core.sleep((began + pause).saturating_sub(core.now())).await;
                    }
                })
            })
            .collect();
        Self { stop, written, took, tasks }
    }

    async fn end(self) {
        self.stop.set(true);
        for task in self.tasks {
            task.await;
        }
    }
}

/// What came of a mirror under guests of twice the target's rate.
struct Outcome {
    words: Vec<String>,
    events: Vec<Event>,
    /// Nanoseconds from the start to READY.
    ready: u64,
    /// Bytes that the job counted as done until READY.
    done: u64,
    /// What the longest of the guests' writes took, from the start of the job to its end.
    latency: u64,
}

fn run(seed: u64, deadline_ms: Option<u32>) -> Outcome {
    let mut sim = slow_world(seed);
    sim.block_on(0, |core| async move {
        let events = Events::of(&core);
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let guest = disk(&d);
        let writers = Writers::start(&core, &guest, 2 * TARGET);
        core.sleep(50 * MS).await;
        let offered = writers.written.get();
        assert!(offered * 20 >= 3 * TARGET / 2, "the guest is faster than the target: {offered}");
        let began = core.now();
        let mut spec = spec(&d, &t, deadline_ms.unwrap_or(1));
        if deadline_ms.is_none() {
            spec.more.converge = None;
        }
        writers.took.borrow_mut().clear();
        start_mirror(spec).await.expect("it starts");
        let manager = JobManager::of(&core);
        manager.until("j", |status| status == Status::Ready).await;
        let (ready, done) = (core.now() - began, manager.query()[0].current);
        core.sleep(50 * MS).await;
        let told = (manager.query_block()[0].converge, manager.query()[0].converge);
        assert_eq!(told.0.is_some(), deadline_ms.is_some());
        assert_eq!(told.0, told.1);
        assert_eq!(told.0.map_or(0, |told| told.delay_us), 0, "nobody is delayed any more");
        manager.job_verb("j", Verb::Complete).expect("completes");
        gone(&core, "j").await;
        assert_eq!(&*guest.node_name(), "t");
        core.sleep(50 * MS).await;
        let took = Rc::clone(&writers.took);
        writers.end().await;
        let latency = took.borrow().iter().copied().max().expect("guests write");
        Outcome { words: events.words(), events: events.all(), ready, done, latency }
    })
}

#[test]
fn a_mirror_is_ready_before_its_deadline_under_a_guest_twice_as_fast_as_its_target() {
    for (seed, deadline_ms) in [(0, 2000), (1, 3000), (2, 5000), (10, 4000)] {
        let Outcome { words, ready, latency, .. } = run(seed, Some(deadline_ms));
        assert!(ready < u64::from(deadline_ms) * MS, "{ready} ns, {words:?}");
        assert!(words.contains(&"CONVERGE write-blocking".into()), "{words:?}");
        assert!(!words.iter().any(|word| word.contains("missed")), "{words:?}");
        assert!(words.contains(&"COMPLETED".into()), "{words:?}");
        assert!(latency <= LATENCY + OWN, "a write took {latency} ns");
    }
}

#[test]
fn guests_are_throttled_where_writing_to_both_sides_is_not_enough() {
    for seed in 5..8 {
        // The copy alone takes 400 ms of the target's time: three times as much.
        let Outcome { words, ready, done, latency, .. } = run(seed, Some(1200));
        assert!(words.contains(&"CONVERGE throttling".into()), "{words:?}");
        assert!(ready < 1200 * MS, "{ready} ns, {words:?}");
        assert!(done < 3 * BYTES, "{done} bytes, of which a part is the guest's own");
        assert!(latency <= LATENCY + OWN, "a write took {latency} ns");
    }
}

#[test]
fn without_the_policy_a_guest_waits_longer_than_it_allows() {
    let Outcome { words, latency, .. } = run(5, None);
    assert!(!words.iter().any(|word| word.contains("CONVERGE")), "{words:?}");
    assert!(latency > 2 * (LATENCY + OWN), "the gates were closed for {latency} ns");
}

#[test]
fn a_deadline_that_cannot_be_met_is_told_once_and_the_job_goes_on() {
    let Outcome { words, events, ready, latency, .. } = run(6, Some(100));
    assert!(latency <= LATENCY + OWN, "a write took {latency} ns");
    assert!(ready > 100 * MS, "8 MiB at 20 MiB/s");
    let missed = words.iter().filter(|word| word.contains("missed")).count();
    assert_eq!(missed, 1, "{words:?}");
    assert!(words.contains(&"COMPLETED".into()), "{words:?}");
    let told = events.iter().find_map(|event| match event {
        Event::Converge { info, .. } if info.missed => Some(*info),
        _ => None,
    });
    let told = told.expect("it is told");
    assert!(told.remaining > 0 && told.phase > Phase::Background, "{told:?}");
}

/// What ends a delay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    Pause,
    Cancel,
    Failure,
    /// Nothing does, and nobody waits for the answer.
    Dropped,
}

#[test]
fn a_delayed_write_goes_on_at_once_when_the_job_stands_still_or_is_over() {
    for ends in [Ends::Pause, Ends::Cancel, Ends::Failure, Ends::Dropped] {
        let mut sim = slow_world(11);
        let (core, d, written, began) = sim.block_on(0, |core| async move {
            let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
            let guest = disk(&d);
            let mut spec = spec(&d, &t, 10);
            spec.more.converge = Some(Converge { deadline_ms: 10, max_latency_us: 10_000_000 });
            start_mirror(spec).await.expect("it starts");
            let manager = JobManager::of(&core);
            let delay = || manager.query()[0].converge.map_or(0, |told| told.delay_us);
            while delay() < 2_000_000 {
                core.sleep(MS).await;
            }
            let buf = core.pool().alloc(4096);
            buf.fill(7);
            let write = guest.write(BYTES - 4096, buf, WriteFlags::default());
            let (began, written) = (core.now(), Rc::new(Cell::new(None)));
            let (done, clock) = (written.clone(), core.clone());
            if ends == Ends::Dropped {
                drop(write);
            } else {
                drop(core.spawn(Class::Guest, async move {
                    write.await.expect("the guest's write succeeds");
                    done.set(Some(clock.now()));
                }));
            }
            core.sleep(5 * MS).await;
            assert_eq!(written.get(), None, "it waits");
            match ends {
                Ends::Pause => manager.job_verb("j", Verb::Pause).expect("pauses"),
                Ends::Cancel => manager.job_verb("j", Verb::Cancel).expect("is cancelled"),
                Ends::Failure | Ends::Dropped => {}
            }
            (core, d, written, began)
        });
        if ends == Ends::Failure {
            sim.inject(FaultRule::once(OpFilter::any().file("/t").kind(SimOpKind::Write), 5));
        }
        sim.block_on(0, |_| async move {
            if ends == Ends::Dropped {
                // It lands although nobody waits for it.
                core.sleep(6_000 * MS).await;
                assert!(content(&d).await.ends_with(&[7; 4096]));
                return;
            }
            core.sleep(1_000 * MS).await;
            let took = written.get().unwrap_or_else(|| panic!("{ends:?}")) - began;
            assert!(took < 500 * MS, "{ends:?}: {took} ns");
        });
    }
}

#[test]
fn a_quick_copy_slows_nobody_down() {
    let mut sim = quick_world(9);
    sim.fs().create("/d", &filled(BYTES));
    sim.fs().create("/t", &vec![0; BYTES as usize]);
    sim.block_on(0, |core| async move {
        let events = Events::of(&core);
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let guest = disk(&d);
        start_mirror(spec(&d, &t, 10_000)).await.expect("it starts");
        let manager = JobManager::of(&core);
        manager.until("j", |status| status == Status::Ready).await;
        assert!(!events.has("CONVERGE"), "{:?}", events.words());
        let told = manager.query_block()[0].converge.expect("it is told");
        assert_eq!((told.phase, told.missed), (Phase::Background, false));
        manager.job_verb("j", Verb::Complete).expect("completes");
        gone(&core, "j").await;
        assert_eq!(&*guest.node_name(), "t");
    });
}

#[test]
fn values_that_mean_nothing_are_refused() {
    let mut sim = quick_world(10);
    sim.fs().create("/d", &filled(BYTES));
    sim.fs().create("/t", &vec![0; BYTES as usize]);
    sim.block_on(0, |core| async move {
        let (d, t) = (node(&core, "d", "/d").await, node(&core, "t", "/t").await);
        let text = start_mirror(spec(&d, &t, 0)).await.expect_err("no time").to_string();
        assert_eq!(text, "Parameter 'deadline-ms' expects a value between 1 and 4294967295");
        let mut still = spec(&d, &t, 10);
        still.more.converge = Some(Converge { deadline_ms: 10, max_latency_us: 0 });
        let text = start_mirror(still).await.expect_err("no latency").to_string();
        assert_eq!(text, "Parameter 'max-latency-us' expects a value between 1 and 10000000");
    });
}
