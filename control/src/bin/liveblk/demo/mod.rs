//! `liveblk demo`: the main job on real images, with a guest that writes and verifies all the time.
//!
//! The scenario runs on an engine core and reports through a channel; the main thread draws. The
//! images are made in a temporary folder that is removed at the end, also after a failure, unless
//! `--keep` names one.

mod guest;
mod images;
mod run;
mod scenario;
mod show;

pub(crate) use run::run;
