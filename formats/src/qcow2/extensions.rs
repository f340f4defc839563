//! Header extensions: parsed, kept in their order, written back; unknown ones survive a rewrite.
//!
//! Promises: extensions never reach beyond the area they are read from; lengths are checked before
//! anything is copied.

use zerocopy::{FromBytes, IntoBytes};

use super::layout::{RawExtension, RawFeature};
use crate::reason::Reason;

/// End of the list.
const END: u32 = 0;
/// The backing file's format name.
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
/// The external data file's name.
pub(super) const DATA_FILE: u32 = 0x4441_5441;
/// Persistent bitmaps.
pub(super) const BITMAPS: u32 = 0x2385_2875;
/// Where the encryption header lies.
pub(super) const ENCRYPTION_HEADER: u32 = 0x0537_be77;

/// One extension as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Extension {
    pub(super) kind: u32,
    pub(super) data: Vec<u8>,
}

/// The extensions of a header, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Extensions {
    pub(super) list: Vec<Extension>,
    /// Bytes that the list takes in the file, without the end marker.
    pub(super) stored: usize,
}

impl Extensions {
    /// Reads the list from `area`, which ends where the backing name or the cluster does.
    pub(super) fn parse(area: &[u8]) -> Result<Self, Reason> {
        let mut list = Vec::new();
        let mut rest = area;
        while let Ok((head, after)) = RawExtension::read_from_prefix(rest) {
            let kind = head.kind.get();
            if kind == END {
                break;
            }
            let len = usize::try_from(head.len.get()).map_err(|_| Reason::Extension)?;
            let data = after.get(..len).ok_or(Reason::Extension)?.to_vec();
            list.push(Extension { kind, data });
            let padded = len.checked_next_multiple_of(8).ok_or(Reason::Extension)?;
            rest = after.get(padded..).unwrap_or_default();
        }
        Ok(Self { list, stored: area.len() - rest.len() })
    }

    /// The list as bytes, with the end marker.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for extension in &self.list {
            let len = u32::try_from(extension.data.len()).expect("invariant: fits in a cluster");
            let head = RawExtension { kind: extension.kind.into(), len: len.into() };
            out.extend_from_slice(head.as_bytes());
            out.extend_from_slice(&extension.data);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out.extend_from_slice(&[0; 8]);
        out
    }

    /// The data of the first extension of this kind.
    pub(super) fn find(&self, kind: u32) -> Option<&[u8]> {
        self.list.iter().find(|extension| extension.kind == kind).map(|found| &*found.data)
    }

    /// Sets, replaces or (with `None`) removes the backing format; a new one comes first.
    pub(super) fn set_backing_format(&mut self, format: Option<&str>) {
        self.list.retain(|extension| extension.kind != BACKING_FORMAT);
        if let Some(format) = format {
            let data = format.as_bytes().to_vec();
            self.list.insert(0, Extension { kind: BACKING_FORMAT, data });
        }
    }

    /// Removes the (optional) table of feature names.
    pub(super) fn drop_feature_names(&mut self) {
        self.list.retain(|extension| extension.kind != FEATURE_NAMES);
    }

    /// The backing file's format name.
    pub(super) fn backing_format(&self) -> Option<String> {
        self.find(BACKING_FORMAT).map(|name| String::from_utf8_lossy(name).into_owned())
    }

    /// The names of these incompatible feature bits, as the peer prints them.
    pub(super) fn feature_names(&self, mut bits: u64) -> String {
        let mut names: Vec<String> = Vec::new();
        let table = self.find(FEATURE_NAMES).unwrap_or_default();
        for raw in table.chunks_exact(size_of::<RawFeature>()) {
            let Ok(feature) = RawFeature::read_from_bytes(raw) else { continue };
            let mask = 1_u64.checked_shl(u32::from(feature.bit)).unwrap_or(0);
            if feature.kind == 0 && bits & mask != 0 {
                let end = feature.name.iter().position(|byte| *byte == 0).unwrap_or(46);
                let name = feature.name.get(..end).unwrap_or_default();
                names.push(String::from_utf8_lossy(name).into_owned());
                bits &= !mask;
            }
        }
        if bits != 0 {
            names.push(format!("Unknown incompatible feature: {bits:x}"));
        }
        names.join(", ")
    }
}

/// The table of feature names that new images get.
pub(super) fn feature_name_table() -> Extension {
    const NAMES: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut data = Vec::with_capacity(NAMES.len() * size_of::<RawFeature>());
    for (kind, bit, text) in NAMES {
        let mut name = [0; 46];
        for (to, from) in name.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        data.extend_from_slice(RawFeature { kind, bit, name }.as_bytes());
    }
    Extension { kind: FEATURE_NAMES, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_extensions_survive_and_lengths_are_checked() {
        let list = vec![
            Extension { kind: 0x1234, data: vec![1, 2, 3] },
            feature_name_table(),
            Extension { kind: BITMAPS, data: vec![0; 24] },
        ];
        let extensions = Extensions { list, stored: 0 };
        let mut bytes = extensions.bytes();
        bytes.extend_from_slice(&[0xff; 32]);
        let read = Extensions::parse(&bytes).expect("parses");
        assert_eq!(read.list, extensions.list);
        assert_eq!(Extensions::parse(&[0, 0, 0, 9, 0, 0, 0, 1]), Err(Reason::Extension));
        assert_eq!(Extensions::parse(&[1, 0, 0, 9, 255, 255, 255, 255]), Err(Reason::Extension));
    }

    #[test]
    fn features_are_named_from_the_table_and_the_rest_in_hex() {
        let extensions = Extensions { list: vec![feature_name_table()], stored: 0 };
        assert_eq!(
            extensions.feature_names(0x105),
            "dirty bit, external data file, Unknown incompatible feature: 100"
        );
    }
}
