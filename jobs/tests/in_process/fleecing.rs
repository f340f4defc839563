//! Copy-before-write filters and the view of the snapshot they keep, under guest writes on the
//! simulator: the instant, failures of the target for guest or snapshot, hung targets, discards.
use std::rc::Rc;

use crate::rig::*;
use liveblk_engine::ErrorKind;
use liveblk_engine::address::GuestRange;
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::driver::sim::{FaultRule, HoldPoint, OpFilter, Sim, SimOpKind};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::graph::Graph;
use liveblk_engine::node::{Node, Origin};
use liveblk_jobs::{
    BackupSpec, CopyBeforeWriteSpec, CopyMode, JobManager, MirrorSpec, OnCbwError, Status,
    SyncMode, Verb, add_copy_before_write, add_snapshot_access, start_backup, start_mirror,
};

const GRANULE: u64 = 65536;

fn cbw(source: &Rc<Node>, target: &Rc<Node>, on_error: OnCbwError) -> CopyBeforeWriteSpec {
    CopyBeforeWriteSpec {
        name: Some("cbw".into()),
        source: source.clone(),
        target: target.clone(),
        owned: None,
        bitmap: None,
        on_error,
        timeout_ns: None,
        min_cluster_size: 0,
    }
}

/// Files `/d` (filled) and `/t`, `/u` (zero).
fn files(sim: &Sim) -> Vec<u8> {
    let first = filled(SIZE);
    sim.fs().create("/d", &first);
    for name in ["/t", "/u"] {
        sim.fs().create(name, &vec![0; SIZE as usize]);
    }
    first
}

async fn nodes(core: &Core) -> (Rc<Node>, Rc<Node>, Rc<Node>) {
    (node(core, "d", "/d").await, node(core, "t", "/t").await, node(core, "u", "/u").await)
}

fn view(core: &Core, filter: &Rc<Node>) -> Rc<Node> {
    add_snapshot_access(core, Some("sa"), filter, true).expect("a view")
}

async fn try_read(node: &Rc<Node>, offset: u64, len: usize) -> Result<Vec<u8>, ErrorKind> {
    let buf = node.core().pool().alloc(len);
    let read = node.read(offset, buf.clone(), Origin::External).await;
    read.map(|()| buf.to_vec()).map_err(|error| error.kind())
}

/// Reads the node piece by piece in a random order, guests writing meanwhile.
async fn slowly(core: &Core, node: &Rc<Node>) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    let piece = 48 * 1024_u64;
    let mut order: Vec<u64> = (0..SIZE / piece).collect();
    while !order.is_empty() {
        let at = order.swap_remove((core.random() % order.len() as u64) as usize) * piece;
        let found = try_read(node, at, piece as usize).await.expect("the snapshot reads");
        bytes[at as usize..(at + piece) as usize].copy_from_slice(&found);
        core.sleep(core.random() % 100_000).await;
    }
    bytes
}

#[test]
fn the_view_reads_the_instant_whatever_guests_write() {
    for (seed, policy) in (0..20).map(|seed| {
        let strict = seed % 2 == 0;
        (seed, if strict { OnCbwError::BreakGuestWrite } else { OnCbwError::BreakSnapshot })
    }) {
        let mut sim = world(seed);
        let first = files(&sim);
        sim.block_on(0, |core| async move {
            let (d, t, _) = nodes(&core).await;
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 4);
            core.sleep(2_000_000).await;
            let from = core.now();
            let filter = add_copy_before_write(cbw(&d, &t, policy)).await.expect("a filter");
            let to = core.now();
            let sa = view(&core, &filter);
            let one = slowly(&core, &sa).await;
            let two = slowly(&core, &sa).await;
            guests.stop().await;
            assert_eq!(log.failures.get(), 0);
            assert_eq!(first_difference(&one, &two), None, "seed {seed}");
            log.prove_instant(&[(0, &first, &one)], from, to);
            assert_eq!(first_difference(&content(&d).await, &log.model(0, &first)), None);
            let graph = Graph::of(&core);
            graph.remove(&sa).await.expect("removable");
            graph.remove(&filter).await.expect("removable");
            assert!(t.users().is_empty());
            log.write_one(&core, 0, &guest, 0, SIZE / SECTOR).await;
        });
    }
}

