//! From the command line to what must be done, in order.
//!
//! Owns: the two passes. Order rules: 1. first pass over all options: help, version, unknown
//! options and misuse end the program before anything happens; `--pidfile`, `--daemonize`,
//! `--header-refs` and `--allow-dir` are noted. 2. [`Plan::actions`]: the other options strictly in
//! order, each parsed when its turn comes, so that an error in a later one is found after earlier
//! ones took effect, as in the peer.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

use super::chardev::{ChardevSpec, parse_chardev};
use super::getopt::{Given, Item, Opt, Scanner};
use super::help;
use super::keyval::parse_keyval;
use super::qemuopts::parse_options;
use crate::json::parse_one;
use crate::schema::shared::{BLOCK_EXPORT_OPTIONS, BLOCKDEV_OPTIONS, OBJECT_OPTIONS};
use crate::schema::startup::{MONITOR_OPTIONS, NBD_SERVER_OPTIONS};
use crate::schema::types::ObjectType;
use crate::schema::{
    BlockExportAdd, BlockdevOptions, MonitorOptions, NbdServerOptions, ObjectAdd, Source, validate,
};

/// Which files an image's header may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeaderRefs {
    /// Any file.
    Any,
    /// Files in the image's own folder or below, and in allowed folders.
    #[default]
    SameDir,
    /// None: only what options name.
    Explicit,
}

/// The program ends before it began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Early {
    /// Exit status.
    pub status: u8,
    /// For standard output.
    pub output: String,
    /// For standard error.
    pub error: String,
}

/// What an option asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Open a node.
    Blockdev(Box<BlockdevOptions>),
    /// Open a stream; the texts are warnings.
    Chardev(ChardevSpec, Vec<String>),
    /// Speak QMP on a stream.
    Monitor(MonitorOptions),
    /// Listen for NBD clients.
    NbdServer(NbdServerOptions),
    /// Export a node.
    Export(Box<BlockExportAdd>),
    /// Make an object.
    Object(ObjectAdd),
    /// Print a text and end the program with success.
    Print(String),
}

/// An option's turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The option as typed, for error texts.
    pub text: String,
    /// What to do, or why its argument is refused.
    pub action: Result<Action, String>,
}

/// A command line that passed the first pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Base name of the program, for error texts.
    pub program: String,
    /// `--daemonize`.
    pub daemonize: bool,
    /// `--pidfile`.
    pub pidfile: Option<PathBuf>,
    /// `--header-refs`.
    pub header_refs: HeaderRefs,
    /// `--allow-dir`, each.
    pub allowed_dirs: Vec<PathBuf>,
    items: Vec<Item>,
}

/// The first pass. `program` is argv[0], `words` are the rest.
pub fn plan(program: &str, words: &[String]) -> Result<Plan, Early> {
    let program = program.rsplit('/').next().unwrap_or(program).to_owned();
    let fail = |text: String| Early {
        status: 1,
        output: String::new(),
        error: format!("{program}: {text}\n"),
    };
    let print = |output| Early { status: 0, output, error: String::new() };
    let mut plan = Plan {
        program: program.clone(),
        daemonize: false,
        pidfile: None,
        header_refs: HeaderRefs::default(),
        allowed_dirs: Vec::new(),
        items: Vec::new(),
    };
    for item in Scanner::new(words) {
        let item = item.map_err(|error| fail(error.to_string()))?;
        let Item::Option(given) = &item else {
            plan.items.push(item);
            continue;
        };
        match given.opt {
            Opt::Help => return Err(print(help::usage(&program))),
            Opt::Version => return Err(print(help::version())),
            Opt::Trace => check_trace(&given.argument)
                .map_err(|error| fail(format!("{}: {error}", given.text)))?,
            Opt::Daemonize => plan.daemonize = true,
            Opt::Pidfile => plan.pidfile = Some((&given.argument).into()),
            Opt::AllowDir => plan.allowed_dirs.push((&given.argument).into()),
            Opt::HeaderRefs => {
                plan.header_refs = match given.argument.as_str() {
                    "any" => HeaderRefs::Any,
                    "same-dir" => HeaderRefs::SameDir,
                    "explicit" => HeaderRefs::Explicit,
                    _ => {
                        let want = "expected any, same-dir or explicit";
                        return Err(fail(format!("{}: {want}", given.text)));
                    }
                };
            }
            _ => plan.items.push(item),
        }
    }
    Ok(plan)
}

