//! Options of opening an image, from the names and values that QMP gives them.
//!
//! Source: QMP `BlockdevOptionsQcow2`. Unknown names and wrong kinds are refused by name.

use std::fmt;

use liveblk_engine::format::{FormatOptions, InfoValue};

use super::freed::Passes;
use super::overlap::{Overlap, overlap_check};
use crate::limits::{CACHE_CLEAN_SECONDS, L2_CACHE_BYTES, REFCOUNT_CACHE_BYTES};

/// What is wrong with an option; Display is the whole text, the peer's where it has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionFault {
    /// An unknown name, or a value of the wrong kind.
    Bad(String),
    /// All three cache sizes were given.
    AllSizesSet,
    /// One cache is to be larger than both together.
    Exceeds(&'static str),
    /// A size of pieces of L2 tables that does not fit clusters of so many bytes.
    EntrySize(u64),
    /// `discard-no-unref` in a version 2 image.
    NoUnrefVersion,
    /// An interval of more seconds than fit in 32 bits.
    CleanInterval,
    /// Lazy refcounts in a version 2 image.
    LazyVersion,
    /// An unknown set of overlap checks.
    OverlapValue(String),
    /// Two different sets of overlap checks.
    OverlapConflict(String, String),
    /// Neither on nor off.
    OnOff(String),
}

impl fmt::Display for OptionFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bad(name) => {
                write!(f, "Option '{name}' is unknown to qcow2, or its value is of the wrong kind")
            }
            Self::AllSizesSet => f.write_str(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            ),
            Self::Exceeds(which) => write!(f, "{which}-cache-size may not exceed cache-size"),
            Self::EntrySize(cluster) => write!(
                f,
                "L2 cache entry size must be a power of two between 512 and the cluster size \
                 ({cluster})"
            ),
            Self::OverlapValue(value) => write!(
                f,
                "Unsupported value '{value}' for qcow2 option 'overlap-check'. Allowed are any of \
                 the following: none, constant, cached, all"
            ),
            Self::OverlapConflict(flat, member) => write!(
                f,
                "Conflicting values for qcow2 options 'overlap-check' ('{flat}') and \
                 'overlap-check.template' ('{member}')"
            ),
            Self::OnOff(name) => write!(f, "Parameter '{name}' expects 'on' or 'off'"),
            Self::NoUnrefVersion => {
                f.write_str("discard-no-unref is only supported since qcow2 version 3")
            }
            Self::CleanInterval => f.write_str("Cache clean interval too big"),
            Self::LazyVersion => f.write_str(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
            ),
        }
    }
}

/// How an image is opened beyond what every format is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Give the space of what guests discard back to the storage before it can be reused
    /// (`pass-discard-request`; by default what the node's `discard` says).
    pub discard_unmap: bool,
    /// The same for what snapshots leave behind (`pass-discard-snapshot`).
    pub pass_snapshot: bool,
    /// The same for old places of tables and bitmaps (`pass-discard-other`).
    pub pass_other: bool,
    /// What guests discard stays allocated where it is (`discard-no-unref`).
    pub no_unref: bool,
    /// Overrides the image's own wish for refcounts that may be stale while it is in use. A
    /// permission that is never used: refcounts are never late here, so the dirty bit is never set.
    pub lazy_refcounts: Option<bool>,
    /// Bytes of cached L2 slices at most.
    pub l2_cache: u64,
    /// Bytes of cached refcount slices at most.
    pub refcount_cache: u64,
    /// Reserve space ahead of what is needed, on files where writes get cheaper by it.
    pub room_ahead: bool,
    /// Bytes of a cached piece of an L2 table, if given.
    pub l2_cache_entry: Option<u64>,
    /// Seconds after which cached tables that nobody used leave memory; 0: never.
    pub cache_clean: u64,
    /// Which metadata is guarded against writes of other things.
    pub overlap: Overlap,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            discard_unmap: false,
            pass_snapshot: true,
            pass_other: false,
            no_unref: false,
            lazy_refcounts: None,
            l2_cache: L2_CACHE_BYTES,
            refcount_cache: REFCOUNT_CACHE_BYTES,
            room_ahead: true,
            l2_cache_entry: None,
            cache_clean: CACHE_CLEAN_SECONDS,
            overlap: Overlap::default(),
        }
    }
}

