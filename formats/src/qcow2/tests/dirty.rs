//! The dirty bit, the corrupt bit and autoclear bits: what an open does with them, and that they
//! tell the truth after a cut.

use std::process::Command;

use liveblk_engine::driver::sim::{Sim, SimConfig};
use liveblk_engine::executor::Class;
use liveblk_engine::format::InfoValue;

use super::mover::{calm, file, open};
use super::specimen::{PLAIN, Shape, Specimen};
use crate::qcow2::check;

/// The incompatible bits in the file of `sim`.
fn incompatible(sim: &Sim) -> u64 {
    let mut bits = [0; 8];
    assert!(sim.fs().read_at("/image", 72, &mut bits));
    u64::from_be_bytes(bits)
}

fn world(bytes: &[u8]) -> Sim {
    let sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/image", bytes);
    sim
}

/// A dirty image as an interrupted writer leaves it: clusters in use that nothing counts.
fn dirty() -> Specimen {
    let mut new = Specimen::new(PLAIN);
    new.set(72, 8, 1);
    new.set(80, 8, 1);
    for host in new.places.data.clone() {
        new.set_count(host, 0);
    }
    new
}

#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_for_writing_and_left_alone_otherwise() {
    let specimen = dirty();
    for writable in [false, true] {
        let mut sim = world(&specimen.bytes);
        let expected: Vec<u8> = (0..3 * 4096).map(|at| specimen.expected(at)).collect();
        sim.block_on(0, |core| async move {
            let storage = file(&core, "/image", false).await;
            let disk = open(&core, storage, writable).await.expect("opens");
            assert_eq!(disk.format.info().dirty, !writable);
            assert_eq!(disk.read(0, 3 * 4096).await.expect("reads"), expected);
            disk.format.close().await.expect("closes");
        });
        assert_eq!(incompatible(&sim), u64::from(!writable));
        let after = sim.fs().read("/image").expect("is there");
        assert_eq!(after == specimen.bytes, !writable, "read-only changes nothing");
    }
}

#[test]
fn an_image_that_becomes_writable_later_is_repaired_then() {
    let specimen = dirty();
    let mut sim = world(&specimen.bytes);
    sim.block_on(0, |core| async move {
        let storage = file(&core, "/image", false).await;
        let disk = open(&core, storage.clone(), false).await.expect("opens");
        disk.format.set_writable(true).await.expect("becomes writable");
        disk.write(0, &[9; 20_000]).await.expect("writes");
        disk.format.set_writable(false).await.expect("becomes read-only");
        assert_eq!(disk.read(0, 20_000).await.expect("reads"), vec![9; 20_000]);
        let report = check(&core, &storage).await.expect("is checked");
        assert!(report.is_clean(), "{:?}", report.problems);
    });
    assert_eq!(incompatible(&sim), 0);
}

/// Refcounts are never late here, so the bit is never set: that is its truth at any cut.
#[test]
fn an_image_with_lazy_refcounts_is_clean_at_every_cut() {
    let mut specimen = Specimen::new(PLAIN);
    specimen.set(80, 8, 1);
    for steps in (0..120).step_by(4) {
        let sim = world(&specimen.bytes);
        let mut sim = sim;
        let core = sim.core(0);
        drop(core.spawn(Class::Guest, {
            let core = core.clone();
            async move {
                let disk = open(&core, file(&core, "/image", false).await, true).await.unwrap();
                for at in 0..20 {
                    disk.write(at * 60_000, &[at as u8 + 1; 9000]).await.unwrap();
                    disk.format.flush().await.unwrap();
                }
            }
        }));
        sim.run_steps(steps);
        let mut after = Sim::with_fs(SimConfig::new(steps).calm(), sim.fs().after_power_cut(steps));
        assert_eq!(incompatible(&after), 0);
        after.block_on(0, |core| async move {
            let storage = file(&core, "/image", false).await;
            let report = check(&core, &storage).await.expect("is checked");
            assert_eq!(report.corruptions, 0, "{:?}", report.problems);
        });
    }
}

