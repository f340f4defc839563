//! Against the peer's tools: images made by either are read right by the other.

use std::path::Path;
use std::process::Command;

use liveblk_engine::driver::sim::{Sim, SimConfig, SimFs};
use liveblk_engine::format::{BackingRef, ZeroMode};

use super::mover::{calm, file, open};
use crate::qcow2::{CreateOptions, check, create};

/// The data file of a simulated world, which images know as `image.data`.
pub(super) const DATA_FILE: &str = "/image.data";

/// Runs a tool of the peer; its output, or a panic with it.
pub(super) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} is needed: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}{errors}");
    text
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is text")
}

/// The peer finds no corruption in a file of a simulated world (leaks are allowed).
pub(super) fn check_exported(fs: &SimFs, path: &str) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let target = folder.path().join("image");
    fs.export(path, &target).expect("is exported");
    // Its data file, if it has one, under the name that the header has.
    for other in fs.paths().iter().filter(|other| other.as_os_str() != path) {
        let name = other.file_name().expect("a file has a name");
        fs.export(other, folder.path().join(name)).expect("is exported");
    }
    let output = Command::new("qemu-img")
        .current_dir(folder.path())
        .args(["check", "-f", "qcow2", text(&target)])
        .output()
        .expect("qemu-img is needed");
    let code = output.status.code();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(matches!(code, Some(0 | 3)), "qemu-img check: {code:?} {errors}");
}

pub(super) fn load(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("the file is there")
}

#[test]
fn a_created_image_equals_the_peers_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let theirs = folder.path().join("theirs");
    let base = BackingRef { file: "base.img".into(), format: Some("raw".into()) };
    let cases: Vec<(CreateOptions, String, Vec<&str>)> = vec![
        (CreateOptions::new(1 << 30), "1G".into(), vec![]),
        (CreateOptions::new(0), "0".into(), vec![]),
        (CreateOptions::new(10 << 40), "10T".into(), vec![]),
        (
            CreateOptions { backing: Some(base), ..CreateOptions::new(5 << 20) },
            "5M".into(),
            vec!["-u", "-b", "base.img", "-F", "raw"],
        ),
        (
            CreateOptions { version: 2, ..CreateOptions::new(1 << 20) },
            "1M".into(),
            vec!["-o", "compat=0.10"],
        ),
        (
            CreateOptions { cluster_size: 4096, ..CreateOptions::new(1 << 30) },
            "1G".into(),
            vec!["-o", "cluster_size=4096"],
        ),
        (
            CreateOptions { refcount_order: 0, ..CreateOptions::new(1 << 20) },
            "1M".into(),
            vec!["-o", "refcount_bits=1"],
        ),
    ];
    for (options, size, extra) in cases {
        let _ = std::fs::remove_file(&theirs);
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        arguments.extend(extra);
        arguments.extend([text(&theirs), &size]);
        run("qemu-img", &arguments);
        let ours = calm(|core| async move {
            let storage = file(&core, "/new", true).await;
            create(&core, &storage, options).await.expect("is created");
            let buf = core.pool().alloc(storage.size() as usize);
            storage.read(0, buf.clone()).await.unwrap();
            buf.to_vec()
        });
        let theirs = load(&theirs);
        let differ = ours.iter().zip(&theirs).position(|(a, b)| a != b);
        assert_eq!((differ, ours.len()), (None, theirs.len()), "{arguments:?}");
    }
}

#[test]
fn images_of_the_peer_read_right() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for creation in [
        "cluster_size=65536",
        "cluster_size=512",
        "cluster_size=2M",
        "cluster_size=4096,refcount_bits=1",
        "cluster_size=4096,refcount_bits=64",
        "compat=0.10",
    ] {
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", creation, text(&path), "9M"]);
        let mut io = vec![
            "-f",
            "qcow2",
            text(&path),
            "-c",
            "write -P 1 0 1M",
            "-c",
            "write -P 2 1500k 700k",
            "-c",
            "write -P 3 5M 4M",
            "-c",
            "discard 6M 1M",
        ];
        if creation != "compat=0.10" {
            io.extend(["-c", "write -z 512k 256k", "-c", "write -z -u 5M 512k"]);
        }
        run("qemu-io", &io);
        let flat = folder.path().join("flat");
        run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&path), text(&flat)]);
        let expected = load(&flat);
        let bytes = load(&path);
        let mut sim = Sim::new(SimConfig::new(3));
        sim.fs().create("/image", &bytes);
        let read = sim.block_on(0, |core| async move {
            let storage = file(&core, "/image", false).await;
            let report = check(&core, &storage).await.expect("is checked");
            assert!(report.is_clean(), "{:?}", report.problems);
            let disk = open(&core, storage, false).await.expect("opens");
            assert_eq!(disk.format.size(), 9 << 20);
            disk.read(0, 9 << 20).await.expect("reads")
        });
        assert!(read == expected, "{creation}");
    }
}

