//! What power cuts keep, lose and tear; what syncs, FUA and folder syncs promise.

use std::rc::Rc;

use super::{create, open};
use crate::driver::sim::*;
use crate::driver::{FsOp, OpKind};
use crate::executor::Core;
use crate::storage::{File, FileOptions};

const CUTS: u64 = 200;

async fn write(core: &Core, file: &Rc<File>, offset: u64, len: usize, byte: u8) {
    let buf = core.pool().alloc(len);
    buf.fill(byte);
    file.write(offset, buf, false).await.unwrap();
}

async fn sync_folder(core: &Core) {
    assert_eq!(core.submit(OpKind::Fs(FsOp::SyncFolder("/".into()))).await.result, 0);
}

/// The content of `/f` after each of many cuts; `None` where the file is gone.
fn cuts(fs: &SimFs) -> Vec<Option<Vec<u8>>> {
    (0..CUTS).map(|seed| fs.after_power_cut(seed).read("/f")).collect()
}

#[test]
fn a_flushed_write_survives_every_cut() {
    for seed in 0..20 {
        let mut sim = Sim::new(SimConfig::new(seed));
        sim.block_on(0, |core| async move {
            let file = create(&core, "/f").await;
            sync_folder(&core).await;
            write(&core, &file, 0, 20_000, 1).await;
            write(&core, &file, 5_000, 5_000, 2).await;
            file.flush().await.unwrap();
        });
        assert!(sim.fs().is_durable("/f"));
        let mut expected = vec![1; 20_000];
        expected[5_000..10_000].fill(2);
        for content in cuts(&sim.fs()) {
            assert!(content.as_ref() == Some(&expected));
        }
    }
}

#[test]
fn an_unflushed_write_survives_some_cuts_and_is_torn_in_some() {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/f", &[7; 16_384]);
    sim.block_on(0, |core| async move {
        let file = open(&core, "/f", FileOptions::default()).await;
        write(&core, &file, 0, 16_384, 8).await;
        write(&core, &file, 4_096, 4_096, 9).await;
    });
    let fs = sim.fs();
    let (mut gone, mut whole, mut torn, mut reordered) = (0, 0, 0, 0);
    for content in cuts(&fs).into_iter().map(|content| content.expect("the name is durable")) {
        for sector in content.chunks(512) {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "sectors are atomic");
        }
        let versions: Vec<u8> = content.chunks(512).map(|sector| sector[0]).collect();
        assert!(versions[16..].iter().all(|byte| *byte < 9), "nobody wrote this there");
        let latest = |index: usize| if (8..16).contains(&index) { 9 } else { 8 };
        let kept = versions.iter().enumerate().filter(|(i, byte)| **byte == latest(*i)).count();
        match (versions.iter().all(|byte| *byte == 7), kept) {
            (true, _) => gone += 1,
            (false, 32) => whole += 1,
            (false, _) => torn += 1,
        }
        let second = versions[8..16].contains(&9);
        reordered += u64::from(second && versions[16..].contains(&7));
    }
    assert!(gone > 20 && whole > 20 && torn > 20 && reordered > 10);
    assert_eq!(sim.fs().read("/f").unwrap()[4_096], 9, "looking at cuts changes nothing");
}

#[test]
fn only_what_had_completed_before_a_sync_is_certain() {
    let mut lost = 0;
    for seed in 0..40 {
        let mut sim = Sim::new(SimConfig::new(seed).calm());
        sim.fs().create("/f", &[0; 8192]);
        let core = sim.core(0);
        let file =
            sim.block_on(0, |core| async move { open(&core, "/f", FileOptions::default()).await });
        let hold =
            sim.hold(OpFilter::any().kind(SimOpKind::Write).range(0..1), HoldPoint::Completion);
        let buf = core.pool().alloc(4096);
        buf.fill(1);
        let early = file.write(0, buf.clone(), false);
        sim.block_on(0, |_| {
            let file = Rc::clone(&file);
            async move {
                file.write(4096, buf, false).await.unwrap();
                file.flush().await.unwrap();
            }
        });
        hold.release();
        sim.block_on(0, |_| early).unwrap();
        for content in cuts(&sim.fs()).into_iter().map(|content| content.unwrap()) {
            assert!(content[4096..] == [1; 4096], "completed before the sync");
            lost += u64::from(content[..4096] != [1; 4096]);
        }
    }
    assert!(lost > 100, "in flight when the sync was submitted");
}

#[test]
fn a_forced_write_is_durable_at_its_completion_with_the_size_it_needs() {
    let mut sim = Sim::new(SimConfig::new(2));
    sim.fs().create("/f", &[]);
    sim.block_on(0, |core| async move {
        let file = open(&core, "/f", FileOptions::default()).await;
        write(&core, &file, 0, 4096, 1).await;
        let buf = core.pool().alloc(4096);
        buf.fill(2);
        file.write(8192, buf, true).await.unwrap();
    });
    for content in cuts(&sim.fs()).into_iter().map(|content| content.unwrap()) {
        assert!(content[8192..] == [2; 4096]);
        assert!(content[4096..8192] == [0; 4096]);
    }
}

