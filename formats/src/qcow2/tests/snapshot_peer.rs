//! Snapshots against the peer's tools: images of either are used by the other.

use std::path::Path;
use std::process::Command;

use liveblk_engine::driver::sim::{Sim, SimConfig};
use liveblk_engine::format::{SnapshotChoice, ZeroMode};

use super::mover::{Disk, calm, file, open};
use super::peer::{load, run, text};
use super::snapshots::{shapes, snapshots, take};
use crate::qcow2::{check, create};

/// The content of a snapshot as the peer reads it.
fn converted(image: &Path, snapshot: &str) -> Vec<u8> {
    let raw = image.with_extension("raw");
    let (name, raw_name) = (format!("snapshot.name={snapshot}"), text(&raw));
    run("qemu-img", &["convert", "-l", &name, "-f", "qcow2", "-O", "raw", text(image), raw_name]);
    load(&raw)
}

fn flat(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("raw");
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(image), text(&raw)]);
    load(&raw)
}

fn assert_clean(image: &Path) {
    let report = run("qemu-img", &["check", "-f", "qcow2", text(image)]);
    assert!(report.contains("No errors were found"), "{report}");
}

fn write(image: &Path, pattern: u32, at: u64, len: u64) {
    let command = format!("write -P {pattern} {at} {len}");
    run("qemu-io", &["-f", "qcow2", "-c", &command, text(image)]);
}

#[test]
fn snapshots_of_ours_are_what_the_peer_reads_applies_and_deletes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for options in shapes() {
        println!("{options:?}");
        let narrow = options.refcount_order < 2;
        let mut sim = Sim::new(SimConfig::new(5));
        let (first, second, now) = sim.block_on(0, |core| async move {
            let storage = file(&core, "/image", true).await;
            create(&core, &storage, options).await.expect("is created");
            let disk = open(&core, storage, true).await.expect("opens");
            disk.write(700, &[1; 600_000]).await.unwrap();
            let first = disk.read(0, 1 << 20).await.unwrap();
            take(&disk, "first").await.unwrap();
            disk.write(100_000, &[2; 200_000]).await.unwrap();
            disk.zero(0, 50_000, ZeroMode::Keep).await.unwrap();
            let second = disk.read(0, 1 << 20).await.unwrap();
            take(&disk, "second").await.unwrap();
            disk.zero(300_000, 200_000, ZeroMode::Unmap).await.unwrap();
            disk.write(900_000, &[3; 100_000]).await.unwrap();
            let now = disk.read(0, 1 << 20).await.unwrap();
            disk.format.close().await.expect("closes");
            (first, second, now)
        });
        sim.fs().export("/image", &path).unwrap();
        assert_clean(&path);
        let list = run("qemu-img", &["snapshot", "-l", text(&path)]);
        assert!(list.contains("1       first") && list.contains("2       second"), "{list}");
        assert!(converted(&path, "first") == first && converted(&path, "second") == second);
        assert!(flat(&path) == now);
        if !narrow {
            // The peer counts the new references before it gives up the old ones.
            run("qemu-img", &["snapshot", "-a", "first", text(&path)]);
            assert!(flat(&path) == first);
        }
        write(&path, 9, 4096, 4096);
        assert_clean(&path);
        run("qemu-img", &["snapshot", "-d", "first", text(&path)]);
        assert!(converted(&path, "second") == second);
        run("qemu-img", &["snapshot", "-d", "second", text(&path)]);
        assert_clean(&path);
    }
}

