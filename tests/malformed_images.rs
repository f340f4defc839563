//! Images that lie: whatever a file claims, nothing panics, nothing takes long, memory stays
//! bounded, and no guest write lands in metadata (reliability rows Q10, Q13, Q14, R6, R11, R14).
//!
//! Some hundred damaged images, made byte by byte, go through a read-only open, a writable open
//! with reads, writes, zeroes, discards, flush and close, a check and a repair, on storage in
//! memory. Whether they open is compared with the peer.

#![expect(unsafe_code, reason = "a global allocator is an unsafe trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::process::Command;
use std::rc::Rc;

use liveblk::engine::buf::Buf;
use liveblk::engine::driver::sim::{Sim, SimConfig};
use liveblk::engine::executor::Core;
use liveblk::engine::format::ReferencePolicy;
use liveblk::engine::node::ZeroFlags;
use liveblk::engine::storage::{File, FileOptions, Storage};
use liveblk::formats::qcow2::{Repair, check, repair};
use liveblk::{BackingSource, Host, OpenNode, WriteFlags};

#[path = "../formats/src/qcow2/tests/mutations.rs"]
mod mutations;
#[path = "../formats/src/qcow2/tests/specimen.rs"]
#[allow(dead_code, reason = "the tests of the crate use the rest")]
mod specimen;

use mutations::{Variant, variants};
use specimen::Specimen;

/// Bytes that one image may take while it is opened, used, checked or repaired: its metadata bound
/// and the caches. What the simulated file holds comes on top.
const MEMORY_MAX: i64 = 104 << 20;

/// Processor time that one step with one image may take, also without optimisation.
const NANOS_MAX: u64 = 1_000_000_000;

/// Bytes to which a file may grow.
const FILE_MAX: u64 = 2 << 30;

/// What guests write, found nowhere else.
const MARK: [u8; 16] = *b"<guest's content";

struct Counting;

thread_local! {
    static LIVE: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

fn count(bytes: i64) {
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

fn size(layout: Layout) -> i64 {
    i64::try_from(layout.size()).unwrap_or(i64::MAX)
}

// SAFETY: every call is passed on to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(size(layout));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(size(layout));
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-size(layout));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(i64::try_from(bytes).unwrap_or(i64::MAX) - size(layout));
        // SAFETY: the caller's promise.
        unsafe { System.realloc(memory, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Nanoseconds of processor time of this thread.
fn cpu_time() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|field| field.parse().ok()).unwrap_or(0)
}

/// Runs `step` on the file of `sim` and demands its bounds.
fn bounded<F: Future<Output = ()> + 'static>(
    sim: &mut Sim,
    name: &str,
    step: impl FnOnce(Core) -> F,
) {
    let nanos = in_memory_max(sim, name, step);
    assert!(nanos < NANOS_MAX, "{name}: {nanos} ns");
    let size = sim.fs().size("/image").unwrap_or(0);
    assert!(size < FILE_MAX, "{name}: the file grew to {size}");
}

/// Runs `step` on the file of `sim` and demands its bound of memory; answers its processor time.
fn in_memory_max<F: Future<Output = ()> + 'static>(
    sim: &mut Sim,
    name: &str,
    step: impl FnOnce(Core) -> F,
) -> u64 {
    let used = |sim: &Sim| i64::try_from(sim.fs().used()).unwrap_or(i64::MAX);
    let (live, file, start) = (LIVE.get(), used(sim), cpu_time());
    PEAK.set(live);
    sim.block_on(0, step);
    let nanos = cpu_time().saturating_sub(start);
    let peak = PEAK.get() - live - 2 * (used(sim) - file).max(0);
    assert!(peak < MEMORY_MAX, "{name}: {peak} bytes");
    println!("{name}: {peak} bytes, {nanos} ns");
    nanos
}

async fn storage(core: &Core, writable: bool) -> Storage {
    let options = FileOptions { path: "/image".into(), writable, ..FileOptions::default() };
    Storage::File(File::open(core, options).await.expect("the file is there"))
}

/// Opens the image and attaches to it, if that is possible.
async fn disk(core: &Core, writable: bool) -> Option<(Host, liveblk::Disk)> {
    let host = Host::on(core, ReferencePolicy::Explicit);
    let mut spec = OpenNode::new("qcow2", "/image").named("image");
    spec.backing = BackingSource::None;
    spec.writable = writable;
    spec.monitor_owned = true;
    let node = host.open(spec).await.ok()?;
    let disk = if writable {
        host.attach(&node).ok()?
    } else {
        let user = liveblk::engine::node::User::Guest { name: "eye".into() };
        liveblk::Disk::attach(&node, user, false).ok()?
    };
    Some((host, disk))
}

