//! A client's dirty bitmap in backups and mirrors: what is copied, what the bitmap is afterwards,
//! also after failures, cancels and power cuts (contract.md §3.4, reliability.md Q2, R9).
use std::rc::Rc;

use crate::rig::*;
use liveblk_engine::address::GuestRange;
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::driver::sim::{FaultRule, OpFilter, Sim, SimOpKind};
use liveblk_engine::executor::Core;
use liveblk_engine::node::{NewBitmap, Node};
use liveblk_jobs::{
    BackupSpec, BitmapChoice, BitmapMode, CopyMode, JobManager, MirrorSpec, Status, SyncMode, Verb,
    start_backup, start_mirror,
};

const GRANULE: u64 = 65536;

fn backup(source: &Rc<Node>, target: &Rc<Node>, sync: SyncMode, mode: BitmapMode) -> BackupSpec {
    let mut spec = BackupSpec {
        job: options("j"),
        source: source.clone(),
        target: target.clone(),
        sync,
        allow_larger_target: false,
        compress: false,
        more: Default::default(),
    };
    spec.more.bitmap = BitmapChoice { name: Some("b".into()), mode: Some(mode) };
    spec
}

fn files(sim: &Sim) -> Vec<u8> {
    let first = filled(SIZE);
    sim.fs().create("/d", &first);
    sim.fs().create("/t", &first);
    first
}

/// The two disks, alike, and a bitmap of the source that records from now on.
async fn nodes(core: &Core) -> (Rc<Node>, Rc<Node>) {
    let (d, t) = (node(core, "d", "/d").await, node(core, "t", "/t").await);
    let new = NewBitmap {
        name: "b".into(),
        granularity: Some(GRANULE),
        persistent: false,
        disabled: false,
        follow: false,
    };
    d.add_bitmap(new).await.expect("a bitmap");
    (d, t)
}

fn bits(node: &Node) -> DirtyBitmap {
    node.bitmap("b").expect("there").view(Clone::clone)
}

/// Whether every sector in which the images differ is dirty.
fn covers(bits: &DirtyBitmap, one: &[u8], other: &[u8]) -> bool {
    one.chunks(512)
        .zip(other.chunks(512))
        .enumerate()
        .all(|(sector, (one, other))| one == other || bits.test(sector as u64 * 512))
}

#[test]
fn an_incremental_backup_brings_the_target_to_the_instant_and_leaves_what_came_later() {
    for seed in 0..15 {
        let mut sim = world(seed);
        let first = files(&sim);
        sim.block_on(0, |core| async move {
            let (d, t) = nodes(&core).await;
            let (log, guest) = (Log::new(), disk(&d));
            for _ in 0..20 {
                log.write_one(&core, 0, &guest, 0, SIZE / SECTOR).await;
            }
            let guests = log.guests(&core, 0, &guest, 3);
            let from = core.now();
            let spec = backup(&d, &t, SyncMode::Incremental, BitmapMode::OnSuccess);
            start_backup(spec).await.expect("it starts");
            let to = core.now();
            gone(&core, "j").await;
            guests.stop().await;
            let (copy, live) = (content(&t).await, content(&d).await);
            log.prove_instant(&[(0, &first, &copy)], from, to);
            assert!(covers(&bits(&d), &copy, &live), "seed {seed}: a later write is not recorded");
        });
    }
}

