//! The command line of `liveblk`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::img::ImgOptions;

/// Live block operations on virtual disks.
#[derive(Debug, Parser)]
#[command(name = "liveblk", version, about, propagate_version = true)]
pub(crate) struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Show the main job: a guest writes while its disks are snapshotted, mirrored and backed up
    Demo(DemoOptions),
    /// Image files offline: create, info, check, compare, convert, map, resize, snapshot, bitmap
    Img(Box<ImgOptions>),
}

/// Options of `liveblk demo`.
#[derive(Args, Debug)]
pub(crate) struct DemoOptions {
    /// Make the images in this folder (created if missing) and keep them
    #[arg(long, value_name = "DIR")]
    pub(crate) keep: Option<PathBuf>,
    /// Size of the first disk in MiB (the second is an eighth of it)
    #[arg(long, value_name = "MIB", default_value_t = 512,
          value_parser = clap::value_parser!(u64).range(64..=65536))]
    pub(crate) size: u64,
}
