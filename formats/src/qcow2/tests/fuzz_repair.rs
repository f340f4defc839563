//! What the fuzz target `qcow2_check_repair` runs, and the ordinary tests replay: an image with
//! changed bytes is checked, repaired and checked again.
//!
//! An input is one byte for the specimen and then changes of 12 bytes each: where (3), how wide
//! (1), what (8); or, from 128 on, the file itself. Promises: no panic; a second check finds no
//! more than the first; a repair of a repaired image changes nothing; what is clean opens.

use liveblk_engine::buf::Buf;
use liveblk_engine::driver::sim::Rng;
use liveblk_engine::executor::Core;
use liveblk_engine::storage::{Memory, Storage};

use super::mover::open;
use super::specimen::{SHAPES, Specimen};
use crate::qcow2::{Repair, check, repair};

/// The largest image that an input is taken for, in bytes.
const IMAGE_MAX: usize = 1 << 20;

/// Changes of one input.
const CHANGES_MAX: usize = 64;

/// The file that an input stands for.
fn image(data: &[u8]) -> Vec<u8> {
    let Some((kind, rest)) = data.split_first() else { return Vec::new() };
    if *kind >= 128 {
        return rest[..rest.len().min(IMAGE_MAX)].to_vec();
    }
    let mut new = Specimen::new(SHAPES[usize::from(*kind) % SHAPES.len()].1);
    let len = new.bytes.len() as u64;
    for change in rest.chunks_exact(12).take(CHANGES_MAX) {
        let number = |range: &[u8]| range.iter().fold(0, |all, byte| all << 8 | u64::from(*byte));
        let width = 1 << (change[3] % 4);
        new.set(number(&change[..3]) % (len - 8), width, number(&change[4..12]));
    }
    new.bytes
}

/// Runs one input; panics if a promise is broken.
pub(super) async fn check_repair(core: Core, data: Vec<u8>) {
    let memory = Memory::new(0);
    drop(memory.write(0, &Buf::from_vec(image(&data))));
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
    let mut all: Vec<Vec<u8>> = (0..SHAPES.len()).map(|kind| vec![kind as u8]).collect();
    let mut rng = Rng::new(7);
    for round in 0..400_u64 {
        let kind = (round % SHAPES.len() as u64) as u8;
        let specimen = Specimen::new(SHAPES[usize::from(kind)].1);
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