#[test]
fn snapshots_of_the_peer_are_kept_applied_and_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for creation in [
        "cluster_size=65536",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4096,refcount_bits=2",
        "cluster_size=4096,refcount_bits=4",
        "cluster_size=2M,refcount_bits=8",
        "cluster_size=65536,refcount_bits=32",
        "compat=0.10",
        "cluster_size=16384,extended_l2=on",
    ] {
        println!("{creation}");
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", creation, text(&path), "5M"]);
        write(&path, 1, 0, 3 << 20);
        if creation.starts_with("cluster_size=65536") {
            let packed = ["write -c -P 8 4M 64k", "write -c -P 9 4160k 64k"];
            run("qemu-io", &["-f", "qcow2", "-c", packed[0], "-c", packed[1], text(&path)]);
        }
        run("qemu-img", &["snapshot", "-c", "first", text(&path)]);
        write(&path, 2, 1_000_000, 1_000_000);
        run("qemu-img", &["snapshot", "-c", "second", text(&path)]);
        write(&path, 3, 2_500_000, 1_000_000);
        let (first, second) = (converted(&path, "first"), converted(&path, "second"));
        let now = flat(&path);
        let mut sim = Sim::new(SimConfig::new(3));
        sim.fs().create("/image", &load(&path));
        let size = 5 << 20;
        let now_ours = now.clone();
        sim.block_on(0, |core| async move {
            let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
            let list = snapshots(&disk).list();
            assert_eq!(
                list.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(),
                ["first", "second"]
            );
            assert!(list.iter().all(|s| s.disk_size == size && s.date_sec > 0));
            assert!(disk.read(0, size).await.unwrap() == now_ours);
            disk.write(2_000_000, &[4; 1_500_000]).await.expect("copies what is shared");
            disk.zero(0, 700_000, ZeroMode::Unmap).await.unwrap();
            disk.format.close().await.expect("closes");
        });
        sim.fs().export("/image", &path).unwrap();
        assert_clean(&path);
        assert!(converted(&path, "first") == first && converted(&path, "second") == second);
        let (one, two) = (first.clone(), second.clone());
        sim.block_on(0, |core| async move {
            let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
            snapshots(&disk).apply("first").await.expect("is applied");
            assert!(disk.read(0, size).await.unwrap() == one);
            disk.write(1_000_000, &[5; 10_000]).await.unwrap();
            snapshots(&disk).apply("2").await.expect("is applied");
            assert!(disk.read(0, size).await.unwrap() == two);
            disk.write(0, &[6; 600]).await.unwrap();
            snapshots(&disk).delete("1").await.expect("is deleted");
            disk.format.close().await.expect("closes");
        });
        sim.fs().export("/image", &path).unwrap();
        assert_clean(&path);
        assert!(converted(&path, "second") == second);
        sim.block_on(0, |core| async move {
            let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
            snapshots(&disk).delete("second").await.expect("is deleted");
            disk.write(4_000_000, &[7; 600]).await.unwrap();
            disk.format.close().await.expect("closes");
        });
        sim.fs().export("/image", &path).unwrap();
        assert_clean(&path);
        let after = flat(&path);
        assert!(after[600..4_000_000] == second[600..4_000_000]);
    }
}

#[test]
fn sizes_of_either_are_what_the_other_sees() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for creation in ["cluster_size=65536", "cluster_size=512", "cluster_size=16384,extended_l2=on"]
    {
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", creation, text(&path), "5M"]);
        write(&path, 1, 0, 5 << 20);
        run("qemu-img", &["snapshot", "-c", "five", text(&path)]);
        // The peer leaves what the last cluster held behind the end.
        run("qemu-img", &["resize", "-q", "--shrink", "-f", "qcow2", text(&path), "3000320"]);
        let mut sim = Sim::new(SimConfig::new(3));
        sim.fs().create("/image", &load(&path));
        sim.block_on(0, |core| async move {
            let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
            assert_eq!(disk.format.size(), 3_000_320);
            disk.format.resize(4 << 20).await.expect("grows");
            let bytes = disk.read(0, 4 << 20).await.unwrap();
            assert!(bytes[..3_000_320].iter().all(|byte| *byte == 1));
            assert!(bytes[3_000_320..].iter().all(|byte| *byte == 0));
            disk.write(3 << 20, &[2; 1 << 20]).await.unwrap();
            disk.format.resize(3_500_032).await.expect("shrinks");
            disk.format.close().await.expect("closes");
        });
        sim.fs().export("/image", &path).unwrap();
        assert_clean(&path);
        run("qemu-img", &["resize", "-q", "-f", "qcow2", text(&path), "6M"]);
        let bytes = flat(&path);
        assert!(bytes[3_500_032..].iter().all(|byte| *byte == 0), "nothing is left behind the end");
        let ones = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 1);
        assert!(ones(&converted(&path, "five")[..5 << 20]));
        run("qemu-img", &["snapshot", "-a", "five", text(&path)]);
        let bytes = flat(&path);
        assert!(bytes.len() == 5 << 20 && ones(&bytes));
        assert_clean(&path);
    }
}

