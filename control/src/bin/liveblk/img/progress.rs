//! Progress on stderr: a bar with rate and ETA on a terminal, percentages with `-p` elsewhere.

use std::cell::Cell;
use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressStyle};

/// Shows how far a verb is.
pub(crate) enum Progress {
    /// Nobody looks.
    Silent,
    /// A bar.
    Bar(ProgressBar),
    /// A line of percentages; the last one shown in hundredths of a percent.
    Line { total: u64, shown: Cell<u64> },
}

impl Progress {
    /// For `total` bytes. `wanted` is `-p`, `quiet` is `-q`.
    pub(crate) fn new(total: u64, wanted: bool, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        match (quiet, terminal, wanted) {
            (true, ..) | (false, false, false) => Self::Silent,
            (false, true, _) => {
                let form = "{bar:30} {percent:>3}% {bytes}/{total_bytes} {bytes_per_sec} ETA {eta}";
                let style = ProgressStyle::with_template(form)
                    .unwrap_or_else(|_| ProgressStyle::default_bar());
                Self::Bar(ProgressBar::new(total).with_style(style))
            }
            (false, false, true) => {
                let line = Self::Line { total, shown: Cell::new(u64::MAX) };
                line.at(0);
                line
            }
        }
    }

    /// `done` bytes are done.
    pub(crate) fn at(&self, done: u64) {
        match self {
            Self::Silent => {}
            Self::Bar(bar) => bar.set_position(done),
            Self::Line { total, shown } => {
                let part = match u128::from(*total) {
                    0 => 10_000,
                    total => u64::try_from(u128::from(done) * 10_000 / total).unwrap_or(10_000),
                };
                if shown.get() == u64::MAX || part >= shown.get() + 100 {
                    shown.set(part);
                    print!("    ({}.{:02}/100%)\r", part / 100, part % 100);
                }
            }
        }
    }

    /// All is done.
    pub(crate) fn end(&self) {
        match self {
            Self::Silent => {}
            Self::Bar(bar) => bar.finish_and_clear(),
            Self::Line { .. } => println!("    (100.00/100%)\r"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Self::Bar(bar) = self
            && !bar.is_finished()
        {
            bar.abandon();
        }
    }
}
