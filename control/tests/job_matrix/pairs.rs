//! Each ordered pair of operations on shared nodes, the first in each of its states: the second is
//! refused with class and text, and nothing is harmed by the attempt, or both end right.
//!
//! The table says what is well defined. Jobs that move content between layers that another one
//! moves exclude each other, and so do two that would move the guest, but for a mirror and an
//! active commit (`beside`); a backup is an instant and goes with what came first, but for a mirror
//! that takes the guest away from under it.

use std::rc::Rc;

use liveblk_engine::driver::sim::SimFs;
use liveblk_engine::executor::Class;
use liveblk_jobs::Status;
use serde_json::json;

use crate::world::{Cells, Op, SIZE, World, images, on};

/// What a second operation must meet.
#[derive(Clone, Copy, Debug)]
enum Answer {
    /// It is done, and both end right.
    Right,
    /// Refused with this text, in class GenericError.
    No(&'static str),
}

use Answer::{No, Right};

const STREAM: &str = "Node 'd' is busy: block device is in use by block job: stream";
const COMMIT: &str = "Node 'd' is busy: block device is in use by block job: commit";
const MIRROR: &str = "Node 'd' is busy: block device is in use by block job: mirror (job 'j')";
const MIRROR_BELOW: &str = "Node 'd' is busy: block device is in use by block job: mirror";
const BACKUP_BELOW: &str = "Node 'd' is busy: block device is in use by block job: backup";
const FROZEN: &str = "Cannot change frozen 'backing' link from 'd' to 'c'";
const NO_ROOT: &str = "Need a root block node";
const BELOW: &str = "Node 'd' is busy: node is used as backing hd of 'sj'";

const SECONDS: [Op; 9] = [
    Op::Snapshot,
    Op::Stream,
    Op::Commit,
    Op::Active,
    Op::Mirror,
    Op::Backup,
    Op::Resize,
    Op::Reopen,
    Op::Relink,
];

/// First operation; then the answers to snapshot, stream, commit, active commit, mirror, backup,
/// resize, reopen, reopen with another backing node.
const TABLE: [(Op, [Answer; 9]); 8] = [
    // Fills d: whoever moves content of its layers waits; copies and overlays of d do not care.
    (
        Op::Stream,
        [Right, No(STREAM), No(STREAM), No(STREAM), Right, Right, No(STREAM), Right, No(FROZEN)],
    ),
    // Empties the layers between d and a: d itself is not touched but for its header.
    (
        Op::Commit,
        [Right, No(COMMIT), No(COMMIT), No(COMMIT), Right, Right, Right, Right, No(FROZEN)],
    ),
    // Takes the guest away from d, and follows it until then; copies of all of d go on at a.
    (
        Op::Active,
        [Right, No(COMMIT), No(COMMIT), No(COMMIT), Right, Right, Right, Right, No(FROZEN)],
    ),
    // The same; what moves content within d's chain does not show.
    (
        Op::Mirror,
        [Right, Right, Right, Right, No(MIRROR), No(MIRROR), Right, Right, No(MIRROR_BELOW)],
    ),
    // Is an instant of d: only its layers have to stay what they are.
    (Op::Backup, [Right, Right, Right, Right, Right, Right, Right, Right, No(BACKUP_BELOW)]),
    // d lies below the new node by then; it can have several above it.
    (Op::Snapshot, [Right, Right, No(NO_ROOT), No(NO_ROOT), Right, Right, No(BELOW), Right, Right]),
    (Op::Resize, [Right; 9]),
    (Op::Reopen, [Right; 9]),
];

/// The states in which the second comes.
fn states(first: Op) -> &'static [Status] {
    use Status::*;
    match first {
        Op::Stream | Op::Commit | Op::Backup => &[Running, Paused, Waiting, Pending],
        Op::Active | Op::Mirror => &[Running, Paused, Ready, Standby, Waiting, Pending],
        _ => &[],
    }
}

fn row(first: Op) -> [Answer; 9] {
    TABLE.into_iter().find(|(op, _)| *op == first).expect("a row").1
}

