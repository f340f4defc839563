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
use super::cache;
use super::copy::{Copy, Sources};
use super::create::{self, Design};
use super::failure::{Answer, Failure};
use super::keys::{self, Value};
use super::newfile::NewFile;
use super::progress::Progress;
use super::size;
use super::source::{self, Wanted};

/// Bytes of zeroes in a row that are not written, where nothing is said.
const SPARSE: u64 = 4096;

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
    /// Copy a snapshot inside the source (name or id)
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    source_snapshot: Option<String>,
    /// Requests in flight
    #[arg(short = 'm', long, value_name = "COUNT", default_value_t = 8,
          value_parser = clap::value_parser!(u8).range(1..=16))]
    parallel: u8,
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
    sparse: u64,
    direct: bool,
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
    let sparse = match options.sparse_size.as_deref().map(size::parse) {
        None => SPARSE,
        Some(Some(bytes)) => bytes,
        Some(None) => {
            let text = "Invalid buffer size for sparse output (-S): a size is expected";
            return Err(Failure::new(text));
        }
    };
    if let Some(snapshot) = &options.source_snapshot {
        return Err(Failure::new(format!(
            "Reading snapshot '{snapshot}' without applying it is not supported: apply it in a \
             copy of the image and convert that"
        )));
    }
    if options.backing.is_some() && sources.len() > 1 {
        return Err(Failure::new(
            "Having a backing file for the target makes no sense when \
                                 concatenating multiple input images",
        ));
    }
    let plan = Plan { sources: open_sources(host, &options, sources).await?, sparse, direct };
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

async fn open_sources(
    host: &Host,
    options: &ConvertOptions,
    files: &[String],
) -> Result<Sources, Failure> {
    let direct = cache::is_direct(options.source_cache.as_deref(), "source cache")?;
    let mut nodes = Vec::new();
    for file in files {
        let wanted = Wanted {
            format: options.source_format.as_deref(),
            shared: options.force_share,
            direct,
            ..Wanted::default()
        };
        nodes.push(source::open(host, file, wanted).await?);
    }
    Sources::new(nodes).ok_or_else(|| Failure::new("The sources are too large together"))
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
    if !options.target_options.is_empty() {
        return Err(Failure::new("-o has no use with -n: the target exists"));
    }
    let wanted = Wanted {
        format: Some(&options.target_format),
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
        progress: Progress::new(plan.sources.total(), options.progress, options.quiet),
    };
    let copied = copy.run().await?;
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