/// Guest offsets at which something is done, in both tables.
fn offsets(specimen: &specimen::Specimen) -> Vec<u64> {
    let cluster = specimen.cluster();
    let first = [0, 1, 2, 4, 5, 6, 9].map(|index| index * cluster);
    let second = [0, 1, 2].map(|index| specimen.span() + index * cluster);
    first.into_iter().chain(second).collect()
}

async fn look(core: Core, offsets: Vec<u64>) {
    let Some((host, disk)) = disk(&core, false).await else { return };
    for offset in offsets {
        let buf = core.pool().alloc(4096);
        drop(disk.read(offset, buf).await);
    }
    drop(disk);
    drop(host.close().await);
}

async fn work(core: Core, offsets: Vec<u64>, cluster: u64) {
    let Some((host, disk)) = disk(&core, true).await else { return };
    let marked = |len: usize| Buf::from_vec(MARK.repeat(len / MARK.len()));
    for (at, offset) in offsets.iter().enumerate() {
        drop(disk.read(*offset, core.pool().alloc(512)).await);
        let len = if at % 2 == 0 { 512 } else { usize::try_from(cluster).unwrap_or(512) };
        drop(disk.write(*offset, marked(len), WriteFlags::default()).await);
    }
    drop(disk.flush().await);
    let (first, last) = (offsets.first().copied().unwrap_or(0), offsets.last().copied());
    drop(disk.discard(first, cluster, false).await);
    drop(disk.write_zeroes(last.unwrap_or(0), cluster, ZeroFlags::default()).await);
    drop(disk.write(first, marked(1 << 16), WriteFlags::default()).await);
    drop(disk.flush().await);
    drop(disk);
    drop(host.close().await);
}

fn world(variant: &Variant) -> Sim {
    let sim = Sim::new(SimConfig::new(1).calm());
    sim.fs().create("/image", &variant.specimen.bytes);
    sim
}

/// The clusters that held metadata still do: none of them holds what the guest wrote.
fn expect_no_guest_data_in_metadata(sim: &Sim, variant: &Variant) {
    let specimen = &variant.specimen;
    let places = &specimen.places;
    let metadata =
        [0, places.reftable, places.block, places.l1, places.snapshots, places.snapshot_l1];
    for place in metadata.into_iter().enumerate().filter(|(at, place)| *at == 0 || *place != 0) {
        let mut bytes = vec![0; usize::try_from(specimen.cluster()).unwrap_or(0)];
        if !sim.fs().read_at("/image", place.1, &mut bytes) {
            continue;
        }
        let found = bytes.chunks(MARK.len()).any(|piece| piece == MARK);
        assert!(!found, "{}: guest data in the metadata at {:#x}", variant.name, place.1);
    }
}

#[test]
fn no_damaged_image_panics_hangs_takes_memory_or_lets_guests_into_metadata() {
    let all = variants();
    assert!(all.len() > 500, "{}", all.len());
    for variant in all {
        let offsets = offsets(&variant.specimen);
        let name = variant.name.clone();
        let cluster = variant.specimen.cluster();
        bounded(&mut world(&variant), &format!("{name}, read"), |core| look(core, offsets.clone()));
        let mut sim = world(&variant);
        bounded(&mut sim, &format!("{name}, write"), |core| work(core, offsets.clone(), cluster));
        // Where the variant moves or empties these tables, their old places are free to use.
        if !name.starts_with("header-") && !name.contains("count") && !name.contains("reftable") {
            expect_no_guest_data_in_metadata(&sim, &variant);
        }
        let mut sim = world(&variant);
        bounded(&mut sim, &format!("{name}, check"), |core| async move {
            drop(check(&core, &storage(&core, false).await).await);
        });
        bounded(&mut sim, &format!("{name}, repair"), |core| async move {
            drop(repair(&core, &storage(&core, true).await, Repair::All).await);
        });
        bounded(&mut sim, &format!("{name}, use after repair"), |core| {
            work(core, offsets.clone(), cluster)
        });
    }
}

