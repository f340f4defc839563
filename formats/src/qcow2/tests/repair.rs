//! Repair against the peer: what we repair is clean for it, what it repairs is clean for us, the
//! numbers of a check are the same, and a cut in the middle costs nothing.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use liveblk_engine::buf::Buf;
use liveblk_engine::driver::sim::{Sim, SimConfig};
use liveblk_engine::executor::{Class, Core};
use liveblk_engine::storage::{Memory, Storage};

use super::mover::{calm, file, open};
use super::mutations::{Variant, variants};
use super::specimen::{COPIED, PLAIN, SHAPES, Specimen};
use crate::qcow2::{CheckReport, Repair, check, repair};

/// Exit code, standard output and errors of `qemu-img`.
fn qemu_img(arguments: &[&str], path: &Path) -> (i32, String, String) {
    let output = Command::new("qemu-img").args(arguments).arg(path).output();
    let output = output.expect("qemu-img is needed");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// A number of the peer's report; 0 where it has none.
fn number(report: &str, name: &str) -> u64 {
    let Some((_, rest)) = report.split_once(&format!("\"{name}\":")) else { return 0 };
    rest.trim_start().chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

fn memory(bytes: &[u8]) -> Storage {
    let memory = Memory::new(0);
    drop(memory.write(0, &Buf::from_vec(bytes.to_vec())));
    Storage::Memory(memory)
}

async fn content(core: &Core, storage: &Storage) -> Vec<u8> {
    let buf = core.pool().alloc(storage.size() as usize);
    storage.read(0, buf.clone()).await.expect("is read");
    buf.to_vec()
}

/// What a check of ours says; `None`: it refuses.
fn our_check(bytes: &[u8]) -> Option<CheckReport> {
    let storage = memory(bytes);
    calm(|core| async move { check(&core, &storage).await.ok() })
}

/// What a repair of ours makes of an image.
fn our_repair(bytes: &[u8], what: Repair) -> Option<(CheckReport, Vec<u8>)> {
    let storage = memory(bytes);
    calm(move |core| async move {
        let report = repair(&core, &storage, what).await.ok()?;
        Some((report, content(&core, &storage).await))
    })
}

/// Whether guest data is what the specimen was made with.
async fn expect_data(core: &Core, storage: Storage, specimen: &Specimen, name: &str) {
    let disk = open(core, storage, true).await.expect(name);
    for table in 0..2 {
        let start = table * specimen.span();
        let len = 6 * specimen.cluster();
        let bytes = disk.read(start, len).await.expect(name);
        let expected: Vec<u8> = (start..start + len).map(|at| specimen.expected(at)).collect();
        assert!(bytes == expected, "{name}: data at {start:#x}");
    }
    disk.format.close().await.expect(name);
}

#[test]
fn specimens_are_clean_for_both_with_the_same_numbers_and_data() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for (name, shape) in SHAPES {
        let specimen = Specimen::new(shape);
        std::fs::write(&path, &specimen.bytes).unwrap();
        let (code, json, errors) = qemu_img(&["check", "--output=json"], &path);
        assert_eq!(code, 0, "{name}: {json} {errors}");
        let report = our_check(&specimen.bytes).expect(name);
        assert!(report.is_clean(), "{name}: {:?}", report.problems);
        expect_equal_numbers(name, &report, &json);
        let copy = specimen.clone();
        calm(|core| async move { expect_data(&core, memory(&copy.bytes), &copy, name).await });
    }
}

fn expect_equal_numbers(name: &str, report: &CheckReport, json: &str) {
    let ours = [
        ("image-end-offset", report.image_end_offset),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("check-errors", report.check_errors),
    ];
    for (field, value) in ours {
        let problems = &report.problems;
        assert_eq!(value, number(json, field), "{name}: {field} of {json} {problems:?}");
    }
}

/// Damages whose repair loses no data, by name.
fn harmless(all: Vec<Variant>) -> Vec<Variant> {
    all.into_iter()
        .filter(|variant| {
            let name = &variant.name;
            if name.contains("refcount-order") {
                return false;
            }
            name.contains("count") && !name.contains("snapshot-count") && !name.contains("bitmap")
                || name.starts_with("plain-reftable-")
                || name.ends_with("without-copied")
        })
        .filter(|variant| !variant.name.starts_with("header"))
        .collect()
}

#[test]
fn damaged_refcounts_and_copied_bits_are_repaired_without_loss_of_data() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let mut repaired = 0;
    for (at, variant) in harmless(variants()).into_iter().enumerate() {
        let Variant { name, specimen } = variant;
        let (report, bytes) = our_repair(&specimen.bytes, Repair::All).expect(&name);
        assert!(report.is_clean(), "{name}: {:?}", report.problems);
        repaired += u64::from(report.corruptions_fixed + report.leaks_fixed > 0);
        let copy = bytes.clone();
        let (base, text) = (specimen.clone(), name.clone());
        calm(|core| async move { expect_data(&core, memory(&copy), &base, &text).await });
        if at % 3 == 0 {
            std::fs::write(&path, &bytes).unwrap();
            let (code, json, errors) = qemu_img(&["check", "--output=json"], &path);
            assert_eq!(code, 0, "{name}: {json} {errors}");
        }
    }
    assert!(repaired > 100, "{repaired}");
}

