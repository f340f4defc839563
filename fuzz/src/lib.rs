//! What the targets share: one simulated machine per thread, for all inputs.

use std::cell::RefCell;

use liveblk_formats::qcow2::fuzzing::{Session, TARGETS};

thread_local! {
    static SESSION: RefCell<Session> = RefCell::new(Session::new());
}

/// Runs one input of the target `name`; panics if a promise is broken.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    let target = target.expect("invariant: called with a name of the list");
    SESSION.with_borrow_mut(|session| (target.run)(session, data));
}
