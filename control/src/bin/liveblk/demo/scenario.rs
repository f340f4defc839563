//! What the demo does, step by step, on an engine core.
//!
//! Each step reports its progress and ends with a line of figures; the first thing that is wrong
//! (a job's error, a block that the guest does not recognise) ends the demo with that text.

use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::mpsc::Sender;

use liveblk::engine::executor::{Class, JoinHandle};
use liveblk::engine::node::Origin;
use liveblk::{Disk, Host, HostError, Job, Node, WriteFlags};

use super::guest::{self, Running};
use super::images;

/// What the main thread shows.
pub(crate) enum Update {
    /// A step begins.
    Begin(&'static str),
    /// It has done this many bytes of so many.
    Progress(u64, u64),
    /// It ended with these figures.
    End(String),
}

/// The demo's inputs.
pub(crate) struct Scenario {
    pub(crate) folder: PathBuf,
    pub(crate) size: u64,
    pub(crate) updates: Sender<Update>,
}

/// Why the demo stopped, as text.
pub(crate) type Outcome = Result<(), String>;

/// How often progress is reported, in nanoseconds.
const REPORT_NS: u64 = 50_000_000;

/// Writes one counter alternately to two disks, so that a cut between them would show.
struct Pair {
    disks: [Disk; 2],
    offsets: [u64; 2],
    stopping: Cell<bool>,
}

impl Pair {
    fn start(disks: [Disk; 2]) -> (Rc<Self>, JoinHandle<Result<u64, liveblk::Error>>) {
        let offsets = [disks[0].size() - 4096, disks[1].size() - 4096];
        let pair = Rc::new(Self { disks, offsets, stopping: Cell::new(false) });
        let core = pair.disks[0].core().clone();
        let worker = Rc::clone(&pair);
        let task = core.spawn(Class::Guest, async move { worker.count().await });
        (pair, task)
    }

    async fn count(&self) -> Result<u64, liveblk::Error> {
        let mut counter = 0_u64;
        while !self.stopping.get() {
            counter += 1;
            for (disk, offset) in self.disks.iter().zip(self.offsets) {
                let buf = disk.core().pool().zeroed(512);
                buf.copy_from(0, &counter.to_be_bytes());
                disk.write(offset, buf, WriteFlags::default()).await?;
            }
        }
        Ok(counter)
    }
}

impl Scenario {
    /// Runs all steps.
    pub(crate) async fn run(self, host: Host) -> Result<Outcome, HostError> {
        self.begin("prepare: a chain of two images with old data, and a second disk");
        let first = images::new_chain(&host, &self.folder, self.size).await?;
        let second =
            images::new_image(&host, &self.folder, images::SECOND, "second", self.size / 8).await?;
        let disks = [host.attach(&first)?, host.attach(&second)?];
        self.end(format!("{} and {} MiB", self.size >> 20, self.size >> 23));
        let guest = Running::start(&disks[0], self.size / 2);
        let steps = self.steps(&host, &disks, [&first, &second], &guest).await;
        let guest = guest.stop().await?;
        Ok(match steps {
            Ok(Ok(())) => match guest.check() {
                Ok(()) => self.finish(&host, &disks[0], &guest).await?,
                wrong => wrong,
            },
            Ok(wrong) => wrong,
            Err(error) => Err(error.to_string()),
        })
    }

    async fn steps(
        &self,
        host: &Host,
        disks: &[Disk; 2],
        nodes: [&Rc<Node>; 2],
        guest: &Running,
    ) -> Result<Outcome, HostError> {
        if let Err(wrong) = self.snapshot(host, disks, nodes, guest).await? {
            return Ok(Err(wrong));
        }
        if let Err(wrong) = self.mirror(host, &disks[0], guest).await? {
            return Ok(Err(wrong));
        }
        self.backup(host, &disks[0], guest).await
    }

    async fn snapshot(
        &self,
        host: &Host,
        disks: &[Disk; 2],
        nodes: [&Rc<Node>; 2],
        guest: &Running,
    ) -> Result<Outcome, HostError> {
        self.begin("snapshot: both disks at one instant");
        let (pair, counting) = Pair::start(disks.clone());
        host.core().sleep(300_000_000).await;
        guest.take_figures();
        let overlays = images::OVERLAYS.map(|name| self.folder.join(name));
        let begun = host.core().now();
        host.snapshot(&[("disk", &overlays[0], "disk-c"), ("second", &overlays[1], "second-c")])
            .await?;
        let took = host.core().now() - begun;
        host.core().sleep(100_000_000).await;
        pair.stopping.set(true);
        counting.await?;
        let mut counters = [0; 2];
        for ((node, offset), counter) in nodes.into_iter().zip(pair.offsets).zip(&mut counters) {
            let buf = host.space(512);
            node.read(offset, buf.clone(), Origin::External).await?;
            *counter = buf.u64_be(0).unwrap_or(0);
        }
        if counters[0] != counters[1] && counters[0] != counters[1] + 1 {
            return Ok(Err(format!("the snapshots are not of one instant: {counters:?}")));
        }
        let served = disks.each_ref().map(Disk::node_name);
        self.end(format!(
            "{} ms; counters {} and {}: one cut; the guest goes on at {} and {}; {}",
            took / 1_000_000,
            counters[0],
            counters[1],
            served[0],
            served[1],
            stall(guest)
        ));
        Ok(guest.check())
    }

