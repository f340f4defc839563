//! The mapping of qcow2 images: a resolve in memory, opening a large image, reads through chains.
//!
//! `chain/4k_randread_cpu` reports the processor time of the core's thread (its kernel part
//! included) per read, not the time that passes. Before these rows, the depths are compared in turn
//! within one run, which is what a layer costs; beside each, in the same turn, what plain `pread`s
//! cost that are spread over the files of the chain as its data is: more files are more cache
//! misses in the kernel, which is no work of ours. Images lie in the current folder's file system;
//! the page cache serves them.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use liveblk::engine::address::GuestRange;
use liveblk::engine::executor::Core;
use liveblk::engine::format::{Extents, Preallocation};
use liveblk::engine::storage::{File, FileOptions, Storage};
use liveblk::formats::qcow2::{CreateOptions, create};
use liveblk::{BackingSource, Disk, Host, HostError, Node, OpenNode, WriteFlags};

const BLOCK: usize = 4096;
const DISK: u64 = 64 << 20;
const DEPTH: usize = 32;
/// Requests that one turn of a bench stands for: an image is opened and warmed for each sample.
const BATCH: u64 = 20_000;
/// Rounds of the interleaved comparison of depths, and reads of each depth in a round.
const ROUNDS: usize = 9;
const ROUND_READS: u64 = 100_000;

/// Makes an image at `path`.
async fn make(core: &Core, path: &Path, options: CreateOptions) {
    let file = FileOptions {
        path: path.to_owned(),
        writable: true,
        create_new: true,
        ..FileOptions::default()
    };
    let storage = Storage::File(File::open(core, file).await.expect("a file can be made"));
    create(core, &storage, options).await.expect("an image can be made");
}

/// Opens a chain, base first, through the page cache.
async fn open(host: &Host, chain: &[PathBuf]) -> Result<Rc<Node>, HostError> {
    let mut below: Option<OpenNode> = None;
    for (index, path) in chain.iter().enumerate() {
        let mut spec = host.image(path, "qcow2");
        spec.options.direct = false;
        spec.writable = index + 1 == chain.len();
        spec.monitor_owned = spec.writable;
        spec.backing =
            below.take().map_or(BackingSource::None, |below| BackingSource::Open(Box::new(below)));
        below = Some(spec);
    }
    let name = format!("disk{}", chain.len());
    host.open(below.expect("a chain has an image").named(&name)).await
}

/// Writes `len` bytes at `at`.
async fn fill(host: &Host, disk: &Disk, at: u64, len: usize) -> Result<(), HostError> {
    let block = host.space(len);
    block.fill(1);
    Ok(disk.write(at, block, WriteFlags::default()).await?)
}

/// Processor time of this thread so far.
fn processor_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("procfs is there");
    let spent = text.split(' ').next().and_then(|field| field.parse().ok());
    Duration::from_nanos(spent.expect("the first field is a time"))
}

/// The time of `count` resolves of 4 KiB in an image whose tables are in memory.
fn resolve(options: CreateOptions, count: u64) -> Duration {
    let dir = tempfile::tempdir_in(".").expect("a folder can be made");
    let path = dir.path().join("disk");
    let run = liveblk::run(move |host| async move {
        make(host.core(), &path, options).await;
        let node = open(&host, &[path]).await?;
        let disk = host.attach(&node)?;
        // Every other 64 KiB, so that neighbours do not continue each other.
        for at in (0..DISK).step_by(128 << 10) {
            fill(&host, &disk, at, 64 << 10).await?;
        }
        let format = node.format();
        let mut extents = Extents::new();
        let mut one = || {
            let at = host.core().random() % (DISK / BLOCK as u64) * BLOCK as u64;
            let lease = format.resolve(GuestRange::new(at, BLOCK as u64), &mut extents);
            std::hint::black_box(&extents);
            drop(lease);
        };
        (0..1000).for_each(|_| one());
        let begun = Instant::now();
        (0..count).for_each(|_| one());
        Ok::<_, HostError>(begun.elapsed())
    });
    run.expect("the bench runs")
}

/// The time of `count` opens of the image at `path`.
fn opens(path: &Path, count: u64) -> Duration {
    let chain = [path.to_owned()];
    let run = liveblk::run(move |host| async move {
        let mut spent = Duration::ZERO;
        for _ in 0..count {
            let begun = Instant::now();
            let node = open(&host, &chain).await?;
            spent += begun.elapsed();
            host.graph().remove(&node).await?;
        }
        Ok::<_, HostError>(spent)
    });
    run.expect("the bench runs")
}

