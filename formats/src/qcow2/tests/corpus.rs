//! The corpora of the fuzz targets, replayed: no input breaks a promise.

use super::fuzzing::{Session, TARGETS};

#[test]
fn every_input_of_the_corpora_keeps_the_promises() {
    for target in TARGETS {
        let mut session = Session::new();
        for (number, input) in (target.corpus)().iter().enumerate() {
            println!("{} {number}", target.name);
            (target.run)(&mut session, input);
        }
    }
}
