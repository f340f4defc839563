//! `liveblk img check`: the metadata of an image, judged and repaired.
//!
//! Exit codes: 0 clean, 1 the check itself failed, 2 corruptions, 3 leaks, 63 not a format that can
//! be checked.

use std::rc::Rc;

use clap::{Args, ValueEnum};
use liveblk::engine::graph::FileSource;
use liveblk::engine::storage::{LockRequest, Storage};
use liveblk::formats::qcow2::{self, CheckReport};
use liveblk::{BackingSource, Host, Node, OpenNode};
use serde_json::{Map, Value, json};

use super::arguments::Output;
use super::cache;
use super::failure::{Answer, Failure};
use super::source;

/// Check (and repair) the metadata of an image
///
/// Exit code 0: clean; 1: the check failed; 2: corruptions; 3: leaked clusters; 63: the format has
/// nothing to check.
#[derive(Args, Debug)]
pub(crate) struct CheckOptions {
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Format of the image (needed for raw)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILE is a list of options, driver=FORMAT,file.filename=PATH,..., instead of a name
    #[arg(long)]
    image_opts: bool,
    /// Repair
    #[arg(short, long, value_enum, value_name = "WHAT", conflicts_with = "force_share")]
    repair: Option<Repair>,
    /// Cache mode
    #[arg(short = 'T', long, value_name = "MODE")]
    cache: Option<String>,
    /// Read although another process may be writing
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    output: Output,
    /// The image
    filename: String,
}

impl CheckOptions {
    /// The same with the file's name in place of options: what is checked is all in the file.
    fn plain(self) -> Result<Self, Failure> {
        if !self.image_opts {
            return Ok(self);
        }
        let opts = source::named_by(&self.filename, self.format.as_deref())?;
        let Some(filename) = opts.filename().map(str::to_owned) else {
            return Err(Failure::open(&self.filename, &"Parameter 'file' is missing"));
        };
        Ok(Self { format: opts.driver().map(str::to_owned), filename, ..self })
    }
}

/// What is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Repair {
    /// Leaked clusters: harmless, always safe
    Leaks,
    /// Everything that can be repaired
    All,
}

/// Checks.
pub(crate) async fn run(host: &Host, options: CheckOptions) -> Answer {
    let options = options.plain()?;
    let format = source::format_of(host, &options.filename, options.format.as_deref()).await?;
    if format != "qcow2" {
        let text = "This image format does not support checks";
        return Err(Failure::new(text).with_code(63));
    }
    let node = open(host, &options).await?;
    let storage = node.format().data_storage().clone();
    let report = judge(host, &options, &storage).await?;
    // Closing flushes: a repair is told only when it is durable.
    host.graph().remove(&node).await?;
    if options.output.is_json() {
        println!("{:#}", as_json(&options.filename, &report));
    } else if !options.quiet {
        print!("{}", as_text(&report));
    }
    Ok(code(&report))
}

/// The file with the locks that a check needs: nobody else writes it meanwhile.
async fn open(host: &Host, options: &CheckOptions) -> Result<Rc<Node>, Failure> {
    let file = &options.filename;
    let mut spec = OpenNode::new("file", file);
    spec.writable = options.repair.is_some();
    spec.backing = BackingSource::None;
    spec.monitor_owned = true;
    spec.options.direct = cache::is_direct(options.cache.as_deref(), "source cache")?;
    if let FileSource::Open(held) = &mut spec.file {
        held.no_locking = options.force_share;
    }
    let node = host.open(spec).await.map_err(|error| Failure::open(file, &error))?;
    if let Storage::File(held) = node.format().data_storage()
        && options.repair.is_none()
    {
        let locked = held.lock(LockRequest::ReadStable).await;
        locked.map_err(|error| Failure::open(file, &error))?;
    }
    Ok(node)
}

async fn judge(
    host: &Host,
    options: &CheckOptions,
    storage: &Storage,
) -> Result<CheckReport, Failure> {
    let failed = |error: liveblk::Error| {
        // A file that is no image cannot be opened; anything else went wrong while checking.
        match error.op() {
            "open" | "check" => Failure::open(&options.filename, &error),
            _ => Failure::from(error).during("Check failed"),
        }
    };
    let core = host.core();
    let report = match options.repair {
        None => qcow2::check(core, storage).await,
        Some(Repair::Leaks) => qcow2::repair(core, storage, qcow2::Repair::Leaks).await,
        Some(Repair::All) => qcow2::repair(core, storage, qcow2::Repair::All).await,
    };
    let report = report.map_err(failed)?;
    if !options.output.is_json() && !options.quiet {
        report.problems.iter().for_each(|problem| eprintln!("{problem}"));
    }
    Ok(report)
}

fn code(report: &CheckReport) -> u8 {
    match (report.check_errors, report.corruptions, report.leaks) {
        (0, 0, 0) => 0,
        (0, 0, _) => 3,
        (0, ..) => 2,
        _ => 1,
    }
}

fn as_json(filename: &str, report: &CheckReport) -> Value {
    let mut out = Map::new();
    let mut put = |name: &str, count: u64, always: bool| {
        if count != 0 || always {
            out.insert(name.to_owned(), json!(count));
        }
    };
    put("image-end-offset", report.image_end_offset, true);
    put("compressed-clusters", report.compressed_clusters, false);
    put("corruptions", report.corruptions, false);
    put("corruptions-fixed", report.corruptions_fixed, false);
    put("total-clusters", report.total_clusters, false);
    put("check-errors", report.check_errors, true);
    put("leaks", report.leaks, false);
    put("leaks-fixed", report.leaks_fixed, false);
    put("allocated-clusters", report.allocated_clusters, false);
    put("fragmented-clusters", report.fragmented_clusters, false);
    out.insert("filename".to_owned(), json!(filename));
    out.insert("format".to_owned(), json!("qcow2"));
    Value::Object(out)
}

fn as_text(report: &CheckReport) -> String {
    let mut text = String::new();
    if report.leaks_fixed + report.corruptions_fixed > 0 {
        text.push_str(&format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    \
             {} corruptions\n\nDouble checking the fixed image now...\n",
            report.leaks_fixed, report.corruptions_fixed
        ));
    }
    if report.is_clean() {
        text.push_str("No errors were found on the image.\n");
    }
    if report.corruptions > 0 {
        text.push_str(&format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the \
             image may corrupt it.\n",
            report.corruptions
        ));
    }
    if report.leaks > 0 {
        text.push_str(&format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no \
             harm to data.\n",
            report.leaks
        ));
    }
    if report.check_errors > 0 {
        let count = report.check_errors;
        text.push_str(&format!("\n{count} internal errors have occurred during the check.\n"));
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let part = |count: u64, of: u64| count as f64 * 100.0 / of as f64;
        text.push_str(&format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            report.allocated_clusters,
            report.total_clusters,
            part(report.allocated_clusters, report.total_clusters),
            part(report.fragmented_clusters, report.allocated_clusters),
            part(report.compressed_clusters, report.allocated_clusters)
        ));
    }
    text.push_str(&format!("Image end offset: {}\n", report.image_end_offset));
    text
}
