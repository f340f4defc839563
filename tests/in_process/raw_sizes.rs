//! The size of a raw disk across a power cut.

use liveblk::engine::driver::sim::{Sim, SimConfig};
use liveblk::engine::format::Preallocation;

use super::simulated::host;

#[test]
fn a_new_size_of_a_raw_disk_is_durable_when_it_is_answered() {
    for seed in 0..20 {
        let mut sim = Sim::new(SimConfig::new(seed).calm());
        sim.fs().create("/disk", &[1; 8192]);
        let size = if seed % 2 == 0 { 4096 } else { 1 << 20 };
        sim.block_on(0, |core| async move {
            let host = host(&core);
            let node = host.open(host.image("/disk", "raw")).await.expect("the disk opens");
            node.resize(size, Preallocation::Off).await.expect("the disk is resized");
        });
        assert_eq!(sim.fs().after_power_cut(seed).size("/disk"), Some(size), "seed {seed}");
    }
}
