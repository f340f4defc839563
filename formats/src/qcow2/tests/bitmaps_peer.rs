//! Bitmaps against the peer's tools: read bit for bit in both directions, directories that lie.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use liveblk_engine::address::GuestRange;
use liveblk_engine::bitmap::DirtyBitmap;
use liveblk_engine::driver::sim::{Sim, SimConfig, SimFs};
use liveblk_engine::format::InfoValue;

use super::bitmaps::{bitmaps, info, runs};
use super::mover::{file, open};
use super::peer::{load, run, text};
use crate::qcow2::{CreateOptions, check, create};

static SOCKETS: AtomicU32 = AtomicU32::new(0);

/// The dirty ranges of a bitmap as the peer's NBD server tells them.
fn peers_runs(image: &Path, name: &str) -> Vec<(u64, u64)> {
    let folder = image.parent().expect("a folder");
    // Each server takes its own name: one that ends removes the file late.
    let socket = folder.join(format!("socket-{}", SOCKETS.fetch_add(1, Ordering::Relaxed)));
    // A server that ends keeps its lock for a while: it gets a copy.
    let copy = socket.with_extension("image");
    std::fs::copy(image, &copy).expect("is copied");
    let serve = ["--fork", "-r", "-f", "qcow2", "-B", name, "-k", text(&socket), text(&copy)];
    // It serves one client and ends.
    run("qemu-nbd", &serve);
    let source = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
        text(&socket)
    );
    let map = run("qemu-img", &["map", "--output=json", "--image-opts", &source]);
    let mut found: Vec<(u64, u64)> = Vec::new();
    for entry in map.split('{').skip(1).filter(|entry| entry.contains("\"data\": false")) {
        let number = |name: &str| -> u64 {
            let after = entry.split(&format!("\"{name}\": ")).nth(1).expect("has the field");
            let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().expect("is a number")
        };
        let (start, length) = (number("start"), number("length"));
        match found.last_mut() {
            Some((at, len)) if *at + *len == start => *len += length,
            _ => found.push((start, length)),
        }
    }
    found
}

fn import(path: &Path) -> SimFs {
    let sim = Sim::new(SimConfig::new(3).calm());
    sim.fs().create("/image", &load(path));
    sim.crash()
}

const WRITES: [(u64, u64); 5] =
    [(0, 512), (1_234_944, 4096), (9 << 20, 3 << 20), (30_000_128, 512), ((48 << 20) - 512, 512)];

#[test]
fn bitmaps_of_the_peer_are_read_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for cluster in ["512", "4k", "64k", "2M"] {
        let creation = format!("cluster_size={cluster}");
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &creation, text(&path), "48M"]);
        for (name, granularity) in [("fine", "512"), ("middle", "64k"), ("coarse", "4M")] {
            run("qemu-img", &["bitmap", "--add", "-g", granularity, text(&path), name]);
        }
        run("qemu-img", &["bitmap", "--add", "--disable", "-g", "8k", text(&path), "off"]);
        let writes: Vec<String> =
            WRITES.iter().map(|(at, len)| format!("write -q {at} {len}")).collect();
        let mut io = vec!["-f", "qcow2", text(&path)];
        io.extend(writes.iter().flat_map(|write| ["-c", write.as_str()]));
        run("qemu-io", &io);
        run("qemu-img", &["bitmap", "--disable", text(&path), "coarse"]);
        let names = ["fine", "middle", "coarse", "off"];
        let expected = names.map(|name| peers_runs(&path, name));
        assert!(expected[0].len() == WRITES.len() && expected[3].is_empty(), "{expected:?}");
        let mut sim = Sim::with_fs(SimConfig::new(4), import(&path));
        sim.block_on(0, move |core| async move {
            let storage = file(&core, "/image", false).await;
            let report = check(&core, &storage).await.expect("is checked");
            assert!(report.is_clean(), "{:?}", report.problems);
            let disk = open(&core, storage, false).await.expect("opens");
            let set = bitmaps(&disk);
            let listed = [
                info("fine", 512, true),
                info("middle", 65536, true),
                info("coarse", 4 << 20, false),
                info("off", 8192, false),
            ];
            assert_eq!(set.list(), listed);
            for (name, expected) in names.into_iter().zip(expected) {
                assert_eq!(runs(&set.load(name).await.expect("loads")), expected, "{name}");
            }
        });
    }
}

