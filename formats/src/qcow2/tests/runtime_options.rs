//! Options of opening an image, each by what it changes.

use std::future::Future;

use liveblk_engine::address::GuestRange;
use liveblk_engine::driver::sim::{FaultRule, OpFilter, Sim, SimConfig, SimOpKind};
use liveblk_engine::executor::Core;
use liveblk_engine::format::{Extents, InfoValue, Mapping, ZeroMode};
use liveblk_engine::{ErrorKind, Result};

use super::mover::{Disk, file, open_with};
use super::snapshots::{snapshots, take};
use crate::qcow2::{CreateOptions, check, create};

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 65_536;
const EOPNOTSUPP: i32 = 95;

type Given = Vec<(&'static str, InfoValue)>;

fn flags(given: &[(&'static str, bool)]) -> Given {
    given.iter().map(|(name, on)| (*name, InfoValue::Flag(*on))).collect()
}

fn world<F: Future + 'static>(make: impl FnOnce(Core) -> F) -> (Sim, F::Output)
where
    F::Output: 'static,
{
    let mut sim = Sim::new(SimConfig::new(1).calm());
    let output = sim.block_on(0, make);
    (sim, output)
}

async fn image(core: &Core, options: CreateOptions, given: &Given) -> Result<Disk> {
    let storage = file(core, "/image", true).await;
    create(core, &storage, options).await.expect("is created");
    open_with(core, storage, true, given).await
}

async fn plain(core: &Core, given: &Given) -> Disk {
    image(core, CreateOptions::new(16 * MIB), given).await.expect("opens")
}

/// The mappings of the first clusters, one letter each.
async fn letters(disk: &Disk, count: u64) -> String {
    disk.read(0, count * CLUSTER).await.expect("loads the tables");
    let letter = |at: u64| {
        let mut extents = Extents::new();
        let lease = disk.format.resolve(GuestRange::new(at * CLUSTER, CLUSTER), &mut extents);
        drop(lease);
        match extents.first().map(|extent| &extent.mapping) {
            Some(Mapping::Data(_)) => 'd',
            Some(Mapping::ZeroAllocated(_)) => 'a',
            Some(Mapping::Zero) => 'z',
            Some(Mapping::Absent) => '-',
            _ => '?',
        }
    };
    (0..count).map(letter).collect()
}

/// Whether the space of what `script` frees goes back to the storage.
fn gives_back<F: Future<Output = ()> + 'static>(
    given: Given,
    script: impl FnOnce(Disk) -> F + 'static,
) -> bool {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    let punches = OpFilter::any().kind(SimOpKind::PunchHole);
    sim.inject(FaultRule::always(punches, EOPNOTSUPP));
    sim.block_on(0, |core| async move {
        let disk = plain(&core, &given).await;
        script(disk.clone()).await;
        disk.format.close().await.expect("closes");
        let report = check(&core, disk.format.data_storage()).await.expect("is checked");
        assert!(report.is_clean(), "{:?}", report.problems);
    });
    sim.faults() > 0
}

#[test]
fn what_guests_discard_goes_back_if_requests_are_passed() {
    for (given, expected) in [
        (flags(&[]), true),
        (flags(&[("pass-discard-request", false)]), false),
        (flags(&[("pass-discard-request", false), ("pass-discard-other", true)]), false),
    ] {
        for mode in [ZeroMode::Discard, ZeroMode::Unmap] {
            let found = gives_back(given.clone(), move |disk| async move {
                disk.write(0, &[1; 1 << 20]).await.unwrap();
                disk.zero(0, MIB, mode).await.unwrap();
                disk.format.flush().await.unwrap();
            });
            assert_eq!(found, expected, "{given:?} {mode:?}");
        }
    }
}

#[test]
fn what_a_deleted_snapshot_kept_goes_back_unless_told_otherwise() {
    for (given, expected) in
        [(flags(&[]), true), (flags(&[("pass-discard-snapshot", false)]), false)]
    {
        let found = gives_back(given.clone(), |disk| async move {
            disk.write(0, &[1; 1 << 20]).await.unwrap();
            take(&disk, "one").await.expect("is taken");
            disk.write(0, &[2; 1 << 20]).await.unwrap();
            snapshots(&disk).delete("one").await.expect("is deleted");
        });
        assert_eq!(found, expected, "{given:?}");
    }
}

#[test]
fn old_places_of_tables_go_back_only_if_others_are_passed() {
    for (given, expected) in [(flags(&[]), false), (flags(&[("pass-discard-other", true)]), true)] {
        let found = gives_back(given.clone(), |disk| async move {
            disk.write(0, &[1; 1 << 16]).await.unwrap();
            // The L1 table moves.
            disk.format.resize(1 << 43).await.expect("grows");
            disk.format.flush().await.unwrap();
        });
        assert_eq!(found, expected, "{given:?}");
    }
}

#[test]
fn what_was_rewritten_elsewhere_keeps_its_space_for_the_next_write() {
    let given = flags(&[("pass-discard-other", true)]);
    let found = gives_back(given, |disk| async move {
        disk.write_compressed(0, &[1; 1 << 20]).await.unwrap();
        disk.write(0, &[2; 1 << 20]).await.unwrap();
        disk.format.flush().await.unwrap();
    });
    assert!(!found);
}

#[test]
fn discarded_clusters_stay_where_they_are_without_unref() {
    for (pass, mode) in [
        (true, ZeroMode::Discard),
        (true, ZeroMode::Unmap),
        (false, ZeroMode::Discard),
        (false, ZeroMode::Unmap),
    ] {
        let (sim, full) = world(move |core| async move {
            let given = flags(&[("discard-no-unref", true), ("pass-discard-request", pass)]);
            let disk = plain(&core, &given).await;
            disk.write(0, &[1; 8 << 16]).await.unwrap();
            disk.format.flush().await.unwrap();
            let size = disk.format.data_storage().size();
            disk.zero(CLUSTER, 6 * CLUSTER, mode).await.unwrap();
            assert_eq!(letters(&disk, 9).await, "daaaaaad-");
            assert_eq!(disk.read(CLUSTER, 6 * CLUSTER).await.unwrap(), [0; 6 << 16]);
            disk.zero(CLUSTER, 6 * CLUSTER, mode).await.expect("nothing is left to do");
            disk.format.flush().await.unwrap();
            // The same places are written again: the file does not grow.
            disk.write(2 * CLUSTER, &[3; 2 << 16]).await.unwrap();
            assert_eq!(letters(&disk, 9).await, "daddaaad-");
            assert_eq!(disk.read(2 * CLUSTER, 2 * CLUSTER).await.unwrap(), [3; 2 << 16]);
            disk.format.close().await.unwrap();
            let report = check(&core, disk.format.data_storage()).await.unwrap();
            assert!(report.is_clean(), "{:?}", report.problems);
            assert!(disk.format.data_storage().size() <= size);
            8 * CLUSTER
        });
        // Of the eight clusters four hold data, and without passing all still have their space.
        let used = sim.fs().used();
        assert_eq!(used < full + CLUSTER, pass, "{mode:?}: {used} bytes are in use");
    }
}

#[test]
fn clusters_of_a_snapshot_are_given_up_also_without_unref() {
    world(|core| async move {
        let disk = plain(&core, &flags(&[("discard-no-unref", true)])).await;
        disk.write(0, &[1; 2 << 16]).await.unwrap();
        take(&disk, "one").await.expect("is taken");
        disk.zero(0, CLUSTER, ZeroMode::Discard).await.unwrap();
        assert_eq!(letters(&disk, 3).await, "zd-");
        disk.format.flush().await.unwrap();
        snapshots(&disk).apply("one").await.expect("is applied");
        assert_eq!(disk.read(0, 2 * CLUSTER).await.unwrap(), [1; 2 << 16]);
        disk.format.close().await.unwrap();
    });
}

#[test]
fn a_discard_that_fails_without_unref_leaves_the_cluster_as_it_was() {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.inject(FaultRule::always(OpFilter::any().kind(SimOpKind::PunchHole), 5));
    sim.block_on(0, |core| async move {
        let disk = plain(&core, &flags(&[("discard-no-unref", true)])).await;
        disk.write(0, &[1; 2 << 16]).await.unwrap();
        let outcome = disk.zero(0, CLUSTER, ZeroMode::Discard).await;
        let letter = letters(&disk, 2).await;
        // The storage may take a failed discard for a hint that was not taken.
        assert_eq!(letter, if outcome.is_ok() { "ad" } else { "dd" });
        disk.write(0, &[2; 512]).await.expect("the cluster is free again");
        disk.format.close().await.unwrap();
    });
}

/// Clusters of 2 MiB, so that one table has many pieces.
fn wide() -> CreateOptions {
    CreateOptions { cluster_size: 2 << 20, ..CreateOptions::new(1 << 40) }
}

#[test]
fn cached_pieces_of_tables_have_the_size_that_was_asked_for() {
    for (entry, misses) in [(4096, 64), (65_536, 4), (262_144, 1)] {
        let (_, loads) = world(move |core| async move {
            let given = vec![("l2-cache-entry-size", InfoValue::Number(entry))];
            let disk = image(&core, wide(), &given).await.expect("opens");
            disk.write(0, &[1; 512]).await.unwrap();
            disk.format.close().await.unwrap();
            let storage = disk.format.data_storage().clone();
            let disk = open_with(&core, storage, false, &given).await.expect("opens");
            // 512 entries fill 4 KiB.
            let ahead = (0..64).map(|index| index * (512 * (2 << 20)));
            let mut loads = 0;
            for at in ahead {
                loads += u64::from(is_missed(&disk, at).await);
            }
            loads
        });
        assert_eq!(loads, misses, "{entry}");
    }
}

/// Whether the entry of byte `at` is not cached; afterwards it is.
async fn is_missed(disk: &Disk, at: u64) -> bool {
    let mut extents = Extents::new();
    let lease = disk.format.resolve(GuestRange::new(at, 512), &mut extents);
    drop(lease);
    let Some(Mapping::Miss(miss)) = extents.first().map(|extent| extent.mapping.clone()) else {
        return false;
    };
    disk.format.load(miss).await.expect("loads");
    true
}

#[test]
fn a_small_cache_forgets_what_a_large_one_keeps() {
    for (bytes, kept) in [(64 << 10, false), (8 << 20, true)] {
        for name in ["l2-cache-size", "cache-size"] {
            world(move |core| async move {
                let disk = image(&core, wide(), &Given::new()).await.expect("opens");
                disk.write(0, &[1; 512]).await.unwrap();
                disk.format.close().await.unwrap();
                let storage = disk.format.data_storage().clone();
                let given = vec![(name, InfoValue::Number(bytes))];
                let disk = open_with(&core, storage, false, &given).await.expect("opens");
                for index in 0..64 {
                    assert!(is_missed(&disk, index << 30).await, "{index}");
                }
                assert_eq!(is_missed(&disk, 0).await, !kept, "{name} {bytes}");
            });
        }
    }
}

#[test]
fn cached_tables_that_nobody_uses_are_forgotten_after_the_interval() {
    const SECOND: u64 = 1_000_000_000;
    for (interval, after, gone) in [(10, 25, true), (10, 5, false), (0, 100_000, false)] {
        let (_, missed) = world(move |core| async move {
            let given = vec![("cache-clean-interval", InfoValue::Number(interval))];
            let disk = plain(&core, &given).await;
            disk.write(0, &[1; 512]).await.unwrap();
            disk.format.flush().await.unwrap();
            assert!(!is_missed(&disk, 0).await);
            core.sleep(after * SECOND).await;
            let missed = is_missed(&disk, 0).await;
            // In use at least once in each interval it stays.
            for _ in 0..10 {
                core.sleep(9 * SECOND).await;
                assert!(!is_missed(&disk, 0).await);
            }
            assert_eq!(disk.read(0, 512).await.unwrap(), [1; 512]);
            missed
        });
        assert_eq!(missed, gone, "{interval} s, after {after} s");
    }
}

#[test]
fn an_idle_world_with_cached_tables_comes_to_rest() {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    let disk = sim.block_on(0, |core| async move {
        let disk = plain(&core, &Given::new()).await;
        disk.write(0, &[1; 512]).await.unwrap();
        disk
    });
    sim.run_idle();
    drop(disk);
}

/// An image whose disk refers to an L2 table of a snapshot as if it were a cluster of data.
async fn crossed(core: &Core) -> Disk {
    let disk = plain(core, &Given::new()).await;
    disk.write(0, &[1; 2 << 16]).await.unwrap();
    take(&disk, "one").await.expect("is taken");
    // The disk has an own L2 table afterwards.
    disk.write(0, &[2; 512]).await.unwrap();
    disk.format.close().await.unwrap();
    let storage = disk.format.data_storage().clone();
    let word = async |at: u64| {
        let buf = core.pool().alloc(8);
        storage.read(at, buf.clone()).await.unwrap();
        u64::from_be_bytes(buf.to_vec().try_into().unwrap()) & 0x00ff_ffff_ffff_fe00
    };
    let (l1, table) = (word(40).await, word(64).await & !511);
    let theirs = word(word(table).await).await;
    let ours = word(l1).await;
    assert_ne!(theirs, ours, "the table was copied");
    let entry = core.pool().alloc(8);
    entry.copy_from(0, &(1 << 63 | theirs).to_be_bytes());
    storage.write(ours + 8, entry, false).await.unwrap();
    storage.flush().await.unwrap();
    disk
}

#[test]
fn tables_of_snapshots_are_guarded_if_that_is_asked_for() {
    let text = |text: &str| InfoValue::Text(text.to_owned());
    let all: [(Given, bool); 5] = [
        (vec![], false),
        (vec![("overlap-check", text("cached"))], false),
        (vec![("overlap-check", text("all"))], true),
        (vec![("overlap-check.inactive-l2", InfoValue::Flag(true))], true),
        (
            vec![
                ("overlap-check.template", text("all")),
                ("overlap-check.inactive-l2", InfoValue::Flag(false)),
            ],
            false,
        ),
    ];
    for (given, guarded) in all {
        println!("{given:?}");
        world(move |core| async move {
            let storage = crossed(&core).await.format.data_storage().clone();
            let disk = open_with(&core, storage, true, &given).await.expect("opens");
            let written = disk.write(CLUSTER, &[7; 512]).await;
            match written {
                Err(error) => {
                    assert!(guarded && error.kind() == ErrorKind::Corrupt, "{error}");
                    assert!(error.to_string().contains("overlaps metadata"), "{error}");
                }
                Ok(()) => assert!(!guarded, "the snapshot is damaged"),
            }
            let _ = disk.format.close().await;
        });
    }
}

#[test]
fn single_kinds_of_metadata_are_guarded_or_not() {
    for (guarded, flag) in [(true, true), (false, false)] {
        world(move |core| async move {
            let disk = plain(&core, &Given::new()).await;
            disk.write(0, &[1; 512]).await.unwrap();
            disk.format.close().await.unwrap();
            let storage = disk.format.data_storage().clone();
            let word = core.pool().alloc(8);
            storage.read(40, word.clone()).await.unwrap();
            let l1 = u64::from_be_bytes(word.to_vec().try_into().unwrap());
            storage.read(l1, word.clone()).await.unwrap();
            let l2 = u64::from_be_bytes(word.to_vec().try_into().unwrap()) & !(1 << 63);
            // The second cluster of the disk is the refcount table.
            storage.read(48, word.clone()).await.unwrap();
            let table = u64::from_be_bytes(word.to_vec().try_into().unwrap());
            word.copy_from(0, &(1 << 63 | table).to_be_bytes());
            storage.write(l2 + 8, word, false).await.unwrap();
            let given = flags(&[("overlap-check.refcount-table", flag)]);
            let disk = open_with(&core, storage, true, &given).await.expect("opens");
            let written = disk.write(CLUSTER + 4096, &[7; 512]).await;
            assert_eq!(written.is_err(), guarded, "{written:?}");
            let _ = disk.format.close().await;
        });
    }
}

#[test]
fn options_that_cannot_be_are_refused_with_the_peers_texts() {
    let number = |name, value| vec![(name, InfoValue::Number(value))];
    let v2 = || CreateOptions { version: 2, ..CreateOptions::new(MIB) };
    let v3 = || CreateOptions::new(MIB);
    let entry =
        "L2 cache entry size must be a power of two between 512 and the cluster size (65536)";
    let all: [(CreateOptions, Given, &str); 9] = [
        (
            v2(),
            flags(&[("discard-no-unref", true)]),
            "discard-no-unref is only supported since qcow2 version 3",
        ),
        (
            v2(),
            flags(&[("lazy-refcounts", true)]),
            "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
        ),
        (v3(), number("l2-cache-entry-size", 3000), entry),
        (v3(), number("l2-cache-entry-size", 256), entry),
        (v3(), number("l2-cache-entry-size", 131_072), entry),
        (v3(), number("l2-cache-entry-size", 0), entry),
        (v3(), number("cache-clean-interval", 1 << 32), "Cache clean interval too big"),
        (v3(), number("cache-clean-interval", u64::MAX), "Cache clean interval too big"),
        (
            v3(),
            vec![("cache-size", InfoValue::Number(1)), ("l2-cache-size", InfoValue::Number(2))],
            "l2-cache-size may not exceed cache-size",
        ),
    ];
    for (options, given, text) in all {
        world(move |core| async move {
            let refused = image(&core, options, &given).await.err().expect("is refused");
            assert_eq!(refused.to_string(), text, "{given:?}");
        });
    }
    world(|core| async move {
        let given = flags(&[("discard-no-unref", false), ("lazy-refcounts", false)]);
        let v2 = CreateOptions { version: 2, ..CreateOptions::new(MIB) };
        image(&core, v2, &given).await.expect("what is off needs no version");
    });
}

/// Changes the options of an open image, as `blockdev-reopen` does.
fn retune(disk: &Disk, given: &Given, discard_unmap: bool) {
    let named = given.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
    let options = disk.format.abilities().options.expect("qcow2 has some");
    options.prepare(&named.collect(), discard_unmap).expect("they fit")();
}

#[test]
fn where_freed_space_goes_changes_while_the_image_is_open() {
    let passes = |on| flags(&[("pass-discard-request", on)]);
    for (first, then, unmap, expected) in [
        (passes(false), passes(true), false, true),
        (passes(true), passes(false), true, false),
        // What is not named gets its default, which follows the node's own option.
        (passes(false), Given::new(), true, true),
        (passes(true), Given::new(), false, false),
    ] {
        let later = then.clone();
        let found = gives_back(first, move |disk| async move {
            disk.write(0, &[1; 1 << 20]).await.unwrap();
            retune(&disk, &later, unmap);
            disk.zero(0, MIB, ZeroMode::Discard).await.unwrap();
            disk.format.flush().await.unwrap();
        });
        assert_eq!(found, expected, "{then:?} {unmap}");
    }
}

#[test]
fn options_that_changed_stay_through_a_while_of_being_read_only() {
    let found = gives_back(flags(&[("pass-discard-request", false)]), |disk| async move {
        disk.write(0, &[1; 1 << 20]).await.unwrap();
        retune(&disk, &flags(&[("pass-discard-request", true)]), false);
        disk.format.set_writable(false).await.unwrap();
        disk.format.set_writable(true).await.unwrap();
        disk.zero(0, MIB, ZeroMode::Discard).await.unwrap();
        disk.format.flush().await.unwrap();
    });
    assert!(found, "the option is lost");
}

#[test]
fn caches_shrink_and_grow_under_writes() {
    world(|core| async move {
        let disk = image(&core, CreateOptions::new(1 << 33), &Given::new()).await.expect("opens");
        let sizes = [1, 4 << 20, 64 << 10, 1, 32 << 20];
        for (turn, bytes) in (0_u64..).zip(sizes) {
            let size = InfoValue::Number(bytes);
            let names = ["l2-cache-size", "refcount-cache-size"];
            retune(&disk, &names.map(|name| (name, size.clone())).to_vec(), true);
            // Each in a table of its own.
            for table in 0..16_u64 {
                let at = (table << 29) + turn * CLUSTER;
                let byte = (16 * turn + table) as u8 + 1;
                disk.write(at, &[byte; 4096]).await.unwrap();
            }
            for table in 0..16_u64 {
                for earlier in 0..=turn {
                    let at = (table << 29) + earlier * CLUSTER;
                    let byte = (16 * earlier + table) as u8 + 1;
                    assert_eq!(disk.read(at, 4096).await.unwrap(), [byte; 4096], "{turn} {table}");
                }
            }
        }
        disk.format.close().await.unwrap();
        let report = check(&core, disk.format.data_storage()).await.expect("is checked");
        assert!(report.is_clean(), "{:?}", report.problems);
    });
}

#[test]
fn another_image_in_the_place_of_one_that_was_given_away_is_refused() {
    world(|core| async move {
        let disk = plain(&core, &Given::new()).await;
        disk.write(0, &[1; 4096]).await.unwrap();
        disk.format.set_writable(false).await.unwrap();
        let storage = disk.format.data_storage().clone();
        let other = CreateOptions { cluster_size: 4096, ..CreateOptions::new(MIB) };
        create(&core, &storage, other).await.expect("is created");
        for writable in [false, true] {
            let refused = disk.format.set_writable(writable).await.expect_err("is another one");
            assert!(refused.to_string().contains("another image than before"), "{refused}");
        }
    });
}
