//! `liveblk img convert`: one image made of the content of others.
//!
//! Order: sources open -> target made under a temporary name -> copied -> flushed and closed ->
//! renamed, folder synchronised -> success. A failure before the rename leaves no file and the old
//! target as it was; with `-n` the target is written where it is.

use std::rc::Rc;

use clap::Args;
use liveblk::engine::format::BackingRef;
use liveblk::engine::node::Origin;
use liveblk::{BackingSource, Host, Node, OpenNode};
use serde_json::json;

use super::arguments::Output;
use super::bitmap_copy::{self, Bitmaps};
use super::cache;
use super::copy::{Copy, Pace, Sources};
use super::create::{self, Design};
use super::failure::{Answer, Failure};
use super::keys::{self, Value};
use super::newfile::NewFile;
use super::progress::Progress;
use super::size::{self, SIZE_MAX};
use super::snapshot;
use super::source::{self, Wanted};

/// Bytes of zeroes in a row that are not written, where nothing is said.
const SPARSE: u64 = 4096;

/// The most that may be asked for.
const SPARSE_MAX: u64 = 16 << 20;

/// Copy images into a new one, in another format if wanted
///
/// Holes are not read, zeroes are not written. The target appears under its name only when it is
/// complete and durable: a copy that fails leaves a file that was there as it was.
#[derive(Args, Debug)]
pub(crate) struct ConvertOptions {
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Show progress also where there is no terminal
    #[arg(short, long)]
    progress: bool,
    /// Format of the sources (needed for raw)
    #[arg(short = 'f', long, value_name = "FMT")]
    source_format: Option<String>,
    /// Format of the target
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    target_format: String,
    /// Options of the target's format: key=value,... (`-o help` lists them)
    #[arg(short = 'o', long, value_name = "OPTIONS")]
    target_options: Vec<String>,
    /// Write compressed clusters (qcow2)
    #[arg(short, long)]
    compress: bool,
    /// Make the target an overlay of this image, which holds what the source has below itself
    #[arg(short = 'B', long, value_name = "FILE")]
    backing: Option<String>,
    /// Format of that image
    #[arg(short = 'F', long, value_name = "FMT", requires = "backing")]
    backing_format: Option<String>,
    /// Write into a target that exists
    #[arg(short, long)]
    no_create: bool,
    /// The target reads as zeroes already (with -n)
    #[arg(long, requires = "no_create")]
    target_is_zero: bool,
    /// Bytes of zeroes in a row that become a hole; 0: write everything
    #[arg(short = 'S', long, value_name = "SIZE")]
    sparse_size: Option<String>,
    /// The sources are lists of options, driver=FORMAT,file.filename=PATH,..., instead of names
    #[arg(long, alias = "image-opts")]
    source_image_opts: bool,
    /// The same for the target (with -n)
    #[arg(long)]
    target_image_opts: bool,
    /// Copy a snapshot inside the source: its id or name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    source_snapshot: Option<String>,
    /// Copy the persistent bitmaps of the source too
    #[arg(long)]
    bitmaps: bool,
    /// Leave out bitmaps that can no longer be trusted, instead of failing
    #[arg(long)]
    skip_broken_bitmaps: bool,
    /// Requests in flight
    #[arg(short = 'm', long, value_name = "COUNT", default_value_t = 8,
          value_parser = clap::value_parser!(u8).range(1..=16))]
    parallel: u8,
    /// Bytes per second at most
    #[arg(short, long, value_name = "RATE")]
    rate: Option<String>,
    /// Zeroes in place of what cannot be read, with a warning, instead of failing
    #[arg(long)]
    salvage: bool,
    /// Share blocks with the source where the file system can; these are not searched for zeroes
    #[arg(short = 'C', long)]
    copy_range_offloading: bool,
    /// Accepted without effect: pieces may always be written out of order
    #[arg(short = 'W', long)]
    oob: bool,
    /// Cache mode of the sources
    #[arg(short = 'T', long, value_name = "MODE")]
    source_cache: Option<String>,
    /// Cache mode of the target
    #[arg(short = 't', long, value_name = "MODE")]
    target_cache: Option<String>,
    /// Read although another process may be writing
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    output: Output,
    /// Sources, one after the other on the target, and the target
    #[arg(required_unless_present = "target_options", num_args = 1.., value_name = "FILES")]
    files: Vec<String>,
}

/// What is fixed before the first byte moves.
struct Plan {
    sources: Sources,
    bitmaps: Option<Bitmaps>,
    sparse: u64,
    direct: bool,
    /// Bytes per second at most; 0: as fast as it goes.
    rate: u64,
}

