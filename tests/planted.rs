//! Tests of the model test: each planted bug, a rule of the project left out at the one place that
//! keeps it, is found within few seeds. Runs with `--features planted-bugs`.

#[path = "model/backups.rs"]
mod backups;
#[path = "model/beside.rs"]
mod beside;
#[path = "model/bitmaps.rs"]
mod bitmaps;
#[path = "model/chains.rs"]
mod chains;
#[path = "model/changes.rs"]
mod changes;
#[path = "model/guest.rs"]
mod guest;
#[path = "model/images.rs"]
mod images;
#[path = "model/instants.rs"]
mod instants;
#[path = "model/judge.rs"]
mod judge;
#[path = "model/ledger.rs"]
mod ledger;
#[path = "model/mixed.rs"]
mod mixed;
#[path = "model/operator.rs"]
mod operator;
#[path = "model/pattern.rs"]
mod pattern;
#[path = "model/run.rs"]
mod run;
#[path = "model/together.rs"]
mod together;
#[path = "model/world.rs"]
mod world;

use std::panic::catch_unwind;

use liveblk::engine::planted::Planted;

use run::Settings;

/// Seeds within which each bug must be found.
const SEEDS: u64 = 100;

/// The first seed that finds `bug`, and what it says.
fn finds(bug: Planted) {
    let mut settings = Settings::with_peer(false);
    settings.planted = Some(bug);
    let found = (1..=SEEDS).find_map(|seed| {
        let wrong = catch_unwind(|| run::run(seed, settings)).err()?;
        let text = wrong.downcast_ref::<String>().cloned();
        Some((seed, text.unwrap_or_else(|| "a panic without a text".into())))
    });
    match found {
        Some((seed, text)) => println!("{bug:?} found by seed {seed}: {text}"),
        None => panic!("{bug:?} is not found by {SEEDS} seeds"),
    }
}

#[test]
fn a_flush_that_was_left_out_is_found() {
    finds(Planted::FlushLeftOut);
}

#[test]
fn a_dirty_bit_that_was_cleared_after_the_read_is_found() {
    finds(Planted::BitClearedAfterRead);
}

#[test]
fn a_claim_that_was_released_before_the_completion_is_found() {
    finds(Planted::ClaimReleasedEarly);
}

#[test]
fn zeroes_that_bitmaps_do_not_hear_of_are_found() {
    finds(Planted::ZeroesUnrecorded);
}

#[test]
fn a_freed_cluster_that_was_reused_at_once_is_found() {
    finds(Planted::FreedReusedAtOnce);
}
