//! A rate limit: a token bucket over slices of 100 ms.
//!
//! Order rules: a unit is issued when the bucket holds it, then charged; in any 100 ms no more than
//! 1.5 times their budget is issued, or one unit where that is more. For that the bucket holds half
//! a slice, and units are an eighth of a slice ([`Rate::unit`]), so that a wake-up that comes late
//! loses nothing. Where the granularity of a copy does not allow such small units, the bucket holds
//! nothing: a unit is issued as soon as there is no debt, and its debt delays the next.
//! Charges that ignore the limit (copy-before-write) make debt; nothing waits for them.

use crate::limits::RATE_SLICE_NS;

/// The limit of one job. Time is an argument, in nanoseconds.
#[derive(Clone, Debug)]
pub struct Rate {
    /// Bytes per second; 0 means no limit.
    speed: u64,
    /// Bytes that the copies take at once.
    unit: u64,
    /// Bytes that may be issued now; negative: debt.
    tokens: i128,
    refilled_at: u64,
}

impl Rate {
    /// A limit of `speed` bytes per second (0: none) at time `now`.
    pub fn new(speed: u64, now: u64) -> Self {
        let mut rate = Self { speed, unit: 1, tokens: 0, refilled_at: now };
        rate.tokens = rate.burst();
        rate
    }

    /// Bytes per second; 0 means no limit.
    pub fn speed(&self) -> u64 {
        self.speed
    }

    /// Changes the limit; debt of the old one is forgotten.
    pub fn set_speed(&mut self, speed: u64, now: u64) {
        *self = Self::new(speed, now);
    }

    /// The bytes that copies take at once under this limit: at most `largest`, multiples of
    /// `granularity` (bytes). What is asked for last is what [`Rate::delay`] waits for.
    pub fn unit(&mut self, granularity: u64, largest: u64) -> u64 {
        let granularity = granularity.max(1);
        let whole = |bytes: u64| (bytes / granularity * granularity).max(granularity);
        self.unit = match self.speed {
            0 => largest,
            _ => whole(self.budget() / 8).min(largest.max(granularity)),
        };
        self.tokens = self.tokens.min(self.burst());
        self.unit
    }

    /// Nanoseconds until a unit may be issued (0: now).
    pub fn delay(&mut self, now: u64) -> u64 {
        if self.speed == 0 {
            return 0;
        }
        self.refill(now);
        let needed = i128::from(self.unit).min(self.burst());
        if self.tokens >= needed {
            return 0;
        }
        let missing = u128::try_from(needed - self.tokens).unwrap_or(0);
        let nanos = (missing * 1_000_000_000).div_ceil(u128::from(self.speed));
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }

    /// Counts `bytes` that were issued.
    pub fn charge(&mut self, bytes: u64, now: u64) {
        if self.speed > 0 {
            self.refill(now);
            self.tokens -= i128::from(bytes);
        }
    }

    /// Takes back a charge of `bytes` that were not moved.
    pub fn refund(&mut self, bytes: u64) {
        if self.speed > 0 {
            self.tokens = (self.tokens + i128::from(bytes)).min(self.burst());
        }
    }

    fn refill(&mut self, now: u64) {
        let elapsed = now.saturating_sub(self.refilled_at);
        let earned = u128::from(self.speed) * u128::from(elapsed) / 1_000_000_000;
        if earned == 0 {
            return;
        }
        // Only the time that whole bytes took is used up, so slow rates lose nothing.
        let used = earned * 1_000_000_000 / u128::from(self.speed);
        self.refilled_at += u64::try_from(used).unwrap_or(elapsed);
        let earned = i128::try_from(earned).unwrap_or(i128::MAX / 2);
        self.tokens = (self.tokens + earned).min(self.burst());
    }

    /// Bytes of a slice.
    fn budget(&self) -> u64 {
        let slice = u128::from(self.speed) * u128::from(RATE_SLICE_NS) / 1_000_000_000;
        u64::try_from(slice).unwrap_or(u64::MAX)
    }

