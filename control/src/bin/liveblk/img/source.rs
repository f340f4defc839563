//! Opening images that exist: which format, which rights, with or without what lies below.

use std::path::Path;
use std::rc::Rc;

use liveblk::engine::format::SnapshotChoice;
use liveblk::engine::graph::FileSource;
use liveblk::engine::storage::{File, FileOptions};
use liveblk::{BackingSource, ErrorKind, Host, HostError, Node, OpenNode};
use liveblk_control::backend::ImageOpts;

use super::failure::Failure;

/// How an image is to be opened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wanted<'a> {
    /// Its format, if the caller says it.
    pub(crate) format: Option<&'a str>,
    /// For writing.
    pub(crate) writable: bool,
    /// Read although others may write.
    pub(crate) shared: bool,
    /// Past the page cache.
    pub(crate) direct: bool,
    /// Without what lies below.
    pub(crate) alone: bool,
    /// What names it are options (`--image-opts`), not a file name.
    pub(crate) by_options: bool,
    /// As it was at this snapshot inside it.
    pub(crate) snapshot: Option<&'a SnapshotChoice>,
}

/// Opens the image `file`.
///
/// # Errors
/// "Could not open 'file': " and why.
pub(crate) async fn open(host: &Host, file: &str, wanted: Wanted<'_>) -> Result<Rc<Node>, Failure> {
    let share = wanted.shared && !wanted.writable;
    let (format, mut spec) = match wanted.by_options {
        true => by_options(host, file, wanted, share).await?,
        false => {
            let format = format_of(host, file, wanted.format).await?;
            let mut spec = OpenNode::new(&format, file);
            spec.writable = wanted.writable;
            spec.force_share = share;
            (format, spec)
        }
    };
    spec.bitmaps = false;
    spec.options.direct |= wanted.direct;
    spec.options.discard_unmap = true;
    spec.monitor_owned = true;
    if wanted.alone {
        spec.backing = BackingSource::None;
    }
    if let FileSource::Open(held) = &mut spec.file {
        held.no_locking |= share;
    }
    spec.snapshot = wanted.snapshot.cloned();
    host.open(spec).await.map_err(|error| match &error {
        HostError::Engine(error) if error.op() == "open a snapshot" => {
            let cause: &dyn std::fmt::Display = match error.kind() {
                ErrorKind::NotFound => &"Can't find snapshot",
                ErrorKind::Unsupported => &format!(
                    "Block format '{format}' used by device '' does not support temporarily \
                     loading internal snapshots"
                ),
                _ => error,
            };
            Failure::new(format!("Failed to load snapshot: {cause}"))
        }
        _ => Failure::open(file, &error),
    })
}

/// The image that options name.
async fn by_options(
    host: &Host,
    text: &str,
    wanted: Wanted<'_>,
    share: bool,
) -> Result<(String, OpenNode), Failure> {
    let opts = named_by(text, wanted.format)?;
    let format = match (opts.driver(), opts.filename()) {
        (Some("file"), _) => "file".to_owned(),
        (None, Some(filename)) => format_of(host, filename, None).await?,
        (driver, _) => format_of(host, text, Some(driver.unwrap_or("raw"))).await?,
    };
    let spec = opts.open(&format, !wanted.writable, share);
    Ok((format, spec.map_err(|cause| Failure::open(text, &cause))?))
}

/// The options of an image; `format` is what was said beside them.
///
/// # Errors
/// If they cannot be read, or a format was said as well.
pub(crate) fn named_by(text: &str, format: Option<&str>) -> Result<ImageOpts, Failure> {
    if format.is_some() {
        return Err(Failure::new("--image-opts and --format are mutually exclusive"));
    }
    ImageOpts::parse(text).map_err(|cause| Failure::open(text, &cause))
}

/// The format of `file`: what the caller says, else what the file proves. raw is never guessed.
///
/// # Errors
/// If it cannot be read, or proves nothing.
pub(crate) async fn format_of(
    host: &Host,
    file: &str,
    said: Option<&str>,
) -> Result<String, Failure> {
    let formats = host.graph().config().formats;
    if let Some(said) = said {
        return match formats.find(said) {
            Some(_) => Ok(said.to_owned()),
            None => {
                let known: Vec<&str> = formats.names().collect();
                let cause = format!("Unknown driver '{said}' (there are: {})", known.join(", "));
                Err(Failure::open(file, &cause))
            }
        };
    }
    let failed = |error: liveblk::Error| match error.detail() {
        Some(detail) => Failure::open(file, &detail),
        None => Failure::open(file, &error.kind()),
    };
    let options = FileOptions { path: file.into(), ..FileOptions::default() };
    let opened = File::open(host.core(), options).await.map_err(failed)?;
    let head = host.space(512);
    opened.read(0, head.clone()).await.map_err(failed)?;
    let head = head.to_vec();
    let known = formats.names().filter_map(|name| formats.find(name));
    let mut proven = known.filter(|driver| driver.recognises(&head));
    proven.next().map(|driver| driver.name().to_owned()).ok_or_else(|| {
        let cause = "it is in no format that can be recognised, and raw is never guessed: say it \
                     with -f raw";
        Failure::open(file, &cause)
    })
}

/// The size of a disk in whole sectors, as guests see it.
pub(crate) fn sectors(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(512).unwrap_or(bytes)
}

/// A path without a leading `./`, as people write it.
pub(crate) fn shown(path: &str) -> String {
    let plain = Path::new(path).strip_prefix("./").unwrap_or(Path::new(path));
    plain.display().to_string()
}