    async fn mirror(
        &self,
        host: &Host,
        disk: &Disk,
        guest: &Running,
    ) -> Result<Outcome, HostError> {
        self.begin("mirror: the whole disk to a new image, then pivot");
        let target =
            images::new_image(host, &self.folder, images::NEW_HOME, "disk-e", self.size).await?;
        guest.take_figures();
        let begun = host.core().now();
        let job = host.mirror("mirror0", &disk.node(), &target).await?;
        self.watch(host, &job, true).await;
        host.ready(&job).await?;
        let ready = host.core().now() - begun;
        host.complete(&job).await?;
        let requests = guest.requests();
        if disk.node().id() != target.id() {
            return Ok(Err("the disk did not move to the mirror's target".into()));
        }
        self.end(format!(
            "{} ready after {} ms; the guest made {requests} requests meanwhile; {}",
            rate(job.copied(), ready),
            ready / 1_000_000,
            stall(guest)
        ));
        Ok(guest.check())
    }

    async fn backup(
        &self,
        host: &Host,
        disk: &Disk,
        guest: &Running,
    ) -> Result<Outcome, HostError> {
        self.begin("backup: the disk as it is at one instant");
        let target =
            images::new_image(host, &self.folder, images::BACKUP, "backup", self.size).await?;
        guest.take_figures();
        let floor = guest.floor();
        let begun = host.core().now();
        let job = host.backup("backup0", &disk.node(), &target).await?;
        let ceiling = guest.ceiling();
        self.watch(host, &job, false).await;
        host.wait(&job).await?;
        let took = host.core().now() - begun;
        let figures = stall(guest);
        let piece = host.space(1 << 20);
        for at in (0..self.size / 2).step_by(1 << 20) {
            target.read(at, piece.clone(), Origin::External).await?;
            let first = at / guest::BLOCK;
            if let Err(wrong) = guest::check_versions(first, &piece.to_vec(), &floor, &ceiling) {
                return Ok(Err(format!("the backup is wrong: {wrong}")));
            }
        }
        self.end(format!(
            "{} in {} ms; it holds every write answered before it and none sent after ({} blocks \
             checked); {figures}",
            rate(job.copied(), took),
            took / 1_000_000,
            floor.len()
        ));
        Ok(guest.check())
    }

    /// With the guest stopped: a copy of the idle disk is identical to it.
    async fn finish(
        &self,
        host: &Host,
        disk: &Disk,
        guest: &guest::Guest,
    ) -> Result<Outcome, HostError> {
        self.begin("verify: the guest stops; its disk, a copy of it, and what it wrote");
        let target = images::new_image(host, &self.folder, images::COPY, "copy", self.size).await?;
        let job = host.backup("backup1", &disk.node(), &target).await?;
        self.watch(host, &job, false).await;
        host.wait(&job).await?;
        if let Some(offset) = images::compare(host, &disk.node(), &target).await? {
            return Ok(Err(format!("images differ at offset {offset}")));
        }
        let (floor, ceiling) = (guest.floor(), guest.ceiling());
        let piece = host.space(1 << 20);
        for at in (0..self.size / 2).step_by(1 << 20) {
            disk.read(at, piece.clone()).await?;
            let first = at / guest::BLOCK;
            if let Err(wrong) = guest::check_versions(first, &piece.to_vec(), &floor, &ceiling) {
                return Ok(Err(format!("the disk is wrong: {wrong}")));
            }
        }
        self.end("images are identical; every block is the one that the guest wrote last".into());
        Ok(Ok(()))
    }

    /// Reports progress until `job` is ready (or over).
    async fn watch(&self, host: &Host, job: &Rc<Job>, until_ready: bool) {
        loop {
            let (done, total) = (job.copied(), job.total());
            // The main thread is gone only if it failed to draw: the demo goes on.
            let _ = self.updates.send(Update::Progress(done, total));
            let status = job.status();
            if status.is_completed() || (until_ready && status == liveblk::Status::Ready) {
                return;
            }
            host.core().sleep(REPORT_NS).await;
        }
    }

    fn begin(&self, title: &'static str) {
        let _ = self.updates.send(Update::Begin(title));
    }

    fn end(&self, figures: String) {
        let _ = self.updates.send(Update::End(figures));
    }
}

fn stall(guest: &Running) -> String {
    let (_, stall) = guest.take_figures();
    let tenths = stall / 100_000;
    format!("longest guest stall {}.{} ms", tenths / 10, tenths % 10)
}

/// Bytes and rate as people read them.
fn rate(bytes: u64, nanos: u64) -> String {
    let mib = bytes >> 20;
    let per_second = (bytes.saturating_mul(1000) / (nanos / 1_000_000).max(1)) >> 20;
    format!("{mib} MiB at {per_second} MiB/s")
}
