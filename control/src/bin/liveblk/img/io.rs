//! `liveblk img io`: reads and writes in the words of qemu-io, for tests and for nothing else.
//!
//! Each argument after the file is a command; the first that fails ends the program with exit code
//! 1. `write [-z [-u]] [-c] [-P BYTE] OFFSET LENGTH`, `read [-P BYTE] OFFSET LENGTH`, `discard
//! OFFSET LENGTH`, `truncate SIZE`, `flush`, `length`. No promise is made about its output.

use std::rc::Rc;

use clap::Args;
use liveblk::engine::format::Preallocation;
use liveblk::engine::node::Origin;
use liveblk::{Host, Node, WriteFlags, ZeroFlags};

use super::failure::{Answer, Failure};
use super::pieces;
use super::size;
use super::source::{self, Wanted};

/// Bytes of one request.
const STEP: u64 = 2 << 20;

/// For tests: read and write in the words of qemu-io
#[derive(Args, Debug)]
pub(crate) struct IoOptions {
    /// Format of the image (needed for raw)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Open read-only
    #[arg(short, long)]
    read_only: bool,
    /// Say what each command did
    #[arg(short, long)]
    verbose: bool,
    /// The image
    filename: String,
    /// Commands
    commands: Vec<String>,
}

/// A command with its arguments read.
#[derive(Debug, Default)]
struct Command<'a> {
    verb: &'a str,
    pattern: Option<u8>,
    zeroes: bool,
    unmap: bool,
    compressed: bool,
    numbers: Vec<u64>,
}

/// Runs the commands.
pub(crate) async fn run(host: &Host, options: IoOptions) -> Answer {
    let wanted = Wanted {
        format: options.format.as_deref(),
        writable: !options.read_only,
        ..Wanted::default()
    };
    let node = source::open(host, &options.filename, wanted).await?;
    for text in &options.commands {
        let command = parse(text).ok_or_else(|| {
            Failure::new(format!("'{text}' is no command (see the source of `liveblk img io`)"))
        })?;
        let done = command.run(host, &node).await;
        let said = done.map_err(|failure| failure.during(text))?;
        if options.verbose || !said.is_empty() {
            println!("{text}: {}", if said.is_empty() { "done" } else { &said });
        }
    }
    node.flush(Origin::External).await?;
    host.graph().remove(&node).await?;
    Ok(0)
}

fn parse(text: &str) -> Option<Command<'_>> {
    let mut words = text.split_whitespace();
    let mut command = Command { verb: words.next()?, ..Command::default() };
    while let Some(word) = words.next() {
        match word {
            "-P" => command.pattern = Some(u8::try_from(size::parse(words.next()?)?).ok()?),
            "-z" => command.zeroes = true,
            "-u" => command.unmap = true,
            "-c" => command.compressed = true,
            number => command.numbers.push(size::parse(number)?),
        }
    }
    let wants = match command.verb {
        "write" | "read" | "discard" => 2,
        "truncate" => 1,
        "flush" | "length" => 0,
        _ => return None,
    };
    (command.numbers.len() == wants).then_some(command)
}

impl Command<'_> {
    async fn run(&self, host: &Host, node: &Rc<Node>) -> Result<String, Failure> {
        let number = |index: usize| self.numbers.get(index).copied().unwrap_or(0);
        let (at, len) = (number(0), number(1));
        match self.verb {
            "write" if self.zeroes => {
                let flags = ZeroFlags { may_unmap: self.unmap, ..ZeroFlags::default() };
                node.write_zeroes(at, len, flags, Origin::External).await?;
            }
            "write" => self.write(host, node, at, len).await?,
            "read" => self.read(host, node, at, len).await?,
            "discard" => node.discard(at, len, Origin::External).await?,
            "truncate" => node.resize(at, Preallocation::Off).await?,
            "flush" => node.flush(Origin::External).await?,
            _ => return Ok(node.size().to_string()),
        }
        Ok(String::new())
    }

    async fn write(&self, host: &Host, node: &Rc<Node>, at: u64, len: u64) -> Result<(), Failure> {
        let pattern = self.pattern.unwrap_or(0xcd);
        for (at, len) in pieces::split(at, len, STEP) {
            let bytes = host.space(usize::try_from(len).unwrap_or(0));
            bytes.fill(pattern);
            let flags = WriteFlags { compressed: self.compressed, ..WriteFlags::default() };
            node.write(at, bytes, flags, Origin::External).await?;
        }
        Ok(())
    }

    async fn read(&self, host: &Host, node: &Rc<Node>, at: u64, len: u64) -> Result<(), Failure> {
        for (at, len) in pieces::split(at, len, STEP) {
            let bytes = host.space(usize::try_from(len).unwrap_or(0));
            node.read(at, bytes.clone(), Origin::External).await?;
            let Some(pattern) = self.pattern else { continue };
            let bytes = bytes.to_vec();
            if let Some(index) = bytes.iter().position(|byte| *byte != pattern) {
                let wrong = at + index as u64;
                let text = format!("Pattern verification failed at offset {wrong}");
                return Err(Failure::new(text));
            }
        }
        Ok(())
    }
}
