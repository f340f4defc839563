//! A snapshot of a disk with a persistent dirty bitmap on a full file system: the old layer has no
//! place for the bits. The snapshot is good, guests go on, the layer stays writable and says so,
//! with its bits; it becomes read-only with them by itself when there is space. A bitmap that
//! never found a place is known to be behind, and a close tells that.

use std::rc::Rc;

use crate::simulated::{CLUSTER, LEN, expect, host, inspect, make, write};
use liveblk::engine::driver::sim::{Sim, SimConfig, SimFs};
use liveblk::engine::executor::Core;
use liveblk::engine::node::{BitmapFacts, NewBitmap, NodeOptions};
use liveblk::jobs::limits::{READ_ONLY_RETRY_MAX_NS, READ_ONLY_RETRY_NS};
use liveblk::jobs::{Action, CommitSpec, CompletionMode, start_commit, transaction};
use liveblk::{BackingSource, Disk, ErrorKind, Host, Node, OpenNode, Status};

/// Clusters of the disk.
const CLUSTERS: u64 = 256;

/// A world whose disk got a layer above it that found no space for the old layer's bitmap.
struct World {
    sim: Sim,
    host: Rc<Host>,
    disk: Disk,
    base: Rc<Node>,
    /// Clusters that were written before the snapshot.
    written: u64,
}

async fn open(host: &Host, path: &str, writable: bool) -> Rc<Node> {
    let mut spec = OpenNode::new("qcow2", path).named(path.trim_start_matches('/'));
    spec.backing = BackingSource::None;
    spec.options = NodeOptions { discard_unmap: true, ..NodeOptions::default() };
    spec.writable = writable;
    spec.monitor_owned = true;
    host.open(spec).await.expect("the image opens")
}

fn bitmap() -> NewBitmap {
    NewBitmap {
        name: "b".into(),
        granularity: Some(512),
        persistent: true,
        disabled: false,
        follow: false,
    }
}

async fn snapshot(core: &Core, base: &str, overlay: &str) {
    let action = Action::Snapshot { node: base.into(), overlay: overlay.into() };
    let actions = vec![(core.id(), action)];
    let done = transaction(core, actions, CompletionMode::Individual).await;
    done.expect("a snapshot needs no space");
}

/// Writes cluster after cluster until there is no space, then takes the snapshot.
fn late(seed: u64) -> World {
    let mut sim = Sim::new(SimConfig::new(seed).calm());
    let (host, disk) = sim.block_on(0, |core| async move {
        make(&core, "/base", CLUSTERS).await;
        make(&core, "/top", CLUSTERS).await;
        let host = Rc::new(host(&core));
        let base = open(&host, "/base", true).await;
        let disk = host.attach(&base).expect("is free");
        base.add_bitmap(bitmap()).await.expect("is added");
        write(&disk, 0, LEN, 1).await.expect("a write");
        disk.flush().await.expect("a flush");
        open(&host, "/top", true).await;
        (host, disk)
    });
    sim.fs().set_capacity(Some(sim.fs().used() + seed * 512));
    let (guest, core) = (disk.clone(), sim.core(0));
    let (base, written) = sim.block_on(0, |_| async move {
        let mut full = None;
        for cluster in 1..CLUSTERS {
            if let Err(error) = write(&guest, cluster * CLUSTER, LEN, 1).await {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                full = Some(cluster);
                break;
            }
        }
        let base = guest.node();
        // The flush of the snapshot must not be what fails: that would be told, and nothing done.
        if let Err(error) = guest.flush().await {
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        }
        snapshot(&core, "base", "top").await;
        (base, full.expect("the file system becomes full"))
    });
    World { sim, host, disk, base, written }
}

fn facts(node: &Node) -> BitmapFacts {
    node.bitmap_facts().into_iter().next().expect("it has a bitmap")
}

fn roomy(fs: SimFs) -> SimFs {
    fs.set_capacity(None);
    fs
}

/// What a later process finds of the bitmap in `fs`.
fn found(fs: SimFs) -> BitmapFacts {
    let mut sim = Sim::with_fs(SimConfig::new(0).calm(), roomy(fs));
    sim.block_on(0, |core| async move {
        let host = host(&core);
        let facts = facts(&*open(&host, "/base", false).await);
        host.close().await.expect("closes");
        facts
    })
}

