//! Power cuts at every stage of the changes that touch header and tables.

use liveblk_engine::driver::sim::{Sim, SimConfig};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::format::BackingRef;

use super::mover::{file, open};
use crate::qcow2::{CreateOptions, check, create};

fn reference(file: &str, format: Option<&str>) -> Option<BackingRef> {
    Some(BackingRef { file: file.to_owned(), format: format.map(str::to_owned) })
}

async fn image(core: Core, options: CreateOptions) {
    let storage = file(&core, "/image", false).await;
    create(&core, &storage, options).await.expect("is created");
    let disk = open(&core, storage, true).await.expect("opens");
    disk.write(0, &[1; 70_000]).await.expect("writes");
    disk.format.close().await.expect("closes");
}

/// Runs `change` for some steps, cuts the power, and judges what is left, for many cuts.
fn cut_everywhere<F, G>(
    options: &CreateOptions,
    stages: u64,
    change: impl Fn(Core) -> F,
    judge: impl Fn(Core) -> G,
) where
    F: Future<Output = ()> + 'static,
    G: Future<Output = ()> + 'static,
{
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/image", &[]);
    let made = options.clone();
    sim.block_on(0, |core| image(core, made));
    let start = sim.crash();
    for steps in (0..stages).step_by(3) {
        let mut sim = Sim::with_fs(SimConfig::new(steps).calm(), start.after_kill());
        let core = sim.core(0);
        drop(core.spawn(Class::Guest, change(core.clone())));
        sim.run_steps(steps);
        for seed in 0..2 {
            let left = sim.fs().after_power_cut(seed);
            let mut after = Sim::with_fs(SimConfig::new(seed).calm(), left);
            after.block_on(0, |core| {
                let judged = judge(core.clone());
                async move {
                    let storage = file(&core, "/image", false).await;
                    let report = check(&core, &storage).await.expect("is checked");
                    assert_eq!(report.corruptions, 0, "{:?}", report.problems);
                    let disk = open(&core, storage, true).await.expect("opens");
                    assert_eq!(disk.read(0, 70_000).await.expect("reads"), vec![1; 70_000]);
                    judged.await;
                }
            });
        }
    }
}

#[test]
fn a_cut_while_the_backing_reference_changes_leaves_the_old_or_the_new_one() {
    let changes = [
        (reference("old.qcow2", Some("qcow2")), reference("new.raw", Some("raw"))),
        (reference("old.qcow2", Some("qcow2")), None),
        (None, reference("new-and-rather-long-name.qcow2", Some("qcow2"))),
        (reference("old", None), reference("new", Some("qcow2"))),
        (reference("o", Some("qcow2")), reference(&"n".repeat(900), Some("a-long-format-name"))),
    ];
    for (old, new) in changes {
        let options = CreateOptions { backing: old.clone(), ..CreateOptions::new(1 << 20) };
        let wanted = new.clone();
        cut_everywhere(
            &options,
            60,
            move |core| {
                let wanted = wanted.clone();
                async move {
                    let disk = open(&core, file(&core, "/image", false).await, true).await.unwrap();
                    disk.format.set_backing(wanted).await.unwrap();
                }
            },
            |core| {
                let (old, new) = (old.clone(), new.clone());
                async move {
                    let storage = file(&core, "/image", false).await;
                    let disk = open(&core, storage, false).await.unwrap();
                    let found = disk.format.info().backing;
                    assert!(found == old || found == new, "{found:?}");
                }
            },
        );
    }
}

#[test]
fn a_cut_while_the_disk_grows_leaves_the_old_or_the_new_size() {
    let options = CreateOptions { cluster_size: 512, ..CreateOptions::new(1 << 20) };
    cut_everywhere(
        &options,
        240,
        |core| async move {
            let disk = open(&core, file(&core, "/image", false).await, true).await.unwrap();
            disk.write(500_000, &[2; 10_000]).await.unwrap();
            disk.format.resize(64 << 20).await.unwrap();
            disk.write(60 << 20, &[3; 10_000]).await.unwrap();
            disk.format.flush().await.unwrap();
        },
        |core| async move {
            let storage = file(&core, "/image", false).await;
            let disk = open(&core, storage, false).await.unwrap();
            assert!([1 << 20, 64 << 20].contains(&disk.format.size()));
        },
    );
}
