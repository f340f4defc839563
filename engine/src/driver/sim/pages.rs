//! Sparse bytes: 4 KiB pages in a map, absent pages read as zeroes.
//!
//! Pages are shared between clones until one of them writes, so copies of whole files are cheap.

use std::collections::BTreeMap;
use std::rc::Rc;

/// Bytes of a page.
pub(super) const PAGE: u64 = 4096;
const PAGE_LEN: usize = 4096;

pub(super) type Page = Rc<[u8; PAGE_LEN]>;

/// The pages of a file.
#[derive(Clone, Debug, Default)]
pub(super) struct Pages(BTreeMap<u64, Page>);

/// A piece of a range that lies in one page.
pub(super) struct Piece {
    pub(super) page: u64,
    /// Position in the page.
    pub(super) start: usize,
    /// Position in the range.
    pub(super) at: usize,
    pub(super) len: usize,
}

/// Cuts `len` bytes at `offset` at page borders.
pub(super) fn pieces(offset: u64, len: usize) -> impl Iterator<Item = Piece> {
    let mut at = 0;
    std::iter::from_fn(move || {
        (at < len).then(|| {
            let position = offset + at as u64;
            let start = usize::try_from(position % PAGE).expect("invariant: below a page");
            let part = (PAGE_LEN - start).min(len - at);
            let piece = Piece { page: position / PAGE, start, at, len: part };
            at += part;
            piece
        })
    })
}

impl Pages {
    /// Number of pages present.
    pub(super) fn count(&self) -> u64 {
        self.0.len() as u64
    }

    /// Pages of the range that are not there yet.
    pub(super) fn missing(&self, offset: u64, len: u64) -> u64 {
        if len == 0 {
            return 0;
        }
        let (first, end) = (offset / PAGE, (offset + len).div_ceil(PAGE));
        end - first - self.0.range(first..end).count() as u64
    }

    /// Indexes of the pages present that overlap the range.
    pub(super) fn present(&self, offset: u64, end: u64) -> impl Iterator<Item = u64> + '_ {
        self.0.range(offset / PAGE..end.div_ceil(PAGE)).map(|(page, _)| *page)
    }

    /// All pages, shared with the caller.
    pub(super) fn all(&self) -> BTreeMap<u64, Page> {
        self.0.clone()
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        for piece in pieces(offset, bytes.len()) {
            let page = self.0.entry(piece.page).or_insert_with(|| Rc::new([0; PAGE_LEN]));
            let page = Rc::make_mut(page);
            page[piece.start..piece.start + piece.len]
                .copy_from_slice(&bytes[piece.at..piece.at + piece.len]);
        }
    }

    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) {
        for piece in pieces(offset, bytes.len()) {
            let to = &mut bytes[piece.at..piece.at + piece.len];
            match self.0.get(&piece.page) {
                Some(page) => to.copy_from_slice(&page[piece.start..piece.start + piece.len]),
                None => to.fill(0),
            }
        }
    }

    /// Makes `offset..end` read as zeroes; whole pages are given back.
    pub(super) fn zero(&mut self, offset: u64, end: u64) {
        if offset >= end {
            return;
        }
        let touched: Vec<u64> = self.present(offset, end).collect();
        for index in touched {
            let start = index * PAGE;
            let (from, to) = (offset.max(start) - start, end.min(start + PAGE) - start);
            if to - from == PAGE {
                self.0.remove(&index);
            } else if let Some(page) = self.0.get_mut(&index) {
                let from = usize::try_from(from).expect("invariant: inside a page");
                let to = usize::try_from(to).expect("invariant: inside a page");
                Rc::make_mut(page)[from..to].fill(0);
            }
        }
    }

    /// Runs of data and holes that cover the range, page-granular.
    pub(super) fn runs(&self, offset: u64, len: u64) -> Vec<(u64, bool)> {
        let end = offset.saturating_add(len);
        let mut runs: Vec<(u64, bool)> = Vec::new();
        let mut push = |len: u64, data: bool| match runs.last_mut() {
            Some(last) if last.1 == data => last.0 += len,
            _ if len > 0 => runs.push((len, data)),
            _ => {}
        };
        let mut at = offset;
        for page in self.present(offset, end) {
            let start = (page * PAGE).max(offset);
            push(start - at, false);
            at = ((page + 1) * PAGE).min(end);
            push(at - start, true);
        }
        push(end - at, false);
        runs
    }
}