#[test]
fn a_check_counts_what_the_peer_counts() {
    // Where the peer does not count, or counts otherwise, and why.
    let differences = [
        // An L1 entry without an offset is damage for us; the peer reads the header as a table.
        "l1-0-at-header",
        "l1-1-at-header",
        // Offset 0 with the COPIED bit: nothing for the peer.
        "at-header",
        // A table that starts inside a cluster is not followed; the peer reads it.
        "unaligned",
        "l1-0-all-ones",
        "l1-1-all-ones",
        "l1-0-compressed",
        "l1-1-compressed",
        "l1-0-reserved-low",
        "l1-1-reserved-low",
        // A block counted nowhere, twice, or out of place: the peer ends with errors instead.
        "reftable-",
        // The peer refuses or stops where we go on.
        "snapshot-",
        "bitmap-",
        "extension-",
        "header-",
    ];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let mut compared = 0;
    for (at, variant) in variants().into_iter().enumerate() {
        let Variant { name, specimen } = variant;
        let differs = differences.iter().any(|part| name.contains(part));
        if differs || at % 2 == 1 || name.contains("cut-to") || name.contains("cluster-bits") {
            continue;
        }
        let Some(report) = our_check(&specimen.bytes) else { continue };
        std::fs::write(&path, &specimen.bytes).unwrap();
        let (_, json, errors) = qemu_img(&["check", "--output=json"], &path);
        if json.is_empty() {
            panic!("{name}: {errors} but {report:?}");
        }
        expect_equal_numbers(&name, &report, &json);
        compared += 1;
    }
    assert!(compared > 150, "{compared}");
}

#[test]
fn what_one_side_repairs_is_clean_for_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let (mut by_us, mut by_them) = (0, 0);
    for (at, variant) in variants().into_iter().enumerate() {
        let Variant { name, specimen } = variant;
        if at % 5 != 0 || name.contains("cut-to") {
            continue;
        }
        std::fs::write(&path, &specimen.bytes).unwrap();
        let (code, ..) = qemu_img(&["check", "-r", "all"], &path);
        let theirs = std::fs::metadata(&path).unwrap().len() < 64 << 20;
        if code == 0 && theirs {
            let bytes = std::fs::read(&path).unwrap();
            if let Some(report) = our_check(&bytes) {
                let own_view = name.contains("at-header");
                assert!(report.is_clean() || own_view, "{name}: {:?}", report.problems);
                by_them += 1;
            }
        }
        if let Some((report, bytes)) = our_repair(&specimen.bytes, Repair::All)
            && report.is_clean()
        {
            std::fs::write(&path, &bytes).unwrap();
            let (code, json, errors) = qemu_img(&["check", "--output=json"], &path);
            // What the peer does not even open is not for a check to judge.
            let opens = !errors.contains("Could not open");
            assert!(code == 0 || !opens, "{name}: {json} {errors} {:?}", report.problems);
            by_us += u64::from(opens);
        }
    }
    assert!(by_us > 80 && by_them > 80, "{by_us} {by_them}");
}

