//! Memory of tasks: type-erased futures in blocks that are reused.
//!
//! A task is its future until it is done, then its output until the join handle takes it. Blocks
//! are kept in free lists by size class, so spawning allocates nothing in steady state.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::future::Future;
use std::pin::Pin;
use std::ptr::NonNull;
use std::task::{Context, Poll};

/// Size classes of task blocks: 256 B << index.
const CLASSES: usize = 10;
const SMALLEST: usize = 256;
const ALIGN: usize = 64;

/// Free blocks by size class.
#[derive(Default)]
pub(super) struct TaskMemory {
    free: [Vec<NonNull<u8>>; CLASSES],
}

enum Stage<F: Future> {
    Running(F),
    /// `None`: the output was taken.
    Done(Option<F::Output>),
}

struct Vtable {
    layout: Layout,
    /// Polls the future; true when it is done (the output is then stored in its place).
    poll: unsafe fn(NonNull<u8>, &mut Context<'_>) -> bool,
    /// Moves the output to the pointer, which must be valid for it.
    take: unsafe fn(NonNull<u8>, *mut u8),
    drop: unsafe fn(NonNull<u8>),
}

/// A task's memory; `Copy` because the slab of tasks decides about its life.
#[derive(Clone, Copy)]
pub(super) struct RawTask {
    memory: NonNull<u8>,
    vtable: &'static Vtable,
}

struct Of<F>(std::marker::PhantomData<F>);

impl<F: Future> Of<F> {
    const VTABLE: Vtable = Vtable {
        layout: Layout::new::<Stage<F>>(),
        poll: Self::poll,
        take: Self::take,
        drop: Self::drop,
    };

    /// # Safety
    /// `memory` holds a `Stage<F>` that is not being polled and was not dropped.
    unsafe fn poll(memory: NonNull<u8>, context: &mut Context<'_>) -> bool {
        // SAFETY: the caller passes memory that holds a Stage<F>, not moved since it was written.
        let stage = unsafe { memory.cast::<Stage<F>>().as_mut() };
        let Stage::Running(future) = stage else { return true };
        // SAFETY: the stage stays at this address until it is dropped in place.
        let future = unsafe { Pin::new_unchecked(future) };
        match future.poll(context) {
            Poll::Ready(output) => {
                *stage = Stage::Done(Some(output));
                true
            }
            Poll::Pending => false,
        }
    }

    /// # Safety
    /// As for `poll`; `output` is valid for writing an `Option<F::Output>`.
    unsafe fn take(memory: NonNull<u8>, output: *mut u8) {
        // SAFETY: as in `poll`; the task is done, so nothing is pinned any more.
        let stage = unsafe { memory.cast::<Stage<F>>().as_mut() };
        // The output alone is moved: a stage is as large as its future.
        if let Stage::Done(value) = stage {
            // SAFETY: the caller's pointer is valid for an Option<F::Output>.
            unsafe { output.cast::<Option<F::Output>>().write(value.take()) };
        }
    }

    /// # Safety
    /// As for `poll`; nothing uses the contents afterwards.
    unsafe fn drop(memory: NonNull<u8>) {
        // SAFETY: the memory holds a Stage<F> that is dropped exactly once.
        unsafe { memory.cast::<Stage<F>>().drop_in_place() };
    }
}

impl RawTask {
    /// Polls once; true when the task is done.
    ///
    /// # Safety
    /// The task was not released and is not being polled.
    pub(super) unsafe fn poll(self, context: &mut Context<'_>) -> bool {
        // SAFETY: the vtable belongs to the memory.
        unsafe { (self.vtable.poll)(self.memory, context) }
    }

    /// Takes the output of a finished task.
    ///
    /// # Safety
    /// The task was not released and `T` is its output type.
    pub(super) unsafe fn take<T>(self) -> Option<T> {
        let mut output: Option<T> = None;
        // SAFETY: the vtable belongs to the memory; T is the output type.
        unsafe { (self.vtable.take)(self.memory, (&raw mut output).cast()) };
        output
    }
}

impl TaskMemory {
    /// Moves `future` into a block.
    pub(super) fn store<F: Future + 'static>(&mut self, future: F) -> RawTask {
        let layout = Layout::new::<Stage<F>>();
        let memory = match class(layout) {
            Some(class) => self.free[class].pop().unwrap_or_else(|| allocate(class_layout(class))),
            None => allocate(layout),
        };
        // SAFETY: the block is at least as large and aligned as the layout demands.
        unsafe { memory.cast::<Stage<F>>().write(Stage::Running(future)) };
        RawTask { memory, vtable: &Of::<F>::VTABLE }
    }

    /// Keeps the block of a task whose contents were dropped.
    pub(super) fn recycle(&mut self, task: RawTask) {
        match class(task.vtable.layout) {
            Some(class) => self.free[class].push(task.memory),
            // SAFETY: allocated by `store` with this layout.
            None => unsafe { dealloc(task.memory.as_ptr(), task.vtable.layout) },
        }
    }
}

/// Drops the future or output of a task in place.
///
/// # Safety
/// Called once per task, not while it is polled.
pub(super) unsafe fn drop_contents(task: RawTask) {
    // SAFETY: the vtable belongs to the memory; the caller promises that this is the only drop.
    unsafe { (task.vtable.drop)(task.memory) };
}

impl Drop for TaskMemory {
    fn drop(&mut self) {
        for (class, blocks) in self.free.iter_mut().enumerate() {
            for block in blocks.drain(..) {
                // SAFETY: blocks of a class were allocated with its layout.
                unsafe { dealloc(block.as_ptr(), class_layout(class)) };
            }
        }
    }
}

fn class(layout: Layout) -> Option<usize> {
    let fits = |class: &usize| layout.size() <= SMALLEST << *class;
    (layout.align() <= ALIGN).then(|| (0..CLASSES).find(fits)).flatten()
}

fn class_layout(class: usize) -> Layout {
    Layout::from_size_align(SMALLEST << class, ALIGN)
        .expect("invariant: sizes are small powers of two")
}

fn allocate(layout: Layout) -> NonNull<u8> {
    // SAFETY: a Stage is never zero-sized (it has a tag) and classes are not either.
    let memory = unsafe { alloc(layout) };
    NonNull::new(memory).unwrap_or_else(|| handle_alloc_error(layout))
}
