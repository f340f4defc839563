//! `liveblk`: the command for people.
//!
//! Owns the command line; each verb is a module. Errors go to stderr with the program's name, exit
//! code 1.

#![forbid(unsafe_code)]

mod cli;
mod demo;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = cli::Arguments::parse();
    let result = match arguments.verb {
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