impl Plan {
    /// The options in order, each parsed when it is asked for.
    pub fn actions(&self) -> impl Iterator<Item = Step> {
        self.items.iter().map(|item| match item {
            Item::Option(given) => Step { text: given.text.clone(), action: action(given) },
            Item::Word(word) => {
                Step { text: word.clone(), action: Err("Unexpected argument".to_owned()) }
            }
        })
    }
}

fn action(given: &Given) -> Result<Action, String> {
    let argument = given.argument.as_str();
    match given.opt {
        Opt::Blockdev => {
            let value = structured(argument, Some("driver"), &BLOCKDEV_OPTIONS)?;
            typed::<BlockdevOptions>(value).map(|options| Action::Blockdev(Box::new(options)))
        }
        Opt::Export => {
            let value = structured(argument, Some("type"), &BLOCK_EXPORT_OPTIONS)?;
            typed::<BlockExportAdd>(value).map(|export| Action::Export(Box::new(export)))
        }
        Opt::Monitor => {
            typed(structured(argument, Some("chardev"), &MONITOR_OPTIONS)?).map(Action::Monitor)
        }
        Opt::NbdServer => {
            typed(structured(argument, None, &NBD_SERVER_OPTIONS)?).map(Action::NbdServer)
        }
        Opt::Object => object(argument),
        Opt::Chardev if matches!(argument, "help" | "?") => Ok(Action::Print(help::chardevs())),
        Opt::Chardev => {
            parse_chardev(argument).map(|(spec, warnings)| Action::Chardev(spec, warnings))
        }
        Opt::Help | Opt::Version | Opt::Trace | Opt::Daemonize | Opt::Pidfile => nothing(),
        Opt::HeaderRefs | Opt::AllowDir => nothing(),
    }
}

/// The first pass has dealt with the option and keeps none of its kind.
fn nothing() -> Result<Action, String> {
    Ok(Action::Print(String::new()))
}

/// An argument in either syntax, checked against its type.
fn structured(text: &str, implied: Option<&str>, ty: &ObjectType) -> Result<Value, String> {
    let (value, source) = if text.starts_with('{') {
        (json(text)?, Source::Json)
    } else {
        let parsed = parse_keyval(text, implied).map_err(|error| error.to_string())?;
        if parsed.help {
            return Err("Help is not available for this option".to_owned());
        }
        (with_bitmap(parsed.value, ty), Source::Keyval)
    };
    validate(ty, value, source).map_err(|error| error.to_string())
}

fn json(text: &str) -> Result<Value, String> {
    let value = parse_one(text).map_err(|error| error.to_string())?;
    Ok(value.unwrap_or_default())
}

/// `bitmap=NAME` of an export, which the peer's help promises, is `bitmaps.0=NAME`.
fn with_bitmap(mut value: Value, ty: &ObjectType) -> Value {
    let members = value.as_object_mut().filter(|_| std::ptr::eq(ty, &BLOCK_EXPORT_OPTIONS));
    if let Some(members) = members.filter(|members| !members.contains_key("bitmaps"))
        && let Some(bitmap) = members.shift_remove("bitmap")
    {
        members.insert("bitmaps".to_owned(), Value::Array(vec![bitmap]));
    }
    value
}

fn object(text: &str) -> Result<Action, String> {
    if !text.starts_with('{') {
        let parsed = parse_keyval(text, Some("qom-type")).map_err(|error| error.to_string())?;
        if parsed.help {
            let named = parsed.value.get("qom-type").and_then(Value::as_str);
            return Ok(Action::Print(help::objects(named)));
        }
    }
    typed(structured(text, Some("qom-type"), &OBJECT_OPTIONS)?).map(Action::Object)
}

fn typed<T: for<'de> Deserialize<'de>>(value: Value) -> Result<T, String> {
    T::deserialize(value).map_err(|error| error.to_string())
}

/// Tracing is accepted so that command lines written for the peer work.
fn check_trace(text: &str) -> Result<(), String> {
    parse_options(text, "enable", &["enable", "events", "file"])
        .map(|_| ())
        .map_err(|name| format!("Invalid parameter '{name}'"))
}
