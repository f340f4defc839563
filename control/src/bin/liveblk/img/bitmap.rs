//! `liveblk img bitmap`: the persistent bitmaps of an image.

use clap::{ArgAction, ArgMatches, Args, FromArgMatches};
use liveblk::Host;

use super::arguments::Output;
use super::failure::{Answer, Failure};

/// Change the persistent bitmaps of an image
#[derive(Args, Debug)]
pub(crate) struct BitmapOptions {
    /// Format of the image
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
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
pub(crate) async fn run(_host: &Host, options: BitmapOptions) -> Answer {
    if options.actions.0.is_empty() {
        return Err(Failure::new(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ));
    }
    Err(Failure::new("Persistent bitmaps are not supported yet"))
}
