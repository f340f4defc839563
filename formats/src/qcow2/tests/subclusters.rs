//! Extended L2 entries: against the peer's tools, on overlays, under damage and after sharing.

use std::path::Path;
use std::process::Command;

use liveblk_engine::address::GuestRange;
use liveblk_engine::driver::sim::{Rng, Sim, SimConfig};
use liveblk_engine::format::{BackingRef, Extents, Mapping, WriteStep, ZeroMode, ZeroStep};

use super::mover::{Disk, calm, file, open};
use crate::qcow2::{CreateOptions, check, create};

const SECTOR: u64 = 512;

/// What the base holds: other bytes in every sector, never zero.
fn base_byte(at: u64) -> u8 {
    ((at / SECTOR) % 251) as u8 + 1
}

/// What one sector is in the top image, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Below,
    Zero(Option<u64>),
    Data(u64),
}

fn run(folder: &Path, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).current_dir(folder).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} is needed: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}{errors}");
    text
}

/// A folder with a base of `size` bytes.
fn folder_with_base(size: u64) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let bytes: Vec<u8> = (0..size).map(base_byte).collect();
    std::fs::write(folder.path().join("base"), bytes).expect("a base");
    folder
}

fn overlay(size: u64, cluster_size: u64) -> CreateOptions {
    CreateOptions {
        backing: Some(BackingRef { file: "base".into(), format: Some("raw".into()) }),
        cluster_size,
        extended_l2: true,
        ..CreateOptions::new(size)
    }
}

/// The peer's map of the image `name`, by sector.
fn peers_map(folder: &Path, name: &str, size: u64) -> Vec<Place> {
    let text = run(folder, "qemu-img", &["map", "-f", "qcow2", "--output=json", name]);
    let mut places = Vec::new();
    for line in text.lines() {
        let field = |key: &str| {
            let at = line.find(&format!("\"{key}\": "))? + key.len() + 4;
            line.get(at..)?.split([',', '}']).next().map(str::trim)
        };
        let number = |key| field(key).and_then(|value| value.parse::<u64>().ok());
        let (Some(len), Some(depth)) = (number("length"), number("depth")) else { continue };
        for sector in 0..len / SECTOR {
            let offset = number("offset").map(|offset| offset + sector * SECTOR);
            places.push(match (depth, field("zero")) {
                (0, Some("true")) => Place::Zero(offset),
                (0, _) => Place::Data(offset.expect("data has an offset")),
                _ => Place::Below,
            });
        }
    }
    assert_eq!(places.len() as u64, size / SECTOR);
    places
}

/// Our map of the image, by sector.
async fn our_map(disk: &Disk) -> Vec<Place> {
    let size = disk.format.size();
    let mut places: Vec<Place> = Vec::new();
    while (places.len() as u64) < size / SECTOR {
        let at = places.len() as u64 * SECTOR;
        let mut extents = Extents::new();
        let lease = disk.format.resolve(GuestRange::new(at, size - at), &mut extents);
        for extent in &extents {
            let sectors = (0..extent.len / SECTOR).map(|sector| sector * SECTOR);
            match &extent.mapping {
                Mapping::Data(host) => {
                    places.extend(sectors.map(|at| Place::Data(host.bytes() + at)));
                }
                Mapping::Zero => places.extend(sectors.map(|_| Place::Zero(None))),
                Mapping::ZeroAllocated(host) => {
                    places.extend(sectors.map(|at| Place::Zero(Some(host.bytes() + at))));
                }
                Mapping::Absent => places.extend(sectors.map(|_| Place::Below)),
                Mapping::Miss(miss) => disk.format.load(*miss).await.expect("is loaded"),
                other => panic!("{other:?}"),
            }
        }
        drop(lease);
    }
    places
}

/// The bytes of the image `name` with its chain, as the peer reads them.
fn peers_bytes(folder: &Path, name: &str) -> Vec<u8> {
    run(folder, "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", name, "flat"]);
    std::fs::read(folder.join("flat")).expect("the flat image")
}

async fn reopened(core: &liveblk_engine::executor::Core, writable: bool) -> Disk {
    let mut disk = open(core, file(core, "/image", false).await, writable).await.expect("opens");
    disk.below = base_byte;
    disk
}

