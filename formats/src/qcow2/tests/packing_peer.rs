//! Compressed clusters against the peer's tools, both ways.

use std::path::Path;

use liveblk_engine::driver::sim::{Sim, SimConfig};
use liveblk_engine::format::{Mapping, ZeroMode};

use super::mover::{file, open};
use super::packing::{mapping, noise, soft};
use super::peer::{load, run, text};
use crate::qcow2::{CompressionType, CreateOptions, check, create};

const SIZE: u64 = 9 << 20;

fn below(at: u64) -> u8 {
    (at / 512 % 251) as u8 + 1
}

/// A disk of soft and hard bytes and zeroes, and the layer below it.
fn write_sources(folder: &Path) {
    let base: Vec<u8> = (0..SIZE).map(below).collect();
    std::fs::write(folder.join("base"), base).unwrap();
    let mut disk: Vec<u8> = (0..SIZE).map(below).collect();
    let mut put = |at: usize, bytes: Vec<u8>| disk[at..at + bytes.len()].copy_from_slice(&bytes);
    put(0, soft(1, 3 << 20));
    put(3 << 20, noise(2, 1 << 20));
    put(5 << 20, vec![0; 1 << 20]);
    put(7 << 20, soft(3, 700_001));
    std::fs::write(folder.join("disk"), disk).unwrap();
}

/// What of `bytes` the image at `path` of the peer's reads as, and how many clusters are packed.
fn read_by_us(path: &Path, backed: bool) -> (Vec<u8>, u64) {
    let bytes = load(path);
    let mut sim = Sim::new(SimConfig::new(3));
    sim.fs().create("/image", &bytes);
    sim.block_on(0, |core| async move {
        let storage = file(&core, "/image", false).await;
        let report = check(&core, &storage).await.expect("is checked");
        assert!(report.is_clean(), "{:?}", report.problems);
        let mut disk = open(&core, storage, false).await.expect("opens");
        if backed {
            disk.below = below;
        }
        let size = disk.format.size();
        let read = disk.read(0, size).await.expect("reads");
        let extents = mapping(&disk, 0, size);
        let packed = extents.iter().filter(|run| matches!(run.mapping, Mapping::Compressed(_)));
        (read, packed.count() as u64)
    })
}

#[test]
fn compressed_images_of_the_peer_read_right() {
    let folder = tempfile::tempdir().unwrap();
    write_sources(folder.path());
    let path = |name: &str| folder.path().join(name);
    let (disk, base, image) = (path("disk"), path("base"), path("image"));
    for kind in ["zlib", "zstd"] {
        for options in ["512", "4096", "65536", "2M", "65536,extended_l2=on"] {
            let options = format!("compression_type={kind},cluster_size={options}");
            for backed in [false, true] {
                let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2", "-c"];
                arguments.extend(["-o", &options]);
                if backed {
                    arguments.extend(["-B", text(&base), "-F", "raw"]);
                }
                arguments.extend([text(&disk), text(&image)]);
                run("qemu-img", &arguments);
                let (read, packed) = read_by_us(&image, backed);
                assert!(read == load(&disk), "{arguments:?}");
                assert!(packed > 1, "{arguments:?}");
            }
        }
    }
}

#[test]
fn compressed_images_that_the_peer_went_on_writing_read_right() {
    let folder = tempfile::tempdir().unwrap();
    write_sources(folder.path());
    let path = |name: &str| folder.path().join(name);
    let (disk, image, flat) = (path("disk"), path("image"), path("flat"));
    for options in ["compat=0.10", "compression_type=zstd", "refcount_bits=1,cluster_size=4k"] {
        let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", options];
        arguments.extend([text(&disk), text(&image)]);
        run("qemu-img", &arguments);
        let writes =
            ["write -P 9 100k 10k", "write -c -P 7 5M 64k", "discard 1M 512k", "write -z 2M 100k"];
        let mut io = vec!["-f", "qcow2", text(&image)];
        io.extend(writes.iter().flat_map(|write| ["-c", *write]));
        run("qemu-io", &io);
        run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&image), text(&flat)]);
        let (read, packed) = read_by_us(&image, false);
        assert!(read == load(&flat), "{options}");
        assert!(packed > 1, "{options}");
    }
}

