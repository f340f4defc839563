//! External data files through the library: which are opened, who may use them, what a power cut
//! and a change of the role leave.

use crate::simulated::{CLUSTER, LEN, expect, write};
use liveblk::engine::driver::sim::{Sim, SimConfig};
use liveblk::engine::executor::Core;
use liveblk::engine::format::ReferencePolicy;
use liveblk::engine::graph::{DataFileSource, FileSpec};
use liveblk::engine::node::User;
use liveblk::engine::storage::{File, FileOptions, Storage};
use liveblk::formats::qcow2::{CreateOptions, create_with_data};
use liveblk::{BackingSource, Disk, ErrorKind, Host, OpenNode};

const SIZE: u64 = 64 * CLUSTER;

async fn storage(core: &Core, path: &str) -> Storage {
    let options = FileOptions { path: path.into(), writable: true, ..FileOptions::default() };
    Storage::File(File::open(core, options).await.expect("the file opens"))
}

/// A world with `/in/image`, whose header calls its data file `name`, and some files for it.
fn world(name: &str, raw: bool) -> Sim {
    let mut sim = Sim::new(SimConfig::new(1));
    for path in ["/in/image", "/in/near.data", "/out.data"] {
        sim.fs().create(path, &[]);
    }
    let name = name.to_owned();
    sim.block_on(0, move |core| async move {
        let image = storage(&core, "/in/image").await;
        let data = storage(&core, "/in/near.data").await;
        let options = CreateOptions {
            cluster_size: CLUSTER,
            data_file: Some(name),
            data_file_raw: raw,
            ..CreateOptions::new(SIZE)
        };
        create_with_data(&core, &image, Some(&data), options).await.expect("a new image");
    });
    sim
}

fn spec() -> OpenNode {
    let mut spec = OpenNode::new("qcow2", "/in/image").named("image");
    spec.backing = BackingSource::None;
    spec.monitor_owned = true;
    spec
}

fn named(path: &str) -> DataFileSource {
    DataFileSource::Open(FileSpec { path: path.into(), ..FileSpec::default() })
}

fn same_dir() -> ReferencePolicy {
    ReferencePolicy::SameDir { allow: Vec::new() }
}

/// Row Q16: what a header names is opened as the policy allows it; a refusal names the option and
/// leaves nothing open.
#[test]
fn the_policy_decides_which_data_file_of_a_header_is_opened() {
    for (name, policy, opens) in [
        ("near.data", ReferencePolicy::Explicit, false),
        ("near.data", same_dir(), true),
        ("near.data", ReferencePolicy::Any, true),
        ("/out.data", same_dir(), false),
        ("../out.data", same_dir(), false),
        ("/out.data", ReferencePolicy::SameDir { allow: vec!["/".into()] }, true),
        ("json:{\"driver\":\"file\",\"filename\":\"/out.data\"}", ReferencePolicy::Any, false),
        ("nbd://host/x", ReferencePolicy::Any, false),
    ] {
        let mut sim = world(name, false);
        sim.block_on(0, move |core| async move {
            let host = Host::on(&core, policy);
            match host.open(spec()).await {
                Ok(_) => assert!(opens, "{name} is opened"),
                Err(error) => {
                    assert!(!opens, "{name}: {error}");
                    let liveblk::HostError::Engine(error) = error else { panic!("{error}") };
                    assert_eq!(error.kind(), ErrorKind::PolicyRefused, "{error}");
                    assert!(error.to_string().contains("'data-file'"), "{error}");
                    assert!(host.graph().nodes().is_empty(), "{name}: nothing stays open");
                }
            }
            host.close().await.expect("closes");
        });
    }
}

#[test]
fn a_missing_data_file_and_the_image_itself_are_refused_and_nothing_stays_open() {
    let mut sim = world("missing.data", false);
    sim.block_on(0, |core| async move {
        let host = Host::on(&core, same_dir());
        let error = host.open(spec()).await.expect_err("there is none");
        assert!(error.to_string().contains("No such file or directory"), "{error}");
        let itself = OpenNode { data_file: named("/in/image"), ..spec() };
        let error = host.open(itself).await.expect_err("not that one");
        assert!(error.to_string().contains("is the image itself"), "{error}");
        let nowhere = OpenNode { data_file: DataFileSource::Node("no".into()), ..spec() };
        let error = host.open(nowhere).await.expect_err("no such node");
        assert_eq!(error.to_string(), "Cannot find device='no' nor node-name='no'");
        assert!(host.graph().nodes().is_empty());
        let right = OpenNode { data_file: named("/in/near.data"), ..spec() };
        let node = host.open(right).await.expect("the caller may name any file");
        let data = node.data_file().expect("is a node of its own");
        let users = data.users();
        assert!(matches!(&users[..], [User::Data { node }] if &**node == "image"), "{users:?}");
        assert!(host.graph().check_removable(&data).is_err());
        drop(data);
        host.graph().remove(&node).await.expect("closes");
        assert!(host.graph().nodes().is_empty(), "the data file's node goes with its image");
    });
}

#[test]
fn guests_write_to_the_data_file_and_a_power_cut_keeps_what_was_flushed() {
    for raw in [false, true] {
        let mut sim = world("near.data", raw);
        sim.block_on(0, |core| async move {
            let host = Host::on(&core, same_dir());
            let node = host.open(spec()).await.expect("opens");
            let disk = host.attach(&node).expect("is free");
            write(&disk, 0, LEN, 1).await.expect("writes");
            write(&disk, 10 * CLUSTER + 512, LEN, 2).await.expect("writes");
            write(&disk, 20 * CLUSTER, 2 * LEN, 3).await.expect("writes");
            disk.write_zeroes(20 * CLUSTER, CLUSTER, Default::default()).await.expect("zeroes");
            disk.flush().await.expect("is durable");
            write(&disk, 30 * CLUSTER, LEN, 4).await.expect("writes");
        });
        for seed in 0..10 {
            let mut after = Sim::with_fs(SimConfig::new(seed), sim.fs().after_power_cut(seed));
            after.block_on(0, |core| async move {
                let host = Host::on(&core, same_dir());
                let node = host.open(spec()).await.expect("opens");
                let user = User::Guest { name: "eye".into() };
                let disk = Disk::attach(&node, user, false).expect("is free");
                expect(&disk, 0, LEN, 1).await;
                expect(&disk, 10 * CLUSTER + 512, LEN, 2).await;
                expect(&disk, 20 * CLUSTER, LEN, 0).await;
                expect(&disk, 21 * CLUSTER, LEN, 3).await;
                if raw {
                    let data = storage(&core, "/in/near.data").await;
                    for (at, byte) in [(0, 1), (10 * CLUSTER + 512, 2), (20 * CLUSTER, 0)] {
                        let buf = core.pool().alloc(LEN);
                        data.read(at, buf.clone()).await.expect("reads");
                        assert_eq!(buf.to_vec(), vec![byte; LEN], "the raw file at {at}");
                    }
                }
                drop(disk);
                node.set_writable(false).await.expect("becomes clean");
                node.set_writable(true).await.expect("and writable again");
                host.close().await.expect("closes");
            });
        }
    }
}
