//! `liveblk img`: image files offline, in qemu-img's argument style.
//!
//! Exit codes, texts and JSON shapes are qemu-img 10.0's where it has them. Beyond it: raw is never
//! probed (`-f raw` says it), references in headers are followed by policy, a new image gets its
//! name only when it is complete and durable, overlays get subclusters. Works on the library, never
//! on a daemon; an image that another process writes is refused by its locks.

mod arguments;
mod bitmap;
mod bitmap_copy;
mod cache;
mod check;
mod compare;
mod convert;
mod copy;
mod create;
mod failure;
mod info;
mod io;
mod keys;
mod map;
mod newfile;
mod pieces;
mod progress;
mod resize;
mod run;
mod size;
mod snapshot;
mod source;

pub(crate) use arguments::ImgOptions;
pub(crate) use run::run;