#[test]
fn what_the_peer_left_dirty_is_written_on_and_clean_for_the_peer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let name = path.to_str().unwrap();
    let run = |program: &str, arguments: &[&str]| {
        Command::new(program).args(arguments).output().expect("the peer's tools are needed")
    };
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", name, "32M"]);
    let aborted = run("qemu-io", &["-c", "write -P 7 1M 3M", "-c", "abort", name]);
    assert!(!aborted.status.success());
    let mut sim = world(&std::fs::read(&path).unwrap());
    assert_eq!(incompatible(&sim) & 1, 1, "the peer left it dirty");
    sim.block_on(0, |core| async move {
        let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
        assert_eq!(disk.read(1 << 20, 3 << 20).await.expect("reads"), vec![7; 3 << 20]);
        disk.write(8 << 20, &[8; 1 << 20]).await.expect("writes");
        let info = disk.format.info().specific;
        assert!(info.contains(&("lazy-refcounts", InfoValue::Flag(true))));
        disk.format.close().await.expect("closes");
    });
    sim.fs().export("/image", &path).unwrap();
    let checked = run("qemu-img", &["check", name]);
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    let reads = ["-c", "read -P 7 1M 3M", "-c", "read -P 8 8M 1M", name];
    let read = String::from_utf8_lossy(&run("qemu-io", &reads).stdout).into_owned();
    assert!(!read.contains("verification failed"), "{read}");
}

#[test]
fn the_corrupt_bit_keeps_writers_out_until_a_repair_finds_nothing_wrong() {
    let mut specimen = Specimen::new(PLAIN);
    specimen.set(72, 8, 2);
    let mut sim = world(&specimen.bytes);
    sim.block_on(0, |core| async move {
        let storage = file(&core, "/image", false).await;
        let error = open(&core, storage.clone(), true).await.err().expect("is refused");
        assert_eq!(error.to_string(), "qcow2: Image is corrupt; cannot be opened read/write");
        let disk = open(&core, storage.clone(), false).await.expect("reads are allowed");
        assert!(disk.format.set_writable(true).await.is_err());
        crate::qcow2::repair(&core, &storage, crate::qcow2::Repair::All).await.expect("repairs");
        open(&core, storage, true).await.expect("opens").format.close().await.expect("closes");
    });
    assert_eq!(incompatible(&sim), 0);
}

/// Row R10: whatever changes in the header, fields and extensions that nobody knows stay.
#[test]
fn every_header_survives_being_read_and_written() {
    use super::super::header::Header;
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut kept = 0;
    for round in 0..3000 {
        let shape = Shape { bitmap: round % 3 == 0, snapshot: round % 2 == 0, ..PLAIN };
        let mut specimen = Specimen::new(shape);
        specimen.set(80, 8, random());
        specimen.set(88, 8, random());
        let further = 8 * (random() % 12);
        if further > 8 && round % 4 == 1 && !shape.bitmap {
            // A longer header than anybody knows; the extensions move behind it.
            let end = 104 + further;
            specimen.set(100, 4, end);
            (112..end).step_by(8).for_each(|at| specimen.set(at, 8, random()));
            specimen.set(end, 8, 0x7777_0000 << 32 | 11);
            specimen.set(end + 8, 8, random());
            specimen.set(end + 16, 8, random() << 40);
            specimen.set(end + 24, 8, 0);
        }
        if round % 5 == 0 {
            specimen.set(8, 8, 1024);
            specimen.set(16, 4, 9);
            specimen.set(1024, 8, u64::from_be_bytes(*b"base.qco"));
            specimen.set(1032, 1, u64::from(b'w'));
        }
        let size = specimen.bytes.len() as u64;
        let Ok(header) = Header::parse(&specimen.bytes, size) else { continue };
        let written = header.bytes();
        assert_eq!(written, specimen.bytes[..written.len()], "round {round}");
        let mut again = specimen.bytes.clone();
        again[..written.len()].copy_from_slice(&written);
        assert_eq!(Header::parse(&again, size), Ok(header), "round {round}");
        kept += 1;
    }
    assert!(kept > 2000, "{kept}");
}

#[test]
fn autoclear_bits_that_nobody_here_maintains_go_with_the_first_writer() {
    let mut specimen = Specimen::new(PLAIN);
    specimen.set(88, 8, 0xff00);
    let bytes = specimen.bytes.clone();
    let left = calm(move |core| async move {
        let storage = file(&core, "/image", true).await;
        let buf = liveblk_engine::buf::Buf::from_vec(bytes);
        storage.write(0, buf, false).await.unwrap();
        open(&core, storage.clone(), true).await.expect("opens").format.close().await.unwrap();
        let buf = core.pool().alloc(8);
        storage.read(88, buf.clone()).await.unwrap();
        buf.to_vec()
    });
    assert_eq!(left, [0; 8]);
}
