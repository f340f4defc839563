//! What a client asks for when it starts a job, validated once.

use std::path::PathBuf;
use std::rc::Rc;

use liveblk_engine::node::{Node, NodeId, Permissions, User};

use crate::bitmap_use::BitmapChoice;
use crate::converge::Converge;
use crate::error::{GranularityRule, JobError, Result};
use crate::limits::BACKUP_GRANULE_MIN;

/// What to do about a failed read or write of a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// End with the error.
    #[default]
    Report,
    /// Try again later.
    Ignore,
    /// Pause.
    Stop,
    /// Pause on a full disk, else end.
    Enospc,
    /// As `Enospc`.
    Auto,
}

/// What a job copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncMode {
    /// Everything.
    Full,
    /// What the top layer holds.
    Top,
    /// Mirror: what is written from now on. Backup: what is about to be overwritten.
    None,
    /// What a bitmap names; its bits are cleared if the job succeeds.
    Incremental,
    /// What a bitmap names.
    Bitmap,
}

impl SyncMode {
    /// Whether a bitmap names what is copied.
    pub(crate) const fn is_by_bitmap(self) -> bool {
        matches!(self, Self::Incremental | Self::Bitmap)
    }

    /// The name in QMP.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Top => "top",
            Self::None => "none",
            Self::Incremental => "incremental",
            Self::Bitmap => "bitmap",
        }
    }
}

/// What becomes of a user's bitmap at the end of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapMode {
    /// What was copied is cleared if the job succeeds.
    OnSuccess,
    /// What was copied is cleared, whatever the end.
    Always,
    /// It stays as it is.
    Never,
}

impl BitmapMode {
    /// The name in QMP.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OnSuccess => "on-success",
            Self::Always => "always",
            Self::Never => "never",
        }
    }
}

/// When a guest write reaches a mirror's target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyMode {
    /// Later.
    #[default]
    Background,
    /// Before the guest is answered.
    WriteBlocking,
}

impl CopyMode {
    /// The name in QMP.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Background => "background",
            Self::WriteBlocking => "write-blocking",
        }
    }
}

/// Options that all jobs have.
#[derive(Clone, Debug)]
pub struct JobOptions {
    /// The id; an identifier, unique on this core.
    pub id: String,
    /// Bytes per second; 0 means no limit; negative is refused.
    pub speed: i64,
    /// Whether the result becomes effective without job-finalize.
    pub auto_finalize: bool,
    /// Whether it goes away without job-dismiss.
    pub auto_dismiss: bool,
    /// About failed reads.
    pub on_source_error: OnError,
    /// About failed writes.
    pub on_target_error: OnError,
}

impl JobOptions {
    /// The defaults of the peer for job `id`.
    pub fn new(id: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            speed: 0,
            auto_finalize: true,
            auto_dismiss: true,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
        }
    }

    /// The speed limit as the rate takes it.
    ///
    /// # Errors
    /// If it is negative.
    pub fn checked_speed(&self) -> Result<u64> {
        checked_speed(self.speed)
    }
}

/// A mirror to be started.
#[derive(Clone)]
pub struct MirrorSpec {
    /// Common options.
    pub job: JobOptions,
    /// What is copied; guests write here.
    pub source: Rc<Node>,
    /// Where to.
    pub target: Rc<Node>,
    /// What of the source.
    pub sync: SyncMode,
    /// When guest writes are copied.
    pub copy_mode: CopyMode,
    /// Bytes per dirty bit; default: the target's cluster size within 4 KiB to 64 KiB,
    /// 64 KiB if it has none.
    pub granularity: Option<u64>,
    /// Accept a larger target; its tail then reads zero.
    pub allow_larger_target: bool,
    /// What most mirrors leave alone.
    pub more: MirrorOptions,
}

/// Options of a mirror with defaults.
#[derive(Clone, Debug, Default)]
pub struct MirrorOptions {
    /// Bytes of copies in flight, rounded up to the granularity; 0 is our choice.
    pub buf_size: u64,
    /// Keep space of the target allocated where the source reads as zeroes.
    pub keep_zeroes: bool,
    /// The target reads as zeroes everywhere: it is not looked at, and zeroes are not written.
    pub target_is_zero: bool,
    /// The name under which queries show the job's filter node.
    pub filter_name: Option<String>,
    /// What is put below the target when guests move to it.
    pub backing_at_pivot: Option<NodeId>,
    /// A bitmap of the source: what is copied, or what the copy leaves behind.
    pub bitmap: BitmapChoice,
    /// Be ready in time.
    pub converge: Option<Converge>,
}

/// A backup to be started.
#[derive(Clone)]
pub struct BackupSpec {
    /// Common options.
    pub job: JobOptions,
    /// What is copied; guests write here.
    pub source: Rc<Node>,
    /// Where to.
    pub target: Rc<Node>,
    /// What of the source.
    pub sync: SyncMode,
    /// Accept a larger target; its tail then reads zero.
    pub allow_larger_target: bool,
    /// Store whole clusters of the target compressed.
    pub compress: bool,
    /// What most backups leave alone.
    pub more: BackupOptions,
}