#[test]
fn mixed_subclusters_of_the_peer_read_right_and_map_equal() {
    let size = 3 << 20;
    for cluster in ["16k", "64k", "128k", "2M"] {
        let folder = folder_with_base(size);
        let path = folder.path();
        let options =
            format!("extended_l2=on,cluster_size={cluster},backing_file=base,backing_fmt=raw");
        run(path, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, "image"]);
        let mut rng = Rng::new(7);
        let mut commands = Vec::new();
        for step in 0..120_u64 {
            let at = rng.bits() % (size / SECTOR - 64) * SECTOR;
            let len = (1 + rng.bits() % 64) * SECTOR;
            commands.push("-c".to_owned());
            commands.push(match step % 5 {
                0 => format!("write -z {at} {len}"),
                1 => format!("write -z -u {at} {len}"),
                2 if step % 3 == 0 => format!("discard {at} {len}"),
                _ => format!("write -P {} {at} {len}", step + 1),
            });
        }
        let mut arguments = vec!["-d", "unmap", "-f", "qcow2", "image"];
        arguments.extend(commands.iter().map(String::as_str));
        run(path, "qemu-io", &arguments);
        let expected = peers_bytes(path, "image");
        let map = peers_map(path, "image", size);
        let mut sim = Sim::new(SimConfig::new(3));
        sim.fs().create("/image", &std::fs::read(path.join("image")).unwrap());
        sim.block_on(0, |core| async move {
            let report = check(&core, &file(&core, "/image", false).await).await.expect("checked");
            assert!(report.is_clean(), "{:?}", report.problems);
            let disk = reopened(&core, false).await;
            assert!(disk.read(0, size).await.expect("reads") == expected, "the same bytes");
            let ours = our_map(&disk).await;
            let differ = ours.iter().zip(&map).position(|(a, b)| a != b);
            assert_eq!(differ.map(|at| (at, ours[at], map[at])), None);
        });
    }
}

#[test]
fn mixed_subclusters_of_ours_are_clean_equal_and_map_equal_for_the_peer() {
    let size: u64 = (3 << 20) + 1536;
    for (seed, cluster) in [(1, 16 << 10), (2, 64 << 10), (3, 128 << 10), (4, 2 << 20)] {
        let folder = folder_with_base(size);
        let mut sim = Sim::new(SimConfig::new(seed));
        let (expected, map) = sim.block_on(0, |core| async move {
            let storage = file(&core, "/image", true).await;
            create(&core, &storage, overlay(size, cluster)).await.expect("is created");
            let disk = reopened(&core, true).await;
            let mut model: Vec<u8> = (0..size).map(base_byte).collect();
            let mut rng = Rng::new(seed);
            for step in 0..200_u64 {
                let at = rng.bits() % (size / SECTOR) * SECTOR;
                let len = ((1 + rng.bits() % 64) * SECTOR).min(size - at);
                let here = at as usize..(at + len) as usize;
                let byte = if step % 3 == 0 { 0 } else { step as u8 };
                match step % 6 {
                    0 => disk.zero(at, len, ZeroMode::Keep).await.expect("zeroes"),
                    3 => disk.zero(at, len, ZeroMode::Unmap).await.expect("zeroes"),
                    _ => disk.write(at, &vec![byte; len as usize]).await.expect("writes"),
                }
                model[here].fill(byte);
            }
            // A discard leaves what it has no whole unit of.
            disk.zero(SECTOR, size / 2, ZeroMode::Discard).await.expect("discards");
            let bytes = disk.read(0, size).await.expect("reads");
            for (at, (found, before)) in bytes.iter().zip(&model).enumerate() {
                let discarded = (at as u64) < SECTOR + size / 2;
                assert!(found == before || (discarded && *found == 0), "byte {at}");
            }
            let map = our_map(&disk).await;
            disk.format.close().await.expect("closes");
            let disk = reopened(&core, false).await;
            assert!(disk.read(0, size).await.expect("reads") == bytes, "after a reopen");
            (bytes, map)
        });
        let path = folder.path();
        sim.fs().export("/image", path.join("image")).unwrap();
        let report = run(path, "qemu-img", &["check", "-f", "qcow2", "image"]);
        assert!(report.contains("No errors were found"), "{report}");
        assert!(peers_bytes(path, "image") == expected, "the same bytes");
        let theirs = peers_map(path, "image", size);
        // Where much is reserved the peer asks the file, too, and finds holes in the data.
        let holes = |at: usize| expected[at * 512..at * 512 + 512].iter().all(|byte| *byte == 0);
        let same = |at: usize| match (map[at], theirs[at]) {
            (Place::Data(ours), Place::Zero(Some(theirs))) => ours == theirs && holes(at),
            (ours, theirs) => ours == theirs,
        };
        let differ = (0..map.len()).find(|at| !same(*at));
        assert_eq!(differ.map(|at| (at, map[at], theirs[at])), None);
    }
}

