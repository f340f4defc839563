//! The second pass: options take effect in their order.
//!
//! Owns: what of a text goes to which stream. Promises: the first option that fails ends it; what
//! was opened before is closed by the caller.

use std::io::Write;

use crate::backend::EngineBackend;
use crate::cli::{Action, Plan};
use crate::json::Layout;
use crate::monitor::{Chardevs, MonitorSetup};
use crate::schema::{Command, MonitorOptions};

/// How the second pass ends.
pub(super) enum Started {
    /// Serve these monitors.
    Serve(Vec<MonitorSetup>),
    /// An option only asked for a text, which is printed.
    Printed,
}

/// Performs the options of `plan`. The error is the whole line for standard error, without the
/// program's name.
pub(super) fn perform(plan: &Plan, backend: &EngineBackend) -> Result<Started, String> {
    let mut chardevs = Chardevs::default();
    let mut monitors = Vec::new();
    for step in plan.actions() {
        let run = |command| {
            let done = backend.run(command).map(drop);
            done.map_err(|failure| failure.full_text())
        };
        let tell = |text: String| eprintln!("{}: {}: {text}", plan.program, step.text);
        let done = step.action.and_then(|action| match action {
            Action::Blockdev(options) => run(Command::BlockdevAdd(options)),
            Action::NbdServer(options) => run(Command::NbdServerStart(options)),
            Action::Export(export) => run(Command::BlockExportAdd(*export)),
            Action::Object(object) => run(Command::ObjectAdd(object)),
            Action::Chardev(spec, warnings) => {
                warnings.into_iter().for_each(&tell);
                chardevs.open(spec, &mut |text| tell(text))
            }
            Action::Monitor(options) => monitor(options, &mut chardevs).map(|setup| {
                monitors.push(setup);
            }),
            Action::Print(text) => {
                print(&text);
                Err(String::new())
            }
        });
        match done {
            Ok(()) => {}
            Err(text) if text.is_empty() => return Ok(Started::Printed),
            Err(text) => return Err(format!("{}: {text}", step.text)),
        }
    }
    Ok(Started::Serve(monitors))
}

fn monitor(options: MonitorOptions, chardevs: &mut Chardevs) -> Result<MonitorSetup, String> {
    let chardev = chardevs.claim(&options.chardev)?;
    if options.mode.as_deref() == Some("readline") {
        return Err("Only QMP is supported".to_owned());
    }
    let layout = if options.pretty { Layout::Pretty } else { Layout::Compact };
    Ok(MonitorSetup { chardev, layout })
}

/// Prints a text on standard output.
pub(super) fn print(text: &str) {
    let mut out = std::io::stdout();
    // Nobody is left who could be told.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