/// A machine's state lies behind the end of the disk, in a larger L1 table.
#[test]
fn machine_state_behind_the_disk_stays_with_its_snapshot_and_is_never_seen() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for creation in ["cluster_size=4096", "cluster_size=512", "cluster_size=4096,compat=0.10"] {
        println!("{creation}");
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", creation, text(&path), "1000448"]);
        write(&path, 1, 0, 1_000_448);
        run("qemu-io", &["-f", "qcow2", "-c", "write -b -P 7 0 3M", text(&path)]);
        run("qemu-img", &["snapshot", "-c", "state", text(&path)]);
        let v3 = !creation.contains("0.10");
        calm_with(&load(&path), move |core| async move {
            let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
            if v3 {
                disk.format.resize(3 << 20).await.expect("grows");
                let added = disk.read(1_000_448, (3 << 20) - 1_000_448).await.unwrap();
                assert!(added.iter().all(|byte| *byte == 0));
            }
            disk.write(0, &[2; 100_000]).await.unwrap();
            snapshots(&disk).apply("state").await.expect("is applied");
            assert_eq!(disk.format.size(), 1_000_448);
            assert!(disk.read(0, 1_000_448).await.unwrap().iter().all(|byte| *byte == 1));
            take(&disk, "second").await.expect("is taken");
            snapshots(&disk).delete("second").await.expect("is deleted");
            disk.format.close().await.expect("closes");
            let report = check(&core, disk.format.data_storage()).await.expect("is checked");
            assert!(report.is_clean(), "{:?}", report.problems);
        });
        let mut sim = Sim::new(SimConfig::new(1).calm());
        sim.fs().create("/image", &load(&path));
        sim.block_on(0, |core| async move {
            let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
            snapshots(&disk).apply("state").await.expect("is applied");
            disk.format.close().await.expect("closes");
        });
        sim.fs().export("/image", &path).unwrap();
        assert_clean(&path);
        run("qemu-img", &["snapshot", "-a", "state", text(&path)]);
        run("qemu-io", &["-f", "qcow2", "-c", "read -b -P 7 0 3M", text(&path)]);
        sim.fs().create("/image", &load(&path));
        sim.block_on(0, |core| async move {
            let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
            snapshots(&disk).delete("state").await.expect("is deleted");
            disk.format.close().await.expect("closes");
        });
        sim.fs().export("/image", &path).unwrap();
        assert_clean(&path);
    }
}

#[test]
fn unknown_extra_data_and_machine_state_survive_a_change_of_the_table() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&path), "5M"]);
    write(&path, 1, 0, 1 << 20);
    run("qemu-img", &["snapshot", "-c", "long", text(&path)]);
    let mut bytes = load(&path);
    bytes.resize(bytes.len().next_multiple_of(65_536), 0);
    let at = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    let id_and_name = bytes[at + 64..at + 69].to_vec();
    bytes[at + 32..at + 36].copy_from_slice(&77_u32.to_be_bytes());
    bytes[at + 36..at + 40].copy_from_slice(&40_u32.to_be_bytes());
    bytes[at + 40..at + 48].copy_from_slice(&77_u64.to_be_bytes());
    bytes[at + 56..at + 64].copy_from_slice(&12_345_u64.to_be_bytes());
    bytes[at + 64..at + 80].copy_from_slice(b"from the future!");
    bytes[at + 80..at + 85].copy_from_slice(&id_and_name);
    let mut sim = Sim::new(SimConfig::new(3).calm());
    sim.fs().create("/image", &bytes);
    sim.block_on(0, |core| async move {
        let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
        let info = snapshots(&disk).list().remove(0);
        assert_eq!((info.name.as_str(), info.vm_state_size), ("long", 77));
        assert_eq!(info.icount, Some(12_345));
        take(&disk, "second").await.unwrap();
        disk.format.close().await.expect("closes");
        let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
        assert_eq!(snapshots(&disk).list()[0], info);
    });
    let after = sim.fs().read("/image").unwrap();
    let moved = u64::from_be_bytes(after[64..72].try_into().unwrap()) as usize;
    assert_ne!(moved, at);
    assert_eq!(after[moved + 16..moved + 85], bytes[at + 16..at + 85]);
    sim.fs().export("/image", &path).unwrap();
    assert_clean(&path);
}

