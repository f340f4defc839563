//! Reads of qcow2 images against a second reader that shares no code with ours or the peer.
//!
//! Images are made by us or by the peer with random requests from a seed: versions, cluster sizes,
//! compressed and zeroed clusters, alone or over a backing file shorter than the disk. The model is
//! what the requests say. Our reads and the crate imago's must both be the model, byte by byte.
//! What imago does not open is listed with the reason.

use std::path::{Path, PathBuf};
use std::process::Command;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use liveblk::engine::driver::sim::{Rng, Sim, SimConfig};
use liveblk::engine::executor::Core;
use liveblk::engine::format::BackingRef;
use liveblk::engine::node::ZeroFlags;
use liveblk::engine::storage::Memory;
use liveblk::formats::qcow2::{CompressionType, CreateOptions};
use liveblk::{Disk, WriteFlags};

/// Cluster bits and size of the disks: several tables where that is cheap; none but the first a
/// whole number of clusters.
const DISKS: [(u32, u64); 4] =
    [(9, 700 << 10), (12, (3 << 20) - 512), (16, (4 << 20) - 1536), (21, (10 << 20) - 512)];

/// Files whose bytes are what is written, again and again: the first half packs well.
const FILLS: usize = 6;

/// A request.
#[derive(Clone, Debug)]
enum Op {
    Packed { at: u64, len: u64, fill: usize },
    Write { at: u64, len: u64, fill: usize },
    Zero { at: u64, len: u64, unmap: bool },
}

/// An image to be made: what it is and what is done to it.
#[derive(Clone, Debug)]
struct Plan {
    version: u32,
    cluster_bits: u32,
    size: u64,
    ops: Vec<Op>,
}

impl Plan {
    fn new(version: u32, cluster_bits: u32, size: u64, rng: &mut Rng) -> Self {
        let cluster = 1 << cluster_bits;
        let mut ops = Vec::new();
        // First what the peer stores compressed only where nothing is yet.
        for _ in 0..4 {
            let at = rng.bits() % (size / cluster) * cluster;
            let known = |op: &Op| matches!(op, Op::Packed { at: other, .. } if *other == at);
            if !ops.iter().any(known) {
                let fill = (rng.bits() % (FILLS as u64 / 2)) as usize;
                ops.push(Op::Packed { at, len: cluster, fill });
            }
        }
        for number in 0..24_u64 {
            let at = rng.bits() % (size / 512) * 512;
            let most = *rng.pick(&[1, 9, 2 * cluster / 512, 3 * cluster / 512]);
            let len = ((1 + rng.bits() % most) * 512).min(size - at);
            ops.push(match number % 6 {
                0 => {
                    // Whole clusters, so that zeroes can be a matter of the tables alone.
                    let at = at / cluster * cluster;
                    let len = ((1 + rng.bits() % 2) * cluster).min(size - at);
                    Op::Zero { at, len, unmap: rng.bits().is_multiple_of(2) }
                }
                1 => Op::Zero { at, len, unmap: rng.bits().is_multiple_of(2) },
                _ => Op::Write { at, len, fill: (rng.bits() % FILLS as u64) as usize },
            });
        }
        Self { version, cluster_bits, size, ops }
    }

    /// Does to `disk`, which has the content of the layers below, what the requests say.
    fn model(&self, below: &[u8], fills: &[Vec<u8>]) -> Vec<u8> {
        let mut disk = below[..below.len().min(self.size as usize)].to_vec();
        disk.resize(self.size as usize, 0);
        for op in &self.ops {
            match op {
                Op::Packed { at, len, fill } | Op::Write { at, len, fill } => {
                    let bytes = filled(&fills[*fill], *len);
                    disk[*at as usize..][..*len as usize].copy_from_slice(&bytes);
                }
                Op::Zero { at, len, .. } => disk[*at as usize..][..*len as usize].fill(0),
            }
        }
        disk
    }
}

fn filled(fill: &[u8], len: u64) -> Vec<u8> {
    fill.iter().copied().cycle().take(len as usize).collect()
}

fn fills(rng: &mut Rng) -> Vec<Vec<u8>> {
    let fill = |number: usize| -> Vec<u8> {
        let packs = number < FILLS / 2;
        let byte = |at: usize| if packs { (at % 61) as u8 } else { 0 };
        let mask = if packs { 1 } else { 255 };
        // Lengths that are no multiple of anything: neighbouring sectors differ.
        (0..4999 + 2 * number).map(|at| byte(at) ^ (rng.bits() & mask) as u8).collect()
    };
    (0..FILLS).map(fill).collect()
}

fn world<F: Future + 'static>(make: impl FnOnce(Core) -> F) -> F::Output
where
    F::Output: 'static,
{
    let config = SimConfig { steps_max: u64::MAX, ..SimConfig::new(1).calm() };
    Sim::new(config).block_on(0, make)
}

