//! Writes whose bytes come from another node and are not moved: the blocks of its file are shared.
//!
//! Owns the request and the search for places. Such a write enters the node by its write path, in
//! the order of the module header; step 5 (data) makes the file share the blocks. It never fails:
//! what cannot be shared is left to the caller, who copies it and meets the failure, if there is
//! one, where a copy meets it. Everything in the range may have changed then.
//!
//! Where the bytes lie is asked under the claim and kept by leases until the request ends. What the
//! bytes are is not looked at: no zeroes are found, and hooks that look at bytes are obeyed by not
//! sharing.
//!
//! While guests wait for the source, the caller may ask for his [`ShareTurn`] back: the request
//! then begins nothing any more and ends. What is being shared at that moment is waited for, which
//! is short; gates, claims and tables of the target are not.

use std::cell::Cell;
use std::rc::Rc;

use smallvec::SmallVec;

use super::account::{Counting, Work};
use super::fill::absent;
use super::object::{DetectZeroes, Node};
use super::path::Path;
use super::reads::WatchedReads;
use super::request::{Admitted, Origin, Target, checked_write};
use crate::address::GuestRange;
use crate::error::Result;
use crate::executor::{Class, Core, JoinHandle};
use crate::format::{Extents, Format, Mapping, MissId, WritePiece, WriteStep};
use crate::lease::Lease;
use crate::limits::SHARE_RUN_MIN;
use crate::storage::{File, Sharing, Storage};

/// How a write by sharing ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shared {
    /// All of the range is shared.
    Done,
    /// The bytes have to be copied.
    Copy,
    /// The turn was asked for.
    GivenUp,
}

/// The right to share blocks of a source that others wait for.
#[derive(Debug, Default)]
pub struct ShareTurn {
    busy: Cell<bool>,
    wanted_back: Cell<bool>,
    longest_ns: Cell<u64>,
}

impl ShareTurn {
    /// From now on nothing more is shared; true if nothing is being shared.
    pub fn give_up(&self) -> bool {
        self.wanted_back.set(true);
        !self.busy.get()
    }

    /// Nanoseconds of the longest single step so far: that long writers of the source waited.
    pub fn longest_ns(&self) -> u64 {
        self.longest_ns.get()
    }

    fn begin(&self) -> bool {
        let may = !self.wanted_back.get();
        self.busy.set(may);
        may
    }

    fn end(&self, nanos: u64) {
        self.busy.set(false);
        self.longest_ns.set(self.longest_ns.get().max(nanos));
    }
}

/// What a write by sharing goes by.
#[derive(Clone, Debug, Default)]
pub struct ShareRight {
    /// What is known of the files.
    pub sharing: Rc<Sharing>,
    /// Whether it may go on.
    pub turn: Rc<ShareTurn>,
}

/// A run of guest bytes, and where it lies as it is.
struct Place {
    range: GuestRange,
    file: Option<(Rc<File>, u64)>,
}

/// The places of a range, in order, with what keeps them.
#[derive(Default)]
struct Places {
    runs: Vec<Place>,
    leases: SmallVec<[Lease; 4]>,
    _watched: WatchedReads,
}

impl Node {
    /// Writes `range` by sharing what `source` has in the same range.
    pub fn write_shared(
        self: &Rc<Self>,
        source: &Rc<Self>,
        range: GuestRange,
        right: ShareRight,
        origin: Origin,
    ) -> JoinHandle<Shared> {
        let (node, source) = (Rc::clone(self), Rc::clone(source));
        self.core().spawn(Class::Background, async move {
            // Whatever is wrong, a copy will meet it and tell it.
            write(Target::Node(node, origin), &source, range, &right).await.unwrap_or(Shared::Copy)
        })
    }

    /// Gives this node's own layer by sharing what layers below show through it in `range`, where
    /// it has nothing itself; as [`Node::fill`].
    pub fn fill_shared(
        self: &Rc<Self>,
        range: GuestRange,
        right: ShareRight,
        origin: Origin,
    ) -> JoinHandle<Shared> {
        let node = Rc::clone(self);
        self.core().spawn(Class::Background, async move {
            fill(Target::Node(node, origin), range, &right).await.unwrap_or(Shared::Copy)
        })
    }

    /// The parts of `range`, in order, that `target` may be able to share as they lie now: whole
    /// blocks, in places that are long enough to be worth it. Past the gate, as a read of a copy.
    pub fn sharable(
        self: &Rc<Self>,
        range: GuestRange,
        target: &Rc<Self>,
        sharing: &Rc<Sharing>,
    ) -> JoinHandle<Result<Vec<GuestRange>>> {
        let (node, target, sharing) = (Rc::clone(self), Rc::clone(target), Rc::clone(sharing));
        self.core().spawn(Class::Background, async move {
            let node = node.served();
            if node.view().is_some() || !target.served().takes_blocks() {
                return Ok(Vec::new());
            }
            let path = node.path();
            let storage = target.served().path().top().format.data_storage().clone();
            let Storage::File(into) = storage else { return Ok(Vec::new()) };
            let places = places(&path, 0, range).await?;
            let mut found: Vec<GuestRange> = Vec::new();
            for run in places.runs.iter().filter_map(|place| place.usable(&into, &sharing)) {
                match found.last_mut() {
                    Some(last) if last.end() == run.start => last.len += run.len,
                    _ => found.push(run),
                }
            }
            Ok(found)
        })
    }

