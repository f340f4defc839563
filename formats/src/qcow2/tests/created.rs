//! New images beside the peer's: the same bytes, or the same facts where places may differ.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use liveblk_engine::ErrorKind;
use liveblk_engine::driver::sim::{Sim, SimConfig};
use liveblk_engine::executor::Class;
use liveblk_engine::format::{BackingRef, CreateImage, InfoValue, Preallocation};
use liveblk_engine::storage::{Memory, Storage};

use super::mover::{calm, file, open};
use crate::qcow2::{CompressionType, CreateOptions, check, create, create_with_data};

/// Runs a tool of the peer in `folder`; its output, or a panic with it.
fn run(folder: &Path, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).current_dir(folder).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} is needed: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}{errors}");
    text
}

/// The same creation in the peer's words.
fn peers_options(options: &CreateOptions) -> String {
    let on = |flag: bool| if flag { "on" } else { "off" };
    let mut text = format!(
        "compat={},cluster_size={},refcount_bits={},preallocation={}",
        if options.version == 3 { "1.1" } else { "0.10" },
        options.cluster_size,
        1 << options.refcount_order,
        format!("{:?}", options.preallocation).to_lowercase(),
    );
    if options.version == 3 {
        let packing = format!("{:?}", options.compression_type).to_lowercase();
        text += &format!(
            ",lazy_refcounts={},extended_l2={},compression_type={packing}",
            on(options.lazy_refcounts),
            on(options.extended_l2),
        );
    }
    if let Some(name) = &options.data_file {
        text += &format!(",data_file={name},data_file_raw={}", on(options.data_file_raw));
    }
    text
}

/// Every combination that can be made, in sizes that keep the test short.
fn matrix() -> Vec<CreateOptions> {
    use Preallocation::{Falloc, Full, Metadata, Off};
    let mut all = Vec::new();
    for preallocation in [Off, Metadata, Falloc, Full] {
        for (version, cluster_size, refcount_order, size) in [
            (3, 512, 6, 300 << 10),
            (3, 4096, 0, 7 << 20),
            (3, 65536, 4, 3_000_320),
            (3, 2 << 20, 3, 5 << 20),
            (2, 65536, 4, 1 << 20),
            (2, 512, 4, 100 << 10),
        ] {
            let plain = CreateOptions {
                version,
                cluster_size,
                refcount_order,
                preallocation,
                ..CreateOptions::new(size)
            };
            all.push(plain.clone());
            if version == 2 {
                continue;
            }
            all.push(CreateOptions {
                lazy_refcounts: true,
                compression_type: CompressionType::Zstd,
                ..plain.clone()
            });
            for extended_l2 in [false, true] {
                if extended_l2 && cluster_size < 16 << 10 {
                    continue;
                }
                let plain = CreateOptions { extended_l2, ..plain.clone() };
                all.push(plain.clone());
                for data_file_raw in [false, true] {
                    let data_file = Some("data".to_owned());
                    all.push(CreateOptions { data_file, data_file_raw, ..plain.clone() });
                }
            }
        }
    }
    all
}

async fn bytes(core: &liveblk_engine::executor::Core, storage: &Storage) -> Vec<u8> {
    let buf = core.pool().alloc(storage.size() as usize);
    storage.read(0, buf.clone()).await.unwrap();
    buf.to_vec()
}