/// One cell.
fn cell(images: &SimFs, seed: u64, first: Op, state: Option<Status>, second: Op, answer: Answer) {
    let what = format!("{second:?} under {first:?} {state:?}");
    on(images, seed, move |world: Rc<World>| async move {
        match state {
            Some(state) => world.lead(first, state, false).await,
            None => world.try_op(first, "j", "t").await.expect("the first is done"),
        }
        if first == Op::Resize {
            // A copy is as large as d.
            let resize = json!({"node-name": "w", "size": 2 * SIZE});
            world.qmp("block_resize", resize).await.expect("it grows");
        }
        world.work(3).await;
        let found = world.try_op(second, "k", "w").await;
        let refused = found.is_err();
        match (answer, found) {
            (Right, Ok(())) => {}
            (No(text), Err((class, desc))) => {
                assert_eq!((&*class, &*desc), ("GenericError", text), "{what}");
                assert_eq!(world.status(), state, "{what}: the first does not notice");
            }
            (answer, found) => panic!("{what}: {found:?} instead of {answer:?}"),
        }
        world.work(3).await;
        world.finish().await;
        match first {
            Op::Active if refused => assert_eq!(world.guest_is_at(), "a", "{what}"),
            Op::Mirror if refused => assert_eq!(world.guest_is_at(), "t", "{what}"),
            _ => {}
        }
        world.prove(&what).await;
    });
}

fn all_of(first: Op) {
    let (images, mut cells) = (images(), Cells::default());
    for (nth, (second, answer)) in SECONDS.into_iter().zip(row(first)).enumerate() {
        for (index, state) in states(first).iter().enumerate() {
            let seed = (nth * 10 + index) as u64;
            let what = format!("{second:?} under {first:?} {state:?}");
            cells.run(&what, || cell(&images, seed, first, Some(*state), second, answer));
        }
    }
    cells.demand();
}

#[test]
fn what_comes_under_a_stream_is_right_or_told_who_has_the_node() {
    all_of(Op::Stream);
}

#[test]
fn what_comes_under_a_commit_is_right_or_told_who_has_the_node() {
    all_of(Op::Commit);
}

#[test]
fn what_comes_under_an_active_commit_is_right_or_told_who_has_the_node() {
    all_of(Op::Active);
}

#[test]
fn what_comes_under_a_mirror_is_right_or_told_who_has_the_node() {
    all_of(Op::Mirror);
}

#[test]
fn what_comes_under_a_backup_is_right_or_told_who_has_the_node() {
    all_of(Op::Backup);
}

#[test]
fn what_comes_after_a_snapshot_a_resize_or_a_reopen_is_right_or_told_why_not() {
    let (images, mut cells) = (images(), Cells::default());
    for first in [Op::Snapshot, Op::Resize, Op::Reopen] {
        for (nth, (second, answer)) in SECONDS.into_iter().zip(row(first)).enumerate() {
            // What lies below d is another disk then: only what guests see of s counts.
            if second != Op::Relink {
                let what = format!("{second:?} after {first:?}");
                cells.run(&what, || cell(&images, nth as u64, first, None, second, answer));
            }
        }
    }
    cells.demand();
}

/// Two operations at once: each is done or refused, whoever comes first, and the images are right.
#[test]
fn operations_that_begin_together_leave_right_images() {
    let (images, mut cells) = (images(), Cells::default());
    let firsts = [Op::Snapshot, Op::Resize, Op::Reopen];
    for (nth, second) in SECONDS.into_iter().filter(|second| *second != Op::Relink).enumerate() {
        for (index, first) in firsts.into_iter().enumerate() {
            let what = format!("{second:?} together with {first:?}");
            let seed = (nth * 3 + index) as u64;
            cells.run(&what, || together(&images, seed, first, second));
        }
    }
    cells.demand();
}

fn together(images: &SimFs, seed: u64, first: Op, second: Op) {
    let what = format!("{second:?} together with {first:?}");
    on(images, seed, move |world: Rc<World>| async move {
        let other = Rc::clone(&world);
        let wait = world.core.random() % 300_000;
        let begun = async move { other.try_op(first, "j", "t").await };
        let begun = world.core.spawn(Class::Guest, begun);
        world.core.sleep(wait).await;
        let answers = [world.try_op(second, "k", "w").await, begun.await];
        for (class, text) in answers.iter().filter_map(|answer| answer.as_ref().err()) {
            assert_eq!(class, "GenericError", "{what}");
            assert!(text.contains("busy") || text.contains("root"), "{what}: {text}");
        }
        assert!(answers.iter().any(Result::is_ok), "{what}: {answers:?}");
        world.finish().await;
        world.prove(&what).await;
    });
}
