//! `liveblk`: the command for people.
//!
//! Owns the command line; each verb is a module. Errors go to stderr with the program's name, exit
//! code 1; a wrong command line has exit code 2 (`img`: 1, as qemu-img; `img compare`: 2, because 1
//! means there that the images differ).

#![forbid(unsafe_code)]

mod cli;
mod demo;
mod img;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = match cli::Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return explain(&error),
    };
    let result = match arguments.verb {
        cli::Verb::Img(options) => return img::run(*options),
        cli::Verb::Demo(options) => demo::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("liveblk: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints help, the version or what is wrong with the command line.
fn explain(error: &clap::Error) -> ExitCode {
    // Nothing can be said if the output is closed.
    let _ = error.print();
    let mut words = std::env::args().skip(1);
    let img = words.next().as_deref() == Some("img");
    let compare = words.any(|word| word == "compare");
    match error.exit_code() {
        0 => ExitCode::SUCCESS,
        _ if img && !compare => ExitCode::from(1),
        _ => ExitCode::from(2),
    }
}
