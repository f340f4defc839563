//! The copy of `convert`: plan by the map, reads ahead, writes behind, both bounded.
//!
//! Order rules: (1) pieces are planned, read and written in ascending order, so that the target is
//! laid out in order; reads and writes of different pieces are in flight together; (2) a piece
//! counts as done when its write has ended; (3) the first failure stops the copy after what is in
//! flight has ended. What the source knows to be zeroes is not read; zeroes are written only where
//! the target does not read as zeroes already. Where it is asked for, blocks are shared with the
//! source instead of copied, as far as the file system can; those are not looked at for zeroes.

use std::collections::VecDeque;
use std::rc::Rc;

use liveblk::engine::address::GuestRange;
use liveblk::engine::buf::Buf;
use liveblk::engine::executor::Core;
use liveblk::engine::node::{MapExtent, Origin, Receipt, ShareRight, Shared};
use liveblk::engine::storage::Sharing;
use liveblk::{Host, Node, WriteFlags, ZeroFlags};

use super::failure::Failure;
use super::pieces::{self, Read, UNIT};
use super::progress::Progress;
use super::{map, source};

/// Bytes whose map is looked up at once.
const STEP: u64 = 256 << 20;

/// Most bytes that are shared at once.
const SHARE_STEP: u64 = 64 << 20;

/// Bytes of one write of zeroes.
const ZERO_STEP: u64 = 256 << 20;

/// Images one after the other.
pub(crate) struct Sources {
    /// Where each begins, and the image.
    parts: Vec<(u64, Rc<Node>)>,
    total: u64,
}

impl Sources {
    /// `nodes` in this order; `None` if they are too large together.
    pub(crate) fn new(nodes: Vec<Rc<Node>>) -> Option<Self> {
        let mut total: u64 = 0;
        let mut parts = Vec::new();
        for node in nodes {
            let size = source::sectors(node.size());
            parts.push((total, node));
            total = total.checked_add(size)?;
        }
        Some(Self { parts, total })
    }

    /// Bytes of all.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }
}

/// One copy.
pub(crate) struct Copy<'a> {
    pub(crate) host: &'a Host,
    pub(crate) sources: &'a Sources,
    pub(crate) target: &'a Rc<Node>,
    /// Zeroes in a row that are left out, in bytes; 0: everything is written.
    pub(crate) sparse: u64,
    /// Whole clusters are written compressed.
    pub(crate) compress: bool,
    /// The target reads as zeroes where it is not written.
    pub(crate) reads_zero: bool,
    /// The target reads as what lies below the source's own layer where it is not written.
    pub(crate) below: bool,
    /// Reads in flight, and writes.
    pub(crate) window: usize,
    /// Zeroes take the place of what cannot be read; whether that is told.
    pub(crate) salvages: Option<bool>,
    /// Blocks are shared where that is possible.
    pub(crate) sharing: Option<Rc<Sharing>>,
    pub(crate) pace: Pace,
    pub(crate) progress: Progress,
}

/// A limit of bytes per second.
pub(crate) struct Pace {
    core: Core,
    started: u64,
    rate: u64,
}

impl Pace {
    /// At most `rate` bytes per second from now on; 0: no limit.
    pub(crate) fn new(host: &Host, rate: u64) -> Self {
        let core = host.core().clone();
        Self { started: core.now(), core, rate }
    }

    /// Waits until `done` bytes may have been written.
    async fn wait(&self, done: u64) {
        if self.rate == 0 {
            return;
        }
        let due = u128::from(done) * 1_000_000_000 / u128::from(self.rate);
        let due = self.started.saturating_add(u64::try_from(due).unwrap_or(u64::MAX));
        if self.core.now() < due {
            self.core.sleep_until(due).await;
        }
    }
}

/// What happens with a run of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Duty {
    /// Nothing: the target reads right already.
    Skip,
    /// Make it read as zeroes.
    Zero,
    /// Copy its bytes.
    Data,
}

/// What is on its way.
struct Flight {
    /// Reads with their offsets on the target.
    reads: VecDeque<(u64, Read)>,
    /// Writes with offset and length.
    writes: VecDeque<(u64, u64, Receipt)>,
    written: u64,
    /// Where the next piece of data may begin: what lies before is planned.
    reached: u64,
}

