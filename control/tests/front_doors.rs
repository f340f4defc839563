//! What an image header names and claims, at each front door: the library, `liveblk`, `liveblkd`.
//!
//! References are followed as the policy of the door says (rows Q15, Q16, R12); sizes that cannot
//! be are refused before anything is allocated for them (rows Q13, R11, R14), at each door alike.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use liveblk::{CoreId, Engine, EngineConfig, Host, OpenNode, ReferencePolicy};
use nix::sys::resource::{UsageWho, getrusage};

/// Bytes that any process started here may have taken: the bound of an image's metadata, its
/// caches, and what the program takes anyway.
const PROCESS_BYTES_MAX: i64 = 160 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    /// What the door does if nothing is said.
    Default,
    Explicit,
    SameDir,
    Any,
    /// Same folder, and the folder `out` too.
    Allow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Door {
    Library,
    Tool,
    Daemon,
}

const DOORS: [Door; 3] = [Door::Library, Door::Tool, Door::Daemon];

/// Opens the image at this door, for reading; the refusal, if there is one.
fn open(door: Door, policy: Policy, image: &Path) -> Result<(), String> {
    match door {
        Door::Library => open_by_library(policy, image),
        Door::Tool => open_by_tool(policy, image),
        Door::Daemon => open_by_daemon(policy, image),
    }
}

fn out_of(image: &Path) -> PathBuf {
    image.parent().and_then(Path::parent).expect("invariant: in a folder of the test").join("out")
}

fn open_by_library(policy: Policy, image: &Path) -> Result<(), String> {
    let path = image.to_owned();
    let spec = move || OpenNode::new("qcow2", path).named("image");
    let opened = match policy {
        Policy::Default => liveblk::run(|host| async move { host.open(spec()).await.map(drop) }),
        policy => {
            let policy = match policy {
                Policy::Explicit => ReferencePolicy::Explicit,
                Policy::Any => ReferencePolicy::Any,
                Policy::Allow => ReferencePolicy::SameDir { allow: vec![out_of(image)] },
                _ => ReferencePolicy::SameDir { allow: Vec::new() },
            };
            let engine = Engine::start(&EngineConfig::default()).unwrap();
            let answer = engine.handle().run(CoreId(0), move |core| async move {
                let host = Host::on(&core, policy);
                let opened = host.open(spec()).await.map(drop);
                let closed = host.close().await;
                opened.and(closed)
            });
            answer.wait().unwrap()
        }
    };
    opened.map_err(|error| error.to_string())
}

fn words(policy: Policy, image: &Path) -> Vec<String> {
    match policy {
        Policy::Default => Vec::new(),
        Policy::Explicit => vec!["--header-refs=explicit".to_owned()],
        Policy::SameDir => vec!["--header-refs=same-dir".to_owned()],
        Policy::Any => vec!["--header-refs=any".to_owned()],
        Policy::Allow => vec![format!("--allow-dir={}", out_of(image).display())],
    }
}

fn open_by_tool(policy: Policy, image: &Path) -> Result<(), String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_liveblk"));
    command.arg("img").args(words(policy, image)).args(["map", "-f", "qcow2"]).arg(image);
    let ended = command.output().unwrap();
    let errors = String::from_utf8_lossy(&ended.stderr).into_owned();
    match ended.status.code() {
        Some(0) => Ok(()),
        Some(1) => Err(errors),
        other => panic!("{image:?}: {other:?} {errors}"),
    }
}

/// The second node is refused, so that the daemon ends: whose refusal it is tells about the first.
fn open_by_daemon(policy: Policy, image: &Path) -> Result<(), String> {
    let node = format!(
        "driver=qcow2,node-name=x,read-only=on,file.driver=file,file.filename={}",
        image.display()
    );
    let ended = Command::new(env!("CARGO_BIN_EXE_liveblkd"))
        .args(words(policy, image))
        .args(["--blockdev", &node, "--blockdev", "driver=file,node-name=end,filename=/nowhere"])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(1), "{errors}");
    if errors.contains("node-name=end") { Ok(()) } else { Err(errors) }
}

