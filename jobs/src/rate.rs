//! A rate limit: a token bucket over slices of 100 ms.
//!
//! Order rules: a unit is issued while the bucket is not in debt, then charged; so at least one
//! unit always goes through, and the debt delays the next. The bucket holds half a slice, so that
//! no 100 ms carry more than 1.5 times their budget (plus the one unit that may exceed it).
//! Charges that ignore the limit (copy-before-write) still make debt.

use crate::limits::RATE_SLICE_NS;

/// The limit of one job. Time is an argument, in nanoseconds.
#[derive(Clone, Debug)]
pub struct Rate {
    /// Bytes per second; 0 means no limit.
    speed: u64,
    /// Bytes that may be issued now; negative: debt.
    tokens: i128,
    refilled_at: u64,
}

impl Rate {
    /// A limit of `speed` bytes per second (0: none) at time `now`.
    pub fn new(speed: u64, now: u64) -> Self {
        let mut rate = Self { speed, tokens: 0, refilled_at: now };
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

    /// Nanoseconds until a unit may be issued (0: now).
    pub fn delay(&mut self, now: u64) -> u64 {
        if self.speed == 0 {
            return 0;
        }
        self.refill(now);
        if self.tokens > 0 {
            return 0;
        }
        let missing = u128::try_from(1 - self.tokens).unwrap_or(0);
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

    /// Half a slice's budget, at least one byte.
    fn burst(&self) -> i128 {
        let slice = u128::from(self.speed) * u128::from(RATE_SLICE_NS) / 1_000_000_000;
        i128::try_from(slice / 2).unwrap_or(i128::MAX / 2).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// Issues units of `unit` bytes as fast as the limit allows for `seconds`; (time, bytes) each.
    fn issue(rate: &mut Rate, unit: u64, seconds: u64) -> Vec<(u64, u64)> {
        let mut now = 0;
        let mut issued = Vec::new();
        while now < seconds * 1000 * MS {
            match rate.delay(now) {
                0 => {
                    rate.charge(unit, now);
                    issued.push((now, unit));
                }
                wait => now += wait,
            }
        }
        issued
    }

    #[test]
    fn no_window_of_100_ms_carries_more_than_one_and_a_half_budgets_and_a_unit() {
        for (speed, unit) in [(100 << 20, 64 << 10), (10 << 20, 256 << 10), (1 << 30, 1 << 20)] {
            let issued = issue(&mut Rate::new(speed, 0), unit, 3);
            let budget = speed / 10;
            for (start, _) in &issued {
                let window: u64 = issued
                    .iter()
                    .filter(|(at, _)| (*start..start + 100 * MS).contains(at))
                    .map(|(_, bytes)| bytes)
                    .sum();
                assert!(window <= budget * 3 / 2 + unit, "{window} of {budget} at {start}");
            }
            let total: u64 = issued.iter().map(|(_, bytes)| bytes).sum();
            assert!(total >= speed * 3 - unit - budget, "{total} at {speed} B/s");
        }
    }

    #[test]
    fn a_slow_limit_lets_one_unit_through_at_once_and_then_waits_for_its_debt() {
        let mut rate = Rate::new(1, 0);
        assert_eq!(rate.delay(0), 0);
        rate.charge(1 << 20, 0);
        assert!(rate.delay(0) >= (1 << 20) * 1_000_000_000);
        rate.set_speed(0, 0);
        assert_eq!(rate.delay(0), 0);
    }

    #[test]
    fn charges_beyond_the_limit_delay_what_follows() {
        let mut rate = Rate::new(1000, 0);
        rate.charge(2000, 0);
        let wait = rate.delay(0);
        assert!((1_900 * MS..2_100 * MS).contains(&wait), "{wait}");
        assert_eq!(rate.delay(wait), 0);
    }
}