#[test]
fn a_snapshot_without_space_for_a_bitmap_is_good_and_the_old_layer_follows_when_there_is_space() {
    for seed in 0..6 {
        let World { mut sim, host: _host, disk, base, written } = late(seed);
        let (guest, layer) = (disk.clone(), Rc::clone(&base));
        sim.block_on(0, |core| async move {
            assert_eq!(&*guest.node_name(), "top", "guests went on");
            assert!(layer.is_writable(), "there was no place for the bits");
            assert!(layer.is_writable_when_active(), "queries say so");
            let facts = facts(&layer);
            assert!(facts.count > 0 && !facts.inconsistent, "the bits are there: {facts:?}");
            for cluster in 0..written {
                expect(&guest, cluster * CLUSTER, LEN, 1).await;
            }
            // Nobody may write to it beside the guests of the overlay.
            let other = liveblk::engine::node::User::Guest { name: "other".into() };
            let refused = Disk::attach(&layer, other, true).expect_err("it is an old layer");
            assert_eq!(refused.kind(), ErrorKind::ReadOnly);
            core.sleep(3 * READ_ONLY_RETRY_NS).await;
            assert!(layer.is_writable(), "there still is no space");
        });
        // At a power cut now: the data is there, and nobody takes the bitmap for true.
        let fs = sim.fs().after_power_cut(seed);
        assert!(found(fs).inconsistent);
        let (bytes, _) = inspect(roomy(sim.fs().after_power_cut(seed)), "/base");
        let data = &bytes[..usize::try_from(written).expect("few") * LEN];
        assert!(data.iter().all(|byte| *byte == 1), "what the flush of the cut made durable");
        sim.fs().set_capacity(None);
        let layer = Rc::clone(&base);
        let count = sim.block_on(0, |core| async move {
            core.sleep(READ_ONLY_RETRY_MAX_NS).await;
            assert!(!layer.is_writable(), "there is space");
            facts(&layer).count
        });
        let kept = found(sim.fs().after_power_cut(seed));
        assert_eq!((kept.inconsistent, kept.count), (false, count), "durable with all bits");
        let guest = disk.clone();
        sim.block_on(0, |_| async move {
            write(&guest, 0, LEN, 2).await.expect("there is space");
            expect(&guest, 0, LEN, 2).await;
        });
        let (bytes, _) = inspect(sim.fs().after_kill(), "/base");
        assert!(bytes[..LEN].iter().all(|byte| *byte == 1), "the old layer stays as it was");
    }
}

#[test]
fn a_close_without_space_tells_that_a_bitmap_is_behind() {
    let World { mut sim, host, disk, base, .. } = late(1);
    drop((disk, base));
    let closed = sim.block_on(0, |_| async move { host.close().await });
    let told = closed.expect_err("bits are lost").to_string();
    assert!(told.contains("No space left"), "{told}");
    assert!(found(sim.fs().after_power_cut(1)).inconsistent);
}

/// While the old layer is tried again a job needs it writable, and leaves it at that.
#[test]
fn a_commit_into_a_layer_that_is_still_writable_ends_with_all_data_and_the_bitmap() {
    for space in [0, READ_ONLY_RETRY_NS - 1, READ_ONLY_RETRY_NS, 2 * READ_ONLY_RETRY_NS] {
        let World { mut sim, host, disk, base, .. } = late(2);
        sim.fs().set_capacity(None);
        let (guest, layer) = (disk.clone(), Rc::clone(&base));
        let jobs = Rc::clone(&host);
        sim.block_on(0, |core| async move {
            core.sleep(space).await;
            write(&guest, 3 * CLUSTER, LEN, 3).await.expect("there is space");
            let top = guest.node();
            let spec = CommitSpec {
                job: liveblk::jobs::JobOptions::new("job"),
                ..CommitSpec::new(&top, &top, &layer)
            };
            let job = start_commit(spec).await.expect("starts");
            jobs.jobs().until("job", |status| status == Status::Ready).await;
            core.sleep(4 * READ_ONLY_RETRY_NS).await;
            assert!(layer.is_writable(), "the job keeps it");
            let complete = liveblk::jobs::lifecycle::Verb::Complete;
            jobs.jobs().block_job_verb("job", complete, false).expect("is ready");
            jobs.jobs().until("job", |_| false).await;
            assert!(job.error().is_none());
            assert_eq!(&*guest.node_name(), "base");
            write(&guest, 4 * CLUSTER, LEN, 4).await.expect("guests are here again");
            core.sleep(READ_ONLY_RETRY_MAX_NS).await;
            write(&guest, 5 * CLUSTER, LEN, 5).await.expect("and it stays writable");
            assert!(facts(&layer).recording);
        });
        drop((disk, base));
        sim.block_on(0, |_| async move { host.close().await.expect("closes") });
        assert!(!found(sim.fs().clone()).inconsistent);
        let (bytes, leaks) = inspect(sim.fs().clone(), "/base");
        for byte in 3..=5 {
            let at = usize::from(byte) * LEN;
            assert!(bytes[at..at + LEN].iter().all(|found| *found == byte), "cluster {byte}");
        }
        assert_eq!(leaks, 0);
    }
}