/// contract.md §0: the peer's mirror from such a view writes zeroes where the chain has data.
#[test]
fn a_mirror_and_a_backup_of_the_view_are_the_instant() {
    for seed in 0..10 {
        let mut sim = world(50 + seed);
        let first = files(&sim);
        sim.block_on(0, |core| async move {
            let (d, t, u) = nodes(&core).await;
            let (log, guest) = (Log::new(), disk(&d));
            let guests = log.guests(&core, 0, &guest, 3);
            core.sleep(1_000_000).await;
            let from = core.now();
            let mut keep = backup(&d, &t);
            keep.sync = SyncMode::None;
            keep.more.filter_name = Some("cbw".into());
            start_backup(keep).await.expect("it starts");
            let to = core.now();
            let filter = Graph::of(&core).find("cbw").expect("the job's filter has its name");
            let sa = view(&core, &filter);
            if seed % 2 == 0 {
                start_mirror(mirror(&sa, &u)).await.expect("it starts");
                let manager = JobManager::of(&core);
                manager.until("m", |status| status == Status::Ready).await;
                manager.block_job_verb("m", Verb::Cancel, false).expect("a copy");
            } else {
                let mut copy = backup(&sa, &u);
                copy.job = options("m");
                start_backup(copy).await.expect("it starts");
            }
            gone(&core, "m").await;
            guests.stop().await;
            log.prove_instant(&[(0, &first, &content(&u).await)], from, to);
            JobManager::of(&core).job_verb("j", Verb::Cancel).expect("cancels");
            gone(&core, "j").await;
            assert!(Graph::of(&core).find("cbw").is_err(), "the filter goes with the job");
            assert_eq!(try_read(&sa, 0, 512).await, Err(ErrorKind::Unsupported));
        });
    }
}

fn backup(source: &Rc<Node>, target: &Rc<Node>) -> BackupSpec {
    BackupSpec {
        job: options("j"),
        source: source.clone(),
        target: target.clone(),
        sync: SyncMode::Full,
        allow_larger_target: false,
        compress: false,
        more: Default::default(),
    }
}

fn mirror(source: &Rc<Node>, target: &Rc<Node>) -> MirrorSpec {
    MirrorSpec {
        job: options("m"),
        source: source.clone(),
        target: target.clone(),
        sync: SyncMode::Full,
        copy_mode: CopyMode::Background,
        granularity: None,
        allow_larger_target: false,
        more: Default::default(),
    }
}

#[test]
fn break_guest_write_fails_the_guest_and_keeps_the_snapshot_right() {
    for nth in 0..10 {
        let mut sim = world(100 + nth);
        let first = files(&sim);
        let filter = OpFilter::any().file("/t").kind(SimOpKind::Write);
        sim.inject(FaultRule::once(filter, 5).after(nth));
        sim.block_on(0, |core| async move {
            let (d, t, _) = nodes(&core).await;
            let (log, guest) = (Log::new(), disk(&d));
            let spec = cbw(&d, &t, OnCbwError::BreakGuestWrite);
            let filter = add_copy_before_write(spec).await.expect("a filter");
            let sa = view(&core, &filter);
            for at in 0..14 {
                let failures = log.failures.get();
                log.write(&core, 0, &guest, at * 300, 200, false).await;
                if log.failures.get() > failures {
                    // The write that failed changed nothing.
                    log.writes.borrow_mut().last_mut().expect("just written").sectors = 0;
                }
            }
            assert_eq!(log.failures.get(), 1, "one write met the failure");
            assert_eq!(first_difference(&content(&sa).await, &first), None);
            assert_eq!(first_difference(&content(&d).await, &log.model(0, &first)), None);
        });
    }
}

#[test]
fn break_snapshot_fails_the_snapshot_and_never_the_guest() {
    for nth in 0..10 {
        let mut sim = world(200 + nth);
        let first = files(&sim);
        let filter = OpFilter::any().file("/t").kind(SimOpKind::Write);
        sim.inject(FaultRule::once(filter, 28).after(nth));
        sim.block_on(0, |core| async move {
            let (d, t, _) = nodes(&core).await;
            let (log, guest) = (Log::new(), disk(&d));
            let spec = cbw(&d, &t, OnCbwError::BreakSnapshot);
            let filter = add_copy_before_write(spec).await.expect("a filter");
            let sa = view(&core, &filter);
            let mut failed = false;
            for at in 0..14 {
                log.write(&core, 0, &guest, at * 300, 200, false).await;
                match try_read(&sa, 0, SIZE as usize).await {
                    Ok(bytes) => {
                        assert!(!failed, "a broken snapshot stays broken");
                        assert_eq!(first_difference(&bytes, &first), None, "{nth}");
                    }
                    Err(kind) => {
                        assert_eq!(kind, ErrorKind::NoSpace);
                        failed = true;
                    }
                }
            }
            assert!(failed);
            assert_eq!(log.failures.get(), 0);
            assert_eq!(first_difference(&content(&d).await, &log.model(0, &first)), None);
        });
    }
}

#[test]
fn a_timeout_ends_the_wait_of_a_guest_as_the_policy_says() {
    for policy in [OnCbwError::BreakGuestWrite, OnCbwError::BreakSnapshot] {
        let mut sim = world(300);
        files(&sim);
        let (guest, sa) = sim.block_on(0, |core| async move {
            let (d, t, _) = nodes(&core).await;
            let mut spec = cbw(&d, &t, policy);
            spec.timeout_ns = Some(2_000_000_000);
            let filter = add_copy_before_write(spec).await.expect("a filter");
            let sa = view(&core, &filter);
            (disk(&d), sa)
        });
        // The source does not answer the read of the old content.
        let hold = sim.hold(OpFilter::any().file("/d").kind(SimOpKind::Read), HoldPoint::Start);
        let before = sim.now();
        let writer = guest.clone();
        let log = Log::new();
        let seen = Rc::clone(&log);
        sim.block_on(0, |core| async move {
            log.write(&core, 0, &writer, 8, 8, false).await;
        });
        let waited = sim.now() - before;
        assert!((2_000_000_000..3_000_000_000).contains(&waited), "{waited}");
        hold.release();
        let strict = policy == OnCbwError::BreakGuestWrite;
        assert_eq!(seen.failures.get(), u64::from(strict));
        sim.block_on(0, |_| async move {
            let found = try_read(&sa, 0, SIZE as usize).await.map(drop);
            let wanted = if strict { Ok(()) } else { Err(ErrorKind::TimedOut) };
            assert_eq!(found, wanted);
        });
    }
}