#[test]
fn bitmaps_of_ours_are_what_the_peer_reads_and_goes_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for cluster_size in [512, 4096, 65536, 2 << 20] {
        let mut sim = Sim::new(SimConfig::new(5));
        sim.block_on(0, move |core| async move {
            let storage = file(&core, "/image", true).await;
            let options = CreateOptions { cluster_size, ..CreateOptions::new(48 << 20) };
            create(&core, &storage, options).await.expect("is created");
            let disk = open(&core, storage, true).await.expect("opens");
            let set = bitmaps(&disk);
            set.add("fine", 512, true).await.unwrap();
            set.add("middle", 65536, true).await.unwrap();
            let mut all = DirtyBitmap::new(48 << 20, 4096);
            all.set_all();
            all.clear_range(GuestRange::new(1 << 20, 4096));
            set.store("all", all, false).await.unwrap();
            for (at, len) in WRITES {
                disk.write(at, &vec![1; len as usize]).await.unwrap();
            }
            disk.format.close().await.expect("closes");
        });
        sim.fs().export("/image", &path).unwrap();
        let report = run("qemu-img", &["check", "-f", "qcow2", text(&path)]);
        assert!(report.contains("No errors were found"), "{cluster_size}: {report}");
        let fine: Vec<(u64, u64)> = WRITES
            .iter()
            .map(|(at, len)| (at & !511, (at + len).next_multiple_of(512) - (at & !511)))
            .collect();
        assert_eq!(peers_runs(&path, "fine"), fine);
        let all = [(0, 1 << 20), ((1 << 20) + 4096, (47 << 20) - 4096)];
        assert_eq!(peers_runs(&path, "all"), all);
        run("qemu-io", &["-f", "qcow2", text(&path), "-c", "write -q 20M 512"]);
        run("qemu-img", &["bitmap", "--clear", text(&path), "all"]);
        run("qemu-img", &["bitmap", "--remove", text(&path), "fine"]);
        run("qemu-img", &["resize", "-q", text(&path), "50M"]);
        let report = run("qemu-img", &["check", "-f", "qcow2", text(&path)]);
        assert!(report.contains("No errors were found"), "{cluster_size}: {report}");
        let expected = peers_runs(&path, "middle");
        assert!(expected.contains(&(20 << 20, 65536)));
        let mut sim = Sim::with_fs(SimConfig::new(6), import(&path));
        sim.block_on(0, |core| async move {
            let disk = open(&core, file(&core, "/image", false).await, true).await.unwrap();
            let set = bitmaps(&disk);
            assert_eq!(set.list(), [info("middle", 65536, true), info("all", 4096, false)]);
            assert_eq!(runs(&set.load("middle").await.unwrap()), expected);
            assert!(set.load("all").await.unwrap().is_clean());
            disk.write(0, &[2; 512]).await.unwrap();
            disk.format.resize(51 << 20).await.expect("grows");
            disk.format.close().await.expect("closes");
        });
        sim.fs().export("/image", &path).unwrap();
        let report = run("qemu-img", &["check", "-f", "qcow2", text(&path)]);
        assert!(report.contains("No errors were found"), "{cluster_size}: {report}");
        run("qemu-img", &["bitmap", "--merge", "middle", text(&path), "all"]);
    }
}

#[test]
fn queries_show_what_qemu_img_shows() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&path), "1M"]);
    run("qemu-img", &["bitmap", "--add", text(&path), "b0"]);
    let mut sim = Sim::with_fs(SimConfig::new(4), import(&path));
    sim.block_on(0, |core| async move {
        let disk = open(&core, file(&core, "/image", false).await, false).await.unwrap();
        let record = InfoValue::Record(vec![
            ("flags", InfoValue::List(vec![InfoValue::Text("auto".into())])),
            ("name", InfoValue::Text("b0".into())),
            ("granularity", InfoValue::Number(65536)),
        ]);
        let specific = disk.format.info().specific;
        let names: Vec<&str> = specific.iter().map(|(name, _)| *name).collect();
        let order = ["lazy-refcounts", "bitmaps", "refcount-bits"];
        assert!(names.windows(3).any(|three| three == order), "{names:?}");
        assert!(specific.contains(&("bitmaps", InfoValue::List(vec![record]))));
    });
}