/// Whatever happens: what the target does not durably have is in the bitmap.
#[test]
fn a_backup_that_fails_or_is_cancelled_gives_up_only_what_is_durable() {
    for (seed, mode, cancel) in (0..24).map(|seed| {
        let mode =
            [BitmapMode::OnSuccess, BitmapMode::Always, BitmapMode::Never][seed as usize % 3];
        (seed, mode, seed % 2 == 0)
    }) {
        let mut sim = copying_world(100 + seed);
        let first = files(&sim);
        if !cancel {
            let filter = OpFilter::any().file("/t").kind(SimOpKind::Write);
            sim.inject(FaultRule::once(filter, 5).after(seed / 3));
        }
        let (live, bitmap) = sim.block_on(0, |core| async move {
            let (d, t) = nodes(&core).await;
            let (log, guest) = (Log::new(), disk(&d));
            for _ in 0..40 {
                log.write_one(&core, 0, &guest, 0, SIZE / SECTOR).await;
            }
            let before = bits(&d);
            let mut spec = backup(&d, &t, SyncMode::Bitmap, mode);
            spec.job.speed = if cancel { 1 << 20 } else { 0 };
            let guests = log.guests(&core, 0, &guest, 2);
            start_backup(spec).await.expect("it starts");
            if cancel {
                core.sleep(300_000_000).await;
                let _ = JobManager::of(&core).job_verb("j", Verb::Cancel);
            }
            gone(&core, "j").await;
            guests.stop().await;
            let after = bits(&d);
            if mode != BitmapMode::Always {
                let mut both = after.clone();
                both.merge(&before);
                assert_eq!(both, after, "seed {seed}: a bit was lost");
            }
            assert!(d.bitmap("b").expect("there").user().is_none());
            (log.model(0, &first), after)
        });
        let left = sim.crash().after_power_cut(seed).read("/t").expect("the target is there");
        assert!(covers(&bitmap, &left, &live), "seed {seed} {mode:?}: given up and not durable");
    }
}

#[test]
fn a_full_backup_leaves_in_the_bitmap_what_came_after_it() {
    let mut sim = quick_world(7);
    files(&sim);
    sim.block_on(0, |core| async move {
        let (d, t) = nodes(&core).await;
        let (log, guest) = (Log::new(), disk(&d));
        log.write(&core, 0, &guest, 0, 8, false).await;
        let spec = backup(&d, &t, SyncMode::Full, BitmapMode::OnSuccess);
        start_backup(spec).await.expect("it starts");
        log.write(&core, 0, &guest, 3 * GRANULE / SECTOR, 8, false).await;
        gone(&core, "j").await;
        let mut wanted = DirtyBitmap::new(SIZE, GRANULE);
        wanted.set_range(GuestRange::new(3 * GRANULE, 1));
        assert_eq!(bits(&d), wanted);
    });
}

#[test]
fn a_mirror_of_what_a_bitmap_names_is_exact_and_clears_it_when_it_completes() {
    for (seed, verb, force) in (0..12).map(|seed| {
        let verb = if seed % 3 == 0 { Verb::Complete } else { Verb::Cancel };
        (seed, verb, seed % 3 == 2)
    }) {
        let mut sim = world(200 + seed);
        let first = files(&sim);
        sim.block_on(0, |core| async move {
            let (d, t) = nodes(&core).await;
            let (log, guest) = (Log::new(), disk(&d));
            for _ in 0..20 {
                log.write_one(&core, 0, &guest, 0, SIZE / SECTOR).await;
            }
            let guests = log.guests(&core, 0, &guest, 3);
            let mut spec = MirrorSpec {
                job: options("j"),
                source: d.clone(),
                target: t.clone(),
                sync: SyncMode::Incremental,
                copy_mode: CopyMode::Background,
                granularity: Some(4096),
                allow_larger_target: false,
                more: Default::default(),
            };
            spec.more.bitmap = BitmapChoice { name: Some("b".into()), mode: None };
            start_mirror(spec).await.expect("it starts");
            let manager = JobManager::of(&core);
            manager.until("j", |status| status == Status::Ready).await;
            core.sleep(2_000_000).await;
            let from = core.now();
            manager.block_job_verb("j", verb, force).expect("ends");
            gone(&core, "j").await;
            let to = core.now();
            core.sleep(1_000_000).await;
            guests.stop().await;
            let (copy, live) = (content(&t).await, content(&d).await);
            assert!(covers(&bits(&d), &copy, &live) || verb == Verb::Complete, "seed {seed}");
            match verb {
                Verb::Complete => {
                    assert_eq!(first_difference(&copy, &log.model(0, &first)), None);
                    assert!(bits(&d).is_clean(), "seed {seed}");
                }
                _ if !force => log.prove_instant(&[(0, &first, &copy)], from, to),
                _ => assert!(!bits(&d).is_clean()),
            }
        });
    }
}