/// Options of a backup with defaults.
#[derive(Clone, Debug, Default)]
pub struct BackupOptions {
    /// Most copies in flight; 0 is our choice.
    pub max_workers: u64,
    /// Most bytes of one copy; 0 is our choice.
    pub max_chunk: u64,
    /// Least bytes of a unit of copy-before-write.
    pub min_cluster_size: u64,
    /// The name under which queries show the job's filter node.
    pub filter_name: Option<String>,
    /// A bitmap of the source: what is copied, or what the copy leaves behind.
    pub bitmap: BitmapChoice,
    /// Who suffers when old content cannot be kept.
    pub on_cbw_error: OnCbwError,
    /// Give space of the source back as it is copied.
    pub discard_source: bool,
    /// Where old content waits for a target that is slow.
    pub spill: SpillOptions,
    /// Whether the target shares blocks with the source where the file system can. Guests then pay
    /// for the first write to each block of the source after the backup, which is why nobody gets
    /// it unasked.
    pub use_copy_range: bool,
}

/// The spill file of a backup: old content goes there that the target does not take in time, so
/// that guests go on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpillOptions {
    /// Its folder; that of the target if absent, or of the source if the target is no file of a
    /// local file system.
    pub folder: Option<PathBuf>,
    /// Most bytes of old content in it; the size of the disk if absent. Beyond it the backup fails
    /// and guests go on. 0: there is no such file, and guests wait for the target.
    pub max: Option<u64>,
    /// Bytes of old content that memory holds before the file is used; 32 MiB if absent, and never
    /// more.
    pub after: Option<u64>,
}

/// Who suffers when copy-before-write cannot keep old content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCbwError {
    /// The guest's write fails, and the snapshot stays whole.
    BreakGuestWrite,
    /// The snapshot (or the backup) fails, and the guest goes on.
    #[default]
    BreakSnapshot,
}

impl MirrorSpec {
    /// The peer's checks that need no node state, and the granularity in bytes.
    ///
    /// # Errors
    /// What cannot work, in the peer's order.
    pub(crate) fn check(&self) -> Result<u64> {
        let granularity = match self.granularity {
            None | Some(0) => match self.target.cluster_size() {
                0 | 1 => 65536,
                bytes => bytes.clamp(4096, 65536),
            },
            Some(bytes) if !(512..=64 << 20).contains(&bytes) => {
                return Err(JobError::BadGranularity { rule: GranularityRule::Range });
            }
            Some(bytes) if !bytes.is_power_of_two() => {
                return Err(JobError::BadGranularity { rule: GranularityRule::PowerOfTwo });
            }
            Some(bytes) => bytes,
        };
        let granularity = if self.needs_whole_clusters() {
            granularity.max(self.target.cluster_size())
        } else {
            granularity
        };
        if self.source.id() == self.target.id() {
            return Err(JobError::SameNode { verb: "mirror" });
        }
        self.more.converge.map_or(Ok(()), |converge| converge.check())?;
        Ok(granularity)
    }
}

impl MirrorSpec {
    /// Whether the target gets its backing file only later: what a cluster of it does not hold is
    /// then nowhere, so only whole clusters are written.
    pub(crate) fn needs_whole_clusters(&self) -> bool {
        let partial = matches!(self.sync, SyncMode::Top | SyncMode::None);
        partial && self.target.cluster_size() > 1 && !self.target.has_backing()
    }
}

impl BackupSpec {
    /// The peer's checks that need no node state.
    ///
    /// # Errors
    /// What cannot work.
    pub(crate) fn check(&self) -> Result<()> {
        if self.source.id() == self.target.id() {
            return Err(JobError::SameNode { verb: "backup" });
        }
        if self.compress && !self.target.can_compress() {
            return Err(JobError::CompressionUnsupported);
        }
        let (chunk, granule) = (self.more.max_chunk, self.granularity());
        if chunk > 0 && chunk < granule {
            return Err(JobError::ChunkTooSmall { chunk, granule });
        }
        if self.more.discard_source && self.source.view().is_none() {
            let writes = |(_, with): &(User, Permissions)| with.perm & Permissions::WRITE != 0;
            if let Some((user, _)) = self.source.uses().into_iter().find(writes) {
                return Err(JobError::InUse {
                    node: (*self.source.name()).into(),
                    by: user.to_string().into(),
                });
            }
        }
        Ok(())
    }
}

impl BackupSpec {
    /// Bytes of a unit of copy-before-write: a power of two.
    pub(crate) fn granularity(&self) -> u64 {
        let least = self.more.min_cluster_size.max(BACKUP_GRANULE_MIN);
        self.target.cluster_size().max(least)
    }
}

/// A speed as the rate takes it.
///
/// # Errors
/// If it is negative.
pub(crate) fn checked_speed(speed: i64) -> Result<u64> {
    u64::try_from(speed).map_err(|_| JobError::NegativeSpeed)
}

/// Checks that `id` is an identifier: a letter, then letters, digits, `-`, `.`, `_`.
///
/// # Errors
/// If it is not.
pub(crate) fn check_id(id: &str) -> Result<()> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.chars().all(legal) {
        Ok(())
    } else {
        Err(JobError::InvalidId { id: id.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_identifiers() {
        for good in ["j", "job0", "a-b.c_d"] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", "0job", "#x", "a b", "ä"] {
            let text = check_id(bad).unwrap_err().to_string();
            assert_eq!(text, format!("Invalid job ID '{bad}'"));
        }
    }

    #[test]
    fn a_negative_speed_is_refused() {
        assert_eq!(
            checked_speed(-1).unwrap_err().to_string(),
            "Parameter 'speed' expects a non-negative value"
        );
        assert_eq!(checked_speed(7), Ok(7));
    }
}