/// Copies.
pub(crate) async fn run(host: &Host, options: ConvertOptions) -> Answer {
    if keys::wants_help(&options.target_options) {
        print!("{}", keys::help(&options.target_format));
        return Ok(0);
    }
    let Some((target, sources)) = options.files.split_last().filter(|(_, rest)| !rest.is_empty())
    else {
        return Err(Failure::new("Must specify image file name (sources, then the target)"));
    };
    let direct = cache::is_direct(options.target_cache.as_deref(), "cache")?;
    let sparse = sparse_size(options.sparse_size.as_deref())?;
    let rate = options.rate.as_deref().map(rate).transpose()?.unwrap_or(0);
    check_choices(&options, sources)?;
    let (sources, bitmaps) = open_sources(host, &options, sources).await?;
    let plan = Plan { sources, bitmaps, sparse, direct, rate };
    let copied = if options.no_create {
        existing(host, &options, target, &plan).await?
    } else {
        fresh(host, &options, target, &plan).await?
    };
    if options.output.is_json() {
        let answer = json!({
            "filename": target,
            "format": options.target_format,
            "virtual-size": plan.sources.total(),
            "bytes-written": copied,
        });
        println!("{answer:#}");
    }
    Ok(0)
}

/// Refuses what does not go together.
fn check_choices(options: &ConvertOptions, sources: &[String]) -> Result<(), Failure> {
    let several = sources.len() > 1;
    let offloads = options.copy_range_offloading;
    let text = if offloads && options.sparse_size.is_some() {
        "Cannot enable copy offloading when -S is used"
    } else if offloads && options.compress {
        "Cannot enable copy offloading when -c is used"
    } else if offloads && options.salvage {
        "Cannot use copy offloading in salvaging mode"
    } else if options.target_image_opts && !options.no_create {
        "--target-image-opts requires use of -n flag"
    } else if options.no_create && !options.target_options.is_empty() {
        "-o has no effect when skipping image creation"
    } else if options.skip_broken_bitmaps && !options.bitmaps {
        "Use of --skip-broken-bitmaps requires --bitmaps"
    } else if options.bitmaps && several {
        "Copying bitmaps only possible with single source"
    } else if options.source_snapshot.is_some() && several {
        "No support for concatenating multiple snapshot"
    } else if options.backing.is_some() && several {
        "Having a backing file for the target makes no sense when concatenating multiple input \
         images"
    } else {
        return Ok(());
    };
    Err(Failure::new(text))
}

/// Bytes of zeroes in a row that become a hole.
fn sparse_size(given: Option<&str>) -> Result<u64, Failure> {
    let Some(text) = given else { return Ok(SPARSE) };
    const WRONG: &str = "Invalid buffer size for sparse output specified";
    match size::parse(text) {
        Some(bytes) if bytes % 512 == 0 && bytes <= SPARSE_MAX => Ok(bytes),
        Some(_) => Err(Failure::new(format!(
            "{WRONG}. Valid sizes are multiples of 512 up to {SPARSE_MAX}. Select 0 to disable \
             sparse detection (fully allocates output)."
        ))),
        None => Err(Failure::new(format!("{WRONG}: '{text}'."))),
    }
}

/// Bytes per second.
fn rate(text: &str) -> Result<u64, Failure> {
    match size::parse(text) {
        Some(bytes) if bytes <= SIZE_MAX => Ok(bytes),
        Some(_) => Err(Failure::new(format!(
            "Invalid rate limit specified. Must be between 0 and {SIZE_MAX}."
        ))),
        None => Err(Failure::new(format!("Invalid rate limit specified: '{text}'."))),
    }
}

async fn open_sources(
    host: &Host,
    options: &ConvertOptions,
    files: &[String],
) -> Result<(Sources, Option<Bitmaps>), Failure> {
    let direct = cache::is_direct(options.source_cache.as_deref(), "source cache")?;
    let snapshot = options.source_snapshot.as_deref().map(snapshot::choice).transpose()?;
    let mut bitmaps = None;
    let mut nodes = Vec::new();
    for file in files {
        let wanted = Wanted {
            format: options.source_format.as_deref(),
            shared: options.force_share,
            direct,
            by_options: options.source_image_opts,
            snapshot: snapshot.as_ref(),
            ..Wanted::default()
        };
        nodes.push(source::open(host, file, wanted).await?);
        if options.bitmaps {
            let skips = options.skip_broken_bitmaps;
            bitmaps = Some(Bitmaps::of(host, file, wanted, skips).await?);
        }
    }
    let sources = Sources::new(nodes);
    let sources = sources.ok_or_else(|| Failure::new("The sources are too large together"))?;
    Ok((sources, bitmaps))
}