#[test]
fn a_second_check_finds_no_more_than_the_first_and_a_second_repair_nothing_to_do() {
    for Variant { name, specimen } in variants().into_iter().step_by(2) {
        let Some(before) = our_check(&specimen.bytes) else { continue };
        for what in [Repair::Leaks, Repair::All] {
            let Some((report, bytes)) = our_repair(&specimen.bytes, what) else { continue };
            let after = our_check(&bytes).expect(&name);
            // A leak that is gone can leave a COPIED bit that only a whole repair sets right.
            let more = after.corruptions > before.corruptions && what == Repair::All;
            assert!(!more, "{name}: {} after {}", after.corruptions, before.corruptions);
            assert_eq!(after.corruptions, report.corruptions, "{name} {what:?}");
            assert_eq!(after.leaks, report.leaks, "{name} {what:?}");
            if what == Repair::All && after.is_clean() {
                let (again, same) = our_repair(&bytes, what).expect(&name);
                assert!(again.is_clean() && same == bytes, "{name}: a repair of nothing");
            }
        }
    }
}

/// Damages that take every way through a repair.
fn patients() -> Vec<(&'static str, Specimen)> {
    let make = |shape, damage: fn(&mut Specimen)| {
        let mut new = Specimen::new(shape);
        damage(&mut new);
        new
    };
    let all = SHAPES[7].1;
    vec![
        ("raised in place", make(PLAIN, |new| new.set_count(new.places.data[0], 0))),
        ("table gone", make(PLAIN, |new| new.set(new.places.reftable, 8, 0))),
        (
            "block shared",
            make(PLAIN, |new| {
                new.set(new.places.reftable + 8, 8, new.places.block);
            }),
        ),
        (
            "leaks and COPIED",
            make(all, |new| {
                new.set_count(new.places.data[4], 3);
                new.set(new.places.l1 + 8, 8, new.places.l2[1]);
            }),
        ),
        (
            "snapshot table",
            make(all, |new| {
                new.set(new.places.snapshots + 36, 4, 0);
                new.set(new.places.snapshots + 40, 5, u64::from_be_bytes(*b"\0\0\x001snap"));
            }),
        ),
        (
            "entry reset",
            make(PLAIN, |new| {
                new.set(new.entry(0, 5), 8, new.places.kept | 0x201 | COPIED);
            }),
        ),
        (
            "dirty",
            make(PLAIN, |new| {
                new.set(72, 8, 1);
                (5..16).for_each(|cluster| new.set_count(cluster * 4096, 0));
            }),
        ),
    ]
}

#[test]
fn a_cut_in_the_middle_of_a_repair_is_finished_by_a_second_one() {
    for (name, specimen) in patients() {
        let specimen = Rc::new(specimen);
        let mut finished = false;
        for steps in 0.. {
            let mut sim = Sim::new(SimConfig::new(steps).calm());
            sim.fs().create("/image", &specimen.bytes);
            let core = sim.core(0);
            let task = core.spawn(Class::Guest, {
                let core = core.clone();
                async move {
                    let storage = file(&core, "/image", false).await;
                    drop(repair(&core, &storage, Repair::All).await.expect("is repaired"));
                }
            });
            drop(task);
            finished |= !sim.run_steps(steps * 2);
            for seed in 0..3 {
                let left = sim.fs().after_power_cut(seed);
                let mut after = Sim::with_fs(SimConfig::new(seed).calm(), left);
                let specimen = Rc::clone(&specimen);
                after.block_on(0, |core| async move {
                    let storage = file(&core, "/image", false).await;
                    let report = repair(&core, &storage, Repair::All).await.expect(name);
                    assert!(report.is_clean(), "{name} {steps}: {:?}", report.problems);
                    expect_data(&core, storage, &specimen, name).await;
                });
            }
            if finished || steps > 400 {
                break;
            }
        }
        assert!(finished, "{name} never ends");
    }
}