#[test]
fn every_kind_of_new_image_is_the_peers_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    for options in matrix() {
        let _ = std::fs::remove_file(folder.path().join("data"));
        let _ = std::fs::remove_file(folder.path().join("theirs"));
        let wanted = peers_options(&options);
        let size = options.size.to_string();
        let arguments = ["create", "-q", "-f", "qcow2", "-o", &wanted, "theirs", &size];
        run(folder.path(), "qemu-img", &arguments);
        let blocks = (options.cluster_size * 8) >> options.refcount_order;
        let one_block = options.size / options.cluster_size + 20 < blocks;
        let has_data = options.data_file.is_some();
        let mode = options.preallocation;
        // There the peer leaves the bits of the subclusters out: see `Plan::table_content`.
        let all_bits = options.data_file_raw && options.extended_l2;
        let (ours, data) = calm(|core| async move {
            let storage = file(&core, "/new", true).await;
            let data = if has_data { Some(file(&core, "/data", true).await) } else { None };
            create_with_data(&core, &storage, data.as_ref(), options).await.expect("is created");
            let data = match &data {
                Some(data) => Some(bytes(&core, data).await),
                None => None,
            };
            (bytes(&core, &storage).await, data)
        });
        let theirs = std::fs::read(folder.path().join("theirs")).unwrap();
        let only_bits = |(a, b): (&[u8], &[u8])| {
            a == b || (all_bits && a == (u64::from(u32::MAX)).to_be_bytes() && b == [0; 8])
        };
        let differ = ours.chunks(8).zip(theirs.chunks(8)).position(|pair| !only_bits(pair));
        // With space reserved, the peer moves its refcount table on the way.
        let moves = matches!(mode, Preallocation::Falloc | Preallocation::Full) && !has_data;
        if one_block {
            let differ = differ.filter(|_| !moves);
            assert_eq!((differ, ours.len()), (None, theirs.len()), "{wanted} {size}");
        }
        if let Some(data) = data {
            let theirs = std::fs::read(folder.path().join("data")).unwrap();
            assert!(data == theirs, "{wanted}: {} {}", data.len(), theirs.len());
        }
        // Where the peer spreads refcount blocks, places differ, but nothing else.
        std::fs::write(folder.path().join("ours"), &ours).unwrap();
        let facts = |name: &str| {
            let info = run(folder.path(), "qemu-img", &["info", "--output=json", name]);
            let keep = |line: &&str| {
                let file_size = line.contains("virtual-size") && line.starts_with("            ");
                !line.contains("actual-size") && !line.contains(name) && !file_size
            };
            info.lines().filter(keep).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(facts("ours"), facts("theirs"), "{wanted}");
        let map = |name: &str| {
            let map = run(folder.path(), "qemu-img", &["map", "--output=json", name]);
            let host = |line: &str| line.split(", \"offset\"").next().unwrap().to_owned();
            if one_block { map } else { map.lines().map(host).collect() }
        };
        if (mode != Preallocation::Metadata || has_data) && !all_bits {
            // Else the peer asks the file system what is a hole, which a copy cannot show.
            assert_eq!(map("ours"), map("theirs"), "{wanted}");
        }
        let report = run(folder.path(), "qemu-img", &["check", "ours"]);
        assert!(report.contains("No errors were found"), "{wanted}: {report}");
    }
}

/// The text of the refusal of these options.
fn refusal(options: CreateOptions) -> String {
    calm(|core| async move {
        let storage = file(&core, "/new", true).await;
        storage.write(0, core.pool().zeroed(512), false).await.unwrap();
        let data = match &options.data_file {
            Some(_) => Some(file(&core, "/data", true).await),
            None => None,
        };
        let result = create_with_data(&core, &storage, data.as_ref(), options).await;
        let error = result.expect_err("is refused");
        let too_large = error.kind() == ErrorKind::Io(27);
        assert!(too_large || error.kind() == ErrorKind::InvalidArgument, "{error}");
        assert_eq!(storage.size(), 512, "refused before anything is touched");
        error.to_string()
    })
}

