//! Header changes: every cut of every plan leaves the old or the new header, and nothing is lost.

use liveblk_engine::driver::sim::{Rng, Sim, SimConfig};

use super::mover::{calm, file};
use crate::qcow2::extensions::{BITMAPS, Extension};
use crate::qcow2::header::Header;
use crate::qcow2::header_plan::{area, changed_sectors, plan};
use crate::qcow2::layout::SECTOR;
use crate::qcow2::{CreateOptions, create};
use crate::reason::Reason;

/// A file size that no table of these headers goes beyond.
const FILE: u64 = 1 << 30;

/// The first cluster of a new image.
fn first_cluster(options: CreateOptions) -> Vec<u8> {
    let cluster = options.cluster_size as usize;
    calm(|core| async move {
        let storage = file(&core, "/image", true).await;
        create(&core, &storage, options).await.expect("is created");
        let buf = core.pool().alloc(cluster);
        storage.read(0, buf.clone()).await.unwrap();
        let mut bytes = buf.to_vec();
        // No change of these headers concerns more.
        bytes.truncate(8192);
        bytes
    })
}

fn parse(bytes: &[u8]) -> Header {
    Header::parse(bytes, FILE).expect("is a header")
}

/// What people and programs get from a header, without where things lie.
fn meaning(header: &Header) -> Header {
    let mut header = header.clone();
    header.backing_offset = 0;
    header.extensions.stored = 0;
    header.extensions.drop_feature_names();
    header.extensions.list.sort_by_key(|extension| extension.kind);
    header
}

fn referring(header: &Header, len: usize, format: Option<&str>) -> Header {
    let mut header = header.clone();
    header.backing = (len > 0).then(|| "n".repeat(len));
    header.extensions.set_backing_format(format.filter(|_| len > 0));
    header
}

/// Applies a plan to the first cluster; at each step, each changed sector alone, all but the
/// deciding one, and random sets of them leave the old or the new meaning.
fn apply(bytes: &mut [u8], new: &Header, rng: &mut Rng) -> Result<(), Reason> {
    let old = parse(bytes);
    let area = area(&old, new);
    let known = [meaning(&old), meaning(new)];
    for step in plan(&old, &bytes[..area], new)? {
        let sectors = changed_sectors(&bytes[..area], &step.bytes);
        let (first, rest) = sectors.split_first().map_or((0, &[][..]), |(f, rest)| (*f, rest));
        let mut sets: Vec<Vec<usize>> = rest.iter().map(|sector| vec![*sector]).collect();
        sets.push(rest.to_vec());
        sets.push(rest.iter().copied().filter(|_| rng.chance(500)).collect());
        for set in sets {
            let mut cut = bytes.to_vec();
            for sector in set {
                let at = sector * SECTOR..(sector + 1) * SECTOR;
                cut[at.clone()].copy_from_slice(&step.bytes[at]);
            }
            let found = meaning(&parse(&cut));
            assert!(known.contains(&found), "first {first}: {found:?}");
        }
        bytes[..area].copy_from_slice(&step.bytes);
        assert!(known.contains(&meaning(&parse(bytes))));
    }
    assert_eq!(meaning(&parse(bytes)), meaning(new));
    Ok(())
}

fn with_bitmaps(header: &Header) -> Header {
    let mut header = header.clone();
    header.autoclear |= 1;
    header.extensions.list.push(Extension { kind: BITMAPS, data: vec![7; 24] });
    header
}

