//! What the targets share: one simulated machine per thread, for all inputs; their seed corpora.

use std::cell::RefCell;
use std::path::PathBuf;

use liveblk_formats::qcow2::fuzzing::{Session, TARGETS, Target};

thread_local! {
    static SESSION: RefCell<Session> = RefCell::new(Session::new());
}

fn target(name: &str) -> Target {
    let target = TARGETS.into_iter().find(|target| target.name == name);
    target.expect("invariant: called with a name of the list")
}

/// What the target `name` does first. With `SEEDS=FOLDER` in the environment it only writes its
/// seed corpus there, prints the length of its longest input in bytes, and ends.
pub fn start(name: &str) {
    let Some(folder) = std::env::var_os("SEEDS").map(PathBuf::from) else { return };
    let target = target(name);
    std::fs::create_dir_all(&folder).expect("the folder can be made");
    for (number, input) in (target.corpus)().iter().enumerate() {
        let file = folder.join(format!("seed-{number:04}"));
        std::fs::write(file, input).expect("the folder takes files");
    }
    println!("{}", target.len_max);
    std::process::exit(0);
}

/// Runs one input of the target `name`; panics if a promise is broken.
pub fn run(name: &str, data: &[u8]) {
    SESSION.with_borrow_mut(|session| (target(name).run)(session, data));
}
