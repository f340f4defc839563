//! Images with an external data file, beside the peer and under power cuts.

use std::cell::Cell;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use liveblk_engine::ErrorKind;
use liveblk_engine::driver::sim::{Sim, SimConfig};
use liveblk_engine::executor::Core;
use liveblk_engine::format::{
    BackingRef, DataSource, Driver, FormatOptions, InfoValue, Mapping, OpenImage, ZeroMode,
};
use liveblk_engine::storage::{Memory, Storage};

use super::mover::{Disk, calm, file, open};
use super::peer::{DATA_FILE, load, run, text};
use crate::qcow2::{CreateOptions, Options, Qcow2Driver, check, create_with_data};

const MIB: u64 = 1 << 20;

fn external(size: u64) -> CreateOptions {
    CreateOptions { data_file: Some("image.data".to_owned()), ..CreateOptions::new(size) }
}

/// qemu-img in the folder of the data file: the peer takes the name from where it is started.
fn run_in(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").current_dir(folder).args(arguments).output();
    let output = output.expect("qemu-img is needed");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

async fn image(core: &Core, options: CreateOptions) -> (Disk, Storage) {
    let storage = file(core, "/image", true).await;
    let data = file(core, DATA_FILE, true).await;
    create_with_data(core, &storage, Some(&data), options).await.expect("is created");
    (open(core, storage, true).await.expect("opens"), data)
}

/// What the work below leaves, on a disk of 6 MiB that grows by one.
async fn some_work(disk: &Disk) -> Vec<u8> {
    disk.write(700, &[1; 3_000_000]).await.unwrap();
    disk.write(4 * MIB, &[2; 100_000]).await.unwrap();
    disk.zero(MIB, MIB, ZeroMode::Unmap).await.unwrap();
    disk.zero(100_000, 300_000, ZeroMode::Keep).await.unwrap();
    disk.format.flush().await.unwrap();
    disk.write(1_500_000, &[3; 200_000]).await.unwrap();
    disk.zero(2 * MIB, 512 << 10, ZeroMode::Discard).await.unwrap();
    disk.write(2 * MIB + 4096, &[5; 8192]).await.unwrap();
    disk.format.resize(7 * MIB).await.expect("grows");
    disk.write(6 * MIB + 5, &[4; 5000]).await.unwrap();
    disk.write(0, &[6; 512]).await.unwrap();
    disk.read(0, 7 * MIB).await.unwrap()
}

#[test]
fn what_we_write_the_peer_reads_and_a_raw_data_file_is_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    for (data_file_raw, extended_l2, cluster_size) in [
        (false, false, 65536),
        (true, false, 65536),
        (false, true, 65536),
        (true, true, 16384),
        (true, false, 4096),
        (false, false, 512),
    ] {
        let options =
            CreateOptions { data_file_raw, extended_l2, cluster_size, ..external(6 * MIB) };
        let mut sim = Sim::new(SimConfig::new(5));
        let expected = sim.block_on(0, |core| async move {
            let (disk, _) = image(&core, options).await;
            let bytes = some_work(&disk).await;
            disk.format.close().await.expect("closes");
            let storage = file(&core, "/image", false).await;
            let report = check(&core, &storage).await.expect("is checked");
            assert!(report.is_clean(), "{:?}", report.problems);
            let disk = open(&core, storage, false).await.expect("opens");
            assert!(disk.read(0, 7 * MIB).await.unwrap() == bytes, "read again");
            bytes
        });
        let path = folder.path().join("image");
        sim.fs().export("/image", &path).unwrap();
        sim.fs().export(DATA_FILE, folder.path().join("image.data")).unwrap();
        let case = format!("raw {data_file_raw} extended {extended_l2} {cluster_size}");
        let report = run_in(folder.path(), &["check", "-f", "qcow2", text(&path)]);
        assert!(report.contains("No errors were found"), "{case}: {report}");
        let flat = folder.path().join("flat");
        std::fs::write(&flat, &expected).unwrap();
        let arguments = ["compare", "-f", "qcow2", "-F", "raw", text(&path), text(&flat)];
        assert!(run_in(folder.path(), &arguments).contains("identical"), "{case}");
        if data_file_raw {
            let data = load(&folder.path().join("image.data"));
            assert!(data.len() as u64 >= 7 * MIB && data[..expected.len()] == expected, "{case}");
        }
    }
}