fn qemu_img(arguments: &[&str], image: &Path) {
    let made = Command::new("qemu-img").args(arguments).arg(image).arg("1M").output();
    let made = made.expect("qemu-img is needed");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

fn set(image: &Path, at: usize, field: &[u8]) {
    let mut bytes = std::fs::read(image).unwrap();
    bytes[at..at + field.len()].copy_from_slice(field);
    std::fs::write(image, bytes).unwrap();
}

/// An image whose header names a backing file, or an external data file.
fn referring(image: &Path, data: bool, name: &str) {
    let _ = std::fs::remove_file(image);
    if !data {
        return qemu_img(&["create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "raw"], image);
    }
    let made = image.with_extension("made");
    let option = format!("data_file={}", made.display());
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &option], image);
    let bytes = std::fs::read(image).unwrap();
    assert_eq!(&bytes[112..116], b"DATA", "the first header extension names the data file");
    set(image, 116, &[0; 900]);
    set(image, 116, &u32::try_from(name.len()).unwrap().to_be_bytes());
    set(image, 120, name.as_bytes());
}

/// A folder with `in/` for images and what they may name, and `out/` for what they may not.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for name in ["in", "in/below", "out"] {
        std::fs::create_dir(path(name)).unwrap();
    }
    for name in ["in/near", "in/below/near", "out/far"] {
        std::fs::write(path(name), vec![7; 1 << 20]).unwrap();
    }
    nix::unistd::mkfifo(&path("in/fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink(path("out/far"), path("in/link")).unwrap();
    folder
}

#[test]
fn references_of_headers_are_followed_as_the_policy_of_each_door_says() {
    use Policy::{Allow, Any, Default, Explicit, SameDir};
    let folder = folder();
    let image = folder.path().join("in/image");
    let text = |name: &str| folder.path().join(name).display().to_string();
    let far = text("out/far");
    let json = format!("json:{{\"driver\":\"file\",\"filename\":\"{far}\"}}");
    let all = [Default, Explicit, SameDir, Any, Allow];
    // `Default` stands for the doors of people; the library's is `Explicit`.
    let cases: [(String, &[Policy]); 11] = [
        ("near".to_owned(), &[Default, SameDir, Any, Allow]),
        ("below/near".to_owned(), &[Default, SameDir, Any, Allow]),
        (text("in/near"), &[Default, SameDir, Any, Allow]),
        (far, &[Any, Allow]),
        ("../out/far".to_owned(), &[Any, Allow]),
        ("link".to_owned(), &[Any]),
        (json, &[]),
        ("nbd://127.0.0.1:1/x".to_owned(), &[]),
        ("/dev/zero".to_owned(), &[]),
        ("fifo".to_owned(), &[]),
        ("image".to_owned(), &[]),
    ];
    for (name, allowed) in &cases {
        for data in [false, true] {
            referring(&image, data, name);
            for (door, policy) in DOORS.iter().flat_map(|door| all.map(|policy| (*door, policy))) {
                let follows = match (door, policy) {
                    (Door::Library, Default) => false,
                    _ => allowed.contains(&policy),
                };
                let opened = open(door, policy, &image);
                let case = format!("{door:?} {policy:?} data {data} {name}: {opened:?}");
                assert_eq!(opened.is_ok(), follows, "{case}");
            }
        }
    }
}

/// Fields of the header with values that ask for far too much, or cannot be.
const CLAIMS: [(&str, usize, &[u8]); 14] = [
    ("backing name of 4 GiB", 8, &[0, 0, 0, 0, 0, 0, 2, 0, 0xff, 0xff, 0xff, 0xff]),
    ("backing name far away", 8, &[0x7f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8]),
    ("clusters of 2^63 bytes", 20, &[0, 0, 0, 63]),
    ("clusters of 4 MiB", 20, &[0, 0, 0, 22]),
    ("a disk of 2^64 bytes", 24, &[0xff; 8]),
    ("a disk of 2^62 bytes", 24, &[0x40, 0, 0, 0, 0, 0, 0, 0]),
    ("2^32 L1 entries", 36, &[0xff; 4]),
    ("L1 of 32 MiB and one entry", 36, &[0, 0x40, 0, 1]),
    ("L1 of 32 MiB in a short file", 36, &[0, 0x40, 0, 0]),
    ("2^32 clusters of refcount table", 56, &[0xff; 4]),
    ("refcount table of 8 MiB and one cluster", 56, &[0, 0, 0, 129]),
    ("2^32 snapshots", 60, &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1, 0, 0]),
    ("refcounts of 2^63 bits", 96, &[0, 0, 0, 63]),
    ("a header of 4 GiB", 100, &[0xff, 0xff, 0xff, 0xf8]),
];

#[test]
fn headers_that_claim_too_much_are_refused_alike_at_each_door_in_bounded_memory() {
    let folder = folder();
    let image = folder.path().join("in/image");
    for (name, at, field) in CLAIMS {
        let _ = std::fs::remove_file(&image);
        qemu_img(&["create", "-q", "-f", "qcow2"], &image);
        set(&image, at, field);
        let texts = DOORS.map(|door| open(door, Policy::Any, &image));
        for (door, text) in DOORS.iter().zip(&texts) {
            let Err(text) = text else { panic!("{name} is opened by {door:?}") };
            let cause = texts[0].as_ref().unwrap_err();
            let cause = cause.rsplit(": ").next().unwrap_or(cause);
            assert!(text.contains(cause), "{name}: {door:?} says {text}, the library {cause}");
        }
    }
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    let most = usage.max_rss() * 1024;
    assert!(most < PROCESS_BYTES_MAX, "{most} bytes");
}

/// The largest tables that are allowed, all of their entries in use, open at each door within the
/// bound.
#[test]
fn the_largest_tables_open_at_each_door_in_bounded_memory() {
    let folder = folder();
    let image = folder.path().join("in/image");
    qemu_img(&["create", "-q", "-f", "qcow2"], &image);
    let cluster = 1_u64 << 16;
    let l1 = std::fs::read(&image).unwrap().len().next_multiple_of(1 << 16) as u64;
    let first = l1 + (32 << 20);
    let entries = (0..4_u64 << 20).map(|index| (first + index * cluster) | (1 << 63));
    let table: Vec<u8> = entries.flat_map(u64::to_be_bytes).collect();
    set(&image, 36, &[0, 0x40, 0, 0]);
    set(&image, 40, &l1.to_be_bytes());
    let mut file = std::fs::OpenOptions::new().append(true).open(&image).unwrap();
    file.set_len(l1).unwrap();
    std::io::Write::write_all(&mut file, &table).unwrap();
    file.set_len(first + (4_u64 << 20) * cluster).unwrap();
    for door in DOORS {
        open(door, Policy::Default, &image).unwrap_or_else(|error| panic!("{door:?}: {error}"));
    }
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    let most = usage.max_rss() * 1024;
    assert!(most < PROCESS_BYTES_MAX, "{most} bytes");
}