#[test]
fn a_failed_sync_leaves_what_it_covered_uncertain_for_good() {
    let mut sim = Sim::new(SimConfig::new(3).calm());
    sim.fs().create("/f", &[0; 4096]);
    sim.inject(FaultRule::once(OpFilter::any().kind(SimOpKind::Sync), libc::EIO));
    sim.block_on(0, |core| async move {
        let file = open(&core, "/f", FileOptions::default()).await;
        write(&core, &file, 0, 4096, 1).await;
        file.flush().await.unwrap_err();
        // The kernel has forgotten, but we have not: every descriptor of the file tells it.
        drop(file);
        let again = open(&core, "/f", FileOptions::default()).await;
        assert_eq!(again.flush().await.unwrap_err().errno(), libc::EIO);
    });
    let lost = cuts(&sim.fs())
        .into_iter()
        .filter(|content| content.as_ref().is_some_and(|content| content[..] == [0; 4096]));
    assert!(lost.count() > 10);
}

#[test]
fn a_write_that_fails_with_eio_may_have_happened_in_part() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..50 {
        let mut sim = Sim::new(SimConfig::new(seed).calm());
        sim.fs().create("/f", &[0; 8192]);
        sim.inject(FaultRule::once(OpFilter::any().kind(SimOpKind::Write), libc::EIO));
        sim.block_on(0, |core| async move {
            let file = open(&core, "/f", FileOptions::default()).await;
            file.write(0, core.pool().zeroed(8192), false).await.unwrap_err();
        });
        let _ = sim.fs().read("/f");
        sim.block_on(0, |core| async move {
            let file = open(&core, "/f", FileOptions::default()).await;
            write(&core, &file, 0, 512, 1).await;
        });
        sim.inject(FaultRule::once(OpFilter::any().kind(SimOpKind::Write), libc::EIO));
        sim.block_on(0, |core| async move {
            let file = open(&core, "/f", FileOptions::default()).await;
            let buf = core.pool().alloc(8192);
            buf.fill(5);
            file.write(0, buf, false).await.unwrap_err();
        });
        let content = sim.fs().read("/f").unwrap();
        seen.insert(content.iter().filter(|byte| **byte == 5).count());
    }
    assert!(seen.contains(&0) && seen.contains(&8192) && seen.len() > 4, "{seen:?}");
}

#[test]
fn names_survive_with_a_sync_of_their_folder() {
    let made = |folder_sync_needed: bool, sync: bool| {
        let mut config = SimConfig::new(4).calm();
        config.fs.folder_sync_needed = folder_sync_needed;
        let mut sim = Sim::new(config);
        sim.block_on(0, |core| async move {
            let file = create(&core, "/f").await;
            write(&core, &file, 0, 512, 1).await;
            file.flush().await.unwrap();
            if sync {
                sync_folder(&core).await;
            }
        });
        cuts(&sim.fs()).into_iter().filter(Option::is_some).count() as u64
    };
    assert_eq!(made(true, true), CUTS);
    assert_eq!(made(false, false), CUTS);
    let lucky = made(true, false);
    assert!(lucky > 20 && lucky < CUTS - 20);
}

#[test]
fn a_rename_moves_the_name_whole_or_not_at_all() {
    let mut sim = Sim::new(SimConfig::new(5).calm());
    sim.fs().create("/f.tmp", b"new");
    let fs = sim.fs();
    sim.block_on(0, |core| async move {
        let rename = FsOp::Rename { from: "/f.tmp".into(), to: "/f".into() };
        assert_eq!(core.submit(OpKind::Fs(rename)).await.result, 0);
        let again = FsOp::Rename { from: "/none".into(), to: "/f".into() };
        assert_eq!(core.submit(OpKind::Fs(again)).await.result, -libc::ENOENT);
    });
    let mut moved = 0;
    for seed in 0..CUTS {
        let after = fs.after_power_cut(seed);
        assert_eq!(after.paths().len(), 1);
        moved += u64::from(after.read("/f").is_some());
    }
    assert!(moved > 20 && moved < CUTS - 20);
    assert_eq!(fs.after_kill().paths(), ["/f"].map(std::path::PathBuf::from));
}

#[test]
fn a_world_cut_at_any_step_starts_again_on_what_survived() {
    for seed in 0..100 {
        let mut sim = Sim::new(SimConfig::new(seed));
        sim.fs().create("/f", &[0; 65_536]);
        let core = sim.core(0);
        let flushed = Rc::new(std::cell::Cell::new(0_u8));
        let known = Rc::clone(&flushed);
        let inside = core.clone();
        drop(core.spawn(crate::executor::Class::Guest, async move {
            let file = open(&inside, "/f", FileOptions::default()).await;
            for round in 1..=255 {
                write(&inside, &file, 0, 65_536, round).await;
                file.flush().await.unwrap();
                known.set(round);
            }
        }));
        sim.run_steps(20 + seed * 3);
        let at_least = flushed.get();
        let mut again = Sim::with_fs(SimConfig::new(seed), sim.crash());
        let content = again.block_on(0, |core| async move {
            let file = open(&core, "/f", FileOptions::default()).await;
            let buf = core.pool().alloc(65_536);
            file.read(0, buf.clone()).await.unwrap();
            buf.to_vec()
        });
        let newer = content.iter().all(|byte| *byte >= at_least && *byte <= at_least + 1);
        assert!(newer, "seed {seed}: older than the flush {at_least}");
    }
}