#[test]
fn what_the_peer_wrote_we_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let data = folder.path().join("image.data");
    for creation in
        ["data_file_raw=off", "data_file_raw=on", "extended_l2=on", "preallocation=metadata"]
    {
        let _ = std::fs::remove_file(&data);
        let options = format!("{creation},data_file={}", text(&data));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, text(&path), "9M"]);
        let work = [
            "write -P 1 0 1M",
            "write -P 2 1500k 700k",
            "write -P 3 5M 4M",
            "discard 6M 1M",
            "write -z 512k 256k",
            "write -z -u 5M 512k",
            "write -z 0 64k",
        ];
        let mut arguments = vec!["-f", "qcow2", text(&path)];
        arguments.extend(work.iter().flat_map(|line| ["-c", line]));
        run("qemu-io", &arguments);
        let flat = folder.path().join("flat");
        run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&path), text(&flat)]);
        let expected = load(&flat);
        let (bytes, held) = (load(&path), load(&data));
        let name = text(&data).to_owned();
        let mut sim = Sim::new(SimConfig::new(3));
        sim.fs().create("/image", &bytes);
        sim.fs().create(DATA_FILE, &held);
        let read = sim.block_on(0, |core| async move {
            let storage = file(&core, "/image", false).await;
            let report = check(&core, &storage).await.expect("is checked");
            assert!(report.is_clean(), "{:?}", report.problems);
            let data = DataSource::Given(file(&core, DATA_FILE, false).await);
            let format = open_with(&core, storage, data).await.expect("opens");
            let facts = format.info().specific;
            assert!(facts.contains(&("data-file", InfoValue::Text(name))), "{facts:?}");
            Disk { core, format, below: |_| 0, even: false }.read(0, 9 * MIB).await.expect("reads")
        });
        assert!(read == expected, "{creation}");
    }
}

async fn open_with(
    core: &Core,
    storage: Storage,
    data: DataSource,
) -> liveblk_engine::Result<Rc<dyn liveblk_engine::format::Format>> {
    let image = OpenImage {
        core: core.clone(),
        filename: storage.name().into(),
        storage,
        writable: true,
        discard_unmap: false,
        data,
        options: FormatOptions::new(),
        raw_offset: 0,
        raw_size: None,
    };
    Qcow2Driver::with_options(Options::default()).open(image).await
}

/// Row Q16: a library that names no data file opens none, whatever the header says.
#[test]
fn without_a_data_source_no_name_of_a_header_is_followed() {
    calm(|core| async move {
        for name in ["image.data", "json:{\"driver\":\"file\"}", "nbd://host/x", "/etc/passwd"] {
            let options =
                CreateOptions { data_file: Some(name.to_owned()), ..CreateOptions::new(MIB) };
            let (storage, data) = (memory(), memory());
            create_with_data(&core, &storage, Some(&data), options).await.expect("is created");
            let error = open_with(&core, storage.clone(), DataSource::None).await.err();
            let error = error.expect("is refused");
            assert_eq!(error.to_string(), "'data-file' is required for this image");
            let asked = Rc::new(Cell::new(None));
            let seen = Rc::clone(&asked);
            let refuse = DataSource::FromHeader(Rc::new(move |reference: BackingRef| {
                seen.set(Some(reference.file));
                Box::pin(async { Err(liveblk_engine::Error::new(ErrorKind::PolicyRefused, "x")) })
            }));
            let error = open_with(&core, storage, refuse).await.err().expect("is refused");
            assert_eq!(error.kind(), ErrorKind::PolicyRefused);
            assert_eq!(asked.take().as_deref(), Some(name), "the policy is asked, nobody else");
        }
        let plain = memory();
        crate::qcow2::create(&core, &plain, CreateOptions::new(MIB)).await.expect("is created");
        let error = open_with(&core, plain, DataSource::Given(memory())).await.err();
        assert_eq!(
            error.expect("is refused").to_string(),
            "'data-file' can only be set for images with an external data file"
        );
    });
}

