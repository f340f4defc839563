//! `liveblk img compare`: whether guests see the same in two images.
//!
//! Only what may differ is read: what both images know to be zeroes is not. Exit code 0: identical,
//! 1: they differ, 2: an error.

use std::collections::VecDeque;
use std::rc::Rc;

use clap::Args;
use liveblk::engine::buf::Buf;
use liveblk::engine::node::MapExtent;
use liveblk::{Host, Node};
use serde_json::json;

use super::arguments::Output;
use super::cache;
use super::failure::{Answer, Failure};
use super::map;
use super::pieces::{self, Read};
use super::progress::Progress;
use super::source::{self, Wanted};

/// Bytes whose map is looked up at once.
const STEP: u64 = 256 << 20;

/// Pairs of reads in flight.
const WINDOW: usize = 8;

/// Compare what guests see of two images
///
/// Exit code 0: identical; 1: they differ; 2: an error. Different sizes are no difference, unless
/// the longer image holds data behind the end of the shorter one, or with --strict.
#[derive(Args, Debug)]
pub(crate) struct CompareOptions {
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// Show progress also where there is no terminal
    #[arg(short, long)]
    progress: bool,
    /// Format of the first image (needed for raw)
    #[arg(short = 'f', long, value_name = "FMT")]
    a_format: Option<String>,
    /// Format of the second image (needed for raw)
    #[arg(short = 'F', long, value_name = "FMT")]
    b_format: Option<String>,
    /// The images are lists of options, driver=FORMAT,file.filename=PATH,..., instead of names
    #[arg(long)]
    image_opts: bool,
    /// Sizes and allocation must be equal too
    #[arg(short, long)]
    strict: bool,
    /// Cache mode
    #[arg(short = 'T', long, value_name = "MODE")]
    cache: Option<String>,
    /// Read although another process may be writing
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    output: Output,
    /// The first image
    filename1: String,
    /// The second image
    filename2: String,
}

/// How two images differ first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Difference {
    Content(u64),
    Size,
    Status(u64),
}

/// Compares.
pub(crate) async fn run(host: &Host, options: CompareOptions) -> Answer {
    compare(host, &options).await.map_err(|failure| failure.with_code(2))
}

async fn compare(host: &Host, options: &CompareOptions) -> Answer {
    let direct = cache::is_direct(options.cache.as_deref(), "source cache")?;
    let (shared, by_options) = (options.force_share, options.image_opts);
    let wanted = Wanted { shared, direct, by_options, ..Wanted::default() };
    let mut images = Vec::new();
    for (file, format) in
        [(&options.filename1, &options.a_format), (&options.filename2, &options.b_format)]
    {
        let wanted = Wanted { format: format.as_deref(), ..wanted };
        images.push(source::open(host, file, wanted).await?);
    }
    let [first, second] = images.as_slice() else { return Err(Failure::new("two images")) };
    let sizes = [first, second].map(|node| source::sectors(node.size()));
    let difference = if options.strict && sizes[0] != sizes[1] {
        Some(Difference::Size)
    } else {
        if sizes[0] != sizes[1] && !options.quiet && !options.output.is_json() {
            println!("Warning: Image size mismatch!");
        }
        let total = sizes[0].max(sizes[1]);
        let progress = Progress::new(total, options.progress, options.quiet);
        let found = Walk { host, nodes: [first, second], sizes, strict: options.strict, progress };
        found.run(total).await?
    };
    tell(options, sizes, difference);
    Ok(u8::from(difference.is_some()))
}

fn tell(options: &CompareOptions, sizes: [u64; 2], difference: Option<Difference>) {
    if options.output.is_json() {
        let (kind, offset) = match difference {
            None => (None, None),
            Some(Difference::Size) => (Some("size"), None),
            Some(Difference::Status(at)) => (Some("block-status"), Some(at)),
            Some(Difference::Content(at)) => (Some("content"), Some(at)),
        };
        let answer = json!({
            "identical": difference.is_none(),
            "difference": kind,
            "offset": offset,
            "sizes": sizes,
        });
        println!("{answer:#}");
        return;
    }
    if options.quiet {
        return;
    }
    match difference {
        None => println!("Images are identical."),
        Some(Difference::Size) => println!("Strict mode: Image size mismatch!"),
        Some(Difference::Content(at)) => println!("Content mismatch at offset {at}!"),
        Some(Difference::Status(at)) => {
            println!("Strict mode: Offset {at} block status mismatch!");
        }
    }
}

/// One pass over both images.
struct Walk<'a> {
    host: &'a Host,
    nodes: [&'a Rc<Node>; 2],
    sizes: [u64; 2],
    strict: bool,
    progress: Progress,
}

/// A pair of reads of the same range; `None`: known to be zeroes.
struct Pair {
    at: u64,
    bytes: [Option<Read>; 2],
}

