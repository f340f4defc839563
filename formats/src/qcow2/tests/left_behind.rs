//! What a writer left behind who was killed, or failed, before a barrier: the next one sees it, and
//! it is not durable. After a power cut nothing may depend on what the cut took back.

use liveblk_engine::driver::sim::{FaultRule, OpFilter, Sim, SimConfig, SimFs, SimOpKind};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::format::{SnapshotInfo, ZeroMode};
use liveblk_engine::{ErrorKind, Result};

use super::bitmaps::bitmaps;
use super::mover::{Disk, file, open};
use crate::qcow2::{CreateOptions, check, create};

const PATH: &str = "/image";
const SIZE: u64 = 1 << 20;
const EIO: i32 = 5;

/// Bytes at the beginning that nobody writes to again.
const KEPT: u64 = 70_000;

/// Where the next writer writes.
const NEXT: u64 = 200_000;

async fn image(core: &Core, path: &str) -> Result<Disk> {
    open(core, file(core, path, false).await, true).await
}

/// An image with data and a bitmap, durable.
fn start() -> SimFs {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create(PATH, &[]);
    sim.block_on(0, |core| async move {
        let options = CreateOptions { cluster_size: 512, ..CreateOptions::new(SIZE) };
        create(&core, &file(&core, PATH, false).await, options).await.expect("is created");
        let disk = image(&core, PATH).await.expect("opens");
        disk.write(0, &[1; KEPT as usize]).await.expect("writes");
        bitmaps(&disk).add("page", 4096, true).await.expect("is added");
        disk.format.close().await.expect("closes");
    });
    sim.crash()
}

/// Every change that gives the places of old tables up.
async fn changes(disk: &Disk) -> Result<()> {
    let named = |name: &str| SnapshotInfo { name: name.to_owned(), ..SnapshotInfo::default() };
    disk.write(100_000, &[2; 9_000]).await?;
    disk.zero(100_000, 4_096, ZeroMode::Unmap).await?;
    disk.format.flush().await?;
    disk.format.resize(40 << 20).await?;
    let snapshots = || disk.format.abilities().snapshots.expect("has snapshots");
    snapshots().create(named("one")).await?;
    disk.write(102_000, &[3; 3_000]).await?;
    snapshots().delete("one").await?;
    bitmaps(disk).add("more", 65_536, true).await?;
    bitmaps(disk).remove("more").await?;
    disk.write(104_000, &[4; 3_000]).await?;
    disk.format.close().await
}

/// Takes what is free, without a flush.
async fn next_writer(core: Core) {
    let disk = image(&core, PATH).await.expect("opens");
    for at in 0..60 {
        disk.write(NEXT + at * 5_000, &[9; 1_500]).await.expect("writes");
    }
}

async fn judge(core: Core, told: String) {
    let storage = file(&core, PATH, false).await;
    let report = check(&core, &storage).await.expect("is checked");
    assert_eq!(report.corruptions, 0, "{told}: {:?}", report.problems);
    let disk = open(&core, storage, false).await.expect("opens");
    let kept = disk.read(0, KEPT).await.expect("reads");
    assert!(kept == vec![1; KEPT as usize], "{told}: what was durable is lost");
    let set = bitmaps(&disk);
    let info = set.list().into_iter().find(|info| info.name == "page").expect("is listed");
    if info.inconsistent {
        return;
    }
    let bits = set.load("page").await.expect("is readable");
    for at in 0..60 {
        let byte = disk.read(NEXT + at * 5_000, 1).await.expect("reads");
        assert!(byte == [0] || bits.test(NEXT + at * 5_000), "{told}: write {at} was missed");
    }
}

/// Row R3.
#[test]
fn what_a_killed_writer_left_is_durable_before_the_next_one_relies_on_it() {
    let start = start();
    let mut steps = 0;
    loop {
        let mut killed = Sim::with_fs(SimConfig::new(1).calm(), start.after_kill());
        let core = killed.core(0);
        let task = core.clone();
        drop(core.spawn(Class::Guest, async move {
            let disk = image(&task, PATH).await.expect("opens");
            changes(&disk).await.expect("nothing fails");
        }));
        let ended = !killed.run_steps(steps);
        let mut next = Sim::with_fs(SimConfig::new(2).calm(), killed.fs().left_behind());
        next.block_on(0, next_writer);
        for seed in 0..4 {
            let cut = next.fs().after_power_cut(steps * 4 + seed);
            let mut after = Sim::with_fs(SimConfig::new(3).calm(), cut);
            let told = format!("killed after {steps}, cut {seed}");
            after.block_on(0, |core| judge(core, told));
        }
        if ended {
            break;
        }
        steps += 2;
    }
    assert!(steps > 100, "there are many steps: {steps}");
}

/// Row Q12.
#[test]
fn an_image_whose_barrier_failed_is_not_opened_for_writing_again_and_can_be_read() {
    let mut sim = Sim::with_fs(SimConfig::new(1).calm(), start());
    let disk = sim.block_on(0, |core| async move { image(&core, PATH).await.expect("opens") });
    // The mark that the bitmap is in use is written, and then not durable.
    let syncs = OpFilter::any().file(PATH).kind(SimOpKind::Sync);
    sim.inject(FaultRule::once(syncs, EIO));
    let told = sim.block_on(0, |_| async move { disk.write(NEXT, &[9; 512]).await });
    assert_eq!(told.expect_err("the mark is not durable").errno(), EIO);
    sim.block_on(0, |core| async move {
        let refused = image(&core, PATH).await.err().expect("is refused");
        assert_eq!(refused.kind(), ErrorKind::Io(EIO));
        let disk = open(&core, file(&core, PATH, false).await, false).await.expect("opens");
        assert_eq!(disk.read(0, 4).await.expect("reads"), [1; 4]);
        let refused = disk.format.set_writable(true).await.expect_err("is refused");
        assert_eq!(refused.kind(), ErrorKind::Io(EIO));
        assert_eq!(disk.read(0, 4).await.expect("reads"), [1; 4]);
    });
    for seed in 0..20 {
        let mut after = Sim::with_fs(SimConfig::new(3).calm(), sim.fs().after_power_cut(seed));
        after.block_on(0, |core| judge(core, format!("cut {seed}")));
    }
}
