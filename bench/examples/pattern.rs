//! The requests of `qemu-img bench` on the engine, for runs beside it: `count` requests of `size`
//! bytes, `depth` at a time, each `step` bytes behind the one before, around the disk.
//!
//! Prints what qemu-img prints: "Run completed in ... seconds." Arguments:
//! `count depth size step read|write direct|cached IMAGE...` (qcow2 images, base first).

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Instant;

use liveblk::{BackingSource, HostError, OpenNode, WriteFlags};

const USAGE: &str = "usage: pattern COUNT DEPTH SIZE STEP read|write direct|cached IMAGE...";

struct Pattern {
    count: u64,
    depth: usize,
    size: u64,
    step: u64,
    write: bool,
    direct: bool,
    images: Vec<PathBuf>,
}

impl Pattern {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Option<Self> {
        let mut number = || arguments.next()?.parse::<u64>().ok();
        let (count, depth, size, step) = (number()?, number()?, number()?, number()?);
        let write = arguments.next()? == "write";
        let direct = arguments.next()? == "direct";
        let images: Vec<_> = arguments.map(PathBuf::from).collect();
        let depth = usize::try_from(depth).ok()?;
        let sound = depth > 0 && size > 0 && !images.is_empty();
        sound.then_some(Self { count, depth, size, step, write, direct, images })
    }
}

fn main() -> Result<(), HostError> {
    let Some(pattern) = Pattern::parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        std::process::exit(2);
    };
    liveblk::run(move |host| async move {
        let mut below: Option<OpenNode> = None;
        for (index, path) in pattern.images.iter().enumerate() {
            let mut spec = host.image(path, "qcow2");
            spec.options.direct = pattern.direct;
            spec.writable = pattern.write && index + 1 == pattern.images.len();
            spec.monitor_owned = index + 1 == pattern.images.len();
            spec.backing = below
                .take()
                .map_or(BackingSource::None, |below| BackingSource::Open(Box::new(below)));
            below = Some(spec);
        }
        let top = below.expect("invariant: there is an image");
        let node = host.open(top.named("disk")).await?;
        let user = liveblk::engine::node::User::Guest { name: "pattern".into() };
        let disk = liveblk::Disk::attach(&node, user, pattern.write)?;
        let len = usize::try_from(pattern.size).unwrap_or(usize::MAX);
        let buffers: Vec<_> = (0..pattern.depth).map(|_| host.space(len)).collect();
        let mut flying = VecDeque::with_capacity(pattern.depth);
        let (mut offset, end) = (0, disk.size() - pattern.size);
        let begun = Instant::now();
        for number in 0..pattern.count {
            if flying.len() == pattern.depth {
                let oldest: liveblk::engine::node::Receipt = flying.pop_front().expect("full");
                oldest.await?;
            }
            let slot = usize::try_from(number % pattern.depth as u64).unwrap_or(0);
            let buf = buffers[slot].clone();
            flying.push_back(if pattern.write {
                disk.write(offset, buf, WriteFlags::default())
            } else {
                disk.read(offset, buf)
            });
            offset += pattern.step;
            if offset > end {
                offset %= disk.size();
                offset = offset.min(end);
            }
        }
        for receipt in flying {
            receipt.await?;
        }
        println!("Run completed in {:.6} seconds.", begun.elapsed().as_secs_f64());
        drop(disk);
        Ok(())
    })
}