impl Walk<'_> {
    async fn run(&self, total: u64) -> Result<Option<Difference>, Failure> {
        let mut pairs: VecDeque<Pair> = VecDeque::new();
        let mut found = None;
        let mut at = 0;
        while at < total && found.is_none() {
            let end = total.min(at + STEP);
            let maps = [self.map_of(0, at, end).await?, self.map_of(1, at, end).await?];
            for (start, len, status) in side_by_side(&maps) {
                if self.strict && !same_status(status) {
                    found = Some(Difference::Status(start));
                    break;
                }
                if status.iter().all(|run| run.zero) {
                    continue;
                }
                for (piece, len) in pieces::split(start, len, pieces::UNIT) {
                    if pairs.len() >= WINDOW
                        && let Some(at) = self.judge(pairs.pop_front()).await?
                    {
                        return Ok(Some(Difference::Content(at)));
                    }
                    pairs.push_back(self.start(piece, len, status));
                }
            }
            at = end;
        }
        while !pairs.is_empty() {
            if let Some(at) = self.judge(pairs.pop_front()).await? {
                return Ok(Some(Difference::Content(at)));
            }
        }
        self.progress.at(total);
        self.progress.end();
        Ok(found)
    }

    /// The map of one image from `at` to `end`; behind its end there are zeroes.
    async fn map_of(
        &self,
        which: usize,
        at: u64,
        end: u64,
    ) -> Result<Vec<(u64, MapExtent)>, Failure> {
        let (Some(node), Some(size)) = (self.nodes.get(which), self.sizes.get(which)) else {
            return Ok(Vec::new());
        };
        let mut runs = map::whole(node, at.min(*size), end.min(*size)).await?;
        let from = at.max(*size);
        if from < end {
            let behind = MapExtent {
                len: end - from,
                depth: 0,
                present: false,
                zero: true,
                data: false,
                compressed: false,
                host: None,
            };
            runs.push((from, behind));
        }
        Ok(runs)
    }

    fn start(&self, at: u64, len: u64, status: [MapExtent; 2]) -> Pair {
        let [first, second] = self.nodes;
        let read = |node: &Rc<Node>, run: MapExtent| {
            (!run.zero).then(|| pieces::read(self.host, node, at, len))
        };
        Pair { at, bytes: [read(first, status[0]), read(second, status[1])] }
    }

    /// Where a pair differs, if it does: the start of the sector.
    async fn judge(&self, pair: Option<Pair>) -> Result<Option<u64>, Failure> {
        let Some(Pair { at, bytes: [first, second] }) = pair else { return Ok(None) };
        let first = match first {
            Some(read) => Some(read.end().await?),
            None => None,
        };
        let second = match second {
            Some(read) => Some(read.end().await?),
            None => None,
        };
        let differs = match (first, second) {
            (None, None) => None,
            (Some(bytes), None) | (None, Some(bytes)) => first_difference(&bytes, None),
            (Some(one), Some(two)) => first_difference(&one, Some(&two)),
        };
        self.progress.at(at);
        Ok(differs.map(|index| at + index / 512 * 512))
    }
}

/// The index of the first byte that differs (from zero, if there is only one buffer).
fn first_difference(one: &Buf, two: Option<&Buf>) -> Option<u64> {
    let Some(two) = two else {
        if one.is_zero() {
            return None;
        }
        return one.to_vec().iter().position(|byte| *byte != 0).map(|index| index as u64);
    };
    let (one, two) = (one.to_vec(), two.to_vec());
    if one == two {
        return None;
    }
    one.iter().zip(&two).position(|(a, b)| a != b).map(|index| index as u64)
}

/// The runs of both maps, cut so that each piece has one status in each image.
fn side_by_side(maps: &[Vec<(u64, MapExtent)>; 2]) -> Vec<(u64, u64, [MapExtent; 2])> {
    let mut out = Vec::new();
    let [first, second] = maps;
    let (mut left, mut right) = (first.iter().peekable(), second.iter().peekable());
    let mut at = first.first().map_or(0, |(at, _)| *at);
    while let (Some((a, one)), Some((b, two))) = (left.peek(), right.peek()) {
        let ends = [a + one.len, b + two.len];
        let end = ends[0].min(ends[1]);
        if end > at {
            out.push((at, end - at, [*one, *two]));
        }
        at = end;
        if ends[0] == end {
            left.next();
        }
        if ends[1] == end {
            right.next();
        }
    }
    out
}

/// Whether both images say the same of a range, places aside.
fn same_status([one, two]: [MapExtent; 2]) -> bool {
    let facts = |run: MapExtent| (run.present, run.zero, run.data, run.compressed);
    facts(one) == facts(two) && one.host.is_some() == two.host.is_some()
}
