//! I/O memory: the only module that allocates it.
//!
//! A [`Buf`] is a list of segments of reference-counted blocks: blocks of the core's own arenas,
//! or foreign memory (an embedder's, a guest's, a runtime's). Slices share memory, so a request can
//! be cut into pieces that the kernel reads or writes independently; each piece keeps its block
//! alive. No reference into the memory is ever handed out: contents are copied in and out, because
//! the kernel may be writing to another slice of the same block.
//!
//! Blocks go back to the pool of their core when the last slice is gone; in steady state nothing
//! is allocated. `Buf` is `!Send`.

use std::alloc::{Layout, handle_alloc_error};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;
use std::rc::{Rc, Weak};

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use smallvec::SmallVec;

use crate::limits::{ARENA_BYTES, BUF_CLASSES, BUF_MAX_BLOCK};

/// Alignment of own blocks of at least a page: enough for O_DIRECT on every device here.
pub const BUF_ALIGN: usize = 4096;

/// A list of memory segments that an I/O operation reads or fills.
#[derive(Clone, Default)]
pub struct Buf {
    segments: SmallVec<[Segment; 2]>,
    len: usize,
}

#[derive(Clone)]
struct Segment {
    block: BlockRef,
    start: usize,
    len: usize,
}

/// A counted reference to a block; the last one returns the block to its pool.
#[derive(Clone)]
struct BlockRef(Option<Rc<Block>>);

struct Block {
    memory: NonNull<u8>,
    capacity: usize,
    origin: Origin,
}

enum Origin {
    /// Part of an arena; `class` says which free list it returns to.
    Pool { class: usize, pool: Weak<PoolInner> },
    /// Memory that somebody else owns and that lives as long as `_owner`.
    Foreign { stable: bool, _owner: Box<dyn Any> },
}

/// The buffers of one core.
#[derive(Clone)]
pub struct Pool(Rc<PoolInner>);

#[derive(Default)]
struct PoolInner {
    free: [RefCell<Vec<Rc<Block>>>; BUF_CLASSES.len()],
    arenas: RefCell<Vec<Arena>>,
    in_use: Cell<usize>,
}

/// A mapping of `ARENA_BYTES`: fresh pages cost nothing before they are touched, where an allocator
/// would clear all of them.
struct Arena {
    memory: NonNull<u8>,
}

impl Pool {
    /// A pool without memory; arenas are added on demand.
    #[expect(clippy::new_without_default, reason = "a pool belongs to a core; none is default")]
    pub fn new() -> Self {
        Self(Rc::new(PoolInner::default()))
    }

    /// A buffer of `len` bytes with unspecified content; one segment up to 1 MiB, a list of 1 MiB
    /// segments above.
    pub fn alloc(&self, len: usize) -> Buf {
        let mut buf = Buf { segments: SmallVec::new(), len };
        let mut left = len;
        while left > 0 {
            let part = left.min(BUF_MAX_BLOCK);
            buf.segments.push(Segment { block: self.block(part), start: 0, len: part });
            left -= part;
        }
        buf
    }

    /// A buffer of `len` zero bytes.
    pub fn zeroed(&self, len: usize) -> Buf {
        let buf = self.alloc(len);
        buf.fill(0);
        buf
    }

    /// Bytes of blocks that are handed out now.
    pub fn in_use(&self) -> usize {
        self.0.in_use.get()
    }

    fn block(&self, len: usize) -> BlockRef {
        let class = BUF_CLASSES
            .iter()
            .position(|size| *size >= len)
            .expect("invariant: parts are at most the largest class");
        let cached = self.0.free[class].borrow_mut().pop();
        let block = cached.unwrap_or_else(|| self.grow(class));
        self.0.in_use.set(self.0.in_use.get() + block.capacity);
        BlockRef(Some(block))
    }

    /// Adds an arena for `class` and returns its first block.
    fn grow(&self, class: usize) -> Rc<Block> {
        let memory = map_arena();
        self.0.arenas.borrow_mut().push(Arena { memory });
        let capacity = BUF_CLASSES[class];
        let mut free = self.0.free[class].borrow_mut();
        for index in (0..ARENA_BYTES / capacity).rev() {
            // SAFETY: index * capacity lies inside the arena just allocated.
            let memory = unsafe { memory.add(index * capacity) };
            let origin = Origin::Pool { class, pool: Rc::downgrade(&self.0) };
            free.push(Rc::new(Block { memory, capacity, origin }));
        }
        free.pop().expect("invariant: an arena holds at least one block")
    }
}