fn memory() -> Storage {
    Storage::Memory(Memory::new(0))
}

#[test]
fn the_place_of_data_is_the_guests_offset_and_nothing_else() {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.block_on(0, |core| async move {
        let (disk, data) = image(&core, external(MIB)).await;
        disk.write(0, &[1; 65536]).await.unwrap();
        disk.write(3 * 65536, &[2; 512]).await.unwrap();
        let mut extents = liveblk_engine::format::Extents::new();
        drop(disk.format.resolve(liveblk_engine::address::GuestRange::new(0, 512), &mut extents));
        assert!(matches!(extents[0].mapping, Mapping::Data(at) if at.bytes() == 0));
        let buf = core.pool().alloc(512);
        data.read(3 * 65536, buf.clone()).await.unwrap();
        assert_eq!(buf.to_vec(), [2; 512]);
        disk.format.close().await.unwrap();
    });
    // The entry of the fourth cluster names the place of the third.
    let storage = sim.fs().read("/image").unwrap();
    let l1 = u64::from_be_bytes(storage[40..48].try_into().unwrap()) as usize;
    let l2 = u64::from_be_bytes(storage[l1..l1 + 8].try_into().unwrap()) & !(1 << 63);
    let mut bytes = storage.clone();
    let at = l2 as usize + 24;
    bytes[at..at + 8].copy_from_slice(&(1_u64 << 63 | 2 << 16).to_be_bytes());
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/image", &bytes);
    sim.fs().create(DATA_FILE, &[7; 1 << 20]);
    sim.block_on(0, |core| async move {
        let disk = open(&core, file(&core, "/image", false).await, true).await.expect("opens");
        assert_eq!(disk.read(0, 512).await.expect("is right"), [7; 512]);
        let error = disk.read(3 << 16, 512).await.expect_err("is damaged").to_string();
        assert!(error.contains("does not match guest cluster offset: 0x30000"), "{error}");
        assert!(disk.write(3 << 16, &[1; 512]).await.is_err());
    });
}

/// Else a power cut could leave data in the file that the disk does not show.
#[test]
fn all_of_a_raw_data_file_is_mapped_from_the_start_and_when_it_grows() {
    calm(|core| async move {
        for (extended_l2, cluster_size) in [(false, 65536), (true, 65536), (true, 16384)] {
            let size = MIB + 512;
            let options =
                CreateOptions { data_file_raw: true, extended_l2, cluster_size, ..external(size) };
            let (disk, _) = image(&core, options).await;
            for size in [size, 2 * MIB + 512, 9 * MIB] {
                disk.format.resize(size).await.expect("grows, or stays");
                // What the peer makes of it, measured.
                let part = if extended_l2 { cluster_size / 32 } else { cluster_size };
                let there = disk.format.data_storage().size();
                assert_eq!(there, size.next_multiple_of(part), "{extended_l2}");
                assert!(disk.read(size - 512, 512).await.expect("reads") == [0; 512]);
                let mut at = 0;
                while at < size {
                    let mut extents = liveblk_engine::format::Extents::new();
                    let range = liveblk_engine::address::GuestRange::new(at, size - at);
                    drop(disk.read(at, 512).await);
                    drop(disk.format.resolve(range, &mut extents));
                    let first = extents.first().expect("an extent");
                    let place = match &first.mapping {
                        Mapping::Data(place) => place.bytes(),
                        other => panic!("{at}: {other:?}"),
                    };
                    assert_eq!(place, at);
                    at += first.len;
                }
            }
            disk.format.close().await.expect("closes");
        }
    });
}

