//! What a simulated world is like: seed, cores, delays, disturbances, failures to inject.

use std::ops::Range;

use super::fs::FsConfig;
use crate::driver::Nanos;

/// How a world is set up; `SimConfig::new(seed)` gives a moderately hostile one.
#[derive(Clone, Debug)]
pub struct SimConfig {
    /// Where all chance comes from.
    pub seed: u64,
    /// Number of simulated cores.
    pub cores: u32,
    /// How long operations take.
    pub latency: Latency,
    /// A disk that takes writes one after the other.
    pub slow: Option<SlowDisk>,
    /// Reads and writes of more than a sector that transfer only a part, per mille.
    pub short_per_mille: u32,
    /// Reads and writes that answer EINTR or EAGAIN without effect, per mille.
    pub again_per_mille: u32,
    /// Operations that are complete when `submit` returns, per mille.
    pub instant_per_mille: u32,
    /// Whether a change of a stable write buffer while its write is in flight is a panic.
    pub check_write_buffers: bool,
    /// Steps after which the world counts as hanging.
    pub steps_max: u64,
    /// The file system, if the world starts with an empty one.
    pub fs: FsConfig,
}

impl SimConfig {
    /// One core; short transfers, EINTR and EAGAIN in a few per cent of the operations.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            cores: 1,
            latency: Latency::default(),
            slow: None,
            short_per_mille: 20,
            again_per_mille: 10,
            instant_per_mille: 50,
            check_write_buffers: true,
            steps_max: 20_000_000,
            fs: FsConfig::default(),
        }
    }

    /// The same world with `cores` cores.
    #[must_use]
    pub fn cores(mut self, cores: u32) -> Self {
        self.cores = cores;
        self
    }

    /// The same world without short transfers, EINTR, EAGAIN and instant completions.
    #[must_use]
    pub fn calm(mut self) -> Self {
        self.short_per_mille = 0;
        self.again_per_mille = 0;
        self.instant_per_mille = 0;
        self
    }
}

/// A disk with a limited rate: a write completes when all before it and its own bytes are through.
#[derive(Clone, Debug)]
pub struct SlowDisk {
    /// Which operations; reads and others keep their latency.
    pub filter: OpFilter,
    /// Its rate.
    pub bytes_per_second: u64,
}

/// Time from submission to completion, in nanoseconds; one in twenty operations takes up to
/// twenty times as long.
#[derive(Clone, Debug)]
pub struct Latency {
    /// Reads.
    pub read: Range<Nanos>,
    /// Writes.
    pub write: Range<Nanos>,
    /// Data syncs and syncs of folders.
    pub sync: Range<Nanos>,
    /// Other calls on files and paths.
    pub fs: Range<Nanos>,
    /// Work on the blocking pool.
    pub work: Range<Nanos>,
}

impl Default for Latency {
    fn default() -> Self {
        Self {
            read: 10_000..100_000,
            write: 10_000..150_000,
            sync: 50_000..500_000,
            fs: 5_000..50_000,
            work: 5_000..50_000,
        }
    }
}

impl Latency {
    pub(super) fn of(&self, kind: SimOpKind) -> &Range<Nanos> {
        match kind {
            SimOpKind::Read => &self.read,
            SimOpKind::Write => &self.write,
            SimOpKind::Sync | SimOpKind::SyncFolder => &self.sync,
            SimOpKind::Work => &self.work,
            _ => &self.fs,
        }
    }
}

/// Kinds of operations, for filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the system calls'")]
pub enum SimOpKind {
    Read,
    Write,
    Sync,
    Open,
    Stat,
    Rename,
    Unlink,
    SyncFolder,
    Lock,
    Extents,
    Allocate,
    PunchHole,
    ZeroRange,
    Truncate,
    Share,
    Work,
    Socket,
    Cancel,
}

/// Which operations a hold or a failure is about; the default is all of them.
#[derive(Clone, Debug, Default)]
pub struct OpFilter {
    file: Option<String>,
    not_file: Option<String>,
    kinds: Vec<SimOpKind>,
    range: Option<Range<u64>>,
}

impl OpFilter {
    /// All operations.
    pub fn any() -> Self {
        Self::default()
    }

    /// Only on files whose path contains `part`.
    #[must_use]
    pub fn file(mut self, part: &str) -> Self {
        self.file = Some(part.to_owned());
        self
    }

    /// Not on files whose path contains `part`.
    #[must_use]
    pub fn not_file(mut self, part: &str) -> Self {
        self.not_file = Some(part.to_owned());
        self
    }

    /// Only of this kind; called again, also of that one.
    #[must_use]
    pub fn kind(mut self, kind: SimOpKind) -> Self {
        self.kinds.push(kind);
        self
    }

    /// Only if the operation touches these bytes of the file.
    #[must_use]
    pub fn range(mut self, range: Range<u64>) -> Self {
        self.range = Some(range);
        self
    }

    pub(super) fn matches(&self, subject: &Subject) -> bool {
        let file = self.file.as_ref().is_none_or(|part| subject.name.contains(part.as_str()));
        let other = self.not_file.as_ref().is_none_or(|part| !subject.name.contains(part.as_str()));
        let kind = self.kinds.is_empty() || self.kinds.contains(&subject.kind);
        let range = self.range.as_ref().is_none_or(|range| {
            subject.offset < range.end && range.start < subject.offset.saturating_add(subject.len)
        });
        file && other && kind && range
    }
}

/// What an operation is about.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub(super) kind: SimOpKind,
    pub(super) name: String,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// A failure to inject.
#[derive(Clone, Debug)]
pub struct FaultRule {
    /// Which operations.
    pub filter: OpFilter,
    /// How many matching operations pass first.
    pub after: u64,
    /// How many fail then; `None` for all.
    pub times: Option<u64>,
    /// What they answer, as a positive errno. EIO on a write leaves any part of it done; EIO on a
    /// sync leaves what it covered undone for good, as if written never to be synced again.
    /// 0: a read or write does not fail but moves only its first half.
    pub errno: i32,
}

impl FaultRule {
    /// The first matching operation fails with `errno`.
    pub fn once(filter: OpFilter, errno: i32) -> Self {
        Self { filter, after: 0, times: Some(1), errno }
    }

    /// The first matching read or write moves only its first half, in whole sectors if it has two.
    pub fn short(filter: OpFilter) -> Self {
        Self::once(filter, 0)
    }

    /// Every matching operation fails with `errno`.
    pub fn always(filter: OpFilter, errno: i32) -> Self {
        Self { filter, after: 0, times: None, errno }
    }

    /// `after` matching operations pass first.
    #[must_use]
    pub fn after(mut self, after: u64) -> Self {
        self.after = after;
        self
    }
}