/// preallocation=metadata on an overlay reserves clusters without content.
#[test]
fn reserved_clusters_without_content_read_from_below_and_are_written_in_place() {
    let size = 4 << 20;
    let folder = folder_with_base(size);
    let path = folder.path();
    let options = "extended_l2=on,preallocation=metadata,backing_file=base,backing_fmt=raw";
    run(path, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, "image"]);
    let mut sim = Sim::new(SimConfig::new(3));
    sim.fs().create("/image", &std::fs::read(path.join("image")).unwrap());
    let before = sim.fs().size("/image").unwrap();
    let expected = sim.block_on(0, |core| async move {
        let disk = reopened(&core, true).await;
        let mut model: Vec<u8> = (0..size).map(base_byte).collect();
        assert!(disk.read(0, size).await.expect("reads") == model, "what is below");
        disk.write(100_000, &[9; 5000]).await.expect("writes");
        model[100_000..105_000].fill(9);
        disk.write(1 << 20, &[8; 300_000]).await.expect("writes");
        model[1 << 20..(1 << 20) + 300_000].fill(8);
        disk.zero(2 << 20, 4096, ZeroMode::Keep).await.expect("zeroes");
        model[2 << 20..(2 << 20) + 4096].fill(0);
        assert!(disk.read(0, size).await.expect("reads") == model);
        disk.format.close().await.expect("closes");
        model
    });
    assert_eq!(sim.fs().size("/image").unwrap(), before, "nothing new was allocated");
    sim.fs().export("/image", path.join("image")).unwrap();
    let report = run(path, "qemu-img", &["check", "-f", "qcow2", "image"]);
    assert!(report.contains("No errors were found"), "{report}");
    assert!(peers_bytes(path, "image") == expected);
}

/// A snapshot shares the clusters: the first write copies what has data and keeps the other bits.
#[test]
fn a_write_to_a_shared_cluster_copies_its_data_and_keeps_the_other_subclusters() {
    let size = 1 << 20;
    let folder = folder_with_base(size);
    let path = folder.path();
    let options = "extended_l2=on,cluster_size=64k,backing_file=base,backing_fmt=raw";
    run(path, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, "image"]);
    let writes = [
        "write -P 1 4096 4096",
        "write -P 2 20480 2048",
        "write -z 40960 2048",
        "write -P 3 64k 64k",
        "write -z 128k 64k",
    ];
    let mut arguments = vec!["-f", "qcow2", "image"];
    writes.iter().for_each(|write| arguments.extend(["-c", write]));
    run(path, "qemu-io", &arguments);
    let old = peers_bytes(path, "image");
    run(path, "qemu-img", &["snapshot", "-c", "s", "image"]);
    let mut sim = Sim::new(SimConfig::new(3));
    sim.fs().create("/image", &std::fs::read(path.join("image")).unwrap());
    let mut model = old.clone();
    let (mut expected, map) = sim.block_on(0, |core| async move {
        let disk = reopened(&core, true).await;
        for (at, len, byte) in
            [(10_000, 3000, 7), (70_000, 100, 8), (140_000, 5000, 9), (300_000, 10, 10)]
        {
            disk.write(at, &vec![byte; len]).await.expect("writes");
            model[at as usize..at as usize + len].fill(byte);
        }
        disk.zero(20_480, 2048, ZeroMode::Keep).await.expect("zeroes");
        model[20_480..22_528].fill(0);
        assert!(disk.read(0, size).await.expect("reads") == model);
        let map = our_map(&disk).await;
        disk.format.close().await.expect("closes");
        (model, map)
    });
    assert_eq!(map[0], Place::Below, "before the first data");
    assert_eq!(map[30_000 / 512], Place::Below, "behind the last data");
    assert!(matches!(map[40_960 / 512], Place::Zero(_)), "zeroes stay zeroes");
    sim.fs().export("/image", path.join("image")).unwrap();
    let report = run(path, "qemu-img", &["check", "-f", "qcow2", "image"]);
    assert!(report.contains("No errors were found"), "{report}");
    assert!(peers_bytes(path, "image") == expected, "the disk");
    run(path, "qemu-img", &["snapshot", "-a", "s", "image"]);
    expected = peers_bytes(path, "image");
    assert!(expected == old, "the snapshot");
}

