//! The N-th failure of a repair: what is left is repaired by the next one, and no data is lost.

use liveblk_engine::driver::sim::{Sim, SimConfig, SimFs};
use liveblk_engine::executor::Core;
use liveblk_engine::storage::Storage;

use super::mover::{file, open};
use super::peer;
use super::specimen::{SHAPES, Specimen};
use super::sweep::{FAULTS, Fault};
use crate::qcow2::{Repair, check, repair};

const PATH: &str = "/repair";

/// One run in so many is also judged by the peer.
const PEER_EVERY: u64 = 200;

/// Damages that a repair has to mend, by name.
fn damages(specimen: &Specimen) -> Vec<(&'static str, Vec<u8>)> {
    let bytes = &specimen.bytes;
    let long = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let table = long(48) as usize;
    let block = long(table) as usize;
    let cluster = specimen.cluster() as usize;
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = bytes.clone();
        change(&mut bytes);
        bytes
    };
    vec![
        ("all is counted too often", with(&|bytes| bytes[block..block + cluster].fill(0x33))),
        ("nothing is counted", with(&|bytes| bytes[block..block + cluster].fill(0))),
        ("no refcount block", with(&|bytes| bytes[table..table + 8].fill(0))),
        ("a block behind the end", with(&|bytes| bytes[table + 1] = 0x7f)),
    ]
}

async fn expect_data(core: &Core, storage: Storage, specimen: &Specimen, told: &str) {
    let disk = open(core, storage, true).await.expect(told);
    for table in 0..2 {
        let start = table * specimen.span();
        let len = 6 * specimen.cluster();
        let bytes = disk.read(start, len).await.expect(told);
        let expected: Vec<u8> = (start..start + len).map(|at| specimen.expected(at)).collect();
        assert!(bytes == expected, "{told}: data at {start:#x}");
    }
    disk.format.close().await.expect(told);
}

/// What a failed repair left is repaired whole, and holds its data.
fn judge(left: SimFs, specimen: &Specimen, told: &str, ask_peer: bool) {
    let mut sim = Sim::with_fs(SimConfig::new(1).calm(), left);
    let (copy, told) = (specimen.clone(), told.to_owned());
    sim.block_on(0, |core| async move {
        let storage = file(&core, PATH, false).await;
        repair(&core, &storage, Repair::All).await.expect(&told);
        let report = check(&core, &storage).await.expect(&told);
        assert!(report.is_clean(), "{told}: {:?}", report.problems);
        expect_data(&core, storage, &copy, &told).await;
    });
    if ask_peer {
        peer::check_exported(&sim.fs(), PATH);
    }
}

/// Rows R2, R3, R10.
#[test]
fn a_repair_that_fails_anywhere_loses_nothing_and_the_next_one_ends_it() {
    let mut runs = 0;
    for (number, (shape_name, shape)) in SHAPES.into_iter().enumerate() {
        let specimen = Specimen::new(shape);
        for (name, bytes) in damages(&specimen) {
            // The first shape meets every fault, the others one each.
            let faults = FAULTS.into_iter().enumerate();
            let chosen = faults.filter(|(at, _)| number == 0 || number % FAULTS.len() == *at);
            for (_, fault) in chosen {
                for nth in 0.. {
                    let told = format!("{shape_name}, {name}, {fault:?} at {nth}");
                    let (hit, sim) = run(&bytes, fault, nth, &told);
                    for left in [sim.fs().after_power_cut(nth), sim.fs().after_kill()] {
                        runs += 1;
                        judge(left, &specimen, &told, runs % PEER_EVERY == 0);
                    }
                    if !hit {
                        break;
                    }
                }
            }
        }
    }
    println!("repairs that fail: {runs} states");
    assert!(runs > 500);
}

/// One repair; whether anything failed.
fn run(bytes: &[u8], fault: Fault, nth: u64, told: &str) -> (bool, Sim) {
    let mut sim = Sim::new(SimConfig::new(nth).calm());
    sim.fs().create(PATH, bytes);
    let storage = sim.block_on(0, |core| async move { file(&core, PATH, false).await });
    sim.inject(fault.rule(PATH, nth));
    let result = sim.block_on(0, |core| async move { repair(&core, &storage, Repair::All).await });
    let hit = sim.faults() > 0;
    sim.clear_faults();
    match result {
        Ok(report) => assert!(report.is_clean(), "{told}: {:?}", report.problems),
        Err(error) => assert!(fault.explains(error.kind()), "{told}: {error}"),
    }
    (hit, sim)
}