/// A file of `bytes` that claims the largest tables there may be: every L1 entry, and with `blocks`
/// every entry of the refcount table, names another cluster inside the file, `stride` clusters from
/// the one before.
fn crowded(stride: u64, blocks: bool) -> (Specimen, u64) {
    const ENTRIES: u64 = 4 << 20;
    const BLOCKS: u64 = 1 << 20;
    let mut specimen = Specimen::new(specimen::PLAIN);
    let (l1, reftable) = (specimen.bytes.len() as u64, specimen.bytes.len() as u64 + 8 * ENTRIES);
    let first = (reftable + 8 * BLOCKS) / specimen.cluster();
    let word = |specimen: &Specimen, at: u64| {
        let at = usize::try_from(at).expect("small");
        u64::from_be_bytes(specimen.bytes[at..at + 8].try_into().expect("eight bytes"))
    };
    let place = |number: u64| (first + number * stride) * specimen.cluster();
    let places = specimen.places.clone();
    let mut table = Vec::new();
    for index in 0..ENTRIES {
        let old = word(&specimen, places.l1 + 8 * index.min(1));
        table.push(if index < 2 { old } else { place(index) | specimen::COPIED });
    }
    for index in 0..BLOCKS {
        let old = word(&specimen, places.reftable + 8 * index.min(1));
        let new = if blocks { place(ENTRIES + index) } else { 0 };
        table.push(if index < 1 { old } else { new });
    }
    let size = place(ENTRIES + BLOCKS);
    specimen.bytes.extend(table.iter().flat_map(|word| word.to_be_bytes()));
    specimen.set(36, 4, ENTRIES);
    specimen.set(40, 8, l1);
    specimen.set(48, 8, reftable);
    specimen.set(56, 4, 8 * BLOCKS / specimen.cluster());
    (specimen, size)
}

/// Row R11: the memory that tables cost follows from their size, not from what they name.
#[test]
fn tables_that_name_millions_of_clusters_take_bounded_memory() {
    for (name, stride, blocks) in
        [("side by side", 1, false), ("far apart", 1 << 21, false), ("both tables", 1 << 20, true)]
    {
        let (specimen, size) = crowded(stride, blocks);
        let mut sim = Sim::new(SimConfig::new(1).calm());
        sim.fs().create("/image", &specimen.bytes);
        let cluster = specimen.cluster();
        let data: Vec<u8> = (0..4096).map(|at| specimen.expected(at)).collect();
        drop(specimen);
        sim.block_on(0, |core| async move {
            let storage = storage(&core, true).await;
            storage.truncate(size).await.expect("the file is sparse");
        });
        let nanos = in_memory_max(&mut sim, &format!("{name}, read"), |core| async move {
            let (host, disk) = disk(&core, false).await.expect("opens");
            let buf = core.pool().alloc(4096);
            disk.read(0, buf.clone()).await.expect("reads");
            assert!(buf.to_vec() == data);
            drop(disk);
            host.close().await.expect("closes");
        });
        assert!(nanos < 5 * NANOS_MAX, "{name}: {nanos} ns");
        let nanos = in_memory_max(&mut sim, &format!("{name}, write"), |core| async move {
            work(core, vec![0, 9 * cluster, 20 * cluster], cluster).await;
        });
        assert!(nanos < 5 * NANOS_MAX, "{name}: {nanos} ns");
    }
}

/// Where our verdict on opening is not the peer's, and why.
const VERDICTS: [(&str, &str); 9] = [
    ("bitmap", "bad bitmaps need not keep a read-only image closed; the peer refuses all of it"),
    ("extension-backing-format", "longer names of formats are only names; the peer has 16 bytes"),
    ("extension-encryption", "the extension means nothing in an image that is not encrypted"),
    ("reftable-offset", "a table over the header, or far behind the end, cannot be one"),
    ("header-snapshots-", "a snapshot table over the header cannot be one"),
    ("header-incompatible-0x7", "a data file without a name is asked for from the caller"),
    ("snapshot-extra-size", "unknown data of snapshots is looked at when they are used"),
    ("cut-to", "missing tables are refused; the peer reads them as zeroes, which is wrong data"),
    ("all-snapshot", "snapshots are looked at when they are used"),
];

#[test]
fn images_open_where_they_open_for_the_peer() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("image");
    let mut different = Vec::new();
    for (at, variant) in variants().into_iter().enumerate() {
        if at % 3 != 0 {
            continue;
        }
        std::fs::write(&path, &variant.specimen.bytes).expect("is written");
        let output = Command::new("qemu-img")
            .args(["info", "-U", "-f", "qcow2"])
            .arg(&path)
            .output()
            .expect("qemu-img is needed");
        let theirs = output.status.success();
        let ours = Rc::new(Cell::new(false));
        let answer = Rc::clone(&ours);
        world(&variant).block_on(0, |core| async move {
            answer.set(disk(&core, false).await.is_some());
        });
        let listed = VERDICTS.iter().any(|(part, _)| variant.name.contains(part));
        if ours.get() != theirs && !listed {
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            different.push(format!(
                "{} ours {} theirs {theirs} {errors}",
                variant.name,
                ours.get()
            ));
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
}