/// Row R7: zeroes on an overlay are zeroes, not holes through which the base is seen. Row R21: they
/// stay zeroes when the image is opened again, also after a power cut.
#[test]
fn zeroes_on_an_overlay_stay_zeroes_after_a_reopen_and_after_a_power_cut() {
    for (mode, extended) in
        [ZeroMode::Keep, ZeroMode::Unmap].into_iter().flat_map(|mode| [(mode, true), (mode, false)])
    {
        let size = 1 << 20;
        let mut sim = Sim::new(SimConfig::new(3).calm());
        let ranges = [(0, 65536), (70_000, 2048), (131_072 + 4096, 8192), (300_032, 100)];
        sim.block_on(0, |core| async move {
            let storage = file(&core, "/image", true).await;
            let options = CreateOptions { extended_l2: extended, ..overlay(size, 64 << 10) };
            create(&core, &storage, options).await.expect("is created");
            liveblk_engine::storage::sync_folder_of(&core, "/image".as_ref()).await.expect("named");
            let disk = reopened(&core, true).await;
            for (at, len) in ranges {
                disk.write(at, &vec![9; len as usize]).await.expect("writes");
                disk.zero(at, len, mode).await.expect("zeroes");
            }
            disk.zero(600_000, 100_000, mode).await.expect("zeroes of what was below alone");
            disk.format.flush().await.expect("is flushed");
        });
        for cut in 0..4 {
            let mut after = Sim::with_fs(SimConfig::new(cut).calm(), sim.fs().after_power_cut(cut));
            after.block_on(0, |core| async move {
                let disk = reopened(&core, cut.is_multiple_of(2)).await;
                for (at, len) in ranges.into_iter().chain([(600_000, 100_000)]) {
                    let bytes = disk.read(at, len).await.expect("reads");
                    assert!(bytes.iter().all(|byte| *byte == 0), "{mode:?} {extended} at {at}");
                }
            });
        }
    }
}

/// Row R16: what an image does not have is what lies below, a short read or write is continued, and
/// a read-only image takes no write.
#[test]
fn absent_subclusters_are_what_lies_below_and_short_transfers_are_continued() {
    for seed in 0..8 {
        // Not calm: transfers are cut short and reordered.
        let mut sim = Sim::new(SimConfig::new(seed));
        sim.block_on(0, |core| async move {
            let storage = file(&core, "/image", true).await;
            create(&core, &storage, overlay(1 << 20, 128 << 10)).await.expect("is created");
            let disk = reopened(&core, true).await;
            let mut model: Vec<u8> = (0..1 << 20).map(base_byte).collect();
            for at in [0, 50_000, 131_000, 400_000, 900_000] {
                disk.write(at, &[seed as u8; 30_000]).await.expect("writes");
                model[at as usize..at as usize + 30_000].fill(seed as u8);
            }
            assert!(disk.read(0, 1 << 20).await.expect("reads") == model);
            disk.format.close().await.expect("closes");
            let disk = reopened(&core, false).await;
            assert!(disk.read(0, 1 << 20).await.expect("reads") == model);
            let refused = disk.write(0, &[1; 512]).await.expect_err("is read-only");
            assert_eq!(refused.kind(), liveblk_engine::ErrorKind::ReadOnly);
            let refused = disk.zero(0, 4096, ZeroMode::Keep).await.expect_err("is read-only");
            assert_eq!(refused.kind(), liveblk_engine::ErrorKind::ReadOnly);
        });
    }
}

