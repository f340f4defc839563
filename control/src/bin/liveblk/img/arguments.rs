//! The command lines of `liveblk img`: what each verb takes, in qemu-img's names.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::bitmap::BitmapOptions;
use super::check::CheckOptions;
use super::compare::CompareOptions;
use super::convert::ConvertOptions;
use super::create::CreateOptions;
use super::info::InfoOptions;
use super::io::IoOptions;
use super::map::MapOptions;
use super::resize::ResizeOptions;
use super::snapshot::SnapshotOptions;

/// Options of `liveblk img`.
#[derive(Args, Debug)]
pub(crate) struct ImgOptions {
    /// Which references in image headers are followed
    #[arg(long, global = true, value_enum, default_value_t, value_name = "POLICY")]
    pub(crate) header_refs: HeaderRefs,
    /// Also follow references into this folder (may be given more than once)
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) allow_dir: Vec<PathBuf>,
    /// Objects of the peer: there are none here that an image could need
    #[arg(long, global = true, hide = true, value_name = "OBJDEF")]
    pub(crate) object: Vec<String>,
    /// What to do with images
    #[command(subcommand)]
    pub(crate) verb: ImgVerb,
}

/// Which references in headers are followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum HeaderRefs {
    /// Any regular file or block device
    Any,
    /// Regular files in the image's own folder or below it, or in an allowed folder
    #[default]
    SameDir,
    /// None
    Explicit,
}

/// The verbs of `liveblk img`.
#[derive(Debug, Subcommand)]
pub(crate) enum ImgVerb {
    /// Make a new image
    Create(CreateOptions),
    /// Show what an image is
    Info(InfoOptions),
    /// Check (and repair) the metadata of an image
    Check(CheckOptions),
    /// Compare what guests see of two images
    Compare(CompareOptions),
    /// Copy images into a new one, in another format if wanted
    Convert(ConvertOptions),
    /// Show where the bytes of an image lie
    Map(MapOptions),
    /// Change the size of an image
    Resize(ResizeOptions),
    /// List, take, apply or delete snapshots inside an image
    Snapshot(SnapshotOptions),
    /// Change the persistent bitmaps of an image
    Bitmap(BitmapOptions),
    /// For tests: read and write in the words of qemu-io
    #[command(hide = true)]
    Io(IoOptions),
}

/// How results are shown.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct Output {
    /// How to show the result
    #[arg(long, value_enum, default_value_t, value_name = "FORM")]
    pub(crate) output: Form,
    /// The same as --output=json
    #[arg(long, conflicts_with = "output")]
    pub(crate) json: bool,
}

/// Forms of results.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    /// For people
    #[default]
    Human,
    /// For programs
    Json,
}

impl Output {
    /// Whether JSON is wanted.
    pub(crate) fn is_json(self) -> bool {
        self.json || self.output == Form::Json
    }
}