#[test]
fn options_that_do_not_go_together_are_refused_with_the_peers_texts() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("base"), [0; 512]).unwrap();
    let new = || CreateOptions::new(1 << 20);
    let v2 = || CreateOptions { version: 2, ..new() };
    let backing = || Some(BackingRef { file: "base".into(), format: Some("raw".into()) });
    let named = || Some("data".to_owned());
    let cases = [
        CreateOptions { extended_l2: true, ..v2() },
        CreateOptions { extended_l2: true, cluster_size: 8192, ..new() },
        CreateOptions { extended_l2: true, cluster_size: 8192, ..v2() },
        CreateOptions { lazy_refcounts: true, ..v2() },
        CreateOptions { lazy_refcounts: true, refcount_order: 3, ..v2() },
        CreateOptions { refcount_order: 3, ..v2() },
        CreateOptions { compression_type: CompressionType::Zstd, ..v2() },
        CreateOptions { data_file: named(), ..v2() },
        CreateOptions { data_file_raw: true, ..new() },
        CreateOptions { data_file: named(), data_file_raw: true, backing: backing(), ..new() },
        CreateOptions { preallocation: Preallocation::Metadata, backing: backing(), ..new() },
        CreateOptions { preallocation: Preallocation::Full, backing: backing(), ..new() },
        CreateOptions { cluster_size: 256, ..new() },
        CreateOptions { cluster_size: 3000, ..new() },
        CreateOptions { cluster_size: 4 << 20, ..new() },
        CreateOptions { cluster_size: 512, ..CreateOptions::new(1 << 50) },
    ];
    for options in cases {
        let (wanted, size) = (peers_options(&options), options.size.to_string());
        let extended =
            if options.extended_l2 && options.version == 2 { ",extended_l2=on" } else { "" };
        let lazy =
            if options.lazy_refcounts && options.version == 2 { ",lazy_refcounts=on" } else { "" };
        let zstd = options.compression_type == CompressionType::Zstd && options.version == 2;
        let zstd = if zstd { ",compression_type=zstd" } else { "" };
        let lone = options.data_file_raw && options.data_file.is_none();
        let lone = if lone { ",data_file_raw=on" } else { "" };
        let wanted = format!("{wanted}{extended}{lazy}{zstd}{lone}");
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &wanted];
        if options.backing.is_some() {
            arguments.extend(["-F", "raw", "-b", "base"]);
        }
        arguments.extend(["theirs", &size]);
        let output = Command::new("qemu-img").current_dir(folder.path()).args(&arguments).output();
        let output = output.expect("qemu-img is needed");
        assert!(!output.status.success(), "{wanted}");
        let theirs = String::from_utf8_lossy(&output.stderr).into_owned();
        let ours = match refusal(options) {
            // The words of blockdev-create; qemu-img has its own where the errno is EFBIG.
            text if text
                == "Could not resize image: Failed to grow the L1 table: File too large" =>
            {
                "The image size is too large for file format 'qcow2' (try using a larger cluster \
                 size)"
                    .to_owned()
            }
            text => text,
        };
        assert_eq!(format!("qemu-img: theirs: {ours}"), theirs.trim_end());
    }
    let odd = refusal(CreateOptions::new(1000));
    assert_eq!(odd, "Image size must be a multiple of 512 bytes");
}

#[test]
fn options_by_name_are_validated_and_unknown_ones_refused_by_name() {
    let text = |text: &str| InfoValue::Text(text.to_owned());
    let parse = |options: &[(&str, InfoValue)]| {
        let options = options.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
        let image =
            CreateImage { size: 1 << 20, options: options.collect(), ..CreateImage::default() };
        CreateOptions::parse(&image)
    };
    let all = parse(&[
        ("version", text("v3")),
        ("cluster-size", InfoValue::Number(32768)),
        ("preallocation", text("falloc")),
        ("refcount-bits", text("32")),
        ("lazy-refcounts", InfoValue::Flag(true)),
        ("compression-type", text("zstd")),
        ("extended-l2", text("on")),
        ("data-file", text("data")),
        ("data-file-raw", InfoValue::Flag(false)),
    ])
    .expect("all are known");
    assert_eq!((all.version, all.cluster_size, all.refcount_order), (3, 32768, 5));
    assert_eq!(all.preallocation, Preallocation::Falloc);
    assert_eq!(all.compression_type, CompressionType::Zstd);
    assert!(all.lazy_refcounts && all.extended_l2 && !all.data_file_raw);
    assert_eq!(all.data_file.as_deref(), Some("data"));
    let refused = |options: &[(&str, InfoValue)]| {
        parse(options).expect_err("is refused").error("create").to_string()
    };
    assert_eq!(refused(&[("bogus", text("1"))]), "Invalid parameter 'bogus'");
    assert_eq!(
        refused(&[("preallocation", text("bad"))]),
        "Parameter 'preallocation' does not accept value 'bad'"
    );
    assert_eq!(
        refused(&[("version", text("1.2"))]),
        "Parameter 'version' does not accept value '1.2'"
    );
    assert_eq!(
        refused(&[("refcount-bits", InfoValue::Flag(true))]),
        "Invalid parameter type for 'refcount-bits', expected: integer"
    );
    for bits in [0, 3, 128] {
        let options = parse(&[("refcount-bits", InfoValue::Number(bits))]).expect("a number");
        let text = refusal(options);
        assert_eq!(text, "Refcount width must be a power of two and may not exceed 64 bits");
    }
}