#[test]
fn a_damaged_extended_entry_gives_an_error_and_marks_the_image_corrupt() {
    let good = calm(|core| async move {
        let storage = file(&core, "/image", true).await;
        let options = CreateOptions { backing: None, ..overlay(1 << 30, 64 << 10) };
        create(&core, &storage, options).await.expect("is created");
        let disk = open(&core, storage.clone(), true).await.expect("opens");
        disk.write(0, &[7; 65536]).await.expect("writes");
        disk.format.close().await.expect("closes");
        let buf = core.pool().alloc(storage.size() as usize);
        storage.read(0, buf.clone()).await.unwrap();
        buf.to_vec()
    });
    let table = 0x40000;
    let word = u64::from_be_bytes(good[table..table + 8].try_into().unwrap());
    let bitmap = u64::from_be_bytes(good[table + 8..table + 16].try_into().unwrap());
    assert_eq!((word, bitmap), (1 << 63 | 0x50000, u64::from(u32::MAX)));
    for (word, bitmap) in [
        (word, bitmap | 1 << 32),
        (word, u64::MAX),
        (0, 1),
        (1 << 63, 0),
        (1 << 62 | 0x50000, 1),
        (1 << 63 | 0x30000, 1),
        (1 << 63 | 0x30000, 0),
    ] {
        let mut bytes = good.clone();
        bytes[table..table + 8].copy_from_slice(&word.to_be_bytes());
        bytes[table + 8..table + 16].copy_from_slice(&bitmap.to_be_bytes());
        let mut sim = Sim::new(SimConfig::new(1).calm());
        sim.fs().create("/image", &bytes);
        sim.block_on(0, |core| async move {
            let storage = file(&core, "/image", false).await;
            let report = check(&core, &storage).await.expect("is checked");
            assert!(report.corruptions > 0, "{word:#x} {bitmap:#x}");
            let disk = open(&core, storage, true).await.expect("opens");
            let error = disk.write(8192, &[1; 4096]).await.expect_err("is damaged");
            assert!(error.to_string().contains("corrupt"), "{word:#x} {bitmap:#x}: {error}");
            assert!(disk.write(512 << 20, &[1; 512]).await.is_err(), "no further writes");
            assert!(disk.read(512 << 20, 512).await.is_ok(), "reads of the rest go on");
        });
    }
}

#[test]
fn writes_to_different_subclusters_of_a_cluster_in_its_place_go_on_together() {
    calm(|core| async move {
        let storage = file(&core, "/image", true).await;
        create(&core, &storage, overlay(8 << 20, 128 << 10)).await.expect("is created");
        let disk = reopened(&core, true).await;
        disk.write(4 << 20, &[1; 512]).await.expect("writes: the table is there now");
        let begin = |sub: u64| {
            let range = GuestRange::new(sub * 4096, 4096);
            disk.format.begin_write(range).expect("begins")
        };
        let ready = |step| match step {
            WriteStep::Ready(piece) => piece,
            other => panic!("{other:?}"),
        };
        let first = loop {
            match begin(0) {
                WriteStep::Miss(miss) => disk.format.load(miss).await.expect("is loaded"),
                step => break ready(step),
            }
        };
        assert!(matches!(begin(1), WriteStep::Wait(_)), "the cluster gets its place first");
        let place = first.host.bytes();
        let cluster = core.pool().zeroed(128 << 10);
        disk.format.data_storage().write(place, cluster, false).await.expect("data");
        first.guard.complete();
        let (one, two, three) = (ready(begin(1)), ready(begin(2)), ready(begin(3)));
        assert_eq!(one.host.bytes(), place + 4096);
        assert_eq!(three.host.bytes(), place + 3 * 4096);
        assert!(matches!(begin(2), WriteStep::Wait(_)), "the same subcluster waits");
        let in_place = ready(begin(0));
        assert_eq!(in_place.host.bytes(), place);
        let zero = disk.format.begin_zero(GuestRange::new(16384, 4096), ZeroMode::Keep);
        assert!(matches!(zero.expect("begins"), ZeroStep::Wait(_)), "bits change alone");
        three.guard.complete();
        drop(two.guard);
        let again = ready(begin(2));
        one.guard.complete();
        again.guard.complete();
        drop(in_place);
        let map = our_map(&disk).await;
        for sub in 0..4 {
            assert_eq!(map[sub * 8], Place::Data(place + sub as u64 * 4096));
        }
        assert_eq!(map[4 * 8], Place::Below);
    });
}