/// Row Q13: sizes and offsets of a snapshot table are checked before they are used.
#[test]
fn snapshot_tables_that_lie_are_refused_with_the_peers_texts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&path), "5M"]);
    write(&path, 1, 0, 1 << 20);
    run("qemu-img", &["snapshot", "-c", "long", text(&path)]);
    let good = load(&path);
    let at = u64::from_be_bytes(good[64..72].try_into().unwrap()) as usize;
    let patched = |patches: &[(usize, &[u8])]| {
        let mut bytes = good.clone();
        for (at, patch) in patches {
            bytes[*at..at + patch.len()].copy_from_slice(patch);
        }
        bytes
    };
    let refused: [(&[(usize, &[u8])], &str); 3] = [
        (&[(60, &[0, 1, 0, 1])], "Snapshot table too large"),
        (&[(64, &[0, 0, 0, 0, 0, 0, 0, 9])], "Snapshot table offset invalid"),
        (&[(at + 36, &[0, 0, 4, 8])], "Too much extra metadata in snapshot table entry 0"),
    ];
    for (patches, expected) in refused {
        let bytes = patched(patches);
        std::fs::write(&path, &bytes).unwrap();
        let peer = Command::new("qemu-img").args(["info", text(&path)]).output().unwrap();
        let peer = String::from_utf8_lossy(&peer.stderr).into_owned();
        assert!(peer.contains(expected), "{peer}");
        calm_with(&bytes, move |core| async move {
            let error = open(&core, file(&core, "/image", false).await, true).await.err();
            assert_eq!(error.expect("is refused").to_string(), expected);
        });
    }
    // What an entry names is checked where it is used; nothing panics, hangs or is overwritten.
    let entry: [&[(usize, &[u8])]; 9] = [
        &[(at, &[0x7f; 8])],
        &[(at, &[0, 0, 0, 0, 0, 0, 0, 8])],
        &[(at, &[0; 8])],
        &[(at, &[0, 0, 0, 0, 0x70, 0, 0, 0])],
        &[(at + 8, &[0xff; 4])],
        &[(at + 8, &[0, 0, 0, 0])],
        &[(at + 8, &[0, 0x40, 0, 0])],
        &[(at + 12, &[0xff; 4])],
        &[(at + 48, &[0xff; 8])],
    ];
    for patches in entry {
        let bytes = patched(patches);
        calm_with(&bytes, |core| async move {
            let opened = open(&core, file(&core, "/image", false).await, true).await;
            let Ok(disk) = opened else { return };
            let _ = snapshots(&disk).list();
            for which in ["1", "long"] {
                let which = SnapshotChoice::Text(which.to_owned());
                let Ok(format) = snapshots(&disk).view(which).await else { continue };
                let view = Disk { format, ..disk.clone() };
                let _ = view.read(0, view.format.size().min(1 << 20)).await;
            }
            let _ = take(&disk, "another").await;
            let _ = snapshots(&disk).apply("1").await;
            let _ = snapshots(&disk).delete("1").await;
            let _ = disk.write(0, &[1; 100_000]).await;
            let _ = disk.format.close().await;
            let _ = check(&core, disk.format.data_storage()).await;
        });
    }
}

fn calm_with<F: Future + 'static>(
    bytes: &[u8],
    work: impl FnOnce(liveblk_engine::executor::Core) -> F,
) where
    F::Output: 'static,
{
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/image", bytes);
    sim.block_on(0, work);
}

#[test]
fn a_table_of_many_snapshots_is_written_and_read_again() {
    calm(|core| async move {
        let storage = file(&core, "/image", true).await;
        let options = crate::qcow2::CreateOptions {
            cluster_size: 512,
            ..crate::qcow2::CreateOptions::new(1 << 16)
        };
        create(&core, &storage, options).await.expect("is created");
        let disk = open(&core, storage, true).await.expect("opens");
        disk.write(0, &[1; 1000]).await.unwrap();
        for index in 0..60 {
            let name = format!("{index} {}", "x".repeat(300));
            assert_eq!(take(&disk, &name).await.unwrap().id, (index + 1).to_string());
        }
        disk.format.close().await.expect("closes");
        let disk = open(&core, disk.format.data_storage().clone(), true).await.expect("opens");
        assert_eq!(snapshots(&disk).list().len(), 60);
        for index in (0..60).rev() {
            snapshots(&disk).delete(&(index + 1).to_string()).await.expect("is deleted");
        }
        disk.format.close().await.expect("closes");
        let report = check(&core, disk.format.data_storage()).await.expect("is checked");
        assert!(report.is_clean(), "{:?}", report.problems);
    });
}