/// Fresh zero pages.
fn map_arena() -> NonNull<u8> {
    let len = NonZeroUsize::new(ARENA_BYTES).expect("invariant: arenas are not empty");
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new private mapping; nothing else knows its address.
    match unsafe { mmap_anonymous(None, len, prot, MapFlags::MAP_PRIVATE) } {
        Ok(memory) => memory.cast(),
        Err(_) => handle_alloc_error(Layout::new::<[u8; ARENA_BYTES]>()),
    }
}

impl Drop for PoolInner {
    fn drop(&mut self) {
        // Blocks still handed out keep only a weak reference; their memory must outlive them, so
        // arenas are freed only when every block is back.
        let idle = self.in_use.get() == 0;
        for arena in self.arenas.get_mut().drain(..) {
            if idle {
                // SAFETY: mapped by `map_arena` with this length; no block is in use.
                let unmapped = unsafe { munmap(arena.memory.cast(), ARENA_BYTES) };
                debug_assert!(unmapped.is_ok(), "a mapping of our own");
            }
        }
    }
}

impl Drop for BlockRef {
    fn drop(&mut self) {
        let Some(block) = self.0.take() else { return };
        if Rc::strong_count(&block) > 1 {
            return;
        }
        if let Origin::Pool { class, pool } = &block.origin
            && let Some(pool) = pool.upgrade()
        {
            pool.in_use.set(pool.in_use.get() - block.capacity);
            let class = *class;
            pool.free[class].borrow_mut().push(block);
        }
    }
}

impl Segment {
    fn ptr(&self) -> *mut u8 {
        let block = self.block.0.as_ref().expect("invariant: set until drop");
        // SAFETY: start + len is inside the block (kept by construction of segments).
        unsafe { block.memory.as_ptr().add(self.start) }
    }
}

impl Buf {
    /// An empty buffer.
    pub fn empty() -> Self {
        Self::default()
    }

    /// Wraps memory that the caller owns; `owner` is dropped with the last slice.
    ///
    /// # Safety
    /// `memory` must be valid for reads and writes of `len` bytes as long as `owner` lives, and
    /// moving `owner` must not move it. With `stable` false somebody else (a guest) may change the
    /// bytes at any time; users that need two equal looks at them copy first.
    pub unsafe fn foreign(
        memory: NonNull<u8>,
        len: usize,
        owner: Box<dyn Any>,
        stable: bool,
    ) -> Self {
        let origin = Origin::Foreign { stable, _owner: owner };
        let block = Rc::new(Block { memory, capacity: len, origin });
        let segment = Segment { block: BlockRef(Some(block)), start: 0, len };
        Self { segments: SmallVec::from_iter([segment]), len }
    }

    /// Wraps a vector without copying.
    pub fn from_vec(mut bytes: Vec<u8>) -> Self {
        let len = bytes.len();
        if len == 0 {
            return Self::empty();
        }
        let memory = NonNull::new(bytes.as_mut_ptr()).expect("invariant: vectors are not null");
        // SAFETY: the vector owns len bytes at this address; moving the Vec moves no bytes.
        unsafe { Self::foreign(memory, len, Box::new(bytes), true) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether nobody but the engine can change the bytes.
    pub fn is_stable(&self) -> bool {
        self.segments.iter().all(|segment| {
            segment.block.0.as_ref().is_some_and(|block| match block.origin {
                Origin::Pool { .. } => true,
                Origin::Foreign { stable, .. } => stable,
            })
        })
    }

    /// The bytes in `range` as a buffer that shares the memory.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "slice outside the buffer");
        let mut out = Self { segments: SmallVec::new(), len: range.end - range.start };
        let mut at = 0;
        for segment in &self.segments {
            let from = range.start.max(at);
            let to = range.end.min(at + segment.len);
            if from < to {
                out.segments.push(Segment {
                    block: segment.block.clone(),
                    start: segment.start + (from - at),
                    len: to - from,
                });
            }
            at += segment.len;
        }
        out
    }

    /// Appends the segments of `other`: one buffer, two pieces of memory.
    pub fn append(&mut self, other: Self) {
        self.len += other.len;
        self.segments.extend(other.segments);
    }

    /// Drops all segments; the list keeps its memory for further use.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.len = 0;
    }

    /// Number of memory segments.
    pub fn segment_count(&self) -> usize {
        self.segments.len()
    }

