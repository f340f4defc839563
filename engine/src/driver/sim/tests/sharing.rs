//! Blocks that files share: what is refused as the kernel refuses it, what is independent
//! afterwards, what a cut leaves.

use std::rc::Rc;

use super::open;
use crate::driver::sim::*;
use crate::error::ErrorKind;
use crate::executor::Core;
use crate::storage::{File, FileOptions, Sharing};

/// A world with `/s` of five blocks, the fourth a hole and half of the last there, and `/t`.
fn world(config: FsConfig) -> Sim {
    let fs = SimFs::new(config);
    let mut bytes = vec![7; 4 * 4096 + 2048];
    bytes[3 * 4096..4 * 4096].fill(0);
    fs.create("/s", &bytes);
    fs.create("/t", &[9; 2 * 4096]);
    Sim::with_fs(SimConfig::new(1), fs)
}

async fn files(core: &Core) -> (Rc<File>, Rc<File>) {
    let write = FileOptions { writable: true, ..FileOptions::default() };
    (open(core, "/s", write.clone()).await, open(core, "/t", write).await)
}

fn sharing() -> FsConfig {
    FsConfig { shares: true, ..FsConfig::default() }
}

#[test]
fn a_shared_block_is_each_files_own_and_durable_with_a_flush() {
    let mut sim = world(sharing());
    sim.block_on(0, |core| async move {
        let (s, t) = files(&core).await;
        t.share(4096, &s, 2 * 4096, 2 * 4096).await.expect("shared");
        assert_eq!(t.size(), 3 * 4096);
        t.flush().await.expect("durable");
        let buf = core.pool().alloc(4096);
        buf.fill(8);
        s.write(2 * 4096, buf, false).await.expect("written");
    });
    let mut expected = vec![9; 4096];
    expected.extend(vec![7; 4096]);
    expected.extend(vec![0; 4096]);
    for seed in 0..50 {
        let left = sim.fs().after_power_cut(seed).read("/t").expect("a file");
        assert!(left == expected, "seed {seed}");
    }
}

#[test]
fn what_is_not_flushed_may_be_lost() {
    let mut sim = world(sharing());
    sim.block_on(0, |core| async move {
        let (s, t) = files(&core).await;
        t.share(0, &s, 0, 4096).await.expect("shared");
    });
    let left = |seed| sim.fs().after_power_cut(seed).read("/t").expect("a file")[0];
    assert!((0..50).any(|seed| left(seed) == 9) && (0..50).any(|seed| left(seed) == 7));
}

#[test]
fn parts_of_blocks_what_lies_beyond_the_end_and_full_disks_are_refused() {
    let room = FsConfig { capacity: Some(7 * 4096), ..sharing() };
    world(room).block_on(0, |core| async move {
        let (s, t) = files(&core).await;
        for (at, from, len) in [(512, 0, 4096), (0, 512, 4096), (0, 0, 512), (0, 4 * 4096, 4096)] {
            let error = t.share(at, &s, from, len).await.expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::Io(libc::EINVAL), "{at} {from} {len}");
        }
        let error = t.share(2 * 4096, &s, 0, 2 * 4096).await.expect_err("no room");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(t.size(), 2 * 4096);
        t.share(0, &s, 0, 4096).await.expect("where there was a block there is room");
    });
}

#[test]
fn who_was_refused_is_not_asked_again_and_who_shared_once_is() {
    world(sharing()).block_on(0, |core| async move {
        let (s, t) = files(&core).await;
        let known = Sharing::default();
        assert_eq!(known.unit(&s, &s), None, "a file and itself");
        assert_eq!(known.unit(&s, &t), Some(4096));
        // No space says nothing about the files.
        let full = Err(crate::Error::new(ErrorKind::NoSpace, "share blocks"));
        known.note(&s, &t, &full);
        assert!(known.unit(&s, &t).is_some() && !known.is_hopeless());
        let refused = t.share(512, &s, 0, 4096).await;
        known.note(&s, &t, &Ok(()));
        known.note(&s, &t, &refused);
        assert_eq!(known.unit(&s, &t), Some(4096));
        let fresh = Sharing::default();
        fresh.note(&s, &t, &refused);
        assert!(fresh.unit(&s, &t).is_none() && fresh.is_hopeless());
        assert_eq!(fresh.unit(&t, &s), Some(4096), "the other way round");
    });
    world(FsConfig::default()).block_on(0, |core| async move {
        let (s, t) = files(&core).await;
        assert_eq!(Sharing::default().unit(&s, &t), None);
        let error = t.share(0, &s, 0, 4096).await.expect_err("refused");
        assert_eq!(error.kind().errno(), libc::EOPNOTSUPP);
    });
}