fn mirror(source: &Rc<Node>, target: &Rc<Node>, auto_finalize: bool) -> MirrorSpec {
    let mut spec = MirrorSpec {
        job: options("j"),
        source: source.clone(),
        target: target.clone(),
        sync: SyncMode::Incremental,
        copy_mode: CopyMode::Background,
        granularity: Some(4096),
        allow_larger_target: false,
        more: Default::default(),
    };
    spec.job.auto_finalize = auto_finalize;
    spec.more.bitmap = BitmapChoice { name: Some("b".into()), mode: None };
    spec
}

/// All of `wanted` is in `found`.
fn holds(found: &DirtyBitmap, wanted: &DirtyBitmap) -> bool {
    let mut both = found.clone();
    both.merge(wanted);
    both == *found
}

#[test]
fn a_mirrors_bitmap_is_whole_until_the_mirror_has_completed() {
    for (seed, verb) in
        (0..12).map(|seed| (seed, [Verb::Finalize, Verb::Cancel][seed as usize % 2]))
    {
        let mut sim = world(230 + seed);
        files(&sim);
        sim.block_on(0, |core| async move {
            let (d, t) = nodes(&core).await;
            let (log, guest) = (Log::new(), disk(&d));
            for _ in 0..20 {
                log.write_one(&core, 0, &guest, 0, SIZE / SECTOR).await;
            }
            let before = bits(&d);
            let manager = JobManager::of(&core);
            start_mirror(mirror(&d, &t, false)).await.expect("it starts");
            assert_eq!(bits(&d), before, "seed {seed}: at its start");
            manager.until("j", |status| status == Status::Ready).await;
            assert_eq!(bits(&d), before, "seed {seed}: when it is ready");
            log.write_one(&core, 0, &guest, 0, SIZE / SECTOR).await;
            manager.job_verb("j", Verb::Complete).expect("completes");
            manager.until("j", |status| status == Status::Pending).await;
            assert!(holds(&bits(&d), &before), "seed {seed}: before it is finalized");
            manager.job_verb("j", verb).expect("it ends");
            gone(&core, "j").await;
            core.sleep(1_000_000).await;
            match verb {
                Verb::Finalize => assert!(bits(&d).is_clean(), "seed {seed}"),
                _ => assert!(holds(&bits(&d), &before), "seed {seed}: a bit was lost"),
            }
            assert!(d.bitmap("b").expect("there").user().is_none());
        });
    }
}

/// Every write and flush of the target fails in turn: what is not durably there stays dirty.
#[test]
fn a_mirror_that_fails_gives_up_no_bit() {
    let mut failed = 0;
    for seed in 0..16 {
        let mut sim = world(260 + seed);
        files(&sim);
        let kind = if seed % 4 == 3 { SimOpKind::Sync } else { SimOpKind::Write };
        let filter = OpFilter::any().file("/t").kind(kind);
        sim.inject(FaultRule::once(filter, 5).after(seed / 4));
        let ended_well = sim.block_on(0, |core| async move {
            let (d, t) = nodes(&core).await;
            let (log, guest) = (Log::new(), disk(&d));
            for _ in 0..30 {
                log.write_one(&core, 0, &guest, 0, SIZE / SECTOR).await;
            }
            let before = bits(&d);
            let events = Events::of(&core);
            start_mirror(mirror(&d, &t, true)).await.expect("it starts");
            let manager = JobManager::of(&core);
            manager.until("j", |status| status == Status::Ready).await;
            let _ = manager.job_verb("j", Verb::Complete);
            gone(&core, "j").await;
            core.sleep(1_000_000).await;
            let ended_well = !events.has("ERROR");
            match ended_well {
                true => assert!(bits(&d).is_clean(), "seed {seed}"),
                false => assert!(holds(&bits(&d), &before), "seed {seed}: a bit was lost"),
            }
            ended_well
        });
        failed += u64::from(!ended_well);
    }
    assert!(failed > 4, "{failed} failed");
}