impl Copy<'_> {
    /// Copies everything; the bytes that were written.
    ///
    /// # Errors
    /// The first failure, with its place.
    pub(crate) async fn run(&self) -> Result<u64, Failure> {
        let mut flight =
            Flight { reads: VecDeque::new(), writes: VecDeque::new(), written: 0, reached: 0 };
        let copied = self.copy_all(&mut flight).await;
        // Whatever happened, nothing is left behind in flight.
        let mut result = copied;
        while let Some((at, read)) = flight.reads.pop_front() {
            let ended = match (self.bytes_of(read).await, &result) {
                (Ok(bytes), Ok(())) => self.write(&mut flight, at, bytes).await,
                (ended, _) => ended.map(drop),
            };
            result = result.and(ended);
        }
        while !flight.writes.is_empty() {
            let ended = self.land(&mut flight).await;
            result = result.and(ended);
        }
        result?;
        self.progress.at(self.sources.total);
        self.progress.end();
        Ok(flight.written)
    }

    async fn copy_all(&self, flight: &mut Flight) -> Result<(), Failure> {
        for (start, node) in &self.sources.parts {
            let size = source::sectors(node.size());
            let mut at = 0;
            while at < size {
                let end = size.min(at + STEP);
                let runs = self.runs_of(node, at, end).await?;
                for (from, run) in runs {
                    self.copy_run(flight, node, *start, from, run).await?;
                }
                at = end;
            }
        }
        Ok(())
    }

    async fn copy_run(
        &self,
        flight: &mut Flight,
        node: &Rc<Node>,
        start: u64,
        from: u64,
        run: MapExtent,
    ) -> Result<(), Failure> {
        match self.duty(&run) {
            Duty::Skip => {
                self.progress.at(start + from + run.len);
                Ok(())
            }
            Duty::Zero => {
                let end = start + from + run.len;
                let at = (start + from).max(flight.reached).min(end);
                self.zero(flight, at, end - at).await
            }
            Duty::Data => {
                let unit = self.unit();
                let (at, end) = (start + from, start + from + run.len);
                let last = start + source::sectors(node.size());
                // Only whole clusters can be compressed: take what the source has around the run.
                let (at, end) = match self.compress {
                    true => (at / unit * unit, end.next_multiple_of(unit)),
                    false => (at, end),
                };
                let at = at.max(flight.reached).max(start);
                let end = end.min(last).max(at);
                flight.reached = end;
                for (at, end) in self.share(flight, node, start, (at, end)).await {
                    self.read(flight, node, start, (at, end), unit).await?;
                }
                Ok(())
            }
        }
    }

    /// Shares what can be shared of a part of the target with `node`, which begins there at
    /// `start`; the parts that are left to be copied.
    async fn share(
        &self,
        flight: &mut Flight,
        node: &Rc<Node>,
        start: u64,
        (mut at, end): (u64, u64),
    ) -> Vec<(u64, u64)> {
        let mut left = Vec::new();
        // Only the first source lies where it lies in the target.
        if let Some(sharing) = self.sharing.as_ref().filter(|_| start == 0) {
            let looked = node.sharable(GuestRange::new(at, end - at), self.target, sharing);
            for run in looked.await.unwrap_or_default() {
                for (from, len) in pieces::split(run.start.bytes(), run.len, SHARE_STEP) {
                    self.pace.wait(flight.written).await;
                    let sharing = Rc::clone(sharing);
                    let right = ShareRight { sharing, ..ShareRight::default() };
                    let range = GuestRange::new(from, len);
                    let origin = Origin::External;
                    if self.target.write_shared(node, range, right, origin).await == Shared::Done {
                        left.push((at, from));
                        at = range.end().bytes();
                        flight.written += len;
                        self.progress.at(at);
                    }
                }
            }
        }
        left.push((at, end));
        left.retain(|(at, end)| at < end);
        left
    }

    /// Starts to read a part of the target from `node`.
    async fn read(
        &self,
        flight: &mut Flight,
        node: &Rc<Node>,
        start: u64,
        (at, end): (u64, u64),
        unit: u64,
    ) -> Result<(), Failure> {
        for (at, len) in pieces::split(at, end - at, unit) {
            if flight.reads.len() >= self.window {
                self.advance(flight).await?;
            }
            let read = pieces::read(self.host, node, at - start, len);
            flight.reads.push_back((at, read));
        }
        Ok(())
    }

    fn duty(&self, run: &MapExtent) -> Duty {
        if self.below && run.depth > 0 {
            return Duty::Skip;
        }
        match (run.zero, self.sparse) {
            (false, _) | (true, 0) => Duty::Data,
            (true, _) if self.reads_zero => Duty::Skip,
            (true, _) => Duty::Zero,
        }
    }

    /// Bytes of one piece.
    fn unit(&self) -> u64 {
        let cluster = self.target.cluster_size();
        if self.compress { cluster } else { UNIT.max(cluster) }
    }

    /// Ends the oldest read and starts its writes.
    async fn advance(&self, flight: &mut Flight) -> Result<(), Failure> {
        let Some((at, read)) = flight.reads.pop_front() else { return Ok(()) };
        let bytes = self.bytes_of(read).await?;
        self.write(flight, at, bytes).await
    }

    /// What was read; with zeroes where it could not be, if that is wanted.
    async fn bytes_of(&self, read: Read) -> Result<Buf, Failure> {
        match self.salvages {
            Some(tells) => Ok(read.salvaged(tells).await),
            None => read.end().await,
        }
    }

    /// The map of a part of a source.
    async fn runs_of(
        &self,
        node: &Rc<Node>,
        at: u64,
        end: u64,
    ) -> Result<Vec<(u64, MapExtent)>, Failure> {
        let error = match map::whole(node, at, end).await {
            Ok(runs) => return Ok(runs),
            Err(error) => error,
        };
        let text = format!("error while reading block status at offset {at}: {error}");
        let Some(tells) = self.salvages else { return Err(Failure::new(text)) };
        if tells {
            eprintln!("liveblk img: warning: {text}");
        }
        // What is known of none of it is looked at byte by byte.
        Ok(vec![(at, MapExtent { len: end - at, data: true, present: true, ..map::nothing() })])
    }

    /// Starts to write what is not zero of `bytes`; makes the rest read as zeroes.
    async fn write(&self, flight: &mut Flight, at: u64, bytes: Buf) -> Result<(), Failure> {
        if self.sparse == 0 {
            return self.put(flight, at, bytes).await;
        }
        let granule = match self.compress {
            true => self.unit(),
            false => self.target.format().subcluster_size().max(self.sparse.max(512)),
        };
        let mut done: u64 = 0;
        let len = bytes.len() as u64;
        while done < len {
            let (zero, count) = stretch(&bytes, at, done, granule);
            let part = bytes.slice(length(done)..length(done + count));
            if !zero {
                self.put(flight, at + done, part).await?;
            } else if !self.reads_zero {
                self.zero(flight, at + done, count).await?;
            }
            done += count;
        }
        self.progress.at(at);
        Ok(())
    }

    async fn put(&self, flight: &mut Flight, at: u64, bytes: Buf) -> Result<(), Failure> {
        if flight.writes.len() >= self.window {
            self.land(flight).await?;
        }
        let len = bytes.len() as u64;
        self.pace.wait(flight.written).await;
        let flags = WriteFlags { compressed: self.compress, ..WriteFlags::default() };
        let receipt = self.target.write(at, bytes, flags, Origin::External);
        flight.writes.push_back((at, len, receipt));
        flight.written += len;
        Ok(())
    }

    async fn zero(&self, flight: &mut Flight, at: u64, len: u64) -> Result<(), Failure> {
        for (at, len) in pieces::split(at, len, ZERO_STEP) {
            if flight.writes.len() >= self.window {
                self.land(flight).await?;
            }
            let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
            let receipt = self.target.write_zeroes(at, len, flags, Origin::External);
            flight.writes.push_back((at, len, receipt));
        }
        Ok(())
    }

    /// Waits for the oldest write.
    async fn land(&self, flight: &mut Flight) -> Result<(), Failure> {
        let Some((at, _, receipt)) = flight.writes.pop_front() else { return Ok(()) };
        let landed = receipt.await;
        landed.map_err(|error| Failure::new(format!("error while writing at byte {at}: {error}")))
    }
}

/// How many bytes from `done` on are alike: zeroes or not, by granules of the target.
fn stretch(bytes: &Buf, at: u64, done: u64, granule: u64) -> (bool, u64) {
    let len = bytes.len() as u64;
    let mut alike = None;
    let mut end = done;
    while end < len {
        let next = ((at + end) / granule + 1).saturating_mul(granule) - at;
        let next = next.min(len);
        let zero = bytes.slice(length(end)..length(next)).is_zero();
        if *alike.get_or_insert(zero) != zero {
            break;
        }
        end = next;
    }
    (alike.unwrap_or(true), end - done)
}

fn length(len: u64) -> usize {
    usize::try_from(len).unwrap_or(0)
}