impl Options {
    /// Takes what `given` says, the rest from `self`.
    ///
    /// # Errors
    /// An unknown name, a value of the wrong kind, cache sizes that contradict each other.
    pub(super) fn with(mut self, given: &FormatOptions) -> Result<Self, OptionFault> {
        let (mut both, mut l2, mut refcounts) = (None, None, None);
        for (name, value) in given {
            match (name.as_str(), value) {
                ("pass-discard-request", InfoValue::Flag(on)) => self.discard_unmap = *on,
                ("lazy-refcounts", InfoValue::Flag(on)) => self.lazy_refcounts = Some(*on),
                ("cache-size", InfoValue::Number(bytes)) => both = Some(*bytes),
                ("l2-cache-size", InfoValue::Number(bytes)) => l2 = Some(*bytes),
                ("refcount-cache-size", InfoValue::Number(bytes)) => refcounts = Some(*bytes),
                ("l2-cache-entry-size", InfoValue::Number(bytes)) => {
                    self.l2_cache_entry = Some(*bytes);
                }
                ("pass-discard-snapshot", InfoValue::Flag(on)) => self.pass_snapshot = *on,
                ("pass-discard-other", InfoValue::Flag(on)) => self.pass_other = *on,
                ("discard-no-unref", InfoValue::Flag(on)) => self.no_unref = *on,
                ("cache-clean-interval", InfoValue::Number(seconds)) => {
                    if u32::try_from(*seconds).is_err() {
                        return Err(OptionFault::CleanInterval);
                    }
                    self.cache_clean = *seconds;
                }
                (name, InfoValue::Text(_) | InfoValue::Flag(_))
                    if name.starts_with("overlap-check") => {}
                _ => return Err(OptionFault::Bad(name.clone())),
            }
        }
        self.share_out(both, l2, refcounts)?;
        self.overlap = overlap_check(given)?;
        Ok(self)
    }

    /// Divides the cache sizes as the peer does (QEMU, "qcow2 L2/refcount cache configuration").
    fn share_out(
        &mut self,
        both: Option<u64>,
        l2: Option<u64>,
        refcounts: Option<u64>,
    ) -> Result<(), OptionFault> {
        if let Some(both) = both {
            match (l2, refcounts) {
                (Some(_), Some(_)) => return Err(OptionFault::AllSizesSet),
                (Some(l2), _) if l2 > both => return Err(OptionFault::Exceeds("l2")),
                (_, Some(refcounts)) if refcounts > both => {
                    return Err(OptionFault::Exceeds("refcount"));
                }
                (Some(l2), None) => self.set(l2, both - l2),
                (None, Some(refcounts)) => self.set(both - refcounts, refcounts),
                (None, None) => self.set(both - both / 5, both / 5),
            }
            return Ok(());
        }
        self.set(l2.unwrap_or(self.l2_cache), refcounts.unwrap_or(self.refcount_cache));
        Ok(())
    }

    /// For which freed clusters space goes back.
    pub(super) const fn passes(&self) -> Passes {
        let (snapshot, other) = (self.pass_snapshot, self.pass_other);
        Passes { request: self.discard_unmap, snapshot, other }
    }

    fn set(&mut self, l2: u64, refcounts: u64) {
        (self.l2_cache, self.refcount_cache) = (l2, refcounts);
    }

    /// Checks what depends on the image.
    pub(super) fn check(&self, version: u32, cluster: u64) -> Result<(), OptionFault> {
        if self.lazy_refcounts == Some(true) && version < 3 {
            return Err(OptionFault::LazyVersion);
        }
        if self.no_unref && version < 3 {
            return Err(OptionFault::NoUnrefVersion);
        }
        match self.l2_cache_entry {
            Some(bytes) if !bytes.is_power_of_two() || !(512..=cluster).contains(&bytes) => {
                Err(OptionFault::EntrySize(cluster))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(options: &[(&str, InfoValue)]) -> Result<Options, OptionFault> {
        let given = options.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
        Options::default().with(&given.collect())
    }

    #[test]
    fn cache_sizes_are_shared_out_and_contradictions_refused() {
        let size = InfoValue::Number;
        let both = given(&[("cache-size", size(10 << 20))]).expect("one size is enough");
        assert_eq!((both.l2_cache, both.refcount_cache), (8 << 20, 2 << 20));
        let one = given(&[("cache-size", size(10)), ("l2-cache-size", size(7))]).expect("fits");
        assert_eq!((one.l2_cache, one.refcount_cache), (7, 3));
        let more = given(&[("cache-size", size(10)), ("refcount-cache-size", size(11))]);
        assert_eq!(more, Err(OptionFault::Exceeds("refcount")));
        let names = ["cache-size", "l2-cache-size", "refcount-cache-size"];
        assert_eq!(given(&names.map(|name| (name, size(9)))), Err(OptionFault::AllSizesSet));
    }

    #[test]
    fn unknown_names_and_wrong_kinds_are_refused_by_name() {
        let unknown = given(&[("cache", InfoValue::Number(1))]);
        assert_eq!(unknown, Err(OptionFault::Bad("cache".to_owned())));
        let kind = given(&[("lazy-refcounts", InfoValue::Number(1))]);
        assert_eq!(kind, Err(OptionFault::Bad("lazy-refcounts".to_owned())));
    }
}