    /// Address and length of each segment, for the ring and for inline system calls.
    pub fn raw_segments(&self) -> impl Iterator<Item = (*mut u8, usize)> + '_ {
        self.segments.iter().map(|segment| (segment.ptr(), segment.len))
    }

    /// Whether address and length of every segment are multiples of `align` (a power of two).
    pub fn is_aligned(&self, align: usize) -> bool {
        self.raw_segments().all(|(ptr, len)| (ptr as usize | len) & (align - 1) == 0)
    }

    /// Copies `bytes` to position `at`.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn copy_from(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len, "copy outside the buffer");
        let mut done = 0;
        for (ptr, len) in self.slice(at..at + bytes.len()).raw_segments() {
            // SAFETY: the segment has len bytes; bytes has at least done + len; no overlap with
            // a Rust reference, as none into blocks exist.
            unsafe { ptr.copy_from_nonoverlapping(bytes.as_ptr().add(done), len) };
            done += len;
        }
    }

    /// Copies the bytes from position `at` into `bytes`.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn copy_to(&self, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= self.len, "copy outside the buffer");
        let mut done = 0;
        for (ptr, len) in self.slice(at..at + bytes.len()).raw_segments() {
            // SAFETY: as in `copy_from`, with the roles exchanged.
            unsafe { ptr.copy_to_nonoverlapping(bytes.as_mut_ptr().add(done), len) };
            done += len;
        }
    }

    /// Copies all bytes of `other` (of the same length) into this buffer.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_from_buf(&self, other: &Self) {
        assert_eq!(self.len, other.len, "copy between buffers of different lengths");
        let mut at = 0;
        for (ptr, len) in other.raw_segments() {
            let mut done = 0;
            for (to, part) in self.slice(at..at + len).raw_segments() {
                // SAFETY: both segments have `part` bytes here; `copy` allows them to overlap.
                unsafe { to.copy_from(ptr.add(done), part) };
                done += part;
            }
            at += len;
        }
    }

    /// Sets every byte to `byte`.
    pub fn fill(&self, byte: u8) {
        for (ptr, len) in self.raw_segments() {
            // SAFETY: the segment has len bytes.
            unsafe { ptr.write_bytes(byte, len) };
        }
    }

    /// All bytes as a vector.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.copy_to(0, &mut bytes);
        bytes
    }

    /// Whether every byte is zero.
    pub fn is_zero(&self) -> bool {
        self.raw_segments().all(|(ptr, len)| {
            // SAFETY: the segment has len bytes; the slice lives only inside this closure, during
            // which no operation of this core runs.
            let bytes = unsafe { std::slice::from_raw_parts(ptr, len) };
            let (head, words, tail) = as_words(bytes);
            words.iter().all(|word| *word == 0) && head.iter().chain(tail).all(|byte| *byte == 0)
        })
    }

    /// The big-endian u64 at byte `at`, if it is inside.
    pub fn u64_be(&self, at: usize) -> Option<u64> {
        let mut bytes = [0; 8];
        (at.checked_add(8)? <= self.len).then(|| {
            self.copy_to(at, &mut bytes);
            u64::from_be_bytes(bytes)
        })
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({} bytes, {} segments)", self.len, self.segments.len())
    }
}

fn as_words(bytes: &[u8]) -> (&[u8], &[u64], &[u8]) {
    // SAFETY: every bit pattern is a valid u64.
    unsafe { bytes.align_to::<u64>() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_share_memory_and_blocks_return_to_the_pool() {
        let pool = Pool::new();
        let buf = pool.alloc(3 << 20);
        assert_eq!(buf.segment_count(), 3);
        buf.fill(1);
        let slice = buf.slice((1 << 20) - 2..(1 << 20) + 2);
        slice.copy_from(1, &[7, 8]);
        let mut out = [0; 4];
        buf.copy_to((1 << 20) - 2, &mut out);
        assert_eq!(out, [1, 7, 8, 1]);
        drop(buf);
        assert_eq!(pool.in_use(), 2 << 20, "the slice holds two blocks");
        drop(slice);
        assert_eq!(pool.in_use(), 0);
    }

    #[test]
    fn vectors_are_wrapped_without_a_copy_and_outlive_the_pool() {
        let vec = vec![5_u8; 100];
        let address = vec.as_ptr();
        let buf = Buf::from_vec(vec);
        assert_eq!(buf.raw_segments().next().map(|(ptr, _)| ptr.cast_const()), Some(address));
        assert!(buf.is_stable() && !buf.is_zero());
        let pool = Pool::new();
        let own = pool.zeroed(10);
        drop(pool);
        assert!(own.is_zero());
    }
}
