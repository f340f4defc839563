//! What the fuzz target `qcow2_check_repair` runs, and the ordinary tests replay: an image with
//! changed bytes is checked, repaired and checked again.
//!
//! An input is one byte for the specimen and then changes of 12 bytes each: where (3), how wide
//! (1), what (8); or, from 128 on, the file itself. Promises: no panic; a second check finds no
//! more than the first; a repair of a repaired image changes nothing; what is clean opens.

use std::collections::BTreeMap;
use std::rc::Rc;

use liveblk_engine::buf::Buf;
use liveblk_engine::driver::sim::Rng;
use liveblk_engine::executor::Core;
use liveblk_engine::storage::{Memory, Storage};

use super::fuzzing::Session;
use super::mover::open;
use super::specimen::{PLAIN, SHAPES, Shape, Specimen};
use crate::qcow2::{Repair, check, repair};

/// The largest image that an input is taken for, in bytes.
const IMAGE_MAX: usize = 1 << 20;

/// Changes of one input.
const CHANGES_MAX: usize = 64;

/// The images that inputs change: of every kind, with the smallest clusters that it can have, so
/// that most of the time goes into checks and not into bytes.
const KINDS: [Shape; SHAPES.len()] = {
    let mut kinds = [PLAIN; SHAPES.len()];
    let mut at = 0;
    while at < kinds.len() {
        kinds[at] = SHAPES[at].1;
        if !kinds[at].extended && kinds[at].cluster_bits > 12 {
            kinds[at].cluster_bits = 12;
        }
        at += 1;
    }
    kinds
};

/// Found by the fuzzer: changes of the specimen with a snapshot, after which a repair made a file
/// grow over the part of a snapshot's L1 table that lay behind its end.
const BEHIND_THE_END: [[u8; 12]; 4] = [
    [0, 192, 10, 184, 184, 184, 184, 184, 61, 184, 184, 184],
    [184, 176, 72, 71, 71, 68, 184, 184, 184, 184, 184, 184],
    [184, 0, 0, 255, 2, 184, 61, 184, 184, 184, 184, 176],
    [72, 71, 71, 68, 184, 184, 184, 184, 184, 184, 184, 0],
];

/// The file that an input stands for.
fn image(specimens: &mut BTreeMap<usize, Rc<Memory>>, data: &[u8]) -> Rc<Memory> {
    let Some((kind, rest)) = data.split_first() else { return Memory::new(0) };
    if *kind >= 128 {
        return Memory::from_bytes(&rest[..rest.len().min(IMAGE_MAX)]);
    }
    let kind = usize::from(*kind) % KINDS.len();
    let made = || Memory::from_bytes(&Specimen::new(KINDS[kind]).bytes);
    let new = specimens.entry(kind).or_insert_with(made).copy();
    for change in rest.chunks_exact(12).take(CHANGES_MAX) {
        let number = |range: &[u8]| range.iter().fold(0, |all, byte| all << 8 | u64::from(*byte));
        let width = 1 << (change[3] % 4);
        let at = number(&change[..3]) % (new.size() - 8);
        drop(new.write(at, &Buf::from_vec(change[12 - width..].to_vec())));
    }
    new
}

/// Runs one input; panics if a promise is broken.
pub(super) fn qcow2_check_repair(session: &mut Session, data: &[u8]) {
    let image = image(&mut session.specimens, data);
    session.run(|core| check_repair(core, image));
}

async fn check_repair(core: Core, memory: Rc<Memory>) {
    let storage = Storage::Memory(memory);
    let Ok(before) = check(&core, &storage).await else { return };
    let Ok(repaired) = repair(&core, &storage, Repair::All).await else { return };
    let after = check(&core, &storage).await.expect("what was checked can be checked again");
    assert!(after.corruptions <= before.corruptions, "{before:?} {after:?}");
    assert_eq!((after.corruptions, after.leaks), (repaired.corruptions, repaired.leaks));
    let size = storage.size();
    if after.is_clean() {
        let again = repair(&core, &storage, Repair::All).await.expect("is clean");
        assert!(again.is_clean() && storage.size() == size, "{again:?}");
    }
    if let Ok(disk) = open(&core, storage, true).await {
        drop(disk.read(0, disk.format.size().min(1 << 16)).await);
        drop(disk.write(0, &[1; 512]).await);
        drop(disk.format.close().await);
    }
}

/// Seed inputs: each specimen whole, and with changes where its tables are.
pub(super) fn corpus() -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = (0..KINDS.len()).map(|kind| vec![kind as u8]).collect();
    all.push([&[6][..], BEHIND_THE_END.as_flattened()].concat());
    let mut rng = Rng::new(7);
    for round in 0..400_u64 {
        let kind = (round % KINDS.len() as u64) as u8;
        let specimen = Specimen::new(KINDS[usize::from(kind)]);
        let places = &specimen.places;
        let mut input = vec![kind];
        for _ in 0..rng.bits() % 5 + 1 {
            let tables = [
                0,
                72,
                places.reftable,
                places.block,
                places.l1,
                places.l2[0],
                places.l2[1],
                places.snapshots,
                places.snapshot_l1,
                places.directory,
                places.bitmap_table,
            ];
            let at = tables[(rng.bits() % tables.len() as u64) as usize] + rng.bits() % 12 * 8;
            input.extend_from_slice(&(at as u32).to_be_bytes()[1..]);
            input.push(rng.bits() as u8);
            let cluster = rng.bits() % 20 * specimen.cluster();
            let value = match rng.bits() % 6 {
                0 => rng.bits(),
                1 => cluster,
                2 => cluster | 1 << 63,
                3 => cluster | 1 << 62 | (rng.bits() % 4096),
                4 => rng.bits() % 4,
                _ => cluster | (rng.bits() % 512),
            };
            input.extend_from_slice(&value.to_be_bytes());
        }
        all.push(input);
    }
    all
}
