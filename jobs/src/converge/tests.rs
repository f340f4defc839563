//! The policy without a clock: looks at made-up traffic.

use super::*;

const MS: u64 = 1_000_000;
const MIB: u64 = 1 << 20;
/// Bytes of the disk.
const DISK: u64 = 100 * MIB;

fn second() -> Rc<Convergence> {
    let wanted = Converge { deadline_ms: 1000, max_latency_us: 20_000 };
    Convergence::new(wanted, CopyMode::Background, 0)
}

fn sight(traffic: Traffic, left: u64) -> Sight {
    Sight { traffic, left, size: DISK, ..Sight::default() }
}

/// A copy at `copied` bytes per second under guests that make `dirtied` bytes dirty.
fn run(converge: &Convergence, from: u64, to: u64, rates: Traffic, left: u64) -> Vec<Step> {
    let at = |ms: u64, rate: u64| rate * ms / 1000;
    (from..to)
        .step_by(10)
        .map(|ms| {
            let traffic = Traffic {
                dirtied: at(ms, rates.dirtied),
                copied: at(ms, rates.copied),
                covered: at(ms, rates.covered),
            };
            converge.look(ms * MS, sight(traffic, left))
        })
        .collect()
}

#[test]
fn a_copy_that_will_be_there_in_time_slows_nobody_down() {
    let converge = second();
    let quick = Traffic { copied: 100 * MIB, dirtied: 10 * MIB, covered: 0 };
    let steps = run(&converge, 10, 500, quick, 10 * MIB);
    assert!(steps.iter().all(|step| *step == Step::default()));
    let info = converge.info(10 * MIB);
    assert_eq!((info.phase, info.delay_us), (Phase::Background, 0));
    let eta = info.eta_ms.expect("it is known");
    assert!((100..130).contains(&eta), "{eta} ms");
}

#[test]
fn a_guest_that_is_faster_than_the_target_leads_through_the_phases() {
    let converge = second();
    let fast = Traffic { copied: 20 * MIB, dirtied: 40 * MIB, covered: 0 };
    let steps = run(&converge, 10, 250, fast, 10 * MIB);
    assert!(steps.iter().any(|step| step.phase));
    let info = converge.info(10 * MIB);
    assert_eq!((info.phase, info.eta_ms, info.delay_us), (Phase::WriteBlocking, None, 0));
    let blocked = Traffic { copied: 5 * MIB, dirtied: 0, covered: 15 * MIB };
    run(&converge, 250, 600, blocked, 10 * MIB);
    assert_eq!(converge.info(0).phase, Phase::Throttling);
    let steps = run(&converge, 600, 1300, blocked, 10 * MIB);
    assert_eq!(steps.iter().filter(|step| step.missed).count(), 1, "it is told once");
}

#[test]
fn delays_grow_step_by_step_to_half_the_latency_and_go_when_the_copy_is_early() {
    let converge = second();
    let late = Traffic { copied: 2 * MIB, dirtied: 0, covered: 18 * MIB };
    let mut last = 0;
    for ms in (10..900).step_by(10) {
        run(&converge, ms, ms + 1, late, 10 * MIB);
        let delay = converge.delay();
        assert!(delay >= last && delay <= (2 * last).max(10 * MS / 16), "{last}, {delay} ns");
        last = delay;
    }
    assert_eq!(last, 10 * MS);
    // The bytes go on from where they were.
    for ms in (900..1000).step_by(10) {
        let copied = 2 * MIB + (ms - 900) * 10 * MIB;
        let traffic = Traffic { copied, dirtied: 0, covered: 18 * MIB };
        converge.look(ms * MS, sight(traffic, MIB));
        assert!(converge.delay() <= 10 * MS);
    }
    assert!(converge.delay() < 10 * MS);
    converge.meet();
    let info = converge.info(0);
    assert_eq!((info.phase, info.delay_us, info.eta_ms), (Phase::WriteBlocking, 0, Some(0)));
}

#[test]
fn the_background_ends_before_more_than_twice_the_disk_is_copied() {
    let wanted = Converge { deadline_ms: u32::MAX, max_latency_us: 1 };
    let converge = Convergence::new(wanted, CopyMode::Background, 0);
    let (copied, left) = (DISK, DISK / 4 * 3 + MIB);
    let step = converge.look(10 * MS, sight(Traffic { copied, ..Traffic::default() }, left));
    assert!(step.phase);
    assert_eq!(converge.info(left).phase, Phase::WriteBlocking);
    assert!(copied + left < 2 * DISK);
}

#[test]
fn nobody_is_delayed_for_a_copy_that_its_own_speed_limit_slows_down() {
    let converge = second();
    for ms in (10..1500).step_by(10) {
        let copied = ms * MIB / 100;
        let traffic = Traffic { copied, dirtied: 0, covered: ms * MIB };
        let limited = Sight { speed: 10 * MIB, ..sight(traffic, DISK - copied) };
        converge.look(ms * MS, limited);
        assert_eq!(converge.delay(), 0);
    }
    assert_eq!(converge.info(DISK).phase, Phase::WriteBlocking);
    assert!(converge.info(DISK).missed);
}

#[test]
fn nothing_is_learnt_while_the_job_stands_still() {
    let converge = second();
    let quick = Traffic { copied: 100 * MIB, dirtied: 10 * MIB, covered: 0 };
    run(&converge, 10, 200, quick, 10 * MIB);
    let traffic = Traffic { copied: 19 * MIB, ..quick };
    for ms in (200..900).step_by(10) {
        assert_eq!(converge.stand_still(ms * MS, sight(traffic, 10 * MIB)), Step::default());
    }
    let step = converge.look(900 * MS, sight(traffic, 10 * MIB));
    assert_eq!((step, converge.info(0).phase), (Step::default(), Phase::Background));
    assert!(converge.stand_still(1001 * MS, sight(traffic, 10 * MIB)).missed);
    assert!(!converge.stand_still(1002 * MS, sight(traffic, 10 * MIB)).missed);
}

#[test]
fn a_client_that_asks_for_write_blocking_is_not_asked_again() {
    let converge = second();
    let asked = Sight { blocking: true, ..sight(Traffic::default(), DISK) };
    let step = converge.look(10 * MS, asked);
    assert!(step.phase, "queries and events agree");
    assert_eq!(converge.info(DISK).phase, Phase::WriteBlocking);
}
