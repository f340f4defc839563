//! Copy-on-write by subclusters: what a first write to an overlay moves.

use liveblk::engine::driver::sim::{Sim, SimConfig};
use liveblk::formats::qcow2::CreateOptions;

const SIZE: u64 = 64 << 20;

fn overlay(extended: bool) -> CreateOptions {
    CreateOptions { cluster_size: 128 << 10, extended_l2: extended, ..CreateOptions::new(SIZE) }
}

#[test]
fn a_first_4k_write_to_an_overlay_with_subclusters_moves_no_backing_data() {
    Sim::new(SimConfig::new(1).calm()).block_on(0, |core| async move {
        let base = crate::layers::make(&core, CreateOptions::new(SIZE)).await;
        let top = crate::layers::make(&core, overlay(true)).await;
        let host = crate::layers::host(&core);
        let node = crate::layers::open(&host, std::slice::from_ref(&base)).await;
        let disk = host.attach(&node).expect("the image is free");
        for at in (0..SIZE).step_by(1 << 20) {
            crate::layers::write(&disk, at, &vec![7; 1 << 20]).await;
        }
        drop((disk, node));
        host.close().await.expect("the base closes");
        let host = crate::layers::host(&core);
        let node = crate::layers::open(&host, &[base.clone(), top.clone()]).await;
        let disk = host.attach(&node).expect("the chain is free");
        // The first write of all makes the table, and reads load the tables below.
        crate::layers::write(&disk, 0, &[1; 4096]).await;
        crate::layers::read(&disk, 32 << 20, 512).await;
        for cluster in 1..64_u64 {
            let at = cluster * (128 << 10) + (cluster % 32) * 4096;
            let (below, own) = (base.traffic(), top.traffic());
            crate::layers::write(&disk, at, &[2; 4096]).await;
            assert_eq!(base.traffic(), below, "cluster {cluster}: nothing from below");
            let written = top.traffic().written - own.written;
            assert_eq!(written, 4096, "cluster {cluster}: the data alone");
            assert_eq!(top.traffic().read, own.read);
        }
        // A part of a subcluster takes the rest of it from below, and no more.
        let (below, own) = (base.traffic(), top.traffic());
        crate::layers::write(&disk, (32 << 20) + 512, &[3; 1024]).await;
        assert_eq!(base.traffic().read - below.read, 4096 - 1024);
        assert_eq!(top.traffic().written - own.written, 4096);
        let around = crate::layers::read(&disk, 32 << 20, 4096).await;
        assert!(around[..512] == [7; 512] && around[512..1536] == [3; 1024]);
        assert!(around[1536..] == [7; 2560]);
        // The next part of the same subcluster, and whole ones around it, take nothing any more.
        let below = base.traffic();
        crate::layers::write(&disk, (32 << 20) + 3072, &[4; 1024 + 8192]).await;
        assert_eq!(base.traffic(), below);
    });
}

#[test]
fn without_subclusters_the_same_write_copies_the_cluster() {
    Sim::new(SimConfig::new(1).calm()).block_on(0, |core| async move {
        let base = crate::layers::make(&core, CreateOptions::new(SIZE)).await;
        let top = crate::layers::make(&core, overlay(false)).await;
        let host = crate::layers::host(&core);
        let node = crate::layers::open(&host, &[base, top.clone()]).await;
        let disk = host.attach(&node).expect("the chain is free");
        crate::layers::write(&disk, 0, &[1; 4096]).await;
        let own = top.traffic();
        crate::layers::write(&disk, 1 << 20, &[2; 4096]).await;
        assert_eq!(top.traffic().written - own.written, 128 << 10, "the counter counts");
    });
}
