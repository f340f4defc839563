//! The demo's screen: one bar with rate and ETA per step on a terminal, plain lines elsewhere.

use std::error::Error;
use std::io::IsTerminal;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

use super::scenario::{Scenario, Update};

/// Starts the scenario on an engine and draws its updates until it ends.
pub(crate) fn run(folder: &Path, size: u64) -> Result<(), Box<dyn Error>> {
    let begun = Instant::now();
    let (updates, receiver) = channel();
    let scenario = Scenario { folder: folder.into(), size, updates };
    let engine = std::thread::spawn(move || liveblk::run(move |host| scenario.run(host)));
    let failed = draw(&receiver);
    let outcome = engine.join().map_err(|_| "the engine stopped unexpectedly")?;
    match outcome {
        Ok(Ok(())) => {
            println!("All steps passed in {:.1} s.", begun.elapsed().as_secs_f64());
            Ok(())
        }
        Ok(Err(wrong)) => Err(format!("{}: {wrong}", failed.unwrap_or("demo")).into()),
        Err(error) => Err(format!("{}: {error}", failed.unwrap_or("demo")).into()),
    }
}

/// Draws until the scenario is over; the title of the step that did not end, if any.
fn draw(updates: &Receiver<Update>) -> Option<&'static str> {
    let terminal = std::io::stderr().is_terminal();
    let style = "{bar:30} {percent:>3}% {bytes}/{total_bytes} {bytes_per_sec} ETA {eta}";
    let style =
        ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
    let mut step: Option<&'static str> = None;
    let mut bar: Option<ProgressBar> = None;
    for update in updates {
        match update {
            Update::Begin(title) => {
                println!("{title}");
                step = Some(title);
            }
            Update::Progress(done, total) if terminal => {
                let bar = bar.get_or_insert_with(|| {
                    ProgressBar::new(total.max(1)).with_style(style.clone())
                });
                bar.set_length(total.max(1));
                bar.set_position(done);
            }
            Update::Progress(..) => {}
            Update::End(figures) => {
                if let Some(bar) = bar.take() {
                    bar.finish_and_clear();
                }
                println!("  {figures}");
                step = None;
            }
        }
    }
    if let Some(bar) = bar {
        bar.abandon();
    }
    step
}