#[test]
fn a_reader_of_the_source_holds_back_the_guest_that_would_overwrite_it() {
    let mut sim = world(301);
    let first = files(&sim);
    let (guest, sa) = sim.block_on(0, |core| async move {
        let (d, t, _) = nodes(&core).await;
        let spec = cbw(&d, &t, OnCbwError::BreakSnapshot);
        let filter = add_copy_before_write(spec).await.expect("a filter");
        let sa = view(&core, &filter);
        (disk(&d), sa)
    });
    let hold = sim.hold_nth(OpFilter::any().file("/d").kind(SimOpKind::Read), HoldPoint::Start, 0);
    let core = sim.core(0);
    let read = core.spawn(Class::Guest, async move { try_read(&sa, 0, GRANULE as usize).await });
    sim.run_for(1_000_000);
    let writer = guest.clone();
    let write = core.spawn(Class::Guest, async move {
        let buf = writer.core().pool().alloc(4096);
        buf.fill(9);
        writer.write(0, buf, Default::default()).await.expect("a write");
    });
    sim.run_for(5_000_000);
    hold.release();
    let found = sim.block_on(0, |_| read).expect("the snapshot reads");
    assert!(found == first[..GRANULE as usize], "the reader saw the guest's write");
    sim.block_on(0, |_| write);
}

#[test]
fn what_the_reader_discards_and_what_no_bitmap_names_cannot_be_read() {
    let mut sim = world(302);
    let first = files(&sim);
    sim.block_on(0, |core| async move {
        let (d, t, _) = nodes(&core).await;
        let guest = disk(&d);
        let mut bits = DirtyBitmap::new(SIZE, 4096);
        bits.set_range(GuestRange::new(2 * GRANULE, 4 * GRANULE));
        let mut spec = cbw(&d, &t, OnCbwError::BreakGuestWrite);
        spec.bitmap = Some(bits);
        let filter = add_copy_before_write(spec).await.expect("a filter");
        let sa = view(&core, &filter);
        let log = Log::new();
        for at in 0..12 {
            log.write(&core, 0, &guest, at * GRANULE / SECTOR + 3, 2, false).await;
        }
        let range = 2 * GRANULE as usize..6 * GRANULE as usize;
        let found = try_read(&sa, 2 * GRANULE, 4 * GRANULE as usize).await.expect("named");
        assert!(found == first[range]);
        let refused = Err(ErrorKind::PolicyRefused);
        assert_eq!(try_read(&sa, GRANULE, 512).await.map(drop), refused);
        assert_eq!(try_read(&sa, 5 * GRANULE, 2 * GRANULE as usize).await.map(drop), refused);
        sa.discard(3 * GRANULE - 512, GRANULE + 1024, Origin::External).await.expect("a discard");
        assert_eq!(try_read(&sa, 3 * GRANULE, 512).await.map(drop), refused);
        assert!(try_read(&sa, 2 * GRANULE, GRANULE as usize).await.is_ok(), "not whole: kept");
    });
}

#[test]
fn a_filter_serves_guests_and_moves_none() {
    let mut sim = world(303);
    files(&sim);
    sim.block_on(0, |core| async move {
        let (d, t, _) = nodes(&core).await;
        let guest = disk(&d);
        let spec = cbw(&d, &t, OnCbwError::BreakSnapshot);
        let filter = add_copy_before_write(spec).await.expect("a filter");
        assert_eq!(&*guest.node_name(), "d");
        let through = disk(&filter);
        let buf = core.pool().alloc(512);
        buf.fill(3);
        through.write(0, buf, Default::default()).await.expect("a write");
        assert_eq!(try_read(&d, 0, 512).await, Ok(vec![3; 512]));
        let sizes = (filter.size(), filter.driver(), filter.is_writable());
        assert_eq!(sizes, (SIZE, "copy-before-write", true));
        let refused = Graph::of(&core).remove(&d).await.map_err(|error| error.kind());
        assert_eq!(refused, Err(ErrorKind::Busy));
        let text = |spec| async move { add_copy_before_write(spec).await.unwrap_err().to_string() };
        let mut again = cbw(&d, &d, OnCbwError::BreakSnapshot);
        again.name = Some("again".into());
        assert_eq!(text(again).await, "Source and target cannot be the same");
    });
}