/// The images of a chain, base first.
#[derive(Clone)]
struct Chain {
    images: Vec<PathBuf>,
    /// Which of them has each cluster.
    owners: Vec<usize>,
}

/// A chain of `depth` images in `dir`: a full base, and overlays that have a little each.
async fn chain(host: &Host, dir: &Path, depth: usize) -> Result<Chain, HostError> {
    let mut images = Vec::new();
    let mut owners = vec![0; (DISK >> 16) as usize];
    for layer in 0..depth {
        images.push(dir.join(format!("layer{layer}")));
        make(host.core(), &images[layer], CreateOptions::new(DISK)).await;
        let node = open(host, &images).await?;
        let disk = host.attach(&node)?;
        if layer == 0 {
            for at in (0..DISK).step_by(1 << 20) {
                fill(host, &disk, at, 1 << 20).await?;
            }
        }
        for _ in 0..if layer == 0 { 0 } else { 8 } {
            let cluster = host.core().random() % (DISK >> 16);
            fill(host, &disk, cluster << 16, 1 << 16).await?;
            owners[cluster as usize] = layer;
        }
        drop(disk);
        host.graph().remove(&node).await?;
    }
    Ok(Chain { images, owners })
}

/// The processor time of `count` plain reads of files that are spread as a chain's data is.
fn plain_reads(
    host: &Host,
    files: &[(std::fs::File, u64)],
    owners: &[usize],
    count: u64,
) -> Duration {
    let mut block = [0; BLOCK];
    let begun = processor_time();
    for _ in 0..count {
        let at = host.core().random() % (DISK / BLOCK as u64);
        let (file, blocks) = &files[owners[(at >> 4) as usize]];
        file.read_exact_at(&mut block, at % blocks * BLOCK as u64).expect("the file is there");
        std::hint::black_box(&block);
    }
    processor_time() - begun
}

/// Reads all of a disk once.
async fn warm(host: &Host, disk: &Disk) -> Result<(), HostError> {
    for at in (0..DISK).step_by(BLOCK) {
        disk.read(at, host.space(BLOCK)).await?;
    }
    Ok(())
}

/// Does `count` random reads; the processor time they took.
async fn reads(host: &Host, disk: &Disk, count: u64) -> Result<Duration, HostError> {
    let buffers: Vec<_> = (0..DEPTH).map(|_| host.space(BLOCK)).collect();
    let mut flying = std::collections::VecDeque::with_capacity(DEPTH);
    let begun = processor_time();
    for number in 0..count {
        if flying.len() == DEPTH {
            let oldest: liveblk::engine::node::Receipt = flying.pop_front().expect("full");
            oldest.await?;
        }
        let at = host.core().random() % (DISK / BLOCK as u64) * BLOCK as u64;
        flying.push_back(disk.read(at, buffers[number as usize % DEPTH].clone()));
    }
    for receipt in flying {
        receipt.await?;
    }
    Ok(processor_time() - begun)
}

/// The processor time of `count` random reads through a chain.
fn chain_reads(images: &[PathBuf], count: u64) -> Duration {
    let images = images.to_vec();
    let run = liveblk::run(move |host| async move {
        let node = open(&host, &images).await?;
        let disk = host.attach(&node)?;
        warm(&host, &disk).await?;
        let spent = reads(&host, &disk, count).await?;
        drop(disk);
        Ok::<_, HostError>(spent)
    });
    run.expect("the bench runs")
}