#[test]
fn images_of_ours_are_clean_and_equal_for_the_peer() {
    let folder = tempfile::tempdir().unwrap();
    for (bits, order, version) in
        [(16, 4, 3), (9, 6, 3), (9, 0, 3), (12, 2, 3), (21, 4, 3), (16, 4, 2)]
    {
        let mut sim = Sim::new(SimConfig::new(5));
        let expected = sim.block_on(0, |core| async move {
            let storage = file(&core, "/image", true).await;
            let options = CreateOptions {
                cluster_size: 1 << bits,
                refcount_order: order,
                version,
                ..CreateOptions::new(6 << 20)
            };
            create(&core, &storage, options).await.expect("is created");
            let disk = open(&core, storage, true).await.expect("opens");
            let size = 6 << 20;
            disk.write(700, &[1; 3_000_000]).await.unwrap();
            disk.write(4 << 20, &[2; 100_000]).await.unwrap();
            disk.zero(1 << 20, 1 << 20, ZeroMode::Unmap).await.unwrap();
            disk.zero(100_000, 300_000, ZeroMode::Keep).await.unwrap();
            disk.format.flush().await.unwrap();
            disk.write(1_500_000, &[3; 200_000]).await.unwrap();
            disk.format.resize(size + (1 << 20)).await.expect("grows");
            disk.write(size + 5, &[4; 5000]).await.unwrap();
            let bytes = disk.read(0, size + (1 << 20)).await.unwrap();
            disk.format.close().await.expect("closes");
            bytes
        });
        let path = folder.path().join("image");
        sim.fs().export("/image", &path).unwrap();
        let report = run("qemu-img", &["check", "-f", "qcow2", text(&path)]);
        assert!(report.contains("No errors were found"), "{bits} {order} {version}: {report}");
        let flat = folder.path().join("flat");
        std::fs::write(&flat, &expected).unwrap();
        let arguments = ["compare", "-f", "qcow2", "-F", "raw", text(&path), text(&flat)];
        assert!(run("qemu-img", &arguments).contains("identical"));
    }
}

#[test]
fn a_changed_backing_reference_is_what_the_peer_reads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let names = [
        Some(("base.qcow2", Some("qcow2"))),
        Some(("a-much-longer-name-of-a-base-image.raw", Some("raw"))),
        None,
        Some(("x", None)),
        Some(("/abs/base", Some("qcow2"))),
    ];
    for version in [3, 2] {
        let mut sim = Sim::new(SimConfig::new(9));
        sim.block_on(0, |core| async move {
            let storage = file(&core, "/image", true).await;
            let options = CreateOptions { version, ..CreateOptions::new(1 << 20) };
            create(&core, &storage, options).await.expect("is created");
        });
        for name in names {
            let reference = name.map(|(file, format)| BackingRef {
                file: file.to_owned(),
                format: format.map(str::to_owned),
            });
            let expected = reference.clone();
            sim.block_on(0, |core| async move {
                let disk = open(&core, file(&core, "/image", false).await, true).await.unwrap();
                disk.format.set_backing(reference.clone()).await.expect("is changed");
                assert_eq!(disk.format.info().backing, reference);
                disk.format.close().await.unwrap();
                let disk = open(&core, file(&core, "/image", false).await, false).await.unwrap();
                assert_eq!(disk.format.info().backing, reference);
            });
            sim.fs().export("/image", &path).unwrap();
            let info =
                run("qemu-img", &["info", "-U", "-f", "qcow2", "--output=json", text(&path)]);
            match &expected {
                Some(BackingRef { file, format }) => {
                    assert!(info.contains(&format!("\"backing-filename\": \"{file}\"")), "{info}");
                    if let Some(format) = format {
                        let line = format!("\"backing-filename-format\": \"{format}\"");
                        assert!(info.contains(&line), "{info}");
                    }
                }
                None => assert!(!info.contains("backing-filename"), "{info}"),
            }
        }
    }
}