/// Compressed writes between normal ones, zeroes and discards, at odd places.
async fn work(disk: &super::mover::Disk, cluster: u64, version: u32) {
    let clusters = |count: u64| (count * cluster) as usize;
    let whole = |at: u64| at.next_multiple_of(cluster);
    disk.write_compressed(0, &soft(1, clusters((3 << 20) / cluster))).await.unwrap();
    disk.write(700, &noise(4, 5000)).await.unwrap();
    disk.write_compressed(whole(4 << 20), &noise(5, clusters(2))).await.unwrap();
    disk.zero(whole(1 << 20), 300_000, ZeroMode::Unmap).await.unwrap();
    disk.format.flush().await.unwrap();
    if version > 2 {
        disk.zero(2 << 20, 1 << 20, ZeroMode::Discard).await.unwrap();
    }
    disk.write_compressed(whole(1 << 20), &soft(6, clusters(3))).await.unwrap();
    disk.format.flush().await.unwrap();
    disk.write_compressed(whole(1 << 20), &soft(7, clusters(2))).await.unwrap();
    disk.write(whole(1 << 20) + 1000, &[8; 100]).await.unwrap();
    // The last cluster ends with the disk.
    let last = (SIZE - 1) / cluster * cluster;
    disk.write_compressed(last, &soft(9, (SIZE - last) as usize)).await.unwrap();
}

#[test]
fn compressed_images_of_ours_are_clean_and_equal_for_the_peer() {
    let folder = tempfile::tempdir().unwrap();
    let (path, flat) = (folder.path().join("image"), folder.path().join("flat"));
    let cases = [
        (16, 4, 3, false),
        (16, 4, 2, false),
        (10, 6, 3, false),
        (12, 0, 3, false),
        (12, 1, 3, false),
        (16, 2, 3, true),
        (21, 4, 3, false),
    ];
    for (bits, refcount_order, version, extended_l2) in cases {
        for compression_type in [CompressionType::Zlib, CompressionType::Zstd] {
            if version == 2 && compression_type == CompressionType::Zstd {
                continue;
            }
            let options = CreateOptions {
                cluster_size: 1 << bits,
                refcount_order,
                version,
                extended_l2,
                compression_type,
                ..CreateOptions::new(SIZE)
            };
            println!("{options:?}");
            let mut sim = Sim::new(SimConfig::new(5));
            let expected = sim.block_on(0, |core| async move {
                let storage = file(&core, "/image", true).await;
                create(&core, &storage, options).await.expect("is created");
                let disk = open(&core, storage, true).await.expect("opens");
                work(&disk, 1 << bits, version).await;
                let bytes = disk.read(0, SIZE).await.unwrap();
                let extents = mapping(&disk, 0, SIZE);
                let packed =
                    extents.iter().any(|run| matches!(run.mapping, Mapping::Compressed(_)));
                assert!(packed, "something is compressed");
                disk.format.close().await.expect("closes");
                bytes
            });
            sim.fs().export("/image", &path).unwrap();
            let report = run("qemu-img", &["check", "-f", "qcow2", text(&path)]);
            assert!(report.contains("No errors were found"), "{report}");
            std::fs::write(&flat, &expected).unwrap();
            let arguments = ["compare", "-f", "qcow2", "-F", "raw", text(&path), text(&flat)];
            assert!(run("qemu-img", &arguments).contains("identical"));
            let pattern =
                format!("read -P 8 {} 100", (1_u64 << 20).next_multiple_of(1 << bits) + 1000);
            run("qemu-io", &["-r", "-f", "qcow2", "-c", &pattern, text(&path)]);
        }
    }
}
