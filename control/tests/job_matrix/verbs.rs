//! Each verb in each state of each kind of job, by the table of the peer: class and text of a
//! refusal, which changes nothing, and the effect of what is accepted.

use std::rc::Rc;

use liveblk_engine::driver::sim::{HoldPoint, OpFilter, Sim, SimConfig, SimFs, SimOpKind};
use liveblk_jobs::Status;
use serde_json::{Value, json};

use crate::rig;
use crate::world::{Cells, Op, World, gone, images, rig_latency};

use Status::{Aborting, Concluded, Paused, Pending, Ready, Running, Standby, Waiting};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Pause,
    Resume,
    Complete,
    /// `job-cancel`, and `block-job-cancel` with force.
    Force,
    /// `block-job-cancel`.
    Soft,
    Finalize,
    Dismiss,
    SetSpeed,
    Change,
}

const VERBS: [Verb; 9] = [
    Verb::Pause,
    Verb::Resume,
    Verb::Complete,
    Verb::Force,
    Verb::Soft,
    Verb::Finalize,
    Verb::Dismiss,
    Verb::SetSpeed,
    Verb::Change,
];

impl Verb {
    /// The commands that are this verb, for job j.
    fn commands(self) -> Vec<(&'static str, Value)> {
        let (id, device) = (json!({"id": "j"}), json!({"device": "j"}));
        match self {
            Self::Pause => vec![("job-pause", id), ("block-job-pause", device)],
            Self::Resume => vec![("job-resume", id), ("block-job-resume", device)],
            Self::Complete => vec![("job-complete", id), ("block-job-complete", device)],
            Self::Force => vec![
                ("job-cancel", id),
                ("block-job-cancel", json!({"device": "j", "force": true})),
            ],
            Self::Soft => vec![("block-job-cancel", device)],
            Self::Finalize => vec![("job-finalize", id.clone()), ("block-job-finalize", id)],
            Self::Dismiss => vec![("job-dismiss", id.clone()), ("block-job-dismiss", id)],
            Self::SetSpeed => {
                vec![("block-job-set-speed", json!({"device": "j", "speed": 1 << 20}))]
            }
            // An active commit is told by its own options only.
            Self::Change => vec![(
                "block-job-change",
                json!({"id": "j", "type": "mirror", "copy-mode": "write-blocking"}),
            )],
        }
    }

    /// The word for it in the peer's refusals.
    fn word(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Complete => "complete",
            Self::Force | Self::Soft => "cancel",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
            Self::SetSpeed => "set-speed",
            Self::Change => "change",
        }
    }
}

/// What a verb must meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// Done.
    Done,
    /// The state does not take it.
    State,
    /// Refused for another reason.
    Text(&'static str),
}

const RESUME: Answer = Answer::Text("Can't resume a job that was not paused");
const TWICE: Answer = Answer::Text("Job is already paused");
const SOFTLY: Answer = Answer::Text("The block job for device 'j' is currently paused");
const NO_CHANGE: Answer = Answer::Text("Job type does not support change");

const STATES: [Status; 8] =
    [Running, Paused, Ready, Standby, Waiting, Pending, Aborting, Concluded];

/// Verb; then its answers in the order of [`STATES`].
const TABLE: [(Verb, [Answer; 8]); 9] = {
    use Answer::{Done, State};
    [
        (Verb::Pause, [Done, TWICE, Done, TWICE, State, State, State, State]),
        (Verb::Resume, [RESUME, Done, RESUME, Done, RESUME, RESUME, RESUME, RESUME]),
        (Verb::Complete, [State, State, Done, Done, State, State, State, State]),
        (Verb::Force, [Done, Done, Done, Done, Done, Done, State, State]),
        (Verb::Soft, [Done, SOFTLY, Done, SOFTLY, Done, Done, State, State]),
        (Verb::Finalize, [State, State, State, State, State, Done, State, State]),
        (Verb::Dismiss, [State, State, State, State, State, State, State, Done]),
        (Verb::SetSpeed, [Done, Done, Done, Done, State, State, State, State]),
        (Verb::Change, [Done, Done, Done, Done, State, State, State, State]),
    ]
};

/// Whether a mirror or active commit is meant where a job can be ready.
fn exists(kind: Op, state: Status) -> bool {
    kind.follows() || !matches!(state, Ready | Standby)
}

fn wanted(verb: Verb, kind: Op, state: Status) -> Answer {
    let row = TABLE.into_iter().find(|(known, _)| *known == verb).expect("a row").1;
    let at = STATES.iter().position(|known| *known == state).expect("a state");
    match row[at] {
        Answer::Done if verb == Verb::Change && kind != Op::Mirror => NO_CHANGE,
        answer => answer,
    }
}

/// Leads a job into `state`, then runs `test`.
fn at<F: Future<Output = ()> + 'static>(
    images: &SimFs,
    kind: Op,
    state: Status,
    test: impl FnOnce(Rc<World>) -> F + 'static,
) {
    let mut config = SimConfig::new(kind as u64);
    config.latency = rig_latency();
    let mut sim = Sim::with_fs(config, images.after_power_cut(0));
    // A partner whose target hangs keeps the job from being over.
    let writes = OpFilter::any().kind(SimOpKind::Write).file("/y");
    let hold = (state == Aborting).then(|| sim.hold(writes, HoldPoint::Start));
    sim.block_on(0, move |core| async move {
        let world = World::open(&core).await;
        world.lead(kind, state, state == Concluded).await;
        test(world).await;
    });
    drop(hold);
}