/// An image of the peer with two bitmaps, its bytes, and where its directory is.
fn two_bitmaps(path: &Path) -> (Vec<u8>, usize) {
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(path), "64M"]);
    run("qemu-img", &["bitmap", "--add", text(path), "b0"]);
    run("qemu-img", &["bitmap", "--add", "-g", "4096", "--disable", text(path), "b1"]);
    let bytes = load(path);
    let field: [u8; 8] = bytes[528..536].try_into().expect("8 bytes");
    (bytes, u64::from_be_bytes(field) as usize)
}

#[test]
fn directories_that_lie_are_refused_in_the_peers_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let (good, dir) = two_bitmaps(&path);
    assert_eq!(good[504..508], [0x23, 0x85, 0x28, 0x75]);
    let be = |value: u64| value.to_be_bytes().to_vec();
    let be4 = |value: u32| value.to_be_bytes().to_vec();
    let constraints = "Bitmap 'b0' doesn't satisfy the constraints";
    let cases: Vec<(usize, Vec<u8>, &str)> = vec![
        (508, be4(16), "bitmaps_ext: Invalid extension length"),
        (516, be4(1), "bitmaps_ext: Reserved field is not zero"),
        (512, be4(0), "found bitmaps extension with zero bitmaps"),
        (
            512,
            be4(65536),
            "bitmaps_ext: Image has 65536 bitmaps, exceeding the QEMU supported maximum of 65535",
        ),
        (512, be4(3), "Less bitmaps found than specified in header extension"),
        (512, be4(1), "More bitmaps found than specified in header extension"),
        (
            520,
            be(67_107_841),
            "bitmaps_ext: bitmap directory size (67107841) exceeds the maximum supported size \
             (67107840)",
        ),
        (520, be(0), "Requested bitmap directory size is zero"),
        (520, be(56), "Broken bitmap directory"),
        (528, be(dir as u64 + 512), "bitmaps_ext: invalid bitmap directory offset"),
        (dir + 8, be4(0), constraints),
        (dir, be(0x200), constraints),
        (dir, be(0), constraints),
        (dir + 12, be4(8), constraints),
        (dir + 16, vec![2], constraints),
        (dir + 17, vec![8], constraints),
        (dir + 17, vec![32], constraints),
        (dir + 18, vec![0, 0], "Bitmap '' doesn't satisfy the constraints"),
        (dir + 18, vec![4, 0], "Broken bitmap directory"),
        (dir + 20, be4(u32::MAX), "Broken bitmap directory"),
        (dir + 57, vec![b'0'], "Bitmap already exists: b0"),
    ];
    for (at, patch, expected) in cases {
        let mut bytes = good.clone();
        bytes[at..at + patch.len()].copy_from_slice(&patch);
        std::fs::write(&path, &bytes).unwrap();
        // The peer prints a byte of something else for a name of no bytes.
        let odd = at == dir + 20 || patch == [0, 0];
        if !odd {
            let peer = std::process::Command::new("qemu-img")
                .args(["info", text(&path)])
                .output()
                .expect("qemu-img is needed");
            let words = String::from_utf8_lossy(&peer.stderr).into_owned();
            assert!(words.contains(expected), "{at} {patch:?}: {words}");
        }
        for writable in [false, true] {
            let mut sim = Sim::new(SimConfig::new(1).calm());
            sim.fs().create("/image", &bytes);
            let refusal = sim.block_on(0, move |core| async move {
                let storage = file(&core, "/image", false).await;
                open(&core, storage, writable).await.err().map(|error| error.to_string())
            });
            assert_eq!(refusal.as_deref(), Some(expected), "{at}");
        }
    }
}