async fn apply(disk: &Disk, ops: &[Op], fills: &[Vec<u8>]) {
    for op in ops {
        match op {
            Op::Packed { at, len, fill } => {
                let bytes = filled(&fills[*fill], *len);
                let buf = disk.core().pool().alloc(bytes.len());
                buf.copy_from(0, &bytes);
                let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
                disk.write(*at, buf, flags).await.expect("a compressed write");
            }
            Op::Write { at, len, fill } => {
                crate::layers::write(disk, *at, &filled(&fills[*fill], *len)).await;
            }
            Op::Zero { at, len, unmap } => {
                let flags = ZeroFlags { may_unmap: *unmap, ..ZeroFlags::default() };
                disk.write_zeroes(*at, *len, flags).await.expect("zeroes");
            }
        }
    }
}

/// Makes a chain of images, base first, by our engine; the files' bytes.
fn made_by_us(plans: &[Plan], fills: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let (plans, fills) = (plans.to_vec(), fills.to_vec());
    world(|core| async move {
        let mut chain = Vec::new();
        for plan in plans {
            let backing = (!chain.is_empty())
                .then(|| BackingRef { file: name(chain.len() - 1), format: Some("qcow2".into()) });
            let options = CreateOptions {
                version: plan.version,
                cluster_size: 1 << plan.cluster_bits,
                backing,
                ..CreateOptions::new(plan.size)
            };
            chain.push(crate::layers::make(&core, options).await);
            let host = crate::layers::host(&core);
            let node = crate::layers::open(&host, &chain).await;
            let disk = host.attach(&node).expect("the image is free");
            apply(&disk, &plan.ops, &fills).await;
            drop((disk, node));
            host.close().await.expect("the image closes");
        }
        chain.iter().map(|image| image.to_bytes()).collect()
    })
}

fn run(folder: &Path, program: &str, arguments: &[String]) -> String {
    let output = Command::new(program).current_dir(folder).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} is needed: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

/// Makes the same chain by the peer's tools.
fn made_by_the_peer(folder: &Path, plans: &[Plan], fills: &[Vec<u8>]) -> Vec<Vec<u8>> {
    for (number, fill) in fills.iter().enumerate() {
        std::fs::write(folder.join(format!("fill{number}")), fill).expect("is written");
    }
    let mut chain = Vec::new();
    for (depth, plan) in plans.iter().enumerate() {
        let compat = if plan.version == 2 { "0.10" } else { "1.1" };
        let cluster = 1_u64 << plan.cluster_bits;
        let options = format!("compat={compat},cluster_size={cluster}");
        let mut create = words(&format!("create -q -f qcow2 -o {options}"));
        if let Some(below) = depth.checked_sub(1) {
            create.extend(words(&format!("-F qcow2 -b {}", name(below))));
        }
        create.extend([name(depth), plan.size.to_string()]);
        run(folder, "qemu-img", &create);
        let mut io = words("-t unsafe -d unmap -f qcow2");
        io.push(name(depth));
        for op in &plan.ops {
            io.push("-c".into());
            io.push(match op {
                Op::Packed { at, len, fill } => format!("write -q -c -s fill{fill} {at} {len}"),
                Op::Write { at, len, fill } => format!("write -q -s fill{fill} {at} {len}"),
                Op::Zero { at, len, unmap: true } => format!("write -q -z -u {at} {len}"),
                Op::Zero { at, len, unmap: false } => format!("write -q -z {at} {len}"),
            });
        }
        let said = run(folder, "qemu-io", &io);
        assert!(said.trim().is_empty(), "qemu-io: {said}");
        chain.push(std::fs::read(folder.join(name(depth))).expect("is read"));
    }
    chain
}

/// The file of the image at `depth`, 0 being the base.
fn name(depth: usize) -> String {
    format!("image{depth}.qcow2")
}

/// The whole disk as we read it, through the chain.
fn read_by_us(chain: &[Vec<u8>]) -> Vec<u8> {
    let chain: Vec<_> = chain.iter().map(|bytes| Memory::from_bytes(bytes)).collect();
    world(|core| async move {
        let host = crate::layers::host(&core);
        let node = crate::layers::open(&host, &chain).await;
        let size = node.size();
        let disk = host.attach(&node).expect("the image is free");
        let mut all = Vec::new();
        while (all.len() as u64) < size {
            let len = (size - all.len() as u64).min(1 << 20);
            all.extend(crate::layers::read(&disk, all.len() as u64, len as usize).await);
        }
        drop((disk, node));
        host.close().await.expect("the image closes");
        all
    })
}

fn opened(path: &Path) -> std::io::Result<FormatAccess<File>> {
    let image = Qcow2::<File>::builder_path(path).open(PermissiveImplicitOpenGate::default())?;
    Ok(FormatAccess::new(image))
}

