//! Which writes lead from one header to another so that every cut leaves the old or the new one.
//!
//! A reader looks at the first cluster: the fixed fields in its first sector say how long the list
//! of extensions is and where the backing name lies. One 512-byte sector is written whole or not at
//! all. A step from one content of the cluster to the next is therefore safe if
//! 1. it changes one sector only, or
//! 2. behind the first sector it changes nothing that the content before it uses; then the rest is
//!    written first, and after a barrier the first sector, which decides.
//!
//! Where the new content cannot be reached in one such step, contents that mean the same as the old
//! one are put in between: the name elsewhere, the table of feature names (which is only a help for
//! people) left out for a while, the bitmaps extension at the front of the list. Pure, no I/O.

use std::ops::Range;

use super::extensions::BITMAPS;
use super::header::Header;
use super::layout::SECTOR;
use crate::limits::BACKING_NAME_MAX;
use crate::reason::Reason;

/// Steps that a plan takes at most.
const STEPS_MAX: usize = 4;

/// Areas up to this size are tried at many places for the name.
const SMALL_AREA: usize = 4096;

/// The distance of these places.
const PLACES: usize = 128;

/// The beginning of the first cluster, and what it means.
#[derive(Clone, Debug)]
pub(super) struct Content {
    pub(super) header: Header,
    pub(super) bytes: Vec<u8>,
}

/// Bytes of the first cluster that a change from `old` to `new` can concern.
pub(super) fn area(old: &Header, new: &Header) -> usize {
    let used = [old, new].map(|header| {
        let list = header.header_length as usize + header.extensions.bytes().len();
        let name = usize::try_from(header.backing_offset).unwrap_or(0);
        list.max(name + BACKING_NAME_MAX as usize)
    });
    let needed = used.into_iter().max().unwrap_or(0) + 2 * (BACKING_NAME_MAX as usize + 1);
    let cluster = usize::try_from(old.geometry.cluster()).unwrap_or(0);
    needed.next_multiple_of(SECTOR).min(cluster)
}

/// The contents to be written one after the other; the last one means `new`. `bytes` is the
/// beginning of the first cluster as it is, as long as [`area`] says.
pub(super) fn plan(old: &Header, bytes: &[u8], new: &Header) -> Result<Vec<Content>, Reason> {
    let name = new.backing.as_ref().map_or(0, String::len);
    if name > BACKING_NAME_MAX as usize {
        return Err(Reason::BackingName);
    }
    let mut smallest = new.clone();
    smallest.extensions.drop_feature_names();
    if smallest.bytes().len() + name > bytes.len() {
        return Err(Reason::HeaderFull);
    }
    let start = Content { header: old.clone(), bytes: bytes.to_vec() };
    let found = [true, false].into_iter().find_map(|names| search(&start, old, new, names));
    found.ok_or(Reason::HeaderUnsafe)
}

/// A shortest way to the new header, with or without the table of feature names.
fn search(start: &Content, old: &Header, new: &Header, names: bool) -> Option<Vec<Content>> {
    let mut seen = Vec::new();
    let mut front = vec![vec![start.clone()]];
    for _ in 0..STEPS_MAX {
        for way in &front {
            let from = way.last()?;
            let goal = contents(new, from, &[names]).into_iter().find(|to| is_safe(from, to));
            if let Some(goal) = goal {
                let mut way = way.get(1..).unwrap_or_default().to_vec();
                way.push(goal);
                return Some(way);
            }
        }
        let mut next = Vec::new();
        for way in &front {
            let from = way.last()?;
            for to in contents(old, from, &[true, false]) {
                let key = (to.header.backing_offset, to.header.extensions.clone());
                if is_safe(from, &to) && !seen.contains(&key) {
                    seen.push(key);
                    let mut way = way.clone();
                    way.push(to);
                    next.push(way);
                }
            }
        }
        front = next;
    }
    None
}

/// The ways to lay out a header over what is there now.
fn contents(meaning: &Header, from: &Content, names: &[bool]) -> Vec<Content> {
    let mut found = Vec::new();
    for keep in names {
        for bitmaps_first in [false, true] {
            let mut header = meaning.clone();
            if !keep {
                header.extensions.drop_feature_names();
            }
            if bitmaps_first {
                header.extensions.list.sort_by_key(|extension| extension.kind != BITMAPS);
            }
            for at in places(&header, from) {
                found.extend(lay_out(header.clone(), &from.bytes, at));
            }
        }
    }
    found
}

/// Where the name could go.
fn places(header: &Header, from: &Content) -> Vec<usize> {
    let end = header.header_length as usize + header.extensions.bytes().len();
    let Some(name) = &header.backing else { return vec![end] };
    let used = used_ranges(&from.header).iter().map(|range| range.end).max().unwrap_or(0);
    let area = from.bytes.len();
    let mut places = vec![end, used.max(end).next_multiple_of(8), area.saturating_sub(name.len())];
    if area <= SMALL_AREA {
        places.extend((0..area).step_by(PLACES));
    }
    places.retain(|at| *at >= end);
    places
}

/// The beginning of the cluster with this header and its backing name at `at`, if it fits and no
/// sector ends inside of what says where the bitmaps are.
fn lay_out(mut header: Header, under: &[u8], at: usize) -> Option<Content> {
    let name = header.backing.clone().unwrap_or_default();
    header.backing_offset = if name.is_empty() { 0 } else { at as u64 };
    let content = header.bytes();
    header.extensions.stored = content.len().checked_sub(header.header_length as usize + 8)?;
    if let Some(data) = header.data_of(BITMAPS)
        && data.start / SECTOR != (data.end - 1) / SECTOR
    {
        return None;
    }
    let mut bytes = under.to_vec();
    bytes.get_mut(..content.len())?.copy_from_slice(&content);
    bytes.get_mut(at..at.checked_add(name.len())?)?.copy_from_slice(name.as_bytes());
    Some(Content { header, bytes })
}

/// See the module header.
fn is_safe(from: &Content, to: &Content) -> bool {
    let sectors = changed_sectors(&from.bytes, &to.bytes);
    if sectors.len() <= 1 {
        return true;
    }
    let used = used_ranges(&from.header);
    used.into_iter().flatten().filter(|at| *at >= SECTOR).all(|at| {
        let (from, to) = (from.bytes.get(at), to.bytes.get(at));
        from == to
    })
}

/// The sectors in which two contents differ.
pub(super) fn changed_sectors(from: &[u8], to: &[u8]) -> Vec<usize> {
    let pairs = from.chunks(SECTOR).zip(to.chunks(SECTOR)).enumerate();
    pairs.filter(|(_, (from, to))| from != to).map(|(sector, _)| sector).collect()
}

/// What a header makes readers look at: fields, extensions with their end marker, the name.
fn used_ranges(header: &Header) -> [Range<usize>; 2] {
    let end = header.header_length as usize + header.extensions.stored + 8;
    let at = usize::try_from(header.backing_offset).unwrap_or(0);
    let name = header.backing.as_ref().map_or(0, String::len);
    [0..end, at..at + name]
}