#[test]
fn verbs_that_a_state_does_not_take_are_refused_as_by_the_peer_and_change_nothing() {
    let (images, mut cells) = (images(), Cells::default());
    for kind in Op::JOBS {
        for state in STATES.into_iter().filter(|state| exists(kind, *state)) {
            cells.run(&format!("{kind:?} {state}"), || refusals(&images, kind, state));
        }
    }
    cells.demand();
}

fn refusals(images: &SimFs, kind: Op, state: Status) {
    at(images, kind, state, move |world| async move {
        for verb in VERBS {
            let desc = match wanted(verb, kind, state) {
                Answer::Done => continue,
                Answer::Text(text) => text.to_owned(),
                Answer::State => format!(
                    "Job 'j' in state '{state}' cannot accept command verb '{}'",
                    verb.word()
                ),
            };
            for (name, arguments) in verb.commands() {
                let answer = world.qmp(name, arguments).await;
                let refusal = ("GenericError".to_owned(), desc.clone());
                assert_eq!(answer, Err(refusal), "{name}: {kind:?} {state}");
                assert_eq!(world.status(), Some(state), "{name}: {kind:?}");
            }
        }
        if state != Aborting {
            world.finish().await;
            world.prove(&format!("{kind:?} {state}")).await;
        }
    });
}

#[test]
fn verbs_that_a_state_takes_have_their_effect() {
    let (images, mut cells) = (images(), Cells::default());
    for kind in Op::JOBS {
        for state in STATES.into_iter().filter(|state| exists(kind, *state)) {
            for verb in VERBS {
                if wanted(verb, kind, state) != Answer::Done {
                    continue;
                }
                for (name, arguments) in verb.commands() {
                    let what = format!("{name}: {kind:?} {state}");
                    let case = (verb, name, arguments);
                    cells.run(&what, || effects(&images, kind, state, case));
                }
            }
        }
    }
    cells.demand();
}

fn effects(images: &SimFs, kind: Op, state: Status, case: (Verb, &'static str, Value)) {
    let (verb, name, arguments) = case;
    at(images, kind, state, move |world| async move {
        let what = format!("{name}: {kind:?} {state}");
        let answer = world.qmp(name, arguments).await;
        assert_eq!(answer, Ok(json!({})), "{what}");
        effect(&world, verb, kind, state, &what).await;
        world.finish().await;
        world.prove_images(&what).await;
    });
}

/// What must have happened after `verb`.
async fn effect(world: &Rc<World>, verb: Verb, kind: Op, state: Status, what: &str) {
    let manager = liveblk_jobs::JobManager::of(&world.core);
    let until = async |wanted| manager.until("j", |now| now == wanted).await;
    let asked = world.core.now();
    let copied = verb == Verb::Soft && state == Ready;
    match verb {
        Verb::Pause => {
            until(if state == Ready { Standby } else { Paused }).await;
            world.work(2).await;
        }
        Verb::Resume => until(if state == Standby { Ready } else { Running }).await,
        Verb::SetSpeed | Verb::Change => assert_eq!(world.status(), Some(state), "{what}"),
        Verb::Complete if state == Standby => {
            world.core.sleep(2_000_000_000).await;
            assert_eq!(world.status(), Some(Standby), "{what}: takes effect when resumed");
        }
        Verb::Complete | Verb::Finalize | Verb::Dismiss | Verb::Force | Verb::Soft => {
            gone(&world.core).await;
            assert!(world.core.now() - asked < 1_000_000_000, "{what}: within a second");
        }
    }
    let events = world.events.words();
    let has = |word: &str| events.iter().any(|known| known == word);
    match verb {
        Verb::Force | Verb::Soft if !copied => {
            assert!(has("CANCELLED") && !has("COMPLETED"), "{what}: {events:?}");
        }
        _ if copied => assert!(has("COMPLETED") && !has("CANCELLED"), "{what}: {events:?}"),
        Verb::Finalize => assert!(has("COMPLETED"), "{what}: {events:?}"),
        _ => {}
    }
    if has("CANCELLED") {
        world.forget_copies();
    }
    let moved = match (verb, kind) {
        (Verb::Force | Verb::Soft, _) => Some("d"),
        (Verb::Complete, Op::Mirror) if state == Ready => Some("t"),
        (Verb::Complete, Op::Active) if state == Ready => Some("a"),
        _ => None,
    };
    if let Some(node) = moved {
        assert_eq!(world.guest_is_at(), node, "{what}");
    }
    if copied && kind == Op::Mirror {
        let copy = rig::content(&crate::world::find(&world.core, "t")).await;
        crate::world::same(&copy, &world.model(), what);
    }
}

#[test]
fn verbs_for_unknown_jobs_have_the_classes_that_clients_probe() {
    let images = images();
    crate::world::on(&images, 1, |world: Rc<World>| async move {
        for verb in VERBS {
            for (name, arguments) in verb.commands() {
                // The two that take an id are of the older kind, too.
                let (class, desc) = if name.starts_with("block-job-") {
                    ("DeviceNotActive", "Block job 'j' not found")
                } else {
                    ("GenericError", "Job not found")
                };
                let answer = world.qmp(name, arguments).await;
                assert_eq!(answer, Err((class.to_owned(), desc.to_owned())), "{name}");
            }
        }
    });
}
