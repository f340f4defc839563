//! Reads through deep chains: right whatever the layers hold, and as fast as through one layer.

use std::rc::Rc;

use liveblk::engine::driver::sim::{Rng, Sim, SimConfig};
use liveblk::engine::executor::Core;
use liveblk::engine::limits::CHAIN_INDEX_BYTES;
use liveblk::engine::node::Origin;
use liveblk::engine::storage::Memory;
use liveblk::formats::qcow2::CreateOptions;
use liveblk::{Disk, Host, Node, WriteFlags, ZeroFlags};

const SECTOR: u64 = 512;

/// What layers are like: cluster size in bytes, and subclusters or not.
type Shape = (u64, bool);

const MIXED: &[Shape] = &[(64 << 10, false), (128 << 10, true), (4096, false), (16 << 10, true)];

/// A chain and what its disk holds.
struct Chain {
    images: Vec<Rc<Memory>>,
    content: Vec<u8>,
}

impl Chain {
    async fn make(core: &Core, rng: &mut Rng, depth: usize, shapes: &[Shape], even: bool) -> Self {
        let mut chain = Self { images: Vec::new(), content: Vec::new() };
        for layer in 0..depth {
            let (cluster_size, extended_l2) = shapes[(rng.bits() % shapes.len() as u64) as usize];
            let size = if even { 16 << 20 } else { SECTOR * (16_000 + rng.bits() % 16_000) };
            let options = CreateOptions { cluster_size, extended_l2, ..CreateOptions::new(size) };
            chain.images.push(crate::layers::make(core, options).await);
            chain.content.resize(size as usize, 0);
            let host = crate::layers::host(core);
            let disk = chain.disk(&host).await;
            for _ in 0..12 {
                chain.change(rng, &disk, layer as u8 + 1).await;
            }
            drop(disk);
            host.close().await.expect("the chain closes");
        }
        chain
    }

    async fn disk(&self, host: &Host) -> Disk {
        let node = crate::layers::open(host, &self.images).await;
        host.attach(&node).expect("the chain is free")
    }

    /// Writes or zeroes a random piece of the disk.
    async fn change(&mut self, rng: &mut Rng, disk: &Disk, byte: u8) {
        let sectors = self.content.len() as u64 / SECTOR;
        let first = rng.bits() % sectors;
        let count = [1, 8, 8, 100, 300][(rng.bits() % 5) as usize].min(sectors - first);
        let (at, len) = ((first * SECTOR) as usize, (count * SECTOR) as usize);
        if rng.bits().is_multiple_of(5) {
            let unmap = rng.bits().is_multiple_of(2);
            let flags = ZeroFlags { may_unmap: unmap, ..Default::default() };
            disk.write_zeroes(at as u64, len as u64, flags).await.expect("zeroes");
            self.content[at..at + len].fill(0);
        } else {
            crate::layers::write(disk, at as u64, &vec![byte; len]).await;
            self.content[at..at + len].fill(byte);
        }
    }

    async fn compare(&self, disk: &Disk, step: usize) {
        for at in (0..self.content.len()).step_by(step) {
            let len = step.min(self.content.len() - at);
            let found = crate::layers::read(disk, at as u64, len).await;
            let wrong = found.iter().zip(&self.content[at..]).position(|(a, b)| a != b);
            assert_eq!(wrong, None, "at {at}");
        }
    }
}

fn top(host: &Host) -> Rc<Node> {
    host.graph().find("depth0").expect("the top is open")
}

/// Lower layers asked per run of bytes that the top does not have.
async fn probes_per_hit(chain: &Chain, host: &Host, disk: &Disk) -> f64 {
    let before = top(host).chain_stats();
    chain.compare(disk, 4096).await;
    let after = top(host).chain_stats();
    let lookups = after.lookups - before.lookups;
    assert!(lookups > 1000, "most of the disk is not in the top: {lookups}");
    assert_eq!(after.scans, before.scans, "everything is known");
    assert!(after.placed > before.placed, "most places are known");
    assert!(after.bytes <= (chain.images.len() * CHAIN_INDEX_BYTES) as u64);
    (after.probes - before.probes) as f64 / lookups as f64
}

