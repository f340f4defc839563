//! What is metadata, or known to be somebody's data, is not written over, whatever tables say.

use liveblk_engine::driver::sim::{Sim, SimConfig};

use super::mover::{file, open};
use super::specimen::{COPIED, PLAIN, SHAPES, Specimen};
use crate::qcow2::{Repair, repair};

fn world(specimen: &Specimen) -> Sim {
    let sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/image", &specimen.bytes);
    sim
}

/// Row R6 and the peer's overlap checks: an entry that leads into metadata is not followed.
#[test]
fn guest_writes_never_reach_metadata_of_any_kind() {
    let base = Specimen::new(SHAPES[7].1);
    let places = base.places.clone();
    for (kind, place) in [
        ("header", 0),
        ("refcount table", places.reftable),
        ("refcount block", places.block),
        ("L1", places.l1),
        ("L2", places.l2[0]),
        ("own L2", places.l2[1]),
        ("snapshot table", places.snapshots),
        ("snapshot L1", places.snapshot_l1),
        ("bitmap directory", places.directory),
    ] {
        let mut specimen = base.clone();
        let at = specimen.entry(1, 0);
        specimen.set(at, 8, place | COPIED);
        let mut sim = world(&specimen);
        let span = specimen.span();
        sim.block_on(0, |core| async move {
            let disk = open(&core, file(&core, "/image", false).await, true).await.expect(kind);
            let error = disk.write(span, &[0xee; 4096]).await.expect_err(kind);
            assert!(error.to_string().contains("corrupt"), "{kind}: {error}");
            assert!(disk.write(span + (1 << 16), &[0xee; 512]).await.is_err(), "{kind}: stopped");
        });
        sim.run_idle();
        let mut bytes = vec![0; 1 << 16];
        assert!(sim.fs().read_at("/image", place, &mut bytes));
        assert!(!bytes.contains(&0xee), "{kind} was written over");
        let mut bits = [0; 8];
        assert!(sim.fs().read_at("/image", 72, &mut bits));
        assert_eq!(bits[7] & 2, 2, "{kind}: the corrupt bit");
    }
}

/// Row R1: clusters in use that the refcounts call free are not handed out once they were seen.
#[test]
fn the_allocator_hands_out_nothing_that_is_known_to_be_mapped() {
    let mut specimen = Specimen::new(PLAIN);
    for host in specimen.places.data.clone() {
        specimen.set_count(host, 0);
    }
    specimen.set_count(specimen.places.l2[1], 0);
    let mut sim = world(&specimen);
    sim.block_on(0, |core| async move {
        let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
        let (cluster, span) = (specimen.cluster(), specimen.span());
        let old = |at: u64| (at..at + 2 * cluster).map(|at| specimen.expected(at)).collect();
        for start in [0, span] {
            let expected: Vec<u8> = old(start);
            assert_eq!(disk.read(start, 2 * cluster).await.expect("reads"), expected);
        }
        for index in 10..60 {
            disk.write(index * cluster, &[0xee; 4096]).await.expect("writes");
            disk.write(span + index * cluster, &[0xee; 4096]).await.expect("writes");
        }
        disk.format.flush().await.expect("flushes");
        for start in [0, span] {
            let expected: Vec<u8> = old(start);
            assert_eq!(disk.read(start, 2 * cluster).await.expect("reads"), expected);
        }
    });
}

/// Row R2's kind: a table behind the end of the file would read as zeroes ("nothing is there", "all
/// is free") once the file grew over its place.
#[test]
fn an_image_that_lost_its_end_is_not_written_and_its_refcounts_can_be_rebuilt() {
    for (kind, repairable) in
        [("refcount table", true), ("refcount block", true), ("L2 table", false)]
    {
        let mut specimen = Specimen::new(PLAIN);
        let cluster = specimen.cluster();
        let far = (specimen.bytes.len() as u64).next_multiple_of(cluster) + 3 * cluster;
        let (entry, value) = match kind {
            "L2 table" => (specimen.places.l1 + 8, far | COPIED),
            // The header's pointer to it.
            "refcount table" => (48, far),
            _ => (specimen.places.reftable, far),
        };
        specimen.set(entry, 8, value);
        let before = specimen.bytes.clone();
        let mut sim = world(&specimen);
        let image = specimen.clone();
        sim.block_on(0, |core| async move {
            let error = open(&core, file(&core, "/image", false).await, true).await;
            let error = error.err().expect(kind).to_string();
            assert!(error.contains(&format!("its {kind} lies beyond the end")), "{error}");
            let disk = open(&core, file(&core, "/image", false).await, false).await.expect(kind);
            assert_eq!(disk.read(0, 1).await.expect(kind), [image.expected(0)]);
            let lost = disk.read(image.span(), 1).await;
            assert_eq!(lost.is_ok(), repairable, "{kind}: {lost:?}");
        });
        sim.run_idle();
        let mut after = vec![0; before.len()];
        assert!(sim.fs().read_at("/image", 0, &mut after));
        assert!(after == before, "{kind}: something was written");
        sim.block_on(0, |core| async move {
            let storage = file(&core, "/image", false).await;
            drop(repair(&core, &storage, Repair::All).await.expect(kind));
            let opens = open(&core, storage, true).await;
            assert_eq!(opens.is_ok(), repairable, "{kind}");
            let Ok(disk) = opens else { return };
            for index in 10..60 {
                disk.write(index * cluster, &[0xee; 4096]).await.expect("writes");
            }
            for at in (0..2 * cluster).step_by(512) {
                assert_eq!(disk.read(at, 1).await.expect("reads"), [specimen.expected(at)]);
            }
        });
    }
}
