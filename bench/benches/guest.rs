//! Guest requests on the embedded API, without a front door: time per request by queue depth.
//!
//! Names are area/operation/parameter. The file lies in the current folder's file system; the page
//! cache serves it, so the engine's own cost is what is measured.

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use liveblk::{Disk, Host, HostError, WriteFlags};

const BLOCK: usize = 4096;
const DISK: u64 = 64 << 20;

#[derive(Clone, Copy)]
enum Operation {
    Read,
    Write,
}

/// Does `count` random 4 KiB requests at queue depth `depth`; the time they took.
async fn requests(
    host: &Host,
    disk: &Disk,
    operation: Operation,
    depth: u64,
    count: u64,
) -> Duration {
    let buffers: Vec<_> = (0..depth).map(|_| host.space(BLOCK)).collect();
    let mut flying = std::collections::VecDeque::with_capacity(buffers.len());
    let begun = Instant::now();
    for number in 0..count {
        let slot = usize::try_from(number % depth).expect("invariant: below the depth");
        if flying.len() == buffers.len() {
            let oldest: liveblk::engine::node::Receipt = flying.pop_front().expect("not empty");
            oldest.await.expect("the request succeeds");
        }
        let offset = host.core().random() % (DISK / BLOCK as u64) * BLOCK as u64;
        let buf = buffers[slot].clone();
        flying.push_back(match operation {
            Operation::Read => disk.read(offset, buf),
            Operation::Write => disk.write(offset, buf, WriteFlags::default()),
        });
    }
    for receipt in flying {
        receipt.await.expect("the request succeeds");
    }
    begun.elapsed()
}

/// Opens a fully written image of `driver` and runs `count` requests on it.
fn measure(driver: &'static str, operation: Operation, depth: u64, count: u64) -> Duration {
    let dir = tempfile::tempdir_in(".").expect("a folder can be made");
    let path = dir.path().join("disk");
    let run = liveblk::run(move |host| async move {
        if driver == "raw" {
            let file = std::fs::File::create(&path).and_then(|file| file.set_len(DISK));
            file.expect("a file can be made");
        } else {
            host.create(&path, driver, DISK).await?;
        }
        let mut spec = host.image(path, driver).named("disk");
        spec.options.direct = false;
        let node = host.open(spec).await?;
        let disk = host.attach(&node)?;
        for at in (0..DISK).step_by(1 << 20) {
            let block = host.space(1 << 20);
            block.fill(1);
            disk.write(at, block, WriteFlags::default()).await?;
        }
        disk.flush().await?;
        requests(&host, &disk, operation, depth, 1000).await;
        Ok::<_, HostError>(requests(&host, &disk, operation, depth, count).await)
    });
    run.expect("the bench runs")
}

fn guest(criterion: &mut Criterion) {
    for (name, operation) in [
        ("guest_read/4k_randread", Operation::Read),
        ("guest_write/4k_randwrite", Operation::Write),
    ] {
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements(1));
        for driver in ["raw", "qcow2"] {
            for depth in [1, 32] {
                group.bench_function(format!("{driver}/qd{depth}"), |bencher| {
                    bencher.iter_custom(|count| measure(driver, operation, depth, count));
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, guest);
criterion_main!(benches);