    /// Whether writes may come without their bytes.
    fn takes_blocks(&self) -> bool {
        self.options().detect_zeroes == DetectZeroes::Off && self.view().is_none()
    }
}

impl Place {
    /// The whole blocks of it that `into` may share.
    fn usable(&self, into: &File, sharing: &Sharing) -> Option<GuestRange> {
        let (file, at) = self.file.as_ref()?;
        let unit = sharing.unit(file, into)?;
        let start = self.range.start.align_up(unit);
        let inside = file.size().saturating_sub(*at).min(self.range.len);
        let end = self.range.start.plus(inside).align_down(unit);
        let skipped = start.since(self.range.start);
        let fits = at.saturating_add(skipped).is_multiple_of(unit);
        let len = end.since(start);
        (fits && len >= SHARE_RUN_MIN).then_some(GuestRange { start, len })
    }
}

async fn write(
    target: Target,
    source: &Rc<Node>,
    range: GuestRange,
    right: &ShareRight,
) -> Result<Shared> {
    let Admitted { node, .. } = &target.admit().await;
    let counting = Counting::admitted(node, Work::Write, range.len).withdrawn();
    if let Some(end) = refused(node, range, right)? {
        return Ok(end);
    }
    node.watch.note(range.start.bytes(), range.len);
    let path = node.path();
    let claim = node.claims.claim(range);
    claim.held().await;
    let hooks = node.hooks.current();
    if hooks.copies_bytes() {
        return Ok(Shared::Copy);
    }
    hooks.before(range).await?;
    let source = source.served();
    let ended = if source.view().is_some() {
        Ok(Shared::Copy)
    } else {
        share(node.core(), &path, (&source.path(), 0), range, right).await
    };
    let done = matches!(ended, Ok(Shared::Done));
    hooks.after(range, super::hooks::Copies::new(), done).await;
    node.bitmaps.record(range);
    drop(claim);
    if done {
        counting.done();
    }
    ended
}

async fn fill(target: Target, range: GuestRange, right: &ShareRight) -> Result<Shared> {
    let Admitted { node, .. } = &target.admit().await;
    if let Some(end) = refused(node, range, right)? {
        return Ok(end);
    }
    let path = node.path();
    let claim = node.claims.claim(range.widen(path.top().format.cluster_size()));
    claim.held().await;
    for run in absent(&*path.top().format, range).await? {
        // The layer itself has nothing there.
        match share(node.core(), &path, (&path, 1), run, right).await? {
            Shared::Done => {}
            other => return Ok(other),
        }
    }
    Ok(Shared::Done)
}

/// How it ends at once, if so.
fn refused(node: &Node, range: GuestRange, right: &ShareRight) -> Result<Option<Shared>> {
    checked_write(node, range.start.bytes(), range.len, "share blocks")?;
    if right.turn.wanted_back.get() {
        return Ok(Some(Shared::GivenUp));
    }
    Ok((!node.takes_blocks()).then_some(Shared::Copy))
}

/// Brings `range` into the top layer of `path` as `source` shows it from layer `from` on. The
/// caller holds the claim. Nothing that was resolved is kept while the layer lets the request wait:
/// what it waits for may be waiting for that.
async fn share(
    core: &Core,
    path: &Path,
    (source, from): (&Path, usize),
    range: GuestRange,
    right: &ShareRight,
) -> Result<Shared> {
    let format = &path.top().format;
    let Storage::File(into) = format.data_storage() else { return Ok(Shared::Copy) };
    let mut way = Way { core, format: &**format, into, right, rest: range };
    while !way.rest.is_empty() {
        let places = places(source, from, way.rest).await?;
        let stop = way.go(&places).await?;
        drop(places);
        match stop {
            Stop::End(ended) => return Ok(ended),
            Stop::Miss(miss) => format.load(miss).await?,
            Stop::Wait(wait) => format.pending(wait).await,
        }
    }
    Ok(Shared::Done)
}

/// A range on its way into a layer.
struct Way<'a> {
    core: &'a Core,
    format: &'a dyn Format,
    into: &'a Rc<File>,
    right: &'a ShareRight,
    rest: GuestRange,
}

/// Why a range did not go on.
enum Stop {
    End(Shared),
    Miss(MissId),
    Wait(MissId),
}