    /// Half a slice's budget; with units that are larger nothing, so that two of them keep their
    /// distance.
    fn burst(&self) -> i128 {
        let half = self.budget() / 2;
        if self.unit > half { 1 } else { i128::from(half).max(1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// A background loop in simulated time: every wake-up comes up to `late` nanoseconds late, and
    /// `debts` are charged when their time has come. What was issued when.
    fn issue(
        rate: &mut Rate,
        (granularity, largest): (u64, u64),
        seconds: u64,
        late: u64,
        mut debts: Vec<(u64, u64)>,
    ) -> Vec<(u64, u64)> {
        let (mut now, mut issued, mut turn) = (0, Vec::new(), 0u64);
        while now < seconds * 1000 * MS {
            while debts.first().is_some_and(|(at, _)| *at <= now) {
                let (at, bytes) = debts.remove(0);
                rate.charge(bytes, at);
            }
            let unit = rate.unit(granularity, largest);
            match rate.delay(now) {
                0 => {
                    rate.charge(unit, now);
                    issued.push((now, unit));
                }
                wait => {
                    turn = turn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    now += wait + if late == 0 { 0 } else { (turn >> 33) % late };
                }
            }
        }
        issued
    }

    fn sum(issued: &[(u64, u64)]) -> u64 {
        issued.iter().map(|(_, bytes)| bytes).sum()
    }

    #[test]
    fn no_100_ms_carry_more_than_one_and_a_half_budgets_or_one_unit() {
        let cases = [
            (100 << 20, (64 << 10, 1 << 20)),
            (10 << 20, (64 << 10, 256 << 10)),
            (1 << 30, (64 << 10, 1 << 20)),
            (3 << 20, (4 << 10, 1 << 20)),
            (64 << 10, (64 << 10, 1 << 20)),
            (1 << 10, (64 << 10, 1 << 20)),
            (20 << 20, (2 << 20, 2 << 20)),
        ];
        for (speed, units) in cases {
            for late in [0, 2 * MS] {
                let issued = issue(&mut Rate::new(speed, 0), units, 10, late, Vec::new());
                let unit = issued[0].1;
                let most = (speed / 10 * 3 / 2).max(unit);
                for (at, (start, _)) in issued.iter().enumerate() {
                    let inside = |(time, _): &&(u64, u64)| *time < start + 100 * MS;
                    let window: u64 =
                        issued[at..].iter().take_while(inside).map(|(_, bytes)| bytes).sum();
                    assert!(window <= most, "{window} of {most} at {start} with {speed} B/s");
                }
            }
        }
    }

    #[test]
    fn in_the_long_run_the_limit_is_met_within_two_in_a_hundred() {
        for (speed, units) in [
            (100 << 20, (64 << 10, 1 << 20)),
            (10 << 20, (64 << 10, 256 << 10)),
            (1 << 30, (64 << 10, 1 << 20)),
            (3 << 20, (4 << 10, 1 << 20)),
            (20 << 20, (2 << 20, 2 << 20)),
        ] {
            for late in [0, MS] {
                let issued = issue(&mut Rate::new(speed, 0), units, 100, late, Vec::new());
                let (total, wanted) = (sum(&issued), speed * 100);
                let error = total.abs_diff(wanted);
                assert!(error * 50 <= wanted, "{total} of {wanted} at {speed} B/s, late {late}");
            }
        }
    }

    #[test]
    fn copy_before_write_is_debt_that_the_background_pays() {
        let speed = 10 << 20;
        // A second's worth at once after one second, and a steady fifth from second 10 to 20.
        let mut debts = vec![(1000 * MS, speed)];
        debts.extend((0..100).map(|turn| ((10_000 + turn * 100) * MS, speed / 50)));
        let caused: u64 = debts.iter().map(|(_, bytes)| bytes).sum();
        let units = (64 << 10, 256 << 10);
        let issued = issue(&mut Rate::new(speed, 0), units, 50, 0, debts);
        let quiet = issued.iter().filter(|(at, _)| (1000 * MS..1_900 * MS).contains(at));
        assert_eq!(quiet.count(), 0, "the background waits for the debt");
        let total = sum(&issued) + caused;
        assert!(total.abs_diff(speed * 50) * 50 <= speed * 50, "{total}");
    }

    #[test]
    fn a_slow_limit_lets_one_unit_through_at_once_and_then_waits_for_its_debt() {
        let mut rate = Rate::new(1, 0);
        assert_eq!(rate.unit(1 << 20, 1 << 20), 1 << 20);
        assert_eq!(rate.delay(0), 0);
        rate.charge(1 << 20, 0);
        assert!(rate.delay(0) >= (1 << 20) * 1_000_000_000);
        rate.set_speed(0, 0);
        assert_eq!(rate.delay(0), 0);
        assert_eq!(rate.unit(1 << 16, 1 << 20), 1 << 20);
    }

    #[test]
    fn a_new_limit_holds_at_once() {
        let mut rate = Rate::new(1 << 10, 0);
        rate.unit(1 << 16, 1 << 20);
        rate.charge(1 << 20, 0);
        rate.set_speed(100 << 20, 5 * MS);
        let issued = issue(&mut rate, (64 << 10, 1 << 20), 10, 0, Vec::new());
        let wanted = 10 * (100 << 20);
        assert!(sum(&issued).abs_diff(wanted) * 50 <= wanted);
    }
}