/// The same as imago reads it, which follows the references in the headers: all of it, then pieces
/// that begin and end anywhere.
fn read_by_imago(path: &Path, expected: &[u8], rng: &mut Rng) -> Vec<u8> {
    let image = opened(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(image.size(), expected.len() as u64);
    let mut all = vec![0xa5; expected.len()];
    for (number, piece) in all.chunks_mut(777_777).enumerate() {
        image.read(piece, number as u64 * 777_777).expect("imago reads");
    }
    for _ in 0..60 {
        let at = (rng.bits() % expected.len() as u64) as usize;
        let len = (1 + rng.bits() % 9000).min((expected.len() - at) as u64) as usize;
        let mut piece = vec![0x5a; len];
        image.read(piece.as_mut_slice(), at as u64).expect("imago reads");
        assert!(piece == expected[at..at + len], "{at} {len}");
    }
    all
}

fn expect_equal(what: &str, found: &[u8], model: &[u8]) {
    let wrong = found.iter().zip(model).position(|(found, model)| found != model);
    assert_eq!((found.len(), wrong), (model.len(), None), "{what}: length, first wrong byte");
}

/// The image of one case in a folder of its own; the path of the top.
fn written(folder: &Path, chain: &[Vec<u8>]) -> PathBuf {
    for (depth, bytes) in chain.iter().enumerate() {
        std::fs::write(folder.join(name(depth)), bytes).expect("is written");
    }
    folder.join(name(chain.len() - 1))
}

#[test]
fn a_second_reader_the_model_and_we_read_the_same() {
    let mut rng = Rng::new(2026);
    let mut kinds = [0; 2];
    let mut cases = 0;
    for (cluster_bits, size) in DISKS {
        for (version, layers, ours) in [2, 3]
            .into_iter()
            .flat_map(|version| [1, 2].map(|layers| (version, layers)))
            .flat_map(|(version, layers)| [true, false].map(|ours| (version, layers, ours)))
        {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let fills = fills(&mut rng);
            let mut plans = Vec::new();
            if layers == 2 {
                // Shorter than the disk above, with other clusters.
                let size = size / 4 * 3 / 512 * 512;
                plans.push(Plan::new(5 - version, 14, size, &mut rng));
            }
            plans.push(Plan::new(version, cluster_bits, size, &mut rng));
            let model = plans.iter().fold(Vec::new(), |below, plan| plan.model(&below, &fills));
            let who = if ours { "by us" } else { "by the peer" };
            let case = format!("version {version}, 2^{cluster_bits}, {layers} layers, {who}");
            let chain = match ours {
                true => made_by_us(&plans, &fills),
                false => made_by_the_peer(folder.path(), &plans, &fills),
            };
            let top = written(folder.path(), &chain);
            expect_equal(&format!("{case}: we read"), &read_by_us(&chain), &model);
            let theirs = read_by_imago(&top, &model, &mut rng);
            expect_equal(&format!("{case}: imago reads"), &theirs, &model);
            let map = format!("map -f qcow2 --output=json {}", name(chain.len() - 1));
            let map = run(folder.path(), "qemu-img", &words(&map));
            for (seen, kind) in
                kinds.iter_mut().zip(["\"compressed\": true", "\"present\": true, \"zero\": true"])
            {
                *seen += usize::from(map.contains(kind));
            }
            cases += 1;
        }
    }
    println!("{cases} images; compressed clusters in {}, zero clusters in {}", kinds[0], kinds[1]);
    assert!(kinds[0] >= cases / 2 && kinds[1] >= cases / 4, "{kinds:?} of {cases}");
}

/// What imago 0.2.6 refuses, with the bit that it names: it knows no incompatible feature but the
/// external data file.
const REFUSED: [(&str, &str); 3] = [
    ("compression_type=zstd", "feature(s) 3 "),
    ("extended_l2=on", "feature(s) 4 "),
    ("the dirty bit", "feature(s) 0 "),
];

#[test]
fn what_the_second_reader_cannot_open_is_known() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (what, expected) in REFUSED {
        let mut bytes = world(|core| async move {
            let options = CreateOptions {
                extended_l2: what.starts_with("extended"),
                compression_type: match what.ends_with("zstd") {
                    true => CompressionType::Zstd,
                    false => CompressionType::Zlib,
                },
                ..CreateOptions::new(1 << 20)
            };
            crate::layers::make(&core, options).await.to_bytes()
        });
        if what == "the dirty bit" {
            bytes[79] |= 1;
        }
        let path = written(folder.path(), &[bytes]);
        let Err(error) = opened(&path) else { panic!("imago opens {what} now: compare it too") };
        assert!(error.to_string().contains(expected), "{what}: {error}");
    }
}