impl Way<'_> {
    /// Brings what lies in `places` into the layer, as far as that goes without waiting.
    async fn go(&mut self, places: &Places) -> Result<Stop> {
        for place in &places.runs {
            let Some((from, at)) = &place.file else { return Ok(Stop::End(Shared::Copy)) };
            let end = place.range.end();
            while self.rest.start < end {
                if self.right.turn.wanted_back.get() {
                    return Ok(Stop::End(Shared::GivenUp));
                }
                let here = GuestRange { len: end.since(self.rest.start), ..self.rest };
                let at = at.saturating_add(here.start.since(place.range.start));
                let piece = match self.format.begin_write(here)? {
                    WriteStep::Miss(miss) => return Ok(Stop::Miss(miss)),
                    WriteStep::Wait(wait) => return Ok(Stop::Wait(wait)),
                    WriteStep::Ready(piece) => piece,
                };
                let len = piece.len;
                match self.piece(piece, from, at).await {
                    Shared::Done => {}
                    other => return Ok(Stop::End(other)),
                }
                let start = here.start.plus(len);
                self.rest = GuestRange { start, len: self.rest.end().since(start) };
            }
        }
        Ok(Stop::End(Shared::Done))
    }

    /// Shares one piece with `from` at `at`; a guard that is dropped gives its clusters back.
    async fn piece(&self, piece: WritePiece, from: &Rc<File>, at: u64) -> Shared {
        let ShareRight { sharing, turn } = self.right;
        let Some(unit) = sharing.unit(from, self.into) else { return Shared::Copy };
        if !piece.host.bytes().is_multiple_of(unit) {
            // So it is with all of them.
            sharing.refuse(from, self.into);
            return Shared::Copy;
        }
        let whole = piece.head == 0 && piece.tail == 0;
        let inside = at.checked_add(piece.len).is_some_and(|end| end <= from.size());
        if !whole || !inside || !(at | piece.len).is_multiple_of(unit) {
            return Shared::Copy;
        }
        if !turn.begin() {
            return Shared::GivenUp;
        }
        let began = self.core.now();
        let result = self.into.share(piece.host.bytes(), from, at, piece.len).await;
        turn.end(self.core.now().saturating_sub(began));
        sharing.note(from, self.into, &result);
        if result.is_err() {
            return Shared::Copy;
        }
        piece.guard.complete();
        Shared::Done
    }
}

/// What is left to find out, the earliest range on top of the stack.
enum Todo {
    Look(GuestRange, usize),
    Known(Place),
}

/// Where the bytes of `range` lie, as seen from layer `from` of `path`.
async fn places(path: &Path, from: usize, range: GuestRange) -> Result<Places> {
    let mut places = Places { _watched: path.watch_read(range), ..Places::default() };
    let mut todo = vec![Todo::Look(range, from)];
    while let Some(part) = todo.pop() {
        match part {
            Todo::Known(place) => places.add(place),
            Todo::Look(range, layer) => {
                let mut found = look(path, range, layer, &mut places).await?;
                while let Some(part) = found.pop() {
                    todo.push(part);
                }
            }
        }
    }
    Ok(places)
}

/// What one layer says about `range`, in order.
async fn look(
    path: &Path,
    range: GuestRange,
    layer: usize,
    places: &mut Places,
) -> Result<Vec<Todo>> {
    let mut found = Vec::new();
    let nowhere = |range: GuestRange| Todo::Known(Place { range, file: None });
    let Some(format) = path.layers().get(layer).map(|layer| Rc::clone(&layer.format)) else {
        found.push(nowhere(range));
        return Ok(found);
    };
    let inside = range.intersect(GuestRange::new(0, format.size()));
    let mut extents = Extents::new();
    if !inside.is_empty()
        && let Some(lease) = format.resolve(inside, &mut extents)
    {
        places.leases.push(lease);
    }
    let mut rest = inside;
    for extent in &extents {
        let run = GuestRange { len: extent.len.min(rest.len), ..rest };
        let file = match (&extent.mapping, format.data_storage()) {
            (Mapping::Miss(miss), _) => {
                format.load(*miss).await?;
                found.push(Todo::Look(rest, layer));
                break;
            }
            (Mapping::Absent, _) => {
                found.push(Todo::Look(run, layer + 1));
                None
            }
            (Mapping::Data(host), Storage::File(file)) => Some((Rc::clone(file), host.bytes())),
            _ => None,
        };
        if !matches!(extent.mapping, Mapping::Absent) {
            found.push(Todo::Known(Place { range: run, file }));
        }
        rest = GuestRange { start: run.end(), len: rest.len - run.len };
    }
    if inside.len < range.len {
        let start = range.start.plus(inside.len);
        found.push(nowhere(GuestRange { start, len: range.len - inside.len }));
    }
    Ok(found)
}

impl Places {
    /// Adds the next run; what continues the last one in its file becomes one with it.
    fn add(&mut self, place: Place) {
        if place.range.is_empty() {
            return;
        }
        if let (Some(last), Some((file, at))) = (self.runs.last_mut(), &place.file)
            && let Some((known, from)) = &last.file
            && Rc::ptr_eq(known, file)
            && from.checked_add(last.range.len) == Some(*at)
        {
            last.range.len += place.range.len;
            return;
        }
        self.runs.push(place);
    }
}