fn one_layer_is_asked(depth: usize, shapes: &'static [Shape], even: bool) {
    Sim::new(SimConfig::new(depth as u64).calm()).block_on(0, |core| async move {
        let mut rng = Rng::new(depth as u64);
        let mut chain = Chain::make(&core, &mut rng, depth, shapes, even).await;
        let host = crate::layers::host(&core);
        let disk = chain.disk(&host).await;
        chain.compare(&disk, 65536).await;
        let mut rounds = 0;
        loop {
            let before = top(&host).chain_stats().scans;
            chain.compare(&disk, 4096).await;
            rounds += 1;
            if top(&host).chain_stats().scans == before {
                break;
            }
            assert!(rounds < depth, "it gets warm");
        }
        let ratio = probes_per_hit(&chain, &host, &disk).await;
        let bytes = top(&host).chain_stats().bytes;
        println!("depth {depth}: {ratio:.4} probes per hit, {bytes} bytes, warm after {rounds}");
        assert!(ratio <= 1.0, "{ratio}");
        for step in 0..40 {
            chain.change(&mut rng, &disk, 200 + step).await;
        }
        chain.compare(&disk, 4096).await;
        chain.compare(&disk, 1 << 20).await;
    });
}

#[test]
fn at_depth_32_at_most_one_lower_layer_is_asked_per_hit() {
    one_layer_is_asked(32, &[(64 << 10, false)], true);
    one_layer_is_asked(32, &[(128 << 10, true), (64 << 10, false)], true);
}

#[test]
fn at_depth_100_at_most_one_lower_layer_is_asked_per_hit() {
    one_layer_is_asked(100, &[(64 << 10, false)], true);
}

#[test]
fn layers_of_all_sizes_and_cluster_sizes_read_right_cold_and_warm() {
    for seed in 0..6 {
        Sim::new(SimConfig::new(seed).calm()).block_on(0, move |core| async move {
            let mut rng = Rng::new(seed);
            let depth = 3 + (rng.bits() % 12) as usize;
            let mut chain = Chain::make(&core, &mut rng, depth, MIXED, false).await;
            let host = crate::layers::host(&core);
            let disk = chain.disk(&host).await;
            for round in 0..3 {
                let step = [65536, 4096, 512 * 7][round as usize];
                chain.compare(&disk, step).await;
                for _ in 0..20 {
                    chain.change(&mut rng, &disk, 100 + round).await;
                }
            }
            chain.compare(&disk, 3 << 20).await;
        });
    }
}

#[test]
fn a_lower_layer_that_is_written_is_asked_again() {
    Sim::new(SimConfig::new(5).calm()).block_on(0, |core| async move {
        let mut rng = Rng::new(5);
        let mut chain = Chain::make(&core, &mut rng, 6, &[(64 << 10, false)], true).await;
        let host = crate::layers::host(&core);
        let disk = chain.disk(&host).await;
        for _ in 0..6 {
            chain.compare(&disk, 4096).await;
        }
        for lower in [3_usize, 1, 5] {
            let node = (0..lower).fold(top(&host), |node, _| node.backing().expect("a layer"));
            node.set_writable(true).await.expect("is reopened");
            let below = top(&host).chain_stats();
            assert_eq!(below.bytes, 0, "nothing is relied on");
            let mut written = 0;
            for at in (lower as u64 * 131_072..16 << 20).step_by(1 << 20) {
                // Where nothing above has anything, the new bytes are what is read.
                let status = top(&host).block_status(at, 65536).await.expect("a status");
                if status.len() != 1 || (status[0].depth as usize) <= lower {
                    continue;
                }
                let buf = core.pool().alloc(65536);
                buf.fill(77 + lower as u8);
                let write = node.write(at, buf, WriteFlags::default(), Origin::External);
                write.await.expect("a write");
                written += 1;
                chain.content[at as usize..at as usize + 65536].fill(77 + lower as u8);
            }
            assert!(written > 0, "some of it is seen from above");
            chain.compare(&disk, 4096).await;
            node.set_writable(false).await.expect("is reopened");
            chain.compare(&disk, 4096).await;
            chain.compare(&disk, 4096).await;
        }
    });
}
