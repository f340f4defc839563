//! Address spaces of virtual disks as types: a guest offset can never be used as a host offset.
//!
//! Owns the newtypes and their arithmetic. Does no I/O and knows no format. All values are bytes.

use std::fmt;

/// A byte offset on the virtual disk, as the guest sees it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestOffset(u64);

/// A byte offset in the file that stores an image.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HostOffset(u64);

macro_rules! offset_type {
    ($name:ident) => {
        impl $name {
            /// The offset `bytes`.
            pub const fn new(bytes: u64) -> Self {
                Self(bytes)
            }

            /// The value in bytes.
            pub const fn bytes(self) -> u64 {
                self.0
            }

            /// This offset plus `len` bytes; saturates, so a check against a size still fails.
            #[must_use]
            pub const fn plus(self, len: u64) -> Self {
                Self(self.0.saturating_add(len))
            }

            /// Bytes from `earlier` to this offset; 0 if `earlier` is not earlier.
            pub const fn since(self, earlier: Self) -> u64 {
                self.0.saturating_sub(earlier.0)
            }

            /// The start of the `unit`-sized block that holds this offset (`unit` is a power of
            /// two).
            #[must_use]
            pub const fn align_down(self, unit: u64) -> Self {
                Self(self.0 & !(unit - 1))
            }

            /// The first multiple of `unit` (a power of two) at or after this offset; saturates.
            #[must_use]
            pub const fn align_up(self, unit: u64) -> Self {
                Self(self.0.saturating_add(unit - 1) & !(unit - 1))
            }

            /// Bytes from the start of the `unit`-sized block to this offset.
            pub const fn within(self, unit: u64) -> u64 {
                self.0 & (unit - 1)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:#x})", stringify!($name), self.0)
            }
        }
    };
}

offset_type!(GuestOffset);
offset_type!(HostOffset);

/// A half-open range of guest bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct GuestRange {
    /// First byte.
    pub start: GuestOffset,
    /// Length in bytes.
    pub len: u64,
}

impl GuestRange {
    /// The range of `len` bytes at byte `start`.
    pub const fn new(start: u64, len: u64) -> Self {
        Self { start: GuestOffset::new(start), len }
    }

    /// The first byte after the range (saturating).
    pub const fn end(self) -> GuestOffset {
        self.start.plus(self.len)
    }

    /// Whether the range holds no byte.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Whether the two ranges share a byte.
    pub const fn overlaps(self, other: Self) -> bool {
        self.len > 0
            && other.len > 0
            && self.start.bytes() < other.end().bytes()
            && other.start.bytes() < self.end().bytes()
    }

    /// The smallest range of whole `unit`-sized blocks that covers this one.
    #[must_use]
    pub const fn widen(self, unit: u64) -> Self {
        let start = self.start.align_down(unit);
        let end = self.end().align_up(unit);
        Self { start, len: end.since(start) }
    }

    /// The bytes both ranges share; empty (at this range's start) if none.
    #[must_use]
    pub fn intersect(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        if end <= start {
            return Self { start: self.start, len: 0 };
        }
        Self { start, len: end.since(start) }
    }
}
