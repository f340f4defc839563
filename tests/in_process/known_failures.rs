//! Failures that other systems had, each as a test: overlapping writes merged wrongly (Q8), a
//! discard that brings old data of a lower layer back (Q11), images that guests make of raw disks
//! (Q15, R12, R13), requests smaller than every unit (Q21), several queues on one image (R5).

use crate::simulated::{CLUSTER, LEN, expect, host, inspect, make, open, read, write};
use liveblk::engine::driver::sim::{Rng, Sim, SimConfig};
use liveblk::engine::executor::{Class, Core};
use liveblk::engine::format::{BackingRef, ReferencePolicy};
use liveblk::engine::node::NodeOptions;
use liveblk::engine::storage::{File, FileOptions, Storage};
use liveblk::formats::qcow2::{CreateOptions, create};
use liveblk::{BackingSource, Disk, Host, OpenNode};

async fn file(core: &Core, path: &str) -> Storage {
    let options = FileOptions {
        path: path.into(),
        writable: true,
        create_new: true,
        ..FileOptions::default()
    };
    Storage::File(File::open(core, options).await.expect("a new file"))
}

fn node(driver: &str, path: &str, writable: bool) -> OpenNode {
    let mut spec = OpenNode::new(driver, path).named(path.trim_start_matches('/'));
    spec.backing = BackingSource::None;
    spec.options = NodeOptions { discard_unmap: true, ..NodeOptions::default() };
    spec.writable = writable;
    spec.monitor_owned = true;
    spec
}

/// Row Q8.
#[test]
fn overlapping_writes_sent_together_leave_one_of_them_everywhere_and_drop_no_tail() {
    for seed in 0..100 {
        let mut sim = Sim::new(SimConfig::new(seed));
        sim.block_on(0, move |core| async move {
            make(&core, "/a", 16).await;
            let disk = open(&host(&core), "/a").await;
            let mut rng = Rng::new(seed);
            let sector = |bits: u64| bits % 64 * 512;
            let mut sent = Vec::new();
            for byte in 1..=4_u8 {
                let (at, len) = (sector(rng.bits()), 512 + sector(rng.bits()));
                let len = len.min(16 * CLUSTER - at);
                let (disk, size) = (disk.clone(), usize::try_from(len).expect("is small"));
                let writing = async move { write(&disk, at, size, byte).await };
                sent.push((at, len, byte, core.spawn(Class::Guest, writing)));
            }
            let mut allowed = vec![Vec::new(); LEN * 16];
            for (at, len, byte, writing) in sent {
                writing.await.expect("a write");
                for place in at..at + len {
                    allowed[usize::try_from(place).expect("is small")].push(byte);
                }
            }
            let found = read(&disk, 0, LEN * 16).await;
            for (at, (byte, allowed)) in found.iter().zip(&allowed).enumerate() {
                let fits = allowed.contains(byte) || (allowed.is_empty() && *byte == 0);
                assert!(fits, "seed {seed}: byte {at} is {byte}, not of {allowed:?}");
            }
            disk.flush().await.expect("a flush");
        });
        inspect(sim.fs().after_power_cut(seed), "/a");
    }
}

/// An overlay of `version` whose base holds 1 everywhere.
async fn overlay(core: &Core, version: u32) -> Disk {
    let base = file(core, "/base").await;
    let size = 16 * CLUSTER;
    let options = CreateOptions { cluster_size: CLUSTER, ..CreateOptions::new(size) };
    create(core, &base, options).await.expect("a base");
    drop(base);
    let host = host(core);
    let filling = open(&host, "/base").await;
    write(&filling, 0, LEN * 16, 1).await.expect("a write");
    filling.flush().await.expect("a flush");
    drop(filling);
    host.close().await.expect("is closed");
    let top = file(core, "/top").await;
    let backing = BackingRef { file: "/base".into(), format: Some("qcow2".into()) };
    let options = CreateOptions {
        cluster_size: CLUSTER,
        version,
        backing: Some(backing),
        ..CreateOptions::new(size)
    };
    create(core, &top, options).await.expect("an overlay");
    drop(top);
    let mut spec = node("qcow2", "/top", true);
    spec.backing = BackingSource::Open(Box::new(node("qcow2", "/base", false)));
    let host = Host::on(core, ReferencePolicy::Explicit);
    let node = host.open(spec).await.expect("opens");
    host.attach(&node).expect("is free")
}

/// Row Q11.
#[test]
fn a_discard_never_brings_back_what_the_layer_below_holds() {
    for version in [2, 3] {
        Sim::new(SimConfig::new(1)).block_on(0, move |core| async move {
            let disk = overlay(&core, version).await;
            expect(&disk, 0, LEN, 1).await;
            write(&disk, 0, LEN * 8, 2).await.expect("a write");
            disk.discard(0, 4 * CLUSTER, true).await.expect("a discard");
            disk.discard(4 * CLUSTER + 512, 1024, true).await.expect("a discard");
            disk.discard(8 * CLUSTER, CLUSTER, true).await.expect("of what only the base has");
            let found = read(&disk, 0, LEN * 8).await;
            assert!(found.iter().all(|byte| matches!(byte, 0 | 2)), "version {version}");
            disk.write_zeroes(0, 8 * CLUSTER, Default::default()).await.expect("zeroes");
            expect(&disk, 0, LEN * 8, 0).await;
            expect(&disk, 9 * CLUSTER, LEN, 1).await;
        });
    }
}