#[test]
fn tables_that_lie_make_the_bitmap_unreadable_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let (good, dir) = two_bitmaps(&path);
    let field: [u8; 8] = good[dir..dir + 8].try_into().expect("8 bytes");
    let table = u64::from_be_bytes(field) as usize;
    let cases: [(usize, u64); 7] = [
        (dir, 1 << 40),
        (table, 1 << 40),
        (table, 0x200),
        (table, 2),
        (table, 1 << 60),
        (table, 0x10000 | 1),
        (table, dir as u64),
    ];
    for (at, word) in cases {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
        let mut sim = Sim::new(SimConfig::new(1).calm());
        sim.fs().create("/image", &bytes);
        sim.block_on(0, move |core| async move {
            let storage = file(&core, "/image", false).await;
            let disk = open(&core, storage.clone(), true).await.expect("opens");
            let set = bitmaps(&disk);
            let error = set.load("b0").await.expect_err("cannot be read").to_string();
            let text = "Could not read bitmap 'b0' from image: Invalid argument";
            assert_eq!(error, text, "{at} {word:#x}");
            assert!(set.load("b1").await.expect("is good").is_clean());
            disk.write(0, &[1; 512]).await.expect("writes");
            disk.format.close().await.expect("closes");
            let disk = open(&core, storage, true).await.expect("opens");
            let set = bitmaps(&disk);
            assert!(set.list()[0].inconsistent, "it could not be brought up to date");
            set.remove("b0").await.expect("is removed");
            disk.write(1 << 20, &[1; 512]).await.expect("writes");
            disk.format.close().await.expect("closes");
            assert_eq!(disk.read(0, 512).await.expect("reads"), [1; 512]);
        });
    }
}

#[test]
fn bitmaps_that_somebody_did_not_maintain_are_ignored_and_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let (mut bytes, _) = two_bitmaps(&path);
    bytes[88..96].copy_from_slice(&[0; 8]);
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/image", &bytes);
    sim.block_on(0, |core| async move {
        let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
        let set = bitmaps(&disk);
        assert_eq!(set.list(), []);
        disk.write(0, &[1; 512]).await.expect("writes");
        set.add("b0", 4096, false).await.expect("the old ones do not count");
        disk.format.close().await.expect("closes");
        let disk = open(&core, file(&core, "/image", false).await, false).await.expect("opens");
        assert_eq!(bitmaps(&disk).list(), [info("b0", 4096, false)]);
    });
    sim.fs().export("/image", &path).unwrap();
    // By whole members: the name of the temporary folder is in the answer, too.
    let shown = run("qemu-img", &["info", "--output=json", text(&path)]);
    let has = |name: &str| shown.contains(&format!("\"name\": \"{name}\""));
    assert!(has("b0") && !has("b1"), "{shown}");
}

/// Extra data of others is kept; without leave to use the bitmap, it is not used.
#[test]
fn extra_data_is_kept_and_decides_about_use() {
    use crate::qcow2::bitmap_dir::{Pointer, Stored, directory};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let (good, dir) = two_bitmaps(&path);
    for (flags, usable) in [(2 | 4, true), (2, false)] {
        let mut bytes = good.clone();
        let field: [u8; 8] = bytes[dir..dir + 8].try_into().expect("8 bytes");
        let stored = Stored {
            name: b"theirs".to_vec(),
            flags,
            granularity_bits: 16,
            table: u64::from_be_bytes(field),
            entries: 1,
            extra: b"what they know".to_vec(),
        };
        let content = directory([stored].iter());
        bytes.resize(dir + 65536, 0);
        bytes[dir..dir + content.len()].copy_from_slice(&content);
        let size = content.len() as u64;
        let pointer = Pointer { count: 1, bytes: size, offset: dir as u64 };
        bytes[512..536].copy_from_slice(&pointer.data());
        let mut sim = Sim::new(SimConfig::new(1).calm());
        sim.fs().create("/image", &bytes);
        sim.block_on(0, move |core| async move {
            let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
            let set = bitmaps(&disk);
            assert_eq!(set.load("theirs").await.is_ok(), usable);
            assert_eq!(set.list()[0].inconsistent, !usable);
            disk.write(0, &[1; 512]).await.expect("writes");
            set.add("ours", 65536, false).await.expect("is added");
            disk.format.close().await.expect("closes");
            let storage = file(&core, "/image", false).await;
            let disk = open(&core, storage, false).await.expect("opens");
            assert_eq!(bitmaps(&disk).list()[0].in_use, !usable, "it missed a write");
        });
        let bytes = sim.fs().read("/image").expect("is there");
        let kept = bytes.windows(14).filter(|part| *part == b"what they know").count();
        assert!(kept > 0, "it is in the new directory");
    }
}
