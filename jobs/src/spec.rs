//! What a client asks for when it starts a job, validated once.

use std::rc::Rc;

use liveblk_engine::node::Node;

use crate::error::{GranularityRule, JobError, Result};

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
    /// What a bitmap names (a later version).
    Incremental,
    /// What a bitmap names (a later version).
    Bitmap,
}

impl SyncMode {
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

/// When a guest write reaches a mirror's target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CopyMode {
    /// Later.
    #[default]
    Background,
    /// Before the guest is answered (a later version).
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
        if matches!(self.sync, SyncMode::Incremental | SyncMode::Bitmap) {
            return Err(JobError::SyncModeUnsupported { mode: self.sync.name() });
        }
        if self.copy_mode == CopyMode::WriteBlocking {
            return Err(JobError::NotYet { what: "Copy mode 'write-blocking'" });
        }
        if self.source.id() == self.target.id() {
            return Err(JobError::SameNode { verb: "mirror" });
        }
        Ok(granularity)
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
        if matches!(self.sync, SyncMode::Incremental | SyncMode::Bitmap) {
            return Err(JobError::BitmapMissing { mode: self.sync.name() });
        }
        Ok(())
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