#[test]
fn names_of_every_length_replace_each_other_at_every_cluster_size_and_cut() {
    let mut rng = Rng::new(1);
    let some = [0, 1, 8, 100, 300, 375, 376, 377, 500, 700, 900, 1023];
    for bits in 9..=16_usize {
        for bitmaps in [false, true] {
            let options = CreateOptions { cluster_size: 1 << bits, ..CreateOptions::new(1 << 20) };
            let base = first_cluster(options);
            let header = parse(&base);
            let header = if bitmaps { with_bitmaps(&header) } else { header };
            let (mut tried, mut refused) = (0, 0);
            for len in (bits..=1023).step_by(9) {
                let other = some[len % some.len()];
                for (from, to) in [(len, other), (other, len)] {
                    let mut bytes = base.clone();
                    let old = referring(&header, from, Some("raw"));
                    if apply(&mut bytes, &old, &mut rng).is_err() {
                        continue;
                    }
                    tried += 1;
                    let format = (to % 2 == 0).then_some("qcow2");
                    let new = referring(&parse(&bytes), to, format);
                    match apply(&mut bytes, &new, &mut rng) {
                        Ok(()) => {}
                        Err(Reason::HeaderFull) => {
                            let fixed = if bitmaps { 112 + 32 + 8 } else { 112 + 8 };
                            assert!(fixed + 16 + to > 1 << bits, "{from} -> {to} at 2^{bits}");
                        }
                        Err(Reason::HeaderUnsafe) => {
                            assert!((10..=11).contains(&bits) && from.min(to) > 300);
                            refused += 1;
                        }
                        Err(other) => panic!("{other}"),
                    }
                }
            }
            assert!(refused * 3 < tried, "2^{bits}: {refused} of {tried} refused");
        }
    }
}

/// Row R10: no rewrite drops a field or an extension.
#[test]
fn header_changes_keep_every_field_and_extension_byte_for_byte() {
    let mut rng = Rng::new(2);
    let plain = first_cluster(CreateOptions::new(1 << 20));
    for round in 0..150 {
        let mut bytes = first_cluster_with_everything(&plain, &mut rng);
        for _ in 0..6 {
            let mut new = parse(&bytes);
            let before = meaning(&new);
            match rng.below(4) {
                0 => {
                    let format = ["raw", "qcow2", "a-format"][rng.index(3)];
                    let len = rng.below(400) as usize;
                    new = referring(&new, len, Some(format).filter(|_| rng.chance(700)));
                }
                1 if !new.bitmaps_valid() => {
                    new.extensions.list.retain(|extension| extension.kind != BITMAPS);
                    new = with_bitmaps(&new);
                }
                2 => {
                    new.extensions.list.retain(|extension| extension.kind != BITMAPS);
                    new.autoclear &= !1;
                }
                _ => new.size += 512,
            }
            let wanted = meaning(&new);
            if apply(&mut bytes, &new, &mut rng).is_err() {
                continue;
            }
            let after = parse(&bytes);
            assert_eq!(after.further, before.further, "round {round}");
            assert_eq!(meaning(&after), wanted, "round {round}");
            for kind in [0x0537_be77, 0x1234_5678, 0x4441_5441] {
                assert_eq!(after.extensions.find(kind), before.extensions.find(kind));
            }
        }
    }
}

/// A first cluster with unknown fields, unknown extensions and those with a meaning.
fn first_cluster_with_everything(plain: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = plain.to_vec();
    let mut header = parse(&bytes);
    let extra = rng.index(12) * 8;
    header.header_length = 112 + extra as u32;
    header.further = (0..8 + extra).map(|at| if at == 0 { 0 } else { at as u8 }).collect();
    let kinds = [0x0537_be77_u32, 0x1234_5678, 0x4441_5441];
    for kind in kinds {
        if rng.chance(600) {
            let data = (0..rng.below(60)).map(|at| at as u8 ^ kind as u8).collect();
            let at = rng.index(header.extensions.list.len() + 1);
            header.extensions.list.insert(at, Extension { kind, data });
        }
    }
    let content = header.bytes();
    bytes[..content.len()].copy_from_slice(&content);
    bytes
}

#[test]
fn a_name_that_does_not_fit_is_refused_and_nothing_changes() {
    let options = CreateOptions { cluster_size: 512, ..CreateOptions::new(1 << 20) };
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.block_on(0, |core| async move {
        let storage = file(&core, "/image", true).await;
        create(&core, &storage, options).await.expect("is created");
        let disk = super::mover::open(&core, storage, true).await.expect("opens");
        for (len, errno) in [(377, 28), (1023, 28), (1024, 22)] {
            let reference = liveblk_engine::format::BackingRef {
                file: "n".repeat(len),
                format: Some("raw".into()),
            };
            let error = disk.format.set_backing(Some(reference)).await.expect_err("does not fit");
            assert_eq!(error.errno(), errno, "{len}: {error}");
            assert_eq!(disk.format.info().backing, None);
        }
        disk.write(0, &[1; 512]).await.expect("the image goes on");
    });
}