/// Compares depths within one run, in turn, with the first of them.
fn compare(chains: &[(usize, Chain)]) {
    let chains = chains.to_vec();
    let run = liveblk::run(move |host| async move {
        let mut open_chains = Vec::new();
        for (depth, chain) in &chains {
            let node = open(&host, &chain.images).await?;
            let disk = host.attach(&node)?;
            warm(&host, &disk).await?;
            let files = chain.images.iter().map(|path| {
                let file = std::fs::File::open(path).expect("the image is there");
                let blocks = file.metadata().expect("a file has a size").len() / BLOCK as u64;
                (file, blocks)
            });
            let files: Vec<_> = files.collect();
            open_chains.push((*depth, node, disk, files, &chain.owners, Vec::new(), Vec::new()));
        }
        let before: Vec<_> = open_chains.iter().map(|(_, node, ..)| node.chain_stats()).collect();
        for _ in 0..ROUNDS {
            for (_, _, disk, files, owners, spent, plain) in &mut open_chains {
                let time = reads(&host, disk, ROUND_READS).await?;
                spent.push(time.as_nanos() as f64 / ROUND_READS as f64);
                let time = plain_reads(&host, files, owners, ROUND_READS);
                plain.push(time.as_nanos() as f64 / ROUND_READS as f64);
            }
        }
        let Some((.., alone, plain_alone)) = open_chains.first() else { return Ok(()) };
        for ((depth, node, _, _, _, spent, plain), before) in open_chains.iter().zip(before) {
            let after = node.chain_stats();
            let floors = plain.iter().zip(plain_alone).map(|(here, alone)| here / alone).collect();
            let more = spent.iter().zip(plain).map(|(ours, plain)| ours - plain).collect();
            let hits = (after.lookups - before.lookups).max(1) as f64;
            let probes = (after.probes - before.probes) as f64 / hits;
            let ratios = spent.iter().zip(alone).map(|(here, alone)| here / alone).collect();
            let (cpu, ratios) = (spread(spent.clone()), spread(ratios));
            let index = after.bytes / (*depth as u64 - 1).max(1);
            eprintln!(
                "depth {depth}: {cpu} ns of CPU per read, {ratios} of depth 1; \
                 plain preads {} ns, {} of depth 1; more than plain {} ns; \
                 {probes:.3} probes per hit, {index} bytes of index per layer",
                spread(plain.clone()),
                spread(floors),
                spread(more),
            );
        }
        Ok::<_, HostError>(())
    });
    run.expect("the comparison runs");
}

/// Minimum, median and maximum.
fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or_default();
    format!("{:.3}/{:.3}/{:.3}", at(0), at(values.len() / 2), at(values.len().saturating_sub(1)))
}

fn mapping(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("mapping/resolve_hot");
    group.throughput(Throughput::Elements(1));
    for (name, cluster_size, extended_l2) in
        [("64k", 64 << 10, false), ("2M", 2 << 20, false), ("128k_subclusters", 128 << 10, true)]
    {
        group.bench_function(name, |bencher| {
            let options = CreateOptions { cluster_size, extended_l2, ..CreateOptions::new(DISK) };
            bencher.iter_custom(|count| {
                let spent = resolve(options.clone(), count * BATCH);
                spent / u32::try_from(BATCH).expect("small")
            });
        });
    }
    group.finish();
}

fn opening(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("mapping/open");
    group.sample_size(20);
    for (name, preallocation) in
        [("1T_empty", Preallocation::Off), ("1T_all_mapped", Preallocation::Metadata)]
    {
        let dir = tempfile::tempdir_in(".").expect("a folder can be made");
        let path = dir.path().join("disk");
        let made = path.clone();
        let run = liveblk::run(move |host| async move {
            let options = CreateOptions { preallocation, ..CreateOptions::new(1 << 40) };
            make(host.core(), &made, options).await;
            Ok::<_, HostError>(())
        });
        run.expect("an image can be made");
        group.bench_function(name, |bencher| bencher.iter_custom(|count| opens(&path, count)));
    }
    group.finish();
}

fn chains(criterion: &mut Criterion) {
    let dir = tempfile::tempdir_in(".").expect("a folder can be made");
    let at = dir.path().to_owned();
    let made = liveblk::run(move |host| async move {
        let mut chains = Vec::new();
        for depth in [1, 8, 32, 100] {
            let folder = at.join(format!("depth{depth}"));
            std::fs::create_dir(&folder).expect("a folder can be made");
            chains.push((depth, chain(&host, &folder, depth).await?));
        }
        Ok::<_, HostError>(chains)
    });
    let chains = made.expect("the chains can be made");
    compare(&chains);
    let mut group = criterion.benchmark_group("chain/4k_randread_cpu");
    group.throughput(Throughput::Elements(1)).sample_size(10);
    for (depth, chain) in &chains {
        let images = &chain.images;
        group.bench_function(format!("depth{depth}"), |bencher| {
            bencher.iter_custom(|count| {
                chain_reads(images, count * BATCH) / u32::try_from(BATCH).expect("small")
            });
        });
    }
    group.finish();
}

criterion_group!(benches, mapping, opening, chains);
criterion_main!(benches);