/// Rows Q15, R12 and R13.
#[test]
fn what_a_guest_writes_into_a_raw_disk_is_never_taken_for_an_image() {
    Sim::new(SimConfig::new(1)).block_on(0, |core| async move {
        let secret = file(&core, "/secret").await;
        secret.truncate(16 * CLUSTER).await.expect("is sized");
        drop(secret);
        let evil = file(&core, "/evil").await;
        let backing = BackingRef { file: "/secret".into(), format: Some("raw".into()) };
        let options = CreateOptions { backing: Some(backing), ..CreateOptions::new(16 * CLUSTER) };
        create(&core, &evil, options).await.expect("an image that names a file");
        let size = evil.size();
        drop(evil);
        let host = Host::on(&core, ReferencePolicy::Any);
        let raw = host.open(node("raw", "/evil", true)).await.expect("opens as what it is");
        assert_eq!((raw.driver(), raw.size()), ("raw", size));
        assert!(raw.info().backing.is_none());
        let disk = host.attach(&raw).expect("is free");
        assert_eq!(read(&disk, 0, 4).await, b"QFI\xfb");
        write(&disk, 0, 512, 7).await.expect("the first sector is the guest's, too");
        expect(&disk, 0, 512, 7).await;
        drop(disk);
        host.close().await.expect("is closed");
        // A header that names a file but no format: what the file holds does not make it raw.
        let top = file(&core, "/top").await;
        let backing = BackingRef { file: "/secret".into(), format: None };
        let options = CreateOptions { backing: Some(backing), ..CreateOptions::new(16 * CLUSTER) };
        create(&core, &top, options).await.expect("an overlay");
        drop(top);
        let host = Host::on(&core, ReferencePolicy::Any);
        let mut spec = node("qcow2", "/top", true);
        spec.backing = BackingSource::FromHeader;
        let error = host.open(spec).await.expect_err("raw is never guessed");
        assert!(error.to_string().contains("/secret"), "{error}");
    });
}

/// Row Q21.
#[test]
fn requests_of_one_sector_work_on_clusters_of_any_size_and_at_a_ragged_end() {
    for (cluster, sectors) in [(4096_u64, 41_u64), (65_536, 300), (1 << 20, 2051)] {
        let mut sim = Sim::new(SimConfig::new(cluster));
        sim.block_on(0, move |core| async move {
            let image = file(&core, "/a").await;
            let options =
                CreateOptions { cluster_size: cluster, ..CreateOptions::new(sectors * 512) };
            create(&core, &image, options).await.expect("an image");
            drop(image);
            let disk = open(&host(&core), "/a").await;
            let mut model = vec![0_u8; usize::try_from(sectors).expect("is small")];
            let mut rng = Rng::new(cluster);
            for step in 0..400_u64 {
                let at = if step % 7 == 0 { sectors - 1 } else { rng.bits() % sectors };
                let byte = u8::try_from(step % 250 + 1).expect("is small");
                write(&disk, at * 512, 512, byte).await.expect("a write");
                model[usize::try_from(at).expect("is small")] = byte;
            }
            for (at, byte) in model.iter().enumerate() {
                expect(&disk, at as u64 * 512, 512, *byte).await;
            }
            let beyond = disk.write(sectors * 512, core.pool().zeroed(512), Default::default());
            assert!(beyond.await.is_err(), "nothing behind the end");
            disk.flush().await.expect("a flush");
        });
        inspect(sim.fs().after_power_cut(1), "/a");
    }
}

/// Row R5.
#[test]
fn many_queues_on_one_image_keep_each_others_data_and_the_tables() {
    for seed in 0..30 {
        let mut sim = Sim::new(SimConfig::new(seed));
        sim.block_on(0, move |core| async move {
            make(&core, "/a", 64).await;
            let disk = open(&host(&core), "/a").await;
            let queue = |queue: u8| {
                let disk = disk.clone();
                core.spawn(Class::Guest, async move {
                    // Every queue has every eighth sector: all share all clusters.
                    for step in 0..64_u64 {
                        let at = (step * 8 + u64::from(queue)) * 512;
                        write(&disk, at, 512, queue + 1).await.expect("a write");
                        if step % 16 == u64::from(queue) {
                            disk.flush().await.expect("a flush");
                        }
                    }
                })
            };
            let queues: Vec<_> = (0..8).map(queue).collect();
            for queue in queues {
                queue.await;
            }
            disk.flush().await.expect("a flush");
        });
        let (bytes, leaks) = inspect(sim.fs().after_power_cut(seed), "/a");
        for (sector, bytes) in bytes.chunks(512).enumerate() {
            let byte = u8::try_from(sector % 8 + 1).expect("is small");
            assert!(bytes.iter().all(|found| *found == byte), "seed {seed}, sector {sector}");
        }
        assert_eq!(leaks, 0, "seed {seed}");
    }
}