/// Options that take every step of a creation.
fn every_step() -> CreateOptions {
    CreateOptions {
        cluster_size: 4096,
        refcount_order: 6,
        preallocation: Preallocation::Full,
        ..CreateOptions::new(3 << 20)
    }
}

#[test]
fn a_creation_that_fails_at_any_operation_leaves_nothing_that_opens() {
    for (external, errno) in [(false, 28), (false, 5), (true, 28), (true, 5)] {
        let failed = (0..2000).take_while(|nth| {
            let nth = *nth;
            calm(move |core| async move {
                let memory = Memory::new(0);
                let storage = Storage::Memory(Rc::clone(&memory));
                let data = Storage::Memory(Memory::new(4096));
                let mut options = every_step();
                options.data_file = external.then(|| "data".to_owned());
                memory.plant_fault(Some((nth, errno)));
                let given = external.then_some(&data);
                let result = create_with_data(&core, &storage, given, options).await;
                memory.plant_fault(None);
                let opened = open(&core, storage, false).await;
                match &result {
                    Ok(()) => assert!(external || opened.is_ok()),
                    Err(error) => {
                        assert_eq!(error.errno(), errno, "operation {nth}");
                        let refused = opened.err().expect("nothing to open").to_string();
                        assert_eq!(refused, "Image is not in qcow2 format", "operation {nth}");
                        assert_eq!(data.size(), 4096, "the data file is what it was");
                    }
                }
                result.is_err()
            })
        });
        let failed = failed.count();
        assert!((5..2000).contains(&failed), "{failed} operations");
    }
}

#[test]
fn a_power_cut_during_a_creation_leaves_a_whole_image_or_none() {
    let mut whole = 0;
    for steps in (0..400).step_by(7) {
        let mut sim = Sim::new(SimConfig::new(steps).calm());
        sim.fs().create("/image", &[]);
        let core = sim.core(0);
        let work = core.clone();
        drop(core.spawn(Class::Guest, async move {
            let storage = file(&work, "/image", false).await;
            let backing = BackingRef { file: "b".repeat(700), format: Some("raw".into()) };
            let options = CreateOptions { backing: Some(backing), ..CreateOptions::new(8 << 20) };
            create(&work, &storage, options).await.expect("is created");
        }));
        sim.run_steps(steps);
        for seed in 0..3 {
            let left = sim.fs().after_power_cut(seed);
            let mut after = Sim::with_fs(SimConfig::new(seed).calm(), left);
            whole += after.block_on(0, |core| async move {
                let storage = file(&core, "/image", false).await;
                let Ok(disk) = open(&core, storage.clone(), false).await else { return 0 };
                let backing = disk.format.info().backing.expect("the name is there");
                assert_eq!(backing.file, "b".repeat(700), "the header is whole");
                let report = check(&core, &storage).await.expect("is checked");
                assert!(report.is_clean(), "{:?}", report.problems);
                1
            });
        }
    }
    assert!(whole > 0, "some cuts came after the end");
}