/// Copies into a new image.
async fn fresh(
    host: &Host,
    options: &ConvertOptions,
    target: &str,
    plan: &Plan,
) -> Result<u64, Failure> {
    let design = design(host, options, target, plan).await.map_err(|f| f.during(target))?;
    let new = NewFile::reserve(host, target)
        .await
        .map_err(|failure| failure.during("error while converting"))?;
    let made = design.write(host, &new, target).await;
    let sides = made.map_err(|failure| failure.during("error while converting"))?;
    let mut spec = OpenNode::new(&design.format, new.path());
    spec.options.direct = plan.direct;
    spec.options.discard_unmap = true;
    spec.monitor_owned = true;
    if design.backing.is_none() || options.compress {
        spec.backing = BackingSource::None;
    }
    let opened = host.open(spec).await;
    let node = opened.map_err(|error| new.renamed(Failure::open(target, &error)))?;
    let below = design.backing.is_some();
    let copied = transfer(host, options, plan, &node, Zeroes { known: !below, below }).await;
    let copied = copied.map_err(|failure| new.renamed(failure))?;
    new.finish(host).await?;
    sides.keep_all();
    Ok(copied)
}

/// Copies into an image that exists.
async fn existing(
    host: &Host,
    options: &ConvertOptions,
    target: &str,
    plan: &Plan,
) -> Result<u64, Failure> {
    let by_options = options.target_image_opts;
    let wanted = Wanted {
        format: (!by_options).then_some(options.target_format.as_str()),
        by_options,
        writable: true,
        direct: plan.direct,
        ..Wanted::default()
    };
    let node = source::open(host, target, wanted).await?;
    if node.size() < plan.sources.total() {
        return Err(Failure::new(format!(
            "output file is smaller than input file: '{target}' has {} bytes, {} are needed",
            node.size(),
            plan.sources.total()
        )));
    }
    let below = options.backing.is_some();
    let zeroes = Zeroes { known: options.target_is_zero && !below, below };
    transfer(host, options, plan, &node, zeroes).await
}

/// What the target holds before the copy.
#[derive(Clone, Copy)]
struct Zeroes {
    /// It reads as zeroes.
    known: bool,
    /// It reads as what lies below the source.
    below: bool,
}

/// Copies everything, flushes and closes the target.
async fn transfer(
    host: &Host,
    options: &ConvertOptions,
    plan: &Plan,
    node: &Rc<Node>,
    zeroes: Zeroes,
) -> Result<u64, Failure> {
    if options.compress && !node.can_compress() {
        return Err(Failure::new("Compression not supported for this file format or image"));
    }
    let copy = Copy {
        host,
        sources: &plan.sources,
        target: node,
        sparse: plan.sparse,
        compress: options.compress,
        reads_zero: zeroes.known,
        below: zeroes.below,
        window: usize::from(options.parallel),
        salvages: options.salvage.then_some(!options.quiet),
        sharing: options.copy_range_offloading.then(Rc::default),
        pace: Pace::new(host, plan.rate),
        progress: Progress::new(plan.sources.total(), options.progress, options.quiet),
    };
    let copied = copy.run().await?;
    if let Some(bitmaps) = &plan.bitmaps {
        bitmaps.copy_to(node).await?;
    }
    let flushed = node.flush(Origin::External).await;
    let what = "error while flushing the target";
    flushed.map_err(|error| Failure::from(error).during(what))?;
    // Closing writes what was put off (refcounts); what fails there is a failure of the copy.
    let closed = host.graph().remove(node).await;
    closed.map_err(|error| Failure::from(error).during("error while closing the target"))?;
    Ok(copied)
}

/// The target as it will be made.
async fn design(
    host: &Host,
    options: &ConvertOptions,
    target: &str,
    plan: &Plan,
) -> Result<Design, Failure> {
    let format = &options.target_format;
    let mut keys = create::new_keys(host, format, &options.target_options)?;
    if options.bitmaps && (format != "qcow2" || create::is_v2_wanted(&keys)) {
        return Err(bitmap_copy::unsupported(format));
    }
    if options.compress && format != "qcow2" {
        return Err(Failure::new("Compression not supported for this file format"));
    }
    if options.compress && keys.get("data_file").is_some() {
        return Err(Failure::new("Compression cannot be used with an external data file"));
    }
    if let Some(backing) = &options.backing {
        keys.set("backing_file", Value::Text(backing.clone()));
    }
    if let Some(backing_format) = &options.backing_format {
        keys.set("backing_fmt", Value::Text(backing_format.clone()));
    }
    let backing_format = keys.take_text("backing_fmt");
    let backing = match keys.take_text("backing_file") {
        Some(_) if format != "qcow2" => {
            let text = format!("Backing file not supported for file format '{format}'");
            return Err(Failure::new(text));
        }
        Some(_) if backing_format.is_none() => {
            let text = "Use of backing file requires explicit backing format (-F)";
            return Err(Failure::new(text));
        }
        Some(file) => Some(BackingRef { file, format: backing_format }),
        None => None,
    };
    if let Some(backing) = &backing {
        create::backing_size(host, target, backing).await?;
        create::overlay_defaults(&mut keys);
    }
    let total = plan.sources.total();
    let size = keys.take_number("size").unwrap_or(total);
    if size < total {
        return Err(Failure::new(format!(
            "The size of the target ({size}) is less than that of the source ({total})"
        )));
    }
    Ok(Design { format: format.clone(), keys, size, backing })
}