#[test]
fn a_raw_data_file_forbids_a_backing_file() {
    calm(|core| async move {
        let options = CreateOptions { data_file_raw: true, ..external(MIB) };
        let (disk, _) = image(&core, options).await;
        let backing = BackingRef { file: "base".to_owned(), format: Some("raw".to_owned()) };
        let error = disk.format.set_backing(Some(backing)).await.expect_err("is refused");
        assert_eq!(
            error.to_string(),
            "Backing file and data-file-raw cannot be used at the same time"
        );
        disk.format.set_backing(None).await.expect("nothing is nothing");
        assert!(disk.format.info().specific.contains(&("data-file-raw", InfoValue::Flag(true))));
        let facts = open(&core, file(&core, "/image", false).await, true).await.unwrap();
        let raw = ("data-file-raw", InfoValue::Flag(true));
        assert!(facts.format.info().specific.contains(&raw), "the autoclear bit is kept");
    });
}

#[test]
fn data_that_was_not_flushed_is_not_mapped_after_a_power_cut() {
    let mut sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/image", &[]);
    sim.fs().create(DATA_FILE, &[]);
    sim.block_on(0, |core| async move {
        let storage = file(&core, "/image", false).await;
        let data = file(&core, DATA_FILE, false).await;
        let created = create_with_data(&core, &storage, Some(&data), external(4 * MIB)).await;
        created.expect("is created");
        let disk = open(&core, storage, true).await.expect("opens");
        disk.write(0, &[1; 65536]).await.unwrap();
        disk.format.flush().await.unwrap();
        disk.write(MIB, &[2; 65536]).await.unwrap();
        // No flush: neither the data nor the mapping is durable.
    });
    for seed in 0..20 {
        let left = sim.fs().after_power_cut(seed);
        let mut after = Sim::with_fs(SimConfig::new(seed).calm(), left);
        after.block_on(0, |core| async move {
            let storage = file(&core, "/image", false).await;
            let disk = open(&core, storage, true).await.expect("opens");
            assert_eq!(disk.read(0, 65536).await.expect("reads"), vec![1; 65536]);
            let later = disk.read(MIB, 65536).await.expect("reads");
            assert_eq!(later, vec![0; 65536], "the mapping was not written");
        });
    }
}

/// What is in a raw data file shows, also if a cut took the mapping of a write that was not
/// flushed: therefore all of it is mapped, as the peer does it, the part that was added too.
#[test]
fn all_of_a_raw_data_file_is_mapped_also_after_growth() {
    calm(|core| async move {
        let options =
            CreateOptions { data_file_raw: true, cluster_size: 4096, ..external(5 * 4096 + 512) };
        let (disk, _) = image(&core, options).await;
        for size in [5 * 4096 + 512, 9 * 4096 + 1024, 3 * 4096, 3 * 4096 + 512, 40 * 4096] {
            disk.format.resize(size).await.expect("is resized");
            let mut extents = liveblk_engine::format::Extents::new();
            let all = liveblk_engine::address::GuestRange::new(0, size);
            while extents.iter().any(|extent| matches!(extent.mapping, Mapping::Miss(_)))
                || extents.is_empty()
            {
                disk.read(0, size).await.expect("reads");
                extents.clear();
                drop(disk.format.resolve(all, &mut extents));
            }
            let mapped = extents.iter().all(|extent| matches!(extent.mapping, Mapping::Data(_)));
            assert!(mapped, "{size}: {extents:?}");
            // What the peer makes of it, measured.
            assert_eq!(disk.format.data_storage().size(), size.next_multiple_of(4096));
        }
        disk.format.close().await.expect("closes");
        let report = check(&core, &file(&core, "/image", false).await).await.expect("is checked");
        assert!(report.is_clean(), "{:?}", report.problems);
    });
}
