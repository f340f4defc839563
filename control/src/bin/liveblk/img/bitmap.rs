//! `liveblk img bitmap`: the persistent bitmaps of an image.

use std::fmt::Display;
use std::rc::Rc;

use clap::{ArgAction, ArgMatches, Args, FromArgMatches};
use liveblk::engine::bitmap::DirtyBitmap;
use liveblk::engine::format::BitmapInfo;
use liveblk::{Host, Node};
use serde_json::{Value, json};

use super::arguments::Output;
use super::failure::{Answer, Failure};
use super::size;
use super::source::{self, Wanted};

/// Change the persistent bitmaps of an image
#[derive(Args, Debug)]
pub(crate) struct BitmapOptions {
    /// Format of the image
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// FILE is a list of options, driver=FORMAT,file.filename=PATH,..., instead of a name
    #[arg(long)]
    image_opts: bool,
    #[command(flatten)]
    actions: Actions,
    /// Bytes per bit of a new bitmap
    #[arg(short, long, value_name = "SIZE")]
    granularity: Option<String>,
    /// The image that holds the bitmap to merge, if it is another one
    #[arg(short = 'b', long, value_name = "FILE")]
    source_file: Option<String>,
    /// The format of that image
    #[arg(short = 'F', long, value_name = "FMT", requires = "source_file")]
    source_format: Option<String>,
    #[command(flatten)]
    output: Output,
    /// The image
    filename: String,
    /// The bitmap
    bitmap: String,
}

/// One thing to do with the bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(String),
}

/// What is to be done, in the order of the command line.
#[derive(Clone, Debug, Default)]
struct Actions(Vec<Action>);

const FLAGS: [(&str, &str, Action); 5] = [
    ("add", "Make the bitmap; it records writes from then on", Action::Add),
    ("remove", "Remove the bitmap", Action::Remove),
    ("clear", "Clear all bits", Action::Clear),
    ("enable", "Record writes from now on", Action::Enable),
    ("disable", "Record no writes from now on", Action::Disable),
];

impl FromArgMatches for Actions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut found: Vec<(usize, Action)> = Vec::new();
        for (name, _, action) in FLAGS {
            if matches.get_flag(name)
                && let Some(at) = matches.index_of(name)
            {
                found.push((at, action));
            }
        }
        let names = matches.get_many::<String>("merge").into_iter().flatten();
        let places = matches.indices_of("merge").into_iter().flatten();
        found.extend(places.zip(names).map(|(at, name)| (at, Action::Merge(name.clone()))));
        found.sort_by_key(|(at, _)| *at);
        Ok(Self(found.into_iter().map(|(_, action)| action).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Actions {
    fn augment_args(command: clap::Command) -> clap::Command {
        let command = FLAGS.into_iter().fold(command, |command, (name, help, _)| {
            command.arg(clap::Arg::new(name).long(name).help(help).action(ArgAction::SetTrue))
        });
        command.arg(
            clap::Arg::new("merge")
                .long("merge")
                .value_name("SOURCE")
                .help("Add the bits of this bitmap (may be given more than once)")
                .action(ArgAction::Append),
        )
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

/// Does it.
pub(crate) async fn run(host: &Host, options: BitmapOptions) -> Answer {
    let actions = &options.actions.0;
    if actions.is_empty() {
        return Err(Failure::new(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ));
    }
    let granularity = granularity(&options)?;
    if options.source_file.is_some() && !actions.iter().any(|a| matches!(a, Action::Merge(_))) {
        return Err(Failure::new("Merge bitmap source file only supported with --merge"));
    }
    let wanted = Wanted {
        format: options.format.as_deref(),
        by_options: options.image_opts,
        writable: true,
        alone: true,
        ..Wanted::default()
    };
    let node = source::open(host, &options.filename, wanted).await?;
    for action in actions {
        let name = &options.bitmap;
        let failed = |cause: &dyn Display| {
            let verb = action.verb();
            Failure::new(format!("Operation {verb} on bitmap {name} failed: {cause}"))
        };
        let Some(held) = node.format().abilities().bitmaps else {
            return Err(failed(&"this image cannot hold persistent bitmaps (qcow2 version 3 can)"));
        };
        let known = held.list().iter().any(|bitmap| bitmap.name == *name);
        let result = match action {
            Action::Add if known => return Err(failed(&format!("Bitmap already exists: {name}"))),
            Action::Add => {
                let granularity = granularity.unwrap_or_else(|| held.default_granularity());
                held.add(name, granularity, true).await
            }
            _ if !known => return Err(failed(&format!("Dirty bitmap '{name}' not found"))),
            Action::Remove => held.remove(name).await,
            Action::Clear => held.clear(name).await,
            Action::Enable => held.set_enabled(name, true).await,
            Action::Disable => held.set_enabled(name, false).await,
            Action::Merge(source) => match other(host, &options, &node, source).await? {
                Some(bits) => held.merge(name, bits).await,
                None => return Err(failed(&format!("Dirty bitmap '{source}' not found"))),
            },
        };
        result.map_err(|error| failed(&error))?;
    }
    let list = node.format().abilities().bitmaps.map(|held| held.list()).unwrap_or_default();
    // Bits are stored when the image is closed: what fails there is a failure.
    host.graph().remove(&node).await?;
    if options.output.is_json() {
        println!("{:#}", list.iter().map(json).collect::<Value>());
    }
    Ok(0)
}

fn granularity(options: &BitmapOptions) -> Result<Option<u64>, Failure> {
    let Some(text) = &options.granularity else { return Ok(None) };
    if !options.actions.0.contains(&Action::Add) {
        return Err(Failure::new("granularity only supported with --add"));
    }
    let good = |bytes: &u64| bytes.is_power_of_two() && (512..=1 << 31).contains(bytes);
    let Some(bytes) = size::parse(text) else {
        return Err(Failure::new(format!("Invalid granularity specified: '{text}'.")));
    };
    match Some(bytes).filter(good) {
        Some(bytes) => Ok(Some(bytes)),
        None => Err(Failure::new(format!(
            "Operation add on bitmap {} failed: Granularity must be power of 2 and at least 512 \
             (at most 2G), not '{text}'",
            options.bitmap
        ))),
    }
}

/// The bits of the bitmap to merge; `None` if there is none of that name.
async fn other(
    host: &Host,
    options: &BitmapOptions,
    own: &Rc<Node>,
    name: &str,
) -> Result<Option<DirtyBitmap>, Failure> {
    let node = match &options.source_file {
        None => Rc::clone(own),
        Some(file) => {
            let format = options.source_format.as_deref();
            let wanted = Wanted { format, alone: true, ..Wanted::default() };
            source::open(host, file, wanted).await?
        }
    };
    let bits = match node.format().abilities().bitmaps {
        Some(held) if held.list().iter().any(|bitmap| bitmap.name == name) => {
            Some(held.load(name).await?)
        }
        _ => None,
    };
    if options.source_file.is_some() {
        host.graph().remove(&node).await?;
    }
    Ok(bits)
}

impl Action {
    const fn verb(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

fn json(bitmap: &BitmapInfo) -> Value {
    let mut flags = Vec::new();
    if bitmap.in_use {
        flags.push("in-use");
    }
    if bitmap.enabled {
        flags.push("auto");
    }
    json!({"flags": flags, "name": bitmap.name, "granularity": bitmap.granularity})
}
