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
    let format = source::format_of(host, &options.filename, options.format.as_deref()).await?;
    if format != "qcow2" {
        let text = "This image format does not support checks";
        return Err(Failure::new(text).with_code(63));
    }
    let node = open(host, &options).await?;
    let storage = node.format().data_storage().clone();
    let report = judge(host, &options, &storage).await?;
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
    let failed = |error: liveblk::Error| Failure::open(&options.filename, &error);
    if options.repair.is_some() {
        return Err(Failure::new("Check failed: repairing is not supported yet"));
    }
    let report = qcow2::check(host.core(), storage).await.map_err(failed)?;
    if !options.output.is_json() && !options.quiet {
        report.problems.iter().for_each(|problem| eprintln!("{problem}"));
    }
    Ok(report)
}

fn code(report: &CheckReport) -> u8 {
    match (report.corruptions, report.leaks) {
        (0, 0) => 0,
        (0, _) => 3,
        _ => 2,
    }
}

fn as_json(filename: &str, report: &CheckReport) -> Value {
    let mut out = Map::new();
    let mut put = |name: &str, value: Value| {
        out.insert(name.to_owned(), value);
    };
    let mut some = |name: &str, count: u64| {
        if count != 0 {
            put(name, json!(count));
        }
    };
    some("corruptions", report.corruptions);
    some("leaks", report.leaks);
    some("allocated-clusters", report.allocated_clusters);
    put("check-errors", json!(0));
    put("filename", json!(filename));
    put("format", json!("qcow2"));
    Value::Object(out)
}

fn as_text(report: &CheckReport) -> String {
    let mut text = String::new();
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
    text
}
