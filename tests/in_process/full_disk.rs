//! A file system that becomes full in the middle of an allocation: the write fails with ENOSPC,
//! nothing half-made is visible, and all goes on when there is space again.

use crate::simulated::{CLUSTER, LEN, expect, host, inspect, make, open, write};
use liveblk::ErrorKind;
use liveblk::engine::driver::sim::{Sim, SimConfig};

/// Clusters of the disk; two L2 tables and more than one refcount slice.
const CLUSTERS: u64 = 1024;

/// Writes here and there until a write finds no space; returns the clusters that were written.
fn fill(sim: &mut Sim, disk: &liveblk::Disk) -> Vec<u64> {
    let disk = disk.clone();
    sim.block_on(0, |_| async move {
        let mut written = Vec::new();
        for step in 0..200_u64 {
            let cluster = step * 517 % CLUSTERS;
            match write(&disk, cluster * CLUSTER, LEN, 7).await {
                Ok(()) => written.push(cluster),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                    return written;
                }
            }
            if step % 5 == 4
                && let Err(error) = disk.flush().await
            {
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
                return written;
            }
        }
        panic!("the disk does not become full");
    })
}

#[test]
fn a_full_file_system_costs_the_write_and_nothing_else() {
    for spare in 0..40 {
        let mut sim = Sim::new(SimConfig::new(spare));
        let disk = sim.block_on(0, |core| async move {
            make(&core, "/a", CLUSTERS).await;
            open(&host(&core), "/a").await
        });
        sim.fs().set_capacity(Some(sim.fs().used() + spare * 4096));
        let written = fill(&mut sim, &disk);
        let (bytes, _) = inspect(unlimited(&sim, spare), "/a");
        assert!(bytes.iter().all(|byte| *byte == 0 || *byte == 7));
        // Reads of what was written go on, also without space.
        let (looker, known) = (disk.clone(), written.clone());
        sim.block_on(0, |_| async move {
            for cluster in known {
                expect(&looker, cluster * CLUSTER, LEN, 7).await;
            }
        });
        sim.fs().set_capacity(None);
        let guest = disk.clone();
        sim.block_on(0, |_| async move {
            for cluster in 0..200 {
                write(&guest, cluster * CLUSTER, LEN, 8).await.expect("there is space again");
            }
            guest.flush().await.expect("there is space again");
        });
        let (bytes, leaks) = inspect(unlimited(&sim, spare), "/a");
        for (cluster, bytes) in (0..).zip(bytes.chunks(LEN)) {
            let wanted = match cluster {
                0..200 => 8,
                _ if written.contains(&cluster) => 7,
                // The write that failed may have landed or not.
                _ => bytes[0],
            };
            assert!(bytes.iter().all(|byte| *byte == wanted), "spare {spare} cluster {cluster}");
        }
        assert_eq!(leaks, 0, "spare {spare}: nothing was left behind");
    }
}

fn unlimited(sim: &Sim, seed: u64) -> liveblk::engine::driver::sim::SimFs {
    let fs = sim.fs().after_power_cut(seed);
    fs.set_capacity(None);
    fs
}
