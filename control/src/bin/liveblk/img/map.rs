//! `liveblk img map`: where the bytes of an image lie.

use std::rc::Rc;

use clap::Args;
use liveblk::engine::node::MapExtent;
use liveblk::{Host, Node};

use super::arguments::Output;
use super::failure::{Answer, Failure};
use super::size::{self, SIZE_MAX};
use super::source::{self, Wanted};

/// Bytes that are looked up at once.
const WINDOW: u64 = 1 << 30;

/// Show where the bytes of an image lie
#[derive(Args, Debug)]
pub(crate) struct MapOptions {
    /// Format of the image (needed for raw)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILE is a list of options, driver=FORMAT,file.filename=PATH,..., instead of a name
    #[arg(long)]
    image_opts: bool,
    /// First byte
    #[arg(short, long, value_name = "OFFSET")]
    start_offset: Option<String>,
    /// Bytes at most
    #[arg(short = 'l', long, value_name = "LENGTH")]
    max_length: Option<String>,
    /// Read although another process may be writing
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    output: Output,
    /// The image
    filename: String,
}

/// Shows it.
pub(crate) async fn run(host: &Host, options: MapOptions) -> Answer {
    let start = number("start offset", options.start_offset.as_deref())?.unwrap_or(0);
    let most = number("max length", options.max_length.as_deref())?.unwrap_or(SIZE_MAX);
    let wanted = Wanted {
        format: options.format.as_deref(),
        by_options: options.image_opts,
        shared: options.force_share,
        ..Wanted::default()
    };
    let node = source::open(host, &options.filename, wanted).await?;
    let end = source::sectors(node.size()).min(start.saturating_add(most));
    let runs = whole(&node, start, end).await.map_err(|error| {
        Failure::new(format!("{}: Failed to get the block status: {error}", options.filename))
    })?;
    if options.output.is_json() {
        let lines: Vec<String> = runs.iter().map(|(at, run)| line(*at, run)).collect();
        match lines.is_empty() {
            true => println!("[{}]", line(start, &nothing())),
            false => println!("[{}]", lines.join(",\n")),
        }
        return Ok(0);
    }
    println!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to");
    for (at, run) in runs.iter().filter(|(_, run)| run.data && !run.zero) {
        let Some(host) = run.host else {
            let text = "File contains external, encrypted or compressed clusters.";
            return Err(Failure::new(text));
        };
        let (at, len, to) = (hex(*at), hex(run.len), hex(host));
        println!("{at:<16}{len:<16}{to:<16}{}", source::shown(&file_of(&node, run.depth)));
    }
    Ok(0)
}

/// The runs of `node` from `start` to `end`, each with its offset; the last sector of a disk is
/// whole.
pub(crate) async fn whole(
    node: &Rc<Node>,
    start: u64,
    end: u64,
) -> Result<Vec<(u64, MapExtent)>, liveblk::Error> {
    let mut runs: Vec<(u64, MapExtent)> = Vec::new();
    let mut at = start;
    let size = node.size();
    while at < end.min(size) {
        let len = WINDOW.min(end.min(size) - at);
        for run in node.map(at, len).await? {
            push(&mut runs, at, run);
            at += run.len;
        }
    }
    if at < end
        && let Some((_, last)) = runs.last_mut()
    {
        last.len += end - at;
    }
    Ok(runs)
}

fn push(runs: &mut Vec<(u64, MapExtent)>, at: u64, run: MapExtent) {
    match runs.last_mut() {
        Some((_, last)) if last.is_continued_by(&run) => last.len += run.len,
        _ => runs.push((at, run)),
    }
}

fn number(what: &str, text: Option<&str>) -> Result<Option<u64>, Failure> {
    let Some(text) = text else { return Ok(None) };
    match size::parse(text).filter(|bytes| *bytes <= SIZE_MAX) {
        Some(bytes) => Ok(Some(bytes)),
        None => Err(Failure::new(format!("Invalid {what} specified: '{text}'."))),
    }
}

fn hex(value: u64) -> String {
    if value == 0 { "0".to_owned() } else { format!("{value:#x}") }
}

/// The file that holds the data of the layer `depth` below `node`.
fn file_of(node: &Rc<Node>, depth: u32) -> String {
    let mut node = Rc::clone(node);
    for _ in 0..depth {
        if let Some(below) = node.backing() {
            node = below;
        }
    }
    node.format().data_storage().name().to_owned()
}

/// What is told of a range behind the end.
pub(crate) const fn nothing() -> MapExtent {
    MapExtent {
        len: 0,
        depth: 0,
        present: false,
        zero: false,
        data: false,
        compressed: false,
        host: None,
    }
}

fn line(at: u64, run: &MapExtent) -> String {
    let MapExtent { len, depth, present, zero, data, compressed, host } = run;
    let host = host.map_or(String::new(), |host| format!(", \"offset\": {host}"));
    format!(
        "{{ \"start\": {at}, \"length\": {len}, \"depth\": {depth}, \"present\": {present}, \
         \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}{host}}}"
    )
}
